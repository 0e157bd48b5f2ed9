// mbarrier, and the order that it gives to what threads do before their arrival and after their wait. Threads that use
// one have vector clocks: a thread's tick counts what it has released, and seen[t] is the tick of thread t up to which
// its accesses come before those of this thread.
#include <algorithm>
#include <map>

#include "cuda_runtime.h"

namespace cuda_emulator {
namespace {

struct Clock {
  std::vector<uint32_t> seen;
  uint32_t tick = 0, fences = 0;
};

struct Barrier {
  int count, pending;
  int bytes = 0;   // that the phase still waits for
  int parity = 0;  // of the phase under way
  int init_thread;
  uint32_t init_barriers;
  std::vector<uint32_t> arrived, released;  // clocks of this phase's arrivals; of those of all phases that ended
  std::vector<Copy> copies;                 // of arrivals of this phase
  std::vector<int> waiting;
};

std::vector<Clock> clocks;  // empty until a kernel uses what needs them
std::map<const void*, Barrier> barriers;

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

Clock& my_clock() {
  if (clocks.empty()) {
    clocks.resize(threads_of_cluster());
    for (Clock& clock : clocks) clock.seen.assign(clocks.size(), 0);
  }
  return clocks[current().thread];
}

Barrier& find_barrier(const void* address, Site site) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fault("uses an mbarrier at " + at(site) + " that nobody has initialized");
  const Current& now = current();
  Barrier& barrier = found->second;
  if (barrier.init_thread / threads_of_cta() != now.rank) {
    fault("uses an mbarrier at " + at(site) + " of another CTA of its cluster");
  }
  if (barrier.init_thread != now.thread && barrier.init_barriers >= now.barriers) {
    fault("uses an mbarrier at " + at(site) + " without a barrier after its initialization");
  }
  return barrier;
}

// What the current thread did so far comes before what follows the phase's end.
void arrive(Barrier& barrier, int arrivals, int bytes) {
  Clock& mine = my_clock();
  const int self = current().thread;
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  const bool ends = barrier.pending == 0 && barrier.bytes == 0;
  if (ends) {  // before the tick: the last arrival releases what it completes
    for (const Copy& copy : barrier.copies) end_copy(copy.target, copy.data.data(), copy.bytes, copy.by_engine);
    barrier.copies.clear();
  }
  join(barrier.arrived, mine.seen);
  barrier.arrived[self] = ++mine.tick;
  load_clock(self);
  if (!ends) return;
  barrier.pending = barrier.count;
  barrier.parity ^= 1;
  join(barrier.released, barrier.arrived);
  for (int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

}  // namespace

void load_clock(int thread) {
  if (clocks.empty()) return set_clock(0, 0, nullptr);
  const Clock& clock = clocks[thread];
  set_clock(clock.tick, clock.fences, clock.seen.data());
}

namespace {
// Of those of `count` threads from `first` on of which meets(their number from there) is true.
template <typename Meets>
void join_clocks(int first, int count, Meets meets) {
  std::vector<uint32_t> all(clocks.size(), 0);
  for (int i = 0; i < count; ++i) {
    if (!meets(i)) continue;
    join(all, clocks[first + i].seen);
    all[first + i] = ++clocks[first + i].tick;
  }
  for (int i = 0; i < count; ++i) {
    if (meets(i)) clocks[first + i].seen = all;
  }
  load_clock(current().thread);
}
}  // namespace

void join_clocks_of_warp(int first, uint32_t mask) {
  if (clocks.empty()) return;
  join_clocks(first, kWarpSize, [mask](int lane) { return mask >> lane & 1; });
}

void join_clocks_of_warpgroup(int first) {
  my_clock();
  join_clocks(first, kWarpgroupSize, [](int) { return true; });
}

uint32_t proxy_fences(int thread) {
  return clocks.empty() ? 0 : clocks[thread].fences;
}

void proxy_fence() {
  ++my_clock().fences;
  load_clock(current().thread);
}

void mbarrier_init(const void* address, int count, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 8) fault("initializes a misaligned mbarrier at " + at(site));
  my_clock();
  const Current& now = current();
  Barrier barrier{count, count, 0, 0, now.thread, now.barriers, {}, {}, {}, {}};
  barrier.arrived.assign(clocks.size(), 0);
  barrier.released = barrier.arrived;
  barriers.insert_or_assign(address, barrier);
}

void mbarrier_arrive(const void* address, Site site) {
  arrive(find_barrier(address, site), 1, 0);
}

void mbarrier_arrive_expecting(const void* address, int bytes, Site site) {
  arrive(find_barrier(address, site), 1, bytes);
}

void mbarrier_take_copies(const void* address, const std::vector<Copy>& copies, Site site) {
  Barrier& barrier = find_barrier(address, site);
  barrier.copies.insert(barrier.copies.end(), copies.begin(), copies.end());
  arrive(barrier, 0, -static_cast<int>(copies.size() * sizeof copies[0].data));
}

void mbarrier_arrive_after_copies(const void* address, Site site) {
  Barrier& barrier = find_barrier(address, site);
  for (const Copy& copy : take_open_copies()) barrier.copies.push_back(copy);
  arrive(barrier, 1, 0);
}

void mbarrier_wait(const void* address, int parity, Site site) {
  Barrier& barrier = find_barrier(address, site);
  if (parity != 0 && parity != 1) fault("waits for parity " + std::to_string(parity) + " at " + at(site));
  while (barrier.parity == parity) {
    barrier.waiting.push_back(current().thread);
    block("mbarrier_wait", site);
  }
  join(my_clock().seen, barrier.released);
}

void forget_barriers() {
  barriers.clear();
  clocks.clear();
}

}  // namespace cuda_emulator
