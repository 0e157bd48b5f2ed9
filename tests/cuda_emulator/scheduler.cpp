// Threads of a CTA as fibers. The scheduler runs every thread that can run until it waits or ends; a CTA in which none
// can run and not all have ended is stuck, and the message says where its threads wait.
#include <sys/mman.h>

#include <map>
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
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kBlocked, kDone };

struct Thread {
  void* stack_pointer;
  State state;
  uint3 index;
  Site site;         // where it waits
  const char* what;  // for which warp-wide operation, of which lanes
  uint32_t mask;
  void* data;
};

struct Cta {
  std::vector<Thread> threads;
  std::vector<uint32_t> warp_barriers;
  void (*run_thread)(const void* call) = nullptr;
  const void* call = nullptr;
  int running = -1;
  int at_barrier = 0, done = 0;
};

Cta cta;
Current now{};
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
  cuda_emulator_switch(&cta.threads[cta.running].stack_pointer, scheduler_stack_pointer);
}

void wait(State state, Site site) {
  Thread& thread = cta.threads[cta.running];
  thread.state = state;
  thread.site = site;
  to_scheduler();
}

void leave() {
  const int self = cta.running;
  const uint32_t bit = 1u << self % kWarpSize;
  if (cta.at_barrier) fault("ended while other threads of its CTA wait at a barrier");
  for (int i = self / kWarpSize * kWarpSize; i < (self / kWarpSize + 1) * kWarpSize; ++i) {
    if (i >= static_cast<int>(cta.threads.size())) break;
    const Thread& other = cta.threads[i];
    if (other.state == State::kInWarp && other.mask & bit) {
      fault("ended while a lane of its warp waits for it in " + std::string(other.what) + " at " + at(other.site));
    }
  }
  cta.threads[self].state = State::kDone;
  ++cta.done;
  to_scheduler();
}

void thread_main() {
  cta.run_thread(cta.call);
  end_of_thread();
  leave();
}

void prepare(int index) {
  Thread& thread = cta.threads[index];
  const unsigned x = blockDim.x, y = blockDim.y;
  thread = {};
  thread.index = make_uint3(index % x, index / x % y, index / (x * y));
  // As after a call of thread_main: a return address that is never used, six registers that do not matter.
  auto** top = reinterpret_cast<void**>(stack_of(index) + kStackBytes);
  top[-2] = reinterpret_cast<void*>(thread_main);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  thread.stack_pointer = top - 8;
}

void resume(int index) {
  Thread& thread = cta.threads[index];
  cta.running = index;
  threadIdx = thread.index;
  now.in_kernel = true;
  now.thread = index;
  now.warp_barriers = cta.warp_barriers[index / kWarpSize];
  now.stack_begin = reinterpret_cast<uintptr_t>(stack_of(index));
  now.stack_end = now.stack_begin + kStackBytes;
  load_clock(index);
  cuda_emulator_switch(&scheduler_stack_pointer, thread.stack_pointer);
  now.in_kernel = false;
}

void report_stuck() {
  std::map<std::string, int> waiting;
  for (const Thread& thread : cta.threads) {
    if (thread.state == State::kDone) ++waiting["have ended"];
    if (thread.state == State::kAtBarrier) ++waiting["wait at the barrier at " + at(thread.site)];
    if (thread.state == State::kInWarp || thread.state == State::kBlocked)
      ++waiting["wait in " + std::string(thread.what) + " at " + at(thread.site)];
  }
  std::string message = "stuck: ";
  for (const auto& [where, count] : waiting) message += std::to_string(count) + " threads " + where + "; ";
  fault(message.substr(0, message.size() - 2));
}

