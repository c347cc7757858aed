// Runs: a list, their curves while they train, and their samples.

import { fetchJson } from "./api.js";
import { AXES, Chart, columnTraces, lossTraces } from "./charts.js";
import { el, errorNotice, fromTemplate, SegmentedControl, statistic, toggle } from "./dom.js";
import { formatDuration, formatNumber, formatPercent } from "./format.js";
import { RunLog } from "./run_log.js";

const NUM_COLOURS = 8; // --run-1 to --run-8 in palette.css
const STATES = { finished: "finished", training: "training", stopped: "stopped" };

/** The tab. The run selected last is also the model of the other tabs. */
export class RunsTab {
  constructor(panel, model) {
    this.panel = panel;
    this.model = model;
    this.infos = [];
    /** @type {Map<string, RunLog>} the runs in the charts */
    this.selected = new Map();
    this.focused = "";
    this.isBusy = false;
    this.needsUpdate = false;
    this.needsRedraw = true;
    this.empty = fromTemplate("no-runs").node;
    const { node, refs } = fromTemplate("runs-layout");
    this.layout = node;
    this.empty.hidden = true;
    this.layout.hidden = true;
    this.list = new RunList(refs.list, (name) => this.toggleRun(name));
    this.header = new RunHeader();
    this.charts = new RunCharts(() => this.drawCharts());
    this.samples = new SampleViewer();
    refs.body.append(this.header.node, this.charts.node, this.samples.node);
    panel.append(this.empty, this.layout);
    const darkMode = matchMedia("(prefers-color-scheme: dark)");
    darkMode.addEventListener("change", () => this.redraw());
    document.addEventListener("visibilitychange", () => this.update());
  }

  show() {
    this.redraw();
  }

  redraw() {
    this.needsRedraw = true;
    this.update();
  }

  /** Read what has changed and show it. A call during an update leads to another one. */
  async update() {
    if (this.panel.hidden || document.hidden) return;
    this.needsUpdate = true;
    if (this.isBusy) return;
    this.isBusy = true;
    while (this.needsUpdate) {
      this.needsUpdate = false;
      try {
        await this.refresh();
        this.panel.querySelector(":scope > .notice")?.remove();
      } catch (error) {
        const isBlank = this.empty.hidden && this.layout.hidden;
        if (isBlank) this.panel.replaceChildren(errorNotice(error), this.empty, this.layout);
      }
    }
    this.isBusy = false;
  }

  async refresh() {
    this.infos = await fetchJson("/page/runs");
    this.empty.hidden = this.infos.length > 0;
    this.layout.hidden = !this.infos.length;
    if (!this.infos.length) return;
    if (!this.focused) {
      const training = this.infos.find((info) => info.state === "training");
      this.select((training ?? this.infos[0]).name);
    }
    this.list.update(this.infos, this.selected, this.focused);
    this.header.update(this.info(this.focused));
    if ((await this.readLogs()) || this.needsRedraw) {
      this.needsRedraw = false;
      this.drawCharts();
      this.samples.update(this.selected.get(this.focused), this.focused);
    }
    this.needsUpdate ||= [...this.selected.values()].some((log) => log.hasMore);
  }

  async readLogs() {
    let hasChanged = false;
    for (const [name, log] of this.selected) {
      if (!this.info(name)) {
        hasChanged = this.selected.delete(name);
      } else if (await log.refresh()) {
        hasChanged = true;
      }
    }
    return hasChanged;
  }

  info(name) {
    return this.infos.find((info) => info.name === name);
  }

  toggleRun(name) {
    if (this.selected.has(name)) {
      this.selected.delete(name);
      this.focused = [...this.selected.keys()].at(-1) ?? "";
    } else {
      this.select(name);
    }
    this.redraw();
  }

  select(name) {
    this.selected.set(name, new RunLog(name));
    this.focused = name;
    this.model.choose(name);
    this.needsRedraw = true;
  }

