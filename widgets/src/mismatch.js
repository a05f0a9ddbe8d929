// GradientMismatch: surrogate against truth per layer, a derivative to draw, two moons to try it on. State comes from Python.

import { contours } from "d3-contour";
import { scaleLinear } from "d3-scale";
import { Editor, Primitive } from "./drawing.js";
import { field, floats, h, select, setOptions, uid } from "./dom.js";
import { minus, svg } from "./svg.js";
import { View, widget } from "./view.js";

const PRESETS = ["clipped", "polynomial", "tanh", "erf", "swish", "identity"];
const SEND_MS = 80;
const two = (value) => (value === null || value === undefined ? "–" : minus(value.toFixed(2)));
const share = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`);

class Mismatch extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.serial = 0;
    this.build(root);
    this.watch();
  }

  build(root) {
    this.editor = new Editor((values, done) => this.drawn(values, done));
    this.primitive = new Primitive();
    this.preset = select([{ name: "", title: "choose ..." }, ...PRESETS.map((name) => ({ name }))], "", () => {
      if (this.preset.value) this.sendDrawing(this.preset.value);
      this.preset.value = "";
    });
    this.mirror = h("input", { type: "checkbox", onchange: () => (this.editor.mirror = this.mirror.checked) });
    this.mirror.checked = true;
    this.area = h("p", { class: "ql-muted" });
    this.guesses = h("fieldset", { class: "ql-guesses" }, h("legend", { text: "Guess first: where does it point best?" }));
    this.layer = select([], "", () => this.send({ type: "choose", layer: this.layer.value }));
    this.scatter = h("div", { class: "ql-scatter" });
    this.numbers = h("p", { class: "ql-numbers" });
    this.verdict = h("p", { class: "ql-result", "aria-live": "polite" });
    this.meter = h("div", { class: "ql-meter" });
    this.train = h("button", { class: "ql-primary", text: "Train with this surrogate", onclick: () => this.send({ type: "train" }) });
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    this.plane = h("div", { class: "ql-plane-box" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.code = h("pre", { class: "ql-code", tabindex: "0", "aria-label": "Python code of the quantizer", "data-lm-suppress-shortcuts": "" });
    this.caption = h("p", { class: "ql-caption" });
    this.revealed = h("div", { class: "ql-revealed" }, field("Layer", this.layer), this.scatter, this.numbers, this.meter);
    this.root = h(
      "div",
      { class: "ql-studio ql-mismatch" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "How wrong is the gradient that trains a binary net, and can you draw a better one?" }),
        h(
          "div",
          { class: "ql-columns" },
          h(
            "section",
            {},
            h("h4", { text: "Backward: the derivative you draw" }),
            this.editor.node,
            h("div", { class: "ql-tools" }, field("Start from", this.preset), h("label", { class: "ql-choice" }, this.mirror, "mirror")),
            h("h4", { text: "Its function, and the sign that runs forward" }),
            this.primitive.node,
            this.area,
          ),
          h("section", {}, h("h4", { text: "Gradient against the truth" }), this.guesses, this.verdict, this.revealed),
          h(
            "section",
            { class: "ql-area-moons" },
            h("h4", { text: "Two moons, trained with it" }),
            h("div", { class: "ql-buttons" }, this.train, this.stop),
            this.status,
            this.plane,
            h("details", {}, h("summary", { text: "Take it home" }), this.code),
          ),
        ),
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    this.listen({
      drawing: () => this.drawDrawing(),
      curves: () => this.drawPrimitive(),
      layers: () => this.drawLayers(),
      settings: () => this.drawScatter(),
      honesty: () => this.drawMeter(),
      moons: () => this.drawMoons(),
      code: () => this.drawCode(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    clearTimeout(this.timer);
    super.close();
  }

  // ---- drawing

  /** While a point is dragged, what is sent is thinned; the end is always sent. */
  drawn(values, done) {
    this.pending = values;
    if (done) {
      clearTimeout(this.timer);
      this.timer = undefined;
      this.sendDrawing(values);
    } else if (this.timer === undefined) {
      this.timer = setTimeout(() => {
        this.timer = undefined;
        this.sendDrawing(this.pending);
      }, SEND_MS);
    }
  }

  /** Drawings are numbered: an answer to an older one must not undo a newer one that is on its way. */
  sendDrawing(values) {
    this.serial = Math.max(this.serial, this.model.get("drawing").serial) + 1;
    this.send({ type: "draw", values, serial: this.serial });
  }

  drawDrawing() {
    const { knots, values, area, serial } = this.model.get("drawing");
    if (serial >= this.serial) this.editor.set(knots, values);
    this.area.textContent = `Height of the step that it stands for: ${two(area)}; the jump of sign is 2.`;
  }

  drawPrimitive() {
    const { x, F } = this.model.get("curves");
    this.primitive.draw(floats(x), floats(F));
  }

  drawCode() {
    this.code.textContent = this.model.get("code");
  }

  // ---- gradients

  drawLayers() {
    const layers = this.model.get("layers");
    const names = layers.map(({ layer }) => layer);
    setOptions(this.layer, names.map((name) => ({ name })), this.model.get("settings").layer ?? "");
    if (this.offered !== names.join("\n") && names.length) {
      this.offered = names.join("\n");
      this.guesses.querySelectorAll(".ql-choice").forEach((node) => node.remove());
      const name = uid("guess");
      for (const layer of names) {
        const input = h("input", { type: "radio", name, value: layer, onchange: () => this.predict(layer) });
        this.guesses.append(h("label", { class: "ql-choice" }, input, layer));
      }
    }
    this.drawScatter();
  }

  predict(layer) {
    this.guess = layer;
    this.drawScatter();
    this.drawCaption();
    this.guesses.disabled = true;
  }

  judge() {
    const best = this.best();
    if (this.guess === null || !best) return;
    const right = best.layer === this.guess ? "You guessed right" : `You guessed ${this.guess}`;
    this.verdict.textContent = `${right}: with this drawing it is ${best.layer}, cosine ${two(best.cosine)}.`;
  }

  best() {
    const known = this.model.get("layers").filter(({ cosine }) => cosine !== null);
    return known.sort((a, b) => b.cosine - a.cosine)[0];
  }

  drawScatter() {
    const layers = this.model.get("layers");
    const chosen = this.model.get("settings").layer;
    const one = layers.find(({ layer }) => layer === chosen);
    this.revealed.hidden = this.guess === null || !one;
    this.guesses.hidden = layers.length === 0;
    if (this.revealed.hidden) return;
    this.judge();
    this.layer.value = chosen;
    this.scatter.replaceChildren(scatter(one));
    this.numbers.textContent =
      `Cosine ${two(one.cosine)}, rank correlation ${two(one.spearman)}, right sign ${share(one.signs)} of the weights that matter.` +
      (one.blocked === null ? "" : ` The drawing passes nothing at ${share(one.blocked)} of the activations that follow.`);
    this.root.dataset.cosine = one.cosine === null ? "none" : one.cosine.toFixed(4);
  }

  drawMeter() {
    const { circulation, residual, spaces, summary } = this.model.get("honesty");
    if (!spaces) return;
    const row = (text, value, hint) => {
      const bar = h("div", { class: "ql-bar" });
      bar.style.width = `${100 * Math.min(1, value ?? 0)}%`;
      const track = h("div", { class: "ql-bar-track", role: "img", "aria-label": `${text}: ${value === null ? "nothing flows" : value.toFixed(3)} on a scale from 0 to 1` }, bar);
      return h("div", { class: "ql-bar-row", title: hint }, h("span", { text }), track, h("span", { text: value === null ? "–" : value.toFixed(3) }));
    };
    const note = h("p", { class: "ql-muted", text: "0 for the gradient of a function. Circulation 1 would be a vortex; residual 1: the line integral says nothing about the loss." });
    this.meter.replaceChildren(
      h("h4", { text: "Is it the gradient of anything?" }),
      row("circulation", circulation, summary),
      row("residual", residual, summary),
      note,
    );
  }

  // ---- two moons

  drawMoons() {
    const moons = this.model.get("moons");
    if (!moons.grid) return;
    this.plane.replaceChildren(plane(moons), ...(moons.steps.length > 1 ? [accuracy(moons)] : []));
    this.root.dataset.step = String(moons.steps.at(-1));
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction } = this.model.get("status");
    const busy = phase === "training";
    this.root.dataset.phase = phase;
    this.train.disabled = busy;
    this.stop.disabled = !busy;
    this.status.textContent = busy ? `${text} (${Math.round(100 * fraction)} %)` : text;
    this.drawError();
  }

  drawCaption() {
    this.caption.textContent = this.guess === null ? "Exact changes of the loss are compared with what back-propagation says. Guess a layer to see." : this.model.get("caption");
  }
}

/** Surrogate over truth; the quarters in which the signs differ are shaded. */
function scatter({ layer, axis, surrogate, truth, cosine, signs }) {
  const size = 290;
  const [left, bottom, top] = [26, 34, 6];
  const x = scaleLinear([-1.1, 1.1], [left, size]);
  const y = scaleLinear([-1.1, 1.1], [size - bottom, top]);
  const said = `${layer}: the surrogate's gradient over the ${axis}. Cosine ${two(cosine)}; right sign for ${share(signs)}.`;
  const chart = svg("svg", { viewBox: `0 0 ${size + 4} ${size}`, role: "img", "aria-label": said, class: "ql-plot" });
  for (const [a, b] of [[-1.1, 1.1], [0, 0]]) {
    chart.append(svg("rect", { x: x(a), y: y(b), width: x(0) - x(-1.1), height: y(-1.1) - y(0), class: "ql-wrong-quarter" }));
  }
  chart.append(svg("text", { x: x(-1.05), y: y(1.1) + 12, class: "ql-quarter" }, "wrong sign"));
  chart.append(svg("line", { x1: x(-1.1), x2: x(1.1), y1: y(0), y2: y(0), class: "ql-grid" }), svg("line", { x1: x(0), x2: x(0), y1: y(-1.1), y2: y(1.1), class: "ql-grid" }));
  const [g, t] = [floats(surrogate), floats(truth)];
  g.forEach((value, i) => chart.append(svg("circle", { cx: x(t[i]), cy: y(value), r: 2.4, class: "ql-spot" })));
  chart.append(svg("text", { x: x(0), y: size - 18, "text-anchor": "middle" }, "truth, scaled:"));
  chart.append(svg("text", { x: x(0), y: size - 5, "text-anchor": "middle" }, axis));
  chart.append(svg("text", { x: 12, y: y(0), "text-anchor": "middle", transform: `rotate(-90 12 ${y(0)})` }, "surrogate, scaled"));
  return chart;
}

