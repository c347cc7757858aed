// What the page asks its server. Everything comes from where the page came from.

const listeners = new Set();

/** Be told whether the server answers: `listener(true)` or `listener(false)`. */
export function onReach(listener) {
  listeners.add(listener);
}

/** The JSON at a path; with a body, what is answered to it. Errors: an Error whose message is for a person. */
export async function ask(path, body, signal) {
  const response = await send(path, body, signal);
  return response.json();
}

/** The pieces of text that the model writes, as they come: `onPiece({index, text, tokens: [{text, logprob, top}], finish})`. */
export async function complete(body, onPiece, signal) {
  const response = await send("/v1/completions", { ...body, stream: true }, signal);
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      for (const part of message.choices) onPiece({ index: part.index, text: part.text, tokens: tokensOf(part.logprobs), finish: part.finish_reason });
    }
  }
}

function tokensOf(logprobs) {
  if (!logprobs) return [];
  return logprobs.tokens.map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

async function send(path, body, signal) {
  const headers = {};
  if (sessionStorage.getItem("key")) headers.Authorization = `Bearer ${sessionStorage.getItem("key")}`;
  const options = { headers, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    listeners.forEach((listener) => listener(false));
    throw new Error("The server does not answer.");
  }
  listeners.forEach((listener) => listener(true));
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  const said = await response.json().catch(() => ({}));
  const detail = said.error?.message ?? said.detail ?? response.statusText;
  return typeof detail === "string" ? detail : detail.map((problem) => `${problem.loc?.at(-1)}: ${problem.msg}`).join("; ");
}
