// The hf_fastpath operators on CUDA: argument checks, dispatch on the dtype, launch. The only file that knows torch,
// and only its stable ABI, so that one library serves every torch from 2.11 on. Schemas are defined in
// hf_fastpath/ops/*.py; tests/test_op_schemas.py compares them with the signatures here, since the ABI does not check
// types.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

// Lives in libtorch_cuda, which a CPU-only torch lacks; weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace hf_fastpath {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  return out << ")";
}

// One op's checks: every message starts with the op's name.
struct Check {
  const char* op;

  template <typename... Parts>
  void operator()(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream message;
    message << "hf_fastpath::" << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void dtype(const Tensor& t, ScalarType expected, const char* name, const char* dtype_name) const {
    (*this)(t.scalar_type() == expected, name, " must be ", dtype_name);
  }
  // A negative size stands for any.
  void shape(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name, const char* meaning) const {
    bool ok = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; ok && i < sizes.size(); ++i) {
      ok = sizes.begin()[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes.begin()[i];
    }
    (*this)(ok, name, " must have shape ", meaning, ", got ", t);
  }
  void contiguous(const Tensor& t, const char* name) const { (*this)(t.is_contiguous(), name, " must be contiguous"); }
  void aligned(const Tensor& t, uintptr_t bytes, const char* name) const {
    (*this)(reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0, name, " must be aligned to ", bytes, " bytes");
  }
  void same_device(const Tensor& first, const Tensor& t, const char* name) const {
    (*this)(t.is_cuda() && t.get_device_index() == first.get_device_index(), name,
            " must be on cuda:", first.get_device_index(), " like the other arguments");
  }
  Dtype float_dtype(const Tensor& t, const char* name) const {
    const ScalarType type = t.scalar_type();
    (*this)(type == ScalarType::Half || type == ScalarType::BFloat16, name, " must be float16 or bfloat16");
    return type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
  }
  void launched(cudaError_t error) const {
    (*this)(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
  }
};

// torch's C functions return 0 for success. (The headers' own check has another name in every torch.)
void require_success(AOTITorchError code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string("hf_fastpath: torch failed to ") + what);
}

// Makes a tensor's device current, and gives torch's current stream there.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("hf_fastpath: this torch was built without CUDA");
    require_success(aoti_torch_get_current_cuda_stream(device_, reinterpret_cast<void**>(&stream_)), "give its stream");
  }
  cudaStream_t stream() const { return stream_; }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    std::array<int64_t, 4> strides{};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
    const int32_t code = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                         : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                         : aoti_torch_dtype_float32();
    AtenTensorHandle handle = nullptr;
    require_success(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), code,
                                             aoti_torch_device_type_cuda(), device_, &handle),
                    "allocate a tensor");
    return Tensor(handle);
  }

  int sm_count() const {
    static std::array<std::atomic<int>, 64> counts{};
    std::atomic<int>& count = counts[device_ % counts.size()];
    if (int known = count.load(std::memory_order_relaxed)) return known;
    int value = 0;
    if (cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device_) != cudaSuccess) value = 1;
    count.store(value, std::memory_order_relaxed);
    return value;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <typename T = void>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <typename T = void>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

constexpr int64_t kMaxInt = 2147483647;

// The packed weight's tensors, as described in hf_fastpath/packing.py. Returns the scales' dtype.
Dtype check_packed(const Check& check, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                   int64_t k, int64_t n, int64_t group_size) {
  check(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128, got ",
        group_size);
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(k >= group_size && k <= kMaxInt - 128 && k % group_size == 0,
        "in_features must be a positive multiple of group_size ", group_size, ", got ", k);
  const int64_t row_tiles = (n + 15) / 16;
  check.dtype(qweight, ScalarType::Int, "qweight", "int32");
  check.shape(qweight, {row_tiles, (k + 63) / 64, 32, 4}, "qweight", "(ceil(N/16), ceil(K/64), 32, 4)");
  check.contiguous(qweight, "qweight");
  check.aligned(qweight, 16, "qweight");
  const Dtype dtype = check.float_dtype(scales, "scales");
  check.shape(scales, {row_tiles, k / group_size, 16}, "scales", "(ceil(N/16), K/group, 16)");
  check.contiguous(scales, "scales");
  check.aligned(scales, 4, "scales");
  check.same_device(qweight, scales, "scales");
  if (zeros) {
    check.dtype(*zeros, ScalarType::Byte, "zeros", "uint8");
    check.shape(*zeros, {row_tiles, k / group_size, 16}, "zeros", "(ceil(N/16), K/group, 16)");
    check.contiguous(*zeros, "zeros");
    check.aligned(*zeros, 2, "zeros");
    check.same_device(qweight, *zeros, "zeros");
  }
  return dtype;
}

