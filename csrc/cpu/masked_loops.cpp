#include "masked_loops.h"

#include <limits>

#include "vector.h"

namespace ato {

using cpu::bits_of;
using cpu::float_of;

namespace {

// a where the condition holds, else b. By bits: compilers turn chains of ?: into branches, which
// keep a loop from being vectorised.
ATO_FN uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

}  // namespace

using cpu::half;

ATO_FN float to_float(half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  // Exponents move from bias 15 to 127; those of infinity and NaN to 255.
  const uint32_t shift = choose(magnitude < 0x7c00u, 112u << 23, 224u << 23);
  // Subnormal numbers count steps of 2^-24, the last place of 0.5.
  const uint32_t tiny = bits_of(float_of(0x3f000000u + magnitude) - 0.5f);
  return float_of(sign | choose(magnitude < 0x400u, tiny, (magnitude << 13) + shift));
}

// Round to nearest even; NaN stays NaN.
template <>
ATO_FN half from_float<half>(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  const uint32_t sign = (bits_of(x) ^ magnitude) >> 16;
  const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = choose(magnitude < 0x38800000u, tiny, normal);
  // From 65520 on, halfway to what would be the next number.
  const uint32_t rounded = choose(magnitude >= 0x477ff000u, 0x7c00u, finite);
  return {static_cast<uint16_t>(sign | choose(magnitude > 0x7f800000u, 0x7e00u, rounded))};
}

}  // namespace ato

namespace ato::cpu {

namespace {

// exp; 0 below -87.
ATO_FN float exponential(float x) {
  constexpr float kMost = 88.72f, kLeast = -87.0f;
  const float inside = x < kLeast ? kLeast : (x > kMost ? kMost : x);
  const auto [m, shifted] = exponential_of(inside);
  const float value = float_of(bits_of(m + 1.0f) + (bits_of(shifted) << 23));
  const float low = x < kLeast ? 0.0f : value;
  return x > kMost ? std::numeric_limits<float>::infinity() : low;
}

// exp(t^2) * erfc(t) as u * polynomial(u), u = 1 / (1 + t / 2), fitted for 1 <= t <= 9.6 so that
// erfc is off by less than 2e-11 before rounding.
constexpr float kErfc[] = {0.28263630122761496f,   0.273595316429629f,   0.3018117589094995f,
                           -0.014212334128147958f, 0.46072793841389736f, -0.40676476301566455f,
                           0.10220158719371031f};
// erf(t) / t in powers of t^2, Taylor: 2 / sqrt(pi) * (-1)^k / (k! * (2k + 1)).
constexpr double kTwoByRootPi = 1.1283791670955126;
constexpr float kErf[] = {
    static_cast<float>(kTwoByRootPi),           static_cast<float>(-kTwoByRootPi / 3),
    static_cast<float>(kTwoByRootPi / 10),      static_cast<float>(-kTwoByRootPi / 42),
    static_cast<float>(kTwoByRootPi / 216),     static_cast<float>(-kTwoByRootPi / 1320),
    static_cast<float>(kTwoByRootPi / 9360),    static_cast<float>(-kTwoByRootPi / 75600),
    static_cast<float>(kTwoByRootPi / 685440),  static_cast<float>(-kTwoByRootPi / 6894720),
    static_cast<float>(kTwoByRootPi / 76204800)};

// act(z) and its derivative.
struct Value {
  float value, slope;
};

// Where NaN comes in, NaN goes out, so comparisons are written to be false for it.
template <Activation A>
ATO_FN Value activated(float z) {
  if constexpr (A == kIdentity) {
    return {z, 1.0f};
  } else if constexpr (A == kRelu) {
    return {z <= 0.0f ? 0.0f : z, z <= 0.0f ? 0.0f : 1.0f};
  } else if constexpr (A == kRelu6) {
    const float low = z <= 0.0f ? 0.0f : z;
    const float slope = z <= 0.0f ? 0.0f : 1.0f;
    return {low >= 6.0f ? 6.0f : low, z >= 6.0f ? 0.0f : slope};
  } else if constexpr (A == kHardswish) {
    const float up = z + 3.0f;
    const float low = up <= 0.0f ? 0.0f : up;
    const float rising = z <= -3.0f ? 0.0f : z / 3.0f + 0.5f;
    return {z * (low >= 6.0f ? 6.0f : low) / 6.0f, z >= 3.0f ? 1.0f : rising};
  } else if constexpr (A == kSilu) {
    const float below = 1.0f + exponential(-z);
    const float s = 1.0f / below;
    return {z / below, s * (1.0f + z * (1.0f - s))};
  } else {
    const float t = z * 0.70710678f;
    const float size = t < 0.0f ? -t : t;
    const float t2 = t * t;
    const float e = exponential(-t2);
    float near = kErf[10];
    for (int k = 9; k >= 0; --k) {
      near = near * t2 + kErf[k];
    }
    const float u = 1.0f / (1.0f + 0.5f * size);
    float far = kErfc[6];
    for (int k = 5; k >= 0; --k) {
      far = far * u + kErfc[k];
    }
    const float tail = 0.5f * e * (far * u);
    const float outside = t < 0.0f ? tail : 1.0f - tail;
    const float normal = size < 1.0f ? 0.5f + 0.5f * (near * t) : outside;
    return {z * normal, normal + z * (e * 0.39894228f)};
  }
}

template <Activation A, class T>
ATO_FN void rows_body(const Masked<T>& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t c = row % m.channels;
    const float gate = m.gate[c], scale = m.scale[c], shift = m.shift[c];
    const T* x = m.x + row * m.inner;
    T* out = m.out + row * m.inner;
    ATO_NO_ALIAS
    for (int64_t i = 0; i < m.inner; ++i) {
      out[i] = from_float<T>(gate * activated<A>(to_float(x[i]) * scale + shift).value);
    }
  }
}

template <Activation A, class T>
ATO_FN void points_body(const Masked<T>& m, int64_t begin, int64_t end) {
  for (int64_t point = begin; point < end; ++point) {
    const T* x = m.x + point * m.channels;
    T* out = m.out + point * m.channels;
    ATO_NO_ALIAS
    for (int64_t c = 0; c < m.channels; ++c) {
      const float z = to_float(x[c]) * m.scale[c] + m.shift[c];
      out[c] = from_float<T>(m.gate[c] * activated<A>(z).value);
    }
  }
}

// One element's gradient; returns its part of the gate's.
template <Activation A, class T>
ATO_FN double element_grad(const T* x, const T* grad, T* out, float gate, float scale,
                           float shift) {
  const Value a = activated<A>(to_float(*x) * scale + shift);
  const float g = to_float(*grad);
  *out = from_float<T>(g * gate * a.slope * scale);
  return static_cast<double>(g) * static_cast<double>(a.value);
}

template <Activation A, class T>
ATO_FN void rows_grad_body(const Masked<T>& m, int64_t begin, int64_t end, double* sums) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t c = row % m.channels;
    const float gate = m.gate[c], scale = m.scale[c], shift = m.shift[c];
    const T* x = m.x + row * m.inner;
    const T* grad = m.grad + row * m.inner;
    T* out = m.out + row * m.inner;
    LaneSums<1> lanes;
    int64_t i = 0;
    for (; i + kLanes <= m.inner; i += kLanes) {
      ATO_NO_ALIAS
      for (int64_t j = 0; j < kLanes; ++j) {
        const int64_t at = i + j;
        lanes.lanes[0][j] += element_grad<A>(x + at, grad + at, out + at, gate, scale, shift);
      }
    }
    for (int64_t j = 0; i + j < m.inner; ++j) {
      const int64_t at = i + j;
      lanes.lanes[0][j] += element_grad<A>(x + at, grad + at, out + at, gate, scale, shift);
    }
    double sum[1] = {0.0};
    lanes.join(sum);
    sums[row] = sum[0];
  }
}

