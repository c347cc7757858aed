// A text whose tokens can be shaded and picked.

import { el } from "./dom.js";
import { tokenLabel } from "./format.js";

/** A text of tokens in a box. */
export class TokenText {
  /**
   * @param {string} label
   * @param {object} [options]
   * @param {(i: number, span: HTMLElement) => void} [options.onpick] for a click, Enter or Space
   * @param {(i: number) => string} [options.describe] words for a pointer or a screen reader
   */
  constructor(label, { onpick = null, describe = () => "" } = {}) {
    this.spans = [];
    this.texts = [];
    this.onpick = onpick;
    this.describe = describe;
    this.node = el("div", { className: "text tokens", role: "group", "aria-label": label });
    if (!onpick) return;
    this.node.classList.add("pickable");
    const listeners = {
      click: (event) => this.pick(this.indexOf(event.target)),
      keydown: (event) => this.handleKey(event),
      focusin: (event) => this.labelToken(this.indexOf(event.target)),
      pointerover: (event) => this.labelToken(this.indexOf(event.target)),
    };
    for (const [name, listener] of Object.entries(listeners)) {
      this.node.addEventListener(name, listener);
    }
  }

  /**
   * Replace the tokens. The last token of a character has its text; those before it are empty.
   * @param {string[]} texts
   */
  set(texts) {
    this.spans = [];
    this.texts = [];
    this.node.replaceChildren();
    this.append(texts);
  }

  /** @param {string[]} texts */
  append(texts) {
    for (const text of texts) {
      const span = el("span", {}, text);
      if (text.endsWith("\n")) span.className = "ends-line";
      span.dataset.i = this.spans.length;
      if (this.onpick) {
        span.setAttribute("role", "button");
        span.tabIndex = text && !this.texts.some(Boolean) ? 0 : -1;
      }
      this.spans.push(span);
      this.texts.push(text);
      this.node.append(span);
    }
  }

  /** Append text to the last token. */
  extendLast(text) {
    const last = this.texts.length - 1;
    this.texts[last] += text;
    this.spans[last].textContent = this.texts[last];
  }

  /** Remove the tokens from index `i` on. */
  truncate(i) {
    for (const span of this.spans.splice(i)) span.remove();
    this.texts.length = i;
  }

  /**
   * Shade tokens: negative values in the cool colour, positive ones in the warm colour.
   * @param {number[]} values from -1 to 1
   */
  shade(values, start = 0) {
    values.forEach((value, k) => {
      const span = this.spans[start + k];
      span.style.setProperty("--heat", `${Math.round(100 * Math.min(1, Math.abs(value)))}%`);
      span.classList.toggle("cold", value < 0);
    });
  }

  /** Mark one token as selected. */
  select(i) {
    this.node.querySelector(".selected")?.classList.remove("selected");
    this.spans[i]?.classList.add("selected");
  }

  indexOf(target) {
    const span = target.closest?.("[data-i]");
    return span && this.node.contains(span) ? Number(span.dataset.i) : null;
  }

  pick(i) {
    if (i === null) return;
    this.focusToken(i);
    this.onpick(i, this.spans[i]);
  }

  /** Label a token when it is reached: labelling all of them at once would be slow. */
  labelToken(i) {
    if (i === null) return;
    const words = this.describe(i);
    this.spans[i].title = words;
    this.spans[i].setAttribute("aria-label", `${tokenLabel(this.texts[i])}: ${words}`);
  }

  focusToken(i) {
    const previous = this.node.querySelector("[tabindex='0']");
    if (previous) previous.tabIndex = -1;
    this.spans[i].tabIndex = 0;
    this.spans[i].focus({ preventScroll: true });
  }

  handleKey(event) {
    const i = this.indexOf(event.target);
    if (i === null) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.pick(i);
      return;
    }
    const target = this.keyTarget(event.key, i);
    if (target === undefined || !this.spans[target]) return;
    event.preventDefault();
    this.focusToken(target);
    this.spans[target].scrollIntoView({ block: "nearest" });
  }

  keyTarget(key, i) {
    switch (key) {
      case "ArrowRight":
        return this.nextVisible(i + 1, 1);
      case "ArrowLeft":
        return this.nextVisible(i - 1, -1);
      case "Home":
        return this.nextVisible(0, 1);
      case "End":
        return this.nextVisible(this.spans.length - 1, -1);
      case "ArrowDown":
        return this.onNextLine(i, 1);
      case "ArrowUp":
        return this.onNextLine(i, -1);
      default:
        return undefined;
    }
  }

  nextVisible(i, step) {
    while (this.texts[i] === "") i += step;
    return i;
  }

  /** Return the nearest token on the next line in a direction. */
  onNextLine(i, direction) {
    const here = this.spans[i].getBoundingClientRect();
    let nearest;
    let minDistance = Infinity;
    let lineTop = null;
    for (let j = i + direction; this.spans[j]; j += direction) {
      const box = this.spans[j].getBoundingClientRect();
      if (!this.texts[j] || Math.abs(box.top - here.top) < here.height / 2) continue;
      lineTop ??= box.top;
      if (Math.abs(box.top - lineTop) >= here.height / 2) break;
      const distance = Math.abs(box.left - here.left);
      if (distance < minDistance) {
        minDistance = distance;
        nearest = j;
      }
    }
    return nearest;
  }
}
