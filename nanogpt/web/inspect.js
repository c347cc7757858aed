// Inspect: surprisal, attention, neurons and the token embedding of a model on a text.

import { AlternativesPopover } from "./alternatives.js";
import { fetchJson } from "./api.js";
import { AttentionView } from "./attention.js";
import { colours, escapeForPlotly, loadPlotly, PLOTLY_CONFIG, plotlyLayout } from "./charts.js";
import { announce, el, errorNotice, fromTemplate, SegmentedControl, statistic } from "./dom.js";
import { formatNumber, formatPercent, onOneLine, tokenLabel } from "./format.js";
import { shadesFromBits } from "./series.js";
import { TextInput } from "./text_input.js";
import { TokenText } from "./token_text.js";

const VIEWS = {
  surprisal: "Surprisal",
  attention: "Attention",
  neurons: "Neurons",
  embedding: "Embedding",
};
const NUM_SURPRISING = 10;
const CONTEXT_TOKENS = 20;
const MAX_LABELS = 600; // tokens; more are drawn as dots

/** The tab. */
export class InspectTab {
  constructor(panel, model) {
    this.model = model;
    this.text = "";
    this.current = "surprisal";
    this.views = {
      surprisal: new SurprisalView(),
      attention: new AttentionView(),
      neurons: new NeuronsView(),
      embedding: new EmbeddingView(),
    };
    /** The views that show the current text and model. */
    this.upToDate = new Set();
    this.input = new TextInput("Text to inspect", "Inspect", model, (text) => {
      this.text = text;
      this.upToDate.clear();
      return this.refresh();
    });
    const choices = Object.entries(VIEWS);
    const control = new SegmentedControl("View", choices, this.current, (name) => {
      this.current = name;
      this.tryRefresh();
    });
    const hint = "Enter a text above, or use the model's last sample.";
    this.hint = el("p", { className: "text-muted" }, hint);
    this.holder = el("div", { className: "view" });
    const switcher = el("div", { className: "switcher" }, control.node);
    this.results = el("div", { hidden: true }, switcher, this.input.error, this.holder);
    panel.append(this.input.empty, this.input.form, this.results);
    model.addEventListener("change", () => this.reload());
    const darkMode = matchMedia("(prefers-color-scheme: dark)");
    darkMode.addEventListener("change", () => this.repaint());
    this.reload();
  }

  reload() {
    this.upToDate.clear();
    return this.tryRefresh();
  }

  async tryRefresh() {
    this.input.error.replaceChildren();
    try {
      await this.refresh();
    } catch (error) {
      this.input.error.replaceChildren(errorNotice(error));
    }
  }

  /** Show the current view, and update it unless it already shows this text and model. */
  async refresh() {
    const name = this.current;
    const view = this.views[name];
    const isReady = Boolean(this.text) || name === "embedding"; // which needs no text
    this.results.hidden = !this.model.name;
    this.holder.replaceChildren(isReady ? view.node : this.hint);
    if (!isReady || !this.model.name || this.upToDate.has(name)) return;
    await view.update(this.model.name, this.text);
    this.upToDate.add(name);
    announce(`${VIEWS[name]} shown`);
  }

  repaint() {
    for (const name of this.upToDate) this.views[name].repaint?.();
  }
}

/** The surprisal of each token, in bits. */
class SurprisalView {
  constructor() {
    const { node, refs } = fromTemplate("surprisal-view");
    this.node = node;
    this.refs = refs;
    this.result = null;
    this.alternatives = new AlternativesPopover("The model's predictions at this token.");
    this.text = new TokenText("The text, shaded by surprisal", {
      onpick: (i, span) => this.showAlternatives(i, span),
      describe: (i) => {
        const bits = this.result.bits[i];
        return `${formatNumber(bits, 1)} bits, ${formatPercent(2 ** -bits)} likely`;
      },
    });
    refs.text.append(this.text.node);
    node.append(this.alternatives.node);
  }

  async update(model, text) {
    this.result = await fetchJson("/page/inspect/surprisal", { model, text });
    const { token_texts, bits, bits_per_byte, total_bits } = this.result;
    this.text.set(token_texts);
    this.text.shade(shadesFromBits(token_texts, bits));
    this.refs.facts.replaceChildren(
      statistic("Surprisal", formatNumber(bits_per_byte, 3), "bits per byte"),
      statistic("Total", formatNumber(total_bits), "bits"),
      statistic("Text", formatNumber(token_texts.length), "tokens"),
    );
    const most = this.result.most_surprising.filter((i) => token_texts[i]);
    const rows = most.slice(0, NUM_SURPRISING).map((i) => el("li", {}, this.surprisingRow(i)));
    this.refs.most.replaceChildren(...rows);
  }

  surprisingRow(i) {
    const { token_texts, bits } = this.result;
    const context = (start, end) => {
      return token_texts.slice(Math.max(0, start), end).join("").replaceAll("\n", " ");
    };
    const onclick = () => {
      this.text.spans[i].scrollIntoView({ block: "center" });
      this.text.pick(i);
    };
    return el(
      "button",
      { type: "button", className: "plain", onclick },
      el("span", { className: "context" }, context(i - CONTEXT_TOKENS, i)),
      el("mark", {}, tokenLabel(token_texts[i])),
      el("span", { className: "context after" }, context(i + 1, i + 1 + CONTEXT_TOKENS)),
      el("span", { className: "text-muted" }, `${formatNumber(bits[i], 1)} bits`),
    );
  }

