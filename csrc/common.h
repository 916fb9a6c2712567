// Checks shared by the host functions of every compiled op. Messages name argument, index,
// expected and got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "group_step.h"

namespace ato {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const Tensor& tensor, const char* name, int64_t index, ScalarType dtype,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, "[", index, "]: expected dtype ",
                  static_cast<int>(dtype), " (torch ScalarType), got ",
                  static_cast<int>(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), name, "[", index,
                  "]: expected the device of params[0] (index ", like.get_device_index(),
                  "), got another (index ", tensor.get_device_index(), ")");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, "[", index, "]: expected a contiguous tensor");
}

inline void check_table(const Tensor& table, const char* name, int64_t columns) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long, name, ": expected int64, got dtype ",
                  static_cast<int>(table.scalar_type()));
  STD_TORCH_CHECK(table.is_contiguous(), name, ": expected a contiguous table");
  if (columns > 0) {
    STD_TORCH_CHECK(table.dim() == 2 && table.sizes()[1] == columns, name, ": expected [n, ",
                    columns, "], got ", table.dim(), " dimension(s)");
  } else {
    STD_TORCH_CHECK(table.dim() == 1, name, ": expected one dimension, got ", table.dim());
  }
}

inline void check_tables(const Tensor& tensors, const Tensor& segments, const Tensor& bundles,
                         const Tensor& blocks) {
  check_table(tensors, "tensors", kTensorColumns);
  check_table(segments, "segments", kSegmentColumns);
  check_table(bundles, "bundles", kBundleColumns);
  check_table(blocks, "blocks", kBlockColumns);
}

// The host table: every tensor inside its buffer, every row of `hyper` there.
inline void check_rows(const Tensor& tensors, const std::vector<Tensor>& params, int64_t n_rows) {
  const int64_t* row = tensors.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tensors.sizes()[0]; ++t, row += kTensorColumns) {
    STD_TORCH_CHECK(row[kBuffer] >= 0 && row[kBuffer] < static_cast<int64_t>(params.size()),
                    "tensors[", t, "]: expected one of ", params.size(), " buffer(s), got ",
                    row[kBuffer]);
    STD_TORCH_CHECK(row[kOffset] >= 0 && row[kNumel] >= 0 &&
                        row[kNumel] <= params[row[kBuffer]].numel() - row[kOffset],
                    "tensors[", t, "]: expected a place in a buffer of ",
                    params[row[kBuffer]].numel(), " elements, got ", row[kNumel], " at ",
                    row[kOffset]);
    STD_TORCH_CHECK(row[kHyperRow] >= 0 && row[kHyperRow] < n_rows, "tensors[", t,
                    "]: expected one of ", n_rows, " row(s) of hyper, got ", row[kHyperRow]);
  }
}

// Tables the host can read: bundles within the groups, units over all bundles.
inline void check_bundles(const Tensor& bundles, int64_t n_groups, int64_t n_rows) {
  const Bundle* bundle = reinterpret_cast<const Bundle*>(bundles.const_data_ptr<int64_t>());
  for (int64_t b = 0; b < bundles.sizes()[0]; ++b, ++bundle) {
    STD_TORCH_CHECK(bundle->group_begin + bundle->n <= n_groups || bundle->group_begin < 0,
                    "bundles[", b, "]: expected groups below ", n_groups, ", got ", bundle->n,
                    " from ", bundle->group_begin);
    STD_TORCH_CHECK(bundle->hyper >= 0 && bundle->hyper < n_rows, "bundles[", b,
                    "]: expected one of ", n_rows, " row(s) of hyper, got ", bundle->hyper);
  }
}

// Parameters: one flat buffer per dtype.
inline void check_params(const std::vector<Tensor>& params) {
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType dtype = params[i].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "params[", i,
                    "]: expected float32 or bfloat16, got dtype ", static_cast<int>(dtype));
    check_tensor(params[i], "params", i, dtype, params[0]);
  }
}

// Flat fp32 buffers of one state must match the parameters' one to one.
inline void check_states(const std::vector<Tensor>& states, const char* name,
                         const std::vector<Tensor>& params, bool needed) {
  const size_t expected = needed ? params.size() : 0;
  STD_TORCH_CHECK(states.size() == expected || (!needed && states.size() == params.size()), name,
                  ": expected ", expected, " buffer(s), one per entry of params, got ",
                  states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    check_tensor(states[i], name, i, ScalarType::Float, params[0]);
    STD_TORCH_CHECK(states[i].numel() == params[i].numel(), name, "[", i, "]: expected ",
                    params[i].numel(), " elements, got ", states[i].numel());
  }
}

