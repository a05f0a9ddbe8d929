// TimeTravel: every weight at every step, and which flip changed a prediction. State comes from Python, messages go to Python.

import { LineChart } from "./chart.js";
import { field, floats, h, percent, select, uid } from "./dom.js";
import { Film, FilmPicture } from "./film.js";
import { View, widget } from "./view.js";

const PLAY_MS = 80;
const NAMED = 4; // flips that are named below the picture
const GUESSES = [
  [1, 1, "one flip"],
  [2, 5, "2 to 5"],
  [6, Infinity, "more than 5"],
];

const signed = (v, digits = 3) => (v === null ? "–" : Number(v.toPrecision(digits)).toString().replace("-", "−"));

class TimeTravel extends View {
  constructor(model, root) {
    super(model);
    this.mode = "signs";
    this.guess = null;
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const s = this.model.get("settings");
    this.layer = select(this.model.get("layers"), s.layer, () => this.choose({ layer: this.layer.value }));
    this.slider = h("input", { type: "range", min: s.first, max: s.last, step: 1, value: s.step, oninput: () => this.travel(), onchange: () => this.arrive() });
    this.now = h("output", { class: "ql-now-step" });
    this.play = h("button", { text: "Play", onclick: () => this.toggle() });
    const number = (name) => {
      const onchange = (event) => event.target.value !== "" && this.choose({ [name]: Number(event.target.value) });
      const onkeydown = (event) => event.key === "Enter" && onchange(event); // JupyterLab keeps Enter from the input's own change
      return h("input", { type: "number", min: 0, step: 1, onchange, onkeydown });
    };
    this.inputs = Object.fromEntries(["example", "since", "until"].map((name) => [name, number(name)]));
    const modeName = uid("mode");
    const mode = (value, text) => {
      const input = h("input", { type: "radio", name: modeName, value, onchange: () => this.show(value) });
      input.checked = value === this.mode;
      return h("label", { class: "ql-choice" }, input, text);
    };
    this.picture = new FilmPicture();
    this.legend = h("p", { class: "ql-muted ql-legend" });
    this.named = h("p", { class: "ql-named", "aria-live": "polite" });
    this.rateChart = new LineChart("Weights that flip, per record", { yFormat: ".2~%", readFormat: ".2~%" });
    this.swings = h("table", { class: "ql-swings" });
    this.courseChart = new LineChart("Margin of the class predicted at the end", { yFormat: ".3~g", readFormat: ".3~g" });
    this.turns = h("p", { class: "ql-muted" });
    const guessName = uid("guess");
    this.guesses = h(
      "fieldset",
      { class: "ql-guesses" },
      h("legend", { text: "Your guess: of these flips it takes" }),
      ...GUESSES.map(([, , text], i) => {
        const input = h("input", { type: "radio", name: guessName, value: i, onchange: () => this.predict(i) });
        return h("label", { class: "ql-choice" }, input, text);
      }),
    );
    this.find = h("button", { class: "ql-primary", text: "Find the flips", onclick: () => this.send({ type: "find" }) });
    this.halt = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.marginChart = new LineChart("Margin, flip by flip", { yFormat: ".3~g", readFormat: ".3~g" });
    this.marginChart.xTitle.text("flips done, in the order of time");
    this.table = h("div", { class: "ql-scroll ql-table" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.root = h(
      "div",
      { class: "ql-studio ql-travel" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Which flip of a weight changed this prediction?" }),
        h("div", { class: "ql-step" }, field("Step of the training", this.slider), this.now, this.play),
        h(
          "div",
          { class: "ql-columns" },
          h(
            "section",
            { class: "ql-area-film" },
            h("h4", { text: "The weights of a layer" }),
            field("Layer", this.layer),
            h("div", { class: "ql-modes", role: "radiogroup", "aria-label": "What the picture shows" }, mode("signs", "signs at this step"), mode("counts", "how often each flipped")),
            this.picture.node,
            this.legend,
            this.named,
            this.rateChart.node,
            this.swings,
          ),
          h(
            "section",
            { class: "ql-area-ask" },
            h("h4", { text: "One example's prediction" }),
            h("div", { class: "ql-place" }, field("Example", this.inputs.example), field("From step", this.inputs.since), field("to step", this.inputs.until)),
            this.courseChart.node,
            this.turns,
            this.guesses,
            h("div", { class: "ql-buttons" }, this.find, this.halt),
            this.status,
            this.result,
            this.marginChart.node,
          ),
        ),
        this.table,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    this.listen({
      frames: () => this.load(),
      settings: () => this.drawPlace(),
      rate: () => this.drawRate(),
      swings: () => this.drawSwings(),
      prediction: () => this.drawCourse(),
      found: () => this.drawFound(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    clearInterval(this.timer);
    for (const chart of [this.rateChart, this.courseChart, this.marginChart]) chart.close();
    super.close();
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  // ---- the film

  load() {
    this.film = new Film(this.model.get("frames"));
    this.drawFrame();
  }

  travel() {
    this.drawFrame();
  }

  /** The slider was let go: Python learns where. */
  arrive() {
    this.choose({ step: Number(this.slider.value) });
  }

  toggle() {
    if (this.timer) {
      this.pause();
      this.arrive();
      return;
    }
    const { first, last } = this.model.get("settings");
    if (Number(this.slider.value) >= last) this.slider.value = first;
    this.play.textContent = "Pause";
    this.timer = setInterval(() => {
      const next = this.film.frame(Number(this.slider.value)) + 1;
      if (next >= this.film.at.length) {
        this.pause();
        this.arrive();
        return;
      }
      this.slider.value = this.film.at[next];
      this.drawFrame();
    }, PLAY_MS);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = undefined;
    this.play.textContent = "Play";
  }

  show(mode) {
    this.mode = mode;
    this.drawFrame();
  }

  drawFrame() {
    if (!this.film) return;
    const step = Number(this.slider.value);
    const frame = this.film.frame(step);
    const flipped = this.picture.draw(this.film, frame, this.mode);
    this.now.textContent = `step ${this.film.at[frame]}`;
    this.slider.setAttribute("aria-valuetext", `step ${this.film.at[frame]}`);
    this.root.dataset.frame = String(frame);
    const [weights, frames] = this.film.left_out;
    const rest = `${weights ? ` Not drawn: ${weights.toLocaleString("en")} weights.` : ""}${frames ? ` Every ${Math.round((frames + this.film.at.length) / this.film.at.length)}th record is shown.` : ""}`;
    const low = signed(this.film.levels[0]);
    const high = signed(this.film.levels.at(-1));
    this.legend.textContent = (this.mode === "signs" ? `Dark is ${low}, light ${high}; yellow went up just now, red went down.` : `Dark never flipped, light flipped most: ${Math.max(0, ...this.film.counts)} times.`) + rest;
    const names = flipped.slice(0, NAMED).map((i) => `${this.film.name(i)} to ${signed(this.film.value(this.film.code(frame, i)))}`);
    const more = flipped.length > NAMED ? `, and ${flipped.length - NAMED} more` : "";
    this.named.textContent = `${flipped.length} ${flipped.length === 1 ? "flip" : "flips"} in this step${names.length ? `: ${names.join(", ")}${more}` : ""}.`;
  }

  drawRate() {
    const rate = this.model.get("rate");
    const x = floats(rate.steps);
    const curves = [
      { label: "all layers", short: "all", slot: 0, dashed: false, x, y: floats(rate.all) },
      { label: rate.layer, short: "layer", slot: 1, dashed: true, x, y: floats(rate.own) },
    ];
    this.rateChart.update({ curves, absent: "one record only" });
  }

  drawSwings() {
    const rows = this.model.get("swings");
    const header = ["weight", "flips", "full swing", "last flip"];
    this.swings.replaceChildren(h("caption", { text: "Weights that flipped most" }), h("tr", {}, ...header.map((text) => h("th", { scope: "col", text }))));
    for (const row of rows) {
      const cells = [`${row.layer}[${row.index.join(", ")}]`, row.flips, row.period === null ? "–" : `about ${Math.round(row.period)} steps`, `step ${row.last_flip}`];
      this.swings.append(h("tr", {}, ...cells.map((text) => h("td", { text }))));
    }
    if (!rows.length) this.swings.append(h("tr", {}, h("td", { text: "No weight flipped.", colspan: header.length })));
  }

  // ---- one prediction

  drawPlace() {
    const s = this.model.get("settings");
    this.layer.value = s.layer;
    for (const [name, input] of Object.entries(this.inputs)) {
      [input.min, input.max] = name === "example" ? [0, s.examples - 1] : [s.first, s.last];
      if (input !== document.activeElement || this.model.get("status").error) input.value = s[name];
    }
    if (!this.timer && this.slider !== document.activeElement) this.slider.value = s.step;
    this.drawFrame();
  }

  drawCourse() {
    const p = this.model.get("prediction");
    if (!p.steps) {
      this.courseChart.update({ curves: [], absent: "following the prediction ..." });
      this.turns.textContent = "";
      return;
    }
    const curve = { label: `class ${p.last}`, short: `class ${p.last}:`, slot: 0, dashed: false, x: floats(p.steps), y: floats(p.margins) };
    this.courseChart.update({ curves: [curve], references: [{ label: "no margin", value: 0 }] });
    const last = p.turns.at(-1);
    this.turns.textContent = last
      ? `The prediction changed ${p.turns.length} times, last between steps ${last[0]} and ${last[1]} to class ${p.last}.`
      : `Class ${p.last} is predicted throughout: choose another example.`;
  }

  predict(i) {
    this.guess = i;
    this.drawStatus();
  }

  drawFound() {
    const found = this.model.get("found");
    if (!found.at) {
      this.guess = null;
      for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
      this.marginChart.node.hidden = true;
      this.table.replaceChildren();
      this.result.textContent = "";
      this.drawStatus();
      return;
    }
    this.marginChart.node.hidden = false;
    const curve = { label: `class ${found.class_a}`, short: `class ${found.class_a}:`, slot: 0, dashed: false, x: floats(found.at), y: floats(found.margins) };
    this.marginChart.update({ curves: [curve], references: [{ label: "no margin", value: 0 }], absent: "no flips in this interval" });
    this.drawTable(found);
    if (!found.done) return;
    if (found.first === null) {
      this.result.textContent = `None of the ${found.flips} flips changed the prediction, class ${found.class_a}.`;
      return;
    }
    const [low, high] = GUESSES[this.guess ?? 0];
    const right = found.minimal >= low && found.minimal <= high;
    const verdict = this.guess === null ? "" : ` You guessed ${right ? "right" : "wrong"}.`;
    this.result.textContent = `${found.minimal} of ${found.flips} ${found.flips === 1 ? "flip suffices" : "flips suffice"} to leave class ${found.class_a}; in the order of time it is number ${found.first} that does it.${verdict}`;
  }

  drawTable(found) {
    const header = ["no.", "step", "weight", "flip", "margin", "change", "alone", "undone", ""];
    const hints = { alone: "change of the margin by this flip alone on the earlier weights", undone: "change by taking it back on the later weights" };
    const table = h("table", { class: "ql-flips" }, h("caption", { text: "Flips of a minimal set, and those that moved the margin most" }));
    table.append(h("tr", {}, ...header.map((text) => h("th", { scope: "col", text, title: hints[text] ?? null }))));
    for (const row of found.rows) {
      const mark = [row.minimal ? "in the set" : "", row.first ? "turns it" : ""].filter(Boolean).join(", ");
      const cells = [row.number, row.step, row.weight, `${signed(row.before)} → ${signed(row.after)}`, signed(row.margin), signed(row.change), signed(row.alone), signed(row.undone), mark];
      table.append(h("tr", { class: row.minimal ? "ql-chosen" : null }, ...cells.map((text, i) => h("td", { text, class: i === 2 || i === 8 ? null : "ql-number" }))));
    }
    this.table.replaceChildren(table);
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase !== "idle";
    const answered = Boolean(this.model.get("found").at);
    this.root.dataset.phase = phase;
    this.guesses.disabled = busy || answered;
    this.find.disabled = busy || this.guess === null || answered;
    this.halt.disabled = !busy;
    this.status.textContent = busy ? `${text} ${percent(fraction, 0)}` : text;
    this.drawError();
    if (error) this.drawPlace(); // a number that was refused goes back to what holds
  }

  drawCaption() {
    this.caption.textContent = this.model.get("caption");
  }
}

export default widget(TimeTravel);
