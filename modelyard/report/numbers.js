"use strict";
// Numbers as people read them

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const BINARY = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "bytes"]];
const TIMES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"]];

function digits(value, count = 3) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) return value.toExponential(count - 1).replace("e+", "e");
  const decimals = Math.max(0, count - 1 - Math.floor(Math.log10(Math.abs(value))));
  const text = value.toFixed(Math.min(decimals, 12));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
const largestBelow = (table, value) => table.find(([factor]) => Math.abs(value) >= 0.9995 * factor) ?? table.at(-1);

function quantity(value, unit = "") {
  const [factor, prefix] = largestBelow(PREFIXES, value);
  return `${digits(value / factor)} ${prefix}${unit.startsWith("FLOP") || !prefix || !unit ? "" : " "}${unit}`.trim();
}
function duration(seconds) {
  if (seconds < 60) return seconds < 1 ? `${digits(seconds * 1e3)} ms` : `${digits(seconds)} s`;
  const at = largestBelow(TIMES, seconds), [factor, unit] = at, [below, small] = TIMES[TIMES.indexOf(at) + 1];
  const whole = Math.floor(Math.round(seconds / below) * below / factor);
  return `${whole} ${unit} ${Math.round((seconds - whole * factor) / below)} ${small}`;
}
const superscript = (exponent) => [...String(exponent)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("");

// A unit: `show` writes one value; `axis(largest)` gives [what one tick unit is worth, the axis' label].
const decimal = (unit) => ({
  show: (v) => quantity(v, unit),
  axis: (largest) => {
    const [factor, prefix] = largestBelow(PREFIXES, largest);
    return [factor, `${prefix}${unit.startsWith("FLOP") || !prefix ? "" : " "}${unit}`];
  },
});
const UNITS = {
  loss: { show: (v) => digits(v, v < 10 ? 5 : 4), axis: () => [1, "nats per token"] },
  norm: { show: (v) => digits(v, 4), axis: () => [1, "L2 norm"] },
  rate: {
    show: (v) => (v ? v.toExponential(3) : "0"),
    axis: (largest) => {
      const exponent = largest > 0 ? Math.floor(Math.log10(largest)) : 0;
      return [10 ** exponent, exponent ? `× 10${superscript(exponent)}` : "learning rate"];
    },
  },
  speed: decimal("tokens/s"),
  flops: decimal("FLOP/s"),
  share: { show: (v) => `${digits(v * 100)}%`, axis: () => [0.01, "%"] },
  bytes: {
    show: (v) => { const [factor, unit] = largestBelow(BINARY, v); return `${digits(v / factor)} ${unit}`; },
    axis: (largest) => largestBelow(BINARY, largest),
  },
  seconds: {
    show: duration,
    axis: (largest) => { const [factor, unit] = largestBelow(TIMES, largest); return [factor, `${unit} per iteration`]; },
  },
};
const AXES = {
  i: { name: "iterations", label: () => [1, "iterations"], show: (v) => `iteration ${Math.round(v).toLocaleString("en")}` },
  t: { name: "tokens", label: () => [1, "tokens"], show: (v) => quantity(v, "tokens") },
  s: {
    name: "time",
    label: (largest) => { const [factor, unit] = largestBelow(TIMES, largest); return [factor, `time at work [${unit}]`]; },
    show: duration,
  },
};

// Scales

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return [ticks, step];
}
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.8) return niceTicks(low, high, count)[0];
  const stride = Math.max(1, Math.ceil(decades / count)), ticks = [];
  for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.log10(high); exponent++) {
    if (exponent % stride) continue;
    for (const m of decades < 3 ? [1, 2, 5] : [1]) ticks.push(m * 10 ** exponent);
  }
  return ticks.filter((v) => v >= low * 0.9999 && v <= high * 1.0001);
}
function tickText(value, step) {
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (Math.abs(value) >= 1e4) return quantity(Number(value.toPrecision(12)));
  return decimals > 6 ? digits(value) : value.toFixed(decimals).replace("-0", value ? "-0" : "0");
}
// Index of the entry of the ascending `xs` (null: no place on this axis) that is nearest to x, or -1.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  if (high < 0 || xs[0] === null) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}
function smoothed(values, weight) {
  let mean = 0, sum = 0;  // The weights' sum corrects the start, as Adam does.
  return values.map((v) => {
    if (v === null) return null;
    mean = weight * mean + (1 - weight) * v;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}