template <Activation A, class T>
ATO_FN void points_grad_body(const Masked<T>& m, int64_t begin, int64_t end, double* sums) {
  for (int64_t point = begin; point < end; ++point) {
    const T* x = m.x + point * m.channels;
    const T* grad = m.grad + point * m.channels;
    T* out = m.out + point * m.channels;
    int64_t c = 0;
    for (; c + kLanes <= m.channels; c += kLanes) {
      double product[kLanes];
      ATO_NO_ALIAS
      for (int64_t j = 0; j < kLanes; ++j) {
        const int64_t at = c + j;
        product[j] =
            element_grad<A>(x + at, grad + at, out + at, m.gate[at], m.scale[at], m.shift[at]);
      }
      for (int64_t j = 0; j < kLanes; ++j) {
        sums[c + j] += product[j];
      }
    }
    for (; c < m.channels; ++c) {
      sums[c] += element_grad<A>(x + c, grad + c, out + c, m.gate[c], m.scale[c], m.shift[c]);
    }
  }
}

}  // namespace

#define ATO_BY_ACTIVATION(body, ...)        \
  switch (act) {                            \
    case kIdentity:                         \
      return body<kIdentity>(__VA_ARGS__);  \
    case kRelu:                             \
      return body<kRelu>(__VA_ARGS__);      \
    case kRelu6:                            \
      return body<kRelu6>(__VA_ARGS__);     \
    case kHardswish:                        \
      return body<kHardswish>(__VA_ARGS__); \
    case kSilu:                             \
      return body<kSilu>(__VA_ARGS__);      \
    default:                                \
      return body<kGelu>(__VA_ARGS__);      \
  }

#define ATO_MASKED(T)                                                                              \
  ATO_CLONES void masked_rows(Activation act, const Masked<T>& m, int64_t begin, int64_t end){     \
      ATO_BY_ACTIVATION(rows_body, m, begin,                                                       \
                        end)} ATO_CLONES void masked_rows_grad(Activation act, const Masked<T>& m, \
                                                               int64_t begin, int64_t end,         \
                                                               double* sums){ATO_BY_ACTIVATION(    \
      rows_grad_body, m, begin, end,                                                               \
      sums)} ATO_CLONES void masked_points(Activation act, const Masked<T>& m, int64_t begin,      \
                                           int64_t end){ATO_BY_ACTIVATION(                         \
      points_body, m, begin,                                                                       \
      end)} ATO_CLONES void masked_points_grad(Activation act, const Masked<T>& m, int64_t begin,  \
                                               int64_t end, double* sums) {                        \
    ATO_BY_ACTIVATION(points_grad_body, m, begin, end, sums)                                       \
  }

ATO_MASKED(float)
ATO_MASKED(bf16)
ATO_MASKED(half)

}  // namespace ato::cpu
