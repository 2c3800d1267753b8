// The kernels compiled for AVX2 with AVX-VNNI.
#include "vec_avx2.h"

#define MILLIS_VEC vec_avxvnni
#define MILLIS_ROWS 4  // sums of more would not stay in the 16 registers
#include "kernels_body.h"

namespace millis {

const Kernels& avxvnni_kernels() {
  static const Kernels table = make_table("avxvnni");
  return table;
}

}  // namespace millis
