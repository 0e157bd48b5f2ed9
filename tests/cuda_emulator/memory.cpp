// Of every load and store of a kernel: it lies inside a buffer that the kernel may know, is aligned, does not read what
// nobody wrote, does not write what is read-only, and does not race. Two accesses of the same byte, one of them a
// write, race unless a barrier lies between them that both threads took part in; threads of different CTAs have none,
// but may have drawn tickets.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "atomics_emulated.cuh"
#include "emulator.h"

namespace cuda_emulator {
namespace {

// One or several accesses that are not ordered among each other: kSeveral where they differ in thread, warp or CTA.
constexpr int64_t kNone = -1, kSeveral = -2;

struct Access {
  int64_t cta = kNone, cluster = kNone;
  int32_t thread = 0, warp = 0;
  uint32_t barriers = 0, warp_barriers = 0, cluster_barriers = 0;
  uint32_t tick = 0, fences = 0;
  bool by_engine = false;
  bool atomic = false;
};

struct Byte {
  Access read, write;
  bool defined = false;
  bool under_copy = false;
};

// Made page by page: most of a large buffer is not touched.
constexpr size_t kPageBytes = 256;
using Page = std::array<Byte, kPageBytes>;

struct Region {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  bool defined = false;  // what nobody has touched yet
  bool used = false;
  std::vector<std::unique_ptr<Page>> pages = {};  // of writable regions: those of which a byte was touched

