// What the CUDA kernels share: the argument tables a launch carries by value, and a block-wide sum
// with a fixed order.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "common.h"
#include "group_step.h"

namespace ato::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later): no table is copied to the device,
// so nothing synchronises and a captured graph owns its arguments.
constexpr int64_t kMaxTensors = 2048;
constexpr int64_t kMaxRows = 240;

struct Gradients {
  // Null where missing.
  const float* of[kMaxTensors];
};

// The sum of every thread's value, valid in thread 0; the order depends on kThreads alone.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  for (int shift = 16; shift > 0; shift /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, shift);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    warp_sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) {
      total += warp_sums[w];
    }
  }
  return total;
}

// Calls body(shift) for this thread's elements of the chunk; shift counts from the chunk's start.
template <class Body>
__device__ __forceinline__ void for_elements(const Chunk& chunk, const Body& body) {
  if (chunk.outer == 1) {
    for (int64_t i = threadIdx.x; i < chunk.inner; i += kThreads) {
      body(i);
    }
    return;
  }
  const int64_t n = chunk.inner * chunk.outer;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    body(i / chunk.inner * chunk.stride + i % chunk.inner);
  }
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Gradients gradient_table(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) <= kMaxTensors, "grads: expected at most ",
                  kMaxTensors, " tensors, got ", grads.size());
  Gradients table = {};
  for (size_t i = 0; i < grads.size(); ++i) {
    table.of[i] = grads[i].numel() == 0 ? nullptr : grads[i].const_data_ptr<float>();
  }
  return table;
}

}  // namespace ato::cuda
