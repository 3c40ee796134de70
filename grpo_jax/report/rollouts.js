// The rollouts: a list of the groups that the filters leave, and the group, or the step, that is looked at.

const ROW = 60; // pixels of a group in the list
const LONG = 20000; // characters of a text that are shown at once
const MARK_SHORT = { missing: "missing", extra: "too many", value: "other value", type: "other type" };
const CARDS = 24; // groups of a step that are shown at once

class Rollouts {
  // source: where the parts come from; onGroup(address): a group was chosen.
  constructor(source, onGroup) {
    this.source = source;
    this.onGroup = onGroup;
    this.runs = []; // by run: {index, begun, groups, chunks: Map, texts: lower-case texts by group, taskTexts}
    this.run = 0;
    this.shown = []; // numbers of the groups that the filters leave
    this.chosen = null; // the number of a group
    this.wholeStep = false;
    this.turn = 0; // of the newest filtering: older ones give up
    this.list = byId("list");
    this.space = byId("space");
    this.detail = byId("detail");
    this.list.addEventListener("scroll", () => this.rows(), { passive: true });
    this.list.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.rows()).observe(this.list);
    const form = byId("filters");
    let waiting;
    form.addEventListener("input", (event) => {
      if (event.target.id === "run") return;
      clearTimeout(waiting);
      waiting = setTimeout(() => this.filter(), event.target.id === "search" ? 120 : 0);
    });
    form.addEventListener("reset", () => setTimeout(() => this.filter()));
    form.addEventListener("submit", (event) => event.preventDefault());
    byId("run").addEventListener("change", (event) => { this.run = Number(event.target.value); this.chosen = null; this.open().then(() => this.filter()); });
  }

  // Takes a new manifest in; what is filtered, chosen and scrolled stays.
  async update(manifest) {
    this.manifest = manifest;
    const select = byId("run");
    select.replaceChildren(...manifest.runs.map((run, i) => option(String(i), run.label)));
    select.value = String(this.run);
    byId("run-label").hidden = manifest.runs.length < 2;
    if (this.runs[this.run]) {
      await this.open();
      await this.filter();
    }
  }

  // Reads the columns of the run that is looked at, where they are not the newest.
  async open() {
    const about = this.manifest.runs[this.run];
    const before = this.runs[this.run];
    const run = before?.begun === about.begun ? before : { begun: about.begun, groups: -1, chunks: new Map(), texts: [], taskTexts: [] };
    if (run.groups !== about.groups) {
      const index = await this.source.json(`index-${this.run}`);
      // The last chunk may have grown; all before it are as they were.
      for (const [name, chunk] of run.chunks) if (chunk.length < index.chunk) run.chunks.delete(name);
      const seen = {};
      index.place = index.step.map((step) => (seen[step] = (seen[step] ?? -1) + 1));
      index.byTask = new Map();
      index.task.forEach((task, g) => { if (!index.byTask.has(task)) index.byTask.set(task, []); index.byTask.get(task).push(g); });
      if (before && before !== run && this.chosen !== null) this.chosen = numberOf(index, before.index.step[this.chosen], before.index.place[this.chosen]);
      run.index = index;
      run.groups = about.groups;
    }
    this.runs[this.run] = run;
    this.choices(run.index);
  }

  get index() { return this.runs[this.run]?.index; }

  // Fills the choices of the filters; what was chosen stays, where it still is one.
  choices(index) {
    const fill = (id, options) => {
      const select = byId(id), before = select.value;
      select.replaceChildren(...options.map(([value, text]) => option(value, text)));
      if (options.some(([value]) => value === before)) select.value = before;
    };
    fill("reason", [["", "any"], ...index.reasons.map((code, i) => [String(i), this.manifest.reasons[code] ?? code])]);
    fill("difference", [["", "any"], ["any", "some difference"], ["none", "no difference"], ...Object.entries(this.manifest.marks)]);
    byId("tools").replaceChildren(...[...index.tools].sort().slice(0, 2000).map((name) => option(name, "")));
  }

  settings() {
    const value = (id) => byId(id).value.trim();
    const number = (id, none) => value(id) === "" || Number.isNaN(Number(value(id))) ? none : Number(value(id));
    return {
      query: byId("search").value.toLowerCase(), from: number("from", -Infinity), to: number("to", Infinity), least: number("least", -Infinity), most: number("most", Infinity),
      reason: value("reason") === "" ? null : Number(value("reason")), difference: value("difference"), variance: value("variance"), tool: value("tool").toLowerCase(),
    };
  }

  // The numbers of the groups that the filters but the search leave.
  matching(settings) {
    const { step, reward, reason, marks, called, tools } = this.index;
    const bit = Object.keys(this.manifest.marks).indexOf(settings.difference);
    const wanted = settings.tool ? new Set(tools.flatMap((name, i) => name.toLowerCase().includes(settings.tool) ? [i] : [])) : null;
    const anyReward = settings.least === -Infinity && settings.most === Infinity;
    const anyResponse = anyReward && settings.reason === null && !settings.difference;
    const found = [];
    for (let g = 0; g < step.length; g++) {
      if (step[g] < settings.from || step[g] > settings.to) continue;
      if (wanted && !called[g].some((tool) => wanted.has(tool))) continue;
      if (settings.variance && (Math.min(...reward[g]) === Math.max(...reward[g])) !== (settings.variance === "equal")) continue;
      if (!anyResponse && !reward[g].some((value, i) => this.fits(settings, bit, value, reason[g][i], marks[g][i]))) continue;
      found.push(g);
    }
    return found;
  }

  // Whether one response has all that is asked of a response.
  fits(settings, bit, value, reason, marks) {
    if (value === null ? settings.least !== -Infinity || settings.most !== Infinity : value < settings.least || value > settings.most) return false;
    if (settings.reason !== null && reason !== settings.reason) return false;
    if (settings.difference === "any") return marks !== 0;
    if (settings.difference === "none") return marks === 0;
    return !settings.difference || (marks >> bit & 1) === 1;
  }

  async filter() {
    const turn = ++this.turn;
    if (!this.index) return;
    const settings = this.settings();
    let found = this.matching(settings);
    if (settings.query) {
      if (!await this.readTexts(turn)) return;
      const { texts, taskTexts, index } = this.runs[this.run];
      const inTask = taskTexts.map((text) => text.includes(settings.query));
      found = found.filter((g) => inTask[index.task[g]] || texts[g].includes(settings.query));
    }
    const query = byId("search").value;
    const queried = query !== this.query;
    this.query = query;
    this.shown = found;
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${this.index.step.length.toLocaleString("en")} groups`;
    this.rows();
    if (this.chosen === null && found.length) await this.choose(found[0], false);
    else if (this.chosen === null) this.detail.replaceChildren(make("p", "quiet", this.index.step.length ? "No group is like that." : "This run has no rollouts."));
    else if (queried || this.wholeStep) await this.show();
  }

  // The texts of all groups, to search in. Says how far it is; false where another filtering has begun meanwhile.
  async readTexts(turn) {
    const run = this.runs[this.run], groups = run.index.step.length, tasks = run.index.tasks.length, size = run.index.chunk;
    for (let g = run.texts.length; g < groups; g = run.texts.length) {
      const chunk = await this.chunk("groups", Math.floor(g / size));
      for (let k = g % size; k < chunk.length; k++) run.texts.push(chunk[k].map((one) => one.pieces.map((piece) => piece[1]).join("")).join("\n").toLowerCase());
      if (turn !== this.turn) return false;
      byId("count").textContent = `reading ${run.texts.length.toLocaleString("en")} of ${groups.toLocaleString("en")} groups…`;
    }
    for (let t = run.taskTexts.length; t < tasks; t = run.taskTexts.length) {
      const chunk = await this.chunk("tasks", Math.floor(t / size));
      for (let k = t % size; k < chunk.length; k++) {
        const said = chunk[k].turns.filter(([role]) => role !== "system").map(([, text]) => text);
        const right = chunk[k].answer.map((call) => `${call.name} ${call.arguments}`);
        run.taskTexts.push([run.index.tasks[run.taskTexts.length][0], ...said, ...right].join("\n").toLowerCase());
      }
      if (turn !== this.turn) return false;
    }
    return true;
  }

  // What some groups, or tasks, say. The newest few are kept.
  async chunk(kind, k) {
    const chunks = this.runs[this.run].chunks, name = `${kind}-${this.run}-${k}`;
    if (!chunks.has(name)) {
      const read = await this.source.json(name);
      chunks.set(name, read);
      if (chunks.size > 40) chunks.delete(chunks.keys().next().value);
      return read;
    }
    return chunks.get(name);
  }

  // Draws the rows that are in sight.
  rows() {
    if (!this.index) return;
    this.space.style.height = `${this.shown.length * ROW}px`;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.shown.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 4);
    const rows = [];
    for (let i = first; i < last; i++) rows.push(this.row(i));
    this.space.replaceChildren(...rows);
    const active = this.shown.indexOf(this.chosen);
    if (active >= first && active < last) this.list.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(i) {
    const g = this.shown[i], index = this.index;
    const row = make("div", "row",
      make("div", "request", ...shownText(index.tasks[index.task[g]][1], this.query)),
      make("div", "facts", make("span", "", `step ${index.step[g]} · ${index.place[g] + 1}`), this.cells(g), index.learned[g] ? "" : make("span", "", "not learned")));
    row.id = `row-${g}`;
    row.style.top = `${i * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(g === this.chosen));
    row.setAttribute("aria-posinset", String(i + 1));
    row.setAttribute("aria-setsize", String(this.shown.length));
    row.addEventListener("click", () => this.choose(g, true));
    return row;
  }

  cells(g) {
    const cells = make("span", "cells");
    const rewards = this.index.reward[g];
    cells.setAttribute("role", "img");
    cells.setAttribute("aria-label", `rewards ${rewards.map((value) => value === null ? "none" : plainNumber(value)).join(", ")}`);
    cells.append(...rewards.slice(0, 16).map((value) => rewardTag(value, "cell", true)), rewards.length > 16 ? ` +${rewards.length - 16}` : "");
    return cells;
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    this.move(move);
  }

  // Goes on, or back, by so many groups of the list.
  move(by) {
    const { shown } = this;
    if (!shown.length) return;
    let at = shown.indexOf(this.chosen);
    if (at < 0) at = shown.findIndex((g) => g > this.chosen) - (by > 0 ? 1 : 0);
    this.choose(shown[Math.min(shown.length - 1, Math.max(0, at + by))], true);
  }

  // Goes to the first group of the next step, or of the one before, that is in the list.
  moveStep(by) {
    const step = this.index?.step;
    if (!step || this.chosen === null) return;
    const steps = [...new Set(this.shown.map((g) => step[g]))].sort((a, b) => a - b);
    const next = by > 0 ? steps.find((s) => s > step[this.chosen]) : steps.findLast((s) => s < step[this.chosen]);
    if (next !== undefined) this.choose(this.shown.find((g) => step[g] === next), true);
  }

  // by: whether a person chose it, and its address should say so.
  async choose(g, by) {
    this.chosen = g;
    const at = this.shown.indexOf(g);
    if (at >= 0) {
      const top = at * ROW;
      if (top < this.list.scrollTop) this.list.scrollTop = top;
      else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    }
    this.rows();
    if (by) this.onGroup(this.address(g));
    await this.show();
    this.detail.scrollTop = 0;
  }

  address(g) { return `#group=${this.run}.${this.index.step[g]}.${this.index.place[g]}`; }

  // Chooses the group of an address: run, step and place in the step.
  async go(run, step, place) {
    if (this.run !== run || !this.index) {
      this.run = Math.min(run, this.manifest.runs.length - 1);
      byId("run").value = String(this.run);
      await this.open();
    }
    const g = numberOf(this.index, step, place);
    this.chosen = g;
    await this.filter();
    if (g !== null) await this.choose(g, false);
    else this.detail.replaceChildren(make("p", "quiet", `There is no group ${place + 1} of step ${step} here.`));
  }

  async show() {
    const g = this.chosen, run = this.run;
    const content = this.wholeStep ? await this.step(g) : await this.group(g);
    if (g !== this.chosen || run !== this.run) return;
    const open = [...this.detail.querySelectorAll("details[open]")].map((fold) => fold.dataset.name).filter(Boolean);
    this.detail.replaceChildren(...content);
    for (const name of open) { const fold = this.detail.querySelector(`details[data-name="${CSS.escape(name)}"]`); if (fold) fold.open = true; }
  }

  async read(g) {
    const { index } = this, size = index.chunk, task = index.task[g];
    const [groups, tasks] = await Promise.all([this.chunk("groups", Math.floor(g / size)), this.chunk("tasks", Math.floor(task / size))]);
    return [groups[g % size], tasks[task % size]];
  }

  async group(g) {
    const { index } = this;
    const [said, task] = await this.read(g);
    const [id] = index.tasks[index.task[g]];
    const nodes = [this.head(`Step ${index.step[g]}, group ${index.place[g] + 1}`, g)];
    const asked = task.turns.findLastIndex(([role]) => role !== "assistant" && role !== "system");
    const request = asked < 0 ? task.turns.length - 1 : asked;
    nodes.push(make("div", "request-full text", ...this.long(task.turns[request][1])));
    const rest = task.turns.filter((_, i) => i !== request);
    if (rest.length) nodes.push(fold("prompt", `the rest of the prompt (${rest.map(([role]) => role).join(", ")})`, () => rest.map(([role, text]) => make("div", "turn", make("div", "role", role), make("div", "text", ...this.long(text))))));
    if (task.tools.length) {
      nodes.push(fold("tools", `${task.tools.length === 1 ? "1 tool" : `${task.tools.length} tools`} offered: ${task.tools.map(([name]) => name).join(", ")}`.slice(0, 300), () => task.tools.map(([name, json]) => make("div", "turn", make("div", "role", ...shownText(name)), make("div", "text mono", ...this.long(indented(json)))))));
    }
    nodes.push(make("div", "right", make("h3", "", task.answer.length ? "The right calls" : "Right is to call nothing"), ...task.answer.map((call) => make("div", "text mono", ...shownText(`${call.name} ${call.arguments}`, this.query)))));
    const others = index.byTask.get(index.task[g]).filter((other) => other !== g);
    if (others.length) nodes.push(make("p", "others quiet", "The same prompt in step ", ...others.slice(0, 20).map((other) => link(this.address(other), `${index.step[other]} (${right(index.reward[other])})`))));
    nodes.push(make("div", "responses", ...said.map((one, i) => this.response(g, i, one))));
    nodes.push(make("p", "quiet", "id ", make("code", "", ...shownText(id))));
    return nodes;
  }

  head(title, g) {
    const buttons = make("div", "buttons");
    const button = (text, title, act) => { const one = make("button", "plain", text); one.type = "button"; one.title = title; one.addEventListener("click", act); buttons.append(one); return one; };
    button("‹", "the group before (k)", () => this.move(-1)).setAttribute("aria-label", "the group before");
    button("›", "the next group (j)", () => this.move(1)).setAttribute("aria-label", "the next group");
    const whole = button("step side by side", "all groups of the step (s)", () => this.toggleStep());
    whole.setAttribute("aria-pressed", String(this.wholeStep));
    const address = link(this.address(g), "link to this group");
    buttons.append(address);
    return make("div", "head", make("h3", "", title), this.wholeStep ? "" : this.cells(g), buttons);
  }

  toggleStep() { this.wholeStep = !this.wholeStep; if (this.chosen !== null) this.show(); }

  response(g, i, said) {
    const { index } = this;
    const code = index.reasons[index.reason[g][i]];
    const advantage = index.advantage[g][i];
    const facts = `advantage ${advantage === null ? "none" : (advantage > 0 ? "+" : "") + plainNumber(advantage)} · ${index.length[g][i].toLocaleString("en")} tokens${index.cut[g][i] ? " · cut at the limit" : ""}`;
    const why = code === "correct" ? "correct" : this.manifest.reasons[code] ?? code;
    const article = make("article", "response",
      make("h4", "", `${i + 1}`, rewardTag(index.reward[g][i], "tag", false), make("span", "", ...shownText(why))),
      make("p", "facts", facts));
    article.setAttribute("aria-label", `response ${i + 1}`);
    for (const [kind, text] of said.pieces) {
      if (!kind && !text.trim()) continue;
      article.append(make("div", `piece ${kind}`, make("span", "kind", { think: "thought", call: "calls", "": "other text" }[kind]), make("span", `text${kind === "call" ? " mono" : ""}`, ...this.long(text))));
    }
    if (!said.pieces.length) article.append(make("p", "quiet", "It said nothing."));
    article.append(this.differences(said.calls));
    return article;
  }

  // The calls of a response against the right ones, argument by argument.
  differences(calls) {
    const box = make("div", "diff");
    if (calls === null) return box.append(make("p", "mark", "no calls that can be read")), box;
    const words = this.manifest.marks;
    const wrong = calls.some((call) => call.mark || call.arguments.some((row) => row[0]));
    if (!wrong) return box.append(make("p", "same", calls.length ? "✓ the right calls" : "✓ no call, as is right")), box;
    for (const call of calls) {
      const note = call.mark ? [" ", make("span", "mark", `✗ ${words[call.mark]}`), ...(call.mark === "name" ? [", wanted ", make("span", "mono", ...shownText(call.wanted))] : [])] : [];
      box.append(make("h5", "", make("span", "mono", ...shownText(call.name)), ...note));
      if (!call.arguments.length) continue;
      const table = make("table", "", make("thead", "", make("tr", "", ...["argument", "given", "right", ""].map((text) => columnHead(text)))));
      const body = make("tbody");
      for (const [mark, path, given, wanted] of call.arguments) {
        const cell = (value) => value === null ? make("td", "quiet", "–") : make("td", "mono text", ...shownText(value));
        const off = mark || call.mark === "missing_call" || call.mark === "extra_call";
        body.append(make("tr", off ? "off" : "", make("td", "mono", ...shownText(path)), cell(given), cell(wanted), make("td", mark ? "mark" : "same", mark ? `✗ ${MARK_SHORT[mark]}` : off ? "" : "✓")));
      }
      table.append(body);
      box.append(table);
    }
    return box;
  }

  // All groups of a step that are in the list, in short.
  async step(g) {
    const { index } = this;
    const step = index.step[g];
    const groups = this.shown.filter((other) => index.step[other] === step);
    const cards = make("div", "cards");
    const nodes = [this.head(`Step ${step}, ${groups.length} group${groups.length === 1 ? "" : "s"} side by side`, g), cards];
    const add = async (from) => {
      for (const other of groups.slice(from, from + CARDS)) cards.append(await this.card(other));
      if (from + CARDS < groups.length) {
        const more = make("button", "plain", `${groups.length - from - CARDS} more`);
        more.type = "button";
        more.addEventListener("click", () => { more.remove(); add(from + CARDS); });
        cards.after(more);
      }
    };
    await add(0);
    return nodes;
  }

  async card(g) {
    const { index } = this;
    const [said, task] = await this.read(g);
    const lines = said.map((one, i) => {
      const code = index.reasons[index.reason[g][i]];
      const off = (one.calls ?? []).flatMap((call) => [...(call.mark ? [this.manifest.marks[call.mark]] : []), ...call.arguments.filter((row) => row[0]).map(([mark, path, given, wanted]) => `${path}: ${given ?? "missing"}${wanted === null ? " (too many)" : given === null ? "" : `, not ${wanted}`}`)]);
      return make("li", "", rewardTag(index.reward[g][i], "cell", true), make("span", "", ...shownText((code === "correct" ? "correct" : off.length ? off.join("; ") : this.manifest.reasons[code] ?? code).slice(0, 240))));
    });
    return make("article", "card", make("h4", "", link(this.address(g), `group ${index.place[g] + 1}`)), make("p", "", ...shownText(index.tasks[index.task[g]][1], this.query)),
      ...task.answer.map((call) => make("p", "mono quiet", ...shownText(`${call.name} ${call.arguments}`.slice(0, 300)))), make("ol", "", ...lines));
  }

  // A text, of which the beginning is shown at first, where it is long.
  long(text) {
    if (text.length <= LONG) return shownText(text, this.query);
    const rest = make("button", "plain", `… show all ${text.length.toLocaleString("en")} characters`);
    rest.type = "button";
    rest.addEventListener("click", () => rest.replaceWith(...shownText(text.slice(LONG), this.query)));
    return [...shownText(text.slice(0, LONG), this.query), rest];
  }
}

// The number of a group of a step; null where there is none.
function numberOf(index, step, place) {
  const g = index.step.findIndex((s, i) => s === step && index.place[i] === place);
  return g < 0 ? null : g;
}
