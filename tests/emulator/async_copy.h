// A thread's copies to shared memory that it has not waited for yet, in the order and the groups in which it made them.
#pragma once
#include <cstddef>
#include <deque>

namespace cuda_on_cpu {

struct AsyncCopy {  // of 16 bytes
  void* to;
  const void* from;  // nullptr: zeros
};

struct AsyncCopies {
  std::deque<AsyncCopy> copies;
  std::deque<size_t> groups;  // how many copies each has
  size_t committed = 0;       // copies that are in a group

  void commit() {
    groups.push_back(copies.size() - committed);
    committed = copies.size();
  }
  // The next copy that a wait for all groups but the last `pending` makes; false where there is none.
  bool next(size_t pending, AsyncCopy& copy) {
    while (groups.size() > pending && groups.front() == 0) groups.pop_front();
    if (groups.size() <= pending) return false;
    copy = copies.front();
    copies.pop_front();
    --groups.front();
    --committed;
    return true;
  }
};

}  // namespace cuda_on_cpu
