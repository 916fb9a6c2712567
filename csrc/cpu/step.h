// The CPU step on raw pointers, free of torch, so that sanitizers can run it.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "group_step.h"

namespace ato::cpu {

struct Buffers {
  void* p;
  bool is_bf16;
  float* m;
  float* v;
};

struct TensorStep {
  Coefficients c;
  // Null where the gradient is missing; the rule is none then.
  const void* grad;
  Rule rule;
};

struct Step {
  std::vector<Buffers> buffers;
  std::vector<TensorStep> tensors;
  std::vector<double> lr;
  const Segment* segments;
  const Bundle* bundles;
  const bool* mask;
  const float* strength;
  const float* threshold;
  int64_t projection;
  ProjectionArgs args;
};

// Fills s.tensors. `tensors` and `hyper` are the op's tables, `grads` null where missing.
void prepare(Step& s, const int64_t* tensors, const std::vector<const void*>& grads,
             int64_t optimizer, const double* hyper, double grad_scale, const float* steps);

// Runs units, taken from `next`, until none is left; any number of threads may.
void run_units(const Step& s, const int64_t* units, int64_t n_units, std::atomic<int64_t>& next);

// Counts the step for every tensor it updated (SGD: whose buffer it updated).
void advance(const Step& s, float* steps);

}  // namespace ato::cpu
