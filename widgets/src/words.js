// Packed words: reading their bits, the picture of a layer's weights, the rows of one word.

import { h, octets, uid } from "./dom.js";

const CELL = 3; // CSS pixels of one bit in the picture
const DOTTED = 2 ** 20; // bits up to which every bit gets CELL x CELL pixels of its own, room for a mark
const DARK = [0, 82, 127];
const LIGHT = [244, 241, 230];
const GREYS = [[158, 158, 158], [255, 255, 255]]; // padding is grey with a white dot, or where there is no room for one, speckled

/** Words as pairs of 32-bit halves: JavaScript has no integers of 64 bits that are quick. */
export function halves(buffer) {
  const bytes = octets(buffer);
  return new Uint32Array(bytes.slice().buffer);
}
export const bitOf = (words, word, i) => (words[2 * word + (i >> 5)] >>> (i & 31)) & 1;
export const ints = (buffer) => new Int32Array(octets(buffer).slice().buffer);

export class Picture {
  /** The weights of a layer, a row per unit; `onpick` is called with the unit that was clicked. */
  constructor(onpick) {
    this.note = h("p", { class: "ql-muted", id: uid("note") });
    this.canvas = h("canvas", { class: "ql-picture", role: "img", "aria-describedby": this.note.id });
    this.frame = h("div", { class: "ql-frame" });
    this.scroll = h("div", { class: "ql-scroll" }, h("div", { class: "ql-sheet" }, this.canvas, this.frame));
    this.canvas.addEventListener("click", (event) => onpick(Math.floor(event.offsetY / CELL)));
    this.node = h("div", {}, this.scroll, this.note);
  }

  draw({ words: buffer, used: mask, units, width, summary }) {
    const words = halves(buffer);
    const used = halves(mask);
    const each = used.length / 2; // words of a tap: the pattern of used bits repeats with it
    const bits = 64 * width;
    const cell = bits * units <= DOTTED ? CELL : 1;
    this.canvas.width = bits * cell;
    this.canvas.height = units * cell;
    this.canvas.style.width = `${bits * CELL}px`;
    this.canvas.style.height = `${units * CELL}px`;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(this.canvas.width, this.canvas.height);
    for (let unit = 0; unit < units; unit += 1) {
      for (let i = 0; i < bits; i += 1) {
        const word = i >> 6;
        const counts = bitOf(used, word % each, i & 63);
        const sign = counts && (bitOf(words, unit * width + word, i & 63) ? DARK : LIGHT);
        for (let p = 0; p < cell * cell; p += 1) {
          const row = Math.floor(p / cell);
          const dot = cell === 1 ? (unit + i) % 4 === 0 : p === 4;
          image.data.set(sign || GREYS[Number(dot)], 4 * ((unit * cell + row) * bits * cell + i * cell + (p % cell)));
          image.data[4 * ((unit * cell + row) * bits * cell + i * cell + (p % cell)) + 3] = 255;
        }
      }
    }
    context.putImageData(image, 0, 0);
    this.canvas.setAttribute("aria-label", summary);
  }

  mark(unit, { units, width, left_out: [rows, columns] }) {
    this.frame.hidden = unit >= units;
    this.frame.style.top = `${unit * CELL}px`;
    const top = unit * CELL;
    if (top < this.scroll.scrollTop || top > this.scroll.scrollTop + this.scroll.clientHeight - 12) this.scroll.scrollTop = top - 40;
    const more = [rows ? `${rows} more units` : "", columns ? `${columns} more words of each` : ""].filter(Boolean).join(" and ");
    this.note.textContent =
      `One row is one unit, ${64 * width} bits; the framed one is unit ${unit}. Grey with white dots: padding, which never counts.` +
      (more ? ` Not drawn: ${more}.` : "");
  }
}

const ROWS = [
  ["activation", "activations", "−", "+"],
  ["weight", "weights", "−", "+"],
  ["xor", "xor: where they differ", "≠", "="],
];

/** The three rows of word t: `data` holds the words as halves. */
export function wordRows(data, t) {
  return ROWS.map(([name, label, one, zero]) => {
    const cells = h("div", { class: "ql-cells", role: "img" });
    let ones = 0;
    let count = 0;
    for (let i = 0; i < 64; i += 1) {
      const counts = bitOf(data.counted, t, i);
      const bit = bitOf(data[name], t, i);
      ones += counts && bit;
      count += counts;
      cells.append(h("span", { class: counts ? `ql-bit-${name === "xor" ? "x" : "s"}${bit}` : "ql-bit-none", text: counts ? (bit ? one : zero) : "·" }));
    }
    cells.setAttribute("aria-label", `${label}, word ${t + 1}: ${ones} of ${count} are ${name === "xor" ? "different" : "minus one"}`);
    return h("div", { class: "ql-bits" }, h("span", { class: "ql-muted", text: label }), cells);
  });
}
