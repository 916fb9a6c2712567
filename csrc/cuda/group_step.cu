// Host function of the CUDA kernel of ato_fast::group_step_. Nothing is allocated or read back, so
// a step can be captured.
#include "group_step.cuh"

#include <algorithm>

#include "launch.cuh"

namespace ato::cuda {
namespace {

const float* one_float(const Tensor& tensor, const char* name, int64_t index, const Tensor& like) {
  check_tensor(tensor, name, index, ScalarType::Float, like);
  STD_TORCH_CHECK(tensor.numel() == 1, name, "[", index, "]: expected one element, got ",
                  tensor.numel());
  return tensor.const_data_ptr<float>();
}

using Kernel = decltype(step_kernel<Rule::sgd, false>);

template <Rule R>
Kernel* kernel_of(bool projected) {
  return projected ? &step_kernel<R, true> : &step_kernel<R, false>;
}

// A momentum buffer is cleared with its group even where no parameter group has momentum any more.
Kernel* kernel_of(int64_t optimizer, bool has_first, bool projected) {
  if (optimizer != kSgd) {
    return kernel_of<Rule::adam>(projected);
  }
  return has_first ? kernel_of<Rule::momentum>(projected) : kernel_of<Rule::sgd>(projected);
}

}  // namespace

void group_step_(std::vector<Tensor> params, std::vector<Tensor> first, std::vector<Tensor> second,
                 Tensor step, Tensor scratch, std::vector<Tensor> grads, Tensor tensors,
                 Tensor segments, Tensor bundles, Tensor /*units*/, Tensor blocks, Tensor mask,
                 Tensor strength, Tensor threshold, std::vector<double> hyper,
                 std::vector<Tensor> lr, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf, int64_t optimizer, int64_t projection,
                 std::vector<double> projection_args) {
  check_codes(optimizer, projection, projection_args, hyper, lr);
  check_tables(tensors, segments, bundles, blocks);
  if (params.empty()) {
    return;
  }
  check_params(params);
  check_states(first, "first", params, uses_first(optimizer, hyper));
  check_states(second, "second", params, optimizer != kSgd);
  check_tensor(step, "step", 0, ScalarType::Float, params[0]);
  check_tensor(scratch, "scratch", 0, ScalarType::Int, params[0]);
  STD_TORCH_CHECK(scratch.numel() >= 1, "scratch: expected one element, got none");
  check_groups(mask, strength, threshold, params[0]);
  const int64_t n_tensors = tensors.sizes()[0];
  STD_TORCH_CHECK(step.numel() == n_tensors, "step: expected ", n_tensors, " elements, got ",
                  step.numel());
  check_grads(grads, tensors, params);
  const int64_t n_rows = static_cast<int64_t>(hyper.size()) / kHyperColumns;
  STD_TORCH_CHECK(n_rows <= kMaxRows, "hyper: expected at most ", kMaxRows,
                  " parameter groups, got ", n_rows);
  if (blocks.numel() == 0) {
    return;
  }

  Step s = {};
  s.tables = tables_of(params, &first, &second, grads, segments, bundles, blocks);
  std::copy(hyper.begin(), hyper.end(), s.hyper);
  for (size_t row = 0; row < lr.size(); ++row) {
    s.lr[row] = lr[row].numel() == 0 ? nullptr : one_float(lr[row], "lr", row, params[0]);
  }
  const int64_t* table = tensors.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < n_tensors; ++t) {
    // SGD counts the updates of its buffer, as torch does by leaving it None until the first.
    const double beta1 = hyper[table[t * kTensorColumns + kHyperRow] * kHyperColumns + kBeta1];
    if (s.tables.grads[t] != nullptr && (optimizer != kSgd || beta1 != 0.0)) {
      s.advances[t / kFlagBits] |= uint32_t{1} << t % kFlagBits;
      s.n_advances = t + 1;
    }
  }
  s.steps = step.mutable_data_ptr<float>();
  s.finished = reinterpret_cast<unsigned*>(scratch.mutable_data_ptr<int32_t>());
  s.mask = mask.const_data_ptr<bool>();
  s.strength = strength.const_data_ptr<float>();
  s.threshold = threshold.const_data_ptr<float>();
  s.grad_scale = grad_scale ? one_float(*grad_scale, "grad_scale", 0, params[0]) : nullptr;
  s.found_inf = found_inf ? one_float(*found_inf, "found_inf", 0, params[0]) : nullptr;
  s.optimizer = optimizer;
  s.projection = projection;
  s.args = projection_constants(projection_args);

  const int32_t device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* arguments[] = {&s};
  launch(kernel_of(optimizer, !first.empty(), projection != kNone), blocks.sizes()[0], arguments,
         current_stream(device));
}

}  // namespace ato::cuda

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CUDA, m) {
  m.impl("group_step_", TORCH_BOX(&ato::cuda::group_step_));
}
