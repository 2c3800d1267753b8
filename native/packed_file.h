// Packed weights in a file, so that they are packed once and mapped ever after.
//
//   Header | names: for each matrix an Entry and its name, padded to 8 bytes | for each matrix, at a page of its own, its
//   panels as format.h describes them, in the order in which a plan reads them | a page that vector loads may touch
//
// Little-endian, the same for every ISA and number of threads. Nothing of a file is believed before it is checked.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pack.h"

namespace millis {

constexpr size_t kKeyBytes = 32;  // of the digest that says which source, in which state, a file was packed from

struct PackedEntry {
  std::string name;
  FormatId format;
  int rows, cols;
  size_t offset;  // of the panels, in the file
};

// What precedes the panels: offsets follow from the sizes. `source` tells people, and the cache's pruning, what was packed.
struct PackedLayout {
  std::vector<uint8_t> head;
  std::vector<PackedEntry> entries;
  size_t file_bytes;
};

// Throws std::invalid_argument for a type or shape that no matrix may have, and for a name given twice.
PackedLayout packed_layout(std::span<const uint8_t> key, std::string_view source, std::vector<PackedEntry> matrices);

// A mapped file, all of whose pages are mapped before they are used.
class PackedFile {
 public:
  // Throws std::invalid_argument, which says what is wrong, unless the file is whole, of this version and packed from
  // what `key` names.
  PackedFile(const std::string& path, std::span<const uint8_t> key);
  ~PackedFile();
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  // nullptr where there is no such matrix of this format and shape.
  const PackedEntry* find(std::string_view name, FormatId format, int rows, int cols) const;
  const uint8_t* panels(const PackedEntry& entry) const { return data_ + entry.offset; }
  size_t bytes() const { return bytes_; }
  const std::string& source() const { return source_; }

 private:
  void read_names(std::span<const uint8_t> names, size_t count);

  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  std::string source_;
  std::vector<PackedEntry> entries_;
};

// The source that a file says it was packed from, whatever its key. Throws std::invalid_argument as PackedFile does.
std::string packed_source(const std::string& path);

}  // namespace millis
