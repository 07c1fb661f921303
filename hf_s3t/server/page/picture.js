// The live picture: per shard its stages, each below the one that it stands on; what serves, what is kept, what went.

import { byId, make, plural } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 36, GAP = 3, SHOWN_FOR = 4000;

const shards = new Map(); // number of a shard -> {svg, caption, layout, blocks: name -> <g>}
let states = null; // name -> "serves" | "kept" | "missing", as last seen
let wouldGo = new Set();

function svg(tag, attributes = {}) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const slicesOf = (stage) => stage.slice(stage.indexOf("/") + 1).split("-").map(Number);

// Where each block lies: as wide as the stacks that stand on it, as deep as it has slices.
function layoutOf(names) {
  const root = { children: new Map() };
  for (const name of names) {
    let node = root;
    for (const slice of slicesOf(name)) {
      if (!node.children.has(slice)) node.children.set(slice, { slice, children: new Map(), stage: null });
      node = node.children.get(slice);
    }
    node.stage = name;
  }
  const places = new Map();
  let rows = 0;
  const place = (node, left, depth) => {
    let width = 0;
    for (const child of [...node.children.values()].sort((a, b) => a.slice - b.slice)) {
      width += place(child, left + width, depth + 1);
    }
    width = Math.max(width, 1);
    if (node.stage) places.set(node.stage, { left, width, row: depth - 1, slice: node.slice });
    rows = Math.max(rows, depth);
    return width;
  };
  return { places, columns: place(root, 0, 0), rows };
}

const setOf = (stage) => slicesOf(stage).sort((a, b) => a - b).join();

// A stage counts by the set of its slices: what is there in another order is not missing.
function statesOf(shard) {
  const there = new Set(shard.stages.map(({ stage }) => setOf(stage)));
  const found = new Map(shard.planned.filter((name) => !there.has(setOf(name))).map((name) => [name, "missing"]));
  for (const { stage, is_serving } of shard.stages) found.set(stage, is_serving ? "serves" : "kept");
  return found;
}

// Draws a status; returns what changed since the last one, in sentences.
export function draw(status) {
  const now = new Map(status.shards.flatMap((shard) => [...statesOf(shard)]));
  const changes = states ? status.shards.flatMap((shard) => changesOf(shard, now)) : [];
  const known = new Set(status.shards.map((shard) => shard.shard));
  for (const [number, { figure }] of shards) if (!known.has(number)) { figure.remove(); shards.delete(number); }
  for (const shard of status.shards) drawShard(shard, now);
  states = now;
  drawTable(status);
  return changes;
}

// What a deletion would take is marked until it happened or something else is looked for.
export function markWouldGo(stages) {
  wouldGo = new Set(stages);
  for (const { blocks } of shards.values()) {
    for (const [name, block] of blocks) block.classList.toggle("would-go", wouldGo.has(name));
  }
}

function changesOf(shard, now) {
  const names = [...new Set([...states.keys(), ...now.keys()])].filter((name) => name.startsWith(`shard-${shard.shard}/`));
  const isThere = (all, name) => (all.get(name) ?? "missing") !== "missing";
  const gone = names.filter((name) => isThere(states, name) && !isThere(now, name));
  const grown = names.filter((name) => !isThere(states, name) && isThere(now, name));
  const depth = `shard ${shard.shard} serves ${shard.depth} of ${shard.num_slices} slices now`;
  const tell = (stages, verb) => stages.length
    ? [`${plural(stages.length, "stage")} of shard ${shard.shard} ${verb} (${stages.map((n) => slicesOf(n).join("-")).join(", ")}); ${depth}`]
    : [];
  return [...tell(gone, "went"), ...tell(grown, stagesGrew(grown))];
}

const stagesGrew = (grown) => (grown.length === 1 ? "has grown" : "have grown");

