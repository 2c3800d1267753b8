// The kernels compiled for AVX-512 with VNNI.
#include "vec_avx512.h"

#define MILLIS_VEC vec_avx512
#define MILLIS_BYTE_ROWS 14
#define MILLIS_WIDE_ROWS 16
#include "kernels_body.h"

namespace millis {

const Kernels& avx512_kernels() {
  static const Kernels table = make_table("avx512");
  return table;
}

}  // namespace millis
