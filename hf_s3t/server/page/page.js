// The page of a server: asks for its state each second and shows it; asking and forgetting are in their own files.

import * as api from "./api.js";
import * as ask from "./ask.js";
import * as forget from "./forget.js";
import { byId, clock, fromNow, make, number, plural } from "./dom.js";
import { draw } from "./picture.js";

const EACH = 1000, AT_MOST = 15000, EVENTS = 50;

let nudge = () => {}; // ends the present pause
let wasUnreachable = false;
let listed = null; // what the list of erasures was last asked for; null: it is to be asked for again

const sleep = (ms) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  nudge = () => { clearTimeout(timer); resolve(); };
});

async function watch() {
  let pause = EACH;
  for (;;) {
    if (document.hidden) await sleep(2 ** 31 - 1);
    try {
      show(await api.json("status", "v1/status"));
      pause = EACH;
    } catch (error) {
      pause = error.isDenied ? AT_MOST : Math.min(pause * 2, AT_MOST);
      showFailure(error, pause);
    }
    await sleep(pause);
  }
}

function show(status) {
  if (wasUnreachable) {
    happened(["the server answers again"]);
    meetModel();
  }
  wasUnreachable = false;
  document.body.classList.remove("stale");
  document.title = `${status.model ?? "hf-s3t"} – hf-s3t serve`;
  byId("name").textContent = status.model ?? "hf-s3t serve";
  showState(...stateOf(status));
  showFacts(status);
  happened(draw(status));
  showWaiting(status);
  ask.knows(status);
  byId("picture-said").hidden = true;
  const seen = JSON.stringify([status.deletions, status.erasures_waiting, api.keys().length]);
  if (seen !== listed) listErasures(seen);
}

async function listErasures(seen) {
  listed = seen;
  // What is under way is asked for until it is not.
  if (await forget.list()) listed = null;
}

function stateOf({ is_exhausted, depths, failures, engine }) {
  if (is_exhausted) return ["Exhausted: no shard has a stack left, questions are refused until stages are grown again", "bad"];
  if (engine && !engine.is_ready) return [`Waits for vLLM behind it. ${engine.problem ?? ""}`.trim(), "bad"];
  const dead = depths.filter((depth) => depth === 0).length;
  if (dead) return [`Answers, without ${plural(dead, "shard")} that ${dead === 1 ? "has" : "have"} no stack left`, "fair"];
  if (failures?.length) return [`Answers. Not done yet, and tried again: ${failures.join(" ")}`, "fair"];
  return [engine ? "Answers, through vLLM" : "Answers", "good"];
}

function showFailure(error, pause) {
  if (error.isDenied) {
    byId("picture-said").hidden = false;
    byId("picture-said").textContent = `${error.message} Until then the shards do not show.`;
    return showState(api.keys().length ? "No key to watch" : "Wants a key", "fair");
  }
  if (!error.isUnreachable && !error.status) console.error(error);
  if (error.isUnreachable && !wasUnreachable) happened(["the server cannot be reached"]);
  wasUnreachable ||= Boolean(error.isUnreachable);
  document.body.classList.add("stale");
  return showState(`${error.message} Asked again in ${Math.round(pause / 1000)} s.`, "bad");
}

// Said anew only when it is new: a screen reader speaks each change.
function showState(words, kind) {
  const state = byId("state");
  if (state.textContent !== words) state.textContent = words;
  state.className = `state ${kind}`;
}

function showFacts(status) {
  const slices = status.shards.map((shard) => shard.num_slices);
  const [there, all] = status.stages ?? [null, null];
  const facts = [
    ["Depth", `${status.depths.join(", ")} of ${Math.max(...slices)}`],
    ["Stages", there === null ? "?" : `${number(there)} of ${number(all)}`],
    ["Deletions left (expected)", number(status.deletions_until_exhausted, 1)],
    ["First shard dead after", number(status.deletions_until_first_dead_shard, 1)],
    ["Examples in", number(status.examples)],
    ["Deletions so far", number(status.deletions)],
  ];
  const shown = byId("facts");
  if (!shown.children.length) shown.append(...facts.map(([name]) => make("div", {}, make("dt", { textContent: name }), make("dd"))));
  facts.forEach(([, value], n) => { shown.children[n].querySelector("dd").textContent = value; });
}

function showWaiting(status) {
  const { waiting, running } = status.queue;
  byId("queue").textContent = `${waiting ? plural(waiting, "request") : "No request"} ${
    waiting > 1 ? "wait" : "waits"}, ${running ? plural(running, "answer") : "none"} ${running > 1 ? "are" : "is"} under way.`;
  byId("erasures-waiting").replaceChildren(...status.erasures_waiting.map(({ apply_by, examples }) =>
    make("li", { textContent: `An erasure of ${plural(examples, "example")} waits, applied ${fromNow(apply_by)} at the latest.` })));
}

function happened(sentences) {
  for (const words of sentences) {
    byId("events").prepend(make("li", {}, make("time", { textContent: clock() }), ` ${words}`));
    byId("no-events").hidden = true;
  }
  while (byId("events").children.length > EVENTS) byId("events").lastChild.remove();
}

// What hinders it is said when somebody asks.
const meetModel = () => ask.prepare({ anew: true }).catch(() => {});

// Keys

function showKeys() {
  byId("key-list").replaceChildren(...api.keys().map(({ key, scopes }, at) => {
    const remove = make("button", { type: "button", className: "quiet", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove the key that ends in ${key.slice(-2)}`);
    remove.addEventListener("click", () => {
      api.forgetKey(at);
      showKeys();
      nudge();
    });
    const may = scopes.map((scope) => api.TO[scope]).join(", ");
    return make("li", { className: "row" }, make("span", { textContent: `A key that ends in ${key.slice(-2)}: may ${may}` }), remove);
  }));
}

async function useKey() {
  const field = byId("key");
  byId("key-said").textContent = "Trying it …";
  try {
    const scopes = await api.addKey(field.value.trim());
    byId("key-said").textContent = scopes.length
      ? `You may ${scopes.map((scope) => api.TO[scope]).join(", ")} with it.`
      : "The server does not know this key.";
    if (scopes.length) field.value = "";
    showKeys();
    meetModel();
    nudge();
  } catch (error) {
    byId("key-said").textContent = error.message;
  }
}

// Where everything is open no field for keys is shown.
async function askForKeys() {
  for (let pause = EACH; ; pause = Math.min(pause * 2, AT_MOST)) {
    try {
      const open = await api.scopesOf(null);
      byId("keys").hidden = open.length === Object.keys(api.TO).length;
      return;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
document.addEventListener("visibilitychange", () => document.hidden || nudge());
ask.start();
forget.start(() => {
  listed = null;
  nudge();
});
showKeys();
askForKeys();
meetModel();
watch();
