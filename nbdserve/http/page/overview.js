// The first view: space, what is going on, and all volumes.

import { LatencyChart } from "./chart.js";
import { List, element, progressBar, setAttribute, setHidden, setProgress, setText } from "./dom.js";
import { age, ago, bytes, count, duration, latency, moment, percent, plural, rate } from "./format.js";

const $ = (id) => document.getElementById(id);

const MOST_WARNINGS = 6;

const COLUMNS = [
  { key: "name", title: "Name", value: (row) => row.name, text: (row) => row.name },
  { key: "size", title: "Size", value: (row) => row.size, show: bytes, number: true, middling: true },
  {
    key: "mapped",
    title: "Data",
    hint: "what the volume holds data for",
    value: (row) => row.mapped,
    show: bytes,
    number: true,
  },
  {
    key: "own",
    title: "On disk",
    hint: "of this volume alone",
    value: (row) => row.own,
    show: bytes,
    number: true,
    wide: true,
  },
  { key: "layers", title: "Layers", value: (row) => row.layers, show: count, number: true, wide: true },
  {
    key: "snapshots",
    title: "Snapshots",
    value: (row) => row.snapshots,
    show: count,
    number: true,
    wide: true,
  },
  { key: "clients", title: "Clients", value: (row) => row.clients, show: count, number: true, wide: true },
  {
    key: "iops",
    title: "IOPS",
    value: (row) => row.rates?.iops ?? null,
    show: count,
    number: true,
  },
  {
    key: "read",
    title: "Read",
    value: (row) => row.rates?.read ?? null,
    show: rate,
    number: true,
    wide: true,
  },
  {
    key: "write",
    title: "Written",
    value: (row) => row.rates?.write ?? null,
    show: rate,
    number: true,
    wide: true,
  },
  {
    key: "p99",
    title: "p99",
    hint: "99 % of the requests were answered within this time",
    value: (row) => row.rates?.p99 ?? null,
    show: latency,
    number: true,
  },
  {
    key: "backup",
    title: "Backup",
    hint: "the last one that succeeded",
    value: (row) => row.backup,
    text: (row) => (row.backup === null ? "none" : age(row.backup)),
    number: true,
  },
];

// The last success of a backup of each volume, in seconds since 1970.
export function lastBackups(status) {
  const found = new Map();
  for (const record of status.history ?? []) {
    if (record.last_success === null) continue;
    found.set(record.volume, Math.max(found.get(record.volume) ?? 0, record.last_success));
  }
  return found;
}

// Everything that takes long: [{key, what, done, total, note}].
export function workOf(status) {
  const work = [];
  for (const job of status.jobs ?? []) {
    const began = `for ${duration(Date.now() / 1000 - moment(job.started).getTime() / 1000)}`;
    const ends =
      job.kind === "restore"
        ? `${job.snapshot} → ${job.volume}, from ${job.repository}`
        : `${job.volume}@${job.snapshot} → ${job.repository}`;
    work.push({
      key: JSON.stringify([job.kind, job.volume, job.snapshot, job.repository, job.started]),
      volume: job.volume,
      what: `${job.kind} ${ends}`,
      done: job.done,
      total: job.total,
      note: began,
    });
  }
  for (const found of status.hydrations ?? []) {
    work.push({
      key: JSON.stringify(["hydration", found.volume]),
      volume: found.volume,
      what: `lazy restore of ${found.volume}, from ${found.source}`,
      done: found.fetched,
      total: found.total,
      note: found.problem ?? (found.rate === null ? "" : `at most ${rate(found.rate)} by itself`),
    });
  }
  return work;
}

export class WorkList {
  constructor(section) {
    this.section = section;
    this.list = new List(
      section.querySelector(".rows"),
      (item) => item.key,
      (item) => {
        const row = element("div", { class: "work" }, element("p", {}, item.what), progressBar(item.what));
        row.append(element("p", { class: "note" }));
        return row;
      },
      (row, item) => {
        setProgress(row.children[1], item.done, item.total);
        const done =
          item.total > 0
            ? `${bytes(item.done)} of ${bytes(item.total)}, ${percent(item.done, item.total)}`
            : "beginning";
        setText(row.children[2], item.note === "" ? done : `${done} · ${item.note}`);
      },
    );
  }

  show(work) {
    setHidden(this.section, work.length === 0);
    this.list.show(work);
  }
}

export class Overview {
  constructor() {
    this.sort = { key: "name", down: false };
    this.rows = [];
    this.chart = new LatencyChart($("latency"));
    this.work = new WorkList($("progress"));
    this.buildTiles();
    this.buildTable();
    $("filter").addEventListener("input", () => this.showRows());
    this.warnings = new List(
      $("warnings"),
      (text) => text,
      (text) => element("p", { class: "notice" }, text),
      () => {},
    );
  }

  buildTiles() {
    this.tiles = {};
    for (const [key, title] of [
      ["space", "Space"],
      ["activity", "Activity"],
      ["latency", "Latency (p99)"],
      ["backups", "Backups"],
    ]) {
      const value = element("b");
      const note = element("span", { class: "note" });
      const tile = element("div", { class: "tile" }, element("h2", {}, title), value, note);
      this.tiles[key] = { value, note, tile };
      $("tiles").append(tile);
    }
    this.space = progressBar("Space in use");
    this.tiles.space.value.after(this.space);
  }

