// Runs CUDA kernels on the CPU: what it does, not how fast. A grid runs cluster by cluster, of one CTA unless the
// launch says otherwise; a cluster's threads are fibers of one OS thread that run until they reach a barrier or a
// warp-wide instruction, and meet there. Threads are numbered through their cluster.
//
// Kernels are compiled with -fsanitize=thread, not for its library but for the calls it puts before every load and
// store: memory.cpp answers them with the checks of compute-sanitizer's memcheck, initcheck and racecheck.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_emulator {

constexpr int kWarpSize = 32;

// Where in the source a barrier or warp-wide instruction stands: threads that meet must come from the same place.
struct Site {
  const char* file;
  int line;
};
std::string at(Site site);

// ---- scheduler.cpp --------------------------------------------------------------------------------------------------
// Every thread calls run_thread(call); `call` has `bytes` bytes, which the kernel may read, and each CTA has
// `dynamic_bytes` of dynamic shared memory.
cudaError_t run_grid(dim3 grid, dim3 block, unsigned cluster, void (*run_thread)(const void* call), const void* call,
                     size_t bytes, size_t dynamic_bytes);

void cta_barrier(Site site);
void cluster_barrier(Site site);
int threads_of_cta();
int threads_of_cluster();
int first_thread_of_warpgroup();  // of the current thread's
bool has_ended(int rank);         // whether a CTA of the cluster has, all threads

// Waits for all lanes of `mask`, then calls `combine` once with what each lane passed as `data` (nullptr outside the
// mask).
using Lanes = void* [kWarpSize];
void warp_meet(const char* what, uint32_t mask, void* data, void (*combine)(Lanes& lanes), Site site);
void warp_barrier(uint32_t mask, Site site);

// The same for the four warps of a warpgroup.
constexpr int kWarpgroupSize = 4 * kWarpSize;
using WarpgroupLanes = void* [kWarpgroupSize];
void warpgroup_meet(const char* what, void* data, void (*combine)(WarpgroupLanes& lanes), Site site);

// A barrier of a warpgroup, one of the CTA's 15 that have a number.
void warpgroup_barrier(int number, Site site);
void forget_warpgroup_barriers();

// The current thread stops until another one wakes it.
void block(const char* what, Site site);
void wake(int thread);

// Ends the launch with a message for the test. Does not return when a thread of a kernel calls it.
void fault(const std::string& message);

// The thread that runs: what the race check needs to know. `barriers` and `warp_barriers` count those passed so far.
struct Current {
  bool in_kernel;
  int64_t cta, cluster;
  int thread, rank;  // rank: of the CTA in its cluster
  uint32_t barriers, warp_barriers, cluster_barriers;
  uintptr_t stack_begin, stack_end;
  uint32_t tick, fences;  // see mbarrier.cpp
  const uint32_t* seen;
};
extern Current running;
inline const Current& current() {
  return running;
}
void set_clock(uint32_t tick, uint32_t fences, const uint32_t* seen);
std::string thread_name(int64_t cta, int thread);

// ---- memory.cpp -----------------------------------------------------------------------------------------------------
// `code`: where in the program, for the message.
void check_memory(const void* pointer, size_t size, bool write, size_t alignment, const void* code);
inline void check(const void* pointer, size_t size, bool write, size_t alignment, const void* code) {
  const Current& now = current();
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!now.in_kernel || (address >= now.stack_begin && address + size <= now.stack_end)) return;
  check_memory(pointer, size, write, alignment, code);
}
void set_image(uintptr_t begin, uintptr_t end);
void begin_grid(const void* call, size_t bytes, size_t dynamic_bytes, unsigned cluster);
void begin_cluster();
unsigned char* dynamic_shared();
// Where a CTA of the cluster has what this one has at `own`.
const void* in_cluster(const void* own, int rank, Site site);

// Gives the counter's number, which becomes one more, and 0 behind `last`. What this thread did before, and its CTA
// before its latest barrier, is before all that a thread does that draws later, and its CTA behind its next barrier.
uint32_t draw_ticket(uint32_t* counter, uint32_t last, const void* code);

// A copy that other hardware than the thread makes: it reads global memory and takes the target away at once, and
// gives it at the end; in between nobody may read or write there.
void begin_copy(void* target, const void* source, size_t bytes);
// `by_engine`: written by the engine that copies boxes, which wgmma sees without a fence.
void end_copy(void* target, const void* data, size_t bytes, bool by_engine = false);

// A read by wgmma or by a store of boxes, which do not see ordinary stores that no fence_proxy_async() of their thread
// follows.
void check_async_read(const void* pointer, size_t bytes, const char* reader);

// ---- async_copy.cpp -------------------------------------------------------------------------------------------------
struct Copy {
  void* target;
  size_t bytes;                        // up to 16
  std::array<unsigned char, 16> data;  // as it was when the copy was issued
  bool by_engine = false;
};
void cp_async(void* target, const void* source, size_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
std::vector<Copy> take_open_copies();  // those of this thread that are in no group yet
void end_of_thread();                  // what a thread must not leave behind
void forget_copies();                  // before a CTA begins; so for the two below

// ---- tensor_copy.cpp -----------------------------------------------------------------------------------------------
struct Matrix {
  unsigned char* begin;
  int64_t rows, width, row_bytes;  // rows: of a part; others: bytes
  int parts, box_rows, box_bytes;  // box_rows: of each part
  bool swizzled;
};
// `column`: in bytes.
void tensor_load(void* target, const Matrix& matrix, int parts, int row, int column, const void* barrier, Site site);
void tensor_store(const Matrix& matrix, int row, int column, const void* source);
void tensor_stores_read();
bool tensor_stores_under_way();
void forget_tensor_stores();

// ---- mbarrier.cpp ---------------------------------------------------------------------------------------------------
void mbarrier_init(const void* address, int count, Site site);
void mbarrier_arrive(const void* address, Site site);
void mbarrier_arrive_after_copies(const void* address, Site site);
void mbarrier_wait(const void* address, int parity, Site site);
void mbarrier_arrive_expecting(const void* address, int bytes, Site site);
void mbarrier_take_copies(const void* address, const std::vector<Copy>& copies, Site site);  // of a tensor_load()
void proxy_fence();
uint32_t proxy_fences(int thread);                   // how many a thread has passed
void load_clock(int thread);                         // calls set_clock()
void join_clocks_of_warp(int first, uint32_t mask);  // after a warp's barrier
void join_clocks_of_warpgroup(int first);
void forget_barriers();

// ---- wgmma.cpp ------------------------------------------------------------------------------------------------------
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
bool wgmma_under_way();
void forget_wgmma();

}  // namespace cuda_emulator
