// The kernels compiled for AVX2.
#include "vec_avx2.h"

#define MILLIS_VEC vec_avx2
#define MILLIS_ROWS 4  // sums of more would not stay in the 16 registers
#define MILLIS_WIDE_ROWS 6
#define MILLIS_WIDE_LEAST 24
#include "kernels_body.h"

namespace millis {

const Kernels& avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}

}  // namespace millis