  Byte& byte(uintptr_t address) {
    std::unique_ptr<Page>& page = pages[(address - begin) / kPageBytes];
    if (!page) {
      page = std::make_unique<Page>();
      for (Byte& byte : *page) byte.defined = defined;
    }
    return (*page)[(address - begin) % kPageBytes];
  }
  void forget_bytes() {
    pages.clear();
    pages.resize((end - begin + kPageBytes - 1) / kPageBytes);
  }
  void forget_accesses() {
    for (std::unique_ptr<Page>& page : pages) {
      if (!page) continue;
      for (Byte& byte : *page) byte.read = byte.write = Access{};
    }
  }
};

std::vector<Region> buffers, shared;
Region params{"the kernel's parameters", 0, 0, false};
std::vector<Region> dynamic;  // of the CTAs of a cluster
std::array<Region*, 256> recently_found;
bool overlap = false;  // of buffers
uintptr_t image_begin, image_end;

Access this_access() {
  const Current& now = current();
  return {now.cta,      now.cluster,       now.thread,           now.thread / kWarpSize,
          now.barriers, now.warp_barriers, now.cluster_barriers, now.tick,
          now.fences};
}

// A ticket that a thread drew from a counter, and for those who drew later what it tells them.
struct Draw {
  int64_t cta;
  int32_t thread;
  uint32_t barriers;
  bool last;
};
std::unordered_map<uintptr_t, std::vector<Draw>> draws;  // of the grid, of each counter
struct Seen {
  Draw earlier, own;
};
std::vector<Seen> seen_draws;  // by the cluster that runs

// Of several CTAs it is not known any more when each of them drew: who drew last is taken to come after all.
bool ordered_by_tickets(const Access& before, const Access& now) {
  return std::any_of(seen_draws.begin(), seen_draws.end(), [&](const Seen& seen) {
    const auto& [earlier, own] = seen;
    if (own.cta != now.cta || (own.thread != now.thread && own.barriers >= now.barriers)) return false;
    if (before.cta == kSeveral) return own.last;
    return earlier.cta == before.cta && (earlier.thread == before.thread || before.barriers < earlier.barriers);
  });
}

bool ordered(const Access& before, const Access& now) {
  if (before.cta == kNone) return true;
  if (before.cta != now.cta) {
    const bool together = before.cta != kSeveral && before.cluster == now.cluster;
    return (together && before.cluster_barriers < now.cluster_barriers) || ordered_by_tickets(before, now);
  }
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  if (before.warp == now.warp && before.warp_barriers < now.warp_barriers) return true;
  const uint32_t* seen = current().seen;
  return seen && before.thread >= 0 && before.tick < seen[before.thread];
}

void merge(Access& reads, const Access& now) {
  if (ordered(reads, now)) {
    reads = now;
    return;
  }
  if (reads.cta != now.cta) reads.cta = kSeveral;
  if (reads.thread != now.thread) reads.thread = kSeveral;
  if (reads.warp != now.warp) reads.warp = kSeveral;
  reads.barriers = now.barriers;
  reads.warp_barriers = std::max(reads.warp_barriers, now.warp_barriers);
  reads.cluster_barriers = now.cluster_barriers;
}

// Further reads of a byte that are not ordered among each other, where threads have clocks: one each.
std::unordered_map<uintptr_t, std::vector<Access>> other_reads;

void add_read(uintptr_t address, Access& first, const Access& now) {
  if (!current().seen) return merge(first, now);
  if (ordered(first, now)) {
    first = now;
    return;
  }
  std::vector<Access>& others = other_reads[address];
  others.erase(std::remove_if(others.begin(), others.end(), [&](const Access& a) { return ordered(a, now); }),
               others.end());
  others.push_back(now);
}

// A read that the write `now` would race with; nullptr when there is none.
const Access* racing_read(uintptr_t address, const Access& first, const Access& now) {
  if (!ordered(first, now)) return &first;
  const auto found = other_reads.find(address);
  if (found == other_reads.end()) return nullptr;
  for (const Access& other : found->second) {
    if (!ordered(other, now)) return &other;
  }
  other_reads.erase(found);
  return nullptr;
}

std::string who(const Access& access) {
  if (access.cta == kSeveral) return "threads of several CTAs";
  if (access.thread == kSeveral) return "several threads of CTA " + std::to_string(access.cta);
  return thread_name(access.cta, access.thread);
}

std::string place(const Region& region, uintptr_t address, const void* code) {
  char text[64];
  snprintf(text, sizeof text, " (code at %p)", static_cast<const void*>(code));
  return "byte " + std::to_string(static_cast<int64_t>(address - region.begin)) + " of " + region.name +
         ", which has " + std::to_string(region.end - region.begin) + text;
}

void check_bytes(Region& region, uintptr_t address, size_t size, bool write, const void* code, bool atomic = false) {
  Access now = this_access();
  now.atomic = atomic;
  for (uintptr_t i = address; i < address + size; ++i) {
    Byte& byte = region.byte(i);
    if (!ordered(byte.write, now) && !(atomic && byte.write.atomic)) {
      fault(std::string("race: ") + (write ? "writes " : "reads ") + place(region, i, code) +
            ", without a barrier after " + who(byte.write) + " wrote it");
    }
    const Access* reader = write ? racing_read(i, byte.read, now) : nullptr;
    if (reader) {
      fault("race: writes " + place(region, i, code) + ", without a barrier after " + who(*reader) + " read it");
    }
    if (write && byte.under_copy) fault("writes " + place(region, i, code) + ", under a copy that may not be done");
    if (!write && !byte.defined) fault("reads " + place(region, i, code) + ", which nobody wrote");
    if (write) {
      byte.write = now;
      byte.defined = true;
    } else {
      add_read(i, byte.read, now);
    }
  }
}

bool has(const Region& region, uintptr_t address) {
  return address >= region.begin && address < region.end;
}

Region* search(uintptr_t address) {
  if (has(params, address)) return &params;
  for (auto* list : {&dynamic, &shared, &buffers}) {
    for (Region& region : *list) {
      if (has(region, address)) return &region;
    }
  }
  return nullptr;
}

// Where regions overlap, the one that comes first counts.
Region* find(uintptr_t address) {
  if (overlap) return search(address);
  Region*& recent = recently_found[address / kPageBytes % recently_found.size()];
  if (!recent || !has(*recent, address)) recent = search(address);
  return recent;
}

// For the message: the buffer that a stray address was probably meant for.
const Region* nearest(uintptr_t address) {
  const Region* best = nullptr;
  uintptr_t least = 1 << 20;
  for (const Region& region : dynamic) {
    if (region.begin != region.end && address - region.end < 1024) return &region;
  }
  for (const auto* list : {&buffers, &shared}) {
    for (const Region& region : *list) {
      const uintptr_t distance = address < region.begin ? region.begin - address : address - region.end + 1;
      if (distance < least) least = distance, best = &region;
    }
  }
  return best;
}

void make_undefined(Region& region) {
  memset(reinterpret_cast<void*>(region.begin), 0xff, region.end - region.begin);  // NaN, -1
  region.forget_bytes();
  region.used = false;
}

}  // namespace

void check_memory(const void* pointer, size_t size, bool write, size_t alignment, const void* code) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Region* region = find(address);
  const auto verb = [write] { return std::string(write ? "writes " : "reads "); };
  if (!region) {
    if (!write && address >= image_begin && address + size <= image_end) return;  // a constant
    const Region* meant = nearest(address);
    return fault(verb() + (meant ? place(*meant, address, code) : "where no buffer is"));
  }
  if (address + size > region->end)
    return fault(verb() + std::to_string(size) + " bytes at " + place(*region, address, code));
  if (address % alignment)
    return fault(verb() + std::to_string(size) + " bytes, misaligned, at " + place(*region, address, code));
  if (write && !region->writable) return fault(verb() + "the input " + place(*region, address, code));
  region->used = true;
  if (region->writable) check_bytes(*region, address, size, write, code);
}

