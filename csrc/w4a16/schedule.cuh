// Which CTA computes what of a product that is cut into tiles of outputs by rows of x, and each tile into units of 128
// columns of K.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace hf_fastpath {

constexpr int kUnitCols = 128;  // one group of the largest size: two packed tiles

// A tile's place in the output, in tiles.
struct Place {
  int row_block, token_block;
};

// Split: each CTA takes an equal share of all units of all tiles, in their order ("stream-K", Osama et al., PPoPP
// 2023), so that no CTA waits for others however few tiles there are; a tile may then be the sum of several CTAs'
// parts. Whole: each CTA takes whole tiles, number c, c + ctas, c + 2 * ctas, ...
struct Schedule {
  int row_blocks, token_blocks;
  int units;  // of a tile
  int ctas;
  bool split;

  __host__ __device__ int tiles() const { return row_blocks * token_blocks; }
  __host__ __device__ int64_t all_units() const { return static_cast<int64_t>(tiles()) * units; }
  // The first unit of a CTA's share, counted over all tiles.
  __host__ __device__ int64_t begin(int cta) const { return all_units() * cta / ctas; }
  // The CTA whose share holds a unit.
  __host__ __device__ int owner(int64_t unit) const { return static_cast<int>(((unit + 1) * ctas - 1) / all_units()); }
  // Where a CTA stores its part of a tile. A share has at most two partial tiles: the one it begins inside of, and the
  // one it ends inside of.
  __host__ __device__ int64_t slot(int cta, int tile) const {
    return 2 * static_cast<int64_t>(cta) + (begin(cta) <= static_cast<int64_t>(tile) * units);
  }
  __host__ __device__ bool has_partial_tiles() const { return split && tiles() % ctas != 0; }

  // Neighbouring tiles share what they read: eight blocks of tokens meet the same weights, then the next weights.
  __device__ __forceinline__ Place place(int tile) const {
    constexpr int kTogether = 8;
    const int per_group = kTogether * row_blocks, group = tile / per_group, inside = tile % per_group;
    const int width = min(kTogether, token_blocks - kTogether * group);
    return {inside / width, kTogether * group + inside % width};
  }
};

// Split over `ctas` CTAs, or over so few that each has kLeastUnits: below that, CTAs would store and add more than they
// multiply.
constexpr int kLeastUnits = 2;
inline Schedule split_schedule(int row_blocks, int token_blocks, int units, int ctas) {
  Schedule schedule{row_blocks, token_blocks, units, 1, true};
  schedule.ctas = static_cast<int>(std::min<int64_t>((schedule.all_units() + kLeastUnits - 1) / kLeastUnits, ctas));
  return schedule;
}
inline Schedule whole_schedule(int row_blocks, int token_blocks, int units, int ctas) {
  Schedule schedule{row_blocks, token_blocks, units, 1, false};
  schedule.ctas = std::min(schedule.tiles(), ctas);
  return schedule;
}

// A CTA's way through its units.
struct Cursor {
  int tile;
  int unit;        // of the tile
  int first_unit;  // the first one of this tile that this CTA does
  int left;        // units to do, this one included

  __device__ __forceinline__ Cursor(const Schedule& s, int cta) {
    if (s.split) {
      const int64_t begin = s.begin(cta);
      left = static_cast<int>(s.begin(cta + 1) - begin);
      tile = static_cast<int>(begin / s.units);
      unit = static_cast<int>(begin % s.units);
    } else {
      left = (s.tiles() - cta + s.ctas - 1) / s.ctas * s.units;
      tile = cta;
      unit = 0;
    }
    first_unit = unit;
  }
  // Returns whether that leads to another tile.
  __device__ __forceinline__ bool advance(const Schedule& s) {
    --left;
    if (++unit < s.units) return false;
    unit = first_unit = 0;
    tile += s.split ? 1 : s.ctas;
    return true;
  }
  // Whether this unit is the last one that the CTA does of its tile, and whether it then has done all of them.
  __device__ __forceinline__ bool ends_tile(const Schedule& s) const { return unit + 1 == s.units || left == 1; }
  __device__ __forceinline__ bool did_all(const Schedule& s) const { return first_unit == 0 && unit + 1 == s.units; }
};

}  // namespace hf_fastpath
