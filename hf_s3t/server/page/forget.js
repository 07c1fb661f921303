// Forgetting: find, see what it costs, confirm, and keep the receipt. And which erasures wait and were done.

import { Refusal, json, randomName } from "./api.js";
import { byId, fromNow, make, number, plural, seconds, sendOnEnter, when } from "./dom.js";
import { markWouldGo } from "./picture.js";

const LISTED = 50;
let found = null; // {request, preview} as last looked for
let pending = null; // {request, key} of an erasure that may be sent again
let afterwards = () => {}; // tells the page that something changed

export function start(changed) {
  afterwards = changed;
  sendOnEnter(byId("names"));
  byId("find-form").addEventListener("submit", (event) => {
    event.preventDefault();
    find();
  });
  byId("find-form").addEventListener("input", clear);
  byId("forget").addEventListener("click", confirm);
  byId("confirm").addEventListener("close", () => {
    if (byId("confirm").returnValue === "forget") forget();
  });
  byId("receipt-close").addEventListener("click", () => byId("receipt").close());
  byId("receipt").addEventListener("close", () => URL.revokeObjectURL(byId("receipt-download").href));
}

function clear() {
  found = null;
  byId("found").hidden = true;
  byId("find-said").textContent = "";
  markWouldGo([]);
}

async function find() {
  clear();
  const kind = byId("find-form").elements.kind.value;
  const names = byId("names").value.split("\n").map((name) => name.trim()).filter(Boolean);
  if (!names.length) return say("Write an id or a group first.");
  say("Looking …");
  const request = { [`${kind}s`]: names, include_duplicates: byId("duplicates").checked };
  try {
    const asked = new URLSearchParams(names.map((name) => [kind, name]));
    const [examples, preview] = await Promise.all([
      json("erase", `v1/examples?${asked}`),
      json("erase", "v1/erasures?dry_run=true", { method: "POST", body: request }),
    ]);
    show(examples.data, preview, request);
  } catch (error) {
    say(error.message);
    report(error);
  }
}

function show(examples, preview, request) {
  if (!preview.deleted) {
    const gone = preview.already_deleted;
    return say(gone ? `${plural(gone, "example")} of that name ${gone === 1 ? "was" : "were"} forgotten before: nothing is left to forget.`
      : "It was forgotten before: nothing is left to forget.");
  }
  found = { request, preview };
  say("");
  byId("found-summary").textContent = plural(preview.deleted, "example");
  byId("found-rows").replaceChildren(...examples.slice(0, LISTED).map(row),
    ...(examples.length > LISTED ? [rest(examples.length - LISTED)] : []));
  byId("cost").replaceChildren(...cost(preview, request));
  byId("forget").textContent = `Forget ${plural(preview.deleted, "example")} …`;
  byId("found").hidden = false;
  markWouldGo(preview.stages);
}

function row({ id, group, shard, slice, deleted }) {
  const where = deleted ? ["forgotten before", ""] : [shard, slice];
  return make("tr", {}, make("th", { scope: "row", textContent: id ?? "all of it" }),
    ...[group ?? "", ...where].map((text) => make("td", { textContent: text })));
}

const rest = (n) => make("tr", {}, make("td", { colSpan: 4, textContent: `and ${number(n)} more` }));

function cost(preview, request) {
  const lines = preview.stages.length ? stagesByShard(preview.stages) : ["No stage would go."];
  lines.push(`Depths ${depths(preview)}.`);
  const { deletions_left_before: before, deletions_left_after: after } = preview;
  lines.push(`Expected further deletions until nothing answers: ${number(before, 1)} → ${number(after, 1)}.`);
  if (preview.work_to_regrow) {
    lines.push(`To grow it again takes ${number(preview.work_to_regrow, 2)} of a plain fine-tuning on all the data.`);
  }
  const equal = preview.duplicates;
  if (request.include_duplicates) lines.push("Rows of the same content under other ids are among them.");
  else if (equal.length) {
    lines.push(`${plural(equal.length, "row")} of the same content under other ids would stay: ${
      equal.slice(0, LISTED).join(", ")}${equal.length > LISTED ? ", …" : ""}.`);
  }
  const said = lines.map((line) => make("p", { textContent: line }));
  if (preview.is_exhausted) said.push(make("p", { className: "notice", textContent: EXHAUSTS }));
  return said;
}

function stagesByShard(stages) {
  const shards = Map.groupBy(stages, (stage) => stage.slice(0, stage.indexOf("/")));
  return [...shards].map(([shard, names]) => `${plural(names.length, "stage")} of ${shard.replace("-", " ")} would go: ${
    names.map((name) => name.slice(shard.length + 1)).join(", ")}.`);
}

const EXHAUSTS = "Nothing would be left to answer: until stages are grown again, every question is refused (503).";
const depths = ({ depths_before: before, depths_after: after }) => `[${before.join(", ")}] → [${after.join(", ")}]`;

