// The rollout browser: a step's rows in pages, search over all steps, and one prompt in several steps side by side.

const PAGE = 20, HITS = 200, BESIDE = 6;
const view = { run: 0, block: null, page: 0, order: "drawn", sought: "", search: 0 };
const FIRST = ["prompt", "response", "answer", "rewards", "finished", "policy_version", "prompt_key", "step", "raw_response", "group_id"];
const ORDERS = [["drawn", "as drawn"], ["high", "highest reward first"], ["low", "lowest reward first"],
  ["long", "longest first"], ["short", "shortest first"]];

function drawRollouts(run) {
  if (!run.rollouts.length) return section("rollouts", "Rollouts", el("p", { class: "soft" }, "none yet (output.rollouts_every)"));
  const entry = run.rollouts.find((one) => one.block === view.block) || run.rollouts[defaultAt(run)];
  view.block = entry.block;
  const parts = [...new Set(run.rollouts.map((one) => one.part))];
  const same = run.rollouts.filter((one) => one.part === entry.part), at = same.indexOf(entry);
  const all = run.rollouts.reduce((sum, one) => sum + one.rows, 0), shown = run.rollouts.reduce((sum, one) => sum + one.shown, 0);
  const to = (one) => { view.block = one.block; view.page = 0; view.search++; drawRollouts(run); };
  section("rollouts", "Rollouts",
    el("p", { class: "soft" }, `${number(shown)} of ${number(all)} rollouts, of ${run.rollouts.length} files`),
    el("div", { class: "controls" },
      parts.length > 1 ? select(parts.map((part) => [part, part || "training"]), entry.part, (part) =>
        to(run.rollouts.filter((one) => one.part === part).at(-1)), "part") : null,
      el("button", { disabled: at === 0, onclick: () => to(same[at - 1]) }, "‹"),
      select(same.map((one) => [one.block, `${one.part ? "after" : "step"} ${one.step}`]), entry.block, (block) => to(same.find((one) => one.block === block)), "step"),
      el("button", { disabled: at === same.length - 1, onclick: () => to(same[at + 1]) }, "›"),
      select(ORDERS, view.order, (order) => { view.order = order; view.page = 0; showRows(run, entry); }, "order"),
      el("input", { type: "search", placeholder: "search all rollouts", "aria-label": "search rollouts", value: view.sought,
        onchange: (event) => { view.sought = event.target.value; view.sought ? searchAll(run) : drawRollouts(run); } })),
    el("div", { id: "rows" }));
  return view.sought ? searchAll(run) : showRows(run, entry);
}

function defaultAt(run) {
  const training = run.rollouts.map((one, at) => [one, at]).filter(([one]) => !one.part);
  return training.length ? training.at(-1)[1] : run.rollouts.length - 1;
}

function showRollouts(run, entry) {
  Object.assign(view, { block: entry.block, page: 0, sought: "" });
  drawRollouts(run);
  document.getElementById("rollouts").scrollIntoView();
}

function reward(columns, row) { return columns.rewards ? columns.rewards[row] ?? -Infinity : 0; }
function size(columns, row) { return columns.response ? columns.response[row].length : 0; }

function ordered(columns, count) {
  const rows = [...Array(count).keys()];
  const by = { high: (a, b) => reward(columns, b) - reward(columns, a), low: (a, b) => reward(columns, a) - reward(columns, b),
    long: (a, b) => size(columns, b) - size(columns, a), short: (a, b) => size(columns, a) - size(columns, b) }[view.order];
  return by ? rows.sort(by) : rows;
}

async function showRows(run, entry) {
  const columns = await loadBlock(entry.block), place = document.getElementById("rows");
  if (view.block !== entry.block || view.sought || !place) return;
  const order = ordered(columns, entry.shown), pages = Math.max(1, Math.ceil(order.length / PAGE));
  view.page = Math.min(view.page, pages - 1);
  const turn = (by) => () => { view.page += by; showRows(run, entry); };
  const pager = () => el("div", { class: "controls" }, el("button", { disabled: view.page === 0, onclick: turn(-1) }, "‹ previous"),
    `rows ${view.page * PAGE + 1} to ${Math.min(order.length, (view.page + 1) * PAGE)} of ${order.length}` +
    (entry.shown < entry.rows ? ` (${entry.rows} in the file)` : ""),
    el("button", { disabled: view.page >= pages - 1, onclick: turn(1) }, "next ›"));
  place.replaceChildren(pager(), ...order.slice(view.page * PAGE, (view.page + 1) * PAGE).map((row) =>
    rowCard(columns, row, "", run, entry)), pages > 1 ? pager() : "");
}

