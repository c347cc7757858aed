// The curves of several runs, drawn by plotly. It is fetched from the installed package when the first curve is drawn.

import { number } from "./dom.js";
import { before, thinned } from "./logs.js";

const POINTS = 600; // of a curve, across the screen
const NATS_TO_BITS = 1 / Math.log(2);

export const AXES = { step: "steps", seconds: "seconds of training", tokens: "tokens read" };
export const BASELINES = {
  uniform: "chance, which takes all signs for equally likely",
  unigram: "a table of how frequent each sign is",
  bigram: "a table of what follows each sign",
  trigram: "a table of what follows each two signs",
};

let loading;

/** plotly.js, once. */
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/page/plotly.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly.js could not be read from the installed package plotly."));
    document.head.append(script);
  });
  return loading;
}

/** Text as plotly shows it unchanged: it reads a little HTML. */
export function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/** The page's colours, light or dark, for what style sheets do not reach. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "muted", "line", "surface", "accent", "cool"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** What all charts of the page look like. */
export function look(extra = {}) {
  const { ink, muted, line, surface } = colours();
  const axis = { gridcolor: line, zeroline: false, linecolor: line, tickcolor: line, ticks: "outside", ticklen: 4, automargin: true, fixedrange: false };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: muted },
    margin: { l: 46, r: 12, t: 10, b: 38 }, showlegend: false, hovermode: "x", dragmode: "zoom",
    hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: ink, size: 12 } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

export const PLAIN = { displayModeBar: false, responsive: true, doubleClick: "autosize" };

/** A chart in a div: `draw(runs, options)`, with runs of {log, colour, about} and options of {axis, bits, logX, logY}. It stays sharp when one zooms in. */
export class Chart {
  constructor(div, traces, title) {
    Object.assign(this, { div, traces, title });
    this.drawing = Promise.resolve();
  }

  draw(runs, options) {
    this.last = [runs, options];
    this.drawing = this.drawing.then(() => this.last[0] === runs && this.render(runs, options)).catch((error) => (this.div.textContent = error.message));
    return this.drawing;
  }

  async render(runs, options) {
    const Plotly = await plotly();
    const first = !this.div.classList.contains("js-plotly-plot");
    const key = JSON.stringify([options, runs.map((run) => run.log.name)]); // another view forgets how far one had zoomed in
    if (this.key !== key) this.zoom = null;
    this.key = key;
    const furthest = Math.max(1, ...runs.map((run) => run.log.steps[options.axis].at(-1) ?? 0));
    const whole = options.logX ? [0, Math.log10(furthest)] : [0, furthest * 1.005];
    const limits = this.zoom?.x && (options.logX ? this.zoom.x.map((value) => 10 ** value) : this.zoom.x);
    const { traces, annotations = [], shapes = [], highest } = this.traces(runs, { ...options, limits });
    const title = typeof this.title === "function" ? this.title(options) : this.title;
    this.div.setAttribute("aria-label", `${title}, over ${AXES[options.axis]}: ${runs.map((run) => run.log.name).join(", ") || "no run chosen"}`);
    const top = this.zoom?.y ?? (highest && !options.logY ? [lowest(traces), highest] : null);
    const few = this.div.clientWidth < 420;
    const ticks = options.axis === "seconds" && !options.logX ? timeTicks(limits ? limits[1] - limits[0] : furthest, furthest, few ? 3 : 8) : { nticks: few ? 4 : 9 };
    await Plotly.react(this.div, traces, look({
      annotations, shapes,
      xaxis: { type: options.logX ? "log" : "linear", title: { text: AXES[options.axis], standoff: 6 }, range: this.zoom?.x ?? whole, tickangle: 0, ...ticks },
      yaxis: { type: options.logY ? "log" : "linear", nticks: few ? 4 : 6, exponentformat: "power", minexponent: 5, ...(top ? { range: top } : { autorange: true }) },
    }), PLAIN);  // prettier-ignore
    if (first) this.div.on("plotly_relayout", (change) => this.zoomed(change));
  }

  /** Remember how far one has zoomed in, and draw the curves as fine as that shows them. */
  zoomed(change) {
    const range = (axis) => (`${axis}.range[0]` in change ? [change[`${axis}.range[0]`], change[`${axis}.range[1]`]] : null);
    if ("xaxis.autorange" in change || "yaxis.autorange" in change) this.zoom = null;
    else if (range("xaxis") || range("yaxis")) this.zoom = { x: range("xaxis") ?? this.zoom?.x, y: range("yaxis") ?? this.zoom?.y };
    else return;
    this.draw([...this.last[0]], this.last[1]);
  }
}

