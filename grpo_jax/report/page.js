// The page: its data, its views and its addresses; live, it asks for what is new.

const EVERY = 2000; // milliseconds between two questions for what is new

// The parts of the page, JSON compressed: from the page itself, or from where it came from.
const source = {
  live: document.body.dataset.live === "yes",
  async json(name) {
    const bytes = this.live ? await this.asked(`/data/${name}`) : this.inside(name);
    return bytes && new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  },
  inside(name) {
    const element = document.getElementById(name);
    if (element === null) throw new Error(`the page is cut off: it lacks its part ${name}`);
    const text = atob(element.textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  },
  // null: nothing is new.
  async asked(address) {
    const answer = await fetch(address);
    if (answer.status === 204) return null;
    if (!answer.ok) throw new Error(await answer.text());
    return answer.arrayBuffer();
  },
};

let manifest = null;

const curves = new Curves(byId("curves"), (step) => rolloutsOf({ from: step, to: step }), (step, byKey) => readout(step, byKey));
const rollouts = new Rollouts(source, (address) => { history.replaceState(null, "", address); });

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

// What the page shows of a manifest, a newer one too.
async function show(found) {
  manifest = found;
  byId("made").textContent = `${source.live ? "live, read" : "made"} ${manifest.made}`;
  legend();
  summary();
  drawCurves();
  tables();
  await rollouts.update(manifest);
}

function legend() {
  byId("legend").hidden = manifest.runs.length < 2;
  byId("legend").replaceChildren(...manifest.runs.map((run, i) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    line.setAttribute("width", "26");
    line.setAttribute("height", "8");
    line.setAttribute("aria-hidden", "true");
    const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ x1: 1, x2: 25, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": DASHES[i % 4].join(" ") })) stroke.setAttribute(name, value);
    stroke.style.stroke = `var(--c${i % 8})`;
    line.append(stroke);
    return make("li", "", line, run.label);
  }));
}

function summary() {
  byId("summary").replaceChildren(...manifest.runs.map((run) => {
    const list = make("dl");
    for (const item of run.summary) {
      const text = make("dd", "", ...shownText(item.text));
      if (item.show) {
        const button = make("button", "plain", "show them");
        button.type = "button";
        button.addEventListener("click", () => rolloutsOf({ run: manifest.runs.indexOf(run), ...item.show }));
        text.append(" ", button);
      }
      list.append(make("dt", item.warning ? "warning" : "", item.title), text);
    }
    const place = make("p", "quiet", run.folder);
    return make("div", "run-summary", ...(manifest.runs.length > 1 ? [make("h3", "", run.label)] : []), list, place);
  }));
}

function drawCurves() {
  curves.draw(manifest);
  byId("smoothing").value = String(curves.width);
  const steps = Math.max(0, ...manifest.runs.map((run) => run.metrics.step.length));
  const width = (curves.width / 100) * steps;
  byId("smoothing-width").textContent = width < 0.5 ? "off" : `± ${Math.round(width)} steps`;
}

function readout(step, byKey) {
  const place = byId("readout");
  place.setAttribute("aria-live", byKey ? "polite" : "off");
  if (step === null) return place.replaceChildren();
  const values = byKey ? curves.charts.find(({ figure }) => figure === document.activeElement)?.plot : null;
  const told = values ? [...values.root.querySelectorAll(".u-legend .u-series:not(.raw)")].slice(1).map((row) => `${row.querySelector(".u-label").textContent} ${row.querySelector(".u-value").textContent}`).join(", ") : "";
  const some = manifest.runs.some((run) => run.groups);
  place.replaceChildren(`step ${step}${told ? `: ${told}` : ""}${some ? " · click, or Enter, for its rollouts" : ""}`);
}

