// The settings at the right: connection, system prompt, sampling, tools. Every change holds at once.

import { byId, fitHeight, h, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { SAMPLING } from "./store.js";
import { EXAMPLE, parseTools } from "./tools.js";

/**
 * `actions`: change(settings), changeChat(chat), changeKey(key, remember), close().
 * `settings` is set from outside when something else changes them.
 */
export class Panel {
  constructor(actions) {
    Object.assign(this, { actions, root: byId("panel") });
  }

  /** Builds the panel anew: for another chat, another language, another list of models. */
  show({ settings, chat, models, key }) {
    Object.assign(this, { settings, chat });
    this.root.replaceChildren(
      h("div", { class: "panel-head" }, h("h2", { text: t("settings") }), iconButton("close", t("closeSettings"), () => this.actions.close())),
      h("div", { class: "panel-body" }, this.connection(models, key), this.behaviour(), this.sampling(), this.tools()));
    if (!this.root.hidden) for (const area of this.root.querySelectorAll("textarea")) fitHeight(area);
  }

  connection(models, key) {
    const model = h("select", { id: "model", class: "field", on: { change: () => this.set({ model: model.value }) } });
    this.modelField = model;
    this.showModels(this.settings, models);
    const field = h("input", { id: "api-key", class: "field", type: "password", value: key, placeholder: t("apiKeyHint"), autocomplete: "off", spellcheck: "false" });
    const keep = h("input", { id: "remember-key", type: "checkbox", checked: this.settings.rememberKey });
    const changed = () => this.actions.changeKey(field.value.trim(), keep.checked);
    field.addEventListener("change", changed);
    keep.addEventListener("change", changed);
    // In a form, so that password managers know what the field is.
    return h("form", { class: "group", on: { submit: (event) => event.preventDefault() } }, h("h3", { text: t("connection") }),
      labelled("model", t("model"), model),
      labelled("api-key", t("apiKey"), field),
      h("label", { class: "check" }, keep, h("span", { text: t("rememberKey") })));
  }

  /** Shows another list of models, and nothing else anew: the user may be typing in another field. */
  showModels(settings, models) {
    this.settings = settings;
    const options = models.map((name) => h("option", { value: name, selected: name === settings.model, text: name }));
    this.modelField.disabled = !models.length;
    this.modelField.replaceChildren(...(options.length ? options : [h("option", { text: t("noModel") })]));
  }

  behaviour() {
    const area = h("textarea", { id: "system", class: "field", rows: 3, placeholder: t("systemHint") }, this.chat.system);
    area.addEventListener("input", () => {
      fitHeight(area);
      this.setChat({ system: area.value });
    });
    return group("behaviour", labelled("system", t("system"), area), note("systemNote"));
  }

  sampling() {
    const fields = SAMPLING.map((entry) => this.number(entry));
    const reset = () => {
      for (const field of fields) field.querySelector("input").value = "";
      this.set({ sampling: {} });
    };
    const button = h("button", { type: "button", class: "text-button", text: t("resetSampling"), on: { click: reset } });
    return group("sampling", h("div", { class: "grid" }, fields), h("div", { class: "row-between" }, note("samplingNote"), button));
  }

  number([name, least, most, step, whole]) {
    const value = this.settings.sampling[name];
    const field = h("input", {
      id: `sampling-${name}`, class: "field", type: "number", min: least, max: most, step: whole ? 1 : "any",
      value: value ?? "", placeholder: t("byServer"), inputmode: least < 0 ? "text" : "decimal",
    });
    const problem = h("span", { class: "field-problem", role: "alert" });
    field.addEventListener("keydown", (event) => stepBy(event, field, step, least, most));
    field.addEventListener("input", () => {
      const next = Number(field.value);
      const empty = field.value === "" && !field.validity.badInput;
      const good = empty || (!field.validity.badInput && next >= least && next <= most && (!whole || Number.isInteger(next)));
      field.setAttribute("aria-invalid", String(!good));
      problem.textContent = good ? "" : t("outOfRange", { name: t(name), min: least, max: most });
      const sampling = { ...this.settings.sampling };
      if (good && !empty) sampling[name] = next;
      else delete sampling[name]; // what the field shows in red is not sent
      this.set({ sampling });
    });
    return h("div", { class: "number" }, labelled(field.id, t(name), field), problem);
  }

  tools() {
    const area = h("textarea", { id: "tools", class: "field mono", rows: 3, spellcheck: "false", placeholder: "[]" }, this.chat.tools);
    const verdict = h("p", { class: "hint", id: "tools-verdict", role: "status" });
    const choice = h("select", { id: "tool-choice", class: "field" });
    const refresh = () => {
      const { tools, problem } = parseTools(area.value);
      const names = tools.map((tool) => tool.function.name);
      area.setAttribute("aria-invalid", String(Boolean(problem)));
      verdict.classList.toggle("bad", Boolean(problem));
      verdict.textContent = problem ? t("toolsBad", { reason: problem }) : names.length ? t("toolsCount", { count: names.length, names: names.join(", ") }) : t("toolsNote");
      const choices = [["auto", t("choiceAuto")], ["none", t("choiceNone")], ["required", t("choiceRequired")], ...names.map((name) => [name, t("choiceNamed", { name })])];
      choice.replaceChildren(...choices.map(([value, text]) => h("option", { value, text, selected: value === this.chat.toolChoice })));
      choice.disabled = !names.length;
      fitHeight(area);
    };
    const changed = () => {
      this.setChat({ tools: area.value });
      refresh();
    };
    area.addEventListener("input", changed);
    choice.addEventListener("change", () => this.setChat({ toolChoice: choice.value }));
    const insert = () => {
      area.value = JSON.stringify(EXAMPLE, null, 2);
      changed();
    };
    refresh();
    return group("tools", labelled("tools", t("toolsField"), area), verdict,
      labelled("tool-choice", t("toolChoice"), choice),
      h("button", { type: "button", class: "text-button", text: t("toolsExample"), on: { click: insert } }));
  }

  set(change) {
    this.settings = { ...this.settings, ...change };
    this.actions.change(this.settings);
  }

  setChat(change) {
    Object.assign(this.chat, change);
    this.actions.changeChat(this.chat);
  }
}

// Arrow keys step by what suits the value, while any number may be typed.
function stepBy(event, field, step, least, most) {
  const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (!direction) return;
  event.preventDefault();
  const start = field.value === "" ? Math.max(least, 0) : Number(field.value) + direction * step;
  field.value = String(Number(Math.min(most, Math.max(least, start)).toFixed(4)));
  field.dispatchEvent(new Event("input"));
}

const group = (name, ...children) => h("section", { class: "group" }, h("h3", { text: t(name) }), children);
const labelled = (id, text, field) => h("div", { class: "labelled" }, h("label", { for: id, text }), field);
const note = (name) => h("p", { class: "hint", text: t(name) });
