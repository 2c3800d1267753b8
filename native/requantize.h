// Weights made smaller at load, for a model whose errors cost time and nothing else: a draft model.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "format.h"
#include "pool.h"

namespace millis {

// Blocks of IQ4_NL that stand for the values of `data`, blocks of `type`. Throws std::invalid_argument unless they are whole
// numbers of blocks of both.
std::vector<uint8_t> to_iq4_nl(GgmlType type, std::span<const uint8_t> data, Pool& pool);

}  // namespace millis
