// CPU kernels of the controller's noise and heads (ato_fast/noise.py). Sums are in a fixed order:
// per group along its head, for a gate's features over blocks of kRows groups.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <tuple>

#include "common.h"
#include "loops.h"
#include "philox.h"
#include "vector.h"

namespace ato::cpu {
namespace {

constexpr int64_t kGrain = 2048;
constexpr int64_t kRows = 64;

struct Counter {
  uint64_t seed, draw;
};

Counter counter_of(int64_t seed, int64_t draw, const std::optional<Tensor>& state) {
  if (state.has_value()) {
    STD_TORCH_CHECK(state->scalar_type() == ScalarType::Long && state->numel() == 2,
                    "state: expected int64 [2], got ", state->numel(), " element(s)");
    const int64_t* values = state->const_data_ptr<int64_t>();
    seed = values[0];
    draw = values[1];
  }
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(draw)};
}

float gumbel(float uniform) {
  return -std::log(-std::log(uniform));
}

// Groups of one gate.
struct Block {
  int64_t gate, begin, end;
};

std::vector<Block> blocks_of(const Tensor& features, const Tensor& heads, const Tensor& bounds) {
  check_tensor(features, "features", 0, ScalarType::Float, heads);
  check_tensor(heads, "heads", 0, ScalarType::Float, heads);
  check_table(bounds, "bounds", 0);
  STD_TORCH_CHECK(features.dim() == 2 && heads.dim() == 2 &&
                      features.sizes()[1] == heads.sizes()[1] &&
                      bounds.numel() == features.sizes()[0] + 1,
                  "features, heads and bounds: expected [L, H], [G, H] and [L + 1]");
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  const int64_t n_gates = features.sizes()[0];
  std::vector<Block> blocks;
  for (int64_t gate = 0; gate < n_gates; ++gate) {
    STD_TORCH_CHECK(bound[gate] >= 0 && bound[gate] <= bound[gate + 1], "bounds[", gate,
                    "]: expected ascending bounds, got ", bound[gate], " and ", bound[gate + 1]);
    for (int64_t begin = bound[gate]; begin < bound[gate + 1]; begin += kRows) {
      blocks.push_back({gate, begin, std::min(begin + kRows, bound[gate + 1])});
    }
  }
  STD_TORCH_CHECK(bound[0] == 0 && bound[n_gates] == heads.sizes()[0], "bounds: expected 0 to ",
                  heads.sizes()[0], ", got ", bound[0], " to ", bound[n_gates]);
  return blocks;
}

template <class Body>
void for_blocks(const std::vector<Block>& blocks, const Body& body) {
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), kGrain / kRows,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t at = begin; at < end; ++at) {
                                  body(at, blocks[at]);
                                }
                              });
}

// Memory of a gradient of the heads, elements behind the header. It is megabytes that live for one
// step, which malloc may give back to the system every time: fresh pages cost several times what
// the kernel does. So the last one is kept for the next of its size.
struct alignas(64) Spare {
  int64_t n_bytes;
};

std::atomic<Spare*> spare{nullptr};

void free_spare(Spare* block) {
  ::operator delete(block, std::align_val_t{alignof(Spare)});
}

Tensor empty_from_spare(const Tensor& like) {
  const int64_t n_bytes = like.numel() * static_cast<int64_t>(sizeof(float));
  Spare* block = spare.exchange(nullptr);
  if (block != nullptr && block->n_bytes != n_bytes) {
    free_spare(block);
    block = nullptr;
  }
  if (block == nullptr) {
    void* memory = ::operator new(sizeof(Spare) + n_bytes, std::align_val_t{alignof(Spare)});
    block = new (memory) Spare{n_bytes};
  }
  return torch::stable::from_blob(
      block + 1, like.sizes(), like.strides(), like.device(), ScalarType::Float,
      [](void* data) { free_spare(spare.exchange(static_cast<Spare*>(data) - 1)); });
}

// d_head = grad * feature; d_feature += grad * head.
ATO_CLONES void outer(float grad, const float* head, const float* feature, float* d_head,
                      double* d_feature, int64_t n) {
  ATO_NO_ALIAS
  for (int64_t i = 0; i < n; ++i) {
    d_head[i] = grad * feature[i];
    d_feature[i] += static_cast<double>(grad) * static_cast<double>(head[i]);
  }
}

}  // namespace

