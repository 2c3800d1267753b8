// Executes a plan for a ragged batch. Ops mirror models/plan.py, whose docstrings define them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "adapter.h"
#include "aligned.h"
#include "kernels.h"
#include "pack.h"
#include "packed_file.h"
#include "pool.h"

namespace millis {

constexpr int kPrivateRows = 8;     // up to here every thread prepares its own copy of a product's input, and logits are screened;
constexpr int kScreenRanked = 2;    // of which so many may draw among their top_k: a whole matrix is soon quicker than reading all that may be
constexpr int kScreenChanged = 64;  // and one of so many logits may be changed: what shares a panel with it is read
constexpr int kMostHeads = 4096;
constexpr size_t kMostShared = 256;  // units of queries in a step whose keys may be shared among threads

struct RuntimeConfig {
  int threads, max_tokens, max_outputs, pages;
  int layers, kv_heads, head_dim, vocab, context;
  bool exact;  // float32 weights and cache
  std::string isa;
  bool bytes = false;  // multiply by activations of one byte, where that is faster
  bool screen = true;  // read of an output matrix in two planes only what may decide, where the caller allows it
};

// One step's work; see engine/runner.py.
struct Batch {
  std::vector<int32_t> tokens, starts, lengths, tables;  // [T], [S], [S], [S * table_width]
  size_t table_width;
  std::vector<int32_t> types = {};            // [T] of an encoder's tokens; empty: all 0
  std::vector<int32_t> parents = {};          // [T] of each token among those of its sequence, -1: what is cached; empty: the one before
  std::vector<const Adapter*> adapters = {};  // [S], null: none; or none at all
  // Of an encoder-decoder model: how many tokens each sequence's source has, and the pages that hold their keys and values.
  std::vector<int32_t> sources = {}, source_tables = {};  // [S], [S * source_width]
  size_t source_width = 0;
};

using Vector = std::vector<float>;

struct Buffer {
  int width;
  AlignedVector<float> data;  // [rows][width]
};

struct NormOp {
  Buffer *out, *x;
  const Vector *weight, *bias;
  float eps;
  bool layer;
  const Buffer* residual;
  int column, width;  // of what is normed: all, or where out is x, some columns
};
struct EmbedOp {
  Buffer* out;
  const Matrix *weight, *positions, *types;
  float scale;
};
struct Segment {
  const Matrix* weight;
  const float* bias;
  int column;
};
struct MatMulOp {
  Buffer *out = nullptr, *x = nullptr;
  std::vector<Segment> segments;  // outputs side by side
  const Matrix* gate = nullptr;   // gated: out = activation(x gate^T) * (x segments[0]^T)
  Activation activation = Activation::None;
  const Buffer* residual = nullptr;
  int number = -1;                                // of the op in its plan; -1 behind a select, where no adapter adds
  bool bytes = false;                             // multiplies by activations of one byte
  const NormOp* norm = nullptr;                   // applied to x on the way in, when its result has no other reader
  const MatMulOp *from = nullptr, *to = nullptr;  // the product that writes x, the one that reads `out`, if for each other only
  std::vector<float> padded_bias;

