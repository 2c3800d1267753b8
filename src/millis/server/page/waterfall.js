// Where an answer's milliseconds went, drawn: one row a stage on a common scale, and what was left until the deadline.

import { element, shape } from "./dom.js";
import { milliseconds, roundMilliseconds, word } from "./words.js";

const WIDEST = 640, LEFT = 84, RIGHT = 72, ROW = 20, BAR = 10;

/** The stages of an answer, one after the other. Arrival is 0; the queue's time includes the tokenizer's. */
export function stages(timings) {
  const { tokenize_ms: tokenize, queue_ms: queue, first_token_ms: first, decode_ms: decode, total_ms: total } = timings;
  const begun = Math.max(queue, tokenize), token = Math.max(first, begun);
  const edges = [["tokenize", 0, tokenize], ["queue", tokenize, begun], ["prefill", begun, token], ["decode", token, token + decode]];
  if (total - (token + decode) > 0.05) edges.push(["finish", token + decode, total]);
  return edges.map(([name, from, to]) => ({ name, from, to: Math.max(from, to) }));
}

/** The picture for `timings`, as the server sends them. */
export function waterfall(timings) {
  const rows = stages(timings);
  const deadline = timings.deadline_ms;
  if (deadline !== undefined) {
    const late = timings.slack_ms < 0;
    rows.push({ name: late ? "late" : "slack", from: Math.min(timings.total_ms, deadline), to: Math.max(timings.total_ms, deadline) });
  }
  const end = Math.max(timings.total_ms, deadline ?? 0, 0.001);
  const width = Math.min(WIDEST, innerWidth - 70); // on a phone, what an answer has: text keeps its size
  const x = (ms) => LEFT + (ms / end) * (width - LEFT - RIGHT);
  const height = rows.length * ROW + 22;
  const description = rows.map((row) => `${word(row.name)} ${milliseconds(row.to - row.from)}`).join(", ");
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "waterfall", "aria-label": `${word("timingsOf")}: ${description}` });
  for (const tick of ticks(end, (width - LEFT - RIGHT) / 96)) {
    picture.append(
      shape("line", { x1: x(tick), x2: x(tick), y1: 0, y2: height - 18, class: "grid" }),
      shape("text", { x: x(tick), y: height - 4, class: "tick", "text-anchor": "middle" }, roundMilliseconds(tick)),
    );
  }
  rows.forEach((row, i) => picture.append(...bar(row, i * ROW, x, width - RIGHT + 10)));
  if (deadline !== undefined) picture.append(shape("line", { x1: x(deadline), x2: x(deadline), y1: 0, y2: height - 18, class: "deadline" }));
  return picture;
}

function bar(row, y, x, right) {
  const width = Math.max(2, x(row.to) - x(row.from));
  return [
    shape("text", { x: LEFT - 10, y: y + 14, class: "name", "text-anchor": "end" }, word(row.name)),
    shape("rect", { x: x(row.from), y: y + 5, width, height: BAR, rx: 2, class: `stage-${row.name}` }),
    shape("text", { x: right, y: y + 14, class: "value" }, milliseconds(row.to - row.from)),
  ];
}

/** Round times from 0 to `end`, in `most` steps at most. */
function ticks(end, most) {
  const step = [1, 2, 5].flatMap((n) => [0.1, 1, 10, 100, 1000, 10000].map((p) => n * p)).sort((a, b) => a - b).find((n) => end / n <= most);
  return Array.from({ length: Math.floor(end / (step ?? end)) + 1 }, (_, i) => i * (step ?? end));
}

/** The counts beside the picture, as one line. */
export function counts(timings, seenMs) {
  const rate = timings.decode_ms > 0 && timings.completion_tokens > 1 ? (1000 * (timings.completion_tokens - 1)) / timings.decode_ms : null;
  const parts = [
    word("prompt", timings.prompt_tokens) + (timings.cached_tokens ? ` (${word("cached", timings.cached_tokens)})` : ""),
    word("steps", timings.steps),
    rate === null ? null : word("tokensPerSecond", rate.toFixed(0)),
    timings.drafted_tokens ? word("drafted", timings.accepted_tokens, timings.drafted_tokens) : null,
    seenMs === null ? null : word("inBrowser", milliseconds(seenMs)),
  ];
  return element("p", { class: "counts" }, parts.filter(Boolean).join(" · "));
}

/** One line that says it all: total, tokens, first token, slack. */
export function headline(timings) {
  const parts = [milliseconds(timings.total_ms), word("tokens", timings.completion_tokens), word("firstToken", milliseconds(timings.first_token_ms))];
  if (timings.slack_ms !== undefined) {
    parts.push(timings.slack_ms >= 0 ? word("slackLeft", milliseconds(timings.slack_ms)) : word("slackLate", milliseconds(-timings.slack_ms)));
  }
  return parts.join(" · ");
}
