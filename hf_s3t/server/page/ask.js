// Asking: every question with its answers side by side, each with the depths that it was answered at.

import { Refusal, call, events, json } from "./api.js";
import { byId, clock, make, number, plural, seconds, sendOnEnter } from "./dom.js";

let model = null; // what the server says of its model, once it has
let state = { depths: null, deletions: null, isExhausted: false };
let running = null; // AbortController of the answer under way
const questions = []; // {asked, card, answers, again, deletions}

export function start() {
  sendOnEnter(byId("question"));
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", () => running?.abort());
}

// What can be asked follows from the model, which a server that was started anew may have another of.
export async function prepare({ anew = false } = {}) {
  if (anew) model = null;
  if (model) return;
  [model] = (await json("answer", "v1/models")).data;
  const { task, has_chat_template: hasTemplate } = model;
  const generates = task === "generation";
  byId("ask-settings").hidden = !generates;
  byId("ask-as").value = generates && !hasTemplate ? "text" : "chat";
  byId("ask-as").options[0].disabled = !hasTemplate;
  if (generates && !hasTemplate) byId("question-label").textContent = "A text to be continued (this model has no chat template)";
  if (task === "text-classification") byId("question-label").textContent = "A text to be classified";
  if (task === "image-classification") {
    for (const id of ["question", "question-label", "question-help"]) byId(id).hidden = true;
    byId("image-label").hidden = false;
  }
}

const waysToAsk = () => (model.task === "generation" ? byId("ask-as").value : "classify");

export function knows(status) {
  state = { depths: status.depths, deletions: status.deletions, isExhausted: status.is_exhausted };
  for (const question of questions) question.again.classList.toggle("due", question.deletions !== status.deletions);
}

async function ask() {
  const text = byId("question").value;
  const file = byId("image").files[0];
  if (!text.trim() && !file) return say("Write a question first.");
  if (running) return say("An answer is under way: wait for it, or stop it.");
  try {
    await prepare();
  } catch (error) {
    return say(error.message);
  }
  const image = file ? await dataUrl(file) : null;
  const asked = {
    text, image, as: waysToAsk(),
    max_tokens: Number(byId("max-tokens").value) || 64, temperature: Number(byId("temperature").value) || 0,
  };
  const same = questions.find((one) => JSON.stringify(one.asked) === JSON.stringify(asked));
  return answer(same ?? addQuestion(asked));
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function addQuestion(asked) {
  const answers = make("div", { className: "answers" });
  const again = make("button", { type: "button", className: "quiet again", textContent: "Ask again" });
  const title = make("h3", {}, asked.text || "An image");
  const card = make("article", { className: "question" }, make("header", { className: "row" }, title, again), answers);
  if (asked.image) card.insertBefore(make("img", { src: asked.image, alt: "The image that was asked about" }), answers);
  const question = { asked, card, answers, again, deletions: state.deletions };
  again.addEventListener("click", () => (running ? say("An answer is under way: wait for it, or stop it.") : answer(question)));
  questions.unshift(question);
  byId("answers").prepend(card);
  return question;
}

async function answer(question) {
  const shown = addAnswer(question);
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").hidden = false;
  say("Answering …");
  const began = performance.now();
  try {
    const note = await ROUTES[question.asked.as](question.asked, shown);
    shown.note.textContent = `${note}${seconds((performance.now() - began) / 1000)}`;
    say("Answered.");
  } catch (error) {
    fail(shown, error);
  } finally {
    running = null;
    byId("ask").disabled = false;
    byId("stop").hidden = true;
    question.deletions = state.deletions;
    question.again.classList.remove("due");
  }
}

function fail(shown, error) {
  const words = error.name === "AbortError" ? "Stopped by you." : error.message;
  shown.box.classList.add("failed");
  shown.note.textContent = words;
  say(words);
  if (!(error instanceof Refusal) && error.name !== "AbortError") console.error(error);
}

function addAnswer(question) {
  const where = state.depths === null ? "depths unknown" : `depths ${state.depths.join(", ")}`;
  const when = state.deletions === null ? clock() : `${clock()}, ${plural(state.deletions, "deletion")} so far`;
  const text = make("p", { className: "text" });
  const note = make("p", { className: "hint" });
  const box = make("div", { className: "answer" }, make("p", { className: "where" },
    make("strong", { textContent: where }), make("span", { textContent: ` ${when}` })), text, note);
  question.answers.append(box);
  box.scrollIntoView({ block: "nearest", inline: "nearest" });
  return { box, text, note };
}

// Each asks in its own way, writes what comes into the answer, and returns what is said below it.
const ROUTES = {
  async chat(asked, shown) {
    const body = { messages: [{ role: "user", content: asked.text }] };
    return stream("v1/chat/completions", body, asked, shown, (choice) => choice.delta?.content ?? "");
  },
  async text(asked, shown) {
    return stream("v1/completions", { prompt: asked.text }, asked, shown, (choice) => choice.text ?? "");
  },
  async classify(asked, shown) {
    const body = { model: model.id, ...(asked.image ? { images: [asked.image] } : { input: asked.text }) };
    const { data } = await json("answer", "v1/classify", { method: "POST", body, signal: running.signal });
    const [{ label, probs }] = data;
    shown.text.textContent = label;
    return `${number(100 * Math.max(...probs), 1)}% sure of ${plural(probs.length, "label")}, `;
  },
};

async function stream(path, body, { max_tokens, temperature }, shown, textOf) {
  const whole = { ...body, model: model.id, max_tokens, temperature, stream: true,
    stream_options: { include_usage: true } };
  const response = await call("answer", path, { method: "POST", body: whole, signal: running.signal });
  let reason = null, tokens = null;
  for await (const event of events(response)) {
    if (event.error) throw new Refusal(event.error.message, { status: 200, code: event.error.code });
    const [choice] = event.choices ?? [];
    if (choice) shown.text.append(textOf(choice));
    reason = choice?.finish_reason ?? reason;
    tokens = event.usage?.completion_tokens ?? tokens;
  }
  if (reason === null) throw new Refusal("The connection was cut before the answer ended.");
  if (!shown.text.textContent) shown.text.append(make("em", { textContent: "(nothing)" }));
  return `${tokens === null ? "" : `${plural(tokens, "token")}, `}${reason === "length" ? "cut at the limit, " : ""}`;
}

function say(words) {
  byId("ask-said").textContent = words;
}
