// Attention of one new token a row over an int8 KV cache, read as int8; see attn/kernel.cuh.
#include "attn/format_bytes.cuh"
#include "attn/step.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kPadded, bool kWhole>
struct Int8 {
  using Format = attn::ByteFormat<T, kPadded, kWhole, attn::Tuning<4, 2, 2, 8, 32, kPadded == 256 ? 2 : 3>,
                                  attn::Int8Codec, attn::Scales::kOfToken>;
};

}  // namespace

int64_t attn_decode_int8_scratch_floats(const AttnDecodeArgs& args) {
  return attn::scratch_floats_for<Int8>(args);
}
cudaError_t launch_attn_decode_int8(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  return attn::launch_for<Int8>(args, dtype, stream);
}

cudaError_t launch_attn_step_int8(const AttnDecodeArgs& args, const KvNewTokens& tokens, const KvInt8Storage& storage,
                                  Dtype dtype, cudaStream_t stream) {
  if (attn::step_fits(args, tokens) && attn::has_few_parts_for<Int8>(args)) {
    return attn::launch_step_for<Int8, kv::Int8>(args, tokens, storage, dtype, stream);
  }
  const cudaError_t error = launch_kv_int8_append(tokens, storage, dtype, stream);
  return error != cudaSuccess ? error : launch_attn_decode_int8(args, dtype, stream);
}

}  // namespace hf_fastpath
