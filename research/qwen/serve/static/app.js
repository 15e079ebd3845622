// The page: its state, and what happens on each action. Views are told what to show; they never change the state.

import * as api from "./api.js";
import { fillAnswer, newAnswer, requestBody, titleFrom } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, download, h } from "./dom.js";
import { currentLanguage, setLanguage, t } from "./i18n.js";
import { Panel } from "./panel.js";
import * as shell from "./shell.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { SUGGESTIONS } from "./strings.js";
import { isKeyProblem, Thread } from "./thread.js";

const state = {
  settings: store.loadSettings(),
  key: store.loadKey(),
  chats: store.loadChats(),
  chat: store.newChat(),
  models: [],
  server: "loading",
  run: null, // {chat, answer, abort} while an answer is written
};

const thread = new Thread(byId("thread"), { edit, regenerate, sendResults, enterKey: () => openPanel("api-key") });
const sidebar = new Sidebar({ open: openChat, rename, exportOne, remove });
const panel = new Panel({ change: changeSettings, changeChat: keep, changeKey, close: () => shell.showPanel(false) });
const composer = new Composer({ send, stop });

function showAll() {
  showChat();
  showPanel();
  composer.show(Boolean(state.run));
  shell.showModel(state);
  shell.showTheme(state.settings.theme);
  byId("toggle-language").textContent = t("languageShort");
}

function showChat() {
  const { chat } = state;
  const empty = !chat.messages.length;
  byId("welcome").hidden = !empty;
  if (empty) showSuggestions();
  thread.show(chat, Boolean(state.run));
  byId("chat-title").textContent = chat.title;
  document.title = chat.title ? `${chat.title} · Qwen` : "Qwen";
  sidebar.show(state.chats, chat.id);
}

function showPanel() {
  panel.show(state);
}

function showSuggestions() {
  const make = (text) => h("button", { type: "button", class: "suggestion", text, on: { click: () => send(text) } });
  byId("suggestions").replaceChildren(...SUGGESTIONS[currentLanguage()].map(make));
}

// --- chats ---

function openChat(id) {
  const chat = state.chats.find((candidate) => candidate.id === id);
  if (!chat || chat === state.chat) return shell.showSidebar(false);
  stop();
  state.chat = chat;
  afterSwitch();
}

function newChat() {
  stop();
  state.chat = store.newChat();
  afterSwitch();
}

function afterSwitch() {
  shell.showSidebar(false);
  showChat();
  showPanel();
  shell.scrollToEnd(true);
  composer.focus();
}

/** Keeps a chat that has something in it, as the latest if `touched`. */
function keep(chat, touched = false) {
  if (!chat.messages.length) return;
  if (touched) chat.updated = Date.now();
  if (!state.chats.includes(chat)) state.chats.push(chat);
  state.chats.sort((a, b) => b.updated - a.updated);
  if (!store.saveChat(chat)) shell.toast(t("storageFull"));
}

function rename(id, title) {
  const chat = state.chats.find((candidate) => candidate.id === id);
  if (!chat) return;
  chat.title = title;
  keep(chat);
  showChat();
}

function remove(id) {
  const chat = state.chats.find((candidate) => candidate.id === id);
  if (!chat) return;
  if (state.run?.chat === chat) stop();
  state.chats = state.chats.filter((other) => other !== chat);
  store.removeChat(id);
  if (state.chat === chat) newChat();
  else showChat();
  shell.toast(t("deleted", { title: chat.title }), t("undo"), () => {
    keep(chat);
    showChat();
  });
}

function exportOne(id) {
  const chats = state.chats.filter((chat) => chat.id === id);
  download(`qwen-chat-${id}.json`, store.exportText(chats));
}

async function importFile(input) {
  const file = input.files[0];
  input.value = "";
  const chats = file ? store.importChats(await file.text()) : [];
  for (const chat of chats) keep(chat);
  showChat();
  shell.toast(chats.length ? t("imported", { count: chats.length }) : t("importBad"));
}

// --- asking ---

function send(text) {
  if (state.run || !text.trim()) return;
  ask({ id: store.newId(), role: "user", content: text.trim() });
  composer.clear();
}

function edit(id, text) {
  const at = state.chat.messages.findIndex((message) => message.id === id);
  if (state.run || at < 0) return;
  state.chat.messages.length = at;
  ask({ id, role: "user", content: text });
}

