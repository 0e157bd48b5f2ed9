// A mixture of SwiGLU experts for a few rows of x, their weights packed int4: two kernels, with nothing that depends on
// data in their launches. See moe/decode.cuh.
//
// The first computes silu(gate) * up of every pair of a row and an expert, from a tile of gate's outputs and the same
// one of up's. The second computes the experts' second products, and adds those of a row, each times its share, in the
// order of the row's experts, and then the residual: a CTA takes a tile of outputs for all experts, so that nothing has
// to be added among CTAs. It knows the experts before the first kernel ends, but does not find room beside that one,
// which brings the first of its weights to the L2 when its own have been asked for.
//
// One row has kernels of its own: moe/one_row.cuh.
#include "moe/one_row.cuh"
#include "moe/whole_slots.cuh"

namespace hf_fastpath {
namespace {

using namespace moe;

template <typename T>
struct Params {
  const T* x;
  const T* shares;
  const T* residual;  // or nullptr
  T* inner;
  T* y;
  Choices choices;
  Part gate_up, down;
  int hidden, intermediate;
};

// What memory delivers between the first kernel's last weights and the second's first.
constexpr int kAheadBytes = 12 << 20, kLineBytes = 128;

constexpr int kGateUpWarps = 8;  // each has slots of its own
constexpr int kGateUpStages = 3;
constexpr int kDownWarps = 16, kDownStages = 4;

// Asks for the second product's weights of the first slots' experts, kAheadBytes of them: a thread's share.
__device__ __forceinline__ void ask_for_next_weights(const Slots& slots, const Part& p) {
  const int64_t tile_bytes = static_cast<int64_t>(p.row_tiles) * p.col_tiles * 512;
  const int64_t zero_bytes = p.zeros ? static_cast<int64_t>(p.row_tiles) * p.groups * 16 : 0;
  const int64_t scale_bytes = static_cast<int64_t>(p.row_tiles) * p.groups * 32;
  const auto lines_of = [](int64_t bytes) { return static_cast<int>((bytes + kLineBytes - 1) / kLineBytes); };
  const int scales_from = lines_of(tile_bytes), zeros_from = scales_from + lines_of(scale_bytes);
  const int expert_lines = zeros_from + lines_of(zero_bytes);
  const int all = static_cast<int>(min(int64_t{slots.count} * expert_lines, int64_t{kAheadBytes / kLineBytes}));
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
    const int64_t expert = slots.expert[i / expert_lines], line = i % expert_lines;
    const unsigned char* from = p.qweight + expert * tile_bytes + line * kLineBytes;
    if (line >= scales_from) from = p.scales + expert * scale_bytes + (line - scales_from) * kLineBytes;
    if (line >= zeros_from) from = p.zeros + expert * zero_bytes + (line - zeros_from) * kLineBytes;
    prefetch_l2(from);
  }
}

// kPlain: see is_plain().
template <typename W, bool kPlain>
__global__ void __launch_bounds__(32 * kGateUpWarps, 2) gate_up_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  using Shared = Memory<W, 2, kGateUpWarps, kGateUpStages>;
  auto& memory = *reinterpret_cast<Shared*>(dynamic_shared());
  const Slots& slots = memory.slots;
  const int half = p.gate_up.row_tiles / 2;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  make_slots(memory.slots, memory.scratch(), p.choices, p.choices.top_k);
  const auto store = [&](int place, int block, int out, float gate, float up) {
    p.inner[static_cast<int64_t>(slots.pairs[place]) * p.intermediate + block * 16 + out] = linear::swiglu<T>(gate, up);
  };
  const auto finish = [&](int slot, int block, const float (&sums)[2][1][4]) {
    const int lane = threadIdx.x % 32, first = slots.begin[slot], size = slots.size(slot);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * (lane % 4) + i % 2, out = lane / 4 + 8 * (i / 2);
      if (column < size) store(first + column, block, out, sums[0][0][i], sums[1][0][i]);
    }
  };
  const auto all_asked = [&] { ask_for_next_weights(slots, p.down); };
  multiply_whole_slots<kPlain>(memory, p.gate_up, p.x, half, all_asked, finish);
}

template <typename W, bool kPlain>
__global__ void __launch_bounds__(32 * kDownWarps, 1) down_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  constexpr int kThreads = 32 * kDownWarps;
  using Shared = Memory<W, 1, kDownWarps, kDownStages>;
  auto& memory = *reinterpret_cast<Shared*>(dynamic_shared());
  const int row_tile = blockIdx.x, top_k = p.choices.top_k, pairs = p.choices.rows * top_k;
  float* const products = memory.partials() + Shared::partial_floats(p.down);  // [pair][output]
  const auto place_of = [&](int i) { return static_cast<int64_t>(i / 16) * p.hidden + row_tile * 16 + i % 16; };
  // The kernel before let this one begin when it had waited for those that computed `experts`.
  make_slots(memory.slots, memory.scratch(), p.choices, 1);
  float share = 0.0f, residual = 0.0f;
  const auto ready = [&] {
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const int i = threadIdx.x;
    if (i < pairs) share = to_float(p.shares[i]);
    if (p.residual && i < p.choices.rows * 16) residual = to_float(p.residual[place_of(i)]);
  };
  const auto round = [&](int first, int count, const Partials<1>& sums) {
    for (int i = threadIdx.x; i < count * 16; i += kThreads) {
      products[memory.slots.pairs[first + i / 16] * 16 + i % 16] = sums.total(i / 16, i % 16);
    }
  };
  multiply_slots<kPlain>(memory, p.down, p.inner, row_tile, 1, 0, memory.slots.count, ready, round);
  if (threadIdx.x < pairs) memory.slots.share[threadIdx.x] = share;
  __syncthreads();
  for (int i = threadIdx.x; i < p.choices.rows * 16; i += kThreads) {
    const int first = i / 16 * top_k;
    float sum = 0.0f;
    for (int k = 0; k < top_k; ++k) sum = fmaf(products[(first + k) * 16 + i % 16], memory.slots.share[first + k], sum);
    if (p.residual) sum += i < kThreads ? residual : to_float(p.residual[place_of(i)]);
    p.y[place_of(i)] = from_float<T>(sum);
  }
}

