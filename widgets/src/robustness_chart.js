// Accuracy against eps with intervals, and the curve of a check, as SVG. A net has a colour, a mark and a dash of its own.

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear, scaleLog } from "d3-scale";
import { select } from "d3-selection";

import { mark, read } from "./replay_plane.js";
import { svg } from "./svg.js";

const SIZE = { width: 480, height: 280, left: 60, right: 14, top: 12, bottom: 38 };
const SMALL = { width: 300, height: 150, left: 54, right: 12, top: 10, bottom: 34 };
const ASIDE = 4; // pixels between the intervals of two nets

export const percent = (value) => `${(100 * value).toFixed(1)} %`;

function frame(size, x, y, xTitle, yTitle, bottomAxis, leftAxis) {
  const root = svg("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", class: "ql-curves" });
  const bottom = svg("g", { class: "ql-axis", transform: `translate(0,${size.height - size.bottom})` });
  const left = svg("g", { class: "ql-axis", transform: `translate(${size.left},0)` });
  select(bottom).call(bottomAxis.tickSizeOuter(0));
  select(left).call(leftAxis.tickSizeOuter(0));
  const middle = (size.top + size.height - size.bottom) / 2;
  root.append(bottom, left);
  root.append(svg("text", { x: (size.left + size.width - size.right) / 2, y: size.height - 4, "text-anchor": "middle", class: "ql-axis-title" }, xTitle));
  root.append(svg("text", { transform: `translate(11,${middle}) rotate(-90)`, "text-anchor": "middle", class: "ql-axis-title" }, yTitle));
  return root;
}

/** curves: as Python sends them, arrays read; told: whether a guess was made, before it only clean accuracies stand there. */
export function drawRobustness({ curves, grid, eps, norm, told }) {
  const x = scaleLinear([0, Math.max(...grid)], [SIZE.left + 8, SIZE.width - SIZE.right - 8]);
  const y = scaleLinear([0, 1], [SIZE.height - SIZE.bottom, SIZE.top]);
  const xAxis = axisBottom(x).tickValues(apart([0, ...grid], x)).tickFormat((v) => read(v));
  const yAxis = axisLeft(y).ticks(5).tickFormat((v) => `${Math.round(100 * v)} %`);
  const root = frame(SIZE, x, y, `ε (${norm})`, "accuracy, worst case over attacks", xAxis, yAxis);
  root.setAttribute("aria-label", inWords(curves, grid, told));
  root.append(svg("line", { x1: x(eps), x2: x(eps), y1: SIZE.top, y2: SIZE.height - SIZE.bottom, class: "ql-cursor" }));
  curves.forEach((curve, k) => {
    const aside = ASIDE * (k - (curves.length - 1) / 2);
    const points = [{ at: 0, share: curve.clean }];
    if (told) grid.forEach((at, i) => Number.isFinite(curve.share[i]) && points.push({ at, share: curve.share[i], low: curve.low[i], high: curve.high[i] }));
    const open = curve.complete || points.length === 1 ? "" : " ql-open";
    const way = points.map((p) => `${(x(p.at) + aside).toFixed(1)},${y(p.share).toFixed(1)}`).join(" ");
    const group = svg("g", { class: `ql-run-${curve.slot}${open}`, "data-net": curve.name, "data-points": points.length });
    group.append(svg("polyline", { points: way, class: `ql-curve ql-dash-${curve.slot}` }));
    for (const p of points) {
      const px = x(p.at) + aside;
      if (p.low !== undefined) group.append(svg("path", { d: `M${px - 3},${y(p.low)}h6M${px},${y(p.low)}V${y(p.high)}M${px - 3},${y(p.high)}h6`, class: "ql-interval" }));
      group.append(mark(px, y(p.share), curve.slot));
    }
    if (told && curve.complete && curve.plain) group.append(...gap(curve, grid, x(curve.plain.eps) + aside, y));
    root.append(group);
  });
  return root;
}

/** How much plain PGD alone leaves beyond the worst case, at the radius of the panel. */
function gap({ plain: { eps, share }, share: worst, slot }, grid, px, y) {
  const i = grid.findIndex((v) => Math.abs(v - eps) <= 1e-9 * v);
  const line = i < 0 ? [] : [svg("line", { x1: px, x2: px, y1: y(worst[i]), y2: y(share), class: "ql-gap" })];
  return [...line, plain(px, y(share), slot)];
}

/** What plain PGD alone leaves: a ring around nothing. */
export const plain = (px, py, slot) => svg("circle", { cx: px, cy: py, r: 6, class: `ql-plain-pgd ql-run-${slot}` });

/** Figures only of nets that are finished, with what the panel says. */
function inWords(curves, grid, told) {
  if (!told) return `Accuracy without an attack. ${curves.map((c) => `${c.name}: ${percent(c.clean)}`).join("; ")}. The rest comes after your guess.`;
  const parts = curves.map((c) => {
    if (!c.complete) return `${c.name}: ${percent(c.clean)} without an attack, not finished, so no robust accuracy is stated`;
    const shares = grid.map((at, i) => `${percent(c.share[i])} at ${read(at)}`);
    return `${c.name}: ${percent(c.clean)} without an attack, at most ${shares.join(", ")}; ${c.verdict}`;
  });
  return `Accuracy against eps, worst case over attacks. ${parts.join(". ")}.`;
}

/** Ticks that leave room for their labels. */
function apart(ticks, x) {
  const kept = [];
  for (const v of ticks) if (kept.every((k) => Math.abs(x(k) - x(v)) > 30)) kept.push(v);
  return kept;
}

/** What a check saw. */
export function drawCheck({ name, words, curve }) {
  const finite = Array.from(curve.x, (at, i) => [at, curve.y[i]]).filter(([a, b]) => Number.isFinite(a) && Number.isFinite(b));
  const points = curve.log ? finite.filter(([at]) => at > 0) : finite;
  if (points.length === 0) return null;
  const [xs, ys] = [points.map(([a]) => a), points.map(([, b]) => b)];
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const ends = [SMALL.left + 6, SMALL.width - SMALL.right];
  const x = curve.log && x1 > x0 ? scaleLog([x0, x1], ends) : scaleLinear([x0, x1 > x0 ? x1 : x0 + 1], ends);
  const low = Math.min(0, ...ys);
  const y = scaleLinear([low, Math.max(...ys) > low ? Math.max(...ys) : low + 1], [SMALL.height - SMALL.bottom, SMALL.top]);
  const xAxis = axisBottom(x).tickValues(ticks(x, curve.log)).tickFormat((v) => read(v, 2));
  const root = frame(SMALL, x, y, curve.x_name, curve.y_name, xAxis, axisLeft(y).ticks(3));
  root.setAttribute("aria-label", `${name}: ${curve.y_name} against ${curve.x_name}. ${words}`);
  root.append(svg("polyline", { points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), class: "ql-curve ql-plain" }));
  for (const [a, b] of points) root.append(svg("circle", { cx: x(a), cy: y(b), r: 2.6, class: "ql-spot" }));
  return root;
}

function ticks(x, log) {
  const all = log ? x.ticks(4).filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9) : x.ticks(4);
  const some = all.length < 2 ? x.domain() : all;
  const kept = [];
  for (const v of some) if (kept.every((k) => Math.abs(x(k) - x(v)) > 36)) kept.push(v);
  return kept;
}
