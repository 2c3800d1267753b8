// The kernels in plain C++, for every machine.
#include "vec_scalar.h"

#define MILLIS_VEC vec_scalar
#define MILLIS_ROWS 2  // more would take minutes to compile, and have no registers to be faster by
#define MILLIS_BYTE_ROWS 2
#define MILLIS_WIDE_ROWS 4
#define MILLIS_WIDE_LEAST 16
#include "kernels_body.h"

namespace millis {

const Kernels& scalar_kernels() {
  static const Kernels table = make_table("scalar");
  return table;
}

}  // namespace millis
