#include "step.h"

#include <algorithm>
#include <cstring>

#include "loops.h"

namespace ato::cpu {
namespace {

// Channels with pieces of at most this many elements are handled for a whole bundle at once.
constexpr int64_t kShort = 32;

bool is_short(const Segment& segment) {
  return segment.inner <= kShort;
}

// What one thread needs for a bundle with dropped groups.
struct Workspace {
  // Updated rows of one channel, and updated short segments of all channels.
  std::vector<float> row, shorts;
  // What moved one piece of these (DHSPG).
  std::vector<float> moved;
  std::vector<Sums> sums;
  // Per channel: what becomes of it.
  std::vector<float> scale, pull;
  // One factor per element of a short segment.
  std::vector<float> scale_each, pull_each;
};

// Calls body(p, buffers, segment) with p the segment's buffer in its own type.
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

// The plain update of channels [first, last), of long segments only or of all.
void sweep(const Step& s, const Bundle& bundle, int64_t first, int64_t last, bool shorts) {
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    const TensorStep& tensor = s.tensors[s.segments[k].tensor];
    if (tensor.rule == Rule::none || (!shorts && is_short(s.segments[k]))) {
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

// Calls body(p, buffers, segment, shift) for every contiguous long piece of a channel.
template <class Body>
void for_long_pieces(const Step& s, const Bundle& bundle, int64_t channel, const Body& body) {
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    if (is_short(s.segments[k])) {
      continue;
    }
    typed(s, s.segments[k], [&](auto* p, const Buffers& b, const Segment& segment) {
      for (int64_t o = 0; o < segment.outer; ++o) {
        body(p, b, segment, channel * segment.inner + o * segment.stride);
      }
    });
  }
}

// Updates all channels' short segments into w.shorts and adds up the dropped ones.
void try_shorts(const Step& s, const Bundle& bundle, const bool* keep, Workspace& w) {
  int64_t size = 0;
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    size += is_short(s.segments[k]) ? s.segments[k].inner * s.segments[k].outer * bundle.n : 0;
  }
  w.shorts.resize(std::max<size_t>(w.shorts.size(), size));
  float* z = w.shorts.data();
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    if (!is_short(s.segments[k])) {
      continue;
    }
    typed(s, s.segments[k], [&](auto* p, const Buffers& b, const Segment& segment) {
      const TensorStep& tensor = s.tensors[segment.tensor];
      for (int64_t o = 0; o < segment.outer; ++o) {
        const auto span =
            span_of(tensor, p, b, segment, o * segment.stride, bundle.n * segment.inner);
        if (s.projection == kDhspg) {
          w.moved.resize(std::max<size_t>(w.moved.size(), span.n));
          update_zu(tensor.rule, tensor.c, span, z, w.moved.data());
        } else {
          update_to(tensor.rule, tensor.c, span, z);
        }
        for (int64_t c = 0; c < bundle.n; ++c) {
          for (int64_t i = c * segment.inner; !keep[c] && i < (c + 1) * segment.inner; ++i) {
            w.sums[c].add(to_float(span.x[i]), z[i]);
            if (s.projection == kDhspg) {
              w.sums[c].add_moved(to_float(span.x[i]), w.moved[i]);
            }
          }
        }
        z += span.n;
      }
    });
  }
}

// Writes the short segments of all channels.
void finish_shorts(const Step& s, const Bundle& bundle, Workspace& w) {
  const float* z = w.shorts.data();
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    if (!is_short(s.segments[k])) {
      continue;
    }
    typed(s, s.segments[k], [&](auto* p, const Buffers& b, const Segment& segment) {
      const int64_t inner = segment.inner, n = bundle.n * inner;
      const float *scale = w.scale.data(), *pull = w.pull.data();
      if (inner > 1) {
        w.scale_each.resize(std::max<size_t>(w.scale_each.size(), n));
        w.pull_each.resize(std::max<size_t>(w.pull_each.size(), n));
        for (int64_t c = 0; c < bundle.n; ++c) {
          std::fill_n(w.scale_each.data() + c * inner, inner, scale[c]);
          std::fill_n(w.pull_each.data() + c * inner, inner, pull[c]);
        }
        scale = w.scale_each.data();
        pull = w.pull_each.data();
      }
      for (int64_t o = 0; o < segment.outer; ++o, z += n) {
        combine_each(span_of(s.tensors[segment.tensor], p, b, segment, o * segment.stride, n), z,
                     scale, pull);
      }
    });
  }
}

