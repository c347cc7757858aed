// What was likely at a place of a text: a small window beside it, with a bar for each token.

import { el, nameOf, percent } from "./dom.js";

/** The window. `advice` says below the bars what choosing one does. */
export class Likely {
  constructor(advice) {
    this.title = el("h3", {});
    this.list = el("ul", {});
    this.node = el("div", { className: "likely", popover: "auto", role: "dialog" }, this.title, this.list, el("p", { className: "quiet" }, advice));
    this.node.addEventListener("toggle", (event) => event.newState === "closed" && this.giveBack());
    this.list.addEventListener("keydown", (event) => this.key(event));
  }

  /** Open it beside `span`. `entries` are {text, share, taken}; `onchoose(text)` is called for the one that is chosen, where one may choose. */
  open(span, title, entries, onchoose) {
    this.origin = span;
    this.title.textContent = title;
    this.node.setAttribute("aria-label", title);
    this.list.replaceChildren(...entries.map((entry) => el("li", {}, this.row(entry, onchoose))));
    this.node.showPopover();
    const [box, own] = [span.getBoundingClientRect(), this.node.getBoundingClientRect()];
    const below = box.bottom + own.height + 14 < innerHeight || box.top < own.height;
    this.node.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8))}px`;
    this.node.style.top = `${below ? box.bottom + 6 : box.top - own.height - 6}px`;
    (this.list.querySelector("button") ?? this.node).focus({ preventScroll: true });
  }

  /** A part of a character, which the server writes as bytes, cannot be chosen: text cannot go on from it. */
  row({ text, share, taken }, onchoose) {
    const bar = el("span", { className: "bar" });
    bar.style.setProperty("--share", `${100 * share}%`);
    const words = `${nameOf(text)}, ${percent(share)}${taken ? ", which stands there" : ""}`;
    const parts = [el("span", { className: "token-name" }, nameOf(text)), el("span", { className: "share" }, percent(share)), bar];
    if (!onchoose || text.startsWith("bytes:\\x")) return el("div", { className: taken ? "taken" : "", "aria-label": words, role: "img" }, ...parts);
    const choose = () => {
      this.origin = null;
      this.node.hidePopover();
      onchoose(text);
    };
    return el("button", { type: "button", className: taken ? "taken" : "", "aria-label": words, onclick: choose }, ...parts);
  }

  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...this.list.querySelectorAll("button")];
    if (!step || !buttons.length) return;
    event.preventDefault();
    buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length].focus();
  }

  giveBack() {
    if (this.origin?.isConnected && (document.activeElement === document.body || this.node.contains(document.activeElement))) this.origin.focus({ preventScroll: true });
  }
}
