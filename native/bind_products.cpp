// Products by one matrix alone, in each of the forms that a step has them: their values for tests, their times for `millis bench kernels`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "arrays.h"
#include "cpu.h"
#include "pack.h"
#include "step.h"
#include "wide.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

namespace {

using Clock = std::chrono::steady_clock;

// What activations are: floats, for matrices of floats; two bytes; one byte; or a wide product's operands.
enum class By { floats, shorts, bytes, wide };

// Rows of activations [count, cols] made ready to be multiplied by matrices of one format. x stays the caller's.
class Rows {
 public:
  Rows(const Kernels& k, const Matrix& w, const float* x, int count, By by)
      : k_(k), by_(by), x_(x), count_(count), cols_(w.cols()), at_once_(by == By::bytes ? byte_group(count, k.byte_rows) : kTileRows) {
    const size_t rows = static_cast<size_t>(count), width = static_cast<size_t>(cols_), blocks = width / kBlock;
    const size_t group = by == By::wide ? k.wide.operands(cols_) : 0;
    if (by == By::shorts) shorts_.resize(rows * blocks);
    if (by == By::bytes) bytes_.resize((rows + static_cast<size_t>(at_once_)) * blocks);
    if (by == By::wide) wide_.resize((rows + kGroupRows - 1) / kGroupRows * group, 0xffffffff);
    for (size_t r = 0; r < rows; ++r) {
      const float* from = x + r * width;
      const size_t first = r - r % static_cast<size_t>(at_once_);
      if (by == By::shorts) k.quantize(from, cols_, shorts_.data() + r * blocks);
      if (by == By::bytes) k.quantize_bytes(from, cols_, at_once_, bytes_.data() + first * blocks + (r - first));
      if (by == By::wide) k.wide.pack_rows(from, 0, 1, cols_, wide_.data() + packed_row(static_cast<int>(r), group));
    }
  }

  // By the panels [begin, end) of w, into out [count, 16 * panels].
  void times(const Matrix& w, int begin, int end, float* out) const {
    if (by_ == By::wide) return times_wide(w, begin, end, out);
    const int id = static_cast<int>(w.format_id());
    const size_t width = static_cast<size_t>(cols_), blocks = width / kBlock, stride = static_cast<size_t>(w.panels()) * kPanelRows;
    for (int p = begin; p < end; ++p)
      for (int m = 0; m < count_; m += at_once_) {
        float tile[kTileRows * kPanelRows];
        const int some = std::min(at_once_, count_ - m);
        const auto at = static_cast<size_t>(m);
        if (by_ == By::floats) k_.float_panel[id](w.panel(p), cols_, x_ + at * width, width, some, tile);
        if (by_ == By::shorts) multiply_panel(k_, w, p, shorts_.data() + at * blocks, blocks, some, tile);
        if (by_ == By::bytes) k_.bytes_panel[id](w.panel(p), cols_, bytes_.data() + at * blocks, at_once_, some, tile);
        k_.finish(tile, Epilogue{}, some, kPanelRows, out + at * stride + static_cast<size_t>(p) * kPanelRows, stride);
      }
  }

 private:
  void times_wide(const Matrix& w, int begin, int end, float* out) const {
    const size_t stride = static_cast<size_t>(w.panels()) * kPanelRows;
    AlignedVector<uint32_t> operands(kWideOperands);
    AlignedVector<float> tiles(kWideTiles);
    const Segment segment{&w, nullptr, 0};
    const auto finish = [&](const WidePlace& at, int block, int some) {
      for (int i = 0; i < at.panels(); ++i)
        k_.finish(tiles.data() + static_cast<size_t>(i) * kWideTile, Epilogue{}, some, kPanelRows,
                  out + static_cast<size_t>(block) * stride + static_cast<size_t>(at.panel() + i) * kPanelRows, stride);
    };
    wide_products(
        k_.wide, WidePlace(k_.wide, {&segment, 1}, nullptr, cols_, {begin, end}), wide_.data(), cols_, {0, count_}, operands.data(), tiles.data(),
        [](int, int) {}, finish);
  }

