// The inner loops of the CPU kernels over contiguous spans, T = float or bf16. Every loop is
// elementwise or adds into a fixed number of lanes, so its result does not depend on the
// instruction set chosen at run time nor on the number of threads.
#pragma once

#include <cstdint>

#include "group_step.h"

namespace ato::cpu {

// The part of one tensor's buffers that a loop works on; m and v are null where the rule has none.
template <class T>
struct Span {
  T* x;
  const T* g;
  float* m;
  float* v;
  int64_t n;
};

// x becomes its update.
void update(Rule rule, const Coefficients& c, const Span<float>& span);
void update(Rule rule, const Coefficients& c, const Span<bf16>& span);

// z becomes the update of x, which stays.
void update_to(Rule rule, const Coefficients& c, const Span<float>& span, float* z);
void update_to(Rule rule, const Coefficients& c, const Span<bf16>& span, float* z);
// The same; u becomes what moved x (`Moved`).
void update_zu(Rule rule, const Coefficients& c, const Span<float>& span, float* z, float* u);
void update_zu(Rule rule, const Coefficients& c, const Span<bf16>& span, float* z, float* u);
// z alone; adds to sums.zz.
void update_zz(Rule rule, const Coefficients& c, const Span<float>& span, float* z, Sums& sums);
void update_zz(Rule rule, const Coefficients& c, const Span<bf16>& span, float* z, Sums& sums);
// The same; adds to all sums but zz.
void update_zx(Rule rule, const Coefficients& c, const Span<float>& span, float* z, Sums& sums);
void update_zx(Rule rule, const Coefficients& c, const Span<bf16>& span, float* z, Sums& sums);

// x = scale * z - pull * x
void combine(float* x, const float* z, float scale, float pull, int64_t n);
void combine(bf16* x, const float* z, float scale, float pull, int64_t n);

// The same element by element, with scale[i] and pull[i]. Where scale is 0, x and the states become
// exactly 0; where pull is 0 and scale 1, x becomes z itself.
void combine_each(const Span<float>& span, const float* z, const float* scale, const float* pull);
void combine_each(const Span<bf16>& span, const float* z, const float* scale, const float* pull);

// sum of x*y in float64; x and y may be the same span.
double dot(const float* x, const float* y, int64_t n);
double dot(const bf16* x, const bf16* y, int64_t n);

// Stops at the first block with a non-zero element; -0 counts as zero.
bool all_zero(const float* x, int64_t n);
bool all_zero(const bf16* x, int64_t n);

}  // namespace ato::cpu
