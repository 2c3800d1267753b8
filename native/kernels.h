// The table of compute kernels that one ISA fills. Pointers in, pointers out; shapes are the caller's promise.
#pragma once

#include "format.h"

namespace millis {

constexpr int kPageTokens = 32;  // positions in a page of the KV cache
constexpr int kTileQueries = 4;  // queries that share one pass over the keys
constexpr int kTileRows = 32;    // activation rows of one call of a panel kernel

enum class Activation { None, Silu, GeluTanh };

// What becomes of a tile of products before it is stored. Null pointers and None mean "leave out".
struct Epilogue {
  const float* bias = nullptr;  // [16]
  Activation activation = Activation::None;
  const float* gated = nullptr;     // [rows][16] tile multiplied in after the activation
  const float* residual = nullptr;  // [rows][stride]
};

// Queries of one KV head over the pages of one sequence.
struct Attend {
  int queries;                   // in [1, kTileQueries]
  const float* q[kTileQueries];  // [head_dim] each
  float* out[kTileQueries];      // [head_dim] each
  int position[kTileQueries];    // attends to [max(0, position - window + 1), position]
  int window;                    // 0: all
  int head_dim;                  // a multiple of 16
  float scale;
  const int32_t* table;  // page of positions [32 i, 32 i + 32)
  const uint8_t* cache;  // this layer and KV head in page 0: keys [head_dim][32], then values [32][head_dim]
  size_t page_stride;    // bytes from one page to the next
  float* scratch;        // [2 * kTileQueries * head_dim]
};

struct Kernels {
  const char* isa;
  // tile[m][16] = x[m] . panel, for m < rows. Strides count elements of x.
  void (*quant_panel[kFormats])(const uint8_t* panel, int cols, const ActBlock* x, size_t stride, int rows, float* tile);
  void (*float_panel[kFormats])(const uint8_t* panel, int cols, const float* x, size_t stride, int rows, float* tile);
  // out[m][n] for m < rows, n < columns (up to 16) from a tile.
  void (*finish)(const float* tile, const Epilogue& e, int rows, int columns, float* out, size_t stride);
  void (*quantize)(const float* x, int n, ActBlock* out);  // n: a multiple of 32
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n, float* out);
  void (*rotate)(float* x, const float* cosines, const float* sines, int head_dim, bool interleaved);
  // key, value: [head_dim], into slot `slot` of a page of one layer and KV head.
  void (*write_kv[2])(const float* key, const float* value, int head_dim, int slot, uint8_t* page);  // [0] f16, [1] f32
  void (*attend[2])(const Attend& task);                                                             // likewise
  float (*log_sum_exp)(const float* x, int n);
  uint64_t (*read)(const uint8_t* data, size_t bytes);  // streams the bytes; for measuring bandwidth
};

// Those of the architecture compiled for exist.
const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();
const Kernels& neon_dot_kernels();
const Kernels& neon_i8mm_kernels();

}  // namespace millis