function confirm() {
  const { preview, request } = found;
  const names = request.groups ?? request.ids;
  const of = names.length === 1 ? ` (${names[0]})` : "";
  byId("confirm-title").textContent = `Forget ${plural(preview.deleted, "example")}${of}?`;
  byId("confirm-cost").textContent = `${plural(preview.stages.length, "stage")} will go, depths ${depths(preview)}.`
    + (preview.is_exhausted ? ` ${EXHAUSTS}` : "");
  // What is of the same content is found when it is erased, so that cannot wait.
  byId("when").disabled = request.include_duplicates;
  if (request.include_duplicates) byId("when").value = "";
  byId("confirm").returnValue = "keep";
  byId("confirm").showModal();
}

async function forget() {
  const request = { ...found.request };
  if (byId("when").value) request.max_delay = Number(byId("when").value);
  if (byId("on-running").value) request.on_running = byId("on-running").value;
  pending = { request, key: randomName() };
  await sendPending();
}

// Sent again under the same Idempotency-Key, it is the same request: nothing is forgotten twice.
async function sendPending() {
  const { request, key } = pending;
  const told = byId("forgotten");
  told.replaceChildren(make("p", { textContent: "Forgetting …" }));
  byId("forget").disabled = true;
  try {
    const headers = { "Idempotency-Key": key };
    const erasure = await json("erase", "v1/erasures", { method: "POST", body: request, headers });
    pending = null;
    byId("names").value = "";
    clear();
    told.replaceChildren(...outcome(erasure));
    afterwards();
  } catch (error) {
    report(error);
    const isUnsure = error.isUnreachable || error.status >= 500;
    const words = error.isUnreachable ? `${error.message} Whether it was forgotten is not known.` : error.message;
    told.replaceChildren(make("p", { className: "notice", textContent: words }));
    if (isUnsure) {
      const again = make("button", { type: "button", textContent: "Send it again" });
      again.addEventListener("click", sendPending);
      told.append(again, make("p", { className: "hint", textContent: "It is the same request to the server: nothing is forgotten twice." }));
    }
  } finally {
    byId("forget").disabled = false;
  }
}

function outcome(erasure) {
  if (erasure.status === "waiting") {
    return [make("p", { textContent: `Recorded: it is forgotten ${fromNow(erasure.apply_by)} at the latest. Until then it still answers.` })];
  }
  const went = erasure.stages_removed?.length ?? 0;
  const words = `${plural(erasure.deleted, "example")} forgotten in ${seconds(erasure.seconds)}: ${
    plural(went, "stage")} went, depths ${depths(erasure)}.`;
  const said = [make("p", { className: "done", textContent: words }), receiptButton(erasure)];
  if (erasure.duplicates?.length) {
    said.splice(1, 0, make("p", { textContent: `Rows of the same content under other ids (told this once, written nowhere): ${
      erasure.duplicates.join(", ")}` }));
  }
  const unsure = erasure.engine?.not_confirmed ?? [];
  if (unsure.length) said.push(make("p", { className: "notice", textContent: `Not confirmed: ${unsure.join(" ")} ${erasure.engine.next_step ?? ""}` }));
  return said;
}

function receiptButton(erasure) {
  const button = make("button", { type: "button", className: "quiet", textContent: "Receipt" });
  button.setAttribute("aria-label", `Receipt of ${erasure.id}`);
  button.addEventListener("click", () => openReceipt(erasure.id));
  return button;
}

async function openReceipt(id) {
  try {
    const { duplicates, ...erasure } = await json("erase", `v1/erasures/${encodeURIComponent(id)}`);
    const text = JSON.stringify(erasure, null, 2);
    const lines = (erasure.receipts ?? []).map((receipt) => receipt.line);
    byId("receipt-said").textContent = lines.length
      ? `Line ${lines.join(", ")} of the ledger. It names nobody: ids are digests under the system's secret.`
      : "No line of the ledger yet.";
    byId("receipt-text").textContent = text;
    byId("receipt-download").href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    byId("receipt-download").download = `${id}.json`;
    byId("receipt").showModal();
  } catch (error) {
    byId("erasures-said").hidden = false;
    byId("erasures-said").textContent = error.message;
    report(error);
  }
}

// The newest erasures, for whoever may see them; whether one is under way.
export async function list() {
  try {
    const { data } = await json("erase", "v1/erasures?limit=10");
    byId("erasures").hidden = !data.length;
    byId("erasures-said").hidden = true;
    byId("erasure-rows").replaceChildren(...data.map((one) => make("tr", {},
      make("th", { scope: "row", textContent: one.id }), make("td", { textContent: when(one.created) }),
      make("td", { textContent: STATES[one.status] ?? one.status }),
      make("td", { textContent: one.status === "done" ? one.deleted : one.requested }),
      make("td", {}, one.status === "done" ? receiptButton(one) : ""))));
    return data.some((one) => one.status === "running");
  } catch (error) {
    byId("erasures").hidden = true;
    byId("erasures-said").hidden = !error.isDenied;
    byId("erasures-said").textContent = "Which erasures were done shows with a key to forget.";
    report(error);
    return false;
  }
}

const STATES = { done: "done", waiting: "waits", running: "under way", interrupted: "interrupted: send it again" };

function say(words) {
  byId("find-said").textContent = words;
}

function report(error) {
  if (!(error instanceof Refusal)) console.error(error);
}
