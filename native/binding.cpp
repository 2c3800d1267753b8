// The Python module millis._native: the runtime as Python sees it, and kernels one by one for tests and measurements.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>

#include "arrays.h"
#include "cpu.h"
#include "requantize.h"
#include "runtime.h"
#include "sampler.h"
#include "unlocked.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

void bind_adapter(nb::module_& m);
void bind_bench(nb::module_& m);
void bind_packed(nb::module_& m);
void bind_products(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_strings(nb::module_& m);

namespace {

using Adapters = std::optional<std::vector<std::shared_ptr<const Adapter>>>;  // of each sequence; None: it has none

using Lengths = std::optional<Array<int32_t>>;  // of each sequence's source; None: the model reads none
using Tables = std::optional<Array2<int32_t>>;  // and the pages that hold it

// Checked, so that it may be run; the caller holds the adapters meanwhile.
Batch batch_of(const Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
               const Array2<int32_t>& tables, const Adapters& adapters = {}, std::vector<int32_t> parents = {}, const Lengths& sources = {},
               const Tables& source_tables = {}) {
  Batch batch{copy_of(tokens), copy_of(starts), copy_of(lengths), copy_of(tables), tables.shape(1)};
  batch.parents = std::move(parents);
  if (sources) batch.sources = copy_of(*sources);
  if (source_tables) batch.source_tables = copy_of(*source_tables), batch.source_width = source_tables->shape(1);
  for (const auto& adapter : adapters.value_or(std::vector<std::shared_ptr<const Adapter>>{})) batch.adapters.push_back(adapter.get());
  runtime.check(batch);
  return batch;
}

// Row of each sequence's last token.
std::vector<int32_t> last_rows(const Batch& batch) {
  std::vector<int32_t> rows;
  int32_t end = 0;
  for (const int32_t length : batch.lengths) rows.push_back((end += length) - 1);
  return rows;
}

using Samplers = nb::typed<nb::sequence, std::optional<Sampler>>;

// The samplers of a step, nullptr for None. Held here, because another thread may change the list meanwhile.
struct Held {
  std::vector<nb::object> objects;
  std::vector<Sampler*> samplers;

  Held(const Samplers& given, int vocab) {
    for (nb::handle item : given) {
      objects.push_back(nb::borrow(item));
      Sampler* sampler = nullptr;
      if (!item.is_none() && !nb::try_cast(item, sampler)) throw nb::type_error("samplers must hold a Sampler or None for each sequence");
      if (sampler && sampler->vocab() != vocab) throw std::invalid_argument("batch: a sampler of another vocabulary");
      if (sampler && std::count(samplers.begin(), samplers.end(), sampler)) throw std::invalid_argument("batch: one sampler serves one sequence");
      samplers.push_back(sampler);
    }
  }
};

using Sampled = std::tuple<int32_t, float, std::vector<std::pair<int32_t, float>>>;

// The rows of a step to choose from: of each sampled sequence its last token and the drafts that end its tokens.
struct Verified {
  std::vector<int32_t> rows;
  std::vector<size_t> first;                     // [S + 1] of each sequence in rows
  std::vector<size_t> sequence;                  // of each row
  std::vector<std::span<const int32_t>> drafts;  // of each sequence

  // What row i stands behind.
  std::span<const int32_t> ahead(size_t i) const { return drafts[sequence[i]].first(i - first[sequence[i]]); }

  Verified(const Batch& batch, const std::vector<Sampler*>& samplers, const std::vector<int32_t>& drafted) : first{0} {
    if (drafted.size() != batch.lengths.size()) throw std::invalid_argument("batch: one number of drafts for each sequence");
    int32_t end = 0;
    for (size_t s = 0; s < samplers.size(); ++s) {
      const int32_t count = drafted[s];
      if (count < 0 || count >= batch.lengths[s] || (count > 0 && !samplers[s]))
        throw std::invalid_argument("batch: drafts follow a token of their sequence, which has a sampler");
      if (count > 0 && samplers[s]->masked()) throw std::invalid_argument("batch: drafts behind a mask, which speaks of the next token only");
      end += batch.lengths[s];
      for (int32_t row = end - 1 - count; samplers[s] && row < end; ++row) rows.push_back(row), sequence.push_back(s);
      first.push_back(rows.size());
      drafts.push_back(std::span(batch.tokens).subspan(static_cast<size_t>(end - count), static_cast<size_t>(count)));
    }
  }
};

// A sequence's [(token, log-probability, best)]: the drafts that its sampler chooses as well, then the first token that is
// its choice alone, or kUnusable or kMaskLate; none where its sampler is None. Each row is chosen as if all drafts before it were right, side by
// side.
std::vector<std::vector<Sampled>> step(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
                                       const Array2<int32_t>& tables, const Samplers& given, const Array<int32_t>& drafted, const Adapters& adapters,
                                       const Lengths& sources, const Tables& source_tables) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables, adapters, {}, sources, source_tables);
  const Held held(given, runtime.config().vocab);
  if (held.samplers.size() != batch.lengths.size()) throw std::invalid_argument("batch: one sampler or None for each sequence");
  const Verified v(batch, held.samplers, copy_of(drafted));
  std::vector<Choice> choices(v.rows.size());
  std::vector<Choosing> choosing;
  for (size_t i = 0; i < v.rows.size(); ++i) choosing.push_back(held.samplers[v.sequence[i]]->choosing(v.ahead(i)));
  {
    const Unlocked unlocked;
    const auto vocab = static_cast<size_t>(runtime.config().vocab);
    runtime.run(
        batch, v.rows,
        [&](size_t i, float* logits) {
          held.samplers[v.sequence[i]]->choose(std::span(logits, vocab), v.ahead(i), runtime.kernels().log_sum_exp, choices[i]);
        },
        choosing);
  }
  std::vector<std::vector<Sampled>> out(held.samplers.size());
  std::vector<int32_t> chosen;
  for (size_t s = 0; s < out.size(); ++s) {
    if (!held.samplers[s]) continue;
    chosen.clear();
    for (size_t i = v.first[s]; i < v.first[s + 1]; ++i) {
      Choice& c = choices[i];
      out[s].emplace_back(c.token, c.logprob, std::move(c.top));
      if (c.token < 0) break;
      chosen.push_back(c.token);
      if (i + 1 < v.first[s + 1] && c.token != v.drafts[s][i - v.first[s]]) break;
    }
    held.samplers[s]->commit(chosen);
  }
  return out;
}

