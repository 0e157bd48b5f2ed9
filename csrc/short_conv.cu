// LFM2's gated short convolution, out[t] = C[t] * (sum over l of weight[l] * (B x)[t - taps + 1 + l] + bias), depthwise
// and causal, going on from the last inputs of an earlier call, which are replaced by the last ones of this.
//
// A thread takes some neighbouring channels of a chunk of tokens and keeps the last inputs of its channels in
// registers. What was before a chunk it multiplies anew, except before the first: the thread that has a channel's first
// chunk reads the state, and being the only one that does, it also writes it.
//
// B x, the sum and the result are each rounded to the dtype, as separate operations do; the sum is in fp32, from the
// bias and the oldest tap on.
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 64;
constexpr int kManyTokens = 32, kFewTokens = 8;  // of a chunk; at least kMaxConvTaps - 1
constexpr int kAtOnce = 4;                       // tokens of a chunk that are loaded together

// kCount neighbouring values as they are in memory; whole vectors are aligned to 16 bytes there.
template <typename T, int kCount>
struct Values {
  static constexpr int kWords = kCount * sizeof(T) % 16 ? 0 : kCount * sizeof(T) / 16;
  alignas(16) T value[kCount];

  // kWeights: no kernel writes it meanwhile. Only such memory may be read by the non-coherent path: those loads move
  // to before wait_for_previous_kernel().
  template <bool kWeights = false>
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kWords > 0) {
      const uint4* source = reinterpret_cast<const uint4*>(p);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words()[i] = kWeights ? load_early16(source + i) : source[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = p[i];
    }
  }
  __device__ __forceinline__ void store(T* p) {
    if constexpr (kWords > 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(p)[i] = words()[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) p[i] = value[i];
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return to_float(value[i]); }

 private:
  __device__ __forceinline__ uint4* words() { return reinterpret_cast<uint4*>(value); }
};

// B, x and C of a token in a thread's channels.
template <typename T, int kChannels>
struct Token {
  Values<T, kChannels> b, c, x;
  bool real;

  // B x; 0 for a token that is masked, whatever it holds.
  __device__ __forceinline__ float gated(int channel) const {
    return real ? to_float(from_float<T>(b[channel] * x[channel])) : 0.0f;
  }
};

// A thread's channels in one row of the batch.
template <typename T, int kChannels>
struct Row {
  const T* bcx;
  const uint8_t* mask;

  __device__ __forceinline__ Row(const ShortConvArgs& p, int64_t batch, int channel)
      : bcx(static_cast<const T*>(p.bcx) + batch * p.stride_batch + channel),
        mask(p.mask ? p.mask + batch * p.mask_stride_batch : nullptr) {}

  __device__ __forceinline__ bool real(const ShortConvArgs& p, int token) const {
    return mask == nullptr || mask[token * p.mask_stride_token];
  }
  __device__ __forceinline__ void load(Token<T, kChannels>& target, const ShortConvArgs& p, int token) const {
    const T* source = bcx + token * p.stride_token;
    target.b.load(source);
    target.c.load(source + p.channels);
    target.x.load(source + 2 * p.channels);
    target.real = real(p, token);
  }
  // Tokens up to the last one that is not masked. All lanes of a warp ask together.
  __device__ __forceinline__ int end(const ShortConvArgs& p) const {
    if (mask == nullptr) return p.tokens;
    for (int last = p.tokens; last > 0; last -= 32) {
      const int token = last - 1 - static_cast<int>(threadIdx.x % 32);
      const unsigned end = token >= 0 && real(p, max(token, 0)) ? token + 1 : 0;
      if (const unsigned latest = __reduce_max_sync(kFullWarp, end)) return latest;
    }
    return 0;
  }
};

// The weights of a thread's channels, and their last inputs, the oldest first.
template <typename T, int kTaps, int kChannels>
struct Convolution {
  using State = Values<T, kTaps * kChannels>;
  State weight;
  Values<T, kChannels> bias = {};
  float window[kTaps][kChannels] = {};

  __device__ __forceinline__ Convolution(const ShortConvArgs& p, int channel) {
    weight.template load<true>(static_cast<const T*>(p.weight) + static_cast<int64_t>(channel) * kTaps);
    if (p.bias) bias.template load<true>(static_cast<const T*>(p.bias) + channel);
  }
  __device__ __forceinline__ void go_on_from(const State& state) {
#pragma unroll
    for (int i = 0; i < kTaps * kChannels; ++i) window[i % kTaps][i / kTaps] = state[i];
  }
  __device__ __forceinline__ void push(const Token<T, kChannels>& token) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int tap = 0; tap + 1 < kTaps; ++tap) window[tap][c] = window[tap + 1][c];
      window[kTaps - 1][c] = token.gated(c);
    }
  }
  // Of the token that was pushed last.
  __device__ __forceinline__ Values<T, kChannels> out(const Token<T, kChannels>& token) const {
    Values<T, kChannels> out;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float sum = bias[c];
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sum = fmaf(window[tap][c], weight[c * kTaps + tap], sum);
      out.value[c] = from_float<T>(token.c[c] * to_float(from_float<T>(sum)));
    }
    return out;
  }
};

template <typename T, int kTaps>
__device__ __forceinline__ T* state_of(const ShortConvArgs& p, int64_t batch, int channel) {
  return static_cast<T*>(p.state) + (batch * p.channels + channel) * kTaps;
}

