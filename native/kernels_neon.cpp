// The kernels compiled for plain NEON.
#include "vec_neon.h"

#define MILLIS_VEC vec_neon
#define MILLIS_WIDE_LEAST 16
#include "kernels_body.h"

namespace millis {

const Kernels& neon_kernels() {
  static const Kernels table = make_table("neon");
  return table;
}

}  // namespace millis
