// Building a runtime: names become pointers, and every size is checked once, here.
#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>

#include "cpu.h"
#include "step.h"
#include "wide.h"

namespace millis {
namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::None;
  if (name == "silu") return Activation::Silu;
  if (name == "gelu_tanh") return Activation::GeluTanh;
  if (name == "gelu") return Activation::Gelu;
  if (name == "relu") return Activation::Relu;
  if (name == "tanh") return Activation::Tanh;
  throw std::invalid_argument("unknown activation " + name);
}

void require_within(const char* name, int value, int most) {
  require(value >= 1 && value <= most, std::string(name) + " must lie in [1, " + std::to_string(most) + "], not " + std::to_string(value));
}

// The limits keep every product of sizes below, of indices in runtime.cpp and of bytes of one page, within its type.
const RuntimeConfig& checked(const RuntimeConfig& c) {
  require_within("threads", c.threads, 1024);
  require_within("max_tokens", c.max_tokens, 1 << 16);
  require_within("max_outputs", c.max_outputs, c.max_tokens);
  require_within("pages", c.pages, 1 << 26);
  require_within("layers", c.layers, 1 << 16);
  require_within("kv_heads", c.kv_heads, kMostHeads);
  require_within("head_dim", c.head_dim, 1024);
  require_within("vocab", c.vocab, kMostSide);
  require_within("context", c.context, 1 << 24);
  require(c.head_dim % 16 == 0, "head_dim must be a multiple of 16, not " + std::to_string(c.head_dim));
  return c;
}

}  // namespace

Runtime::Runtime(const RuntimeConfig& config)
    : config_(checked(config)),
      kernels_(select_kernels(config.isa)),
      private_(static_cast<size_t>(config.threads)),
      adding_(kernels_, config.exact, config.threads),
      pool_(config.threads) {}

// Waits until no other thread builds or runs.
std::unique_lock<std::mutex> Runtime::turn() {
  if (pool_.lost_in_fork())
    throw std::runtime_error(
        "this process was forked from the one that loaded the model, without its compute threads; load the model after the fork");
  return std::unique_lock(turn_);
}

std::unique_lock<std::mutex> Runtime::building() {
  auto lock = turn();
  require(!finished_, "the runtime is finished; nothing can be added");
  return lock;
}

Buffer* Runtime::buffer(const std::string& name) {
  const auto found = buffers_.find(name);
  require(found != buffers_.end(), "no buffer " + name);
  return &found->second;
}

const Matrix* Runtime::matrix(const std::string& name) const {
  const auto found = matrices_.find(name);
  require(found != matrices_.end(), "no matrix " + name);
  return found->second.get();
}

const Vector* Runtime::vector(const std::string& name, size_t size) const {
  if (name.empty()) return nullptr;
  const auto found = vectors_.find(name);
  require(found != vectors_.end(), "no vector " + name);
  require(found->second.size() == size, name + " must hold " + std::to_string(size) + " values");
  return &found->second;
}

void Runtime::add_buffer(const std::string& name, int width) {
  const auto lock = building();
  require(width >= 1 && width <= kMostSide, "width of buffer " + name + " is out of range");
  const int rows = name == "logits" ? config_.max_outputs : config_.max_tokens;
  const bool added = buffers_.try_emplace(name, Buffer{width, AlignedVector<float>(static_cast<size_t>(rows) * static_cast<size_t>(width))}).second;
  require(added, "buffer " + name + " is given twice");
}

void Runtime::use_packed(std::shared_ptr<const PackedFile> file) {
  const auto lock = building();
  packed_ = std::move(file);
}

void Runtime::add_matrix(const std::string& name, int type, int rows, int cols, std::span<const uint8_t> data) {
  const auto lock = building();
  require(!matrices_.contains(name), "matrix " + name + " is given twice");
  const auto ggml = static_cast<GgmlType>(type);
  std::unique_ptr<Matrix> packed;
  const PackedEntry* found = packed_ && !config_.exact ? packed_->find(name, packed_format_of(ggml, rows), rows, cols) : nullptr;
  if (found) packed = std::make_unique<Matrix>(name, found->format, rows, cols, std::shared_ptr<const uint8_t>(packed_, packed_->panels(*found)));
  else packed = std::make_unique<Matrix>(name, ggml, rows, cols, data, config_.exact, pool_);
  weight_bytes_ += packed->bytes();
  matrices_.emplace(name, std::move(packed));
}

