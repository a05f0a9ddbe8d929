// Pictures of the Temperature view. They are built when data come; a move of the slider only moves cursor, dots, bars and readings.
// Curves are told apart by dash and legend as well as by colour, regimes by letter and hatching.

import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear } from "d3-scale";
import { select } from "d3-selection";

import { h } from "./dom.js";
import { svg } from "./svg.js";

const WIDTH = 440;
const HEIGHT = 226;
const EDGE = { left: 50, right: 12, top: 20, bottom: 36 };
const X0 = EDGE.left;
const X1 = WIDTH - EDGE.right;
const Y0 = HEIGHT - EDGE.bottom;
const Y1 = EDGE.top;
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const SPOTS = { ring: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", triangle: "M0,-6L5.5,4.5L-5.5,4.5z", square: "M-4.5,-4.5h9v9h-9z" };
const NEAR = 30; // two names closer than this would overlap
const MOST_CLASSES = 20; // that have a bar
const REGIMES = [["healthy", "H"], ["wrong direction", "W"], ["dead", "D"]];

export const power = (exponent) => `10${[...String(Math.round(exponent))].map((c) => SUPERSCRIPT[c]).join("")}`;
export const percent = (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : `${Number((100 * value).toFixed(1))} %`);
/** A positive number in three digits. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(1).replace("e-", "e−").replace("e+", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: 3 });
}
/** A number of which the decimal logarithm was sent; float64's do not fit into JavaScript's log of float32. */
export function readLog(log) {
  if (log === -Infinity) return "0";
  if (!Number.isFinite(log)) return "–";
  if (log > -3 && log < 5) return number(10 ** log);
  const exponent = Math.floor(log);
  return `${(10 ** (log - exponent)).toFixed(1)}e${String(exponent).replace("-", "−")}`;
}

/** Whole powers of ten within a domain, thinned to a handful. */
export function powers([low, high], most = 6) {
  const first = Math.ceil(low);
  const step = Math.max(1, Math.ceil((high - first) / most));
  return Array.from({ length: Math.max(0, Math.floor((high - first) / step) + 1) }, (_, i) => first + i * step);
}

function axes(root, bottom, left, xTitle) {
  const draw = (axis, transform) => {
    const g = svg("g", { class: "ql-axis", transform });
    select(g).call(axis.tickSizeOuter(0));
    root.append(g);
  };
  draw(bottom, `translate(0,${Y0})`);
  draw(left, `translate(${X0},0)`);
  root.append(svg("text", { x: (X0 + X1) / 2, y: HEIGHT - 4, "text-anchor": "middle", class: "ql-axis-title" }, xTitle));
}

function entry(picture, text) {
  const reading = h("span", { text });
  return { node: h("span", { class: "ql-entry" }, picture, reading), reading };
}

function swatch(...parts) {
  const picture = svg("svg", { viewBox: "0 -7 30 14", "aria-hidden": "true" });
  picture.append(...parts);
  return picture;
}

class Picture {
  constructor(title) {
    this.title = title;
    this.heading = h("h4", { text: title });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "ql-plot", "aria-label": title });
    this.legend = h("p", { class: "ql-legend" });
    this.node = h("section", {}, this.heading, this.svg, this.legend);
  }

  rename(title) {
    this.title = title;
    this.heading.textContent = title;
  }

  say(text) {
    this.svg.setAttribute("aria-label", `${this.title}. ${text}`);
  }
}

