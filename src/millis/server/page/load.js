// The live view of load: /metrics read every second, a card a figure, a line of the last minute in each.

import { element, shape } from "./dom.js";
import { growth, parse, quantile } from "./metrics.js";
import { get } from "./stream.js";
import { milliseconds, word } from "./words.js";

const POLL_MS = 1000, GAP_MS = 5000, KEPT = 61, WINDOW = 30, CHART = { width: 120, height: 28 };
const FIRST = "millis:time_to_first_token_seconds", END = "millis:e2e_request_latency_seconds";
const CARDS = ["First", "Tokens", "Requests", "Deadlines", "Step", "End", "Kv", "Prefix"];

/** Shows the server's figures in `place` until the page goes. `key()` is the API key of the moment. */
export class Load {
  constructor(place, note, key) {
    this.note = note;
    this.key = key;
    this.readings = [];
    this.lines = new Map(CARDS.map((name) => [name, []]));
    this.cards = new Map(CARDS.map((name) => [name, card()]));
    place.append(...[...this.cards.values()].map((one) => one.node));
    this.relabel();
    this.poll();
  }

  /** After a change of language. */
  relabel() {
    for (const [name, one] of this.cards) one.title.textContent = word(`card${name}`);
    this.show();
  }

  async poll() {
    if (!document.hidden) {
      try {
        const response = await get("metrics", this.key());
        this.take({ at: performance.now(), ...parse(await response.text()) });
      } catch (error) {
        this.problem = error.status ? word("httpStatus", error.status) : word("unreachable");
      }
      this.show();
    }
    setTimeout(() => this.poll(), POLL_MS);
  }

  take(reading) {
    this.problem = null;
    if (reading.at - this.readings.at(-1)?.at > GAP_MS) this.forget();
    this.readings.push(reading);
    if (this.readings.length > KEPT) this.readings.shift();
    this.figures = figures(this.readings);
    for (const [name, line] of this.lines) {
      line.push(this.figures[name].line);
      if (line.length > KEPT) line.shift();
    }
  }

  /** After a while without readings, as in a hidden tab: those before it are not of the last minute. */
  forget() {
    this.readings = [];
    for (const line of this.lines.values()) line.length = 0;
  }

  show() {
    this.note.textContent = this.problem ? word("noLoad", this.problem) : word("window");
    this.note.classList.toggle("problem", Boolean(this.problem));
    if (!this.figures) return;
    for (const [name, one] of this.cards) {
      const { big, small } = this.figures[name];
      one.big.textContent = big();
      one.small.textContent = small();
      one.chart.replaceChildren(...sparkline(this.lines.get(name)));
    }
  }
}

function card() {
  const title = element("h3"), big = element("p", { class: "big" }, "–"), small = element("p", { class: "small" }, " ");
  const chart = shape("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  return { node: element("div", { class: "card" }, title, big, small, chart), title, big, small, chart };
}

/** What each card says: `big` and `small` as texts of the moment, `line` as a number or null. */
function figures(readings) {
  const now = readings.at(-1), last = readings.at(-2), window = readings.at(-1 - WINDOW) ?? readings[0];
  const value = (name) => now.values.get(`millis:${name}`) ?? 0;
  const most = (name) => now.most.get(`millis:${name}`) ?? 0; // of any model, where a sum of theirs means nothing
  const time = (seconds) => (!seconds ? "–" : milliseconds(1000 * seconds));
  const share = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(part === whole ? 0 : 1)} %` : "–");
  const [first, first99] = [0.5, 0.99].map((q) => quantile(now, window, FIRST, q));
  const [end, end99] = [0.5, 0.99].map((q) => quantile(now, window, END, q));
  const sent = (before) => growth(now, before, `${FIRST}_count`) + growth(now, before, "millis:inter_token_latency_seconds_count");
  const rate = last ? (1000 * sent(last)) / (now.at - last.at) : 0;
  const [met, missed] = [value("deadlines_met_total"), value("deadlines_missed_total")];
  const [hits, queries] = ["hits", "queries"].map((name) => growth(now, window, `millis:prefix_cache_${name}_total`));
  return {
    First: { big: () => time(first), small: () => word("p99", time(first99)), line: last ? quantile(now, last, FIRST, 0.5) : null },
    Tokens: { big: () => rate.toFixed(0), small: () => word("tokens", value("generation_tokens_total")), line: rate },
    Requests: { big: () => word("running", value("num_requests_running")), small: () => word("waiting", value("num_requests_waiting")), line: value("num_requests_running") + value("num_requests_waiting") },
    Deadlines: { big: () => share(met, met + missed), small: () => word("turned", value("requests_refused_total"), value("deadlines_landed_total")), line: last ? growth(now, last, "millis:deadlines_met_total") : 0 },
    Step: { big: () => time(most("step_actual_seconds")), small: () => word("predictedStep", time(most("step_predicted_seconds"))), line: most("step_actual_seconds") },
    End: { big: () => time(end), small: () => word("p99", time(end99)), line: last ? quantile(now, last, END, 0.5) : null },
    Kv: { big: () => share(most("kv_cache_usage_perc"), 1), small: () => word("preempted", value("num_preemptions_total")), line: most("kv_cache_usage_perc") },
    Prefix: { big: () => share(hits, queries), small: () => word("ofPrompts"), line: queries > 0 ? hits / queries : null },
  };
}

function sparkline(values) {
  const most = Math.max(...values.filter((value) => value !== null), 0);
  if (most <= 0) return [];
  const y = (value) => CHART.height - 2 - (value / most) * (CHART.height - 5);
  const points = values
    .map((value, i) => [CHART.width - ((values.length - 1 - i) * CHART.width) / (KEPT - 1), value])
    .filter(([, value]) => value !== null)
    .map(([x, value]) => `${x.toFixed(1)},${y(value).toFixed(1)}`);
  if (points.length === 1) return [shape("circle", { cx: points[0].split(",")[0] - 2, cy: points[0].split(",")[1], r: 2 })];
  const [start, stop] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
  return [
    shape("polygon", { points: `${start},${CHART.height} ${points.join(" ")} ${stop},${CHART.height}` }),
    shape("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }),
  ];
}
