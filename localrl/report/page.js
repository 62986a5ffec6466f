"use strict";
// The page's interaction: reading charts, choosing groups, colouring tokens. Text of models and users
// only becomes text nodes; nothing here writes markup or makes requests.
const data = JSON.parse(document.getElementById("data").textContent);
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

// Charts: shows the value under the pointer, or under a cursor that the arrow keys move.

for (const svg of document.querySelectorAll("svg.chart")) {
  const { steps, lines } = data.charts[svg.dataset.chart];
  const key = svg.closest("figure").querySelector(".key");
  const cursor = svg.querySelector(".cursor");
  const [left, right] = [46, 350];
  const span = steps[steps.length - 1] - steps[0] || 1;
  let place = steps.length - 1;
  const move = (to) => {
    place = Math.min(Math.max(to, 0), steps.length - 1);
    const x = left + ((right - left) * (steps[place] - steps[0])) / span;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    key.querySelector(".at").textContent = `step ${steps[place]}`;
    for (const b of key.querySelectorAll("[data-line]")) {
      b.textContent = number(lines[b.dataset.line][place]);
    }
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 360;
    const step = steps[0] + ((x - left) / (right - left)) * span;
    const far = steps.map((s) => Math.abs(s - step));
    move(far.indexOf(Math.min(...far)));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    move(place + by);
  });
}

if (data.groups.length) openGroups(data.groups);
