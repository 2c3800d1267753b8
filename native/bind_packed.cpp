// Python's view of packed files: Python opens, writes and renames; what a file holds is decided and checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <tuple>

#include "arrays.h"
#include "packed_file.h"
#include "unlocked.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {
namespace {

using Panels = nb::ndarray<nb::numpy, const uint8_t>;
using Named = std::tuple<std::string, int, int, int>;  // name, GGML type, rows, columns

std::span<const uint8_t> span_of(const nb::bytes& bytes) { return {static_cast<const uint8_t*>(bytes.data()), bytes.size()}; }

std::string text_of(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

Panels pack(const std::string& name, int type, int rows, int cols, const Array<uint8_t>& data, int threads) {
  std::unique_ptr<Matrix> matrix;
  {
    const Unlocked unlocked;
    Pool pool(threads);
    matrix = std::make_unique<Matrix>(name, static_cast<GgmlType>(type), rows, cols, std::span(data.data(), data.size()), false, pool);
  }
  const size_t bytes = matrix->bytes();
  const uint8_t* panels = matrix->panel(0);
  nb::capsule owner(matrix.get(), [](void* p) noexcept { delete static_cast<Matrix*>(p); });
  matrix.release();
  return Panels(panels, {bytes}, owner);
}

std::tuple<nb::bytes, std::vector<size_t>, size_t> layout(const nb::bytes& key, const nb::bytes& source, const std::vector<Named>& matrices) {
  std::vector<PackedEntry> entries;
  for (const auto& [name, type, rows, cols] : matrices) entries.push_back({name, packed_format_of(static_cast<GgmlType>(type), rows), rows, cols, 0});
  const PackedLayout found = packed_layout(span_of(key), text_of(source), std::move(entries));
  std::vector<size_t> offsets;
  for (const PackedEntry& entry : found.entries) offsets.push_back(entry.offset);
  return {nb::bytes(found.head.data(), found.head.size()), std::move(offsets), found.file_bytes};
}

}  // namespace

void bind_packed(nb::module_& m) {
  m.attr("PACK_VERSION") = kPackVersion;
  m.def("pack", &pack, "name"_a, "type"_a, "rows"_a, "cols"_a, "data"_a.noconvert(), "threads"_a,
        "[bytes] a matrix's panels, as a packed file holds them.");
  m.def("packed_layout", &layout, "key"_a, "source"_a, "matrices"_a,
        "(head, offset of each matrix's panels, size) of the packed file of `matrices`: name, GGML type, rows, columns.");
  m.def(
      "packed_source",
      [](const nb::bytes& path) {
        const std::string source = packed_source(text_of(path));
        return nb::bytes(source.data(), source.size());
      },
      "path"_a, "The source that a packed file names; ValueError unless it is one of this version.");
  nb::class_<PackedFile>(m, "PackedFile")
      .def(
          "__init__",
          [](PackedFile* self, const nb::bytes& path, const nb::bytes& key) {
            const std::string name = text_of(path), wanted = text_of(key);
            const Unlocked unlocked;  // reading a cold file takes long
            new (self) PackedFile(name, std::span(reinterpret_cast<const uint8_t*>(wanted.data()), wanted.size()));
          },
          "path"_a, "key"_a)
      .def(
          "has",
          [](const PackedFile& self, const std::string& name, int type, int rows, int cols) {
            return self.find(name, packed_format_of(static_cast<GgmlType>(type), rows), rows, cols) != nullptr;
          },
          "name"_a, "type"_a, "rows"_a, "cols"_a)
      .def_prop_ro("nbytes", &PackedFile::bytes);
}

}  // namespace millis