function rowCard(columns, row, sought, run, entry) {
  const numbers = Object.keys(columns).filter((name) => !FIRST.includes(name) && typeof columns[name][row] === "number");
  const others = Object.keys(columns).filter((name) => !FIRST.includes(name) && !numbers.includes(name) && columns[name][row] !== "" && columns[name][row] !== "{}");
  const versions = columns.policy_version ? columns.policy_version[row] : [];
  const tokens = versions.reduce((sum, [, count]) => sum + count, 0);
  return el("div", { class: "row" },
    el("div", { class: "head" },
      columns.rewards ? el("b", {}, `reward ${number(columns.rewards[row])}`) : null,
      columns.finished ? el("span", { class: "soft" }, columns.finished[row] ? "ended by itself" : "cut by the limit") : null,
      versions.length ? el("span", { class: "soft" }, `${tokens} tokens, drawn by weights ` +
        versions.map(([version, count]) => versions.length > 1 ? `${version} (${count})` : version).join(", ")) : null,
      numbers.map((name) => el("span", { class: "soft" }, `${name} ${number(columns[name][row])}`)),
      run && columns.prompt && columns.prompt[row] ? link("this prompt in other steps", (event) =>
        besideEachOther(run, entry, columns.prompt_key[row], event.target.closest(".row"))) : null),
    columns.prompt ? el("pre", { class: "prompt" }, marked(columns.prompt[row], sought)) : null,
    columns.response ? el("pre", { class: "response" }, marked(columns.response[row], sought)) : null,
    columns.answer && columns.answer[row] ? el("div", { class: "soft" }, "answer ", marked(columns.answer[row], sought)) : null,
    others.length || columns.raw_response ? el("details", {}, el("summary", {}, "more"),
      table([], [...(columns.raw_response ? [["raw_response", columns.raw_response[row]]] : []),
        ...others.map((name) => [name, text(columns[name][row])])])) : null);
}

function text(value) {
  return Array.isArray(value) ? value.map((run) => Array.isArray(run) ? `${run[0]} × ${run[1]}` : run).join(", ") : String(value);
}

async function besideEachOther(run, entry, key, under) {
  const having = run.rollouts.filter((one) => one.part === entry.part && one.prompts.includes(key));
  const every = Math.max(1, (having.length - 1) / (BESIDE - 1));
  const chosen = [...new Set([...Array(BESIDE).keys()].map((k) => having[Math.min(having.length - 1, Math.round(k * every))]))];
  const places = await Promise.all(chosen.map(async (one) => {
    const columns = await loadBlock(one.block);
    const rows = [...Array(one.shown).keys()].filter((row) => columns.prompt_key[row] === key);
    return el("div", {}, el("h3", {}, link(`${one.part ? "after" : "step"} ${one.step}`, () => showRollouts(run, one)), ` (${rows.length})`),
      rows.slice(0, 4).map((row) => rowCard(columns, row, "")));
  }));
  under.nextElementSibling?.classList.contains("beside") && under.nextElementSibling.remove();
  under.after(el("div", { class: "beside" }, places));
}

// One file after the other: what was unpacked is let go again. A later search ends an earlier one.
async function searchAll(run) {
  const mine = ++view.search, sought = view.sought.toLowerCase(), place = document.getElementById("rows");
  const said = el("p", { class: "soft" }), hits = el("div", {});
  place.replaceChildren(said, hits);
  let found = 0, rows = 0;
  for (const [at, entry] of run.rollouts.entries()) {
    const columns = await loadBlock(entry.block);
    if (view.search !== mine || !place.isConnected) return;
    rows += entry.shown;
    for (let row = 0; row < entry.shown; row++) {
      const has = ["prompt", "response", "answer", "fields"].some((name) => columns[name] && columns[name][row].toLowerCase().includes(sought));
      if (!has) continue;
      if (found++ < HITS) hits.append(el("h3", {}, link(`${entry.part || "training"}, step ${entry.step}`, () => showRollouts(run, entry))),
        rowCard(columns, row, view.sought, run, entry));
    }
    said.textContent = `${number(found)} rows with “${view.sought}” in ${number(rows)} rollouts, ${at + 1} of ${run.rollouts.length} files` +
      (found > HITS ? `; the first ${HITS} are shown` : "");
  }
}
