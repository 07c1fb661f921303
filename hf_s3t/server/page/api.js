// Talks to the server: which key for what, and every refusal as a sentence.

const STORE = "hf-s3t-keys";
const PROBES = { answer: "v1/models", erase: "v1/erasures?limit=1", status: "v1/status" };
export const TO = { answer: "ask", erase: "forget", status: "watch" };

export class Refusal extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }

  get isUnreachable() { return this.status === 0; }
  get isDenied() { return this.status === 401 || this.status === 403; }
}

const read = () => JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
const write = (keys) => sessionStorage.setItem(STORE, JSON.stringify(keys));

export const keys = () => read();
export const forgetKey = (at) => write(read().filter((_, n) => n !== at));

// The server's answer to a request; throws a Refusal otherwise.
export async function call(scope, path, { method = "GET", body, headers = {}, signal } = {}) {
  const key = read().find((one) => one.scopes.includes(scope))?.key;
  return send(path, key, scope, { method, body, headers, signal });
}

async function send(path, key, scope, { method = "GET", body, headers = {}, signal }) {
  const all = { ...headers };
  if (key) all.Authorization = `Bearer ${key}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers: all, signal, cache: "no-store", credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. It may have been stopped, or be starting again.");
  }
  if (response.ok) return response;
  throw await refusal(response, Boolean(key), scope);
}

export async function json(scope, path, options) {
  const response = await call(scope, path, options);
  try {
    return await response.json();
  } catch {
    throw new Refusal("The connection to the server was cut in the middle of its answer.");
  }
}

const EXHAUSTED = "Exhausted: no shard has a stack left, so nothing answers until stages are grown again on what remains.";

async function refusal(response, hasKey, scope) {
  const { status } = response;
  const error = (await response.json().catch(() => ({})))?.error ?? {};
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const said = error.code === "exhausted" ? EXHAUSTED : error.message;
  return new Refusal(sentence(status, said, hasKey, scope, retryAfter),
    { status, code: error.code ?? null, retryAfter });
}

function sentence(status, said, hasKey, scope, retryAfter) {
  const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  if (status === 401) return hasKey ? "The server does not know this key." : `The server wants a key to ${TO[scope]}.`;
  if (status === 403) return said ?? `None of your keys may ${TO[scope]}.`;
  if (status === 429) return `Too many requests wait already.${again || " Try again in a moment."}`;
  if (status === 502 || status === 504) return said ?? "The server took too long, or cannot be reached through its proxy.";
  return (said ?? `The server answered ${status} and said no more.`) + (status === 503 ? again : "");
}

// What a key may, or what may be done without one: a set of scopes, and whether the server wants another key at all.
export async function scopesOf(key) {
  const tried = await Promise.all(Object.entries(PROBES).map(async ([scope, path]) => {
    try {
      await send(path, key, scope, {});
      return [scope, "may"];
    } catch (error) {
      if (error.isUnreachable) throw error;
      return [scope, error.isDenied ? "denied" : "may"];
    }
  }));
  return tried.filter(([, result]) => result === "may").map(([scope]) => scope);
}

export async function addKey(key) {
  const scopes = await scopesOf(key);
  if (scopes.length) write([...read().filter((one) => one.key !== key), { key, scopes }]);
  return scopes;
}

// The texts of a stream of server-sent events, as they come. `[DONE]` or the end of the connection ends it.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// A name for a request that may be sent again. (`randomUUID` is there for https and localhost alone.)
export function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
