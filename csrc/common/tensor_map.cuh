// Descriptions of matrices in global memory for the hardware that copies boxes of them (tensor_load(), tensor_store()
// of ptx_sm90.cuh; compute capability 9.0 and newer). tests/cuda_emulator/tensor_map_emulated.cuh is their meaning in
// C++.
#pragma once

#ifdef HF_FASTPATH_EMULATED
#include "tensor_map_emulated.cuh"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace hf_fastpath {

using TensorMap = CUtensorMap;

// The driver's function is looked up, not linked: the library must load where there is no driver.
inline cudaError_t encode_tensor_map(TensorMap* map, CUtensorMapDataType type, const void* matrix, int parts,
                                     int64_t rows, int64_t cols, int64_t row_bytes, int box_rows, int box_cols,
                                     CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(parts)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows * row_bytes)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(parts)};
  const cuuint32_t every[3] = {1, 1, 1}, dimensions = parts == 1 ? 2 : 3;
  const CUresult result = encode(map, type, dimensions, const_cast<void*>(matrix), sizes, strides, box, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Describes a (rows, cols) matrix of 16-bit values whose rows are `row_bytes` apart (a multiple of 16, at least the
// row), from an address aligned to 16 bytes, to be copied in boxes of box_rows (up to 256) by 64 columns; cols must be
// a multiple of 8. A box lies in shared memory aligned to 1,024 bytes, swizzled as wgmma_descriptor() says.
inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int64_t rows, int64_t cols, int64_t row_bytes,
                                   int box_rows) {
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, matrix, 1, rows, cols, row_bytes, box_rows, 64,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

// Describes rows of `row_bytes` bytes (a multiple of 16), one after the other from an address aligned to 16 bytes, to
// be copied in boxes of box_rows by box_bytes (a multiple of 16, up to 1,024). Columns are counted in words of 4 bytes.
// A box lies in shared memory aligned to 128 bytes, row after row.
//
// With two parts, for tensor_load_parts(), the matrix is twice `rows` rows: a box is those of the first part, then
// those with the same numbers in the second.
inline cudaError_t make_row_map(TensorMap* map, const void* matrix, int64_t rows, int64_t row_bytes, int box_rows,
                                int box_bytes, int parts = 1) {
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, matrix, parts, rows, row_bytes / 4, row_bytes, box_rows,
                           box_bytes / 4, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace hf_fastpath

#endif
