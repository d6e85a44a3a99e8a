// The page: a chat with the models that this server has. It talks to no other machine and runs nothing that a model says.

import * as api from "./api.js";
import { Chats, DEFAULTS } from "./chats.js";
import { element, render } from "./markdown.js";
import * as tokens from "./tokens.js";

const $ = (id) => document.getElementById(id);
const chats = new Chats();
const popover = $("tokens");
let running = null; // {controller, node} of the answer that is being written
let key = sessionStorage.getItem("edgellm-key") ?? "";

const icon = (name) => {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
};
const button = (name, label, onclick, more = {}) => element("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));

// -- messages -----------------------------------------------------------------------------------------------------

const shown = new Map(); // node id -> its article

function showTalk() {
  tokens.close(popover);
  const path = chats.path();
  shown.clear();
  $("messages").replaceChildren(...path.map((node) => {
    const article = element("article", { class: node.role, "aria-label": node.role === "user" ? "You" : "Model" });
    shown.set(node.id, article);
    fill(article, node);
    return article;
  }));
  $("welcome").hidden = path.length > 0;
  showChats();
}

function fill(article, node) {
  const live = running?.node === node;
  if (node.role === "user") article.replaceChildren(element("div", { class: "bubble" }, node.text), bar(node));
  else {
    const thought = element("details", { class: "reasoning", hidden: true }, element("summary", {}, "Thinking"), element("div"));
    const body = element("div", { class: "body" });
    article.replaceChildren(thought, body, element("p", { class: "figures" }), ...(live ? [] : [bar(node)]));
    update(article, node);
  }
}

// What grows while an answer is written; called for each frame at most.
function update(article, node) {
  const [thought, body, figures] = article.children;
  thought.hidden = !node.reasoning;
  if (node.reasoning) render(thought.lastChild, node.reasoning);
  if (node.showsTokens && node.tokens.length) body.replaceChildren(tokens.view(node.tokens, popover, (index, text) => goOn(node, index, text)));
  else render(body, node.text);
  if (running?.node === node) body.classList.add("live");
  else body.classList.remove("live");
  figures.textContent = figuresOf(node);
}

function bar(node) {
  const { children, chosen } = chats.current.nodes[node.parent];
  const turn = (step) => () => { if (!running) { chats.turn(node, step); chats.save(); showTalk(); } };
  const versions = children.length < 2 ? [] : [element("span", { class: "versions" },
    button("left", "Earlier version", turn(-1), { disabled: chosen === 0 }), `${chosen + 1} of ${children.length}`,
    button("right", "Later version", turn(1), { disabled: chosen === children.length - 1 }))];
  const own = node.role === "user" ? [button("edit", "Edit and ask again", () => edit(node))] : [
    button("again", "Answer again", () => answer(node.parent)),
    ...(node.tokens.length ? [button("tokens", "Tokens by probability", () => { node.showsTokens = !node.showsTokens; forget(node); }, { "aria-pressed": String(!!node.showsTokens) })] : [])];
  return element("div", { class: "bar" }, ...versions, button("copy", "Copy", () => copy(node.text)), ...own);
}

function forget(node) {
  const article = shown.get(node.id);
  tokens.close(popover);
  fill(article, node);
  article.querySelector("[aria-pressed]")?.focus();
}

function figuresOf({ figures }) {
  if (!figures) return "";
  const { n, tps, prompt, reused, first, finish } = figures;
  const reasons = { length: "stopped at the limit", context_full: "context full", cancelled: "stopped", error: "broken off" };
  return [
    n ? `${n} tokens` : "", tps ? `${tps.toFixed(tps < 10 ? 1 : 0)} per second` : "",
    prompt ? `prompt ${prompt}${reused ? `, ${reused} reused` : ""}` : "", first ? `first after ${first.toFixed(first < 1 ? 2 : 1)} s` : "",
    reasons[finish] ?? "",
  ].filter(Boolean).join(" · ");
}

const copy = (text) => navigator.clipboard?.writeText(text).then(() => say("Copied"));
const say = (text) => { $("status").textContent = text; };

function notice(text) {
  $("notice").hidden = !text;
  $("notice").replaceChildren(text, ...(text ? [button("close", "Dismiss", () => notice(""))] : []));
}

// -- asking -------------------------------------------------------------------------------------------------------

function ask(text) {
  const last = chats.path().at(-1);
  answer(chats.add(last?.id ?? "root", "user", text).id);
}

function edit(node) {
  if (running) return;
  const area = element("textarea", { class: "edit", "aria-label": "Edit the message", rows: "1" });
  area.value = node.text;
  const finish = () => showTalk();
  const send = () => { const text = area.value.trim(); if (text) answer(chats.add(node.parent, "user", text).id); };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); finish(); }
  });
  area.addEventListener("input", () => grow(area));
  shown.get(node.id).replaceChildren(area, element("div", { class: "bar" },
    element("button", { type: "button", class: "plain", onclick: finish }, "Cancel"), element("button", { type: "button", class: "primary", onclick: send }, "Send")));
  grow(area);
  area.focus();
}

