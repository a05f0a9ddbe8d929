// AnnealingCockpit: schedules of all methods over one time axis, a run and its branch. State comes from Python, messages go to Python.

import { format } from "d3-format";

import { LineChart } from "./chart.js";
import { field, floats, h, percent, select, uid } from "./dom.js";
import { View, widget } from "./view.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 200; // of an instrument's picture, in its own units
const HIGH = 20;
const GUESSES = [
  ["smaller", "smaller than planned"],
  ["equal", "about as planned"],
  ["larger", "larger than planned"],
];
const MEASURES = {
  residual: "forward less deployed weight",
  flips: "the share of weights that flip",
  loss: "the loss",
};
const CHARTS = [
  ["residual", "Forward less deployed weight, mean size", { yFormat: ".2~g", readFormat: ".2~g", log: true }],
  ["distance", "Latent weight to its nearest level, mean", { yFormat: ".2~g", readFormat: ".2~g" }],
  ["flips", "Weights that flip in a step", { yFormat: ".2~%", readFormat: ".2~%" }],
  ["progress", "How far the schedule is", { yFormat: ".0%", readFormat: ".0%", ceiling: 1 }],
];
const read = format(".3~g");

const svg = (tag, attributes, ...children) => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

/** One scheduled quantity: a small picture over the progress of the run, and its value at the moment. */
class Instrument {
  constructor(row, progress) {
    this.progress = progress;
    this.values = floats(row.values);
    const heights = floats(row.heights);
    const points = Array.from(progress, (p, i) => `${(WIDE * p).toFixed(1)},${(1 + (HIGH - 2) * (1 - heights[i])).toFixed(1)}`);
    this.cursor = svg("line", { y1: 0, y2: HIGH, class: "ql-cursor" });
    const picture = svg(
      "svg",
      { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", "aria-label": row.said },
      svg("polygon", { points: `0,${HIGH} ${points.join(" ")} ${WIDE},${HIGH}`, class: "ql-under" }),
      svg("polyline", { points: points.join(" "), class: "ql-over" }),
      this.cursor,
    );
    this.value = h("td", { class: "ql-number" });
    const first = this.values[0];
    const last = this.values.at(-1);
    const range = row.log || first !== last || new Set(this.values).size > 1 ? `${read(first)} → ${read(last)}${row.log ? " (log)" : ""}` : "constant";
    const names = row.methods.length > 3 ? `${row.methods.slice(0, 3).join(", ")} and ${row.methods.length - 3} more` : row.methods.join(", ");
    this.methods = row.methods;
    this.node = h(
      "tr",
      { class: row.rate ? "ql-rate" : null, title: row.methods.length > 3 ? row.methods.join(", ") : null },
      h("th", { scope: "row", text: names }),
      h("td", { text: row.quantity }),
      h("td", { class: "ql-course" }, picture),
      this.value,
      h("td", { class: "ql-range", text: range }),
    );
  }

  at(progress) {
    const i = Math.round(progress * (this.progress.length - 1));
    const x = (WIDE * progress).toFixed(1);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.value.textContent = read(this.values[i]);
  }

  mark(method) {
    this.node.classList.toggle("ql-mine", this.methods.includes(method));
  }
}

class AnnealingCockpit extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.instruments = [];
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const s = this.model.get("settings");
    this.slider = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: s.moment, oninput: () => this.point(), onchange: () => this.choose({ moment: Number(this.slider.value) }) });
    this.now = h("output", { class: "ql-now" });
    this.method = select(this.model.get("methods"), s.method, () => this.choose({ method: this.method.value }));
    this.change = select(this.model.get("changes"), s.change, () => this.choose({ change: this.change.value }));
    const number = (name) => {
      const onchange = (event) => event.target.value !== "" && this.choose({ [name]: Number(event.target.value) });
      const onkeydown = (event) => event.key === "Enter" && onchange(event); // JupyterLab keeps Enter from the input's own change
      return h("input", { type: "number", min: name === "seed" ? 0 : 1, step: 1, value: s[name], onchange, onkeydown });
    };
    this.numbers = { epochs: number("epochs"), seed: number("seed") };
    const guessName = uid("guess");
    this.legend = h("legend");
    this.guesses = h(
      "fieldset",
      { class: "ql-guesses" },
      this.legend,
      ...GUESSES.map(([value, text]) => {
        const input = h("input", { type: "radio", name: guessName, value, onchange: () => this.predict(value) });
        return h("label", { class: "ql-choice" }, input, text);
      }),
    );
    const button = (type, text) => h("button", { text, onclick: () => this.send({ type }) });
    this.buttons = {
      branch: h("button", { class: "ql-primary", text: "Run both", onclick: () => this.send({ type: "branch" }) }),
      stop: button("stop", "Stop"),
      train: button("train", "Train on"),
      freeze: h("button", { text: "Freeze", onclick: () => this.send({ type: this.model.get("planned").frozen ? "release" : "freeze" }) }),
      rewind: button("rewind", "Rewind to the moment"),
    };
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "Share of the work done" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.charts = CHARTS.map(([name, title, options]) => [name, new LineChart(title, options)]);
    this.table = h("tbody");
    this.note = h("p", { class: "ql-muted" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.root = h(
      "div",
      { class: "ql-studio ql-cockpit" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "What if annealing stopped half way, and training went on?" }),
        h("div", { class: "ql-moment" }, field("The moment", this.slider), this.now),
        h(
          "div",
          { class: "ql-choices" },
          field("Method", this.method),
          field("From the moment on, the branch has", this.change),
          field("Epochs", this.numbers.epochs),
          field("Seed", this.numbers.seed),
        ),
        h(
          "div",
          { class: "ql-scroll ql-instruments", tabindex: 0, role: "region", "aria-label": "Schedules of all methods" },
          h(
            "table",
            {},
            h("caption", { text: "Schedules of all methods over one run, each between its own lowest and highest value" }),
            h("thead", {}, h("tr", {}, ...["method", "quantity", "over the run", "at the moment", "from → to"].map((text) => h("th", { scope: "col", text })))),
            this.table,
          ),
        ),
        this.note,
        this.guesses,
        h("div", { class: "ql-buttons" }, ...Object.values(this.buttons)),
        this.progress,
        this.status,
        this.result,
        h("div", { class: "ql-charts" }, ...this.charts.map(([, chart]) => chart.node)),
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    const runs = () => this.drawRuns();
    this.listen({
      instruments: () => this.drawInstruments(),
      settings: () => this.drawSettings(),
      planned: runs,
      branched: runs,
      verdict: () => this.drawVerdict(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    for (const [, chart] of this.charts) chart.close();
    super.close();
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  // ---- schedules

  drawInstruments() {
    const { rows, progress, left_out: leftOut } = this.model.get("instruments");
    if (!rows) {
      this.table.replaceChildren(h("tr", {}, h("td", { colspan: 5, class: "ql-muted", text: "Building every method of the catalog ..." })));
      return;
    }
    const p = floats(progress);
    this.instruments = rows.map((row) => new Instrument(row, p));
    this.table.replaceChildren(...this.instruments.map((instrument) => instrument.node));
    this.note.textContent = leftOut.length ? `Not on this small net: ${leftOut.map(({ method }) => method).join(", ")}.` : "";
    this.root.dataset.rows = String(rows.length);
    this.point();
  }

  point() {
    const moment = Number(this.slider.value);
    const { total } = this.model.get("planned");
    const step = total ? `, step ${Math.round(moment * total)} of ${total}` : "";
    this.now.textContent = `${percent(moment, 0)} of the run${step}`;
    this.slider.setAttribute("aria-valuetext", this.now.textContent);
    const { method } = this.model.get("settings");
    for (const instrument of this.instruments) {
      instrument.at(moment);
      instrument.mark(method);
    }
  }

  // ---- runs

  drawSettings() {
    const s = this.model.get("settings");
    const refused = this.model.get("status").error;
    this.method.value = s.method;
    this.change.value = s.change;
    for (const [name, input] of Object.entries(this.numbers)) if (input !== document.activeElement || refused) input.value = s[name];
    if (this.slider !== document.activeElement) this.slider.value = s.moment;
    this.point();
    this.drawGuess();
  }

  predict(value) {
    this.guess = value;
    this.drawStatus();
  }

  drawGuess() {
    const { measure } = this.model.get("planned");
    this.legend.textContent = `Your guess: at the end of the branch, ${MEASURES[measure ?? "residual"]} will be`;
  }

  drawRuns() {
    const runs = [
      ["as planned", "planned", this.model.get("planned"), false],
      ["the branch", "branch", this.model.get("branched"), true],
    ].filter(([, , run]) => run.step);
    for (const [name, chart] of this.charts) {
      const curves = runs.map(([label, short, run, dashed], slot) => ({ label, short, slot, dashed, x: floats(run.step), y: floats(run[name]) }));
      const known = curves.filter((curve) => curve.y.some(Number.isFinite));
      chart.update({ curves: known, absent: curves.length ? "no quantized weights" : "nothing trained yet" });
    }
    this.root.dataset.now = String(this.model.get("planned").now ?? 0);
    this.buttons.freeze.textContent = this.model.get("planned").frozen ? "Release the schedule" : "Freeze the schedule";
    this.point();
    this.drawGuess();
    this.drawStatus();
  }

  drawVerdict() {
    const { measure, verdict, text } = this.model.get("verdict");
    if (!verdict) {
      this.guess = null;
      for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
      this.result.textContent = "";
      this.drawStatus();
      return;
    }
    const said = GUESSES.find(([value]) => value === verdict)[1];
    const told = this.guess === null ? "" : ` You guessed ${this.guess === verdict ? "right" : "wrong"}.`;
    this.result.textContent = `In the branch ${MEASURES[measure]} is ${said}. ${text}${told}`;
    this.drawStatus();
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase !== "idle";
    const known = Boolean(this.model.get("verdict").verdict);
    const run = this.model.get("planned");
    this.root.dataset.phase = phase;
    this.guesses.disabled = busy || known;
    this.buttons.branch.disabled = busy || known || this.guess === null;
    this.buttons.stop.disabled = !busy;
    this.buttons.train.disabled = busy;
    this.buttons.rewind.disabled = busy || !run.now;
    this.buttons.freeze.disabled = !run.step;
    this.progress.hidden = !busy;
    this.progress.value = fraction;
    this.status.textContent = busy && fraction > 0 ? `${text} (${percent(fraction, 0)})` : text;
    this.drawError();
    if (error) this.drawSettings(); // a number that was refused goes back to what holds
  }

  drawCaption() {
    this.caption.textContent = this.model.get("caption");
  }
}

export default widget(AnnealingCockpit);
