// CPU kernels of ato_fast::masked_bn_act_kernel and masked_bn_act_backward_kernel. Every activation
// is read once and written once; sums belong to rows or to a fixed number of blocks of points and
// are added in order, so results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common.h"
#include "masked_loops.h"

namespace ato::cpu {
namespace {

// Elements a thread should have, so that starting it pays.
constexpr int64_t kGrain = 1 << 15;
// Blocks that points are summed in: more than threads, and few enough that sums cost nothing.
constexpr int64_t kBlocks = 128;

void check_masked(const Tensor& x, const Tensor& gate, const Tensor& scale, const Tensor& shift,
                  int64_t channels, int64_t inner, int64_t activation) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x: expected float32, bfloat16 or float16, got dtype ", static_cast<int>(dtype));
  check_tensor(gate, "gate", 0, ScalarType::Float, x);
  check_tensor(scale, "scale", 0, ScalarType::Float, x);
  check_tensor(shift, "shift", 0, ScalarType::Float, x);
  STD_TORCH_CHECK(
      gate.numel() == channels && scale.numel() == channels && shift.numel() == channels,
      "gate, scale and shift: expected ", channels, " entries each, got ", gate.numel(), ", ",
      scale.numel(), " and ", shift.numel());
  STD_TORCH_CHECK(inner >= 1 && x.numel() % (std::max<int64_t>(channels, 1) * inner) == 0,
                  "inner: expected a divisor of the elements per channel, got ", inner);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: expected 0 to ",
                  static_cast<int64_t>(kActivations) - 1, ", got ", activation);
}

template <class T>
Masked<T> pointers(const Tensor& x, const Tensor* grad, Tensor& out, const Tensor& gate,
                   const Tensor& scale, const Tensor& shift, int64_t inner) {
  return {static_cast<const T*>(x.const_data_ptr()),
          grad == nullptr ? nullptr : static_cast<const T*>(grad->const_data_ptr()),
          static_cast<T*>(out.mutable_data_ptr()),
          gate.const_data_ptr<float>(),
          scale.const_data_ptr<float>(),
          shift.const_data_ptr<float>(),
          gate.numel(),
          inner};
}

// Calls body(m) with the elements in x's type.
template <class Body>
void typed(const Tensor& x, const Tensor* grad, Tensor& out, const Tensor& gate,
           const Tensor& scale, const Tensor& shift, int64_t inner, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(pointers<float>(x, grad, out, gate, scale, shift, inner));
    case ScalarType::BFloat16:
      return body(pointers<bf16>(x, grad, out, gate, scale, shift, inner));
    default:
      return body(pointers<half>(x, grad, out, gate, scale, shift, inner));
  }
}

// How many pieces of `elements` each make a thread's work worth starting.
int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
}

}  // namespace

Tensor masked_bn_act_kernel(Tensor x, Tensor gate, Tensor scale, Tensor shift, int64_t inner,
                            int64_t activation) {
  const int64_t channels = gate.numel();
  check_masked(x, gate, scale, shift, channels, inner, activation);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) {
    return out;
  }
  const auto act = static_cast<Activation>(activation);
  const int64_t rows = x.numel() / inner;
  typed(x, nullptr, out, gate, scale, shift, inner, [&](const auto& m) {
    if (inner == 1) {
      torch::stable::parallel_for(
          0, rows / channels, grain(channels),
          [&](int64_t begin, int64_t end) { masked_points(act, m, begin, end); });
    } else {
      torch::stable::parallel_for(0, rows, grain(inner), [&](int64_t begin, int64_t end) {
        masked_rows(act, m, begin, end);
      });
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_bn_act_backward_kernel(Tensor grad, Tensor x, Tensor gate,
                                                         Tensor scale, Tensor shift, int64_t inner,
                                                         int64_t activation) {
  const int64_t channels = gate.numel();
  check_masked(x, gate, scale, shift, channels, inner, activation);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
                  "grad: expected x's dtype and ", x.numel(), " elements, got dtype ",
                  static_cast<int>(grad.scalar_type()), " and ", grad.numel());
  Tensor out = torch::stable::empty_like(x);
  Tensor gate_grad = torch::stable::empty_like(gate);
  float* result = gate_grad.mutable_data_ptr<float>();
  std::fill(result, result + channels, 0.0f);
  if (x.numel() == 0) {
    return {out, gate_grad};
  }
  const auto act = static_cast<Activation>(activation);
  const int64_t rows = x.numel() / inner, points = rows / channels;
  const int64_t n_blocks = std::min(points, kBlocks);
  std::vector<double> sums(inner == 1 ? n_blocks * channels : rows, 0.0);
  typed(x, &grad, out, gate, scale, shift, inner, [&](const auto& m) {
    if (inner == 1) {
      torch::stable::parallel_for(
          0, n_blocks, grain(x.numel() / n_blocks), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
              masked_points_grad(act, m, block * points / n_blocks, (block + 1) * points / n_blocks,
                                 sums.data() + block * channels);
            }
          });
    } else {
      torch::stable::parallel_for(0, rows, grain(inner), [&](int64_t begin, int64_t end) {
        masked_rows_grad(act, m, begin, end, sums.data());
      });
    }
  });
  const int64_t parts = static_cast<int64_t>(sums.size()) / channels;
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += sums[part * channels + c];
    }
  }
  std::transform(sums.begin(), sums.begin() + channels, result,
                 [](double sum) { return static_cast<float>(sum); });
  return {out, gate_grad};
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("masked_bn_act_kernel", TORCH_BOX(&ato::cpu::masked_bn_act_kernel));
  m.impl("masked_bn_act_backward_kernel", TORCH_BOX(&ato::cpu::masked_bn_act_backward_kernel));
}
