// From a chat to a request, and from the pieces of a streamed answer back into the chat. No view in here.

import { ApiError, streamChat } from "./api.js";
import { newId } from "./store.js";
import { parseTools } from "./tools.js";

/** The body of a request: only what the user set, so that the server's defaults hold for the rest. */
export function requestBody(chat, settings, model) {
  const body = { messages: wireMessages(chat), stream: true, stream_options: { include_usage: true }, ...settings.sampling };
  if (model) body.model = model;
  const { tools } = parseTools(chat.tools);
  if (tools.length) {
    body.tools = tools;
    body.tool_choice = toolChoice(chat.toolChoice, tools);
  }
  return body;
}

function toolChoice(choice, tools) {
  if (choice === "none" || choice === "required") return choice;
  const named = tools.some((tool) => tool.function.name === choice);
  return named ? { type: "function", function: { name: choice } } : "auto";
}

/** Messages as the server takes them. Calls without a result are left out, as are answers that never began. */
export function wireMessages(chat) {
  const answered = new Set(chat.messages.filter((message) => message.role === "tool").map((message) => message.callId));
  const wire = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const message of chat.messages) {
    if (message.role === "user") wire.push({ role: "user", content: message.content });
    else if (message.role === "tool") wire.push({ role: "tool", tool_call_id: message.callId, content: message.content });
    else {
      const calls = message.calls.filter((call) => answered.has(call.id));
      if (!message.content && !calls.length) continue;
      wire.push(assistantMessage(message.content, calls));
    }
  }
  return wire;
}

function assistantMessage(content, calls) {
  if (!calls.length) return { role: "assistant", content };
  const wireCalls = calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role: "assistant", content: content || null, tool_calls: wireCalls };
}

/** An answer that has not begun. */
export function newAnswer(model) {
  return { id: newId(), role: "assistant", content: "", calls: [], state: "streaming", finish: "", model, error: null, usage: null, seconds: 0 };
}

/** Puts one event of the stream into the answer. */
export function addChunk(answer, chunk) {
  if (chunk.model) answer.model = chunk.model;
  if (chunk.usage) answer.usage = usageOf(chunk.usage);
  for (const choice of chunk.choices ?? []) {
    if (choice.index) continue; // one answer is asked for
    const delta = choice.delta ?? {};
    if (typeof delta.content === "string") answer.content += delta.content;
    for (const piece of delta.tool_calls ?? []) addCallPiece(answer.calls, piece);
    if (choice.finish_reason) answer.finish = choice.finish_reason;
  }
}

// Id and name come once, with the first piece of a call; the arguments come in pieces.
function addCallPiece(calls, piece) {
  const index = Number.isInteger(piece.index) ? piece.index : calls.length;
  while (calls.length <= index && calls.length < 128) calls.push({ id: newId(), name: "", arguments: "" });
  const call = calls[index];
  if (!call) return;
  if (piece.id) call.id = piece.id;
  if (piece.function?.name) call.name = piece.function.name;
  if (piece.function?.arguments) call.arguments += piece.function.arguments;
}

function usageOf(usage) {
  return {
    prompt: usage.prompt_tokens ?? 0,
    completion: usage.completion_tokens ?? 0,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
  };
}

/**
 * Fills `answer` from the server until it ends, is stopped by `signal` or fails; never throws.
 * `onChange` is called after every piece and once at the end, when `answer.state` is done, stopped or error.
 */
export async function fillAnswer(answer, body, key, signal, onChange) {
  let firstPiece = 0;
  try {
    await streamChat(body, key, signal, (chunk) => {
      addChunk(answer, chunk);
      if (!firstPiece && (answer.content || answer.calls.length)) firstPiece = performance.now();
      onChange(answer);
    });
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "error";
    if (answer.state === "error") answer.error = plainError(error);
  }
  if (firstPiece) answer.seconds = (performance.now() - firstPiece) / 1000;
  onChange(answer);
}

function plainError(error) {
  if (!(error instanceof ApiError)) return { message: String(error.message ?? error), requestId: "" };
  const { message, status, code, requestId, wait, cut } = error;
  return { message, status, code, requestId, wait, cut };
}

/** A title from the first message: its first line, cut between characters, never inside one. */
export function titleFrom(text, most = 40) {
  const line = text.trim().split("\n", 1)[0];
  const characters = [...new Intl.Segmenter().segment(line)].map((part) => part.segment);
  return characters.length > most ? `${characters.slice(0, most).join("").trimEnd()}…` : line;
}
