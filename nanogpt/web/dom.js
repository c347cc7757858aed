// Elements. Text from outside only becomes text nodes and attributes, never HTML.

/**
 * Create an element. Properties that start with "on" are event listeners; strings become text.
 * @param {string} tag
 * @param {object} [properties] properties, attributes and listeners
 * @param {...(Node|string)} children
 */
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

/**
 * Create an SVG element.
 * @param {string} tag
 * @param {object} [attributes]
 */
export function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/**
 * Instantiate a <template> of index.html.
 * @param {string} id
 * @returns {{node: HTMLElement, refs: Object<string, HTMLElement>}} the element, and those with
 *   data-ref by that name
 */
export function fromTemplate(id) {
  const node = document.getElementById(id).content.firstElementChild.cloneNode(true);
  const refs = {};
  for (const ref of node.querySelectorAll("[data-ref]")) refs[ref.dataset.ref] = ref;
  return { node, refs };
}

/**
 * Announce a change to screen readers.
 * @param {string} message
 */
export function announce(message) {
  document.getElementById("live").textContent = message;
}

const SPINNER_DELAY = 800; // ms; most answers are faster

/**
 * Await work; if it takes long, say so in `status` meanwhile.
 * @template T
 * @param {Promise<T>} work
 * @param {HTMLElement} status
 * @returns {Promise<T>}
 */
export async function withSpinner(work, status) {
  const timer = setTimeout(() => {
    status.textContent = "Loading the model (up to 30 s the first time) …";
  }, SPINNER_DELAY);
  try {
    return await work;
  } finally {
    clearTimeout(timer);
    status.textContent = "";
  }
}

/**
 * Create a notice with an error's message.
 * @param {Error} error
 */
export function errorNotice(error) {
  return el("p", { className: "notice", role: "alert" }, error.message);
}

/**
 * Submit a form on Ctrl + Enter in its text area.
 * @param {HTMLTextAreaElement} box
 * @param {HTMLFormElement} form
 */
export function submitOnCtrlEnter(box, form) {
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

/** A row of buttons of which one is chosen. */
export class SegmentedControl {
  /**
   * @param {string} label
   * @param {[any, string][]} choices values with their labels
   * @param {any} value
   * @param {(value: any) => void} onchange
   */
  constructor(label, choices, value, onchange) {
    this.choices = choices;
    this.onchange = onchange;
    this.node = el("div", { className: "segments", role: "radiogroup", "aria-label": label });
    this.buttons = choices.map(([key, text]) => {
      const onclick = () => this.choose(key);
      return el("button", { type: "button", role: "radio", onclick }, text);
    });
    this.node.addEventListener("keydown", (event) => this.handleKey(event));
    this.node.append(...this.buttons);
    this.mark(value);
  }

  choose(value) {
    this.mark(value);
    this.onchange(value);
  }

  mark(value) {
    this.choices.forEach(([key], i) => {
      this.buttons[i].setAttribute("aria-checked", key === value);
      this.buttons[i].tabIndex = key === value ? 0 : -1;
    });
  }

  handleKey(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const count = this.buttons.length;
    const next = (this.buttons.indexOf(event.target) + step + count) % count;
    this.buttons[next].focus();
    this.choose(this.choices[next][0]);
  }
}

/**
 * Create a labelled checkbox.
 * @param {string} label
 * @param {boolean} checked
 * @param {(checked: boolean) => void} onchange
 */
export function toggle(label, checked, onchange) {
  const box = el("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return el("label", { className: "switch" }, box, label);
}

/**
 * Create an entry of a <dl class="facts">: a label above a value with its unit.
 * @param {string} label
 * @param {string} value
 */
export function statistic(label, value, unit = "") {
  const suffix = unit ? el("span", { className: "unit" }, ` ${unit}`) : "";
  return el("div", { className: "fact" }, el("dt", {}, label), el("dd", {}, value, suffix));
}