// [(token, its probability to this model)]: what each sequence's sampler would choose behind its tokens, of which the last
// `ahead` are drafts; a negative token where that is none. Only the first `words` tokens are looked at. Samplers stay as they are.
std::vector<std::pair<int32_t, float>> propose(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts,
                                               const Array<int32_t>& lengths, const Array2<int32_t>& tables, const Samplers& given,
                                               const std::vector<std::vector<int32_t>>& ahead, std::optional<int> words) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables);
  const Held held(given, runtime.config().vocab);
  if (held.samplers.size() != batch.lengths.size() || std::count(held.samplers.begin(), held.samplers.end(), nullptr))
    throw std::invalid_argument("batch: one sampler for each sequence");
  if (ahead.size() != batch.lengths.size()) throw std::invalid_argument("batch: one list of drafts for each sequence");
  for (const auto& drafts : ahead)
    for (const int32_t token : drafts)
      if (token < 0 || token >= runtime.config().vocab) throw std::invalid_argument("batch: token id out of the vocabulary");
  const int vocab = runtime.config().vocab, among = words.value_or(vocab);
  if (among < 1 || among > vocab) throw std::invalid_argument("propose: among 1 to all words");
  std::vector<Choice> choices(ahead.size());
  std::vector<float> probability(ahead.size(), 0.0f);
  {
    const Unlocked unlocked;
    const auto rows = last_rows(batch);
    const auto look = [&](size_t i, float* logits) {
      std::fill(logits + among, logits + vocab, -INFINITY);
      const float all = runtime.kernels().log_sum_exp(logits, among);
      held.samplers[i]->choose(std::span(logits, static_cast<size_t>(vocab)), ahead[i], runtime.kernels().log_sum_exp, choices[i]);
      probability[i] = std::exp(choices[i].logit - all);
    };
    runtime.run(batch, rows, look, {}, among);
  }
  std::vector<std::pair<int32_t, float>> out;
  for (size_t i = 0; i < choices.size(); ++i) out.emplace_back(choices[i].token, probability[i]);
  return out;
}

