"use strict";
// All that is here can be read without it: values at a pointer, tabs for what stands one below the other, a filter of keys.

const SVG = "http://www.w3.org/2000/svg";

function rowsOf(figure) {
  const table = figure.querySelector("table.points");
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  return [...table.tBodies[0].rows].map((row) =>
    [...row.cells].map((cell, i) => [names[i], cell.textContent.trim()]).filter(([, text]) => text !== ""));
}

// Shows the row of the table that belongs to a place on the chart.
function watch(figure, places, shown = (row) => row) {
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
  const tip = document.createElement("div"), line = document.createElementNS(SVG, "path");
  const { width, height } = svg.viewBox.baseVal;
  let rows = null, now = -1;
  tip.className = "tip";
  tip.hidden = true;
  line.setAttribute("class", "cursor");
  plot.append(tip);
  svg.append(line);
  svg.setAttribute("tabindex", "0");

  function show(i) {
    rows ??= rowsOf(figure);
    now = Math.max(0, Math.min(rows.length - 1, i));
    const x = places(rows)[now];
    tip.textContent = shown(rows[now]).map(([name, text]) => `${name}  ${text}`).join("\n");
    tip.hidden = false;
    line.setAttribute("d", `M${x} 6V${height - 22}`);
    const at = (x / width) * plot.clientWidth, room = tip.offsetWidth;
    tip.style.left = `${Math.max(0, at + 12 + room > plot.clientWidth ? at - 12 - room : at + 12)}px`;
  }
  function hide() {
    tip.hidden = true;
    line.removeAttribute("d");
  }
  svg.addEventListener("pointermove", (event) => {
    rows ??= rowsOf(figure);
    const frame = svg.getBoundingClientRect(), x = ((event.clientX - frame.left) / frame.width) * width;
    const all = places(rows);
    show(all.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(all[best] - x) ? i : best), 0));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(now < 0 ? Infinity : now); });
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: Infinity }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}

for (const figure of document.querySelectorAll("figure.curve")) {
  const { first, last, left, right } = figure.querySelector("svg").dataset;
  watch(figure, (rows) => rows.map(([[, step]]) => +left + ((step - first) / (last - first)) * (right - left)));
}
for (const figure of document.querySelectorAll("figure.bars, figure.map")) {
  const groups = [...figure.querySelectorAll("svg > g")];
  const middles = groups.map((group) => { const box = group.getBBox(); return box.x + box.width / 2; });
  watch(figure, () => middles);
}

// One pane at a time, chosen by tabs; the last is open.
document.querySelectorAll(".panes").forEach((panes, number) => {
  const all = [...panes.querySelectorAll(":scope > .pane")];
  if (all.length < 2) return;
  const bar = document.createElement("div");
  bar.className = "tabs";
  bar.setAttribute("role", "tablist");
  bar.setAttribute("aria-label", "Steps");
  const buttons = all.map((pane, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = pane.dataset.tab;
    button.id = `tab-${number}-${i}`;
    pane.id = `pane-${number}-${i}`;
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", pane.id);
    pane.setAttribute("role", "tabpanel");
    pane.setAttribute("aria-labelledby", button.id);
    button.addEventListener("click", () => open(i));
    return button;
  });
  function open(chosen) {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-selected", String(i === chosen));
      button.tabIndex = i === chosen ? 0 : -1;
      all[i].hidden = i !== chosen;
    });
    for (const prompt of all[chosen].querySelectorAll(".prompt")) prompt.scrollTop = prompt.scrollHeight;
  }
  bar.addEventListener("keydown", (event) => {
    const now = buttons.indexOf(document.activeElement), count = buttons.length;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: count - 1 }[event.key];
    if (now < 0 || to === undefined) return;
    event.preventDefault();
    open((to + count) % count);
    buttons[(to + count) % count].focus();
  });
  bar.append(...buttons);
  all[0].before(bar);
  open(all.length - 1);
});

// What is known of a token, below its response; arrow keys go from one to the next.
for (const said of document.querySelectorAll(".said")) {
  const tokens = [...said.querySelectorAll(".t")], told = said.nextElementSibling;
  let now = 0;
  if (!tokens.length) continue;
  const tell = (token) => { told.textContent = token.title; };
  tokens[0].tabIndex = 0;
  said.addEventListener("pointerover", (event) => { if (event.target.matches(".t")) tell(event.target); });
  said.addEventListener("focusin", (event) => { if (event.target.matches(".t")) tell(event.target); });
  said.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[now].tabIndex = -1;
    now = to;
    tokens[now].tabIndex = 0;
    tokens[now].focus();
  });
}

// Of a long prompt its end stands next to the response.
for (const prompt of document.querySelectorAll(".prompt")) prompt.scrollTop = prompt.scrollHeight;

// The keys of a configuration that hold a word.
for (const details of document.querySelectorAll("details.findable")) {
  const field = document.createElement("input");
  field.type = "search";
  field.className = "find";
  field.placeholder = "Filter keys and values";
  field.setAttribute("aria-label", "Filter keys and values");
  details.querySelector("summary").after(field);
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    for (const row of details.querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}