export class Curves extends Picture {
  /**
   * @param logs log10 of the betas
   * @param y {domain, ticks, format}
   * @param lines [{name, slot, values, read, strong, dotted}]: values (K), NaN where nothing is known
   * @param verticals [{log, name, text, slot}]: name in the picture, text in the legend; horizontals [{value, text, name}], spots [{log, value, shape, text}]
   */
  draw({ logs, y, lines, verticals = [], horizontals = [], spots = [] }) {
    const sx = scaleLinear([logs[0], logs.at(-1)], [X0, X1]);
    const sy = scaleLinear(y.domain, [Y0, Y1]);
    const inside = (v) => Number.isFinite(v) && v >= y.domain[0] - 1e-9 && v <= y.domain[1] + 1e-9;
    Object.assign(this, { logs, lines, sx, sy, inside, spots, verticals });
    this.svg.replaceChildren();
    axes(this.svg, axisBottom(sx).tickValues(powers(sx.domain())).tickFormat(power), axisLeft(sy).tickValues(y.ticks).tickFormat(y.format), "β");
    for (const { value, text, name } of horizontals) {
      this.svg.append(svg("line", { x1: X0, x2: X1, y1: sy(value), y2: sy(value), class: name }));
      const above = sy(value) > Y1 + 16;
      if (text) this.svg.append(svg("text", { x: X1 - 2, y: sy(value) + (above ? -4 : 12), "text-anchor": "end", class: "ql-note-text" }, text));
    }
    const sorted = [...verticals].sort((a, b) => a.log - b.log);
    const [low, high] = sx.domain();
    const within = (log) => sx(Math.min(high, Math.max(low, log)));
    const near = sorted.length > 1 && within(sorted[1].log) - within(sorted[0].log) < NEAR;
    sorted.forEach(({ log, name, slot }, i) => {
      const outside = log < low ? "‹ " : log > high ? "› " : "";
      const x = within(log);
      this.svg.append(svg("line", { x1: x, x2: x, y1: Y0, y2: Y1, class: `ql-rule ql-run-${slot} ql-dash-${slot}` }));
      const [anchor, shift] = !near ? ["middle", 0] : i === 0 ? ["end", -1] : ["start", 1];
      this.svg.append(svg("text", { x: x + shift, y: Y1 - 6, "text-anchor": anchor, class: `ql-label ql-run-${slot}` }, outside + name));
    });
    this.cursor = svg("line", { y1: Y0, y2: Y1, class: "ql-cursor" });
    this.svg.append(this.cursor);
    for (const { slot, values, strong, dotted, name } of lines) {
      const points = Array.from(values, (v, i) => ({ x: sx(logs[i]), y: sy(v), ok: inside(v), known: !Number.isNaN(v) })).filter(({ known }) => known);
      const d = points.map((p, i) => (p.ok ? `${i && points[i - 1].ok ? "L" : "M"}${p.x.toFixed(1)},${p.y.toFixed(1)}` : "")).join("");
      this.svg.append(svg("path", { class: `ql-curve ql-run-${slot} ql-dash-${slot}${strong ? " ql-chosen" : ""}`, "data-series": name, d }));
      if (dotted) for (const p of points.filter(({ ok }) => ok)) this.svg.append(svg("circle", { class: `ql-tiny ql-run-${slot}`, cx: p.x, cy: p.y, r: 1.8 }));
    }
    this.dots = lines.map(({ slot }) => svg("circle", { class: `ql-dot ql-run-${slot}`, r: 4 }));
    this.svg.append(...this.dots);
    for (const { log, value, shape } of spots.filter(({ value }) => inside(value))) {
      const x = within(log);
      this.svg.append(svg("path", { class: `ql-spot ql-spot-${shape}`, transform: `translate(${x},${sy(value)})`, d: SPOTS[shape] }));
    }
    const kept = lines.map(({ slot, name }) => entry(swatch(svg("path", { d: "M0,0H30", class: `ql-curve ql-run-${slot} ql-dash-${slot}` })), name));
    const ruled = verticals.map(({ slot, text }) => entry(swatch(svg("path", { d: "M15,-7V7", class: `ql-rule ql-run-${slot} ql-dash-${slot}` })), text));
    const fixed = spots.map(({ shape, text }) => entry(swatch(svg("path", { d: SPOTS[shape], transform: "translate(15,0)", class: `ql-spot ql-spot-${shape}` })), text));
    this.readings = kept.map(({ reading }) => reading);
    this.legend.replaceChildren(...[...kept, ...ruled, ...fixed].map(({ node }) => node));
  }

  move(index) {
    const x = this.sx(this.logs[index]);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.lines.forEach(({ name, values, read }, i) => {
      const value = values[index];
      const seen = this.inside(value);
      this.dots[i].setAttribute("visibility", seen ? "visible" : "hidden");
      if (seen) {
        this.dots[i].setAttribute("cx", x);
        this.dots[i].setAttribute("cy", this.sy(value));
      }
      this.readings[i].textContent = `${name}: ${read(value)}`;
    });
    const said = [...this.readings.map((r) => r.textContent), ...this.verticals.map(({ text }) => text), ...this.spots.map(({ text }) => text)];
    this.say(`At β ${number(10 ** this.logs[index])}: ${said.join(", ")}`);
  }
}

export class Bars extends Picture {
  /** softmax p(beta) of one example: the label's bar is hatched, the decision's class is marked by an arrow. */
  draw({ p, classes, label, decision }) {
    const at = (k, j) => p[k * classes + j];
    // The order of classes is the same at every beta, so the first beta tells which have a bar.
    const order = Array.from({ length: classes }, (_, j) => j).sort((a, b) => at(0, b) - at(0, a));
    const shown = new Set([label, ...order.slice(0, MOST_CLASSES - (order.indexOf(label) < MOST_CLASSES ? 0 : 1))]);
    const kept = Array.from(shown).sort((a, b) => a - b);
    const step = (X1 - X0 - 8) / kept.length;
    const sy = scaleLinear([0, 1], [Y0, Y1]);
    const sx = (j) => X0 + 8 + step * (kept.indexOf(j) + 0.5);
    Object.assign(this, { at, kept, sy, label, decision, classes });
    this.svg.replaceChildren();
    const axis = axisBottom(scaleLinear([0, 1], [X0, X1])).tickValues([]);
    const more = classes > kept.length ? `class; the ${kept.length} most probable of ${classes}` : "class";
    axes(this.svg, axis, axisLeft(sy).tickValues([0, 0.25, 0.5, 0.75, 1]).tickFormat((v) => `${100 * v} %`), more);
    this.svg.append(svg("line", { x1: X0, x2: X1, y1: sy(1 / classes), y2: sy(1 / classes), class: "ql-even" }));
    const width = Math.max(3, Math.min(26, step - 4));
    this.rects = kept.map((j) => svg("rect", { x: sx(j) - width / 2, width, class: "ql-bar" }));
    this.hatch = svg("path", { class: "ql-hatch" });
    this.left = sx(label) - width / 2;
    this.width = width;
    this.tops = kept.map((j) => svg("text", { x: sx(j), "text-anchor": "middle", class: "ql-label" }));
    this.svg.append(...this.rects, this.hatch, ...this.tops);
    for (const j of kept) this.svg.append(svg("text", { x: sx(j), y: Y0 + 14, "text-anchor": "middle", class: `ql-label${j === label ? " ql-strong" : " ql-muted"}` }, j === decision ? `▸${j}` : String(j)));
    const parts = [
      entry(swatch(svg("rect", { x: 8, y: -6, width: 14, height: 12, class: "ql-bar" }), svg("path", { d: hatching(8, -6, 14, 12), class: "ql-hatch" })), `label: class ${label}`),
      entry(swatch(svg("text", { x: 11, y: 4, class: "ql-label" }, "▸")), `decision: class ${decision}`),
      entry(swatch(svg("path", { d: "M0,0H30", class: "ql-even" })), `1 / ${classes}`),
    ];
    this.legend.replaceChildren(...parts.map(({ node }) => node));
  }