void Runtime::add_vector(const std::string& name, Vector values) {
  const auto lock = building();
  require(vectors_.try_emplace(name, std::move(values)).second, "vector " + name + " is given twice");
}

void Runtime::embed(const std::string& out, const std::string& weight, float scale, const std::string& positions, const std::string& types) {
  const auto lock = building();
  EmbedOp op{buffer(out), matrix(weight), positions.empty() ? nullptr : matrix(positions), types.empty() ? nullptr : matrix(types), scale};
  require(op.weight->cols() == op.out->width && op.weight->rows() >= config_.vocab, weight + " does not fit " + out);
  require(!op.positions || (op.positions->cols() == op.out->width && op.positions->rows() >= config_.context), positions + " does not fit");
  require(!op.types || op.types->cols() == op.out->width, types + " does not fit");
  ops_.emplace_back(op);
}

void Runtime::norm(const std::string& out, const std::string& x, const std::string& weight, const std::string& bias, float eps, bool layer,
                   const std::string& residual, int begin, int end) {
  const auto lock = building();
  Buffer *to = buffer(out), *from = buffer(x), *added = residual.empty() ? nullptr : buffer(residual);
  const bool part = end > 0, fits = part ? to == from && !added && begin >= 0 && begin < end && end <= to->width : to != from && begin == 0;
  require(fits && to->width == from->width && (!added || added->width == to->width), "norm " + weight + ": buffers do not fit");
  const auto width = static_cast<size_t>(part ? end - begin : to->width);
  require(!weight.empty(), "a norm needs a weight");
  ops_.emplace_back(NormOp{to, from, vector(weight, width), vector(bias, width), eps, layer, added, begin, static_cast<int>(width)});
}

void Runtime::matmul(const std::string& out, const std::string& x, const std::vector<std::string>& weights, const std::vector<std::string>& biases,
                     const std::string& activation, const std::string& residual, const std::string& gate) {
  const auto lock = building();
  MatMulOp op;
  op.out = buffer(out), op.x = buffer(x);
  op.activation = activation_of(activation);
  if (!gate.empty()) op.gate = matrix(gate);
  if (!residual.empty()) op.residual = buffer(residual);
  require(op.out != op.x && !weights.empty(), "matmul into " + out + ": bad buffers or no weights");
  require(biases.empty() || biases.size() == weights.size(), "matmul into " + out + ": one bias for each weight, or none");
  int width = 0;
  for (const auto& name : weights) {
    const Matrix* w = matrix(name);
    require(w->cols() == op.x->width && w->rows() <= op.out->width - width, name + " does not fit " + x + " and " + out);
    op.segments.push_back({w, nullptr, width});
    width += w->rows();
  }
  require(width == op.out->width && (!op.residual || op.residual->width == width), "matmul into " + out + ": widths do not fit");
  require(!op.gate || (weights.size() == 1 && op.gate->rows() == width && op.gate->cols() == op.x->width && biases.empty()),
          gate + " does not fit " + weights[0]);
  op.padded_bias.assign(biases.empty() ? 0 : static_cast<size_t>(width) + kPanelRows, 0.0f);
  for (size_t i = 0; i < biases.size(); ++i) {
    const Vector* bias = vector(biases[i], static_cast<size_t>(op.segments[i].weight->rows()));
    require(bias, "a bias without a name");
    std::copy(bias->begin(), bias->end(), op.padded_bias.begin() + op.segments[i].column);
    op.segments[i].bias = op.padded_bias.data() + op.segments[i].column;
  }
  if (first_selected_ == 0) op.number = static_cast<int>(ops_.size());
  ops_.emplace_back(std::move(op));
}

std::shared_ptr<const Adapter> Runtime::adapter(const std::vector<AdapterPair>& pairs) const {
  require(finished_, "the runtime is not finished");
  std::vector<const MatMulOp*> products;
  for (size_t i = 0; i < first_selected_; ++i)
    if (const auto* product = std::get_if<MatMulOp>(&ops_[i])) products.push_back(product);
  return std::make_shared<const Adapter>(*this, products, pairs, config_.exact);
}

