// Attention of one new token a row over an fp8 KV cache, read as fp8; see attn/kernel.cuh.
#include "attn/format_bytes.cuh"
#include "attn/kernel.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kPadded, bool kWhole>
struct Fp8 {
  using Format = attn::ByteFormat<T, kPadded, kWhole, attn::Tuning<4, 2, 2, 8, 32, kPadded == 256 ? 2 : 3>,
                                  attn::Fp8Codec, attn::Scales::kOfGroup>;
};

}  // namespace

int64_t attn_decode_fp8_scratch_floats(const AttnDecodeArgs& args) {
  return attn::scratch_floats_for<Fp8>(args);
}
cudaError_t launch_attn_decode_fp8(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  return attn::launch_for<Fp8>(args, dtype, stream);
}

}  // namespace hf_fastpath