// Of a read and a write of a variable, which do not race with other atomics.
void check_atomic(uint32_t* pointer, const void* code) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Region* region = find(address);
  if (!region || address + sizeof *pointer > region->end || !region->writable || address % sizeof *pointer) {
    fault("an atomic where no variable is");
  }
  region->used = true;
  for (uintptr_t i = address; i < address + sizeof *pointer; ++i) {
    if (!region->byte(i).defined) fault("an atomic adds to " + place(*region, i, code) + ", which nobody wrote");
  }
  check_bytes(*region, address, sizeof *pointer, true, code, true);
}

uint32_t atomic_add(uint32_t* pointer, uint32_t value, const void* code) {
  check_atomic(pointer, code);
  const uint32_t before = *pointer;
  *pointer = before + value;
  return before;
}

uint32_t draw_ticket(uint32_t* counter, uint32_t last, const void* code) {
  check_atomic(counter, code);
  const Draw own{current().cta, current().thread, current().barriers, *counter >= last};
  std::vector<Draw>& all = draws[reinterpret_cast<uintptr_t>(counter)];
  for (const Draw& earlier : all) seen_draws.push_back({earlier, own});
  all.push_back(own);
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

void set_image(uintptr_t begin, uintptr_t end) {
  image_begin = begin, image_end = end;
}

void begin_grid(const void* call, size_t bytes, size_t dynamic_bytes, unsigned cluster) {
  static std::vector<unsigned char> memory;
  const size_t pitch = (dynamic_bytes + 1023) / 1024 * 1024 + 1024;  // a gap: an access beyond the end is one
  memory.resize(cluster * pitch + 1024);
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024;
  dynamic.clear();
  for (unsigned rank = 0; rank < cluster; ++rank) {
    const uintptr_t begin = first + rank * pitch;
    dynamic.push_back({"dynamic shared memory", begin, begin + dynamic_bytes, true});
    make_undefined(dynamic.back());
  }
  recently_found.fill(nullptr);
  params.begin = reinterpret_cast<uintptr_t>(call);
  params.end = params.begin + bytes;
  draws.clear();
  for (Region& region : buffers) region.forget_accesses();  // kernels of a stream run one after the other
}

void begin_cluster() {
  for (auto* list : {&shared, &dynamic}) {
    for (Region& region : *list) {
      if (region.used) make_undefined(region);
    }
  }
  other_reads.clear();
  seen_draws.clear();
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(dynamic[current().rank].begin);
}

const void* in_cluster(const void* own, int rank, Site site) {
  const Region& mine = dynamic[current().rank];
  const uintptr_t offset = reinterpret_cast<uintptr_t>(own) - mine.begin;
  if (offset >= mine.end - mine.begin) fault("names what is not its dynamic shared memory at " + at(site));
  if (rank < 0 || rank >= static_cast<int>(dynamic.size())) {
    fault("names rank " + std::to_string(rank) + " of a cluster of " + std::to_string(dynamic.size()) + " at " +
          at(site));
  }
  if (has_ended(rank)) fault("reads the shared memory of a CTA that has ended at " + at(site));
  return reinterpret_cast<const void*>(dynamic[rank].begin + offset);
}

void begin_copy(void* target, const void* source, size_t bytes) {
  if (source) check(source, bytes, false, bytes, __builtin_return_address(0));
  check(target, bytes, true, bytes, __builtin_return_address(0));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(target);
  Region* region = find(begin);
  const bool is_shared = region && (region == &dynamic[current().rank] || region->name.rfind("shared", 0) == 0);
  if (!is_shared || region->end < begin + bytes) {
    return fault("copies to what is not shared memory");
  }
  for (uintptr_t i = begin; i < begin + bytes; ++i) {
    Byte& byte = region->byte(i);
    byte.defined = false;
    byte.under_copy = true;
  }
  memset(target, 0xff, bytes);
}

void end_copy(void* target, const void* data, size_t bytes, bool by_engine) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(target);
  Region& region = *find(begin);
  for (uintptr_t i = begin; i < begin + bytes; ++i) {
    Byte& byte = region.byte(i);
    byte.write = this_access();
    byte.write.by_engine = by_engine;
    byte.defined = true;
    byte.under_copy = false;
  }
  memcpy(target, data, bytes);
}

