// The race check of each operator: race_<op>.cpp runs its launch functions on cases that reach every kernel.
#pragma once
#include <cstdint>
#include <vector>

// Numbers in [-2, 2) that differ from place to place.
inline std::vector<float> numbers(int64_t count) {
  std::vector<float> v(count);
  uint32_t state = 1;
  for (float& x : v) x = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-22f - 2.0f;
  return v;
}

// 0, or 1 where a launch was refused
int race_adaln();
int race_bias_activation();
int race_eos_log_prob();
int race_masked_linear_cross_entropy();
int race_qgfd();
int race_scale_shift();
int race_token_sampling();
int race_unmask();
