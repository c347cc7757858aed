// Show one sample at a time, chosen by a slider.
const list = document.querySelector(".samples");
if (list && list.children.length > 1) {
  const samples = [...list.children];
  const label = document.createElement("label");
  const slider = document.createElement("input");
  const last = samples.length - 1;
  Object.assign(slider, { type: "range", min: 0, max: last, value: last });
  label.className = "slider";
  label.append("first", slider, "last");
  slider.setAttribute("aria-label", "Sample, from the first to the last");
  const choose = () => {
    const chosen = samples[slider.valueAsNumber];
    samples.forEach((sample) => sample.classList.toggle("chosen", sample === chosen));
    slider.setAttribute("aria-valuetext", chosen.querySelector("h3").textContent);
  };
  slider.addEventListener("input", choose);
  list.before(label);
  list.className = "samples one";
  choose();
}
