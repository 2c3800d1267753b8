// Floats to GGML's quantised blocks, each block's scales searched for the least weighted squared error.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "format.h"
#include "pool.h"

namespace millis {

// Blocks of `type` that stand for `values` [rows][cols]. `weights` [cols], all positive: what a squared error in that column
// counts. `errors` [rows] receives each row's weighted squared error. Throws std::invalid_argument for a float type, or where
// cols is not a whole number of blocks.
std::vector<uint8_t> quantize(GgmlType type, std::span<const float> values, std::span<const float> weights, std::span<double> errors, Pool& pool);

// 32 values as a block of IQ4_NL in `out`, whose 18 bytes are zero; all errors count the same, and fewer scales are tried.
void quick_iq4_nl(const float* x, uint8_t* out);

}  // namespace millis
