// wgmma: products that run on until they are waited for. A warpgroup's operations are queued; wgmma_wait() reads the B
// operands from shared memory and gives the sums. Until then accumulators hold NaN and fragments of A must not change.
#include <cmath>
#include <cstring>
#include <deque>
#include <map>

#include "ptx_sm90_emulated.cuh"

namespace cuda_emulator {
namespace {

struct Sum {
  std::vector<float> value;
  int under_way = 0;
};

struct Operation {
  WgmmaLane lanes[kWarpgroupSize];
};

struct Warpgroup {
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;  // oldest first
  std::map<float*, Sum> sums;
  bool fenced = false;
};

std::map<int, Warpgroup> warpgroups;

Warpgroup& my_warpgroup() {
  return warpgroups[first_thread_of_warpgroup()];
}

// The 16 bytes of row `token` that hold columns 8 * chunk ... + 7 of the operand.
const uint16_t* operand_chunk(uint64_t descriptor, int token, int chunk) {
  const uint32_t start = (descriptor & 0x3fff) << 4, rows_of_8 = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + token / 8 * rows_of_8 + token % 8 * 128 + chunk * 16;
  address ^= address >> 3 & 0x70;
  const unsigned char* bytes = dynamic_shared() + (address - kSharedWindow);
  check_async_read(bytes, 16, "wgmma");
  return reinterpret_cast<const uint16_t*>(bytes);
}

void finish(Warpgroup& group, const Operation& op) {
  const WgmmaLane& first = op.lanes[0];
  std::vector<float> b(first.tokens * 16);
  for (int token = 0; token < first.tokens; ++token) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint16_t* values = operand_chunk(first.b, token, chunk);
      for (int i = 0; i < 8; ++i) b[token * 16 + chunk * 8 + i] = first.to_float(values[i]);
    }
  }
  float a[64][16];
  for (int l = 0; l < kWarpgroupSize; ++l) {
    const WgmmaLane& lane = op.lanes[l];
    if (memcmp(lane.a, lane.a_at, sizeof lane.a) != 0) fault("a fragment changed while wgmma was reading it");
    const int row = l / 32 * 16 + l % 32 / 4, t = l % 4;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i)
        a[row + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = lane.to_float(lane.a[i] >> 16 * h & 0xffff);
    }
  }
  for (int l = 0; l < kWarpgroupSize; ++l) {
    const WgmmaLane& lane = op.lanes[l];
    Sum& sum = group.sums[lane.c];
    for (int i = 0; i < lane.tokens / 2; ++i) {
      const int row = l / 32 * 16 + l % 32 / 4 + 8 * (i / 2 % 2), token = i / 4 * 8 + 2 * (l % 4) + i % 2;
      double total = lane.accumulate ? sum.value[i] : 0.0;
      for (int k = 0; k < 16; ++k) total += static_cast<double>(a[row][k]) * b[token * 16 + k];
      sum.value[i] = static_cast<float>(total);
    }
    if (--sum.under_way) continue;
    std::copy(sum.value.begin(), sum.value.end(), lane.c);
    group.sums.erase(lane.c);
  }
}

void issue(WarpgroupLanes& lanes) {
  Warpgroup& group = my_warpgroup();
  if (!group.fenced) fault("wgmma without a wgmma_fence() after the last group");
  group.open.emplace_back();
  for (int l = 0; l < kWarpgroupSize; ++l) {
    const WgmmaLane& lane = *static_cast<const WgmmaLane*>(lanes[l]);
    if (lane.b != static_cast<const WgmmaLane*>(lanes[0])->b) fault("lanes of a wgmma disagree about its descriptor");
    if (lane.b >> 62 != 1) fault("wgmma without the 128-byte swizzle");
    group.open.back().lanes[l] = lane;
    Sum& sum = group.sums[lane.c];
    if (sum.under_way++ == 0) sum.value.assign(lane.c, lane.c + lane.tokens / 2);
    std::fill(lane.c, lane.c + lane.tokens / 2, NAN);
  }
}

}  // namespace

void wgmma(WgmmaLane& lane, Site site) {
  warpgroup_meet("wgmma", &lane, issue, site);
}

void wgmma_fence(Site site) {
  char nothing;
  warpgroup_meet("wgmma_fence", &nothing, [](WarpgroupLanes&) { my_warpgroup().fenced = true; }, site);
}

void wgmma_commit(Site site) {
  char nothing;
  const auto combine = [](WarpgroupLanes&) {
    Warpgroup& group = my_warpgroup();
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    group.fenced = false;
  };
  warpgroup_meet("wgmma_commit", &nothing, combine, site);
}

void wgmma_wait(int pending, Site site) {
  const auto combine = [](WarpgroupLanes& lanes) {
    Warpgroup& group = my_warpgroup();
    while (static_cast<int>(group.groups.size()) > *static_cast<int*>(lanes[0])) {
      for (const Operation& op : group.groups.front()) finish(group, op);
      group.groups.pop_front();
    }
  };
  warpgroup_meet("wgmma_wait", &pending, combine, site);
}

bool wgmma_under_way() {
  const Warpgroup& group = my_warpgroup();
  return !group.open.empty() || !group.groups.empty();
}

void forget_wgmma() {
  warpgroups.clear();
}

}  // namespace cuda_emulator