void run_cta() {
  const int count = static_cast<int>(cta.threads.size());
  for (int i = 0; i < count; ++i) prepare(i);
  cta.at_barrier = cta.done = 0;
  cta.warp_barriers.assign((count + kWarpSize - 1) / kWarpSize, 0);
  now.barriers = 0;
  begin_cta();
  forget_copies();
  forget_barriers();
  forget_wgmma();
  forget_tensor_stores();
  forget_warpgroup_barriers();
  while (cta.done < count && fault_message.empty()) {
    bool progress = false;
    for (int i = 0; i < count && fault_message.empty(); ++i) {
      if (cta.threads[i].state != State::kReady) continue;
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

const Current& current() {
  return now;
}

void set_clock(uint32_t tick, uint32_t fences, const uint32_t* seen) {
  now.tick = tick, now.fences = fences, now.seen = seen;
}

std::string thread_name(int64_t cta_index, int thread) {
  return "thread " + std::to_string(thread) + " of CTA " + std::to_string(cta_index);
}

void fault(const std::string& message) {
  if (fault_message.empty()) fault_message = (now.in_kernel ? thread_name(now.cta, now.thread) + ": " : "") + message;
  if (now.in_kernel) to_scheduler();  // for good: the scheduler resumes nobody after a fault
}

cudaError_t run_grid(dim3 grid, dim3 block, void (*run_thread)(const void* call), const void* call, size_t bytes,
                     size_t dynamic_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  cta.threads.resize(threads);
  cta.run_thread = run_thread;
  cta.call = call;
  begin_grid(call, bytes, dynamic_bytes);
  now.cta = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x, ++now.cta) {
        blockIdx = make_uint3(x, y, z);
        run_cta();
        if (!fault_message.empty()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

void cta_barrier(Site site) {
  if (cta.done) fault("reached the barrier at " + at(site) + " when other threads of its CTA had ended");
  ++cta.at_barrier;
  if (cta.at_barrier < static_cast<int>(cta.threads.size())) return wait(State::kAtBarrier, site);
  for (const Thread& other : cta.threads) {
    if (other.state != State::kAtBarrier) continue;
    if (other.site.line != site.line || strcmp(other.site.file, site.file) != 0) {
      fault("waits at the barrier at " + at(site) + ", others at the one at " + at(other.site));
    }
  }
  cta.at_barrier = 0;
  ++now.barriers;
  for (Thread& thread : cta.threads) thread.state = State::kReady;
}

void warp_meet(const char* what, uint32_t mask, void* data, void (*combine)(Lanes& lanes), Site site) {
  const int self = cta.running, first = self / kWarpSize * kWarpSize;
  if (!(mask >> self % kWarpSize & 1)) fault("is not in the mask of its own " + std::string(what) + " at " + at(site));
  Thread& thread = cta.threads[self];
  thread.what = what;
  thread.mask = mask;
  thread.data = data;
  Lanes lanes = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int index = first + lane;
    const bool missing = index >= static_cast<int>(cta.threads.size()) || cta.threads[index].state == State::kDone;
    if (missing) fault(std::string(what) + " at " + at(site) + " names lane " + std::to_string(lane) + ", which ended");
    const Thread& other = cta.threads[index];
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
    if (mask >> lane & 1) cta.threads[first + lane].state = State::kReady;
  }
}

void warpgroup_meet(const char* what, void* data, void (*combine)(WarpgroupLanes& lanes), Site site) {
  const int self = cta.running, first = self / kWarpgroupSize * kWarpgroupSize;
  if (first + kWarpgroupSize > static_cast<int>(cta.threads.size()))
    fault(std::string(what) + " of a part of a warpgroup");
  Thread& thread = cta.threads[self];
  thread.what = what;
  thread.mask = 0xffffffffu;
  thread.data = data;
  WarpgroupLanes lanes;
  for (int i = 0; i < kWarpgroupSize; ++i) {
    const Thread& other = cta.threads[first + i];
    if (first + i != self && other.state != State::kInWarp) return wait(State::kInWarp, site);
    lanes[i] = other.data;
    if (first + i != self && (other.what != what || other.site.line != site.line)) {
      fault("is in " + std::string(what) + " at " + at(site) + ", thread " + std::to_string(first + i) + " in " +
            other.what + " at " + at(other.site));
    }
  }
  combine(lanes);
  for (int i = 0; i < kWarpgroupSize; ++i) cta.threads[first + i].state = State::kReady;
}

namespace {
std::map<int, int> warpgroup_of_barrier;
}

void warpgroup_barrier(int number, Site site) {
  const int self = cta.running / kWarpgroupSize;
  if (number < 1 || number > 15) fault("uses barrier number " + std::to_string(number) + " at " + at(site));
  if (warpgroup_of_barrier.emplace(number, self).first->second != self) {
    fault("uses barrier number " + std::to_string(number) + " at " + at(site) + ", which is another warpgroup's");
  }
  const auto combine = [](WarpgroupLanes& lanes) {
    for (void* lane : lanes) {
      if (*static_cast<int*>(lane) != *static_cast<int*>(lanes[0]))
        fault("threads of a barrier disagree about its number");
    }
    join_clocks_of_warpgroup(cta.running / kWarpgroupSize * kWarpgroupSize);
  };
  warpgroup_meet("bar.sync", &number, combine, site);
  load_clock(cta.running);
}

void forget_warpgroup_barriers() {
  warpgroup_of_barrier.clear();
}

void block(const char* what, Site site) {
  cta.threads[cta.running].what = what;
  cta.threads[cta.running].mask = 0;
  wait(State::kBlocked, site);
}

void wake(int thread) {
  cta.threads[thread].state = State::kReady;
}

void warp_barrier(uint32_t mask, Site site) {
  char nothing;
  const auto combine = [](Lanes& lanes) {
    const int warp = cta.running / kWarpSize;
    ++cta.warp_barriers[warp];
    uint32_t mask = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) mask |= static_cast<uint32_t>(lanes[lane] != nullptr) << lane;
    join_clocks_of_warp(warp * kWarpSize, mask);
  };
  warp_meet("__syncwarp", mask, &nothing, combine, site);
  now.warp_barriers = cta.warp_barriers[cta.running / kWarpSize];
  load_clock(cta.running);
}

}  // namespace cuda_emulator

// The message of the last fault, which it clears; "" when there was none.
extern "C" __attribute__((visibility("default"))) const char* emulator_take_fault() {
  static std::string taken;
  taken.swap(cuda_emulator::fault_message);
  cuda_emulator::fault_message.clear();
  return taken.c_str();
}
