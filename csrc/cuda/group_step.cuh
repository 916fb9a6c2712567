// Kernel of ato_fast::group_step_: a step of the whole model in one launch, one thread block per
// row of `blocks`.
//
// A kept channel (or elements in no group) is updated and written as it is read. A dropped one is
// looked at first: where it is zero already, nothing but its states is read. Otherwise it is
// updated and held on chip, its sums are reduced, the decision is made, and it is written once;
// what does not fit on chip is read and computed a second time. Sums are float64 in a fixed order:
// every run gives the same bits.
#pragma once

#include "update.cuh"

namespace ato::cuda {

// Floats of shared memory in which a thread holds dropped elements: 40 KiB a block, below the
// 48 KiB any device gives without asking. 13 elements of AdamW under the prox, 10 elsewhere.
constexpr int kHeldFloats = 40;

// A dropped channel's elements between update and decision: a thread's own columns of shared
// memory, one for each of z, x, m and v as needed, taken in the order of the walk.
template <Rule R>
struct Held {
  static constexpr int kColumns = R == Rule::sgd ? 1 : R == Rule::momentum ? 2 : 3;
  float* next;
  // Elements that fit, and the distance of the columns.
  int left, column;

  // Only the prox never needs x again.
  __device__ __forceinline__ Held(float* storage, int64_t projection)
      : next(storage + threadIdx.x),
        left(kHeldFloats / (kColumns + (projection == kProx ? 0 : 1))),
        column(left * kThreads) {}

  // Calls move(cell, value) for the next `count` elements, of which `left` has room.
  template <class Move>
  __device__ __forceinline__ void next_item(Values& values, float (&z)[kQuad], int count,
                                            bool with_x, const Move& move) {
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      if (r < count) {
        float* cell = next + r * kThreads;
        move(cell[0], z[r]);
        if constexpr (R != Rule::sgd) {
          move(cell[column], values.m[r]);
        }
        if constexpr (R == Rule::adam) {
          move(cell[2 * column], values.v[r]);
        }
        if (with_x) {
          move(cell[kColumns * column], values.x[r]);
        }
      }
    }
    next += count * kThreads;
    left -= count;
  }
};

// A group's sums or a thread's part of them. No projection needs both sum(z^2) and sum(z * x).
struct Partial {
  double xx, zz_or_zx, xu, uu;

  __device__ __forceinline__ void add(int64_t projection, double x, double z, double u) {
    xx += x * x;
    zz_or_zx += z * (projection == kProx ? z : x);
    if (projection == kDhspg) {
      xu += x * u;
      uu += u * u;
    }
  }
};

__device__ __forceinline__ uint32_t bits_of(const float (&x)[kQuad]) {
  uint32_t bits = 0;
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    bits |= __float_as_uint(x[r]);
  }
  return bits;
}

// Whether a channel has an element with any bit set.
__device__ __forceinline__ bool has_bits(const Tile& tile, const Work& work) {
  uint32_t bits = 0;
  for_items<kInFlight>(tile, work, [&](const Item(&items)[kInFlight]) {
    float x[kInFlight][kQuad] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const Piece& piece = tile.pieces[items[k].piece];
      for_accesses(piece, items[k], [&](const auto& access) { access.read_p(x[k], piece); });
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      bits |= bits_of(x[k]);
    }
  });
  return bits != 0;
}

// Updates a dropped channel without writing and holds what fits; returns this thread's sums.
template <Rule R>
__device__ __forceinline__ Partial update_held(const Tile& tile, const Updates& updates,
                                               const Work& work, int64_t projection,
                                               Held<R>& held) {
  Partial sums = {};
  for_items<1>(tile, work, [&](const Item(&items)[1]) {
    const Item& item = items[0];
    const Piece& piece = tile.pieces[item.piece];
    Values values = {};
    float z[kQuad] = {}, u[kQuad] = {};
    read_all<R>(values, piece, item);
    updated<R>(z, u, values, piece, updates, item);
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      if (r < item.count) {
        sums.add(projection, values.x[r], z[r], u[r]);
      }
    }
    if (item.count <= held.left) {
      held.next_item(values, z, item.count, projection != kProx,
                     [](float& cell, float value) { cell = value; });
    }
  });
  return sums;
}

// Writes a dropped channel as decided: scale * z - pull * x; zeros, and so its states, if scale is
// 0.
template <Rule R>
__device__ __forceinline__ void write_held(const Tile& tile, const Updates& updates,
                                           const Work& work, float scale, float pull,
                                           Held<R>& held) {
  for_items<1>(tile, work, [&](const Item(&items)[1]) {
    const Item& item = items[0];
    const Piece& piece = tile.pieces[item.piece];
    Values values = {};
    float z[kQuad] = {};
    if (scale != 0.0f && item.count <= held.left) {
      held.next_item(values, z, item.count, pull != 0.0f,
                     [](float cell, float& value) { value = cell; });
    } else if (scale != 0.0f) {
      float moved[kQuad];
      read_all<R>(values, piece, item);
      updated<R>(z, moved, values, piece, updates, item);
    }
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      values.x[r] = pull != 0.0f ? scale * z[r] - pull * values.x[r] : scale * z[r];
    }
    write_all<R>(values, piece, item);
  });
}

