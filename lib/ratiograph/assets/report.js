// Values under the pointer: each chart carries its steps, their places in the view box, and its values as text.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const head = figure.querySelector("figcaption output"), named = [...figure.querySelectorAll(".legend output")];
  const single = named.length === 0, outputs = single ? [head] : named;
  const last = [head.textContent, ...outputs.map((output) => output.textContent)];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let near = 0;
    data.x.forEach((at, index) => { if (Math.abs(at - x) < Math.abs(data.x[near] - x)) near = index; });
    cursor.removeAttribute("hidden");
    cursor.setAttribute("x1", data.x[near]);
    cursor.setAttribute("x2", data.x[near]);
    const place = data.where.replace("#", data.steps[near].toLocaleString("en"));
    outputs.forEach((output, index) => { output.textContent = data.series[index][near]; });
    head.textContent = single ? place + ": " + data.series[0][near] : place;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "hidden");
    outputs.forEach((output, index) => { output.textContent = last[index + 1]; });
    head.textContent = last[0];
  });
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
