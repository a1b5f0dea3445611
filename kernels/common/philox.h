// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), for host and device alike.
//
// All of fastdiff's random numbers are philox(key = seed, counter = (sequence id, absolute position, step, draw)): a
// function of what is drawn for, not of the batch, the backend or the threads. Ids are taken modulo 2^32.
#pragma once
#include <stdint.h>

#include "kernels/common/host_device.h"

namespace fastdiff {

// What a number is drawn for: the last word of the counter.
enum class Draw : uint32_t {
  kToken = 0,      // sample_tokens, lm_head_sample: which id
  kOrder = 1,      // unmask_, order "random"
  kAncestral = 2,  // unmask_, rule "ancestral"
};

struct Philox {
  uint32_t word[4];
};

FD_HOST_DEVICE Philox philox(uint64_t seed, uint64_t sequence, uint64_t position, uint64_t step, Draw draw) {
  uint32_t c0 = static_cast<uint32_t>(sequence), c1 = static_cast<uint32_t>(position), c2 = static_cast<uint32_t>(step);
  uint32_t c3 = static_cast<uint32_t>(draw), k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 53 random bits in [0, 1).
FD_HOST_DEVICE double uniform53(const Philox& r) {
  return (static_cast<double>(r.word[0] >> 5) * 67108864.0 + static_cast<double>(r.word[1] >> 6)) * 0x1p-53;
}

}  // namespace fastdiff
