// The microscope's pictures as SVG: curves told apart by dash and mark as well as by colour, labels that do not overlap.

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear, scalePoint } from "d3-scale";
import { select } from "d3-selection";

import { h } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 440;
const HEIGHT = 230;
const EDGE = { left: 52, right: 12, top: 10, bottom: 40 };
const X0 = EDGE.left;
const X1 = WIDTH - EDGE.right;
const Y0 = HEIGHT - EDGE.bottom;
const Y1 = EDGE.top;
const MARKS = ["M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0", "M-3.2,-3.2h6.4v6.4h-6.4z", "M0,-4L4,3L-4,3z"];
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

const power = (exponent) => `10${[...String(Math.round(exponent))].map((c) => SUPERSCRIPT[c]).join("")}`;
const read = (log) => (Number.isFinite(log) ? `${(10 ** (log - Math.floor(log))).toFixed(1)}e${Math.floor(log)}` : "0");
const percent = (value) => `${(100 * value).toFixed(0)} %`;

function plot(title, label, xTitle) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}. ${label}`);
  svg.setAttribute("class", "ql-plot");
  const root = select(svg);
  root.append("text").attr("x", (X0 + X1) / 2).attr("y", HEIGHT - 4).attr("text-anchor", "middle").attr("class", "ql-axis-title").text(xTitle);
  return { root, nodes: [h("h4", { text: title }), svg] };
}

/** Whole powers of ten within a domain, thinned to a handful. */
function powers([low, high], most = 6) {
  const first = Math.ceil(low);
  const step = Math.max(1, Math.ceil((high - first) / most));
  return Array.from({ length: Math.max(0, Math.floor((high - first) / step) + 1) }, (_, i) => first + i * step);
}

function axes(root, bottom, left) {
  root.append("g").attr("class", "ql-axis").attr("transform", `translate(0,${Y0})`).call(bottom.tickSizeOuter(0));
  root.append("g").attr("class", "ql-axis").attr("transform", `translate(${X0},0)`).call(left.tickSizeOuter(0));
}

function rule(root, x1, y1, x2, y2, name) {
  root.append("line").attr("class", name).attr("x1", x1).attr("y1", y1).attr("x2", x2).attr("y2", y2);
}

const word = (root, x, y, text, name = "ql-muted", anchor = "start") =>
  root.append("text").attr("class", `ql-label ${name}`).attr("x", x).attr("y", y).attr("text-anchor", anchor).text(text);

/** Medians at one beta, quartile q of (3, K, L). */
const row = (norms, q, index, K, L) => norms.subarray((q * K + index) * L, (q * K + index + 1) * L);

export function normPlot(data, index, dtype) {
  const { names, grid, curves, smoothed, expected } = data;
  const [K, L] = [grid.betas.length, names.length];
  const shown = curves[dtype];
  const series = [{ name: data.exact ? "back-propagated, exact" : "back-propagated, surrogate", slot: 0, norms: shown.norms }];
  if (smoothed) series.push({ name: `smoothed, k ${grid.k}, float64`, slot: 1, norms: smoothed.norms });
  const lines = series.map((s) => ({ ...s, middle: row(s.norms, 1, index, K, L), low: row(s.norms, 0, index, K, L), high: row(s.norms, 2, index, K, L) }));
  if (expected.length) lines.push({ name: "mean field", slot: 2, middle: expected.subarray(index * L, (index + 1) * L) });
  // One domain for all temperatures, so that the slider is seen to move the curve and not the axis.
  const medians = shown.norms.subarray(K * L, 2 * K * L);
  const finite = [...medians, ...lines.flatMap((l) => [...l.middle])].filter(Number.isFinite);
  const smallest = grid.smallest[dtype];
  const high = Math.ceil(Math.max(...finite, smallest + 1)) + 0.5;
  const low = Math.max(smallest - 3, Math.min(...finite, high - 3) - 1);
  const floor = Math.min(low, high - 4);
  const x = scalePoint(names, [X0 + 14, X1 - 14]);
  const y = scaleLinear([floor, high], [Y0 - 8, Y1]);
  const said = lines.map((l) => `${l.name}: ${names.map((name, i) => `${name} ${read(l.middle[i])}`).join(", ")}`).join("; ");
  const { root, nodes } = plot("Gradient norm per layer (median, quartiles)", said, "");
  axes(root, axisBottom(x), axisLeft(y).tickValues(powers([floor, high])).tickFormat(power));
  const narrow = names.length > 5;
  root.selectAll(".tick text").filter((name) => typeof name === "string").attr("transform", narrow ? "rotate(-22)" : null).attr("text-anchor", narrow ? "end" : "middle");
  if (smallest >= floor) {
    rule(root, X0, y(smallest), X1, y(smallest), "ql-floor");
    word(root, X1, y(smallest) - 4, `smallest ${dtype}`, "ql-muted", "end");
  }
  for (const line of lines) {
    const at = names.map((name, i) => ({ x: x(name), v: line.middle[i], low: line.low?.[i], high: line.high?.[i] }));
    const inside = (v) => Number.isFinite(v) && v >= floor;
    const points = at.filter((p) => inside(p.v));
    for (const p of at.filter((q) => inside(q.high) && line.slot === 0)) rule(root, p.x, y(Math.max(p.low, floor)), p.x, y(p.high), `ql-quartiles ql-line-${line.slot}`);
    const d = at.map((p, i) => (inside(p.v) ? `${i && inside(at[i - 1].v) ? "L" : "M"}${p.x},${y(p.v)}` : "")).join("");
    root.append("path").attr("class", `ql-line ql-line-${line.slot} ql-dash-${line.slot}`).attr("data-series", line.name).attr("d", d);
    root.selectAll(null).data(points).join("path").attr("class", `ql-point-${line.slot}`).attr("transform", (p) => `translate(${p.x},${y(p.v)})`).attr("d", MARKS[line.slot]);
    if (line.slot === 2) continue;
    const gone = at.filter((p) => !inside(p.v));
    root.selectAll(null).data(gone).join("text").attr("class", `ql-gone ql-point-${line.slot}`).attr("x", (p) => p.x + 8 * line.slot).attr("y", Y0 - 2).attr("text-anchor", "middle").text("×");
  }
  return [...nodes, legend(lines.map((l) => ({ text: l.name, slot: l.slot })), "× no gradient")];
}

function legend(items, more = "") {
  const entry = ({ text, slot }) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 30 12");
    svg.setAttribute("aria-hidden", "true");
    const root = select(svg);
    rule(root, 0, 6, 30, 6, `ql-line ql-line-${slot} ql-dash-${slot}`);
    if (MARKS[slot]) root.append("path").attr("class", `ql-point-${slot}`).attr("transform", "translate(15,6)").attr("d", MARKS[slot]);
    return h("span", { class: "ql-entry" }, svg, text);
  };
  return h("p", { class: "ql-legend" }, ...items.map(entry), more);
}

function bars(root, x, y, edges, shift, shares) {
  const items = Array.from(shares, (value, i) => ({ value, a: edges[i] + shift, b: edges[i + 1] + shift })).filter((d) => d.value > 0);
  const [low, high] = x.domain();
  root
    .selectAll(null)
    .data(items.filter((d) => d.b > low && d.a < high))
    .join("rect")
    .attr("class", "ql-bin")
    .attr("x", (d) => x(Math.max(d.a, low)))
    .attr("width", (d) => Math.max(1, x(Math.min(d.b, high)) - x(Math.max(d.a, low)) - 1))
    .attr("y", (d) => y(d.value))
    .attr("height", (d) => Y0 - y(d.value));
}

export function gapPlot(data, index, dtype, seen) {
  const { edges, shares, misclassified } = data.gaps;
  const beta = data.grid.betas[index];
  const [wrong, zero] = data.grid.thresholds[dtype].map(Math.log10);
  const x = scaleLinear([-2, 4.5], [X0, X1]);
  const y = scaleLinear([0, Math.max(...shares, 0.01) * 1.35], [Y0, Y1]);
  const shift = Math.log10(beta);
  const limits = `the gradient's direction is wrong above ${(10 ** wrong).toFixed(1)}, it is 0 above ${(10 ** zero).toFixed(1)}`;
  const { root, nodes } = plot("Gap of the logits, β Δ", seen ? limits : "the limits appear after your guess", `β Δ; not drawn: ${percent(misclassified)} of the examples, which are misclassified`);
  bars(root, x, y, edges, shift, shares);
  axes(root, axisBottom(x).tickValues(powers([-2, 4.5])).tickFormat(power), axisLeft(y).ticks(4, ".0%"));
  if (seen) {
    for (const at of [wrong, zero]) rule(root, x(at), Y0, x(at), Y1, "ql-threshold");
    word(root, x(wrong) - 4, Y1 + 9, `wrong way from ${(10 ** wrong).toFixed(1)}`, "ql-mark-1", "end");
    word(root, x(zero) + 4, Y1 + 9, `zero from ${(10 ** zero).toFixed(1)}`, "ql-mark-1");
  }
  return nodes;
}

