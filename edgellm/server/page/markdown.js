// Markdown as DOM nodes: every piece of a model's text goes into the page as a text node, never as HTML.
//
// render(container, text) may be called again and again with a text that grows: blocks whose source has not changed
// keep their nodes, so a stream costs its last block only.

const DEPTH = 12; // quotes and lists inside each other; deeper is shown as text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function render(container, text) {
  const before = container.blocks ?? [];
  const sources = split(text.split("\n"));
  let same = 0;
  while (same < before.length && same < sources.length && before[same].source === sources[same].join("\n")) same += 1;
  for (const { node } of before.slice(same)) node.remove();
  const fresh = sources.slice(same).map((lines) => ({ source: lines.join("\n"), node: block(lines, 0) }));
  container.append(...fresh.map(({ node }) => node));
  container.blocks = [...before.slice(0, same), ...fresh];
}

// Lines to blocks, each an array of lines.
function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) { at += 1; continue; }
    const end = endOf(lines, at);
    blocks.push(lines.slice(at, end));
    at = end;
  }
  return blocks;
}

function endOf(lines, start) {
  let at = start + 1;
  const fence = FENCE.exec(lines[start]);
  if (fence) {
    while (at < lines.length && !closes(lines[at], fence[1])) at += 1;
    return Math.min(at + 1, lines.length);
  }
  if (HEADING.test(lines[start]) || RULE.test(lines[start])) return at;
  if (ITEM.test(lines[start])) {
    const indent = ITEM.exec(lines[start])[1].length;
    while (at < lines.length) {
      if (lines[at].trim()) {
        const inside = indentOf(lines[at]) > indent;
        const goesOn = inside || ITEM.test(lines[at]) || lines[at - 1].trim() !== ""; // or a lazy line of a paragraph
        if (!goesOn || (!inside && opensOther(lines[at]))) break;
      } else {
        const next = lines.slice(at, at + 3).find((line) => line.trim());
        if (next === undefined || !(indentOf(next) > indent || ITEM.test(next))) break;
      }
      at += 1;
    }
    return at;
  }
  if (QUOTE.test(lines[start])) {
    while (at < lines.length && lines[at].trim() && (QUOTE.test(lines[at]) || !opens(lines, at))) at += 1;
    return at;
  }
  if (isTable(lines, start)) {
    while (at < lines.length && lines[at].includes("|") && lines[at].trim()) at += 1;
    return at;
  }
  while (at < lines.length && lines[at].trim() && !opens(lines, at)) at += 1;
  return at;
}

const indentOf = (line) => line.length - line.trimStart().length;
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && lines[at + 1].includes("|") && DELIMITERS.test(lines[at + 1]);
const opensOther = (line) => FENCE.test(line) || HEADING.test(line) || (RULE.test(line) && !ITEM.test(line)) || QUOTE.test(line);
const opens = (lines, at) => opensOther(lines[at]) || RULE.test(lines[at]) || ITEM.test(lines[at]) || isTable(lines, at);

function block(lines, depth) {
  const first = lines[0];
  const fence = FENCE.exec(first);
  if (fence) return code(lines, fence);
  const heading = HEADING.exec(first);
  if (heading) return element(`h${Math.min(heading[1].length + 1, 6)}`, {}, ...inline(heading[2]));
  if (RULE.test(first)) return element("hr");
  if (depth < DEPTH && QUOTE.test(first)) {
    return element("blockquote", {}, ...inner(lines.map((line) => line.replace(QUOTE, "")), depth));
  }
  if (depth < DEPTH && ITEM.test(first)) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return element("p", {}, ...inline(lines.join("\n")));
}

const inner = (lines, depth) => split(lines).map((part) => block(part, depth + 1));

