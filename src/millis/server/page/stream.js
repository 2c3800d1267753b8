// Asking the server: the answer's chunks as they come, or the error it gave.

/** The server's refusal or failure. `code` and `predicted_ms` are its own; status 0: it was not reached. */
export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? "");
    this.status = status;
    this.code = error?.code ?? null;
    this.predicted_ms = error?.predicted_ms ?? null;
  }

  get refusal() {
    return this.status === 503 || this.status === 429;
  }
}

/** Headers that every request carries. */
function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The response to a GET. Raises ServerError. */
export async function get(path, key) {
  const response = await reached(fetch(path, { headers: headers(key), cache: "no-store" }));
  if (!response.ok) throw await failure(response);
  return response;
}

/** The chunks of a streamed chat completion. Raises ServerError; AbortError once `signal` is given. */
export async function* chat(body, key, signal) {
  const response = await reached(fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  }));
  if (!response.ok) throw await failure(response);
  for await (const data of events(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error);
    yield chunk;
  }
  throw new ServerError(0, null);
}

async function* events(reader) {
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) return;
    const whole = (rest + value).split(/\r?\n\r?\n/);
    rest = whole.pop();
    for (const event of whole) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function reached(fetching) {
  try {
    return await fetching;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, null);
  }
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new ServerError(response.status, body?.error ?? null);
}
