// Building the page: elements from a tag, properties and children. Text always goes through textContent.

// JupyterLab takes arrow keys and Enter from whatever has the focus in a notebook (its shortcuts have the selector `:focus`),
// unless the element itself carries the attribute `data-lm-suppress-shortcuts`.
const FOCUSABLE = new Set(["input", "select", "button", "summary"]);

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (FOCUSABLE.has(tag)) element.setAttribute("data-lm-suppress-shortcuts", "");
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

let last = 0;

/** A fresh id: several widgets may stand on one page. */
export const uid = (stem) => `ql-${stem}-${(last += 1)}`;

/** A label with its input; the input may be found by `name`. */
export function field(text, input, hint = "") {
  const id = uid("field");
  input.id = id;
  const parts = [h("label", { for: id, text }), input];
  if (hint) {
    input.title = hint;
    input.setAttribute("aria-description", hint);
  }
  return h("div", { class: "ql-field" }, ...parts);
}

export function select(options, value, onchange) {
  const element = h("select", { onchange });
  setOptions(element, options, value);
  return element;
}

export function setOptions(element, options, value) {
  element.replaceChildren(
    ...options.map(({ name, title, disabled }) => {
      const option = h("option", { value: name, text: title ?? name });
      option.disabled = Boolean(disabled);
      return option;
    }),
  );
  element.value = value;
}

/** float32 array of a binary trait (a DataView or an ArrayBuffer, at any offset). */
export function floats(buffer) {
  if (!buffer) return new Float32Array(0);
  const bytes = octets(buffer);
  return new Float32Array(bytes.slice().buffer);
}

export function octets(buffer) {
  return buffer instanceof ArrayBuffer ? new Uint8Array(buffer) : new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength);
}

export const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);
