// RobustnessLab: robust accuracy of several nets with the honesty panel beside it. State comes from Python, messages go to Python.
// No robust accuracy is written of a net whose attacks or panel have not run to the end; its curve is drawn as unfinished.

import { field, floats, h, select, setOptions, uid } from "./dom.js";
import { read } from "./replay_plane.js";
import { swatch } from "./replay_pictures.js";
import { drawCheck, drawRobustness, percent, plain } from "./robustness_chart.js";
import { detail, strip } from "./robustness_examples.js";
import { svg } from "./svg.js";
import { View, widget } from "./view.js";

const CHECKS = 17;
const STATES = { pass: ["✓", "pass"], warn: ["!", "warn"], fail: ["✗", "fail"], skipped: ["–", "skipped"] };
const SUITES = { quick: "quick", standard: "standard: AutoAttack's and more", search: "search: no gradient", own: "your own" };

class Robustness extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.opened = new Set();
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    this.run = h("button", { class: "ql-primary", text: "Run", onclick: () => this.send({ type: "run" }) });
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    this.note = h("span", { class: "ql-muted" });
    this.guesses = h("fieldset", { class: "ql-guesses" });
    this.nets = h("fieldset", {}, h("legend", { text: "Nets" }));
    this.suite = select([], "", () => this.choose({ suite: this.suite.value }));
    this.suiteField = field("Suite", this.suite);
    this.attacks = h("div", { class: "ql-boxes" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.chart = h("div", { class: "ql-chart-box" });
    this.legend = h("div", { class: "ql-legend" });
    this.counts = h("div", { class: "ql-counts" });
    this.panels = h("div", { class: "ql-columns ql-panels" });
    this.eps = select([], "", () => this.choose({ eps: Number(this.eps.value) }));
    this.before = h("button", { text: "◀", "aria-label": "earlier examples", onclick: () => this.turn(-1) });
    this.after = h("button", { text: "▶", "aria-label": "later examples", onclick: () => this.turn(1) });
    this.where = h("span", { class: "ql-muted" });
    this.strip = h("div", { class: "ql-strip-box ql-scroll", role: "group", "aria-label": "examples and what was found for them" });
    this.key = h("p", { class: "ql-muted" });
    this.detail = h("div", { class: "ql-detail-box" });
    this.hint = h("p", { class: "ql-muted", text: "The robustness curves, the honesty panels and what the attacks found appear after your guess." });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    this.secret = [
      h("section", {}, h("h4", { text: "Honesty panel: can these numbers be trusted? Open a check to see its evidence." }), this.panels),
      h("section", {}, h("h4", { text: "What the attacks found" }), h("div", { class: "ql-row-bar" }, field("Radius ε on view", this.eps), this.before, this.where, this.after), this.strip, this.key, this.detail),
    ];
    this.root = h(
      "div",
      { class: "ql-studio ql-robustness" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Which of these nets is robust, and which only looks so?" }),
        this.guesses,
        h("div", { class: "ql-row-bar" }, this.run, this.stop, this.note),
        h("div", { class: "ql-place" }, this.nets, h("fieldset", {}, h("legend", { text: "Attacks" }), this.suiteField, this.attacks)),
        this.result,
        h("div", { class: "ql-columns" }, h("section", {}, h("h4", { text: "Accuracy against ε, with 95 % intervals" }), this.chart, this.legend), h("section", {}, this.counts)),
        this.hint,
        ...this.secret,
        this.status,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  watch() {
    const curves = () => this.drawCurves();
    const examples = () => this.drawExamples();
    this.listen({
      choices: () => this.drawPlace(),
      settings: () => {
        this.drawPlace();
        this.drawCurves();
      },
      curves,
      panels: () => this.drawPanels(),
      answer: () => this.drawAnswer(),
      pictures: examples,
      sample: examples,
      status: () => this.drawStatus(),
      caption: () => this.drawAnswer(),
    });
  }

  choose(changes) {
    this.send({ type: "choose", ...changes });
  }

  get told() {
    return this.guess !== null;
  }

  // ---- what is chosen

  drawPlace() {
    const { nets, suites, attacks, eps, stale } = this.model.get("choices");
    const settings = this.model.get("settings");
    const slot = (name) => nets.indexOf(name);
    this.boxes(this.nets, nets, settings.nets, "nets", (name) => swatch(slot(name)));
    setOptions(this.suite, suites.map((name) => ({ name, title: SUITES[name] ?? name })), settings.suite);
    this.suiteField.hidden = suites.length < 2;
    this.boxes(this.attacks, attacks, settings.attacks, "attacks", () => null);
    setOptions(this.eps, eps.map((v) => ({ name: String(v), title: read(v) })), String(settings.eps));
    this.note.textContent = stale ? "The choice has changed: run again." : "";
    this.drawGuesses(nets, eps[Math.floor(eps.length / 2)]);
  }

  /** Checkboxes; at least one stays chosen. A box that is there is kept, so that it keeps the focus. */
  boxes(node, names, chosen, what, before) {
    const there = [...node.querySelectorAll("input")];
    if (there.map((box) => box.value).join("\n") !== names.join("\n")) {
      there.forEach((box) => box.closest("label").remove());
      for (const name of names) {
        const box = h("input", { type: "checkbox", value: name, onchange: () => this.tick(node, what, box) });
        node.append(h("label", { class: "ql-choice" }, box, before(name), name));
      }
    }
    for (const box of node.querySelectorAll("input")) box.checked = chosen.includes(box.value);
  }

  tick(node, what, box) {
    const chosen = [...node.querySelectorAll("input:checked")].map((input) => input.value);
    if (chosen.length === 0) box.checked = true;
    else this.choose({ [what]: chosen });
  }

  drawGuesses(nets, eps) {
    const key = JSON.stringify([nets, eps]);
    if (this.guesses.dataset.key === key) return;
    this.guesses.dataset.key = key;
    const name = uid("guess");
    const options = nets.length > 1 ? nets.map((net) => [net, net]) : [["more", "half of the examples or more"], ["less", "fewer"]];
    const text = nets.length > 1 ? `Your guess: at ε = ${read(eps)}, which net keeps more accuracy under the worst of all attacks?` : `Your guess: at ε = ${read(eps)}, how many examples does the net keep under the worst of all attacks?`;
    const guess = ([value, title]) => {
      const input = h("input", { type: "radio", name, value, onchange: () => this.predict(value) });
      return h("label", { class: "ql-choice" }, input, title);
    };
    this.guesses.replaceChildren(h("legend", { text }), ...options.map(guess));
  }

  predict(value) {
    this.guess = value;
    this.guesses.disabled = true;
    this.drawCurves();
    this.drawPanels();
    this.drawExamples();
    this.drawAnswer();
    this.drawStatus();
  }

  // ---- curves

  drawCurves() {
    const { eps, norm } = { norm: this.model.get("pictures").norm ?? "linf", ...this.model.get("settings") };
    const grid = this.model.get("choices").eps;
    const curves = this.model.get("curves").map((c) => ({ ...c, share: floats(c.share), low: floats(c.low), high: floats(c.high) }));
    this.chart.replaceChildren(drawRobustness({ curves, grid, eps, norm, told: this.told }));
    const ring = svg("svg", { viewBox: "-15 -8 30 16", "aria-hidden": "true", class: "ql-swatch-line" });
    ring.append(plain(0, 0, "none"));
    const entries = curves.map((c) => h("span", { class: "ql-entry" }, swatch(c.slot), `${c.name}: ${this.word(c)}`));
    if (this.told && curves.some((c) => c.complete && c.plain)) entries.push(h("span", { class: "ql-entry" }, ring, "what plain PGD alone leaves"));
    this.legend.replaceChildren(...(entries.length ? entries : [h("span", { class: "ql-muted", text: "The nets are being trained ..." })]));
    this.counts.replaceChildren(...(this.told ? curves.map((c) => this.count(c, grid)) : []));
  }

  word(c) {
    if (!this.told) return `${percent(c.clean)} right without an attack`;
    if (c.complete) return c.verdict;
    return `${percent(c.clean)} right without an attack; not finished, no robust accuracy is stated`;
  }

  count(c, grid) {
    const head = h("tr", {}, h("th", { scope: "col", text: "Attack, in this order" }), ...grid.map((v) => h("th", { scope: "col", text: `ε ${read(v)}` })));
    const rows = c.broken.map(({ attack, counts }) => h("tr", {}, h("th", { scope: "row", text: attack }), ...counts.map((n) => h("td", { class: "ql-number", text: n === null ? "·" : String(n) }))));
    const title = h("caption", {}, swatch(c.slot), `${c.name}: newly broken examples (· not run)`);
    return h("div", { class: "ql-scroll" }, h("table", { class: "ql-broken" }, title, h("thead", {}, head), h("tbody", {}, ...rows)));
  }

  // ---- panels

  drawPanels() {
    for (const part of this.secret) part.hidden = !this.told;
    this.hint.hidden = this.told;
    if (!this.told) return;
    this.panels.replaceChildren(...this.model.get("panels").map((panel) => this.panel(panel)));
  }

  panel({ name, slot, rows, verdict, summary, masked, eps }) {
    const sign = rows.length === 0 ? "…" : masked ? "✗" : "✓";
    const at = eps === null ? "" : `, at ε = ${read(eps)}`;
    const head = h("h4", {}, swatch(slot), `${name}${at}: ${sign} ${verdict}`);
    if (rows.length === 0) return h("section", { "data-net": name }, head, h("p", { class: "ql-muted", text: `The ${CHECKS} checks are made once the attacks have run.` }));
    return h("section", { "data-net": name }, head, h("div", { class: "ql-checks" }, ...rows.map((row) => this.check(name, row))), h("p", { class: "ql-verdict", text: summary }));
  }

  check(net, row) {
    const [sign, word] = STATES[row.state];
    const kind = row.state === "fail" && !row.masking ? `${word}, no masking` : word;
    const key = `${net}/${row.number}`;
    const state = h("span", { class: `ql-state ql-state-${row.state}`, text: `${sign} ${kind}` });
    const summary = h("summary", {}, h("span", { class: "ql-check-number", text: String(row.number) }), state, h("span", { text: row.name }), row.mechanism ? h("span", { class: "ql-muted", text: ` ${row.mechanism}` }) : null);
    const node = h("details", { class: "ql-check", "data-check": row.number }, summary);
    const fill = () => {
      if (node.childElementCount > 1) return;
      const lines = [["What must hold", row.condition], ["Evidence", row.words], ["Repair", row.repair]].filter(([, text]) => text);
      for (const [title, text] of lines) node.append(h("p", {}, h("strong", { text: `${title}: ` }), text));
      const curve = row.curve && drawCheck({ ...row, curve: { ...row.curve, x: floats(row.curve.x), y: floats(row.curve.y) } });
      if (curve) node.append(curve);
    };
    node.open = this.opened.has(key);
    if (node.open) fill();
    node.addEventListener("toggle", () => {
      if (node.open) this.opened.add(key);
      else this.opened.delete(key);
      if (node.open) fill();
    });
    return node;
  }

  // ---- examples

  turn(by) {
    const { first, labels, total } = this.model.get("pictures");
    const next = by < 0 ? first - labels.length : first + labels.length;
    this.choose({ example: Math.max(0, Math.min(total - 1, by < 0 ? first - 1 : next)) });
  }

  drawExamples() {
    const page = this.model.get("pictures");
    const sample = this.model.get("sample");
    if (!this.told || page.labels === undefined) {
      this.strip.replaceChildren();
      this.detail.replaceChildren();
      return;
    }
    const focused = this.strip.contains(document.activeElement);
    const last = page.first + page.labels.length - 1;
    this.where.textContent = `examples ${page.first} to ${last} of ${page.total}`;
    this.before.disabled = page.first === 0;
    this.after.disabled = last === page.total - 1;
    this.strip.classList.toggle("ql-no-pictures", page.shape.length === 0);
    this.strip.replaceChildren(...strip(page, sample.example, swatch, (example) => this.choose({ example })));
    if (focused) this.strip.querySelector(".ql-chosen")?.focus();
    const marks = "✗ broken, ✓ held so far, ○ wrong from the start";
    this.key.textContent = page.shape.length ? `${marks}. Change: orange is added, purple taken away; the factor is the same for all. Below it: the ${page.norm} distance of what broke it.` : `${marks}.`;
    this.detail.replaceChildren(...detail(sample, swatch, page.eps));
  }

  // ---- answer and status

  drawAnswer() {
    const { right, words } = this.model.get("answer");
    this.root.dataset.told = String(this.told);
    const known = this.told && words !== undefined;
    this.root.dataset.complete = String(this.model.get("answer").words !== undefined);
    const many = this.model.get("choices").nets.length > 1;
    const verdict = known && (!many || this.model.get("curves").some((c) => c.name === this.guess)) ? `You guessed ${right.includes(this.guess) ? "right" : "wrong"}. ` : "";
    this.result.textContent = known ? verdict + words : this.told ? "Your guess is noted. The answer comes when all attacks and the panel have run." : "";
    this.caption.textContent = this.told ? this.model.get("caption") : "Guess first; the numbers come after.";
  }

  drawStatus() {
    const { phase, text, fraction } = this.model.get("status");
    const busy = phase === "running";
    this.root.dataset.phase = phase;
    this.run.disabled = busy;
    this.stop.disabled = !busy;
    const doing = this.told ? text : text.split(", ")[0]; // what an attack or a check found would give the answer away
    this.status.textContent = busy ? `${doing} ${Math.round(100 * fraction)} %` : text;
    this.status.classList.toggle("ql-busy", busy);
    this.drawError();
    if (this.model.get("status").error) this.drawPlace();
  }
}

export default widget(Robustness);
