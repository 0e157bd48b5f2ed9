// Attention of one new token a row over keys and values as the model has them; see attn/kernel.cuh.
#include "attn/format_16bit.cuh"
#include "attn/step.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kPadded, bool kWhole>
struct Static {
  using Format = attn::StaticFormat<T, kPadded, kWhole, attn::Tuning<4, 2, 2, 4, 32, kPadded == 256 ? 1 : 3>>;
};

}  // namespace

int64_t attn_decode_static_scratch_floats(const AttnDecodeArgs& args) {
  return attn::scratch_floats_for<Static>(args);
}
cudaError_t launch_attn_decode_static(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  return attn::launch_for<Static>(args, dtype, stream);
}

cudaError_t launch_attn_step_static(const AttnDecodeArgs& args, const KvNewTokens& tokens,
                                    const KvStaticStorage& storage, Dtype dtype, cudaStream_t stream) {
  if (attn::step_fits(args, tokens) && attn::has_few_parts_for<Static>(args)) {
    return attn::launch_step_for<Static, kv::Plain>(args, tokens, storage, dtype, stream);
  }
  const cudaError_t error = launch_kv_static_append(tokens, storage, dtype, stream);
  return error != cudaSuccess ? error : launch_attn_decode_static(args, dtype, stream);
}

}  // namespace hf_fastpath
