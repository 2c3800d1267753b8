// The kernels compiled for AVX-512 with VNNI and BF16.
#include "vec_avx512bf16.h"

#define MILLIS_VEC vec_avx512bf16
#define MILLIS_BYTE_ROWS 14
#define MILLIS_PAIRS
#define MILLIS_WIDE_ROWS 16
#define MILLIS_WIDE_LEAST 40

#include "kernels_body.h"

namespace millis {

const Kernels& avx512bf16_kernels() {
  static const Kernels table = make_table("avx512bf16");
  return table;
}

}  // namespace millis
