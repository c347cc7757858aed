// Memorization: passages of a text that occur verbatim in the training text, with a baseline.

import { fetchJson } from "./api.js";
import { announce, el, fromTemplate, statistic } from "./dom.js";
import { formatNumber, formatPercent, onOneLine } from "./format.js";
import { splitAtPassages } from "./series.js";
import { TextInput } from "./text_input.js";

/** The tab. */
export class MemorizationTab {
  constructor(panel, model) {
    this.model = model;
    this.input = new TextInput("Text to check", "Check", model, (text) => this.check(text));
    const { node, refs } = fromTemplate("memorization-results");
    this.results = node;
    this.refs = refs;
    this.results.hidden = true;
    panel.append(this.input.empty, this.input.form, this.input.error, this.results);
    model.addEventListener("change", () => {
      this.results.hidden = true;
    });
  }

  async check(text) {
    const request = { model: this.model.name, text };
    const result = await fetchJson("/page/memorization", request);
    const chars = [...text]; // offsets count characters, as in Python, not UTF-16 units
    this.results.hidden = false;
    this.refs.summary.textContent = result.summary;
    this.showFacts(result);
    this.refs.note.textContent = result.passages.length
      ? `Passages of at least ${result.min_bytes} bytes.`
      : `No passage of ${result.min_bytes} bytes or more.`;
    const items = result.passages.map((passage, i) => this.passageItem(passage, i, chars));
    this.refs.list.replaceChildren(...items);
    this.refs.text.replaceChildren(...markPassages(chars, result.passages));
    announce(result.summary);
  }

  showFacts({ fraction, longest, indexed_bytes, baseline }) {
    const searched = formatNumber(indexed_bytes / 1e6, 2);
    this.refs.facts.replaceChildren(
      statistic("Copied", formatPercent(fraction), "of the text"),
      statistic("Longest passage", formatNumber(longest), "bytes"),
      statistic("Searched", searched, "MB of training text"),
    );
    const label = `Baseline: median of ${formatNumber(baseline.num_windows)} held-out windows`;
    this.refs.bars.replaceChildren(
      fractionBar("This text", fraction, "own"),
      fractionBar(label, baseline.median_fraction, ""),
    );
    this.refs.bars.hidden = !baseline.num_windows;
  }

  passageItem(passage, i, chars) {
    const { start, end, num_bytes, document: number, line } = passage;
    const onclick = () => {
      const mark = this.refs.text.querySelector(`[data-passage="${i}"]`);
      mark.scrollIntoView({ block: "center" });
      mark.focus({ preventScroll: true });
    };
    const source = `document ${formatNumber(number)}, line ${formatNumber(line)}`;
    const label = `Passage ${i + 1}: ${num_bytes} bytes, ${source}; show it in the text`;
    const caption = `${formatNumber(num_bytes)} bytes · ${source} of the training text`;
    const faint = (text) => el("span", { className: "text-faint" }, text);
    const quote = el(
      "span",
      { className: "text" },
      faint(`…${onOneLine(passage.context_before)}`),
      el("mark", {}, onOneLine(chars.slice(start, end).join(""))),
      faint(`${onOneLine(passage.context_after)}…`),
    );
    const properties = { type: "button", className: "plain passage", onclick };
    const heading = el("span", { className: "text-muted" }, caption);
    const button = el("button", properties, heading, quote);
    button.setAttribute("aria-label", label);
    return el("li", {}, button);
  }
}

function fractionBar(label, fraction, className) {
  const bar = el("span", { className: "bar" });
  bar.style.setProperty("--fraction", `${100 * fraction}%`);
  const value = el("span", { className: "fraction" }, formatPercent(fraction));
  return el("div", { className }, el("span", {}, label), value, bar);
}

function markPassages(chars, passages) {
  return splitAtPassages(chars, passages).map(({ text, passage }) => {
    if (passage === null) return text;
    const mark = el("mark", { tabIndex: -1 }, text);
    mark.dataset.passage = passage;
    return mark;
  });
}
