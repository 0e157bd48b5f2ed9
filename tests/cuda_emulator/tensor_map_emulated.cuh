// csrc/common/tensor_map.cuh in plain C++: a map is what it describes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hf_fastpath {

struct alignas(64) TensorMap {
  unsigned char* matrix;
  int64_t rows, width, row_bytes;  // rows: of a part; others: bytes
  int parts, box_rows, box_bytes;
  int unit;  // bytes of what columns count
  bool swizzled;
};

// The limits are those of the driver's cuTensorMapEncodeTiled, and one of this emulator: rows of whole 16 bytes.
inline cudaError_t make_map(TensorMap* map, const void* matrix, int64_t rows, int64_t width, int64_t row_bytes,
                            int parts, int box_rows, int box_bytes, int unit, bool swizzled) {
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && row_bytes % 16 == 0 && width % 16 == 0;
  const bool sized = rows > 0 && width > 0 && row_bytes >= width && box_rows > 0 && box_rows <= 256 && box_bytes > 0 &&
                     box_bytes % 16 == 0 && box_bytes / unit <= 256;
  *map = {static_cast<unsigned char*>(const_cast<void*>(matrix)),
          rows,
          width,
          row_bytes,
          parts,
          box_rows,
          box_bytes,
          unit,
          swizzled};
  return aligned && sized ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int64_t rows, int64_t cols, int64_t row_bytes,
                                   int box_rows) {
  return make_map(map, matrix, rows, 2 * cols, row_bytes, 1, box_rows, 128, 2, true);
}
inline cudaError_t make_row_map(TensorMap* map, const void* matrix, int64_t rows, int64_t row_bytes, int box_rows,
                                int box_bytes, int parts = 1) {
  return make_map(map, matrix, rows, row_bytes, row_bytes, parts, box_rows, box_bytes, 4, false);
}

}  // namespace hf_fastpath
