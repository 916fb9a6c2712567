// How the CUDA kernels walk the tables: a team of threads per channel, its segments in shared
// memory, its elements in items of four.
#pragma once

#include <cuda_runtime.h>

#include "group_step.h"

namespace ato::cuda {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kQuad = 4;
// Segments in shared memory at once: one per lane of the warp that reads them.
constexpr int kTile = kLanes;
// What the argument of one launch has room for.
constexpr int64_t kMaxTensors = 2048;
constexpr int64_t kMaxBuffers = 2;

struct Buffer {
  void* p;
  // Null where unused.
  float* m;
  float* v;
  bool is_bf16;
};

struct Tables {
  const Segment* segments;
  const Bundle* bundles;
  const Block* blocks;
  Buffer buffers[kMaxBuffers];
  // Null where missing.
  const void* grads[kMaxTensors];
};

// A segment as its channels are walked; the pointers are at channel 0. A channel has fewer than
// 2^31 elements.
struct Piece {
  Buffer buffer;
  const void* g;
  int64_t stride;
  uint32_t inner, size;
  // place / inner == place * inverse >> shift for every place of the channel.
  uint32_t inverse, shift;
  // The elements of an item: four neighbours (1), or one per round of a warp (kLanes).
  uint32_t step;
  // Items among those of the tile, for one channel.
  int begin, end;
  // Whether four neighbours may be accessed as one.
  bool aligned;

  // Distance of an element from the channel's first.
  __device__ __forceinline__ int64_t spread(uint32_t place) const {
    const uint32_t o = static_cast<uint32_t>(uint64_t{place} * inverse >> shift);
    return o * stride + (place - o * inner);
  }
};

struct Tile {
  Piece pieces[kTile];
  int n_items;
};

// `count` elements of a piece from `place` on; 0 is no item.
struct Item {
  int64_t channel_shift;
  uint32_t place;
  int piece, count;
};

// The compiler cannot see where an address from shared memory points.
template <class T>
__device__ __forceinline__ T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T at[kQuad];
};

// Element r of an item or, at once, all four; T is the type of the parameter and its gradient.
template <class T, bool kAtOnce>
struct Access {
  int64_t shift;
  int r;

  template <class U>
  __device__ __forceinline__ void read(float (&to)[kQuad], const U* from) const {
    if constexpr (kAtOnce) {
      const Quad<U> quad = *reinterpret_cast<const Quad<U>*>(in_global(from + shift));
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        to[k] = to_float(quad.at[k]);
      }
    } else {
      to[r] = to_float(*in_global(from + shift));
    }
  }

  template <class U>
  __device__ __forceinline__ void write(U* to, const float (&from)[kQuad]) const {
    if constexpr (kAtOnce) {
      Quad<U> quad;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        quad.at[k] = from_float<U>(from[k]);
      }
      *reinterpret_cast<Quad<U>*>(in_global(to + shift)) = quad;
    } else {
      *in_global(to + shift) = from_float<U>(from[r]);
    }
  }

  __device__ __forceinline__ void read_p(float (&to)[kQuad], const Piece& piece) const {
    read(to, static_cast<const T*>(piece.buffer.p));
  }
  __device__ __forceinline__ void read_g(float (&to)[kQuad], const Piece& piece) const {
    read(to, static_cast<const T*>(piece.g));
  }
  __device__ __forceinline__ void write_p(const Piece& piece, const float (&from)[kQuad]) const {
    write(static_cast<T*>(piece.buffer.p), from);
  }
};

template <class T, class Body>
__device__ __forceinline__ void accesses_of(const Piece& piece, const Item& item,
                                            const Body& body) {
  if (piece.aligned && item.count == kQuad) {
    body(Access<T, true>{item.channel_shift + piece.spread(item.place), 0});
    return;
  }
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    if (r < item.count) {
      const int64_t shift = piece.spread(item.place + r * piece.step);
      body(Access<T, false>{item.channel_shift + shift, r});
    }
  }
}

