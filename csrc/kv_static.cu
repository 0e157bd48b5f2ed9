// Keys and values in full precision: nothing is rounded but what the transform of keys rounds.
#include "kv/append_tokens.cuh"

namespace hf_fastpath {
namespace {

struct Plain : kv::InOrder {
  using Storage = KvStaticStorage;
  using Row = uint4;

  template <typename T, int kLanes>
  static __device__ __forceinline__ Row quantize(const uint4& x) {
    return x;
  }
  static __device__ __forceinline__ void store(const Storage& s, kv::Side side, int64_t entry, int dim, int lane,
                                               const Row& row) {
    uint16_t* data = static_cast<uint16_t*>(side == kv::Side::kKey ? s.keys : s.values);
    reinterpret_cast<uint4*>(data + entry * dim)[lane] = row;
  }
};

}  // namespace

cudaError_t launch_kv_static_append(const KvNewTokens& tokens, const KvStaticStorage& storage, Dtype dtype,
                                    cudaStream_t stream) {
  return kv::launch_append_tokens<Plain>(tokens, storage, dtype, stream);
}

}  // namespace hf_fastpath
