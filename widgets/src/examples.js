// What the net has to learn: one picture per class, or the points of a planar set.

import { extent } from "d3-array";
import { scaleLinear } from "d3-scale";

import { floats, h, octets } from "./dom.js";

const SIDE = 40; // CSS pixels of a picture

export function examples(preview) {
  if (preview.pixels) return pictures(preview);
  if (preview.points) return points(preview);
  return h("p", { class: "ql-muted", text: `${preview.data}: examples are shown once the files have been read, after Train.` });
}

function pictures({ pixels, shape, labels, classes, data }) {
  const [channels, rows, columns] = shape;
  const all = octets(pixels);
  const size = channels * rows * columns;
  const strip = h("ul", { class: "ql-strip", "aria-label": `One example per class of ${data}` });
  labels.forEach((label, n) => {
    const canvas = h("canvas", { width: columns, height: rows, role: "img", "aria-label": `example of class ${classes[label]}` });
    canvas.style.width = canvas.style.height = `${SIDE}px`;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    for (let p = 0; p < rows * columns; p += 1) {
      for (let c = 0; c < 3; c += 1) image.data[4 * p + c] = all[n * size + Math.min(c, channels - 1) * rows * columns + p];
      image.data[4 * p + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    strip.append(h("li", {}, canvas, h("span", { text: classes[label] })));
  });
  return strip;
}

const SHAPES = ["●", "△", "■", "◇", "✚", "▽"]; // classes are not told apart by colour alone

function points({ points: buffer, labels, classes, data }) {
  const xy = floats(buffer);
  const canvas = h("canvas", { width: 480, height: 240, role: "img", class: "ql-plane" });
  canvas.setAttribute("aria-label", `${labels.length} points of ${data} in the plane; classes ${classes.join(", ")}`);
  canvas.style.width = "240px";
  const context = canvas.getContext("2d");
  const x = scaleLinear(extent(xy.filter((_, i) => i % 2 === 0)), [12, 468]);
  const y = scaleLinear(extent(xy.filter((_, i) => i % 2 === 1)), [228, 12]);
  context.font = "14px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  const style = getComputedStyle(document.body);
  labels.forEach((label, i) => {
    context.fillStyle = label % 2 ? "#e69f00" : style.getPropertyValue("--jp-ui-font-color1") || "#333";
    context.fillText(SHAPES[label % SHAPES.length], x(xy[2 * i]), y(xy[2 * i + 1]));
  });
  return h("div", { class: "ql-strip" }, canvas);
}
