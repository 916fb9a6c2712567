// The loops of the bidirectional GRU on the CPU, free of torch, fp32. Every sum is taken term by
// term in a fixed order and a direction is one thread's work: no result depends on the instruction
// set nor on the number of threads.
#pragma once

#include <cstdint>

namespace ato::cpu {

// Gates of torch.nn.GRU, in its order: reset, update, new. Values per unit and step that backward
// needs: the gates and W_hn h + b_hn.
constexpr int64_t kGruGates = 3;
constexpr int64_t kGruSaved = 4;

// One direction, contiguous. The state before its first step is 0.
struct Gru {
  int64_t steps, inputs, hidden;
  // From the last step to the first.
  bool reverse;
  const float* source;     // [steps, inputs]
  const float* weight_ih;  // [3 * hidden, inputs]
  const float* weight_hh;  // [3 * hidden, hidden]
  const float* bias_ih;    // [3 * hidden]
  const float* bias_hh;    // [3 * hidden]
};

// Writes every step's state to out, whose rows are 2 * hidden apart, and saved [steps, 4 * hidden].
void gru_forward(const Gru& gru, float* out, float* saved);

// Writes the gradients of the weights and biases; grad has rows like out.
struct GruGradients {
  float* weight_ih;
  float* weight_hh;
  float* bias_ih;
  float* bias_hh;
};
void gru_backward(const Gru& gru, const float* out, const float* saved, const float* grad,
                  const GruGradients& to);

}  // namespace ato::cpu
