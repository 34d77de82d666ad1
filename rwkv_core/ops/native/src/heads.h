// What wkv6 and wkv7 share: sizes, and the states of heads in the layouts they are worked on in.

#pragma once

#include "simd.h"

namespace {

constexpr int FORWARD_VECTORS = LANES == 16 ? 4 : 2;  // of a block of columns, held in registers
constexpr int64_t TILE = 16;  // values whose states of one chunk the backward pass holds at a time

struct HeadSizes {
  int64_t B, T, H, K, V, L;  // L tokens of a chunk

  int64_t chunks() const { return (T + L - 1) / L; }
  int64_t work() const { return 5 * T * K * V; }
  // floats of a state kept for the backward pass, [values / TILE, K, TILE]: read in one sweep
  int64_t kept() const { return round_up(V, TILE) * K; }
  int64_t key(int64_t bh) const { return (bh / H * T * H + bh % H) * K; }  // [B, T, H, K]
  int64_t value(int64_t bh) const { return (bh / H * T * H + bh % H) * V; }
};

inline HeadSizes head_sizes(const int64_t* n) { return {n[0], n[1], n[2], n[3], n[4], n[5]}; }

// Call `visit(at, width)` for every block of columns. In the forward pass a state is held block after
// block, each [K, width]: rows at a power of two apart would push each other out of the cache.
template <typename Visit>
INLINE void each_block(int64_t padded, Visit visit) {
  int64_t at = 0;
  for (; at + FORWARD_VECTORS * LANES <= padded; at += FORWARD_VECTORS * LANES)
    visit(at, FORWARD_VECTORS * LANES);
  for (; at < padded; at += LANES) visit(at, LANES);
}

// A state as the caller knows it, [K, V], into blocks and back.
inline void read_state(const HeadSizes& size, float* S, const float* from) {
  const int64_t K = size.K, V = size.V;
  each_block(round_up(V, LANES), [&](int64_t at, int64_t width) {
    pack(S + at * K, width, from + at, V, K, at + width < V ? width : V - at);
  });
}

inline void write_state(const HeadSizes& size, float* to, const float* S) {
  const int64_t K = size.K, V = size.V;
  each_block(round_up(V, LANES), [&](int64_t at, int64_t width) {
    unpack(to + at, V, S + at * K, width, K, at + width < V ? width : V - at);
  });
}

// The same for the backward pass, see HeadSizes::kept.
inline void keep_state(const HeadSizes& size, float* to, const float* S) {
  const int64_t K = size.K;
  if (size.V % TILE) memset(to, 0, 4 * size.kept());
  each_block(round_up(size.V, LANES), [&](int64_t at, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES)
      unpack(to + (at + i) / TILE * TILE * K + (at + i) % TILE, TILE, S + at * K + i, width, K, LANES);
  });
}

// The inputs of the chunk that a thread turns to next, as many as there are. While it works on token t
// of one chunk it asks for token t of the next, a cache line of each input with every block: the rows
// of a head lie too far apart for the processor to foresee. Exact where K = V, and only a hint: what
// does not exist is not fetched.
struct Ahead {
  const float* inputs[8];
  int64_t stride;

  void fetch(int64_t t, int64_t at) const {
    for (const float* rows : inputs)
      if (rows) __builtin_prefetch(rows + t * stride + at);
  }
};

// How many rows of a head further the next chunk begins: the same tokens of the next head, or the
// following (with step L·H) or preceding (-L·H) tokens of the first one.
INLINE int64_t rows_ahead(int64_t h, int64_t heads, int64_t step) {
  return h + 1 < heads ? 1 : step - h;
}

// Σ a b c
INLINE float dot3(const float* a, const float* b, const float* c, int64_t n) {
  float sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int x = 0; x < 4; x++) sums[x] += a[i + x] * b[i + x] * c[i + x];
  for (; i < n; i++) sums[0] += a[i] * b[i] * c[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace
