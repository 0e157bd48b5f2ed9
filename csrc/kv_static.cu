// Keys and values in full precision: nothing is rounded but what the transform of keys rounds.
#include "kv/in_order.cuh"

namespace hf_fastpath {

cudaError_t launch_kv_static_append(const KvNewTokens& tokens, const KvStaticStorage& storage, Dtype dtype,
                                    cudaStream_t stream) {
  return kv::launch_append_tokens<kv::Plain>(tokens, storage, dtype, stream);
}

}  // namespace hf_fastpath
