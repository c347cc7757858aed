// Elements, numbers and words, as every tab needs them. Text from outside only ever becomes text nodes and attributes, never HTML.

/** An element with properties or attributes, event listeners (`onclick`) and children; strings become text. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** An element of SVG with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A number for a person: with so many digits behind the point, or a dash where it is not known. */
export function number(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A share as per cent: small ones with a digit behind the point. */
export function percent(share) {
  return `${number(100 * share, share < 0.0995 && share > 0 ? 1 : 0)} %`;
}

/** Seconds as a person says them. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

const SIGNS = { "\n": "new line", "\t": "tab", "\r": "carriage return", " ": "space", "\u00a0": "no-break space", "": "part of a character" };

/** What a token is called in a list: its text, or the name of what cannot be seen. */
export function nameOf(text) {
  return SIGNS[text] ?? (text.trim() === "" ? [...text].map((sign) => SIGNS[sign] ?? "blank").join(", ") : text.replaceAll("\n", "↵"));
}

/** Tell a screen reader something that changed elsewhere. */
export function announce(message) {
  document.getElementById("live").textContent = message;
}

/** A sentence that says what went wrong, in place of a result. */
export function failure(error) {
  return el("p", { className: "notice", role: "alert" }, error.message);
}

/** One of several, as a row of buttons: `choices` are pairs of a value and its label. */
export function choice(label, choices, value, onchange) {
  const group = el("div", { className: "segments", role: "radiogroup", "aria-label": label });
  const buttons = choices.map(([key, text]) => el("button", { type: "button", role: "radio", onclick: () => choose(key) }, text));
  function choose(key, quietly = false) {
    choices.forEach(([other], i) => {
      buttons[i].setAttribute("aria-checked", other === key);
      buttons[i].tabIndex = other === key ? 0 : -1;
    });
    if (!quietly) onchange(key);
  }
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (buttons.indexOf(event.target) + step + buttons.length) % buttons.length;
    buttons[next].focus();
    choose(choices[next][0]);
  });
  group.append(...buttons);
  choose(value, true);
  return group;
}

/** A switch with a label behind it. */
export function toggle(label, checked, onchange) {
  const box = el("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return el("label", { className: "switch" }, box, label);
}

/** A number and what it is, below each other. */
export function fact(label, value, unit = "") {
  return el("div", { className: "fact" }, el("dt", {}, label), el("dd", {}, value, unit ? el("span", { className: "unit" }, ` ${unit}`) : ""));
}
