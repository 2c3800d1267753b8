// NumPy arrays on their way in. nanobind checks type and rank; what they hold is copied before it is checked and used.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <vector>

namespace millis {

template <class T>
using Array = nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Array2 = nanobind::ndarray<const T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

// A copy stays as it was checked while other Python threads run, and is aligned, which an array need not be.
template <class T, class... Rest>
std::vector<T> copy_of(const nanobind::ndarray<const T, Rest...>& array) {
  std::vector<T> out(array.size());
  if (!out.empty()) std::memcpy(out.data(), array.data(), out.size() * sizeof(T));
  return out;
}

}  // namespace millis