// Gradients: one per tensor, of its dtype; empty where missing, else as many elements as it has.
inline void check_grads(const std::vector<Tensor>& grads, const Tensor& tensors,
                        const std::vector<Tensor>& params) {
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == tensors.sizes()[0], "grads: expected ",
                  tensors.sizes()[0], " gradients, one per row of tensors, got ", grads.size());
  const int64_t* row = tensors.const_data_ptr<int64_t>();
  for (size_t i = 0; i < grads.size(); ++i, row += kTensorColumns) {
    const int64_t got = grads[i].numel();
    STD_TORCH_CHECK(got == 0 || got == row[kNumel], "grads[", i, "]: expected ", row[kNumel],
                    " elements or none, got ", got);
    const Tensor& like = params[row[kBuffer]];
    STD_TORCH_CHECK(got == 0 || grads[i].scalar_type() == like.scalar_type(), "grads[", i,
                    "]: expected its parameter's dtype ", static_cast<int>(like.scalar_type()),
                    " (torch ScalarType), got ", static_cast<int>(grads[i].scalar_type()));
    STD_TORCH_CHECK(grads[i].device() == like.device(), "grads[", i,
                    "]: expected the device of params[0] (index ", like.get_device_index(),
                    "), got another (index ", grads[i].get_device_index(), ")");
  }
}

// What the groups are told: mask, strength and threshold of one length.
inline void check_groups(const Tensor& mask, const Tensor& strength, const Tensor& threshold,
                         const Tensor& like) {
  check_tensor(mask, "mask", 0, ScalarType::Bool, like);
  check_tensor(strength, "strength", 0, ScalarType::Float, like);
  check_tensor(threshold, "threshold", 0, ScalarType::Float, like);
  STD_TORCH_CHECK(mask.numel() == strength.numel() && mask.numel() == threshold.numel(),
                  "mask, strength and threshold: expected one length, got ", mask.numel(), ", ",
                  strength.numel(), " and ", threshold.numel());
}

inline void check_codes(int64_t optimizer, int64_t projection,
                        const std::vector<double>& projection_args,
                        const std::vector<double>& hyper, const std::vector<Tensor>& lr) {
  STD_TORCH_CHECK(optimizer >= kSgd && optimizer <= kAdamW,
                  "optimizer: expected 0 (sgd), 1 (adam) or 2 (adamw), got ", optimizer);
  STD_TORCH_CHECK(projection >= kNone && projection <= kDhspg,
                  "projection: expected 0 (none), 1 (prox), 2 (half-space) or 3 (dhspg), got ",
                  projection);
  const size_t wanted = projection == kHalfSpace ? 1 : projection == kDhspg ? 3 : 0;
  STD_TORCH_CHECK(projection_args.size() == wanted, "projection_args: expected ", wanted,
                  " value(s) for projection ", projection, ", got ", projection_args.size());
  STD_TORCH_CHECK(hyper.size() % kHyperColumns == 0, "hyper: expected rows of ",
                  static_cast<int64_t>(kHyperColumns), " values, got ", hyper.size());
  STD_TORCH_CHECK(lr.empty() || lr.size() * kHyperColumns == hyper.size(), "lr: expected ",
                  hyper.size() / kHyperColumns, " tensors or none, got ", lr.size());
}

inline ProjectionArgs projection_constants(const std::vector<double>& values) {
  ProjectionArgs args;
  args.eps = values.size() > 0 ? values[0] : 0.0;
  args.amplify = values.size() > 1 ? values[1] : 0.0;
  args.cap = values.size() > 2 ? values[2] : 0.0;
  return args;
}

// Whether any parameter group keeps a first state (momentum or exp_avg).
inline bool uses_first(int64_t optimizer, const std::vector<double>& hyper) {
  bool uses = optimizer != kSgd;
  for (size_t at = kBeta1; at < hyper.size(); at += kHyperColumns) {
    uses = uses || hyper[at] != 0.0;
  }
  return uses;
}

}  // namespace ato