// The two tensors of one side of an int8 cache of `like`'s batch, heads and dimension.
void check_cache(const Check& check, const Tensor& cache, const Tensor& scale, int64_t batch, int64_t heads,
                 int64_t capacity, int64_t dim, const char* cache_name, const char* scale_name) {
  check.dtype(cache, ScalarType::Char, cache_name, "int8");
  check.shape(cache, {batch, heads, capacity, dim}, cache_name, "(B, H_kv, capacity, D)");
  check.contiguous(cache, cache_name);
  check.dtype(scale, ScalarType::Half, scale_name, "float16");
  check.shape(scale, {batch, heads, capacity}, scale_name, "(B, H_kv, capacity)");
  check.contiguous(scale, scale_name);
}

Tensor w4a16_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_linear"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t m = x.size(0), k = x.size(1);
  check(m <= kMaxLinearRows, "takes up to ", kMaxLinearRows, " rows, got ", m, "; use w4a16_dequantize for more");
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, k, out_features, group_size);
  check(x.scalar_type() == scales.scalar_type(), "x and scales must have the same dtype");
  check.same_device(x, qweight, "qweight");
  if (bias) {
    check(bias->scalar_type() == x.scalar_type(), "bias and x must have the same dtype");
    check.shape(*bias, {out_features}, "bias", "(N,)");
    check.contiguous(*bias, "bias");
    check.same_device(x, *bias, "bias");
  }
  const Launch launch(x);
  Tensor y = launch.empty({m, out_features}, x.scalar_type());
  if (m == 0) return y;
  const W4A16LinearArgs args{data(x),
                             x.stride(0),
                             data(qweight),
                             data(scales),
                             data<uint8_t>(zeros),
                             data(bias),
                             y.data_ptr(),
                             static_cast<int>(m),
                             static_cast<int>(out_features),
                             static_cast<int>(k),
                             static_cast<int>(group_size)};
  check.launched(launch_w4a16_linear(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t variant) {
  constexpr Check check{"w4a16_gemm"};
  check(variant >= 0 && variant < kW4A16GemmVariants, "variant must be in 0 to ", kW4A16GemmVariants - 1, ", got ",
        variant);
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t m = x.size(0), k = x.size(1);
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, k, out_features, group_size);
  check.aligned(scales, 16, "scales");
  if (zeros) check.aligned(*zeros, 16, "zeros");
  check(x.scalar_type() == scales.scalar_type(), "x and scales must have the same dtype");
  check.same_device(x, qweight, "qweight");
  if (bias) {
    check(bias->scalar_type() == x.scalar_type(), "bias and x must have the same dtype");
    check.shape(*bias, {out_features}, "bias", "(N,)");
    check.contiguous(*bias, "bias");
    check.same_device(x, *bias, "bias");
  }
  // The smallest tile is 128 by 32, and its units of 128 columns are counted in 32 bits.
  check(k <= 1 << 24, "in_features must be at most ", 1 << 24, ", got ", k);
  check(m <= kMaxInt - 256 && (out_features / 128 + 1) * (m / 32 + 1) <= kMaxInt / (k / 128 + 1),
        "M * N * K is too large: ", m, " * ", out_features, " * ", k);
  const Launch launch(x);
  Tensor y = launch.empty({m, out_features}, x.scalar_type());
  if (m == 0) return y;
  const int rows = static_cast<int>(m), n = static_cast<int>(out_features), cols = static_cast<int>(k);
  const int form = static_cast<int>(variant);
  const int64_t floats = w4a16_gemm_workspace_floats(rows, n, cols, form, launch.sm_count());
  const Tensor workspace = launch.empty({floats}, ScalarType::Float);
  const W4A16GemmArgs args{data(x),
                           x.stride(0),
                           data(qweight),
                           data(scales),
                           data<uint8_t>(zeros),
                           data(bias),
                           y.data_ptr(),
                           static_cast<float*>(workspace.data_ptr()),
                           rows,
                           n,
                           cols,
                           static_cast<int>(group_size),
                           form};
  const cudaError_t error = launch_w4a16_gemm(args, dtype, launch.sm_count(), launch.stream());
  check(error != cudaErrorNoKernelImageForDevice, "variant ", form,
        " needs a GPU of compute capability 9.0, and kernels that were compiled for sm_90a");
  check.launched(error);
  return y;
}