// The answer again up to one token, another in its place, and on from there.
function goOn(node, index, text) {
  if (running) return;
  const before = node.tokens.slice(0, index);
  const said = tokens.textOf(before) + text;
  const chosen = node.tokens[index][2].find(([other]) => other === text);
  answer(node.parent, { text: said, reasoning: node.reasoning, tokens: [...before, [text, chosen?.[1] ?? 0, node.tokens[index][2]]] });
}

function hasModel() {
  if (!$("model").value) notice("There is no model to answer.");
  return Boolean($("model").value);
}

async function answer(parent, begun = null) {
  if (running || !hasModel()) return;
  notice("");
  const said = chats.path(parent).filter(({ role, text }) => role === "user" || text); // an answer that never came is none
  const messages = said.map(({ role, text }) => ({ role, content: text }));
  if (chats.settings.system.trim()) messages.unshift({ role: "system", content: chats.settings.system });
  const node = Object.assign(chats.add(parent, "assistant", ""), begun ?? {}, { showsTokens: false });
  if (begun) messages.push({ role: "assistant", content: node.text, ...(node.reasoning ? { reasoning_content: node.reasoning } : {}) });
  running = { controller: new AbortController(), node };
  node.figures = { began: performance.now() };
  showTalk();
  setRunning(true);
  toEnd(true);
  let finish = "stop";
  try {
    const request = { model: $("model").value, messages, settings: chats.settings, key, signal: running.controller.signal, goesOn: begun !== null };
    for await (const event of api.chat(request)) finish = take(node, event) ?? finish;
  } catch (error) {
    finish = error.name === "AbortError" ? "cancelled" : "error";
    if (finish === "error") failed(error);
  }
  end(node, finish);
}

function take(node, event) {
  node.reasoning += event.reasoning;
  node.text += event.text;
  if (!event.reasoning) for (const entry of event.tokens) node.tokens.push(tokens.kept(entry));
  const { figures } = node;
  if ((event.text || event.reasoning) && !figures.first) figures.first = (performance.now() - figures.began) / 1000;
  if (event.usage) {
    figures.n = event.usage.completion_tokens;
    figures.prompt = event.usage.prompt_tokens;
    figures.reused = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  if (event.timings) figures.tps = event.timings.predicted_per_second;
  draw(node);
  return event.finish;
}

let frame = 0;
function draw(node) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const article = shown.get(node.id);
    if (!article || !running) return;
    const stays = atEnd();
    update(article, node);
    if (stays) toEnd();
    saveSoon();
  });
}

function end(node, finish) {
  const { figures } = node;
  const seconds = (performance.now() - figures.began) / 1000 - (figures.first ?? 0);
  figures.n ??= node.tokens.length;
  figures.tps ??= figures.n > 1 && seconds > 0 ? (figures.n - 1) / seconds : 0;
  figures.finish = finish;
  running = null;
  setRunning(false);
  chats.save();
  const stays = atEnd();
  showTalk();
  if (stays) toEnd();
  say(finish === "cancelled" ? "Stopped" : finish === "error" ? "The answer broke off" : "The answer is complete");
}

function failed(error) {
  notice(error.status === undefined ? "The server cannot be reached. Is it running?" : error.message);
  if (error.status === 401) { openDrawer("settings"); $("settings-form").elements.key.focus(); }
}

const stop = () => running?.controller.abort();

function setRunning(on) {
  $("send").replaceChildren(icon(on ? "stop" : "send"));
  $("send").setAttribute("aria-label", on ? "Stop" : "Send");
  document.body.classList.toggle("running", on);
  if (on) say("The model writes");
}

// -- scrolling and saving ---------------------------------------------------------------------------------------------

const atEnd = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
const toEnd = () => { $("talk").scrollTop = $("talk").scrollHeight; };
let saving = 0;
function saveSoon() { saving ||= setTimeout(() => { saving = 0; chats.save(); }, 1000); }
addEventListener("pagehide", () => chats.save());

// -- the list of chats ------------------------------------------------------------------------------------------------

function showChats() {
  $("chat-list").replaceChildren(...chats.all.filter((chat) => Object.keys(chat.nodes).length > 1).map((chat) => element("li", {},
    element("button", { type: "button", class: "plain", "aria-current": chat === chats.current ? "true" : undefined, onclick: () => { open(chat); } }, chat.title),
    button("trash", `Delete ${chat.title}`, () => { stop(); chats.remove(chat); chats.save(); showTalk(); }))));
}

