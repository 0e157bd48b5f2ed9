// Copies of boxes of a matrix between global and shared memory (cp.async.bulk.tensor, with the 128-byte swizzle or
// none). Loads
// end with the phase of their barrier, stores when their thread waits for them: as late as the PTX ISA allows.
#include <cstring>
#include <map>
#include <vector>

#include "emulator.h"

namespace cuda_emulator {
namespace {

constexpr int kChunk = 16;  // bytes

struct Store {
  Matrix matrix;
  int row, column;
  unsigned char* source;
};
std::map<int, std::vector<Store>> stores;  // of a thread, not yet waited for

// Calls per_chunk(place in shared memory, place in the matrix or nullptr) for each 16 bytes of a box.
template <typename PerChunk>
void for_each_chunk(const Matrix& m, int row, int column, unsigned char* box, PerChunk per_chunk) {
  const uintptr_t alignment = m.swizzled ? 1024 : 128;
  if (reinterpret_cast<uintptr_t>(box) % alignment) {
    fault("a tensor copy that is not aligned to " + std::string(m.swizzled ? "1,024" : "128") + " bytes");
  }
  for (int i = 0; i < m.parts * m.box_rows; ++i) {
    const int64_t before = i / m.box_rows * m.rows;
    for (int c = 0; c < m.box_bytes / kChunk; ++c) {
      const int64_t r = int64_t{row} + i % m.box_rows, byte = int64_t{column} + c * kChunk;
      const bool inside = r >= 0 && r < m.rows && byte >= 0 && byte < m.width;
      const int place = m.swizzled ? c ^ i % 8 : c;
      per_chunk(box + i * m.box_bytes + place * kChunk, inside ? m.begin + (before + r) * m.row_bytes + byte : nullptr);
    }
  }
}

}  // namespace

void tensor_load(void* target, const Matrix& matrix, int parts, int row, int column, const void* barrier, Site site) {
  if (matrix.parts != parts) fault("a tensor copy of another number of dimensions than its map's");
  std::vector<Copy> copies;
  const auto load = [&](unsigned char* place, const unsigned char* source) {
    begin_copy(place, source, 16);
    Copy copy{place, 16, {}, true};
    if (source) memcpy(copy.data.data(), source, 16);
    copies.push_back(copy);
  };
  for_each_chunk(matrix, row, column, static_cast<unsigned char*>(target), load);
  mbarrier_take_copies(barrier, copies, site);
}

void tensor_store(const Matrix& matrix, int row, int column, const void* source) {
  auto* box = static_cast<unsigned char*>(const_cast<void*>(source));
  for_each_chunk(matrix, row, column, box, [](const unsigned char* place, const unsigned char* target) {
    if (target) check_async_read(place, 16, "tensor_store");
  });
  stores[current().thread].push_back({matrix, row, column, box});
}

void tensor_stores_read() {
  for (const Store& store : stores[current().thread]) {
    const auto copy = [](const unsigned char* place, unsigned char* target) {
      if (!target) return;
      check(target, 16, true, 16, __builtin_return_address(0));
      memcpy(target, place, 16);
    };
    for_each_chunk(store.matrix, store.row, store.column, store.source, copy);
  }
  stores.erase(current().thread);
}

bool tensor_stores_under_way() {
  return stores.count(current().thread) != 0;
}

void forget_tensor_stores() {
  stores.clear();
}

}  // namespace cuda_emulator
