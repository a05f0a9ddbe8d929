// The plane of a replay as SVG: landscape, outlines, paths up to a step. An attacker has a colour, a mark and a dash of its own.

import { extent, max, range } from "d3-array";
import { axisBottom, axisLeft } from "d3-axis";
import { contours } from "d3-contour";
import { scaleLinear, scaleSymlog } from "d3-scale";
import { select } from "d3-selection";

import { uid } from "./dom.js";
import { minus, svg } from "./svg.js";

const SIDE = 420;
const EDGE = { left: 54, right: 10, top: 10, bottom: 36 };
const LEVELS = 9;
const ARROW = 34; // length of an arrow that lies in the plane
const RING = 6; // radius of the smallest ring; those of other attackers are larger, so that none hides another
const STAR = Array.from({ length: 10 }, (_, k) => {
  const r = k % 2 ? 3.6 : 9;
  return `${(r * Math.sin((k * Math.PI) / 5)).toFixed(2)},${(-r * Math.cos((k * Math.PI) / 5)).toFixed(2)}`;
}).join(" ");

export const MARKS = [
  "M-3.2,0a3.2,3.2 0 1,0 6.4,0a3.2,3.2 0 1,0 -6.4,0",
  "M-3,-3h6v6h-6z",
  "M0,-4L4,3L-4,3z",
  "M0,-4.4L4.4,0L0,4.4L-4.4,0z",
  "M0,4L4,-3L-4,-3z",
  "M-3.6,-3.6L3.6,3.6M-3.6,3.6L3.6,-3.6",
];
export const read = (value, digits = 3) => (Number.isFinite(value) ? minus(Number(value.toPrecision(digits))) : "–");

/** Draw everything anew. `state`: {ground, paths (those on view, with their slot), step, label}. */
export function drawPlane(state) {
  const { ground, paths, step, label } = state;
  const root = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", "aria-label": label, class: "ql-plane-picture" });
  const [left, right, bottom, top] = ground.extent;
  const x = scaleLinear([left, right], [EDGE.left, SIDE - EDGE.right]);
  const y = scaleLinear([bottom, top], [SIDE - EDGE.bottom, EDGE.top]);
  const clip = uid("clip");
  const hatch = uid("hatch");
  const frame = { x: EDGE.left, y: EDGE.top, width: SIDE - EDGE.left - EDGE.right, height: SIDE - EDGE.top - EDGE.bottom };
  const defs = svg("defs");
  const clipPath = svg("clipPath", { id: clip });
  clipPath.append(svg("rect", frame));
  const pattern = svg("pattern", { id: hatch, width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  pattern.append(svg("line", { x1: 0, y1: 0, x2: 0, y2: 8, class: "ql-hatch" }));
  defs.append(clipPath, pattern);
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  inside.append(svg("rect", { ...frame, class: "ql-floor" }), ...land(ground, x, y, hatch), ...outlines(ground, x, y));
  for (const path of paths) inside.append(line(path, step, x, y));
  for (const path of paths) inside.append(...marks(path, step, x, y));
  const [cx, cy] = [x(ground.centre[0]), y(ground.centre[1])];
  inside.append(svg("path", { d: `M${cx - 5},${cy}h10M${cx},${cy - 5}v10`, class: "ql-here" }));
  root.append(defs, inside, ...frameAxes(x, y, ground));
  return root;
}

/** Land where the margin is high is darker; where the label is lost it is hatched. */
function land({ margin, side, extent: [left, right, bottom, top] }, x, y, hatch) {
  const [low, high] = extent(margin);
  const u = (i) => x(left + ((i - 0.5) / (side - 1)) * (right - left)); // d3-contour's points stand on half-integers
  const v = (j) => y(bottom + ((j - 0.5) / (side - 1)) * (top - bottom));
  const draw = ({ coordinates }) =>
    coordinates.map((polygon) => polygon.map((ring) => `M${ring.map(([i, j]) => `${stretch(u, i, side).toFixed(1)},${stretch(v, j, side).toFixed(1)}`).join("L")}Z`).join("")).join("");
  const made = contours().size([side, side]);
  const levels = range(1, LEVELS).map((k) => low + (k / LEVELS) * (high - low));
  const parts = high > low ? levels.map((level) => svg("path", { d: draw(made.contour(margin, level)), class: "ql-level" })) : [];
  if (high > 0) {
    const d = draw(made.contour(margin, 1e-6 * max([-low, high]))); // a margin of 0 is a tie
    parts.push(svg("path", { d, fill: `url(#${hatch})`, "fill-rule": "evenodd" }), svg("path", { d, class: "ql-boundary" }));
  }
  return parts;
}

/** Rings run along the border half a cell inside of it; they are taken beyond it, so that it is no contour. */
const stretch = (scale, i, side) => scale(i <= 0.5 ? -1 : i >= side - 0.5 ? side + 1 : i);

function outlines({ ball, allowed }, x, y) {
  const polygon = (points, name) => svg("polygon", { points: pairs(points).map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), class: name });
  return [polygon(ball, "ql-ball"), ...(allowed.length > 2 ? [polygon(allowed, "ql-allowed")] : [])];
}

const pairs = (flat) => Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);

