// What the browser keeps: settings, the key and the chats, each chat under its own name in localStorage.
// Whatever is read back, from the storage or from a file, is checked field by field before it is used.

const SETTINGS = "qwen-page.settings";
const KEY = "qwen-page.key";
const CHAT = "qwen-page.chat.";
const VERSION = 1;

const memory = new Map(); // where the browser allows no storage, chats live as long as the page

/** Numbers a request may carry: [name, least, most, step, whole]. Empty fields are not sent. */
export const SAMPLING = [
  ["temperature", 0, 2, 0.05, false],
  ["top_p", 0, 1, 0.01, false],
  ["top_k", 0, 1000, 1, true],
  ["max_tokens", 1, 1_000_000, 1, true],
  ["seed", 0, Number.MAX_SAFE_INTEGER, 1, true],
  ["repetition_penalty", 0.1, 2, 0.05, false],
  ["presence_penalty", -2, 2, 0.1, false],
  ["frequency_penalty", -2, 2, 0.1, false],
];

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

/** An empty chat. */
export function newChat() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system: "", tools: "", toolChoice: "auto", messages: [] };
}

/** Settings as kept, with every value valid. */
export function loadSettings() {
  const kept = record(parse(read(SETTINGS)));
  const sampling = {};
  for (const [name, least, most] of SAMPLING) {
    const value = record(kept.sampling)[name];
    if (typeof value === "number" && value >= least && value <= most) sampling[name] = value;
  }
  return {
    theme: ["light", "dark"].includes(kept.theme) ? kept.theme : "auto",
    language: ["en", "zh"].includes(kept.language) ? kept.language : "",
    model: text(kept.model),
    rememberKey: kept.rememberKey === true,
    sampling,
  };
}

export const saveSettings = (settings) => write(SETTINGS, JSON.stringify(settings));

/** The key lives as long as the tab, unless the user wants it kept. */
export const loadKey = () => read(KEY) || read(KEY, "sessionStorage") || "";

export function saveKey(key, remember) {
  write(KEY, remember ? key : "");
  write(KEY, remember ? "" : key, "sessionStorage");
}

/** All chats, the latest first. */
export function loadChats() {
  const chats = [];
  for (const name of names()) {
    const chat = name.startsWith(CHAT) ? reviveChat(parse(read(name))) : null;
    if (chat) chats.push(chat);
  }
  return chats.sort((a, b) => b.updated - a.updated);
}

/** Keeps the chat; false if there is no room. */
export const saveChat = (chat) => write(CHAT + chat.id, JSON.stringify(chat));
export const removeChat = (id) => write(CHAT + id, "");
export const isChatKey = (name) => name === null || name.startsWith(CHAT);

/** The file of an export. */
export const exportText = (chats) => JSON.stringify({ format: "qwen-page-chats", version: VERSION, chats }, null, 2);

/** The chats of an exported file, with fresh ids; empty if it is none. */
export function importChats(source) {
  const file = record(parse(source));
  if (file.format !== "qwen-page-chats" || !Array.isArray(file.chats)) return [];
  return file.chats.map(reviveChat).filter(Boolean).map((chat) => ({ ...chat, id: newId() }));
}

function reviveChat(value) {
  const kept = record(value);
  if (typeof kept.id !== "string" || !/^[\w-]{1,64}$/.test(kept.id) || !Array.isArray(kept.messages)) return null;
  return {
    ...newChat(),
    id: kept.id,
    title: text(kept.title),
    created: number(kept.created) ?? Date.now(),
    updated: number(kept.updated) ?? Date.now(),
    system: text(kept.system),
    tools: text(kept.tools),
    toolChoice: text(kept.toolChoice) || "auto",
    messages: kept.messages.map(reviveMessage).filter(Boolean),
  };
}

function reviveMessage(value) {
  const kept = record(value);
  const base = { id: newId(), role: kept.role, content: text(kept.content) };
  if (kept.role === "user") return base;
  if (kept.role === "tool") return { ...base, callId: text(kept.callId), name: text(kept.name) };
  if (kept.role !== "assistant") return null;
  const calls = (Array.isArray(kept.calls) ? kept.calls : []).map(record);
  return {
    ...base,
    calls: calls.map((call) => ({ id: text(call.id), name: text(call.name), arguments: text(call.arguments) })),
    // An answer that was being written when the page was closed has been cut.
    state: ["done", "error"].includes(kept.state) ? kept.state : "stopped",
    finish: text(kept.finish),
    model: text(kept.model),
    error: kept.error ? { message: text(record(kept.error).message), requestId: text(record(kept.error).requestId) } : null,
    usage: reviveUsage(record(kept.usage)),
    seconds: number(kept.seconds) ?? 0,
  };
}

function reviveUsage(usage) {
  if (number(usage.completion) === undefined) return null;
  return { prompt: number(usage.prompt) ?? 0, completion: usage.completion, cached: number(usage.cached) ?? 0 };
}

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : undefined);
const record = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});

function parse(source) {
  try {
    return JSON.parse(source);
  } catch {
    return null;
  }
}

function read(name, where = "localStorage") {
  try {
    return window[where].getItem(name);
  } catch {
    return memory.get(where + name) ?? null;
  }
}

function names() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [...memory.keys()].filter((name) => name.startsWith("localStorage")).map((name) => name.slice(12));
  }
}

// An empty text removes the entry.
function write(name, value, where = "localStorage") {
  try {
    if (value) window[where].setItem(name, value);
    else window[where].removeItem(name);
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    if (value) memory.set(where + name, value);
    else memory.delete(where + name);
    return true;
  }
}
