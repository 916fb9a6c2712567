// How the CPU's inner loops are compiled, and sums whose order is fixed.
#pragma once

#include <cstdint>

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
