// A layer's weights at every recorded step, as a picture: unpacked here, so that the slider needs no kernel.

import { h, octets } from "./dom.js";

const WIDTH = 420; // CSS pixels that the picture fills, about
const COLOURS = { low: [38, 50, 56], high: [244, 239, 225], up: [255, 196, 0], down: [200, 60, 0], edge: [158, 158, 158] };

const aligned = (buffer, Kind) => new Kind(octets(buffer).slice().buffer);

export class Film {
  constructor(content) {
    Object.assign(this, content);
    this.at = aligned(content.steps, Int32Array);
    this.counts = aligned(content.counts, Uint16Array);
    this.bytes = octets(content.bits);
    this.size = this.rows * this.columns;
    this.stride = this.plane * this.planes;
  }

  /** The number of the frame that holds at a step. */
  frame(step) {
    let [low, high] = [0, this.at.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.at[middle] <= step) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Code of a weight in a frame: 0 is the highest level. */
  code(frame, i) {
    let code = 0;
    for (let p = 0; p < this.planes; p += 1) code |= ((this.bytes[frame * this.stride + p * this.plane + (i >> 3)] >> (i & 7)) & 1) << p;
    return code;
  }

  value(code) {
    return this.levels[this.levels.length - 1 - code];
  }

  name(i) {
    const index = [];
    for (const size of [...this.shape].reverse()) {
      index.unshift(i % size);
      i = Math.floor(i / size);
    }
    return `[${index.join(", ")}]`;
  }

  /** Weights that differ from the frame before. */
  flips(frame) {
    const found = [];
    if (frame > 0) for (let i = 0; i < this.size; i += 1) if (this.code(frame, i) !== this.code(frame - 1, i)) found.push(i);
    return found;
  }
}

export class FilmPicture {
  constructor() {
    this.canvas = h("canvas", { role: "img", class: "ql-picture" });
    this.node = h("div", { class: "ql-scroll" }, this.canvas);
  }

  /** Draw a frame; `mode` is "signs" or "counts". Returns the weights that flipped in it. */
  draw(film, frame, mode) {
    const cell = Math.max(1, Math.min(12, Math.floor(WIDTH / film.columns)));
    this.canvas.width = film.columns;
    this.canvas.height = film.rows;
    this.canvas.style.width = `${film.columns * cell}px`;
    this.canvas.style.height = `${film.rows * cell}px`;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(film.columns, film.rows);
    const flipped = film.flips(frame);
    const top = film.levels.length - 1;
    const most = Math.max(1, ...film.counts);
    const paint = (i, rgb) => image.data.set([...rgb, 255], 4 * i);
    for (let i = 0; i < film.size; i += 1) {
      const share = mode === "counts" ? Math.sqrt(film.counts[i] / most) : 1 - film.code(frame, i) / top;
      paint(i, COLOURS.low.map((dark, c) => dark + share * (COLOURS.high[c] - dark)));
    }
    if (mode === "signs") for (const i of flipped) paint(i, film.code(frame, i) < film.code(frame - 1, i) ? COLOURS.up : COLOURS.down);
    context.putImageData(image, 0, 0);
    const negative = mode === "signs" ? Array.from({ length: film.size }, (_, i) => film.value(film.code(frame, i)) < 0).filter(Boolean).length : 0;
    const said =
      mode === "signs"
        ? `${film.layer} at step ${film.at[frame]}: ${negative} of ${film.size} weights are negative, ${flipped.length} flipped since the frame before`
        : `${film.layer}: how often each of ${film.size} weights flipped, at most ${most} times`;
    this.canvas.setAttribute("aria-label", said);
    return flipped;
  }
}
