// AttributionGuard: maps of a float net and its quantized twin next to exact ablation. State comes from Python, messages go to Python.

import { field, floats, h, octets, select, uid } from "./dom.js";
import { View, widget } from "./view.js";

const SIDE = 104; // pixels of a map on the page
const SCALE = 2; // canvas pixels per page pixel
const AGREED_OR_MADE = new Set([1, 2]);
const SILENT = 3;
const FOR = [179, 88, 6]; // orange
const AGAINST = [84, 39, 136]; // purple
const GROUND = [247, 247, 247];
const EXPLAINS = { deployed: "deployed net", exact: "deployed net", surrogate: "SURROGATE" };
const NETS = { float: "Float net", quantized: "Quantized twin" };

const fixed = (value, digits = 2) => (value === null || value === undefined ? "none" : value.toFixed(digits).replace("-", "−"));
const share = (value) => (value === null || value === undefined ? "all" : `${(100 * value).toFixed(1)} %`);

class Attribution extends View {
  constructor(model, root) {
    super(model);
    this.guess = null;
    this.shown = null;
    this.build(root);
    this.watch();
  }

  // ---- page

  build(root) {
    const { examples, patches, methods } = this.model.get("choices");
    this.methods = methods;
    this.example = h("input", { type: "range", min: 0, max: examples - 1, step: 1, oninput: () => this.choose({ example: Number(this.example.value) }) });
    this.exampleText = h("output", { class: "ql-number" });
    const options = patches.map((p) => ({ name: String(p), title: p === 1 ? "single pixels" : `${p} × ${p} pixels` }));
    this.patch = select(options, "", () => this.choose({ patch: Number(this.patch.value) }));
    this.run = h("button", { text: "Run again", onclick: () => this.send({ type: "run" }) });
    this.stop = h("button", { text: "Stop", onclick: () => this.send({ type: "stop" }) });
    const name = uid("guess");
    const guess = (value, text) => {
      const input = h("input", { type: "radio", name, value, onchange: () => this.predict(value) });
      return h("label", { class: "ql-choice" }, input, text);
    };
    const legend = h("legend", { text: "Your guess: which map of the quantized twin ranks the pixels most like exact ablation?" });
    this.guesses = h("fieldset", { class: "ql-guesses" }, legend, ...methods.map((m) => guess(m.name, m.title)));
    this.sheet = h("div", { class: "ql-sheet-maps" });
    this.result = h("p", { class: "ql-result", "aria-live": "polite" });
    this.table = h("table", { class: "ql-ranks" });
    this.status = h("p", { class: "ql-status", role: "status" });
    this.error = h("p", { class: "ql-error", role: "alert" });
    this.caption = h("p", { class: "ql-caption" });
    const exampleField = field("Example", this.example);
    exampleField.append(this.exampleText);
    this.root = h(
      "div",
      { class: "ql-studio ql-attribution" },
      h(
        "div",
        { class: "ql-inner" },
        h("h3", { class: "ql-question", text: "Which of these maps tells what the quantized net looks at?" }),
        h("div", { class: "ql-place" }, exampleField, field("A feature is", this.patch), this.run, this.stop),
        this.guesses,
        h("div", { class: "ql-scroll" }, this.sheet),
        this.legend(),
        this.result,
        h("div", { class: "ql-scroll" }, this.table),
        this.status,
        this.error,
        this.caption,
      ),
    );
    root.append(this.root);
  }

  legend() {
    const sample = (score, code, text) => {
      const canvas = h("canvas", { class: "ql-sample", "aria-hidden": "true" });
      paint(canvas, new Float32Array([score]), new Uint8Array([code]), 1, 1, 20, 1);
      return h("span", { class: "ql-key" }, canvas, text);
    };
    return h(
      "p",
      { class: "ql-legend" },
      sample(1, 0, "speaks for the class"),
      sample(-1, 0, "speaks against it (−)"),
      sample(0, 2, "exact zero: by construction, or the references agree"),
      sample(0, SILENT, "exact zero where the net changes: no information"),
    );
  }

  watch() {
    const maps = () => this.drawMaps();
    this.listen({
      settings: () => this.drawPlace(),
      picture: maps,
      maps,
      status: () => this.drawStatus(),
      caption: () => this.drawCaption(),
    });
  }