// Calls body(access) so that every element of the item is accessed once.
template <class Body>
__device__ __forceinline__ void for_accesses(const Piece& piece, const Item& item,
                                             const Body& body) {
  if (piece.buffer.is_bf16) {
    accesses_of<bf16>(piece, item, body);
  } else {
    accesses_of<float>(piece, item, body);
  }
}

// The threads that handle one channel: the block, or a warp where a block has several channels.
struct Team {
  bool wide;

  __device__ __forceinline__ int rank() const {
    return static_cast<int>(wide ? threadIdx.x : threadIdx.x % kLanes);
  }
  __device__ __forceinline__ int size() const { return wide ? kThreads : kLanes; }

  // Whether any thread of the team says so.
  __device__ __forceinline__ bool any(bool value) const {
    return wide ? __syncthreads_or(value) != 0 : __any_sync(0xffffffffu, value) != 0;
  }

  // Adds up every thread's values, in an order that depends on the team's size alone. The sums are
  // in rank 0; a barrier must lie between two calls, which share an array.
  template <int N>
  __device__ __forceinline__ void sum(double (&values)[N]) const {
    __shared__ double of_warps[kWarps][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int shift = kLanes / 2; shift > 0; shift /= 2) {
        values[i] += __shfl_down_sync(0xffffffffu, values[i], shift);
      }
    }
    if (!wide) {
      return;
    }
    if (threadIdx.x % kLanes == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        of_warps[threadIdx.x / kLanes][i] = values[i];
      }
    }
    __syncthreads();
    if (rank() == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        for (int w = 1; w < kWarps; ++w) {
          values[i] += of_warps[w][i];
        }
      }
    }
  }

  // Rank 0's values for every thread of the team; as `sum`, one barrier later.
  __device__ __forceinline__ float2 from_first(float2 values) const {
    __shared__ float2 shared;
    if (!wide) {
      return {__shfl_sync(0xffffffffu, values.x, 0), __shfl_sync(0xffffffffu, values.y, 0)};
    }
    if (rank() == 0) {
      shared = values;
    }
    __syncthreads();
    return shared;
  }
};

// The channel of this thread's team; threads beyond the block's channels have none.
struct Work {
  const Bundle& bundle;
  Team team;
  // Of the bundle.
  int channel;
  bool active;
};

__device__ __forceinline__ Work work_of(const Tables& t, int64_t index) {
  const Block& block = t.blocks[index];
  const bool wide = block.n == 1;
  const int at = wide ? 0 : static_cast<int>(threadIdx.x) / kLanes;
  return {t.bundles[block.bundle], {wide}, static_cast<int>(block.first) + at, at < block.n};
}

__device__ __forceinline__ bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Which elements an item holds must not depend on addresses: they may differ between two runs, the
// order of the sums may not.
__device__ __forceinline__ Piece piece_of(const Tables& t, const Segment& segment, int64_t n) {
  const Buffer& buffer = t.buffers[segment.buffer];
  const char* g = static_cast<const char*>(t.grads[segment.tensor]);
  const int bytes = buffer.is_bf16 ? sizeof(bf16) : sizeof(float);
  Piece piece = {};
  piece.buffer.p = static_cast<char*>(buffer.p) + segment.start * bytes;
  piece.buffer.m = buffer.m == nullptr ? nullptr : buffer.m + segment.start;
  piece.buffer.v = buffer.v == nullptr ? nullptr : buffer.v + segment.start;
  piece.buffer.is_bf16 = buffer.is_bf16;
  piece.g = g == nullptr ? nullptr : g + segment.grad_start * bytes;
  piece.stride = segment.stride;
  piece.inner = static_cast<uint32_t>(segment.inner);
  piece.size = static_cast<uint32_t>(segment.inner * segment.outer);
  const bool single = segment.outer == 1;
  if (!single) {
    // Granlund and Montgomery's division by an invariant, for numerators below 2^31: 2^(shift - 31)
    // is the divisor or the next power of two.
    piece.shift = 31 + (piece.inner > 1 ? kLanes - __clz(piece.inner - 1) : 0);
    piece.inverse = static_cast<uint32_t>(((uint64_t{1} << piece.shift) - 1) / piece.inner + 1);
  }
  const bool whole = segment.inner % kQuad == 0 && (single || segment.stride % kQuad == 0);
  const bool quads =
      (segment.start | segment.grad_start) % kQuad == 0 && (whole || (single && n == 1));
  piece.step = quads ? 1 : kLanes;
  piece.aligned =
      quads && is_aligned(piece.buffer.p, kQuad * bytes) && is_aligned(piece.g, kQuad * bytes) &&
      is_aligned(piece.buffer.m, sizeof(float4)) && is_aligned(piece.buffer.v, sizeof(float4));
  return piece;
}

