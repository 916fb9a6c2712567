#include "loops.h"

#include <cstring>
#include <initializer_list>

#include "vector.h"

#if defined(__GNUC__)
#define ATO_INLINE __attribute__((always_inline))
#define ATO_PREFETCH(at) __builtin_prefetch(at)
#else
#define ATO_INLINE
#define ATO_PREFETCH(at) static_cast<void>(at)
#endif

namespace ato::cpu {

namespace {

// Elements per block of an update, and how far ahead its streams are fetched: the hardware's
// prefetchers stop at pages and lose the thread where rows end and sums begin.
constexpr int64_t kBlock = 64;
constexpr int64_t kAhead = 512;
constexpr int64_t kLineBytes = 64;

template <Rule R>
constexpr bool kHasM = R == Rule::momentum || R == Rule::adam;

template <class T>
ATO_FN void prefetch(const T* at) {
  for (int64_t i = 0; i < kBlock; i += kLineBytes / static_cast<int64_t>(sizeof(T))) {
    ATO_PREFETCH(at + i);
  }
}

template <Rule R, class T>
ATO_FN void prefetch_block(const Span<T>& s, int64_t i) {
  prefetch(s.x + i);
  if constexpr (R != Rule::none) {
    prefetch(s.g + i);
  }
  if constexpr (kHasM<R>) {
    prefetch(s.m + i);
  }
  if constexpr (R == Rule::adam) {
    prefetch(s.v + i);
  }
}

// The update of element i, states written back.
template <Rule R, class T>
ATO_FN Moved updated(const Coefficients& c, const Span<T>& s, int64_t i) {
  float g = 0.0f, m = 0.0f, v = 0.0f;
  if constexpr (R != Rule::none) {
    g = to_float(s.g[i]);
  }
  if constexpr (kHasM<R>) {
    m = s.m[i];
  }
  if constexpr (R == Rule::adam) {
    v = s.v[i];
  }
  const Moved moved = ato::update<R>(to_float(s.x[i]), g, m, v, c);
  if constexpr (kHasM<R>) {
    s.m[i] = m;
  }
  if constexpr (R == Rule::adam) {
    s.v[i] = v;
  }
  return moved;
}

template <Rule R, class T, class Z>
ATO_FN void update_body(const Coefficients c, const Span<T> s, Z* z) {
  int64_t i = 0;
  for (; i + kBlock <= s.n; i += kBlock) {
    prefetch_block<R>(s, i + kAhead);
    ATO_NO_ALIAS
    for (int64_t j = i; j < i + kBlock; ++j) {
      z[j] = from_float<Z>(updated<R>(c, s, j).z);
    }
  }
  ATO_NO_ALIAS
  for (int64_t j = i; j < s.n; ++j) {
    z[j] = from_float<Z>(updated<R>(c, s, j).z);
  }
}

template <Rule R, class T>
ATO_FN void zu_body(const Coefficients c, const Span<T> s, float* z, float* u) {
  ATO_NO_ALIAS
  for (int64_t i = 0; i < s.n; ++i) {
    const Moved moved = updated<R>(c, s, i);
    z[i] = moved.z;
    u[i] = moved.u;
  }
}

struct SquareOfZ {
  static constexpr int kSums = 1;

  ATO_FN static void of(float, const Moved& moved, double (&out)[kSums]) {
    out[0] = static_cast<double>(moved.z) * static_cast<double>(moved.z);
  }
};

struct ProductsWithX {
  static constexpr int kSums = 4;

