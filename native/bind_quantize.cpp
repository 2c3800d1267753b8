// Python's view of the quantisers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "arrays.h"
#include "pack.h"
#include "quantize.h"
#include "unlocked.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {
namespace {

std::pair<NewArray<uint8_t>, NewArray<double>> quantize_matrix(int type, const Array2<float>& values, const Array<float>& weights, int threads) {
  if (values.shape(1) != weights.size()) throw std::invalid_argument("quantize: one weight for each column");
  const std::vector<float> columns = copy_of(weights);
  std::vector<double> errors(values.shape(0));
  std::vector<uint8_t> out;
  {
    const Unlocked unlocked;
    Pool pool(threads);
    out = quantize(static_cast<GgmlType>(type), std::span(values.data(), values.size()), columns, errors, pool);
  }
  return {owned(std::move(out)), owned(std::move(errors))};
}

}  // namespace

void bind_quantize(nb::module_& m) {
  m.def("quantize", &quantize_matrix, "type"_a, "values"_a.noconvert(), "weights"_a.noconvert(), "threads"_a,
        "([bytes], [rows]) `values` [rows, columns] in blocks of a GGML type; each row's error, by `weights` [columns].");
  m.def(
      "packed_bytes",
      [](int type, int rows, int cols) {
        if (rows < 1 || cols < 1) throw std::invalid_argument("packed_bytes: a matrix has rows and columns");
        const size_t panels = static_cast<size_t>((rows + kPanelRows - 1) / kPanelRows);
        return panels * format(packed_format_of(static_cast<GgmlType>(type), rows)).panel_bytes(cols);
      },
      "type"_a, "rows"_a, "cols"_a, "Bytes that a product reads of a matrix of this GGML type.");
}

}  // namespace millis
