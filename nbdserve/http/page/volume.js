// The view of one volume: its map, its layers and snapshots, its backups, its latency.

import { LatencyChart } from "./chart.js";
import { List, element, setHidden, setText } from "./dom.js";
import { NOTHING, ago, bytes, count, duration, latency, percent, plural, rate, time } from "./format.js";
import { LayerMap, layerColours } from "./map.js";
import { WorkList, workOf } from "./overview.js";

const FACTS = [
  ["Size", (volume) => bytes(volume.size)],
  ["Data", (volume) => `${bytes(volume.mapped)} (${percent(volume.mapped ?? 0, volume.size)})`],
  ["On disk", (volume) => bytes(volume.own)],
  ["Shared", (volume) => bytes(volume.shared)],
  ["Clients", (volume) => String(volume.clients)],
  ["Created", (volume) => time(volume.created)],
];

function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

export class VolumeView {
  constructor(parent, name) {
    this.parent = parent;
    this.name = name;
    this.map = null;
    this.facts = FACTS.map(() => element("dd"));
    this.missing = element("p", { class: "notice", hidden: true });
    this.summary = element("p", { class: "summary" }, "drawing…");
    this.since = element("p", { class: "note" });
    const drawing = element("div", { class: "map" });
    this.layerMap = new LayerMap(drawing);
    this.layers = element("ol", { class: "chain" });
    this.branches = section("Snapshots on other branches", element("ul", { class: "plain" }));
    this.activity = element("p", { class: "note" });
    const chart = element("div", { class: "chart" });
    this.chart = new LatencyChart(chart);
    this.backups = element("div");
    this.work = new WorkList(section("In progress", element("div", { class: "rows" })));
    this.body = element(
      "div",
      {},
      element("dl", { class: "facts" }, ...FACTS.flatMap(([title], at) => [
        element("div", {}, element("dt", {}, title), this.facts[at]),
      ])),
      this.work.section,
      section("Where the data lives", this.summary, drawing, this.since),
      section("Layers and snapshots", element("p", { class: "note" }, "newest first"), this.layers),
      this.branches,
      section("Latency", this.activity, chart),
      section("Last backups", this.backups),
    );
    parent.replaceChildren(
      element("p", { class: "back" }, element("a", { href: "#" }, "← all volumes")),
      element("h1", { tabindex: "-1" }, name),
      this.missing,
      this.body,
    );
    this.layerList = new List(
      this.layers,
      (item) => item.layer,
      () => this.createLayer(),
      (node, item) => this.updateLayer(node, item),
    );
    this.branchList = new List(
      this.branches.querySelector("ul"),
      (item) => item.name,
      () => element("li"),
      (node, item) => setText(node, this.describeSnapshot(item)),
    );
  }

  show(state) {
    const { status, volumes, measurements } = state;
    const info = volumes?.volumes.find((volume) => volume.name === this.name) ?? null;
    if (volumes !== null) {
      const lost = volumes.unreadable.find((volume) => volume.name === this.name);
      setHidden(this.missing, info !== null);
      setHidden(this.body, info === null);
      const gone = `There is no volume ${this.name} (any more).`;
      setText(this.missing, lost ? `This volume cannot be read: ${lost.problem}` : gone);
    }
    if (info !== null) FACTS.forEach(([, text], at) => setText(this.facts[at], text(info)));
    if (status !== null) {
      this.work.show(workOf(status).filter((item) => item.volume === this.name));
      this.showBackups((status.history ?? []).filter((record) => record.volume === this.name));
    }
    const rates = measurements.volumes.get(this.name);
    const now = rates && [
      `${count(rates.iops)} IOPS`,
      `read ${rate(rates.read)}`,
      `written ${rate(rates.write)}`,
      `p99 ${latency(rates.p99)}`,
    ];
    setText(this.activity, now ? now.join(" · ") : "No client has asked for anything lately.");
    this.chart.show(measurements.series.get(this.name) ?? []);
  }

  // The colours have changed.
  redraw() {
    this.chart.draw();
    if (this.map !== null) this.showMap(this.map, [...this.snapshots.values()]);
  }

  // What a map must be drawn anew for.
  static stateOf(info) {
    return JSON.stringify([info.id, info.size, info.mapped, info.layers, info.snapshots]);
  }

  failed(problem) {
    setText(this.summary, `The map cannot be drawn: ${problem}`);
  }

