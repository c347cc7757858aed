// Curves of several runs, drawn by plotly.js from the installed package.

import { formatNumber } from "./format.js";
import { downsample, lastIndexAtMost, timeTicks } from "./series.js";

const MAX_POINTS = 600; // per curve in view
const BITS_PER_NAT = 1 / Math.log(2);
const NARROW = 420; // px

export const AXES = { step: "steps", seconds: "training time", tokens: "training tokens" };
export const PLOTLY_CONFIG = { displayModeBar: false, responsive: true, doubleClick: "autosize" };

let loading = null;

/** Load plotly.js once. */
export function loadPlotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/page/plotly.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly.js could not be loaded from the server."));
    document.head.append(script);
  });
  return loading;
}

/**
 * Escape text for plotly, which interprets some HTML.
 * @param {string} text
 */
export function escapeForPlotly(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/** Return the colours of the page, light or dark. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "muted", "line", "surface", "accent", "cool"];
  return Object.fromEntries(
    names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
  );
}

/**
 * Return the plotly layout that all charts share, with changes.
 * @param {object} [extra]
 */
export function plotlyLayout({ xaxis = {}, yaxis = {}, ...extra } = {}) {
  const { ink, muted, line, surface } = colours();
  const axis = {
    gridcolor: line,
    zeroline: false,
    linecolor: line,
    tickcolor: line,
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    fixedrange: false,
  };
  const fontFamily = getComputedStyle(document.body).fontFamily;
  return {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: fontFamily, size: 12, color: muted },
    margin: { l: 46, r: 12, t: 10, b: 38 },
    showlegend: false,
    hovermode: "x",
    dragmode: "zoom",
    hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: ink, size: 12 } },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...extra,
  };
}

/**
 * A chart of several runs that stays sharp when zoomed.
 *
 * @typedef {object} ChartRun
 * @property {import("./run_log.js").RunLog} log
 * @property {string} colour
 * @property {object} info the run's entry of /page/runs
 *
 * @typedef {object} ChartOptions
 * @property {"step"|"seconds"|"tokens"} axis
 * @property {boolean} bits bits per byte instead of nats per token
 * @property {boolean} logX
 * @property {boolean} logY
 */
export class Chart {
  /**
   * @param {HTMLElement} div
   * @param {(runs: ChartRun[], options: ChartOptions) => object} traces
   * @param {(options: ChartOptions) => string} title for screen readers
   */
  constructor(div, traces, title) {
    this.div = div;
    this.traces = traces;
    this.title = title;
    this.runs = [];
    this.options = null;
    this.key = "";
    this.zoom = null;
    this.drawing = Promise.resolve();
  }

  draw(runs, options) {
    this.runs = runs;
    this.options = options;
    this.drawing = this.drawing
      .then(() => (this.runs === runs ? this.render(runs, options) : undefined))
      .catch((error) => {
        this.div.textContent = error.message;
      });
    return this.drawing;
  }

  async render(runs, options) {
    const Plotly = await loadPlotly();
    const isFirst = !this.div.classList.contains("js-plotly-plot");
    // Another selection of runs or axes resets the zoom.
    const key = JSON.stringify([options, runs.map((run) => run.log.name)]);
    if (this.key !== key) this.zoom = null;
    this.key = key;
    const maxX = Math.max(1, ...runs.map((run) => run.log.steps[options.axis].at(-1) ?? 0));
    const limits = this.limits(options);
    const drawn = this.traces(runs, { ...options, limits });
    const names = runs.map((run) => run.log.name).join(", ") || "no run selected";
    const label = `${this.title(options)}, over ${AXES[options.axis]}: ${names}`;
    this.div.setAttribute("aria-label", label);
    const layout = plotlyLayout({
      annotations: drawn.annotations ?? [],
      shapes: drawn.shapes ?? [],
      xaxis: this.xaxis(options, maxX, limits),
      yaxis: this.yaxis(options, drawn),
    });
    await Plotly.react(this.div, drawn.traces, layout, PLOTLY_CONFIG);
    if (isFirst) this.div.on("plotly_relayout", (change) => this.onZoom(change));
  }

  /** Return the visible range of x; null for all. */
  limits(options) {
    if (!this.zoom?.x) return null;
    return options.logX ? this.zoom.x.map((value) => 10 ** value) : this.zoom.x;
  }

  xaxis(options, maxX, limits) {
    const isNarrow = this.div.clientWidth < NARROW;
    const fullRange = options.logX ? [0, Math.log10(maxX)] : [0, maxX * 1.005];
    const axis = {
      type: options.logX ? "log" : "linear",
      title: { text: AXES[options.axis], standoff: 6 },
      range: this.zoom?.x ?? fullRange,
      tickangle: 0,
    };
    if (options.axis === "seconds" && !options.logX) {
      const visible = limits ? limits[1] - limits[0] : maxX;
      return { ...axis, ...timeTicks(visible, maxX, isNarrow ? 3 : 8) };
    }
    return { ...axis, nticks: isNarrow ? 4 : 9 };
  }