function drawShard(shard, now) {
  const names = [...now.keys()].filter((name) => name.startsWith(`shard-${shard.shard}/`));
  const key = names.join(" ");
  let drawn = shards.get(shard.shard);
  if (drawn?.key !== key) {
    const fresh = build(shard, names, key);
    if (drawn) drawn.figure.replaceWith(fresh.figure);
    else byId("picture").append(fresh.figure);
    shards.set(shard.shard, (drawn = fresh));
  }
  for (const name of names) paint(drawn.blocks.get(name), name, now.get(name));
  const there = names.filter((name) => now.get(name) !== "missing").length;
  drawn.caption.textContent = `depth ${shard.depth} of ${shard.num_slices}, ${there} of ${plural(names.length, "stage")}`;
  drawn.figure.classList.toggle("dead", shard.depth === 0);
  drawn.svg.setAttribute("aria-label", `Shard ${shard.shard}: ${drawn.caption.textContent}; `
    + (servingStacks(shard).length ? `${servingStacks(shard).join(" and ")} serve` : "nothing serves"));
}

function build(shard, names, key) {
  const { places, columns, rows } = layoutOf(names);
  const unit = columns > 12 ? 24 : columns > 6 ? 36 : 50;
  const picture = svg("svg", { viewBox: `0 0 ${columns * unit} ${rows * ROW}`, role: "img" });
  picture.style.maxWidth = `${Math.max(columns * unit * 1.2, 90)}px`;
  const blocks = new Map();
  for (const [name, { left, width, row, slice }] of places) {
    const block = svg("g", { class: "stage", "data-stage": name });
    const at = { x: left * unit + GAP / 2, y: row * ROW + GAP / 2, width: width * unit - GAP, height: ROW - GAP, rx: 4 };
    const text = svg("text", { x: at.x + at.width / 2, y: at.y + at.height / 2 });
    text.textContent = slice;
    block.append(svg("title"), svg("rect", at), svg("rect", { ...at, class: "ghost" }), text);
    picture.append(block);
    blocks.set(name, block);
  }
  const caption = make("span", { className: "caption" });
  const figure = make("figure", {}, make("figcaption", {}, make("strong", { textContent: `Shard ${shard.shard} ` }), caption));
  figure.append(picture);
  figure.style.setProperty("--columns", columns);
  return { figure, svg: picture, caption, blocks, key };
}

const WORDS = { serves: "serves", kept: "kept, serves when those that serve go", missing: "not there" };

function paint(block, name, state) {
  const before = states ? (states.get(name) ?? "missing") : state;
  block.classList.remove("serves", "kept", "missing");
  block.classList.add(state);
  block.classList.toggle("would-go", wouldGo.has(name) && state !== "missing");
  block.querySelector("title").textContent = `Stage ${slicesOf(name).join("-")}, trained on ${
    plural(slicesOf(name).length, "slice")}: ${WORDS[state]}`;
  if (before !== "missing" && state === "missing") flash(block, "gone");
  if (before === "missing" && state !== "missing") flash(block, "grown");
}

function flash(block, mark) {
  block.classList.remove("gone", "grown");
  block.classList.add(mark);
  setTimeout(() => block.classList.remove(mark), SHOWN_FOR);
}

// The stacks that answer, each by its deepest stage.
function servingStacks(shard) {
  const serving = shard.stages.filter((stage) => stage.is_serving).map(({ stage }) => slicesOf(stage).join("-"));
  return serving.filter((one) => !serving.some((other) => other.startsWith(`${one}-`)));
}

function drawTable(status) {
  byId("stage-rows").replaceChildren(...status.shards.map((shard) => {
    const found = statesOf(shard);
    const listed = (state) => [...found].filter(([, one]) => one === state).map(([name]) => slicesOf(name).join("-"));
    const cell = (texts) => make("td", { textContent: texts.join(", ") || "none" });
    return make("tr", {}, make("th", { scope: "row", textContent: shard.shard }),
      make("td", { textContent: `${shard.depth} of ${shard.num_slices}` }),
      cell(servingStacks(shard)), cell(listed("kept")), cell(listed("missing")));
  }));
  for (const id of ["legend", "picture-help", "stage-table"]) byId(id).hidden = false;
}
