// The table of compute kernels that one ISA fills. Pointers in, pointers out; shapes are the caller's promise.
#pragma once

#include "format.h"
#include "race.h"

namespace millis {

constexpr int kPageTokens = 32;  // positions in a page of the KV cache
constexpr int kTileQueries = 4;  // queries that share one pass over the keys
constexpr int kMostTaps = 8;     // of a convolution over a sequence
constexpr int kTileRows = 32;    // activation rows of one call of a panel kernel
constexpr int kBiasSlack = 32;   // floats that may be read past the scores' biases of a row

enum class Activation { None, Silu, GeluTanh, Gelu, Relu, Tanh };

// What becomes of a tile of products before it is stored. Null pointers and None mean "leave out".
struct Epilogue {
  const float* bias = nullptr;  // [16]
  Activation activation = Activation::None;
  const float* gated = nullptr;     // [rows][16] tile multiplied in after the activation
  const float* residual = nullptr;  // [rows][stride]
};

constexpr int kGroupRows = 16;      // activation rows that lie together in a wide product
constexpr int kStepDwords = 16;     // dwords of a row that lie together
constexpr int kWideBlock = 256;     // activation rows that pass over a panel together
constexpr int kWideColumns = 1024;  // columns of a panel unpacked at a time, at most: all of its operands stay in the cache

// Columns [first, first + cols) of a panel as operands; first is a multiple of a block's columns.
using Unpack = void (*)(const uint8_t* panel, int first, int cols, uint32_t* out);

// Panels to unpack, all at once or a block at a time: tiles multiply by themselves, and leave the vector units to make the next
// operands.
struct Unpacking {
  Unpack unpack[2] = {};
  const uint8_t* panel[2] = {};
  uint32_t* out = nullptr;
  size_t stride = 0, block_dwords = 0;  // dwords of a panel's operands to the next's, of a block's
  int panels = 0, first = 0, cols = 0, done = 0;

  int blocks() const { return panels * ((cols + kBlock - 1) / kBlock); }
  void one() {
    const int each = blocks() / panels, i = done / each, at = done % each;
    unpack[i](panel[i], first + at * kBlock, cols - at * kBlock < kBlock ? cols - at * kBlock : kBlock,
              out + static_cast<size_t>(i) * stride + static_cast<size_t>(at) * block_dwords);
    ++done;
  }
  void rest() {
    for (int i = 0; done == 0 && i < panels; ++i) unpack[i](panel[i], first, cols, out + static_cast<size_t>(i) * stride);
    while (done > 0 && done < blocks()) one();
  }
};

// `rows` rows of x times some unpacked panels. Sizes and strides in dwords, but for the tile's.
//   weights: a panel [steps * 16 dwords][16 rows];  x: groups of 16 rows [steps of all columns][16 rows][16 dwords]
struct WideTask {
  const uint32_t* weights;
  size_t panel_stride;
  int panels, steps;
  const uint32_t* x;
  size_t group_stride;
  int rows;
  float* tile;                // a panel's: [rows rounded up to whole groups][16]
  size_t tile_stride;         // floats from one panel's to the next's
  bool add;                   // to what the tile holds
  Unpacking* next = nullptr;  // to unpack meanwhile
};

// Where row r lies among packed rows: groups of `group` dwords. Static, as half_to_float is.
static inline constexpr size_t packed_row(int r, size_t group) {
  return static_cast<size_t>(r / kGroupRows) * group + static_cast<size_t>(r % kGroupRows) * kStepDwords;
}

// Products of many rows. Weights are unpacked to dwords: a float, or two bfloat16 of neighbouring columns.
struct Wide {
  int step_columns;         // columns in 16 dwords
  int panels;               // that one product likes to take together
  int columns;              // of a panel that are unpacked at a time: at most kWideColumns
  int least_rows;           // from here on it is faster than quant_panel
  bool unpacks;             // whether the product unpacks what comes next
  Unpack unpack[kFormats];  // null: not for this format
  void (*pack_rows)(const float* x, size_t stride, int rows, int cols, uint32_t* out);  // of one group; zeros behind the last column
  void (*product)(const WideTask& task);
  // As `finish` does, for a product behind it: 16 columns, from `column` on, of rows that begin a group, as its x. No residual.
  void (*finish)(const float* tile, const Epilogue& e, int rows, int column, uint32_t* x, size_t group);

