// Host function of the CUDA kernel of ato_fast::group_norms.
#include "group_norms.cuh"

#include "launch.cuh"

namespace ato::cuda {

Tensor group_norms(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor tensors,
                   Tensor segments, Tensor bundles, Tensor blocks, int64_t n_groups) {
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one buffer, got none");
  check_tables(tensors, segments, bundles, blocks);
  check_params(params);
  if (!grads.empty()) {
    check_grads(grads, tensors, params);
  }
  const int32_t device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<int64_t> shape{n_groups, grads.empty() ? 1 : 3};
  Tensor out = torch::stable::empty(shape, ScalarType::Double, std::nullopt, params[0].device());
  torch::stable::zero_(out);
  if (n_groups == 0 || blocks.numel() == 0) {
    return out;
  }
  Tables tables = tables_of(params, nullptr, nullptr, grads, segments, bundles, blocks);
  double* sums = out.mutable_data_ptr<double>();
  void* arguments[] = {&tables, &sums};
  launch(grads.empty() ? &norms_kernel<false> : &norms_kernel<true>, blocks.sizes()[0], arguments,
         current_stream(device));
  return out;
}

}  // namespace ato::cuda

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CUDA, m) {
  m.impl("group_norms", TORCH_BOX(&ato::cuda::group_norms));
}
