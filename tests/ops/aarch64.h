// What the aarch64 programs of tests/ops/test_aarch64.py share: a loop in place of threads, and operands from stdin.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/common/parallel_for.h"

inline void run_serially(int64_t begin, int64_t end, int64_t, fastdiff::cpu::ParallelFor::Body body, const void* closure) {
  body(closure, begin, end);
}

template <class T = char>
std::vector<T> read(int64_t count) {
  std::vector<T> data(count);
  if (fread(data.data(), sizeof(T), count, stdin) != size_t(count)) exit(2);
  return data;
}
