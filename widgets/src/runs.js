// The runs: a table to compare them and the way to the notebook.

import { field, h, percent, select, setOptions } from "./dom.js";

const COLUMNS = ["show", "run", "method", "differs in", "state", "step", "deployed", "latent", "loss", "flips"];

export class Runs {
  /** @param onCompare called with the labels to show; @param onSend called with a label and a variable name */
  constructor(name, onCompare, onSend) {
    this.onCompare = onCompare;
    this.body = h("tbody");
    this.which = select([], "", () => {});
    this.name = h("input", { type: "text", value: name, size: 10, spellcheck: "false" });
    this.button = h("button", { type: "button", text: "Send to notebook", onclick: () => onSend(this.which.value, this.name.value) });
    this.note = h("span", { class: "ql-note", role: "status" });
    const head = h("tr", {}, ...COLUMNS.map((text) => h("th", { scope: "col", text })));
    this.node = h(
      "section",
      { class: "ql-runs", "aria-label": "Runs", hidden: true },
      h("div", { class: "ql-scroll" }, h("table", {}, h("caption", { text: "Runs: tick those to see side by side" }), h("thead", {}, head), this.body)),
      h("div", { class: "ql-send" }, field("Run", this.which), field("to variable", this.name), this.button, this.note),
    );
  }

  /** Answer next to the button. */
  say(text, wrong) {
    this.note.textContent = text;
    this.note.classList.toggle("ql-wrong", wrong);
  }

  update(rows) {
    this.node.hidden = rows.length === 0;
    const focused = document.activeElement?.dataset?.run;
    this.body.replaceChildren(...rows.map((row) => this.row(row, rows)));
    if (focused) this.body.querySelector(`input[data-run="${CSS.escape(focused)}"]`)?.focus();
    const ready = rows.filter((row) => row.ready).map((row) => ({ name: row.label }));
    const chosen = ready.some((r) => r.name === this.which.value && r.name !== this.newest) ? this.which.value : ready.at(-1)?.name;
    this.newest = ready.at(-1)?.name;
    setOptions(this.which, ready, chosen ?? "");
    this.button.disabled = ready.length === 0;
  }

  row(row, rows) {
    const box = h("input", { type: "checkbox", "data-run": row.label, "aria-label": `show run ${row.label}` });
    box.checked = row.slot !== null;
    box.addEventListener("change", () => {
      const shown = rows.filter((r) => (r.label === row.label ? box.checked : r.slot !== null));
      this.onCompare(shown.map((r) => r.label));
    });
    const swatch = h("span", { class: row.slot === null ? "ql-swatch" : `ql-swatch ql-run-${row.slot}`, "aria-hidden": "true" });
    const method = h("td", { text: row.method });
    method.title = row.title;
    return h(
      "tr",
      {},
      h("td", {}, box),
      h("th", { scope: "row" }, swatch, h("span", { text: row.label })),
      method,
      h("td", { text: row.differs || "–" }),
      h("td", { text: row.phase }),
      h("td", { class: "ql-number", text: String(row.step) }),
      h("td", { class: "ql-number", text: percent(row.acc) }),
      h("td", { class: "ql-number", text: percent(row.latent) }),
      h("td", { class: "ql-number", text: row.loss === null ? "–" : row.loss.toPrecision(3) }),
      h("td", { class: "ql-number", text: percent(row.flips, 2) }),
    );
  }
}
