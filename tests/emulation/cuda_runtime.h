// Lets a C++ compiler build the .cu files and run their kernels on the host with the semantics of
// thread blocks; see emulator.cpp. Found before CUDA's own header, which this replaces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// By reference, as the argument lies in constant memory: a copy for every thread would be slow.
#define __grid_constant__ &
// One block runs at a time.
#define __shared__ static
#define __isGlobal(pointer) true
#define __builtin_assume(condition)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

// Where a thread waits; those that wait together must wait in one place.
struct Site {
  const char* file;
  int line;
};

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Runs every block of the grid; throws std::runtime_error where the threads of one disagree.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);

// Whether any thread of the block says so, after all have come here.
bool block_barrier(bool value, Site site);

// Each lane's 8 bytes, given to all lanes of the warp; valid until the lane's next exchange.
const uint64_t* warp_exchange(uint64_t value, unsigned mask, Site site);

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffled(T value, int source, unsigned mask, Site site) {
  const uint64_t* lanes = warp_exchange(packed(value), mask, site);
  T result;
  std::memcpy(&result, &lanes[source], sizeof(T));
  return result;
}

template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...);
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

// Default arguments: those of the call.
#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) {
  emulation::block_barrier(false, {file, line});
}

inline int __syncthreads_or(int value, EMULATION_SITE) {
  return emulation::block_barrier(value != 0, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::warp_exchange(0, mask, {file, line});
}

inline int __any_sync(unsigned mask, int value, EMULATION_SITE) {
  const uint64_t* lanes = emulation::warp_exchange(value != 0, mask, {file, line});
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) {
    any = any || lanes[lane] != 0;
  }
  return any;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  return emulation::shuffled(value, source % 32, mask, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, EMULATION_SITE) {
  const int lane = threadIdx.x % 32;
  return emulation::shuffled(value, lane + by < 32 ? lane + by : lane, mask, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, EMULATION_SITE) {
  const int lane = threadIdx.x % 32;
  return emulation::shuffled(value, lane >= by ? lane - by : lane, mask, {file, line});
}

inline void __threadfence() {}

inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned before = *at;
  *at = before >= limit ? 0 : before + 1;
  return before;
}

inline unsigned __float_as_uint(float value) {
  return static_cast<unsigned>(emulation::packed(value));
}

inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <class... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  emulation::run_grid(grid, block, [=] {
    emulation::call(kernel, arguments, std::index_sequence_for<Arguments...>{});
  });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 0;
}
