// The loops of masked_bn_act on the CPU, free of torch, T = float, bf16 or half. Elementwise, or
// sums in a fixed order: no result depends on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

#include "group_step.h"

namespace ato::cpu {

// Values of the op's `activation` argument (`ACTIVATIONS` of ato_fast/masked.py).
enum Activation : int64_t { kIdentity, kRelu, kRelu6, kHardswish, kSilu, kGelu, kActivations };

struct half {
  uint16_t bits;
};

// Elements [outer, channels, inner], contiguous; gate, scale and shift one entry per channel.
template <class T>
struct Masked {
  const T* x;
  const T* grad;
  T* out;
  const float* gate;
  const float* scale;
  const float* shift;
  int64_t channels, inner;
};

// Rows [begin, end) of `inner` elements; row r is of channel r % channels.
// out = gate * act(scale * x + shift)
void masked_rows(Activation act, const Masked<float>& m, int64_t begin, int64_t end);
void masked_rows(Activation act, const Masked<bf16>& m, int64_t begin, int64_t end);
void masked_rows(Activation act, const Masked<half>& m, int64_t begin, int64_t end);
// out = grad * gate * act'(z) * scale; sums[r] = sum of grad * act(z) over row r.
void masked_rows_grad(Activation act, const Masked<float>& m, int64_t begin, int64_t end,
                      double* sums);
void masked_rows_grad(Activation act, const Masked<bf16>& m, int64_t begin, int64_t end,
                      double* sums);
void masked_rows_grad(Activation act, const Masked<half>& m, int64_t begin, int64_t end,
                      double* sums);

// The same for inner = 1, where channels lie side by side: points [begin, end) of `channels`
// elements. The gradient adds sums over the points to sums[channels].
void masked_points(Activation act, const Masked<float>& m, int64_t begin, int64_t end);
void masked_points(Activation act, const Masked<bf16>& m, int64_t begin, int64_t end);
void masked_points(Activation act, const Masked<half>& m, int64_t begin, int64_t end);
void masked_points_grad(Activation act, const Masked<float>& m, int64_t begin, int64_t end,
                        double* sums);
void masked_points_grad(Activation act, const Masked<bf16>& m, int64_t begin, int64_t end,
                        double* sums);
void masked_points_grad(Activation act, const Masked<half>& m, int64_t begin, int64_t end,
                        double* sums);

}  // namespace ato::cpu
