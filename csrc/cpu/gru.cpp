// CPU kernels of the controller's GRU (ato_fast/gru.py): a whole sequence in one call, its two
// directions on two threads if there are.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common.h"
#include "gru_loops.h"

namespace ato::cpu {
namespace {

// Of one direction: weight_ih, weight_hh, bias_ih, bias_hh.
constexpr int64_t kWeights = 4;
constexpr int64_t kDirections = 2;

struct Sizes {
  int64_t steps, inputs, hidden;
};

Sizes check_gru(const Tensor& source, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(source.dim() == 2, "source: expected [L, inputs], got ", source.dim(),
                  " dimension(s)");
  STD_TORCH_CHECK(weights.size() == kDirections * kWeights, "weights: expected ",
                  kDirections * kWeights, " tensors, got ", weights.size());
  check_tensor(source, "source", 0, ScalarType::Float, source);
  const Sizes sizes{source.sizes()[0], source.sizes()[1], weights[3].numel() / 3};
  const int64_t columns[kWeights] = {sizes.inputs, sizes.hidden, 1, 1};
  for (int64_t i = 0; i < kDirections * kWeights; ++i) {
    check_tensor(weights[i], "weights", i, ScalarType::Float, source);
    const int64_t expected = 3 * sizes.hidden * columns[i % kWeights];
    STD_TORCH_CHECK(weights[i].numel() == expected, "weights[", i, "]: expected ", expected,
                    " elements for ", sizes.inputs, " inputs and a hidden size of ", sizes.hidden,
                    ", got ", weights[i].numel());
  }
  return sizes;
}

void check_values(const Tensor& values, const char* name, int64_t n, const Tensor& like) {
  check_tensor(values, name, 0, ScalarType::Float, like);
  STD_TORCH_CHECK(values.numel() == n, name, ": expected ", n, " elements, got ", values.numel());
}

// Body(gru, direction) for both.
template <class Body>
void for_directions(const Tensor& source, const std::vector<Tensor>& weights, const Sizes& sizes,
                    const Body& body) {
  torch::stable::parallel_for(0, kDirections, 1, [&](int64_t begin, int64_t end) {
    for (int64_t direction = begin; direction < end; ++direction) {
      const Tensor* weight = &weights[direction * kWeights];
      body(Gru{sizes.steps, sizes.inputs, sizes.hidden, direction == 1,
               source.const_data_ptr<float>(), weight[0].const_data_ptr<float>(),
               weight[1].const_data_ptr<float>(), weight[2].const_data_ptr<float>(),
               weight[3].const_data_ptr<float>()},
           direction);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> bi_gru_kernel(Tensor source, std::vector<Tensor> weights) {
  const Sizes sizes = check_gru(source, weights);
  const auto empty = [&](const std::vector<int64_t>& shape) {
    return torch::stable::empty(shape, ScalarType::Float, std::nullopt, source.device());
  };
  Tensor out = empty({sizes.steps, kDirections * sizes.hidden});
  Tensor saved = empty({kDirections, sizes.steps, kGruSaved * sizes.hidden});
  float* states = out.mutable_data_ptr<float>();
  float* kept = saved.mutable_data_ptr<float>();
  for_directions(source, weights, sizes, [&](const Gru& gru, int64_t direction) {
    gru_forward(gru, states + direction * sizes.hidden,
                kept + direction * sizes.steps * kGruSaved * sizes.hidden);
  });
  return {out, saved};
}

std::vector<Tensor> bi_gru_backward_kernel(Tensor grad, Tensor source, std::vector<Tensor> weights,
                                           Tensor states, Tensor saved) {
  const Sizes sizes = check_gru(source, weights);
  const int64_t n_states = sizes.steps * sizes.hidden;
  check_values(grad, "grad", kDirections * n_states, source);
  check_values(states, "states", kDirections * n_states, source);
  check_values(saved, "saved", kDirections * kGruSaved * n_states, source);
  std::vector<Tensor> found;
  std::vector<float*> to;
  for (const Tensor& weight : weights) {
    found.push_back(torch::stable::empty_like(weight));
    to.push_back(found.back().mutable_data_ptr<float>());
  }
  const float* out = states.const_data_ptr<float>();
  const float* kept = saved.const_data_ptr<float>();
  const float* slope = grad.const_data_ptr<float>();
  for_directions(source, weights, sizes, [&](const Gru& gru, int64_t direction) {
    const int64_t half = direction * sizes.hidden;
    float* const* into = &to[direction * kWeights];
    gru_backward(gru, out + half, kept + direction * kGruSaved * n_states, slope + half,
                 {into[0], into[1], into[2], into[3]});
  });
  return found;
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("bi_gru_kernel", TORCH_BOX(&ato::cpu::bi_gru_kernel));
  m.impl("bi_gru_backward_kernel", TORCH_BOX(&ato::cpu::bi_gru_backward_kernel));
}
