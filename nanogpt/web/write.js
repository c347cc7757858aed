// Write: a prompt, several continuations as they are made, and what else was likely at every place.

import { ask, complete } from "./api.js";
import { announce, el, failure, percent, waitingFor } from "./dom.js";
import { Likely } from "./likely.js";
import { noModel } from "./source.js";
import { shadesOfBits, TokenText } from "./tokens.js";

const TOP = 5; // alternatives at each place
const NATS_A_BIT = Math.log(2);
// In which order the settings are asked for; what each does comes from the program itself.
const SHOWN = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop"];
const PART = /^bytes:(\\x[0-9a-f]{2})+$/; // of a character, as the server writes it
const FEW = 200; // tokens to begin with

export function writeTab(panel, model) {
  new Writer(panel, model);
  return {};
}

class Writer {
  running = null; // what stops the texts that are being written
  fields = null; // of the settings, once the server has told which there are
  prompt = el("textarea", { id: "prompt", rows: 3, spellcheck: false, placeholder: "How should it begin? Empty: like the beginning of a text." });
  stop = el("button", { type: "button", hidden: true, onclick: () => this.running?.abort() }, "Stop");
  note = el("p", { className: "quiet", hidden: true }, "Shaded: how unlikely each character was. Click one to see what else was likely there, and go on from another.");
  cards = el("div", { className: "cards" });
  error = el("div");
  waiting = el("span", { className: "quiet", role: "status" });
  likely = new Likely("Choose one: the text is written anew from here.");

  constructor(panel, model) {
    this.model = model;
    const settings = el("div", { className: "settings-grid" });
    const form = el("form", { className: "panel", onsubmit: (event) => (event.preventDefault(), this.begin()) },
      el("label", { htmlFor: "prompt" }, "Prompt"), this.prompt,
      el("div", { className: "buttons" }, el("button", { type: "submit", className: "primary" }, "Write"), this.stop, el("span", { className: "quiet hint" }, "Ctrl + Enter"), this.waiting),
      el("details", { open: innerWidth > 760 }, el("summary", {}, "Settings"), settings));  // prettier-ignore
    this.prompt.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.requestSubmit());
    const empty = noModel();
    const meet = (name) => ([empty.hidden, form.hidden] = [Boolean(name), !name]);
    model.changed.push(meet);
    meet(model.name);
    panel.append(empty, form, this.error, this.note, this.cards, this.likely.node);
    ask("/page/settings").then((schema) => (this.fields = makeFields(settings, schema))).catch((problem) => this.error.replaceChildren(failure(problem)));
  }

  async begin() {
    if (!this.fields) return;
    this.running?.abort();
    const { n, ...sampling } = this.fields.values();
    const prompt = this.prompt.value;
    const texts = Array.from({ length: n }, (_, i) => new Continuation(i, n, prompt, (place, span, text) => this.offer(place, span, text)));
    this.cards.replaceChildren(...texts.map((text) => text.node));
    this.note.hidden = false;
    await this.run(texts, { ...sampling, n, prompt });
  }

  /** Show what else was likely at a place of a text. */
  offer(place, span, text) {
    const { token, logprob, top } = text.tokens[place];
    const known = top.some(([other]) => other === token) ? top : [...top, [token, logprob]];
    const entries = known.map(([other, log]) => ({ text: text.spelled(place, other), share: Math.exp(log), taken: other === token, choice: [other, log] }));
    this.likely.open(span, "Likely here", entries, (entry) => this.goOn(text, place, entry.text, ...entry.choice));
  }

  /** Write one text again from a place on, where another token now stands. */
  async goOn(text, place, written, token, logprob) {
    this.running?.abort();
    text.replace(place, written, token, logprob);
    const { n, ...sampling } = this.fields.values();
    const left = sampling.max_tokens - place - 1;
    if (left > 0) await this.run([text], { ...sampling, n: 1, max_tokens: left, prompt: text.all() });
  }

  /** Have the texts continued. */
  async run(texts, body) {
    const own = (this.running = new AbortController());
    this.error.replaceChildren();
    this.stop.hidden = false;
    texts.forEach((text) => text.begin());
    announce("Writing");
    let begun = null;
    waitingFor(new Promise((resolve) => (begun = resolve)), this.waiting);
    const take = (news) => {
      begun();
      texts[news.index].take(news);
    };
    try {
      await complete({ ...body, model: this.model.name, logprobs: TOP }, take, own.signal);
      announce(texts.length === 1 ? "The text is written" : `${texts.length} texts are written`);
    } catch (problem) {
      if (problem.name !== "AbortError") this.error.replaceChildren(failure(problem));
      else announce("Stopped");
    } finally {
      begun();
      texts.forEach((text) => text.rest());
      if (this.running === own) [this.stop.hidden, this.running] = [true, null];
    }
  }
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

  /** Shade the tokens from a place on; a character that began before it belongs to them. */
  shade(from) {
    while (from > 0 && this.text.texts[from - 1] === "") from--;
    const bits = this.tokens.slice(from).map((token) => -token.logprob / NATS_A_BIT);
    this.text.shade(shadesOfBits(this.text.texts.slice(from), bits), from);
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

  /** What a token would write at a place: a part of a character, which comes as "bytes:\\xe6", with the parts before it; null where that is no character yet. */
  spelled(place, token) {
    if (!PART.test(token)) return token;
    let first = place;
    while (first > 0 && this.text.texts[first - 1] === "") first--;
    const parts = [...this.tokens.slice(first, place).map((before) => before.token), token];
    const bytes = parts.flatMap((part) => part.match(/[0-9a-f]{2}(?=\\|$)/g).map((hex) => parseInt(hex, 16)));
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
    } catch {
      return null;
    }
  }

  /** Put another token at a place, where `text` then stands, and drop what came after it. */
  replace(place, text, token, logprob) {
    const { top } = this.tokens[place];
    this.tokens.splice(place, Infinity, { token, logprob, top });
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
