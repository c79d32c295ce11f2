"use strict";
// The page of `flashclient serve --ui`: a chat, and what the model and its weightd do meanwhile.

const STATE_MS = 1000;
const by = (id) => document.getElementById(id);
const chat = { messages: [], asking: null };
let before = null; // the state one poll ago

function made(kind, text, parent) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

// --- the server ---

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options) {
  const answer = await fetch(path, { headers: headers(), ...options });
  if (answer.ok) return answer;
  let message = `status ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not of this server */ }
  if (answer.status === 401) by("keys").hidden = false;
  throw new Error(message);
}

async function* events(answer) {
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const data = held.slice(0, end).replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function notice(text) {
  by("notice").textContent = text;
  by("notice").hidden = !text;
}

// --- the chat ---

async function send(text) {
  notice("");
  const messages = chat.messages; // New begins another list
  messages.push({ role: "user", content: text });
  show("user").textContent = text;
  const article = show("assistant"), begin = performance.now();
  let said = "", tokens = 0, usage = null, first = 0;
  chat.asking = new AbortController();
  busy(true);
  try {
    const body = { model: by("models").value, messages, stream: true, stream_options: { include_usage: true } };
    const answer = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: chat.asking.signal });
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const piece = event.choices[0]?.delta.content;
      if (!piece) continue;
      first = first || performance.now();
      tokens += 1;
      said += piece;
      render(article, said);
      scroll();
    }
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  }
  chat.asking = null;
  busy(false);
  if (chat.messages !== messages) return;
  if (said) {
    messages.push({ role: "assistant", content: said });
    note(article, usage, tokens, first - begin, performance.now() - first);
  } else {
    messages.pop();
    article.previousSibling?.remove();
    article.remove();
    if (!by("text").value) by("text").value = text;
  }
  scroll();
}

function note(article, usage, pieces, firstMs, restMs) {
  const tokens = usage ? usage.completion_tokens : pieces;
  const parts = [`${tokens} tokens`, `first after ${(firstMs / 1000).toFixed(2)} s`];
  if (tokens > 1 && restMs > 0) parts.push(`${((tokens - 1) * 1000 / restMs).toFixed(1)} tokens/s`);
  const kept = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`prompt of ${usage.prompt_tokens}` + (kept ? `, ${kept} kept` : ""));
  if (!usage) parts.push("stopped");
  made("footer", parts.join(" · "), article);
}

function show(role) {
  const article = made("article", "", by("messages"));
  article.className = role;
  scroll();
  return article;
}

function scroll() {
  const box = by("messages");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 200) box.scrollTop = box.scrollHeight;
}

function busy(is) {
  by("send").hidden = is;
  by("stop").hidden = !is;
  by("models").disabled = is;
}

function reset() {
  chat.asking?.abort();
  chat.messages = [];
  by("messages").replaceChildren();
  notice("");
  by("text").focus();
}

// --- markdown: elements are made one by one, so nothing that a model says becomes HTML ---

function render(parent, text) {
  parent.replaceChildren();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length;) at = block(parent, lines, at);
}

function block(parent, lines, at) {
  const line = lines[at];
  const fence = line.match(/^\s*(```+|~~~+)/);
  if (fence) {
    let end = at + 1;
    while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
    made("code", lines.slice(at + 1, end).join("\n"), made("pre", undefined, parent));
    return end + 1;
  }
  const heading = line.match(/^(#{1,6})\s+(.*)/);
  if (heading) {
    inline(made(`h${Math.min(5, heading[1].length + 2)}`, undefined, parent), heading[2]);
    return at + 1;
  }
  const item = /^\s*(?:([-*+])|\d+[.)])\s+(.*)/;
  if (item.test(line)) {
    const ordered = !line.match(item)[1], list = made(ordered ? "ol" : "ul", undefined, parent);
    if (ordered) list.start = parseInt(line, 10) || 1;
    for (; at < lines.length && item.test(lines[at]); at += 1) inline(made("li", undefined, list), lines[at].match(item)[2]);
    return at;
  }
  if (/^\s*>/.test(line)) {
    let end = at;
    while (end < lines.length && /^\s*>/.test(lines[end])) end += 1;
    inline(made("blockquote", undefined, parent), lines.slice(at, end).map((one) => one.replace(/^\s*>\s?/, "")).join("\n"));
    return end;
  }
  if (!line.trim()) return at + 1;
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !/^\s*(```|~~~|#{1,6}\s|[-*+]\s|\d+[.)]\s|>)/.test(lines[end])) end += 1;
  inline(made("p", undefined, parent), lines.slice(at, end).join("\n"));
  return end;
}

const SPANS = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(\n)/g;

function inline(parent, text) {
  let at = 0;
  for (const found of text.matchAll(SPANS)) {
    parent.append(text.slice(at, found.index));
    const [whole, code, strong, emphasised, label, address, end] = found;
    if (code) made("code", code, parent);
    else if (strong) inline(made("strong", undefined, parent), strong);
    else if (emphasised) inline(made("em", undefined, parent), emphasised);
    else if (end) made("br", undefined, parent);
    else Object.assign(made("a", label, parent), { href: address, rel: "noopener noreferrer", target: "_blank" });
    at = found.index + whole.length;
  }
  parent.append(text.slice(at));
}

// --- what the model does ---

const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(4, Math.max(0, Math.floor(Math.log2(Math.max(1, count)) / 10)));
  return `${(count / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
};

async function poll() {
  if (document.hidden) return;
  try {
    const state = await (await ask("ui/state")).json();
    const model = state.models.find((one) => one.name === by("models").value) || state.models[0];
    const old = before?.name === model.name ? before : null;
    if (old) rates(model, old);
    before = model;
    by("load").textContent = `${model.running}, ${model.waiting}`;
    by("kept").textContent = model.kept_tokens.toLocaleString();
    by("mode").textContent = model.mode;
    memory(state.weightd);
  } catch { by("speed").textContent = "no answer"; }
}

function rates(model, old) {
  const tokens = model.made_tokens - old.made_tokens, steps = model.steps - old.steps;
  const hits = model.hits - old.hits, misses = model.misses - old.misses;
  by("speed").textContent = `${(tokens / (model.at_s - old.at_s)).toFixed(1)} tokens/s`;
  // What a client holds it does not ask for.
  if (hits + misses > 0) by("hits").textContent = `${(100 * hits / (hits + misses)).toFixed(1)} %`;
  else if (steps > 0) by("hits").textContent = "all, and held";
  if (tokens > 0) by("read").textContent = bytes((model.read_bytes - old.read_bytes) / tokens);
  const waits = model.layer_waits_s.map((wait, layer) => 1000 * (wait - old.layer_waits_s[layer]) / Math.max(1, steps));
  const most = Math.max(...waits, 1), box = by("layers");
  while (box.children.length < waits.length) made("i", undefined, box);
  while (box.children.length > waits.length) box.lastChild.remove();
  waits.forEach((wait, layer) => {
    box.children[layer].style.background = `rgba(var(--wait), ${(0.9 * wait / most).toFixed(2)})`;
    box.children[layer].title = `layer ${layer}: waited ${wait.toFixed(2)} ms a step`;
  });
  box.setAttribute("aria-label", `${waits.filter((wait) => wait > 0.1).length} of ${waits.length} layers waited`);
}

function memory(weightd) {
  const parts = [["pool", weightd.dram_pool_bytes], ["resident", weightd.dram_resident_bytes], ["tables", weightd.dram_tables_bytes]];
  by("memory").replaceChildren();
  for (const [name, size] of parts) {
    const part = made("i", undefined, by("memory"));
    part.style.width = `${100 * size / weightd.dram_limit_bytes}%`;
    part.style.background = `var(--${name})`;
    part.title = `${name}: ${bytes(size)}`;
  }
  const used = parts.reduce((sum, [, size]) => sum + size, 0);
  const text = `${bytes(used)} of ${bytes(weightd.dram_limit_bytes)}: ` + parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ");
  by("memory-text").textContent = text;
  by("memory").setAttribute("aria-label", text);
}

// --- the beginning ---

async function begin() {
  try {
    const listed = (await (await ask("v1/models")).json()).data;
    by("models").replaceChildren(...listed.map((one) => new Option(one.id)));
    by("keys").hidden = true;
    notice("");
  } catch (error) { return notice(error.message); }
  await poll();
}

by("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("text").value.trim();
  if (!text || chat.asking) return;
  by("text").value = "";
  send(text);
});
by("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("asking").requestSubmit();
  }
});
by("stop").addEventListener("click", () => chat.asking?.abort());
by("new").addEventListener("click", reset);
by("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", by("key").value.trim());
  begin();
});
begin();
setInterval(poll, STATE_MS);
