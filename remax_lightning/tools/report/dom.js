"use strict";

const SVG = "http://www.w3.org/2000/svg";

/* Texts only ever become text nodes: nothing that a sample holds is read as markup. */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

/* A number for a person, in at most `digits` significant digits. */
function shown(value, digits = 4) {
  if (value === undefined || value === null) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e");
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
}

const tooltip = byId("tooltip");

function showTooltip(text, event) {
  tooltip.textContent = text;
  tooltip.hidden = false;
  const left = event.clientX + 14;
  const beyond = left + tooltip.offsetWidth > window.innerWidth - 8;
  tooltip.style.left = `${Math.max(8, beyond ? event.clientX - tooltip.offsetWidth - 14 : left)}px`;
  tooltip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tooltip.offsetHeight - 8)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

const DATA = JSON.parse(byId("data").textContent);

/* What a run that trains has at step 0 is the policy as it was. */
function isBefore(step) {
  return DATA.trained && step === 0;
}

function stepName(step) {
  return isBefore(step) ? "step 0, before training" : `step ${shown(step)}`;
}