  int steps(int cols) const { return (cols + step_columns - 1) / step_columns; }
  // Dwords of a panel's operands, and of a group of packed rows.
  static_assert(kPanelRows == kGroupRows);
  size_t operands(int cols) const { return static_cast<size_t>(steps(cols)) * kPanelRows * kStepDwords; }
};

// What queries of one KV head of a sequence attend to.
struct Keys {
  int first, end;  // positions [first, end), first a multiple of 32; each query masks what it must not see
  int window;      // a query at p attends to (p - window, p]; 0: all up to p
  int head_dim;    // a multiple of 16
  float scale;
  const int32_t* table;  // page of positions [32 i, 32 i + 32)
  const uint8_t* cache;  // this layer and KV head in page 0: keys [head_dim][32], then values [32][head_dim]
  size_t page_stride;    // bytes from one page to the next
  int masked_from;       // pages from here on hold a tree of tokens: each query sees what its mask says. A multiple of 32
};

// A few queries.
struct Attend : Keys {
  int queries;                   // in [1, kTileQueries]
  const float* q[kTileQueries];  // [head_dim] each
  float* out[kTileQueries];      // [head_dim] each; where partial: sums, then the largest score and the sum of weights
  int position[kTileQueries];
  const uint32_t* mask[kTileQueries];  // a word a page from masked_from on, a bit a slot
  const float* bias[kTileQueries];     // added to the score of the key at position i: bias[n][i]; null: nothing is
  bool partial;
  float* scratch;  // [2 * kTileQueries * head_dim]
};

// Queries of one head of a text over all of its tokens.
struct AttendAll {
  const float *q, *k, *v;  // [head_dim] of the first query and the first token; `stride` floats to the next
  size_t stride;
  int queries, keys, head_dim;  // head_dim: a multiple of 16
  float scale;
  float* out;  // likewise, `out_stride` floats apart
  size_t out_stride;
  float* scratch;     // [attend_all_floats(keys, head_dim)]
  const float* bias;  // added to the score of query m and key j: bias[j - m]; null: nothing is
  int window, at;     // query m sees keys at + m - window to at + m + window; 0: all
};

constexpr int kAllRows = 8;  // queries that pass over the keys together

constexpr size_t attend_all_floats(int keys, int head_dim) {
  return (static_cast<size_t>(keys) + kPanelRows) * static_cast<size_t>(head_dim + kAllRows);
}

// A token's row of a gated convolution: b * x is kept; out = c * (the latest tap * b * x + each other tap * what was kept before).
struct Convolve {
  const float *b, *c, *x, *weight;  // weight: [taps][columns], the oldest tap first, `stride` floats apart
  size_t stride;
  int taps, columns;                   // taps in [1, kMostTaps]; columns: a multiple of 16
  const uint8_t* past[kMostTaps - 1];  // [columns] each, kept by the tokens before, the nearest first; null: there was none
  uint8_t* kept;
  float* out;
};

constexpr int kWideQueries = 192, kWideRows = 64;  // of AttendWide, of a pass over a block of keys
constexpr int kWideKeys = 128;                     // of a block

// Many queries, over an f16 cache.
struct AttendWide : Keys {
  int rows;  // in [1, kWideQueries]
  const float* q[kWideQueries];
  float* out[kWideQueries];
  int position[kWideQueries];
  const uint32_t* mask[kWideQueries];
  void (*product)(const WideTask& task);
  uint32_t* words;  // [wide_attention_words(head_dim)]
  float* floats;    // [wide_attention_floats(head_dim)]
};

constexpr size_t wide_attention_words(int head_dim) {  // for the narrowest dwords: a float each
  const size_t panel = static_cast<size_t>(head_dim) * kPanelRows, keys = static_cast<size_t>(kWideKeys);
  const size_t padding = 2 * kGroupRows * kStepDwords * (kWideQueries / kGroupRows + kWideKeys / kPanelRows);
  return panel * (kWideQueries / kGroupRows + kWideKeys / kPanelRows) + keys * (kWideRows + static_cast<size_t>(head_dim)) + padding;
}
constexpr size_t wide_attention_floats(int head_dim) {
  const auto width = static_cast<size_t>(head_dim);
  return static_cast<size_t>(kWideRows) * kWideKeys + static_cast<size_t>(kWideQueries) * (width + kPanelRows) + width;
}

// What screening needs of 32 activations: logits += d (scale * (high nibbles . high bytes) + offset), their variance d^2 variance.
struct ScreenBlock {
  float scale, offset, variance;
};

// Of a row's 16 logits in a panel: what the largest is likely to be, what none lies above, and the most that one errs by.
struct Bounds {
  float likely, upper, error;
};

// Memory to be asked for in the midst of products, so that it comes while they compute: spans, one after the other, so many
// lines with each block of 32 columns.
struct Span {
  const uint8_t *at, *end;
};
struct Ahead {
  Span *span = nullptr, *last = nullptr;  // [span, last)
  int lines = 0;
};

// What an adapter adds to rows [first, first + rows) of a tile: u, [rows] of [rank], times a panel of its second matrix.
struct Addend {
  const uint8_t* panels;  // [panels][rank][16]
  int rank, first, rows;
  const float* u;
};

struct Kernels {
  const char* isa;
  // tile[m][16] = x[m] . panel, for m < rows. Strides count elements of x. `ahead` goes on as far as was asked for.
  void (*quant_panel[kFormats])(const uint8_t* panel, int cols, const ActBlock* x, size_t stride, int rows, float* tile, Ahead& ahead);
  void (*float_panel[kFormats])(const uint8_t* panel, int cols, const float* x, size_t stride, int rows, float* tile);
  void (*planes_panel)(const uint8_t* high, const uint8_t* low, int cols, const ActBlock* x, size_t stride, int rows, float* tile);
  // The same from the first plane of Q8_0Planes alone, six standard deviations to either side. s: [rows][blocks].
  void (*screen)(const uint8_t* panel, int cols, const ActBlock* x, size_t stride, const ScreenBlock* s, int rows, float* tile, Bounds* bounds);
  // Whether one of 16 tokens, `first` and those behind it, that has a bit in `among` may reach `most` in a race, given logits
  // that err by `error` at most.
  bool (*may_win)(const float* logits, float error, float most, const Choosing& race, int32_t first, uint32_t among);
  // The same of activations of one byte, in groups of `group` rows, byte_rows at most: block b of row m is x[b * group + m]. Null: not
  // for this format, or no faster.
  void (*bytes_panel[kFormats])(const uint8_t* panel, int cols, const ByteBlock* x, int group, int rows, float* tile);
  int byte_rows;
  void (*quantize_bytes)(const float* x, int n, int step, ByteBlock* out);  // n: a multiple of 32; step: from one block to the next
  // out[m][n] for m < rows, n < columns (up to 16) from a tile.
  void (*finish)(const float* tile, const Epilogue& e, int rows, int columns, float* out, size_t stride);
  // tiles[i][m][16] += u[m] . panel + i. Strides in floats: from one row of u, from one tile, to the next. [0] f16, [1] f32.
  void (*add_products[2])(const Addend* list, int count, int panel, int panels, size_t stride, float* tiles, size_t tile_stride);
  void (*quantize)(const float* x, int n, ActBlock* out);  // n: a multiple of 32
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n, float* out);
  void (*rotate)(float* x, const float* cosines, const float* sines, int head_dim, bool interleaved);
  // key, value: [head_dim], into slot `slot` of a page of one layer and KV head.
  void (*write_kv[2])(const float* key, const float* value, int head_dim, int slot, uint8_t* page);  // [0] f16, [1] f32
  void (*attend[2])(const Attend& task);                                                             // likewise
  void (*attend_wide)(const AttendWide& task);
  void (*attend_all)(const AttendAll& task);
  void (*convolve[2])(const Convolve& task);  // keeps [0] f16, [1] f32
  float (*log_sum_exp)(const float* x, int n);
  Wide wide;
  uint64_t (*read)(const uint8_t* data, size_t bytes);  // streams the bytes; for measuring bandwidth
};

// Those of the architecture compiled for exist.
const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();
const Kernels& soft_amx_kernels();  // tiles in plain C++, to test the products of amx_kernels() anywhere; never chosen
const Kernels& neon_kernels();
const Kernels& neon_dot_kernels();
const Kernels& neon_i8mm_kernels();
const Kernels& neon_bf16_kernels();

}  // namespace millis
