// Writes and checks the head of a packed file, and maps the rest.
#include "packed_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <stdexcept>

namespace millis {
namespace {

constexpr char kMagic[8] = {'M', 'I', 'L', 'L', 'I', 'S', 'P', 'K'};
constexpr size_t kPage = 4096;
constexpr size_t kMostHead = size_t{16} << 20;  // bytes of header and names
constexpr size_t kMostName = 256, kMostSource = 1 << 16;

struct Header {
  char magic[8];
  uint32_t version, count;
  uint64_t head_bytes, file_bytes;
  uint8_t key[kKeyBytes];
  uint32_t source_bytes, zero;
  uint64_t checksum;  // of the whole head, with zero here
};
static_assert(sizeof(Header) == 80);

struct Entry {
  int32_t format, rows, cols;
  uint32_t name_bytes;
  uint64_t offset;
};
static_assert(sizeof(Entry) == 24);

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// FNV-1a (Fowler, Noll and Vo): against accidents, not against forgery. Whatever a forger may write is checked for size.
uint64_t checksum_of(std::span<const uint8_t> head) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < head.size(); ++i) {
    const bool own = i >= offsetof(Header, checksum) && i < sizeof(Header);
    hash = (hash ^ (own ? 0 : head[i])) * 0x100000001b3u;
  }
  return hash;
}

// Bytes of a matrix's panels; 0 where no matrix may have this format and shape. At most 2^24 * 2^24 * 4 and some.
size_t panels_bytes(int format_id, int rows, int cols) {
  if (format_id < 0 || format_id >= kFormats || rows < 1 || cols < 1 || rows > kMostSide || cols > kMostSide) return 0;
  const Format& f = kFormat[format_id];
  if (cols % f.file_values != 0) return 0;
  return f.panel_bytes(cols) * static_cast<size_t>((rows + kPanelRows - 1) / kPanelRows);
}

void append(std::vector<uint8_t>& to, const void* from, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(from);
  to.insert(to.end(), at, at + bytes);
  to.resize(round_up(to.size(), 8));
}

struct Descriptor {
  explicit Descriptor(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;
};

// The head of a file that is whole and of this version.
std::vector<uint8_t> read_head(int fd) {
  require(fd >= 0, errno == ENOENT ? "no packed file" : "the packed file cannot be opened");
  struct stat status;
  require(::fstat(fd, &status) == 0 && S_ISREG(status.st_mode), "the packed file is not a regular file");
  Header header;
  require(::pread(fd, &header, sizeof header, 0) == static_cast<ssize_t>(sizeof header), "the packed file ends inside its header");
  require(std::memcmp(header.magic, kMagic, sizeof kMagic) == 0, "not a packed file");
  require(header.version == kPackVersion, "packed by another version");
  require(header.file_bytes == static_cast<uint64_t>(status.st_size), "the packed file is not as long as it says");
  require(header.head_bytes >= sizeof header && header.head_bytes <= std::min<uint64_t>(kMostHead, header.file_bytes),
          "the packed file's header has an impossible length");
  std::vector<uint8_t> head(header.head_bytes);
  require(::pread(fd, head.data(), head.size(), 0) == static_cast<ssize_t>(head.size()), "the packed file ends inside its header");
  require(checksum_of(head) == header.checksum && std::memcmp(head.data(), &header, sizeof header) == 0, "the packed file's header is damaged");
  require(header.source_bytes <= kMostSource && header.source_bytes <= head.size() - sizeof header, "the packed file's source is damaged");
  return head;
}

Header header_of(const std::vector<uint8_t>& head) {
  Header header;
  std::memcpy(&header, head.data(), sizeof header);
  return header;
}

std::string source_of(const std::vector<uint8_t>& head) {
  return {reinterpret_cast<const char*>(head.data()) + sizeof(Header), header_of(head).source_bytes};
}

}  // namespace