function line({ at, slot }, step, x, y) {
  const points = pairs(at).slice(0, step + 1).map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  const group = svg("g", { "data-path": slot });
  group.append(svg("polyline", { points, class: "ql-casing" }), svg("polyline", { points, class: `ql-way ql-run-${slot}` }));
  return group;
}

function marks({ at, arrows, zero, broke, slot }, step, x, y) {
  const places = pairs(at).map(([a, b]) => [x(a), y(b)]);
  const last = Math.min(step, places.length - 1);
  const parts = [];
  const rings = new Set(); // one ring for all steps at a place
  for (let t = 0; t <= last; t += 1) {
    const [px, py] = places[t];
    const [da, db] = [arrows[2 * t], arrows[2 * t + 1]];
    if (Number.isFinite(da)) parts.push(arrow(px, py, ARROW * da, -ARROW * db, slot, t === last));
    if (zero[t]) rings.add(`${px},${py}`);
    if (t === last || t === 0) parts.push(mark(px, py, slot));
  }
  for (const ring of rings) {
    const [cx, cy] = ring.split(",");
    parts.push(svg("circle", { cx, cy, r: RING + 3.5 * slot, class: `ql-ring ql-run-${slot}` }));
  }
  if (broke !== null && broke <= last) {
    const [px, py] = places[broke];
    parts.push(svg("polygon", { points: STAR, transform: `translate(${px},${py})`, class: `ql-star ql-run-${slot}` }));
  }
  return parts;
}

export const mark = (px, py, slot) => svg("path", { d: MARKS[slot % MARKS.length], transform: `translate(${px},${py})`, class: `ql-mark ql-run-${slot}` });

function arrow(px, py, dx, dy, slot, now) {
  const length = Math.hypot(dx, dy);
  const [ux, uy] = length > 0 ? [dx / length, dy / length] : [0, 0];
  const [hx, hy] = [px + dx, py + dy];
  const head = Math.min(5, length);
  const side = 0.45 * head;
  const d = `M${px},${py}L${hx},${hy}M${hx - head * ux - side * uy},${hy - head * uy + side * ux}L${hx},${hy}L${hx - head * ux + side * uy},${hy - head * uy - side * ux}`;
  return svg("path", { d, class: `ql-arrow ql-run-${slot}${now ? " ql-now" : ""}` });
}

function frameAxes(x, y, { two }) {
  const bottom = svg("g", { class: "ql-axis", transform: `translate(0,${SIDE - EDGE.bottom})` });
  const left = svg("g", { class: "ql-axis", transform: `translate(${EDGE.left},0)` });
  select(bottom).call(axisBottom(x).ticks(5).tickSizeOuter(0));
  select(left).call(axisLeft(y).ticks(5).tickSizeOuter(0));
  const [a, b] = two ? ["first input", "second input"] : ["u, towards the worst point found", "v, leading direction of the rest"];
  const middle = (EDGE.top + SIDE - EDGE.bottom) / 2;
  return [
    bottom,
    left,
    svg("text", { x: (EDGE.left + SIDE - EDGE.right) / 2, y: SIDE - 4, "text-anchor": "middle", class: "ql-axis-title" }, a),
    svg("text", { transform: `translate(11,${middle}) rotate(-90)`, "text-anchor": "middle", class: "ql-axis-title" }, b),
  ];
}