__device__ __forceinline__ int items_of(const Piece& piece) {
  const uint32_t round = kQuad * piece.step;
  return static_cast<int>(piece.size / round * piece.step + min(piece.size % round, piece.step));
}

__device__ __forceinline__ int n_segments(const Bundle& bundle) {
  return static_cast<int>(bundle.segment_end - bundle.segment_begin);
}

// Puts the bundle's segments from `first` on into shared memory. `also(k, segment)` runs once for
// each, on a thread of its own. Called by the whole block.
template <class Also>
__device__ __forceinline__ void load_tile(Tile& tile, const Tables& t, const Bundle& bundle,
                                          int first, const Also& also) {
  // Nobody reads the tile before any more.
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int k = threadIdx.x;
    int n_items = 0;
    if (first + k < n_segments(bundle)) {
      const Segment& segment = t.segments[bundle.segment_begin + first + k];
      tile.pieces[k] = piece_of(t, segment, bundle.n);
      n_items = items_of(tile.pieces[k]);
      also(k, segment);
    }
    int end = n_items;
#pragma unroll
    for (int shift = 1; shift < kLanes; shift *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, shift);
      end += k >= shift ? before : 0;
    }
    tile.pieces[k].begin = end - n_items;
    tile.pieces[k].end = end;
    if (k == kTile - 1) {
      tile.n_items = end;
    }
  }
  __syncthreads();
}

// Calls body(first) with the bundle's segments from `first` on in the tile, a tile at a time.
// `loaded`: the only tile is in shared memory already. Otherwise called by the whole block.
template <class Also, class Body>
__device__ __forceinline__ void for_tiles(Tile& tile, const Tables& t, const Bundle& bundle,
                                          bool loaded, const Also& also, const Body& body) {
  for (int first = 0; first < n_segments(bundle); first += kTile) {
    if (!loaded) {
      load_tile(tile, t, bundle, first, also);
    }
    body(first);
  }
}

// Item i of a channel; `piece` is where the search begins and ends, i never decreases.
__device__ __forceinline__ Item item_at(const Tile& tile, int channel, int i, int& piece) {
  if (i >= tile.n_items) {
    return {0, 0, 0, 0};
  }
  while (i >= tile.pieces[piece].end) {
    ++piece;
  }
  const Piece& at = tile.pieces[piece];
  const uint32_t q = static_cast<uint32_t>(i - at.begin);
  const uint32_t place = at.step == 1 ? q * kQuad : q / kLanes * (kLanes * kQuad) + q % kLanes;
  const uint32_t left = at.size - place;
  const uint32_t count = at.step == 1 ? left : (left + kLanes - 1) / kLanes;
  return {static_cast<int64_t>(channel) * at.inner, place, piece,
          static_cast<int>(min(count, uint32_t{kQuad}))};
}

// Calls body(items) for this thread's items of a channel, N at a time so that their loads overlap.
template <int N, class Body>
__device__ __forceinline__ void for_items(const Tile& tile, const Work& work, const Body& body) {
  int piece = 0;
  for (int i = work.team.rank(); i < tile.n_items; i += N * work.team.size()) {
    Item items[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      items[k] = item_at(tile, work.channel, i + k * work.team.size(), piece);
    }
    body(items);
  }
}

}  // namespace ato::cuda