  drawCharts() {
    const runs = [...this.selected].map(([name, log]) => {
      return { log, colour: this.list.colour(name), info: this.info(name) };
    });
    this.charts.draw(runs.filter((run) => run.info));
  }
}

/** The list of runs; each keeps its colour while it is listed. */
class RunList {
  constructor(node, ontoggle) {
    this.node = node;
    this.ontoggle = ontoggle;
    this.rows = new Map();
  }

  variable(name) {
    const index = [...this.rows.keys()].indexOf(name);
    return `--run-${(index % NUM_COLOURS) + 1}`;
  }

  colour(name) {
    const style = getComputedStyle(document.documentElement);
    return style.getPropertyValue(this.variable(name)).trim();
  }

  update(infos, selected, focused) {
    const nodes = infos.map((info) => {
      const { node, refs } = this.rows.get(info.name) ?? this.addRow(info.name);
      const isTraining = info.state === "training";
      refs.button.setAttribute("aria-pressed", selected.has(info.name));
      refs.button.classList.toggle("is-focused", info.name === focused);
      refs.button.classList.toggle("is-running", isTraining);
      const quality = info.bits_per_byte
        ? `${formatNumber(info.bits_per_byte, 3)} bits per byte`
        : "not evaluated yet";
      const progress =
        isTraining && info.progress ? `, ${formatPercent(info.progress)}` : "";
      refs.facts.textContent = `${quality} · ${STATES[info.state]}${progress}`;
      return node;
    });
    const isSame =
      nodes.length === this.node.children.length &&
      nodes.every((node, i) => node === this.node.children[i]);
    if (!isSame) this.node.replaceChildren(...nodes);
  }

  addRow(name) {
    const row = fromTemplate("run-row");
    this.rows.set(name, row);
    row.refs.name.textContent = name;
    row.refs.swatch.style.setProperty("--swatch", `var(${this.variable(name)})`);
    row.refs.button.addEventListener("click", () => this.ontoggle(name));
    return row;
  }
}

/** The name, diagnosis and figures of one run. */
class RunHeader {
  constructor() {
    this.node = el("header", { className: "run-header" });
    this.key = null;
  }

  update(info) {
    const key = JSON.stringify(info ?? null);
    if (this.key === key) return;
    this.key = key;
    if (!info) {
      const hint = "Select a run to see its curves.";
      this.node.replaceChildren(el("p", { className: "text-muted" }, hint));
      return;
    }
    this.node.replaceChildren(
      el("h2", {}, info.name),
      el("p", { className: "text-muted" }, describeRun(info)),
      el("p", { className: "diagnosis" }, diagnosisText(info)),
      el("dl", { className: "facts" }, ...runStatistics(info)),
    );
  }
}

function describeRun({ settings, text }) {
  const parts = [];
  if (text.sources.length) {
    parts.push(`${text.sources.slice(0, 3).join(", ")}, ${formatNumber(text.bytes)} bytes`);
  }
  if (settings.n_layer) {
    const { arch, n_layer, n_head, n_embd, context_length } = settings;
    const shape = `${n_layer} layers, ${n_head} heads, width ${n_embd}`;
    parts.push(`${arch}, ${shape}, context ${context_length}`);
  }
  return parts.join(" · ");
}

function runStatistics(info) {
  const isTraining = info.state === "training" && info.progress;
  const step =
    info.steps && info.state !== "finished"
      ? `${formatNumber(info.step)} of ${formatNumber(info.steps)}`
      : formatNumber(info.step);
  const secondsLeft = isTraining ? (info.seconds / info.progress) * (1 - info.progress) : null;
  return [
    statistic("Held-out text", formatNumber(info.bits_per_byte, 3), "bits per byte"),
    statistic("Validation loss", formatNumber(info.val_loss, 3), "nats per token"),
    statistic("Step", step),
    statistic("Throughput", formatNumber(info.tokens_per_second), "tokens/s"),
    isTraining
      ? statistic("Time left", formatDuration(secondsLeft))
      : statistic("Time", formatDuration(info.seconds)),
  ];
}

