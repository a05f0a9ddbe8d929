// Small drawings of numbers: the running sum of a dot product, seconds per backend, gain by size.

import { scaleLinear, scaleLog } from "d3-scale";
import { h } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

export const minus = (value) => String(value).replace("-", "−");
const seconds = (s) => (s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${(1e3 * s).toFixed(2)} ms` : `${(1e6 * s).toFixed(1)} µs`);

/** The sum after each of the first `step` words, with zero and the threshold. */
export function runningSum(sums, step, threshold) {
  const [width, height, left, right] = [420, 110, 40, 92];
  const shown = [0, ...sums.slice(0, step)];
  const marks = threshold === null ? [0] : [0, threshold];
  const x = scaleLinear().domain([0, sums.length]).range([left, width - right]);
  const y = scaleLinear().domain([Math.min(...marks, ...sums), Math.max(...marks, ...sums)]).nice(3).range([height - 18, 8]);
  const said = `Running sum: ${minus(shown.at(-1))} after ${step} of ${sums.length} words${threshold === null ? "" : `; threshold ${minus(threshold)}`}`;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said, class: "ql-plot ql-running" });
  for (const v of y.ticks(3)) chart.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, minus(v)));
  chart.append(svg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), class: "ql-grid" }));
  const path = shown.map((v, t) => (t ? `H${x(t)}V${y(v)}` : `M${x(0)},${y(0)}`)).join("");
  chart.append(svg("path", { d: path, class: "ql-line ql-line-0" }));
  chart.append(svg("circle", { cx: x(step), cy: y(shown.at(-1)), r: 3.5, class: "ql-now" }));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "words added"));
  const ends = [{ text: `sum ${minus(shown.at(-1))}`, at: y(shown.at(-1)) }];
  if (threshold !== null) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(threshold), y2: y(threshold), class: "ql-threshold" }));
    ends.push({ text: `threshold ${minus(threshold)}`, at: y(threshold) });
  }
  ends.sort((a, b) => a.at - b.at);
  if (ends.length === 2 && ends[1].at - ends[0].at < 13) ends[1].at = ends[0].at + 13;
  for (const { text, at } of ends) chart.append(svg("text", { x: width - right + 6, y: at + 4 }, text));
  return chart;
}

const MEANING = {
  original: "the float net",
  torch: "signs as floats",
  numba: "xor and popcount on the processor",
  cuda: "on the GPU",
  onnxruntime: "signs as floats, in another runtime",
};

/** Bars from zero, a row per backend. */
export function bars({ rows, batch, where }) {
  if (!rows) return [];
  const most = Math.max(...rows.map((row) => row.seconds));
  const drawn = rows.map((row) => {
    const bar = h("div", { class: "ql-bar" });
    bar.style.width = `${(100 * row.seconds) / most}%`;
    return h("div", { class: "ql-bar-row" }, h("span", { text: row.name }), h("div", { class: "ql-bar-track" }, bar), h("span", { text: seconds(row.seconds) }));
  });
  const names = rows.filter(({ name }) => name in MEANING).map(({ name }) => `${name}: ${MEANING[name]}`);
  return [...drawn, h("p", { class: "ql-muted", text: `Time of a batch of ${batch}, ${where}. ${names.join("; ")}.` })];
}

const WAYS = [["gain", ""], ["packing_gain", " ql-dashed"]];

/** Gain over float32 by size, on log axes. */
export function gains({ kinds, points, smallest, summary }) {
  if (!points || points.length < 2) return [];
  const [width, height, left, bottom] = [420, 200, 46, 34];
  const sizes = [...new Set(points.map((p) => p.n))];
  const all = points.flatMap((p) => [p.gain, p.packing_gain]);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary, class: "ql-plot" });
  const x = scaleLog().domain([Math.min(...sizes), Math.max(...sizes)]).range([left + 8, width - 18]);
  const y = scaleLog().domain([Math.min(0.5, ...all), Math.max(2, ...all)]).range([height - bottom, 8]);
  for (const v of y.ticks().filter((t) => Number.isInteger(Math.round(1e6 * Math.log10(t)) / 1e6))) {
    chart.append(svg("line", { x1: left, x2: width - 8, y1: y(v), y2: y(v), class: v === 1 ? "ql-even" : "ql-grid" }));
    chart.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, `${v}×`));
  }
  for (const v of sizes) chart.append(svg("text", { x: x(v), y: height - bottom + 16, "text-anchor": "middle" }, v));
  chart.append(svg("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "size n"));
  Object.keys(kinds).forEach((kind, i) => {
    const line = points.filter((p) => p.kind === kind);
    for (const [key, dash] of WAYS) {
      const d = line.map((p, j) => `${j ? "L" : "M"}${x(p.n)},${y(p[key])}`).join("");
      if (line.length > 1) chart.append(svg("path", { d, class: `ql-line ql-line-${i}${dash}`, "data-points": line.length }));
      for (const p of line) chart.append(mark(i, x(p.n), y(p[key])));
    }
  });
  const legend = Object.entries(kinds).map(([kind, title], i) => {
    const s = smallest[kind];
    const packing = s.packing === null ? "" : `, with packing from n = ${s.packing}`;
    const said = s.words === null ? "bits did not win at the sizes measured" : `bits win from n = ${s.words}${packing}`;
    return h("p", { class: "ql-key" }, h("span", { class: `ql-mark ql-mark-${i}`, text: i ? "■" : "●", "aria-hidden": "true" }), `${title}: ${said}.`);
  });
  return [h("p", { text: "Gain over float32; above the line 1× bits win. Dashed: packing of the activations included." }), chart, ...legend];
}

/** Kinds are told apart by the shape of their points as well as by colour. */
function mark(i, x, y) {
  return i ? svg("rect", { x: x - 3, y: y - 3, width: 6, height: 6, class: `ql-point-${i}` }) : svg("circle", { cx: x, cy: y, r: 3.2, class: `ql-point-${i}` });
}