  ATO_FN static void of(float before, const Moved& moved, double (&out)[kSums]) {
    const double x = before, z = moved.z, u = moved.u;
    out[0] = x * x;
    out[1] = z * x;
    out[2] = x * u;
    out[3] = u * u;
  }
};

// Rows of 16 elements: the rule's update into z, and its products into the lanes.
template <Rule R, class Products, class T>
ATO_FN void trial_body(const Coefficients c, const Span<T> s, float* z,
                       double (&sums)[Products::kSums]) {
  LaneSums<Products::kSums> lanes;
  int64_t i = 0;
  for (; i + kLanes <= s.n; i += kLanes) {
    if (i % kBlock == 0) {
      prefetch_block<R>(s, i + kAhead);
    }
    ATO_NO_ALIAS
    for (int64_t j = 0; j < kLanes; ++j) {
      double product[Products::kSums];
      const float x = to_float(s.x[i + j]);
      const Moved moved = updated<R>(c, s, i + j);
      z[i + j] = moved.z;
      Products::of(x, moved, product);
      for (int k = 0; k < Products::kSums; ++k) {
        lanes.lanes[k][j] += product[k];
      }
    }
  }
  for (int64_t j = 0; i + j < s.n; ++j) {
    double product[Products::kSums];
    const float x = to_float(s.x[i + j]);
    const Moved moved = updated<R>(c, s, i + j);
    z[i + j] = moved.z;
    Products::of(x, moved, product);
    for (int k = 0; k < Products::kSums; ++k) {
      lanes.lanes[k][j] += product[k];
    }
  }
  lanes.join(sums);
}

template <Rule R, class T>
ATO_FN void zz_body(const Coefficients& c, const Span<T>& s, float* z, Sums& sums) {
  double totals[1] = {sums.zz};
  trial_body<R, SquareOfZ>(c, s, z, totals);
  sums.zz = totals[0];
}

template <Rule R, class T>
ATO_FN void zx_body(const Coefficients& c, const Span<T>& s, float* z, Sums& sums) {
  double totals[4] = {sums.xx, sums.zx, sums.xu, sums.uu};
  trial_body<R, ProductsWithX>(c, s, z, totals);
  sums.xx = totals[0];
  sums.zx = totals[1];
  sums.xu = totals[2];
  sums.uu = totals[3];
}

template <class T>
ATO_FN double dot_body(const T* x, const T* y, int64_t n) {
  LaneSums<1> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes.lanes[0][j] +=
          static_cast<double>(to_float(x[i + j])) * static_cast<double>(to_float(y[i + j]));
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    lanes.lanes[0][j] +=
        static_cast<double>(to_float(x[i + j])) * static_cast<double>(to_float(y[i + j]));
  }
  double sum[1] = {0.0};
  lanes.join(sum);
  return sum[0];
}

template <class T>
ATO_FN void combine_body(T* x, const float* z, float scale, float pull, int64_t n) {
  if (pull == 0.0f) {
    ATO_NO_ALIAS
    for (int64_t i = 0; i < n; ++i) {
      x[i] = from_float<T>(scale * z[i]);
    }
    return;
  }
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    x[i] = from_float<T>(scale * z[i] - pull * to_float(x[i]));
  }
}

template <class T>
ATO_FN void combine_each_body(const Span<T> s, const float* z, const float* scale,
                              const float* pull) {
  ATO_NO_ALIAS
  for (int64_t i = 0; i < s.n; ++i) {
    const float both = scale[i] * z[i] - pull[i] * to_float(s.x[i]);
    const float one = scale[i] * z[i];
    const float value = pull[i] == 0.0f ? one : both;
    s.x[i] = from_float<T>(scale[i] == 0.0f ? 0.0f : value);
  }
  for (float* state : {s.m, s.v}) {
    if (state != nullptr) {
      ATO_NO_ALIAS
      for (int64_t i = 0; i < s.n; ++i) {
        state[i] = scale[i] == 0.0f ? 0.0f : state[i];
      }
    }
  }
}

// Bits of x but its sign.
ATO_FN uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits << 1;
}

ATO_FN uint32_t magnitude(bf16 x) {
  return static_cast<uint16_t>(x.bits << 1);
}

