// Look: what surprises a model in a text, what it attends to, what its neurons respond to, and its alphabet as a map.

import { ask } from "./api.js";
import { attentionView } from "./attention.js";
import { colours, look, PLAIN, plain, plotly } from "./curves.js";
import { announce, choice, el, fact, failure, nameOf, number, percent } from "./dom.js";
import { Likely } from "./likely.js";
import { Source } from "./source.js";
import { shadeOfBits, TokenText } from "./tokens.js";

const VIEWS = { surprise: "Surprise", attention: "Attention", neurons: "Neurons", alphabet: "Alphabet" };

export function lookTab(panel, model) {
  const views = { surprise: surpriseView(), attention: attentionView(), neurons: neuronsView(), alphabet: alphabetView() };
  let shown = "surprise";
  let text = "";
  const source = new Source("A text to read", "Look", model, (given) => ((text = given), refresh(true)));
  const holder = el("div", { className: "view" });
  const switcher = choice("What to look at", Object.entries(VIEWS), shown, (key) => ((shown = key), source.error.replaceChildren(), refresh().catch((error) => source.error.replaceChildren(failure(error)))));  // prettier-ignore
  const hint = el("p", { className: "quiet" }, "Give it a text above, or take the model's last sample, to see how it reads.");
  const results = el("div", { hidden: true }, el("div", { className: "switcher" }, switcher), source.error, holder);
  panel.append(source.empty, source.form, results);
  const again = () => refresh(true).catch((error) => source.error.replaceChildren(failure(error)));
  model.changed.push(again);
  again();

  /** Show the chosen view of the text; one that has read this text with this model already stays as it is. */
  async function refresh(anew = false) {
    results.hidden = !model.name;
    if (anew) for (const view of Object.values(views)) view.read = false;
    const view = views[shown];
    const ready = text || shown === "alphabet"; // which is the model's, whatever the text
    holder.replaceChildren(ready ? view.node : hint);
    if (view.read || !ready || !model.name) return;
    await view.show(model.name, text);
    view.read = true;
    announce(`${VIEWS[shown]} is shown`);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Object.values(views).forEach((view) => view.read && view.repaint?.()));
  return {};
}

function surpriseView() {
  let found = null;
  const likely = new Likely("What the model held likely here, before it saw what stands there.");
  const text = new TokenText("The text, shaded by surprise", {
    onpick: (i, span) => open(i, span),
    describe: (i) => `${number(found.bits[i], 1)} bits, ${percent(2 ** -found.bits[i])} likely`,
  });
  const facts = el("dl", { className: "facts" });
  const most = el("ol", { className: "most" });
  const node = el("div", { className: "panel" }, el("p", { className: "quiet" }, "One bit: as sure as of a coin. The deeper the colour, the less the model expected what it read; click a character to see what it held likely."),
    facts, scale("0 bits: certain", "10 bits: one in a thousand"), text.node, el("h3", {}, "Most surprising"), most, likely.node);  // prettier-ignore

  function open(i, span) {
    const entries = found.alternatives[i].map(([other, share]) => ({ text: other, share, taken: other === found.pieces[i] }));
    if (!entries.some((entry) => entry.taken)) entries.push({ text: found.pieces[i], share: 2 ** -found.bits[i], taken: true });
    likely.open(span, `${number(found.bits[i], 1)} bits`, entries, null);
  }

  async function show(model, given) {
    found = await ask("/page/look/surprise", { model, text: given });
    text.set(found.pieces);
    text.shade(found.bits.map(shadeOfBits));
    facts.replaceChildren(fact("Surprise", number(found.bits_per_byte, 3), "bits per byte"), fact("In all", number(found.total_bits), "bits"), fact("Text", number(found.pieces.length), "tokens"));
    most.replaceChildren(...found.most.filter((i) => found.pieces[i]).slice(0, 10).map((i) => {
      const around = (from, to) => found.pieces.slice(Math.max(0, from), to).join("").replaceAll("\n", " ");
      const go = () => (text.spans[i].scrollIntoView({ block: "center" }), text.pick(i));
      return el("li", {}, el("button", { type: "button", className: "plain", onclick: go },
        el("span", { className: "context" }, around(i - 20, i)), el("mark", {}, nameOf(found.pieces[i])), el("span", { className: "context after" }, around(i + 1, i + 16)),
        el("span", { className: "quiet" }, `${number(found.bits[i], 1)} bits`)));  // prettier-ignore
    }));  // prettier-ignore
  }
  return { node, show };
}

/** What colours mean, from none to all. */
function scale(none, all) {
  return el("p", { className: "scale quiet" }, el("span", {}, none), el("span", { className: "ramp" }), el("span", {}, all));
}

