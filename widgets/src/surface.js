// One surface on a canvas: seen from above with contours, or turned about in three dimensions. No numbers are made here but colours.

import { contours } from "d3-contour";
import { scaleLinear, scaleLog } from "d3-scale";

import { h } from "./dom.js";

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const STOPS = VIRIDIS.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
const LEVELS = 10;
const SHARES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4];
const SIDE = 300; // CSS pixels of the drawing
const TALL = 0.75; // height of a surface in 3-D, in units of its side
const TURN = Math.PI / 18;
const QUADS = 50; // a side, at most
const CASING = "#ffffff";
const INK = "#111111";
const PATH = "#e8590c";

export function viridis(t) {
  const u = Math.min(1, Math.max(0, t)) * (STOPS.length - 1);
  const i = Math.min(STOPS.length - 2, Math.floor(u));
  return STOPS[i].map((c, k) => Math.round(c + (u - i) * (STOPS[i + 1][k] - c)));
}

const rgb = ([r, g, b], shade = 1) => `rgb(${Math.round(r * shade)},${Math.round(g * shade)},${Math.round(b * shade)})`;

/** Loss to a number in [0, 1], on the scale that all surfaces share; beyond its top is 1. */
export const height = ({ low, high, log }) => (log ? scaleLog([low, high], [0, 1]) : scaleLinear([low, high], [0, 1])).clamp(true);

export class Surface {
  /**
   * @param title of the function
   * @param onpoint called with lattice indices (i, j) when a point is chosen
   * @param onturn called with (yaw, pitch) when the surface is turned
   */
  constructor(title, onpoint, onturn) {
    this.title = title;
    this.onpoint = onpoint;
    this.onturn = onturn;
    this.canvas = h("canvas", { role: "img", tabindex: 0, "data-lm-suppress-shortcuts": true, class: "ql-surface" });
    this.veil = h("p", { class: "ql-veil" });
    this.caption = h("figcaption", { text: title });
    this.node = h("figure", { class: "ql-landscape", "data-function": title }, this.caption, h("div", { class: "ql-stack" }, this.canvas, this.veil));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("pointerdown", (event) => this.grab(event));
  }

  /** state: {shape, loss (one function), flipped, evaluated, scale, view, yaw, pitch, at, path, a, b, label, hidden} */
  draw(state) {
    this.state = state;
    this.veil.textContent = state.hidden;
    this.veil.hidden = !state.hidden;
    this.canvas.setAttribute("aria-label", state.hidden ? `${this.title}: ${state.hidden}` : state.label);
    this.canvas.dataset.view = state.view;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = this.canvas.height = Math.round(SIDE * ratio);
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    if (state.hidden) return;
    if (state.view === "3d") this.turned(ctx);
    else this.above(ctx);
  }

  // ---- from above: a to the right, b upwards

  x(i) {
    return (i * SIDE) / (this.state.shape[0] - 1);
  }

  y(j) {
    return SIDE - (j * SIDE) / (this.state.shape[1] - 1);
  }

  at(a, b) {
    const { a: as, b: bs, shape } = this.state;
    return [this.x(((a - as[0]) / (as[1] - as[0])) * (shape[0] - 1)), this.y(((b - bs[0]) / (bs[1] - bs[0])) * (shape[1] - 1))];
  }

  above(ctx) {
    const { shape, loss, scale, flipped, evaluated, complete } = this.state;
    const [n, m] = shape;
    const t = height(scale);
    const image = new ImageData(n, m);
    for (let i = 0; i < n; i += 1) {
      for (let j = 0; j < m; j += 1) image.data.set([...viridis(t(loss[i * m + j])), 255], 4 * ((m - 1 - j) * n + i));
    }
    const small = new OffscreenCanvas(n, m);
    small.getContext("2d").putImageData(image, 0, 0);
    ctx.imageSmoothingEnabled = false;
    const [dx, dy] = [SIDE / (n - 1), SIDE / (m - 1)];
    ctx.drawImage(small, -dx / 2, -dy / 2, SIDE + dx, SIDE + dy); // a pixel around each lattice point
    const heights = this.transposed(loss).map(t);
    const levels = Array.from({ length: LEVELS - 1 }, (_, i) => (i + 1) / LEVELS);
    ctx.strokeStyle = "rgba(255,255,255,0.65)";
    ctx.lineWidth = 0.6;
    for (const ring of this.rings(heights, levels)) ctx.stroke(ring.path);
    if (flipped) this.drawFlips(ctx, this.transposed(flipped));
    if (!complete) {
      ctx.fillStyle = "rgba(255,255,255,0.8)";
      for (let i = 0; i < n; i += 1) for (let j = 0; j < m; j += 1) if (evaluated[i * m + j]) ctx.fillRect(this.x(i) - 0.6, this.y(j) - 0.6, 1.2, 1.2);
    }
    this.drawPath(ctx, (a, b) => this.at(a, b));
    this.star(ctx, ...this.at(0, 0));
    this.cross(ctx);
  }

