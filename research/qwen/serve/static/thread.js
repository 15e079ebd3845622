// The conversation in the middle of the page.

import { callCards } from "./tools.js";
import { copyText, fitHeight, h, iconButton } from "./dom.js";
import { currentLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { Prose, showCopied } from "./prose.js";

/**
 * `actions`: edit(messageId, text), regenerate(), sendResults(results), enterKey().
 * The chat is shown anew by `show`; while an answer is written, only `update` runs.
 */
export class Thread {
  constructor(root, actions) {
    Object.assign(this, { root, actions, chat: null, running: false, editing: "", live: null });
  }

  show(chat, running) {
    if (this.chat?.id !== chat.id || running) this.editing = "";
    Object.assign(this, { chat, running, live: null });
    const results = new Map(chat.messages.filter(({ role }) => role === "tool").map(({ callId, content }) => [callId, content]));
    const shown = chat.messages.filter(({ role }) => role !== "tool");
    this.root.replaceChildren(...shown.map((message, at) => this.item(message, at === shown.length - 1, results)));
    const area = this.root.querySelector(".edit-field");
    if (area) fitHeight(area);
  }

  /** Shows what was added to the answer that is being written. */
  update(answer) {
    if (this.live?.answer !== answer) return;
    this.live.refresh();
  }

  item(message, last, results) {
    if (message.role === "user") return message.id === this.editing ? this.editor(message) : this.question(message);
    return this.answer(message, last, results);
  }

  question(message) {
    const edit = this.running ? null : iconButton("edit", t("edit"), () => this.edit(message.id));
    return h("article", { class: "question", "aria-label": t("you") },
      h("div", { class: "bubble", text: message.content }),
      h("div", { class: "actions" }, this.copyButton(message), edit));
  }

  edit(id) {
    this.editing = id;
    this.show(this.chat, this.running);
    const area = this.root.querySelector(".edit-field");
    area?.focus();
    area?.setSelectionRange(area.value.length, area.value.length);
  }

  editor(message) {
    const area = h("textarea", { class: "field edit-field", rows: 1, "aria-label": t("editField") }, message.content);
    const cancel = () => this.edit("");
    const submit = (event) => {
      event?.preventDefault();
      if (area.value.trim()) this.actions.edit(message.id, area.value.trim());
    };
    area.addEventListener("input", () => fitHeight(area));
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey) submit(event);
    });
    return h("form", { class: "editor", on: { submit } }, area,
      h("div", { class: "row-end" },
        h("button", { type: "button", class: "plain", text: t("cancel"), on: { click: cancel } }),
        h("button", { type: "submit", class: "primary", text: t("save") })));
  }

  answer(message, last, results) {
    const prose = new Prose();
    const rest = h("div", { class: "answer-rest" });
    const element = h("article", { class: "answer", "aria-label": t("assistant") }, prose.element, rest);
    const refresh = () => {
      prose.update(message.content);
      const streaming = message.state === "streaming";
      element.classList.toggle("streaming", streaming);
      rest.replaceChildren(...(streaming ? this.progress(message, results) : this.ending(message, last, results)));
    };
    refresh();
    if (message.state === "streaming") this.live = { answer: message, refresh };
    return element;
  }

  progress(message, results) {
    if (message.calls.length) return [callCards(message.calls, results, null)];
    if (message.content) return [];
    return [h("div", { class: "waiting", role: "img", "aria-label": t("thinking") }, h("i"), h("i"), h("i"))];
  }

  ending(message, last, results) {
    const canSend = last && !this.running && message.state === "done";
    const parts = [];
    if (message.calls.length) parts.push(callCards(message.calls, results, canSend ? this.actions.sendResults : null));
    if (message.error) parts.push(this.problem(message.error, last));
    // A problem has its own button to try again.
    const again = last && !this.running && !message.error ? iconButton("redo", t("regenerate"), () => this.actions.regenerate()) : null;
    const copy = message.content ? this.copyButton(message) : null;
    const actions = h("div", { class: "actions" }, copy, again, h("span", { class: "figures" }, ...figures(message)));
    if (actions.querySelector("button") || actions.textContent) parts.push(actions);
    return parts;
  }

  problem(error, last) {
    const texts = errorTexts(error);
    const buttons = [];
    if (isKeyProblem(error)) buttons.push(h("button", { type: "button", class: "plain", text: t("openKey"), on: { click: this.actions.enterKey } }));
    if (last && !this.running) buttons.push(h("button", { type: "button", class: "plain", text: t("retry"), on: { click: this.actions.regenerate } }));
    return h("div", { class: "problem", role: "alert" }, icon("warn"),
      h("div", { class: "problem-body" },
        texts.map((text) => h("p", { text })),
        error.requestId ? h("p", { class: "request-id", text: t("requestId", { id: error.requestId }) }) : null,
        h("div", { class: "row" }, buttons)));
  }

  copyButton(message) {
    const button = iconButton("copy", t("copy"), async () => showCopied(button, await copyText(message.content)));
    return button;
  }
}

export const isKeyProblem = (error) => error.status === 401 || error.status === 403;

/** What happened, in the reader's language, and after it what the server said. */
function errorTexts(error) {
  const own = ownText(error);
  const wait = error.wait ? t("errorWait", { seconds: error.wait }) : "";
  return [[own, wait].filter(Boolean).join(" "), error.message].filter(Boolean);
}

function ownText({ status, cut, message }) {
  if (cut) return t("errorCut");
  if (status === 401 || status === 403) return t("errorKey");
  if (status === 429) return t("errorBusy");
  if (status === 503) return t("errorUnavailable");
  if (status === 0) return t("errorNetwork");
  return message ? "" : t("errorStatus", { status });
}

function figures({ usage, seconds, state, finish }) {
  const format = new Intl.NumberFormat(currentLanguage(), { maximumFractionDigits: 1 });
  const parts = [];
  if (state === "stopped") parts.push(t("stopped"));
  else if (finish === "length") parts.push(t("cutAtLength"));
  if (usage) {
    parts.push(t("tokens", { count: format.format(usage.completion) }));
    if (seconds > 0.05 && usage.completion > 1) parts.push(t("speed", { speed: format.format((usage.completion - 1) / seconds) }));
    parts.push(t("promptTokens", { count: format.format(usage.prompt) }));
    if (usage.cached) parts.push(t("cached", { count: format.format(usage.cached) }));
  }
  return parts.map((part) => h("span", { text: part }));
}
