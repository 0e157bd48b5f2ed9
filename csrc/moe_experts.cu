// A mixture of SwiGLU experts for a few rows of x, their weights packed int4: two kernels, with nothing that depends on
// data in their launches. See moe/decode.cuh.
//
// The first computes silu(gate) * up of every pair of a row and an expert; a CTA takes a tile of gate's outputs and the
// same one of up's. The second computes the experts' second products, and adds those of a row, each times its share, in
// the order of the row's experts: a CTA takes a tile of outputs for all experts, so that nothing has to be added among
// CTAs. It knows the experts before the first kernel ends, and asks for its weights then.
#include "moe/decode.cuh"

namespace hf_fastpath {
namespace {

using namespace moe;

template <typename T>
struct Params {
  const T* x;
  const T* shares;
  T* inner;
  T* y;
  Choices choices;
  Part gate_up, down;
  int hidden, intermediate;
};

// What a kernel is made for. kFew pairs: the second kernel finds room beside the first, each having half of a
// multiprocessor's registers. More: two CTAs of the first one share a multiprocessor. kAny: that, with a K of any size.
enum class Form { kFew, kMore, kAny };
constexpr int kFewPairs = 8;

constexpr int kGateUpWarps = 8;
template <Form kForm>
constexpr int kGateUpStages = kForm == Form::kFew ? 4 : 3;
template <Form kForm>
constexpr int kDownWarps = kForm == Form::kFew ? 8 : 16;
constexpr int kDownStages = 4;

template <typename W, Form kForm>
__global__ void __launch_bounds__(32 * kGateUpWarps, 2) gate_up_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  using Shared = Memory<W, 2, kGateUpWarps, kGateUpStages<kForm>>;
  auto& memory = *reinterpret_cast<Shared*>(dynamic_shared());
  const int half = p.gate_up.row_tiles / 2, row_tile = blockIdx.x % half, share = blockIdx.x / half;
  const int shares = gridDim.x / half;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  make_slots(memory.slots, memory.scratch(), p.choices, p.choices.top_k);
  const int count = memory.slots.count;
  const auto round = [&](int first, int pairs, const Partials<2>& sums) {
    for (int i = threadIdx.x; i < pairs * 16; i += 32 * kGateUpWarps) {
      const int pair = memory.slots.pairs[first + i / 16], out = i % 16;
      const T result = linear::swiglu<T>(sums.total(i / 16, out), sums.total(i / 16, 16 + out));
      p.inner[static_cast<int64_t>(pair) * p.intermediate + row_tile * 16 + out] = result;
    }
  };
  multiply_slots<kForm != Form::kAny>(
      memory, p.gate_up, p.x, row_tile, half, count * share / shares, count * (share + 1) / shares, [] {}, round);
}

template <typename W, Form kForm>
__global__ void __launch_bounds__(32 * kDownWarps<kForm>, kForm == Form::kFew ? 2 : 1)
    down_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  constexpr int kThreads = 32 * kDownWarps<kForm>;
  using Shared = Memory<W, 1, kDownWarps<kForm>, kDownStages>;
  auto& memory = *reinterpret_cast<Shared*>(dynamic_shared());
  const int row_tile = blockIdx.x, top_k = p.choices.top_k, pairs = p.choices.rows * top_k;
  float* const products =  // [pair][output]
      memory.partials() + Shared::partial_floats(p.down, pairs);
  // The kernel before let this one begin when it had waited for those that computed `experts`.
  make_slots(memory.slots, memory.scratch(), p.choices, 1);
  const auto ready = [] {
    wait_for_previous_kernel();
    let_next_kernel_begin();
  };
  const auto round = [&](int first, int count, const Partials<1>& sums) {
    for (int i = threadIdx.x; i < count * 16; i += kThreads) {
      const int pair = memory.slots.pairs[first + i / 16], out = i % 16;
      products[pair * 16 + out] = sums.total(i / 16, out) * to_float(p.shares[pair]);
    }
  };
  multiply_slots<kForm != Form::kAny>(memory, p.down, p.inner, row_tile, 1, 0, memory.slots.count, ready, round);
  __syncthreads();
  for (int i = threadIdx.x; i < p.choices.rows * 16; i += kThreads) {
    const int row = i / 16, out = i % 16;
    float sum = 0.0f;
    for (int k = 0; k < top_k; ++k) sum += products[(row * top_k + k) * 16 + out];
    p.y[static_cast<int64_t>(row) * p.hidden + row_tile * 16 + out] = from_float<T>(sum);
  }
}

