// How the CPU's inner loops are compiled, and sums whose order is fixed.
#pragma once

#include <cstdint>
#include <cstring>

#include "group_step.h"

// One build serves every x86-64: the loader picks the widest clone the machine has. Elsewhere, and
// with compilers that lack the attribute's arch= levels, the plain build is what runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(ATO_NO_CLONES)
#define ATO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ATO_CLONES
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define ATO_NO_ALIAS _Pragma("GCC ivdep")
#elif defined(__clang__)
#define ATO_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#else
#define ATO_NO_ALIAS
#endif

namespace ato::cpu {

ATO_FN uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

ATO_FN float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// exp(x) = 2^n * (1 + m), with n in the lowest bits of `shifted`.
struct Exponential {
  float m, shifted;
};

// For -87 <= x <= 88.72: m by a Taylor series to r^7, |r| <= ln(2)/2 (remainder 5e-9).
ATO_FN Exponential exponential_of(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln(2) in two parts: n times the first is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  return {p * r * r + r, shifted};
}

constexpr int64_t kLanes = 16;

// Sums in float64 over kLanes lanes, element i in lane i % kLanes, joined pairwise at the end.
template <int kSums>
struct LaneSums {
  double lanes[kSums][kLanes] = {};

  ATO_FN void join(double (&sums)[kSums]) {
    for (int k = 0; k < kSums; ++k) {
      for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t j = 0; j < width; ++j) {
          lanes[k][j] += lanes[k][j + width];
        }
      }
      sums[k] += lanes[k][0];
    }
  }
};

}  // namespace ato::cpu
