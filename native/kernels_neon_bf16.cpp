// The kernels compiled for NEON with 8-bit matrix products and with those of bfloat16 (FEAT_BF16).
#include "vec_neon_bf16.h"

#define MILLIS_VEC vec_neon_bf16
#define MILLIS_PAIRS
#define MILLIS_QUADS
#define MILLIS_WIDE_LEAST 40  // as with AVX-512 BF16: not measured on ARM
#include "kernels_body.h"

namespace millis {

const Kernels& neon_bf16_kernels() {
  static const Kernels table = make_table("neon-bf16");
  return table;
}

}  // namespace millis
