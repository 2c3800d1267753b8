// Timings of single kernels for `millis bench kernels`: a matrix packed once, multiplied many times by a team of threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "aligned.h"
#include "arrays.h"
#include "cpu.h"
#include "pack.h"
#include "wide.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// The panels [begin, end) of w times `rows` quantised rows of x, into out [rows, 16 * panels].
void multiply(const Kernels& k, const Matrix& w, const ActBlock* acts, const float* x, int rows, int begin, int end, float* out) {
  const int id = static_cast<int>(w.format_id()), cols = w.cols();
  const size_t blocks = static_cast<size_t>(cols / kBlock), width = static_cast<size_t>(cols);
  const size_t stride = static_cast<size_t>(w.panels()) * kPanelRows;
  for (int p = begin; p < end; ++p)
    for (int m = 0; m < rows; m += kTileRows) {
      float tile[kTileRows * kPanelRows];
      const int some = std::min(kTileRows, rows - m);
      const auto at = static_cast<size_t>(m);
      if (format(w.format_id()).is_float()) k.float_panel[id](w.panel(p), cols, x + at * width, width, some, tile);
      else multiply_panel(k, w, p, acts + at * blocks, blocks, some, tile);
      k.finish(tile, Epilogue{}, some, kPanelRows, out + at * stride + static_cast<size_t>(p) * kPanelRows, stride);
    }
}

// The same as a wide product, as the runtime takes it for many rows; x holds whole groups of packed rows.
void multiply_wide(const Kernels& k, const Matrix& w, const uint32_t* x, int rows, int begin, int end, float* out) {
  const int cols = w.cols();
  const size_t stride = static_cast<size_t>(w.panels()) * kPanelRows;
  AlignedVector<uint32_t> operands(kWideOperands);
  AlignedVector<float> tiles(kWideTiles);
  const Segment segment{&w, nullptr, 0};
  const auto finish = [&](const WidePlace& at, int block, int some) {
    for (int i = 0; i < at.panels(); ++i)
      k.finish(tiles.data() + static_cast<size_t>(i) * kWideTile, Epilogue{}, some, kPanelRows,
               out + static_cast<size_t>(block) * stride + static_cast<size_t>(at.panel() + i) * kPanelRows, stride);
  };
  wide_products(
      k.wide, WidePlace(k.wide, {&segment, 1}, nullptr, cols, {begin, end}), x, cols, rows, operands.data(), tiles.data(), [](int, int) {}, finish);
}

// (seconds of each of `repeats` products, packed bytes): `count` rows of activations by a matrix [rows, cols]. They take
// turns with `copies` copies of it, as the matrices of a model do, so that a small one does not stay in the cache.
std::pair<std::vector<double>, size_t> time_matmul(int type, int rows, int cols, const Array<uint8_t>& data, int count, const std::string& isa,
                                                   int threads, int repeats, int copies) {
  if (count < 1 || count > 4096 || threads < 1 || threads > 1024 || repeats < 1 || repeats > 100000 || copies < 1 || copies > 4096)
    throw std::invalid_argument("time_matmul: count and copies in [1, 4096], threads in [1, 1024], repeats in [1, 100000]");
  const Kernels& k = select_kernels(isa);
  Pool pool(threads);
  std::vector<std::unique_ptr<Matrix>> all;
  for (int i = 0; i < copies; ++i)
    all.push_back(std::make_unique<Matrix>("w", static_cast<GgmlType>(type), rows, cols, std::span(data.data(), data.size()), false, pool));
  const Matrix& w = *all[0];
  const size_t blocks = static_cast<size_t>(cols / kBlock), width = static_cast<size_t>(cols);
  std::vector<float> x(width * static_cast<size_t>(count));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) / 8.0f - 1.0f;
  std::vector<ActBlock> acts(blocks * static_cast<size_t>(count) + 1);
  std::vector<float> out(static_cast<size_t>(count) * static_cast<size_t>(w.panels()) * kPanelRows);
  const bool wide = count >= k.wide.least_rows && k.wide.unpack[static_cast<int>(w.format_id())];
  const size_t group = wide ? k.wide.operands(cols) : 0, groups = (static_cast<size_t>(count) + kGroupRows - 1) / kGroupRows;
  AlignedVector<uint32_t> packed(groups * group);
  for (size_t m = 0; wide && m < static_cast<size_t>(count); ++m)
    k.wide.pack_row(x.data() + m * width, cols, packed.data() + m / kGroupRows * group + m % kGroupRows * kStepDwords);
  std::vector<double> times;
  const nb::gil_scoped_release unlocked;
  for (int m = 0; m < count && !format(w.format_id()).is_float(); ++m)
    k.quantize(x.data() + static_cast<size_t>(m) * width, cols, acts.data() + static_cast<size_t>(m) * blocks);
  for (int i = 0; i < repeats; ++i) {
    const Matrix& turn = *all[static_cast<size_t>(i % copies)];
    const auto begin = Clock::now();
    pool.run([&](int t) {
      const int first = w.panels() * t / threads, last = w.panels() * (t + 1) / threads;
      if (wide) multiply_wide(k, turn, packed.data(), count, first, last, out.data());
      else multiply(k, turn, acts.data(), x.data(), count, first, last, out.data());
    });
    times.push_back(seconds_since(begin));
  }
  return {times, w.bytes()};
}

