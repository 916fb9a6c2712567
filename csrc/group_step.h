// The arithmetic of one step, shared by every compiled backend: the update of one element and the
// decision about one group. Semantics: torch.optim's SGD, Adam and AdamW element by element; the
// projections are those of ATO section 3 (prox) and OTO (half-space, DHSPG).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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
enum Projection : int64_t { kNone = 0, kProx = 1, kHalfSpace = 2, kDhspg = 3 };

// Inner loops: one per set of state buffers that is read and written; none without a gradient.
enum class Rule { none, sgd, momentum, adam };

// Columns of one row of the op's `hyper` argument.
enum Hyper : int64_t { kLr, kWeightDecay, kBeta1, kBeta2, kEps, kNesterov, kHyperColumns };

// Columns of the int64 tables (see ato_fast/plan.py).
enum TensorColumn : int64_t { kBuffer, kOffset, kNumel, kHyperRow, kTensorColumns };

struct Segment {
  int64_t tensor, buffer, hyper;
  // In elements: place in the flat buffer and in the gradient.
  int64_t start, grad_start;
  // Channel c has `outer` pieces of `inner` contiguous elements at start + c * inner, `stride`
  // apart.
  int64_t inner, outer, stride;
};
constexpr int64_t kSegmentColumns = 8;
static_assert(sizeof(Segment) == kSegmentColumns * sizeof(int64_t), "one row of `segments`");

struct Bundle {
  int64_t segment_begin, segment_end;
  // `n` neighbouring groups; -1 (and n = 1) for elements in no group.
  int64_t group_begin, n;
  // Whose lr the groups' thresholds use.
  int64_t hyper;
};
constexpr int64_t kBundleColumns = 5;
static_assert(sizeof(Bundle) == kBundleColumns * sizeof(int64_t), "one row of `bundles`");

// A thread block's work: n channels of a bundle.
struct Block {
  int64_t bundle, first, n;
};
constexpr int64_t kBlockColumns = 3;
static_assert(sizeof(Block) == kBlockColumns * sizeof(int64_t), "one row of `blocks`");

struct bf16 {
  uint16_t bits;
};

ATO_FN float to_float(float x) {
  return x;
}

ATO_FN float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
ATO_FN T from_float(float x);

template <>
ATO_FN float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN.
template <>
ATO_FN bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

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

// An element after the optimizer's update, and what that moved it by, decoupled decay aside:
// z = decay * x - u. Where lr is small, u taken from z would be mostly rounding.
struct Moved {
  float z, u;
};

template <Rule R>
ATO_FN Moved update(float x, float g, float& m, float& v, const Coefficients& c) {
  if constexpr (R == Rule::none) {
    return {x, 0.0f};
  }
  g = g * c.unscale + c.l2 * x;
  if constexpr (R == Rule::adam) {
    m = c.keep1 * m + c.add1 * g;
    v = c.keep2 * v + c.add2 * g * g;
    const float u = c.rate * (m / (std::sqrt(v) * c.sqrt_correction + c.eps));
    return {c.decay * x - u, u};
  } else if constexpr (R == Rule::momentum) {
    m = c.keep1 * m + c.add1 * g;
    const float u = c.rate * (c.direct * g + c.through * m);
    return {x - u, u};
  } else {
    const float u = c.rate * g;
    return {x - u, u};
  }
}

// Sums over one group: x before the update, z and u as in `Moved`.
struct Sums {
  double xx = 0.0, zz = 0.0, zx = 0.0, xu = 0.0, uu = 0.0;

  ATO_FN void add(float before, float after) {
    const double x = before, z = after;
    xx += x * x;
    zz += z * z;
    zx += z * x;
  }

  ATO_FN void add_moved(float before, float by) {
    const double x = before, u = by;
    xu += x * u;
    uu += u * u;
  }
};

// Constants of a projection: half-space [eps], DHSPG [eps, amplify, cap].
struct ProjectionArgs {
  double eps = 0.0, amplify = 0.0, cap = 0.0;
};

// The group becomes scale * z - pull * x; exactly 0, its state too, if scale is 0.
struct Decision {
  double scale, pull;
};

constexpr double kInfinity = __builtin_inf();

// The norm a group loses in this step. An infinite strength means hard zero whatever lr is.
ATO_FN double group_threshold(double lr, double strength, double threshold) {
  return (strength == kInfinity ? kInfinity : lr * strength) + threshold;
}

// DHSPG's choice (OTOv2): between the pull that makes the norm fall and the one up to which the
// step still descends. The cap wins where both cannot be had.
ATO_FN double dhspg_threshold(const Sums& s, double threshold, const ProjectionArgs& args) {
  if (!(s.xu < 0.0)) {
    return threshold;
  }
  const double norm = std::sqrt(s.xx);
  const double low = -s.xu / norm;
  const double high = -s.uu * norm / s.xu;
  const double wanted = std::fmin(std::fmax(args.amplify * low, threshold), args.cap * threshold);
  return wanted >= high ? 0.5 * (low + high) : wanted;
}

// Comparisons are written so that NaN stays in the group and divergence is not hidden.
ATO_FN Decision decide(int64_t projection, const Sums& s, double threshold,
                       const ProjectionArgs& args) {
  if (s.xx == 0.0) {
    return {0.0, 0.0};
  }
  if (projection == kProx) {
    const double norm = std::sqrt(s.zz + 1e-8);
    return {threshold >= norm ? 0.0 : 1.0 - threshold / norm, 0.0};
  }
  if (threshold == kInfinity) {
    return {s.zx == s.zx ? 0.0 : 1.0, 0.0};
  }
  if (projection == kDhspg) {
    threshold = dhspg_threshold(s, threshold, args);
  }
  const double pull = threshold / (std::sqrt(s.xx) + 1e-8);
  return {s.zx - pull * s.xx < args.eps * s.xx ? 0.0 : 1.0, pull};
}

}  // namespace ato
