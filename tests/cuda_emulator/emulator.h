// Runs CUDA kernels on the CPU: what it does, not how fast. A grid runs CTA by CTA; a CTA's threads are fibers of one
// OS thread that run until they reach a barrier or a warp-wide instruction, and meet there.
//
// Kernels are compiled with -fsanitize=thread, not for its library but for the calls it puts before every load and
// store: memory.cpp answers them with the checks of compute-sanitizer's memcheck, initcheck and racecheck.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_emulator {

constexpr int kWarpSize = 32;

// Where in the source a barrier or warp-wide instruction stands: threads that meet must come from the same place.
struct Site {
  const char* file;
  int line;
};

// ---- scheduler.cpp --------------------------------------------------------------------------------------------------
// Every thread calls run_thread(call); `call` has `bytes` bytes, which the kernel may read, and each CTA has
// `dynamic_bytes` of dynamic shared memory.
cudaError_t run_grid(dim3 grid, dim3 block, void (*run_thread)(const void* call), const void* call, size_t bytes,
                     size_t dynamic_bytes);

void cta_barrier(Site site);

// Waits for all lanes of `mask`, then calls `combine` once with what each lane passed as `data` (nullptr outside the
// mask).
using Lanes = void* [kWarpSize];
void warp_meet(const char* what, uint32_t mask, void* data, void (*combine)(Lanes& lanes), Site site);
void warp_barrier(uint32_t mask, Site site);

// Ends the launch with a message for the test. Does not return when a thread of a kernel calls it.
void fault(const std::string& message);

// The thread that runs: what the race check needs to know. `barriers` and `warp_barriers` count those passed so far.
struct Current {
  bool in_kernel;
  int64_t cta;
  int thread;
  uint32_t barriers, warp_barriers;
  uintptr_t stack_begin, stack_end;
};
const Current& current();
std::string thread_name(int64_t cta, int thread);

// ---- memory.cpp -----------------------------------------------------------------------------------------------------
void begin_grid(const void* call, size_t bytes, size_t dynamic_bytes);
void begin_cta();
unsigned char* dynamic_shared();

// A copy that other hardware than the thread makes: it reads global memory and takes the target away at once, and
// gives it at the end; in between nobody may read or write there.
void begin_copy(void* target, const void* source, size_t bytes);
void end_copy(void* target, const void* data, size_t bytes);

// ---- async_copy.cpp -------------------------------------------------------------------------------------------------
void cp_async(void* target, const void* source, size_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
void end_of_thread();  // what a thread must not leave behind
void forget_copies();  // before a CTA begins

}  // namespace cuda_emulator
