// Vectors that begin on a cache line: a wide load that crosses one costs twice, and every row of a tile is such a load.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace millis {

constexpr size_t kCacheLine = 64;

template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kCacheLine})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{kCacheLine}); }
  bool operator==(const Aligned&) const = default;
};

template <class T>
using AlignedVector = std::vector<T, Aligned<T>>;

}  // namespace millis