  choose(changes) {
    this.exampleText.textContent = String(changes.example ?? this.example.value);
    this.send({ type: "choose", ...changes });
  }

  // ---- where

  drawPlace() {
    const { example, patch } = this.model.get("settings");
    this.example.value = example;
    this.exampleText.textContent = String(example);
    this.patch.value = String(patch);
    const place = `${example}/${patch}`;
    if (this.shown !== place) this.forget(); // another question
    this.shown = place;
  }

  forget() {
    this.guess = null;
    for (const input of this.guesses.querySelectorAll("input")) input.checked = false;
    this.drawAnswer();
  }

  predict(value) {
    this.guess = value;
    this.drawMaps();
  }

  /** Whether all methods have been run, so that there is an answer. */
  get whole() {
    const rows = this.model.get("maps").rows;
    return Boolean(rows) && this.methods.every(({ name }) => rows[1].cells.some((cell) => cell.method === name));
  }

  get told() {
    return this.guess !== null && this.whole;
  }

  // ---- maps

  drawMaps() {
    const { values, height, width, example } = this.model.get("picture");
    const maps = this.model.get("maps");
    const input = (caption) => {
      const canvas = h("canvas", { role: "img", "aria-label": `the input, example ${example}` });
      paintInput(canvas, floats(values), height, width);
      return h("figure", { class: "ql-map" }, h("figcaption", { text: caption }), canvas);
    };
    const rows = maps.rows ?? [{ net: "float", cells: [] }, { net: "quantized", cells: [] }];
    this.sheet.replaceChildren(
      ...rows.map((row) => {
        const note = row.cells.length ? `F(x) − F(x0) = ${fixed(row.difference)}` : "running ...";
        const first = input(NETS[row.net]);
        first.append(h("p", { class: "ql-under", text: note }));
        return h("div", { class: "ql-maps", role: "group", "aria-label": NETS[row.net] }, first, ...row.cells.map((cell) => this.cell(cell, row.net, height, width)));
      }),
    );
    this.drawAnswer();
  }

  cell(cell, net, height, width) {
    const canvas = h("canvas", { role: "img", "aria-label": `${cell.title} of the ${NETS[net].toLowerCase()}, explains the ${EXPLAINS[cell.explains]}. ${this.under(cell)}` });
    const zeros = cell.zeros.byteLength ? octets(cell.zeros) : new Uint8Array(height * width);
    paint(canvas, floats(cell.scores), zeros, height, width);
    const label = h("span", { class: `ql-label-net${cell.explains === "surrogate" ? " ql-surrogate" : ""}`, text: EXPLAINS[cell.explains] });
    const figure = h("figure", { class: "ql-map" }, h("figcaption", { text: cell.title }), canvas, label);
    for (const text of this.under(cell).split("; ")) figure.append(h("p", { class: `ql-under${cell.silent ? " ql-loud" : ""}`, text }));
    return figure;
  }

  under(cell) {
    if (cell.method === "exact") return "the reference";
    const parts = [];
    if (cell.silent) parts.push("NO INFORMATION");
    if (cell.complete) parts.push(`misses ${share(cell.relative)}`);
    if (this.told) parts.push(`rank ${fixed(cell.rank)}`);
    return parts.join("; ") || "claims no sum";
  }

  // ---- the answer

  drawAnswer() {
    this.table.replaceChildren();
    this.result.textContent = "";
    this.root.dataset.told = String(this.told);
    this.drawCaption();
    if (!this.told) {
      if (this.guess !== null) this.result.textContent = "The maps are still being computed ...";
      return;
    }
    const { rows, best } = this.model.get("maps");
    const title = (name) => this.methods.find((m) => m.name === name)?.title ?? name;
    const answer = best
      ? `On this example ${title(best)} ranks best; you guessed ${title(this.guess)}: ${best === this.guess ? "right" : "wrong"}.`
      : "No map of this example has an order to compare.";
    this.result.textContent = answer;
    const heads = ["Map", "Float: this", "all", "Quantized: this", "all", "Explains", "Verdict on the quantized twin's map"];
    this.table.append(h("caption", { text: "Rank correlation with exact ablation: this example, and the median of all" }));
    this.table.append(h("tr", {}, ...heads.map((text) => h("th", { scope: "col", text }))));
    const [float, quantized] = rows;
    for (const { name } of this.methods) {
      const [a, b] = [float, quantized].map((row) => row.cells.find((cell) => cell.method === name));
      const cells = [
        h("th", { scope: "row", text: (name === best ? "★ " : "") + title(name) }),
        ...[a.rank, a.median, b.rank, b.median].map((value) => h("td", { class: "ql-number", text: fixed(value) })),
        h("td", { text: EXPLAINS[b.explains] }),
        h("td", { class: "ql-reason" }, h("strong", { text: b.verdict }), b.reason ? `: ${b.reason}` : ""),
      ];
      this.table.append(h("tr", {}, ...cells));
    }
  }

