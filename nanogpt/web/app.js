// The page: four tabs, and the model that three of them use.

import { fetchJson, onOnlineChange, watchChanges } from "./api.js";
import { announce, el } from "./dom.js";
import { GenerateTab } from "./generate.js";
import { InspectTab } from "./inspect.js";
import { MemorizationTab } from "./memorization.js";
import { RunsTab } from "./runs.js";

const TABS = {
  runs: RunsTab,
  generate: GenerateTab,
  inspect: InspectTab,
  memorization: MemorizationTab,
};

/** The chosen model. A "change" event follows each choice; `name` is "" without a model. */
export class ModelChoice extends EventTarget {
  name = "";
  requested = "";

  constructor(select) {
    super();
    this.select = select;
    select.addEventListener("change", () => {
      this.choose(select.value);
      announce(`Model ${select.value}`);
    });
  }

  /** Choose a model; if there is none of that name yet, as soon as there is. */
  choose(name) {
    this.requested = name;
    const isListed = [...this.select.options].some((option) => option.value === name);
    if (name !== this.name && isListed) this.set(name);
  }

  /** Reload the list of models, newest first. */
  async update() {
    const models = await fetchJson("/v1/models").catch(() => null);
    if (!models) return;
    const names = models.data.sort((a, b) => b.created - a.created).map((model) => model.id);
    const listed = [...this.select.options].map((option) => option.value);
    if (names.length && names.join("\n") === listed.join("\n")) return;
    this.select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    const preferred = [this.requested, this.name].find((name) => names.includes(name));
    const name = preferred ?? names[0] ?? "";
    if (name !== this.name || !name) this.set(name);
    this.select.value = name;
  }

  set(name) {
    this.name = name;
    this.select.value = name;
    this.dispatchEvent(new Event("change"));
  }
}

class App {
  constructor() {
    this.model = new ModelChoice(document.getElementById("model"));
    this.modelLabel = document.getElementById("model-choice");
    this.offline = document.getElementById("offline");
    this.tabs = Object.keys(TABS).map((name) => ({
      name,
      button: document.getElementById(`tab-${name}`),
      panel: document.getElementById(name),
      view: null,
    }));
    this.tabs.forEach(({ name, button }, i) => {
      button.addEventListener("click", () => this.show(name));
      button.addEventListener("keydown", (event) => this.handleKey(event, i));
    });
    window.addEventListener("hashchange", () => this.show(location.hash.slice(1)));
    onOnlineChange((online) => this.setOnline(online));
    this.show(location.hash.slice(1));
    watchChanges(() => this.update());
  }

  update() {
    this.model.update();
    for (const tab of this.tabs) tab.view?.update?.();
  }

  show(name, focus = false) {
    const chosen = this.tabs.find((tab) => tab.name === name) ?? this.tabs[0];
    for (const tab of this.tabs) {
      const isChosen = tab === chosen;
      tab.panel.hidden = !isChosen;
      tab.button.setAttribute("aria-selected", isChosen);
      tab.button.tabIndex = isChosen ? 0 : -1;
      if (isChosen) {
        tab.view ??= new TABS[tab.name](tab.panel, this.model);
        tab.view.show?.();
      }
    }
    this.modelLabel.hidden = chosen.name === "runs";
    document.title = `${chosen.button.textContent} · Nano-GPT`;
    history.replaceState(null, "", `#${chosen.name}`);
    if (focus) chosen.button.focus();
  }

  handleKey(event, i) {
    const last = this.tabs.length - 1;
    const targets = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: last };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const next = this.tabs[(target + this.tabs.length) % this.tabs.length];
    this.show(next.name, true);
  }

  setOnline(online) {
    if (this.offline.hidden === online) return;
    this.offline.hidden = online;
    this.offline.textContent = online
      ? ""
      : "The server has stopped. Start it again in a terminal: nanogpt serve runs";
  }
}

new App();
