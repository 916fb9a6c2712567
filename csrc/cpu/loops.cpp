#include "loops.h"

#include <cstring>

// One build serves every x86-64: the loader picks the widest clone the machine has. Elsewhere, and
// with compilers that lack the attribute's arch= levels, the plain build is what runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
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

namespace {

constexpr int64_t kLanes = 16;

}  // namespace

ATO_CLONES
void sgd_span(const Coefficients& c, float* p, const float* g, int64_t n) {
  const Coefficients k = c;
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    float m = 0.0f, v = 0.0f;
    p[i] = update<Rule::sgd>(p[i], g[i], m, v, k);
  }
}

ATO_CLONES
void momentum_span(const Coefficients& c, float* p, float* m, const float* g, int64_t n) {
  const Coefficients k = c;
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    float buffer = m[i], v = 0.0f;
    p[i] = update<Rule::momentum>(p[i], g[i], buffer, v, k);
    m[i] = buffer;
  }
}

ATO_CLONES
void adam_span(const Coefficients& c, float* p, float* m, float* v, const float* g, int64_t n) {
  const Coefficients k = c;
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    float first = m[i], second = v[i];
    p[i] = update<Rule::adam>(p[i], g[i], first, second, k);
    m[i] = first;
    v[i] = second;
  }
}

ATO_CLONES
double dot(const float* x, const float* y, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
    }
  }
  for (int64_t j = 0; i < n; ++i, ++j) {
    lanes[j] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) {
      lanes[j] += lanes[j + width];
    }
  }
  return lanes[0];
}

ATO_CLONES
void pull_span(float* z, const float* x, float pull, int64_t n) {
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    z[i] -= pull * x[i];
  }
}

ATO_CLONES
void scale_span(float* z, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    z[i] *= scale;
  }
}

bool all_zero(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != 0.0f) {
      return false;
    }
  }
  return true;
}

}  // namespace ato::cpu
