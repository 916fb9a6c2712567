// CUDA kernel of ato_fast::group_step_, the straightforward way: one block per chunk updates and
// writes its partial sums to its slot, one block per dropped group adds its slots in order, decides
// and scales. The half-space projection needs the norms before the step: one more launch. Nothing
// is read back, so a step can be captured.
#include "launch.cuh"

namespace ato::cuda {
namespace {

// Columns of a slot of `scratch`.
enum Slot : int64_t { kBeforeXX, kZZ, kZX, kXX, kSlotColumns = 8 };

struct Step {
  float* p;
  float* m;
  float* v;
  float* steps;
  double* scratch;
  const Chunk* chunks;
  const Item* items;
  const float* strength;
  const float* threshold;
  const float* grad_scale;
  const float* found_inf;
  int64_t n_slots, n_items, n_tensors;
  int64_t optimizer, projection;
  double half_space_eps;
};

struct Rows {
  double hyper[kMaxRows * kHyperColumns];
  // Null where the host value holds.
  const float* lr[kMaxRows];
};
static_assert(sizeof(Step) + sizeof(Rows) + sizeof(Gradients) <= 32764, "kernel argument limit");

__device__ __forceinline__ bool skipped(const Step& s) {
  return s.found_inf != nullptr && *s.found_inf != 0.0f;
}

__device__ __forceinline__ double rate_of(const Rows& rows, int64_t row) {
  const float* lr = rows.lr[row];
  return lr != nullptr ? static_cast<double>(*lr) : rows.hyper[row * kHyperColumns + kLr];
}

__device__ double threshold_of(const Step& s, const Rows& rows, const Item& item) {
  return group_threshold(rate_of(rows, item.hyper), s.strength[item.group],
                         s.threshold[item.group]);
}

__device__ double slots_sum(const Step& s, const Item& item, int64_t column) {
  double sum = 0.0;
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    sum += s.scratch[k * kSlotColumns + column];
  }
  return sum;
}

// The item that owns a slot: the last whose chunks begin at or before it and are not empty.
__device__ const Item& item_of(const Step& s, int64_t slot) {
  int64_t low = 0, high = s.n_items;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (s.items[middle].chunk_end <= slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return s.items[low];
}

__global__ void __launch_bounds__(kThreads) before_kernel(const __grid_constant__ Step s) {
  if (skipped(s)) {
    return;
  }
  const Chunk chunk = s.chunks[blockIdx.x];
  const float* p = s.p + chunk.start;
  double xx = 0.0;
  for_elements(chunk, [&](int64_t i) { xx += static_cast<double>(p[i]) * p[i]; });
  xx = block_sum(xx);
  if (threadIdx.x == 0) {
    s.scratch[blockIdx.x * int64_t{kSlotColumns} + kBeforeXX] = xx;
  }
}

struct Sums {
  double zz = 0.0, zx = 0.0, xx = 0.0;

  __device__ __forceinline__ void add(float x, float z) {
    zz += static_cast<double>(z) * z;
    zx += static_cast<double>(z) * x;
    xx += static_cast<double>(x) * x;
  }
};

template <Rule R>
__device__ __forceinline__ void update_chunk(const Step& s, const Chunk& chunk, const float* grad,
                                             const Coefficients& c, float pull, Sums& sums) {
  for_elements(chunk, [&](int64_t i) {
    const int64_t at = chunk.start + i;
    const float x = s.p[at];
    float z = x;
    if (grad != nullptr) {
      float m = R != Rule::sgd ? s.m[at] : 0.0f;
      float v = R == Rule::adam ? s.v[at] : 0.0f;
      z = update<R>(x, grad[i], m, v, c);
      if constexpr (R != Rule::sgd) {
        s.m[at] = m;
      }
      if constexpr (R == Rule::adam) {
        s.v[at] = v;
      }
    }
    z -= pull * x;
    s.p[at] = z;
    sums.add(x, z);
  });
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Step s, const __grid_constant__ Rows rows,
                  const __grid_constant__ Gradients grads) {
  if (skipped(s)) {
    return;
  }
  __shared__ Coefficients shared_c;
  __shared__ float shared_pull;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = s.chunks[slot];
  const double* hyper = rows.hyper + chunk.hyper * kHyperColumns;
  const bool projected = s.projection != kNone && slot < s.n_slots;
  if (threadIdx.x == 0) {
    const double scale = s.grad_scale != nullptr ? static_cast<double>(*s.grad_scale) : 1.0;
    shared_c =
        coefficients(s.optimizer, hyper, rate_of(rows, chunk.hyper), s.steps[chunk.tensor], scale);
    shared_pull = 0.0f;
    if (projected && s.projection == kHalfSpace) {
      const Item& item = item_of(s, slot);
      shared_pull = static_cast<float>(
          half_space_pull(slots_sum(s, item, kBeforeXX), threshold_of(s, rows, item)));
    }
  }
  __syncthreads();
  const Coefficients c = shared_c;
  const float pull = shared_pull;
  const float* grad = grads.of[chunk.tensor];
  if (grad != nullptr) {
    grad += chunk.grad_start;
  }
  Sums sums;
  if (s.optimizer != kSgd) {
    update_chunk<Rule::adam>(s, chunk, grad, c, pull, sums);
  } else if (hyper[kBeta1] != 0.0) {
    update_chunk<Rule::momentum>(s, chunk, grad, c, pull, sums);
  } else {
    update_chunk<Rule::sgd>(s, chunk, grad, c, pull, sums);
  }
  if (projected) {
    const double zz = block_sum(sums.zz);
    const double zx = block_sum(sums.zx);
    const double xx = block_sum(sums.xx);
    if (threadIdx.x == 0) {
      double* out = s.scratch + slot * kSlotColumns;
      out[kZZ] = zz;
      out[kZX] = zx;
      out[kXX] = xx;
    }
  }
}

// Tensors whose step count this step advances.
struct Advance {
  bool of[kMaxTensors];
};

// One block per projected item; the last block advances the step counts, which no other reads here.
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const __grid_constant__ Step s, const __grid_constant__ Rows rows,
                  const __grid_constant__ Advance advance) {
  if (skipped(s)) {
    return;
  }
  if (blockIdx.x == gridDim.x - 1) {
    for (int64_t t = threadIdx.x; t < s.n_tensors; t += kThreads) {
      if (advance.of[t]) {
        s.steps[t] += 1.0f;
      }
    }
    return;
  }
  __shared__ float shared_scale;
  const Item item = s.items[blockIdx.x];
  if (threadIdx.x == 0) {
    const double threshold = threshold_of(s, rows, item);
    const double xx = slots_sum(s, item, kXX);
    double scale = 0.0;
    if (xx != 0.0) {
      scale = s.projection == kProx
                  ? prox_scale(slots_sum(s, item, kZZ), threshold)
                  : half_space_scale(slots_sum(s, item, kZX), xx, threshold, s.half_space_eps);
    }
    shared_scale = static_cast<float>(scale);
  }
  __syncthreads();
  const float scale = shared_scale;
  if (scale == 1.0f) {
    return;
  }
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    const Chunk chunk = s.chunks[k];
    for_elements(chunk, [&](int64_t i) {
      const int64_t at = chunk.start + i;
      if (scale != 0.0f) {
        s.p[at] *= scale;
        return;
      }
      s.p[at] = 0.0f;
      if (s.m != nullptr) {
        s.m[at] = 0.0f;
      }
      if (s.v != nullptr) {
        s.v[at] = 0.0f;
      }
    });
  }
}

