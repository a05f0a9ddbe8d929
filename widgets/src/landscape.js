// LandscapeExplorer: three functions of one net on one plane. State comes from Python, messages go to Python.

import { format } from "d3-format";

import { field, floats, h, octets, percent, select, uid } from "./dom.js";
import { Surface, viridis } from "./surface.js";
import { View, widget } from "./view.js";

const TITLES = {
  deployed: "deployed: shipped",
  latent: "latent: never shipped",
  smoothed: "smoothed",
  surrogate: "surrogate",
};
const START = { yaw: -0.6, pitch: 0.6 };
const read = format(".3~g");

class Landscape extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.at = null;
    this.view = "2d";
    this.turn = { ...START };
    this.surfaces = {};
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const name = uid("guess");
    const choice = (value, text) => {
      const input = h("input", { type: "radio", name, value, onchange: () => this.predict(value) });
      return h("label", { class: "ql-choice" }, input, text);
    };
    this.guesses = h(
      "fieldset",
      { class: "ql-guesses" },
      h("legend", { text: "Your guess: at the net itself (the star), the deployed loss is" }),
      choice("above", "above the latent loss"),
      choice("below", "below it"),
      choice("equal", "equal to it"),
    );
    this.slider = h("input", { type: "range", min: 0, max: 1, step: 0.01, oninput: () => this.slide() });
    this.k = h("output", { class: "ql-k" });
    this.sliderField = field("Sharpness k of the smoothed function: every jump is a tanh(k x)", this.slider);
    this.views = select([{ name: "2d", title: "from above, with contours" }, { name: "3d", title: "in 3-D" }], this.view, () => this.look(this.views.value));
    this.norms = select([], null, () => this.send({ type: "norm", batch_norm: this.norms.value }));
    this.normField = field("Batch norm", this.norms);
    this.buttons = {
      stop: h("button", { text: "Cancel", onclick: () => this.send({ type: "stop" }) }),
      refine: h("button", { text: "Refine", onclick: () => this.send({ type: "refine" }) }),
      reset: h("button", { text: "Reset the view", onclick: () => this.rotate(START.yaw, START.pitch) }),
    };
    this.panels = h("div", { class: "ql-panels" });
    this.legend = h("canvas", { role: "img", class: "ql-legend" });
    this.low = h("span");
    this.high = h("span");
    this.readout = h("p", { class: "ql-readout", "aria-live": "polite" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.hint = h("p", { class: "ql-muted ql-hint" });
    this.root = h(
      "div",
      { class: "ql-studio ql-explorer" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Which landscape does the net that is shipped really stand in?" }),
        this.guesses,
        this.result,
        h("div", { class: "ql-slide" }, this.sliderField, this.k),
        this.panels,
        h("div", { class: "ql-scale" }, this.low, this.legend, this.high),
        this.readout,
        this.hint,
        h("div", { class: "ql-bar" }, field("View", this.views), this.normField, ...Object.values(this.buttons), this.status),
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    const surfaces = () => this.drawSurfaces();
    this.listen({
      settings: () => this.drawSettings(),
      path: surfaces,
      surface: surfaces,
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    cancelAnimationFrame(this.frame);
    super.close();
  }

  // ---- what a user does

  predict(value) {
    this.guess = value;
    this.drawSurfaces();
    this.drawCaption();
  }

  look(view) {
    this.view = view;
    this.drawSurfaces();
  }

  rotate(yaw, pitch) {
    this.turn = { yaw, pitch: Math.min(Math.PI / 2, Math.max(0.1, pitch)) };
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawSurfaces());
  }

  slide() {
    const [low, high] = this.model.get("settings").range;
    const k = Math.min(high, Math.max(low, Number((low * (high / low) ** Number(this.slider.value)).toPrecision(3))));
    this.showSharpness(k);
    this.send({ type: "smooth", sharpness: k });
  }

  showSharpness(k) {
    this.k.textContent = `k = ${read(k)}`;
    this.slider.setAttribute("aria-valuetext", this.k.textContent);
  }

  point(i, j) {
    this.at = [i, j];
    this.drawSurfaces();
  }

  // ---- drawing

  drawSettings() {
    const { range, sharpness, smooth, functions, modes, batch_norm: mode } = this.model.get("settings");
    this.sliderField.parentElement.hidden = !smooth;
    if (this.slider !== document.activeElement) {
      // while it is being moved, what Python echoes is already old
      this.slider.value = Math.log(sharpness / range[0]) / Math.log(range[1] / range[0]);
      this.showSharpness(sharpness);
    }
    this.normField.hidden = modes.length === 0;
    this.norms.replaceChildren(...modes.map((name) => h("option", { value: name, text: name === "frozen" ? "frozen" : "re-estimated at every point" })));
    this.norms.value = mode;
    this.guesses.hidden = this.result.hidden = !functions.includes("latent");
    const kept = Object.keys(this.surfaces).join();
    if (kept === functions.join()) return;
    this.surfaces = Object.fromEntries(
      functions.map((name) => [
        name,
        new Surface(
          name,
          (i, j) => this.point(i, j),
          (yaw, pitch) => this.rotate(yaw, pitch),
        ),
      ]),
    );
    this.panels.replaceChildren(...functions.map((name) => this.surfaces[name].node));
    this.panels.dataset.count = String(functions.length);
  }

  get asked() {
    return this.guess === null && !this.guesses.hidden;
  }

  data() {
    const surface = this.model.get("surface");
    if (!surface.shape) return null;
    if (this.cached?.surface !== surface) {
      this.cached = {
        surface,
        loss: floats(surface.loss),
        accuracy: floats(surface.accuracy),
        flipped: surface.flipped?.byteLength ? floats(surface.flipped) : null,
        evaluated: octets(surface.evaluated),
      };
    }
    return this.cached;
  }

  drawSurfaces() {
    const data = this.data();
    const path = this.model.get("path");
    const drawnPath = path.a ? { a: floats(path.a), b: floats(path.b) } : null;
    this.buttons.reset.hidden = this.view !== "3d";
    const count = data ? data.surface.shape[0] * data.surface.shape[1] : 0;
    this.root.dataset.points = data ? String(data.evaluated.reduce((sum, v) => sum + v, 0)) : "0";
    for (const [name, panel] of Object.entries(this.surfaces)) {
      const k = data ? data.surface.functions.indexOf(name) : -1;
      panel.caption.textContent = `${TITLES[name] ?? name}${name === "smoothed" && data ? `, k = ${read(data.surface.sharpness)}` : ""}`;
      const hidden = k < 0 ? "Evaluating ..." : name === "deployed" && this.asked ? "Guess first." : "";
      if (hidden) {
        panel.draw({ hidden, view: this.view, shape: [2, 2] });
        continue;
      }
      const { surface } = data;
      const loss = data.loss.subarray(k * count, (k + 1) * count);
      panel.draw({
        hidden: "",
        view: this.view,
        ...this.turn,
        shape: surface.shape,
        origin: surface.origin,
        a: surface.a,
        b: surface.b,
        loss,
        flipped: data.flipped,
        evaluated: data.evaluated,
        complete: surface.complete,
        scale: surface,
        at: this.at,
        path: drawnPath,
        label: `${name}: loss ${read(surface.centre[name])} at the net itself, from ${read(loss.reduce((p, q) => Math.min(p, q)))} to ${read(loss.reduce((p, q) => Math.max(p, q)))} on the plane.`,
      });
    }
    if (data) {
      this.drawLegend(data.surface);
      this.drawReadout(data);
      this.drawResult(data.surface);
    }
  }

  drawLegend(surface) {
    const [w, hgt] = [240, 12];
    this.legend.width = w;
    this.legend.height = hgt;
    const ctx = this.legend.getContext("2d");
    for (let x = 0; x < w; x += 1) {
      ctx.fillStyle = `rgb(${viridis(x / (w - 1)).join()})`;
      ctx.fillRect(x, 0, 1, hgt);
    }
    this.low.textContent = `loss ${read(surface.low)}`;
    this.high.textContent = `${read(surface.high)} and more${surface.log ? ", log scale" : ""}`;
    this.legend.setAttribute("aria-label", `colours run from loss ${read(surface.low)}, dark, to ${read(surface.high)}, bright`);
    const marks = [...(this.model.get("path").a ? ["the orange line is the training run"] : []), ...(surface.flipped?.byteLength ? ["dashed lines: share of weights flipped"] : [])];
    const keys = this.view === "3d" ? "Drag, or use the arrow keys, to turn all surfaces" : "Click, or use the arrow keys (with Shift: 5 points), to read a point";
    this.hint.textContent = `${keys}. Star: the net itself${this.view === "2d" && marks.length ? `; ${marks.join("; ")}` : ""}.`;
  }

  drawReadout({ surface, loss, accuracy, flipped }) {
    const [n, m] = surface.shape;
    const [i, j] = this.at ?? surface.origin;
    const k = i * m + j;
    const along = ([low, high], index, count) => low + ((high - low) * index) / (count - 1);
    const parts = surface.functions
      .map((name, f) => [name, loss[f * n * m + k], accuracy[f * n * m + k]])
      .filter(([name]) => name !== "deployed" || !this.asked)
      .map(([name, value, share]) => `${name} loss ${read(value)}, accuracy ${percent(share)}`);
    const flips = flipped ? ` ${percent(flipped[k])} of the weights flipped.` : "";
    this.readout.textContent = `At (${read(along(surface.a, i, n))}, ${read(along(surface.b, j, m))}): ${parts.join("; ")}.${flips}`.replaceAll("-", "−");
  }

  drawResult({ centre }) {
    if (this.asked || this.guesses.hidden) {
      this.result.textContent = "";
      return;
    }
    const [deployed, latent] = [centre.deployed, centre.latent];
    const same = Math.abs(deployed - latent) <= 1e-9 * Math.max(Math.abs(deployed), Math.abs(latent));
    const truth = same ? "equal" : deployed > latent ? "above" : "below";
    this.result.textContent = `Deployed ${read(deployed)}, latent ${read(latent)}: ${truth === "equal" ? "equal to it" : truth}. You guessed ${truth === this.guess ? "right" : "wrong"}.`;
  }

  drawStatus() {
    const { phase, text, fraction } = this.model.get("status");
    const busy = phase === "running";
    this.root.dataset.phase = phase;
    this.buttons.stop.disabled = !busy;
    this.buttons.refine.disabled = busy || fraction >= 1;
    this.status.textContent = text;
    this.drawError();
  }

  drawCaption() {
    this.caption.textContent = this.asked ? "Guess, and the deployed surface is drawn beside the others." : this.model.get("caption");
  }
}

export default widget(Landscape);
