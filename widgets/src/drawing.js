// A derivative to draw: points that are dragged or moved with the arrow keys; and the function that it is the derivative of.

import { scaleLinear } from "d3-scale";
import { h } from "./dom.js";
import { minus, svg } from "./svg.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [290, 190, 30, 22, 8];
const [LOW, HIGH] = [-1, 3];
const STEP = 0.05;
const KEYS = { ArrowUp: STEP, ArrowRight: STEP, ArrowDown: -STEP, ArrowLeft: -STEP, PageUp: 0.5, PageDown: -0.5 };

const round = (v) => Math.round(v / STEP) * STEP;
const clip = (v) => Math.min(HIGH, Math.max(LOW, v));

function frame(y0, y1, xs, said, ticks) {
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "ql-plot", "aria-label": said });
  const x = scaleLinear([xs[0], xs[1]], [LEFT, WIDTH - 6]);
  const y = scaleLinear([y0, y1], [HEIGHT - BOTTOM, TOP]);
  for (const v of ticks) {
    chart.append(svg("line", { x1: LEFT, x2: WIDTH - 6, y1: y(v), y2: y(v), class: v === 0 ? "ql-even" : "ql-grid" }));
    chart.append(svg("text", { x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, minus(v)));
  }
  for (const v of x.ticks(5)) chart.append(svg("text", { x: x(v), y: HEIGHT - 6, "text-anchor": "middle" }, minus(v)));
  return { chart, x, y };
}

export class Editor {
  /** @param onchange called with the values and whether the gesture has ended */
  constructor(onchange) {
    this.onchange = onchange;
    this.mirror = true;
    this.knots = [];
    this.values = [];
    this.dragged = null;
    this.node = h("div", { class: "ql-editor" });
  }

  /** Take a drawing that came from Python; a point that is being dragged is left alone. */
  set(knots, values) {
    if (this.dragged !== null) return;
    const same = knots.length === this.knots.length && knots.every((k, i) => k === this.knots[i]);
    [this.knots, this.values] = [knots, [...values]];
    if (same && this.handles) this.place();
    else this.build();
  }

  build() {
    const span = this.knots.at(-1) - this.knots[0];
    const ends = [this.knots[0] - span / 8, this.knots.at(-1) + span / 8];
    const { chart, x, y } = frame(LOW, HIGH, ends, "The derivative; its points are sliders", [-1, 0, 1, 2, 3]);
    chart.setAttribute("role", "group");
    [this.x, this.y, this.chart] = [x, y, chart];
    this.area = svg("path", { class: "ql-drawn-area" });
    this.line = svg("path", { class: "ql-drawn" });
    chart.append(this.area, this.line);
    this.handles = this.knots.map((knot, i) => {
      const handle = svg("circle", {
        r: 6.5,
        cx: x(knot),
        class: "ql-handle",
        tabindex: 0,
        role: "slider",
        "aria-label": `derivative at x = ${knot}`,
        "aria-valuemin": LOW,
        "aria-valuemax": HIGH,
        "aria-orientation": "vertical",
        "data-lm-suppress-shortcuts": "",
      });
      handle.addEventListener("keydown", (event) => this.key(event, i));
      handle.addEventListener("pointerdown", (event) => this.grab(event, i));
      handle.addEventListener("pointermove", (event) => this.drag(event, i));
      for (const name of ["pointerup", "pointercancel"]) handle.addEventListener(name, () => this.release());
      chart.append(handle);
      return handle;
    });
    this.node.replaceChildren(chart);
    this.place();
  }

  place() {
    const points = this.knots.map((k, i) => [this.x(k), this.y(clip(this.values[i]))]);
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${a},${b}`).join("");
    this.line.setAttribute("d", path);
    this.area.setAttribute("d", `${path}L${points.at(-1)[0]},${this.y(0)}L${points[0][0]},${this.y(0)}Z`);
    this.handles.forEach((handle, i) => {
      handle.setAttribute("cy", points[i][1]);
      handle.setAttribute("aria-valuenow", this.values[i].toFixed(2));
    });
  }

  move(i, value, done) {
    const v = clip(round(value));
    this.values[i] = v;
    const twin = this.knots.findIndex((k) => Math.abs(k + this.knots[i]) < 1e-9);
    if (this.mirror && twin >= 0) this.values[twin] = v;
    this.place();
    this.onchange(this.values.map((w) => Number(w.toFixed(6))), done);
  }

  key(event, i) {
    const step = KEYS[event.key];
    const target = event.key === "Home" ? 0 : event.key === "End" ? 2 : step === undefined ? null : this.values[i] + step;
    if (target === null) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(i, target, true);
  }

  grab(event, i) {
    this.dragged = i;
    event.target.setPointerCapture(event.pointerId);
  }

  drag(event, i) {
    if (this.dragged !== i) return;
    const box = this.chart.getBoundingClientRect();
    this.move(i, this.y.invert(((event.clientY - box.top) / box.height) * HEIGHT), false);
  }

  release() {
    if (this.dragged === null) return;
    const i = this.dragged;
    this.dragged = null;
    this.move(i, this.values[i], true);
  }
}

export class Primitive {
  constructor() {
    this.node = h("div", { class: "ql-primitive" });
  }

  draw(x, F) {
    if (!x.length) return;
    const reach = Math.max(1.5, ...F.map(Math.abs));
    const ticks = scaleLinear([-reach, reach], [0, 1]).ticks(5);
    const last = F.at(-1).toFixed(2);
    const said = `Forward: sign, and the function of the derivative, from ${minus(F[0].toFixed(2))} to ${minus(last)}`;
    const { chart, x: sx, y } = frame(-1.1 * reach, 1.1 * reach, [x[0], x.at(-1)], said, ticks);
    chart.setAttribute("role", "img");
    chart.append(svg("path", { d: `M${sx(x[0])},${y(-1)}H${sx(0)}V${y(1)}H${sx(x.at(-1))}`, class: "ql-step" }));
    const d = Array.from(x, (v, i) => `${i ? "L" : "M"}${sx(v)},${y(F[i])}`).join("");
    chart.append(svg("path", { d, class: "ql-line ql-dashed ql-line-0" }));
    chart.append(svg("text", { x: sx(x[0]) + 4, y: y(-1) - 5 }, "sign"));
    this.node.replaceChildren(chart);
  }
}
