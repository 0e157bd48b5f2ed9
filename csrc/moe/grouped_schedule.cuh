// Which CTA computes what of the experts' products over sorted pairs, whose numbers only the GPU knows.
#pragma once

#include "../w4a16/sm90_stage.cuh"

namespace hf_fastpath::moe {

// In shared memory: where each expert's pairs, and its tiles, begin.
struct GroupedTable {
  int pair[kMaxGroupedExperts + 1], tile[kMaxGroupedExperts + 1];
};

// A CTA's tile is 128 outputs of an expert by some of its pairs, counted expert by expert; tiles of the same weights
// are neighbours. CTA c takes the tiles c, c + clusters, ...: a "cluster" is one CTA here, as in ClusterSchedule.
struct GroupedSchedule {
  const GroupedTable* table;
  int experts, row_tiles, row_blocks;  // row tiles and their blocks: of an expert
  int units, clusters;
  static constexpr int splits = 1;
  static constexpr bool kPaired = false;

  struct Place {
    int expert, row_block, token;  // token: the first of the tile, among all sorted pairs
  };

  __device__ __forceinline__ int begin(int rank) const { return rank * units; }
  __device__ __forceinline__ int count() const { return table->tile[experts]; }
  template <int kTokenTiles>
  __device__ __forceinline__ Place place(int tile) const {
    int low = 0, high = experts - 1;  // the last expert whose tiles begin at `tile` or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table->tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int within = tile - table->tile[low], tokens = table->pair[low + 1] - table->pair[low];
    const int token_blocks = (tokens + 8 * kTokenTiles - 1) / (8 * kTokenTiles);
    return {low, within / token_blocks, table->pair[low] + within % token_blocks * 8 * kTokenTiles};
  }
};

// All threads of a CTA; the first one counts. An expert without pairs has no tiles, so that the search ends beyond it.
template <int kTokenTiles>
__device__ __forceinline__ void fill_table(GroupedTable& table, const int* first_pair, int experts, int row_blocks) {
  for (int i = threadIdx.x; i <= experts; i += blockDim.x) table.pair[i] = first_pair[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    int tiles = 0;
    for (int e = 0; e < experts; ++e) {
      table.tile[e] = tiles;
      tiles += (table.pair[e + 1] - table.pair[e] + 8 * kTokenTiles - 1) / (8 * kTokenTiles) * row_blocks;
    }
    table.tile[experts] = tiles;
  }
  __syncthreads();
}

template <int kTokenTiles>
__device__ __forceinline__ Corner corner_of(const GroupedSchedule& s, int tile) {
  const GroupedSchedule::Place place = s.place<kTokenTiles>(tile);
  return {place.expert * s.row_tiles + place.row_block * kGemmWarps, place.token};
}

}  // namespace hf_fastpath::moe
