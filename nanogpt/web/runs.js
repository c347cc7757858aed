// Runs: which there are, their curves while they grow, and what each wrote on the way.

import { choice, duration, el, fact, failure, number, percent, toggle } from "./dom.js";
import { ask } from "./api.js";
import { AXES, BASELINES, Chart, column, losses } from "./curves.js";
import { Log } from "./logs.js";

const EVERY = 1000; // milliseconds
const COLOURS = ["--run-1", "--run-2", "--run-3", "--run-4", "--run-5", "--run-6", "--run-7", "--run-8"];
const STATES = { finished: "finished", training: "training now", stopped: "stopped" };

/** Fill the panel; gives what to do when it is shown and hidden. */
export function runsTab(panel) {
  const view = { shown: false, runs: [], chosen: new Map(), focus: "", options: { axis: "step", bits: true, logX: false, logY: false } };
  const list = el("ul", { className: "run-list", "aria-label": "Runs" });
  const empty = el("div", { className: "empty", hidden: true }, el("h2", {}, "No runs yet"),
    el("p", {}, "Train a model on a text of yours; it will appear here and you can watch it learn:"), el("pre", {}, "nanogpt train book.txt --open"));  // prettier-ignore
  const header = el("header", { className: "run-header" });
  const charts = makeCharts(view);
  const samples = makeSamples();
  const body = el("div", { className: "run-body" }, header, charts.node, samples.node);
  const layout = el("div", { className: "runs-layout", hidden: true }, el("aside", { className: "panel" }, el("h2", {}, "Runs"), list), body);
  panel.append(empty, layout);

  async function refresh() {
    view.runs = await ask("/page/runs");
    empty.hidden = view.runs.length > 0;
    layout.hidden = !empty.hidden;
    if (!view.runs.length) return;
    if (!view.focus) choose(view.runs.find((run) => run.state === "training")?.name ?? view.runs[0].name, true);
    fillList(list, view, choose);
    fillHeader(header, view.runs.find((run) => run.name === view.focus));
    let changed = view.redraw;
    for (const [name, log] of view.chosen) {
      const about = view.runs.find((run) => run.name === name);
      if (!about) changed = view.chosen.delete(name);
      else changed = (await log.refresh()) || changed;
    }
    if (changed) {
      view.redraw = false;
      charts.draw();
      samples.fill(view.chosen.get(view.focus), view.runs.find((run) => run.name === view.focus));
    }
  }

  /** Show a run's curves, or no longer; the run chosen last is the one that the words are about. */
  function choose(name, on) {
    if (on) view.chosen.set(name, view.chosen.get(name) ?? new Log(name));
    else view.chosen.delete(name);
    view.focus = on ? name : [...view.chosen.keys()].at(-1) ?? "";
    view.redraw = true;
    if (view.runs.length && view.shown) tick();
  }

  let busy = false;
  async function tick() {
    if (!view.shown || busy || document.hidden) return;
    busy = true;
    try {
      await refresh();
      panel.querySelector(":scope > .notice")?.remove();
    } catch (error) {
      if (empty.hidden && layout.hidden) panel.replaceChildren(failure(error), empty, layout);
    } finally {
      busy = false;
      if (view.redraw && view.chosen.size) setTimeout(tick);
    }
  }
  setInterval(tick, EVERY);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => ((view.redraw = true), tick()));
  return { show: () => ((view.shown = view.redraw = true), tick()), hide: () => (view.shown = false) };
}

/** The colour of a run: the same as long as it is in the list. */
function colourOf(view, name) {
  view.colours ??= new Map();
  if (!view.colours.has(name)) view.colours.set(name, COLOURS[view.colours.size % COLOURS.length]);
  return view.colours.get(name);
}

function fillList(list, view, choose) {
  const rows = new Map([...list.children].map((row) => [row.dataset.name, row]));
  const fresh = view.runs.map((run) => {
    const row = rows.get(run.name) ?? makeRow(run.name, view, choose);
    const on = view.chosen.has(run.name);
    row.firstChild.setAttribute("aria-pressed", on);
    row.firstChild.classList.toggle("focus", run.name === view.focus);
    const quality = run.bits_per_byte ? `${number(run.bits_per_byte, 3)} bits per byte` : "not measured yet";
    const state = run.state === "training" && run.progress ? `${STATES.training}, ${percent(run.progress)}` : STATES[run.state];
    row.querySelector(".run-facts").textContent = `${quality} · ${state}`;
    row.firstChild.classList.toggle("going", run.state === "training");
    return row;
  });
  if (fresh.some((row, i) => list.children[i] !== row) || list.children.length !== fresh.length) list.replaceChildren(...fresh);
}

function makeRow(name, view, choose) {
  const swatch = el("span", { className: "swatch" });
  swatch.style.setProperty("--swatch", `var(${colourOf(view, name)})`);
  const toggleRun = () => choose(name, !view.chosen.has(name));
  const row = el("li", {}, el("button", { type: "button", onclick: toggleRun }, swatch, el("span", { className: "run-name" }, name), el("span", { className: "run-facts" })));
  row.dataset.name = name;
  return row;
}

