// The arithmetic of one step, shared by every compiled backend: the update of one element and the
// decision about one group. Semantics: torch.optim's SGD, Adam and AdamW element by element; the
// projections are those of ATO section 3 (prox) and OTO (half-space).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ATO_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ATO_FN inline __attribute__((always_inline))
#else
#define ATO_FN inline
#endif

namespace ato {

// Values of the op's `optimizer` and `projection` arguments.
enum Optimizer : int64_t { kSgd = 0, kAdam = 1, kAdamW = 2 };
enum Projection : int64_t { kNone = 0, kProx = 1, kHalfSpace = 2 };

// Inner loops: one per set of state buffers that is read and written.
enum class Rule { sgd, momentum, adam };

// Columns of one row of the op's `hyper` argument.
enum Hyper : int64_t { kLr, kWeightDecay, kBeta1, kBeta2, kEps, kNesterov, kHyperColumns };

// Columns of the int64 tables (see ato_fast/plan.py).
enum TensorColumn : int64_t { kBuffer, kOffset, kNumel, kHyperRow, kTensorColumns };
enum ItemColumn : int64_t { kChunkBegin, kChunkEnd, kGroup, kItemHyper, kItemColumns };

struct Chunk {
  int64_t tensor, buffer, hyper;
  // In elements: place in the flat buffer and in the gradient.
  int64_t start, grad_start;
  // `outer` pieces of `inner` contiguous elements, `stride` apart.
  int64_t inner, outer, stride;
};
constexpr int64_t kChunkColumns = 8;
static_assert(sizeof(Chunk) == kChunkColumns * sizeof(int64_t), "one row of the chunk table");

struct Item {
  int64_t chunk_begin, chunk_end, group, hyper;
};
static_assert(sizeof(Item) == kItemColumns * sizeof(int64_t), "one row of the item table");

// What the update of one tensor needs, all derived once per tensor and step. With g the stored
// gradient: g' = unscale * g + l2 * x; m = keep1 * m + add1 * g'; v = keep2 * v + add2 * g'^2.
struct Coefficients {
  float unscale, l2, decay;
  float keep1, add1, keep2, add2;
  float rate, sqrt_correction, eps;
  // Nesterov mixes: direction = direct * g' + through * m.
  float direct, through;
};

ATO_FN Coefficients coefficients(int64_t optimizer, const double* hyper, double lr,
                                 double steps_done, double grad_scale) {
  const double wd = hyper[kWeightDecay];
  Coefficients c;
  c.unscale = static_cast<float>(1.0 / grad_scale);
  c.l2 = static_cast<float>(optimizer == kAdamW ? 0.0 : wd);
  c.decay = static_cast<float>(optimizer == kAdamW ? 1.0 - lr * wd : 1.0);
  if (optimizer == kSgd) {
    const bool first = steps_done == 0.0;
    c.keep1 = static_cast<float>(first ? 0.0 : hyper[kBeta1]);
    c.add1 = static_cast<float>(first ? 1.0 : 1.0 - hyper[kBeta2]);
    c.keep2 = c.add2 = c.eps = 0.0f;
    c.sqrt_correction = 1.0f;
    c.rate = static_cast<float>(lr);
    const bool nesterov = hyper[kNesterov] != 0.0;
    c.direct = nesterov ? 1.0f : 0.0f;
    c.through = static_cast<float>(nesterov ? hyper[kBeta1] : 1.0);
  } else {
    const double step = steps_done + 1.0;
    c.keep1 = static_cast<float>(hyper[kBeta1]);
    c.add1 = static_cast<float>(1.0 - hyper[kBeta1]);
    c.keep2 = static_cast<float>(hyper[kBeta2]);
    c.add2 = static_cast<float>(1.0 - hyper[kBeta2]);
    c.rate = static_cast<float>(lr / (1.0 - std::pow(hyper[kBeta1], step)));
    c.sqrt_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(hyper[kBeta2], step)));
    c.eps = static_cast<float>(hyper[kEps]);
    c.direct = c.through = 0.0f;
  }
  return c;
}

template <Rule R>
ATO_FN float update(float x, float g, float& m, float& v, const Coefficients& c) {
  g = g * c.unscale + c.l2 * x;
  if constexpr (R == Rule::adam) {
    m = c.keep1 * m + c.add1 * g;
    v = c.keep2 * v + c.add2 * g * g;
    return c.decay * x - c.rate * (m / (std::sqrt(v) * c.sqrt_correction + c.eps));
  } else if constexpr (R == Rule::momentum) {
    m = c.keep1 * m + c.add1 * g;
    return x - c.rate * (c.direct * g + c.through * m);
  } else {
    return x - c.rate * g;
  }
}

constexpr double kInfinity = __builtin_inf();

// The norm a group loses in this step. An infinite strength means hard zero whatever lr is.
ATO_FN double group_threshold(double lr, double strength, double threshold) {
  return (strength == kInfinity ? kInfinity : lr * strength) + threshold;
}

// Factor of the proximal step; 0 drops the group. NaN stays NaN, so divergence is not hidden.
ATO_FN double prox_scale(double zz, double threshold) {
  const double norm = std::sqrt(zz + 1e-8);
  return threshold >= norm ? 0.0 : 1.0 - threshold / norm;
}

// Factor of x that the half-space trial step subtracts; a hard zero needs no trial step.
ATO_FN double half_space_pull(double xx, double threshold) {
  return threshold == kInfinity ? 0.0 : threshold / (std::sqrt(xx) + 1e-8);
}

// 0 drops the group, 1 keeps the trial step.
ATO_FN double half_space_scale(double zx, double xx, double threshold, double eps) {
  const bool hard = threshold == kInfinity && zx == zx;
  return hard || zx < eps * xx ? 0.0 : 1.0;
}

}  // namespace ato
