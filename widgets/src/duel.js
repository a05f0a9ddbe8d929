// MethodDuel: two methods in lockstep and where the nets that they deploy part. State comes from Python, messages go to Python.

import { LineChart } from "./chart.js";
import { field, floats, h, octets, percent, select, uid } from "./dom.js";
import { View, widget } from "./view.js";

const GUESSES = [
  [0, 0.1, "under 10 %"],
  [0.1, 0.3, "10 to 30 %"],
  [0.3, 0.45, "30 to 45 %"],
  [0.45, 1.01, "over 45 %"],
];
const SIDE = 240; // CSS pixels of a plane
const COLOURS = [
  [0, 82, 127],
  [232, 213, 138],
  [90, 150, 110],
  [170, 110, 150],
];
const APART = [200, 78, 0];
const MARKS = ["#ffffff", "#111111"];

/** Decisions over the plane on a canvas, with the test points. */
class Plane {
  constructor(title) {
    this.canvas = h("canvas", { class: "ql-plane-picture", role: "img", width: 2 * SIDE, height: 2 * SIDE });
    this.caption = h("figcaption", { text: title });
    this.node = h("figure", { class: "ql-chart ql-plane" }, this.caption, this.canvas);
  }

  /** Paint a (side x side) picture, rows upwards; `colour` maps a cell's number to [r, g, b]. */
  draw(plane, colour, title, said) {
    const { side } = plane;
    const small = new OffscreenCanvas(side, side);
    const image = new ImageData(side, side);
    for (let k = 0; k < side * side; k += 1) {
      const row = side - 1 - Math.floor(k / side);
      image.data.set([...colour(k), 255], 4 * (row * side + (k % side)));
    }
    small.getContext("2d").putImageData(image, 0, 0);
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, width, height);
    const x = floats(plane.x);
    const y = octets(plane.y);
    const at = (value, [low, high]) => (value - low) / (high - low);
    y.forEach((label, i) => {
      const cx = width * at(x[2 * i], plane.u);
      const cy = height * (1 - at(x[2 * i + 1], plane.v));
      context.beginPath();
      if (label % 2) context.rect(cx - 4, cy - 4, 8, 8);
      else context.arc(cx, cy, 4.5, 0, 2 * Math.PI);
      context.fillStyle = MARKS[label % 2];
      context.fill();
      context.strokeStyle = MARKS[1 - (label % 2)];
      context.lineWidth = 1.2;
      context.stroke();
    });
    this.caption.textContent = title;
    this.canvas.setAttribute("aria-label", said);
  }
}

