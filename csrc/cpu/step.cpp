#include "step.h"

#include <algorithm>
#include <cstring>

#include "loops.h"

namespace ato::cpu {
namespace {

// Calls body(p, segment) with p the segment's buffer in its own type.
template <class Body>
void typed(const Step& s, const Segment& segment, const Body& body) {
  const Buffers& buffers = s.buffers[segment.buffer];
  if (buffers.is_bf16) {
    body(static_cast<bf16*>(buffers.p), buffers, segment);
  } else {
    body(static_cast<float*>(buffers.p), buffers, segment);
  }
}

// n elements `shift` from the segment's start.
template <class T>
Span<T> span_of(const TensorStep& t, T* p, const Buffers& b, const Segment& segment, int64_t shift,
                int64_t n) {
  const int64_t at = segment.start + shift;
  const T* g = static_cast<const T*>(t.grad);
  return {p + at, g != nullptr ? g + segment.grad_start + shift : nullptr,
          b.m != nullptr ? b.m + at : nullptr, b.v != nullptr ? b.v + at : nullptr, n};
}

// The plain update of channels [first, last).
void sweep(const Step& s, const Bundle& bundle, int64_t first, int64_t last) {
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    const TensorStep& tensor = s.tensors[s.segments[k].tensor];
    if (tensor.rule == Rule::none) {
      continue;
    }
    typed(s, s.segments[k], [&](auto* p, const Buffers& b, const Segment& segment) {
      for (int64_t o = 0; o < segment.outer; ++o) {
        const int64_t shift = first * segment.inner + o * segment.stride;
        update(tensor.rule, tensor.c,
               span_of(tensor, p, b, segment, shift, (last - first) * segment.inner));
      }
    });
  }
}

// Calls body(p, buffers, segment, shift) for every contiguous piece of a channel.
template <class Body>
void for_pieces(const Step& s, const Bundle& bundle, int64_t channel, const Body& body) {
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    typed(s, s.segments[k], [&](auto* p, const Buffers& b, const Segment& segment) {
      for (int64_t o = 0; o < segment.outer; ++o) {
        const int64_t shift = channel * segment.inner + o * segment.stride;
        body(p, b, segment, shift);
      }
    });
  }
}

bool is_zero(const Step& s, const Bundle& bundle, int64_t channel) {
  bool zero = true;
  for_pieces(s, bundle, channel,
             [&](const auto* p, const Buffers&, const Segment& segment, int64_t shift) {
               zero = zero && all_zero(p + segment.start + shift, segment.inner);
             });
  return zero;
}

void clear(float* state, int64_t n) {
  if (!all_zero(state, n)) {
    std::memset(state, 0, n * sizeof(float));
  }
}

void drop(const Step& s, const Bundle& bundle, int64_t channel) {
  for_pieces(s, bundle, channel,
             [](auto* p, const Buffers& b, const Segment& segment, int64_t shift) {
               const int64_t at = segment.start + shift;
               std::memset(p + at, 0, segment.inner * sizeof(*p));
               if (b.m != nullptr) {
                 clear(b.m + at, segment.inner);
               }
               if (b.v != nullptr) {
                 clear(b.v + at, segment.inner);
               }
             });
}

// Update, sums, decision and projection of one dropped group; `buffer` holds z in between.
void project(const Step& s, const Bundle& bundle, int64_t channel, std::vector<float>& buffer) {
  if (is_zero(s, bundle, channel)) {
    drop(s, bundle, channel);
    return;
  }
  int64_t size = 0;
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    size += s.segments[k].inner * s.segments[k].outer;
  }
  if (static_cast<int64_t>(buffer.size()) < size) {
    buffer.resize(size);
  }
  Sums sums;
  // Not zero: `decide` asks, and the prox needs no other sum of x.
  sums.xx = s.projection == kProx ? 1.0 : 0.0;
  float* z = buffer.data();
  for_pieces(s, bundle, channel,
             [&](auto* p, const Buffers& b, const Segment& segment, int64_t shift) {
               const TensorStep& t = s.tensors[segment.tensor];
               const auto span = span_of(t, p, b, segment, shift, segment.inner);
               if (s.projection == kProx) {
                 update_zz(t.rule, t.c, span, z, sums);
               } else {
                 update_zx(t.rule, t.c, span, z, sums);
               }
               z += segment.inner;
             });
  const int64_t group = bundle.group_begin + channel;
  const double threshold =
      group_threshold(s.lr[bundle.hyper], s.strength[group], s.threshold[group]);
  const Decision decision = decide(s.projection, sums, threshold, s.args);
  if (decision.scale == 0.0) {
    drop(s, bundle, channel);
    return;
  }
  z = buffer.data();
  for_pieces(s, bundle, channel,
             [&](auto* p, const Buffers&, const Segment& segment, int64_t shift) {
               combine(p + segment.start + shift, z, static_cast<float>(decision.scale),
                       static_cast<float>(decision.pull), segment.inner);
               z += segment.inner;
             });
}

void run_bundle(const Step& s, const Bundle& bundle, std::vector<float>& buffer) {
  if (bundle.group_begin < 0 || s.projection == kNone) {
    sweep(s, bundle, 0, bundle.n);
    return;
  }
  const bool* keep = s.mask + bundle.group_begin;
  for (int64_t c = 0; c < bundle.n;) {
    if (!keep[c]) {
      project(s, bundle, c, buffer);
      ++c;
      continue;
    }
    const int64_t first = c;
    while (c < bundle.n && keep[c]) {
      ++c;
    }
    sweep(s, bundle, first, c);
  }
}

Rule rule_of(int64_t optimizer, const double* hyper) {
  if (optimizer != kSgd) {
    return Rule::adam;
  }
  return hyper[kBeta1] != 0.0 ? Rule::momentum : Rule::sgd;
}

}  // namespace

void prepare(Step& s, const int64_t* tensors, const std::vector<const void*>& grads,
             int64_t optimizer, const double* hyper, double grad_scale, const float* steps) {
  const int64_t n_tensors = static_cast<int64_t>(grads.size());
  s.tensors.resize(n_tensors);
  int64_t last_row = -1;
  Coefficients last = {};
  for (int64_t t = 0; t < n_tensors; ++t) {
    TensorStep& tensor = s.tensors[t];
    const int64_t row = tensors[t * kTensorColumns + kHyperRow];
    const double* values = hyper + row * kHyperColumns;
    // Tensors of one row mostly share their step count: derive the powers once.
    if (row != last_row || steps[t] != steps[t - 1]) {
      last = coefficients(optimizer, values, s.lr[row], steps[t], grad_scale);
    }
    last_row = row;
    tensor = {last, grads[t], grads[t] != nullptr ? rule_of(optimizer, values) : Rule::none};
  }
}

void run_units(const Step& s, const int64_t* units, int64_t n_units, std::atomic<int64_t>& next) {
  std::vector<float> buffer;
  // Relaxed: threads share no results. An ordering here would also hide races from ThreadSanitizer.
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  for (int64_t u = take(); u < n_units; u = take()) {
    for (int64_t b = units[u]; b < units[u + 1]; ++b) {
      run_bundle(s, s.bundles[b], buffer);
    }
  }
}

void advance(const Step& s, float* steps) {
  for (size_t t = 0; t < s.tensors.size(); ++t) {
    if (s.tensors[t].rule == Rule::momentum || s.tensors[t].rule == Rule::adam) {
      steps[t] += 1.0f;
    }
  }
}

}  // namespace ato::cpu
