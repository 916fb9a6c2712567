// The inner loops of the CPU kernels over contiguous fp32 spans. Every loop is elementwise or adds
// into a fixed number of lanes, so its result does not depend on the instruction set chosen at run
// time nor on the number of threads.
#pragma once

#include <cstdint>

#include "group_step.h"

namespace ato::cpu {

// Spans are handled in blocks of this many elements: four streams of it (32 KiB) stay in L1/L2
// between the update and the sums.
constexpr int64_t kBlock = 2048;

void sgd_span(const Coefficients& c, float* p, const float* g, int64_t n);
void momentum_span(const Coefficients& c, float* p, float* m, const float* g, int64_t n);
void adam_span(const Coefficients& c, float* p, float* m, float* v, const float* g, int64_t n);

// sum of x*y in float64; x and y may be the same span.
double dot(const float* x, const float* y, int64_t n);
// z -= pull * x
void pull_span(float* z, const float* x, float pull, int64_t n);
void scale_span(float* z, float scale, int64_t n);
// Stops at the first non-zero element.
bool all_zero(const float* x, int64_t n);

}  // namespace ato::cpu
