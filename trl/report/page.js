// Under the pointer, or with the arrow keys: the step and the value of every line there.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { x: [left, right], series } = JSON.parse(svg.dataset.chart);
  const output = svg.closest("figure").querySelector("output");
  const cursor = svg.querySelector(".cursor");
  const stops = [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  let at = -1;

  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const show = (x) => {
    cursor.removeAttribute("hidden");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const found = series.filter(({ points }) => points.length).map(({ label, points }) => [label, ...nearest(points, x)]);
    const step = found.reduce((a, b) => (Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a))[2];
    const told = found.map(([label, , own, value]) =>
      (found.length > 1 ? `${label} ` : "") + value + (own === step ? "" : ` (${own.toLocaleString("en")})`));
    output.textContent = [`step ${step.toLocaleString("en")}`, ...told].join(" · ");
  };
  const hide = () => {
    at = -1;
    cursor.setAttribute("hidden", "");
    output.textContent = "";
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    if (x < left - 4 || x > right + 4) return hide();
    const stop = stops.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    show(stop);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(stops.length - 1, at + move));
    show(stops[at]);
  });
}
