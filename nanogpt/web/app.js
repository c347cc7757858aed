// The page: its four tabs, the model that three of them work with, and whether the server is there.

import { announce, el } from "./dom.js";
import { ask, onReach } from "./api.js";
import { runsTab } from "./runs.js";
import { writeTab } from "./write.js";
import { lookTab } from "./look.js";
import { copiesTab } from "./copies.js";

const START = { runs: runsTab, write: writeTab, look: lookTab, copies: copiesTab };
const tabs = Object.keys(START).map((name) => ({ name, button: document.getElementById(`tab-${name}`), panel: document.getElementById(name) }));
const select = document.getElementById("model");

/** The model that was chosen for Write, Look and Copies; `changed` are called with its name, or "" while there is none. */
const model = { name: "", changed: [], choose: (name) => take(name) };

function take(name) {
  if (![...select.options].some((option) => option.value === name)) return;
  select.value = model.name = name;
  model.changed.forEach((tell) => tell(name));
}

async function listModels() {
  const found = await ask("/v1/models").catch(() => null);
  if (!found) return;
  const names = found.data.map((entry) => entry.id);
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  const kept = names.includes(model.name) ? model.name : names[0] ?? "";
  if (kept !== model.name || !names.length) {
    model.name = kept;
    model.changed.forEach((tell) => tell(kept));
  }
  select.value = model.name;
}

function show(name, focus = false) {
  const chosen = tabs.find((tab) => tab.name === name) ?? tabs[0];
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.panel.hidden = !on;
    tab.button.setAttribute("aria-selected", on);
    tab.button.tabIndex = on ? 0 : -1;
    if (on && !tab.view) tab.view = START[tab.name](tab.panel, model);
    if (tab.view) (on ? tab.view.show : tab.view.hide)?.();
  }
  document.getElementById("model-choice").hidden = chosen.name === "runs";
  document.title = `${chosen.button.textContent} · Nano-GPT`;
  history.replaceState(null, "", `#${chosen.name}`);
  if (focus) chosen.button.focus();
}

function reach(there) {
  const notice = document.getElementById("offline");
  if (notice.hidden === there) return;
  notice.hidden = there;
  notice.textContent = there ? "" : "The server has ended, so what you see stays as it is. Start it again in a terminal: nanogpt serve runs";
}

tabs.forEach(({ name, button }, i) => {
  button.addEventListener("click", () => show(name));
  button.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(tabs[(to + tabs.length) % tabs.length].name, true);
  });
});
select.addEventListener("change", () => {
  take(select.value);
  announce(`Model ${select.value}`);
});
window.addEventListener("hashchange", () => show(location.hash.slice(1)));
onReach(reach);
show(location.hash.slice(1));
listModels();
setInterval(listModels, 5000);
