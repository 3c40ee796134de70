// The curves: a panel for each of the manifest's, drawn by uPlot, one cursor through all.

const CURVE_HEIGHT = 190;
const PRINTED = 330; // pixels of a curve on paper, where two stand side by side
const FONT = "11px system-ui, sans-serif";
const STROKES = ["solid", "dashed", "dotted", "double"]; // as the legend draws DASHES
const AREAS = [2, 6, 4, 5, 3, 1, 0, 7]; // colours, in the order of a panel's areas
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

class Curves {
  // place: the element to draw in; onStep(step): a step was chosen; onMove(step or null, byKey): where the cursor is.
  constructor(place, onStep, onMove) {
    this.place = place;
    this.onStep = onStep;
    this.onMove = onMove;
    this.smoothing = null; // share of the steps, in per cent, that the running mean's width is; null: not chosen yet
    this.log = false;
    this.zoom = null; // [first, last step] that is shown; null: all
    this.charts = []; // of what is drawn: {plot, box}
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(place);
  }

  // Draws the panels of a manifest anew; folds that are open stay open.
  draw(manifest) {
    this.manifest = manifest;
    const longest = Math.max(0, ...manifest.runs.map((run) => run.metrics.step.length));
    this.width = this.smoothing ?? (longest > 20 ? 2.5 : 0);
    this.last = Math.max(1, ...manifest.runs.flatMap((run) => run.metrics.step.slice(-1)));
    const open = new Set([...this.place.querySelectorAll("details[open]")].map((fold) => fold.dataset.title));
    const focused = document.activeElement?.dataset?.panel;
    this.charts.forEach((chart) => chart.plot.destroy());
    this.charts = [];
    this.place.style.minHeight = `${this.place.offsetHeight}px`; // or the page would scroll while it is empty
    this.place.replaceChildren();
    for (const section of manifest.sections) {
      const panels = make("div", "panels");
      if (section.title === "Everything else") {
        const fold = make("details", "", make("summary", "", section.title), panels);
        fold.dataset.title = section.title;
        this.place.append(fold);
        let drawn = false;
        const fill = () => {
          if (fold.open && !drawn) { drawn = true; this.fill(panels, section.panels); }
        };
        fold.addEventListener("toggle", fill);
        fold.open = open.has(section.title);
      } else {
        this.place.append(make("h3", "", section.title), panels);
        this.fill(panels, section.panels);
      }
    }
    this.place.style.minHeight = "";
    if (focused) this.place.querySelector(`[data-panel="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  fill(place, panels) {
    for (const panel of panels) {
      const runs = this.manifest.runs.map((run, i) => [run, i]).filter(([run]) => panel.series.some((one) => run.metrics[one.metric]));
      if (panel.kind === "stack") {
        for (const [run, i] of runs) this.chart(place, panel, [[run, i]], runs.length > 1 ? `${panel.title}: ${run.name}` : panel.title);
      } else if (runs.length) {
        this.chart(place, panel, runs, panel.title);
      }
    }
  }

  chart(place, panel, runs, title) {
    const box = make("div", panel.kind === "stack" ? "areas" : "lines");
    const figure = make("figure", panel.wide ? "panel wide" : "panel", make("figcaption", "", title), box);
    figure.tabIndex = 0;
    figure.dataset.panel = title;
    figure.setAttribute("role", "group");
    place.append(figure);
    const data = panel.kind === "stack" ? this.stacked(panel, runs[0][0]) : this.lines(panel, runs);
    figure.setAttribute("aria-label", `${title}. ${data.told.join("; ")}`);
    const share = panel.unit === "share";
    const log = this.log && panel.kind === "line";
    const quiet = () => colour("--quiet");
    const grid = { stroke: () => colour("--grid"), width: 1 };
    const curves = this;
    const plot = new uPlot({
      width: this.widthOf(figure),
      height: CURVE_HEIGHT,
      legend: { live: true, markers: { dash: (u, i) => STROKES[DASHES.indexOf(u.series[i].pattern)] ?? "solid" } },
      cursor: { y: false, sync: { key: "steps", scales: ["x", null] }, points: { size: 6 }, drag: { x: true, y: false, setScale: false } },
      scales: {
        x: { time: false, range: (u, min, max) => [curves.zoom?.[0] ?? 0, curves.zoom?.[1] ?? curves.last] },
        y: { distr: log ? 3 : 1, range: (u, min, max) => bounds(min, max, log, panel.kind === "stack") },
      },
      axes: [
        { stroke: quiet, grid, ticks: { show: false }, font: FONT, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] },
        { stroke: quiet, grid, ticks: { show: false }, font: FONT, size: 52, values: (u, ticks) => ticks.map((tick) => tick === null ? "" : short(tick, share)) },
      ],
      series: [{ label: "step" }, ...data.series.map((one) => ({ ...one, value: (u, v, i, at) => short(at === null ? one.latest : one.raw[at], share) }))],
      hooks: {
        setCursor: [(u) => { if (u === curves.led) curves.onMove(u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx], false); }],
        setSelect: [(u) => {
          if (u !== curves.led || u.select.width < 8) return;
          curves.show([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
        }],
      },
    }, data.columns, box);
    plot.root.querySelector("canvas").setAttribute("aria-hidden", "true");
    this.charts.push({ plot, figure });
    figure.addEventListener("pointerenter", () => { this.led = plot; });
    plot.over.addEventListener("click", () => { if (plot.select.width < 8 && plot.cursor.idx !== null) this.onStep(plot.data[0][plot.cursor.idx]); });
    plot.over.addEventListener("dblclick", () => this.show(null));
    figure.addEventListener("keydown", (event) => this.key(event, plot));
  }

  // The columns of a panel's lines: the steps of all its runs, then by line its values, raw and smoothed where it is long.
  lines(panel, runs) {
    const metrics = panel.series.flatMap((one, s) => runs.filter(([run]) => run.metrics[one.metric]).map(([run, i]) => ({ one, s, run, i })));
    const steps = [...new Set(metrics.flatMap(({ one, run }) => run.metrics.step.filter((_, k) => run.metrics[one.metric][k] !== null)))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, k) => [step, k]));
    const columns = [steps];
    const series = [];
    const told = [];
    const many = runs.length > 1;
    for (const { one, s, run, i } of metrics) {
      const raw = new Array(steps.length).fill(null);
      run.metrics.step.forEach((step, k) => { if (run.metrics[one.metric][k] !== null) raw[place.get(step)] = run.metrics[one.metric][k]; });
      const known = raw.filter((value) => value !== null);
      const name = [many ? run.name : "", one.label].filter(Boolean).join(", ") || "value";
      const line = many ? i : s;
      const look = { stroke: () => colour(`--c${line % 8}`), dash: DASHES[(many && panel.series.length > 1 ? s : line) % 4], spanGaps: true };
      look.pattern = look.dash; // uPlot changes its own
      const share = panel.unit === "share";
      told.push(`${name}: ${short(known[0], share)} first, ${short(known[known.length - 1], share)} last`);
      const latest = known[known.length - 1];
      const smooth = known.length > 3 ? smoothed(raw, this.width / 100) : null;
      const drawable = (values) => this.log ? values.map((value) => value > 0 ? value : null) : values;
      if (smooth) {
        columns.push(drawable(raw));
        series.push({ label: name, class: "raw", width: 1, alpha: 0.3, points: { show: false }, raw, latest, ...look, dash: [] });
      }
      columns.push(drawable(smooth ?? raw));
      const points = known.length <= 20 && !smooth;
      series.push({ label: name, width: 2, points: { show: points, size: 5, fill: look.stroke }, raw, latest, ...look });
    }
    return { columns, series, told };
  }

  // Areas on top of each other, of one run: the sum of all first, so that each next one covers its share of it.
  stacked(panel, run) {
    const parts = panel.series.filter((one) => run.metrics[one.metric]);
    const rows = run.metrics.step.map((step, k) => k).filter((k) => parts.some((one) => run.metrics[one.metric][k] !== null));
    const values = parts.map((one) => smoothed(rows.map((k) => run.metrics[one.metric][k] ?? 0), this.width / 100) ?? rows.map((k) => run.metrics[one.metric][k] ?? 0));
    const raw = parts.map((one) => rows.map((k) => run.metrics[one.metric][k]));
    const columns = [rows.map((k) => run.metrics.step[k])];
    const series = [];
    const share = panel.unit === "share";
    for (let p = parts.length - 1; p >= 0; p--) {
      columns.push(rows.map((_, k) => { let sum = 0; for (let q = 0; q <= p; q++) sum += values[q][k]; return sum; }));
      const ink = `--c${AREAS[parts[p].colour % 8]}`;
      series.push({ label: parts[p].label, stroke: () => colour("--card"), fill: () => colour(ink), width: 1, points: { show: rows.length === 1, size: 5 }, raw: raw[p], latest: raw[p][rows.length - 1] });
    }
    const told = parts.map((one, p) => `${one.label}: ${short(raw[p][0], share)} first, ${short(raw[p][rows.length - 1], share)} last`);
    return { columns, series, told };
  }

  // Shows the steps from one to another, in all panels; null: the whole run.
  show(range) {
    this.zoom = range;
    byId("unzoom").hidden = !range;
    for (const { plot } of this.charts) {
      plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      plot.setScale("x", { min: 0, max: this.last });
    }
  }

  key(event, plot) {
    const steps = plot.data[0];
    if (event.key === "Enter" && plot.cursor.idx !== null) return this.onStep(steps[plot.cursor.idx]);
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    this.led = plot;
    const at = plot.cursor.idx ?? (move > 0 ? -1 : steps.length);
    const next = Math.min(steps.length - 1, Math.max(0, at + move));
    plot.setCursor({ left: plot.valToPos(steps[next], "x"), top: 10 }, true, true);
    this.onMove(steps[next], true);
  }

  widthOf(figure) {
    return this.printed ? PRINTED : Math.max(200, figure.clientWidth - 16);
  }

  // As wide as on paper, or on the screen again.
  print(on) {
    this.printed = on;
    this.resize();
    this.charts.forEach(({ plot }) => plot.redraw(false));
  }

  resize() {
    for (const { plot, figure } of this.charts) {
      const width = this.widthOf(figure);
      if (figure.clientWidth && width !== plot.width) plot.setSize({ width, height: CURVE_HEIGHT });
    }
  }
}

// A weighted running mean, Gaussian, over the values there are; width: its standard deviation, as a share of them all. As curves.png's.
function smoothed(values, width) {
  const places = values.map((value, i) => i).filter((i) => values[i] !== null);
  const sigma = width * places.length;
  if (sigma < 0.5) return null;
  const reach = Math.ceil(3 * sigma);
  const kernel = Array.from({ length: reach + 1 }, (_, d) => Math.exp(-0.5 * (d / sigma) ** 2));
  const means = new Array(values.length).fill(null);
  places.forEach((place, k) => {
    let sum = 0, weight = 0;
    for (let j = Math.max(0, k - reach); j <= Math.min(places.length - 1, k + reach); j++) {
      const w = kernel[Math.abs(j - k)];
      sum += w * values[places[j]];
      weight += w;
    }
    means[place] = sum / weight;
  });
  return means;
}

// What the y axis shows: some room round the values, none below nought where there is nothing below it.
function bounds(min, max, log, stack) {
  if (max - min < 1e-9 * Math.abs(max)) min = max; // rounding of a running mean
  if (min === null || max === null) return log ? [0.1, 1] : [0, 1];
  if (log) return min === max ? [min / 2, max * 2] : [min * 0.9, max * 1.1];
  if (stack) return [0, max || 1];
  const room = 0.08 * (max - min) || 0.1 * Math.abs(max) || 0.5;
  return [min >= 0 ? Math.max(0, min - room) : min - room, max + room];
}