function open(chat) {
  stop();
  chats.current = chat;
  chats.save();
  closeDrawers();
  showTalk();
  toEnd();
}

// -- settings ---------------------------------------------------------------------------------------------------------

const FIELDS = [
  ["system", "System prompt", "textarea"],
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.05 }],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: 0, max: 100000, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["repeat_penalty", "Repeat penalty", { min: 0, max: 5, step: 0.05 }],
  ["max_tokens", "Longest answer", { min: 1, step: 1, placeholder: "no limit" }],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }],
];

function showSettings() {
  const form = $("settings-form");
  const field = (name, label, control) => element("label", { class: control.type === "checkbox" ? "check" : "" }, element("span", {}, label), control);
  const rows = FIELDS.map(([name, label, kind]) => field(name, label, kind === "textarea"
    ? element("textarea", { name, rows: "4" })
    : element("input", { name, type: "number", inputmode: "decimal", placeholder: "default", ...kind })));
  const theme = element("select", { name: "theme" }, ...["auto", "light", "dark"].map((value) => element("option", { value }, value)));
  form.replaceChildren(...rows,
    field("theme", "Colours", theme),
    field("logprobs", "Keep the tokens and their alternatives", element("input", { name: "logprobs", type: "checkbox" })),
    field("key", "API key, where the server wants one", element("input", { name: "key", type: "password", autocomplete: "off" })),
    element("button", { type: "button", class: "plain", onclick: () => { Object.assign(chats.settings, DEFAULTS); readSettings(); applyTheme(); chats.save(); } }, "Back to the defaults"));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    if (target.name === "key") { key = target.value; sessionStorage.setItem("edgellm-key", key); loadModels(); return; }
    chats.settings[target.name] = target.type === "checkbox" ? target.checked : target.value;
    applyTheme();
    saveSoon();
  });
  readSettings();
}

function readSettings() {
  for (const control of $("settings-form").elements) {
    if (control.name === "key") control.value = key;
    else if (control.type === "checkbox") control.checked = chats.settings[control.name];
    else if (control.name) control.value = chats.settings[control.name];
  }
}

function applyTheme() {
  if (chats.settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chats.settings.theme;
}

// -- drawers ----------------------------------------------------------------------------------------------------------

const DRAWERS = { chats: "open-chats", settings: "open-settings" };

function openDrawer(name) {
  const wasOpen = !$(name).hidden;
  closeDrawers();
  if (wasOpen) return;
  $(name).hidden = false;
  $(DRAWERS[name]).setAttribute("aria-expanded", "true");
  $(name).querySelector("button, input, textarea, select")?.focus({ preventScroll: true });
}

function closeDrawers() {
  for (const [name, opener] of Object.entries(DRAWERS)) {
    $(name).hidden = true;
    $(opener).setAttribute("aria-expanded", "false");
  }
}

// -- models and start -------------------------------------------------------------------------------------------------

async function loadModels() {
  let names = [];
  try { names = await api.models(key); notice(""); } catch (error) { failed(error); }
  $("model").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chats.model)) $("model").value = chats.model;
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function submit() {
  const text = $("prompt").value.trim();
  if (running) { stop(); return; }
  if (!text || !hasModel()) return;
  $("prompt").value = "";
  grow($("prompt"));
  ask(text);
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("prompt").addEventListener("input", () => grow($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) submit(); }
});
$("model").addEventListener("change", () => { chats.model = $("model").value; chats.save(); });
$("new-chat").addEventListener("click", () => { stop(); chats.begin(); chats.save(); closeDrawers(); showTalk(); $("prompt").focus(); });
for (const [name, opener] of Object.entries(DRAWERS)) $(opener).addEventListener("click", () => openDrawer(name));
$("talk").addEventListener("pointerdown", closeDrawers);
$("talk").addEventListener("scroll", () => tokens.close(popover), { passive: true });
popover.addEventListener("keydown", (event) => tokens.walk(popover, event));
document.addEventListener("pointerdown", ({ target }) => { if (!popover.hidden && !popover.contains(target) && !target.dataset?.at) tokens.close(popover); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const drawer = Object.keys(DRAWERS).find((name) => !$(name).hidden);
  if (!popover.hidden) tokens.close(popover);
  else if (drawer) { closeDrawers(); $(DRAWERS[drawer]).focus(); }
  else stop();
});

applyTheme();
showSettings();
showTalk();
toEnd();
await loadModels();
if (matchMedia("(pointer: fine)").matches) $("prompt").focus();
