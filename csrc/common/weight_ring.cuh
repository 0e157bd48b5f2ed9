// int4 weights on their way to a warp that multiplies them with one row of x: a ring of units in shared memory, which
// the warp fills and empties alone.
#pragma once

#include "digits.cuh"

namespace hf_fastpath::digits {

// A unit of 128 columns of kTiles tiles of outputs.
template <typename W, int kTiles>
struct Stage {
  uint4 tile[kTiles][2][32];
  uint16_t scales[kTiles][W::kGroups][16];
  uint8_t zeros[kTiles][W::kGroups][16];
};

// The packed weights of a product, as its units lie in memory.
struct Packed {
  const unsigned char *tiles, *scales, *zeros;
  int units;  // of a row tile
};

// A warp's units of a row of blocks: kTiles tiles of outputs each, of which the warp has the units `first` .. `end`.
// kStages - 1 are under way; `slots` of the ring are used, kStages or as many as there are units in all.
template <typename W, int kTiles, int kStages>
class WeightRing {
 public:
  using Unit = Stage<W, kTiles>;

  // Whether the lanes of a warp can copy a unit's scales and zeros at once.
  static constexpr bool kFits = 3 * kTiles * W::kGroups <= 32;

  static __host__ __device__ __forceinline__ int slots_for(int blocks, int units, int warps) {
    return min(kStages, blocks * ((units + warps - 1) / warps));
  }

  __device__ __forceinline__ WeightRing(unsigned char* memory, int slots, const Packed& weight, int warp, int warps,
                                        int lane)
      : begin_(memory + warp * slots * static_cast<int>(sizeof(Unit))),
        end_(begin_ + slots * static_cast<int>(sizeof(Unit))),
        now_(begin_),
        last_(begin_ + (kStages - 1) * static_cast<int>(sizeof(Unit))),
        first_unit_(weight.units * warp / warps),
        units_(weight.units * (warp + 1) / warps - first_unit_),
        lane_bytes_(16 * lane) {
    constexpr int kScaleLanes = 2 * kTiles * W::kGroups, kZeroLanes = W::kHasZeros ? kTiles * W::kGroups : 0;
    static_assert(kFits);
    const bool scales = lane < kScaleLanes;
    const int piece = scales ? lane : lane - kScaleLanes, pieces = (scales ? 2 : 1) * W::kGroups;  // of 16 bytes
    has_value_ = lane < kScaleLanes + kZeroLanes;
    unit_values_ = 16 * pieces;
    value_tile_ = piece / pieces;
    value_target_ = static_cast<int>(scales ? offsetof(Unit, scales) : offsetof(Unit, zeros)) + 16 * piece;
    value_base_ = (scales ? weight.scales : weight.zeros) + first_unit_ * unit_values_ + piece % pieces * 16;
    tile_base_ = weight.tiles + first_unit_ * kUnitBytes + lane_bytes_;
    row_values_ = weight.units * unit_values_;
    row_bytes_ = weight.units * kUnitBytes;
    keep_in_register(lane_bytes_), keep_in_register(unit_values_), keep_in_register(value_target_);
  }

  __device__ __forceinline__ int first_unit() const { return first_unit_; }
  __device__ __forceinline__ int units() const { return units_; }

  // Asks for the first `count` units, or as many as are to be under way. start(block) calls begin() with the block's
  // tiles.
  template <typename Start>
  __device__ __forceinline__ void fill(int blocks, int count, Start start) {
    blocks_left_ = units_ > 0 ? blocks : 0;
    next_block_ = 0;
    filled_ = count;
    if (blocks_left_ > 0) start(next_block_);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) ask(begin_ + s * static_cast<int>(sizeof(Unit)), start);
    }
  }
  // And for the others.
  template <typename Start>
  __device__ __forceinline__ void fill_rest(Start start) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s >= filled_) ask(begin_ + s * static_cast<int>(sizeof(Unit)), start);
    }
  }

  // The next units to copy are those of row tile `tile`, whose neighbours in the block are `step` tiles apart.
  __device__ __forceinline__ void begin(int64_t tile, int64_t step) {
    unit_left_ = units_;
    tile_step_ = step * row_bytes_;
    tiles_ = tile_base_ + tile * row_bytes_;
    values_ = value_base_ + (tile + value_tile_ * step) * row_values_;
  }

  // The oldest unit, once it is there; the next one is asked for.
  template <typename Start>
  __device__ __forceinline__ const unsigned char* take(Start start) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the unit that is filled now
    ask(last_, start);
    unsigned char* const unit = now_;
    last_ = now_;
    now_ += sizeof(Unit);
    if (now_ == end_) now_ = begin_;
    return unit;
  }

 private:
  static constexpr int kUnitBytes = 1024;

  template <typename Start>
  __device__ __forceinline__ void ask(unsigned char* unit, Start start) {
    if (blocks_left_ > 0) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        const unsigned char* from = tiles_ + r * tile_step_;
        cp_async16(unit + lane_bytes_ + 1024 * r, from, true);
        cp_async16(unit + lane_bytes_ + 1024 * r + 512, from + 512, true);
      }
      if (has_value_) cp_async16(unit + value_target_, values_, true);
      tiles_ += kUnitBytes, values_ += unit_values_;
      if (--unit_left_ == 0 && --blocks_left_ > 0) start(++next_block_);
    }
    cp_async_commit();
  }

  unsigned char *begin_, *end_, *now_, *last_;
  int first_unit_, units_, lane_bytes_;
  int unit_values_, value_tile_, value_target_, row_values_, row_bytes_;
  const unsigned char *tile_base_, *value_base_, *tiles_, *values_;
  int64_t tile_step_;
  int blocks_left_, next_block_, unit_left_, filled_;
  bool has_value_;
};

}  // namespace hf_fastpath::digits
