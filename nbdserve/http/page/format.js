// Numbers as people read them: binary units for bytes, three digits at most.

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

export const NOTHING = "–";

function digits(value) {
  if (value >= 100) return value.toFixed(0);
  return value.toFixed(value >= 10 ? 1 : 2).replace(/\.?0+$/, "");
}

export function bytes(value) {
  if (value === null || value === undefined) return NOTHING;
  let unit = 0;
  while (value >= 1023.5 && unit < BYTES.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value.toFixed(0) : digits(value)} ${BYTES[unit]}`;
}

export function rate(value) {
  if (value === null || value === undefined) return NOTHING;
  return value < 0.5 ? "0" : `${bytes(value)}/s`;
}

export function count(value) {
  if (value === null || value === undefined) return NOTHING;
  if (value >= 1e6) return `${digits(value / 1e6)} M`;
  if (value >= 1e4) return `${digits(value / 1e3)} k`;
  return value > 0 && value < 10 ? digits(value) : value.toFixed(0);
}

export function latency(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  if (seconds < 0.9995e-3) return `${digits(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${digits(seconds * 1e3)} ms`;
  return `${digits(seconds)} s`;
}

export function duration(seconds) {
  seconds = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60];
  if (days >= 1) return `${Math.floor(days)} d ${Math.floor(hours)} h`;
  if (hours >= 1) return `${Math.floor(hours)} h ${Math.floor(minutes)} min`;
  if (minutes >= 1) return `${Math.floor(minutes)} min`;
  return `${seconds} s`;
}

// `when`: a Date, an ISO 8601 text, or seconds since 1970.
export function moment(when) {
  if (when === null || when === undefined) return null;
  if (typeof when === "number") return new Date(when * 1000);
  return new Date(when);
}

export function ago(when) {
  const date = moment(when);
  if (date === null) return NOTHING;
  return `${duration((Date.now() - date.getTime()) / 1000)} ago`;
}

// The same in the largest unit alone.
export function age(when) {
  const date = moment(when);
  if (date === null) return NOTHING;
  const [number, unit] = duration((Date.now() - date.getTime()) / 1000).split(" ");
  return `${number} ${unit} ago`;
}

export function time(when) {
  const date = moment(when);
  if (date === null || Number.isNaN(date.getTime())) return NOTHING;
  const two = (value) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function percent(part, whole) {
  if (!(whole > 0)) return "0 %";
  const value = (100 * part) / whole;
  return `${value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0)} %`;
}

export function plural(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}