bool is_zero(const Step& s, const Bundle& bundle, int64_t channel, const Sums& shorts) {
  bool zero = shorts.xx == 0.0;
  for_long_pieces(s, bundle, channel,
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

void drop_long(const Step& s, const Bundle& bundle, int64_t channel, bool was_zero) {
  for_long_pieces(s, bundle, channel,
                  [=](auto* p, const Buffers& b, const Segment& segment, int64_t shift) {
                    const int64_t at = segment.start + shift;
                    if (!was_zero) {
                      std::memset(p + at, 0, segment.inner * sizeof(*p));
                    }
                    if (b.m != nullptr) {
                      clear(b.m + at, segment.inner);
                    }
                    if (b.v != nullptr) {
                      clear(b.v + at, segment.inner);
                    }
                  });
}

// Update, sums, decision and projection of one dropped group, whose short segments are tried.
void project(const Step& s, const Bundle& bundle, int64_t channel, Workspace& w) {
  Sums sums = w.sums[channel];
  w.scale[channel] = w.pull[channel] = 0.0f;
  if (is_zero(s, bundle, channel, sums)) {
    drop_long(s, bundle, channel, true);
    return;
  }
  int64_t size = 0;
  for (int64_t k = bundle.segment_begin; k < bundle.segment_end; ++k) {
    size += is_short(s.segments[k]) ? 0 : s.segments[k].inner * s.segments[k].outer;
  }
  w.row.resize(std::max<size_t>(w.row.size(), size));
  float* z = w.row.data();
  for_long_pieces(s, bundle, channel,
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
  // `decide` asks whether the group was zero, which it was not; the prox has no sum of long rows.
  sums.xx = s.projection == kProx ? 1.0 : sums.xx;
  const int64_t group = bundle.group_begin + channel;
  const double threshold =
      group_threshold(s.lr[bundle.hyper], s.strength[group], s.threshold[group]);
  const Decision decision = decide(s.projection, sums, threshold, s.args);
  if (decision.scale == 0.0) {
    drop_long(s, bundle, channel, false);
    return;
  }
  w.scale[channel] = static_cast<float>(decision.scale);
  w.pull[channel] = static_cast<float>(decision.pull);
  z = w.row.data();
  for_long_pieces(
      s, bundle, channel, [&](auto* p, const Buffers&, const Segment& segment, int64_t shift) {
        combine(p + segment.start + shift, z, w.scale[channel], w.pull[channel], segment.inner);
        z += segment.inner;
      });
}

void run_bundle(const Step& s, const Bundle& bundle, Workspace& w) {
  const bool* keep = bundle.group_begin < 0 ? nullptr : s.mask + bundle.group_begin;
  if (keep == nullptr || s.projection == kNone ||
      std::all_of(keep, keep + bundle.n, [](bool kept) { return kept; })) {
    sweep(s, bundle, 0, bundle.n, true);
    return;
  }
  w.sums.assign(bundle.n, Sums());
  w.scale.assign(bundle.n, 1.0f);
  w.pull.assign(bundle.n, 0.0f);
  try_shorts(s, bundle, keep, w);
  for (int64_t c = 0; c < bundle.n;) {
    if (!keep[c]) {
      project(s, bundle, c, w);
      ++c;
      continue;
    }
    const int64_t first = c;
    while (c < bundle.n && keep[c]) {
      ++c;
    }
    sweep(s, bundle, first, c, false);
  }
  finish_shorts(s, bundle, w);
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
  Workspace workspace;
  // Relaxed: threads share no results. An ordering here would also hide races from ThreadSanitizer.
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  for (int64_t u = take(); u < n_units; u = take()) {
    for (int64_t b = units[u]; b < units[u + 1]; ++b) {
      run_bundle(s, s.bundles[b], workspace);
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
