// The strip of examples: each is a button with the example, what was found for each net, and the change magnified.

import { h, octets } from "./dom.js";
import { diverging, grey8, paint } from "./replay_pictures.js";
import { minus } from "./svg.js";

const read = (value, digits = 3) => (value === null || value === undefined ? "–" : minus(Number(value.toPrecision(digits))));

/** What became of an example: a mark and a word, so that it is not told by colour alone. */
export function fate(net, i) {
  if (!net.clean[i]) return ["○", "wrong from the start"];
  if (net.broken[i]) return ["✗", "broken"];
  return net.tried ? ["✓", "held"] : ["…", "not attacked yet"];
}

/** page: as Python sends it; chosen: number of the example that is looked at. */
export function strip(page, chosen, swatch, onpick) {
  const { first, labels, shape, nets, factor } = page;
  const heads = [h("span", { class: "ql-cell-head", text: "example" })];
  for (const net of nets) {
    heads.push(h("span", { class: "ql-cell-head" }, swatch(net.slot), `${net.name}: found`));
    if (shape.length) heads.push(h("span", { class: "ql-cell-head" }, swatch(net.slot), `change × ${read(factor, 2)}`));
  }
  const head = h("div", { class: "ql-column ql-heads", "aria-hidden": "true" }, ...heads);
  return [head, ...labels.map((label, i) => column(page, i, first + i, label, first + i === chosen, onpick))];
}

function column({ shape, clean, nets }, i, number, label, chosen, onpick) {
  const size = shape.reduce((product, v) => product * v, 1);
  const cells = [cell(shape, clean && part(octets(clean), i, size), grey8, `${label}`)];
  const words = [];
  for (const net of nets) {
    const [sign, word] = fate(net, i);
    const said = net.worst_said[i];
    words.push(`${net.name}: ${word}, the net says ${said}`);
    cells.push(cell(shape, net.adversarial && part(octets(net.adversarial), i, size), grey8, `${sign} says ${said}`));
    if (!shape.length) continue;
    const distance = net.broken[i] && net.clean[i] ? `at ${read(net.distance[i])}` : word === "held" ? "held" : "–";
    cells.push(cell(shape, net.delta && part(new Int8Array(octets(net.delta).slice().buffer), i, size), diverging, distance));
  }
  const attributes = { class: `ql-column${chosen ? " ql-chosen" : ""}`, "data-example": number, "aria-pressed": String(chosen), "aria-label": `example ${number}, label ${label}. ${words.join(". ")}` };
  return h("button", { ...attributes, onclick: () => onpick(number) }, h("span", { class: "ql-cell-text", text: `#${number}` }), ...cells);
}

const part = (values, i, size) => values.subarray(i * size, (i + 1) * size);

function cell(shape, values, colours, text) {
  const parts = [];
  if (shape.length && values) {
    const canvas = h("canvas", { "aria-hidden": "true" });
    paint(canvas, shape, values, colours);
    parts.push(canvas);
  }
  return h("span", { class: "ql-cell" }, ...parts, h("span", { class: "ql-cell-text", text }));
}

/** All that is known of one example, a table for each net. */
export function detail({ example, label, nets }, swatch, eps) {
  if (example === undefined) return [];
  const tables = nets.map((net) => {
    const heads = ["ε", "state", "broken by", "distance", "says", "margin"];
    const row = (cells, now = false) => h("tr", { class: now ? "ql-now" : null }, h("th", { scope: "row", text: cells[0] }), ...cells.slice(1).map((text) => h("td", { text })));
    const rows = net.rows.map((r) => {
      const state = !net.right ? "○ wrong from the start" : r.broken ? "✗ broken" : r.tried ? "✓ held" : "… not attacked yet";
      const by = net.right ? r.by : "";
      return row([read(r.eps), state, by || "–", r.broken && net.right ? read(r.distance) : "–", String(r.said), read(r.margin)], r.eps === eps);
    });
    return h(
      "section",
      {},
      h("h4", {}, swatch(net.slot), net.name),
      h("p", { text: net.story }),
      h(
        "div",
        { class: "ql-scroll" },
        h(
          "table",
          { class: "ql-detail" },
          h("caption", { class: "ql-hidden", text: `example ${example} and ${net.name}, by radius` }),
          h("thead", {}, h("tr", {}, ...heads.map((text) => h("th", { scope: "col", text })))),
          h("tbody", {}, row(["none", net.right ? "✓ right" : "○ wrong", "–", "–", String(net.said), read(net.margin)]), ...rows),
        ),
      ),
    );
  });
  return [h("h4", { text: `Example ${example}, label ${label}: what broke it` }), h("div", { class: "ql-columns" }, ...tables)];
}
