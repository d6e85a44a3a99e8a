// The chats of this browser: each a tree of messages, kept in localStorage within a bound.
//
// A node is {id, parent, role, text, reasoning, tokens, figures}; the children of a node are the versions of what
// follows it, and `chosen` says which one is shown. tokens: [[text, probability, [[text, probability], ...]], ...].

const KEY = "edgellm";
const MAX_CHARACTERS = 2_000_000; // browsers keep 5 MB for an origin, two bytes a character
const MAX_CHATS = 100;
const MAX_TITLE = 60;

export const DEFAULTS = {
  system: "", temperature: "", top_p: "", top_k: "", min_p: "", repeat_penalty: "", max_tokens: "", seed: "",
  theme: "auto", logprobs: true,
};

const id = () => crypto.getRandomValues(new Uint32Array(2)).reduce((text, part) => text + part.toString(36), "n");

export class Chats {
  constructor(storage = window.localStorage) {
    this.storage = storage;
    let kept = {};
    try { kept = JSON.parse(storage.getItem(KEY) ?? "{}") ?? {}; } catch { /* damaged or forbidden: begin anew */ }
    this.settings = { ...DEFAULTS, ...kept.settings };
    this.model = typeof kept.model === "string" ? kept.model : "";
    this.all = Array.isArray(kept.all) ? kept.all.filter((chat) => chat?.nodes?.root) : [];
    this.current = this.all.find((chat) => chat.id === kept.current) ?? this.begin();
  }

  begin() {
    const empty = this.all.find((chat) => Object.keys(chat.nodes).length === 1);
    const chat = empty ?? { id: id(), title: "New chat", nodes: { root: { id: "root", children: [], chosen: 0 } } };
    this.all = [chat, ...this.all.filter((other) => other !== chat)];
    this.current = chat;
    return chat;
  }

  remove(chat) {
    this.all = this.all.filter((other) => other !== chat);
    if (chat === this.current) this.current = this.all[0] ?? this.begin();
  }

  add(parent, role, text) {
    const { nodes } = this.current;
    const node = { id: id(), parent, role, text, reasoning: "", tokens: [], figures: null, children: [], chosen: 0 };
    nodes[node.id] = node;
    nodes[parent].chosen = nodes[parent].children.push(node.id) - 1;
    if (parent === "root" && role === "user") this.current.title = text.trim().slice(0, MAX_TITLE) || "New chat";
    this.all = [this.current, ...this.all.filter((chat) => chat !== this.current)];
    return node;
  }

  turn(node, step) {
    const parent = this.current.nodes[node.parent];
    parent.chosen = Math.min(Math.max(parent.chosen + step, 0), parent.children.length - 1);
  }

  // The messages that are shown, from the first to the last.
  path(upTo = null) {
    const { nodes } = this.current;
    const shown = [];
    for (let node = nodes.root; node.children.length; ) {
      node = nodes[node.children[node.chosen]];
      if (!node) break;
      shown.push(node);
      if (node.id === upTo) break;
    }
    return shown;
  }

  save() {
    this.all.splice(MAX_CHATS);
    for (let attempt = 0; attempt < MAX_CHATS + 2; attempt += 1) {
      const text = JSON.stringify({ settings: this.settings, model: this.model, current: this.current.id, all: this.all });
      try {
        if (text.length <= MAX_CHARACTERS) { this.storage.setItem(KEY, text); return true; }
      } catch { /* the browser's own bound is lower */ }
      if (!this.makeRoom()) return false;
    }
    return false;
  }

  // The tokens of the oldest chat that has any go first, then whole chats; the open one goes last.
  makeRoom() {
    const oldest = this.all.filter((chat) => chat !== this.current).reverse();
    for (const chat of [...oldest, this.current]) {
      const heavy = Object.values(chat.nodes).filter((node) => node.tokens?.length);
      for (const node of heavy) node.tokens = [];
      if (heavy.length) return true;
    }
    if (oldest.length) this.remove(oldest[0]);
    return oldest.length > 0;
  }
}