// [rows, vocab]: of each sequence's last token, or of all tokens.
Floats logits(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
              const Array2<int32_t>& tables, bool all, const Adapters& adapters, const Lengths& sources, const Tables& source_tables) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables, adapters, {}, sources, source_tables);
  std::vector<int32_t> rows = last_rows(batch);
  if (all) {
    rows.resize(batch.tokens.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  }
  const auto vocab = static_cast<size_t>(runtime.config().vocab);
  std::vector<float> out(rows.size() * vocab);
  {
    const Unlocked unlocked;
    runtime.run(batch, rows, [&](size_t i, float* row) { std::copy(row, row + vocab, out.data() + i * vocab); });
  }
  return owned(std::move(out), {rows.size(), vocab});
}

// [tokens, width]: what the output matrix reads behind each token.
Floats hidden(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
              const Array2<int32_t>& tables) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables);
  std::vector<int32_t> rows(batch.tokens.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  const size_t width = runtime.hidden_width();
  std::vector<float> out(rows.size() * width);
  {
    const Unlocked unlocked;
    runtime.run_hidden(batch, rows, [&](size_t i, float* row) { std::copy(row, row + width, out.data() + i * width); });
  }
  return owned(std::move(out), {rows.size(), width});
}

// [texts, width]: the embedding of each text, or what the head makes of it.
Floats texts(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& lengths, bool head, const std::optional<Array<int32_t>>& types) {
  Batch batch{copy_of(tokens), {}, copy_of(lengths), {}, 0, types ? copy_of(*types) : std::vector<int32_t>{}};
  runtime.check_texts(batch);
  std::vector<int32_t> rows(batch.lengths.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  const size_t width = runtime.text_width(head);
  std::vector<float> out(rows.size() * width);
  {
    const Unlocked unlocked;
    runtime.run_texts(batch, rows, head, [&](size_t i, float* row) { std::copy(row, row + width, out.data() + i * width); });
  }
  return owned(std::move(out), {rows.size(), width});
}

// Targets of a batch's tokens, -1 where nothing is asked of one, and the rows of those that have one.
struct Targets {
  std::vector<int32_t> of, rows;

  Targets(const Runtime& runtime, const Batch& batch, const Array<int32_t>& given) : of(copy_of(given)) {
    if (of.size() != batch.tokens.size()) throw std::invalid_argument("batch: one target for each token");
    for (size_t i = 0; i < of.size(); ++i) {
      if (of[i] < -1 || of[i] >= runtime.config().vocab) throw std::invalid_argument("batch: target out of the vocabulary");
      if (of[i] >= 0) rows.push_back(static_cast<int32_t>(i));
    }
  }
};

// [tokens]: the log-probability of each token's target, 0 where that is -1.
Floats score(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
             const Array2<int32_t>& tables, const Array<int32_t>& given, const Adapters& adapters) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables, adapters);
  const Targets targets(runtime, batch, given);
  std::vector<float> out(targets.of.size(), 0.0f);
  {
    const Unlocked unlocked;
    runtime.run(batch, targets.rows, [&](size_t i, float* row) {
      const auto at = static_cast<size_t>(targets.rows[i]);
      out[at] = row[targets.of[at]] - runtime.kernels().log_sum_exp(row, runtime.config().vocab);
    });
  }
  return owned(std::move(out));
}

using Ranked = std::tuple<Floats, NewArray<int32_t>, NewArray<int32_t>, Floats>;

// As score, then [tokens]: one more than how many are likelier than the target, 0 where that is -1; then [tokens, count] the
// likeliest tokens, best first, and their log-probabilities; -1 and -inf where there are fewer.
Ranked score_best(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
                  const Array2<int32_t>& tables, const Array<int32_t>& given, int count, const Adapters& adapters) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables, adapters);
  const Targets targets(runtime, batch, given);
  if (count < 0 || count > runtime.config().vocab) throw std::invalid_argument("batch: count in [0, the vocabulary]");
  const size_t size = targets.of.size(), wide = static_cast<size_t>(count), vocab = static_cast<size_t>(runtime.config().vocab);
  std::vector<float> out(size, 0.0f), values(size * wide, -std::numeric_limits<float>::infinity());
  std::vector<int32_t> ranks(size, 0), best(size * wide, -1);
  {
    const Unlocked unlocked;
    runtime.run(batch, targets.rows, [&](size_t i, float* row) {
      thread_local std::vector<Candidate> found;
      const auto at = static_cast<size_t>(targets.rows[i]);
      const float sum = runtime.kernels().log_sum_exp(row, runtime.config().vocab), logit = row[targets.of[at]];
      out[at] = logit - sum;
      ranks[at] = 1 + static_cast<int32_t>(std::count_if(row, row + vocab, [logit](float x) { return x > logit; }));
      largest(std::span(row, vocab), wide, found);
      for (size_t n = 0; n < found.size(); ++n) best[at * wide + n] = found[n].second, values[at * wide + n] = found[n].first - sum;
    });
  }
  return {owned(std::move(out)), owned(std::move(ranks)), owned(std::move(best), {size, wide}), owned(std::move(values), {size, wide})};
}