function tables() {
  const names = manifest.sections.flatMap((section) => section.panels.flatMap((panel) => panel.series.map((one) => [one.metric, panel.unit === "share"])));
  const many = manifest.runs.length > 1;
  const head = make("tr", "", columnHead("metric"), ...manifest.runs.flatMap((run) => [`${many ? `${run.name}: ` : ""}first`, "last", "in step"].map(columnHead)));
  const body = make("tbody", "", ...names.map(([name, share]) => make("tr", "", make("td", "mono", name), ...manifest.runs.flatMap((run) => {
    const values = run.metrics[name] ?? [];
    const first = values.findIndex((value) => value !== null), last = values.findLastIndex((value) => value !== null);
    return [short(values[first], share), short(values[last], share), last < 0 ? "–" : String(run.metrics.step[last])].map((text) => make("td", "", text));
  }))));
  byId("last").replaceChildren(make("thead", "", head), body);
  const fields = [...new Set(manifest.runs.flatMap((run) => Object.keys(run.settings)))];
  byId("only-differing").parentElement.hidden = !many;
  const only = many && byId("only-differing").checked;
  byId("settings").replaceChildren(
    make("thead", "", make("tr", "", columnHead("setting"), ...manifest.runs.map((run) => columnHead(run.name)))),
    make("tbody", "", ...fields.filter((field) => !only || manifest.differing.includes(field)).map((field) => make("tr", manifest.differing.includes(field) ? "differs" : "", make("td", "mono", field),
      ...manifest.runs.map((run) => make("td", "mono", ...(field in run.settings ? shownText(JSON.stringify(run.settings[field])) : ["–"])))))));
}

// The view that the address names: #overview, #rollouts, #values, or #group=RUN.STEP.PLACE.
async function follow() {
  const group = /^#group=(\d+)\.(\d+)\.(\d+)$/.exec(location.hash);
  const name = group ? "rollouts" : ["rollouts", "values"].find((view) => location.hash === `#${view}`) ?? "overview";
  for (const view of ["overview", "rollouts", "values"]) {
    byId(view).hidden = view !== name;
    if (view === name) byId(`to-${view}`).setAttribute("aria-current", "page");
    else byId(`to-${view}`).removeAttribute("aria-current");
  }
  if (name === "overview") curves.resize();
  if (name !== "rollouts") return;
  await whole;
  if (group) await rollouts.go(...group.slice(1).map(Number));
  else {
    await rollouts.open();
    await rollouts.filter();
  }
}

// Shows the groups that a filter leaves.
async function rolloutsOf({ run, from = "", to = "", difference = "" }) {
  if (!manifest.runs.some((one) => one.groups)) return;
  byId("filters").reset();
  if (run !== undefined) rollouts.run = run;
  rollouts.chosen = null;
  await whole;
  await rollouts.open();
  byId("run").value = String(rollouts.run);
  byId("from").value = from;
  byId("to").value = to;
  byId("difference").value = difference;
  await go("#rollouts");
}

// Goes to an address of the page.
function go(address) {
  history.pushState(null, "", address);
  return follow();
}

// Live: asks for what is new, again and again; what is filtered, chosen and scrolled stays.
async function refresh() {
  try {
    const found = await source.json(`runs?since=${manifest.version}`);
    notice("");
    if (found) await show(found);
  } catch (error) {
    notice(error instanceof TypeError ? "The program that shows this page has ended; what is here stays." : error.message);
  }
  setTimeout(refresh, EVERY);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    (byId("rollouts").hidden ? go("#rollouts") : Promise.resolve()).then(() => byId("search").focus());
    return;
  }
  if (byId("rollouts").hidden) return;
  const act = { j: () => rollouts.move(1), k: () => rollouts.move(-1), n: () => rollouts.moveStep(1), p: () => rollouts.moveStep(-1), s: () => rollouts.toggleStep() }[event.key];
  if (act) { event.preventDefault(); act(); }
}

byId("smoothing").addEventListener("input", (event) => { curves.smoothing = Number(event.target.value); drawCurves(); });
byId("log").addEventListener("change", (event) => { curves.log = event.target.checked; drawCurves(); });
byId("unzoom").addEventListener("click", () => curves.show(null));
byId("only-differing").addEventListener("change", tables);
byId("curve-settings").addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => curves.print(false)); // with the colours of the other scheme
addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); curves.print(true); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); curves.print(false); });
addEventListener("hashchange", () => { follow().catch((error) => notice(error.message)); });
addEventListener("keydown", keys);

// The parts behind the script may not be there yet.
const whole = new Promise((done) => { if (document.readyState === "loading") addEventListener("DOMContentLoaded", done); else done(); });

(async () => {
  try {
    if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old for the page: it wants one of 2023 or later.");
    await show(await source.json("runs"));
    document.body.dataset.ready = "yes";
    await follow();
    if (source.live) setTimeout(refresh, EVERY);
  } catch (error) {
    notice(error.message);
    throw error;
  }
})();