Tensor w4a16_dequantize(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                        int64_t in_features, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_dequantize"};
  const Dtype dtype = check_packed(check, qweight, scales, zeros, in_features, out_features, group_size);
  const Launch launch(qweight);
  Tensor out = launch.empty({out_features, in_features}, scales.scalar_type());
  const W4A16DequantizeArgs args{data(qweight),
                                 data(scales),
                                 data<uint8_t>(zeros),
                                 out.data_ptr(),
                                 static_cast<int>(out_features),
                                 static_cast<int>(in_features),
                                 static_cast<int>(group_size)};
  check.launched(launch_w4a16_dequantize(args, dtype, launch.stream()));
  return out;
}

KvAppendSide append_side(const Tensor& input, const Tensor& cache, const Tensor& scale) {
  return {data(input),     input.stride(0), input.stride(1), input.stride(2), static_cast<int8_t*>(cache.data_ptr()),
          scale.data_ptr()};
}

void kv_int8_append(const Tensor& key, const Tensor& value, const Tensor& k_data, const Tensor& k_scale,
                    const Tensor& v_data, const Tensor& v_scale, int64_t start) {
  constexpr Check check{"kv_int8_append"};
  const Dtype dtype = check.float_dtype(key, "key");
  check.shape(key, {-1, -1, -1, -1}, "key", "(B, H_kv, q, D)");
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2), dim = key.size(3);
  check.shape(value, {batch, heads, tokens, dim}, "value", "of key");
  check(value.scalar_type() == key.scalar_type(), "key and value must have the same dtype");
  check(dim >= 1 && dim <= kMaxKvDim, "takes head dimensions up to ", kMaxKvDim, ", got ", dim);
  check((key.stride(3) == 1 && value.stride(3) == 1) || dim == 1,
        "key and value must be contiguous in their last dimension");
  check.shape(k_data, {-1, -1, -1, -1}, "k_data", "(B, H_kv, capacity, D)");
  const int64_t capacity = k_data.size(2);
  check_cache(check, k_data, k_scale, batch, heads, capacity, dim, "k_data", "k_scale");
  check_cache(check, v_data, v_scale, batch, heads, capacity, dim, "v_data", "v_scale");
  check(start >= 0 && start + tokens <= capacity, "tokens ", start, " to ", start + tokens,
        " do not fit a capacity of ", capacity);
  check.same_device(key, value, "value");
  check.same_device(key, k_data, "k_data");
  check.same_device(key, k_scale, "k_scale");
  check.same_device(key, v_data, "v_data");
  check.same_device(key, v_scale, "v_scale");
  if (key.numel() == 0) return;
  check(batch * heads * tokens <= kMaxInt, "takes up to 2^31 tokens and heads at once");
  const Launch launch(key);
  const KvAppendArgs args{{append_side(key, k_data, k_scale), append_side(value, v_data, v_scale)},
                          static_cast<int>(batch),
                          static_cast<int>(heads),
                          static_cast<int>(tokens),
                          static_cast<int>(dim),
                          capacity,
                          start};
  check.launched(launch_kv_int8_append(args, dtype, launch.stream()));
}

void kv_int8_dequantize(const Tensor& cache, const Tensor& scale, const Tensor& out) {
  constexpr Check check{"kv_int8_dequantize"};
  check.shape(cache, {-1, -1, -1, -1}, "data", "(B, H_kv, capacity, D)");
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2), dim = cache.size(3);
  check_cache(check, cache, scale, batch, heads, capacity, dim, "data", "scale");
  const Dtype dtype = check.float_dtype(out, "out");
  check.shape(out, {batch, heads, -1, dim}, "out", "(B, H_kv, length, D)");
  check.contiguous(out, "out");
  const int64_t length = out.size(2);
  check(length <= capacity, "length ", length, " is more than the capacity ", capacity);
  check(length * dim <= kMaxInt * 64, "length ", length, " is too long");
  check.same_device(cache, scale, "scale");
  check.same_device(cache, out, "out");
  if (out.numel() == 0) return;
  const Launch launch(cache);
  const KvDequantizeArgs args{data<int8_t>(cache),  data(scale), out.data_ptr(), batch * heads, capacity, length,
                              static_cast<int>(dim)};
  check.launched(launch_kv_int8_dequantize(args, dtype, launch.stream()));
}

