// Attention of one new token a row over the slots of an H2O cache, fp8 with a scale each; see
// attn/kernel.cuh. The attention that every slot gets is counted by a second kernel, when the sums of weights are
// known.
#include "attn/format_bytes.cuh"
#include "attn/kernel.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kPadded, bool kWhole>
struct H2O {
  using Format = attn::ByteFormat<T, kPadded, kWhole, attn::Tuning<4, 2, 2, 8, 32, kPadded == 256 ? 2 : 3>,
                                  attn::Fp8Codec, attn::Scales::kOfSlot>;
};

constexpr int kCountThreads = 128;

// A CTA a row, KV head and 128 slots. A slot's weights are added in the order of the heads.
__global__ void __launch_bounds__(kCountThreads) h2o_count_kernel(const H2OCountArgs a) {
  const int64_t pair = blockIdx.x, batch = pair / a.kv_heads;
  const int ratio = a.heads / a.kv_heads;
  const int64_t first_head = batch * a.heads + pair % a.kv_heads * ratio;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  int* const counts = a.counts + 2 * pair;
  const int seen = counts[0], used = min(seen, a.capacity);
  const uint8_t* const mask = a.mask ? a.mask + batch * a.mask_row_stride : nullptr;
  const bool padding = mask && seen > 0 && !(seen <= a.mask_columns && mask[seen - 1]);
  const int slot = static_cast<int>(blockIdx.y) * kCountThreads + static_cast<int>(threadIdx.x);
  if (padding) {  // what padding attends to says nothing
    if (slot == 0 && counts[1] == seen - 1) counts[1] = seen;
    return;
  }
  if (slot >= used) return;
  float gained = 0.0f;
  for (int head = 0; head < ratio; ++head) {
    const float2 total = a.totals[first_head + head];
    const float score = a.slot_scores[(first_head + head) * a.capacity + slot];
    if (total.y != 0.0f) gained += exp2f(score - total.x) * total.y;  // 0: nothing was attended
  }
  a.scores[pair * a.capacity + slot] += gained;
}

}  // namespace

int64_t attn_decode_h2o_scratch_floats(const AttnDecodeArgs& args) {
  return attn::scratch_floats_for<H2O>(args);
}
cudaError_t launch_attn_decode_h2o(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  return attn::launch_for<H2O>(args, dtype, stream);
}

cudaError_t launch_h2o_count(const H2OCountArgs& args, cudaStream_t stream) {
  const dim3 grid(args.batch * args.kv_heads, (args.capacity + kCountThreads - 1) / kCountThreads);
  if (has_early_launch()) return launch_kernel_early(h2o_count_kernel, grid, kCountThreads, 0, stream, args);
  return launch_kernel(h2o_count_kernel, grid, kCountThreads, stream, args);
}

}  // namespace hf_fastpath
