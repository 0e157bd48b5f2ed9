// What the operators (ops_*.cpp) share: checks that say what is wrong, torch's current stream, output tensors. These
// files are the only ones that know torch, and only its stable ABI, so that one library serves every torch from 2.11
// on. Schemas are defined in hf_fastpath/ops/*.py; tests/test_op_schemas.py compares them with the signatures in
// ops_*.cpp, since the ABI does not check types.
#pragma once

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
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
    if (error != cudaSuccess) (*this)(false, "CUDA launch failed: ", cudaGetErrorString(error));
  }
};

// torch's C functions return 0 for success. (The headers' own check has another name in every torch.)
inline void require_success(AOTITorchError code, const char* what) {
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
                         : dtype == ScalarType::Long     ? aoti_torch_dtype_int64()
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

}  // namespace hf_fastpath
