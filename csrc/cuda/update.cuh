// The update of kept channels, and what the kernel of ato_fast::group_step_ is told.
#pragma once

#include "walk.cuh"

namespace ato::cuda {

constexpr int64_t kMaxRows = 240;
constexpr int64_t kFlagBits = 32;
// Items whose loads overlap: 32 bytes per thread and stream. With three blocks of 80 registers per
// multiprocessor that is 96 KiB of AdamW's reads in flight.
constexpr int kInFlight = 2;
constexpr int kBlocksPerSm = 3;

struct Step {
  Tables tables;
  double hyper[kMaxRows * kHyperColumns];
  // Null where the host value holds.
  const float* lr[kMaxRows];
  // Bit t: this step is one more of tensor t; no bit from n_advances on is set.
  uint32_t advances[kMaxTensors / kFlagBits];
  int64_t n_advances;
  float* steps;
  // Blocks that are done; zero between launches.
  unsigned* finished;
  const bool* mask;
  const float* strength;
  const float* threshold;
  // Null where there is none.
  const float* grad_scale;
  const float* found_inf;
  int64_t optimizer, projection;
  ProjectionArgs args;
};
static_assert(sizeof(Step) <= 32764, "what the arguments of a kernel may take (CUDA 12.1)");

struct Values {
  float x[kQuad], g[kQuad], m[kQuad], v[kQuad];
};

// How the segments of a tile are updated.
struct Updates {
  Coefficients of[kTile];
  // Of SGD parameter groups only some may have momentum.
  bool plain[kTile];
};

__device__ __forceinline__ double rate_of(const Step& s, int64_t row) {
  const float* lr = s.lr[row];
  return lr != nullptr ? static_cast<double>(*lr) : s.hyper[row * kHyperColumns + kLr];
}

template <Rule R>
__device__ __forceinline__ void derive(Updates& updates, const Step& s, int k,
                                       const Segment& segment) {
  const double* hyper = s.hyper + segment.hyper * kHyperColumns;
  const double scale = s.grad_scale != nullptr ? static_cast<double>(*s.grad_scale) : 1.0;
  // A constant where the rule says all: SGD needs no powers.
  const int64_t optimizer = R == Rule::adam ? s.optimizer : kSgd;
  updates.of[k] =
      coefficients(optimizer, hyper, rate_of(s, segment.hyper), s.steps[segment.tensor], scale);
  updates.plain[k] = optimizer == kSgd && hyper[kBeta1] == 0.0;
}

template <Rule R>
__device__ __forceinline__ void read_all(Values& values, const Piece& piece, const Item& item) {
  for_accesses(piece, item, [&](const auto& access) {
    access.read_p(values.x, piece);
    if (piece.g != nullptr) {
      access.read_g(values.g, piece);
    }
    if constexpr (R != Rule::sgd) {
      access.read(values.m, piece.buffer.m);
    }
    if constexpr (R == Rule::adam) {
      access.read(values.v, piece.buffer.v);
    }
  });
}

template <Rule R>
__device__ __forceinline__ void write_all(const Values& values, const Piece& piece,
                                          const Item& item) {
  for_accesses(piece, item, [&](const auto& access) {
    access.write_p(piece, values.x);
    if constexpr (R != Rule::sgd) {
      access.write(piece.buffer.m, values.m);
    }
    if constexpr (R == Rule::adam) {
      access.write(piece.buffer.v, values.v);
    }
  });
}

// z: an item's elements after the optimizer's update, u: what that moved them by (`Moved`); their
// states change in place.
template <Rule R>
__device__ __forceinline__ void updated(float (&z)[kQuad], float (&u)[kQuad], Values& values,
                                        const Piece& piece, const Updates& updates,
                                        const Item& item) {
  const Coefficients& c = updates.of[item.piece];
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    if (r < item.count) {
      Moved moved;
      if (piece.g == nullptr) {
        moved = {values.x[r], 0.0f};
      } else if (R == Rule::momentum && updates.plain[item.piece]) {
        moved = update<Rule::sgd>(values.x[r], values.g[r], values.m[r], values.v[r], c);
      } else {
        moved = update<R>(values.x[r], values.g[r], values.m[r], values.v[r], c);
      }
      z[r] = moved.z;
      u[r] = moved.u;
    }
  }
}

// The update of a kept channel.
template <Rule R>
__device__ __forceinline__ void update_channel(const Tile& tile, const Updates& updates,
                                               const Work& work) {
  if (!work.active) {
    return;
  }
  for_items<kInFlight>(tile, work, [&](const Item(&items)[kInFlight]) {
    Values values[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const Piece& piece = tile.pieces[items[k].piece];
      if (piece.g != nullptr) {
        read_all<R>(values[k], piece, items[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const Piece& piece = tile.pieces[items[k].piece];
      if (piece.g != nullptr) {
        float moved[kQuad];
        updated<R>(values[k].x, moved, values[k], piece, updates, items[k]);
        write_all<R>(values[k], piece, items[k]);
      }
    }
  });
}

}  // namespace ato::cuda
