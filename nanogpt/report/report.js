// Two things that paper cannot do: read the curves at any step, and leaf through the samples.
const charts = [...document.querySelectorAll(".plot")];
const data = JSON.parse(document.getElementById("numbers").textContent);
let step = null;

function nearest(x, wanted) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= wanted) low = middle; else high = middle;
  }
  return wanted - x[low] <= x[high] - wanted ? low : high;
}

function show(wanted) {
  step = wanted;
  charts.forEach((plot, i) => {
    const { last, curves } = data[i];
    const cursor = plot.querySelector(".cursor");
    cursor.hidden = step === null;
    if (step !== null) {
      cursor.style.left = `${100 * step / last}%`;
      cursor.dataset.step = Math.round(step).toLocaleString("en");
    }
    plot.parentElement.querySelectorAll("output").forEach((output, j) => {
      const { x, y } = curves[j];
      output.textContent = step === null ? "" : y[nearest(x, step)];
    });
  });
}

charts.forEach((plot, i) => {
  const last = data[i].last;
  plot.tabIndex = 0;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(Math.min(last, Math.max(0, last * (event.clientX - box.left) / box.width)));
  });
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.01, ArrowRight: 0.01, PageDown: -0.1, PageUp: 0.1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(Math.min(last, Math.max(0, (step ?? last) + by * last)));
  });
});

const list = document.querySelector(".samples");
if (list && list.children.length > 1) {
  const samples = [...list.children];
  const label = document.createElement("label");
  const slider = document.createElement("input");
  const end = document.createElement("span");
  Object.assign(slider, { type: "range", min: 0, max: samples.length - 1, value: samples.length - 1 });
  label.className = "slider";
  end.textContent = "end";
  label.append("beginning", slider, end);
  slider.setAttribute("aria-label", "Sample, from the first to the last");
  const choose = () => {
    samples.forEach((sample, i) => sample.classList.toggle("now", i === slider.valueAsNumber));
    slider.setAttribute("aria-valuetext", samples[slider.valueAsNumber].querySelector("h3").textContent);
  };
  slider.addEventListener("input", choose);
  list.before(label);
  list.className = "samples one";
  choose();
}