  template <class Holds>
  bool every_weight(const Holds& holds) const {
    return (!gate || holds(gate)) && std::all_of(segments.begin(), segments.end(), [&](const Segment& s) { return holds(s.weight); });
  }
};
struct AttentionOp {
  Buffer *out, *qkv;
  int layer, heads, window;
  float scale, eps;
  const Vector *rope, *q_norm, *k_norm;
  bool interleaved;
  const Vector* bias = nullptr;  // [heads][2 * context + kBiasSlack]: see plan.py
  bool cross = false;            // qkv holds queries only; the keys are the source's
  int rotated = 0;               // of each head's coordinates, the first so many
  bool norm_rotated = false;     // norms come behind the rotation
};
struct ConvolveOp {
  Buffer *out, *bcx;
  const Vector* weight;  // [taps][width of out], the oldest tap first
  int layer, taps;       // layer: the first of those of the cache that keep b * x, [32] rows of [width of out] in each page
};
struct RememberOp {
  Buffer *out, *kv;  // out: null
  int layer;
};
struct SelectOp {
  Buffer *out, *x;
};
struct AttendAllOp {
  Buffer *out, *qkv;
  int heads, kv_heads, head_dim, window;  // tokens on either side; 0: all
  float scale, eps;
  const Vector *bias = nullptr, *rope = nullptr, *q_norm = nullptr, *k_norm = nullptr;
};
struct PoolOp {
  Buffer *out, *x;
  bool mean;  // of all rows of a text; else its first
};
using Op = std::variant<EmbedOp, NormOp, MatMulOp, AttentionOp, SelectOp, AttendAllOp, PoolOp, RememberOp, ConvolveOp>;
static_assert(std::is_nothrow_move_constructible_v<Op>, "a growing list must move ops: segments point into their bias");

// Any thread may call any of it: building and running take turns.
class Runtime {
 public:
  explicit Runtime(const RuntimeConfig& config);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Building, in any order up to finish(); each throws std::invalid_argument on a bad name or size, and after finish().
  void add_buffer(const std::string& name, int width);
  void use_packed(std::shared_ptr<const PackedFile> file);  // matrices added from here on are taken from it where it has them
  void add_matrix(const std::string& name, int type, int rows, int cols, std::span<const uint8_t> data);
  void add_vector(const std::string& name, Vector values);
  void embed(const std::string& out, const std::string& weight, float scale, const std::string& positions, const std::string& types);
  void norm(const std::string& out, const std::string& x, const std::string& weight, const std::string& bias, float eps, bool layer,
            const std::string& residual, int begin, int end);
  void matmul(const std::string& out, const std::string& x, const std::vector<std::string>& weights, const std::vector<std::string>& biases,
              const std::string& activation, const std::string& residual, const std::string& gate);
  void attention(const std::string& out, const std::string& qkv, int layer, int heads, float scale, const std::string& rope, bool interleaved,
                 int window, const std::string& q_norm, const std::string& k_norm, float eps, const std::string& bias, bool norm_rotated);
  void convolve(const std::string& out, const std::string& bcx, const std::string& weight, int layer, int taps);
  void attend_all(const std::string& out, const std::string& qkv, int heads, int kv_heads, int head_dim, float scale, const std::string& bias,
                  const std::string& rope, int window, const std::string& q_norm, const std::string& k_norm, float eps);
  // Ops up to end_source() read a text; those behind it write one, looking at what was remembered of it.
  void remember(const std::string& kv, int layer);
  void end_source();
  void cross_attention(const std::string& out, const std::string& q, int layer, int heads, float scale);
  void select(const std::string& out, const std::string& x);
  void pool(const std::string& out, const std::string& x, bool mean);
  void finish();

  // After finish(). Throws std::invalid_argument naming the weight that does not fit.
  std::shared_ptr<const Adapter> adapter(const std::vector<AdapterPair>& pairs) const;

  // Throws std::invalid_argument where the batch, or the runtime, cannot be run.
  void check(const Batch& batch) const;

  // Runs a checked batch. `choosing`, if given, one for each row: which logits need not be exact. visit(i, logits) is called
  // once for each of `rows`, from any thread; what it throws is thrown again here, once the step is over. `words`: logits from there
  // on are open, and mostly not computed.
  template <class Visit>
  void run(const Batch& batch, std::span<const int32_t> rows, const Visit& visit, std::span<const Choosing> choosing = {}, int words = kMostSide) {
    run_rows(batch, rows, choosing, ops_.size(), visit_row<Visit>, &visit, words);
  }

  // Copies one page of every layer's keys and values over another. Throws std::invalid_argument where there is no such page.
  void copy_page(int from, int to);

  // The same without the output matrix: visit(i, hidden) is handed what it would have read, [hidden_width()].
  template <class Visit>
  void run_hidden(const Batch& batch, std::span<const int32_t> rows, const Visit& visit) {
    run_rows(batch, rows, {}, ops_.size() - 1, visit_row<Visit>, &visit);
  }
  size_t hidden_width() const;  // throws std::invalid_argument where the last op is no product

  // The same for an encoder, whose batch has neither starts nor pages: visit(i, row) is handed the embedding of text i, or what
  // the head makes of it, [text_width(head)].
  void check_texts(const Batch& batch) const;
  template <class Visit>
  void run_texts(const Batch& batch, std::span<const int32_t> texts, bool head, const Visit& visit) {
    run_rows(batch, texts, {}, head ? ops_.size() : pooled_, visit_row<Visit>, &visit);
  }
  size_t text_width(bool head) const;  // throws std::invalid_argument where the plan is no encoder's, or has no head

  // The source half of an encoder-decoder model over texts whose `tables` say which pages are to hold what is remembered.
  // Throws std::invalid_argument where the batch, or the runtime, cannot be run.
  void read(const Batch& batch);

  const RuntimeConfig& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  size_t weight_bytes() const { return weight_bytes_; }
  // Of the weights that products multiply by: what a token reads, but for a row of each embedding. Throws std::invalid_argument
  // where ops may still be added.
  size_t token_bytes() const;

 private:
  using VisitRow = void (*)(const void* visit, size_t index, float* row);
  template <class Visit>
  static void visit_row(const void* visit, size_t index, float* row) {
    (*static_cast<const Visit*>(visit))(index, row);
  }
  struct Step;