function fillHeader(header, run) {
  const key = JSON.stringify(run ?? null);
  if (header.dataset.key === key) return;
  header.dataset.key = key;
  if (!run) {
    header.replaceChildren(el("p", { className: "quiet" }, "Choose a run to see how it learned."));
    return;
  }
  const { settings } = run;
  const shape = settings.n_layer ? `${settings.arch}, ${settings.n_layer} layers, ${settings.n_head} heads, ${settings.n_embd} wide, context ${settings.context_length}` : "";
  const text = run.text.sources.length ? `${run.text.sources.slice(0, 3).join(", ")}, ${number(run.text.bytes)} bytes` : "";
  const left = run.state === "training" && run.progress ? duration((run.seconds / run.progress) * (1 - run.progress)) : "";
  header.replaceChildren(
    el("h2", {}, run.name),
    el("p", { className: "quiet" }, [text, shape].filter(Boolean).join(" · ")),
    el("p", { className: "verdict" }, verdictOf(run)),
    el("dl", { className: "facts" },
      fact("Held-out text", number(run.bits_per_byte, 3), "bits per byte"),
      fact("Validation loss", number(run.val_loss, 3), "nats per token"),
      fact("Step", run.steps ? `${number(run.step)} of ${number(run.steps)}` : number(run.step)),
      fact("Speed", number(run.tokens_per_second), "tokens/s"),
      fact(left ? "Time left" : "Time", left || duration(run.seconds))),
  );  // prettier-ignore
}

/** The verdict in words; before there is one, what to expect. */
function verdictOf(run) {
  if (run.verdict && run.state === "finished") return run.verdict.sentence;
  if (run.val_loss === null) return "No evaluation yet: the first one measures the model on text that it does not learn from.";
  const nats = Object.entries(run.baselines).filter(([, loss]) => run.val_loss < loss).sort((a, b) => a[1] - b[1])[0];
  const so = nats ? `So far it predicts held-out text better than ${BASELINES[nats[0]]}.` : "So far it predicts held-out text no better than chance.";
  return run.state === "training" ? so : `${so} It stopped before its end; to go on: nanogpt train --resume --out ${run.folder}`;
}

function makeCharts(view) {
  const { options } = view;
  const set = (name) => (value) => ((options[name] = value), draw());
  const holder = (className) => el("div", { className, role: "img" });
  const small = { learning_rate: ["Learning rate", ".3~g", ""], tokens_per_second: ["Speed, tokens/s", ",.0f", "tokens/s"], grad_norm: ["Gradient norm", ".3~g", ""] };
  const main = new Chart(holder("chart large"), losses, () => `Loss in ${options.bits ? "bits per byte" : "nats per token"}`);
  const others = Object.entries(small).map(([name, [title, digits, unit]]) => ({ title, chart: new Chart(holder("chart small"), column(name, digits, unit), title) }));
  const title = el("h3", {});
  const key = (kind, words) => el("span", {}, el("span", { className: `key-line ${kind}` }), words);
  const explain = el("p", { className: "quiet key" }, key("thick", "held-out text"), key("", "training"), key("dotted", "counting alone, from chance to three signs in a row"),
    el("span", {}, "Drag to zoom, double-click to go back."));  // prettier-ignore
  const node = el("div", { className: "panel" },
    el("div", { className: "toolbar" }, title,
      choice("Unit of the loss", [[true, "Bits per byte"], [false, "Nats per token"]], options.bits, set("bits")),
      choice("Horizontal axis", Object.entries(AXES).map(([key, label]) => [key, label.split(" ")[0].replace("seconds", "time")]), options.axis, set("axis")),
      toggle("log x", options.logX, set("logX")), toggle("log y", options.logY, set("logY"))),
    main.div, explain,
    el("div", { className: "small-charts" }, ...others.map(({ title, chart }) => el("figure", {}, el("figcaption", {}, title), chart.div))));  // prettier-ignore

  function draw() {
    const style = getComputedStyle(document.documentElement);
    const runs = [...view.chosen].map(([name, log]) => {
      return { log, colour: style.getPropertyValue(colourOf(view, name)).trim(), about: view.runs.find((run) => run.name === name) };
    });
    title.textContent = "Loss";
    main.draw(runs, { ...options });
    for (const { chart } of others) chart.draw(runs, { ...options, logY: false });
  }
  return { node, draw };
}

/** Samples over time: a slider from gibberish to text. */
function makeSamples() {
  let samples = [];
  let shown = null;
  const slider = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "How far the training had come", oninput: show });
  const where = el("p", { className: "quiet", "aria-live": "off" });
  const text = el("div", { className: "text sample", role: "region", "aria-label": "Sample", tabIndex: 0 });
  const none = el("p", { className: "quiet" }, "Nothing written yet. After each evaluation, the model writes a little from the same random numbers.");
  const some = el("div", { className: "stack close", hidden: true }, el("div", { className: "slider" }, el("span", { className: "quiet" }, "early"), slider, el("span", { className: "quiet" }, "late")), where, text);
  const node = el("div", { className: "panel" }, el("h3", {}, "What it wrote on the way"), none, some);
  let losses = new Map();

  function show() {
    const sample = samples[slider.value];
    const loss = losses.get(sample.step);
    const measured = loss ? `, ${number(loss, 3)} bits per byte` : "";
    where.textContent = `After step ${number(sample.step)}${measured} · sample ${Number(slider.value) + 1} of ${samples.length}`;
    slider.setAttribute("aria-valuetext", `step ${sample.step}${measured}`);
    text.textContent = sample.text;
  }

  function fill(log, about) {
    const atEnd = shown !== about?.name || Number(slider.value) === samples.length - 1;
    shown = about?.name;
    samples = log?.samples ?? [];
    losses = new Map((log?.evaluations ?? []).map((evaluation) => [evaluation.step, evaluation.bits_per_byte]));
    none.hidden = samples.length > 0;
    some.hidden = !none.hidden;
    if (!samples.length) return;
    slider.max = samples.length - 1;
    if (atEnd) slider.value = samples.length - 1;
    show();
  }
  return { node, fill };
}
