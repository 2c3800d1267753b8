// Python's view of adapters: made by a runtime, handed to its steps, gone with the last reference.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include "adapter.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

void bind_adapter(nb::module_& m) {
  m.attr("MOST_RANK") = kMostRank;
  nb::class_<Adapter>(m, "Adapter").def_prop_ro("nbytes", &Adapter::bytes, "Bytes of the packed matrices.");
}

}  // namespace millis
