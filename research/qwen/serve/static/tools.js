// Tools of a chat: the functions the user defined, and the cards on which calls are shown and answered.

import { fitHeight, h } from "./dom.js";
import { t } from "./i18n.js";

export const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Current weather of a city",
      parameters: {
        type: "object",
        properties: { city: { type: "string", description: "Name of the city" } },
        required: ["city"],
      },
    },
  },
];

/** The functions in the user's text: `tools` in OpenAI's form, `problem` as text if it is not usable. */
export function parseTools(source) {
  if (!source.trim()) return { tools: [], problem: "" };
  let list;
  try {
    list = JSON.parse(source);
  } catch (error) {
    return { tools: [], problem: error.message };
  }
  if (!Array.isArray(list)) return { tools: [], problem: t("toolsNotList") };
  // Bare functions, the older form, are wrapped.
  const tools = list.map((entry) => (entry?.function ? entry : { type: "function", function: entry }));
  const bad = tools.findIndex((tool) => typeof tool.function?.name !== "string" || !tool.function.name);
  return bad < 0 ? { tools, problem: "" } : { tools: [], problem: t("toolsNoName", { number: bad + 1 }) };
}

const ONE_LINE = 64;

/** Arguments as readable lines if they are JSON, else as the model wrote them. */
export function prettyArguments(source) {
  try {
    const lines = JSON.stringify(JSON.parse(source), null, 2);
    const line = lines.replace(/\n\s*/g, " "); // line ends inside of texts are written \n, so none is lost
    return line.length <= ONE_LINE ? line : lines;
  } catch {
    return source;
  }
}

/**
 * The cards of an answer's calls. `results` maps call ids to texts; where all calls have one, they are only shown.
 * `send(results)` is called with the texts the user wrote; null while no answer is possible.
 */
export function callCards(calls, results, send) {
  const open = calls.filter((call) => !results.has(call.id));
  const fields = new Map();
  const cards = calls.map((call) => {
    const card = h("section", { class: "call", "aria-label": `${t("toolCall")}: ${call.name}` },
      h("h3", { class: "call-name", icon: "tool" }, h("code", { text: call.name })),
      call.arguments ? h("pre", { class: "call-arguments", tabindex: 0, "aria-label": t("toolArguments") }, prettyArguments(call.arguments)) : null);
    if (results.has(call.id)) card.append(shownResult(results.get(call.id)));
    else if (send) card.append(resultField(call, fields));
    return card;
  });
  if (!send || !open.length) return h("div", { class: "calls" }, cards);
  const submit = h("button", { type: "submit", class: "primary", text: t("sendResults") });
  const onSubmit = (event) => {
    event.preventDefault();
    send(new Map(open.map((call) => [call.id, fields.get(call.id).value])));
  };
  return h("form", { class: "calls", on: { submit: onSubmit } }, cards, h("div", { class: "row-end" }, submit));
}

function shownResult(text) {
  return h("div", { class: "call-result" }, h("span", { class: "tag", text: t("toolResultTitle") }), h("pre", { tabindex: 0 }, text));
}

function resultField(call, fields) {
  const area = h("textarea", {
    rows: 1,
    class: "field",
    "aria-label": t("toolResult", { name: call.name }),
    placeholder: t("toolResultHint", { name: call.name }),
    on: { input: () => fitHeight(area), keydown: submitOnEnter },
  });
  fields.set(call.id, area);
  return area;
}

function submitOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}
