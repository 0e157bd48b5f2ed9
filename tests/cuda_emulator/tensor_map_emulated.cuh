// csrc/common/tensor_map.cuh in plain C++: a map is what it describes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hf_fastpath {

struct alignas(64) TensorMap {
  unsigned char* matrix;
  int64_t rows, cols, row_bytes;
  int box_rows;
};

// The limits are those of the driver's cuTensorMapEncodeTiled, and one of this emulator: cols a multiple of 8.
inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int64_t rows, int64_t cols, int64_t row_bytes,
                                   int box_rows) {
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && row_bytes % 16 == 0;
  const bool sized = rows > 0 && cols > 0 && row_bytes >= 2 * cols && box_rows > 0 && box_rows <= 256 && cols % 8 == 0;
  *map = {static_cast<unsigned char*>(const_cast<void*>(matrix)), rows, cols, row_bytes, box_rows};
  return aligned && sized ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace hf_fastpath