// [edges]: the log-probability of targets[i] behind token rows[i] of the batch, whose sequences are trees: parents[t] is the
// place of token t's parent among those of its sequence, -1 what the cache holds. rows ascend; all targets of a row share it.
Floats score_tree(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
                  const Array2<int32_t>& tables, const Array<int32_t>& parents, const Array<int32_t>& rows, const Array<int32_t>& given,
                  const Adapters& adapters) {
  const Batch batch = batch_of(runtime, tokens, starts, lengths, tables, adapters, copy_of(parents));
  if (batch.parents.empty()) throw std::invalid_argument("batch: one parent for each token");
  const std::vector<int32_t> all = copy_of(rows), targets = copy_of(given);
  if (all.size() != targets.size()) throw std::invalid_argument("batch: one row for each target");
  std::vector<int32_t> distinct;
  std::vector<size_t> first;  // edge of each distinct row
  for (size_t i = 0; i < all.size(); ++i) {
    if (targets[i] < 0 || targets[i] >= runtime.config().vocab) throw std::invalid_argument("batch: target out of the vocabulary");
    if (all[i] < (i ? all[i - 1] : 0) || static_cast<size_t>(all[i]) >= batch.tokens.size())
      throw std::invalid_argument("batch: rows ascend, and are those of tokens");
    if (!i || all[i] != all[i - 1]) distinct.push_back(all[i]), first.push_back(i);
  }
  first.push_back(all.size());
  std::vector<float> out(all.size());
  {
    const Unlocked unlocked;
    runtime.run(batch, distinct, [&](size_t r, float* logits) {
      const float sum = runtime.kernels().log_sum_exp(logits, runtime.config().vocab);
      for (size_t i = first[r]; i < first[r + 1]; ++i) out[i] = logits[targets[i]] - sum;
    });
  }
  return owned(std::move(out));
}

// The source half of an encoder-decoder model: what its decoder needs of each text goes into the pages of its table.
void read_sources(Runtime& runtime, const Array<int32_t>& tokens, const Array<int32_t>& lengths, const Array2<int32_t>& tables) {
  const Batch batch{copy_of(tokens), {}, copy_of(lengths), copy_of(tables), tables.shape(1)};
  const Unlocked unlocked;
  runtime.read(batch);
}

using Pair = std::tuple<std::string, Array2<float>, Array2<float>, float>;

std::shared_ptr<const Adapter> make_adapter(const Runtime& runtime, const std::vector<Pair>& given) {
  std::vector<AdapterPair> pairs;
  for (const auto& [weight, a, b, scale] : given) {
    const size_t rank = a.shape(0);
    if (rank != b.shape(1)) throw std::invalid_argument("the two matrices of " + weight + " differ in rank");
    if (rank < 1 || rank > kMostRank) throw std::invalid_argument("the rank of " + weight + " must lie in [1, " + std::to_string(kMostRank) + "]");
    pairs.push_back({weight, static_cast<int>(rank), copy_of(a), copy_of(b), scale});
  }
  const Unlocked unlocked;
  return runtime.adapter(pairs);
}

// [rows, cols] read back from the packed form, which must hold the file's values.
Floats unpack(int type, int rows, int cols, const Array<uint8_t>& data) {
  Pool alone(1);
  const Matrix w("w", static_cast<GgmlType>(type), rows, cols, std::span(data.data(), data.size()), false, alone);
  std::vector<float> out(static_cast<size_t>(rows) * static_cast<size_t>(cols));
  for (int r = 0; r < rows; ++r) w.unpack_row(r, out.data() + static_cast<size_t>(r) * static_cast<size_t>(cols));
  return owned(std::move(out), {static_cast<size_t>(rows), static_cast<size_t>(cols)});
}

