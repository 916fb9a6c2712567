// CPU kernel of ato_fast::group_norms.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common.h"
#include "loops.h"

namespace ato::cpu {

Tensor group_norms(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor tensors,
                   Tensor chunks, Tensor items, int64_t /*n_slots*/, int64_t /*n_projected*/) {
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one buffer, got none");
  check_tables(tensors, chunks, items);
  for (size_t i = 0; i < params.size(); ++i) {
    check_tensor(params[i], "params", i, ScalarType::Float, params[0]);
  }
  if (!grads.empty()) {
    check_grads(grads, tensors, tensors.const_data_ptr<int64_t>() + kNumel, kTensorColumns,
                params[0]);
  }
  const int64_t columns = grads.empty() ? 1 : 3;
  const int64_t n_items = items.sizes()[0];
  const std::vector<int64_t> shape{n_items, columns};
  Tensor out = torch::stable::empty(shape, ScalarType::Double, std::nullopt, params[0].device());
  double* sums = out.mutable_data_ptr<double>();
  std::vector<const float*> values, gradients;
  for (const Tensor& buffer : params) {
    values.push_back(buffer.const_data_ptr<float>());
  }
  for (const Tensor& grad : grads) {
    gradients.push_back(grad.numel() == 0 ? nullptr : grad.const_data_ptr<float>());
  }
  const Chunk* chunk_rows = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>());
  const Item* item_rows = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  torch::stable::parallel_for(0, n_items, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* sum = sums + i * columns;
      std::fill(sum, sum + columns, 0.0);
      for (int64_t k = item_rows[i].chunk_begin; k < item_rows[i].chunk_end; ++k) {
        const Chunk& chunk = chunk_rows[k];
        for (int64_t o = 0; o < chunk.outer; ++o) {
          const int64_t shift = o * chunk.stride;
          const float* x = values[chunk.buffer] + chunk.start + shift;
          sum[0] += dot(x, x, chunk.inner);
          if (columns == 3 && gradients[chunk.tensor] != nullptr) {
            const float* g = gradients[chunk.tensor] + chunk.grad_start + shift;
            sum[1] += dot(g, g, chunk.inner);
            sum[2] += dot(x, g, chunk.inner);
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
