// LoRA adapters (Hu et al., 2021): what each adds to the products of a plan, for the rows of a step that it serves.
//
// y += B (A x), A: [rank][cols], B: [rows][rank]. Both are kept as panels of 16, in the order in which they are read: of an
// op all A together, so that x is read once for q, k and v, then the B of each weight. In fast runs a value is an f16 of
// its matrix scaled by a power of two: as exact as the bfloat16 that most adapters are trained in. Rows that share an
// adapter share a pass over it (Chen et al., 2023, Punica; Sheng et al., 2023, S-LoRA).
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "aligned.h"
#include "kernels.h"

namespace millis {

struct Batch;
struct MatMulOp;
class Runtime;

constexpr int kMostRank = 512;
constexpr int kAddingPanels = 8;  // of a product, added to at a time
constexpr int kAddingRows = 8;    // of a product: what comes next is counted out to so many rows of a block
constexpr int kColumnParts = 4;   // of A x, which threads share out; summed up in the same order however many they are

// One weight's pair of matrices; the product is scaled.
struct AdapterPair {
  std::string weight;
  int rank;
  std::vector<float> a, b;  // [rank][cols], [rows][rank]
  float scale;
};

// Made by Runtime::adapter for that runtime alone. It does not change.
class Adapter {
 public:
  struct Target {
    int rank = 0, first = 0;     // its ranks among all of the op's
    const uint8_t* b = nullptr;  // [panels][rank][16]
  };
  struct Part {     // of an op
    int ranks = 0;  // 0: the op stays as it is
    int cols = 0;
    const uint8_t* a = nullptr;   // [ranks / 16, rounded up][cols][16]
    std::vector<Target> targets;  // one a segment, then one for the gate
    std::vector<float> factors;   // [ranks] what is still to be multiplied with A x
    int panels() const { return (ranks + kPanelRows - 1) / kPanelRows; }
    int units() const { return kColumnParts * panels(); }
  };

  // ops: the plan's products by their number. Throws std::invalid_argument naming the weight that does not fit.
  Adapter(const Runtime& owner, const std::vector<const MatMulOp*>& ops, const std::vector<AdapterPair>& pairs, bool exact);

  const Part& part(int number) const { return parts_[static_cast<size_t>(number)]; }
  int next(int number) const { return next_[static_cast<size_t>(number)]; }  // the next op that it changes, -1: none
  int panels() const { return panels_; }
  size_t bytes() const { return bytes_; }
  const Runtime& owner() const { return owner_; }

 private:
  const Runtime& owner_;
  std::vector<Part> parts_;  // by number of the op
  std::vector<int> next_;
  int panels_ = 0;  // of the part that has the most
  size_t bytes_ = 0;
  std::shared_ptr<uint8_t> data_;
};

// The adapters of the step under way.
class Adding {
 public:
  Adding(const Kernels& kernels, bool exact, int threads) : kernels_(kernels), exact_(exact), own_(static_cast<size_t>(threads)) {}

  // Before a step: who serves which rows. Makes room where no adapter before was as large.
  void begin(const Batch& batch);
  bool any() const { return !runs_.empty(); }
  bool serves(const MatMulOp& op) const;

  // A x of rows [first, last), whose inputs lie one after the other behind x.
  void shrink(const MatMulOp& op, const float* x, int first, int last);
  // The share of one of `threads` threads in A x of all rows.
  void shrink_share(const MatMulOp& op, const float* x, int thread, int threads);
  // Behind a barrier: for rows [first, first + count), what `add` needs. `count` may be kWideBlock.
  void gather(const MatMulOp& op, int first, int count, int thread);
  // What a thread reads next of all adapters, for the products of `op` to ask for.
  void look_ahead(const MatMulOp& op, int thread, int threads);
  Ahead& ahead(int thread) { return own_[static_cast<size_t>(thread)].ahead; }
  // tiles[i][m][16] += what the adapter of row first + m adds to panel + i of a target: a segment or, behind them, the gate.
  void add(const MatMulOp& op, size_t target, int panel, int panels, int first, int count, float* tiles, size_t tile_stride, int thread);
  float* tiles(int thread) { return own_[static_cast<size_t>(thread)].tiles.data(); }  // [kAddingPanels][kTileRows][16]

 private:
  struct Run {  // rows in a row of one adapter
    int first, last;
    const Adapter* adapter;
  };
  struct Own {  // of a thread
    AlignedVector<float> tiles;
    std::vector<float> sums;      // [kWideBlock][16 panels_]: A x of the rows gathered
    std::vector<Addend> addends;  // of rows [first, first + count) and a target
    size_t target = 0;
    int gathered = 0, first = -1, count = 0;
    std::vector<Span> spans;  // what will be read next
    Ahead ahead;              // of them, what was not asked for yet
  };
  void multiply(const Adapter::Part& part, int unit, const float* x, int first, int last);
  const uint8_t* a_of(const Adapter::Part& part, int unit) const;
  // visit(run, part, first, last): a thread's share in the units of an op.
  template <class Visit>
  void each_share(int number, int thread, int threads, const Visit& visit) const;
  float* sums_of(int column_part, int panel, int row) {
    return parts_.data() +
           ((static_cast<size_t>(column_part * panels_ + panel)) * static_cast<size_t>(rows_) + static_cast<size_t>(row)) * kPanelRows;
  }

  const Kernels& kernels_;
  bool exact_;
  std::vector<Run> runs_;
  int rows_ = 0, panels_ = 0;
  std::vector<float> parts_;  // [kColumnParts][panels_][rows_][16]: A x
  std::vector<Own> own_;
};

}  // namespace millis