  std::unique_lock<std::mutex> turn();
  std::unique_lock<std::mutex> building();
  uint8_t* cached(int page, int layer, int head) const {  // keys [head_dim][32], then values [32][head_dim]
    return cache_.get() + static_cast<size_t>(page) * page_stride_ + static_cast<size_t>(layer) * layer_stride_ +
           static_cast<size_t>(head) * head_stride_;
  }
  Buffer* buffer(const std::string& name);
  const Matrix* matrix(const std::string& name) const;
  const Vector* vector(const std::string& name, size_t size) const;
  void place(const Batch& batch);
  void mask_trees(const Batch& batch);
  void run_rows(const Batch& batch, std::span<const int32_t> rows, std::span<const Choosing> choosing, size_t last, VisitRow visit,
                const void* context, int words = kMostSide);
  void run_ops(Step step, int thread);  // each thread walks on its own copy
  void walk(Step& step, size_t first, size_t last, int thread);
  void check_sources(const Batch& batch) const;
  void check_halves() const;
  bool read_once(size_t op) const;
  void fuse();
  void find_tail();
  void touch_cache();

  void execute(const EmbedOp& op, Step& step, int thread);
  void execute(const NormOp& op, Step& step, int thread);
  void execute(const MatMulOp& op, Step& step, int thread);
  bool takes_bytes(const MatMulOp& op) const;
  bool screened(const MatMulOp& op, const Step& step) const;
  void execute_screened(const MatMulOp& op, Step& step, int thread);
  class Screening;
  bool wide(const MatMulOp& op, int rows) const;
  bool packed(const MatMulOp& op, int rows) const;
  void execute_wide(const MatMulOp& op, Step& step, int thread);
  void write_heads(const AttentionOp& op, Step& step, int thread);
  Keys keys_of(const AttentionOp& op, const Step& step, size_t s, int head, int low, int high) const;
  void execute(const AttentionOp& op, Step& step, int thread);
  void execute(const ConvolveOp& op, Step& step, int thread);
  void execute(const SelectOp& op, Step& step, int thread);
  void turn_heads(const AttendAllOp& op, const Step& step, int thread);
  void execute(const AttendAllOp& op, Step& step, int thread);
  void execute(const PoolOp& op, Step& step, int thread);
  void execute(const RememberOp& op, Step& step, int thread);

  RuntimeConfig config_;
  const Kernels& kernels_;
  std::mutex turn_;
  std::map<std::string, Buffer> buffers_;
  std::shared_ptr<const PackedFile> packed_;
  std::map<std::string, std::unique_ptr<Matrix>> matrices_;
  std::map<std::string, Vector> vectors_;
  std::vector<Op> ops_;
  size_t target_ = 0;          // of an encoder-decoder model: ops from here on write
  size_t first_selected_ = 0;  // ops from here on run on selected rows
  size_t tail_ = 0;            // and those from here on may
  std::vector<Buffer*> tail_inputs_;
  size_t pooled_ = 0;  // of an encoder: ops up to the embedding; what follows is its head
  std::atomic<bool> finished_ = false;
  std::atomic<size_t> weight_bytes_ = 0;
  size_t page_stride_ = 0, layer_stride_ = 0, head_stride_ = 0;  // bytes of a page, of a layer of it, of a KV head of that
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t[], Free> cache_;              // [pages][layers][kv_heads][2 * head_dim * 32]; memory comes when it is touched
  std::vector<int32_t> positions_, slots_, sequences_;  // [T] of the batch under way; slots are positions but in a tree
  std::vector<int32_t> begins_;                         // [S] row of each sequence's first token
  std::map<int, std::vector<uint32_t>> masks_;          // by window: [T][mask_words_] which slots a token of a tree sees
  size_t mask_words_ = 0;
  // Of the tokens seen so far: the one that is chosen by now, and the largest logit.
  struct Front {
    double place = -INFINITY;  // its logit, in a race with what it draws
    float logit = -INFINITY;
    int32_t token = -1;
    float largest = logit;
    void take(const Front& other) {
      largest = std::max(largest, other.largest);
      if (other.place > place) place = other.place, logit = other.logit, token = other.token;
    }
  };
  struct Scratch {
    AlignedVector<float> rows, attention, tile;
    std::vector<ActBlock> acts;
    std::vector<ByteBlock> bytes;
    std::vector<ScreenBlock> screen;
    Candidates candidates;
    AlignedVector<uint32_t> wide;  // shared: a product's input; private: panels under way
  };
  std::vector<Scratch> private_;  // one a thread
  Scratch shared_;
  // Of a screened output matrix: [rows][panels] what no logit lies above or, where it is asked of each token, how much no error is above.
  std::vector<float> bound_;
  std::vector<uint32_t> allowed_[kPrivateRows];  // of its rows: a bit for each token that may be chosen
  std::vector<Change> changes_[kPrivateRows];    // and those whose logits are changed before the choice
  std::vector<Front> fronts_;                    // [2][threads][rows] after the first panels, and after all that may hold the choice
  float least_[kPrivateRows];                    // of a race that filters narrow: logits below need not be known
  std::vector<float> partial_;                   // of attention whose keys are shared among threads
  Adding adding_;
  Pool pool_;
};

}  // namespace millis