// One token a row.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ ShortConvArgs p) {
  const int channel = (blockIdx.x * kThreads + threadIdx.x) * kChannels;
  const int64_t batch = blockIdx.y;
  if (channel >= p.channels) return;
  Convolution<T, kTaps, kChannels> convolution(p, channel);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  Token<T, kChannels> token;
  Row<T, kChannels>(p, batch, channel).load(token, p, 0);
  T* const target = state_of<T, kTaps>(p, batch, channel);
  Values<T, kTaps * kChannels> state;
  state.load(target);
  convolution.go_on_from(state);
  convolution.push(token);
  convolution.out(token).store(static_cast<T*>(p.out) + batch * p.channels + channel);
  if (!token.real) return;
#pragma unroll
  for (int i = 0; i < kTaps * kChannels; ++i) {
    state.value[i] = from_float<T>(convolution.window[i % kTaps][i / kTaps]);
  }
  state.store(target);
}

// The state after the call: of the inputs that it held and the tokens' behind them, those from `end` on.
template <typename T, int kTaps, int kChannels>
__device__ __forceinline__ void write_state(const ShortConvArgs& p, const Row<T, kChannels>& row, int end, T* target) {
  Values<T, kTaps * kChannels> state;
  state.load(target);
#pragma unroll 1
  for (int i = 0; i < min(end, kTaps); ++i) {  // by moving them to the place before: registers have no indices
#pragma unroll
    for (int j = 0; j + 1 < kTaps * kChannels; ++j) state.value[j] = state.value[j + 1];
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (end - kTaps + tap < 0) continue;
    Token<T, kChannels> token;
    row.load(token, p, end - kTaps + tap);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) state.value[c * kTaps + tap] = from_float<T>(token.gated(c));
  }
  state.store(target);
}

template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kThreads) chunks_kernel(const __grid_constant__ ShortConvArgs p, int chunk) {
  const int channel = (blockIdx.y * kThreads + threadIdx.x) * kChannels, first = blockIdx.x * chunk;
  const int64_t batch = blockIdx.z;
  const bool there = channel < p.channels;
  Convolution<T, kTaps, kChannels> convolution(p, there ? channel : 0);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Row<T, kChannels> row(p, batch, channel);
  const int end = first == 0 ? row.end(p) : 0;  // all lanes of a warp ask, also those without channels
  if (!there) return;
  T* const target = state_of<T, kTaps>(p, batch, channel);
  if (first == 0) {
    Values<T, kTaps * kChannels> state;
    state.load(target);
    convolution.go_on_from(state);
  } else {
#pragma unroll
    for (int tap = 1; tap < kTaps; ++tap) {
      Token<T, kChannels> token;
      row.load(token, p, first - kTaps + tap);
      convolution.push(token);
    }
  }
  const int stop = min(first + chunk, p.tokens);
  T* out = static_cast<T*>(p.out) + batch * p.tokens * p.channels + channel;
  for (int next = first; next < stop; next += kAtOnce) {
    Token<T, kChannels> tokens[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row.load(tokens[i], p, min(next + i, stop - 1));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // beyond the last too: a branch would let the compiler move loads behind it
      convolution.push(tokens[i]);
      Values<T, kChannels> result = convolution.out(tokens[i]);
      if (next + i < stop) result.store(out + static_cast<int64_t>(next + i) * p.channels);
    }
  }
  if (first == 0) write_state<T, kTaps>(p, row, end, target);
}

template <typename T, int kTaps, int kChannels>
cudaError_t launch(const ShortConvArgs& p, int sm_count, cudaStream_t stream) {
  const int groups = (p.channels + kChannels - 1) / kChannels, columns = (groups + kThreads - 1) / kThreads;
  if (p.tokens == 1) {
    const dim3 grid(columns, p.batch);
    return launch_kernel_early_if_possible(step_kernel<T, kTaps, kChannels>, grid, kThreads, stream, p);
  }
  const int64_t threads = static_cast<int64_t>(p.batch) * groups * ((p.tokens + kManyTokens - 1) / kManyTokens);
  const int chunk = threads >= 512 * static_cast<int64_t>(sm_count) ? kManyTokens : kFewTokens;
  const dim3 grid((p.tokens + chunk - 1) / chunk, columns, p.batch);
  return launch_kernel_early_if_possible(chunks_kernel<T, kTaps, kChannels>, grid, kThreads, stream, p, chunk);
}

template <typename T, int kTaps>
cudaError_t launch_for_alignment(const ShortConvArgs& p, int sm_count, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  bool vectors = p.channels % kWide == 0 && p.stride_token % kWide == 0 && p.stride_batch % kWide == 0;
  for (const void* each : {p.bcx, p.weight, p.bias, static_cast<const void*>(p.state)}) {
    vectors = vectors && aligned_to(each, 16);
  }
  return vectors ? launch<T, kTaps, kWide>(p, sm_count, stream) : launch<T, kTaps, 1>(p, sm_count, stream);
}

template <typename T>
cudaError_t launch_for_taps(const ShortConvArgs& p, int sm_count, cudaStream_t stream) {
  switch (p.taps) {
    case 2:
      return launch_for_alignment<T, 2>(p, sm_count, stream);
    case 3:
      return launch_for_alignment<T, 3>(p, sm_count, stream);
    case 4:
      return launch_for_alignment<T, 4>(p, sm_count, stream);
    case 5:
      return launch_for_alignment<T, 5>(p, sm_count, stream);
    case 6:
      return launch_for_alignment<T, 6>(p, sm_count, stream);
    case 7:
      return launch_for_alignment<T, 7>(p, sm_count, stream);
    case 8:
      return launch_for_alignment<T, 8>(p, sm_count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_short_conv(const ShortConvArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_taps<__half>(args, sm_count, stream);
  if (dtype == Dtype::kBFloat16) return launch_for_taps<__nv_bfloat16>(args, sm_count, stream);
  return launch_for_taps<float>(args, sm_count, stream);
}

}  // namespace hf_fastpath
