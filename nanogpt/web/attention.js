// Attention: every layer and head as a small map; one of them large, and as arcs over the text from a chosen character.

import { ask } from "./api.js";
import { choice, el, nameOf, number, percent, svg } from "./dom.js";
import { TokenText } from "./tokens.js";

const ARCS = 12; // at most, the strongest
const NEAR = 5; // characters back, about a word, are no distance
const FAINT = 0.02; // a share of attention below which no arc is drawn

/** The view, with the `node` that holds it. */
export class AttentionView {
  layer = 0;
  head = 0;
  place = 0; // of the character that looks
  how = "one";
  title = el("h3", {});
  cut = el("p", { className: "quiet" });
  maps = el("div", { className: "maps", role: "radiogroup", "aria-label": "Layers and heads", onkeydown: (event) => this.key(event) });
  large = el("canvas", { className: "map-large", role: "img", tabIndex: 0 });
  reading = el("p", { className: "quiet reading", "aria-live": "polite" });
  arcs = svg("svg", { class: "arcs", "aria-hidden": "true" });
  text = new TokenText("The text; choose a character to see what it attends to", {
    onpick: (i) => this.point(i),
    describe: (i) => (i <= this.place ? `${percent(this.weight(this.place, i))} of its attention` : "comes later"),
  });