void Runtime::attention(const std::string& out, const std::string& qkv, int layer, int heads, float scale, const std::string& rope, bool interleaved,
                        int window, const std::string& q_norm, const std::string& k_norm, float eps, const std::string& bias, bool norm_rotated) {
  const auto lock = building();
  const auto head_dim = static_cast<size_t>(config_.head_dim);
  require(layer >= 0 && layer < config_.layers, "attention: no layer " + std::to_string(layer));
  require(heads >= 1 && heads <= kMostHeads && heads % config_.kv_heads == 0 && window >= 0, "attention: heads or window out of range");
  if (window >= config_.context) window = 0;
  const auto context = static_cast<size_t>(config_.context);
  const auto table = vectors_.find(rope);
  const size_t rotated = table == vectors_.end() ? head_dim : table->second.size() / context;
  require(rotated >= 2 && rotated <= head_dim && rotated % 2 == 0, rope + " must rotate an even number of a head's coordinates");
  AttentionOp op{buffer(out),
                 buffer(qkv),
                 layer,
                 heads,
                 window,
                 scale,
                 eps,
                 vector(rope, context * rotated),
                 vector(q_norm, head_dim),
                 vector(k_norm, head_dim),
                 interleaved,
                 vector(bias, bias_size(heads, config_.context))};
  op.rotated = static_cast<int>(rotated), op.norm_rotated = norm_rotated;
  require(op.out->width == heads * config_.head_dim && op.qkv->width == (heads + 2 * config_.kv_heads) * config_.head_dim,
          "attention: buffers do not fit");
  ops_.emplace_back(op);
}

void Runtime::convolve(const std::string& out, const std::string& bcx, const std::string& weight, int layer, int taps) {
  const auto lock = building();
  require(taps >= 1 && taps <= kMostTaps, "convolve: a kernel of 1 to " + std::to_string(kMostTaps) + " taps");
  Buffer *to = buffer(out), *from = buffer(bcx);
  require(to != from && static_cast<int64_t>(from->width) == int64_t{3} * to->width, "convolve: buffers do not fit");
  require(to->width % kPanelRows == 0, "convolve: a width that is not a multiple of " + std::to_string(kPanelRows));
  require(!weight.empty(), "a convolution needs a weight");
  const int64_t each = int64_t{2} * config_.kv_heads * config_.head_dim, layers = (to->width + each - 1) / each;  // of a token in a layer
  require(layer >= 0 && layer + layers <= config_.layers, "convolve: no layer " + std::to_string(layer + layers - 1));
  ops_.emplace_back(ConvolveOp{to, from, vector(weight, static_cast<size_t>(taps) * static_cast<size_t>(to->width)), layer, taps});
}

void Runtime::select(const std::string& out, const std::string& x) {
  const auto lock = building();
  SelectOp op{buffer(out), buffer(x)};
  require(op.out != op.x && op.out->width == op.x->width, "select: buffers do not fit");
  if (first_selected_ == 0) first_selected_ = ops_.size();
  ops_.emplace_back(op);
}

namespace {

bool reads(const Op& op, const Buffer* b) {
  if (const auto* o = std::get_if<NormOp>(&op)) return o->x == b || o->residual == b;
  if (const auto* o = std::get_if<MatMulOp>(&op)) return o->x == b || o->residual == b;
  if (const auto* o = std::get_if<AttentionOp>(&op)) return o->qkv == b;
  if (const auto* o = std::get_if<AttendAllOp>(&op)) return o->qkv == b;
  if (const auto* o = std::get_if<PoolOp>(&op)) return o->x == b;
  if (const auto* o = std::get_if<SelectOp>(&op)) return o->x == b;
  if (const auto* o = std::get_if<RememberOp>(&op)) return o->kv == b;
  if (const auto* o = std::get_if<ConvolveOp>(&op)) return o->bcx == b;
  return false;
}

// Whether rows of its output depend on those before.
bool mixes(const Op& op) { return std::holds_alternative<AttentionOp>(op) || std::holds_alternative<ConvolveOp>(op); }

}  // namespace

// The ops behind the last attention or convolution up to the select: no row of theirs sees another, so only selected rows need be computed.
void Runtime::find_tail() {
  size_t first = first_selected_;
  while (first > target_ && !mixes(ops_[first - 1])) --first;
  tail_ = first > target_ ? first : first_selected_;
  for (auto& [name, b] : buffers_) {
    const auto uses = [&](const Op& op) { return reads(op, &b) || output_of(op) == &b; };
    const auto user = std::find_if(ops_.begin() + static_cast<ptrdiff_t>(tail_), ops_.end(), uses);
    if (user != ops_.end() && reads(*user, &b)) tail_inputs_.push_back(&b);
  }
}

