// The text that Inspect and Memorization work on: pasted, or the last sample of a run.

import { fetchJson } from "./api.js";
import { errorNotice, fromTemplate, submitOnCtrlEnter, withSpinner } from "./dom.js";

/** A text area with a button. Errors of `onsubmit` appear in `error`. */
export class TextInput {
  /**
   * @param {string} label
   * @param {string} verb the button's label
   * @param {import("./app.js").ModelChoice} model
   * @param {(text: string) => Promise<void>} onsubmit
   */
  constructor(label, verb, model, onsubmit) {
    this.model = model;
    this.onsubmit = onsubmit;
    this.samples = [];
    const { node, refs } = fromTemplate("text-input");
    this.form = node;
    this.refs = refs;
    this.empty = fromTemplate("no-model").node;
    this.error = document.createElement("div");
    refs.label.textContent = label;
    refs.submit.textContent = verb;
    refs.useSample.addEventListener("click", () => this.useLastSample());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    submitOnCtrlEnter(refs.box, this.form);
    model.addEventListener("change", () => this.onModelChange());
    this.onModelChange();
  }

  async onModelChange() {
    const { name } = this.model;
    this.empty.hidden = Boolean(name);
    this.form.hidden = !name;
    this.samples = [];
    this.refs.useSample.hidden = true;
    if (!name) return;
    const path = `/page/runs/${encodeURIComponent(name)}/samples?offset=0&file=`;
    const answer = await fetchJson(path).catch(() => null); // a lone model file has no samples
    if (!answer || name !== this.model.name) return;
    this.samples = answer.records;
    this.refs.useSample.hidden = !this.samples.length;
  }

  useLastSample() {
    this.refs.box.value = this.samples.at(-1).text;
    this.submit();
  }

  async submit() {
    const { box, submit, status } = this.refs;
    if (!box.value) {
      box.focus();
      return;
    }
    this.error.replaceChildren();
    submit.setAttribute("aria-busy", "true");
    try {
      await withSpinner(this.onsubmit(box.value), status);
    } catch (error) {
      this.error.replaceChildren(errorNotice(error));
    } finally {
      submit.removeAttribute("aria-busy");
    }
  }
}