  constructor() {
    this.stage = el("div", { className: "stage" }, this.text.node, this.arcs);
    this.average = choice("Which attention", [["one", "One head"], ["layer", "Mean of the layer"]], this.how, (how) => ((this.how = how), this.paint()));
    const words = "Before it predicts the next character, each head looks back. A row is a character, its columns those it looks at: the deeper the colour, the more.";
    this.node = el("div", { className: "panel" }, el("p", { className: "quiet" }, `${words} Choose a map, named by its layer and head, then a character.`), this.cut, this.maps,
      el("div", { className: "toolbar" }, this.title, this.average), el("div", { className: "attention" }, el("div", {}, this.stage, this.reading), this.large));  // prettier-ignore
    this.large.addEventListener("pointermove", (event) => this.hover(event));
    this.large.addEventListener("click", (event) => this.point(this.tokenAt(event.offsetY)));
    this.large.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.point(this.place + step);
    });
    addEventListener("resize", () => this.node.isConnected && this.found && this.point(this.place));
  }

  async show(model, given) {
    const answer = await ask("/page/look/attention", { model, text: given });
    const bytes = Uint8Array.from(atob(answer.weights), (sign) => sign.charCodeAt(0));
    this.found = { ...answer, tokens: answer.pieces.length, weights: new Float32Array(bytes.buffer) };
    [this.layer, this.head, this.place] = this.mostTelling();
    const { tokens, length } = this.found;
    this.cut.textContent = tokens < length ? `The first ${number(tokens)} of ${number(length)} tokens: as far as the model looks back, or as a page can show.` : "";
    this.text.set(answer.pieces);
    this.repaint();
  }

  repaint() {
    this.drawMaps();
    this.paint();
  }

  /** The share that token i takes from token j, of the head or layer that is shown. */
  weight(i, j) {
    const { heads, tokens, weights } = this.found;
    const at = (head) => weights[((this.layer * heads + head) * tokens + i) * tokens + j];
    if (this.how === "one") return at(this.head);
    let sum = 0;
    for (let head = 0; head < heads; head++) sum += at(head);
    return sum / heads;
  }

  /** Where to begin: the head that looks most decidedly at something farther back, and the character at which it does. */
  mostTelling() {
    const { layers, heads, tokens, weights } = this.found;
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

  /** The small maps: layers from top to bottom and heads from left to right, or the other way round where there are more layers. */
  drawMaps() {
    const { layers, heads, tokens, weights } = this.found;
    const across = heads < layers;
    for (const [name, value] of [["columns", across ? layers : heads], ["rows", across ? heads : layers], ["flow", across ? "column" : "row"]]) {  // prettier-ignore
      this.maps.style.setProperty(`--${name}`, value);
    }
    const buttons = Array.from({ length: layers * heads }, (_, k) => {
      const [layer, head] = [Math.floor(k / heads), k % heads];
      const canvas = el("canvas", {});
      drawMap(canvas, tokens, (i, j) => weights[(k * tokens + i) * tokens + j], 96);
      const pick = () => (([this.layer, this.head] = [layer, head]), this.average.firstChild.click());
      return el("button", { type: "button", role: "radio", onclick: pick, "aria-label": `Layer ${layer}, head ${head}` }, canvas, el("span", { className: "quiet" }, `${layer}.${head}`));
    });
    this.maps.replaceChildren(...buttons);
  }

  /** Go to the map beside, above or below. */
  key(event) {
    const { layers, heads } = this.found;
    const [right, down] = heads < layers ? [heads, 1] : [1, heads];
    const step = { ArrowRight: right, ArrowLeft: -right, ArrowDown: down, ArrowUp: -down }[event.key];
    const next = step && this.maps.children[[...this.maps.children].indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }

  /** Show the head or layer that was chosen. */
  paint() {
    const { heads, tokens } = this.found;
    [...this.maps.children].forEach((button, k) => {
      const [layer, head] = [Math.floor(k / heads), k % heads];
      button.setAttribute("aria-checked", layer === this.layer && (this.how === "layer" || head === this.head));
      button.tabIndex = layer === this.layer && head === this.head ? 0 : -1;
    });
    this.title.textContent = this.how === "one" ? `Layer ${this.layer}, head ${this.head}` : `Layer ${this.layer}, mean of ${heads} heads`;
    this.large.setAttribute("aria-label", `Attention map of ${this.title.textContent}`);
    drawMap(this.large, tokens, (i, j) => this.weight(i, j), 420);
    this.point(this.place);
  }

  /** Shade the text by what a character takes, and draw the strongest as arcs. */
  point(place) {
    const { pieces } = this.found;
    if (!(place in pieces)) return;
    this.place = place;
    const shares = pieces.map((_, j) => (j <= place ? this.weight(place, j) : 0));
    const most = Math.max(...shares);
    this.text.shade(shares.map((share) => share / most));
    this.text.choose(place);
    const strongest = shares.map((share, j) => [share, j]).filter(([share]) => share >= FAINT).sort((a, b) => b[0] - a[0]).slice(0, ARCS);
    this.drawArcs(strongest);
    const words = strongest.slice(0, 3).map(([share, j]) => `${percent(share)} to ${j === place ? "itself" : `“${nameOf(pieces[j])}”, ${place - j} back`}`);
    this.reading.textContent = `“${nameOf(pieces[place])}” attends: ${words.join("; ") || "everywhere a little"}.`;
  }

  drawArcs(strongest) {
    const frame = this.stage.getBoundingClientRect();
    const middle = (i) => {
      const box = this.text.spans[i].getClientRects()[0] ?? this.text.spans[i].getBoundingClientRect();
      return [box.left + box.width / 2 - frame.left, box.top - frame.top + 3];
    };
    this.arcs.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    const [x, y] = middle(this.place);
    const paths = strongest.filter(([, j]) => j !== this.place).map(([share, j]) => {
      const [u, v] = middle(j);
      const height = Math.min(y, v) - Math.min(60, 14 + Math.abs(x - u) / 5);
      return svg("path", { d: `M${x},${y} C${x},${height} ${u},${height} ${u},${v}`, "stroke-width": 1 + 4 * share, "stroke-opacity": 0.25 + 0.75 * Math.sqrt(share) });
    });  // prettier-ignore
    this.arcs.replaceChildren(...paths);
  }

  tokenAt(offset) {
    return Math.floor((offset / this.large.clientWidth) * this.found.tokens);
  }

  /** Say what stands under the pointer on the large map. */
  hover(event) {
    const [i, j] = [this.tokenAt(event.offsetY), this.tokenAt(event.offsetX)];
    const { pieces } = this.found;
    if (!(i in pieces) || !(j in pieces) || j > i) return;
    this.reading.textContent = `“${nameOf(pieces[i])}” takes ${percent(this.weight(i, j))} from “${nameOf(pieces[j])}”, ${i - j} back.`;
  }
}

/** A square map of weights, as many points wide as there are tokens, or `most` where there are more: each then stands for the strongest of its neighbours. */
function drawMap(canvas, tokens, weight, most) {
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