/** The plane: the region of class 1 is tinted and outlined, classes are circles and squares. */
function plane({ decisions, grid, extent, points, labels, summary }) {
  const [x0, x1, y0, y1] = extent;
  const width = 290;
  const height = Math.round((width * (y1 - y0)) / (x1 - x0));
  const x = scaleLinear([x0, x1], [0, width]);
  const y = scaleLinear([y0, y1], [height, 0]);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Decision regions. ${summary}`, class: "ql-plot ql-moons" });
  const [region] = contours().size([grid, grid]).thresholds([0])(Array.from(floats(decisions)));
  const step = (v, length) => ((v - 0.5) / (grid - 1)) * length;
  const ring = (line) => `${line.map(([i, j], k) => `${k ? "L" : "M"}${step(i, width).toFixed(1)},${(height - step(j, height)).toFixed(1)}`).join("")}Z`;
  const d = region.coordinates.flatMap((polygon) => polygon.map(ring)).join("");
  if (d) chart.append(svg("path", { d, class: "ql-region", "fill-rule": "evenodd" }));
  const [p, c] = [floats(points), floats(labels)];
  for (let i = 0; i < c.length; i += 1) {
    const [u, v] = [x(p[2 * i]), y(p[2 * i + 1])];
    chart.append(c[i] ? svg("rect", { x: u - 2.2, y: v - 2.2, width: 4.4, height: 4.4, class: "ql-class-1" }) : svg("circle", { cx: u, cy: v, r: 2.5, class: "ql-class-0" }));
  }
  return chart;
}

function accuracy({ steps, accuracies }) {
  const [width, height, left, right, bottom] = [290, 100, 38, 46, 30];
  const x = scaleLinear([0, steps.at(-1) || 1], [left, width - right]);
  const y = scaleLinear([0.4, 1], [height - bottom, 6]);
  const last = accuracies.at(-1);
  const said = `Accuracy of the deployed net on unseen points: ${(100 * last).toFixed(1)} % after ${steps.at(-1)} steps`;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said, class: "ql-plot" });
  for (const v of [0.5, 1]) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "ql-grid" }));
    chart.append(svg("text", { x: left - 4, y: y(v) + 4, "text-anchor": "end" }, `${100 * v}%`));
  }
  const d = steps.map((s, i) => `${i ? "L" : "M"}${x(s)},${y(Math.max(0.4, accuracies[i]))}`).join("");
  chart.append(svg("path", { d, class: "ql-line ql-line-0" }));
  chart.append(svg("text", { x: width - right + 4, y: y(Math.max(0.4, last)) + 4 }, `${(100 * last).toFixed(1)}%`));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, `accuracy, ${steps.at(-1)} steps`));
  return chart;
}

export default widget(Mismatch);
