"use strict";
// Elements by hand: whatever comes from a run becomes a text node, never HTML.

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined).map((child) =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return made;
}

function link(text, act, title) {
  return el("button", { class: "link", type: "button", onclick: act, title }, text);
}

function table(head, rows) {
  return el("div", { class: "wide" }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((text) => el("th", {}, text)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) =>
      cell instanceof Node ? el("td", {}, cell) : typeof cell === "number" || cell === null || cell === undefined
        ? el("td", { class: "number" }, number(cell)) : el("td", {}, cell)))))));
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function percent(value) { return `${(100 * value).toPrecision(3)} %`; }

function select(options, chosen, act, label) {
  const made = el("select", { onchange: (event) => act(event.target.value), "aria-label": label },
    options.map(([value, text]) => el("option", { value }, text)));
  made.value = chosen;
  return made;
}

// A section of the page, with its entry in the navigation; the same one again when it is drawn anew.
function section(id, title, ...children) {
  const made = el("section", { id }, el("h2", {}, title), ...children);
  const old = document.getElementById(id);
  if (old) old.replaceWith(made);
  else {
    document.getElementById("main").append(made);
    document.getElementById("nav").append(el("a", { href: `#${id}`, onclick: (event) => {
      event.preventDefault();
      made.isConnected ? made.scrollIntoView() : document.getElementById(id).scrollIntoView();
    } }, title));
  }
  return made;
}

// Text with every occurrence of `sought` marked, whatever its case.
function marked(text, sought) {
  if (!sought) return [text];
  const parts = [], small = text.toLowerCase(), what = sought.toLowerCase();
  if (small.length !== text.length) return [text];  // a letter that changes its length would shift the marks
  let at = 0;
  for (let next = small.indexOf(what); next >= 0; next = small.indexOf(what, at)) {
    parts.push(text.slice(at, next), el("mark", {}, text.slice(next, next + what.length)));
    at = next + what.length;
  }
  return [...parts, text.slice(at)];
}
