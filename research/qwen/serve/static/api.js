// Requests to the server this page came from. Addresses are relative to the page, so a proxy's path prefix works.

const at = (path) => new URL(path, document.baseURI);

/** A failed request: `status` is 0 if there was no answer, `wait` the seconds of Retry-After. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", requestId = "", wait = 0, cut = false } = {}) {
    super(message);
    Object.assign(this, { status, code: String(code ?? ""), requestId, wait, cut });
  }
}

/** "ready", "loading" or "offline". */
export async function health() {
  try {
    const response = await fetch(at("health"), { cache: "no-store" });
    if (response.ok) return "ready";
    return response.status === 503 ? "loading" : "offline";
  } catch {
    return "offline";
  }
}

/** Names of the models; ApiError if the server refuses. */
export async function models(key) {
  const response = await send("v1/models", { headers: headersWith(key) });
  const list = (await response.json()).data;
  return Array.isArray(list) ? list.map((entry) => String(entry.id)) : [];
}

/**
 * Streams a chat completion: `onChunk` gets each parsed event. Ends after [DONE].
 * Throws ApiError, or the AbortError of `signal`.
 */
export async function streamChat(body, key, signal, onChunk) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { ...headersWith(key), "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  const requestId = response.headers.get("x-request-id") ?? "";
  let done = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        done = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "", { status: response.status, code: chunk.error.code, requestId });
      onChunk(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(String(error.message ?? error), { requestId, cut: true });
  }
  if (!done) throw new ApiError("", { requestId, cut: true });
}

/** The data of each server-sent event of a byte stream; comments and other fields are passed over. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its empty line is not complete
      // A \r at the very end may be half of a \r\n: it waits for the next piece.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closing early tells the server to stop
  }
}

const headersWith = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function send(path, options) {
  let response;
  try {
    response = await fetch(at(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not the server's own envelope: a proxy answered. The status has to do.
  }
  return new ApiError(typeof error.message === "string" ? error.message : "", {
    status: response.status,
    code: error.code,
    requestId: response.headers.get("x-request-id") ?? "",
    wait: Math.max(0, Math.ceil(Number(response.headers.get("retry-after")) || 0)),
  });
}