class MethodDuel extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const s = this.model.get("settings");
    const methods = this.model.get("methods");
    const menu = (name, options) => select(options, s[name], (event) => this.choose({ [name]: event.target.value }));
    const number = (name, min) => {
      const onchange = (event) => event.target.value !== "" && this.choose({ [name]: Number(event.target.value) });
      const onkeydown = (event) => event.key === "Enter" && onchange(event); // JupyterLab keeps Enter from the input's own change
      return h("input", { type: "number", min, step: 1, value: s[name], onchange, onkeydown });
    };
    this.inputs = { a: menu("a", methods), b: menu("b", methods), data: menu("data", this.model.get("sets")), epochs: number("epochs", 1), seed: number("seed", 0) };
    const guessName = uid("guess");
    this.guesses = h(
      "fieldset",
      { class: "ql-guesses" },
      h("legend", { text: "Your guess: of the deployed weights, those with another sign at the end are" }),
      ...GUESSES.map(([, , text], i) => {
        const input = h("input", { type: "radio", name: guessName, value: i, onchange: () => this.predict(i) });
        return h("label", { class: "ql-choice" }, input, text);
      }),
    );
    this.start = h("button", { class: "ql-primary", text: "Start the duel", onclick: () => this.send({ type: "start" }) });
    this.halt = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "Share of the work done" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.verdict = h("p", { class: "ql-result", "aria-live": "polite" });
    this.charts = {
      loss: new LineChart("Loss of the batch, mean of 9", { yFormat: ".2~g", readFormat: ".2~g" }),
      accuracy: new LineChart("Deployed accuracy on the test part", { yFormat: ".0%", readFormat: ".1%", ceiling: 1 }),
      apart: new LineChart("Deployed weights with another sign", { yFormat: ".0%", readFormat: ".1%" }),
      disagree: new LineChart("Test examples decided differently", { yFormat: ".0~%", readFormat: ".1%" }),
    };
    this.planes = ["a", "b", "apart"].map((title) => new Plane(title));
    this.plane = h("div", { class: "ql-planes" }, ...this.planes.map((plane) => plane.node));
    this.right = h("table", { class: "ql-right" });
    this.layers = h("table", { class: "ql-layers" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.root = h(
      "div",
      { class: "ql-studio ql-duel" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "One start, the same batches, two methods: is it the same net in the end?" }),
        h(
          "div",
          { class: "ql-choices" },
          field("Method A", this.inputs.a),
          field("Method B", this.inputs.b),
          field("Data", this.inputs.data),
          field("Epochs", this.inputs.epochs),
          field("Seed", this.inputs.seed),
        ),
        this.guesses,
        h("div", { class: "ql-buttons" }, this.start, this.halt),
        this.progress,
        this.status,
        this.verdict,
        h("div", { class: "ql-charts" }, ...Object.values(this.charts).map((chart) => chart.node)),
        this.plane,
        h("div", { class: "ql-tables" }, h("div", { class: "ql-scroll" }, this.right), h("div", { class: "ql-scroll" }, this.layers)),
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    this.listen({
      settings: () => this.drawSettings(),
      result: () => this.drawResult(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    for (const chart of Object.values(this.charts)) chart.close();
    super.close();
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  predict(i) {
    this.guess = i;
    this.drawStatus();
  }

  /** Names of the two, told apart where it is one method against itself. */
  get names() {
    const { a, b } = this.model.get("settings");
    return a === b ? [`${a} (A)`, `${b} (B)`] : [a, b];
  }

  // ---- drawing

  drawSettings() {
    const s = this.model.get("settings");
    const refused = this.model.get("status").error;
    for (const [name, input] of Object.entries(this.inputs)) if (input !== document.activeElement || input.tagName === "SELECT" || refused) input.value = s[name];
  }

  drawResult() {
    const result = this.model.get("result");
    const fought = Boolean(result.at);
    const names = this.names;
    const two = (x, [a, b]) => [a, b].map((y, slot) => ({ label: names[slot], short: "AB"[slot], slot, dashed: slot === 1, x: floats(x), y: floats(y) }));
    const one = (y, slot) => ({ label: "all layers", short: "", slot, dashed: false, x: floats(result.at), y: floats(y) });
    const absent = "not fought yet";
    this.charts.loss.update({ curves: fought ? two(result.steps, result.loss) : [], absent });
    this.charts.accuracy.update({ curves: fought ? two(result.at, result.accuracy) : [], absent });
    this.charts.apart.update({ curves: fought ? [one(result.apart, 2)] : [], references: fought ? [{ label: "unrelated: 50 %", value: 0.5 }] : [], absent });
    this.charts.disagree.update({ curves: fought ? [one(result.disagree, 3)] : [], absent });
    this.root.dataset.looks = String(fought ? floats(result.at).length : 0);
    this.plane.hidden = !result.plane;
    if (result.plane) this.drawPlanes(result.plane, names);
    this.drawTables(result, names);
    this.drawVerdict(result);
    this.drawStatus();
  }

  drawPlanes(plane, names) {
    const [a, b] = [octets(plane.a), octets(plane.b)];
    const share = (classes) => classes.reduce((sum, c) => sum + (c === 0), 0) / classes.length;
    [a, b].forEach((classes, k) => {
      const said = `${names[k]}: ${percent(share(classes), 0)} of the plane is class 0`;
      this.planes[k].draw(plane, (i) => COLOURS[classes[i] % COLOURS.length], `What ${names[k]} decides`, said);
    });
    const { side } = plane;
    const hatched = (i) => (i + Math.floor(i / side)) % 4 === 0; // not by colour alone
    const faint = (i) => COLOURS[a[i] % COLOURS.length].map((v) => Math.round(v + 0.72 * (255 - v)));
    const colour = (i) => (a[i] === b[i] ? faint(i) : hatched(i) ? [60, 20, 0] : APART);
    const title = `Different on ${percent(plane.disagree)} of the plane`;
    this.planes[2].draw(plane, colour, title, `The two nets decide differently on ${percent(plane.disagree)} of the plane`);
  }

  drawTables(result, names) {
    this.right.parentElement.parentElement.hidden = !result.at;
    if (!result.at) return;
    const [[neither, onlyB], [onlyA, both]] = result.table;
    const rows = [
      ["both", both],
      [`only ${names[0]}`, onlyA],
      [`only ${names[1]}`, onlyB],
      ["neither", neither],
    ];
    const coin = onlyA + onlyB ? `a fair coin is as one-sided with p = ${result.p_value.toPrecision(2)}` : "no test example tells them apart";
    this.right.replaceChildren(
      h("caption", { text: `Who is right on ${result.examples} test examples: ${coin}` }),
      h("tr", {}, h("th", { scope: "col", text: "right" }), h("th", { scope: "col", text: "examples" })),
      ...rows.map(([text, n]) => h("tr", {}, h("td", { text }), h("td", { text: n, class: "ql-number" }))),
    );
    this.layers.replaceChildren(
      h("caption", { text: `Deployed weights with another sign, of ${result.weights.toLocaleString("en")}` }),
      h("tr", {}, ...["layer", "weights", "another sign"].map((text) => h("th", { scope: "col", text }))),
      ...result.layers.map(({ name, weights, differ }) =>
        h("tr", {}, h("td", { text: name }), h("td", { text: weights.toLocaleString("en"), class: "ql-number" }), h("td", { text: percent(differ), class: "ql-number" })),
      ),
    );
  }

  drawVerdict(result) {
    if (!result.at && this.model.get("status").phase === "idle") {
      this.guess = null; // the guess was about another duel
      for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
    }
    if (!result.done) {
      this.verdict.textContent = "";
      return;
    }
    const apart = floats(result.apart).at(-1);
    const disagree = floats(result.disagree).at(-1);
    const [low, high] = GUESSES[this.guess ?? 0];
    const told = this.guess === null ? "" : ` You guessed ${apart >= low && apart < high ? "right" : "wrong"}.`;
    this.verdict.textContent = `${percent(apart)} of the deployed weights have another sign, ${percent(disagree)} of the test examples are decided differently.${told}`;
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase !== "idle";
    const done = Boolean(this.model.get("result").done);
    this.root.dataset.phase = phase;
    this.guesses.disabled = busy || done;
    this.start.disabled = busy || this.guess === null;
    this.start.textContent = this.model.get("result").at && !busy ? "Start again" : "Start the duel";
    this.halt.disabled = !busy;
    this.progress.hidden = !busy;
    this.progress.value = fraction;
    this.status.textContent = text;
    this.drawError();
    if (error) this.drawSettings(); // a number that was refused goes back to what holds
  }

  drawCaption() {
    this.caption.textContent = this.model.get("caption");
  }
}

export default widget(MethodDuel);
