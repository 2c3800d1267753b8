// The kernels compiled for NEON with dot products (FEAT_DotProd).
#include "vec_neon.h"

#define MILLIS_VEC vec_neon_dot
#include "kernels_body.h"

namespace millis {

const Kernels& neon_dot_kernels() {
  static const Kernels table = make_table("neon-dot");
  return table;
}

}  // namespace millis