void check_async_read(const void* pointer, size_t bytes, const char* reader) {
  check(pointer, bytes, false, bytes, __builtin_return_address(0));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  Region* region = find(begin);
  for (uintptr_t i = begin; i < begin + bytes; ++i) {
    const Access& write = region->byte(i).write;
    if (!write.by_engine && proxy_fences(write.thread) <= write.fences) {
      return fault(std::string(reader) + " reads " + place(*region, i, nullptr) + ", without a proxy fence after " +
                   who(write) + " wrote it");
    }
  }
}

}  // namespace cuda_emulator

#define EXPORT extern "C" __attribute__((visibility("default")))

// Tells what the kernels may touch. An output is undefined until it is written.
enum BufferKind { kInput, kInOut, kOutput };

EXPORT void emulator_add_buffer(const char* name, void* pointer, int64_t bytes, int kind) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  for (const auto& other : cuda_emulator::buffers) {
    if (begin < other.end && other.begin < begin + bytes) cuda_emulator::overlap = true;
  }
  cuda_emulator::buffers.push_back({name, begin, begin + bytes, kind != kInput, kind == kInOut});
  auto& region = cuda_emulator::buffers.back();
  if (kind == kOutput) cuda_emulator::make_undefined(region);
  if (kind == kInOut) region.forget_bytes();
}

EXPORT void emulator_clear_buffers() {
  cuda_emulator::buffers.clear();
  cuda_emulator::overlap = false;
}

// A variable in shared memory.
EXPORT void emulator_add_shared(const char* name, uintptr_t address, int64_t bytes) {
  cuda_emulator::shared.push_back({name, address, address + bytes, true});
  cuda_emulator::make_undefined(cuda_emulator::shared.back());
}
