// BitLab: the bits of a layer, one dot product word by word, and what bits cost here. State comes from Python, messages go to Python.

import { field, h, octets, select, uid } from "./dom.js";
import { bars, gains, minus, runningSum } from "./sums.js";
import { halves, ints, Picture, wordRows } from "./words.js";
import { View, widget } from "./view.js";

const PLAY_MS = 700;
const SHOWN = 4; // rows of the table of words

const kilobytes = (n) => `${(n / 1024).toLocaleString("en", { maximumFractionDigits: 1 })} KB`;

class BitLab extends View {
  constructor(model, root) {
    super(model);
    this.step = 0;
    this.guess = null;
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const layers = this.model.get("layers");
    this.layer = select(layers, this.model.get("settings").layer, () => this.choose({ layer: this.layer.value }));
    const number = (name) => {
      const onchange = (event) => this.choose({ [name]: Number(event.target.value) });
      const onkeydown = (event) => event.key === "Enter" && onchange(event); // JupyterLab keeps Enter from the input's own change
      return h("input", { type: "number", min: 0, step: 1, onchange, onkeydown });
    };
    this.inputs = Object.fromEntries(["unit", "row", "column", "example"].map((name) => [name, number(name)]));
    this.fields = {
      unit: field("Unit", this.inputs.unit, "an output channel or neuron"),
      row: field("Row", this.inputs.row),
      column: field("Column", this.inputs.column),
      example: field("Example", this.inputs.example),
    };
    this.picture = new Picture((unit) => this.choose({ unit }));
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
    this.running = h("div");
    this.sums = h("table", { class: "ql-sums", "aria-label": "the last words that were added" });
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
    this.caption = h("p", { class: "ql-caption" });
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
          h("section", { class: "ql-area-bits" }, h("h4", { text: "The layer's bits: dark is −1, light is +1" }), this.picture.node),
          h(
            "section",
            { class: "ql-area-dot" },
            h("h4", { text: "One dot product, word by word" }),
            this.guesses,
            h("div", { class: "ql-row" }, ...Object.values(this.buttons)),
            this.word,
            this.running,
            this.sums,
            this.result,
          ),
          h(
            "section",
            { class: "ql-area-costs" },
            h("h4", { text: "What it costs on this machine" }),
            this.sizes,
            h("div", { class: "ql-row" }, ...Object.values(this.measure)),
            this.status,
            this.bars,
            this.crossing,
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
      settings: () => this.drawPlace(),
      weights: () => this.drawPicture(),
      dot: () => this.restart(),
      size: () => this.drawSizes(),
      latency: () => this.drawBars(),
      crossing: () => this.drawCrossing(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    clearInterval(this.timer);
    super.close();
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
    this.markUnit();
  }

  drawPicture() {
    this.picture.draw(this.model.get("weights"));
    this.markUnit();
  }

  markUnit() {
    const weights = this.model.get("weights");
    this.picture.mark(this.model.get("settings").unit, weights);
  }

  // ---- one dot product

  restart() {
    this.pause();
    const dot = this.model.get("dot");
    this.dot = dot.count ? dot : null;
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
    this.running.replaceChildren();
    this.sums.replaceChildren();
    this.result.textContent = "";
    this.drawCaption();
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
    this.word.append(...wordRows(d, t));
  }

  drawSums() {
    const d = this.data;
    this.running.append(runningSum(Array.from(d.sums), this.step, this.dot.threshold));
    this.sums.append(h("tr", {}, ...["word", "signs n", "popcount p", "n − 2p", "sum"].map((text) => h("th", { scope: "col", text }))));
    for (let t = Math.max(0, this.step - SHOWN); t < this.step; t += 1) {
      const cells = [t + 1, d.signs[t], d.popcount[t], d.signs[t] - 2 * d.popcount[t], d.sums[t]];
      this.sums.append(h("tr", {}, ...cells.map((value) => h("td", { text: minus(value) }))));
    }
  }

  drawResult() {
    const { z, k, simulated, verdict } = this.dot;
    const right = (z >= 0 ? 1 : -1) === this.guess;
    const next = verdict ? ` ${verdict}` : "";
    const p = this.data.popcount.reduce((total, n) => total + n, 0);
    this.result.textContent = `K − 2 popcount = ${k} − 2 · ${p}: the sum is ${z}; the float simulation says ${simulated}. You guessed ${right ? "right" : "wrong"}.${next}`.replaceAll(" -", " −");
  }

  // ---- cost

  drawSizes() {
    const size = this.model.get("size");
    this.sizes.textContent = `Packed ${kilobytes(size.packed)}; the same net in float32 ${kilobytes(size.float)}: ${(size.float / size.packed).toFixed(1)} times as much.`;
  }

  drawBars() {
    this.bars.replaceChildren(...bars(this.model.get("latency")));
  }

  drawCrossing() {
    this.crossing.replaceChildren(...gains(this.model.get("crossing")));
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase !== "idle";
    this.root.dataset.phase = phase;
    this.measure.cost.disabled = this.measure.crossover.disabled = busy;
    this.measure.stop.disabled = !busy;
    this.status.textContent = busy ? `${text} ${Math.round(100 * fraction)} %` : text;
    this.drawError();
    if (error) this.drawPlace(); // a number that was refused goes back to what holds
  }

  drawCaption() {
    const told = this.dot && this.step === this.dot.count; // the caption gives the sum away
    this.caption.textContent = told ? this.model.get("caption") : this.model.get("weights").summary;
  }
}

export default widget(BitLab);
