#include "gru_loops.h"

#include <algorithm>
#include <vector>

#include "vector.h"

namespace ato::cpu {

namespace {

// Tiles whose sums stay in registers: of one row, and of more.
constexpr int64_t kWide = 128;
constexpr int64_t kRows = 4;
constexpr int64_t kColumns = 32;
// Terms added up before they join the sum, which keeps rounding errors small.
constexpr int64_t kTerms = 16;
constexpr int64_t kLine = 16;

// out[i][j] += sum over k of a[i * a_row + k * a_step] * b[k * b_step + j]
struct Product {
  int64_t rows, depth, columns;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  float* out;
  int64_t out_row;
};

template <int64_t kHeight, int64_t kWidth>
ATO_FN void product_tile(const Product& p, int64_t row, int64_t column) {
  float* out = p.out + row * p.out_row + column;
  for (int64_t first = 0; first < p.depth; first += kTerms) {
    const float* a = p.a + row * p.a_row + first * p.a_step;
    const float* b = p.b + first * p.b_step + column;
    const int64_t n_terms = std::min(kTerms, p.depth - first);
    float sums[kHeight][kWidth] = {};
    for (int64_t k = 0; k < n_terms; ++k) {
      for (int64_t i = 0; i < kHeight; ++i) {
        const float factor = a[i * p.a_row + k * p.a_step];
        for (int64_t j = 0; j < kWidth; ++j) {
          sums[i][j] += factor * b[k * p.b_step + j];
        }
      }
    }
    for (int64_t i = 0; i < kHeight; ++i) {
      for (int64_t j = 0; j < kWidth; ++j) {
        out[i * p.out_row + j] += sums[i][j];
      }
    }
  }
}

template <int64_t kWidth>
ATO_FN void product_columns(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) {
    product_tile<kRows, kWidth>(p, row, column);
  }
  for (; row < p.rows; ++row) {
    product_tile<1, kWidth>(p, row, column);
  }
}

ATO_CLONES void product(const Product& p) {
  int64_t column = 0;
  if (p.rows == 1) {
    for (; column + kWide <= p.columns; column += kWide) {
      product_tile<1, kWide>(p, 0, column);
    }
  }
  for (; column + kColumns <= p.columns; column += kColumns) {
    product_columns<kColumns>(p, column);
  }
  for (; column < p.columns; ++column) {
    product_columns<1>(p, column);
  }
}

// to[j][i] = from[i][j]
ATO_CLONES void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kLine) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = i; k < std::min(i + kLine, rows); ++k) {
        to[j * rows + k] = from[k * columns + j];
      }
    }
  }
}

// exp(x) - 1 as 2^n * m + (2^n - 1): small x keep their relative accuracy. Clamped so that NaN
// stays NaN.
ATO_FN float exp_minus_one(float x) {
  constexpr float kMost = 88.0f, kLeast = -87.0f;
  const auto [m, shifted] = exponential_of(x < kLeast ? kLeast : (x > kMost ? kMost : x));
  const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return power * m + (power - 1.0f);
}

// Both from the argument's size, and near 1 as what is missing there: else errors of a large
// exponential come back as errors of 1 - sigmoid and 1 - tanh^2.
ATO_FN float sigmoid(float x) {
  const float low = 1.0f / (exp_minus_one(x < 0.0f ? -x : x) + 2.0f);
  return x < 0.0f ? low : 1.0f - low;
}

ATO_FN float tanh(float x) {
  const float e = exp_minus_one(2.0f * (x < 0.0f ? -x : x));
  const float part = (e > 1.0f ? -2.0f : e) / (e + 2.0f);
  const float size = e > 1.0f ? 1.0f + part : part;
  return x < 0.0f ? -size : size;
}

// One step's gates and new state from both projections [3 * hidden].
ATO_CLONES void step(const float* input, const float* recurrent, const float* before,
                     int64_t hidden, float* after, float* saved) {
  ATO_NO_ALIAS
  for (int64_t j = 0; j < hidden; ++j) {
    const float reset = sigmoid(input[j] + recurrent[j]);
    const float update = sigmoid(input[hidden + j] + recurrent[hidden + j]);
    const float candidate = recurrent[2 * hidden + j];
    const float fresh = tanh(input[2 * hidden + j] + reset * candidate);
    after[j] = fresh + update * (before[j] - fresh);
    saved[j] = reset;
    saved[hidden + j] = update;
    saved[2 * hidden + j] = fresh;
    saved[3 * hidden + j] = candidate;
  }
}

