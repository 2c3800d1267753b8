// Vectors that begin on a cache line: a wide load that crosses one costs twice, and every row of a tile is such a load. And large
// memory in large pages: where a step reads more small ones than the processor keeps the places of, each costs a look through tables.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
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

// Memory that comes when it is touched, zeros, in pages of 2 MiB where the system has them.
inline std::shared_ptr<uint8_t> large_memory(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  if (bytes > SIZE_MAX - alignment) throw std::bad_alloc();
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded > 0 ? rounded : alignment);
  if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHugePage) ::madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return {static_cast<uint8_t*>(memory), [](uint8_t* p) { std::free(p); }};
}

}  // namespace millis
