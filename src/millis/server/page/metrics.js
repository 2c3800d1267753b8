// Reading Prometheus text, and what two readings say of the time between them. Pure.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;

/** Text → { values: name → sum over labels, most: name → the most of any, buckets: histogram → [[upper bound, count], …] by bound }. */
export function parse(text) {
  const values = new Map(), most = new Map(), bounds = new Map();
  for (const line of text.split("\n")) {
    const found = line[0] === "#" ? null : line.match(LINE);
    if (!found) continue;
    const [, name, labels = "", number] = found, value = Number(number);
    const bound = name.endsWith("_bucket") && labels.match(/(?:^|,)le="([^"]+)"/);
    if (bound) {
      const histogram = name.slice(0, -"_bucket".length), at = bound[1] === "+Inf" ? Infinity : Number(bound[1]);
      const counts = bounds.get(histogram) ?? bounds.set(histogram, new Map()).get(histogram);
      counts.set(at, (counts.get(at) ?? 0) + value);
    } else {
      values.set(name, (values.get(name) ?? 0) + value);
      most.set(name, Math.max(most.get(name) ?? value, value));
    }
  }
  const buckets = new Map([...bounds].map(([name, counts]) => [name, [...counts].sort(([a], [b]) => a - b)]));
  return { values, most, buckets };
}

/** How much a counter grew between two readings; what it counts from anew where the server began anew. */
export function growth(now, before, name) {
  const value = now.values.get(name) ?? 0, last = before?.values.get(name) ?? 0;
  return value >= last ? value - last : value;
}

/** The q-quantile of what a histogram saw between two readings, as Prometheus's histogram_quantile; null: it saw nothing. */
export function quantile(now, before, name, q) {
  const ends = now.buckets.get(name) ?? [];
  const past = new Map(before?.buckets.get(name) ?? []);
  let counts = ends.map(([bound, count]) => [bound, count - (past.get(bound) ?? 0)]);
  if (counts.some(([, count]) => count < 0)) counts = ends;
  const total = counts.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const rank = q * total, i = counts.findIndex(([, count]) => count >= rank);
  const [upper, count] = counts[i], [lower, under] = i > 0 ? counts[i - 1] : [0, 0];
  if (upper === Infinity) return lower;
  return count === under ? upper : lower + ((upper - lower) * (rank - under)) / (count - under);
}