  const Kernels& k_;
  By by_;
  const float* x_;
  int count_, cols_, at_once_;
  std::vector<ActBlock> shorts_;
  std::vector<ByteBlock> bytes_;
  AlignedVector<uint32_t> wide_;
};

// That of a matrix for which neither bytes nor a wide product is asked.
By plain_form(const Matrix& w) { return format(w.format_id()).is_float() ? By::floats : By::shorts; }

// The form that a step takes.
By usual_form(const Kernels& k, const Matrix& w, int count, bool bytes) {
  bytes = bytes && has_bytes(k, w);
  if (wide_pays(k, count, bytes) && has_wide(k, w)) return By::wide;
  return bytes ? By::bytes : plain_form(w);
}

// The form of this name. Throws where this ISA has no such product for the matrix.
By named_form(const Kernels& k, const Matrix& w, const std::string& name) {
  if (name == "shorts") return plain_form(w);
  if (name != "bytes" && name != "wide") throw std::invalid_argument("by: shorts, bytes or wide, not " + name);
  if (name == "bytes" ? !has_bytes(k, w) : !has_wide(k, w))
    throw std::invalid_argument(name == "bytes" ? "no product of bytes for this type" : "no wide product for this type");
  return name == "bytes" ? By::bytes : By::wide;
}

// [rows of x, rows of w] = x w^T by one ISA's kernels; exact: weights as floats.
Floats matmul(const Array2<float>& x, int type, int rows, const Array<uint8_t>& data, const std::string& isa, const std::string& by, bool exact) {
  const Kernels& k = select_kernels(isa);
  const size_t most = by == "wide" ? 4 * kWideBlock : size_t{kMostSide};
  if (x.shape(0) > most || x.shape(1) > size_t{kMostSide}) throw std::invalid_argument("x is too large");
  const auto cols = static_cast<int>(x.shape(1)), count = static_cast<int>(x.shape(0));
  Pool alone(1);
  const Matrix w("w", static_cast<GgmlType>(type), rows, cols, std::span(data.data(), data.size()), exact, alone);
  const By form = named_form(k, w, by);
  const std::vector<float> input = copy_of(x);
  const size_t width = static_cast<size_t>(w.panels()) * kPanelRows, wanted = static_cast<size_t>(rows);
  std::vector<float> whole(x.shape(0) * width), out(x.shape(0) * wanted);
  Rows(k, w, input.data(), count, form).times(w, 0, w.panels(), whole.data());
  for (size_t m = 0; m < x.shape(0); ++m) std::copy_n(whole.data() + m * width, wanted, out.data() + m * wanted);
  return owned(std::move(out), {x.shape(0), wanted});
}

// (seconds of each of `repeats` products, packed bytes): `count` rows of activations by a matrix [rows, cols]. They take
// turns with `copies` copies of it, as the matrices of a model do, so that a small one does not stay in the cache.
std::pair<std::vector<double>, size_t> time_matmul(int type, int rows, int cols, const Array<uint8_t>& data, int count, const std::string& isa,
                                                   int threads, int repeats, int copies, bool bytes) {
  if (count < 1 || count > 4096 || repeats < 1 || repeats > 100000 || copies < 1 || copies > 4096)
    throw std::invalid_argument("time_matmul: count and copies in [1, 4096], repeats in [1, 100000]");
  const Kernels& k = select_kernels(isa);
  Pool pool(threads);
  std::vector<std::unique_ptr<Matrix>> all;
  for (int i = 0; i < copies; ++i)
    all.push_back(std::make_unique<Matrix>("w", static_cast<GgmlType>(type), rows, cols, std::span(data.data(), data.size()), false, pool));
  const Matrix& w = *all[0];
  std::vector<float> x(static_cast<size_t>(cols) * static_cast<size_t>(count));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) / 8.0f - 1.0f;
  std::vector<float> out(static_cast<size_t>(count) * static_cast<size_t>(w.panels()) * kPanelRows);
  std::vector<double> times;
  const nb::gil_scoped_release unlocked;
  const Rows ready(k, w, x.data(), count, usual_form(k, w, count, bytes));
  for (int i = 0; i < repeats; ++i) {
    const Matrix& turn = *all[static_cast<size_t>(i) % all.size()];
    const auto begin = Clock::now();
    pool.run([&](int t) {
      const Range own = share(w.panels(), t, threads);
      ready.times(turn, own.first, own.last, out.data());
    });
    times.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return {times, w.bytes()};
}

}  // namespace

void bind_products(nb::module_& m) {
  m.def("matmul", &matmul, "x"_a, "type"_a, "rows"_a, "data"_a.noconvert(), "isa"_a = "auto", "by"_a = "shorts", "exact"_a = false,
        "x w^T by one ISA's kernels. by: activations as shorts, bytes or wide operands; exact: all in floats.");
  m.def("time_matmul", &time_matmul, "type"_a, "rows"_a, "cols"_a, "data"_a.noconvert(), "count"_a, "isa"_a, "threads"_a, "repeats"_a, "copies"_a = 1,
        "bytes"_a = false, "(seconds of each product, packed bytes) of `count` rows of activations by one matrix, in the form that a step takes.");
}

}  // namespace millis
