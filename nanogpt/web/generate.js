// Generate: a prompt, its completions as they stream, and the alternatives to each token.

import { AlternativesPopover } from "./alternatives.js";
import { fetchJson, streamCompletion } from "./api.js";
import { announce, el, errorNotice, fromTemplate, submitOnCtrlEnter, withSpinner } from "./dom.js";
import { formatPercent } from "./format.js";
import { decodeByteTokens, isByteToken, shadesFromBits } from "./series.js";
import { TokenText } from "./token_text.js";

const NUM_ALTERNATIVES = 5;
const NATS_PER_BIT = Math.log(2);
const DEFAULT_TOKENS = 200;
const NOTE =
  "Shaded by surprisal: the deeper the colour, the less likely the token. " +
  "Click a token to see the alternatives and continue from another one.";

/** The tab. */
export class GenerateTab {
  constructor(panel, model) {
    this.model = model;
    this.running = null; // the AbortController of the current request
    this.fields = null;
    const { node, refs } = fromTemplate("generate-form");
    this.form = node;
    this.refs = refs;
    this.empty = fromTemplate("no-model").node;
    this.note = el("p", { className: "text-muted", hidden: true }, NOTE);
    this.cards = el("div", { className: "cards" });
    this.error = el("div");
    this.alternatives = new AlternativesPopover("Choose a token to continue from it.");
    refs.details.open = innerWidth > 760;
    refs.stop.addEventListener("click", () => this.running?.abort());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    submitOnCtrlEnter(refs.prompt, this.form);
    model.addEventListener("change", () => this.onModelChange());
    this.onModelChange();
    panel.append(
      this.empty,
      this.form,
      this.error,
      this.note,
      this.cards,
      this.alternatives.node,
    );
    this.loadSettings();
  }

  onModelChange() {
    this.empty.hidden = Boolean(this.model.name);
    this.form.hidden = !this.model.name;
  }

  async loadSettings() {
    try {
      const schema = await fetchJson("/page/settings");
      this.fields = new SettingFields(this.refs.settings, schema);
    } catch (error) {
      this.error.replaceChildren(errorNotice(error));
    }
  }

  async start() {
    if (!this.fields) return;
    this.running?.abort();
    const { n, ...sampling } = this.fields.values();
    const prompt = this.refs.prompt.value;
    const completions = Array.from({ length: n }, (_, i) => {
      const title = n > 1 ? `Sample ${i + 1}` : "Sample";
      const completion = new Completion(title, prompt, (index, span) => {
        this.showAlternatives(completion, index, span);
      });
      return completion;
    });
    this.cards.replaceChildren(...completions.map((completion) => completion.node));
    this.note.hidden = false;
    await this.run(completions, { ...sampling, n, prompt });
  }

  showAlternatives(completion, index, span) {
    const { token, logprob, topLogprobs } = completion.tokens[index];
    const isListed = topLogprobs.some(([other]) => other === token);
    const listed = isListed ? topLogprobs : [...topLogprobs, [token, logprob]];
    const entries = listed.map(([other, log]) => ({
      text: completion.tokenText(index, other),
      probability: Math.exp(log),
      isChosen: other === token,
      token: other,
      logprob: log,
    }));
    this.alternatives.open(span, "Alternatives", entries, (entry) => {
      this.branchFrom(completion, index, entry);
    });
  }

  /** Continue one completion from another token at an index. */
  async branchFrom(completion, index, { text, token, logprob }) {
    this.running?.abort();
    completion.replaceToken(index, text, token, logprob);
    const sampling = this.fields.values();
    const tokensLeft = sampling.max_tokens - index - 1;
    if (tokensLeft <= 0) return;
    const prompt = completion.fullText();
    await this.run([completion], { ...sampling, n: 1, max_tokens: tokensLeft, prompt });
  }

  async run(completions, body) {
    const controller = new AbortController();
    this.running = controller;
    this.error.replaceChildren();
    this.refs.stop.hidden = false;
    completions.forEach((completion) => completion.start());
    announce("Generating");
    let onFirstDelta = null;
    const firstDelta = new Promise((resolve) => {
      onFirstDelta = resolve;
    });
    withSpinner(firstDelta, this.refs.status);
    const onDelta = (delta) => {
      onFirstDelta();
      completions[delta.index].appendDelta(delta);
    };
    const request = { ...body, model: this.model.name, logprobs: NUM_ALTERNATIVES };
    try {
      await streamCompletion(request, onDelta, controller.signal);
      announce(completions.length === 1 ? "Done" : `${completions.length} samples done`);
    } catch (error) {
      if (error.name === "AbortError") announce("Stopped");
      else this.error.replaceChildren(errorNotice(error));
    } finally {
      onFirstDelta();
      completions.forEach((completion) => completion.finish());
      if (this.running === controller) {
        this.refs.stop.hidden = true;
        this.running = null;
      }
    }
  }
}

/** One completion: its tokens, their log-probabilities and alternatives. */
class Completion {
  constructor(title, prompt, onpick) {
    this.prompt = prompt;
    /** @type {import("./api.js").Token[]} */
    this.tokens = [];
    this.finishReason = null;
    this.end = 0; // characters of prompt and completion so far
    this.text = new TokenText(title, {
      onpick: (i, span) => {
        if (this.tokens[i].topLogprobs.length) onpick(i, span);
      },
      describe: (i) => `${formatPercent(Math.exp(this.tokens[i].logprob))} likely`,
    });
    this.state = el("span", { className: "text-muted" });
    const toolbar = el("div", { className: "toolbar" }, el("h3", {}, title), this.state);
    this.node = el("article", { className: "panel card" }, toolbar, this.text.node);
    if (prompt) this.text.node.prepend(el("span", { className: "prompt" }, prompt));
  }