const float* one_float(const Tensor& tensor, const char* name, const Tensor& like) {
  check_tensor(tensor, name, 0, ScalarType::Float, like);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  return tensor.const_data_ptr<float>();
}

}  // namespace

void group_step_(std::vector<Tensor> params, std::vector<Tensor> first, std::vector<Tensor> second,
                 Tensor step, Tensor scratch, std::vector<Tensor> grads, Tensor tensors,
                 Tensor chunks, Tensor items, Tensor, Tensor, Tensor strength, Tensor threshold,
                 std::vector<double> hyper, std::vector<Tensor> lr,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t n_slots,
                 int64_t, int64_t optimizer, int64_t projection,
                 std::vector<double> projection_args) {
  check_codes(optimizer, projection, projection_args, hyper, lr);
  check_tables(tensors, chunks, items);
  STD_TORCH_CHECK(params.size() == 1, "params: expected one float32 buffer, got ", params.size());
  const bool needs_first = uses_first(optimizer, hyper);
  check_tensor(params[0], "params", 0, ScalarType::Float, params[0]);
  check_buffers(first, "first", params, needs_first);
  check_buffers(second, "second", params, optimizer != kSgd);
  check_tensor(step, "step", 0, ScalarType::Float, params[0]);
  check_tensor(scratch, "scratch", 0, ScalarType::Double, params[0]);
  check_tensor(strength, "strength", 0, ScalarType::Float, params[0]);
  check_tensor(threshold, "threshold", 0, ScalarType::Float, params[0]);
  STD_TORCH_CHECK(scratch.numel() >= n_slots * kSlotColumns, "scratch: expected at least ",
                  n_slots * kSlotColumns, " elements, got ", scratch.numel());
  const int64_t* table = tensors.const_data_ptr<int64_t>();
  check_grads(grads, tensors, table + kNumel, kTensorColumns, params[0]);
  const int64_t n_rows = static_cast<int64_t>(hyper.size()) / kHyperColumns;
  STD_TORCH_CHECK(n_rows <= kMaxRows, "hyper: expected at most ", kMaxRows,
                  " parameter groups, got ", n_rows);
  const int64_t n_chunks = chunks.sizes()[0];
  const int64_t n_items = projection == kNone ? 0 : items.sizes()[0];
  STD_TORCH_CHECK(n_chunks < int64_t{1} << 31, "chunks: expected fewer than 2^31, got ", n_chunks);

  const Gradients gradients = gradient_table(grads);
  Rows rows = {};
  std::copy(hyper.begin(), hyper.end(), rows.hyper);
  for (size_t row = 0; row < lr.size(); ++row) {
    rows.lr[row] = lr[row].numel() == 0 ? nullptr : one_float(lr[row], "lr", params[0]);
  }
  Advance advance = {};
  for (size_t t = 0; t < grads.size(); ++t) {
    const double beta1 = hyper[table[t * kTensorColumns + kHyperRow] * kHyperColumns + kBeta1];
    advance.of[t] = gradients.of[t] != nullptr && (optimizer != kSgd || beta1 != 0.0);
  }
  Step s = {};
  s.p = params[0].mutable_data_ptr<float>();
  s.m = first.empty() ? nullptr : first[0].mutable_data_ptr<float>();
  s.v = second.empty() ? nullptr : second[0].mutable_data_ptr<float>();
  s.steps = step.mutable_data_ptr<float>();
  s.scratch = scratch.mutable_data_ptr<double>();
  s.chunks = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>());
  s.items = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  s.strength = strength.const_data_ptr<float>();
  s.threshold = threshold.const_data_ptr<float>();
  s.grad_scale = grad_scale ? one_float(*grad_scale, "grad_scale", params[0]) : nullptr;
  s.found_inf = found_inf ? one_float(*found_inf, "found_inf", params[0]) : nullptr;
  s.n_slots = n_slots;
  s.n_items = n_items;
  s.n_tensors = static_cast<int64_t>(grads.size());
  s.optimizer = optimizer;
  s.projection = projection;
  s.half_space_eps = projection == kHalfSpace ? projection_args[0] : 0.0;

  const int32_t device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (projection == kHalfSpace && n_slots > 0) {
    before_kernel<<<static_cast<unsigned>(n_slots), kThreads, 0, stream>>>(s);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (n_chunks > 0) {
    update_kernel<<<static_cast<unsigned>(n_chunks), kThreads, 0, stream>>>(s, rows, gradients);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  decide_kernel<<<static_cast<unsigned>(n_items + 1), kThreads, 0, stream>>>(s, rows, advance);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ato::cuda

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CUDA, m) {
  m.impl("group_step_", TORCH_BOX(&ato::cuda::group_step_));
}
