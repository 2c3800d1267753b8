// The peak of arithmetic for `millis bench kernels`: a plain loop of byte dots on registers, by a team of threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

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
  Pool pool(threads);
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
  m.def("dot_peak", &dot_peak, "isa"_a, "threads"_a, "10^9 byte operations a second of a plain dot loop; 0: none for this ISA.");
}

}  // namespace millis
