// Show a cursor, and the values of each curve there, in all charts with the same horizontal axis.
const charts = [...document.querySelectorAll(".plot")];
const chartData = JSON.parse(document.getElementById("chart-data").textContent);

function nearestIndex(values, target) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= target) low = middle; else high = middle;
  }
  return target - values[low] <= values[high] - target ? low : high;
}

// Move the cursor of an axis to `position`; null hides it.
function showCursor(axis, position) {
  charts.forEach((plot, i) => {
    const { max, curves } = chartData[i];
    if (chartData[i].axis !== axis) return;
    const cursor = plot.querySelector(".cursor");
    cursor.hidden = position === null;
    if (position !== null) {
      cursor.style.left = `${100 * position / max}%`;
      cursor.dataset.label = Math.round(position).toLocaleString("en");
    }
    plot.parentElement.querySelectorAll("output").forEach((output, j) => {
      const { x, y } = curves[j];
      output.textContent = position === null ? "" : y[nearestIndex(x, position)];
    });
  });
}

charts.forEach((plot, i) => {
  const { axis, max } = chartData[i];
  let position = null;
  const show = (target) => {
    position = target === null ? null : Math.min(max, Math.max(0, target));
    showCursor(axis, position);
  };
  plot.tabIndex = 0;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(max * (event.clientX - box.left) / box.width);
  });
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -0.01, ArrowRight: 0.01, PageDown: -0.1, PageUp: 0.1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show((position ?? max) + steps[event.key] * max);
  });
});
