// The page: sections of all runs, then those of the chosen one. Live, it asks for news and draws what has changed.

let data = null, chosenRun = 0;

function drawRun() {
  const run = data.runs[chosenRun];
  drawOverview(run);
  drawHealth(run);
  if (data.runs.length > 1) drawDifferences();
  if (!document.getElementById("curves")) drawCurves();
  drawTime(run);
  drawTimeline(run);
  drawGraph(run);
  drawPlan(run);
  drawRollouts(run);
  drawSettings(run);
}

// Curves of metrics that are there already get their new points; everything else is drawn anew where it differs.
function drawNews(before) {
  const run = data.runs[chosenRun], old = before.runs[chosenRun];
  const differs = (key) => JSON.stringify(run[key]) !== JSON.stringify(old[key]);
  if (differs("facts") || differs("notes")) drawOverview(run);
  if (differs("health") || differs("spikes")) drawHealth(run);
  const names = (one) => one.runs.flatMap((each) => Object.values(each.topics).flatMap(Object.keys)).join("\n");
  if (names(data) !== names(before)) drawCurves();
  else if (differs("topics")) for (const metric of curvePlaces.keys()) drawCurve(metric);
  if (differs("nodes")) drawTime(run);
  if (differs("timeline")) drawTimeline(run);
  if (differs("graph") || differs("node_of")) drawGraph(run);
  if (differs("plan")) drawPlan(run);
  if (differs("rollouts") && !view.sought && view.page === 0) drawRollouts(run);
}

async function watch() {
  const state = document.getElementById("nav").appendChild(el("span", { id: "live", class: "soft" }, "live"));
  let mark = null;
  for (;;) {
    await new Promise((done) => setTimeout(done, POLL_MS));
    try {
      const answer = await fetch("data", { headers: mark ? { "If-None-Match": mark } : {} });
      if (answer.status === 304) { state.textContent = data.runs.every((run) => run.ended) ? "ended" : "live"; continue; }
      if (!answer.ok) throw new Error(await answer.text());
      mark = answer.headers.get("ETag");
      const before = data;
      data = await answer.json();
      drawNews(before);
      state.textContent = data.runs.every((run) => run.ended) ? "ended" : `live, ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      state.textContent = `no answer: ${error.message}`;
    }
  }
}

// #step=12&metric=actor/loss&run=0 opens a step: an address to send to somebody.
function openAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("step")) openStep(Number(asked.get("run") || 0), Number(asked.get("step")), asked.get("metric"));
}

async function begin() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old (it has no DecompressionStream)");
  await loadLibrary();
  data = LIVE ? await (await fetch("data")).json() : await loadBlock("data");
  document.getElementById("main").replaceChildren();
  drawRun();
  openAddress();
  window.addEventListener("hashchange", openAddress);
  document.body.dataset.ready = "yes";
  if (LIVE) watch();
}

begin().catch((error) => {
  document.getElementById("main").append(el("p", { class: "note" }, `the page could not be drawn: ${error.message}`));
  document.body.dataset.ready = "failed";
});