export function lostPlot(data, index, dtype) {
  const { grid, curves, names } = data;
  const logs = grid.betas.map(Math.log10);
  const L = names.length;
  const x = scaleLinear([logs[0], logs.at(-1)], [X0, X1]);
  const y = scaleLinear([0, 1], [Y0, Y1]);
  const known = grid.dtypes.filter((name) => name in curves).sort();
  const value = (name, i) => curves[name].lost[i * L];
  const said = known.map((name) => `${name} ${percent(value(name, index))}`).join(", ");
  const { root, nodes } = plot("Input gradients that are exactly 0", `At this β: ${said}`, "β");
  axes(root, axisBottom(x).tickValues(powers(x.domain())).tickFormat(power), axisLeft(y).ticks(4, ".0%"));
  rule(root, x(logs[index]), Y0, x(logs[index]), Y1, "ql-cursor");
  known.forEach((name, slot) => {
    const d = logs.map((log, i) => `${i ? "L" : "M"}${x(log)},${y(value(name, i))}`).join("");
    root.append("path").attr("class", `ql-line ql-line-${slot} ql-dash-${slot}${name === dtype ? " ql-chosen" : ""}`).attr("data-series", name).attr("d", d);
  });
  return [...nodes, legendOf(known.map((name, slot) => ({ text: `${name} ${percent(value(name, index))}`, slot })))];
}

