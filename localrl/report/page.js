"use strict";
// The page's interaction: reading charts, choosing groups, colouring tokens. Text of models and users
// only becomes text nodes; nothing here writes markup, and only page-live.js makes requests.
let data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(name, text, kind) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function shape(name, settings, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(settings)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function number(value) {
  if (value === null || value === undefined) return "unknown";
  const size = Math.abs(value);
  if (size >= 1e12) return value.toPrecision(3);
  if (size >= 100) return Math.round(value).toLocaleString("en").replaceAll(",", "\u2009");
  if (Number.isInteger(value)) return String(value);
  return size >= 0.1 ? value.toFixed(3) : value.toPrecision(3);
}

// Puts signs before newlines and tabs, and replaces other control characters by their pictures.
function visible(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, (c) => {
    const code = c.codePointAt(0);
    if (c === "\n") return "\u21b5\n";
    if (c === "\t") return "\u21e5\t";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return code === 127 ? "\u2421" : "\ufffd";
  });
}

function mean(values) {
  return values.length ? values.reduce((a, b) => a + b) / values.length : null;
}

// Charts: shows the value under the pointer, or under a cursor that the arrow keys move. Where a column
// stands for several steps, it shows the lowest and the highest value of these.

const cursors = {};
function span(pair) {
  if (!Array.isArray(pair)) return number(pair);
  return `${number(pair[0])} to ${number(pair[1])}`;
}

function readable(svg) {
  const { title, steps, lines } = data.charts[svg.dataset.chart];
  const key = svg.closest("figure").querySelector(".key");
  const cursor = svg.querySelector(".cursor");
  const [left, right] = [46, 350];
  const ends = steps.map((step) => (Array.isArray(step) ? step : [step, step]));
  const [first, last] = [ends[0][0], ends[ends.length - 1][1]];
  let place = ends.length - 1;
  const move = (to) => {
    place = Math.min(Math.max(to, 0), ends.length - 1);
    const [from, until] = ends[place];
    const x = left + ((right - left) * ((from + until) / 2 - first)) / (last - first || 1);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    key.querySelector(".at").textContent =
      from === until ? `step ${from}` : `steps ${from} to ${until}`;
    for (const b of key.querySelectorAll("[data-line]")) {
      b.textContent = span(lines[b.dataset.line][place]);
    }
    cursors[title] = from;
  };
  const nearest = (step) => {
    const far = ends.map(([from, until]) => Math.abs((from + until) / 2 - step));
    return far.indexOf(Math.min(...far));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 360;
    move(nearest(first + ((x - left) / (right - left)) * (last - first)));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    move(place + by);
  });
  if (title in cursors) move(nearest(cursors[title]));
}

document.querySelectorAll("svg.chart").forEach(readable);
const explorer = openGroups();
explorer.update(data.groups);
if (document.body.classList.contains("live")) follow();