/** Return the diagnosis of a finished run, else a comparison with the baselines. */
function diagnosisText(info) {
  if (info.diagnosis && info.state === "finished") return info.diagnosis.summary;
  if (info.val_loss === null) return "Not evaluated yet.";
  const beaten = Object.entries(info.baselines)
    .filter(([, loss]) => info.val_loss < loss)
    .sort((a, b) => a[1] - b[1]);
  const comparison = beaten.length
    ? `Validation loss is below the ${beaten[0][0]} baseline.`
    : "Validation loss is above the uniform baseline.";
  if (info.state === "training") return comparison;
  return `${comparison} The run is not finished: nanogpt train --resume --out ${info.folder}`;
}

/** The charts of the selected runs, with the controls of their axes. */
class RunCharts {
  constructor(onchange) {
    const { node, refs } = fromTemplate("run-charts");
    this.node = node;
    this.options = { axis: "step", bits: true, logX: false, logY: false };
    const set = (name) => (value) => {
      this.options = { ...this.options, [name]: value };
      onchange();
    };
    const units = [
      [true, "Bits per byte"],
      [false, "Nats per token"],
    ];
    const axes = Object.keys(AXES).map((key) => [key, key === "seconds" ? "time" : `${key}`]);
    refs.toolbar.append(
      new SegmentedControl("Unit of the loss", units, true, set("bits")).node,
      new SegmentedControl("Horizontal axis", axes, "step", set("axis")).node,
      toggle("log x", false, set("logX")),
      toggle("log y", false, set("logY")),
    );
    const lossTitle = ({ bits }) => `Loss in ${bits ? "bits per byte" : "nats per token"}`;
    this.loss = new Chart(refs.loss, lossTraces, lossTitle);
    const column = (name, digits, unit, title) => {
      return new Chart(refs[name], columnTraces(name, digits, unit), () => title);
    };
    this.columns = [
      column("learning_rate", ".3~g", "", "Learning rate"),
      column("tokens_per_second", ",.0f", "tokens/s", "Throughput"),
      column("grad_norm", ".3~g", "", "Gradient norm"),
    ];
  }

  draw(runs) {
    this.loss.draw(runs, this.options);
    for (const chart of this.columns) chart.draw(runs, { ...this.options, logY: false });
  }
}

/** The samples of one run, with a slider over the training steps. */
class SampleViewer {
  constructor() {
    const { node, refs } = fromTemplate("run-samples");
    this.node = node;
    this.refs = refs;
    this.samples = [];
    this.bitsByStep = new Map();
    this.name = null;
    refs.slider.addEventListener("input", () => this.show());
  }

  update(log, name) {
    const { slider, none, some } = this.refs;
    const isAtEnd = this.name !== name || Number(slider.value) === this.samples.length - 1;
    this.name = name;
    this.samples = log?.samples ?? [];
    this.bitsByStep = new Map(
      (log?.evaluations ?? []).map(({ step, bits_per_byte }) => [step, bits_per_byte]),
    );
    none.hidden = this.samples.length > 0;
    some.hidden = !this.samples.length;
    if (!this.samples.length) return;
    slider.max = this.samples.length - 1;
    if (isAtEnd) slider.value = this.samples.length - 1;
    this.show();
  }

  show() {
    const { slider, caption, text } = this.refs;
    const sample = this.samples[slider.value];
    const bits = this.bitsByStep.get(sample.step);
    const quality = bits ? `, ${formatNumber(bits, 3)} bits per byte` : "";
    const number = `sample ${Number(slider.value) + 1} of ${this.samples.length}`;
    caption.textContent = `After step ${formatNumber(sample.step)}${quality} · ${number}`;
    slider.setAttribute("aria-valuetext", `step ${sample.step}${quality}`);
    text.textContent = sample.text;
  }
}