void check_mask(const Check& check, const Tensor& query, const Tensor& mask, int64_t length) {
  check.dtype(mask, ScalarType::Bool, "mask", "bool");
  check.shape(mask, {query.size(0), -1}, "mask", "(B, >= length)");
  check(mask.size(1) >= length, "mask must have at least length ", length, " columns, got ", mask.size(1));
  check(mask.stride(1) == 1 || mask.size(1) == 1, "mask must be contiguous in its last dimension");
  check.same_device(query, mask, "mask");
}

Tensor attn_decode_int8(const Tensor& query, const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data,
                        const Tensor& v_scale, const std::optional<Tensor>& mask, int64_t length, double scaling) {
  constexpr Check check{"attn_decode_int8"};
  const Dtype dtype = check.float_dtype(query, "query");
  check.shape(query, {-1, -1, -1}, "query", "(B, H, D)");
  check.contiguous(query, "query");
  const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(2);
  check(dim >= 16 && dim <= kMaxKvDim && dim % 16 == 0, "takes head dimensions that are multiples of 16 up to ",
        kMaxKvDim, ", got ", dim);
  check.shape(k_data, {batch, -1, -1, dim}, "k_data", "(B, H_kv, capacity, D) with query's B and D");
  const int64_t kv_heads = k_data.size(1), capacity = k_data.size(2);
  check(kv_heads >= 1 && heads % kv_heads == 0, "the number of heads ", heads, " is not a multiple of H_kv ", kv_heads);
  check_cache(check, k_data, k_scale, batch, kv_heads, capacity, dim, "k_data", "k_scale");
  check_cache(check, v_data, v_scale, batch, kv_heads, capacity, dim, "v_data", "v_scale");
  check.aligned(k_data, 16, "k_data");
  check.aligned(v_data, 16, "v_data");
  check(length >= 1 && length <= capacity, "length must be in 1 to the capacity ", capacity, ", got ", length);
  check(batch <= 65535 && heads <= 65535, "takes up to 65535 rows and heads");
  check.same_device(query, k_data, "k_data");
  check.same_device(query, k_scale, "k_scale");
  check.same_device(query, v_data, "v_data");
  check.same_device(query, v_scale, "v_scale");
  if (mask) check_mask(check, query, *mask, length);
  const Launch launch(query);
  Tensor out = launch.empty({batch, heads, dim}, query.scalar_type());
  if (query.numel() == 0) return out;
  const Tensor scratch = launch.empty({attn_decode_scratch_floats(batch, heads, dim, length)}, ScalarType::Float);
  const AttnDecodeArgs args{data(query),
                            data<int8_t>(k_data),
                            data(k_scale),
                            data<int8_t>(v_data),
                            data(v_scale),
                            data<uint8_t>(mask),
                            mask ? mask->stride(0) : 0,
                            out.data_ptr(),
                            static_cast<float*>(scratch.data_ptr()),
                            static_cast<int>(batch),
                            static_cast<int>(heads),
                            static_cast<int>(kv_heads),
                            static_cast<int>(dim),
                            capacity,
                            length,
                            static_cast<float>(scaling)};
  check.launched(launch_attn_decode_int8(args, dtype, launch.stream()));
  return out;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("w4a16_linear", TORCH_BOX(&hf_fastpath::w4a16_linear));
  m.impl("w4a16_gemm", TORCH_BOX(&hf_fastpath::w4a16_gemm));
  m.impl("w4a16_dequantize", TORCH_BOX(&hf_fastpath::w4a16_dequantize));
  m.impl("kv_int8_append", TORCH_BOX(&hf_fastpath::kv_int8_append));
  m.impl("kv_int8_dequantize", TORCH_BOX(&hf_fastpath::kv_int8_dequantize));
  m.impl("attn_decode_int8", TORCH_BOX(&hf_fastpath::attn_decode_int8));
}
