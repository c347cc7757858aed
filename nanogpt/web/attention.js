// Attention: a small map for every head, a large one, and arcs from a token to those it attends to.

import { fetchJson } from "./api.js";
import { el, fromTemplate, SegmentedControl, svg } from "./dom.js";
import { formatNumber, formatPercent, tokenLabel } from "./format.js";
import { TokenText } from "./token_text.js";

const MAX_ARCS = 12;
const MIN_DISTANCE = 5; // tokens; closer targets do not count as telling
const MIN_WEIGHT = 0.02; // of an arc
const SMALL_MAP = 96; // px
const LARGE_MAP = 420; // px

/** The attention weights of a text, (layers, heads, T, T). */
class AttentionWeights {
  constructor({ token_texts, num_tokens, layers, heads, weights }) {
    const bytes = Uint8Array.from(atob(weights), (char) => char.charCodeAt(0));
    this.tokenTexts = token_texts;
    this.shown = token_texts.length;
    this.numTokens = num_tokens;
    this.layers = layers;
    this.heads = heads;
    this.data = new Float32Array(bytes.buffer);
  }

  /** Return the weight from query i to key j. */
  at(layer, head, i, j) {
    return this.data[((layer * this.heads + head) * this.shown + i) * this.shown + j];
  }

  meanOverHeads(layer, i, j) {
    let sum = 0;
    for (let head = 0; head < this.heads; head += 1) sum += this.at(layer, head, i, j);
    return sum / this.heads;
  }

  /**
   * Return the head that attends most decisively to distant tokens, and the token at which it does.
   * @returns {{layer: number, head: number, token: number}}
   */
  mostInformativeHead() {
    let best = { layer: 0, head: 0, token: this.shown - 1 };
    let maxSum = 0;
    for (let layer = 0; layer < this.layers; layer += 1) {
      for (let head = 0; head < this.heads; head += 1) {
        const { sum, token } = this.distantAttention(layer, head);
        if (sum > maxSum) {
          maxSum = sum;
          best = { layer, head, token };
        }
      }
    }
    return best;
  }

  distantAttention(layer, head) {
    let sum = 0;
    let max = 0;
    let token = this.shown - 1;
    const offset = (layer * this.heads + head) * this.shown;
    for (let i = MIN_DISTANCE; i < this.shown; i += 1) {
      const row = (offset + i) * this.shown;
      const weight = Math.max(...this.data.subarray(row, row + i - MIN_DISTANCE + 1));
      sum += weight;
      if (weight > max) {
        max = weight;
        token = i;
      }
    }
    return { sum, token };
  }
}

/** The view of Inspect. */
export class AttentionView {
  constructor() {
    const { node, refs } = fromTemplate("attention-view");
    this.node = node;
    this.refs = refs;
    this.weights = null;
    this.layer = 0;
    this.head = 0;
    this.token = 0; // the query whose attention is shown
    this.mode = "head";
    this.arcs = svg("svg", { class: "arcs", "aria-hidden": "true" });
    this.text = new TokenText("The text; choose a token to see what it attends to", {
      onpick: (i) => this.selectToken(i),
      describe: (i) => this.describeToken(i),
    });
    refs.stage.append(this.text.node, this.arcs);
    const modes = [
      ["head", "One head"],
      ["layer", "Mean of the layer"],
    ];
    this.modeControl = new SegmentedControl("Heads", modes, this.mode, (mode) => {
      this.mode = mode;
      this.render();
    });
    refs.toolbar.append(this.modeControl.node);
    this.addListeners();
  }

