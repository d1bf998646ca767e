// Plots of numbers over a shared x axis, drawn as SVG. What all plots share is in `view`; a change to it redraws them all.

const view = { axis: "i", range: null, cursor: null, smoothing: 0, hiddenRuns: new Set(), marks: new Set(), plots: [] };

function make(name, attributes = {}, ...children) {
  const inSvg = /^(svg|g|path|line|rect|circle|text|clipPath|defs|pattern|title)$/.test(name);
  const node = inSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// How lines look: a colour, a dash and a marker each, so that no two differ by colour alone.

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2 1 2", "1 4", "6 6"];
const MARKERS = [
  null,
  (x, y) => `M${x - 3.5} ${y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0`,
  (x, y) => `M${x - 3} ${y - 3}h6v6h-6z`,
  (x, y) => `M${x} ${y - 4}l4 7h-8z`,
  (x, y) => `M${x} ${y - 4.5}l4 4.5-4 4.5-4-4.5z`,
  (x, y) => `M${x} ${y + 4}l4-7h-8z`,
];
const MARKS = {
  resumed: { group: "resumes", glyph: "▲", tall: true },
  stopped: { group: "resumes", glyph: "■", tall: true },
  shutdown: { group: "resumes", glyph: "■", tall: true },
  saved: { group: "saves", glyph: "●", tall: false },
  exported: { group: "saves", glyph: "◆", tall: false },
  skipped: { group: "problems", glyph: "✕", tall: true },
};
const markOf = (kind) => MARKS[kind] ?? { group: "problems", glyph: "!", tall: true };

// Plots

class Plot {
  constructor(title, { wide = false } = {}) {
    this.title = title;
    this.log = false;
    this.at = make("span", { class: "at" });
    this.switches = make("span", { class: "switches" });
    this.legend = make("div", { class: "legend" });
    this.svg = make("svg", { tabindex: 0, role: "group", "aria-describedby": "plot-help" });
    this.node = make("figure", { class: `panel plot${wide ? " wide" : ""}` },
      make("figcaption", {}, make("h3", {}, title), this.switches), this.svg, this.at, this.legend);
    view.plots.push(this);
    this.listen();
  }

  addSwitch(text, change, on = false) {
    const button = make("button", { type: "button", "aria-pressed": String(on) }, text);
    button.addEventListener("click", () => {
      change();
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
      this.draw();
    });
    this.switches.append(button);
  }

  // A legend entry: it switches what it names on and off, and shows its value at the line.
  addEntry(swatch, text, entry) {
    entry.value = make("span", { class: "value" });
    const button = make("button", { type: "button", "aria-pressed": "true", class: "entry" }, swatch, text, entry.value);
    button.addEventListener("click", () => {
      entry.off = !entry.off;
      button.setAttribute("aria-pressed", String(!entry.off));
      this.draw();
    });
    entry.button = button;
    this.legend.append(button);
  }

  listen() {
    let from = null;
    const place = (event) => this.toX(event.clientX - this.svg.getBoundingClientRect().left);
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch" && event.button === 0) {
        from = event.clientX;
        this.svg.setPointerCapture(event.pointerId);
      }
      setCursor(place(event));
    });
    this.svg.addEventListener("pointermove", (event) => {
      setCursor(place(event));
      this.select(from, event.clientX);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(event.clientX - from) > 6) {
        const start = this.toX(from - this.svg.getBoundingClientRect().left);
        setRange([Math.min(start, place(event)), Math.max(start, place(event))]);
      }
      from = null;
      this.select(null);
    });
    this.svg.addEventListener("pointercancel", () => { from = null; this.select(null); });
    this.svg.addEventListener("pointerleave", (event) => { if (from === null && event.pointerType !== "touch") setCursor(null); });
    this.svg.addEventListener("dblclick", () => setRange(null));
    this.svg.addEventListener("blur", () => setCursor(null));
    this.svg.addEventListener("keydown", (event) => {
      const xs = this.places(), now = view.cursor === null ? xs.length - 1 : nearest(xs, view.cursor);
      const step = event.shiftKey ? 10 : 1;
      const moves = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: xs.length - 1 };
      if (event.key in moves && xs.length) {
        setCursor(xs[Math.max(0, Math.min(xs.length - 1, view.cursor === null ? now : moves[event.key]))]);
        drawCursors();
        document.getElementById("spoken").textContent = this.spoken();
      } else if (event.key === "+" || event.key === "=") zoom(0.5);
      else if (event.key === "-") zoom(2);
      else if (event.key === "Escape") setRange(null);
      else return;
      event.preventDefault();
    });
  }

  select(from, to) {
    this.selection?.remove();
    if (from === null || from === undefined) return;
    const left = this.svg.getBoundingClientRect().left;
    const [a, b] = [from - left, to - left].sort((p, q) => p - q);
    this.selection = make("rect", { class: "selection", x: a, width: b - a, y: this.top, height: this.bottom - this.top });
    this.svg.append(this.selection);
  }

  toX(pixel) {
    const share = Math.max(0, Math.min(1, (pixel - this.left) / (this.right - this.left)));
    return this.range[0] + share * (this.range[1] - this.range[0]);
  }
  x(value) { return this.left + ((value - this.range[0]) / (this.range[1] - this.range[0])) * (this.right - this.left); }
  y(value) {
    const [low, high] = this.log ? this.ys.map(Math.log10) : this.ys;
    return this.bottom - (((this.log ? Math.log10(value) : value) - low) / (high - low)) * (this.bottom - this.top);
  }

  // Axes for the y range of [low, high]; returns the group that the content goes to, clipped to the plot's area.
  frame(low, high, unit) {
    const width = Math.max(200, this.svg.clientWidth), height = this.svg.clientHeight || 220;
    Object.assign(this, { left: 50, right: width - (view.several ? 24 : 14), top: 24, bottom: height - 36 });
    this.range = view.range ?? view.extent[view.axis];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    if (!(high > low)) [low, high] = low ? [Math.min(low * 0.9, low * 1.1), Math.max(low * 0.9, low * 1.1)] : [0, 1];
    if (this.log) low = Math.max(low, high * 1e-12);
    this.ys = [low, high];
    const [factor, label] = unit.axis(Math.max(Math.abs(low), Math.abs(high)));
    const rows = Math.max(2, Math.round((this.bottom - this.top) / 34));
    const [plain, step] = niceTicks(low / factor, high / factor, rows);
    for (const tick of this.log ? logTicks(low / factor, high / factor, rows) : plain) {
      const y = this.y(tick * factor), text = this.log ? digits(Number(tick.toPrecision(6)), 4) : tickText(tick, step);
      this.svg.append(make("line", { class: "grid", x1: this.left, x2: this.right, y1: y, y2: y }),
        make("text", { class: "tick", x: this.left - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    const [xFactor, xLabel] = AXES[view.axis].label(this.range[1]);
    const [xTicks, xStep] = niceTicks(this.range[0] / xFactor, this.range[1] / xFactor, Math.floor(width / 95));
    for (const tick of xTicks) {
      const x = this.x(tick * xFactor), anchor = x > width - 22 ? "end" : "middle";
      this.svg.append(make("line", { class: "grid", x1: x, x2: x, y1: this.top, y2: this.bottom }),
        make("text", { class: "tick", x: anchor === "end" ? width - 1 : x, y: this.bottom + 15, "text-anchor": anchor }, tickText(tick, xStep)));
    }
    this.svg.append(make("line", { class: "axis", x1: this.left, x2: this.right, y1: this.bottom, y2: this.bottom }),
      make("text", { class: "unit", x: 2, y: 12 }, label + (this.log ? ", log scale" : "")),
      make("text", { class: "unit", x: (this.left + this.right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel));
    const id = `clip-${view.plots.indexOf(this)}`;
    const content = make("g", { "clip-path": `url(#${id})` });
    this.svg.append(make("clipPath", { id },
      make("rect", { x: this.left - 1, y: this.top - 4, width: this.right - this.left + 2, height: this.bottom - this.top + 5 })));
    this.drawMarks();
    this.svg.append(content);
    this.pointer = make("g", { class: "pointer" });
    this.svg.append(this.pointer);
    return content;
  }

  drawMarks() {
    const taken = new Set();
    this.shownMarks = [];
    for (const mark of view.allMarks) {
      const { group, glyph, tall } = markOf(mark.kind), at = mark[view.axis];
      if (!view.marks.has(group) || view.hiddenRuns.has(mark.run) || !this.showsRun(mark.run)) continue;
      if (at === null || at < this.range[0] || at > this.range[1]) continue;
      const x = Math.round(this.x(at) * 2) / 2;
      this.shownMarks.push([x, mark]);
      if (taken.has(`${group}${Math.round(x / 3)}`)) continue;
      taken.add(`${group}${Math.round(x / 3)}`);
      const size = group === "saves" ? 6 : 10;
      this.svg.append(make("g", { class: `mark ${group}` },
        make("line", { x1: x, x2: x, y1: tall ? this.top : this.bottom - 6, y2: this.bottom }),
        make("text", { x, y: tall ? this.top - 3 : this.bottom - 7, "text-anchor": "middle", "font-size": size }, glyph)));
    }
  }
  showsRun() { return true; }

  // The line at the cursor, and what it says.
  drawCursor() {
    this.pointer.replaceChildren();
    const at = view.cursor !== null && view.cursor >= this.range[0] && view.cursor <= this.range[1] ? view.cursor : null;
    if (at !== null) {
      const x = this.x(at);
      this.pointer.append(make("line", { class: "cursor", x1: x, x2: x, y1: this.top, y2: this.bottom }));
    }
    const near = at === null ? [] : this.shownMarks.filter(([x]) => Math.abs(x - this.x(at)) < 5).map(([, mark]) => mark);
    const texts = near.slice(0, 3).map((m) => `${markOf(m.kind).glyph} ${view.several ? `${view.letters[m.run]}: ` : ""}${m.text}`);
    this.at.textContent = [this.where(at), ...texts].join(" · ");
    this.readOut(at);
  }
}

class LinePlot extends Plot {
  // `lines`: {label, run, colour, dash, marker, points, raw, smoothable, primary}, points being {i, t, s, v, smooth}.
  constructor(title, unit, lines, { fromZero = true, ...options } = {}) {
    super(title, options);
    this.addSwitch("log scale", () => { this.log = !this.log; });
    Object.assign(this, { unit, lines, fromZero });
    for (const line of lines) {
      const swatch = make("svg", { class: "swatch", width: 26, height: 12, "aria-hidden": "true" },
        make("path", { class: `line colour-${line.colour}`, d: "M1 6h24", "stroke-dasharray": DASHES[line.dash] }));
      if (MARKERS[line.marker]) swatch.append(make("path", { class: `marker colour-${line.colour}`, d: MARKERS[line.marker](13, 6) }));
      this.addEntry(swatch, line.label, line);
    }
  }

  get visible() { return this.lines.filter((line) => !line.off && !view.hiddenRuns.has(line.run)); }
  places() { return (this.visible[0]?.points[view.axis] ?? []).filter((x) => x !== null && x >= this.range[0] && x <= this.range[1]); }

  // What is drawn of a line: the faint one, or null, and the strong one.
  parts(line) {
    const { points, raw } = line;
    if (!line.smoothable || !view.smoothing) return [raw, points];
    const from = points.smooth ?? points;
    return [raw ?? points, { ...from, v: smoothed(from.v, view.smoothing) }];
  }

  draw() {
    const range = view.range ?? view.extent[view.axis], values = [], drawn = this.visible.map((line) => [line, ...this.parts(line)]);
    for (const line of this.lines) line.button.hidden = view.hiddenRuns.has(line.run);
    for (const [, ...parts] of drawn) {
      for (const part of parts) part?.v.forEach((v, k) => {
        const x = part[view.axis][k];
        if (v !== null && x !== null && x >= range[0] && x <= range[1] && !(this.log && v <= 0)) values.push(v);
      });
    }
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) [low, high] = this.log ? [1, 10] : [0, 1];
    else if (this.log) [low, high] = [low / 1.1, high * 1.1];
    else [low, high] = [this.fromZero && low >= 0 ? 0 : low - 0.06 * (high - low), high + 0.06 * (high - low)];
    const content = this.frame(low, high, this.unit);
    this.drawn = drawn;
    const ends = [];
    for (const [line, faint, strong] of drawn) {
      if (faint) content.append(this.path(faint, `line faint colour-${line.colour}`, ""));
      const path = this.path(strong, `line colour-${line.colour}`, DASHES[line.dash]);
      content.append(path, this.markers(line, strong));
      this.bad(content, faint ?? strong);
      if (view.several && line.primary && path.last) ends.push([...path.last, line]);
    }
    this.endLabels(ends);
    if (!values.length) this.svg.append(make("text", { class: "empty", x: (this.left + this.right) / 2, y: (this.top + this.bottom) / 2, "text-anchor": "middle" },
      this.visible.length ? "nothing to show here" : "everything is switched off"));
    const first = this.visible[0];
    this.svg.setAttribute("aria-label", `${this.title} by ${AXES[view.axis].name}. ${this.visible.map((line) => this.inWords(line)).join(" ")}`.trim());
    if (first || !this.lines.length) this.node.classList.remove("off"); else this.node.classList.add("off");
    this.drawCursor();
  }

  inWords(line) {
    const values = line.points.v.filter((v) => v !== null);
    return values.length ? `${line.label}: from ${this.unit.show(values[0])} to ${this.unit.show(values.at(-1))}.` : `${line.label}: no finite value.`;
  }

  path(part, style, dash) {
    const xs = part[view.axis];
    let d = "", pen = false, alone = "", last = null;
    const inside = (k) => k >= 0 && k < xs.length && xs[k] !== null && xs[k] >= this.range[0] && xs[k] <= this.range[1];
    const usable = (k) => k >= 0 && k < xs.length && part.v[k] !== null && xs[k] !== null && !(this.log && part.v[k] <= 0);
    for (let k = 0; k < xs.length; k++) {
      if (!usable(k)) { pen = false; continue; }
      if (!inside(k) && !inside(k - 1) && !inside(k + 1) && !(xs[k] < this.range[0] && xs[k + 1] > this.range[1])) { pen = false; continue; }
      const x = this.x(xs[k]).toFixed(1), y = this.y(part.v[k]).toFixed(1);
      d += `${pen ? "L" : "M"}${x} ${y}`;
      // A point without neighbours has no line to be seen by.
      if (!pen && !usable(k + 1)) alone += `M${x - 2.5} ${y}a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0`;
      pen = true;
      if (inside(k)) last = [Number(x), Number(y)];
    }
    const group = make("g", {}, make("path", { class: style, d, "stroke-dasharray": dash }));
    if (alone) group.append(make("path", { class: style.replace("line", "marker"), d: alone }));
    group.last = last;
    return group;
  }

  // A marker at each point, or where points are many at one in 60 pixels.
  markers(line, part) {
    let d = "", before = -Infinity;
    if (MARKERS[line.marker]) {
      const xs = part[view.axis], few = xs.length * 12 < this.right - this.left;
      part.v.forEach((v, k) => {
        if (v === null || xs[k] === null || (this.log && v <= 0)) return;
        const x = this.x(xs[k]);
        if (x < this.left - 1 || x > this.right + 1 || (!few && x < before + 60)) return;
        before = x;
        d += MARKERS[line.marker](Number(x.toFixed(1)), Number(this.y(v).toFixed(1)));
      });
    }
    return make("path", { class: `marker colour-${line.colour}`, d });
  }

  // Values that were not finite have no height: a cross at the top says where they are.
  bad(content, part) {
    part.v.forEach((v, k) => {
      const at = part[view.axis][k];
      if (v !== null || at === null || at < this.range[0] || at > this.range[1]) return;
      const x = this.x(at);
      content.append(make("path", { class: "not-finite", d: `M${x - 4} ${this.top}l8 8m0-8l-8 8` }));
    });
  }

  // A run's letter where its line ends; letters that would lie on one another are moved apart.
  endLabels(ends) {
    ends.sort((a, b) => a[1] - b[1]);
    const placed = [];
    for (const [x, y, line] of ends) {
      let at = Math.max(this.top, y);
      for (const [otherX, otherY] of placed) if (Math.abs(otherX - x) < 16) at = Math.max(at, otherY + 12);
      placed.push([x, at, line]);
    }
    for (const [x, y, line] of placed) {
      const above = placed.filter(([otherX, otherY]) => Math.abs(otherX - x) < 16 && otherY > y).length;
      this.svg.append(make("text", { class: `end colour-${line.colour}`, x: x + 5, y: Math.min(y, this.bottom - 12 * above) + 4 }, view.letters[line.run]));
    }
  }

  where(at) {
    const line = this.visible[0];
    if (at === null || !line) return at === null ? "last values" : "";
    const k = nearest(line.points[view.axis], at);
    if (view.several || k < 0) return AXES[view.axis].show(at);
    return ["i", "t", "s"].filter((axis) => line.points[axis][k] !== null).map((axis) => AXES[axis].show(line.points[axis][k])).join(" · ");
  }

  readOut(at) {
    for (const line of this.lines) line.value.textContent = "";
    for (const [line, faint, strong] of this.drawn) {
      const xs = strong[view.axis], k = at === null ? xs.length - 1 : nearest(xs, at);
      if (k < 0 || xs[k] === null) { line.value.textContent = "–"; continue; }
      const reach = (this.range[1] - this.range[0]) * 0.02;
      if (at !== null && (at > xs.at(-1) + reach || at < xs[0] - reach)) { line.value.textContent = "–"; continue; }
      const value = strong.v[k];
      line.value.textContent = value === null ? "not finite" : this.unit.show(value);
      if (faint) {
        const f = at === null ? faint.v.length - 1 : nearest(faint[view.axis], xs[k]), one = faint.v[f];
        if (one !== value) line.value.textContent += ` (raw ${one === null ? "not finite" : this.unit.show(one)})`;
      }
      if (at === null || value === null || (this.log && value <= 0)) continue;
      const x = this.x(xs[k]);
      if (x >= this.left - 1 && x <= this.right + 1) this.pointer.append(make("circle", { class: `dot colour-${line.colour}`, cx: x, cy: this.y(value), r: 4 }));
    }
  }

  spoken() {
    return [this.where(view.cursor), ...this.visible.map((line) => `${line.label} ${line.value.textContent}`)].join(", ");
  }
}

// Where the time between records went: bars of stacked phases, one plot a run.
class PhasePlot extends Plot {
  constructor(title, phases, run, { from, to, seconds }, options = {}) {
    super(title, options);
    Object.assign(this, { run, from, to, share: true });
    this.layers = phases.map((name, index) => ({ name, index, seconds: seconds[name] })).filter((layer) => layer.seconds.some((v) => v > 0));
    this.addSwitch("share", () => { this.share = !this.share; }, true);
    for (const layer of this.layers) {
      const swatch = make("svg", { class: "swatch", width: 14, height: 12, "aria-hidden": "true" },
        make("rect", { class: `phase-${layer.index}`, width: 14, height: 12 }), make("rect", { class: `hatch hatch-${layer.index}`, width: 14, height: 12 }));
      this.addEntry(swatch, layer.name === "data" ? "getting batches" : layer.name, layer);
    }
  }

  showsRun(run) { return run === this.run; }
  places() { return this.to[view.axis].filter((x) => x !== null && x >= this.range[0] && x <= this.range[1]); }
  // Seconds per iteration, or share, of a layer over the intervals from `first` to `last`.
  value(layer, [first, last]) {
    const sum = (seconds) => { let all = 0; for (let k = first; k <= last; k++) all += seconds[k]; return all; };
    const whole = this.share ? this.layers.reduce((all, one) => all + sum(one.seconds), 0) : this.to.i[last] - this.from.i[first];
    return sum(layer.seconds) / (this.share ? whole || 1 : Math.max(1, whole));
  }
  all(k) { return this.layers.reduce((sum, layer) => sum + layer.seconds[k], 0); }

  draw() {
    this.node.hidden = view.hiddenRuns.has(this.run);
    if (this.node.hidden) return;
    const range = view.range ?? view.extent[view.axis], count = this.to.i.length;
    const [starts, ends] = [this.from[view.axis], this.to[view.axis]];
    const shown = this.layers.filter((layer) => !layer.off), inside = [];
    for (let k = 0; k < count; k++) if (ends[k] !== null && ends[k] >= range[0] && starts[k] <= range[1]) inside.push(k);
    // A bar narrower than two pixels is a blur: neighbours share one.
    const stride = Math.max(1, Math.ceil((2 * inside.length) / Math.max(100, this.svg.clientWidth - 64))), bars = [];
    for (let at = 0; at < inside.length; at += stride) bars.push([inside[at], inside[Math.min(at + stride, inside.length) - 1]]);
    const total = (bar) => shown.reduce((sum, layer) => sum + this.value(layer, bar), 0);
    const high = bars.reduce((most, bar) => Math.max(most, total(bar)), 0);
    const content = this.frame(0, this.share ? 1 : high * 1.06, this.share ? UNITS.share : UNITS.seconds);
    const base = new Float64Array(bars.length);
    for (const layer of shown) {
      let d = "";
      bars.forEach((bar, at) => {
        const value = this.value(layer, bar), y = this.y(base[at] + value), x = this.x(starts[bar[0]]);
        const width = Math.max(1, this.x(ends[bar[1]]) - x), tall = this.y(base[at]) - y;
        base[at] += value;
        if (tall > 0.05) d += `M${x.toFixed(2)} ${y.toFixed(2)}h${width.toFixed(2)}v${tall.toFixed(2)}h${(-width).toFixed(2)}z`;
      });
      content.append(make("path", { class: `phase-${layer.index}`, d }), make("path", { class: `hatch hatch-${layer.index}`, d }));
    }
    this.svg.setAttribute("aria-label", `${this.title} by ${AXES[view.axis].name}. ${shown.map((layer) => `${layer.name} ${duration(layer.seconds.reduce((a, b) => a + b, 0))}`).join(", ")} in all.`);
    this.drawCursor();
  }

  bar(at) { return at === null ? -1 : this.to[view.axis].findIndex((end, k) => end !== null && at >= this.from[view.axis][k] && at <= end); }
  where(at) {
    const k = this.bar(at);
    if (k < 0) return at === null ? "totals" : "";
    return `iterations ${(this.from.i[k] + 1).toLocaleString("en")} to ${this.to.i[k].toLocaleString("en")}: ${duration(this.all(k))}`;
  }
  readOut(at) {
    const k = this.bar(at), sum = (values) => values.reduce((a, b) => a + b, 0);
    const whole = k < 0 ? sum(this.layers.map((layer) => sum(layer.seconds))) : this.all(k);
    for (const layer of this.layers) {
      const seconds = k < 0 ? sum(layer.seconds) : layer.seconds[k];
      layer.value.textContent = at !== null && k < 0 ? "–" : `${duration(seconds)} (${UNITS.share.show(whole ? seconds / whole : 0)})`;
    }
  }
  spoken() { return [this.where(view.cursor), ...this.layers.map((layer) => `${layer.name} ${layer.value.textContent}`)].join(", "); }
}

// What all plots share

let waiting = false;
function setCursor(x) {
  view.cursor = x;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawCursors(); });
}
function drawCursors() { for (const plot of view.plots) if (!plot.node.hidden) plot.drawCursor(); }
function drawAll() { for (const plot of view.plots) plot.draw(); }

function setRange(range) {
  const [low, high] = view.extent[view.axis];
  view.range = range && range[1] > range[0] ? [Math.max(low, range[0]), Math.min(high, range[1])] : null;
  if (view.range && view.range[0] <= low && view.range[1] >= high) view.range = null;
  document.getElementById("whole").disabled = view.range === null;
  drawAll();
}
function zoom(factor) {
  const [low, high] = view.range ?? view.extent[view.axis], middle = view.cursor ?? (low + high) / 2;
  setRange([middle - (middle - low) * factor, middle + (high - middle) * factor]);
}
