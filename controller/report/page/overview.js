// Health, what differs between runs, time by node, timeline, placement and plan, settings.

function drawOverview(run) {
  section("overview", data.runs.length > 1 ? `Run ${run.name}` : "Run",
    data.runs.length > 1 ? el("div", { class: "controls" }, el("span", {}, "all that is about one run shows "),
      select(data.runs.map((one, at) => [at, one.name]), chosenRun, (value) => { chosenRun = Number(value); drawRun(); }, "run")) : null,
    run.notes.map((note) => el("p", { class: "note" }, note)), table([], run.facts));
}

function drawHealth(run) {
  const at = data.runs.indexOf(run);
  section("health", "Health", run.health.length ? null : el("p", { class: "soft" }, "nothing to say yet"),
    el("div", { class: "cards" }, run.health.map((one) => el("div", { class: `card ${one.state}` },
      el("p", {}, el("b", { class: one.state }, `${one.state}: ${one.title}`)), el("p", {}, one.says),
      one.help ? el("p", { class: "soft" }, `What may help: ${one.help}.`) : null,
      el("p", {}, one.metric ? link(one.metric, () => showMetric(one.metric)) : null, " ",
        one.step !== null ? link(`step ${one.step}`, () => openStep(at, one.step, one.metric)) : null)))),
    run.spikes.length ? el("details", {}, el("summary", {}, `Spikes (${run.spikes.length})`),
      table(["metric", "step", "value", "usual before", "deviations"], run.spikes.map((one) => [one.metric,
        link(`step ${one.step}`, () => openStep(at, one.step, one.metric)), one.value, one.usual, Math.round(one.deviations)]))) : null);
}

function drawDifferences() {
  const names = data.runs.map((run) => run.name);
  section("differences", "Compared",
    el("h3", {}, `Settings that differ (${data.differ.length})`),
    data.differ.length ? table(["setting", ...names], data.differ.map((one) => [one.key, ...one.values])) : el("p", { class: "soft" }, "none"),
    el("h3", {}, "Where they ended"), el("p", { class: "soft" }, "the last value of each metric"),
    table(["metric", ...names], data.final.slice(0, 20).map((one) => [one.metric, ...one.values])),
    el("details", {}, el("summary", {}, `all ${data.final.length} metrics`),
      table(["metric", ...names], data.final.map((one) => [one.metric, ...one.values]))));
}

function drawTime(run) {
  const place = el("div", { class: "large" });
  const total = run.nodes.reduce((sum, one) => sum + one.total_s, 0);
  const critical = run.nodes.some((one) => one.critical_s !== null && one.critical_s !== undefined);
  section("time", "Time by node", place, table(
    ["node", "median s", "share", ...(critical ? ["s on the critical path"] : [])],
    run.nodes.map((one) => [el("span", {}, el("span", { style: `color:${colourOf(run, one.node)}` }, "■ "),
      run.graph ? link(one.node, () => showNode(run, one.node)) : one.node), one.median_s,
      total ? percent(one.total_s / total) : "–", ...(critical ? [one.critical_s] : [])])));
  const curves = run.topics["Time by node"] || {};
  chart(place, () => run.nodes.slice(0, COLOURS.length).map((one) => {
    const curve = curves[`time_s/${one.node}`] || { y: [] };
    return { x: curve.x || run.steps, y: curve.y, name: one.node, stackgroup: "all", line: { width: 0, color: colourOf(run, one.node) },
      hovertemplate: `${one.node.replace(/[<>&]/g, "")}: %{y:.3g} s` };
  }), { yaxis: { title: { text: "seconds" } }, hovermode: "x" });
}

// A node has one colour in the page: the more time it takes, the earlier its colour.
function colourOf(run, node) {
  const at = run.nodes.findIndex((one) => one.node === node);
  return at < 0 ? "#9aa3ad" : colour(at);
}

let firstStep = 0;
const SHOWN_STEPS = 4;

