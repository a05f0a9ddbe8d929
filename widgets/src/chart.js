// A small line chart: curves told apart by dash and direct label as well as by colour.

import { extent, max, min } from "d3-array";
import { axisBottom, axisLeft } from "d3-axis";
import { format } from "d3-format";
import { scaleLinear, scaleLog, scaleSymlog } from "d3-scale";
import { select } from "d3-selection";
import { line } from "d3-shape";

import { h } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 176;
const WIDE = 10; // reach of latent weights from which on the bins of qlab.live are logarithmic
const MARGIN = { top: 8, right: 114, bottom: 34, left: 46 };
const LINE_HEIGHT = 13;

export class Frame {
  /** A titled drawing with axes. */
  constructor(title, xTitle) {
    this.title = title;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-label", title);
    this.node = h("figure", { class: "ql-chart" }, h("figcaption", { text: title }), this.svg);
    this.root = select(this.svg);
    this.marks = this.root.append("g").attr("class", "ql-marks");
    this.xAxis = this.root.append("g").attr("class", "ql-axis");
    this.yAxis = this.root.append("g").attr("class", "ql-axis");
    this.xTitle = this.root.append("text").attr("class", "ql-axis-title").attr("text-anchor", "middle").text(xTitle);
    this.empty = this.root.append("text").attr("class", "ql-empty").attr("text-anchor", "middle");
    this.content = null;
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.node);
  }

  get width() {
    return Math.max(220, this.node.clientWidth);
  }

  get inner() {
    return { x0: MARGIN.left, x1: this.width - MARGIN.right, y0: HEIGHT - MARGIN.bottom, y1: MARGIN.top };
  }

  update(content) {
    this.content = content;
    this.draw();
  }

  draw() {
    if (this.content === null || !this.node.isConnected) return;
    this.root.attr("viewBox", `0 0 ${this.width} ${HEIGHT}`).attr("height", HEIGHT);
    const { x0, x1 } = this.inner;
    this.xTitle.attr("x", (x0 + x1) / 2).attr("y", HEIGHT - 3);
    this.paint(this.content);
  }

  axes(x, y, yFormat, xTicks = null) {
    const { x0, x1, y0 } = this.inner;
    const bottom = axisBottom(x).tickSizeOuter(0);
    if (xTicks === null) bottom.ticks(Math.max(2, Math.floor((x1 - x0) / 60)));
    else bottom.tickValues(xTicks).tickFormat(format("~s"));
    this.xAxis.attr("transform", `translate(0,${y0})`).call(bottom);
    this.yAxis.attr("transform", `translate(${x0},0)`).call(axisLeft(y).ticks(4, yFormat).tickSizeOuter(0));
  }

  /** Say why there is nothing to see; an empty text where there is. */
  explain(text) {
    const { x0, x1, y0, y1 } = this.inner;
    this.empty.attr("x", (x0 + x1) / 2).attr("y", (y0 + y1) / 2).text(text);
    this.xAxis.classed("ql-blank", text !== "");
  }

  say(text) {
    this.svg.setAttribute("aria-label", `${this.title}. ${text}`);
  }

  close() {
    this.observer.disconnect();
  }
}

export class LineChart extends Frame {
  /**
   * @param title of the chart
   * @param options yFormat, readFormat: d3 formats of ticks and labels; log: use a log axis where values span it;
   *   ceiling: top of the axis
   */
  constructor(title, options) {
    super(title, "step");
    this.options = options;
  }

  /** content: {curves: [{label, short, slot, dashed, x, y}], references: [{label, value}], absent: text where no curves are} */
  paint({ curves, references = [], absent = "" }) {
    const { x0, x1, y0, y1 } = this.inner;
    const filled = curves.filter((curve) => curve.x.length > 0);
    const x = scaleLinear([0, max(filled, (c) => max(c.x)) || 1], [x0, x1]);
    const { y, log } = this.scale(filled, references, [y0, y1]);
    const visible = (value) => Number.isFinite(value) && (!log || value > 0);
    this.axes(x, y, this.options.yFormat);
    this.explain(filled.length ? "" : absent);

    const path = line()
      .defined(([, value]) => visible(value))
      .x(([step]) => x(step))
      .y(([, value]) => y(value));
    this.marks
      .selectAll("path")
      .data(filled, (c) => c.label)
      .join("path")
      .attr("class", (c) => `ql-line ql-run-${c.slot}${c.dashed ? " ql-dashed" : ""}`)
      .attr("data-series", (c) => c.label)
      .attr("data-points", (c) => c.x.length)
      .attr("d", (c) => path(Array.from(c.x, (step, i) => [step, c.y[i]])));
    this.marks // a curve of one point would be invisible
      .selectAll("circle")
      .data(filled.filter((c) => c.x.length === 1 && visible(c.y[0])))
      .join("circle")
      .attr("class", (c) => `ql-dot ql-run-${c.slot}`)
      .attr("r", 3)
      .attr("cx", (c) => x(c.x[0]))
      .attr("cy", (c) => y(c.y[0]));
    this.marks
      .selectAll("line")
      .data(references)
      .join("line")
      .attr("class", "ql-reference")
      .attr("x1", x0)
      .attr("x2", x1)
      .attr("y1", (r) => y(r.value))
      .attr("y2", (r) => y(r.value));
    this.labels(filled, references, x, y, visible);
    const read = format(this.options.readFormat);
    const parts = filled.map((c) => `${c.label}: ${read(c.y.at(-1))} at step ${c.x.at(-1)}`);
    this.say([...parts, ...references.map((r) => `${r.label}: ${read(r.value)}`)].join("; ") || "Nothing recorded yet.");
  }

