// The metrics and samples of one run, read once and then only from where the last read ended.

import { fetchJson } from "./api.js";
import { lastIndexAtMost } from "./series.js";

const COLUMNS = [
  "step",
  "seconds",
  "tokens",
  "train_loss",
  "learning_rate",
  "grad_norm",
  "tokens_per_second",
];

/** The log of a run; it grows with each `refresh`. */
export class RunLog {
  /** @param {string} name the run's */
  constructor(name) {
    this.name = name;
    this.hasMore = false;
    this.cursors = {};
    this.clearMetrics();
    this.clearSamples();
  }

  clearMetrics() {
    /** One array per column; `tokens` is cumulative. */
    this.steps = Object.fromEntries(COLUMNS.map((column) => [column, []]));
    this.evaluations = [];
    this.cursors.metrics = { offset: 0, file: "" };
  }

  clearSamples() {
    this.samples = [];
    this.cursors.samples = { offset: 0, file: "" };
  }

  /** Read what is new; return true if something was. Sets `hasMore` if a part remains. */
  async refresh() {
    this.hasMore = false;
    const metricsChanged = await this.read(
      "metrics",
      () => this.clearMetrics(),
      (part) => this.addMetrics(part),
    );
    const samplesChanged = await this.read(
      "samples",
      () => this.clearSamples(),
      (part) => this.samples.push(...part.records),
    );
    return metricsChanged || samplesChanged;
  }

  async read(kind, clear, add) {
    const { offset, file } = this.cursors[kind];
    const query = `offset=${offset}&file=${encodeURIComponent(file)}`;
    const path = `/page/runs/${encodeURIComponent(this.name)}/${kind}?${query}`;
    const part = await fetchJson(path);
    const wasReplaced = offset > 0 && part.from === 0;
    if (wasReplaced) clear();
    add(part);
    this.cursors[kind] = { offset: part.offset, file: part.file };
    this.hasMore ||= part.more;
    return wasReplaced || part.offset > part.from;
  }

  addMetrics(part) {
    for (const column of COLUMNS) {
      if (column !== "tokens") this.steps[column].push(...part.steps[column]);
    }
    let tokens = this.steps.tokens.at(-1) ?? 0;
    for (const count of part.steps.tokens) {
      tokens += count;
      this.steps.tokens.push(tokens);
    }
    this.evaluations.push(...part.evaluations);
  }

  /**
   * Return the x values of the evaluations.
   * @param {"step"|"seconds"|"tokens"} axis
   */
  evaluationsOver(axis) {
    if (axis !== "tokens") return this.evaluations.map((evaluation) => evaluation[axis]);
    return this.evaluations.map(({ step }) => {
      return this.steps.tokens[lastIndexAtMost(this.steps.step, step)] ?? 0;
    });
  }
}