const CURVE = { width: 420, height: 205, left: 48, right: 10, top: 8, bottom: 34 };
const POWERS = [-1e6, -1e4, -1e3, -100, -10, -1, -0.1, 0, 0.1, 1, 10, 100, 1e3, 1e4, 1e6];

/** Curves by step: `part` is "margin" or "loss", solid up to the step on view and faint after it. */
export function drawCurves({ paths, part, step, steps, title, label }) {
  const root = svg("svg", { viewBox: `0 0 ${CURVE.width} ${CURVE.height}`, role: "img", "aria-label": `${title}. ${label}`, class: "ql-curves" });
  const values = paths.flatMap((path) => [...path[part]]).filter(Number.isFinite);
  const [low, high] = extent([...values, 0]);
  const wide = max([-low, high]) > 20 && part === "loss";
  const y = (wide ? scaleSymlog().constant(0.1) : scaleLinear()).domain([low, high > low ? high : low + 1]).range([CURVE.height - CURVE.bottom, CURVE.top + 4]);
  const x = scaleLinear([0, Math.max(1, steps)], [CURVE.left + 6, CURVE.width - CURVE.right - 6]);
  const bottom = svg("g", { class: "ql-axis", transform: `translate(0,${CURVE.height - CURVE.bottom})` });
  const left = svg("g", { class: "ql-axis", transform: `translate(${CURVE.left},0)` });
  select(bottom).call(axisBottom(x).ticks(Math.min(10, steps)).tickFormat((v) => (Number.isInteger(v) ? String(v) : "")).tickSizeOuter(0));
  const axis = axisLeft(y).tickSizeOuter(0);
  if (wide) axis.tickValues(apart(POWERS.filter((v) => v >= low && v <= high), y)).tickFormat((v) => minus(v));
  else axis.ticks(4);
  select(left).call(axis);
  root.append(bottom, left);
  root.append(svg("line", { x1: CURVE.left, x2: CURVE.width - CURVE.right, y1: y(0), y2: y(0), class: "ql-zero" }));
  root.append(svg("line", { x1: x(step), x2: x(step), y1: CURVE.top, y2: CURVE.height - CURVE.bottom, class: "ql-cursor" }));
  for (const path of paths) {
    const points = [...path[part]].map((value, t) => ({ t, value })).filter((p) => Number.isFinite(p.value));
    const course = (some) => some.map((p) => `${x(p.t).toFixed(1)},${y(p.value).toFixed(1)}`).join(" ");
    const before = points.filter((p) => p.t <= step);
    root.append(svg("polyline", { points: course(points), class: `ql-curve ql-later ql-run-${path.slot}` }));
    root.append(svg("polyline", { points: course(before), class: `ql-curve ql-dash-${path.slot} ql-run-${path.slot}`, "data-series": path.name }));
    if (before.length) root.append(mark(x(before.at(-1).t), y(before.at(-1).value), path.slot));
    if (part === "margin" && path.broke !== null && path.broke <= step) {
      root.append(svg("polygon", { points: STAR, transform: `translate(${x(path.broke)},${y(path.margin[path.broke])}) scale(0.8)`, class: `ql-star ql-run-${path.slot}` }));
    }
  }
  root.append(svg("text", { x: (CURVE.left + CURVE.width) / 2, y: CURVE.height - 4, "text-anchor": "middle", class: "ql-axis-title" }, "step"));
  return root;
}

/** Ticks that leave room for their labels; 0 always stays. */
function apart(ticks, y) {
  const kept = ticks.includes(0) ? [0] : [];
  for (const v of ticks) if (kept.every((k) => Math.abs(y(k) - y(v)) > 16)) kept.push(v);
  return kept;
}
