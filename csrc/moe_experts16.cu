// A mixture of SwiGLU experts for a few rows of x, their weights in 16 bits as transformers has them: two kernels, with
// nothing that depends on data in their launches. See moe16/products.cuh.
//
// The first computes silu(gate) * up of every pair of a row and an expert. A tile of the tensor core has eight of
// gate's outputs and the same eight of up's, and all tiles of all slots are divided evenly among the CTAs. The second
// computes the experts' second products, and adds those of a row, each times its share, in the order of the row's
// experts: a CTA takes a tile of outputs for all experts, so that nothing has to be added among CTAs. It knows the
// experts before the first kernel ends, and asks for its weights then.
#include "common/decode_epilogue.cuh"
#include "common/launch.cuh"
#include "kernels.h"
#include "moe16/products.cuh"

namespace hf_fastpath {
namespace {

using namespace moe16;

template <typename T>
struct Params {
  const T* x;
  const T* shares;
  const T* residual;
  T* inner;
  T* y;
  Choices choices;
  Weight gate_up, down;
  int hidden, intermediate;
};

constexpr int kGateTile = 8;  // outputs of gate, and of up, in a tile

// Of a warp's ring: as many as let a CTA of the one kernel and one of the other share a multiprocessor of an H100; and
// where a CTA cannot have as much memory.
template <int kTokenTiles>
constexpr int kManyStages = kTokenTiles == 1 ? 6 : 5;
constexpr int kFewStages = 3;
constexpr int kPrefetchSlots = 2, kPrefetchBytes = 64 * 1024;  // of each

// Asks for the weights that the second kernel's CTA of this number wants next, after those that it has asked for
// itself: the memory rests otherwise while that one waits for the last products of this one.
template <typename T>
__device__ __forceinline__ void prefetch_down(const Params<T>& p, const Slots& slots) {
  if (blockIdx.x * kTileRows >= p.hidden) return;
  const int tile_bytes = min(kTileRows * p.down.row_bytes, kPrefetchBytes);
  for (int slot = 1; slot < min(slots.count, 1 + kPrefetchSlots); ++slot) {
    const unsigned char* const tile = p.down.data + slots.expert[slot] * p.down.expert_bytes +
                                      blockIdx.x * kTileRows * static_cast<int64_t>(p.down.row_bytes);
    for (int i = threadIdx.x * 128; i < tile_bytes; i += kThreads * 128) prefetch_l2(tile + i);
  }
}

template <typename T, typename Memory>
__global__ void __launch_bounds__(kThreads, 2) gate_up_kernel(const Params<T> p) {
  auto& memory = *reinterpret_cast<Memory*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_begin();
  memory.make_slots(p.choices, p.choices.top_k);
  const Slots& slots = memory.slots;
  const int tiles = p.intermediate / kGateTile, cta = blockIdx.x;
  const int64_t items = static_cast<int64_t>(slots.count) * tiles;
  const int first = static_cast<int>(items * cta / gridDim.x), end = static_cast<int>(items * (cta + 1) / gridDim.x);
  const auto finish = [&](int slot, int tile, int turn) {
    const int row = threadIdx.x / kGateTile, output = threadIdx.x % kGateTile;
    if (row >= slots.size(slot)) return;
    const int64_t pair = slots.pairs[slots.begin[slot] + row];
    p.inner[pair * p.intermediate + tile * kGateTile + output] =
        linear::swiglu<T>(memory.total(turn, row, output), memory.total(turn, row, kGateTile + output));
  };
  const auto before_last = [&] { prefetch_down(p, slots); };
  multiply_items(
      memory, p.gate_up, p.x, Work{first / tiles, first % tiles, 0, tiles, end - first}, [] {}, before_last, finish);
}

template <typename T, typename Memory>
__global__ void __launch_bounds__(kThreads, 2) down_kernel(const Params<T> p) {
  auto& memory = *reinterpret_cast<Memory*>(dynamic_shared());
  float* const products = reinterpret_cast<float*>(memory.end());  // [pair][output]
  const int tile = blockIdx.x, top_k = p.choices.top_k;
  // The kernel before let this one begin when it had waited for those that computed `experts`.
  memory.make_slots(p.choices, 1);
  const Slots& slots = memory.slots;
  const auto ready = [] {
    wait_for_previous_kernel();
    let_next_kernel_begin();
  };
  const auto finish = [&](int slot, int, int turn) {
    const int row = threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
    if (row >= slots.size(slot)) return;
    const int pair = slots.pairs[slots.begin[slot] + row];
    products[pair * kTileRows + output] = memory.total(turn, row, output) * to_float(p.shares[pair]);
  };
  multiply_items(memory, p.down, p.inner, Work{0, tile, tile, tile + 1, slots.count}, ready, [] {}, finish);
  __syncthreads();
  for (int i = threadIdx.x; i < p.choices.rows * kTileRows; i += kThreads) {
    const int row = i / kTileRows, output = i % kTileRows;
    const float* const source = products + row * top_k * kTileRows + output;
    float sum = source[0];
    for (int k = 1; k < top_k; ++k) sum += source[k * kTileRows];
    const int64_t place = static_cast<int64_t>(row) * p.hidden + tile * kTileRows + output;
    if (p.residual) sum += to_float(p.residual[place]);
    p.y[place] = from_float<T>(sum);
  }
}

template <typename Kernel, typename P>
cudaError_t launch_early(Kernel kernel, int grid, int bytes, cudaStream_t stream, const P& p) {
  if (has_early_launch()) return launch_kernel_early(kernel, grid, kThreads, bytes, stream, p);
  return launch_kernel_with_shared(kernel, grid, kThreads, bytes, stream, p);
}

template <typename T, typename Memory>
cudaError_t launch_form(const Params<T>& p, int sm_count, cudaStream_t stream) {
  const int pairs = p.choices.rows * p.choices.top_k, most = pairs * (p.intermediate / kGateTile);
  const int bytes = static_cast<int>(sizeof(Memory)), product_bytes = 4 * pairs * kTileRows;
  const cudaError_t error = launch_early(gate_up_kernel<T, Memory>, std::min(sm_count, most), bytes, stream, p);
  if (error != cudaSuccess) return error;
  return launch_early(down_kernel<T, Memory>, p.hidden / kTileRows, bytes + product_bytes, stream, p);
}

template <typename T, int kTokenTiles>
cudaError_t launch_rows(const Params<T>& p, int sm_count, cudaStream_t stream) {
  using Large = Memory<kTokenTiles, kManyStages<kTokenTiles>>;
  const int most_products = 4 * kMaxPairs * kTileRows;
  return static_cast<int>(sizeof(Large)) + most_products <= max_shared_bytes()
             ? launch_form<T, Large>(p, sm_count, stream)
             : launch_form<T, Memory<kTokenTiles, kFewStages>>(p, sm_count, stream);
}

// (2 * intermediate, hidden), of which a tile has rows of both halves; or (n, k).
Weight make_weight(const void* data, int n, int k, int tile_rows, int half_rows) {
  const int64_t row_bytes = 2 * static_cast<int64_t>(k);
  return {static_cast<const unsigned char*>(data),
          n * row_bytes,
          half_rows * row_bytes,
          static_cast<int>(row_bytes),
          tile_rows,
          k,
          (k + kUnitCols - 1) / kUnitCols};
}

template <typename T>
cudaError_t launch(const MoeExperts16Args& a, int sm_count, cudaStream_t stream) {
  Params<T> p = {static_cast<const T*>(a.x),
                 static_cast<const T*>(a.shares),
                 static_cast<const T*>(a.residual),
                 static_cast<T*>(a.inner),
                 static_cast<T*>(a.y),
                 {a.experts, 0, a.top_k, a.expert_count},
                 make_weight(a.gate_up, 2 * a.intermediate, a.hidden, kGateTile, a.intermediate),
                 make_weight(a.down, a.hidden, a.intermediate, kTileRows, kTileRows / 2),
                 a.hidden,
                 a.intermediate};
  const int most_rows = kMaxPairs / a.top_k;
  for (int done = 0; done < a.rows; done += p.choices.rows) {
    p.choices.rows = std::min(most_rows, a.rows - done);
    const cudaError_t error =
        p.choices.rows <= kSlotPairs ? launch_rows<T, 1>(p, sm_count, stream) : launch_rows<T, 2>(p, sm_count, stream);
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

cudaError_t launch_moe_experts16(const MoeExperts16Args& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.top_k < 1 || args.top_k > kMaxPairs) return cudaErrorInvalidValue;
  if (dtype == Dtype::kFloat16) return launch<__half>(args, sm_count, stream);
  return launch<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