bool Runtime::takes_bytes(const MatMulOp& op) const {
  return config_.bytes && op.every_weight([&](const Matrix* w) { return has_bytes(kernels_, *w); });
}

// Whether what an op writes is read by the product behind it, as its x, and by nothing else.
bool Runtime::read_once(size_t i) const {
  const Buffer* out = output_of(ops_[i]);
  const auto* product = i + 1 < ops_.size() ? std::get_if<MatMulOp>(&ops_[i + 1]) : nullptr;
  if (!product || product->x != out || product->residual == out) return false;
  for (size_t j = i + 2; j < ops_.size(); ++j) {
    if (reads(ops_[j], out)) return false;
    if (output_of(ops_[j]) == out) break;
  }
  return true;
}

// A norm whose only reader is the product behind it is done by every thread for itself: one barrier less. And products one of which
// reads what the other writes hand it over as the second's operands, where both are wide; unless a walk may end between them.
void Runtime::fuse() {
  for (size_t i = 0; i + 1 < ops_.size(); ++i) {
    if (!read_once(i)) continue;
    auto& product = std::get<MatMulOp>(ops_[i + 1]);
    if (const auto* norm = std::get_if<NormOp>(&ops_[i]); norm && !norm->residual && norm->out != norm->x && product.out != norm->x)
      product.norm = norm;
    auto* before = std::get_if<MatMulOp>(&ops_[i]);
    const bool ends = i + 1 == target_ || i + 1 == first_selected_ || i + 1 == pooled_ || i + 2 == ops_.size();
    if (before && !ends && before->segments.size() == 1 && !before->residual && before->out->width % kBlock == 0)
      before->to = &product, product.from = before;
  }
}

// Memory comes when touched, a fault for each 4 KB. The first pages are touched here, by all threads:
// they serve any usual request, and are the first to be handed out and to be used again. The rest of a long context,
// often more than the weights, would cost more time and memory than most programs ever need; its faults (6 a layer and
// 32 tokens of smollm2) stay below 3 % of the steps. Huge pages are not asked for: the kernel may have to move memory
// to make them, which took from 10 to 250 ms for 200 MB, and would do so in the midst of a step, whose time they do not change.
void Runtime::touch_cache() {
  constexpr size_t kTouchedBytes = size_t{32} << 20, kStep = 4096;
  const size_t bytes = std::min(static_cast<size_t>(config_.pages) * page_stride_, kTouchedBytes);
  const auto threads = static_cast<size_t>(pool_.threads());
  pool_.run([&](int thread) {
    volatile uint8_t* cache = cache_.get();
    for (size_t at = static_cast<size_t>(thread) * kStep; at < bytes; at += threads * kStep) cache[at] = 0;
  });
}

size_t Runtime::token_bytes() const {
  require(finished_, "the runtime is not finished");
  std::set<const Matrix*> read;
  for (const Op& op : ops_) {
    const auto keep = [&](const Matrix* w) { return read.insert(w), true; };
    if (const auto* product = std::get_if<MatMulOp>(&op)) product->every_weight(keep);
  }
  return std::accumulate(read.begin(), read.end(), size_t{0}, [](size_t bytes, const Matrix* w) { return bytes + w->bytes(); });
}

