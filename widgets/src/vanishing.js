// VanishingMicroscope: gradients per layer over temperatures and dtypes. State comes from Python, messages go to Python.
// Everything is there for every temperature, so the slider redraws without asking the kernel; only the caption comes back from it.

import { field, floats, h, select, setOptions, uid } from "./dom.js";
import { gapPlot, lostPlot, normPlot, spectrumPlot } from "./gradients.js";
import { View, widget } from "./view.js";

const SAY_MS = 120; // after the last move of the slider
const REGIMES = { healthy: "in the right direction", wrong: "in the wrong direction", zero: "exactly zero" };

const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(0)} %`);
const number = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toLocaleString("en"));

class Vanishing extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    this.slider = h("input", { type: "range", min: 0, max: 60, step: 1, oninput: () => this.move(Number(this.slider.value)) });
    this.betaText = h("output", { class: "ql-number" });
    const slider = field("Factor β on the logits (temperature 1 / β)", this.slider);
    slider.append(this.betaText);
    this.dtype = select([], "", () => this.pick(this.dtype.value));
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    const name = uid("guess");
    const guess = ([value, text]) => {
      const input = h("input", { type: "radio", name, value, onchange: () => this.predict(value) });
      return h("label", { class: "ql-choice" }, input, text);
    };
    this.legend = h("legend", { text: "Your guess" });
    this.guesses = h("fieldset", { class: "ql-guesses" }, this.legend, ...Object.entries(REGIMES).map(guess));
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.parts = Object.fromEntries(["norms", "gaps", "lost", "spectrum"].map((part) => [part, h("section", { class: `ql-part-${part}` })]));
    this.table = h("table", { class: "ql-states" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.root = h(
      "div",
      { class: "ql-studio ql-vanishing" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Where does the gradient die, and does a smaller β wake it up?" }),
        this.guesses,
        h("div", { class: "ql-place" }, slider, field("Computed in", this.dtype), this.stop),
        this.result,
        h("div", { class: "ql-columns" }, ...Object.values(this.parts)),
        h("h4", { text: "The layers, at every β: units that are stuck, and how much J stretches" }),
        h("div", { class: "ql-scroll", tabindex: 0, role: "region", "aria-label": "state of the layers" }, this.table),
        this.status,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    this.view = { ...this.model.get("settings") };
    const all = () => this.take();
    this.listen({
      layers: () => this.drawTable(),
      grid: all,
      curves: all,
      smoothed: all,
      expected: all,
      gaps: all,
      spectrum: all,
      settings: () => this.follow(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  close() {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.taking);
    super.close();
  }

  // ---- what is chosen

  /** Read the arrays, once for all traits that changed together. */
  take() {
    cancelAnimationFrame(this.taking);
    if (this.data === undefined) this.read();
    else this.taking = requestAnimationFrame(() => this.read());
  }

  read() {
    const grid = this.model.get("grid");
    const curve = (c) => (c?.norms ? { norms: floats(c.norms), lost: floats(c.lost), regimes: floats(c.regimes) } : null);
    const histogram = (part) => ({ ...part, edges: floats(part.edges), shares: floats(part.shares) });
    this.data = {
      grid,
      names: this.model.get("layers").map(({ name }) => name),
      exact: this.model.get("layers").every(({ exact }) => exact),
      curves: Object.fromEntries(Object.entries(this.model.get("curves")).map(([name, c]) => [name, curve(c)])),
      smoothed: curve(this.model.get("smoothed")),
      expected: floats(this.model.get("expected")),
      gaps: histogram(this.model.get("gaps")),
      spectrum: histogram(this.model.get("spectrum")),
    };
    this.slider.max = grid.betas.length - 1;
    setOptions(this.dtype, grid.dtypes.map((name) => ({ name, disabled: !(name in this.data.curves) })), this.view.dtype);
    this.draw();
  }

  /** Python chose another view. */
  follow() {
    const settings = this.model.get("settings");
    if (this.timer === undefined) {
      this.view = { ...settings };
      this.draw();
    }
  }

  predict(value) {
    this.guess = value;
    this.asked = { ...this.view };
    this.guesses.disabled = true;
    this.draw();
    this.drawCaption();
  }

  move(index) {
    this.view.index = index;
    this.draw();
    this.tell();
  }

  pick(dtype) {
    this.view.dtype = dtype;
    this.draw();
    this.tell();
  }

  tell() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = undefined;
      this.send({ type: "set", beta: this.data.grid.betas[this.view.index], dtype: this.view.dtype });
    }, SAY_MS);
  }

  // ---- drawing

  draw() {
    const { index, dtype } = this.view;
    const { grid } = this.data;
    const beta = number(grid.betas[index]);
    this.slider.value = index;
    this.slider.setAttribute("aria-valuetext", `beta ${beta}`);
    this.betaText.textContent = `β = ${beta}`;
    this.dtype.value = dtype;
    const seen = this.guess !== null;
    if (!seen) this.legend.textContent = `Your guess: at β = ${beta} in ${dtype}, the input gradient of most examples is`;
    this.slider.disabled = this.dtype.disabled = !seen;
    this.parts.gaps.replaceChildren(...gapPlot(this.data, index, dtype, seen));
    for (const [part, plot] of [["norms", normPlot], ["lost", lostPlot], ["spectrum", spectrumPlot]]) {
      this.parts[part].hidden = !seen;
      if (seen) this.parts[part].replaceChildren(...plot(this.data, index, dtype));
    }
    this.root.dataset.index = String(index);
    this.root.dataset.dtype = dtype;
    if (seen) this.drawResult();
  }

  drawResult() {
    if (this.result.textContent) return;
    const three = this.data.curves[this.asked.dtype].regimes.subarray(3 * this.asked.index, 3 * this.asked.index + 3);
    const share = Object.fromEntries(Object.keys(REGIMES).map((name, i) => [name, three[i]]));
    const [most] = Object.entries(share).sort((a, b) => b[1] - a[1])[0];
    const right = most === this.guess;
    this.result.textContent = `By the gap of the logits: ${percent(share.healthy)} in the right direction, ${percent(share.wrong)} in the wrong one, ${percent(share.zero)} zero. You guessed ${right ? "right" : "wrong"}. Now move β.`;
  }

  drawTable() {
    const layers = this.model.get("layers");
    const columns = ["layer", "kind", "saturated", "degenerate", "dead", "mean singular value of J"];
    const titles = {
      saturated: "share of pre-activations beyond 1, where the clipped rule passes nothing",
      degenerate: "share of units whose pre-activations have a mean beyond their standard deviation",
      dead: "share of units that give the same for every example",
    };
    const head = h("tr", {}, ...columns.map((text) => h("th", { scope: "col", text, title: titles[text] })));
    const cell = (value) => {
      const td = h("td", { text: percent(value) });
      if (value > 0) td.style.setProperty("--ql-share", `${Math.min(100, 100 * value)}%`);
      return td;
    };
    const rows = layers.map((l) =>
      h("tr", {}, h("th", { scope: "row", text: l.name }), h("td", { text: l.kind.replace("Parametrized", "") }), cell(l.saturated), cell(l.degenerate), cell(l.dead), h("td", { text: number(l.gain) })),
    );
    this.table.replaceChildren(h("thead", {}, head), h("tbody", {}, ...rows));
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
    const { examples, left_out } = this.model.get("grid");
    const more = left_out ? ` The first ${examples} examples are looked at.` : "";
    this.caption.textContent = this.guess === null ? `${examples} examples. The numbers appear after your guess.` : this.model.get("caption") + more;
  }
}

export default widget(Vanishing);
