// The page of one or several runs: which plots there are, and the bar that steers them all.

const page = JSON.parse(document.getElementById("data").textContent);
const { runs } = page;
const EIGHT = (index) => (index % 8) + 1;
view.several = runs.length > 1;
view.letters = runs.map((run) => run.letter);
view.marks = new Set(["resumes", "problems", "saves"]);
view.allMarks = runs.flatMap((run, index) => run.marks.map((mark) => ({ ...mark, run: index })));
view.extent = Object.fromEntries(["i", "t", "s"].map((axis) => {
  let most = 0;
  for (const run of runs) {
    for (const one of [...Object.values(run.series), ...Object.values(run.evaluators), ...Object.values(run.answers), ...(run.phases ? [run.phases.to] : [])]) {
      for (const x of one[axis]) if (x > most) most = x;
    }
  }
  return [axis, [0, most || 1]];
}));

// The lines of a plot. One run: a look for each kind of line. Several: colour and dash are the run's, the marker the kind's.
function linesOf(kinds) {
  const lines = [];
  kinds.forEach(({ name, points, raw = () => null, smoothable = false }, kind) => {
    runs.forEach((run, index) => {
      const found = points(run);
      if (!found || !found.v.length) return;
      const label = view.several ? `${run.letter}${kinds.length > 1 ? ` ${name}` : ""}` : name;
      const look = view.several ? index : kind;
      lines.push({
        label, run: index, points: found, raw: raw(run), smoothable, primary: kind === 0,
        colour: EIGHT(look), dash: (look + Math.floor(look / 8)) % DASHES.length, marker: kind % MARKERS.length,
      });
    });
  });
  return view.several ? lines.sort((a, b) => a.run - b.run) : lines;
}
const series = (key, name) => ({ name, points: (run) => run.series[key] });

// The mean since the record before stands for training; the loss of that one iteration is the faint line behind it.
const same = (a, b) => a.v.length === b.v.length && a.v.every((v, k) => v === b.v[k]);
const named = (of) => [...new Set(runs.flatMap((run) => Object.keys(run[of])))].sort().map((name) => ({ name, points: (run) => run[of][name] }));
const PLOTS = [
  ["Loss", UNITS.loss, [
    {
      name: "train", smoothable: true,
      points: (run) => run.series.loss_mean ?? run.series.loss,
      raw: ({ series: { loss, loss_mean: mean } }) => (loss && mean && !same(loss, mean) ? loss : null),
    },
    ...named("evaluators"),
  ], { wide: true, fromZero: false }],
  ["Loss of what the assistant says, by kind", UNITS.loss, named("kind_losses"), {}],
  ["Accuracy", UNITS.share, named("accuracies"), {}],
  ["Learning rate", UNITS.rate, [series("learning_rate", "learning rate")], {}],
  ["Gradient norm, before clipping", UNITS.norm, [{ ...series("grad_norm", "gradient norm"), smoothable: true }], {}],
  ["Throughput", UNITS.speed, [series("tokens_per_second", "tokens/s"), series("planned_tokens_per_second", "planned")], {}],
  ["Model FLOP utilisation (MFU)", UNITS.share, [series("mfu_causal", "causal"), series("mfu_full", "full square")], {}],
  ["Model FLOP/s", UNITS.flops, [series("model_flops_per_second", "model FLOP/s")], {}],
  ["Peak memory so far", UNITS.bytes, [series("memory_bytes", "memory"), series("planned_memory_bytes", "planned")], {}],
  ["Answers to conversations", UNITS.share, named("answers"), {}],
  ["Waiting for data", UNITS.share, [series("data_wait_share", "share of step time")], {}],
];

const place = document.getElementById("plots");
for (const [title, unit, kinds, options] of PLOTS) {
  const lines = linesOf(kinds);
  // Where the hardware's peak is known, utilisation says the same as FLOP/s and more.
  if (unit === UNITS.flops && runs.every((run) => run.series.mfu_causal || !run.series.model_flops_per_second)) continue;
  if (lines.length) place.append(new LinePlot(title, unit, lines, options).node);
}
runs.forEach((run, index) => {
  if (!run.phases) return;
  const title = `Time per phase${view.several ? `, ${run.letter} ${run.name}` : ""}`;
  place.append(new PhasePlot(title, page.phases, index, run.phases, { wide: !view.several }).node);
});

// The bar

const bar = document.getElementById("toolbar");
function group(label, ...controls) {
  bar.append(make("div", { class: "group", role: "group", "aria-label": label }, make("span", { class: "label" }, label), ...controls));
}
function button(text, press, attributes = {}) {
  const node = make("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", () => press(node));
  return node;
}
function toggle(text, set, member, { inverse = false } = {}) {
  return button(text, (node) => {
    if (!set.delete(member)) set.add(member);
    node.setAttribute("aria-pressed", String(set.has(member) !== inverse));
    drawAll();
  }, { "aria-pressed": String(set.has(member) !== inverse) });
}

if (view.plots.length) {
  if (view.several) {
    group("Runs", ...runs.map((run, index) => {
      const node = toggle("", view.hiddenRuns, index, { inverse: true });
      node.classList.add("run");
      node.append(make("span", { class: `letter run-${EIGHT(index)}` }, run.letter), ` ${run.name}`);
      return node;
    }));
  }
  const axes = Object.entries(AXES).filter(([axis]) => runs.some((run) => [...Object.values(run.series), ...Object.values(run.evaluators), ...Object.values(run.answers)].some((one) => (one[axis][0] ?? null) !== null)));
  group("Over", ...axes.map(([axis, { name }]) => button(name, (node) => {
    for (const other of node.parentNode.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === node));
    view.axis = axis;
    view.cursor = null;
    setRange(null);
  }, { "aria-pressed": String(axis === view.axis) })));
  const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, id: "smoothing", "aria-label": "Smoothing of loss and gradient norm" });
  const shown = make("output", { for: "smoothing" }, "0");
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    shown.textContent = slider.value;
    drawAll();
  });
  group("Smoothing", slider, shown);
  const GROUPS = { resumes: "▲ resumes, stops", problems: "✕ skipped steps, failures", saves: "● saves, exports" };
  const there = Object.keys(GROUPS).filter((name) => view.allMarks.some((mark) => markOf(mark.kind).group === name));
  if (there.length) group("Events", ...there.map((name) => toggle(GROUPS[name], view.marks, name)));
  group("Zoom", button("−", () => zoom(2), { "aria-label": "zoom out" }), button("+", () => zoom(0.5), { "aria-label": "zoom in" }),
    button("everything", () => setRange(null), { id: "whole", disabled: "" }));
} else {
  bar.hidden = true;
  document.getElementById("plot-help").textContent = "There are no numbers to plot yet.";
}

// Hatches tell phases apart without their colours: every second one has lines across it.
const DIRECTIONS = ["M0 8L8 0", "M0 0L8 8", "M4 0V8", "M0 4H8"];
document.body.append(make("svg", { width: 0, height: 0, "aria-hidden": "true", class: "unseen" }, make("defs", {}, ...DIRECTIONS.map((d, k) =>
  make("pattern", { id: `hatch-${k}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" }, make("path", { class: "hatching", d }))))));

drawAll();
let width = 0;
new ResizeObserver(() => {
  if (place.clientWidth === width) return;
  width = place.clientWidth;
  drawAll();
}).observe(place);
