// What -fsanitize=thread and -fsanitize=bounds,... call, answered with our own checks instead of the compilers' runtime
// libraries.
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulator.h"

using cuda_emulator::fault;

namespace {

bool known = false;

// Tells memory.cpp where this library lies: constants in it may be read.
int find_image(dl_phdr_info* info, size_t, void*) {
  const uintptr_t self = reinterpret_cast<uintptr_t>(&find_image);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  if (self < begin || self >= end) return 0;
  cuda_emulator::set_image(begin, end);
  known = true;
  return 1;
}

}  // namespace

extern "C" {

void __tsan_init() {
  if (!known) dl_iterate_phdr(find_image, nullptr);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define ACCESS(bytes)                                                          \
  void __tsan_read##bytes(void* p) {                                           \
    cuda_emulator::check(p, bytes, false, bytes, __builtin_return_address(0)); \
  }                                                                            \
  void __tsan_write##bytes(void* p) {                                          \
    cuda_emulator::check(p, bytes, true, bytes, __builtin_return_address(0));  \
  }
#define UNALIGNED(bytes)                                                   \
  void __tsan_unaligned_read##bytes(void* p) {                             \
    cuda_emulator::check(p, bytes, false, 1, __builtin_return_address(0)); \
  }                                                                        \
  void __tsan_unaligned_write##bytes(void* p) {                            \
    cuda_emulator::check(p, bytes, true, 1, __builtin_return_address(0));  \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_read_range(void* p, uintptr_t bytes) {
  cuda_emulator::check(p, bytes, false, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* p, uintptr_t bytes) {
  cuda_emulator::check(p, bytes, true, 1, __builtin_return_address(0));
}

// -fsanitize=alignment, bounds, shift, signed-integer-overflow, integer-divide-by-zero. Their data starts with the
// place.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED_BEHAVIOUR(kind, text)                                                                 \
  void __ubsan_handle_##kind##_abort(const SourceLocation* at) {                                        \
    const std::string message = std::string(text) + " at " + at->file + ":" + std::to_string(at->line); \
    fault(message);                                                                                     \
    fprintf(stderr, "in a launcher: %s\n", message.c_str()); /* a kernel does not come here */          \
    abort();                                                                                            \
  }
UNDEFINED_BEHAVIOUR(type_mismatch_v1, "a misaligned access")
UNDEFINED_BEHAVIOUR(out_of_bounds, "an array index out of bounds")
UNDEFINED_BEHAVIOUR(shift_out_of_bounds, "a shift by more than the width, or of a negative value")
UNDEFINED_BEHAVIOUR(add_overflow, "an integer overflow")
UNDEFINED_BEHAVIOUR(sub_overflow, "an integer overflow")
UNDEFINED_BEHAVIOUR(mul_overflow, "an integer overflow")
UNDEFINED_BEHAVIOUR(negate_overflow, "an integer overflow")
UNDEFINED_BEHAVIOUR(divrem_overflow, "a division by zero")

}  // extern "C"
