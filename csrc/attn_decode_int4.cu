// Attention of one new token a row over an int4 KV cache (KIVI), read as int4; see attn/kernel.cuh.
#include "attn/format_int4.cuh"
#include "attn/kernel.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kPadded, bool kWhole>
struct Int4 {
  using Format = attn::Int4Format<T, kPadded, kWhole, attn::Tuning<4, 2, 2, 8, 48, kPadded == 256 ? 1 : 3>>;
};

}  // namespace

int64_t attn_decode_int4_scratch_floats(const AttnDecodeArgs& args) {
  return attn::scratch_floats_for<Int4>(args);
}
cudaError_t launch_attn_decode_int4(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  return attn::launch_for<Int4>(args, dtype, stream);
}

}  // namespace hf_fastpath
