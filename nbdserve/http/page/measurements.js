// Rates and latencies, from the difference of what was counted at two times.

export const KEPT_SECONDS = 600;

const MOST_POINTS = 400;
const SHOWN = ["read", "write", "flush"];

// The latency that a part `q` of the requests did not exceed, by the buckets' bounds: linear within
// a bucket, as Prometheus has it. Null when there were none.
export function quantile(buckets, bounds, q) {
  const total = buckets.reduce((sum, count) => sum + count, 0);
  if (total === 0) return null;
  let before = 0;
  for (let at = 0; at < buckets.length; at += 1) {
    if (before + buckets[at] >= q * total && buckets[at] > 0) {
      if (at >= bounds.length) return bounds[bounds.length - 1];
      const low = at === 0 ? 0 : bounds[at - 1];
      return low + ((bounds[at] - low) * (q * total - before)) / buckets[at];
    }
    before += buckets[at];
  }
  return bounds[bounds.length - 1];
}

function add(into, buckets) {
  for (let at = 0; at < buckets.length; at += 1) into[at] = (into[at] ?? 0) + buckets[at];
}

// What was counted between two readings of one export; null when the counting began anew.
function difference(now, before) {
  const commands = {};
  for (const [name, counted] of Object.entries(now.commands)) {
    const old = before?.commands[name];
    if (old !== undefined && counted.count < old.count) return null;
    commands[name] = {
      count: counted.count - (old?.count ?? 0),
      bytes: counted.bytes - (old?.bytes ?? 0),
      buckets: counted.buckets.map((value, at) => value - (old?.buckets[at] ?? 0)),
    };
  }
  return commands;
}

class Sum {
  constructor() {
    this.requests = 0;
    this.bytes = { read: 0, write: 0 };
    this.buckets = { all: [], read: [], write: [], flush: [] };
  }

  add(commands) {
    for (const [name, counted] of Object.entries(commands)) {
      this.requests += counted.count;
      if (name in this.bytes) this.bytes[name] += counted.bytes;
      if (name in this.buckets) add(this.buckets[name], counted.buckets);
      add(this.buckets.all, counted.buckets);
    }
  }

  rates(seconds, bounds) {
    const worst = (name) => quantile(this.buckets[name], bounds, 0.99);
    return {
      iops: this.requests / seconds,
      read: this.bytes.read / seconds,
      write: this.bytes.write / seconds,
      p99: worst("all"),
      latencies: Object.fromEntries(SHOWN.map((name) => [name, worst(name)])),
    };
  }
}

export class Measurements {
  constructor() {
    this.previous = null;
    this.volumes = new Map(); // name: rates
    this.total = null;
    this.series = new Map(); // name, "" for all: [{time, read, write, flush}]
  }

  // A gap: what comes next is not to be compared with what was before.
  forget() {
    this.previous = null;
    this.volumes = new Map();
    this.total = null;
  }

  take(document) {
    const before = this.previous;
    this.previous = document;
    if (before === null || document.uptime <= before.uptime) {
      this.volumes = new Map();
      this.total = null;
      return;
    }
    const seconds = document.uptime - before.uptime;
    const key = (found) => JSON.stringify([found.volume, found.snapshot]);
    const old = new Map(before.exports.map((found) => [key(found), found]));
    const total = new Sum();
    const sums = new Map();
    for (const found of document.exports) {
      const commands = difference(found, old.get(key(found)));
      if (commands === null) continue;
      total.add(commands);
      if (!sums.has(found.volume)) sums.set(found.volume, new Sum());
      sums.get(found.volume).add(commands);
    }
    this.total = total.rates(seconds, document.bounds);
    this.volumes = new Map();
    for (const [name, sum] of sums) this.volumes.set(name, sum.rates(seconds, document.bounds));
    this.keep();
  }

  keep() {
    const now = Date.now() / 1000;
    const add = (name, rates) => {
      if (rates.p99 === null && !this.series.has(name)) return;
      if (!this.series.has(name)) this.series.set(name, []);
      this.series.get(name).push({ time: now, ...rates.latencies });
    };
    add("", this.total);
    for (const [name, rates] of this.volumes) add(name, rates);
    for (const [name, points] of this.series) {
      while (points.length > MOST_POINTS || points[0]?.time < now - KEPT_SECONDS) points.shift();
      if (points.length === 0) this.series.delete(name);
    }
  }
}
