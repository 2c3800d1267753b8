// The page's life: the conversation, the keys, what the header says. The conversation is kept here and nowhere else.

import { element } from "./dom.js";
import { Load } from "./load.js";
import * as settings from "./settings.js";
import { keep, recall } from "./store.js";
import { ServerError, chat, get } from "./stream.js";
import { Turn } from "./turn.js";
import { preferredLanguage, speak, word } from "./words.js";

const at = (id) => document.getElementById(id);
const CHAT = "/v1/chat/completions";
const THEMES = ["auto", "light", "dark"];

let turns = [];
let running = null; // the AbortController of the answer under way

async function ask(question) {
  if (running || !question.trim()) return;
  const asked = settings.body([...turns.flatMap((turn) => turn.messages()), { role: "user", content: question }]);
  const turn = new Turn(question, asked.model, (place) => askAgain(turn, place));
  turns.at(-1)?.retire();
  turns.push(turn);
  at("welcome").hidden = true;
  at("log").append(turn.node);
  at("log").scrollTop = at("log").scrollHeight;
  at("announce").textContent = word("answering");
  const controller = (running = new AbortController());
  show();
  try {
    const outcome = await answer(turn, asked, controller);
    if (running === controller) at("announce").textContent = outcome;
  } finally {
    if (running === controller) running = null;
    show();
  }
}

/** Shows the answer as it comes. Gives what is to be said of its end: nothing where an alert says it. */
async function answer(turn, asked, controller) {
  const began = performance.now();
  let seen = null, reason = null, timings = null;
  try {
    for await (const chunk of chat(asked, settings.key(), controller.signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        seen ??= performance.now() - began;
        following(() => turn.add(choice.delta.content));
      }
      reason = choice?.finish_reason ?? reason;
      timings = chunk.timings ?? timings;
    }
    following(() => turn.finish(reason, timings, seen));
    return word("answered");
  } catch (error) {
    if (error.name === "AbortError") {
      following(() => turn.finish("stopped", null, seen));
      return word("stopped");
    }
    const known = error instanceof ServerError;
    following(() => turn.fail(known ? error : new ServerError(0, { message: String(error) }), asked.deadline_ms));
    if (!known) throw error;
    if (error.status === 401) askForKey();
    return "";
  }
}

/** Changes the log, and keeps its end in view where it was. */
function following(change) {
  const log = at("log"), below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (below) requestAnimationFrame(() => requestAnimationFrame(() => { log.scrollTop = log.scrollHeight; }));
}

function askAgain(turn, place) {
  if (running || turns.at(-1) !== turn) return;
  if (place !== null) settings.setDeadline(place);
  turns.pop();
  turn.node.remove();
  ask(turn.question);
}

function restart() {
  running?.abort();
  running = null;
  turns.forEach((turn) => turn.node.remove());
  turns = [];
  at("welcome").hidden = false;
  show();
  at("prompt").focus();
}

function show() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  if (document.activeElement?.offsetParent === null) at("log").focus({ preventScroll: true }); // what had the focus is gone
}

function submit() {
  const question = at("prompt").value;
  if (running || !question.trim()) return;
  at("prompt").value = "";
  grow();
  ask(question.trim());
}

/** The box is as high as its text, up to what CSS allows. */
function grow() {
  at("prompt").style.height = "auto";
  at("prompt").style.height = `${at("prompt").scrollHeight + 2}px`;
}

function askForKey() {
  if (at("key").offsetParent === null) at("side-open").click(); // where it is narrow the field lies behind the button
  at("key").focus();
}

/** Which models there are that chat, and whether they answer. Asks again every few seconds. */
async function watch() {
  let state = "ready";
  try {
    const served = (await (await get("v1/models", settings.key())).json()).data;
    const models = served.filter((model) => model.endpoints?.includes(CHAT) ?? true).map((model) => model.id);
    if (served.length === 0) state = "starting";
    else if (models.length === 0) state = "readsOnly";
    else if (String(models) !== String([...at("model").options].map((option) => option.value))) {
      const chosen = at("model").value || recall("sessionStorage", "model");
      at("model").replaceChildren(...models.map((id) => element("option", { value: id, selected: id === chosen }, id)));
    }
  } catch (error) {
    state = error.status === 401 ? "needsKey" : "unreachable";
  }
  at("state").dataset.state = state;
  for (const node of [at("prompt"), at("send"), ...at("examples").children]) node.disabled = state === "readsOnly";
  const text = state === "ready" ? `${at("model").value} · ${word(state)}` : word(state);
  if (at("state-text").textContent !== text) at("state-text").textContent = text; // screen readers say each change
  clearTimeout(watch.timer);
  watch.timer = setTimeout(watch, ["ready", "readsOnly"].includes(state) ? 10000 : 1500);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  keep("localStorage", "theme", name);
  at("theme").textContent = word("theme")[name];
}

function examples() {
  at("examples").replaceChildren(...word("examples").map((text) => element("button", { type: "button", onclick: () => ask(text) }, text)));
}

/** Whether a key is meant for an input method. Safari ends composing before it tells of the key, and says so by 229 alone. */
const composing = (event) => event.isComposing || event.keyCode === 229;

function keyboard(event) {
  if (composing(event)) return;
  if (event.key === "Escape") running?.abort();
  else if (event.key === "/" && !event.target.matches("input, textarea, select")) {
    event.preventDefault();
    at("prompt").focus();
  }
}

function listen(load) {
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  at("prompt").addEventListener("input", grow);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
    event.preventDefault();
    submit();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("new").addEventListener("click", restart);
  for (const id of ["key", "model"]) at(id).addEventListener("change", watch);
  at("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
  at("language").addEventListener("change", () => {
    keep("localStorage", "language", at("language").value);
    translate(load);
  });
  at("side-open").addEventListener("click", () => {
    const open = document.body.classList.toggle("side-open");
    at("side-open").setAttribute("aria-expanded", open);
  });
  document.addEventListener("keydown", keyboard);
}

function translate(load) {
  speak(at("language").value);
  theme(document.documentElement.dataset.theme);
  examples();
  settings.show();
  load.relabel();
  turns.forEach((turn) => turn.relabel());
  watch();
}

const stored = recall("localStorage", "theme");
document.documentElement.dataset.theme = THEMES.includes(stored) ? stored : "auto";
at("language").value = preferredLanguage();
speak(at("language").value);
settings.begin();
const load = new Load(at("load"), at("load-note"), settings.key);
listen(load);
translate(load);
at("prompt").focus();
