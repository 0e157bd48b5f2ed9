// Threads of a CTA as fibers. The scheduler runs every thread that can run until it waits or ends; a CTA in which none
// can run and not all have ended is stuck, and the message says where its threads wait.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" void cuda_emulator_switch(void** save, void* load);
// The System V ABI's callee-saved registers; the rest is dead across a call.
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");

namespace cuda_emulator {

Current running{};

namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;

enum class State { kReady, kAtBarrier, kAtClusterBarrier, kInWarp, kBlocked, kDone };

struct Thread {
  void* stack_pointer;
  State state;
  uint3 index;
  Site site;         // where it waits
  const char* what;  // for which warp-wide operation, of which lanes
  uint32_t mask;
  void* data;
};

// What threads of one CTA have in common.
struct Cta {
  int at_barrier = 0, done = 0;
  uint32_t barriers = 0;
};

// The cluster that runs.
struct Cluster {
  std::vector<Thread> threads;
  std::vector<uint32_t> warp_barriers;
  std::vector<Cta> ctas;
  void (*run_thread)(const void* call) = nullptr;
  const void* call = nullptr;
  int running = -1;
  int at_barrier = 0, done = 0;  // at_barrier: at the cluster's
  uint3 first_cta;

  int threads_of_cta() const { return static_cast<int>(threads.size() / ctas.size()); }
  int rank_of(int thread) const { return thread / threads_of_cta(); }
};

int cluster_order = 0;  // of a grid: 0 as they are numbered, 1 the last one first, else by chance

Cluster all;
Current& now = running;
void* scheduler_stack_pointer;
std::string fault_message;

char* stack_of(int thread) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) abort();
    stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  return stacks[thread];
}

void to_scheduler() {
  cuda_emulator_switch(&all.threads[all.running].stack_pointer, scheduler_stack_pointer);
}

void wait(State state, Site site) {
  Thread& thread = all.threads[all.running];
  thread.state = state;
  thread.site = site;
  to_scheduler();
}

void leave() {
  const int self = all.running;
  const uint32_t bit = 1u << self % kWarpSize;
  Cta& cta = all.ctas[all.rank_of(self)];
  if (all.at_barrier) fault("ended while other threads of its cluster wait at a barrier");
  if (cta.at_barrier) fault("ended while other threads of its CTA wait at a barrier");
  for (int i = self / kWarpSize * kWarpSize; i < (self / kWarpSize + 1) * kWarpSize; ++i) {
    if (i >= static_cast<int>(all.threads.size())) break;
    const Thread& other = all.threads[i];
    if (other.state == State::kInWarp && other.mask & bit) {
      fault("ended while a lane of its warp waits for it in " + std::string(other.what) + " at " + at(other.site));
    }
  }
  all.threads[self].state = State::kDone;
  ++cta.done;
  ++all.done;
  to_scheduler();
}

void thread_main() {
  all.run_thread(all.call);
  end_of_thread();
  leave();
}

void prepare(int index) {
  Thread& thread = all.threads[index];
  const unsigned x = blockDim.x, y = blockDim.y;
  thread = {};
  const unsigned inside = static_cast<unsigned>(index % all.threads_of_cta());
  thread.index = make_uint3(inside % x, inside / x % y, inside / (x * y));
  // As after a call of thread_main: a return address that is never used, six registers that do not matter.
  auto** top = reinterpret_cast<void**>(stack_of(index) + kStackBytes);
  top[-2] = reinterpret_cast<void*>(thread_main);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  thread.stack_pointer = top - 8;
}

void resume(int index) {
  Thread& thread = all.threads[index];
  all.running = index;
  threadIdx = thread.index;
  now.in_kernel = true;
  now.thread = index;
  now.rank = all.rank_of(index);
  now.cta = now.cluster * static_cast<int64_t>(all.ctas.size()) + now.rank;
  now.barriers = all.ctas[now.rank].barriers;
  blockIdx = all.first_cta;
  blockIdx.x += static_cast<unsigned>(now.rank);
  now.warp_barriers = all.warp_barriers[index / kWarpSize];
  now.stack_begin = reinterpret_cast<uintptr_t>(stack_of(index));
  now.stack_end = now.stack_begin + kStackBytes;
  load_clock(index);
  cuda_emulator_switch(&scheduler_stack_pointer, thread.stack_pointer);
  now.in_kernel = false;
}

void report_stuck() {
  std::map<std::string, int> waiting;
  for (const Thread& thread : all.threads) {
    if (thread.state == State::kDone) ++waiting["have ended"];
    if (thread.state == State::kAtBarrier) ++waiting["wait at the barrier at " + at(thread.site)];
    if (thread.state == State::kAtClusterBarrier) ++waiting["wait at the cluster's barrier at " + at(thread.site)];
    if (thread.state == State::kInWarp || thread.state == State::kBlocked)
      ++waiting["wait in " + std::string(thread.what) + " at " + at(thread.site)];
  }
  std::string message = "stuck: ";
  for (const auto& [where, count] : waiting) message += std::to_string(count) + " threads " + where + "; ";
  fault(message.substr(0, message.size() - 2));
}