template <typename Kernel, typename P>
cudaError_t launch_early(Kernel kernel, int grid, int threads, int bytes, cudaStream_t stream, const P& p) {
  if (has_early_launch()) return launch_kernel_early(kernel, grid, threads, bytes, stream, p);
  return launch_kernel_with_shared(kernel, grid, threads, bytes, stream, p);
}

template <typename W, Form kForm>
cudaError_t launch_gate_up(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  using Shared = Memory<W, 2, kGateUpWarps, kGateUpStages<kForm>>;
  const int half = p.gate_up.row_tiles / 2, shares = std::max(1, (kForm == Form::kFew ? 1 : 2) * sm_count / half);
  const int bytes = Shared::bytes(p.gate_up, p.choices.rows * p.choices.top_k);
  return launch_early(gate_up_kernel<W, kForm>, half * shares, 32 * kGateUpWarps, bytes, stream, p);
}

template <typename W, Form kForm>
cudaError_t launch_down(const Params<typename W::T>& p, cudaStream_t stream) {
  using Shared = Memory<W, 1, kDownWarps<kForm>, kDownStages>;
  const int pairs = p.choices.rows * p.choices.top_k;
  const int bytes = Shared::bytes(p.down, pairs) + 4 * pairs * 16;
  return launch_early(down_kernel<W, kForm>, p.down.row_tiles, 32 * kDownWarps<kForm>, bytes, stream, p);
}

template <typename T, Form kForm>
cudaError_t launch_form(const MoeExpertsArgs& a, const Params<T>& p, int sm_count, cudaStream_t stream) {
  const cudaError_t error = linear::for_int4_format<T>(
      a.gate_up.group_size, a.gate_up.zeros != nullptr,
      [&](auto format) { return launch_gate_up<decltype(format), kForm>(p, sm_count, stream); });
  if (error != cudaSuccess) return error;
  return linear::for_int4_format<T>(a.down.group_size, a.down.zeros != nullptr,
                                    [&](auto format) { return launch_down<decltype(format), kForm>(p, stream); });
}

template <typename T>
cudaError_t launch_rows(const MoeExpertsArgs& a, const Params<T>& p, int sm_count, cudaStream_t stream) {
  if (!is_plain(p.gate_up) || !is_plain(p.down)) return launch_form<T, Form::kAny>(a, p, sm_count, stream);
  return p.choices.rows * p.choices.top_k <= kFewPairs ? launch_form<T, Form::kFew>(a, p, sm_count, stream)
                                                       : launch_form<T, Form::kMore>(a, p, sm_count, stream);
}

template <typename T>
cudaError_t launch(const MoeExpertsArgs& a, int sm_count, cudaStream_t stream) {
  Params<T> p = {static_cast<const T*>(a.x),
                 static_cast<const T*>(a.shares),
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
    const cudaError_t error = launch_rows<T>(a, p, sm_count, stream);
    if (error != cudaSuccess) return error;
    const int64_t rows = p.choices.rows, pairs = rows * a.top_k;
    p.x += rows * p.hidden;
    p.y += rows * p.hidden;
    p.inner += pairs * p.intermediate;
    p.choices.experts += pairs;
    p.shares += pairs;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_moe_experts(const MoeExpertsArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.top_k < 1 || args.top_k > kMaxPairs) return cudaErrorInvalidValue;
  if (dtype == Dtype::kFloat16) return launch<__half>(args, sm_count, stream);
  return launch<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
