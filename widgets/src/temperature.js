// Temperature: what a factor β on the logits makes of an attack. State comes from Python, messages go to Python.
// Everything is there for every β, so the slider moves marks without asking the kernel; only the caption comes back from it.

import { field, floats, h, octets, select, setOptions } from "./dom.js";
import { Bars, Curves, number, percent, power, powers, readLog, Regimes } from "./temperature_plots.js";
import { View, widget } from "./view.js";

const SAY_MS = 120; // after the last move of the slider
const PIXELS = 72; // side of the picture on the page
const DEEPEST = 12; // decades below the highest curve that are drawn
const OF = { mean: "all right examples, mean", example: "this example" };
const SLOTS = { float32: 0, float64: 1, float16: 2 };
const SHARES = { domain: [0, 1], ticks: [0, 0.25, 0.5, 0.75, 1], format: (v) => `${100 * v} %` };

class Temperature extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.data = null;
    this.build(root);
    this.view = { ...this.model.get("settings") };
    const all = () => this.take();
    this.listen({
      choices: () => this.drawChoices(), // first: the others draw on its axis
      settings: () => this.follow(),
      net: all,
      curves: all,
      regimes: all,
      chosen: all,
      rows: () => this.drawRows(),
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  // ---- page

  build(root) {
    this.slider = h("input", { type: "range", min: 0, max: 50, step: 1, oninput: () => this.move(Number(this.slider.value)) });
    this.betaText = h("output", { class: "ql-number" });
    const slider = h("div", { class: "ql-slide" }, field("Factor β on the logits that the attacker sees, from 0.001 to 100", this.slider), this.betaText);
    this.same = h("p", { class: "ql-same" });
    this.guessed = h("input", { type: "range", min: 0, max: 100, step: 1, value: 50, oninput: () => this.drawGuess() });
    this.guessText = h("output", { class: "ql-number" });
    this.reveal = h("button", { class: "ql-primary", text: "Show what it does", onclick: () => this.predict() });
    this.legend = h("legend");
    this.guesses = h("fieldset", { class: "ql-guesses" }, this.legend, field("Still right after the attack", this.guessed), this.guessText, this.reveal);
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    const example = () => this.example.value !== "" && this.choose({ example: Number(this.example.value) });
    this.example = h("input", { type: "number", min: 0, step: 1, onchange: example, onkeydown: (event) => event.key === "Enter" && example() });
    this.of = select(Object.entries(OF).map(([name, title]) => ({ name, title })), "mean", () => this.choose({ of: this.of.value }));
    this.factor = select([], "", () => this.choose({ c: Number(this.factor.value) }));
    this.dtype = select([], "", () => this.pick(this.dtype.value));
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    this.more = h("button", { text: "Compute the rest", onclick: () => this.send({ type: "run" }) });
    const place = h(
      "div",
      { class: "ql-place" },
      field("Example", this.example),
      field("Curves of", this.of),
      field("Logits of the net times c", this.factor),
      field("Computed in", this.dtype),
      this.stop,
      this.more,
    );
    this.canvas = h("canvas", { role: "img" });
    this.words = h("p", { class: "ql-words" });
    this.bars = new Bars("softmax p(β)");
    place.append(h("div", { class: "ql-example" }, this.canvas, this.words));
    this.accuracy = new Curves("Right after the attack, at every β");
    this.norms = new Curves("Norms");
    this.shares = new Curves("Shares");
    this.cells = new Regimes((example) => this.choose({ example }));
    this.waiting = h("p", { class: "ql-muted ql-waiting" });
    this.columns = h("div", { class: "ql-columns" }, this.bars.node, this.accuracy.node, this.norms.node, this.shares.node);
    this.table = h("table", { class: "ql-rows" });
    this.tableBox = h("div", { class: "ql-scroll", tabindex: 0, role: "region", "aria-label": "the attack at β = 1, by factor c and dtype" }, this.table);
    this.about = h("p", { class: "ql-muted" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    const question = h("h3", { class: "ql-question", text: "Is this net robust, or has its gradient only fallen asleep?" });
    const parts = [question, slider, this.same, this.guesses, this.result, place, this.waiting, this.columns, this.cells.node, this.tableBox, this.about, this.status, this.error, this.caption];
    this.root = h("div", { class: "ql-studio ql-temperature" }, h("div", { class: "ql-inner" }, ...parts));
    root.append(this.root);
  }

  close() {
    clearTimeout(this.timer);
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
    const net = this.model.get("net");
    const chosen = this.model.get("chosen");
    const some = (part, names) => Object.fromEntries(names.map((name) => [name, floats(part[name])]));
    const each = (parts, names) => Object.fromEntries(Object.entries(parts ?? {}).map(([name, part]) => [name, { ...part, ...some(part, names) }]));
    const own = ["psi", "gradient", "alive", "underflow"];
    this.data = net.spread
      ? {
          net: { ...net, ...some(net, ["spread", "h"]), right: octets(net.right) },
          curves: each(this.model.get("curves"), [...own, "lost", "shares", "accuracy"]),
          regimes: Object.fromEntries(Object.entries(this.model.get("regimes")).map(([name, r]) => [name, octets(r)])),
          chosen: chosen.p ? { ...chosen, ...some(chosen, ["p", "spread", "h"]), curves: each(chosen.curves, own) } : null,
        }
      : null;
    this.drawAll();
  }

  /** Python chose another view. */
  follow() {
    const settings = this.model.get("settings");
    const waiting = this.timer !== undefined;
    const before = this.view;
    this.view = { ...settings, ...(waiting ? { index: before.index, beta: before.beta } : {}) };
    if (this.example !== document.activeElement) this.example.value = settings.example;
    this.of.value = settings.of;
    this.dtype.value = settings.dtype;
    this.factor.value = String(settings.c);
    const same = ["example", "of", "c", "dtype"].every((name) => before[name] === this.view[name]);
    if (same && this.drawn) this.drawMoved();
    else this.take();
  }

  move(index) {
    this.view.index = index;
    this.drawMoved();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = undefined;
      this.choose({ beta: this.betas[this.view.index] });
    }, SAY_MS);
  }

  pick(dtype) {
    if (this.data?.curves[dtype]) {
      this.view.dtype = dtype;
      this.drawAll();
    }
    this.choose({ dtype });
  }

  predict() {
    this.guess = Number(this.guessed.value) / 100;
    this.asked = { ...this.view };
    this.drawChoices();
    this.drawAll();
    this.drawRows();
    this.drawCaption();
  }

  // ---- drawing

  get seen() {
    return this.guess !== null;
  }

  drawChoices() {
    const { betas, dtypes, factors, examples, own, complete } = this.model.get("choices");
    this.betas = betas;
    this.logs = betas.map(Math.log10);
    this.one = this.logs.reduce((best, log, i) => (Math.abs(log) < Math.abs(this.logs[best]) ? i : best), 0);
    this.slider.max = betas.length - 1;
    if (examples !== null) this.example.max = examples - 1;
    setOptions(this.factor, factors.map((c) => ({ name: String(c), title: number(c) })), String(this.view.c));
    setOptions(this.dtype, dtypes.map(({ name, failed }) => ({ name, title: failed ? `${name}: does not run` : name, disabled: Boolean(failed) })), this.view.dtype);
    for (const input of [this.factor, this.dtype, this.of]) input.disabled = !this.seen;
    this.complete = complete;
    this.about.textContent = own
      ? "The lab's own net: 64 – 64 – 64 – 10, weights and activations are signs, trained on 8 × 8 digits. At c = 1 its logits are as they should be, at c = 100 they saturate its softmax. The examples are unseen ones that it has right."
      : "";
    this.drawGuess();
    this.drawStatus();
  }

  drawGuess() {
    const { c, dtype } = this.seen ? this.asked : this.view;
    const { eps, norm } = this.model.get("choices");
    const scale = c === 1 ? "" : `, logits times ${number(c)}`;
    this.legend.textContent = `Your guess: plain PGD at β = 1 (${norm} ball, ε = ${number(eps)}, ${dtype}${scale})`;
    this.guessText.textContent = `${this.guessed.value} %`;
    this.guesses.disabled = this.seen;
  }

  drawAll() {
    const { data, view, seen } = this;
    this.drawn = data !== null;
    for (const part of [this.columns, this.cells.node, this.same]) part.hidden = !data;
    this.waiting.hidden = this.drawn;
    this.waiting.textContent = "The pictures are drawn as soon as there is a net and its first gradients.";
    if (!data) return;
    const shown = data.curves[view.dtype] ? view.dtype : Object.keys(data.curves)[0];
    this.shownDtype = shown;
    this.drawExample();
    this.drawNorms(shown);
    this.shares.node.hidden = this.accuracy.node.hidden = this.cells.node.hidden = !seen;
    if (seen) {
      this.drawShares(shown);
      this.drawAccuracy(shown);
      this.cells.draw(data.regimes[shown], data.net.right, view.example);
    }
    this.drawMoved();
    this.drawResult();
  }

  /** Whose curves: means, or the example's own where that was asked for and is there. */
  source(dtype) {
    const { net, curves, chosen } = this.data;
    if (this.view.of === "example" && chosen?.curves[dtype]) {
      return { who: `example ${chosen.example}`, own: chosen.curves[dtype], spread: chosen.spread, h: chosen.h, njs: chosen.njs, hns: chosen.hns };
    }
    return { who: `mean of ${net.counted} right examples`, own: curves[dtype], spread: net.spread, h: net.h, njs: net.njs, hns: net.hns, lost: curves[dtype].lost };
  }

  marks({ njs, hns }) {
    return [
      { log: Math.log10(njs), name: "NJS", text: `NJS: β ${number(njs)}`, slot: 3 },
      { log: Math.log10(hns), name: "HNS", text: `HNS: β ${number(hns)}`, slot: 5 },
    ];
  }

  drawExample() {
    const { chosen } = this.data;
    this.bars.svg.style.display = this.bars.legend.style.display = this.bars.heading.style.display = chosen ? "" : "none";
    this.canvas.hidden = !chosen?.picture.shape;
    this.words.textContent = chosen ? "" : `Example ${this.view.example} is being looked at ...`;
    if (!chosen) return;
    this.bars.draw(chosen);
    const { example, label, decision, gap, picture } = chosen;
    const wrong = decision === label ? "" : ` The net takes it for class ${decision}.`;
    this.words.textContent = `Example ${example}: class ${label}.${wrong} Its logit leads by ${number(Math.abs(gap)) === "–" ? gap : (gap < 0 ? "−" : "") + number(Math.abs(gap))} at β = 1.`;
    if (picture.shape) {
      paint(this.canvas, picture.shape, octets(picture.levels));
      this.canvas.setAttribute("aria-label", `example ${example}, of class ${label}`);
    }
  }

  drawNorms(dtype) {
    const from = this.source(dtype);
    const lines = [
      { name: "error signal ‖ψ‖", slot: 0, values: from.own.psi },
      { name: "β × mean singular value", slot: 1, values: from.spread },
      { name: "input gradient", slot: 2, values: from.own.gradient },
      { name: "Hessian h(β)", slot: 4, values: from.h },
    ].map((line) => ({ ...line, read: readLog }));
    const finite = lines.flatMap(({ values }) => [...values]).filter(Number.isFinite);
    const high = Math.ceil(Math.max(...finite, 0)) + 0.3;
    const low = Math.max(Math.min(...finite, high - 3) - 0.3, high - DEEPEST);
    const domain = [low, high];
    this.norms.rename(`Norms, ${dtype}: ${from.who}`);
    this.norms.draw({ logs: this.logs, y: { domain, ticks: powers(domain), format: power }, lines, verticals: this.marks(from) });
  }

  drawShares(dtype) {
    const from = this.source(dtype);
    const lines = [
      { name: "signs of the gradient that are not 0", slot: 2, values: from.own.alive },
      { name: "entries of ψ rounded to 0", slot: 0, values: from.own.underflow },
    ];
    if (from.lost) lines.push({ name: "examples without any gradient", slot: 1, values: from.lost });
    this.shares.rename(`Shares, ${dtype}: ${from.who}`);
    this.shares.draw({ logs: this.logs, y: SHARES, lines: lines.map((line) => ({ ...line, read: percent })), verticals: this.marks(from) });
  }

  drawAccuracy(dtype) {
    const { net, curves } = this.data;
    const lines = Object.entries(curves).map(([name, { accuracy }]) => ({ name, slot: SLOTS[name], values: accuracy, read: percent, strong: name === dtype, dotted: name === dtype }));
    const { accuracy, rules } = curves[dtype];
    const spots = [{ log: 0, value: accuracy[this.one], shape: "ring", text: `plain, β = 1: ${percent(accuracy[this.one])}` }];
    if (rules.NJS !== null) spots.push({ log: Math.log10(net.njs), value: rules.NJS, shape: "triangle", text: `NJS ${percent(rules.NJS)}` });
    if (rules.HNS !== null) spots.push({ log: Math.log10(net.hns), value: rules.HNS, shape: "square", text: `HNS ${percent(rules.HNS)}` });
    const horizontals = [{ value: net.clean, text: `without an attack ${percent(net.clean)}`, name: "ql-clean" }];
    if (this.asked.c === net.c && this.asked.dtype === dtype) horizontals.push({ value: this.guess, text: `your guess ${percent(this.guess)}`, name: "ql-guess-line" });
    this.accuracy.rename("Right after the attack, at every β");
    this.accuracy.draw({ logs: this.logs, y: { ...SHARES, domain: [-0.03, 1.03] }, lines, spots, horizontals });
  }

  /** The slider moved: marks, bars and readings follow. */
  drawMoved() {
    const { index } = this.view;
    if (!this.betas) return;
    const beta = number(this.betas[index]);
    this.slider.value = index;
    this.slider.setAttribute("aria-valuetext", `beta ${beta}`);
    this.betaText.textContent = `β = ${beta}`;
    if (this.drawn) {
      const { net, curves, chosen } = this.data;
      const dtype = this.shownDtype;
      if (chosen) this.bars.move(index, beta);
      this.norms.move(index);
      if (this.seen) {
        this.shares.move(index);
        this.accuracy.move(index);
        this.cells.move(index, dtype, beta);
      }
      const changed = curves[dtype].changed[index];
      this.same.textContent = changed
        ? `Rounding in ${dtype} changes the prediction of ${changed} of ${net.examples} examples at this β; in exact arithmetic β changes none.`
        : `The decision boundary is unchanged: at this β the prediction of 0 of ${net.examples} examples changes.`;
    }
    this.root.dataset.index = String(index);
    this.root.dataset.dtype = this.shownDtype ?? "";
  }

  drawResult() {
    if (!this.seen || this.told) return;
    const { c, dtype } = this.asked;
    const row = this.model.get("rows").find((r) => r.c === c && r.dtype === dtype);
    const known = row && row.rules.NJS !== null && row.rules.HNS !== null;
    this.told = Boolean(known);
    this.result.textContent = known
      ? `You guessed ${percent(this.guess)}: plain PGD leaves ${percent(row.plain)} right, the same PGD with its logits scaled by NJS ${percent(row.rules.NJS)}, by HNS ${percent(row.rules.HNS)}. Without any gradient at β = 1: ${percent(row.lost)} of the right examples. Now move β.`
      : this.root.dataset.phase === "idle"
        ? "The attack was stopped before its result was known."
        : "The attack is running; its result appears here.";
  }

  drawRows() {
    this.tableBox.hidden = !this.seen;
    if (!this.seen) return;
    const rows = this.model.get("rows");
    const { c, dtype } = this.view;
    const head = h("tr", {}, ...["c", "dtype", "plain PGD at β = 1", "with NJS", "with HNS", "no gradient at β = 1"].map((text) => h("th", { scope: "col", text })));
    const line = (row) => {
      const here = row.c === c && row.dtype === dtype;
      const cells = [row.dtype, percent(row.plain), percent(row.rules.NJS), percent(row.rules.HNS), percent(row.lost)];
      return h("tr", { class: here ? "ql-now" : null, "aria-current": here ? "true" : null }, h("th", { scope: "row", text: `${here ? "▸ " : ""}${number(row.c)}` }), ...cells.map((text) => h("td", { text })));
    };
    this.table.replaceChildren(h("caption", { text: "Share right after the attack, by factor c on the logits and dtype: all that was computed so far" }), h("thead", {}, head), h("tbody", {}, ...rows.map(line)));
    this.drawResult();
  }

  drawStatus() {
    const { phase, text, fraction } = this.model.get("status");
    const busy = phase !== "idle";
    this.root.dataset.phase = phase;
    this.root.dataset.complete = String(this.complete);
    this.stop.hidden = !busy;
    this.more.hidden = busy || this.complete !== false;
    this.drawResult();
    this.status.textContent = busy ? `${text} ${Math.round(100 * fraction)} %` : text;
    this.drawError();
  }

  drawCaption() {
    const { left_out } = this.model.get("choices");
    const more = left_out ? ` ${left_out} more examples were not looked at.` : "";
    this.caption.textContent = this.seen ? this.model.get("caption") + more : "The numbers appear after your guess.";
  }
}

/** A picture (C, H, W) of 8 bits. */
function paint(canvas, [channels, rows, columns], levels) {
  const size = rows * columns;
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.width = `${Math.round((PIXELS * columns) / Math.max(rows, columns))}px`;
  canvas.style.height = `${Math.round((PIXELS * rows) / Math.max(rows, columns))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let p = 0; p < size; p += 1) {
    for (let c = 0; c < 3; c += 1) image.data[4 * p + c] = levels[(channels === 3 ? c : 0) * size + p];
    image.data[4 * p + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

export default widget(Temperature);
