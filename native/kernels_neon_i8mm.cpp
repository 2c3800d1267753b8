// The kernels compiled for NEON with 8-bit matrix products (FEAT_I8MM).
#include "vec_neon.h"

#define MILLIS_VEC vec_neon_i8mm
#include "kernels_body.h"

namespace millis {

const Kernels& neon_i8mm_kernels() {
  static const Kernels table = make_table("neon-i8mm");
  return table;
}

}  // namespace millis
