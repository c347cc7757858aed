// A text whose characters can be shaded, chosen and asked about: used wherever one looks at single tokens.

import { el, nameOf } from "./dom.js";

/** A text of tokens in a box. `onpick(i, span)` is called for a click, Enter or Space; `describe(i)` says a token in words, for a pointer or a screen reader. */
export class TokenText {
  constructor(label, { onpick, describe = () => "" } = {}) {
    this.spans = [];
    this.texts = [];
    Object.assign(this, { onpick, describe });
    this.node = el("div", { className: "text tokens", role: "group", "aria-label": label });
    if (!onpick) return;
    this.node.classList.add("pickable");
    this.node.addEventListener("click", (event) => this.pick(this.place(event.target)));
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("focusin", (event) => this.name(this.place(event.target)));
    this.node.addEventListener("pointerover", (event) => this.name(this.place(event.target)));
  }

  /** Begin anew with these tokens' texts; one of several tokens' characters belongs to the last of them, so texts may be empty. */
  set(texts) {
    this.spans = [];
    this.texts = [];
    this.node.replaceChildren();
    this.add(texts);
  }

  add(texts) {
    for (const text of texts) {
      const span = el("span", {}, text);
      if (text.endsWith("\n")) span.className = "ends-line";
      span.dataset.i = this.spans.length;
      if (this.onpick) {
        span.setAttribute("role", "button");
        span.tabIndex = this.spans.length ? -1 : 0;
      }
      this.spans.push(span);
      this.texts.push(text);
      this.node.append(span);
    }
  }

  /** Put text behind the last token, as part of it. */
  extend(text) {
    this.texts[this.texts.length - 1] += text;
    this.spans.at(-1).textContent = this.texts.at(-1);
  }

  /** Cut off the tokens from place `i` on. */
  cut(i) {
    for (const span of this.spans.splice(i)) span.remove();
    this.texts.length = i;
  }

  /** Shade the tokens by numbers from -1 to 1: below zero in the cool colour, above in the warm one. */
  shade(values, from = 0) {
    for (let i = from; i < this.spans.length; i++) {
      const value = values[i] ?? 0;
      this.spans[i].style.setProperty("--heat", `${Math.round(100 * Math.min(1, Math.abs(value)))}%`);
      this.spans[i].classList.toggle("cold", value < 0);
    }
  }

  /** Mark one token as the chosen one, or none. */
  choose(i) {
    this.node.querySelector(".chosen")?.classList.remove("chosen");
    if (i !== null) this.spans[i]?.classList.add("chosen");
  }

  place(target) {
    const span = target.closest?.("[data-i]");
    return span && this.node.contains(span) ? Number(span.dataset.i) : null;
  }

  pick(i) {
    if (i === null) return;
    this.reach(i);
    this.onpick(i, this.spans[i]);
  }

  /** Name a token when it is reached, which is cheaper than to name all of them. */
  name(i) {
    if (i === null) return;
    const words = this.describe(i);
    this.spans[i].title = words;
    this.spans[i].setAttribute("aria-label", `${nameOf(this.texts[i])}: ${words}`);
  }

  reach(i) {
    const before = this.node.querySelector("[tabindex='0']");
    if (before) before.tabIndex = -1;
    this.spans[i].tabIndex = 0;
    this.spans[i].focus({ preventScroll: true });
  }

  key(event) {
    const i = this.place(event.target);
    if (i === null) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.pick(i);
      return;
    }
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: this.spans.length - 1 }[event.key] ?? this.lineAway(i, { ArrowDown: 1, ArrowUp: -1 }[event.key]);
    if (to === undefined || !this.spans[to]) return;
    event.preventDefault();
    this.reach(to);
    this.spans[to].scrollIntoView({ block: "nearest" });
  }

  /** The token below or above another, on the next line that has one. */
  lineAway(i, direction) {
    if (!direction) return undefined;
    const here = this.spans[i].getBoundingClientRect();
    let [best, nearest, line] = [undefined, Infinity, null];
    for (let j = i + direction; this.spans[j]; j += direction) {
      const box = this.spans[j].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < here.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) >= here.height / 2) break;
      if (Math.abs(box.left - here.left) < nearest) [best, nearest] = [j, Math.abs(box.left - here.left)];
    }
    return best;
  }
}

/** How unlikely a token was, as a shade: none for a certain one, all for one in a thousand. */
export function shadeOfBits(bits) {
  return Math.min(1, bits / 10);
}
