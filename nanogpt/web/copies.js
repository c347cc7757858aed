// Copies: what of a text stands word for word in the training text, where, and whether that is more than fresh text shows.

import { ask } from "./api.js";
import { announce, el, fact, number, percent } from "./dom.js";
import { Source } from "./source.js";

export function copiesTab(panel, model) {
  const source = new Source("A text to check", "Check", model, check);
  const verdict = el("p", { className: "verdict" });
  const facts = el("dl", { className: "facts" });
  const bars = el("div", { className: "compare" });
  const text = el("div", { className: "text passages", role: "group", "aria-label": "The text, with what stands in the training text marked" });
  const list = el("ol", { className: "found" });
  const none = el("p", { className: "quiet" });
  const results = el("div", { className: "stack", hidden: true },
    el("div", { className: "panel" }, verdict, facts, bars),
    el("div", { className: "panel" }, el("h3", {}, "Passages, the longest first"), none, list),
    el("div", { className: "panel" }, el("h3", {}, "In the text"), text));  // prettier-ignore
  panel.append(source.empty, source.form, source.error, results);
  model.changed.push(() => (results.hidden = true));

  async function check(given) {
    const found = await ask("/page/copies", { model: model.name, text: given });
    results.hidden = false;
    verdict.textContent = found.sentence;
    facts.replaceChildren(fact("Copied", percent(found.share), "of the text"), fact("Longest passage", number(found.longest), "bytes"),
      fact("Searched", number(found.indexed_bytes / 1e6, 2), "MB of training text"));  // prettier-ignore
    bars.replaceChildren(bar("This text", found.share, true), bar(`Fresh text: the median of ${number(found.fresh.windows)} stretches as long`, found.fresh.share));
    bars.hidden = !found.fresh.windows;
    none.textContent = found.passages.length ? `What stands in both and is ${found.least} bytes long or more.` : `None of ${found.least} bytes or more: nothing long stands in the training text.`;
    const signs = [...given]; // places are counted in characters, as Python does, not in halves of them
    list.replaceChildren(...found.passages.map((passage, i) => entry(passage, i, signs)));
    text.replaceChildren(...marked(found.passages, signs));
    announce(found.sentence);
  }

  function entry({ start, end, bytes, document: place, line, before, after }, i, signs) {
    const inLine = (words) => words.replaceAll("\n", "↵");
    const go = () => {
      const mark = text.querySelector(`[data-passage="${i}"]`);
      mark.scrollIntoView({ block: "center" });
      mark.focus({ preventScroll: true });
    };
    return el("li", {}, el("button", { type: "button", className: "plain passage", onclick: go, "aria-label": `Passage ${i + 1}: ${bytes} bytes, line ${line} of document ${place}; show it in the text` },
      el("span", { className: "quiet" }, `${number(bytes)} bytes · document ${number(place)}, line ${number(line)} of the training text`),
      el("span", { className: "text" }, el("span", { className: "faint" }, `…${inLine(before)}`), el("mark", {}, inLine(signs.slice(start, end).join(""))), el("span", { className: "faint" }, `${inLine(after)}…`))));  // prettier-ignore
  }
  return {};
}

/** A share as a bar with its number. */
function bar(label, share, own = false) {
  const line = el("span", { className: "bar" });
  line.style.setProperty("--share", `${100 * share}%`);
  return el("div", { className: own ? "own" : "" }, el("span", {}, label), el("span", { className: "share" }, percent(share)), line);
}

/** The text with its passages marked. They do not overlap. */
function marked(passages, signs) {
  const parts = [];
  let at = 0;
  const inOrder = passages.map((passage, i) => ({ ...passage, i })).sort((a, b) => a.start - b.start);
  for (const { start, end, i } of inOrder) {
    const mark = el("mark", { tabIndex: -1 }, signs.slice(start, end).join(""));
    mark.dataset.passage = i;
    parts.push(signs.slice(at, start).join(""), mark);
    at = end;
  }
  return [...parts, signs.slice(at).join("")];
}