PackedLayout packed_layout(std::span<const uint8_t> key, std::string_view source, std::vector<PackedEntry> matrices) {
  require(key.size() == kKeyBytes, "a key has 32 bytes");
  require(source.size() <= kMostSource, "the source's name is too long");
  size_t head_bytes = round_up(sizeof(Header) + source.size(), 8);
  std::set<std::string_view> names;
  for (const PackedEntry& m : matrices) {
    require(m.name.size() <= kMostName && names.insert(m.name).second, "a matrix's name is too long or given twice");
    require(panels_bytes(static_cast<int>(m.format), m.rows, m.cols) != 0, "no matrix has this format and shape");
    head_bytes += round_up(sizeof(Entry) + m.name.size(), 8);
  }
  require(head_bytes <= kMostHead, "too many matrices");
  size_t end = round_up(head_bytes, kPage);
  for (PackedEntry& m : matrices) {
    m.offset = end;
    end = round_up(end + panels_bytes(static_cast<int>(m.format), m.rows, m.cols), kPage);
    require(end < size_t{1} << 60, "too many matrices");
  }
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::copy(key.begin(), key.end(), header.key);
  header.version = kPackVersion, header.count = static_cast<uint32_t>(matrices.size());
  header.head_bytes = head_bytes, header.file_bytes = end + kPage;
  header.source_bytes = static_cast<uint32_t>(source.size());
  std::vector<uint8_t> head;
  append(head, &header, sizeof header);
  append(head, source.data(), source.size());
  for (const PackedEntry& m : matrices) {
    const Entry entry{static_cast<int32_t>(m.format), m.rows, m.cols, static_cast<uint32_t>(m.name.size()), m.offset};
    append(head, &entry, sizeof entry);
    append(head, m.name.data(), m.name.size());
  }
  const uint64_t checksum = checksum_of(head);
  std::memcpy(head.data() + offsetof(Header, checksum), &checksum, sizeof checksum);
  return {std::move(head), std::move(matrices), header.file_bytes};
}

PackedFile::PackedFile(const std::string& path, std::span<const uint8_t> key) {
  const Descriptor file(path);
  const std::vector<uint8_t> head = read_head(file.fd);
  const Header header = header_of(head);
  require(key.size() == kKeyBytes && std::equal(key.begin(), key.end(), header.key), "packed from another file");
  source_ = source_of(head);
  bytes_ = header.file_bytes;
  read_names(std::span(head).subspan(std::min(head.size(), round_up(sizeof header + source_.size(), 8))), header.count);
  void* memory = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  require(memory != MAP_FAILED, "the packed file cannot be mapped");
  data_ = static_cast<const uint8_t*>(memory);
#ifdef MADV_HUGEPAGE
  ::madvise(memory, bytes_, MADV_HUGEPAGE);  // first: what is read from the disk then comes in pages of 2 MB
#endif
#ifdef MADV_POPULATE_READ
  if (::madvise(memory, bytes_, MADV_POPULATE_READ) == 0) return;
  if (errno == EFAULT) {  // it was cut short since its size was read
    ::munmap(memory, bytes_);
    throw std::invalid_argument("the packed file has become shorter");
  }
#endif
  ::madvise(memory, bytes_, MADV_WILLNEED);  // an older kernel: the first step finds the pages read, and maps them
}

PackedFile::~PackedFile() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), bytes_);
}

void PackedFile::read_names(std::span<const uint8_t> names, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    Entry entry;
    require(names.size() >= sizeof entry, "the packed file's names end too early");
    std::memcpy(&entry, names.data(), sizeof entry);
    const size_t bytes = panels_bytes(entry.format, entry.rows, entry.cols), length = round_up(sizeof entry + size_t{entry.name_bytes}, 8);
    require(entry.name_bytes <= kMostName && length <= names.size(), "the packed file's names are damaged");
    require(bytes != 0 && entry.offset % kPage == 0 && bytes_ >= kPage && bytes <= bytes_ - kPage && entry.offset <= bytes_ - kPage - bytes,
            "a matrix of the packed file lies outside it");
    std::string name(reinterpret_cast<const char*>(names.data()) + sizeof entry, entry.name_bytes);
    entries_.push_back({std::move(name), static_cast<FormatId>(entry.format), entry.rows, entry.cols, entry.offset});
    names = names.subspan(length);
  }
}

const PackedEntry* PackedFile::find(std::string_view name, FormatId format, int rows, int cols) const {
  const auto found =
      std::ranges::find_if(entries_, [&](const PackedEntry& e) { return e.name == name && e.format == format && e.rows == rows && e.cols == cols; });
  return found == entries_.end() ? nullptr : &*found;
}

std::string packed_source(const std::string& path) {
  const Descriptor file(path);
  return source_of(read_head(file.fd));
}

}  // namespace millis