function drawTimeline(run) {
  const timeline = run.timeline;
  if (!timeline) return section("timeline", "Timeline", el("p", { class: "soft" }, "trace.json is written when a run ends"));
  const last = timeline.slices.reduce((most, one) => Math.max(most, one[4]), 0);
  const place = el("div", { class: "large" });
  const from = el("input", { type: "number", min: 0, max: last, value: firstStep, "aria-label": "first step",
    onchange: (event) => move(Number(event.target.value)) });
  const move = (step) => { firstStep = Math.min(Math.max(0, step), last); from.value = firstStep; draw(); };
  const draw = () => {
    const there = timeline.slices.filter((one) => one[4] >= firstStep && one[4] < firstStep + SHOWN_STEPS);
    const start = Math.min(...there.map((one) => one[2])), end = Math.max(...there.map((one) => one[2] + one[3]));
    const shown = [...there, ...timeline.slices.filter((one) => one[4] < 0 && one[2] >= start && one[2] < end)];
    chart(place, () => timeline.names.map((name, at) => {
      const own = shown.filter((one) => one[1] === at);
      return { type: "bar", orientation: "h", name, base: own.map((one) => one[2] - start), x: own.map((one) => one[3]),
        y: own.map((one) => timeline.rows[one[0]]), marker: { color: colourOf(run, name), line: { color: "#fff", width: 1 } },
        text: own.map((one) => one[4] < 0 ? "" : one[4]), textposition: "inside",
        customdata: own.map((one) => [one[4], one[5], one[6]]), visible: own.length ? true : false,
        hovertemplate: "step %{customdata[0]}: %{x:.3g} s, %{customdata[1]} tokens, %{customdata[2]} bytes" };
    }), { barmode: "overlay",
      yaxis: { autorange: "reversed" }, xaxis: { title: { text: "seconds" } } },
    (point) => openStep(data.runs.indexOf(run), point.customdata[0], `time_s/${point.data.name}`));
  };
  section("timeline", "Timeline", el("p", { class: "soft" }, "A row is a pool, a number the step, a colour the node (as in the table above)." +
    (timeline.left_out ? ` The first ${timeline.left_out} slices are left out.` : "")),
  el("div", { class: "controls" }, "from step ", from, el("button", { onclick: () => move(firstStep - SHOWN_STEPS) }, "‹ earlier"),
    el("button", { onclick: () => move(firstStep + SHOWN_STEPS) }, "later ›")), place);
  draw();
}

function drawPlan(run) {
  const plan = run.plan;
  if (!plan) return section("plan", "Placement and plan", el("p", { class: "soft" }, "plan_report.json is written when a run ends"));
  const measured = plan.measured.nodes, predicted = (plan.predicted || {}).nodes || {};
  const pools = Object.entries((plan.placement || {}).pools || {});
  const strategies = (plan.placement || {}).strategies || {};
  section("plan", "Placement and plan",
    plan.not_predicted ? el("p", { class: "note" }, `not predicted: ${plan.not_predicted}`) : null,
    plan.cluster ? el("p", {}, `cluster ${plan.cluster}`) : null,
    pools.length ? table(["pool", "slots", "roles"], pools.map(([name, pool]) => [name, pool.gpus, pool.roles.join(", ")])) : null,
    el("h3", {}, "Plan against measurement"),
    table(["node", "strategy", "planned s", "measured s", "measured / planned"], [
      ["a step", "", (plan.predicted || {}).step_s, plan.measured.step_s,
        plan.predicted ? plan.measured.step_s / plan.predicted.step_s : null],
      ...Object.keys({ ...predicted, ...measured }).map((node) => [node,
        Object.entries(strategies[node] || {}).map(([key, value]) => `${key} ${value}`).join(", "),
        predicted[node], measured[node], (plan.ratio || {})[node]])]));
}

function drawSettings(run) {
  section("settings", "Settings", el("details", {}, el("summary", {}, "config.yaml"), el("pre", {}, run.config)));
}
