// AttackReplay: several attackers of one example, step by step. State comes from Python, messages go to Python.
// All steps are there at once, so the slider redraws without asking the kernel; only the caption comes back from it.

import { field, floats, h, octets, select, setOptions, uid } from "./dom.js";
import { at, strip, swatch } from "./replay_pictures.js";
import { drawCurves, drawPlane, read } from "./replay_plane.js";
import { minus, svg } from "./svg.js";
import { View, widget } from "./view.js";

const PLAY_MS = 350;
const SAY_MS = 120; // after the last move of the slider
const NOBODY = "nobody";
const LOSSES = { ce: "cross-entropy", margin: "margin", dlr: "DLR" };
const DATA = { digits: "digits, 8 × 8 pixels", moons: "two moons: two inputs" };
const FAULTS = { saturated: "its softmax saturates", dead: "its surrogate gradient is dead", none: "no fault" };

const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);

class AttackReplay extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.hidden = new Set();
    this.data = { ground: null, paths: [] };
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    this.slider = h("input", { type: "range", min: 0, max: 20, step: 1, oninput: () => this.move(Number(this.slider.value)) });
    this.now = h("output", { class: "ql-now-step" });
    this.play = h("button", { class: "ql-primary", text: "Play", onclick: () => this.toggle() });
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    const number = (name, attributes) => {
      const onchange = (event) => event.target.value !== "" && this.choose({ [name]: Number(event.target.value) });
      const onkeydown = (event) => event.key === "Enter" && onchange(event); // JupyterLab keeps Enter from the input's own change
      return h("input", { type: "number", ...attributes, onchange, onkeydown });
    };
    this.inputs = {
      data: select([], "", () => this.choose({ data: this.inputs.data.value })),
      fault: select([], "", () => this.choose({ fault: this.inputs.fault.value })),
      example: number("example", { min: 0, step: 1 }),
      eps: number("eps", { min: 0, step: "any" }),
      loss: select([], "", () => this.choose({ loss: this.inputs.loss.value })),
    };
    this.own = [field("A binary net for", this.inputs.data), field("What is wrong with it", this.inputs.fault)];
    this.guesses = h("fieldset", { class: "ql-guesses" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.toggles = h("fieldset", { class: "ql-toggles" });
    this.plane = h("div", { class: "ql-plane-box" });
    this.curves = h("div", { class: "ql-curve-box" });
    this.strip = h("div", { class: "ql-pictures ql-scroll", role: "group", "aria-label": "the example and what the attackers made of it" });
    this.table = h("table", { class: "ql-readings" });
    this.tableBox = h("div", { class: "ql-scroll", tabindex: 0, role: "region", "aria-label": "readings at the step on view" }, this.table);
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    const step = h("div", { class: "ql-step" }, field("Step of all attackers", this.slider), this.now, this.play, this.stop);
    this.root = h(
      "div",
      { class: "ql-studio ql-replay" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Which attacker moves?" }),
        step,
        h("div", { class: "ql-place" }, ...this.own, field("Example", this.inputs.example), field("Radius ε", this.inputs.eps), field("PGD maximises", this.inputs.loss)),
        this.guesses,
        this.result,
        this.toggles,
        h("div", { class: "ql-columns" }, h("section", {}, this.plane, this.key()), h("section", {}, this.curves)),
        this.strip,
        this.tableBox,
        this.status,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  key() {
    const sample = (text, ...parts) => {
      const picture = svg("svg", { viewBox: "-16 -9 32 18", "aria-hidden": "true" });
      picture.append(...parts);
      return h("span", { class: "ql-entry" }, picture, text);
    };
    return h(
      "p",
      { class: "ql-legend" },
      sample("gradient it follows", svg("path", { d: "M-12,0H12M7,-3L12,0L7,3", class: "ql-arrow ql-plain" })),
      sample("gradient exactly zero", svg("circle", { r: 7, class: "ql-ring ql-plain" })),
      sample("first step at which the label is lost", svg("polygon", { points: "0,-8 2,-2.6 7.6,-2.5 3.2,1 4.7,6.5 0,3.3 -4.7,6.5 -3.2,1 -7.6,-2.5 -2,-2.6", class: "ql-star ql-plain" })),
      sample("label lost: margin above 0", svg("path", { d: "M-14,8L-2,-8M-6,8L6,-8M2,8L14,-8", class: "ql-hatch" })),
      h("span", { class: "ql-entry", text: "stronger shade: higher margin" }),
      sample("cut of the ball", svg("path", { d: "M-14,0H14", class: "ql-ball" })),
      sample("and of the range", svg("path", { d: "M-14,0H14", class: "ql-allowed" })),
    );
  }

  watch() {
    const all = () => this.take();
    this.listen({
      settings: () => this.follow(),
      choices: () => this.drawChoices(),
      ground: all,
      paths: all,
      pictures: all,
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    clearTimeout(this.timer);
    clearInterval(this.playing);
    cancelAnimationFrame(this.taking);
    super.close();
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  // ---- what there is

  /** Read the arrays, once for all traits that changed together. */
  take() {
    cancelAnimationFrame(this.taking);
    if (!this.root.dataset.painted) this.read();
    else this.taking = requestAnimationFrame(() => this.read());
  }

  read() {
    const ground = this.model.get("ground");
    const numbers = (object, names) => Object.fromEntries(names.map((name) => [name, floats(object[name])]));
    const paths = this.model.get("paths").map((path, slot) => ({
      ...path,
      ...numbers(path, ["at", "arrows", "margin", "loss", "log_steepness"]),
      zero: octets(path.zero),
      wrong: octets(path.wrong),
      slot,
    }));
    this.data = { ground: ground.side ? { ...ground, ...numbers(ground, ["margin", "ball", "allowed"]) } : null, paths };
    const { steps } = this.model.get("choices");
    this.steps = Math.max(1, steps, ...paths.map(({ margin }) => margin.length - 1));
    this.slider.max = this.steps;
    this.slider.value = this.step;
    this.drawToggles();
    this.drawGuesses();
    this.draw();
  }

  get complete() {
    return this.model.get("choices").complete;
  }

  get told() {
    return this.guess !== null && this.complete;
  }

  /** The paths on view: before a guess only the first, which is the plain one. */
  get shown() {
    const { paths } = this.data;
    return this.guess === null ? paths.slice(0, 1) : paths.filter(({ name }) => !this.hidden.has(name));
  }

  follow() {
    const settings = this.model.get("settings");
    if (this.timer === undefined && this.playing === undefined) this.step = settings.step;
    const place = JSON.stringify([settings.data, settings.fault, settings.example]);
    if (this.asked !== undefined && this.asked !== place && this.settled) this.forget(); // another question
    this.asked = place;
    this.settled = settings.example !== null;
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input !== document.activeElement || input.tagName === "SELECT") input.value = settings[name] ?? "";
    }
    this.draw();
  }

  /** Another net or example asks for another guess. */
  forget() {
    this.guess = null;
    this.pause();
    for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
  }

  predict(value) {
    this.guess = value;
    this.step = 0;
    this.drawToggles();
    this.draw();
    this.drawCaption();
    this.toggle();
  }

  move(step) {
    this.step = step;
    this.draw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = undefined;
      this.choose({ step: this.step });
    }, SAY_MS);
  }

  toggle() {
    if (this.playing !== undefined) {
      this.pause();
      this.choose({ step: this.step });
      return;
    }
    if (this.step >= this.steps) this.step = 0;
    this.play.textContent = "Pause";
    this.draw();
    this.playing = setInterval(() => {
      this.step += 1;
      this.draw();
      if (this.step >= this.steps) {
        this.pause();
        this.choose({ step: this.step });
      }
    }, PLAY_MS);
  }

  pause() {
    clearInterval(this.playing);
    this.playing = undefined;
    this.play.textContent = "Play";
  }

  // ---- drawing

  drawChoices() {
    const { own, examples, losses, data, faults } = this.model.get("choices");
    const settings = this.model.get("settings");
    for (const part of this.own) part.hidden = !own;
    setOptions(this.inputs.data, data.map((name) => ({ name, title: DATA[name] })), settings.data);
    setOptions(this.inputs.fault, faults.map((name) => ({ name, title: FAULTS[name] })), settings.fault);
    setOptions(this.inputs.loss, losses.map((name) => ({ name, title: LOSSES[name] })), settings.loss);
    if (examples !== null) this.inputs.example.max = examples - 1;
    this.drawGuesses();
    this.drawResult();
    this.drawCaption();
  }

  /** Who may be guessed; asked once all are known. */
  drawGuesses() {
    const names = this.complete ? this.data.paths.map(({ name, title }) => [name, title]) : [];
    const key = JSON.stringify(names);
    if (this.offered !== key) {
      this.offered = key;
      const group = uid("guess");
      const one = ([value, text]) => {
        const input = h("input", { type: "radio", name: group, value, onchange: () => this.predict(value) });
        input.checked = value === this.guess;
        return h("label", { class: "ql-choice" }, input, text);
      };
      const legend = h("legend", { text: "Your guess: which attacker breaks it first?" });
      const choices = names.length ? [...names, [NOBODY, "none of them"]].map(one) : [h("span", { class: "ql-muted", text: "The attackers are still running ..." })];
      this.guesses.replaceChildren(legend, ...choices);
    }
    this.guesses.disabled = this.guess !== null;
  }

  drawToggles() {
    const { paths } = this.data;
    this.toggles.hidden = this.guess === null || paths.length === 0;
    const key = paths.map(({ name }) => name).join();
    if (this.toggled === key) return;
    this.toggled = key;
    const toggle = ({ name, title, slot }) => {
      const input = h("input", {
        type: "checkbox",
        onchange: () => {
          if (input.checked) this.hidden.delete(name);
          else this.hidden.add(name);
          this.draw();
        },
      });
      input.checked = !this.hidden.has(name);
      return h("label", { class: "ql-choice" }, input, swatch(slot), title);
    };
    this.toggles.replaceChildren(h("legend", { text: "Attackers on view" }), ...paths.map(toggle));
  }

  draw() {
    const { ground } = this.data;
    const shown = this.shown;
    this.guesses.disabled = this.guess !== null;
    this.toggles.hidden = this.guess === null || this.data.paths.length === 0;
    this.slider.value = this.step;
    this.slider.setAttribute("aria-valuetext", `step ${this.step}`);
    this.now.textContent = `step ${this.step} of ${this.steps ?? "–"}`;
    this.root.dataset.step = String(this.step);
    this.root.dataset.shown = String(shown.length);
    this.play.disabled = this.slider.disabled = !ground;
    if (!ground) {
      this.plane.replaceChildren(h("p", { class: "ql-muted ql-waiting", text: "The plane is drawn as soon as the first attacker has run." }));
      this.curves.replaceChildren();
      this.strip.replaceChildren();
      this.table.replaceChildren();
      this.tableBox.hidden = true;
      return;
    }
    const { step, steps } = this;
    const label = `The margin of the deployed net on a plane through the example, lost on ${percent(ground.lost)} of it. At step ${step}: ${shown.map((path) => said(path, step)).join("; ")}.`;
    this.plane.replaceChildren(drawPlane({ ground, paths: shown, step, label }));
    const curves = [
      ["margin", "Margin: above 0 the label is lost"],
      ["loss", "What each attacker maximises"],
    ];
    this.curves.replaceChildren(
      ...curves.flatMap(([part, title]) => [
        h("h4", { text: title }),
        drawCurves({ paths: shown, part, step, steps, title, label: shown.map((path) => `${path.title}: ${read(at(path[part], step))} at step ${step}`).join("; ") }),
      ]),
    );
    this.drawPictures(shown);
    this.drawTable(shown);
    this.drawResult();
  }

  drawResult() {
    if (!this.told || this.data.paths.length === 0) {
      this.result.textContent = "";
      return;
    }
    const { paths } = this.data;
    const first = paths.filter((path) => path.first);
    const still = paths.filter(({ moved }) => !moved).map(({ title }) => title);
    const right = first.length ? first.some(({ name }) => name === this.guess) : this.guess === NOBODY;
    const who = first.length ? `First to break it, at step ${first[0].broke}: ${first.map(({ title }) => title).join("; ")}.` : "None of them breaks it.";
    const rest = still.length ? ` Without a single move: ${still.join("; ")}.` : " All of them move.";
    this.result.textContent = `${who}${rest} You guessed ${right ? "right" : "wrong"}.`;
  }

  drawPictures(shown) {
    const pictures = this.model.get("pictures");
    this.strip.hidden = !pictures.shape;
    if (pictures.shape) this.strip.replaceChildren(...strip(pictures, shown, this.step, this.data.ground));
  }

  drawTable(shown) {
    const told = this.told;
    this.tableBox.hidden = !told;
    if (!told) return;
    const t = this.step;
    const columns = ["attacker", "margin", "its loss", "‖gradient‖", "label lost at", "gradients exactly zero", "path in the plane", "questions", "backward"];
    const head = h("tr", {}, ...columns.map((text) => h("th", { scope: "col", text })));
    const rows = shown.map((path) => {
      const cells = [
        read(at(path.margin, t)),
        read(at(path.loss, t)),
        steep(at(path.log_steepness, t), at(path.zero, t)),
        path.broke === null ? "never" : `step ${path.broke}`,
        path.followed ? `${path.zeros} of ${path.followed}` : "no gradient",
        path.moved ? percent(path.in_plane) : "no move",
        path.forward.toLocaleString("en"),
        path.backward.toLocaleString("en"),
      ];
      return h("tr", {}, h("th", { scope: "row" }, swatch(path.slot), path.title), ...cells.map((text) => h("td", { text })));
    });
    this.table.replaceChildren(h("caption", { text: `At step ${t}, and in all` }), h("thead", {}, head), h("tbody", {}, ...rows));
  }

  drawStatus() {
    const { phase, text, fraction } = this.model.get("status");
    const busy = phase !== "idle";
    this.root.dataset.phase = phase;
    this.stop.hidden = !busy;
    this.status.textContent = busy ? `${text} ${Math.round(100 * fraction)} %` : text;
    this.drawError();
  }

  drawCaption() {
    const caption = this.model.get("caption");
    const [first] = this.model.get("paths");
    const waiting = first ? `Only ${first.title} is drawn. The other paths and the numbers appear after your guess.` : caption;
    this.caption.textContent = this.told ? caption : this.complete ? waiting : "The attackers are still running.";
  }
}

const said = (path, t) => `${path.title} ${at(path.wrong, t) ? "has broken it" : at(path.zero, t) ? "is stuck, its gradient exactly zero" : "has not broken it"}, margin ${read(at(path.margin, t))}`;

/** ||g|| from its logarithm. */
function steep(log, zero) {
  if (zero) return "0 exactly";
  if (Number.isNaN(log)) return "–";
  const power = Math.floor(log);
  return Math.abs(power) < 4 ? read(10 ** log) : `${(10 ** (log - power)).toFixed(1)}e${minus(power)}`;
}

export default widget(AttackReplay);
