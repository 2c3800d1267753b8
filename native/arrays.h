// NumPy arrays on their way in and out. nanobind checks type and rank of what comes in; what it holds is copied before it is checked and used.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <memory>
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

template <class T>
using NewArray = nanobind::ndarray<nanobind::numpy, T>;
using Floats = NewArray<float>;

// A NumPy array that owns `values`.
template <class T>
NewArray<T> owned(std::vector<T>&& values, std::vector<size_t> shape) {
  auto kept = std::make_unique<std::vector<T>>(std::move(values));
  nanobind::capsule owner(kept.get(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return NewArray<T>(kept.release()->data(), shape.size(), shape.data(), owner);
}

template <class T>
NewArray<T> owned(std::vector<T>&& values) {
  const size_t size = values.size();
  return owned(std::move(values), {size});
}

}  // namespace millis