  scale(curves, references, range) {
    const values = curves.flatMap((c) => Array.from(c.y)).filter(Number.isFinite);
    const positive = values.filter((v) => v > 0);
    if (this.options.log && positive.length > 1 && max(positive) / min(positive) > 20) {
      return { y: scaleLog(extent(positive), range).nice(), log: true };
    }
    const all = [...values, ...references.map((r) => r.value)];
    const top = this.options.ceiling ?? (max(all) || 1);
    const bottom = this.options.ceiling === undefined ? 0 : Math.max(0, Math.floor(10 * ((min(all) ?? 0) - 0.02)) / 10);
    return { y: scaleLinear([Math.min(0, min(all) ?? 0, bottom) || bottom, top], range).nice(4), log: false };
  }

  /** Names at the ends of the lines, pushed apart where they would overlap. */
  labels(curves, references, x, y, visible) {
    const { x1, y0, y1 } = this.inner;
    const read = format(this.options.readFormat);
    const items = curves
      .filter((c) => visible(c.y.at(-1)))
      .map((c) => ({ text: `${c.short} ${read(c.y.at(-1))}`, class: `ql-run-${c.slot}`, y: y(c.y.at(-1)) }))
      .concat(references.map((r) => ({ text: r.label, class: "ql-muted", y: y(r.value) })))
      .sort((a, b) => a.y - b.y);
    let floor = y1;
    for (const item of items) floor = (item.y = Math.max(item.y, floor)) + LINE_HEIGHT;
    let ceiling = y0 + 4;
    for (const item of items.toReversed()) ceiling = (item.y = Math.min(item.y, ceiling)) - LINE_HEIGHT;
    this.marks
      .selectAll("text")
      .data(items)
      .join("text")
      .attr("class", (item) => `ql-label ${item.class}`)
      .attr("x", x1 + 6)
      .attr("y", (item) => item.y)
      .attr("dy", "0.32em")
      .text((item) => item.text);
  }
}

export class Histogram extends Frame {
  /** Latent weights: filled for one net, outlines for several; the deployed levels stand as dotted lines. */
  constructor(title) {
    super(title, "latent weight");
  }

  /** content: {histograms: [{label, slot, edges, share, levels, weights}], absent: text where there are none} */
  paint({ histograms, absent = "" }) {
    const { x0, x1, y0, y1 } = this.inner;
    const reach = max(histograms, (d) => max(d.edges)) || 1;
    const wide = reach > WIDE;
    const x = (wide ? scaleSymlog().constant(1) : scaleLinear()).domain([-reach, reach]).range([x0, x1]);
    const y = scaleLinear([0, max(histograms, (d) => max(d.share)) || 1], [y0, y1]).nice(4);
    this.axes(x, y, ".0%", wide ? decades(reach) : null);
    this.explain(histograms.length ? "" : absent);
    const outline = (d) => {
      const corners = [`M${x(d.edges[0])},${y0}`];
      d.share.forEach((share, i) => corners.push(`L${x(d.edges[i])},${y(share)}`, `L${x(d.edges[i + 1])},${y(share)}`));
      return `${corners.join("")}L${x(d.edges.at(-1))},${y0}`;
    };
    const only = histograms.length === 1;
    this.marks
      .selectAll("path")
      .data(histograms, (d) => d.label)
      .join("path")
      .attr("class", (d) => `ql-outline ql-run-${d.slot}${only ? " ql-filled" : ""}`)
      .attr("data-series", (d) => d.label)
      .attr("d", outline);
    const levels = [...new Set(histograms.flatMap((d) => Array.from(d.levels)))].sort((a, b) => a - b);
    this.marks
      .selectAll("line")
      .data(levels)
      .join("line")
      .attr("class", "ql-level")
      .attr("x1", x)
      .attr("x2", x)
      .attr("y1", y0)
      .attr("y2", y1);
    const named = levels.length <= 4 ? levels.map((v) => ({ text: format("+.3~g")(v), x: x(v) + (v < 0 ? -20 : 3), y: y1 + 4 })) : [];
    const items = [
      ...named.map((d) => ({ ...d, class: "ql-muted" })),
      ...histograms.map((d, i) => ({ text: d.label, class: `ql-run-${d.slot}`, x: x1 + 12, y: y1 + 24 + LINE_HEIGHT * i })),
    ];
    this.marks
      .selectAll("text")
      .data(items)
      .join("text")
      .attr("class", (item) => `ql-label ${item.class}`)
      .attr("x", (item) => item.x)
      .attr("y", (item) => item.y)
      .attr("dy", "0.32em")
      .text((item) => item.text);
    const parts = histograms.map((d) => {
      const positive = d.share.reduce((sum, s, i) => sum + (d.edges[i] + d.edges[i + 1] > 0 ? s : 0), 0);
      const top = d.share.indexOf(max(d.share));
      const mode = format(".2~g")((d.edges[top] + d.edges[top + 1]) / 2);
      return `${d.label}: ${d.weights} weights, ${format(".0%")(positive)} of them positive, most of them near ${mode}`;
    });
    const grid = levels.length ? ` Deployed levels: ${levels.map(format("+.3~g")).join(", ")}.` : "";
    this.say((parts.join("; ") || "Nothing recorded yet") + "." + grid);
  }
}

/** Ticks of a symmetric log axis: 0 and powers of ten from 10 up to the reach, thinned to a handful. */
function decades(reach) {
  const powers = Array.from({ length: Math.floor(Math.log10(reach)) }, (_, i) => 10 ** (i + 1));
  const kept = powers.filter((_, i) => i % Math.ceil(powers.length / 3) === 0);
  return [...kept.map((v) => -v).reverse(), 0, ...kept];
}
