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

/** The texts that the model writes, as they come: `onNews({index, text, tokens: [{logprob, top, offset}], finish})`, offsets in characters of prompt and text. */
export async function complete(body, onNews, signal) {
  const response = await send("/v1/completions", { ...body, stream: true }, signal);
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      for (const { index, text, logprobs, finish_reason } of message.choices) onNews({ index, text, tokens: tokensOf(logprobs), finish: finish_reason });
    }
  }
}

function tokensOf(logprobs) {
  return (logprobs?.tokens ?? []).map((_, i) => ({
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i]).sort((a, b) => b[1] - a[1]),
    offset: logprobs.text_offset[i],
  }));
}

async function send(path, body, signal) {
  const options = { signal };
  if (body !== undefined) Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
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
