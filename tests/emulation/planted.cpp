// Kernels with planted errors, and one without: what the emulator must see.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

namespace {

constexpr int kThreads = 64;

// Every thread adds its neighbour's number to its own.
template <bool kWithBarrier>
__global__ void neighbours(int* out) {
  __shared__ int numbers[kThreads];
  const int i = threadIdx.x;
  numbers[i] = 1000 * blockIdx.x + i;
  if (kWithBarrier) {
    __syncthreads();
  }
  const int sum = numbers[i] + numbers[(i + 1) % kThreads];
  __syncthreads();
  out[blockIdx.x * kThreads + i] = sum;
}

__global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_exit(int*) {
  if (threadIdx.x == 7) {
    return;
  }
  __syncthreads();
}

__global__ void half_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
  }
}

__global__ void barrier_and_shuffle(int* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
  }
  __syncthreads();
}

}  // namespace

// Runs a kernel by name on blocks of 64 threads; the error, or an empty string.
extern "C" const char* emulation_run_planted(const char* name, unsigned n_blocks, int* out) {
  static std::string error;
  const std::pair<const char*, void (*)(int*)> kernels[] = {
      {"neighbours", &neighbours<true>}, {"missing barrier", &neighbours<false>},
      {"two barriers", &two_barriers},   {"early exit", &early_exit},
      {"half a warp", &half_a_warp},     {"barrier and shuffle", &barrier_and_shuffle},
  };
  error = "no such kernel";
  for (const auto& [known, kernel] : kernels) {
    if (std::strcmp(known, name) == 0) {
      void* arguments[] = {&out};
      try {
        error = "";
        cudaLaunchKernel(kernel, n_blocks, kThreads, arguments, 0, nullptr);
      } catch (const std::runtime_error& caught) {
        error = caught.what();
      }
    }
  }
  return error.c_str();
}
