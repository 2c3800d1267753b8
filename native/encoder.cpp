// What encoders need beside the rest: attention in both directions, pooling, and steps that end with a row for each text.
#include <algorithm>
#include <stdexcept>

#include "step.h"

namespace millis {
namespace {

constexpr int kUnitQueries = 64;  // of a text and head, where there are too few of these to keep all threads busy, or each sees a window

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

void Runtime::attend_all(const std::string& out, const std::string& qkv, int heads, int kv_heads, int head_dim, float scale, const std::string& bias,
                         const std::string& rope, int window, const std::string& q_norm, const std::string& k_norm, float eps) {
  const auto lock = building();
  require(heads >= 1 && heads <= kMostHeads && head_dim >= 1 && head_dim % kPanelRows == 0, "attention: head_dim must be a multiple of 16");
  require(kv_heads >= 1 && heads % kv_heads == 0 && window >= 0, "attention: heads or window out of range");
  AttendAllOp op{buffer(out), buffer(qkv), heads, kv_heads, head_dim, window < config_.context ? window : 0, scale, eps};
  require(op.out != op.qkv && op.out->width == int64_t{heads} * head_dim && op.qkv->width == (heads + int64_t{2} * kv_heads) * head_dim,
          "attention: buffers do not fit");
  const auto width = static_cast<size_t>(head_dim);
  op.bias = vector(bias, bias_size(heads, config_.context)), op.rope = vector(rope, static_cast<size_t>(config_.context) * width);
  op.q_norm = vector(q_norm, width), op.k_norm = vector(k_norm, width);
  ops_.emplace_back(op);
}

void Runtime::pool(const std::string& out, const std::string& x, bool mean) {
  const auto lock = building();
  PoolOp op{buffer(out), buffer(x), mean};
  require(op.out != op.x && op.out->width == op.x->width, "pool: buffers do not fit");
  if (first_selected_ == 0) first_selected_ = ops_.size();
  if (pooled_ == 0) pooled_ = ops_.size() + 1;
  ops_.emplace_back(op);
}

void Runtime::check_texts(const Batch& batch) const {
  const size_t tokens = batch.tokens.size();
  require(finished_ && pooled_ > 0, "the runtime is not finished, or runs no encoder");
  require(tokens > 0 && tokens <= static_cast<size_t>(config_.max_tokens), "batch: more tokens than max_tokens, or none");
  for (const int32_t token : batch.tokens) require(token >= 0 && token < config_.vocab, "batch: token id out of the vocabulary");
  int64_t total = 0;
  for (const int32_t length : batch.lengths) {
    require(length >= 1 && length <= config_.context, "batch: a text longer than the context, or empty");
    total += length;
  }
  require(total == static_cast<int64_t>(tokens), "batch: lengths do not add up to the tokens");
  require(batch.types.empty() || batch.types.size() == tokens, "batch: one type for each token, or none");
  for (const Op& op : ops_)
    if (const auto* embed = std::get_if<EmbedOp>(&op))
      for (const int32_t type : batch.types) require(type >= 0 && embed->types && type < embed->types->rows(), "batch: no such token type");
}

size_t Runtime::text_width(bool head) const {
  require(pooled_ > 0, "the plan pools nothing: it is no encoder's");
  require(!head || pooled_ < ops_.size(), "the encoder has no head");
  return static_cast<size_t>(output_of(head ? ops_.back() : ops_[pooled_ - 1])->width);
}

// Heads of q and k: norm, rotation.
void Runtime::turn_heads(const AttendAllOp& op, const Step& step, int thread) {
  const auto half = static_cast<size_t>(op.head_dim / 2), sines = static_cast<size_t>(config_.context) * half;
  const Range rows = share(step.count, thread, pool_.threads());
  float* normal = private_[static_cast<size_t>(thread)].attention.data();
  for (int t = rows.first; t < rows.last; ++t)
    for (int h = 0; h < op.heads + op.kv_heads; ++h) {
      float* x = row(*op.qkv, t) + h * op.head_dim;
      if (const Vector* weight = h < op.heads ? op.q_norm : op.k_norm) {
        kernels_.rms_norm(x, weight->data(), op.eps, op.head_dim, normal);
        std::copy(normal, normal + op.head_dim, x);
      }
      if (!op.rope) continue;
      const float* cosines = op.rope->data() + static_cast<size_t>(positions_[static_cast<size_t>(t)]) * half;
      kernels_.rotate(x, cosines, cosines + sines, op.head_dim, false);
    }
}

void Runtime::execute(const AttendAllOp& op, Step& step, int thread) {
  if (op.rope || op.q_norm || op.k_norm) {
    turn_heads(op, step, thread);
    pool_.barrier(thread);
  }
  const auto& lengths = step.batch.lengths;
  const size_t width = static_cast<size_t>(op.qkv->width), keys = static_cast<size_t>(op.heads) * static_cast<size_t>(op.head_dim);
  const size_t values = static_cast<size_t>(op.kv_heads) * static_cast<size_t>(op.head_dim);  // behind the keys
  const int threads = pool_.threads();
  const bool few = op.window > 0 || static_cast<int64_t>(lengths.size()) * op.heads < 4 * threads;
  int unit = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int length = lengths[s], each = few ? kUnitQueries : length;
    for (int h = 0; h < op.heads; ++h)
      for (int first = 0; first < length; first += each, ++unit) {
        if (unit % threads != thread) continue;
        const int last = std::min(first + each, length);
        const int begin = op.window > 0 ? std::max(first - op.window, 0) : 0,
                  end = op.window > 0 ? std::min(last - 1 + op.window, length - 1) + 1 : length;
        const float* text = row(*op.qkv, begins_[s]);
        AttendAll a{};
        a.q = text + static_cast<size_t>(first) * width + h * op.head_dim;
        a.k = text + static_cast<size_t>(begin) * width + keys + h / (op.heads / op.kv_heads) * op.head_dim, a.v = a.k + values, a.stride = width;
        a.queries = last - first, a.keys = end - begin, a.head_dim = op.head_dim, a.scale = op.scale;
        a.window = op.window, a.at = first - begin;
        a.out = row(*op.out, begins_[s] + first) + h * op.head_dim, a.out_stride = keys;
        a.scratch = private_[static_cast<size_t>(thread)].attention.data();
        a.bias = op.bias ? score_bias(op.bias, h, config_.context) + begin - first : nullptr;
        kernels_.attend_all(a);
      }
  }
}

void Runtime::execute(const PoolOp& op, Step& step, int thread) {
  const auto width = static_cast<size_t>(op.out->width);
  for (int r = thread; r < step.count; r += pool_.threads()) {
    const auto s = static_cast<size_t>(step.rows[step.chunk + static_cast<size_t>(r)]);
    const int rows = op.mean ? step.batch.lengths[s] : 1;
    const float* x = row(*op.x, begins_[s]);
    float* out = row(*op.out, r);
    std::copy(x, x + width, out);
    for (int i = 1; i < rows; ++i)
      for (size_t d = 0; d < width; ++d) out[d] += x[static_cast<size_t>(i) * width + d];
    for (size_t d = 0; rows > 1 && d < width; ++d) out[d] /= static_cast<float>(rows);
  }
}

}  // namespace millis