  move(index, beta) {
    this.kept.forEach((j, i) => {
      const value = this.at(index, j);
      const y = this.sy(value);
      this.rects[i].setAttribute("y", y);
      this.rects[i].setAttribute("height", Y0 - y);
      this.tops[i].setAttribute("y", y - 4);
      this.tops[i].textContent = value >= 0.995 || value >= 0.3 || j === this.label ? percent(value) : "";
    });
    const height = Y0 - this.sy(this.at(index, this.label));
    this.hatch.setAttribute("d", height > 1 ? hatching(this.left, Y0 - height, this.width, height) : "");
    this.rename(`softmax p(β) of this example at β = ${beta}`);
    this.say(this.kept.map((j) => `class ${j}: ${percent(this.at(index, j))}`).join(", "));
  }
}

/** Diagonal strokes within a rectangle. */
function hatching(x, y, width, height, step = 5) {
  const parts = [];
  for (let s = step; s < width + height; s += step) {
    const [x1, y1] = s <= height ? [x, y + s] : [x + s - height, y + height];
    const [x2, y2] = s <= width ? [x + s, y] : [x + width, y + s - width];
    parts.push(`M${x1.toFixed(1)},${y1.toFixed(1)}L${x2.toFixed(1)},${y2.toFixed(1)}`);
  }
  return parts.join("");
}

export class Regimes {
  /** A cell for each example: its number, the letter of its regime, and hatching. */
  constructor(onpick) {
    this.onpick = onpick;
    this.heading = h("h4");
    this.cells = h("div", { class: "ql-cells", role: "img" });
    this.legend = h("p", { class: "ql-legend" });
    this.node = h("section", { class: "ql-part-regimes" }, this.heading, this.cells, this.legend);
  }

  /** regimes (K, N), right (N) */
  draw(regimes, right, example) {
    const N = right.length;
    const any = right.some((r) => r);
    Object.assign(this, { regimes, N, counted: any ? right : right.map(() => 1) });
    this.cells.replaceChildren(
      ...Array.from(right, (r, n) => {
        const cell = h("span", { class: `ql-cell${r ? "" : " ql-missed"}${n === example ? " ql-here" : ""}` }, h("span", { text: String(n) }), h("b", {}));
        cell.addEventListener("click", () => this.onpick(n));
        return cell;
      }),
    );
    const parts = REGIMES.map(([name, letter], i) => entry(h("span", { class: "ql-cell ql-sample", "data-regime": i }, h("b", { text: letter })), name));
    this.readings = parts.map(({ reading }) => reading);
    const missed = right.filter((r) => !r).length;
    const more = missed ? [entry(h("span", { class: "ql-cell ql-sample ql-missed" }), `misclassified without an attack: ${missed}, not counted`).node] : [];
    this.legend.replaceChildren(...parts.map(({ node }) => node), ...more);
  }

  move(index, dtype, beta) {
    const count = [0, 0, 0];
    [...this.cells.children].forEach((cell, n) => {
      const regime = this.regimes[index * this.N + n];
      if (this.counted[n]) count[regime] += 1;
      if (cell.dataset.regime === String(regime)) return;
      cell.dataset.regime = String(regime);
      cell.lastChild.textContent = REGIMES[regime][1];
      cell.title = `example ${n}: ${REGIMES[regime][0]}`;
    });
    const total = count.reduce((a, b) => a + b, 0);
    REGIMES.forEach(([name], i) => (this.readings[i].textContent = `${name}: ${count[i]} of ${total}`));
    this.heading.textContent = `Error signal of every example at β = ${beta} in ${dtype}`;
    this.cells.setAttribute("aria-label", `${this.heading.textContent}: ${REGIMES.map(([name], i) => `${name} ${count[i]}`).join(", ")} of ${total}`);
  }
}
