// CUDA kernel of ato_fast::group_norms: one block per item adds its chunks in order.
#include "launch.cuh"

namespace ato::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    norms_kernel(const float* p, const Chunk* chunks, const Item* items, bool with_grads,
                 const __grid_constant__ Gradients grads, double* out) {
  const Item item = items[blockIdx.x];
  double xx = 0.0, gg = 0.0, xg = 0.0;
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    const Chunk chunk = chunks[k];
    const float* x = p + chunk.start;
    const float* g = with_grads ? grads.of[chunk.tensor] : nullptr;
    if (g != nullptr) {
      g += chunk.grad_start;
    }
    for_elements(chunk, [&](int64_t i) {
      const double value = x[i];
      xx += value * value;
      if (g != nullptr) {
        const double gradient = g[i];
        gg += gradient * gradient;
        xg += value * gradient;
      }
    });
  }
  xx = block_sum(xx);
  gg = block_sum(gg);
  xg = block_sum(xg);
  if (threadIdx.x == 0) {
    const int64_t columns = with_grads ? 3 : 1;
    double* sums = out + blockIdx.x * columns;
    sums[0] = xx;
    if (with_grads) {
      sums[1] = gg;
      sums[2] = xg;
    }
  }
}

}  // namespace

Tensor group_norms(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor tensors,
                   Tensor chunks, Tensor items, int64_t, int64_t) {
  check_tables(tensors, chunks, items);
  STD_TORCH_CHECK(params.size() == 1, "params: expected one float32 buffer, got ", params.size());
  check_tensor(params[0], "params", 0, ScalarType::Float, params[0]);
  if (!grads.empty()) {
    check_grads(grads, tensors, tensors.const_data_ptr<int64_t>() + kNumel, kTensorColumns,
                params[0]);
  }
  const int64_t n_items = items.sizes()[0];
  const int32_t device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<int64_t> shape{n_items, grads.empty() ? 1 : 3};
  Tensor out = torch::stable::empty(shape, ScalarType::Double, std::nullopt, params[0].device());
  if (n_items == 0) {
    return out;
  }
  norms_kernel<<<static_cast<unsigned>(n_items), kThreads, 0, current_stream(device)>>>(
      params[0].const_data_ptr<float>(),
      reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>()),
      reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>()), !grads.empty(),
      gradient_table(grads), out.mutable_data_ptr<double>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace ato::cuda

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CUDA, m) {
  m.impl("group_norms", TORCH_BOX(&ato::cuda::group_norms));
}