  showMap(map, snapshots) {
    this.map = map;
    this.snapshots = new Map(snapshots.map((snapshot) => [snapshot.name, snapshot]));
    this.layerMap.show(map);
    const least = Math.ceil(map.size / map.cell_size);
    setText(
      this.summary,
      `${bytes(map.mapped)} of ${bytes(map.size)} hold data (${percent(map.mapped, map.size)}). ` +
        (least === 1 ? "" : `Each square is ${bytes(map.cell_size)}, filled as far as it holds data.`),
    );
    this.showSince(map);
    const colours = layerColours(map.layers);
    const items = map.layers.map((layer, number) => ({ ...layer, number, colour: colours[number] }));
    this.layerList.show(items.reverse());
    const here = new Set(map.layers.flatMap((layer) => layer.snapshots));
    const others = snapshots.filter((snapshot) => !here.has(snapshot.name));
    setHidden(this.branches, others.length === 0);
    this.branchList.show(others);
  }

  showSince(map) {
    if (map.since === null) {
      this.since.replaceChildren("No snapshot here is a backup’s, so what changed since is not known.");
      return;
    }
    const mark = element("i", { class: "key changed", "aria-hidden": "true" });
    const text =
      ` ${bytes(map.changed)} were written since the last backup, ${map.since.snapshot},` +
      ` ${ago(map.since.created)}. What was trimmed since is not in the map.`;
    this.since.replaceChildren(mark, text);
  }

  createLayer() {
    const title = element("b");
    const share = element("span", { class: "share" });
    const node = element(
      "li",
      {
        tabindex: "0",
        onpointerenter: () => this.layerMap.highlight(node.number),
        onpointerleave: () => this.layerMap.highlight(null),
        onfocus: () => this.layerMap.highlight(node.number),
        onblur: () => this.layerMap.highlight(null),
      },
      element("i", { class: "swatch", "aria-hidden": "true" }),
      element("div", {}, element("p", {}, title, share), element("ul", { class: "plain" })),
    );
    node.titleNode = title;
    node.shareNode = share;
    node.snapshotList = new List(
      node.querySelector("ul"),
      (snapshot) => snapshot.name,
      () => element("li"),
      (line, snapshot) => setText(line, this.describeSnapshot(snapshot)),
    );
    return node;
  }

  updateLayer(node, item) {
    node.number = item.number;
    const background = `rgb(${item.colour.join(", ")})`;
    if (node.firstChild.style.backgroundColor !== background) {
      node.firstChild.style.backgroundColor = background;
    }
    const head = item.number === this.map.layers.length - 1;
    const names = item.snapshots.map((name) => `@${name}`).join(", ");
    setText(node.titleNode, head ? "head" : names === "" ? "no snapshot" : `up to ${names}`);
    const changed = item.changed ? " · since the last backup" : "";
    const part = this.map.mapped > 0 ? ` (${percent(item.mapped, this.map.mapped)})` : "";
    setText(
      node.shareNode,
      ` ${bytes(item.mapped)} of the data${part} · ${bytes(item.disk)} on disk` +
        `${changed} · layer ${item.layer}`,
    );
    const found = item.snapshots.map((name) => this.snapshots.get(name)).filter(Boolean);
    node.snapshotList.show(found);
  }

  describeSnapshot(snapshot) {
    const labels = Object.entries(snapshot.labels)
      .filter(([label]) => label !== "backup")
      .map(([label, value]) => `${label}=${value}`);
    const parts = [
      `@${snapshot.name}`,
      `${time(snapshot.created)} (${ago(snapshot.created)})`,
      snapshot.labels.backup === undefined ? null : `backup to repository ${snapshot.labels.backup}`,
      labels.length === 0 ? null : labels.join(", "),
      snapshot.clients === 0 ? null : plural(snapshot.clients, "client"),
    ];
    return parts.filter((part) => part !== null).join(" · ");
  }

  showBackups(records) {
    if (records.length === 0) {
      this.backups.replaceChildren(
        element("p", { class: "empty" }, "No backup of this volume was reported here."),
      );
      return;
    }
    const titles = ["Repository", "Last success", "Snapshot", "Uploaded", "Took", "Last failure"];
    const rows = records.map((record) => [
      record.repository,
      record.last_success === null ? "never" : `${ago(record.last_success)}`,
      record.snapshot ?? NOTHING,
      bytes(record.uploaded),
      record.seconds === null ? NOTHING : duration(record.seconds),
      record.last_failure === null ? NOTHING : `${ago(record.last_failure)}: ${record.failure}`,
    ]);
    const key = JSON.stringify(rows);
    if (key === this.shownBackups) return;
    this.shownBackups = key;
    const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
    const lines = rows.map((row) => element("tr", {}, ...row.map((text) => element("td", {}, text))));
    this.backups.replaceChildren(
      element("div", { class: "table" }, element("table", {},
        element("thead", {}, head), element("tbody", {}, ...lines))),
    );
  }
}
