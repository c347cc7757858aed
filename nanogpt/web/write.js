// Write: a prompt, several continuations as they are made, and what else was likely at every place.

import { ask, complete } from "./api.js";
import { announce, el, failure, percent } from "./dom.js";
import { Likely } from "./likely.js";
import { shadeOfBits, TokenText } from "./tokens.js";

const TOP = 5; // alternatives at each place
const NATS_A_BIT = Math.log(2);
// In which order the settings are asked for; what each does comes from the program itself.
const SHOWN = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop"];
const FEW = 200; // tokens to begin with

export function writeTab(panel, model) {
  const prompt = el("textarea", { id: "prompt", rows: 3, spellcheck: false, placeholder: "How should it begin? Empty: like the beginning of a text." });
  const write = el("button", { type: "submit", className: "primary" }, "Write");
  const stop = el("button", { type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  const note = el("p", { className: "quiet" }, "Shaded: how unlikely each character was. Click one to see what else was likely there, and go on from another.");
  const cards = el("div", { className: "cards" });
  const error = el("div");
  const settings = el("div", { className: "settings-grid" });
  const form = el("form", { className: "panel write-form", onsubmit: begin },
    el("label", { htmlFor: "prompt" }, "Prompt"), prompt, el("div", { className: "buttons" }, write, stop, el("span", { className: "quiet hint" }, "Ctrl + Enter")),
    el("details", { open: innerWidth > 760 }, el("summary", {}, "Settings"), settings));  // prettier-ignore
  const empty = el("div", { className: "empty", hidden: true }, el("h2", {}, "No model yet"),
    el("p", {}, "A run has one after its first evaluation:"), el("pre", {}, "nanogpt train book.txt --open"));  // prettier-ignore
  panel.append(empty, form, error, note, cards);
  note.hidden = true;
  const likely = new Likely("Choose one: the text is written anew from here.");
  panel.append(likely.node);
  let running = null;
  let fields = null;

  prompt.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.requestSubmit());
  const withModel = (name) => ([empty.hidden, form.hidden] = [Boolean(name), !name]);
  model.changed.push(withModel);
  withModel(model.name);
  ask("/page/settings").then((schema) => (fields = makeFields(settings, schema))).catch((problem) => error.replaceChildren(failure(problem)));

  async function begin(event) {
    event.preventDefault();
    if (!fields) return;
    running?.abort();
    const { n, ...sampling } = fields.values();
    const texts = Array.from({ length: n }, (_, i) => new Continuation(i, n, prompt.value, offer));
    cards.replaceChildren(...texts.map((text) => text.node));
    note.hidden = false;
    await run(texts, { ...sampling, n, prompt: prompt.value });
  }

  /** Show what else was likely at a place of a text. */
  function offer(place, span, text) {
    const { logprob, top } = text.tokens[place];
    const taken = text.text.texts[place];
    const known = top.some(([other]) => other === taken) ? top : [...top, [taken, logprob]];
    const entries = known.map(([other, log]) => ({ text: other, share: Math.exp(log), taken: other === taken }));
    likely.open(span, "Likely here", entries, (other) => goOn(text, place, { text: other, logprob: Math.log(entries.find((entry) => entry.text === other).share) }));
  }

  /** Write one text again from a place on, where another token now stands. */
  async function goOn(text, place, token) {
    running?.abort();
    text.replace(place, token);
    const { n, ...sampling } = fields.values();
    const left = sampling.max_tokens - place - 1;
    if (left > 0) await run([text], { ...sampling, n: 1, max_tokens: left, prompt: text.all() });
  }

  async function run(texts, body) {
    const own = (running = new AbortController());
    error.replaceChildren();
    stop.hidden = false;
    texts.forEach((text) => text.begin());
    announce("Writing");
    try {
      await complete({ ...body, model: model.name, logprobs: TOP }, (piece) => texts[piece.index].take(piece), own.signal);
      announce(texts.length === 1 ? "The text is written" : `${texts.length} texts are written`);
    } catch (problem) {
      if (problem.name !== "AbortError") error.replaceChildren(failure(problem));
      else announce("Stopped");
    } finally {
      texts.forEach((text) => text.rest());
      if (running === own) [stop.hidden, running] = [true, null];
    }
  }
  return {};
}

/** One continuation of a prompt: its tokens, each with how likely it was and what else was. */
class Continuation {
  constructor(index, count, prompt, onpick) {
    this.prompt = prompt;
    this.tokens = [];
    this.text = new TokenText(`Text ${index + 1}`, {
      onpick: (i, span) => this.tokens[i].top.length && onpick(i, span, this),
      describe: (i) => `${percent(Math.exp(this.tokens[i].logprob))} likely`,
    });
    this.state = el("span", { className: "quiet" });
    const title = el("h3", {}, count > 1 ? `Text ${index + 1}` : "Text");
    this.node = el("article", { className: "panel card" }, el("div", { className: "toolbar" }, title, this.state), this.text.node);
    if (prompt) this.text.node.prepend(el("span", { className: "prompt" }, prompt));
  }

  /** The prompt and all that was written. */
  all() {
    return this.prompt + this.text.texts.join("");
  }

  begin() {
    this.node.classList.add("writing");
    this.node.setAttribute("aria-busy", "true");
    this.finish = null;
    this.end = [...this.all()].length; // characters of prompt and text so far
  }

  /** Add what is new: a token's text goes from its offset to the next one's; what stands before the first belongs to the token before it. */
  take({ text, tokens, finish }) {
    const [known, signs] = [this.tokens.length, [...text]];
    const places = [...tokens.map(({ offset }) => offset - this.end), signs.length];
    if (places[0] > 0 && known) this.text.extend(signs.slice(0, places[0]).join(""));
    this.text.add(tokens.map((_, i) => signs.slice(places[i], places[i + 1]).join("")));
    this.end += signs.length;
    this.tokens.push(...tokens);
    this.shade(known);
    this.finish = finish ?? this.finish;
    this.describe();
  }

  shade(from) {
    this.text.shade(this.tokens.map((token) => shadeOfBits(-token.logprob / NATS_A_BIT)), from);  // prettier-ignore
  }

  rest() {
    this.node.classList.remove("writing");
    this.node.removeAttribute("aria-busy");
    this.finish ??= "cancelled";
    this.describe();
  }

  describe() {
    const ends = { length: "", stop: ", ended by itself", cancelled: ", stopped" };
    this.state.textContent = `${this.tokens.length} tokens${ends[this.finish] ?? ""}`;
  }

  /** Put another token at a place, and drop what came after it. */
  replace(place, { text, logprob }) {
    const { top } = this.tokens[place];
    this.tokens.splice(place, Infinity, { logprob, top });
    this.text.cut(place);
    this.text.add([text]);
    this.shade(place);
    this.text.choose(place);
    this.text.reach(place);
  }
}

/** The settings of sampling as fields, from the schema that the program writes of them; `values()` are what they say. */
function makeFields(into, schema) {
  const fields = {};
  const add = (name, label, input, help) => {
    input.id = `setting-${name}`;
    input.setAttribute("aria-describedby", `help-${name}`);
    fields[name] = input;
    into.append(el("div", { className: "setting" }, el("label", { htmlFor: input.id }, label), input, el("p", { id: `help-${name}`, className: "quiet" }, help)));
  };
  for (const name of SHOWN.filter((known) => known in schema)) {
    const about = schema[name];
    const kind = about.anyOf?.find((one) => one.type !== "null") ?? about;
    const help = about.description.replace(/\s*\[default: .*\]$/, "");
    if (kind.type === "array") add(name, "stop", el("input", { type: "text", placeholder: "none" }), help.replace(/; may be given more than once/, "").replace(/\.?$/, "; \\n is a new line."));
    else {
      const whole = kind.type === "integer";
      const limits = { min: kind.minimum ?? kind.exclusiveMinimum ?? "", max: kind.maximum ?? "", step: whole ? 1 : "any" };
      const value = name === "max_tokens" ? FEW : about.default ?? "";
      add(name, name.replaceAll("_", " "), el("input", { type: "number", ...limits, value, placeholder: "all", required: about.default !== null }), help);
    }
  }
  add("seed", "seed", el("input", { type: "number", min: 0, step: 1, placeholder: "new each time" }), "Same seed, same text; the second text has the next one, and so on.");
  add("n", "texts", el("input", { type: "number", min: 1, max: 6, step: 1, value: 2, required: true }), "How many to write beside each other.");

  function values() {
    const found = {};
    for (const [name, input] of Object.entries(fields)) {
      if (input.value === "") continue;
      found[name] = name === "stop" ? [input.value.replaceAll("\\n", "\n")] : Number(input.value);
    }
    return found;
  }
  return { values };
}
