// Latencies over the last minutes, on a logarithmic scale.

import { element, setAttribute, setText } from "./dom.js";
import { latency } from "./format.js";
import { KEPT_SECONDS } from "./measurements.js";

// Told apart by dashes as well as by colour.
const LINES = [
  { name: "read", label: "reads", colour: "--read", dash: [] },
  { name: "write", label: "writes", colour: "--write", dash: [6, 3] },
  { name: "flush", label: "flushes", colour: "--flush", dash: [2, 3] },
];
const HEIGHT = 180;
const MARGIN = { left: 56, right: 12, top: 10, bottom: 22 };
const SPANS = [120, 300, KEPT_SECONDS]; // seconds shown: the first that has all points
const NARROW = 480;
const LONGEST_GAP = 20; // seconds, over which no line is drawn

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A canvas in device pixels, drawn on in CSS pixels.
export function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export class LatencyChart {
  constructor(parent) {
    this.points = [];
    this.canvas = element("canvas", { role: "img", "aria-label": "Latency over time" });
    this.values = new Map();
    const legend = element("ul", { class: "keys" });
    for (const line of LINES) {
      const value = element("b");
      this.values.set(line.name, value);
      const key = element("i", { class: `key ${line.name}`, "aria-hidden": "true" });
      legend.append(element("li", {}, key, `${line.label} `, value));
    }
    parent.replaceChildren(this.canvas, legend);
    new ResizeObserver(() => this.draw()).observe(parent);
  }

  show(points) {
    this.points = points;
    for (const [name, node] of this.values) setText(node, latency(points.at(-1)?.[name]));
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (width === 0) return;
    const context = prepare(this.canvas, width, HEIGHT);
    const plot = {
      left: MARGIN.left,
      top: MARGIN.top,
      width: width - MARGIN.left - MARGIN.right,
      height: HEIGHT - MARGIN.top - MARGIN.bottom,
    };
    const values = this.points.flatMap((point) =>
      LINES.map((line) => point[line.name]).filter((value) => value !== null),
    );
    const empty = values.length === 0;
    const low = empty ? -4 : Math.floor(Math.log10(Math.min(...values)) + 1e-9);
    const high = Math.max(low + 2, empty ? -1 : Math.ceil(Math.log10(Math.max(...values)) - 1e-9));
    const y = (value) =>
      plot.top + plot.height * (1 - (Math.log10(value) - low) / (high - low));
    const now = Date.now() / 1000;
    const age = empty ? 0 : now - this.points[0].time;
    const span = SPANS.find((seconds) => age <= seconds) ?? KEPT_SECONDS;
    const x = (time) => plot.left + plot.width * (1 - (now - time) / span);
    this.drawGrid(context, plot, low, high, y);
    this.drawTimes(context, plot, span, width);
    if (empty) {
      context.fillStyle = colour("--soft");
      context.textAlign = "center";
      const middle = [plot.left + plot.width / 2, plot.top + plot.height / 2];
      context.fillText("no requests since this page was opened", ...middle);
    }
    for (const line of LINES) this.drawLine(context, line, x, y);
    const said = LINES.map((line) => `${line.label} ${this.values.get(line.name).textContent}`);
    setAttribute(this.canvas, "aria-label", `Latency now: ${said.join(", ")}`);
  }

  drawGrid(context, plot, low, high, y) {
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colour("--soft");
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let power = low; power <= high; power += 1) {
      const at = Math.round(y(10 ** power)) + 0.5;
      context.beginPath();
      context.moveTo(plot.left, at);
      context.lineTo(plot.left + plot.width, at);
      context.stroke();
      context.fillText(latency(10 ** power), plot.left - 8, at);
    }
  }

  drawTimes(context, plot, span, width) {
    const bottom = plot.top + plot.height + 8;
    const parts = width < NARROW ? 2 : span === 120 ? 4 : 5;
    context.textBaseline = "top";
    for (let part = 0; part <= parts; part += 1) {
      const seconds = span * (1 - part / parts);
      context.textAlign = part === 0 ? "left" : part === parts ? "right" : "center";
      const at = plot.left + (plot.width * part) / parts;
      const text = seconds % 60 === 0 ? `−${seconds / 60} min` : `−${seconds} s`;
      context.fillText(part === parts ? "now" : text, at, bottom);
    }
  }

  drawLine(context, line, x, y) {
    context.strokeStyle = context.fillStyle = colour(line.colour);
    context.lineWidth = 1.75;
    context.setLineDash(line.dash);
    context.beginPath();
    let before = null;
    for (const point of this.points) {
      const value = point[line.name];
      if (value === null) {
        before = null;
        continue;
      }
      const place = [x(point.time), y(value)];
      if (before === null || point.time - before > LONGEST_GAP) {
        context.moveTo(...place);
        context.lineTo(place[0] + 0.01, place[1]);
      } else context.lineTo(...place);
      before = point.time;
    }
    context.lineJoin = "round";
    context.lineCap = "round";
    context.stroke();
    context.setLineDash([]);
  }
}