void Runtime::finish() {
  const auto lock = building();
  require(!ops_.empty() && first_selected_ > 0, "a plan needs ops, and a select or a pool among them");
  check_halves();
  const bool writes = pooled_ == 0;
  const Buffer* logits = writes || pooled_ < ops_.size() ? buffer("logits") : nullptr;
  require(!logits || output_of(ops_.back()) == logits, "the last op must write logits");
  require(!writes || logits->width == config_.vocab, "logits must be [rows, vocab]");
  for (const Op& op : ops_)  // it has max_outputs rows only
    require(!logits || (!reads(op, logits) && (output_of(op) != logits || &op == &ops_.back())), "no op but the last may use logits");
  for (size_t i = first_selected_; i < ops_.size(); ++i) {
    const bool sees = mixes(ops_[i]) || std::holds_alternative<AttendAllOp>(ops_[i]);
    require(!sees && !std::holds_alternative<EmbedOp>(ops_[i]), "attention or a convolution after a select");
    require(!std::holds_alternative<SelectOp>(ops_[i]) || writes, "a plan selects or pools, not both");
    for (size_t j = first_selected_; j < ops_.size(); ++j) {
      if (const auto* s = std::get_if<SelectOp>(&ops_[j])) require(s->x != output_of(ops_[i]), "a selected buffer is written after the select");
      if (const auto* p = std::get_if<PoolOp>(&ops_[j])) require(p->x != output_of(ops_[i]), "a pooled buffer is written after the pool");
    }
  }
  int widest = 1;
  for (const auto& [name, b] : buffers_) widest = name == "logits" ? widest : std::max(widest, b.width);
  const size_t width = static_cast<size_t>(widest), blocks = width / kBlock + 1, rows = static_cast<size_t>(config_.max_tokens);
  for (auto& own : private_) {
    own.rows.resize(kPrivateRows * width), own.acts.resize((kPrivateRows + 1) * blocks);
    own.attention.resize(2 * kTileQueries * static_cast<size_t>(config_.head_dim));
  }
  shared_.rows.resize(rows * width), shared_.acts.resize((rows + 1) * blocks);  // GCC may load from one row more than it uses
  if (!config_.exact) {
    const size_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t steps = width / static_cast<size_t>(kernels_.wide.step_columns) + 1;
    shared_.wide.resize(groups * steps * kGroupRows * kStepDwords);
    for (auto& own : private_) {
      own.wide.resize(std::max(kWideOperands, wide_attention_words(config_.head_dim)));
      own.tile.resize(std::max(kWideTiles, wide_attention_floats(config_.head_dim)));
    }
  }
  for (const Op& op : ops_)
    if (const auto* product = std::get_if<MatMulOp>(&op); product && product->out == logits && config_.screen) {
      bound_.resize(kPrivateRows * static_cast<size_t>(config_.vocab / kPanelRows + 1));
      fronts_.resize(2 * kPrivateRows * static_cast<size_t>(config_.threads));
      for (auto& mask : allowed_) mask.reserve(static_cast<size_t>(config_.vocab) / 32 + 1);
      for (auto& changes : changes_) changes.reserve(static_cast<size_t>(config_.vocab) / kScreenChanged + 1);
      for (auto& own : private_) own.screen.resize(kPrivateRows * blocks);
    }
  partial_.resize(kMostShared * static_cast<size_t>(config_.threads) * kTileQueries * static_cast<size_t>(config_.head_dim + 2));
  const size_t element = config_.exact ? 4 : 2;
  head_stride_ = 2 * static_cast<size_t>(config_.head_dim) * kPageTokens * element;  // whole cache lines
  layer_stride_ = static_cast<size_t>(config_.kv_heads) * head_stride_, page_stride_ = static_cast<size_t>(config_.layers) * layer_stride_;
  size_t bytes;
  if (__builtin_mul_overflow(page_stride_, static_cast<size_t>(config_.pages), &bytes)) throw std::bad_alloc();
  cache_.reset(static_cast<uint8_t*>(std::aligned_alloc(kCacheLine, std::max(bytes, kCacheLine))));
  if (!cache_) throw std::bad_alloc();
  touch_cache();
  for (const Op& op : ops_) {
    if (const auto* attention = std::get_if<AttentionOp>(&op)) masks_[attention->window];
    if (const auto* all = std::get_if<AttendAllOp>(&op))
      for (auto& own : private_) own.attention.resize(std::max(own.attention.size(), attend_all_floats(config_.context, all->head_dim)));
  }
  positions_.reserve(rows), slots_.reserve(rows), sequences_.reserve(rows), begins_.reserve(rows);  // a step allocates nothing
  find_tail();
  fuse();  // ops_ stays as it is from here on
  for (Op& op : ops_)
    if (auto* product = std::get_if<MatMulOp>(&op)) product->bytes = takes_bytes(*product);
  if (config_.bytes) {
    const auto room = [&](size_t count) { return (count + static_cast<size_t>(kernels_.byte_rows)) * blocks; };  // whole groups
    shared_.bytes.resize(room(rows));
    for (auto& own : private_) own.bytes.resize(room(kPrivateRows));
  }
  finished_ = true;
}

}  // namespace millis
