// What the executors of a step share.
#pragma once

#include <algorithm>
#include <exception>

#include "runtime.h"

namespace millis {

struct Runtime::Step {
  const Batch& batch;
  std::span<const int32_t> rows;       // all selected rows
  std::span<const Choosing> choosing;  // see Runtime::run
  size_t last;                         // op to stop before
  bool early = false;                  // rows are selected in front of the plan's tail already
  size_t chunk = 0;                    // first of the selected rows under way
  int count = 0;                       // rows the ops under way run on
  VisitRow visit;
  const void* context;
  int words;  // see Runtime::run
  std::mutex& lock;
  std::exception_ptr& failure;  // of the first visit that threw

  // Whether a row of the batch in [first, end) is selected. `rows` ascend where `early`.
  bool selects(int first, int end) const {
    const auto at = std::lower_bound(rows.begin(), rows.end(), first);
    return at != rows.end() && *at < end;
  }
};

// Rows of activations of one byte that lie together: all where one pass over a panel takes them, else in groups of nearly equal size,
// whose sums stay in registers.
inline int byte_group(int rows, int most) {
  constexpr int kMany = 8;
  if (rows <= most) return rows;
  const int groups = (rows + kMany - 1) / kMany;
  return std::min(most, (rows + groups - 1) / groups);
}

// Whether this ISA has such a product for the matrix: by activations of one byte, by wide operands.
inline bool has_bytes(const Kernels& k, const Matrix& w) { return k.bytes_panel[static_cast<int>(w.format_id())] != nullptr; }
inline bool has_wide(const Kernels& k, const Matrix& w) { return k.wide.unpack[static_cast<int>(w.format_id())] != nullptr; }

// Whether a wide product of so many rows is the quicker one. Tiles are quicker than products of bytes, vectors are not.
inline bool wide_pays(const Kernels& k, int rows, bool bytes) { return rows >= k.wide.least_rows && (!bytes || k.wide.unpacks); }

inline float* row(const Buffer& b, int r) { return const_cast<float*>(b.data.data()) + static_cast<size_t>(r) * static_cast<size_t>(b.width); }

inline const Buffer* output_of(const Op& op) {
  return std::visit([](const auto& o) -> const Buffer* { return o.out; }, op);
}

inline size_t bias_size(int heads, int context) { return static_cast<size_t>(heads) * static_cast<size_t>(2 * context + kBiasSlack); }

// What is added to a head's scores: at [j - i] for the query at position i and the key at position j.
inline const float* score_bias(const Vector* bias, int head, int context) {
  return bias->data() + static_cast<size_t>(head) * static_cast<size_t>(2 * context + kBiasSlack) + (context - 1);
}

void normalize_row(const Kernels& k, const NormOp& op, const float* x, float* out);

}  // namespace millis