// Operations of a plain loop of byte products on registers, `steps` times. Each returns a sum, so that none is left out.
int dots_plain(int steps) {
  int sum = 0;
  for (int i = 0; i < steps; ++i) {
    asm volatile("" : "+r"(sum));
    sum += i * 3;
  }
  return sum;
}

#if defined(__x86_64__)
constexpr int kChains = 10;  // independent accumulators: as many as hide the latency

__attribute__((target("avx512f,avx512bw,avx512vnni"))) int dots_avx512(int steps) {
  __m512i sum[kChains], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int i = 0; i < steps; ++i) {
    for (auto& s : sum) s = _mm512_dpbusd_epi32(s, a, b);
    asm volatile("" : "+x"(a), "+x"(b));
  }
  for (auto& s : sum) a = _mm512_add_epi32(a, s);
  int lanes[16];
  _mm512_storeu_si512(lanes, a);
  return lanes[0];
}

__attribute__((target("avx2"))) int dots_avx2(int steps) {
  __m256i sum[kChains], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (int i = 0; i < steps; ++i)
    for (auto& s : sum) {
      asm volatile("" : "+x"(a));
      s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  for (auto& s : sum) a = _mm256_add_epi32(a, s);
  return _mm_cvtsi128_si32(_mm256_castsi256_si128(a));
}
#endif

// 10^9 operations a second (a multiplication and an addition are two) of byte dots on `threads` threads; 0: no loop for it.
double dot_peak(const std::string& isa, int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("dot_peak: threads in [1, 1024]");
  const std::string name = select_kernels(isa).isa;
  int (*loop)(int) = nullptr;
  double each = 0;  // operations a step
  if (name == "scalar") loop = dots_plain, each = 2;
#if defined(__x86_64__)
  if (name == "avx512" || name == "avx512bf16" || name == "amx") loop = dots_avx512, each = 2.0 * 64 * kChains;
  if (name == "avx2" || name == "avxvnni") loop = dots_avx2, each = 2.0 * 32 * kChains;
#endif
  if (!loop) return 0;
  constexpr int kSteps = 2'000'000;
  const nb::gil_scoped_release unlocked;
  Pool pool(threads);
  double best = 0;
  std::vector<int> kept(static_cast<size_t>(threads));
  for (int i = 0; i < 5; ++i) {
    const auto begin = Clock::now();
    pool.run([&](int t) { kept[static_cast<size_t>(t)] = loop(kSteps); });
    best = std::max(best, each * kSteps * threads / seconds_since(begin) / 1e9);
  }
  return best;
}

}  // namespace

void bind_bench(nb::module_& m) {
  m.def("time_matmul", &time_matmul, "type"_a, "rows"_a, "cols"_a, "data"_a.noconvert(), "count"_a, "isa"_a, "threads"_a, "repeats"_a, "copies"_a = 1,
        "(seconds of each product, packed bytes) of `count` rows of activations by one matrix.");
  m.def("dot_peak", &dot_peak, "isa"_a, "threads"_a, "10^9 byte operations a second of a plain dot loop; 0: none for this ISA.");
}

}  // namespace millis