// Zeros the states of a channel that is zero itself; mostly they are zero too.
template <Rule R>
__device__ __forceinline__ void clear_states(const Tile& tile, const Work& work) {
  if (R == Rule::sgd) {
    return;
  }
  for_items<1>(tile, work, [&](const Item(&items)[1]) {
    const Piece& piece = tile.pieces[items[0].piece];
    for_accesses(piece, items[0], [&](const auto& access) {
      float m[kQuad] = {}, v[kQuad] = {};
      access.read(m, piece.buffer.m);
      if constexpr (R == Rule::adam) {
        access.read(v, piece.buffer.v);
      }
      const float zeros[kQuad] = {};
      if (bits_of(m) != 0) {
        access.write(piece.buffer.m, zeros);
      }
      if (bits_of(v) != 0) {
        access.write(piece.buffer.v, zeros);
      }
    });
  });
}

// Adds a tile's sums to the channel's in shared memory, which its team's rank 0 alone accesses.
__device__ __forceinline__ void collect(Partial& channel, const Team& team, const Partial& sums,
                                        bool is_first) {
  double totals[] = {sums.xx, sums.zz_or_zx, sums.xu, sums.uu};
  team.sum(totals);
  if (team.rank() == 0) {
    const Partial before = is_first ? Partial{} : channel;
    channel.xx = before.xx + totals[0];
    channel.zz_or_zx = before.zz_or_zx + totals[1];
    channel.xu = before.xu + totals[2];
    channel.uu = before.uu + totals[3];
  }
}

// What becomes of a dropped channel: scale and pull, for every thread of its team.
__device__ __forceinline__ float2 decided(const Step& s, const Work& work, const Partial& sums) {
  float2 decision = {};
  if (work.team.rank() == 0) {
    const Bundle& bundle = work.bundle;
    const int64_t group = bundle.group_begin + work.channel;
    const double threshold =
        group_threshold(rate_of(s, bundle.hyper), s.strength[group], s.threshold[group]);
    const Sums all = {sums.xx, sums.zz_or_zx, sums.zz_or_zx, sums.xu, sums.uu};
    const Decision d = decide(s.projection, all, threshold, s.args);
    const float scale = static_cast<float>(d.scale);
    decision = {scale, scale == 0.0f ? 0.0f : static_cast<float>(d.pull)};
  }
  return work.team.from_first(decision);
}

__device__ __forceinline__ bool is_dropped(const Step& s, const Work& work) {
  const int64_t begin = work.bundle.group_begin;
  return work.active && begin >= 0 && !s.mask[begin + work.channel];
}

// One row of `blocks`.
template <Rule R, bool kProjected>
__device__ __forceinline__ void run_block(const Step& s) {
  __shared__ Tile tile;
  __shared__ Updates updates;
  const Work work = work_of(s.tables, blockIdx.x);
  const bool dropped = kProjected && is_dropped(s, work);
  const auto for_each_tile = [&](bool loaded, const auto& body) {
    const auto also = [&](int k, const Segment& segment) { derive<R>(updates, s, k, segment); };
    for_tiles(tile, s.tables, work.bundle, loaded, also, body);
  };
  bool found = false;
  for_each_tile(false, [&](int) {
    if (dropped) {
      found = has_bits(tile, work) || found;
    } else {
      update_channel<R>(tile, updates, work);
    }
  });
  if constexpr (kProjected) {
    __shared__ float storage[kHeldFloats * kThreads];
    __shared__ Partial sums_of[kWarps];
    // Threads without a dropped channel stay where another tile must be loaded.
    const bool loaded = n_segments(work.bundle) <= kTile;
    if (loaded ? !dropped : !__syncthreads_or(dropped)) {
      return;
    }
    const bool alive = dropped && work.team.any(found);
    Partial& sums = sums_of[work.team.wide ? 0 : threadIdx.x / kLanes];
    Held<R> held(storage, s.projection);
    for_each_tile(loaded, [&](int first) {
      if (alive) {
        collect(sums, work.team, update_held<R>(tile, updates, work, s.projection, held),
                first == 0);
      }
    });
    const float2 decision = alive ? decided(s, work, sums) : float2{};
    held = Held<R>(storage, s.projection);
    for_each_tile(loaded, [&](int) {
      if (dropped && !alive) {
        clear_states<R>(tile, work);
      } else if (dropped) {
        write_held<R>(tile, updates, work, decision.x, decision.y, held);
      }
    });
  }
}

// The last block to come here advances the step counts, which all have read by then.
__device__ __forceinline__ void advance(const Step& s) {
  if (s.n_advances == 0) {
    return;
  }
  bool last = false;
  if (threadIdx.x == 0) {
    // The counts were read before a barrier that this thread has passed.
    __threadfence();
    last = atomicInc(s.finished, gridDim.x - 1) == gridDim.x - 1;
  }
  if (__syncthreads_or(last)) {
    for (int64_t t = threadIdx.x; t < s.n_advances; t += kThreads) {
      if ((s.advances[t / kFlagBits] >> (t % kFlagBits) & 1u) != 0u) {
        s.steps[t] += 1.0f;
      }
    }
  }
}

template <Rule R, bool kProjected>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    step_kernel(const Step __grid_constant__ s) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) {
    return;
  }
  run_block<R, kProjected>(s);
  advance(s);
}

}  // namespace ato::cuda
