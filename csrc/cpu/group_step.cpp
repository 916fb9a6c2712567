// CPU kernel of ato_fast::group_step_. Threads take units of about equal size from a shared
// counter. Neighbouring kept rows are updated in one sweep; a dropped group is updated into a
// buffer, reduced, decided and written by one thread while its rows are in cache, so every result
// is the same whatever the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "common.h"
#include "step.h"

namespace ato::cpu {
namespace {

double scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *tensor.const_data_ptr<float>();
    case ScalarType::Double:
      return *tensor.const_data_ptr<double>();
    default:
      STD_TORCH_CHECK(false, name, ": expected float32 or float64, got dtype ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

}  // namespace

void group_step_(std::vector<Tensor> params, std::vector<Tensor> first, std::vector<Tensor> second,
                 Tensor step, Tensor /*scratch*/, std::vector<Tensor> grads, Tensor tensors,
                 Tensor segments, Tensor bundles, Tensor units, Tensor blocks, Tensor mask,
                 Tensor strength, Tensor threshold, std::vector<double> hyper,
                 std::vector<Tensor> lr, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf, int64_t optimizer, int64_t projection,
                 std::vector<double> projection_args) {
  check_codes(optimizer, projection, projection_args, hyper, lr);
  check_tables(tensors, segments, bundles, blocks);
  check_table(units, "units", 0);
  if (params.empty() || (found_inf.has_value() && scalar(*found_inf, "found_inf") != 0.0)) {
    return;
  }
  check_params(params);
  check_states(first, "first", params, uses_first(optimizer, hyper));
  check_states(second, "second", params, optimizer != kSgd);
  check_tensor(step, "step", 0, ScalarType::Float, params[0]);
  check_groups(mask, strength, threshold, params[0]);
  const int64_t n_tensors = tensors.sizes()[0];
  STD_TORCH_CHECK(step.numel() == n_tensors, "step: expected ", n_tensors, " elements, got ",
                  step.numel());
  const int64_t n_rows = static_cast<int64_t>(hyper.size()) / kHyperColumns;
  check_rows(tensors, params, n_rows);
  check_grads(grads, tensors, params);
  check_bundles(bundles, mask.numel(), n_rows);
  STD_TORCH_CHECK(
      units.numel() > 0 && units.const_data_ptr<int64_t>()[units.numel() - 1] == bundles.sizes()[0],
      "units: expected bounds over ", bundles.sizes()[0], " bundles");
  Step s;
  for (size_t i = 0; i < params.size(); ++i) {
    s.buffers.push_back({params[i].mutable_data_ptr(),
                         params[i].scalar_type() == ScalarType::BFloat16,
                         first.empty() ? nullptr : first[i].mutable_data_ptr<float>(),
                         second.empty() ? nullptr : second[i].mutable_data_ptr<float>()});
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    const bool host = lr.empty() || lr[row].numel() == 0;
    s.lr.push_back(host ? hyper[row * kHyperColumns + kLr] : scalar(lr[row], "lr"));
  }
  const double scale = grad_scale.has_value() ? scalar(*grad_scale, "grad_scale") : 1.0;
  std::vector<const void*> gradients;
  for (const Tensor& grad : grads) {
    gradients.push_back(grad.numel() == 0 ? nullptr : grad.const_data_ptr());
  }
  float* steps = step.mutable_data_ptr<float>();
  prepare(s, tensors.const_data_ptr<int64_t>(), gradients, optimizer, hyper.data(), scale, steps);
  s.segments = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
  s.bundles = reinterpret_cast<const Bundle*>(bundles.const_data_ptr<int64_t>());
  s.mask = mask.const_data_ptr<bool>();
  s.strength = strength.const_data_ptr<float>();
  s.threshold = threshold.const_data_ptr<float>();
  s.projection = projection;
  s.args = projection_constants(projection_args);
  const int64_t* bounds = units.const_data_ptr<int64_t>();
  const int64_t n_units = units.numel() - 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), n_units), 1,
                              [&](int64_t, int64_t) { run_units(s, bounds, n_units, next); });
  advance(s, steps);
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("group_step_", TORCH_BOX(&ato::cpu::group_step_));
}
