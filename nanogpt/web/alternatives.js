// The alternatives to one token: a popover beside it, with a bar for each.

import { el, fromTemplate } from "./dom.js";
import { formatPercent, tokenLabel } from "./format.js";

const MARGIN = 8; // px

/** The popover. */
export class AlternativesPopover {
  /** @param {string} hint shown below the bars */
  constructor(hint) {
    const { node, refs } = fromTemplate("alternatives");
    this.node = node;
    this.title = refs.title;
    this.list = refs.list;
    this.origin = null;
    refs.hint.textContent = hint;
    node.addEventListener("toggle", (event) => {
      if (event.newState === "closed") this.restoreFocus();
    });
    this.list.addEventListener("keydown", (event) => this.handleKey(event));
  }

  /**
   * Open beside a token.
   * @param {HTMLElement} span
   * @param {string} title
   * @param {Alternative[]} entries
   * @param {?(entry: Alternative) => void} onchoose null if nothing can be chosen
   *
   * @typedef {object} Alternative
   * @property {?string} text null for part of a character, which cannot be chosen
   * @property {number} probability
   * @property {boolean} isChosen
   */
  open(span, title, entries, onchoose) {
    this.origin = span;
    this.title.textContent = title;
    this.node.setAttribute("aria-label", title);
    const rows = entries.map((entry) => el("li", {}, this.row(entry, onchoose)));
    this.list.replaceChildren(...rows);
    this.node.showPopover();
    this.place(span);
    (this.list.querySelector("button") ?? this.node).focus({ preventScroll: true });
  }

  place(span) {
    const box = span.getBoundingClientRect();
    const own = this.node.getBoundingClientRect();
    const fitsBelow = box.bottom + own.height + 14 < innerHeight || box.top < own.height;
    const maxLeft = document.documentElement.clientWidth - own.width - MARGIN;
    const top = fitsBelow ? box.bottom + 6 : box.top - own.height - 6;
    this.node.style.left = `${Math.max(MARGIN, Math.min(box.left, maxLeft))}px`;
    this.node.style.top = `${top}px`;
  }

  row(entry, onchoose) {
    const name = tokenLabel(entry.text ?? "");
    const probability = formatPercent(entry.probability);
    const bar = el("span", { className: "bar" });
    bar.style.setProperty("--fraction", `${100 * entry.probability}%`);
    const parts = [
      el("span", { className: "token-name" }, name),
      el("span", { className: "fraction" }, probability),
      bar,
    ];
    const className = entry.isChosen ? "is-chosen" : "";
    const label = `${name}, ${probability}${entry.isChosen ? ", in the text" : ""}`;
    if (!onchoose || entry.text === null) {
      return el("div", { className, "aria-label": label, role: "img" }, ...parts);
    }
    const onclick = () => {
      this.origin = null;
      this.node.hidePopover();
      onchoose(entry);
    };
    return el("button", { type: "button", className, "aria-label": label, onclick }, ...parts);
  }

  handleKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...this.list.querySelectorAll("button")];
    if (!step || !buttons.length) return;
    event.preventDefault();
    const next = buttons.indexOf(document.activeElement) + step + buttons.length;
    buttons[next % buttons.length].focus();
  }

  restoreFocus() {
    const active = document.activeElement;
    const isOurs = active === document.body || this.node.contains(active);
    if (this.origin?.isConnected && isOurs) this.origin.focus({ preventScroll: true });
  }
}