  addListeners() {
    const { maps, map } = this.refs;
    maps.addEventListener("keydown", (event) => this.handleMapKey(event));
    map.addEventListener("pointermove", (event) => this.describeCell(event));
    map.addEventListener("click", (event) => this.selectToken(this.tokenAt(event.offsetY)));
    map.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.selectToken(this.token + step);
    });
    addEventListener("resize", () => {
      if (this.node.isConnected && this.weights) this.selectToken(this.token);
    });
  }

  async update(model, text) {
    const answer = await fetchJson("/page/inspect/attention", { model, text });
    this.weights = new AttentionWeights(answer);
    const { layer, head, token } = this.weights.mostInformativeHead();
    this.layer = layer;
    this.head = head;
    this.token = token;
    const { shown, numTokens, tokenTexts } = this.weights;
    this.refs.truncated.textContent =
      shown < numTokens
        ? `The first ${formatNumber(shown)} of ${formatNumber(numTokens)} tokens.`
        : "";
    this.text.set(tokenTexts);
    this.repaint();
  }

  repaint() {
    this.drawSmallMaps();
    this.render();
  }

  /** Return the weight from query i to key j, of the head or layer that is shown. */
  weight(i, j) {
    if (this.mode === "layer") return this.weights.meanOverHeads(this.layer, i, j);
    return this.weights.at(this.layer, this.head, i, j);
  }

  /** Draw one map per head; the longer of layers and heads runs from left to right. */
  drawSmallMaps() {
    const { layers, heads, shown } = this.weights;
    const layersAcross = heads < layers;
    const grid = {
      "--columns": layersAcross ? layers : heads,
      "--rows": layersAcross ? heads : layers,
      "--flow": layersAcross ? "column" : "row",
    };
    for (const [name, value] of Object.entries(grid)) {
      this.refs.maps.style.setProperty(name, value);
    }
    const buttons = Array.from({ length: layers * heads }, (_, k) => {
      const layer = Math.floor(k / heads);
      const head = k % heads;
      const canvas = el("canvas");
      drawMap(canvas, shown, (i, j) => this.weights.at(layer, head, i, j), SMALL_MAP);
      const properties = {
        type: "button",
        role: "radio",
        onclick: () => this.selectHead(layer, head),
        "aria-label": `Layer ${layer}, head ${head}`,
      };
      const caption = el("span", { className: "text-muted" }, `${layer}.${head}`);
      return el("button", properties, canvas, caption);
    });
    this.refs.maps.replaceChildren(...buttons);
  }

  selectHead(layer, head) {
    this.layer = layer;
    this.head = head;
    this.modeControl.choose("head");
  }

  handleMapKey(event) {
    const { layers, heads } = this.weights;
    const right = heads < layers ? heads : 1;
    const down = heads < layers ? 1 : heads;
    const steps = { ArrowRight: right, ArrowLeft: -right, ArrowDown: down, ArrowUp: -down };
    const step = steps[event.key];
    const buttons = [...this.refs.maps.children];
    const next = step && buttons[buttons.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }

  /** Show the selected head or layer. */
  render() {
    const { heads, shown } = this.weights;
    const isLayer = this.mode === "layer";
    [...this.refs.maps.children].forEach((button, k) => {
      const isInLayer = Math.floor(k / heads) === this.layer;
      const isHead = isInLayer && k % heads === this.head;
      button.setAttribute("aria-checked", isLayer ? isInLayer : isHead);
      button.tabIndex = isHead ? 0 : -1;
    });
    const part = isLayer ? `mean of ${heads} heads` : `head ${this.head}`;
    this.refs.title.textContent = `Layer ${this.layer}, ${part}`;
    this.refs.map.setAttribute("aria-label", `Attention map of layer ${this.layer}, ${part}`);
    drawMap(this.refs.map, shown, (i, j) => this.weight(i, j), LARGE_MAP);
    this.selectToken(this.token);
  }

  /** Shade the text by the attention of one query, and draw its largest weights as arcs. */
  selectToken(token) {
    const { tokenTexts } = this.weights;
    if (!(token in tokenTexts)) return;
    this.token = token;
    const weights = tokenTexts.map((_, j) => (j <= token ? this.weight(token, j) : 0));
    const max = Math.max(...weights);
    this.text.shade(weights.map((weight) => weight / max));
    this.text.select(token);
    const largest = weights
      .map((weight, j) => ({ weight, j }))
      .filter(({ weight }) => weight >= MIN_WEIGHT)
      .sort((a, b) => b.weight - a.weight)
      .slice(0, MAX_ARCS);
    this.drawArcs(largest);
    const words = largest.slice(0, 3).map(({ weight, j }) => {
      const label = `“${tokenLabel(tokenTexts[j])}”, ${token - j} back`;
      const target = j === token ? "itself" : label;
      return `${formatPercent(weight)} to ${target}`;
    });
    const list = words.join("; ") || `at most ${formatPercent(max)} to any token`;
    this.refs.reading.textContent = `“${tokenLabel(tokenTexts[token])}” attends: ${list}.`;
  }

  describeToken(i) {
    if (i > this.token) return "a later token";
    return `${formatPercent(this.weight(this.token, i))} of the attention`;
  }

  drawArcs(targets) {
    const frame = this.refs.stage.getBoundingClientRect();
    const center = (i) => {
      const span = this.text.spans[i];
      const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
      return { x: box.left + box.width / 2 - frame.left, y: box.top - frame.top + 3 };
    };
    this.arcs.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    const from = center(this.token);
    const others = targets.filter(({ j }) => j !== this.token);
    const paths = others.map(({ weight, j }) => arc(from, center(j), weight));
    this.arcs.replaceChildren(...paths);
  }

  tokenAt(offset) {
    return Math.floor((offset / this.refs.map.clientWidth) * this.weights.shown);
  }

  /** Describe the cell of the large map under the pointer. */
  describeCell(event) {
    const { tokenTexts } = this.weights;
    const i = this.tokenAt(event.offsetY);
    const j = this.tokenAt(event.offsetX);
    if (!(i in tokenTexts) || !(j in tokenTexts) || j > i) return;
    const query = tokenLabel(tokenTexts[i]);
    const key = tokenLabel(tokenTexts[j]);
    const weight = formatPercent(this.weight(i, j));
    const text = `“${query}” attends ${weight} to “${key}”, ${i - j} back.`;
    this.refs.reading.textContent = text;
  }
}

