// The recipe's graph: solid edges are columns, dashed ones weights. A node shows its edges, its time and its metrics.

const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 200, height: 40 };

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") made.addEventListener("click", value);
    else made.setAttribute(name, value);
  }
  made.append(...children.map((child) => child instanceof Node ? child : document.createTextNode(String(child))));
  return made;
}

function drawGraph(run) {
  const graph = run.graph;
  if (!graph) return section("graph", "Graph", el("p", { class: "soft" }, "no graph.json in the run's folder"));
  const at = Object.fromEntries(graph.nodes.map((node) => [node.name, node]));
  const edges = graph.edges.filter((edge) => at[edge.source] && at[edge.target]).map((edge) => {
    const path = svg("path", { class: edge.weights ? "edge weights" : "edge", d: way(at[edge.source], at[edge.target]) },
      svg("title", {}, `${edge.source} → ${edge.target}: ${edge.names.join(", ")}` +
        (edge.distance ? ` (${edge.distance} step${edge.distance > 1 ? "s" : ""} later)` : "")));
    path.dataset.ends = JSON.stringify([edge.source, edge.target]);
    return path;
  });
  const nodes = graph.nodes.map((node) => svg("g", { class: "node", "data-node": node.name,
    transform: `translate(${node.x + 15},${node.y + 15})`, onclick: () => chooseNode(run, node.name) },
  svg("rect", { ...BOX, rx: 6, fill: node.colour }),
  svg("text", { x: BOX.width / 2, y: 24, "text-anchor": "middle" }, node.name.length > 32 ? `${node.name.slice(0, 31)}…` : node.name),
  svg("title", {}, `${node.name}  ${node.line || ""}`)));
  const titles = (graph.parts || []).map((part) => svg("text", { class: "part", x: 15, y: part.y + 36 }, part.title));
  const made = section("graph", "Graph",
    el("p", { class: "soft" }, "Solid: columns of a batch. Dashed: weights. A click on a node shows what it reads, writes and tells."),
    el("div", { class: "wide" }, svg("svg", { width: graph.width + 20, height: graph.height + 10, role: "img" }, ...edges, ...nodes, ...titles)),
    el("div", { id: "node" }));
  const wide = made.querySelector(".wide");
  wide.scrollLeft = (wide.scrollWidth - wide.clientWidth) / 2;  // a phone begins at its middle
  return made;
}

function way(from, to) {
  const x = from.x + 15 + BOX.width / 2, y = from.y + 15 + BOX.height, toX = to.x + 15 + BOX.width / 2, toY = to.y + 15;
  if (toY > y) return `M${x},${y} C${x},${(y + toY) / 2 + 10} ${toX},${(y + toY) / 2 - 10} ${toX},${toY}`;
  const side = Math.max(x, toX) + BOX.width / 2 + 14;  // back to a row above, or to its own: around the side
  return `M${x},${y} C${side},${y + 30} ${side},${toY - 30} ${toX},${toY}`;
}

function chooseNode(run, name) {
  for (const node of document.querySelectorAll("#graph .node")) node.classList.toggle("chosen", node.dataset.node === name);
  for (const edge of document.querySelectorAll("#graph .edge"))
    edge.classList.toggle("lit", JSON.parse(edge.dataset.ends).includes(name));
  const node = run.graph.nodes.find((one) => one.name === name);
  const time = run.nodes.find((one) => one.node === name);
  const told = Object.keys(run.node_of).filter((metric) => run.node_of[metric] === name);
  document.getElementById("node").replaceChildren(el("h3", {}, name), table([], [
    ["role and op", `${node.role} . ${node.op} (${node.kind})`],
    ["in the recipe", node.line || "–"],
    ["reads", node.reads.join(", ") || "nothing"],
    ["writes", node.writes.join(", ") || "nothing"],
    ["seconds a step", time ? `${number(time.median_s)} (median)` : "–"],
    ["metrics", el("span", {}, told.flatMap((metric) => [link(metric, () => showMetric(metric)), "  "]))],
  ]));
}

function showNode(run, name) {
  if (!run.graph) return;
  chooseNode(run, name);
  document.getElementById("graph").scrollIntoView();
}
