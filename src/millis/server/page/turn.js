// One question and its answer, as the page shows them.

import { element } from "./dom.js";
import { render } from "./markdown.js";
import { deadlineFor } from "./settings.js";
import { counts, headline, waterfall } from "./waterfall.js";
import { milliseconds, roundMilliseconds, word } from "./words.js";

const TITLES = { deadline_exceeded: "tooLate" };
const NOTES = { deadline: "landed", length: "cutOff", stopped: "stopped" };

export class Turn {
  /** `again` asks the question once more; it is given a place on the deadline slider, or null to leave it. */
  constructor(question, model, again) {
    this.question = question;
    this.again = again;
    this.text = "";
    this.latest = true;
    this.complete = false; // an answer that a later question may follow
    this.body = element("div", { class: "text" });
    this.foot = element("div", { class: "foot" });
    this.answer = element("article", { class: "answer", "aria-busy": "true", "aria-label": model }, element("h3", {}, model), this.body, this.foot);
    this.asked = element("article", { class: "question", "aria-label": word("you") }, element("p", { dir: "auto" }, question));
    this.node = element("div", { class: "turn" }, this.asked, this.answer);
    this.drawing = 0;
    this.body.append(element("span", { class: "waiting", "aria-hidden": "true" }));
  }

  /** The messages that a later question follows. */
  messages() {
    return this.complete ? [{ role: "user", content: this.question }, { role: "assistant", content: this.text }] : [];
  }

  /** More text. It is drawn once a frame. */
  add(text) {
    this.text += text;
    this.drawing ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.drawing = 0;
    this.body.replaceChildren(...render(this.text));
  }

  /** The answer has ended. `reason`: finish_reason, or "stopped"; `seenMs`: when its first text was here, or null. */
  finish(reason, timings, seenMs) {
    this.complete = this.text !== "";
    this.settle(() => {
      if (NOTES[reason]) this.foot.append(element("p", { class: `note ${reason}` }, word(NOTES[reason])));
      if (timings) {
        this.foot.append(element("details", { open: this.latest }, element("summary", {}, headline(timings)), waterfall(timings), counts(timings, seenMs)));
      }
      this.tools(this.complete);
    });
  }

  /** There is no answer, or none to its end: a refusal with its forecast, or an error. */
  fail(error, deadlineMs) {
    const title = TITLES[error.code] ?? (error.refusal ? "refused" : this.text ? "brokeOff" : "failed");
    this.settle(() => {
      const card = element("div", { class: error.refusal ? "refusal" : "failure", role: "alert" }, element("strong", {}, word(title)));
      card.append(element("p", {}, error.message || word(error.status ? "httpStatus" : "unreachable", error.status)));
      if (error.code) card.append(element("code", {}, error.code));
      if (error.predicted_ms !== null) card.append(...this.forecast(error.predicted_ms, deadlineMs));
      this.foot.append(card);
      this.tools(false);
    });
  }

  forecast(predictedMs, deadlineMs) {
    const most = Math.max(predictedMs, deadlineMs ?? 0);
    const row = (label, value, kind) =>
      element("div", { class: "forecast" }, element("span", {}, label), element("meter", { class: kind, min: 0, max: most, value, "aria-label": label }));
    const longer = deadlineFor(predictedMs);
    const text = word("extend", longer.ms === null ? word("none") : roundMilliseconds(longer.ms));
    return [
      row(word("predicted", milliseconds(predictedMs)), predictedMs, "predicted"),
      deadlineMs === undefined ? "" : row(word("allowed", roundMilliseconds(deadlineMs)), deadlineMs, "allowed"),
      this.latest ? element("button", { type: "button", onclick: () => this.again(longer.value) }, text) : "",
    ];
  }

  /** The text is whole; `ending` draws what stands below it, now and after a change of language. */
  settle(ending) {
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.draw();
    this.ending = ending;
    this.relabel();
    this.answer.setAttribute("aria-busy", "false");
  }

  /** After a change of language. */
  relabel() {
    this.asked.setAttribute("aria-label", word("you"));
    this.foot.replaceChildren();
    this.ending?.();
  }

  tools(copying) {
    const bar = element("div", { class: "tools" });
    if (copying) {
      const button = element("button", { type: "button", class: "quiet copy", onclick: () => copy(this.text, button) }, word("copy"));
      bar.append(button);
    }
    if (this.latest) bar.append(element("button", { type: "button", class: "quiet again", onclick: () => this.again(null) }, word(copying ? "again" : "tryAgain")));
    this.foot.append(bar);
  }

  /** Another answer is the latest now: this one takes less room, and is asked no more. */
  retire() {
    this.latest = false;
    this.relabel();
  }
}

async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const area = element("textarea", { class: "unseen" }); // pages over plain HTTP have no clipboard of their own
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = word("copied");
  setTimeout(() => { button.textContent = word("copy"); }, 1500);
}