  // ---- status

  drawStatus() {
    const { phase, text, fraction, error } = this.model.get("status");
    const busy = phase === "running";
    this.root.dataset.phase = phase;
    this.run.disabled = busy;
    this.stop.disabled = !busy;
    this.status.textContent = busy ? `${text} ${Math.round(100 * fraction)} %` : text;
    this.drawError();
    if (error) this.drawPlace();
  }

  drawCaption() {
    const known = this.model.get("maps").rows ? "Guess first; ranks and verdicts come after." : this.model.get("caption");
    this.caption.textContent = this.told ? this.model.get("caption") : known; // the caption gives the ranks away
  }
}

/** Size a canvas for a grid and return its context and the side of a cell in canvas pixels. */
function prepared(canvas, height, width, side = SIDE, scale = SCALE) {
  const flat = height === 1 && width > 1; // a vector: one row, as high as a few cells
  const long = Math.max(height, width);
  const cw = (side * scale * width) / long;
  const ch = flat ? (side * scale) / 2 : (side * scale * height) / long;
  canvas.width = cw;
  canvas.height = ch;
  canvas.style.width = `${cw / scale}px`;
  canvas.style.height = `${ch / scale}px`;
  return { context: canvas.getContext("2d"), w: cw / width, hh: ch / height };
}

function paintInput(canvas, values, height, width) {
  const { context, w, hh } = prepared(canvas, height, width);
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  values.forEach((value, i) => {
    const grey = Math.round(255 - (255 * (value - low)) / span);
    context.fillStyle = `rgb(${grey},${grey},${grey})`;
    context.fillRect((i % width) * w, Math.floor(i / width) * hh, w + 0.5, hh + 0.5);
  });
}

/** Scores as colours on their own scale; negative ones with a minus, exact zeros with dots or slashes. */
function paint(canvas, scores, zeros, height, width, side = SIDE, scale = SCALE) {
  const { context, w, hh } = prepared(canvas, height, width, side, scale);
  const top = Math.max(...scores.map(Math.abs)) || 1;
  scores.forEach((score, i) => {
    const [x, y] = [(i % width) * w, Math.floor(i / width) * hh];
    const t = Math.min(1, Math.abs(score) / top);
    const end = score < 0 ? AGAINST : FOR;
    context.fillStyle = `rgb(${GROUND.map((g, k) => Math.round(g + t * (end[k] - g))).join(",")})`;
    context.fillRect(x, y, w + 0.5, hh + 0.5);
    mark(context, zeros[i], score < 0 && t > 0.2, t, x, y, w, hh);
  });
}

function mark(context, code, negative, t, x, y, w, hh) {
  const size = Math.min(w, hh);
  if (size < 7) return;
  context.save();
  context.beginPath();
  context.rect(x, y, w, hh);
  context.clip();
  context.strokeStyle = context.fillStyle = "#5a5a5a";
  context.lineWidth = Math.max(1, size / 14);
  if (code === SILENT) {
    for (let d = -hh; d < w; d += size / 2) {
      context.beginPath();
      context.moveTo(x + d, y + hh);
      context.lineTo(x + d + hh, y);
      context.stroke();
    }
  } else if (AGREED_OR_MADE.has(code)) {
    context.beginPath();
    context.arc(x + w / 2, y + hh / 2, Math.max(1, size / 12), 0, 2 * Math.PI);
    context.fill();
  } else if (negative) {
    context.strokeStyle = t > 0.5 ? "#ffffff" : "#3a1a60";
    context.beginPath();
    context.moveTo(x + w / 2 - size / 4, y + hh / 2);
    context.lineTo(x + w / 2 + size / 4, y + hh / 2);
    context.stroke();
  }
  context.restore();
}

export default widget(Attribution);
