// CPU kernel of ato_fast::group_step_. Threads take units of about equal size from a shared
// counter; a unit is a list of runs that need no projection and of whole groups, in memory order.
// A group is updated, reduced, decided and scaled by one thread while its rows are in cache, so
// every result is the same whatever the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common.h"
#include "loops.h"

namespace ato::cpu {
namespace {

struct Buffers {
  float* p;
  float* m;
  float* v;
};

struct TensorStep {
  Coefficients c;
  // Null where the gradient is missing: no update.
  const float* grad;
  Rule rule;
  bool keeps_step;
};

struct Step {
  std::vector<Buffers> buffers;
  std::vector<TensorStep> tensors;
  std::vector<double> lr;
  const Chunk* chunks;
  const Item* items;
  const float* strength;
  const float* threshold;
  int64_t projection;
  double half_space_eps;
};

void update_span(const TensorStep& t, const Buffers& b, int64_t at, int64_t from, int64_t n) {
  if (t.grad == nullptr) {
    return;
  }
  if (t.rule == Rule::adam) {
    adam_span(t.c, b.p + at, b.m + at, b.v + at, t.grad + from, n);
  } else if (t.rule == Rule::momentum) {
    momentum_span(t.c, b.p + at, b.m + at, t.grad + from, n);
  } else {
    sgd_span(t.c, b.p + at, t.grad + from, n);
  }
}

// Calls body(tensor, buffers, place in the buffer, place in the gradient, n) for every block of at
// most `block` contiguous elements of the chunk.
template <class Body>
void for_blocks(const Step& s, const Chunk& chunk, int64_t block, const Body& body) {
  const TensorStep& tensor = s.tensors[chunk.tensor];
  const Buffers& buffers = s.buffers[chunk.buffer];
  for (int64_t o = 0; o < chunk.outer; ++o) {
    for (int64_t i = 0; i < chunk.inner; i += block) {
      const int64_t shift = o * chunk.stride + i;
      body(tensor, buffers, chunk.start + shift, chunk.grad_start + shift,
           std::min(block, chunk.inner - i));
    }
  }
}

constexpr int64_t kWhole = INT64_MAX;

void clear(float* x, int64_t n) {
  if (x != nullptr && !all_zero(x, n)) {
    std::memset(x, 0, n * sizeof(float));
  }
}

void drop_group(const Step& s, const Item& item) {
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    for_blocks(s, s.chunks[k], kWhole,
               [](const TensorStep&, const Buffers& b, int64_t at, int64_t, int64_t n) {
                 std::memset(b.p + at, 0, n * sizeof(float));
                 clear(b.m != nullptr ? b.m + at : nullptr, n);
                 clear(b.v != nullptr ? b.v + at : nullptr, n);
               });
  }
}

bool is_zero(const Step& s, const Item& item) {
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    const Chunk& chunk = s.chunks[k];
    const float* p = s.buffers[chunk.buffer].p + chunk.start;
    for (int64_t o = 0; o < chunk.outer; ++o) {
      if (!all_zero(p + o * chunk.stride, chunk.inner)) {
        return false;
      }
    }
  }
  return true;
}

double prox_update(const Step& s, const Item& item, double threshold) {
  double zz = 0.0;
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    for_blocks(s, s.chunks[k], kBlock,
               [&](const TensorStep& t, const Buffers& b, int64_t at, int64_t from, int64_t n) {
                 update_span(t, b, at, from, n);
                 zz += dot(b.p + at, b.p + at, n);
               });
  }
  return prox_scale(zz, threshold);
}

double half_space_update(const Step& s, const Item& item, double threshold) {
  double xx = 0.0, zx = 0.0;
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    for_blocks(s, s.chunks[k], kBlock,
               [&](const TensorStep&, const Buffers& b, int64_t at, int64_t, int64_t n) {
                 xx += dot(b.p + at, b.p + at, n);
               });
  }
  const float pull = static_cast<float>(half_space_pull(xx, threshold));
  for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
    for_blocks(s, s.chunks[k], kBlock,
               [&](const TensorStep& t, const Buffers& b, int64_t at, int64_t from, int64_t n) {
                 float before[kBlock];
                 std::memcpy(before, b.p + at, n * sizeof(float));
                 update_span(t, b, at, from, n);
                 pull_span(b.p + at, before, pull, n);
                 zx += dot(b.p + at, before, n);
               });
  }
  return half_space_scale(zx, xx, threshold, s.half_space_eps);
}

void run_free(const Step& s, const Chunk& chunk) {
  for_blocks(s, chunk, kWhole,
             [](const TensorStep& t, const Buffers& b, int64_t at, int64_t from, int64_t n) {
               update_span(t, b, at, from, n);
             });
}

void run_group(const Step& s, const Item& item) {
  if (s.projection == kNone) {
    for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
      run_free(s, s.chunks[k]);
    }
    return;
  }
  if (is_zero(s, item)) {
    drop_group(s, item);
    return;
  }
  const double threshold =
      group_threshold(s.lr[item.hyper], s.strength[item.group], s.threshold[item.group]);
  const double scale = s.projection == kProx ? prox_update(s, item, threshold)
                                             : half_space_update(s, item, threshold);
  if (scale == 0.0) {
    drop_group(s, item);
  } else if (scale != 1.0) {
    const float factor = static_cast<float>(scale);
    for (int64_t k = item.chunk_begin; k < item.chunk_end; ++k) {
      for_blocks(s, s.chunks[k], kWhole,
                 [=](const TensorStep&, const Buffers& b, int64_t at, int64_t, int64_t n) {
                   scale_span(b.p + at, factor, n);
                 });
    }
  }
}

