// Requests to the server that served the page.

/** @type {Set<(online: boolean) => void>} */
const onlineListeners = new Set();

/**
 * Call a listener after each request: with true if the server answered, else with false.
 * @param {(online: boolean) => void} listener
 */
export function onOnlineChange(listener) {
  onlineListeners.add(listener);
}

/**
 * Return the JSON at a path: by GET, or by POST if there is a body.
 * @param {string} path
 * @param {object} [body]
 * @param {AbortSignal} [signal]
 * @throws {Error} with a message for the user
 */
export async function fetchJson(path, body, signal) {
  const response = await send(path, body, signal);
  return response.json();
}

/**
 * Stream a completion.
 * @param {object} body the request for /v1/completions
 * @param {(delta: {index: number, text: string, tokens: Token[], finishReason: ?string}) => void}
 *   onDelta
 * @param {AbortSignal} [signal]
 *
 * @typedef {object} Token
 * @property {string} token
 * @property {number} logprob in nats
 * @property {[string, number][]} topLogprobs most likely first
 * @property {number} offset in characters of prompt and completion
 */
export async function streamCompletion(body, onDelta, signal) {
  const response = await send("/v1/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) handleEvent(event, onDelta);
  }
}

function handleEvent(event, onDelta) {
  const data = event.replace(/^data: /, "");
  if (data === "[DONE]") return;
  const message = JSON.parse(data);
  if (message.error) throw new Error(message.error.message);
  for (const choice of message.choices) {
    onDelta({
      index: choice.index,
      text: choice.text,
      tokens: parseTokens(choice.logprobs),
      finishReason: choice.finish_reason,
    });
  }
}

function parseTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    topLogprobs: Object.entries(logprobs.top_logprobs[i]).sort((a, b) => b[1] - a[1]),
    offset: logprobs.text_offset[i],
  }));
}

async function send(path, body, signal) {
  const options = { signal };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    onlineListeners.forEach((listener) => listener(false));
    throw new Error("The server does not answer.");
  }
  onlineListeners.forEach((listener) => listener(true));
  if (!response.ok) throw new Error(await errorMessage(response));
  return response;
}

async function errorMessage(response) {
  const content = await response.json().catch(() => ({}));
  const detail = content.error?.message ?? content.detail ?? response.statusText;
  if (typeof detail === "string") return detail;
  return detail.map((problem) => `${problem.loc?.at(-1)}: ${problem.msg}`).join("; ");
}

/**
 * Call `onChange` when a run or a model has changed, and at once; the server tells of changes.
 * @param {() => void} onChange
 */
export function watchChanges(onChange) {
  const source = new EventSource("/page/events");
  source.onmessage = onChange;
  source.onopen = () => onlineListeners.forEach((listener) => listener(true));
  source.onerror = () => {
    // A closed stream may only have reached its time limit: a request decides.
    fetchJson("/healthz").catch(() => {});
  };
}
