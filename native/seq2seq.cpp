// What encoder-decoder models need beside the rest: sources whose keys and values stay in pages of the cache, and attention over them.
#include <algorithm>
#include <stdexcept>

#include "step.h"

namespace millis {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

void Runtime::remember(const std::string& kv, int layer) {
  const auto lock = building();
  RememberOp op{nullptr, buffer(kv), layer};
  require(layer >= 0 && layer < config_.layers, "remember: no such layer");
  require(op.kv->width == 2 * config_.kv_heads * config_.head_dim, "remember: the buffer does not fit");
  ops_.emplace_back(op);
}

void Runtime::end_source() {
  const auto lock = building();
  require(target_ == 0 && !ops_.empty() && first_selected_ == 0, "a source ends once, behind its ops");
  target_ = ops_.size();
}

void Runtime::cross_attention(const std::string& out, const std::string& q, int layer, int heads, float scale) {
  const auto lock = building();
  require(layer >= 0 && layer < config_.layers, "attention: no such layer");
  require(heads >= 1 && heads <= kMostHeads && heads % config_.kv_heads == 0, "attention: heads out of range");
  AttentionOp op{buffer(out), buffer(q), layer, heads, 0, scale, 0.0f, nullptr, nullptr, nullptr, false};
  op.cross = true;
  require(op.out != op.qkv && op.out->width == heads * config_.head_dim && op.qkv->width == op.out->width, "attention: buffers do not fit");
  ops_.emplace_back(op);
}

// Each half begins with an embedding and does nothing that only the other can; a plan without a source is all target.
void Runtime::check_halves() const {
  require(target_ == 0 || (pooled_ == 0 && std::holds_alternative<EmbedOp>(ops_[0])), "a source begins with an embedding, and nothing is pooled");
  require(target_ == 0 || (target_ < ops_.size() && std::holds_alternative<EmbedOp>(ops_[target_])), "a target begins with an embedding");
  for (size_t i = 0; i < ops_.size(); ++i) {
    const auto* attention = std::get_if<AttentionOp>(&ops_[i]);
    if (i < target_) require(!attention, "attention over the cache in a source");
    else require(!std::holds_alternative<RememberOp>(ops_[i]) && !(target_ == 0 && attention && attention->cross), "only a source is remembered");
    require(!std::holds_alternative<ConvolveOp>(ops_[i]) || (target_ == 0 && pooled_ == 0), "a convolution in a plan with a source, or that pools");
    require(!attention || pooled_ == 0, "attention over the cache in a plan that pools");
    require(!attention || !attention->bias || target_ > 0, "attention over the cache with a bias outside a target");
    if (pooled_ == 0 && i >= target_) require(!std::holds_alternative<AttendAllOp>(ops_[i]), "attention in both directions where text is written");
  }
}

void Runtime::check_sources(const Batch& batch) const {
  const size_t sequences = batch.lengths.size();
  require((target_ > 0) == !batch.sources.empty(), "batch: an encoder-decoder model needs sources, and no other takes them");
  if (target_ == 0) return;
  require(batch.parents.empty(), "batch: an encoder-decoder model scores no trees");
  require(batch.sources.size() == sequences && batch.source_tables.size() % sequences == 0, "batch: one source for each sequence");
  require(batch.source_tables.size() / sequences == batch.source_width, "batch: one page table for each source");
  for (size_t s = 0; s < sequences; ++s) {
    require(batch.sources[s] >= 1 && batch.sources[s] <= config_.context, "batch: a source longer than the context, or empty");
    const auto used = static_cast<size_t>((batch.sources[s] + kPageTokens - 1) / kPageTokens);
    require(used <= batch.source_width, "batch: a source's page table is too short");
    for (size_t p = 0; p < used; ++p) {
      const int32_t page = batch.source_tables[s * batch.source_width + p];
      require(page >= 0 && page < config_.pages, "batch: page out of range");
    }
  }
}

void Runtime::read(const Batch& batch) {
  const size_t tokens = batch.tokens.size(), sequences = batch.lengths.size();
  require(finished_ && target_ > 0, "the runtime is not finished, or runs no encoder-decoder model");
  require(tokens > 0 && tokens <= static_cast<size_t>(config_.max_tokens), "batch: more tokens than max_tokens, or none");
  for (const int32_t token : batch.tokens) require(token >= 0 && token < config_.vocab, "batch: token id out of the vocabulary");
  require(sequences > 0 && batch.tables.size() == sequences * batch.table_width, "batch: one page table for each text");
  int64_t total = 0;
  for (size_t s = 0; s < sequences; ++s) {
    require(batch.lengths[s] >= 1 && batch.lengths[s] <= config_.context, "batch: a text longer than the context, or empty");
    total += batch.lengths[s];
    const auto used = static_cast<size_t>((batch.lengths[s] + kPageTokens - 1) / kPageTokens);
    require(used <= batch.table_width, "batch: page table too short");
    for (size_t p = 0; p < used; ++p) {
      const int32_t page = batch.tables[s * batch.table_width + p];
      require(page >= 0 && page < config_.pages, "batch: page out of range");
    }
  }
  require(total == static_cast<int64_t>(tokens), "batch: lengths do not add up to the tokens");
  require(batch.starts.empty() && batch.types.empty() && batch.parents.empty() && batch.adapters.empty() && batch.sources.empty(),
          "batch: a source is nothing but tokens");

  const auto lock = turn();
  place(batch);
  adding_.begin(batch);
  std::mutex failing;
  std::exception_ptr failure;
  const Step all{batch, {}, {}, target_, false, 0, static_cast<int>(tokens), nullptr, nullptr, kMostSide, failing, failure};
  pool_.run([&](int thread) {
    Step step = all;
    walk(step, 0, target_, thread);
  });
}

void Runtime::execute(const RememberOp& op, Step& step, int thread) {
  const int hd = config_.head_dim, kv_heads = config_.kv_heads;
  const Range mine = share(step.count * kv_heads, thread, pool_.threads());
  for (int i = mine.first; i < mine.last; ++i) {
    const int t = i / kv_heads, h = i % kv_heads, slot = slots_[static_cast<size_t>(t)];
    const auto* table = step.batch.tables.data() + static_cast<size_t>(sequences_[static_cast<size_t>(t)]) * step.batch.table_width;
    const float* key = row(*op.kv, t) + h * hd;
    kernels_.write_kv[config_.exact](key, key + kv_heads * hd, hd, slot % kPageTokens, cached(table[slot / kPageTokens], op.layer, h));
  }
}

}  // namespace millis
