// What this processor can run, and the kernels chosen for it.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace millis {

// ISAs this processor and operating system support, slowest first.
std::vector<std::string> supported_isas();

// Whether AMX tiles are used here, or why not.
std::string amx_state();

// The kernels of `isa`, or the best with "auto". Throws std::invalid_argument for one unknown or not supported.
const Kernels& select_kernels(const std::string& isa);

}  // namespace millis