  /** values[a][b] to rows of b with a running fastest, as d3-contour reads them. */
  transposed(values) {
    const [n, m] = this.state.shape;
    return Array.from({ length: n * m }, (_, k) => values[(k % n) * m + Math.floor(k / n)]);
  }

  rings(values, levels) {
    const [n, m] = this.state.shape;
    const made = contours().size([n, m]).smooth(true).thresholds(levels)(values);
    return made.flatMap(({ value, coordinates }) => {
      const path = new Path2D();
      let label = null;
      for (const ring of coordinates.flat()) {
        let open = false;
        for (const [u, v] of ring) {
          // d3-contour's cells are centred on half-integers; its rings run along the border, which is no contour
          const edge = u <= 0.5 || v <= 0.5 || u >= n - 0.5 || v >= m - 0.5;
          const [px, py] = [this.x(u - 0.5), this.y(v - 0.5)];
          if (open && !edge) path.lineTo(px, py);
          else path.moveTo(px, py);
          open = !edge;
          if (!edge && px > 22 && px < SIDE - 40 && py > 16 && py < SIDE - 8 && (label === null || py < label[1])) label = [px, py];
        }
      }
      return [{ value, path, label }];
    });
  }

  drawFlips(ctx, values) {
    ctx.font = "600 10px system-ui, sans-serif";
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    const drawn = [this.at(0, 0)]; // no label on the star, nor on another
    for (const { value, path, label } of this.rings(values, SHARES)) {
      ctx.setLineDash([]);
      ctx.lineWidth = 2.4;
      ctx.strokeStyle = "rgba(255,255,255,0.55)";
      ctx.stroke(path);
      ctx.setLineDash([5, 3]);
      ctx.lineWidth = 1.2;
      ctx.strokeStyle = INK;
      ctx.stroke(path);
      ctx.setLineDash([]);
      if (label && drawn.every(([x, y]) => Math.abs(x - label[0]) > 34 || Math.abs(y - label[1]) > 13)) {
        drawn.push(label);
        this.text(ctx, `${Math.round(100 * value)} %`, ...label);
      }
    }
  }

  text(ctx, words, x, y) {
    ctx.lineWidth = 3;
    ctx.strokeStyle = CASING;
    ctx.strokeText(words, x, y);
    ctx.fillStyle = INK;
    ctx.fillText(words, x, y);
  }

