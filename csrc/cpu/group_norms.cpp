// CPU kernel of ato_fast::group_norms.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common.h"
#include "loops.h"

namespace ato::cpu {
namespace {

// Adds the sums of one channel's part in a segment; g is null without a gradient.
template <class T>
void add_segment(const Segment& segment, int64_t channel, const T* x, const T* g, double* sums) {
  for (int64_t o = 0; o < segment.outer; ++o) {
    const int64_t shift = channel * segment.inner + o * segment.stride;
    const T* value = x + segment.start + shift;
    sums[0] += dot(value, value, segment.inner);
    if (g != nullptr) {
      const T* gradient = g + segment.grad_start + shift;
      sums[1] += dot(gradient, gradient, segment.inner);
      sums[2] += dot(value, gradient, segment.inner);
    }
  }
}

}  // namespace

Tensor group_norms(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor tensors,
                   Tensor segments, Tensor bundles, Tensor blocks, int64_t n_groups) {
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one buffer, got none");
  check_tables(tensors, segments, bundles, blocks);
  check_params(params);
  check_rows(tensors, params, INT64_MAX);
  check_bundles(bundles, n_groups, INT64_MAX);
  if (!grads.empty()) {
    check_grads(grads, tensors, params);
  }
  const int64_t columns = grads.empty() ? 1 : 3;
  const std::vector<int64_t> shape{n_groups, columns};
  Tensor out = torch::stable::empty(shape, ScalarType::Double, std::nullopt, params[0].device());
  double* sums = out.mutable_data_ptr<double>();
  std::fill(sums, sums + n_groups * columns, 0.0);
  const auto* segment_rows = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
  const auto* bundle_rows = reinterpret_cast<const Bundle*>(bundles.const_data_ptr<int64_t>());
  torch::stable::parallel_for(0, bundles.sizes()[0], 8, [&](int64_t begin, int64_t end) {
    for (const Bundle* bundle = bundle_rows + begin; bundle < bundle_rows + end; ++bundle) {
      for (int64_t c = 0; bundle->group_begin >= 0 && c < bundle->n; ++c) {
        double* out_row = sums + (bundle->group_begin + c) * columns;
        for (int64_t k = bundle->segment_begin; k < bundle->segment_end; ++k) {
          const Segment& segment = segment_rows[k];
          const void* x = params[segment.buffer].const_data_ptr();
          const bool has_grad = columns == 3 && grads[segment.tensor].numel() != 0;
          const void* g = has_grad ? grads[segment.tensor].const_data_ptr() : nullptr;
          if (params[segment.buffer].scalar_type() == ScalarType::BFloat16) {
            add_segment(segment, c, static_cast<const bf16*>(x), static_cast<const bf16*>(g),
                        out_row);
          } else {
            add_segment(segment, c, static_cast<const float*>(x), static_cast<const float*>(g),
                        out_row);
          }
        }
      }
    }
  });
  return out;
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("group_norms", TORCH_BOX(&ato::cpu::group_norms));
}
