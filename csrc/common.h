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

// Flat buffers of parameters and of one state must match one to one.
inline void check_buffers(const std::vector<Tensor>& buffers, const char* name,
                          const std::vector<Tensor>& params, bool needed) {
  const size_t expected = needed ? params.size() : 0;
  STD_TORCH_CHECK(buffers.size() == expected || (!needed && buffers.size() == params.size()), name,
                  ": expected ", expected, " buffer(s), one per entry of params, got ",
                  buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    check_tensor(buffers[i], name, i, ScalarType::Float, params[0]);
    STD_TORCH_CHECK(buffers[i].numel() == params[i].numel(), name, "[", i, "]: expected ",
                    params[i].numel(), " elements, got ", buffers[i].numel());
  }
}

// Gradients: one per tensor, empty where missing, else as many elements as the tensor.
inline void check_grads(const std::vector<Tensor>& grads, const Tensor& tensors,
                        const int64_t* numels, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == tensors.sizes()[0], "grads: expected ",
                  tensors.sizes()[0], " gradients, one per row of tensors, got ", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t got = grads[i].numel();
    const int64_t expected = numels[static_cast<int64_t>(i) * columns];
    STD_TORCH_CHECK(got == 0 || got == expected, "grads[", i, "]: expected ", expected,
                    " elements or none, got ", got);
    STD_TORCH_CHECK(grads[i].scalar_type() == ScalarType::Float, "grads[", i,
                    "]: expected float32, got dtype ", static_cast<int>(grads[i].scalar_type()));
    STD_TORCH_CHECK(grads[i].device() == like.device(), "grads[", i,
                    "]: expected the device of params[0] (index ", like.get_device_index(),
                    "), got another (index ", grads[i].get_device_index(), ")");
  }
}

inline void check_tables(const Tensor& tensors, const Tensor& chunks, const Tensor& items) {
  check_table(tensors, "tensors", kTensorColumns);
  check_table(chunks, "chunks", kChunkColumns);
  check_table(items, "items", kItemColumns);
}

inline void check_codes(int64_t optimizer, int64_t projection,
                        const std::vector<double>& projection_args,
                        const std::vector<double>& hyper, const std::vector<Tensor>& lr) {
  STD_TORCH_CHECK(optimizer >= kSgd && optimizer <= kAdamW,
                  "optimizer: expected 0 (sgd), 1 (adam) or 2 (adamw), got ", optimizer);
  STD_TORCH_CHECK(projection >= kNone && projection <= kHalfSpace,
                  "projection: expected 0 (none), 1 (prox) or 2 (half-space), got ", projection);
  STD_TORCH_CHECK(projection != kHalfSpace || projection_args.size() == 1,
                  "projection_args: expected [eps], got ", projection_args.size(), " values");
  STD_TORCH_CHECK(hyper.size() % kHyperColumns == 0, "hyper: expected rows of ",
                  static_cast<int64_t>(kHyperColumns), " values, got ", hyper.size());
  STD_TORCH_CHECK(lr.empty() || lr.size() * kHyperColumns == hyper.size(), "lr: expected ",
                  hyper.size() / kHyperColumns, " tensors or none, got ", lr.size());
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