/** Where a vertical axis begins: a little below the lowest point. */
function lowest(traces) {
  const least = Math.min(...traces.flatMap((trace) => trace.y.filter((value) => value !== null)));
  return Number.isFinite(least) ? 0.93 * least : 0;
}

/** Where the marks on an axis of time stand: at whole seconds, minutes or hours, some `count` of them in what is shown. */
function timeTicks(shown, furthest, count) {
  const unit = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400].find((size) => shown / size <= count) ?? 604800;
  const tickvals = Array.from({ length: Math.floor(furthest / unit) + 1 }, (_, i) => i * unit);
  return { tickvals, ticktext: tickvals.map(clock), title: { text: "time of training", standoff: 6 } };
}

function clock(seconds) {
  return seconds < 60 ? `${seconds} s` : seconds < 3600 ? `${seconds / 60} min` : `${seconds / 3600} h`;
}

/** A line of each run through one column of its steps. */
export function column(name, digits, unit) {
  return (runs, options) => ({ traces: runs.map((run) => stepTrace(run, name, 1, options, { digits, unit, width: 1.5 })) });
}

function stepTrace(run, name, factor, { axis, limits }, { digits, unit, width, opacity = 1, label = "" }) {
  const x = run.log.steps[axis];
  const [from, to] = limits ? [Math.max(0, before(x, limits[0])), Math.min(x.length, before(x, limits[1]) + 2)] : [0, x.length];
  const points = thinned(x, run.log.steps[name], POINTS, from, to);
  return {
    x: points.x, y: factor === 1 ? points.y : points.y.map((value) => value && value * factor), type: "scatter", mode: "lines", name: plain(run.log.name), opacity,
    line: { color: run.colour, width }, hovertemplate: `${label}%{y:${digits}} ${unit}<extra>${plain(run.log.name)}</extra>`,
  };  // prettier-ignore
}

/** Training and validation losses, and the n-gram baselines as lines. */
export function losses(runs, options) {
  const unit = options.bits ? "bits per byte" : "nats per token";
  const traces = [];
  for (const run of runs) {
    const factor = options.bits ? run.about.bits_per_nat ?? NATS_TO_BITS : 1;
    traces.push(stepTrace(run, "train_loss", factor, options, { digits: ".3f", unit, width: 1.2, opacity: 0.55, label: "training " }));
    const y = run.log.evaluations.map((evaluation) => (options.bits ? evaluation.bits_per_byte : evaluation.val_loss));
    traces.push({
      x: run.log.evaluationsOver(options.axis), y, type: "scatter", mode: "lines+markers", name: plain(run.log.name), line: { color: run.colour, width: 2.5 }, marker: { size: 6 },
      hovertemplate: `validation %{y:.3f} ${unit}<extra>${plain(run.log.name)}</extra>`,
    });  // prettier-ignore
  }
  const { muted } = colours();
  const baselines = baselinesOf(runs, options.bits);
  const shapes = baselines.map(([, y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, layer: "below", line: { color: muted, width: 1, dash: "dot" } }));
  const annotations = baselines.map(([name, value]) => ({
    xref: "paper", x: 1, xanchor: "right", y: options.logY ? Math.log10(value) : value, yanchor: "bottom", showarrow: false,
    text: `${name} ${number(value, 2)}`, font: { size: 11, color: muted },
  }));  // prettier-ignore
  const chance = baselines.find(([name]) => name === "uniform"); // the first steps, which are worse, would squeeze all others
  return { traces, shapes, annotations, highest: chance && chance[1] * 1.06 };
}

/** The baselines of the first run that knows them, where all agree; runs on different texts have none in common. */
function baselinesOf(runs, bits) {
  const known = runs.filter((run) => Object.keys(run.about.baselines).length);
  const same = known.every((run) => JSON.stringify(run.about.baselines) === JSON.stringify(known[0].about.baselines));
  if (!known.length || !same) return [];
  return Object.entries(known[0].about.baselines).map(([name, nats]) => [name, nats * (bits ? known[0].about.bits_per_nat ?? NATS_TO_BITS : 1)]);
}
