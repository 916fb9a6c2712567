// What the host functions of the CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "common.h"
#include "walk.cuh"

namespace ato::cuda {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// One block per row of `blocks`. The arguments travel by value: nothing is copied to the device, so
// nothing synchronises and a captured graph owns them.
template <class Kernel>
void launch(Kernel* kernel, int64_t n_blocks, void** arguments, cudaStream_t stream) {
  STD_TORCH_CHECK(n_blocks < int64_t{1} << 31, "blocks: expected fewer than 2^31 rows, got ",
                  n_blocks);
  const dim3 grid(static_cast<unsigned>(n_blocks));
  STD_CUDA_CHECK(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Checks and collects what both kernels read. `states` may be null.
inline Tables tables_of(const std::vector<Tensor>& params, const std::vector<Tensor>* first,
                        const std::vector<Tensor>* second, const std::vector<Tensor>& grads,
                        const Tensor& segments, const Tensor& bundles, const Tensor& blocks) {
  STD_TORCH_CHECK(static_cast<int64_t>(params.size()) <= kMaxBuffers, "params: expected at most ",
                  kMaxBuffers, " buffers, got ", params.size());
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) <= kMaxTensors, "grads: expected at most ",
                  kMaxTensors, " tensors, got ", grads.size());
  for (const Tensor* table : {&segments, &bundles, &blocks}) {
    STD_TORCH_CHECK(table->device() == params[0].device(),
                    "segments, bundles, blocks: expected the device of params[0] (index ",
                    params[0].get_device_index(), "), got another (index ",
                    table->get_device_index(), ")");
  }
  Tables tables = {};
  tables.segments = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
  tables.bundles = reinterpret_cast<const Bundle*>(bundles.const_data_ptr<int64_t>());
  tables.blocks = reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>());
  for (size_t i = 0; i < params.size(); ++i) {
    Buffer& buffer = tables.buffers[i];
    buffer.p = params[i].mutable_data_ptr();
    buffer.m = first == nullptr || first->empty() ? nullptr : (*first)[i].mutable_data_ptr<float>();
    buffer.v =
        second == nullptr || second->empty() ? nullptr : (*second)[i].mutable_data_ptr<float>();
    buffer.is_bf16 = params[i].scalar_type() == ScalarType::BFloat16;
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    tables.grads[i] = grads[i].numel() == 0 ? nullptr : grads[i].const_data_ptr();
  }
  return tables;
}

}  // namespace ato::cuda