function code(lines, fence) {
  const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = element("button", { class: "copy", type: "button" }, "Copy");
  copy.addEventListener("click", () => {
    navigator.clipboard?.writeText(text).then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy"; }, 1500); });
  });
  return element("figure", { class: "code" },
    element("figcaption", {}, element("span", {}, fence[2].trim().split(/\s/)[0] || "text"), copy),
    element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([line.slice(item[0].length), item[0].length]);
    else {
      const [text, width] = items.at(-1);
      items[items.length - 1] = [`${text}\n${line.slice(Math.min(indentOf(line), width))}`, width];
    }
  }
  const ordered = /\d/.test(mark);
  const node = element(ordered ? "ol" : "ul", ordered && mark.slice(0, -1) !== "1" ? { start: mark.slice(0, -1) } : {});
  for (const [text] of items) {
    const loose = /\n[ \t]*\n/.test(text.trim());
    const parts = inner(text.split("\n"), depth);
    // a tight item's first paragraph stands in the item itself
    node.append(element("li", {}, ...parts.flatMap((part) => (!loose && part.tagName === "P" ? [...part.childNodes] : [part]))));
  }
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const aligns = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, tag) => element("tr", {}, ...cells(line).slice(0, aligns.length).map((cell, at) => element(tag, { class: aligns[at] }, ...inline(cell))));
  return element("div", { class: "table", tabindex: "0" },
    element("table", {}, element("thead", {}, row(lines[0], "th")), element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

const SPANS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const PLAIN = /[^\\`*_~[\]!<h\n]+/y;
const BARE = /https?:\/\/[^\s<>"'`)\]]+[^\s<>"'`)\].,;:!?]/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const LINK = /(!?)\[([^\[\]\n]{0,500})\]\(\s*<?([^\s()<>]{1,2000})>?(?:\s+"[^"\n]{0,500}")?\s*\)/y;

// Text to an array of nodes and strings. Each delimiter that has no end is looked for once only.
function inline(text, depth = 0) {
  const out = [];
  const dead = new Set();
  let plain = "";
  const flush = () => { if (plain) out.push(plain); plain = ""; };
  const at = (pattern, index) => { pattern.lastIndex = index; return pattern.exec(text); };
  for (let i = 0; i < text.length; ) {
    const run = at(PLAIN, i);
    if (run) { plain += run[0]; i += run[0].length; continue; }
    const c = text[i];
    let found;
    if (c === "\n") { flush(); plain = plain.trimEnd(); out.push(element("br")); i += 1; continue; }
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) { plain += text[i + 1]; i += 2; continue; }
    if (c === "`" && !dead.has(found = /^`+/.exec(text.slice(i, i + 64))[0])) {
      const end = text.indexOf(found, i + found.length);
      if (end > 0) {
        flush();
        out.push(element("code", {}, text.slice(i + found.length, end).replaceAll("\n", " ").replace(/^ (.*) $/, "$1")));
        i = end + found.length;
        continue;
      }
      dead.add(found);
      plain += found;
      i += found.length;
      continue;
    }
    if ((c === "[" || c === "!") && (found = at(LINK, i))) {
      flush();
      out.push(link(found[3], found[2] || found[3], depth));
      i += found[0].length;
      continue;
    }
    if ((c === "h" && (found = at(BARE, i))) || (c === "<" && (found = at(ANGLE, i)))) {
      flush();
      out.push(link(found[1] ?? found[0], found[1] ?? found[0], DEPTH));
      i += found[0].length;
      continue;
    }
    const span = depth < DEPTH && SPANS.find(([mark]) => text.startsWith(mark, i) && !dead.has(mark));
    if (span && spanOpens(text, i, span[0])) {
      const end = spanEnd(text, i + span[0].length, span[0]);
      if (end > 0) {
        flush();
        out.push(element(span[1], {}, ...inline(text.slice(i + span[0].length, end), depth + 1)));
        i = end + span[0].length;
        continue;
      }
      dead.add(span[0]);
    }
    plain += c;
    i += 1;
  }
  flush();
  return out;
}

const WORD = /[\p{L}\p{N}]/u;
const spanOpens = (text, i, mark) => /\S/.test(text[i + mark.length] ?? " ") && !(mark[0] === "_" && WORD.test(text[i - 1] ?? ""));

function spanEnd(text, from, mark) {
  for (let end = text.indexOf(mark, from + 1); end > 0; end = text.indexOf(mark, end + 1)) {
    const single = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    if (/\S/.test(text[end - 1]) && !single && !(mark[0] === "_" && WORD.test(text[end + mark.length] ?? ""))) return end;
    if (end - from > 20000) return -1;
  }
  return -1;
}

function link(address, text, depth) {
  const label = depth < DEPTH ? inline(text, DEPTH) : [text];
  let safe = false;
  try { safe = ["http:", "https:", "mailto:"].includes(new URL(address).protocol); } catch { /* relative or broken */ }
  return safe ? element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...label) : element("span", {}, ...label);
}
