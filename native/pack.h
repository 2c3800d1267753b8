// From a GGUF tensor's bytes to panels, and single rows back to floats.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "format.h"
#include "kernels.h"
#include "pool.h"

namespace millis {

// A weight matrix [rows, cols] in packed form; rows beyond the last are zero.
class Matrix {
 public:
  // Packs `data`, row-major blocks as in a file. `as_f32` dequantises instead, for exact runs.
  // Throws std::invalid_argument if the size of `data` is not what type and shape imply.
  Matrix(std::string name, GgmlType type, int rows, int cols, std::span<const uint8_t> data, bool as_f32, Pool& pool);

  // Panels packed before, of a format and shape that fit; 64 bytes past them may be touched.
  Matrix(std::string name, FormatId format, int rows, int cols, std::shared_ptr<const uint8_t> panels);

  const std::string& name() const { return name_; }
  FormatId format_id() const { return format_; }
  int rows() const { return rows_; }
  int cols() const { return cols_; }
  int panels() const { return (rows_ + kPanelRows - 1) / kPanelRows; }
  size_t bytes() const { return panel_bytes_ * static_cast<size_t>(panels()); }
  const uint8_t* panel(int p) const { return data_.get() + stride_ * static_cast<size_t>(p); }
  const uint8_t* low_plane(int p) const {  // of Q8_0Planes
    return data_.get() + stride_ * static_cast<size_t>(panels()) + (panel_bytes_ - stride_) * static_cast<size_t>(p);
  }

  // out: [cols], the values of one row.
  void unpack_row(int row, float* out) const;

 private:
  void set_strides();

  std::string name_;
  FormatId format_;
  int rows_, cols_;
  size_t panel_bytes_, stride_ = 0;  // of a whole panel; from one to the next
  std::shared_ptr<const uint8_t> data_;
};

// Zeros, in huge pages where that pays; 64 bytes past them may be touched.
std::shared_ptr<uint8_t> panel_memory(size_t bytes);

// tile[m][16] = x[m] . panel p of a quantised matrix.
void multiply_panel(const Kernels& k, const Matrix& w, int p, const ActBlock* x, size_t stride, int rows, float* tile, Ahead* ahead = nullptr);

// The format of a GGML type; throws std::invalid_argument for one we do not read.
FormatId format_of(GgmlType type);

// The format in which a matrix of this type is packed; throws as format_of does.
FormatId packed_format_of(GgmlType type, int rows);

// out: [count]; `count` must be a whole number of blocks. Dequantises as ggml does.
void dequantize(FormatId format, const uint8_t* data, size_t count, float* out);

}  // namespace millis
