// What the visitor chose: the fields of a request, and where each is kept. Nothing outlives the tab but language and theme.

import { keep, recall } from "./store.js";
import { roundMilliseconds, word } from "./words.js";

const DEADLINES = [50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000, 20000, 60000, null];
const KEPT = ["deadline", "on-deadline", "priority", "fallback", "system", "temperature", "max-tokens", "key", "model"];

const field = (id) => document.getElementById(id);

/** Restores the fields, keeps them from now on, and shows what the sliders say. */
export function begin() {
  for (const id of KEPT) {
    const node = field(id), kept = recall("sessionStorage", id);
    if (kept !== null) node.value = kept;
    node.addEventListener("input", () => {
      keep("sessionStorage", id, node.value);
      show();
    });
  }
  show();
}

/** The sliders' values as text, and the fallback's field where it is wanted. */
export function show() {
  const deadline = DEADLINES[field("deadline").value];
  const text = deadline === null ? word("none") : roundMilliseconds(deadline);
  field("deadline-text").textContent = text;
  field("deadline").setAttribute("aria-valuetext", text);
  field("temperature-text").textContent = Number(field("temperature").value).toFixed(1);
  field("on-deadline").disabled = deadline === null;
  field("fallback").hidden = deadline === null || field("on-deadline").value !== "fallback";
}

/** The API key of the moment, or "", without what no header can carry: it came along as the key was copied. */
export const key = () => field("key").value.replace(/[^\x21-\x7e]/g, "");

/** The body of a request for an answer to `messages`. */
export function body(messages) {
  const system = field("system").value.trim(), deadline = DEADLINES[field("deadline").value];
  const tokens = Math.trunc(Number(field("max-tokens").value));
  const asked = {
    model: field("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number(field("temperature").value),
    priority: field("priority").value,
  };
  if (tokens > 0) asked.max_tokens = tokens;
  if (deadline === null) return asked;
  asked.deadline_ms = deadline;
  asked.on_deadline = field("on-deadline").value;
  if (asked.on_deadline === "fallback") asked.fallback = field("fallback").value.trim() || word("fallbackDefault");
  return asked;
}

/** The shortest deadline of the slider that leaves a fifth more than `ms`, as { value: its place, ms }. */
export function deadlineFor(ms) {
  const value = DEADLINES.findIndex((deadline) => deadline === null || deadline >= 1.2 * ms);
  return { value, ms: DEADLINES[value] };
}

/** Moves the slider. */
export function setDeadline(value) {
  field("deadline").value = value;
  field("deadline").dispatchEvent(new Event("input"));
}
