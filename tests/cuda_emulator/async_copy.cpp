// cp.async as the PTX ISA has it: the data arrives when the thread that copies waits for its group, not a moment
// earlier; until then the target holds what nobody may read. (A GPU may be quicker. A kernel must not count on it.)
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "emulator.h"

namespace cuda_emulator {
namespace {

struct ThreadCopies {
  std::vector<Copy> open;                // not yet committed
  std::deque<std::vector<Copy>> groups;  // oldest first
};

std::map<int, ThreadCopies> copies;

}  // namespace

void cp_async(void* target, const void* source, size_t bytes, bool valid) {
  begin_copy(target, valid ? source : nullptr, bytes);
  Copy copy{target, bytes, {}};
  if (valid) memcpy(copy.data.data(), source, bytes);
  copies[current().thread].open.push_back(copy);
}

void cp_async_commit() {
  ThreadCopies& mine = copies[current().thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void cp_async_wait(int pending) {
  ThreadCopies& mine = copies[current().thread];
  while (static_cast<int>(mine.groups.size()) > pending) {
    for (const Copy& copy : mine.groups.front()) end_copy(copy.target, copy.data.data(), copy.bytes);
    mine.groups.pop_front();
  }
}

std::vector<Copy> take_open_copies() {
  return std::exchange(copies[current().thread].open, {});
}

void end_of_thread() {
  if (wgmma_under_way()) fault("ended with wgmma under way that it never waited for");
  if (tensor_stores_under_way()) fault("ended before its tensor_store()s had read their sources");
  ThreadCopies& mine = copies[current().thread];
  bool left = !mine.open.empty();
  for (const auto& group : mine.groups) left |= !group.empty();
  if (left) fault("ended with copies under way that it never waited for");
}

void forget_copies() {
  copies.clear();
}

}  // namespace cuda_emulator
