// One step: what was unusual in it, who told it, which weights drew its rows, and the rows.

const AROUND = 20;

async function openStep(at, step, metric) {
  const run = data.runs[at], dialog = document.getElementById("step");
  const heldout = metric && metric.startsWith("heldout/");
  const near = nearest(run, step, heldout);
  const rows = el("div", {});
  const go = (act) => () => { dialog.close(); if (chosenRun !== at) { chosenRun = at; drawRun(); } act(); };
  const node = nodeOf(run, metric);
  const versions = Object.keys(run.node_of).concat(Object.values(run.topics).flatMap(Object.keys))
    .filter((name, index, all) => name.endsWith("/version") && all.indexOf(name) === index);
  dialog.replaceChildren(
    el("div", { class: "controls" }, el("h2", {}, `${data.runs.length > 1 ? `${run.name}, ` : ""}${heldout ? "after" : "step"} ${step}${heldout ? " steps" : ""}`),
      el("button", { onclick: () => dialog.close() }, "close")),
    metric ? el("p", {}, el("b", {}, metric), ` ${number(valueAt(run, metric, step))}; usual around it: ${number(usual(run, metric, step))} `,
      link("its curve", go(() => showMetric(metric)))) : null,
    node && run.graph ? el("p", {}, "told by the graph's node ", link(node, go(() => showNode(run, node)))) : null,
    versions.length ? el("p", {}, "weight versions after it: ", versions.map((name) => `${name.replace("/version", "")} ${number(valueAt(run, name, step))}`).join(", ")) : null,
    run.timeline ? el("p", {}, link("its timeline", go(() => { firstStep = step; drawTimeline(run); document.getElementById("timeline").scrollIntoView(); }))) : null,
    unusual(run, step), el("h3", {}, "Rows"), rows);
  if (!dialog.open) dialog.showModal();
  if (!near) { rows.append(el("p", { class: "soft" }, "no rollouts were kept (output.rollouts_every)")); return; }
  if (near.step !== step) rows.append(el("p", { class: "note" },
    `rollouts were kept at step ${near.step}, not at ${step}; these are from there`));
  rows.append(el("p", {}, link(`all ${near.shown} rows in the browser`, go(() => showRollouts(run, near)))));
  const columns = await loadBlock(near.block);
  const order = [...Array(near.shown).keys()].sort((a, b) => reward(columns, a) - reward(columns, b));
  const few = [...new Set([...order.slice(-3).reverse(), ...order.slice(0, 3)])];
  rows.append(...few.map((row) => rowCard(columns, row, "")));
}

function nodeOf(run, metric) {
  if (!metric) return null;
  return metric.startsWith("time_s/") ? metric.slice(7) : run.node_of[metric] || null;
}

function nearest(run, step, heldout) {
  const there = run.rollouts.filter((one) => heldout ? one.part.startsWith("heldout") : one.part === "");
  return there.reduce((best, one) => !best || Math.abs(one.step - step) < Math.abs(best.step - step) ? one : best, null);
}

function curveNamed(run, metric) {
  for (const topic of Object.values(run.topics)) if (topic[metric]) return topic[metric];
  return null;
}

function indexOf(run, curve, step) { return (curve.x || run.steps).indexOf(step); }

function valueAt(run, metric, step) {
  const curve = curveNamed(run, metric), at = curve ? indexOf(run, curve, step) : -1;
  return at < 0 ? null : curve.y[at];
}

function around(run, metric, step) {
  const curve = curveNamed(run, metric), at = curve ? indexOf(run, curve, step) : -1;
  if (at < 0) return [];
  return curve.y.slice(Math.max(0, at - AROUND), at + AROUND + 1).filter((value, index) => value !== null && index !== Math.min(at, AROUND));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

function usual(run, metric, step) { return median(around(run, metric, step)); }

// The metrics of a step that are furthest from those of the steps around it.
function unusual(run, step) {
  const found = [];
  for (const topic of Object.values(run.topics)) for (const metric of Object.keys(topic)) {
    const value = valueAt(run, metric, step), others = around(run, metric, step);
    if (value === null || others.length < 6 || metric.startsWith("heldout/") || /version|epoch/.test(metric)) continue;
    const middle = median(others), spread = 1.4826 * median(others.map((one) => Math.abs(one - middle)));
    if (spread > 0) found.push([metric, value, middle, Math.abs(value - middle) / spread]);
  }
  found.sort((a, b) => b[3] - a[3]);
  const shown = found.slice(0, 8).filter((one) => one[3] > 3);
  return shown.length ? el("div", {}, el("h3", {}, "Unusual in this step"),
    table(["metric", "value", "usual", "deviations", "node"], shown.map(([metric, value, middle, far]) =>
      [metric, value, middle, Math.round(10 * far) / 10, nodeOf(run, metric) || "–"]))) : null;
}