  buildTable() {
    const row = $("volumes").tHead.rows[0];
    for (const column of COLUMNS) {
      const button = element(
        "button",
        { type: "button", title: column.hint, onclick: () => this.sortBy(column.key) },
        column.title,
      );
      const kinds = ["number", "wide", "middling"].filter((kind) => column[kind]).join(" ");
      column.head = element("th", { scope: "col", class: kinds }, button);
      column.kinds = kinds;
      row.append(column.head);
    }
    this.table = new List(
      $("volumes").tBodies[0],
      (item) => item.name,
      (item) => {
        const link = element("a", { href: `#volume/${encodeURIComponent(item.name)}` }, item.name);
        const cells = COLUMNS.map((column) => element("td", { class: column.kinds }));
        cells[0].append(link);
        return element("tr", {}, ...cells);
      },
      (node, item) => {
        COLUMNS.forEach((column, at) => {
          if (at === 0) return;
          const text = column.text ? column.text(item) : column.show(column.value(item));
          setText(node.cells[at], text);
        });
        setAttribute(node, "class", item.backup === null ? "never" : null);
      },
    );
    this.markSorted();
  }

  sortBy(key) {
    const first = COLUMNS.find((column) => column.key === key).number === true;
    this.sort = { key, down: this.sort.key === key ? !this.sort.down : first };
    this.markSorted();
    this.showRows();
  }

  markSorted() {
    for (const column of COLUMNS) {
      const sorted = column.key === this.sort.key;
      const order = this.sort.down ? "descending" : "ascending";
      setAttribute(column.head, "aria-sort", sorted ? order : null);
    }
  }

  showRows() {
    const wanted = $("filter").value.trim().toLowerCase();
    const found = this.rows.filter((row) => row.name.toLowerCase().includes(wanted));
    const { value } = COLUMNS.find((column) => column.key === this.sort.key);
    const sign = this.sort.down ? -1 : 1;
    found.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === b) return one.name < other.name ? -1 : 1;
      if (a === null || b === null) return a === null ? 1 : -1; // what is not known comes last
      return a < b ? -sign : sign;
    });
    this.table.show(found);
    const all = this.rows.length;
    setText($("shown"), found.length === all ? String(all) : `${found.length} of ${all}`);
    setHidden($("none"), found.length > 0);
    setHidden($("volumes"), found.length === 0);
    setText(
      $("none"),
      all === 0
        ? "There are no volumes yet: nbdserve volume create NAME --size 10G makes one."
        : "No volume's name has this in it.",
    );
  }

  show(state) {
    const { status, volumes, measurements } = state;
    if (status !== null) {
      this.showSpace(status);
      this.showWarnings(status, volumes);
      this.work.show(workOf(status));
    }
    if (volumes !== null && status !== null) {
      const backups = lastBackups(status);
      this.rows = volumes.volumes.map((volume) => ({
        ...volume,
        rates: measurements.volumes.get(volume.name) ?? null,
        backup: backups.get(volume.name) ?? null,
      }));
      this.showRows();
      this.showBackups(backups);
    }
    this.showActivity(measurements, status);
    this.chart.show(measurements.series.get("") ?? []);
  }

  showSpace(status) {
    const used = status.used ?? status.total - status.free;
    const { value, note } = this.tiles.space;
    setText(value, `${bytes(status.free)} free`);
    setProgress(this.space, status.total - status.free, status.total);
    const parts = [`of ${bytes(status.total)}`];
    if (status.used !== undefined) parts.push(`${bytes(used)} used by volumes`);
    if (status.provisioned !== undefined) {
      const most = status.max_overcommit ?? null;
      const times = (number) => `${number.toFixed(number < 10 ? 1 : 0)}×`;
      const limit = most === null ? "" : `, at most ${times(most)}`;
      const over = status.overcommit ?? null;
      const ratio = over === null ? "" : ` (${times(over)} overcommitted${limit})`;
      parts.push(`${bytes(status.provisioned)} provisioned${ratio}`);
    }
    setText(note, parts.join(" · "));
  }

  showActivity(measurements, status) {
    const total = measurements.total;
    const { value, note } = this.tiles.activity;
    setText(value, total === null ? "…" : `${count(total.iops)} IOPS`);
    const clients = status === null ? "" : ` · ${plural(status.clients, "client")}`;
    setText(note, total === null ? "" : `read ${rate(total.read)} · written ${rate(total.write)}${clients}`);
    const p99 = total?.p99 ?? null;
    setText(this.tiles.latency.value, total === null ? "…" : p99 === null ? "idle" : latency(p99));
    setText(this.tiles.latency.note, "99 of 100 requests took no longer");
    setHidden(this.tiles.latency.note, p99 === null);
  }

  showBackups(backups) {
    const { value, note } = this.tiles.backups;
    const without = this.rows.filter((row) => row.backup === null).length;
    const times = this.rows.map((row) => row.backup).filter((time) => time !== null);
    setText(value, times.length === 0 ? "none yet" : `oldest ${age(Math.min(...times))}`);
    const parts = [`${plural(times.length, "volume")} backed up`];
    if (without > 0) parts.push(`${without} never`);
    setText(note, parts.join(" · "));
  }

  showWarnings(status, volumes) {
    const texts = (status.warnings ?? []).map((warning) => warning.message ?? String(warning));
    for (const lost of status.unreadable) {
      texts.push(`Volume ${lost.name ?? lost.id} cannot be read: ${lost.problem}`);
    }
    for (const half of volumes?.half_restored ?? []) {
      texts.push(`Volume ${half.volume} is half restored from ${half.source}.`);
    }
    for (const record of status.history ?? []) {
      if (record.last_failure !== null && record.last_failure > (record.last_success ?? 0)) {
        const what = `The last backup of ${record.volume} to ${record.repository} failed`;
        texts.push(`${what} ${ago(record.last_failure)}: ${record.failure}`);
      }
    }
    if (texts.length > MOST_WARNINGS) {
      const more = texts.length - MOST_WARNINGS + 1;
      texts.splice(MOST_WARNINGS - 1, more, `and ${plural(more, "more warning")}`);
    }
    this.warnings.show(texts);
  }
}
