// The Studio: question, prediction, controls, live curves, runs. State comes from Python, messages go to Python.

import { Histogram, LineChart } from "./chart.js";
import { Controls } from "./controls.js";
import { field, floats, h, percent } from "./dom.js";
import { examples } from "./examples.js";
import { Runs } from "./runs.js";

const BUSY = new Set(["training", "stopping"]);

function question(bits) {
  if (bits === 32) return "How well does a net with ordinary float weights learn this?";
  return bits === 1 ? "Can a net with only +1 and −1 weights learn this?" : `Can a net with only ${bits} bits per weight learn this?`;
}

class View {
  constructor(model, root) {
    this.model = model;
    this.controls = new Controls(model.get("shelves"), model.get("settings"), (settings) => this.send({ type: "settings", settings }));
    this.runs = new Runs(
      model.get("settings").name,
      (labels) => this.send({ type: "compare", labels }),
      (run, name) => this.send({ type: "send", run, name }),
    );
    this.charts = {
      accuracy: new LineChart("Validation accuracy", { yFormat: ".0%", readFormat: ".1%", ceiling: 1 }),
      loss: new LineChart("Loss", { yFormat: "~g", readFormat: ".2~g", log: true }),
      flips: new LineChart("Weights that changed sign, per epoch", { yFormat: "~p", readFormat: ".2~p", log: true }),
      weights: new Histogram("Latent weights; dotted: the deployed levels"),
    };
    this.build(root);
    this.listen();
  }