  yaxis(options, { traces, maxY }) {
    let range = this.zoom?.y ?? null;
    if (!range && maxY && !options.logY) range = [axisStart(traces), maxY];
    return {
      type: options.logY ? "log" : "linear",
      nticks: this.div.clientWidth < NARROW ? 4 : 6,
      exponentformat: "power",
      minexponent: 5,
      ...(range ? { range } : { autorange: true }),
    };
  }

  /** Remember the zoom, and redraw the curves at its resolution. */
  onZoom(change) {
    const range = (axis) => {
      const low = change[`${axis}.range[0]`];
      return low === undefined ? null : [low, change[`${axis}.range[1]`]];
    };
    if ("xaxis.autorange" in change || "yaxis.autorange" in change) {
      this.zoom = null;
    } else if (range("xaxis") || range("yaxis")) {
      this.zoom = { x: range("xaxis") ?? this.zoom?.x, y: range("yaxis") ?? this.zoom?.y };
    } else {
      return;
    }
    this.draw([...this.runs], this.options);
  }
}

/** Return the start of a vertical axis: a little below the lowest point. */
function axisStart(traces) {
  const values = traces.flatMap((trace) => trace.y.filter((value) => value !== null));
  const lowest = Math.min(...values);
  return Number.isFinite(lowest) ? 0.93 * lowest : 0;
}

/**
 * Return the traces of one column of the steps, one line per run.
 * @param {string} name
 * @param {string} digits a d3 format
 * @param {string} unit
 */
export function columnTraces(name, digits, unit) {
  return (runs, options) => ({
    traces: runs.map((run) => {
      return stepTrace(run, name, options, { factor: 1, digits, unit, width: 1.5 });
    }),
  });
}

function stepTrace(run, name, { axis, limits }, style) {
  const { factor, digits, unit, width, opacity = 1, label = "" } = style;
  const x = run.log.steps[axis];
  const start = limits ? Math.max(0, lastIndexAtMost(x, limits[0])) : 0;
  const end = limits ? Math.min(x.length, lastIndexAtMost(x, limits[1]) + 2) : x.length;
  const points = downsample(x, run.log.steps[name], MAX_POINTS, start, end);
  const runName = escapeForPlotly(run.log.name);
  return {
    x: points.x,
    y: factor === 1 ? points.y : points.y.map((value) => value && value * factor),
    type: "scatter",
    mode: "lines",
    name: runName,
    opacity,
    line: { color: run.colour, width },
    hovertemplate: `${label}%{y:${digits}} ${unit}<extra>${runName}</extra>`,
  };
}

/** Return training and validation losses, with the n-gram baselines as horizontal lines. */
export function lossTraces(runs, options) {
  const unit = options.bits ? "bits per byte" : "nats per token";
  const traces = runs.flatMap((run) => {
    const factor = options.bits ? (run.info.bits_per_nat ?? BITS_PER_NAT) : 1;
    const style = { factor, digits: ".3f", unit, width: 1.2, opacity: 0.55, label: "training " };
    return [stepTrace(run, "train_loss", options, style), evaluationTrace(run, options, unit)];
  });
  const { muted } = colours();
  const baselines = commonBaselines(runs, options.bits);
  const line = { color: muted, width: 1, dash: "dot" };
  const shapes = baselines.map(([, y]) => {
    return { type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, layer: "below", line };
  });
  const annotations = baselines.map(([name, loss]) => ({
    xref: "paper",
    x: 1,
    xanchor: "right",
    y: options.logY ? Math.log10(loss) : loss,
    yanchor: "bottom",
    showarrow: false,
    text: `${name} ${formatNumber(loss, 2)}`,
    font: { size: 11, color: muted },
  }));
  // The first steps are worse than the uniform baseline; showing them would squeeze the rest.
  const uniform = baselines.find(([name]) => name === "uniform");
  return { traces, shapes, annotations, maxY: uniform ? uniform[1] * 1.06 : null };
}

function evaluationTrace(run, options, unit) {
  const runName = escapeForPlotly(run.log.name);
  const key = options.bits ? "bits_per_byte" : "val_loss";
  return {
    x: run.log.evaluationsOver(options.axis),
    y: run.log.evaluations.map((evaluation) => evaluation[key]),
    type: "scatter",
    mode: "lines+markers",
    name: runName,
    line: { color: run.colour, width: 2.5 },
    marker: { size: 6 },
    hovertemplate: `validation %{y:.3f} ${unit}<extra>${runName}</extra>`,
  };
}

/** Return the baselines as [name, loss] if all runs share them; runs on other texts do not. */
function commonBaselines(runs, bits) {
  const infos = runs.map((run) => run.info).filter((info) => Object.keys(info.baselines).length);
  if (!infos.length) return [];
  const first = JSON.stringify(infos[0].baselines);
  if (infos.some((info) => JSON.stringify(info.baselines) !== first)) return [];
  const factor = bits ? (infos[0].bits_per_nat ?? BITS_PER_NAT) : 1;
  return Object.entries(infos[0].baselines).map(([name, nats]) => [name, nats * factor]);
}