// The bytes of a tensor as IQ4_NL.
NewArray<uint8_t> to_four_bits(int type, const Array<uint8_t>& data, int threads) {
  std::vector<uint8_t> out;
  {
    const Unlocked unlocked;
    Pool pool(threads);
    out = to_iq4_nl(static_cast<GgmlType>(type), std::span(data.data(), data.size()), pool);
  }
  return owned(std::move(out));
}

// Milliseconds of `count` plain reads of `mib` MiB by `threads` threads, each its part; all meet behind each. The memory is
// like that of weights: huge pages where the system has them.
std::vector<double> read_times(int mib, int threads, int count) {
  if (mib < 1 || mib > 65536) throw std::invalid_argument("reading: mib in [1, 65536]");
  if (count < 0 || count > 1000000) throw std::invalid_argument("reading: count in [0, 1000000]");
  const Unlocked unlocked;
  const Kernels& k = select_kernels("auto");
  Pool pool(threads);
  const size_t bytes = static_cast<size_t>(mib) << 20, part = bytes / static_cast<size_t>(threads);
  const std::shared_ptr<uint8_t> data = large_memory(bytes + kCacheLine);
  std::memset(data.get(), 1, bytes);
  std::vector<double> times;
  times.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    pool.run([&](int thread) { k.read(data.get() + part * static_cast<size_t>(thread), part); });
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }
  return times;
}

// GB/s: the best of five reads.
double read_bandwidth(int mib, int threads) {
  const std::vector<double> times = read_times(mib, threads, 5);
  const double bytes = static_cast<double>((static_cast<size_t>(mib) << 20) / static_cast<size_t>(threads)) * threads;
  return bytes / std::ranges::min(times) / 1e6;
}