  showAlternatives(i, span) {
    const { alternatives, token_texts, bits } = this.result;
    const entries = alternatives[i].map(([text, probability]) => {
      return { text, probability, isChosen: text === token_texts[i] };
    });
    if (!entries.some((entry) => entry.isChosen)) {
      entries.push({ text: token_texts[i], probability: 2 ** -bits[i], isChosen: true });
    }
    this.alternatives.open(span, `${formatNumber(bits[i], 1)} bits`, entries, null);
  }
}

/** The activations of one neuron, and the passages that activate it most. */
class NeuronsView {
  constructor() {
    const { node, refs } = fromTemplate("neurons-view");
    this.node = node;
    this.refs = refs;
    this.request = null;
    this.result = null;
    this.text = new TokenText("The text, shaded by activation", {
      onpick: () => {},
      describe: (i) => `activation ${formatNumber(this.result.activations[i], 2)}`,
    });
    refs.text.append(this.text.node);
    refs.layer.addEventListener("change", () => {
      this.choose({ layer: Number(refs.layer.value) });
    });
    refs.neuron.addEventListener("change", () => {
      this.choose({ layer: this.result.layer, neuron: Number(refs.neuron.value) });
    });
  }

  async choose(neuron) {
    this.refs.error.replaceChildren();
    try {
      await this.load({ ...this.request, ...neuron });
    } catch (error) {
      this.refs.error.replaceChildren(errorNotice(error));
    }
  }

  update(model, text) {
    this.request = { model, text };
    return this.load({ model, text, layer: 0 });
  }

  async load(request) {
    const result = await fetchJson("/page/inspect/neurons", request);
    this.result = result;
    this.fillSelects();
    this.text.set(result.token_texts);
    this.text.shade(scaleToMax(result.activations));
    await this.loadExcerpts();
  }

  fillSelects() {
    const { layers, layer, neuron, top_neurons } = this.result;
    const layerOptions = Array.from({ length: layers }, (_, i) => {
      return el("option", { value: i, selected: i === layer }, String(i));
    });
    const neuronOptions = top_neurons.map((stats) => {
      const label = `${stats.neuron} (± ${formatNumber(stats.std, 2)})`;
      return el("option", { value: stats.neuron, selected: stats.neuron === neuron }, label);
    });
    this.refs.layer.replaceChildren(...layerOptions);
    this.refs.neuron.replaceChildren(...neuronOptions);
  }

  async loadExcerpts() {
    const result = this.result;
    const { layer, neuron } = result;
    const message = (text) => el("li", { className: "text-muted" }, text);
    this.refs.excerpts.replaceChildren(message("Reading the held-out text …"));
    const request = { model: this.request.model, layer, neuron };
    const excerpts = await fetchJson("/page/inspect/excerpts", request).catch(() => []);
    if (this.result !== result) return; // another neuron was chosen meanwhile
    const items = excerpts.length
      ? excerpts.map(excerptItem)
      : [message("The held-out text of this model is not available.")];
    this.refs.excerpts.replaceChildren(...items);
  }
}

function excerptItem({ token_texts, activations, peak }) {
  const text = new TokenText(`Peak at ${tokenLabel(token_texts[peak])}`);
  text.set(token_texts.map(onOneLine));
  text.shade(scaleToMax(activations));
  text.select(peak);
  const value = el("span", { className: "text-muted" }, formatNumber(activations[peak], 2));
  return el("li", {}, text.node, value);
}

/** Scale values so that the largest magnitude is 1. */
function scaleToMax(values) {
  const max = Math.max(1e-9, ...values.map(Math.abs));
  return values.map((value) => value / max);
}

/** The tokens by the first two principal components of their embedding. */
class EmbeddingView {
  constructor() {
    const { node, refs } = fromTemplate("embedding-view");
    this.node = node;
    this.refs = refs;
    this.result = null;
  }

  async update(model) {
    this.result = await fetchJson("/page/inspect/embedding", { model });
    const [first, second] = this.result.explained_variance_ratio;
    const explained = formatPercent(first + second);
    this.refs.caption.textContent =
      "Tokens by their embedding (PCA): similar tokens are close to each other. " +
      `The two components explain ${explained} of the variance.`;
    const count = formatNumber(this.result.token_texts.length);
    this.refs.chart.setAttribute("aria-label", `Embedding of ${count} tokens`);
    await this.repaint();
  }

  async repaint() {
    const Plotly = await loadPlotly();
    const { ink, accent } = colours();
    const { token_texts, coords } = this.result;
    const names = token_texts.map((text) => (/^\s*$/.test(text) ? tokenLabel(text) : text));
    const bare = {
      showgrid: false,
      showticklabels: false,
      ticks: "",
      zeroline: false,
      showline: false,
    };
    const trace = {
      x: coords.map(([x]) => x),
      y: coords.map(([, y]) => y),
      type: "scatter",
      mode: token_texts.length > MAX_LABELS ? "markers" : "text",
      text: names.map(escapeForPlotly),
      textfont: { size: names.map((name) => (name.length > 2 ? 11 : 17)), color: ink },
      hovertemplate: "%{text}<extra></extra>",
      marker: { color: accent, size: 5 },
    };
    const layout = plotlyLayout({
      hovermode: "closest",
      margin: { l: 12, r: 12, t: 12, b: 12 },
      xaxis: bare,
      yaxis: bare,
    });
    await Plotly.react(this.refs.chart, [trace], layout, PLOTLY_CONFIG);
  }
}