void run_cluster() {
  const int count = static_cast<int>(all.threads.size());
  for (int i = 0; i < count; ++i) prepare(i);
  all.at_barrier = all.done = 0;
  all.ctas.assign(all.ctas.size(), Cta{});
  all.warp_barriers.assign((count + kWarpSize - 1) / kWarpSize, 0);
  now.cluster_barriers = 0;
  begin_cluster();
  forget_copies();
  forget_barriers();
  forget_wgmma();
  forget_tensor_stores();
  forget_warpgroup_barriers();
  while (all.done < count && fault_message.empty()) {
    bool progress = false;
    for (int i = 0; i < count && fault_message.empty(); ++i) {
      if (all.threads[i].state != State::kReady) continue;
      progress = true;
      resume(i);
    }
    if (!progress) report_stuck();
  }
}

}  // namespace

std::string at(Site site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

void set_clock(uint32_t tick, uint32_t fences, const uint32_t* seen) {
  now.tick = tick, now.fences = fences, now.seen = seen;
}

int threads_of_cta() {
  return all.threads_of_cta();
}

int threads_of_cluster() {
  return static_cast<int>(all.threads.size());
}

int first_thread_of_warpgroup() {
  const int first = now.rank * all.threads_of_cta();
  return first + (all.running - first) / kWarpgroupSize * kWarpgroupSize;
}

bool has_ended(int rank) {
  return all.ctas[rank].done == all.threads_of_cta();
}

std::string thread_name(int64_t cta_index, int thread) {
  return "thread " + std::to_string(thread % all.threads_of_cta()) + " of CTA " + std::to_string(cta_index);
}

void fault(const std::string& message) {
  if (fault_message.empty()) fault_message = (now.in_kernel ? thread_name(now.cta, now.thread) + ": " : "") + message;
  if (now.in_kernel) to_scheduler();  // for good: the scheduler resumes nobody after a fault
}

cudaError_t run_grid(dim3 grid, dim3 block, unsigned cluster, void (*run_thread)(const void* call), const void* call,
                     size_t bytes, size_t dynamic_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (!cluster || cluster > 8 || grid.x % cluster) return cudaErrorInvalidConfiguration;
  if (cluster > 1 && threads % kWarpSize) return cudaErrorNotSupported;  // warps must not span CTAs
  gridDim = grid;
  blockDim = block;
  all.ctas.resize(cluster);
  all.threads.resize(threads * cluster);
  all.run_thread = run_thread;
  all.call = call;
  begin_grid(call, bytes, dynamic_bytes, cluster);
  std::vector<int64_t> clusters(int64_t{grid.x / cluster} * grid.y * grid.z);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (cluster_order == 1) std::reverse(clusters.begin(), clusters.end());
  if (cluster_order > 1) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(cluster_order));
  for (const int64_t number : clusters) {
    now.cluster = number;
    const int64_t row = number / (grid.x / cluster);
    all.first_cta = make_uint3(static_cast<unsigned>(number % (grid.x / cluster)) * cluster,
                               static_cast<unsigned>(row % grid.y), static_cast<unsigned>(row / grid.y));
    run_cluster();
    if (!fault_message.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

namespace {
// Those of `count` threads from `first` on that wait in a state stand at the same place; then they go on.
void pass_barrier(State state, int first, int count, Site site) {
  for (int i = first; i < first + count; ++i) {
    const Thread& other = all.threads[i];
    if (other.state != state) continue;
    if (other.site.line != site.line || strcmp(other.site.file, site.file) != 0) {
      fault("waits at the barrier at " + at(site) + ", others at the one at " + at(other.site));
    }
  }
  for (int i = first; i < first + count; ++i) all.threads[i].state = State::kReady;
}
}  // namespace

void cta_barrier(Site site) {
  Cta& cta = all.ctas[now.rank];
  if (cta.done) fault("reached the barrier at " + at(site) + " when other threads of its CTA had ended");
  ++cta.at_barrier;
  if (cta.at_barrier < all.threads_of_cta()) {
    wait(State::kAtBarrier, site);
    return;
  }
  pass_barrier(State::kAtBarrier, now.rank * all.threads_of_cta(), all.threads_of_cta(), site);
  cta.at_barrier = 0;
  now.barriers = ++cta.barriers;
}

void cluster_barrier(Site site) {
  if (all.done) fault("reached the cluster's barrier at " + at(site) + " when other threads of its cluster had ended");
  ++all.at_barrier;
  if (all.at_barrier < threads_of_cluster()) {
    wait(State::kAtClusterBarrier, site);
    return;
  }
  pass_barrier(State::kAtClusterBarrier, 0, threads_of_cluster(), site);
  all.at_barrier = 0;
  for (Cta& cta : all.ctas) ++cta.barriers;
  now.barriers = all.ctas[now.rank].barriers;
  ++now.cluster_barriers;
}

void warp_meet(const char* what, uint32_t mask, void* data, void (*combine)(Lanes& lanes), Site site) {
  const int self = all.running, first = self / kWarpSize * kWarpSize;
  if (!(mask >> self % kWarpSize & 1)) fault("is not in the mask of its own " + std::string(what) + " at " + at(site));
  Thread& thread = all.threads[self];
  thread.what = what;
  thread.mask = mask;
  thread.data = data;
  Lanes lanes = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int index = first + lane;
    const bool missing = index >= static_cast<int>(all.threads.size()) || all.threads[index].state == State::kDone;
    if (missing) fault(std::string(what) + " at " + at(site) + " names lane " + std::to_string(lane) + ", which ended");
    const Thread& other = all.threads[index];
    if (index != self && other.state != State::kInWarp) return wait(State::kInWarp, site);
    lanes[lane] = other.data;
    if (index == self) continue;
    if (other.what != what || other.mask != mask || other.site.line != site.line) {
      fault("is in " + std::string(what) + " at " + at(site) + ", lane " + std::to_string(lane) + " in " + other.what +
            " at " + at(other.site));
    }
  }
  combine(lanes);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) all.threads[first + lane].state = State::kReady;
  }
}