Tensor uniform_kernel(Tensor like, int64_t seed, int64_t draw, std::optional<Tensor> state) {
  check_tensor(like, "like", 0, ScalarType::Float, like);
  const Counter counter = counter_of(seed, draw, state);
  Tensor out = torch::stable::empty_like(like);
  float* numbers = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, like.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      numbers[i] = uniform_number(counter.seed, counter.draw, static_cast<uint64_t>(i));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_mask_kernel(Tensor features, Tensor heads, Tensor bounds,
                                                    int64_t seed, int64_t draw,
                                                    std::optional<Tensor> state, double base,
                                                    double temperature, bool hard) {
  const std::vector<Block> blocks = blocks_of(features, heads, bounds);
  const Counter counter = counter_of(seed, draw, state);
  const std::vector<int64_t> shape{heads.sizes()[0]};
  const auto vector = [&] {
    return torch::stable::empty(shape, ScalarType::Float, std::nullopt, heads.device());
  };
  Tensor logits = vector(), uniform = vector(), mask = vector();
  float* logit = logits.mutable_data_ptr<float>();
  float* number = uniform.mutable_data_ptr<float>();
  float* gate = mask.mutable_data_ptr<float>();
  const float* feature = features.const_data_ptr<float>();
  const float* head = heads.const_data_ptr<float>();
  const int64_t width = heads.sizes()[1];
  for_blocks(blocks, [&](int64_t, const Block& block) {
    for (int64_t i = block.begin; i < block.end; ++i) {
      const double product = dot(head + i * width, feature + block.gate * width, width);
      logit[i] = static_cast<float>(product + base);
      number[i] = uniform_number(counter.seed, counter.draw, static_cast<uint64_t>(i));
      const float noisy = logit[i] + gumbel(number[i]);
      const float soft = 1.0f / (1.0f + std::exp(-noisy / static_cast<float>(temperature)));
      // NaN stays NaN, so that it is noticed.
      const float rounded = noisy >= 0.0f ? 1.0f : (noisy < 0.0f ? 0.0f : noisy);
      gate[i] = hard ? rounded : soft;
    }
  });
  return {logits, uniform, mask};
}

std::tuple<Tensor, Tensor> gate_mask_backward_kernel(Tensor grad_logits, Tensor grad_mask,
                                                     Tensor features, Tensor heads, Tensor bounds,
                                                     Tensor logits, Tensor uniform,
                                                     double temperature) {
  const std::vector<Block> blocks = blocks_of(features, heads, bounds);
  for (const Tensor* tensor : {&grad_logits, &grad_mask, &logits, &uniform}) {
    check_tensor(*tensor, "gradients, logits and uniform", 0, ScalarType::Float, heads);
    STD_TORCH_CHECK(tensor->numel() == heads.sizes()[0], "gradients, logits and uniform: expected ",
                    heads.sizes()[0], " elements each, got ", tensor->numel());
  }
  Tensor d_features = torch::stable::empty_like(features);
  Tensor d_heads = empty_from_spare(heads);
  const float* feature = features.const_data_ptr<float>();
  const float* head = heads.const_data_ptr<float>();
  const float* from_logits = grad_logits.const_data_ptr<float>();
  const float* from_mask = grad_mask.const_data_ptr<float>();
  const float* logit = logits.const_data_ptr<float>();
  const float* number = uniform.const_data_ptr<float>();
  float* d_head = d_heads.mutable_data_ptr<float>();
  const int64_t width = heads.sizes()[1];
  std::vector<double> sums(blocks.size() * width, 0.0);
  for_blocks(blocks, [&](int64_t at, const Block& block) {
    const float scale = static_cast<float>(temperature);
    for (int64_t i = block.begin; i < block.end; ++i) {
      const float noisy = logit[i] + gumbel(number[i]);
      const float soft = 1.0f / (1.0f + std::exp(-noisy / scale));
      const float grad = from_logits[i] + from_mask[i] * soft * (1.0f - soft) / scale;
      outer(grad, head + i * width, feature + block.gate * width, d_head + i * width,
            sums.data() + at * width, width);
    }
  });
  std::vector<double> totals(features.numel(), 0.0);
  for (size_t at = 0; at < blocks.size(); ++at) {
    for (int64_t i = 0; i < width; ++i) {
      totals[blocks[at].gate * width + i] += sums[at * width + i];
    }
  }
  std::transform(totals.begin(), totals.end(), d_features.mutable_data_ptr<float>(),
                 [](double sum) { return static_cast<float>(sum); });
  return {d_features, d_heads};
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("uniform_kernel", TORCH_BOX(&ato::cpu::uniform_kernel));
  m.impl("gate_mask_kernel", TORCH_BOX(&ato::cpu::gate_mask_kernel));
  m.impl("gate_mask_backward_kernel", TORCH_BOX(&ato::cpu::gate_mask_backward_kernel));
}