function regenerate() {
  const { messages } = state.chat;
  if (state.run || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  ask();
}

function sendResults(results) {
  if (state.run) return;
  const calls = state.chat.messages.at(-1).calls;
  ask(...[...results].map(([callId, content]) => {
    const name = calls.find((call) => call.id === callId).name;
    return { id: store.newId(), role: "tool", callId, name, content };
  }));
}

/** Adds messages to the chat and fills the answer to them. */
async function ask(...messages) {
  const { chat, settings } = state;
  chat.messages.push(...messages);
  if (!chat.title) chat.title = titleFrom(chat.messages[0].content);
  const body = requestBody(chat, settings, settings.model);
  const run = { chat, answer: newAnswer(settings.model), abort: new AbortController() };
  chat.messages.push(run.answer);
  state.run = run;
  keep(chat, true);
  composer.show(true);
  showChat();
  shell.scrollToEnd(true);
  const refresh = shell.oncePerFrame(() => {
    if (state.run !== run) return;
    thread.update(run.answer);
    shell.scrollToEnd(false);
  });
  await fillAnswer(run.answer, body, state.key, run.abort.signal, refresh);
  finish(run);
}

function finish(run) {
  if (state.run === run) state.run = null;
  keepUnlessRemoved(run.chat);
  if (state.chat !== run.chat) return;
  composer.show(Boolean(state.run));
  const { scrollTop } = byId("scroller");
  showChat();
  byId("scroller").scrollTop = scrollTop;
  shell.scrollToEnd(false);
  announce(run.answer);
  const field = byId("thread").querySelector(".calls textarea");
  if (field) field.focus();
}

function keepUnlessRemoved(chat) {
  if (state.chats.includes(chat)) keep(chat, true);
}

function announce(answer) {
  const key = { done: "answered", stopped: "answerStopped", error: "answerFailed" }[answer.state];
  byId("announcer").textContent = t(key);
  if (answer.error && isKeyProblem(answer.error)) state.server = "key";
  if (answer.error && answer.error.status === 0 && !answer.error.cut) watchServer();
  shell.showModel(state);
}

/** Ends the answer that is being written; what is there of it stays. */
function stop() {
  const { run } = state;
  if (!run) return;
  state.run = null;
  run.abort.abort();
  composer.show(false);
}

// --- settings ---

function changeSettings(settings) {
  state.settings = settings;
  store.saveSettings(settings);
  shell.showModel(state);
}

function changeKey(key, remember) {
  state.key = key;
  store.saveKey(key, remember);
  changeSettings({ ...state.settings, rememberKey: remember });
  panel.settings = state.settings;
  watchServer();
}

function switchTheme() {
  const next = { auto: "light", light: "dark", dark: "auto" }[state.settings.theme];
  changeSettings({ ...state.settings, theme: next });
  panel.settings = state.settings;
  shell.showTheme(next);
}

function switchLanguage() {
  const next = currentLanguage() === "en" ? "zh" : "en";
  changeSettings({ ...state.settings, language: next });
  setLanguage(next);
  byId("announcer").textContent = "";
  showAll();
}

function openPanel(field) {
  shell.showPanel(true);
  showPanel();
  byId(field)?.focus();
}

// --- the server ---

let watching = 0;

/** Asks until the server is ready, then for its models. */
async function watchServer() {
  clearTimeout(watching);
  state.server = await api.health();
  if (state.server === "ready") await readModels();
  else watching = setTimeout(watchServer, state.server === "loading" ? 1000 : 4000);
  shell.showModel(state);
}

async function readModels() {
  try {
    state.models = await api.models(state.key);
  } catch (error) {
    state.server = isKeyProblem(error) ? "key" : "offline";
    return;
  }
  if (state.models.length && !state.models.includes(state.settings.model)) {
    state.settings = { ...state.settings, model: state.models[0] };
  }
  panel.showModels(state.settings, state.models);
}

// --- start ---

setLanguage(state.settings.language || (document.documentElement.lang.startsWith("zh") ? "zh" : "en"));
shell.start({
  newChat,
  switchTheme,
  switchLanguage,
  openPanel: () => openPanel(),
  stop,
  focusPrompt: () => composer.focus(),
  exportAll: () => download("qwen-chats.json", store.exportText(state.chats)),
  importFile,
});
window.addEventListener("storage", (event) => {
  // Another tab wrote. The chat open here stays as it is.
  if (!store.isChatKey(event.key)) return;
  const own = state.chat;
  state.chats = store.loadChats().map((chat) => (chat.id === own.id ? own : chat));
  sidebar.show(state.chats, own.id);
});
showAll();
composer.focus();
watchServer();
