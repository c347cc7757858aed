// What the logs of one run have told so far. They are asked only for what came after, so a long run is read once.

import { ask } from "./api.js";

const COLUMNS = ["step", "seconds", "tokens", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"];

/** The metrics and samples of a run by name, growing with each `refresh`. */
export class Log {
  constructor(name) {
    this.name = name;
    this.clear("metrics");
    this.clear("samples");
  }

  clear(kind) {
    if (kind === "metrics") {
      this.steps = Object.fromEntries(COLUMNS.map((column) => [column, []])); // `tokens` adds up
      this.evaluations = [];
    } else this.samples = [];
    (this.at ??= {})[kind] = { offset: 0, file: "" };
  }

  /** Read what is new; true where something was. */
  async refresh() {
    const changed = [await this.follow("metrics", (news) => this.addMetrics(news)), await this.follow("samples", (news) => this.samples.push(...news.records))];
    return changed.some(Boolean);
  }

  async follow(kind, add) {
    let changed = false;
    for (let more = true; more; ) {
      const { offset, file } = this.at[kind];
      const news = await ask(`/page/runs/${encodeURIComponent(this.name)}/${kind}?offset=${offset}&file=${file}`);
      if (news.file !== file || (news.from === 0 && offset > 0)) {
        changed ||= offset > 0;
        this.clear(kind);
      }
      add(news);
      changed ||= news.offset > news.from;
      this.at[kind] = { offset: news.offset, file: news.file };
      more = news.more;
    }
    return changed;
  }

  addMetrics(news) {
    let tokens = this.steps.tokens.at(-1) ?? 0;
    for (const column of COLUMNS) {
      const into = this.steps[column];
      for (const value of news.steps[column]) into.push(column === "tokens" ? (tokens += value) : value);
    }
    this.evaluations.push(...news.evaluations);
  }

  /** The x of the evaluations over "step", "seconds" or "tokens". */
  evaluationsOver(axis) {
    if (axis !== "tokens") return this.evaluations.map((evaluation) => evaluation[axis]);
    return this.evaluations.map(({ step }) => (step ? this.steps.tokens[before(this.steps.step, step)] ?? 0 : 0));
  }
}

/** The place of the last of ascending `values` that is not above `limit`; -1 where all are. */
export function before(values, limit) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** A curve as `count` points at most, each the mean of its neighbours, so that a hundred thousand steps draw as fast as a thousand. */
export function thinned(x, y, count, from = 0, to = x.length) {
  const width = Math.max(1, (to - from) / count);
  const points = { x: [], y: [] };
  for (let begin = from; begin < to; begin += width) {
    const [first, behind] = [Math.floor(begin), Math.min(to, Math.max(Math.floor(begin) + 1, Math.floor(begin + width)))];
    let [sum, known] = [0, 0];
    for (let i = first; i < behind; i++) if (y[i] !== null) [sum, known] = [sum + y[i], known + 1];
    points.x.push(x[behind - 1]);
    points.y.push(known ? sum / known : null);
  }
  return points;
}
