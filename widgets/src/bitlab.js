// BitLab: the bits of a layer, one dot product word by word, and what bits cost here. State comes from Python, messages go to Python.

import { scaleLog } from "d3-scale";
import { field, h, octets, select, uid } from "./dom.js";

const CELL = 3; // pixels of one bit in the picture
const SVG = "http://www.w3.org/2000/svg";
const PLAY_MS = 700;

/** Words as pairs of 32-bit halves: JavaScript has no integers of 64 bits that are quick. */
function halves(buffer) {
  const bytes = octets(buffer);
  return new Uint32Array(bytes.slice().buffer);
}
const bitOf = (words, word, i) => (words[2 * word + (i >> 5)] >>> (i & 31)) & 1;
const ints = (buffer) => new Int32Array(octets(buffer).slice().buffer);

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

const seconds = (s) => (s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${(1e3 * s).toFixed(2)} ms` : `${(1e6 * s).toFixed(1)} µs`);
const kilobytes = (n) => `${(n / 1024).toLocaleString("en", { maximumFractionDigits: 1 })} KB`;

class View {
  constructor(model, root) {
    this.model = model;
    this.step = 0;
    this.guess = null;
    this.build(root);
    this.listen();
  }

  // ---- page

  build(root) {
    const layers = this.model.get("layers");
    this.layer = select(layers, this.model.get("settings").layer, () => this.choose({ layer: this.layer.value }));
    const number = (name) => h("input", { type: "number", min: 0, step: 1, onchange: (event) => this.choose({ [name]: Number(event.target.value) }) });
    this.inputs = Object.fromEntries(["unit", "row", "column", "example"].map((name) => [name, number(name)]));
    this.fields = {
      unit: field("Unit", this.inputs.unit, "an output channel or neuron"),
      row: field("Row", this.inputs.row),
      column: field("Column", this.inputs.column),
      example: field("Example", this.inputs.example),
    };
    this.picture = h("canvas", { role: "img" });
    this.pictureNote = h("p", { class: "ql-muted" });
    const guessName = uid("guess");
    const guess = (value, text) => {
      const input = h("input", { type: "radio", name: guessName, value, onchange: () => this.predict(value) });
      return h("label", { class: "ql-choice" }, input, text);
    };
    this.guesses = h("fieldset", { class: "ql-guesses" }, h("legend", { text: "Your guess: the sum will be" }), guess(1, "positive or zero"), guess(-1, "negative"));
    this.buttons = {
      back: h("button", { text: "Back", onclick: () => this.go(this.step - 1) }),
      next: h("button", { text: "Next word", onclick: () => this.go(this.step + 1) }),
      play: h("button", { text: "Play", onclick: () => this.play() }),
      end: h("button", { text: "To the end", onclick: () => this.go(Infinity) }),
    };
    this.word = h("div", { class: "ql-word" });
    this.sums = h("table", { class: "ql-sums" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.sizes = h("p");
    this.bars = h("div", { class: "ql-bars" });
    this.crossing = h("div", { class: "ql-crossing" });
    this.measure = {
      cost: h("button", { text: "Measure the latency", onclick: () => this.send({ type: "measure", what: "cost" }) }),
      crossover: h("button", { text: "Find the crossover", onclick: () => this.send({ type: "measure", what: "crossover" }) }),
      stop: h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) }),
    };
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-muted ql-caption" });
    this.root = h(
      "div",
      { class: "ql-studio ql-bitlab" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "How does a neuron of +1 and −1 weights become one xor and one popcount?" }),
        h("div", { class: "ql-place" }, field("Layer", this.layer), ...Object.values(this.fields)),
        h(
          "div",
          { class: "ql-columns" },
          h("section", {}, h("h4", { text: "The layer's bits: dark is −1, light is +1" }), h("div", { class: "ql-scroll" }, this.picture), this.pictureNote),
          h(
            "section",
            {},
            h("h4", { text: "One dot product, word by word" }),
            this.guesses,
            h("div", { class: "ql-row" }, ...Object.values(this.buttons)),
            this.word,
            this.sums,
            this.result,
          ),
          h(
            "section",
            {},
            h("h4", { text: "What it costs on this machine" }),
            this.sizes,
            h("div", { class: "ql-row" }, ...Object.values(this.measure)),
            this.bars,
            this.crossing,
          ),
        ),
        this.status,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  listen() {
    const redraw = {
      "change:settings": () => this.drawPlace(),
      "change:weights": () => this.drawPicture(),
      "change:dot": () => this.restart(),
      "change:size": () => this.drawSizes(),
      "change:latency": () => this.drawBars(),
      "change:crossing": () => this.drawCrossing(),
      "change:status": () => this.drawStatus(),
      "change:caption": () => this.drawCaption(),
    };
    for (const [name, handler] of Object.entries(redraw)) this.model.on(name, handler);
    this.off = () => Object.entries(redraw).forEach(([name, handler]) => this.model.off(name, handler));
    for (const handler of Object.values(redraw)) handler();
    this.root.dataset.painted = "true";
    this.send({ type: "ready" });
  }

  close() {
    clearInterval(this.timer);
    this.off();
  }

  send(message) {
    this.model.send(message);
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  // ---- where

  drawPlace() {
    const settings = this.model.get("settings");
    const layer = this.model.get("layers").find(({ name }) => name === settings.layer);
    this.layer.value = settings.layer;
    const most = { unit: layer.units, row: layer.grid[0], column: layer.grid[1], example: layer.examples };
    for (const [name, input] of Object.entries(this.inputs)) {
      this.fields[name].hidden = most[name] === undefined;
      input.max = (most[name] ?? 1) - 1;
      input.value = settings[name];
    }
    this.drawPicture();
  }

  drawPicture() {
    const w = this.model.get("weights");
    const words = halves(w.words);
    const used = halves(w.used);
    const [units, width] = [w.units, w.width];
    const context = this.picture.getContext("2d");
    this.picture.width = 64 * width * CELL;
    this.picture.height = units * CELL;
    const style = getComputedStyle(this.root);
    const colours = { minus: style.getPropertyValue("--ql-0"), plus: "#f4f1e6", padding: "#9e9e9e", mark: style.getPropertyValue("--ql-1") };
    for (let unit = 0; unit < units; unit += 1) {
      for (let i = 0; i < 64 * width; i += 1) {
        const counts = bitOf(used, i >> 6, i & 63);
        context.fillStyle = counts ? (bitOf(words, unit * width + (i >> 6), i & 63) ? colours.minus : colours.plus) : colours.padding;
        context.fillRect(i * CELL, unit * CELL, CELL, CELL);
        if (!counts) {
          context.fillStyle = "#fff"; // a dot: padding is told apart without colour
          context.fillRect(i * CELL + 1, unit * CELL + 1, 1, 1);
        }
      }
    }
    const { unit } = this.model.get("settings");
    if (unit < units) {
      context.strokeStyle = colours.mark;
      context.lineWidth = 2;
      context.strokeRect(1, Math.max(1, unit * CELL - 1), this.picture.width - 2, CELL + 2);
    }
    this.picture.setAttribute("aria-label", w.summary);
    const [rows, columns] = w.left_out;
    const more = [rows ? `${rows} more units` : "", columns ? `${columns} more words of each` : ""].filter(Boolean).join(" and ");
    this.pictureNote.textContent = `One row is one unit, ${64 * width} bits; the framed one is unit ${unit}. Grey with a dot: padding, which never counts.${more ? ` Not drawn: ${more}.` : ""}`;
  }

  // ---- one dot product

  restart() {
    clearInterval(this.timer);
    this.timer = undefined;
    const dot = this.model.get("dot");
    this.dot = dot.words === undefined && dot.count ? dot : null;
    if (this.dot) {
      this.data = {
        ...Object.fromEntries(["activation", "weight", "xor", "counted"].map((name) => [name, halves(dot[name])])),
        ...Object.fromEntries(["taps", "first", "signs", "popcount", "sums"].map((name) => [name, ints(dot[name])])),
        inside: octets(dot.inside),
      };
    }
    this.step = 0;
    this.guess = null;
    for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
    this.drawStep();
  }

  predict(value) {
    this.guess = value;
    this.drawStep();
  }

  go(step) {
    if (!this.dot || this.guess === null) return;
    this.step = Math.max(0, Math.min(step, this.dot.count));
    if (this.step === this.dot.count) this.pause();
    this.drawStep();
  }

  play() {
    if (this.timer) return this.pause();
    if (this.step === this.dot.count) this.step = 0;
    this.buttons.play.textContent = "Pause";
    this.timer = setInterval(() => this.go(this.step + 1), PLAY_MS);
    this.go(this.step + 1);
    return undefined;
  }

  pause() {
    clearInterval(this.timer);
    this.timer = undefined;
    this.buttons.play.textContent = "Play";
  }

  drawStep() {
    const ready = Boolean(this.dot) && this.guess !== null;
    this.guesses.disabled = !this.dot || this.step > 0;
    for (const button of Object.values(this.buttons)) button.disabled = !ready;
    if (ready) {
      this.buttons.back.disabled = this.step === 0;
      this.buttons.next.disabled = this.buttons.end.disabled = this.step === this.dot.count;
    }
    this.root.dataset.step = String(this.step);
    this.word.replaceChildren();
    this.sums.replaceChildren();
    this.result.textContent = "";
    if (!this.dot) {
      this.word.append(h("p", { class: "ql-muted", text: "Running the example ..." }));
      return;
    }
    const { count, k } = this.dot;
    if (this.step === 0) {
      const text = `${k} signs in ${count} word${count === 1 ? "" : "s"}. ${ready ? "Add the first word." : "Guess first; then add word by word."}`;
      this.word.append(h("p", { class: "ql-muted", text }));
      return;
    }
    this.drawWord(this.step - 1);
    this.drawSums();
    if (this.step === count) this.drawResult();
  }

  drawWord(t) {
    const d = this.data;
    const axes = d.taps.length / this.dot.count;
    const tap = axes ? `tap (${d.taps[2 * t]}, ${d.taps[2 * t + 1]}), ` : "";
    const where = `Word ${t + 1} of ${this.dot.count}: ${tap}from element ${d.first[t]}`;
    const outside = d.inside[t] ? "" : "; outside the picture, it counts nothing";
    this.word.append(h("p", { text: where + outside }));
    const rows = [
      ["activation", "activations", "−", "+"],
      ["weight", "weights", "−", "+"],
      ["xor", "xor: where they differ", "≠", "="],
    ];
    for (const [name, label, one, zero] of rows) {
      const cells = h("div", { class: "ql-cells", role: "img" });
      for (let i = 0; i < 64; i += 1) {
        const counts = bitOf(d.counted, t, i);
        const bit = bitOf(d[name], t, i);
        cells.append(h("span", { class: counts ? `ql-bit-${name === "xor" ? "x" : "s"}${bit}` : "ql-bit-none", text: counts ? (bit ? one : zero) : "·" }));
      }
      cells.setAttribute("aria-label", `${label} of word ${t + 1}`);
      this.word.append(h("div", { class: "ql-bits" }, h("span", { class: "ql-muted", text: label }), cells));
    }
  }

  drawSums() {
    const d = this.data;
    this.sums.append(h("tr", {}, ...["word", "signs n", "popcount p", "n − 2p", "sum"].map((text) => h("th", { scope: "col", text }))));
    for (let t = Math.max(0, this.step - 6); t < this.step; t += 1) {
      const cells = [t + 1, d.signs[t], d.popcount[t], d.signs[t] - 2 * d.popcount[t], d.sums[t]];
      this.sums.append(h("tr", {}, ...cells.map((value) => h("td", { text: String(value).replace("-", "−") }))));
    }
  }

  drawResult() {
    const { z, simulated, verdict, bit } = this.dot;
    const right = (z >= 0 ? 1 : -1) === this.guess;
    const next = verdict ? ` ${verdict}` : "";
    const out = bit === null || bit === undefined ? "" : ` The bit that goes on is ${bit}.`;
    this.result.textContent = `The sum is ${z}; the float simulation says ${simulated}. You guessed ${right ? "right" : "wrong"}.${next}${out}`.replaceAll(" -", " −");
  }

  // ---- cost

  drawSizes() {
    const size = this.model.get("size");
    this.sizes.textContent = `Packed ${kilobytes(size.packed)}; the same net in float32 ${kilobytes(size.float)}: ${(size.float / size.packed).toFixed(1)} times as much.`;
  }

  drawBars() {
    const { rows, batch, where } = this.model.get("latency");
    this.bars.replaceChildren();
    if (!rows) return;
    const most = Math.max(...rows.map((row) => row.seconds));
    const x = scaleLog().domain([Math.min(...rows.map((row) => row.seconds)) / 2, most]).range([0, 100]);
    for (const row of rows) {
      const bar = h("div", { class: "ql-bar" });
      bar.style.width = `${x(row.seconds)}%`;
      this.bars.append(h("div", { class: "ql-bar-row" }, h("span", { text: row.name }), h("div", { class: "ql-bar-track" }, bar), h("span", { text: seconds(row.seconds) })));
    }
    this.bars.append(h("p", { class: "ql-muted", text: `Batch of ${batch}, logarithmic lengths; ${where}.` }));
  }

  drawCrossing() {
    const { kinds, points, smallest, summary } = this.model.get("crossing");
    this.crossing.replaceChildren();
    if (!points || points.length < 2) return;
    const [width, height, left, bottom] = [320, 190, 52, 34];
    const label = summary;
    const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "ql-chart" });
    const gains = points.flatMap((p) => [p.gain, p.packing_gain]);
    const x = scaleLog().domain([Math.min(...points.map((p) => p.n)), Math.max(...points.map((p) => p.n))]).range([left, width - 8]);
    const y = scaleLog().domain([Math.min(0.5, ...gains), Math.max(2, ...gains)]).range([height - bottom, 8]);
    const ticks = (scale) => scale.ticks().filter((v) => Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6));
    for (const v of ticks(y)) {
      chart.append(svg("line", { x1: left, x2: width - 8, y1: y(v), y2: y(v), class: v === 1 ? "ql-even" : "ql-grid" }));
      chart.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, `${v}×`));
    }
    for (const v of [...new Set(points.map((p) => p.n))].filter((_, i, all) => i % Math.ceil(all.length / 5) === 0)) {
      chart.append(svg("text", { x: x(v), y: height - bottom + 16, "text-anchor": "middle" }, v));
    }
    chart.append(svg("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "size n"));
    Object.keys(kinds).forEach((kind, i) => {
      for (const [key, dash] of [["gain", "none"], ["packing_gain", "4 3"]]) {
        const line = points.filter((p) => p.kind === kind);
        if (line.length < 2) continue;
        const d = line.map((p, j) => `${j ? "L" : "M"}${x(p.n)},${y(p[key])}`).join("");
        chart.append(svg("path", { d, class: `ql-line ql-line-${i}`, "stroke-dasharray": dash, "data-points": line.length }));
      }
    });
    this.crossing.append(h("p", { text: "Gain over float32; above the line bits win. Dashed: packing of the activations included." }), chart);
    for (const [i, [kind, title]] of Object.entries(kinds).entries()) {
      const s = smallest[kind];
      const said = s.words === null ? "bits did not win at the sizes measured" : `bits win from n = ${s.words}${s.packing === null ? "" : `, with packing from n = ${s.packing}`}`;
      this.crossing.append(h("p", { class: "ql-key" }, h("span", { class: `ql-swatch ql-swatch-${i}` }), `${title}: ${said}.`));
    }
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase !== "idle";
    this.root.dataset.phase = phase;
    this.measure.cost.disabled = this.measure.crossover.disabled = busy;
    this.measure.stop.disabled = !busy;
    this.status.textContent = busy ? `${text} ${Math.round(100 * fraction)} %` : text;
    this.error.textContent = error ?? "";
    this.error.hidden = !error;
    if (error) this.drawPlace(); // a number that was refused goes back to what holds
  }

  drawCaption() {
    this.caption.textContent = this.guess === null || !this.dot || this.step < this.dot.count ? "" : this.model.get("caption");
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
