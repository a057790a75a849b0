// Charts, drawn by uPlot when they come into view: one cursor for all, zoom by dragging, smooth lines and a logarithmic scale to
// switch. And buttons that copy.
const data = JSON.parse(document.getElementById("charts").textContent);
const styles = () => getComputedStyle(document.documentElement);
const colour = (name) => styles().getPropertyValue(name).trim();
const COLOURS = 8;
const HEIGHT = 190;
const FEW = 12;  // Points that are drawn whatever is beside them: a line of one or two would not be seen.
const LETTER = 7;  // Width of a digit of an axis, in pixels.
const labels = [...new Set(data.flatMap(({ lines }) => lines.map(({ label }) => label)))];  // A label has one colour in all charts.
const made = new Map();
const on = (id) => document.getElementById(id)?.checked ?? false;

const short = (value) => {
  if (value == null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
};

// Labels of an axis: as short as tells its ticks apart.
function tickLabels(ticks) {
  const shown = ticks.map((tick) => (tick == null ? "" : short(tick)));
  for (let digits = 5; digits < 16 && new Set(shown.filter(Boolean)).size < ticks.filter((tick) => tick != null).length; digits++)
    ticks.forEach((tick, i) => { if (tick != null) shown[i] = String(+tick.toPrecision(digits)); });
  return shown;
}

// Wide enough for the longest label; uPlot asks once before there are any.
const axisWidth = (_, shown) => Math.max(58, 16 + LETTER * Math.max(...(shown ?? []).map((label) => label.length)));

// What the legend tells: the value under the cursor, and without one the last.
const told = (values) => {
  const last = values.findLast((value) => value !== null);
  return (_, value, __, place) => short(place == null ? last : value);
};

function line({ label, smooth, values }, index, hasSmooth) {
  const few = values.filter((value) => value !== null).length <= FEW;
  const stroke = colour(`--line-${index % COLOURS}`);
  return {
    label: smooth ? `${label}, smooth` : label,
    stroke: hasSmooth && !smooth && on("smooth") ? `${stroke}66` : stroke,
    width: smooth ? 2 : hasSmooth && on("smooth") ? 1 : 1.6,
    show: !smooth || on("smooth"),
    spanGaps: true,
    points: { show: hasSmooth || smooth ? false : few || undefined, size: 5, fill: stroke },
    value: told(values),
  };
}

function draw(place) {
  const chart = data[place.dataset.chart];
  const positive = chart.lines.every(({ values }) => values.every((value) => value === null || value > 0));
  const smoothed = new Set(chart.lines.filter(({ smooth }) => smooth).map(({ label }) => label));
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--faint"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    cursor: { sync: { key: "run", setSeries: false }, focus: { prox: 1e6 } },
    scales: { x: { time: false }, y: { distr: on("log") && positive ? 3 : 1 } },
    axes: [{ ...axis, space: 60, incrs: INCREMENTS }, { ...axis, size: axisWidth, values: (_, ticks) => tickLabels(ticks) }],
    series: [{ label: "step", value: told(chart.steps) }, ...chart.lines.map((each) => line(each, labels.indexOf(each.label), smoothed.has(each.label)))],
  };
  made.get(place)?.destroy();
  made.set(place, new uPlot(options, [chart.steps, ...chart.lines.map(({ values }) => values)], place));
}

// Steps are whole numbers.
const INCREMENTS = [...Array(13).keys()].flatMap((power) => [1, 2, 5].map((factor) => factor * 10 ** power));

const places = [...document.querySelectorAll(".plot")];
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting && !made.has(target)) draw(target);
}, { rootMargin: "300px" });
places.forEach((place) => watcher.observe(place));
const again = () => made.forEach((_, place) => draw(place));
for (const id of ["smooth", "log"]) document.getElementById(id)?.addEventListener("change", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
new ResizeObserver(() => made.forEach((plot, place) => plot.setSize({ width: place.clientWidth, height: HEIGHT }))).observe(document.body);

for (const button of document.querySelectorAll(".copy"))
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.parentElement.querySelector("pre"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
  });
