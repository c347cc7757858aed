// Attention: every layer and head as a small map; one of them large, and as arcs over the text from a chosen character.

import { ask } from "./api.js";
import { choice, el, nameOf, number, percent, svg } from "./dom.js";
import { TokenText } from "./tokens.js";

const ARCS = 12; // at most, the strongest
const NEAR = 5; // characters back, about a word, are no distance
const FAINT = 0.02; // a share of attention below which no arc is drawn

export function attentionView() {
  let found = null;
  const view = { layer: 0, head: 0, place: 0, how: "one" };
  const maps = el("div", { className: "maps", role: "radiogroup", "aria-label": "Layers and heads" });
  const large = el("canvas", { className: "map-large", role: "img", tabIndex: 0 });
  const reading = el("p", { className: "quiet reading", "aria-live": "polite" });
  const arcs = svg("svg", { class: "arcs", "aria-hidden": "true" });
  const text = new TokenText("The text; choose a character to see what it attends to", {
    onpick: (i) => ((view.place = i), point()),
    describe: (i) => (i <= view.place ? `${percent(weight(view.place, i))} of its attention` : "comes later"),
  });
  const stage = el("div", { className: "stage" }, text.node, arcs);
  const average = choice("Which attention", [["one", "One head"], ["layer", "Mean of the layer"]], view.how, (how) => ((view.how = how), paint()));
  const title = el("h3", {});
  const cut = el("p", { className: "quiet" });
  const node = el("div", { className: "panel" }, el("p", { className: "quiet" }, "Before it predicts the next character, each head looks back. A row is a character, its columns those it looks at: the deeper the colour, the more. Choose a map, named by its layer and head, then a character."),
    cut, maps, el("div", { className: "toolbar" }, title, average), el("div", { className: "attention" }, el("div", {}, stage, reading), large));  // prettier-ignore

  /** The share that token i takes from token j, of the head or layer that is shown. */
  function weight(i, j) {
    const { heads, tokens, weights } = found;
    const at = (head) => weights[((view.layer * heads + head) * tokens + i) * tokens + j];
    if (view.how === "one") return at(view.head);
    let sum = 0;
    for (let head = 0; head < heads; head++) sum += at(head);
    return sum / heads;
  }

  async function show(model, given) {
    const answer = await ask("/page/look/attention", { model, text: given });
    const bytes = Uint8Array.from(atob(answer.weights), (sign) => sign.charCodeAt(0));
    found = { ...answer, tokens: answer.pieces.length, weights: new Float32Array(bytes.buffer) };
    [view.layer, view.head, view.place] = mostTelling();
    cut.textContent = found.tokens < answer.length ? `The first ${number(found.tokens)} of ${number(answer.length)} tokens: as far as the model looks back, or as a page can show.` : "";
    text.set(found.pieces);
    drawMaps();
    paint();
  }

  /** Where to begin: the head that looks most decidedly at something farther back, and the character at which it does. */
  function mostTelling() {
    const { layers, heads, tokens, weights } = found;
    let best = [0, 0, tokens - 1];
    let most = 0;
    for (let k = 0; k < layers * heads; k++) {
      let [sum, strongest, place] = [0, 0, tokens - 1];
      for (let i = NEAR; i < tokens; i++) {
        const row = weights.subarray((k * tokens + i) * tokens, (k * tokens + i) * tokens + i - NEAR + 1);
        const share = Math.max(...row);
        sum += share;
        if (share > strongest) [strongest, place] = [share, i];
      }
      if (sum > most) [most, best] = [sum, [Math.floor(k / heads), k % heads, place]];
    }
    return best;
  }

  function drawMaps() {
    const across = found.heads < found.layers; // whichever are more go from left to right
    maps.style.setProperty("--columns", across ? found.layers : found.heads);
    maps.style.setProperty("--flow", across ? "column" : "row");
    maps.style.setProperty("--rows", across ? found.heads : found.layers);
    const [down, right] = across ? [1, found.heads] : [found.heads, 1];
    const buttons = Array.from({ length: found.layers * found.heads }, (_, k) => {
      const [layer, head] = [Math.floor(k / found.heads), k % found.heads];
      const canvas = el("canvas", {});
      drawMap(canvas, found, (i, j) => found.weights[(k * found.tokens + i) * found.tokens + j], 96);
      const pick = () => (([view.layer, view.head, view.how] = [layer, head, "one"]), average.firstChild.click());
      return el("button", { type: "button", role: "radio", onclick: pick, "aria-label": `Layer ${layer}, head ${head}` }, canvas, el("span", { className: "quiet" }, `${layer}.${head}`));
    });
    maps.onkeydown = (event) => {
      const step = { ArrowRight: right, ArrowLeft: -right, ArrowDown: down, ArrowUp: -down }[event.key];
      const next = step && buttons[buttons.indexOf(document.activeElement) + step];
      if (!next) return;
      event.preventDefault();
      next.focus();
      next.click();
    };
    maps.replaceChildren(...buttons);
  }

  function paint() {
    const k = view.layer * found.heads + view.head;
    [...maps.children].forEach((button, i) => {
      button.setAttribute("aria-checked", view.how === "one" ? i === k : Math.floor(i / found.heads) === view.layer);
      button.tabIndex = i === k ? 0 : -1;
    });
    title.textContent = view.how === "one" ? `Layer ${view.layer}, head ${view.head}` : `Layer ${view.layer}, mean of ${found.heads} heads`;
    large.setAttribute("aria-label", `Attention map of ${title.textContent}`);
    drawMap(large, found, weight, 420);
    point();
  }

  /** Shade the text by what the chosen character takes, and draw the strongest as arcs. */
  function point() {
    const shares = found.pieces.map((_, j) => (j <= view.place ? weight(view.place, j) : 0));
    const most = Math.max(...shares);
    text.shade(shares.map((share) => share / most));
    text.choose(view.place);
    const strongest = shares.map((share, j) => [share, j]).filter(([share]) => share >= FAINT).sort((a, b) => b[0] - a[0]).slice(0, ARCS);
    drawArcs(strongest);
    const words = strongest.slice(0, 3).map(([share, j]) => `${percent(share)} on ${j === view.place ? "itself" : `“${nameOf(found.pieces[j])}” ${view.place - j} back`}`);
    reading.textContent = `“${nameOf(found.pieces[view.place])}” looks: ${words.join(", ") || "everywhere a little"}.`;
  }

  function drawArcs(strongest) {
    const frame = stage.getBoundingClientRect();
    const middle = (span) => {
      const boxes = span.getClientRects();
      const box = boxes[0] ?? span.getBoundingClientRect();
      return [box.left + box.width / 2 - frame.left, box.top - frame.top + 3];
    };
    arcs.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    const [x, y] = middle(text.spans[view.place]);
    arcs.replaceChildren(...strongest.filter(([, j]) => j !== view.place).map(([share, j]) => {
      const [u, v] = middle(text.spans[j]);
      const height = Math.min(y, v) - Math.min(60, 14 + Math.abs(x - u) / 5);
      return svg("path", { d: `M${x},${y} C${x},${height} ${u},${height} ${u},${v}`, "stroke-width": 1 + 4 * share, "stroke-opacity": 0.25 + 0.75 * Math.sqrt(share) });
    }));  // prettier-ignore
  }

  large.addEventListener("pointermove", (event) => {
    const [i, j] = [event.offsetY, event.offsetX].map((at) => Math.floor((at / large.clientWidth) * found.tokens));
    if (i >= found.tokens || j > i || j < 0) return;
    reading.textContent = `“${nameOf(found.pieces[i])}” takes ${percent(weight(i, j))} from “${nameOf(found.pieces[j])}”, ${i - j} back.`;
  });
  large.addEventListener("click", (event) => {
    const i = Math.floor((event.offsetY / large.clientWidth) * found.tokens);
    if (i < found.tokens) [view.place] = [i], point();
  });
  large.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !found.pieces[view.place + step]) return;
    event.preventDefault();
    view.place += step;
    point();
  });
  addEventListener("resize", () => node.isConnected && found && point());
  return { node, show, repaint: () => (drawMaps(), paint()) };
}

/** A square map of weights, as many points wide as there are tokens, or `most` where there are more: each then stands for the strongest of its neighbours. */
function drawMap(canvas, { tokens }, weight, most) {
  const size = Math.min(tokens, most);
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const [red, green, blue] = rgb(getComputedStyle(document.documentElement).getPropertyValue("--accent").trim());
  const strongest = new Float32Array(size * size);
  for (let i = 0; i < tokens; i++) {
    for (let j = 0; j <= i; j++) {
      const at = Math.floor((i * size) / tokens) * size + Math.floor((j * size) / tokens);
      strongest[at] = Math.max(strongest[at], weight(i, j));
    }
  }
  strongest.forEach((share, at) => image.data.set([red, green, blue, Math.round(255 * Math.sqrt(share))], 4 * at));
  context.putImageData(image, 0, 0);
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}