void warpgroup_meet(const char* what, void* data, void (*combine)(WarpgroupLanes& lanes), Site site) {
  const int self = all.running, first = first_thread_of_warpgroup();
  if (first + kWarpgroupSize > (now.rank + 1) * all.threads_of_cta())
    fault(std::string(what) + " of a part of a warpgroup");
  Thread& thread = all.threads[self];
  thread.what = what;
  thread.mask = 0xffffffffu;
  thread.data = data;
  WarpgroupLanes lanes;
  for (int i = 0; i < kWarpgroupSize; ++i) {
    const Thread& other = all.threads[first + i];
    if (first + i != self && other.state != State::kInWarp) return wait(State::kInWarp, site);
    lanes[i] = other.data;
    if (first + i != self && (other.what != what || other.site.line != site.line)) {
      fault("is in " + std::string(what) + " at " + at(site) + ", thread " + std::to_string(first + i) + " in " +
            other.what + " at " + at(other.site));
    }
  }
  combine(lanes);
  for (int i = 0; i < kWarpgroupSize; ++i) all.threads[first + i].state = State::kReady;
}

namespace {
std::map<std::pair<int, int>, int> warpgroup_of_barrier;  // of a CTA's rank and a number
}

void warpgroup_barrier(int number, Site site) {
  const int self = first_thread_of_warpgroup();
  if (number < 1 || number > 15) fault("uses barrier number " + std::to_string(number) + " at " + at(site));
  if (warpgroup_of_barrier.emplace(std::pair(now.rank, number), self).first->second != self) {
    fault("uses barrier number " + std::to_string(number) + " at " + at(site) + ", which is another warpgroup's");
  }
  const auto combine = [](WarpgroupLanes& lanes) {
    for (void* lane : lanes) {
      if (*static_cast<int*>(lane) != *static_cast<int*>(lanes[0]))
        fault("threads of a barrier disagree about its number");
    }
    join_clocks_of_warpgroup(first_thread_of_warpgroup());
  };
  warpgroup_meet("bar.sync", &number, combine, site);
  load_clock(all.running);
}

void forget_warpgroup_barriers() {
  warpgroup_of_barrier.clear();
}

void block(const char* what, Site site) {
  all.threads[all.running].what = what;
  all.threads[all.running].mask = 0;
  wait(State::kBlocked, site);
}

void wake(int thread) {
  all.threads[thread].state = State::kReady;
}

void warp_barrier(uint32_t mask, Site site) {
  char nothing;
  const auto combine = [](Lanes& lanes) {
    const int warp = all.running / kWarpSize;
    ++all.warp_barriers[warp];
    uint32_t mask = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) mask |= static_cast<uint32_t>(lanes[lane] != nullptr) << lane;
    join_clocks_of_warp(warp * kWarpSize, mask);
  };
  warp_meet("__syncwarp", mask, &nothing, combine, site);
  now.warp_barriers = all.warp_barriers[all.running / kWarpSize];
  load_clock(all.running);
}

}  // namespace cuda_emulator

// In which order the CTAs, or clusters, of a grid run; see cluster_order.
extern "C" __attribute__((visibility("default"))) void emulator_set_cluster_order(int order) {
  cuda_emulator::cluster_order = order;
}

// The message of the last fault, which it clears; "" when there was none.
extern "C" __attribute__((visibility("default"))) const char* emulator_take_fault() {
  static std::string taken;
  taken.swap(cuda_emulator::fault_message);
  cuda_emulator::fault_message.clear();
  return taken.c_str();
}