template <typename Kernel, typename P>
cudaError_t launch_early(Kernel kernel, int grid, int threads, int bytes, cudaStream_t stream, const P& p) {
  if (has_early_launch()) return launch_kernel_early(kernel, grid, threads, bytes, stream, p);
  return launch_kernel_with_shared(kernel, grid, threads, bytes, stream, p);
}

template <typename W, bool kPlain>
cudaError_t launch_gate_up(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  using Shared = Memory<W, 2, kGateUpWarps, kGateUpStages>;
  return launch_early(gate_up_kernel<W, kPlain>, 2 * sm_count, 32 * kGateUpWarps, sizeof(Shared), stream, p);
}

template <typename W, bool kPlain>
cudaError_t launch_down(Params<typename W::T> p, cudaStream_t stream) {
  using Shared = Memory<W, 1, kDownWarps, kDownStages>;
  const int pairs = p.choices.rows * p.choices.top_k, products = 4 * pairs * 16;
  Shared::set_round(p.down, pairs, products);
  const int bytes = Shared::bytes(p.down) + products;
  return launch_early(down_kernel<W, kPlain>, p.down.row_tiles, 32 * kDownWarps, bytes, stream, p);
}

template <typename T, bool kPlain>
cudaError_t launch_form(const MoeExpertsArgs& a, const Params<T>& p, int sm_count, cudaStream_t stream) {
  const cudaError_t error = linear::for_int4_format<T>(
      a.gate_up.group_size, a.gate_up.zeros != nullptr,
      [&](auto format) { return launch_gate_up<decltype(format), kPlain>(p, sm_count, stream); });
  if (error != cudaSuccess) return error;
  return linear::for_int4_format<T>(a.down.group_size, a.down.zeros != nullptr,
                                    [&](auto format) { return launch_down<decltype(format), kPlain>(p, stream); });
}

digits::Packed packed(const Part& p) {
  return {p.qweight, p.scales, p.zeros, p.k / digits::kUnitCols};
}

template <typename T>
cudaError_t launch_many(const MoeExpertsArgs& a, const Params<T>& p, int sm_count, cudaStream_t stream) {
  return is_plain(p.gate_up) && is_plain(p.down) ? launch_form<T, true>(a, p, sm_count, stream)
                                                 : launch_form<T, false>(a, p, sm_count, stream);
}

// By the kernels for one row, if they take it.
template <typename T>
cudaError_t launch_alone(const MoeExpertsArgs& a, const Params<T>& p, int sm_count, cudaStream_t stream) {
  const OneRowParams<T> row = {p.x,      p.choices.experts, p.shares,       p.residual, p.inner,
                               p.y,      packed(p.gate_up), packed(p.down), a.top_k,    a.expert_count,
                               a.hidden, a.intermediate};
  return linear::for_int4_format<T>(a.gate_up.group_size, a.gate_up.zeros != nullptr, [&](auto first) {
    return linear::for_int4_format<T>(a.down.group_size, a.down.zeros != nullptr, [&](auto second) {
      using W = decltype(first);
      using V = decltype(second);
      return takes_one_row<W, V>(row) ? launch_one_row<W, V>(row, stream) : launch_many(a, p, sm_count, stream);
    });
  });
}

template <typename T>
cudaError_t launch(const MoeExpertsArgs& a, const void* residual, int sm_count, cudaStream_t stream) {
  Params<T> p = {static_cast<const T*>(a.x),
                 static_cast<const T*>(a.shares),
                 static_cast<const T*>(residual),
                 static_cast<T*>(a.inner),
                 static_cast<T*>(a.y),
                 {a.experts, 0, a.top_k, a.expert_count},
                 make_part(a.gate_up, 2 * a.intermediate, a.hidden, a.gate_up.group_size),
                 make_part(a.down, a.hidden, a.intermediate, a.down.group_size),
                 a.hidden,
                 a.intermediate};
  const int most_rows = kMaxPairs / a.top_k;
  for (int done = 0; done < a.rows; done += p.choices.rows) {
    p.choices.rows = std::min(most_rows, a.rows - done);
    const cudaError_t error =
        a.rows == 1 ? launch_alone<T>(a, p, sm_count, stream) : launch_many<T>(a, p, sm_count, stream);
    if (error != cudaSuccess) return error;
    const int64_t rows = p.choices.rows, pairs = rows * a.top_k;
    p.x += rows * p.hidden;
    p.y += rows * p.hidden;
    if (p.residual) p.residual += rows * p.hidden;
    p.inner += pairs * p.intermediate;
    p.choices.experts += pairs;
    p.shares += pairs;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_moe_experts(const MoeExpertsArgs& args, const void* residual, Dtype dtype, int sm_count,
                               cudaStream_t stream) {
  if (args.top_k < 1 || args.top_k > kMaxPairs) return cudaErrorInvalidValue;
  if (dtype == Dtype::kFloat16) return launch<__half>(args, residual, sm_count, stream);
  return launch<__nv_bfloat16>(args, residual, sm_count, stream);
}

}  // namespace hf_fastpath
