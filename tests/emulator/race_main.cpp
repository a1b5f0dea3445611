// The race check: every launch function under ThreadSanitizer, one of its fibers a CUDA thread. Exit status 66 and a
// report where two threads touch one place without a barrier between. `fault NAME` runs a seeded fault instead.
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda_on_cpu.h"
#include "faults.h"
#include "race.h"

namespace {

constexpr int (*kOperators[])() = {
    race_adaln, race_bias_activation, race_eos_log_prob,   race_masked_linear_cross_entropy,
    race_qgfd,  race_scale_shift,     race_token_sampling, race_unmask,
};

int run_fault(const char* name) {
  std::vector<float> in(512, 1.0f), out(512);
  return cuda_on_cpu::faults::run(name, in.data(), out.data(), 128);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 3 && !std::strcmp(arguments[1], "fault")) return run_fault(arguments[2]);
    for (const auto& race : kOperators) {
      if (race()) return 1;
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
