// The map of a volume: a square for each cell, coloured by the layer that holds most of it.

import { colour, prepare } from "./chart.js";
import { element, setAttribute, setText } from "./dom.js";
import { bytes, percent } from "./format.js";

export const CELLS = 1024;

const HINT = "Point at a square, or move with the arrow keys, to see what it holds.";
const LEAST = 7; // CSS pixels of a cell, with its gap
const MOST = 26;
const HEIGHT = 340; // at most about so many CSS pixels, where cells need not be smaller than LEAST

// Old layers are blue, light to dark; what no backup has yet is orange: a pair that the colour-blind
// tell apart, and the lightness differs within each.
const RAMPS = {
  light: { kept: [[158, 202, 235], [8, 48, 107]], changed: [[245, 166, 35], [190, 80, 0]] },
  dark: { kept: [[44, 92, 150], [170, 214, 247]], changed: [[214, 110, 10], [255, 190, 92]] },
};

function dark() {
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

// The colours of the layers of a map, oldest first.
export function layerColours(layers) {
  const ramps = dark() ? RAMPS.dark : RAMPS.light;
  const colours = [];
  for (const changed of [false, true]) {
    const members = layers.filter((layer) => layer.changed === changed);
    const [from, to] = changed ? ramps.changed : ramps.kept;
    members.forEach((_, at) => {
      const part = members.length === 1 ? 0.5 : at / (members.length - 1);
      colours.push(from.map((value, index) => Math.round(value + part * (to[index] - value))));
    });
  }
  return colours; // the changed ones are the newest, so this is in the order of the layers
}

export function layerName(layers, number) {
  const layer = layers[number];
  if (number === layers.length - 1) return "the head";
  if (layer.snapshots.length > 0) return `the layer of snapshot ${layer.snapshots.join(", ")}`;
  return `layer ${layer.layer}`;
}

export class LayerMap {
  constructor(parent) {
    this.document = null;
    this.highlighted = null;
    this.cursor = null;
    this.cells = new Map();
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "img",
      onpointermove: (event) => this.point(event),
      onpointerleave: () => this.select(null),
      onblur: () => this.select(null),
      onkeydown: (event) => this.move(event),
    });
    this.said = element("p", { class: "said", "aria-live": "polite" }, HINT);
    parent.replaceChildren(this.canvas, this.said);
    new ResizeObserver(() => this.draw()).observe(parent);
  }

  show(document) {
    this.document = document;
    this.count = Math.ceil(document.size / document.cell_size);
    this.cells = new Map(document.cells.map((cell) => [cell.offset / document.cell_size, cell]));
    if (this.cursor !== null && this.cursor >= this.count) this.cursor = null;
    const changed =
      document.changed === null ? "" : `, ${bytes(document.changed)} since the last backup`;
    setAttribute(
      this.canvas,
      "aria-label",
      `Map of ${document.volume}: ${bytes(document.mapped)} of ${bytes(document.size)} hold data` +
        `${changed}. The arrow keys move from cell to cell.`,
    );
    this.draw();
  }

  // Show one layer's cells only; null: all.
  highlight(layer) {
    if (this.highlighted !== layer) {
      this.highlighted = layer;
      this.draw();
    }
  }

  layOut() {
    const width = this.canvas.clientWidth;
    const fitting = Math.sqrt((width * HEIGHT) / this.count);
    const wanted = Math.min(MOST, Math.max(LEAST, Math.floor(fitting)));
    // As many columns as make rows begin at round offsets.
    this.columns = 2 ** Math.ceil(Math.log2(Math.max(1, width / wanted)));
    if (width / this.columns < LEAST) this.columns /= 2;
    this.pitch = Math.min(MOST, width / this.columns);
    return { width, height: Math.ceil(this.count / this.columns) * this.pitch };
  }

  draw() {
    if (this.document === null || this.canvas.clientWidth === 0) return;
    const { width, height } = this.layOut();
    const context = prepare(this.canvas, width, height);
    const colours = layerColours(this.document.layers);
    const empty = colour("--empty");
    for (let number = 0; number < this.count; number += 1) {
      const box = this.boxOf(number);
      context.globalAlpha = 1;
      context.fillStyle = empty;
      context.fillRect(box.left, box.top, box.width, box.height);
      const cell = this.cells.get(number);
      if (cell !== undefined) this.fill(context, cell, colours, box);
    }
    if (this.cursor !== null) {
      context.globalAlpha = 1;
      context.strokeStyle = colour("--text");
      context.lineWidth = 2;
      const { left, top, width: wide, height: high } = this.boxOf(this.cursor);
      context.strokeRect(left + 1, top + 1, wide - 2, high - 2);
    }
  }

  // Where a cell is drawn: whole pixels, or its edges would be blurred.
  boxOf(number) {
    const gap = this.pitch > 9 ? 2 : 1;
    const edge = (step) => Math.round(step * this.pitch);
    const [column, row] = [number % this.columns, Math.floor(number / this.columns)];
    const [left, top] = [edge(column), edge(row)];
    return { left, top, width: edge(column + 1) - gap - left, height: edge(row + 1) - gap - top };
  }

  // The fuller a cell is, the more of it is coloured.
  fill(context, cell, colours, { left, top, width, height }) {
    const alpha = this.highlighted === null || this.highlighted === cell.layer ? 1 : 0.15;
    const [red, green, blue] = colours[cell.layer];
    context.globalAlpha = alpha * 0.3; // so that little is seen, too
    context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
    context.fillRect(left, top, width, height);
    context.globalAlpha = alpha;
    const part = Math.min(1, cell.mapped / this.lengthOf(cell));
    const high = Math.max(2, Math.round(height * part));
    context.fillRect(left, top + height - high, width, high);
    if (cell.changed === 0 || this.document.layers[cell.layer].changed) return;
    // Some of it was written since the last backup, though not most.
    const mark = Math.max(3, width / 2);
    const [r, g, b] = colours.at(-1);
    context.globalAlpha = this.highlighted === null ? 1 : 0.15;
    context.fillStyle = `rgb(${r}, ${g}, ${b})`;
    context.beginPath();
    context.moveTo(left + width - mark, top);
    context.lineTo(left + width, top);
    context.lineTo(left + width, top + mark);
    context.fill();
  }

  lengthOf(cell) {
    return Math.min(this.document.cell_size, this.document.size - cell.offset);
  }

  point(event) {
    if (this.document === null || !this.columns) return;
    const column = Math.floor(event.offsetX / this.pitch);
    const number = Math.floor(event.offsetY / this.pitch) * this.columns + column;
    this.select(column >= 0 && column < this.columns && number < this.count ? number : null);
  }

  move(event) {
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      Home: -Infinity,
      End: Infinity,
    };
    if (this.document === null || !(event.key in steps)) return;
    event.preventDefault();
    const to = this.cursor === null ? 0 : this.cursor + steps[event.key];
    this.select(Math.min(this.count - 1, Math.max(0, to)));
  }

  select(number) {
    if (number === this.cursor) return;
    this.cursor = number;
    setText(this.said, number === null ? HINT : this.describe(number));
    this.draw();
  }

  describe(number) {
    const { cell_size: size, layers } = this.document;
    const begin = number * size;
    const where = `${bytes(begin)} – ${bytes(Math.min(begin + size, this.document.size))}`;
    const cell = this.cells.get(number);
    if (cell === undefined) return `${where}: empty`;
    const full = percent(cell.mapped, this.lengthOf(cell));
    const most = cell.most === cell.mapped ? "all" : `${bytes(cell.most)}`;
    const changed = cell.changed > 0 ? `; ${bytes(cell.changed)} since the last backup` : "";
    const name = layerName(layers, cell.layer);
    return `${where}: ${bytes(cell.mapped)} of data (${full}), ${most} in ${name}${changed}`;
  }
}