  fullText() {
    return this.prompt + this.text.texts.join("");
  }

  start() {
    this.node.classList.add("is-generating");
    this.node.setAttribute("aria-busy", "true");
    this.finishReason = null;
    this.end = [...this.fullText()].length;
  }

  /**
   * Append a delta. A token's text spans from its offset to the next token's; text before the
   * first offset belongs to the previous token.
   */
  appendDelta({ text, tokens, finishReason }) {
    const firstNew = this.tokens.length;
    const chars = [...text];
    const offsets = [...tokens.map(({ offset }) => offset - this.end), chars.length];
    if (offsets[0] > 0 && firstNew) this.text.extendLast(chars.slice(0, offsets[0]).join(""));
    this.text.append(tokens.map((_, i) => chars.slice(offsets[i], offsets[i + 1]).join("")));
    this.end += chars.length;
    this.tokens.push(...tokens);
    this.shadeFrom(firstNew);
    this.finishReason = finishReason ?? this.finishReason;
    this.showState();
  }

  /** Shade the tokens from an index on, including the start of its character. */
  shadeFrom(index) {
    const start = this.characterStart(index);
    const bits = this.tokens.slice(start).map((token) => -token.logprob / NATS_PER_BIT);
    this.text.shade(shadesFromBits(this.text.texts.slice(start), bits), start);
  }

  /** Return the index of the first token of the character that ends at or after an index. */
  characterStart(index) {
    let start = index;
    while (start > 0 && this.text.texts[start - 1] === "") start -= 1;
    return start;
  }

  finish() {
    this.node.classList.remove("is-generating");
    this.node.removeAttribute("aria-busy");
    this.finishReason ??= "cancelled";
    this.showState();
  }

  showState() {
    const endings = { stop: ", ended by the model", cancelled: ", stopped" };
    const ending = endings[this.finishReason] ?? "";
    this.state.textContent = `${this.tokens.length} tokens${ending}`;
  }

  /** Return the text that a token would add at an index; null for part of a character. */
  tokenText(index, token) {
    if (!isByteToken(token)) return token;
    const before = this.tokens.slice(this.characterStart(index), index);
    return decodeByteTokens([...before.map((other) => other.token), token]);
  }

  /** Replace the token at an index, and drop everything after it. */
  replaceToken(index, text, token, logprob) {
    const { topLogprobs } = this.tokens[index];
    this.tokens.splice(index, Infinity, { token, logprob, topLogprobs });
    this.text.truncate(index);
    this.text.append([text]);
    this.shadeFrom(index);
    this.text.select(index);
    this.text.focusToken(index);
  }
}

// The order of the fields; help, defaults and limits come from the server's schema.
const SHOWN_SETTINGS = [
  "max_tokens",
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "repetition_penalty",
  "stop",
];

/** The sampling settings as form fields. */
class SettingFields {
  constructor(parent, schema) {
    this.parent = parent;
    this.inputs = {};
    for (const name of SHOWN_SETTINGS.filter((known) => known in schema)) {
      this.addFromSchema(name, schema[name]);
    }
    const seed = { type: "number", min: 0, step: 1, placeholder: "random" };
    this.add("seed", el("input", seed), "Random seed; sample i uses seed + i.");
    const n = { type: "number", min: 1, max: 6, step: 1, value: 2, required: true };
    this.add("n", el("input", n), "Number of samples, generated as one batch.");
  }

  addFromSchema(name, schema) {
    const kind = schema.anyOf?.find((option) => option.type !== "null") ?? schema;
    const help = schema.description.replace(/\s*\[default: .*\]$/, "");
    if (kind.type === "array") {
      const hint = `${help.replace(/\.$/, "")}; \\n is a new line.`;
      this.add(name, el("input", { type: "text", placeholder: "none" }), hint);
      return;
    }
    const input = el("input", {
      type: "number",
      min: kind.minimum ?? kind.exclusiveMinimum ?? "",
      max: kind.maximum ?? "",
      step: kind.type === "integer" ? 1 : "any",
      value: name === "max_tokens" ? DEFAULT_TOKENS : (schema.default ?? ""),
      placeholder: "all",
      required: schema.default !== null,
    });
    this.add(name, input, help);
  }

  add(name, input, help) {
    const label = name === "n" ? "samples" : name.replaceAll("_", " ");
    input.id = `setting-${name}`;
    input.setAttribute("aria-describedby", `help-${name}`);
    this.inputs[name] = input;
    const row = el(
      "div",
      { className: "setting" },
      el("label", { htmlFor: input.id }, label),
      input,
      el("p", { id: `help-${name}`, className: "text-muted" }, help),
    );
    this.parent.append(row);
  }

  /** Return the settings that have a value. */
  values() {
    const values = {};
    for (const [name, { value }] of Object.entries(this.inputs)) {
      if (value === "") continue;
      values[name] = name === "stop" ? [value.replaceAll("\\n", "\n")] : Number(value);
    }
    return values;
  }
}
