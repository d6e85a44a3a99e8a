// The token view: an answer as its tokens, tinted by how likely each was, with what could have stood there.

import { element } from "./markdown.js";

const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(100 * p).toFixed(0)} %` : p >= 0.0005 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

// What the interface sends of a token, as it is kept: [text, probability, alternatives, bytes where it is no whole text].
export function kept(entry) {
  const read = ({ token, logprob }) => [token, Number(Math.exp(logprob).toPrecision(4))];
  return [...read(entry), (entry.top_logprobs ?? []).map(read), ...(entry.token.includes("\ufffd") ? [entry.bytes] : [])];
}

// The text of kept tokens, also where characters are spread over several.
export function textOf(all) {
  const encoder = new TextEncoder();
  const bytes = all.flatMap(([text, , , own]) => own ?? [...encoder.encode(text)]);
  return new TextDecoder().decode(Uint8Array.from(bytes));
}

// Tokens as nodes. One of them can be reached with Tab, the arrows walk on; `choose(index, text)` goes on from another.
export function view(tokens, popover, choose) {
  const spans = tokens.map(([text, probability], index) => element("span", {
    class: "token", tabindex: index ? "-1" : "0", "data-at": index, "aria-label": `${visible(text)} ${percent(probability)}`,
  }, text));
  spans.forEach((span, index) => { span.style.setProperty("--doubt", (1 - tokens[index][1]).toFixed(3)); });
  const root = element("div", { class: "token-view" }, ...spans);
  const show = (span) => popoverFor(span, tokens[span.dataset.at], Number(span.dataset.at), popover, choose);
  root.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse" && !popover.pinned && event.target.dataset.at) show(event.target); });
  root.addEventListener("pointerleave", () => { if (!popover.pinned) close(popover); });
  root.addEventListener("focusin", (event) => { if (event.target.dataset.at) show(event.target); });
  root.addEventListener("click", (event) => { if (event.target.dataset.at) { event.target.focus(); show(event.target); popover.pinned = true; } });
  root.addEventListener("keydown", (event) => {
    const span = event.target;
    const next = { ArrowRight: span.nextElementSibling, ArrowLeft: span.previousElementSibling }[event.key];
    if (next) { span.tabIndex = -1; next.tabIndex = 0; next.focus(); event.preventDefault(); }
    if (event.key === "ArrowDown" || event.key === "Enter") { show(span); popover.pinned = true; popover.querySelector("button")?.focus(); event.preventDefault(); }
  });
  return root;
}

export function close(popover) {
  popover.hidden = true;
  popover.pinned = false;
  popover.origin?.classList.remove("open");
}

function popoverFor(span, [text, probability, alternatives], index, popover, choose) {
  close(popover);
  const row = ([other, p]) => element("button", {
    type: "button", class: other === text ? "row taken" : "row", title: other === text ? "This stands there" : "Go on from here",
    onclick: () => { if (other !== text) { close(popover); choose(index, other); } },
  }, element("span", { class: "share" }), element("span", { class: "word" }, visible(other)), element("span", { class: "p" }, percent(p)));
  const all = alternatives.some(([other]) => other === text) ? alternatives : [...alternatives, [text, probability]];
  const rows = all.map(row);
  rows.forEach((node, at) => { node.firstChild.style.width = `${100 * all[at][1]}%`; });
  popover.replaceChildren(...rows);
  popover.origin = span;
  popover.hidden = false;
  span.classList.add("open");
  const box = span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  popover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  popover.style.top = `${box.bottom + height + 12 < innerHeight ? box.bottom + 6 : Math.max(8, box.top - height - 6)}px`;
}

export function walk(popover, event) {
  const next = { ArrowDown: document.activeElement.nextElementSibling, ArrowUp: document.activeElement.previousElementSibling }[event.key];
  if (next) { next.focus(); event.preventDefault(); }
  if (event.key === "Escape") { const { origin } = popover; close(popover); origin?.focus(); close(popover); event.stopPropagation(); }
}