function neuronsView() {
  let found = null;
  let asked = null;
  const layer = el("select", { onchange: () => again({ layer: Number(layer.value) }) });
  const strongest = el("select", { onchange: () => again({ layer: found.layer, neuron: Number(strongest.value) }) });
  const text = new TokenText("The text, shaded by the neuron's activation", { onpick: () => {}, describe: (i) => `activation ${number(found.activations[i], 2)}` });
  const error = el("div");
  const excerpts = el("ul", { className: "excerpts" });
  const more = el("div", {}, el("h3", {}, "What excites it most in the held-out text"), excerpts);
  const node = el("div", { className: "panel" }, el("p", { className: "quiet" }, "One neuron of a feed-forward layer, after each character: warm where it fires, cool where it is below zero."),
    el("div", { className: "toolbar" }, el("label", {}, "Layer ", layer), el("label", {}, "Neuron ", strongest), el("span", { className: "quiet" }, "those that vary most on this text first")),
    error, text.node, more);  // prettier-ignore

  async function again(which) {
    error.replaceChildren();
    try {
      await show(asked.model, asked.text, which);
    } catch (problem) {
      error.replaceChildren(failure(problem));
    }
  }

  async function show(model, given, which = { layer: 0 }) {
    asked = { model, text: given };
    found = await ask("/page/look/neurons", { model, text: given, ...which });
    layer.replaceChildren(...Array.from({ length: found.layers }, (_, i) => el("option", { value: i, selected: i === found.layer }, String(i))));
    strongest.replaceChildren(...found.strongest.map(({ neuron: i, spread }) => el("option", { value: i, selected: i === found.neuron }, `${i} (± ${number(spread, 2)})`)));
    text.set(found.pieces);
    const highest = Math.max(1e-9, ...found.activations.map(Math.abs));
    text.shade(found.activations.map((value) => value / highest));
    const own = found;
    excerpts.replaceChildren(el("li", { className: "quiet" }, "Reading it …"));
    const passages = await ask("/page/look/exciting", { model, layer: found.layer, neuron: found.neuron }).catch(() => []);
    if (own !== found) return; // another neuron was chosen meanwhile
    excerpts.replaceChildren(...(passages.length ? passages.map(excerptOf) : [el("li", { className: "quiet" }, "The held-out text of this model is not at hand.")]));
  }
  return { node, show };
}

function excerptOf({ pieces, activations, peak }) {
  const text = new TokenText(`A passage; most active at ${nameOf(pieces[peak])}`);
  const highest = Math.max(1e-9, ...activations.map(Math.abs));
  text.set(pieces.map((piece) => piece.replaceAll("\n", "↵")));
  text.shade(activations.map((value) => value / highest));
  text.choose(peak);
  return el("li", {}, text.node, el("span", { className: "quiet" }, number(activations[peak], 2)));
}

function alphabetView() {
  let found = null;
  const chart = el("div", { className: "chart map", role: "img" });
  const said = el("p", { className: "quiet" });
  const node = el("div", { className: "panel" }, said, chart);

  async function show(model) {
    found = await ask("/page/look/embedding", { model });
    said.textContent = `Each sign where the model puts it: those it treats alike stand together. Two dimensions of its embedding, which show ${percent(found.explained[0] + found.explained[1])} of all differences. Vowels are coloured.`;
    chart.setAttribute("aria-label", `A map of ${found.pieces.length} signs`);
    await repaint();
  }

  async function repaint() {
    const Plotly = await plotly();
    const { ink, accent } = colours();
    const names = found.pieces.map((piece) => (/^\s*$/.test(piece) ? nameOf(piece) : piece));
    const bare = { showgrid: false, showticklabels: false, ticks: "", zeroline: false, showline: false };
    const vowels = new Set("aeiouAEIOU");
    await Plotly.react(chart, [{
      x: found.xy.map(([x]) => x), y: found.xy.map(([, y]) => y), type: "scatter", mode: found.pieces.length > 600 ? "markers" : "text", text: names.map(plain),
      textfont: { size: names.map((name) => (name.length > 2 ? 11 : 17)), color: found.pieces.map((piece) => (vowels.has(piece) ? accent : ink)) },
      hovertemplate: "%{text}<extra></extra>", marker: { color: accent, size: 5 },
    }], look({ hovermode: "closest", dragmode: "zoom", margin: { l: 12, r: 12, t: 12, b: 12 }, xaxis: bare, yaxis: bare }), PLAIN);  // prettier-ignore
  }
  return { node, show, repaint };
}