function arc(from, to, weight) {
  const height = Math.min(from.y, to.y) - Math.min(60, 14 + Math.abs(from.x - to.x) / 5);
  return svg("path", {
    d: `M${from.x},${from.y} C${from.x},${height} ${to.x},${height} ${to.x},${to.y}`,
    "stroke-width": 1 + 4 * weight,
    "stroke-opacity": 0.25 + 0.75 * Math.sqrt(weight),
  });
}

/**
 * Draw a square map of weights. With more than `maxSize` tokens, a pixel is the maximum of several.
 * @param {HTMLCanvasElement} canvas
 * @param {number} numTokens
 * @param {(i: number, j: number) => number} weight
 * @param {number} maxSize in pixels
 */
function drawMap(canvas, numTokens, weight, maxSize) {
  const size = Math.min(numTokens, maxSize);
  canvas.width = size;
  canvas.height = size;
  const maxima = new Float32Array(size * size);
  for (let i = 0; i < numTokens; i += 1) {
    const row = Math.floor((i * size) / numTokens) * size;
    for (let j = 0; j <= i; j += 1) {
      const pixel = row + Math.floor((j * size) / numTokens);
      maxima[pixel] = Math.max(maxima[pixel], weight(i, j));
    }
  }
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const style = getComputedStyle(document.documentElement);
  const accent = parseHexColour(style.getPropertyValue("--accent").trim());
  maxima.forEach((value, pixel) => {
    image.data.set([...accent, Math.round(255 * Math.sqrt(value))], 4 * pixel);
  });
  context.putImageData(image, 0, 0);
}

function parseHexColour(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}
