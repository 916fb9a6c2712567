// Counter-based noise, shared by compiled backends: Philox4x32-10 (Salmon et al., SC'11).
#pragma once

#include <cstdint>

#include "group_step.h"

namespace ato {

// Word `index % 4` of the block with counter (index / 4, draw), low words first, and key `seed`.
ATO_FN uint32_t philox_word(uint64_t seed, uint64_t draw, uint64_t index) {
  const uint64_t block = index / 4;
  uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32);
  uint32_t c = static_cast<uint32_t>(draw), d = static_cast<uint32_t>(draw >> 32);
  uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = 0xD2511F53ull * a, high = 0xCD9E8D57ull * c;
    a = static_cast<uint32_t>(high >> 32) ^ b ^ first;
    b = static_cast<uint32_t>(high);
    c = static_cast<uint32_t>(low >> 32) ^ d ^ second;
    d = static_cast<uint32_t>(low);
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
  switch (index % 4) {
    case 0:
      return a;
    case 1:
      return b;
    case 2:
      return c;
    default:
      return d;
  }
}

// A number in (0, 1) that fp32 holds exactly.
ATO_FN float uniform_number(uint64_t seed, uint64_t draw, uint64_t index) {
  const uint32_t bits = philox_word(seed, draw, index) >> 9;
  return (static_cast<float>(bits) + 0.5f) * (1.0f / 8388608.0f);
}

}  // namespace ato
