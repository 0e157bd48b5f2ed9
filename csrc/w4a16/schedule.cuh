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

// The tiles of a product in the order in which they are computed. Neighbours share what they read: eight blocks of
// tokens meet the same weights, then the next weights.
struct Tiles {
  int row_blocks, token_blocks;
  int units;  // of a tile

  __host__ __device__ int count() const { return row_blocks * token_blocks; }
  __device__ __forceinline__ Place place(int tile) const {
    constexpr int kTogether = 8;
    const int per_group = kTogether * row_blocks, group = tile / per_group, inside = tile % per_group;
    const int width = min(kTogether, token_blocks - kTogether * group);
    return {inside / width, kTogether * group + inside % width};
  }
};

// Each CTA takes an equal share of all units of all tiles, in their order ("stream-K", Osama et al., PPoPP 2023), so
// that no CTA waits for others however few tiles there are; a tile may then be the sum of several CTAs' parts.
struct Schedule : Tiles {
  int ctas;

  __host__ __device__ int64_t all_units() const { return static_cast<int64_t>(count()) * units; }
  // The first unit of a CTA's share, counted over all tiles.
  __host__ __device__ int64_t begin(int cta) const { return all_units() * cta / ctas; }
  // The CTA whose share holds a unit.
  __host__ __device__ int owner(int64_t unit) const { return static_cast<int>(((unit + 1) * ctas - 1) / all_units()); }
  // Where a CTA stores its part of a tile. A share has at most two partial tiles: the one it begins inside of, and the
  // one it ends inside of.
  __host__ __device__ int64_t slot(int cta, int tile) const {
    return 2 * static_cast<int64_t>(cta) + (begin(cta) <= static_cast<int64_t>(tile) * units);
  }
  __host__ __device__ bool has_partial_tiles() const { return count() % ctas != 0; }
};

// Over `ctas` CTAs, or over so few that each has kLeastUnits: below that, CTAs would store and add more than they
// multiply.
constexpr int kLeastUnits = 2;
inline Schedule stream_k_schedule(const Tiles& tiles, int ctas) {
  Schedule schedule{tiles, 1};
  schedule.ctas = static_cast<int>(std::min<int64_t>((schedule.all_units() + kLeastUnits - 1) / kLeastUnits, ctas));
  return schedule;
}

// A tile is computed by a cluster of `splits` CTAs, which divide its units and add their parts; cluster c takes the
// tiles c, c + clusters, ...
struct ClusterSchedule : Tiles {
  static constexpr bool kPaired = false;
  int splits, clusters;

  // The first unit of a CTA's share of each tile; that of rank `splits` is the tile's end.
  __device__ __forceinline__ int begin(int rank) const { return units * rank / splits; }
};

// `ctas`: how many fit on the GPU at the same time. A cluster that divides K takes one tile, since its parts lie in the
// memory that the next tile's weights would fill.
inline ClusterSchedule cluster_schedule(const Tiles& tiles, int splits, int ctas) {
  splits = std::min(splits, tiles.units);
  return {tiles, splits, splits > 1 ? tiles.count() : std::min(tiles.count(), ctas)};
}

// A CTA's way through its units of a Schedule.
struct Cursor {
  int tile;
  int unit;        // of the tile
  int first_unit;  // the first one of this tile that this CTA does
  int left;        // units to do, this one included

  __device__ __forceinline__ Cursor(const Schedule& s, int cta) {
    const int64_t begin = s.begin(cta);
    left = static_cast<int>(s.begin(cta + 1) - begin);
    tile = static_cast<int>(begin / s.units);
    unit = static_cast<int>(begin % s.units);
    first_unit = unit;
  }
  // Returns whether that leads to another tile.
  __device__ __forceinline__ bool advance(const Schedule& s) {
    --left;
    if (++unit < s.units) return false;
    unit = first_unit = 0;
    ++tile;
    return true;
  }
  // Whether this unit is the last one that the CTA does of its tile, and whether it then has done all of them.
  __device__ __forceinline__ bool ends_tile(const Schedule& s) const { return unit + 1 == s.units || left == 1; }
  __device__ __forceinline__ bool did_all(const Schedule& s) const { return first_unit == 0 && unit + 1 == s.units; }
};

}  // namespace hf_fastpath
