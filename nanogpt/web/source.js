// The text that Look and Copies work on: pasted, or taken from a run.

import { ask } from "./api.js";
import { el, failure } from "./dom.js";

/** A box for a text with a button; `onread(text)` works on it, and what goes wrong there is said below it. */
export class Source {
  constructor(label, verb, model, onread) {
    Object.assign(this, { model, onread });
    this.box = el("textarea", { rows: 5, spellcheck: false, placeholder: "Paste or type any text here." });
    this.go = el("button", { type: "submit", className: "primary" }, verb);
    this.error = el("div");
    this.sample = el("button", { type: "button", hidden: true, onclick: () => this.takeSample() }, "Take its last sample");
    this.form = el("form", { className: "panel", onsubmit: (event) => (event.preventDefault(), this.read()) },
      el("label", {}, el("span", { className: "label" }, label), this.box),
      el("div", { className: "buttons" }, this.go, this.sample, el("span", { className: "quiet hint" }, "Ctrl + Enter")));  // prettier-ignore
    this.empty = el("div", { className: "empty", hidden: true }, el("h2", {}, "No model yet"),
      el("p", {}, "A run has one after its first evaluation:"), el("pre", {}, "nanogpt train book.txt --open"));  // prettier-ignore
    this.box.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && this.form.requestSubmit());
    model.changed.push((name) => this.meet(name));
    this.meet(model.name);
  }

  meet(name) {
    [this.empty.hidden, this.form.hidden] = [Boolean(name), !name];
    this.samples = [];
    this.sample.hidden = true;
    if (!name) return;
    const path = `/page/runs/${encodeURIComponent(name)}/samples?offset=0&file=`;
    ask(path).then(({ records }) => name === this.model.name && (this.sample.hidden = !(this.samples = records).length)).catch(() => {}); // a model without its run has none
  }

  takeSample() {
    this.box.value = this.samples.at(-1).text;
    this.read();
  }

  async read() {
    if (!this.box.value) {
      this.box.focus();
      return;
    }
    this.error.replaceChildren();
    this.go.setAttribute("aria-busy", "true");
    try {
      await this.onread(this.box.value);
    } catch (error) {
      this.error.replaceChildren(failure(error));
    } finally {
      this.go.removeAttribute("aria-busy");
    }
  }
}
