// Arrays of strings as GGUF files hold them: 8 bytes of length, then UTF-8. A vocabulary has up to a quarter of a million.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "arrays.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {
namespace {

using Places = NewArray<uint64_t>;

// The string whose length stands at `place`; data() is null where it does not lie inside `data`.
std::span<const uint8_t> string_at(const Array<uint8_t>& data, uint64_t place) {
  const uint64_t size = data.size();
  if (size < 8 || place > size - 8) return {};
  uint64_t length;
  std::memcpy(&length, data.data() + place, 8);
  if (length > size - 8 - place) return {};
  return {data.data() + place + 8, static_cast<size_t>(length)};
}

Places string_places(const Array<uint8_t>& data, uint64_t at, uint64_t count) {
  std::vector<uint64_t> found;
  found.reserve(std::min<uint64_t>(count, data.size() / 8));
  while (found.size() < count) {
    const auto string = string_at(data, at);
    if (!string.data()) break;
    found.push_back(at);
    at += 8 + string.size();
  }
  return owned(std::move(found));
}

nb::list strings(const Array<uint8_t>& data, const Array<uint64_t>& places) {
  nb::list found;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto string = string_at(data, places.data()[i]);
    PyObject* text = string.data()
                         ? PyUnicode_DecodeUTF8(reinterpret_cast<const char*>(string.data()), static_cast<Py_ssize_t>(string.size()), "strict")
                         : nullptr;
    if (!text) {
      PyErr_Clear();
      break;
    }
    found.append(nb::steal(text));
  }
  return found;
}

}  // namespace

void bind_strings(nb::module_& m) {
  m.def("string_places", &string_places, "data"_a.noconvert(), "at"_a, "count"_a,
        "[found] where `count` strings from `at` on have their lengths; fewer where the data ends before.");
  m.def("strings", &strings, "data"_a.noconvert(), "places"_a.noconvert(), "The strings at `places`, up to the first that is cut off or not UTF-8.");
}

}  // namespace millis
