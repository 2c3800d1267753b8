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

}  // namespace millis
