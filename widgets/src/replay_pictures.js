// The example of a replay and what the attackers made of it, as pictures; the sign of an attacker.

import { h, octets } from "./dom.js";
import { mark, read } from "./replay_plane.js";
import { svg } from "./svg.js";

const PIXELS = 60; // side of a picture on the page
const MORE = [179, 88, 6]; // added to a pixel: orange
const LESS = [84, 39, 136]; // taken from it: purple
const GROUND = [247, 247, 247];

/** The value at a step; a path that ended earlier stands still. */
export const at = (values, t) => values[Math.min(t, values.length - 1)];

/** Line and mark of an attacker. */
export function swatch(slot) {
  const picture = svg("svg", { viewBox: "-15 -6 30 12", "aria-hidden": "true", class: "ql-swatch-line" });
  picture.append(svg("path", { d: "M-15,0H15", class: `ql-curve ql-dash-${slot} ql-run-${slot}` }), mark(0, 0, slot));
  return picture;
}

/** The example, and for each path on view its point at a step with what was added, magnified. */
export function strip({ shape, clean, scale, step: grey, every, deltas }, shown, step, { label, eps }) {
  const base = octets(clean);
  const D = base.length;
  const picture = (caption, words, values, colours) => {
    const canvas = h("canvas", { role: "img", "aria-label": words });
    paint(canvas, shape, values, colours);
    return h("figure", { class: "ql-thumb" }, canvas, h("figcaption", {}, ...caption));
  };
  const pictures = [picture([`class ${label}`], `the example, of class ${label}`, base, grey8)];
  for (const path of shown) {
    if (!deltas[path.name]) continue;
    const t = Math.min(step, path.margin.length - 1);
    const sent = Math.floor(t / every);
    const delta = new Int8Array(octets(deltas[path.name]).slice().buffer).subarray(sent * D, (sent + 1) * D);
    const moved = Float32Array.from(base, (v, i) => v + (grey * delta[i]) / 127);
    const state = path.wrong[t] ? "lost" : "right";
    const biggest = delta.reduce((most, v) => Math.max(most, Math.abs(v)), 0) / 127;
    const magnified = `what ${path.title} added, magnified: at most ${read(biggest * scale)}, ε is ${read(eps)}`;
    pictures.push(
      h(
        "div",
        { class: "ql-pair" },
        picture([swatch(path.slot), state], `${path.title} at step ${t}: the class is ${state}`, moved, grey8),
        picture([biggest ? `change × ${read(127 / grey, 2)}` : "no change"], magnified, delta, diverging),
      ),
    );
  }
  return pictures;
}

export const grey8 = (value) => {
  const v = Math.min(255, Math.max(0, value));
  return [v, v, v];
};

export const diverging = (value) => {
  const t = Math.abs(value) / 127;
  const end = value < 0 ? LESS : MORE;
  return GROUND.map((g, c) => g + t * (end[c] - g));
};

/** Paint one picture (C, H, W). Three channels of a picture are its colours; of what was added, their mean is shown. */
export function paint(canvas, [channels, rows, columns], values, colours) {
  const size = rows * columns;
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.width = `${Math.round((PIXELS * columns) / Math.max(rows, columns))}px`;
  canvas.style.height = `${Math.round((PIXELS * rows) / Math.max(rows, columns))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let p = 0; p < size; p += 1) {
    const parts = Array.from({ length: channels }, (_, c) => values[c * size + p]);
    const rgb = channels === 3 && colours === grey8 ? parts : colours(parts.reduce((sum, v) => sum + v, 0) / channels);
    image.data.set([...rgb.map((v) => Math.min(255, Math.max(0, Math.round(v)))), 255], 4 * p);
  }
  context.putImageData(image, 0, 0);
}
