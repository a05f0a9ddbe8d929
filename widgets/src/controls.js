// The form: what to train. It reads and writes one plain `settings` object and knows nothing of the kernel.

import { field, h, select, setOptions } from "./dom.js";

const number = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text);

export class Controls {
  /**
   * @param shelves {data, nets, methods} with name and title
   * @param settings as of the Python class Settings
   * @param onchange called with the new settings
   */
  constructor(shelves, settings, onchange) {
    this.shelves = shelves;
    this.settings = structuredClone(settings);
    this.onchange = onchange;
    this.described = null;
    this.inputs = {
      method: select(shelves.methods, settings.method, (e) => this.change({ method: e.target.value, hyper: {} })),
      data: select(shelves.data, settings.data, (e) => this.changeData(e.target.value)),
      net: select(shelves.nets, settings.net, (e) => this.change({ net: e.target.value })),
      folder: this.text("folder"),
      epochs: this.numeric("epochs"),
      batch_size: this.numeric("batch_size"),
      seed: this.numeric("seed"),
    };
    this.folder = field("Folder of class folders", this.inputs.folder);
    this.own = h("div", { class: "ql-fields" });
    this.common = h("div", { class: "ql-fields" });
    this.details = h("details", {}, h("summary", { text: "Optimizer and more" }), this.common);
    this.ownTitle = h("legend", { text: "Hyperparameters" });
    this.ownGroup = h("fieldset", {}, this.ownTitle, this.own, this.details);
    this.node = h(
      "form",
      { class: "ql-controls", "aria-label": "What to train" },
      field("Method", this.inputs.method),
      field("Data", this.inputs.data),
      this.folder,
      field("Net", this.inputs.net),
      h(
        "div",
        { class: "ql-row" },
        field("Epochs", this.inputs.epochs),
        field("Batch", this.inputs.batch_size),
        field("Seed", this.inputs.seed),
      ),
      this.ownGroup,
    );
    this.node.addEventListener("submit", (event) => event.preventDefault());
    this.node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("input[type=text]")) event.target.dispatchEvent(new Event("change"));
    });
    this.show();
  }

  text(name) {
    return h("input", { type: "text", value: this.settings[name], onchange: (e) => this.change({ [name]: e.target.value }) });
  }

  numeric(name) {
    const onchange = (e) => this.change({ [name]: number(e.target.value) });
    return h("input", { type: "text", inputmode: "numeric", value: this.settings[name], onchange });
  }

  change(changes) {
    this.settings = { ...this.settings, ...changes };
    this.show();
    this.onchange(this.settings);
  }

  changeData(name) {
    this.change({ data: name, net: this.shelves.data.find((d) => d.name === name)?.net ?? this.settings.net });
  }

  /** Take settings that came from Python; a field being edited is left alone. */
  set(settings) {
    this.settings = structuredClone(settings);
    this.show();
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input !== document.activeElement) input.value = settings[name];
    }
  }

  show() {
    this.folder.hidden = this.settings.data !== "image_folder";
    this.inputs.net.value = this.settings.net;
  }

  /** Offer only the nets that can be built for the data; null: not known yet. */
  fit(nets) {
    const options = this.shelves.nets.map((net) => ({ ...net, disabled: nets !== null && !nets.includes(net.name) }));
    setOptions(this.inputs.net, options.filter((net) => !net.disabled || net.name === this.settings.net), this.settings.net);
  }

  /** Make the controls of the method's hyperparameters. */
  describe({ method, items }) {
    const key = JSON.stringify([method, items]);
    if (key === this.described) return;
    this.described = key;
    this.ownTitle.textContent = `Hyperparameters of ${method}`;
    const make = (item) => field(item.name, this.hyper(item), item.help);
    this.own.replaceChildren(...items.filter((item) => !item.common).map(make));
    this.common.replaceChildren(...items.filter((item) => item.common).map(make));
    this.ownGroup.hidden = items.length === 0;
  }

  waiting(text) {
    if (this.described === null) this.own.replaceChildren(h("p", { class: "ql-muted", text }));
    this.details.hidden = this.described === null;
  }

  hyper(item) {
    const value = item.name in this.settings.hyper ? this.settings.hyper[item.name] : item.default;
    if (item.kind === "bool") {
      const box = h("input", { type: "checkbox", onchange: (e) => this.setHyper(item, e.target.checked) });
      box.checked = Boolean(value);
      return box;
    }
    if (item.kind === "choice") {
      const none = item.optional ? [{ name: "", title: "none" }] : [];
      const options = [...none, ...item.choices.map((choice) => ({ name: String(choice) }))];
      return select(options, value === null ? "" : String(value), (e) => this.setHyper(item, e.target.value));
    }
    const numeric = item.kind === "int" || item.kind === "float";
    return h("input", {
      type: "text",
      inputmode: numeric ? "decimal" : null,
      placeholder: item.optional ? "none" : null,
      value: value ?? "",
      onchange: (e) => this.setHyper(item, numeric ? number(e.target.value) : e.target.value),
    });
  }

  setHyper(item, value) {
    const hyper = { ...this.settings.hyper, [item.name]: value };
    if (value === item.default || (value === "" && item.default === null)) delete hyper[item.name];
    this.change({ hyper });
  }
}