template <class T>
ATO_FN bool all_zero_body(const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch(x + i + kAhead);
    uint32_t any = 0;
    for (int64_t j = i; j < i + kBlock; ++j) {
      any |= magnitude(x[j]);
    }
    if (any != 0) {
      return false;
    }
  }
  uint32_t any = 0;
  for (; i < n; ++i) {
    any |= magnitude(x[i]);
  }
  return any == 0;
}

}  // namespace

#define ATO_RULE(R, T)                                                                           \
  ATO_CLONES void update_##R(const Coefficients& c, const Span<T>& s) {                          \
    update_body<Rule::R>(c, s, s.x);                                                             \
  }                                                                                              \
  ATO_CLONES void update_to_##R(const Coefficients& c, const Span<T>& s, float* z) {             \
    update_body<Rule::R>(c, s, z);                                                               \
  }                                                                                              \
  ATO_CLONES void update_zu_##R(const Coefficients& c, const Span<T>& s, float* z, float* u) {   \
    zu_body<Rule::R>(c, s, z, u);                                                                \
  }                                                                                              \
  ATO_CLONES void update_zz_##R(const Coefficients& c, const Span<T>& s, float* z, Sums& sums) { \
    zz_body<Rule::R>(c, s, z, sums);                                                             \
  }                                                                                              \
  ATO_CLONES void update_zx_##R(const Coefficients& c, const Span<T>& s, float* z, Sums& sums) { \
    zx_body<Rule::R>(c, s, z, sums);                                                             \
  }

// One call per span picks the rule; x86's multiversioning cannot clone a template.
#define ATO_BY_RULE(name, ...)             \
  switch (rule) {                          \
    case Rule::none:                       \
      return name##_none(__VA_ARGS__);     \
    case Rule::sgd:                        \
      return name##_sgd(__VA_ARGS__);      \
    case Rule::momentum:                   \
      return name##_momentum(__VA_ARGS__); \
    case Rule::adam:                       \
      return name##_adam(__VA_ARGS__);     \
  }

#define ATO_LOOPS(T)                                                                          \
  ATO_RULE(none, T)                                                                           \
  ATO_RULE(sgd, T)                                                                            \
  ATO_RULE(momentum, T)                                                                       \
  ATO_RULE(adam, T)                                                                           \
  void update(Rule rule, const Coefficients& c, const Span<T>& s) {                           \
    ATO_BY_RULE(update, c, s)                                                                 \
  }                                                                                           \
  void update_to(Rule rule, const Coefficients& c, const Span<T>& s, float* z) {              \
    ATO_BY_RULE(update_to, c, s, z)                                                           \
  }                                                                                           \
  void update_zu(Rule rule, const Coefficients& c, const Span<T>& s, float* z, float* u) {    \
    ATO_BY_RULE(update_zu, c, s, z, u)                                                        \
  }                                                                                           \
  void update_zz(Rule rule, const Coefficients& c, const Span<T>& s, float* z, Sums& sums) {  \
    ATO_BY_RULE(update_zz, c, s, z, sums)                                                     \
  }                                                                                           \
  void update_zx(Rule rule, const Coefficients& c, const Span<T>& s, float* z, Sums& sums){   \
      ATO_BY_RULE(update_zx, c, s, z, sums)} ATO_CLONES void combine(T* x, const float* z,    \
                                                                     float scale, float pull, \
                                                                     int64_t n) {             \
    combine_body(x, z, scale, pull, n);                                                       \
  }                                                                                           \
  ATO_CLONES void combine_each(const Span<T>& s, const float* z, const float* scale,          \
                               const float* pull) {                                           \
    combine_each_body(s, z, scale, pull);                                                     \
  }                                                                                           \
  ATO_CLONES double dot(const T* x, const T* y, int64_t n) {                                  \
    return dot_body(x, y, n);                                                                 \
  }                                                                                           \
  ATO_CLONES bool all_zero(const T* x, int64_t n) {                                           \
    return all_zero_body(x, n);                                                               \
  }

ATO_LOOPS(float)
ATO_LOOPS(bf16)

}  // namespace ato::cpu
