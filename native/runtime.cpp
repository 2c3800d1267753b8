// The step: checks a batch, then every thread walks the plan's operations side by side.
#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "step.h"
#include "wide.h"

namespace millis {
namespace {

constexpr int kRowBlock = 128;  // rows that pass over a thread's panels together

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Tokens on the longest way through `length` tokens of a sequence, the first of them number `first` of the batch.
int64_t depth(const Batch& batch, size_t first, size_t length) {
  if (batch.parents.empty()) return static_cast<int64_t>(length);
  std::vector<int64_t> depths(length);
  for (size_t i = 0; i < length; ++i) {
    const int32_t parent = batch.parents[first + i];
    require(parent >= -1 && parent < static_cast<int64_t>(i), "batch: a token's parent comes before it");
    depths[i] = parent < 0 ? 1 : depths[static_cast<size_t>(parent)] + 1;
  }
  return *std::max_element(depths.begin(), depths.end());
}

}  // namespace

void Runtime::check(const Batch& batch) const {
  const size_t sequences = batch.lengths.size(), tokens = batch.tokens.size();
  require(finished_ && pooled_ == 0, "the runtime is not finished, or runs an encoder");
  require(sequences > 0 && batch.starts.size() == sequences && batch.tables.size() % sequences == 0, "batch: array sizes differ");
  require(batch.tables.size() / sequences == batch.table_width, "batch: one page table for each sequence");
  require(tokens > 0 && tokens <= static_cast<size_t>(config_.max_tokens), "batch: more tokens than max_tokens, or none");
  for (const int32_t token : batch.tokens) require(token >= 0 && token < config_.vocab, "batch: token id out of the vocabulary");
  require(batch.parents.empty() || batch.parents.size() == tokens, "batch: one parent for each token");
  int64_t total = 0;
  for (size_t s = 0; s < sequences; ++s) {
    const int64_t start = batch.starts[s], length = batch.lengths[s], end = start + length;
    require(start >= 0 && length >= 1 && total + length <= static_cast<int64_t>(tokens), "batch: lengths do not add up to the tokens");
    require(start + depth(batch, static_cast<size_t>(total), static_cast<size_t>(length)) <= config_.context, "batch: positions out of the context");
    const auto used = static_cast<size_t>((end + kPageTokens - 1) / kPageTokens);
    require(used <= batch.table_width, "batch: page table too short");
    for (size_t p = 0; p < used; ++p) {
      const int32_t page = batch.tables[s * batch.table_width + p];
      require(page >= 0 && page < config_.pages, "batch: page out of range");
    }
    total += length;
  }
  require(total == static_cast<int64_t>(tokens), "batch: lengths do not add up to the tokens");
  check_sources(batch);
  require(batch.adapters.empty() || batch.adapters.size() == sequences, "batch: one adapter or None for each sequence");
  for (const Adapter* adapter : batch.adapters) require(!adapter || &adapter->owner() == this, "batch: an adapter of another runtime");
}

void Runtime::place(const Batch& batch) {
  positions_.clear(), slots_.clear(), sequences_.clear(), begins_.clear();
  for (size_t s = 0; s < batch.lengths.size(); ++s) {
    const size_t first = slots_.size();
    const int32_t start = batch.starts.empty() ? 0 : batch.starts[s];
    begins_.push_back(static_cast<int32_t>(first));
    for (int32_t i = 0; i < batch.lengths[s]; ++i) {
      const int32_t parent = batch.parents.empty() ? i - 1 : batch.parents[first + static_cast<size_t>(i)];
      positions_.push_back(parent < 0 ? start : positions_[first + static_cast<size_t>(parent)] + 1);
      slots_.push_back(start + i), sequences_.push_back(static_cast<int32_t>(s));
    }
  }
  if (!batch.parents.empty()) mask_trees(batch);
}

// A token of a tree sees, of the page that the tree begins in and those behind it, what was cached before and its ancestors.
void Runtime::mask_trees(const Batch& batch) {
  mask_words_ = 0;
  for (size_t s = 0; s < batch.lengths.size(); ++s)
    mask_words_ = std::max(mask_words_, static_cast<size_t>((batch.starts[s] % kPageTokens + batch.lengths[s] - 1) / kPageTokens + 1));
  for (auto& [window, mask] : masks_) {
    mask.assign(slots_.size() * mask_words_, 0);
    size_t first = 0;
    for (size_t s = 0; s < batch.lengths.size(); first += static_cast<size_t>(batch.lengths[s]), ++s) {
      const int32_t lead = batch.starts[s] % kPageTokens;
      for (int32_t i = 0; i < batch.lengths[s]; ++i) {
        const size_t t = first + static_cast<size_t>(i);
        const int32_t least = window ? positions_[t] - window + 1 : 0;  // position that it sees
        const auto see = [&](int32_t slot) { mask[t * mask_words_ + static_cast<size_t>(slot / kPageTokens)] |= 1u << (slot % kPageTokens); };
        for (int32_t slot = std::max(0, least - batch.starts[s] + lead); slot < lead; ++slot) see(slot);
        for (int32_t a = i; a >= 0 && positions_[first + static_cast<size_t>(a)] >= least; a = batch.parents[first + static_cast<size_t>(a)])
          see(lead + a);
      }
    }
  }
}

void Runtime::copy_page(int from, int to) {
  const auto lock = turn();
  require(finished_, "the runtime is not finished");
  require(from >= 0 && from < config_.pages && to >= 0 && to < config_.pages, "copy_page: page out of range");
  if (from != to) std::memcpy(cached(to, 0, 0), cached(from, 0, 0), page_stride_);
}

void Runtime::run_rows(const Batch& batch, std::span<const int32_t> rows, std::span<const Choosing> choosing, size_t last, VisitRow visit,
                       const void* context, int words) {
  const auto lock = turn();
  place(batch);
  adding_.begin(batch);
  std::mutex failing;
  std::exception_ptr failure;
  const bool ascend = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
  const bool early = tail_ < first_selected_ && ascend && rows.size() < batch.tokens.size() && !adding_.any();
  const Step step{batch, rows, choosing, last, early, 0, 0, visit, context, words, failing, failure};
  pool_.run([&](int thread) { run_ops(step, thread); });
  if (failure) std::rethrow_exception(failure);
}

void Runtime::walk(Step& step, size_t first, size_t last, int thread) {
  for (size_t i = first; i < last; ++i) {
    if (i + 1 < last) {  // a fused norm is done by the product behind it
      const auto* product = std::get_if<MatMulOp>(&ops_[i + 1]);
      if (product && product->norm && product->norm == std::get_if<NormOp>(&ops_[i])) continue;
    }
    std::visit([&](const auto& op) { execute(op, step, thread); }, ops_[i]);
    pool_.barrier(thread);
  }
}

void Runtime::run_ops(Step step, int thread) {
  step.count = static_cast<int>(step.batch.tokens.size());
  walk(step, target_, step.early ? tail_ : first_selected_, thread);
  if (step.early && !step.rows.empty()) {
    for (size_t i = static_cast<size_t>(thread); i < tail_inputs_.size(); i += static_cast<size_t>(pool_.threads())) {
      const Buffer& b = *tail_inputs_[i];
      for (int r = 0; r < static_cast<int>(step.rows.size()); ++r) std::copy_n(row(b, step.rows[static_cast<size_t>(r)]), b.width, row(b, r));
    }
    pool_.barrier(thread);
    step.count = static_cast<int>(step.rows.size());
    walk(step, tail_, first_selected_, thread);
  }
  const bool hidden = step.last < ops_.size() && pooled_ == 0;
  const Buffer& visited = hidden ? *std::get<MatMulOp>(ops_.back()).x : *output_of(ops_[step.last - 1]);
  const auto most = static_cast<size_t>(config_.max_outputs);
  for (; step.chunk < step.rows.size(); step.chunk += most) {
    step.count = static_cast<int>(std::min(most, step.rows.size() - step.chunk));
    walk(step, first_selected_, step.last, thread);
    for (int r = thread; r < step.count; r += pool_.threads()) {
      try {
        step.visit(step.context, step.chunk + static_cast<size_t>(r), row(visited, r));
      } catch (...) {
        const std::lock_guard lock(step.lock);
        if (!step.failure) step.failure = std::current_exception();
      }
    }
    pool_.barrier(thread);
  }
}

size_t Runtime::hidden_width() const {
  require(std::holds_alternative<MatMulOp>(ops_.back()), "the last op is no product: there are no hidden states");
  return static_cast<size_t>(std::get<MatMulOp>(ops_.back()).x->width);
}

void Runtime::execute(const EmbedOp& op, Step& step, int thread) {
  const auto width = static_cast<size_t>(op.out->width);
  for (int t = thread; t < step.count; t += pool_.threads()) {
    float* out = row(*op.out, t);
    op.weight->unpack_row(step.batch.tokens[static_cast<size_t>(t)], out);
    for (size_t i = 0; op.scale != 1.0f && i < width; ++i) out[i] *= op.scale;
    const auto add = [&](const Matrix* table, int at) {
      if (!table) return;
      AlignedVector<float>& more = private_[static_cast<size_t>(thread)].rows;
      table->unpack_row(at, more.data());
      for (size_t i = 0; i < width; ++i) out[i] += more[i];
    };
    add(op.positions, positions_[static_cast<size_t>(t)]);
    add(op.types, step.batch.types.empty() ? 0 : step.batch.types[static_cast<size_t>(t)]);
  }
}

void normalize_row(const Kernels& k, const NormOp& op, const float* x, float* out) {
  const int n = op.width;
  if (op.layer) k.layer_norm(x, op.weight->data(), op.bias ? op.bias->data() : nullptr, op.eps, n, out);
  else k.rms_norm(x, op.weight->data(), op.eps, n, out);
}

void Runtime::execute(const NormOp& op, Step& step, int thread) {
  AlignedVector<float>& scratch = private_[static_cast<size_t>(thread)].rows;
  for (int r = thread; r < step.count; r += pool_.threads()) {
    float* out = row(*op.out, r) + op.column;
    normalize_row(kernels_, op, row(*op.x, r) + op.column, op.residual ? scratch.data() : out);
    if (!op.residual) continue;
    const float* residual = row(*op.residual, r);
    for (size_t i = 0; i < static_cast<size_t>(op.out->width); ++i) out[i] = residual[i] + scratch[i];
  }
}

void Runtime::execute(const MatMulOp& op, Step& step, int thread) {
  if (wide(op, step.count)) return execute_wide(op, step, thread);
  if (screened(op, step)) return execute_screened(op, step, thread);
  const int threads = pool_.threads(), rows = step.count, cols = op.x->width;
  const auto width = static_cast<size_t>(cols), blocks = width / kBlock, out_width = static_cast<size_t>(op.out->width);
  bool quantised = false;
  for (const auto& s : op.segments) quantised |= !format(s.weight->format_id()).is_float();
  if (op.gate) quantised |= !format(op.gate->format_id()).is_float();
  // Rows that pass over a panel at once; bytes lie in groups of nearly equal size.
  const int at_once = op.bytes ? byte_group(rows, kernels_.byte_rows) : kTileRows, row_block = kRowBlock / at_once * at_once;

  // The input: normalised and quantised here, for all rows by each thread where they are few, else a share each, of rows that lie together.
  const bool mine = rows <= kPrivateRows, adds = adding_.serves(op);
  Scratch& scratch = mine ? private_[static_cast<size_t>(thread)] : shared_;
  const Range part = mine ? Range{0, rows} : share(rows, thread, threads);
  for (int r = part.first; r < part.last; ++r) {
    const float* x = row(*(op.norm ? op.norm->x : op.x), r);
    if (op.norm) {
      float* normal = scratch.rows.data() + static_cast<size_t>(r) * width;
      normalize_row(kernels_, *op.norm, x, normal);
      x = normal;
    }
    if (op.bytes) {
      const int group = r / at_once * at_once;
      kernels_.quantize_bytes(x, cols, at_once, scratch.bytes.data() + static_cast<size_t>(group) * blocks + (r - group));
    } else if (quantised) {
      kernels_.quantize(x, cols, scratch.acts.data() + static_cast<size_t>(r) * blocks);
    }
  }
  const float* floats = op.norm ? scratch.rows.data() : op.x->data.data();
  if (adds && mine) adding_.shrink_share(op, floats, thread, threads);
  if (adds && !mine) adding_.shrink(op, floats, part.first, part.last);
  if (adds || (!mine && (quantised || op.norm))) pool_.barrier(thread);

  const auto product = [&](const Matrix& w, int panel, int first, int count, float* tile) {
    const auto id = static_cast<int>(w.format_id());
    if (format(w.format_id()).is_float())
      kernels_.float_panel[id](w.panel(panel), cols, floats + static_cast<size_t>(first) * width, width, count, tile);
    else if (op.bytes)
      kernels_.bytes_panel[id](w.panel(panel), cols, scratch.bytes.data() + static_cast<size_t>(first) * blocks, at_once, count, tile);
    else
      multiply_panel(kernels_, w, panel, scratch.acts.data() + static_cast<size_t>(first) * blocks, blocks, count, tile,
                     adds ? &adding_.ahead(thread) : nullptr);
  };
  int panels = 0;
  for (const auto& s : op.segments) panels += s.weight->panels();
  if (&op == std::get_if<MatMulOp>(&ops_.back())) panels = std::min(panels, (step.words + kPanelRows - 1) / kPanelRows);
  const Range own = share(panels, thread, threads);
  // Where adapters add, several panels at a time: they read what lies side by side of each.
  const int take = !adds ? 1 : op.gate ? kAddingPanels / 2 : kAddingPanels;
  constexpr int kTile = kTileRows * kPanelRows;
  alignas(64) float tile[2 * kTile];
  float* tiles = adds ? adding_.tiles(thread) : tile;
  if (adds) adding_.look_ahead(op, thread, threads);
  // Panels [from.first, from.last) of all segments, and the rows of a block.
  const auto compute = [&](int block, Range from) {
    int before = 0;
    for (const auto& s : op.segments) {
      const int first = std::max(from.first - before, 0), last = std::min(from.last - before, s.weight->panels());
      before += s.weight->panels();
      for (int p = first; p < last; p += take) {
        const int some = std::min(take, last - p);
        float* gates = tiles + take * kTile;
        for (int r = block; r < std::min(rows, block + row_block); r += at_once) {
          const int count = std::min({at_once, rows - r, block + row_block - r});
          for (int i = 0; i < some; ++i) {
            product(*s.weight, p + i, r, count, tiles + i * kTile);
            if (op.gate) product(*op.gate, p + i, r, count, gates + i * kTile);
          }
          if (adds) adding_.add(op, static_cast<size_t>(&s - op.segments.data()), p, some, r, count, tiles, kTile, thread);
          if (adds && op.gate) adding_.add(op, op.segments.size(), p, some, r, count, gates, kTile, thread);
          for (int i = 0; i < some; ++i) {
            const int from = (p + i) * kPanelRows, columns = std::min(kPanelRows, s.weight->rows() - from);
            const size_t at = static_cast<size_t>(r) * out_width + static_cast<size_t>(s.column + from);
            Epilogue e;
            e.bias = s.bias ? s.bias + from : nullptr;
            e.activation = op.activation;
            e.residual = op.residual ? op.residual->data.data() + at : nullptr;
            if (op.gate) e.gated = tiles + i * kTile;
            kernels_.finish((op.gate ? gates : tiles) + i * kTile, e, count, columns, op.out->data.data() + at, out_width);
          }
        }
      }
    }
  };
  for (int block = 0; block < rows; block += row_block) {
    if (adds) adding_.gather(op, block, std::min(rows - block, row_block), thread);
    // Few rows wait for memory, which no thread has alone; many wait for their thread.
    if (mine || adds || block + row_block < rows) compute(block, own);
    else pool_.deal(thread, panels, [&](int p) { compute(block, {p, p + 1}); });
  }
}

bool Runtime::wide(const MatMulOp& op, int rows) const {
  return !config_.exact && wide_pays(kernels_, rows, op.bytes) && op.every_weight([&](const Matrix* w) { return has_wide(kernels_, *w); });
}

// Whether x holds operands instead of floats, in the same memory.
bool Runtime::packed(const MatMulOp& op, int rows) const {
  if (!op.from || !wide(*op.from, rows) || !wide(op, rows) || adding_.serves(op)) return false;
  const size_t groups = static_cast<size_t>((rows + kGroupRows - 1) / kGroupRows);
  return groups * kernels_.wide.operands(op.x->width) <= static_cast<size_t>(rows) * static_cast<size_t>(op.x->width);
}

void Runtime::execute_wide(const MatMulOp& op, Step& step, int thread) {
  const Wide& wide = kernels_.wide;
  const int threads = pool_.threads(), rows = step.count, cols = op.x->width;
  const auto width = static_cast<size_t>(cols), out_width = static_cast<size_t>(op.out->width);
  const size_t group = wide.operands(cols), out_group = wide.operands(op.out->width);
  Scratch& own = private_[static_cast<size_t>(thread)];
  const bool adds = adding_.serves(op), given = packed(op, rows), gives = op.to && packed(*op.to, rows);
  if (!given) {
    const Range part = share(rows, thread, threads);
    static_assert(kGroupRows % kPrivateRows == 0);
    for (int r = part.first, some; r < part.last; r += some) {
      some = std::min(kPrivateRows - r % kPrivateRows, part.last - r);
      float* normal = adds ? shared_.rows.data() + static_cast<size_t>(r) * width : own.rows.data();
      for (int i = 0; op.norm && i < some; ++i) normalize_row(kernels_, *op.norm, row(*op.norm->x, r + i), normal + static_cast<size_t>(i) * width);
      wide.pack_rows(op.norm ? normal : row(*op.x, r), width, some, cols, shared_.wide.data() + packed_row(r, group));
    }
    if (adds) adding_.shrink(op, op.norm ? shared_.rows.data() : op.x->data.data(), part.first, part.last);
    pool_.barrier(thread);
  }
  const uint32_t* x = given ? reinterpret_cast<const uint32_t*>(op.x->data.data()) : shared_.wide.data();

  int panels = 0;
  for (const auto& s : op.segments) panels += s.weight->panels();
  const auto gather = [&](int block, int some) {
    if (adds) adding_.gather(op, block, some, thread);
  };
  const auto finish = [&](const WidePlace& at, int block, int some) {
    const Segment& s = op.segments[at.segment()];
    for (int i = 0; i < at.panels(); ++i) {
      const int panel = at.panel() + i, columns = std::min(kPanelRows, s.weight->rows() - panel * kPanelRows);
      const size_t to = static_cast<size_t>(block) * out_width + static_cast<size_t>(s.column + panel * kPanelRows);
      float* tiles = own.tile.data() + static_cast<size_t>(i) * kWideTile;
      if (adds) adding_.add(op, at.segment(), panel, 1, block, some, tiles, 0, thread);
      Epilogue e;
      e.bias = s.bias ? s.bias + panel * kPanelRows : nullptr;
      e.activation = op.activation;
      e.residual = op.residual ? op.residual->data.data() + to : nullptr;
      if (op.gate) e.gated = tiles, tiles += kWideTile;
      if (op.gate && adds) adding_.add(op, op.segments.size(), panel, 1, block, some, tiles, 0, thread);
      if (!gives) {
        kernels_.finish(tiles, e, some, columns, op.out->data.data() + to, out_width);
        continue;
      }
      auto* operands = reinterpret_cast<uint32_t*>(op.out->data.data());
      wide.finish(tiles, e, some, panel * kPanelRows, operands + packed_row(block, out_group), out_group);
    }
  };
  const auto compute = [&](Range of, Range from) {
    wide_products(wide, WidePlace(wide, op.segments, op.gate, cols, from), x, cols, of, own.wide.data(), own.tile.data(), gather, finish);
  };
  // The last block is dealt, some panels more at a time where the next ones are unpacked while others are multiplied.
  const int fixed = adds ? rows : (rows - 1) / kWideBlock * kWideBlock, take = wide.panels * (wide.unpacks ? 2 : 1);
  compute({0, fixed}, share(panels, thread, threads));
  if (fixed < rows)
    pool_.deal(thread, (panels + take - 1) / take, [&](int p) { compute({fixed, rows}, {p * take, std::min((p + 1) * take, panels)}); });
}

void Runtime::execute(const SelectOp& op, Step& step, int thread) {
  for (int r = thread; r < step.count; r += pool_.threads()) {
    const size_t at = step.chunk + static_cast<size_t>(r);
    const float* x = row(*op.x, step.early ? static_cast<int>(at) : step.rows[at]);
    std::copy(x, x + op.x->width, row(*op.out, r));
  }
}

}  // namespace millis
