// Small helpers: elements from texts, texts as they may be shown, numbers in few characters.

// All that is not seen, or steers what is: controls, formats (the marks of direction among them), separators, half surrogate pairs.
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

function byId(id) { return document.getElementById(id); }

// An element with a class and children; strings among these become text, never markup.
function make(tag, kind = "", ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

function option(value, text) {
  const one = make("option", "", text);
  one.value = value;
  return one;
}

function link(address, text) {
  const one = make("a", "", text);
  one.href = address;
  return one;
}

function columnHead(text) {
  const one = make("th", "", text);
  one.scope = "col";
  return one;
}

// A fold whose content is made when it is opened.
function fold(name, title, content) {
  const one = make("details", "", make("summary", "", ...shownText(title)));
  one.dataset.name = name;
  let made = false;
  one.addEventListener("toggle", () => { if (one.open && !made) { made = true; one.append(...content()); } });
  return one;
}

// A text as nodes: what is not seen as escapes, what is searched for marked.
function shownText(text, query = "") {
  const nodes = [];
  const lower = text.toLowerCase(), wanted = query.toLowerCase();
  let at = 0;
  if (wanted && lower.length === text.length) {
    for (let found = lower.indexOf(wanted); found >= 0 && nodes.length < 2000; found = lower.indexOf(wanted, at)) {
      nodes.push(...visible(text.slice(at, found)), make("mark", "", ...visible(text.slice(found, found + wanted.length))));
      at = found + wanted.length;
    }
  }
  return [...nodes, ...visible(text.slice(at))];
}

function visible(text) {
  const nodes = [];
  let at = 0;
  for (const { 0: found, index } of text.matchAll(UNSEEN)) {
    if (nodes.length > 4000) break; // the rest as it is: text it stays
    if (index > at) nodes.push(text.slice(at, index));
    const code = found.codePointAt(0).toString(16);
    const escape = make("span", "escape", code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`);
    escape.title = "a character that is not seen";
    nodes.push(escape);
    at = index + found.length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

// A reward in its colour: 1 or more is right, 0 or less wrong.
function rewardTag(value, kind, brief) {
  const state = value >= 1 ? "good" : value > 0 ? "part" : "bad";
  const text = value === null ? "?" : brief && value === 1 ? "✓" : brief && value === 0 ? "✗" : plainNumber(value);
  return make("span", `${kind} ${value === null ? "part" : state}`, brief ? text : `reward ${text}`);
}

function right(rewards) { return `${rewards.filter((value) => value >= 1).length} of ${rewards.length} right`; }

function plainNumber(value) { return String(Number(value.toPrecision(3))); }

function indented(json) {
  try { return JSON.stringify(JSON.parse(json), null, 2); } catch { return json; }
}

// A number in few characters; share: as per cent.
function short(value, share) {
  if (value === null || value === undefined) return "–";
  if (share) return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