  drawPath(ctx, place) {
    const { path } = this.state;
    if (!path) return;
    const points = Array.from(path.a, (a, t) => place(a, path.b[t]));
    for (const [width, colour] of [
      [4, CASING],
      [2, PATH],
    ]) {
      ctx.lineWidth = width;
      ctx.strokeStyle = colour;
      ctx.beginPath();
      points.forEach(([x, y], t) => (t ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
      ctx.stroke();
    }
    for (const [x, y] of points) {
      ctx.beginPath();
      ctx.arc(x, y, 2.2, 0, 7);
      ctx.fillStyle = PATH;
      ctx.fill();
      ctx.lineWidth = 0.8;
      ctx.strokeStyle = CASING;
      ctx.stroke();
    }
    ctx.font = "600 11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const [x, y] = points[0];
    ctx.textAlign = x > SIDE / 2 ? "right" : "left";
    this.text(ctx, "start", x + (x > SIDE / 2 ? -7 : 7), Math.min(SIDE - 10, Math.max(10, y)));
  }

  star(ctx, x, y) {
    if (!(x >= 0 && x <= SIDE && y >= 0 && y <= SIDE)) return;
    ctx.beginPath();
    for (let k = 0; k < 10; k += 1) {
      const r = k % 2 ? 2.8 : 7;
      ctx.lineTo(x + r * Math.sin((k * Math.PI) / 5), y - r * Math.cos((k * Math.PI) / 5));
    }
    ctx.closePath();
    ctx.fillStyle = CASING;
    ctx.fill();
    ctx.lineWidth = 1;
    ctx.strokeStyle = INK;
    ctx.stroke();
  }

  cross(ctx) {
    const { at } = this.state;
    if (!at) return;
    const [x, y] = [this.x(at[0]), this.y(at[1])];
    for (const [width, colour] of [
      [3, CASING],
      [1.2, INK],
    ]) {
      ctx.lineWidth = width;
      ctx.strokeStyle = colour;
      ctx.strokeRect(x - 5, y - 5, 10, 10);
    }
  }

  // ---- turned: an orthographic projection, quads painted from back to front

  turned(ctx) {
    const { shape, loss, scale, yaw, pitch, at, a: as, b: bs } = this.state;
    const [n, m] = shape;
    const t = height(scale);
    const [cos, sin] = [Math.cos(yaw), Math.sin(yaw)];
    const [up, down] = [Math.cos(pitch), Math.sin(pitch)];
    const size = SIDE / 1.75;
    const project = (u, v, z) => {
      const [p, q] = [u * cos - v * sin, u * sin + v * cos];
      return [SIDE / 2 + size * p, SIDE / 2 + 0.16 * SIDE - size * (q * down + TALL * z * up) + 0.08 * size, q];
    };
    const value = (i, j) => t(loss[i * m + j]);
    const point = (i, j) => project(i / (n - 1) - 0.5, j / (m - 1) - 0.5, value(i, j));
    const step = Math.max(1, Math.ceil((Math.max(n, m) - 1) / QUADS));
    const ends = (count) => {
      const marks = [];
      for (let k = 0; k < count - 1; k += step) marks.push(k);
      return [...marks, count - 1];
    };
    const [is, js] = [ends(n), ends(m)];
    const quads = [];
    for (let p = 0; p + 1 < is.length; p += 1) {
      for (let q = 0; q + 1 < js.length; q += 1) {
        const corners = [
          [is[p], js[q]],
          [is[p + 1], js[q]],
          [is[p + 1], js[q + 1]],
          [is[p], js[q + 1]],
        ];
        const places = corners.map(([i, j]) => point(i, j));
        const z = corners.reduce((sum, [i, j]) => sum + value(i, j), 0) / 4;
        const slope = value(is[p + 1], js[q + 1]) - value(is[p], js[q]);
        quads.push({ places, z, depth: places.reduce((sum, c) => sum + c[2], 0), shade: 1 - Math.min(0.3, Math.max(-0.1, 1.6 * slope)) * 0.8 });
      }
    }
    quads.sort((p, q) => q.depth - p.depth);
    ctx.lineJoin = "round";
    for (const { places, z, shade } of quads) {
      ctx.beginPath();
      places.forEach(([x, y], k) => (k ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
      ctx.closePath();
      ctx.fillStyle = ctx.strokeStyle = rgb(viridis(z), Math.min(1, shade));
      ctx.lineWidth = 0.7;
      ctx.fill();
      ctx.stroke();
    }
    const nearest = (v, range, count) => Math.min(count - 1, Math.max(0, Math.round(((v - range[0]) / (range[1] - range[0])) * (count - 1))));
    const on = (a, b) => point(nearest(a, as, n), nearest(b, bs, m));
    this.drawPath(ctx, on);
    this.star(ctx, ...on(0, 0));
    if (at) {
      const [x, y] = point(...at);
      ctx.lineWidth = 1.5;
      ctx.strokeStyle = INK;
      ctx.strokeRect(x - 5, y - 5, 10, 10);
    }
  }

  // ---- mouse and keys

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!by || !this.state) return;
    event.preventDefault();
    event.stopPropagation();
    const { view, yaw, pitch, shape } = this.state;
    if (view === "3d") {
      this.onturn(yaw + by[0] * TURN, pitch + by[1] * TURN);
      return;
    }
    const from = this.state.at ?? this.state.origin;
    const pace = event.shiftKey ? 5 : 1;
    this.onpoint(...from.map((k, axis) => Math.min(shape[axis] - 1, Math.max(0, k + pace * by[axis]))));
  }

  grab(event) {
    if (!this.state || this.state.hidden) return;
    const box = this.canvas.getBoundingClientRect();
    const { view, yaw, pitch, shape } = this.state;
    if (view !== "3d") {
      const i = Math.round(((event.clientX - box.left) / box.width) * (shape[0] - 1));
      const j = Math.round((1 - (event.clientY - box.top) / box.height) * (shape[1] - 1));
      this.onpoint(Math.min(shape[0] - 1, Math.max(0, i)), Math.min(shape[1] - 1, Math.max(0, j)));
      return;
    }
    this.canvas.setPointerCapture(event.pointerId);
    const move = (now) => this.onturn(yaw + (now.clientX - event.clientX) / 90, pitch + (now.clientY - event.clientY) / 150);
    this.canvas.addEventListener("pointermove", move);
    const end = () => this.canvas.removeEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", end, { once: true });
    this.canvas.addEventListener("pointercancel", end, { once: true });
  }
}