function legendOf(items) {
  const node = legend(items);
  for (const mark of node.querySelectorAll("path")) mark.remove(); // these lines have no marks
  return node;
}

export function spectrumPlot(data, index) {
  const { edges, shares, beta1, exact } = data.spectrum;
  if (!edges.length) return [h("h4", { text: "Singular values of β J" }), h("p", { class: "ql-muted", text: "Being computed, or all zero." })];
  const shift = Math.log10(data.grid.betas[index]);
  const x = scaleLinear([Math.floor(edges[0]) - 3, Math.ceil(edges.at(-1)) + 2], [X0, X1]);
  const y = scaleLinear([0, Math.max(...shares) * 1.2], [Y0, Y1]);
  const span = `from ${read(edges[0] + shift)} to ${read(edges.at(-1) + shift)}`;
  const rules = exact ? "exact" : "of the backward rules";
  const factor = beta1 ? `; their mean is 1 at β = ${Number(beta1.toPrecision(3))}` : "";
  const { root, nodes } = plot("Singular values of β J, input to logits", `${span}, ${rules}${factor}`, `singular value, ${rules}${factor}`);
  bars(root, x, y, edges, shift, shares);
  axes(root, axisBottom(x).tickValues(powers(x.domain())).tickFormat(power), axisLeft(y).ticks(4, ".0%"));
  rule(root, x(0), Y0, x(0), Y1, "ql-cursor");
  return nodes;
}
