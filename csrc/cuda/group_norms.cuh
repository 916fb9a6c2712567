// Kernel of ato_fast::group_norms: one launch over the rows of `blocks`, float64 sums in a fixed
// order.
#pragma once

#include "walk.cuh"

namespace ato::cuda {

// out: float64 [n_groups, 3] (with gradients) or [n_groups, 1]; groups without parameters are not
// written.
template <bool kWithGrads>
__global__ void __launch_bounds__(kThreads, 4)
    norms_kernel(const Tables __grid_constant__ t, double* out) {
  __shared__ Tile tile;
  const Work work = work_of(t, blockIdx.x);
  if (work.bundle.group_begin < 0) {
    return;
  }
  constexpr int kSums = kWithGrads ? 3 : 1;
  double sums[kSums] = {};
  const auto add = [&](const Item(&items)[1]) {
    const Item& item = items[0];
    const Piece& piece = tile.pieces[item.piece];
    const bool has_gradient = kWithGrads && piece.g != nullptr;
    float x[kQuad] = {}, g[kQuad] = {};
    for_accesses(piece, item, [&](const auto& access) {
      access.read_p(x, piece);
      if (has_gradient) {
        access.read_g(g, piece);
      }
    });
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      const double value = x[r], gradient = g[r];
      sums[0] += value * value;
      if constexpr (kWithGrads) {
        sums[1] += gradient * gradient;
        sums[2] += value * gradient;
      }
    }
  };
  const auto nothing = [](int, const Segment&) {};
  for_tiles(tile, t, work.bundle, false, nothing, [&](int) {
    if (work.active) {
      for_items<1>(tile, work, add);
    }
  });
  work.team.sum(sums);
  if (work.active && work.team.rank() == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      out[(work.bundle.group_begin + work.channel) * kSums + i] = sums[i];
    }
  }
}

}  // namespace ato::cuda