// Nanoseconds of one barrier among `threads` threads that have nothing else to do, the best of five runs.
double barrier_ns(int threads) {
  const Unlocked unlocked;
  constexpr int kBarriers = 2000;
  Pool pool(threads);
  double best = 1e18;
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      for (int n = 0; n < kBarriers; ++n) pool.barrier(thread);
    });
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, took.count() / kBarriers);
  }
  return best;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a daemon thread that still waits at the end keeps its runtime, and that is no leak
  bind_adapter(m);
  bind_bench(m);
  bind_sampler(m);
  bind_packed(m);
  bind_products(m);
  bind_quantize(m);
  bind_strings(m);
  m.attr("PAGE_TOKENS") = kPageTokens;
  m.attr("BIAS_SLACK") = kBiasSlack;
  m.def("supported_isas", &supported_isas, "ISAs this machine can run, slowest first.");
  m.def("amx_state", &amx_state, "Whether AMX tiles are used here, or why not.");
  m.def("read_bandwidth", &read_bandwidth, "mib"_a, "threads"_a, "GB/s of a plain read of `mib` MiB by `threads` threads.");
  m.def("read_times", &read_times, "mib"_a, "threads"_a, "count"_a, "Milliseconds of `count` such reads, one after the other.");
  m.def("barrier_ns", &barrier_ns, "threads"_a, "Nanoseconds of one barrier among `threads` threads.");
  m.def("to_iq4_nl", &to_four_bits, "type"_a, "data"_a.noconvert(), "threads"_a = 1,
        "The values of `data`, blocks of a GGML type, as blocks of IQ4_NL.");
  m.def("unpack", &unpack, "type"_a, "rows"_a, "cols"_a, "data"_a.noconvert());
  nb::class_<Runtime>(m, "Runtime")
      .def(
          "__init__",
          [](Runtime* self, int threads, const std::string& isa, int max_tokens, int max_outputs, int pages, int layers, int kv_heads, int head_dim,
             int vocab, int context, bool exact, bool screen, bool bytes) {
            new (self) Runtime(
                RuntimeConfig{threads, max_tokens, max_outputs, pages, layers, kv_heads, head_dim, vocab, context, exact, isa, bytes, screen});
          },
          nb::kw_only(), "threads"_a, "isa"_a, "max_tokens"_a, "max_outputs"_a, "pages"_a, "layers"_a, "kv_heads"_a, "head_dim"_a, "vocab"_a,
          "context"_a, "exact"_a, "screen"_a = true, "bytes"_a = false)
      .def(
          "use_packed", [](Runtime& self, std::shared_ptr<PackedFile> file) { self.use_packed(std::move(file)); }, "file"_a,
          "Takes the matrices added from here on out of `file` where it has them.")
      .def("add_buffer", &Runtime::add_buffer, "name"_a, "width"_a)
      .def(
          "add_matrix",
          [](Runtime& self, const std::string& name, int type, int rows, int cols, const Array<uint8_t>& data) {
            const Unlocked unlocked;
            self.add_matrix(name, type, rows, cols, std::span(data.data(), data.size()));
          },
          "name"_a, "type"_a, "rows"_a, "cols"_a, "data"_a.noconvert())
      .def(
          "add_vector", [](Runtime& self, const std::string& name, const Array<float>& values) { self.add_vector(name, copy_of(values)); }, "name"_a,
          "values"_a)
      .def("embed", &Runtime::embed, "out"_a, "weight"_a, "scale"_a, "positions"_a, "types"_a = "")
      .def("norm", &Runtime::norm, "out"_a, "x"_a, "weight"_a, "bias"_a, "eps"_a, "layer"_a, "residual"_a, "begin"_a = 0, "end"_a = 0)
      .def("matmul", &Runtime::matmul, "out"_a, "x"_a, "weights"_a, "biases"_a, "activation"_a, "residual"_a, "gate"_a)
      .def("attention", &Runtime::attention, "out"_a, "qkv"_a, "layer"_a, "heads"_a, "scale"_a, "rope"_a, "interleaved"_a, "window"_a, "q_norm"_a,
           "k_norm"_a, "eps"_a, "bias"_a = "", "norm_rotated"_a = false)
      .def("convolve", &Runtime::convolve, "out"_a, "bcx"_a, "weight"_a, "layer"_a, "taps"_a)
      .def("attend_all", &Runtime::attend_all, "out"_a, "qkv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "bias"_a = "", "rope"_a = "",
           "window"_a = 0, "q_norm"_a = "", "k_norm"_a = "", "eps"_a = 1e-6f)
      .def("remember", &Runtime::remember, "kv"_a, "layer"_a)
      .def("end_source", &Runtime::end_source)
      .def("cross_attention", &Runtime::cross_attention, "out"_a, "q"_a, "layer"_a, "heads"_a, "scale"_a)
      .def("select", &Runtime::select, "out"_a, "x"_a)
      .def("pool", &Runtime::pool, "out"_a, "x"_a, "mean"_a)
      .def("finish", &Runtime::finish)
      .def("adapter", &make_adapter, "pairs"_a, nb::keep_alive<0, 1>(),
           "An adapter of this runtime: (weight, A [rank, inputs], B [outputs, rank], scale) of each product it changes.")
      // Integers are taken as they are: a conversion from 64 bits would silently wrap.
      .def("step", &step, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(), "samplers"_a,
           "drafted"_a.noconvert(), "adapters"_a = nb::none(), "sources"_a.noconvert() = nb::none(), "source_tables"_a.noconvert() = nb::none())
      .def("propose", &propose, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(), "samplers"_a,
           "ahead"_a, "words"_a = nb::none())
      .def("logits", &logits, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(), "all"_a = false,
           "adapters"_a = nb::none(), "sources"_a.noconvert() = nb::none(), "source_tables"_a.noconvert() = nb::none())
      .def("hidden", &hidden, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert())
      .def("read", &read_sources, "tokens"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(),
           "Reads the sources of an encoder-decoder model into the pages of their tables.")
      .def("texts", &texts, "tokens"_a.noconvert(), "lengths"_a.noconvert(), "head"_a = false, "types"_a.noconvert() = nb::none(),
           "[texts, width]: an encoder's embedding of each text, or the logits of its head.")
      .def("score", &score, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(), "targets"_a.noconvert(),
           "adapters"_a = nb::none())
      .def("score_best", &score_best, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(),
           "targets"_a.noconvert(), "count"_a, "adapters"_a = nb::none())
      .def("score_tree", &score_tree, "tokens"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "tables"_a.noconvert(),
           "parents"_a.noconvert(), "rows"_a.noconvert(), "targets"_a.noconvert(), "adapters"_a = nb::none())
      .def(
          "copy_page",
          [](Runtime& self, int from, int to) {
            const Unlocked unlocked;
            self.copy_page(from, to);
          },
          "source"_a, "target"_a, "Copies the keys and values of page `source`, all layers, into page `target`.")
      .def_prop_ro("isa", [](const Runtime& self) { return self.kernels().isa; })
      .def_prop_ro("weight_bytes", &Runtime::weight_bytes)
      .def_prop_ro("token_bytes", &Runtime::token_bytes, "Of the weights that a token is multiplied by.");
}

}  // namespace millis