// Its gradients: [4 * hidden] with respect to the arguments of tanh, of both sigmoids and to
// W_hn h + b_hn; `state` goes from the gradient of the new state to the part of the old one's that
// does not pass through weight_hh.
ATO_CLONES void step_grad(const float* saved, const float* before, int64_t hidden, float* state,
                          float* grads) {
  ATO_NO_ALIAS
  for (int64_t j = 0; j < hidden; ++j) {
    const float reset = saved[j], update = saved[hidden + j], fresh = saved[2 * hidden + j];
    const float candidate = saved[3 * hidden + j];
    const float d_fresh = state[j] * (1.0f - update) * (1.0f - fresh * fresh);
    grads[j] = d_fresh;
    grads[hidden + j] = d_fresh * candidate * reset * (1.0f - reset);
    grads[2 * hidden + j] = state[j] * (before[j] - fresh) * update * (1.0f - update);
    grads[3 * hidden + j] = d_fresh * reset;
    state[j] *= update;
  }
}

ATO_CLONES void add(const float* x, int64_t n, float* sums) {
  ATO_NO_ALIAS
  for (int64_t j = 0; j < n; ++j) {
    sums[j] += x[j];
  }
}

}  // namespace

void gru_forward(const Gru& gru, float* out, float* saved) {
  const int64_t hidden = gru.hidden, gates = kGruGates * hidden;
  std::vector<float> columns(std::max(gru.inputs, hidden) * gates), inputs(gru.steps * gates);
  std::vector<float> recurrent(gates), zeros(hidden, 0.0f);
  for (int64_t t = 0; t < gru.steps; ++t) {
    std::copy(gru.bias_ih, gru.bias_ih + gates, inputs.data() + t * gates);
  }
  transpose(gru.weight_ih, gates, gru.inputs, columns.data());
  product({gru.steps, gru.inputs, gates, gru.source, gru.inputs, 1, columns.data(), gates,
           inputs.data(), gates});
  transpose(gru.weight_hh, gates, hidden, columns.data());
  const float* before = zeros.data();
  for (int64_t i = 0; i < gru.steps; ++i) {
    const int64_t t = gru.reverse ? gru.steps - 1 - i : i;
    std::copy(gru.bias_hh, gru.bias_hh + gates, recurrent.data());
    product({1, hidden, gates, before, 0, 1, columns.data(), gates, recurrent.data(), 0});
    float* after = out + t * 2 * hidden;
    step(inputs.data() + t * gates, recurrent.data(), before, hidden, after,
         saved + t * kGruSaved * hidden);
    before = after;
  }
}

void gru_backward(const Gru& gru, const float* out, const float* saved, const float* grad,
                  const GruGradients& to) {
  const int64_t hidden = gru.hidden, gates = kGruGates * hidden, row = kGruSaved * hidden;
  std::vector<float> grads(gru.steps * row), state(hidden, 0.0f), zeros(hidden, 0.0f);
  for (int64_t i = gru.steps - 1; i >= 0; --i) {
    const int64_t t = gru.reverse ? gru.steps - 1 - i : i;
    const int64_t earlier = gru.reverse ? t + 1 : t - 1;
    const float* before = i > 0 ? out + earlier * 2 * hidden : zeros.data();
    float* found = grads.data() + t * row;
    add(grad + t * 2 * hidden, hidden, state.data());
    step_grad(saved + t * row, before, hidden, state.data(), found);
    product({1, gates, hidden, found + hidden, 0, 1, gru.weight_hh, hidden, state.data(), 0});
  }
  std::fill(to.weight_ih, to.weight_ih + gates * gru.inputs, 0.0f);
  std::fill(to.weight_hh, to.weight_hh + gates * hidden, 0.0f);
  std::fill(to.bias_ih + 2 * hidden, to.bias_ih + gates, 0.0f);
  std::fill(to.bias_hh, to.bias_hh + gates, 0.0f);
  const float* outer = grads.data() + hidden;
  const float one = 1.0f;
  product({1, gru.steps, gates, &one, 0, 0, outer, row, to.bias_hh, 0});
  // The biases of reset and update are added to each other, those of new are not.
  std::copy(to.bias_hh, to.bias_hh + 2 * hidden, to.bias_ih);
  product({1, gru.steps, hidden, &one, 0, 0, grads.data(), row, to.bias_ih + 2 * hidden, 0});
  product({2 * hidden, gru.steps, gru.inputs, outer, 1, row, gru.source, gru.inputs, to.weight_ih,
           gru.inputs});
  product({hidden, gru.steps, gru.inputs, grads.data(), 1, row, gru.source, gru.inputs,
           to.weight_ih + 2 * hidden * gru.inputs, gru.inputs});
  // The direction's first step has no state before it.
  const float* later = outer + (gru.reverse ? 0 : row);
  const float* before = out + (gru.reverse ? 2 * hidden : 0);
  product({gates, gru.steps - 1, hidden, later, 1, row, before, 2 * hidden, to.weight_hh, hidden});
}

}  // namespace ato::cpu