// Entries of `work` are items (>= 0) or the complement of a free chunk's index (< 0).
void run_units(const Step& s, const Tensor& work_table, const Tensor& unit_table) {
  const int64_t* work = work_table.const_data_ptr<int64_t>();
  const int64_t* units = unit_table.const_data_ptr<int64_t>();
  const int64_t n_units = unit_table.numel() - 1;
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t u = next.fetch_add(1); u < n_units; u = next.fetch_add(1)) {
      for (int64_t w = units[u]; w < units[u + 1]; ++w) {
        if (work[w] < 0) {
          run_free(s, s.chunks[~work[w]]);
        } else {
          run_group(s, s.items[work[w]]);
        }
      }
    }
  };
  const int64_t n_workers = std::min<int64_t>(torch::stable::get_num_threads(), n_units);
  torch::stable::parallel_for(0, n_workers, 1, drain);
}

double scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *tensor.const_data_ptr<float>();
    case ScalarType::Double:
      return *tensor.const_data_ptr<double>();
    default:
      STD_TORCH_CHECK(false, name, ": expected float32 or float64, got dtype ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

Rule rule_of(int64_t optimizer, const double* hyper) {
  if (optimizer != kSgd) {
    return Rule::adam;
  }
  return hyper[kBeta1] != 0.0 ? Rule::momentum : Rule::sgd;
}

}  // namespace

void group_step_(std::vector<Tensor> params, std::vector<Tensor> first, std::vector<Tensor> second,
                 Tensor step, Tensor /*scratch*/, std::vector<Tensor> grads, Tensor tensors,
                 Tensor chunks, Tensor items, Tensor work, Tensor units, Tensor strength,
                 Tensor threshold, std::vector<double> hyper, std::vector<Tensor> lr,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                 int64_t /*n_slots*/, int64_t /*n_projected*/, int64_t optimizer,
                 int64_t projection, std::vector<double> projection_args) {
  check_codes(optimizer, projection, projection_args, hyper, lr);
  check_tables(tensors, chunks, items);
  check_table(work, "work", 0);
  check_table(units, "units", 0);
  if (params.empty() || (found_inf.has_value() && scalar(*found_inf, "found_inf") != 0.0)) {
    return;
  }
  for (size_t i = 0; i < params.size(); ++i) {
    check_tensor(params[i], "params", i, ScalarType::Float, params[0]);
  }
  check_buffers(first, "first", params, uses_first(optimizer, hyper));
  check_buffers(second, "second", params, optimizer != kSgd);
  check_tensor(step, "step", 0, ScalarType::Float, params[0]);
  check_tensor(strength, "strength", 0, ScalarType::Float, params[0]);
  check_tensor(threshold, "threshold", 0, ScalarType::Float, params[0]);
  const int64_t n_tensors = tensors.sizes()[0];
  STD_TORCH_CHECK(step.numel() == n_tensors, "step: expected ", n_tensors, " elements, got ",
                  step.numel());
  const int64_t* table = tensors.const_data_ptr<int64_t>();
  check_grads(grads, tensors, table + kNumel, kTensorColumns, params[0]);

  const int64_t n_rows = static_cast<int64_t>(hyper.size()) / kHyperColumns;
  Step s;
  for (size_t i = 0; i < params.size(); ++i) {
    s.buffers.push_back({params[i].mutable_data_ptr<float>(),
                         first.empty() ? nullptr : first[i].mutable_data_ptr<float>(),
                         second.empty() ? nullptr : second[i].mutable_data_ptr<float>()});
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    const bool host = lr.empty() || lr[row].numel() == 0;
    s.lr.push_back(host ? hyper[row * kHyperColumns + kLr] : scalar(lr[row], "lr"));
  }
  const double scale = grad_scale.has_value() ? scalar(*grad_scale, "grad_scale") : 1.0;
  float* steps = step.mutable_data_ptr<float>();
  s.tensors.resize(n_tensors);
  int64_t last = -1;
  for (int64_t t = 0; t < n_tensors; ++t) {
    TensorStep& tensor = s.tensors[t];
    const int64_t row = table[t * kTensorColumns + kHyperRow];
    const double* values = hyper.data() + row * kHyperColumns;
    tensor.grad = grads[t].numel() == 0 ? nullptr : grads[t].const_data_ptr<float>();
    // Tensors of one row mostly share their step count: derive the powers once.
    if (last >= 0 && table[last * kTensorColumns + kHyperRow] == row && steps[last] == steps[t]) {
      tensor.c = s.tensors[last].c;
    } else {
      tensor.c = coefficients(optimizer, values, s.lr[row], steps[t], scale);
    }
    tensor.rule = rule_of(optimizer, values);
    last = t;
  }
  s.chunks = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>());
  s.items = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  s.strength = strength.const_data_ptr<float>();
  s.threshold = threshold.const_data_ptr<float>();
  s.projection = projection;
  s.half_space_eps = projection == kHalfSpace ? projection_args[0] : 0.0;
  run_units(s, work, units);
  for (int64_t t = 0; t < n_tensors; ++t) {
    // SGD counts the updates of its buffer, as torch does by leaving it None until the first.
    if (s.tensors[t].grad != nullptr && s.tensors[t].rule != Rule::sgd) {
      steps[t] += 1.0f;
    }
  }
}

}  // namespace ato::cpu

STABLE_TORCH_LIBRARY_IMPL(ato_fast, CPU, m) {
  m.impl("group_step_", TORCH_BOX(&ato::cpu::group_step_));
}