  build(root) {
    const settings = this.model.get("settings");
    this.question = h("h3", { class: "ql-question" });
    this.examples = h("div");
    this.guess = h("input", { type: "range", min: 0, max: 100, step: 1, value: settings.guess });
    this.guessValue = h("output", { class: "ql-guess" });
    this.guess.addEventListener("input", () => this.paintGuess());
    this.guess.addEventListener("change", () => this.controls.change({ guess: Number(this.guess.value) }));
    this.train = this.button("Train", "train", "ql-primary");
    this.stop = this.button("Stop", "stop");
    this.resume = this.button("Resume", "resume");
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "progress of the run" });
    this.status = h("p", { class: "ql-status" });
    this.spoken = h("p", { class: "ql-hidden", "aria-live": "polite" });
    this.error = h("p", { class: "ql-error-text" });
    this.trace = h("pre");
    this.detail = h("details", {}, h("summary", { text: "Traceback" }), this.trace);
    this.alert = h("div", { class: "ql-error", role: "alert", hidden: true }, this.error, this.detail);
    this.caption = h("p", { class: "ql-caption" });
    this.node = h(
      "section",
      { class: "ql-studio", "aria-label": "Studio" },
      h(
        "div",
        { class: "ql-inner" },
        this.question,
        h(
          "div",
          { class: "ql-task" },
          this.examples,
          h(
            "div",
            { class: "ql-predict" },
            field("Your prediction: accuracy when deployed", this.guess),
            this.guessValue,
          ),
        ),
        h(
          "div",
          { class: "ql-body" },
          h(
            "div",
            { class: "ql-side" },
            h(
              "div",
              { class: "ql-go" },
              h("div", { class: "ql-buttons" }, this.train, this.stop, this.resume),
              h("div", { class: "ql-progress" }, this.progress, this.status),
            ),
            this.spoken,
            this.alert,
            this.controls.node,
          ),
          h("div", { class: "ql-charts" }, ...Object.values(this.charts).map((chart) => chart.node)),
        ),
        this.caption,
        this.runs.node,
      ),
    );
    root.append(this.node);
  }

  button(text, type, extra = "") {
    return h("button", { type: "button", class: extra, text, onclick: () => this.send({ type, settings: this.settings() }) });
  }

  settings() {
    return { ...this.controls.settings, name: this.model.get("settings").name };
  }

  send(message) {
    this.model.send(message);
  }

  listen() {
    const on = {
      settings: () => (this.controls.set(this.model.get("settings")), this.paintQuestion()),
      controls: () => this.paintControls(),
      preview: () => this.paintPreview(),
      status: () => this.paintStatus(),
      live: () => this.paintCharts(),
      shown: () => this.paintCharts(),
      rows: () => this.runs.update(this.model.get("rows")),
      caption: () => this.paintCaption(),
    };
    this.handlers = Object.entries(on).map(([name, handler]) => [`change:${name}`, handler]);
    for (const [event, handler] of this.handlers) this.model.on(event, handler);
    this.paintQuestion();
    this.paintControls();
    this.paintPreview();
    this.paintGuess();
    this.paintStatus();
    this.runs.update(this.model.get("rows"));
    this.paintCaption();
    requestAnimationFrame(() => {
      this.paintCharts();
      this.node.dataset.painted = "true";
      this.send({ type: "ready" }); // from now on the kernel may load PyTorch
    });
  }

  close() {
    for (const [event, handler] of this.handlers) this.model.off(event, handler);
    for (const chart of Object.values(this.charts)) chart.close();
  }

  paintQuestion() {
    const method = this.model.get("shelves").methods.find((m) => m.name === this.controls.settings.method);
    this.question.textContent = question(method?.weight_bits ?? 32);
  }

  paintControls() {
    const controls = this.model.get("controls");
    if (controls.items && controls.method === this.controls.settings.method) this.controls.describe(controls);
    this.controls.waiting("They appear here once PyTorch is loaded.");
  }

  paintPreview() {
    const preview = this.model.get("preview");
    this.examples.replaceChildren(examples(preview));
    this.controls.fit(preview.data === this.controls.settings.data ? preview.nets : null);
    this.paintCharts();
  }

  paintGuess() {
    this.guessValue.textContent = `${this.guess.value} %`;
    this.paintCharts();
  }

  paintCaption() {
    this.caption.textContent = this.model.get("caption");
  }

  paintStatus() {
    const { phase, text, fraction, error, detail, looking, about, resumable } = this.model.get("status");
    const busy = BUSY.has(phase);
    if (this.node.dataset.phase !== phase) this.spoken.textContent = text;
    this.node.dataset.phase = phase;
    this.status.textContent = text;
    this.status.classList.toggle("ql-busy", busy || Boolean(looking));
    this.progress.value = fraction ?? 0;
    this.train.disabled = busy;
    this.stop.disabled = phase !== "training";
    this.resume.disabled = !resumable;
    const sent = about === "send"; // answered next to the button
    this.runs.say(sent ? error || text : "", sent && Boolean(error));
    this.alert.hidden = !error || sent;
    this.error.textContent = error ?? "";
    this.detail.hidden = !detail;
    this.trace.textContent = detail ?? "";
  }

  /** All runs on view, the live one last so that it is drawn on top. */
  records() {
    const live = this.model.get("live");
    return [...this.model.get("shown"), ...(live.label ? [live] : [])];
  }

  paintCharts() {
    if (!this.node) return;
    const records = this.records();
    const curves = (metric, dashed, name) =>
      records.flatMap((record) => {
        const series = record.series.find((s) => s.metric === metric);
        if (!series) return [];
        const short = name ? `${record.label} ${name}` : record.label;
        return [{ label: short, short, slot: record.slot, dashed, x: floats(series.x), y: floats(series.y) }];
      });
    const preview = this.model.get("preview");
    const absent = records.length ? "no values yet" : "press Train";
    const float = records.length > 0 && records.every((record) => record.bits === 32);
    this.charts.accuracy.update({
      absent,
      curves: [...curves("val/acc_latent", true, "latent"), ...curves("val/acc", false, "deployed")],
      references: [
        { label: `guessing ${percent(preview.chance, 0)}`, value: preview.chance },
        { label: `you: ${this.guess.value} %`, value: Number(this.guess.value) / 100 },
      ],
    });
    this.charts.loss.update({ absent, curves: [...curves("val/loss", true, "val"), ...curves("train/loss", false, "train")] });
    this.charts.flips.update({ absent: float ? "float weights have no levels" : absent, curves: curves("quant/flip_ratio", false, "") });
    const drawn = records.filter((record) => record.histogram).map((record) => ({ label: record.label, slot: record.slot, ...record.histogram }));
    if (drawn.length === 0 && preview.histogram) drawn.push({ label: "untrained", slot: 0, ...preview.histogram });
    this.charts.weights.update({
      absent,
      histograms: drawn.map((d) => ({ ...d, edges: floats(d.edges), share: floats(d.share), levels: floats(d.levels) })),
    });
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
