// Charts are drawn when they come into view: a page may have hundreds.

const COLOURS = ["#0b57b0", "#c2571a", "#1a7f4b", "#8a3ffc", "#b3261e", "#00798c", "#8d6e00", "#d0417e", "#556270", "#5b8c00"];
const LAYOUT = {
  margin: { l: 52, r: 10, t: 6, b: 26 }, font: { size: 11 }, showlegend: false, hovermode: "closest",
  paper_bgcolor: "#fff", plot_bgcolor: "#fff",
  xaxis: { gridcolor: "#eef0f2", zeroline: false }, yaxis: { gridcolor: "#eef0f2", zeroline: false, automargin: true },
};
const CONFIG = { displayModeBar: false, responsive: true };
const waiting = new Map();

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && waiting.has(entry.target)) {
    const draw = waiting.get(entry.target);
    waiting.delete(entry.target);
    seen.unobserve(entry.target);
    draw();
  }
}, { rootMargin: "300px" });

// `traces` is a function, so that a chart which nobody sees costs nothing.
function chart(place, traces, layout, onpoint) {
  waiting.set(place, () => {
    const merged = { ...LAYOUT, ...layout, xaxis: { ...LAYOUT.xaxis, ...(layout || {}).xaxis },
      yaxis: { ...LAYOUT.yaxis, ...(layout || {}).yaxis } };
    Plotly.react(place, traces(), merged, CONFIG);
    place.removeAllListeners?.("plotly_click");
    if (onpoint) place.on("plotly_click", (event) => onpoint(event.points[0]));
  });
  seen.unobserve(place);
  seen.observe(place);
}

function colour(at) { return COLOURS[at % COLOURS.length]; }

// All metrics by topic, the runs over each other. A point opens its step.
const curvePlaces = new Map();
const openTopics = new Set(["Rewards and advantages", "Held-out rows", "Policy: KL, ratio, clipping, entropy"]);

function drawCurves() {
  const topics = [...new Set(data.runs.flatMap((run) => Object.keys(run.topics)))];
  const filter = el("input", { type: "search", placeholder: "metrics with ...", "aria-label": "filter metrics",
    value: curveFilter, oninput: (event) => { curveFilter = event.target.value; showCurves(topics); } });
  section("curves", "Curves",
    el("p", { class: "soft" }, "Steps count from 0, as in metrics.jsonl. A click on a point opens its step: rows, weight versions, graph node."),
    data.runs.length > 1 ? el("p", {}, data.runs.map((run, at) =>
      el("span", {}, el("span", { style: `color:${colour(at)}` }, "■ "), run.name, "  "))) : null,
    el("div", { class: "controls" }, filter), el("div", { id: "topics" }));
  curvePlaces.clear();
  showCurves(topics);
}

let curveFilter = "";

function showCurves(topics) {
  const wanted = curveFilter.toLowerCase();
  document.getElementById("topics").replaceChildren(...topics.map((topic) => {
    const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.topics[topic] || {})))]
      .filter((metric) => metric.toLowerCase().includes(wanted));
    if (!metrics.length) return "";
    return el("details", { open: wanted !== "" || openTopics.has(topic), ontoggle: (event) =>
      event.target.open ? openTopics.add(topic) : wanted === "" && openTopics.delete(topic) },
      el("summary", {}, `${topic} (${metrics.length})`),
      el("div", { class: "cards" }, metrics.map((metric) => curveOf(topic, metric))));
  }).filter((made) => made !== ""));
}

function curveOf(topic, metric) {
  const place = el("div", { class: "plot" });
  curvePlaces.set(metric, { place, topic });
  drawCurve(metric);
  return el("div", { class: "chart", "data-metric": metric }, el("div", { class: "name" }, metric), place);
}

function drawCurve(metric) {
  const { place, topic } = curvePlaces.get(metric);
  chart(place, () => data.runs.flatMap((run, at) => {
    const curve = (run.topics[topic] || {})[metric];
    if (!curve) return [];
    const few = curve.y.length < 40;
    return [{ x: curve.x || run.steps, y: curve.y, name: run.name, meta: at, mode: few ? "lines+markers" : "lines",
      marker: { size: 4 }, line: { color: colour(at), width: 1.6 }, hovertemplate: "step %{x}: %{y:.5g}" }];
  }), {}, (point) => openStep(point.data.meta, point.x, metric));
}

function showMetric(metric) {
  if (!curvePlaces.has(metric)) return;
  const { place } = curvePlaces.get(metric);
  place.closest("details").open = true;
  place.parentElement.scrollIntoView({ block: "center" });
}
