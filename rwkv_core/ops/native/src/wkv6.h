// WKV-6 of one head, token by token:
//
//   y_t = (S_{t-1} + diag(u) k v')' r,   S_t = diag(e^w) S_{t-1} + k v'            S is K×V
//
// Forward with lanes over values, backward with lanes over keys, as in wkv7.h. With G the gradient of
// S_t and c = v·dy:
//
//   dk = G v + u r c,   dv = G' k + (Σ r u k) dy,   dw = e^w (G ∘ S_{t-1}) 1
//   dr = S_{t-1} dy + u k c,   du = r k c,   G ← diag(e^w) G + r dy'

#pragma once

#include "heads.h"

namespace {

struct Wkv6Chunk {
  int64_t n, K, key_stride, keys;
  const float *r, *k;          // rows of this chunk, `key_stride` apart
  const float *factor, *keep;  // rows `keys` apart
  const float* bonus;          // Σ r u k of every token
  Ahead ahead;
};

template <int Vectors, bool Strong>
void wkv6_columns(const Wkv6Chunk& c, float* S, int64_t padded, int64_t at, const float* v,
                  float* y) {
  for (int64_t t = 0; t < c.n; t++) {
    c.ahead.fetch(t, at);
    const float *r = c.r + t * c.key_stride, *k = c.k + t * c.key_stride;
    const float *factor = c.factor + t * c.keys, *keep = c.keep + t * c.keys;
    Vec value[Vectors], read[Vectors];
    for (int i = 0; i < Vectors; i++) {
      value[i] = load(v + t * padded + i * LANES);
      read[i] = value[i] * c.bonus[t];
    }
    for (int64_t j = 0; j < c.K; j++) {
      const Vec f = all(factor[j]), kj = all(k[j]), rj = all(r[j]);
      const Ints kept = Strong ? (Ints)all(keep[j]) : Ints{};
      float* row = S + j * Vectors * LANES;
      for (int i = 0; i < Vectors; i++) {
        const Vec s = load(row + i * LANES);
        read[i] += rj * s;
        store(row + i * LANES, decayed<Strong>(s, f, kept) + kj * value[i]);
      }
    }
    for (int i = 0; i < Vectors; i++) store(y + t * padded + i * LANES, read[i]);
  }
}

struct Wkv6Forward {
  HeadSizes size;
  const float *r, *w, *k, *v, *u, *start;
  float *y, *last, *states;  // states is null unless a backward pass will follow

  struct Work {
    Scratch scratch;
    float *S, *v, *y, *plain, *factor, *keep, *bonus;
    bool ready;

    explicit Work(const HeadSizes& size) {
      lay_out(size);
      ready = scratch.allocate();
      if (ready) lay_out(size);
    }
    void lay_out(const HeadSizes& size) {
      const int64_t padded = round_up(size.V, LANES), L = size.L;
      S = scratch.floats(GROUP * size.K * padded);
      v = scratch.floats(L * padded);
      y = scratch.floats(L * padded);
      float** key_rows[] = {&plain, &factor, &keep};
      for (float** rows : key_rows) *rows = scratch.floats(L * round_up(size.K, LANES));
      bonus = scratch.floats(L);
    }
  };

  template <bool Strong>
  static void chunk(const Wkv6Chunk& c, float* S, const Work& work, int64_t padded) {
    each_block(padded, [&](int64_t at, int64_t width) {
      auto columns = width == LANES ? wkv6_columns<1, Strong> : wkv6_columns<FORWARD_VECTORS, Strong>;
      columns(c, S + at * c.K, padded, at, work.v + at, work.y + at);
    });
  }

  // One chunk of one head, from token t on; S is its state, and the next chunk `rows` further.
  void advance(int64_t bh, int64_t t, int64_t rows, float* S, const Work& work) const {
    const auto [B, T, H, K, V, L] = size;
    const int64_t n = t + L < T ? L : T - t;
    const int64_t keys = round_up(K, LANES), padded = round_up(V, LANES);
    const int64_t key = size.key(bh) + t * H * K, value = size.value(bh) + t * H * V;
    if (states) keep_state(size, states + (bh * size.chunks() + t / L) * size.kept(), S);
    pack(work.plain, keys, w + key, H * K, n, K);
    const bool strong = decays(n * keys, work.plain, work.factor, work.keep);
    pack(work.v, padded, v + value, H * V, n, V);
    for (int64_t i = 0; i < n; i++)
      work.bonus[i] = dot3(r + key + i * H * K, u + bh % H * K, k + key + i * H * K, K);
    const int64_t soon = key + rows * K;
    Wkv6Chunk c = {n, K, H * K, keys, r + key, k + key, work.factor, work.keep, work.bonus,
                   {{r + soon, w + soon, k + soon, v + value + rows * V}, H * K}};
    strong ? chunk<true>(c, S, work, padded) : chunk<false>(c, S, work, padded);
    unpack(y + value, H * V, work.y, padded, n, V);
  }

  bool range(int64_t begin, int64_t end) const { return by_groups(*this, begin, end, size.H); }

  void run(int64_t first, int64_t heads, const Work& work) const {
    const int64_t area = size.K * round_up(size.V, LANES), KV = size.K * size.V;
    for (int64_t h = 0; h < heads; h++) read_state(size, work.S + h * area, start + (first + h) * KV);
    for (int64_t t = 0; t < size.T; t += size.L)
      for (int64_t h = 0; h < heads; h++)
        advance(first + h, t, rows_ahead(h, heads, size.L * size.H), work.S + h * area, work);
    for (int64_t h = 0; h < heads; h++) write_state(size, last + (first + h) * KV, work.S + h * area);
  }
};

struct Wkv6Backward {
  HeadSizes size;
  const float *r, *w, *k, *v, *u, *states, *dy, *dlast;
  float *dr, *dw, *dk, *dv, *du, *dstart;  // du [B, H, K]

  struct Work {
    Scratch scratch;
    float *r, *factor, *keep, *plain, *k;  // [L, Kp], Kp keys padded
    float *dr, *dw, *dk;                   // [L, Kp]
    float *v, *dy, *dv;                    // [L, Vp], Vp values padded
    float *G;                              // [GROUP, Vp, Kp]
    float *S;                              // [L, TILE, Kp]
    float *dv_lanes;                       // [TILE, LANES]
    float *u;                              // [Kp]
    double *du;                            // [GROUP, Kp]
    bool ready;

    explicit Work(const HeadSizes& size) {
      lay_out(size);
      ready = scratch.allocate();
      if (ready) lay_out(size);
    }
    void lay_out(const HeadSizes& size) {
      const int64_t keys = round_up(size.K, LANES), values = round_up(size.V, TILE);
      float** key_rows[] = {&r, &factor, &keep, &plain, &k, &dr, &dw, &dk};
      float** value_rows[] = {&v, &dy, &dv};
      for (float** rows : key_rows) *rows = scratch.floats(size.L * keys);
      for (float** rows : value_rows) *rows = scratch.floats(size.L * values);
      G = scratch.floats(GROUP * values * keys);
      S = scratch.floats(size.L * TILE * keys);
      dv_lanes = scratch.floats(TILE * LANES);
      u = scratch.floats(keys);
      du = (double*)scratch.floats(2 * GROUP * keys);
    }
  };

  // S_{t+1} of a tile from S_t, for every token of the chunk but the last.
  template <bool Strong>
  static void recompute(const Work& m, int64_t n, int64_t keys, const float* v, int64_t values) {
    for (int64_t t = 0; t + 1 < n; t++) {
      const float* from = m.S + t * TILE * keys;
      float* to = m.S + (t + 1) * TILE * keys;
      for (int64_t j = 0; j < keys; j += LANES) {
        const Vec factor = load(m.factor + t * keys + j), k = load(m.k + t * keys + j);
        const Ints keep = (Ints)load(m.keep + t * keys + j);
        for (int64_t i = 0; i < TILE; i++) {
          const Vec s = decayed<Strong>(load(from + i * keys + j), factor, keep);
          store(to + i * keys + j, s + k * v[t * values + i]);
        }
      }
    }
  }

  // One token of one tile.
  template <bool Strong>
  static void collect(const Work& m, int64_t t, int64_t keys, const float* S, float* G,
                      const float* v, const float* dy) {
    float* dv_lanes = m.dv_lanes;
    for (int64_t j = 0; j < keys; j += LANES) {
      const int64_t at = t * keys + j;
      const Vec factor = load(m.factor + at), r = load(m.r + at), k = load(m.k + at);
      const Ints keep = (Ints)load(m.keep + at);
      Vec dr = load(m.dr + at), dw = load(m.dw + at), dk = load(m.dk + at);
      for (int64_t i = 0; i < TILE; i++) {
        const Vec dv = j ? load(dv_lanes + i * LANES) : Vec{};
        const Vec dyi = all(dy[i]), vi = all(v[i]);
        const Vec s = load(S + i * keys + j), g = load(G + i * keys + j);
        dr += s * dyi;
        dw += s * g;
        dk += g * vi;
        store(dv_lanes + i * LANES, dv + g * k);
        store(G + i * keys + j, decayed<Strong>(g, factor, keep) + r * dyi);
      }
      store(m.dr + at, dr), store(m.dw + at, dw), store(m.dk + at, dk);
    }
  }

  template <bool Strong>
  static void tile(const Work& m, const Ahead& ahead, float* G, int64_t n, int64_t keys,
                   int64_t values, int64_t first) {
    const float *v = m.v + first, *dy = m.dy + first;
    recompute<Strong>(m, n, keys, v, values);
    for (int64_t t = n - 1; t >= 0; t--) {
      const int64_t row = t * values;
      ahead.fetch(t, first);
      collect<Strong>(m, t, keys, m.S + t * TILE * keys, G, v + row, dy + row);
      for (int64_t i = 0; i < TILE; i += LANES)
        lane_sums((Vec*)(m.dv_lanes + i * LANES), m.dv + row + first + i);
    }
  }

  // One chunk of one head; G is the gradient of the state after it, and becomes that before it. The
  // next chunk is `rows` further.
  void retreat(int64_t bh, int64_t index, int64_t rows, float* G, double* du_head,
               const Work& m) const {
    const auto [B, T, H, K, V, L] = size;
    const int64_t keys = round_up(K, LANES), values = round_up(V, TILE);
    const int64_t begin = index * L, n = begin + L < T ? L : T - begin;
    const int64_t key = size.key(bh) + begin * H * K, value = size.value(bh) + begin * H * V;
    const float* state = states + (bh * size.chunks() + index) * size.kept();

    pack(m.u, keys, u + bh % H * K, K, 1, K);
    pack(m.r, keys, r + key, H * K, n, K);
    pack(m.k, keys, k + key, H * K, n, K);
    pack(m.plain, keys, w + key, H * K, n, K);
    pack(m.v, values, v + value, H * V, n, V);
    pack(m.dy, values, dy + value, H * V, n, V);
    const bool strong = decays(n * keys, m.plain, m.factor, m.keep);
    float* sums[] = {m.dr, m.dw, m.dk};
    for (float* sum : sums) memset(sum, 0, 4 * n * keys);
    const int64_t soon = key + rows * K, soon_value = value + rows * V;
    const Ahead ahead = {{r + soon, w + soon, k + soon, v + soon_value, dy + soon_value}, H * K};

    for (int64_t first = 0; first < values; first += TILE) {
      float* g = G + first * keys;
      transpose(m.S, keys, state + first * K, TILE, K, TILE);
      const int64_t next = first + TILE < values ? (first + TILE) * K : -size.kept();
      fetch(state + next, TILE * K);  // the next tile, or the first one of the chunk before
      auto run = strong ? tile<true> : tile<false>;
      run(m, ahead, g, n, keys, values, first);
    }

    for (int64_t t = 0; t < n; t++) {
      const float bonus = dot3(m.r + t * keys, m.u, m.k + t * keys, keys);
      float vdy = 0;
      for (int64_t i = t * values; i < t * values + V; i++) {
        vdy += m.v[i] * m.dy[i];
        m.dv[i] += bonus * m.dy[i];
      }
      for (int64_t j = 0; j < keys; j++) {
        const int64_t at = t * keys + j;
        const float r = m.r[at], k = m.k[at], u = m.u[j];
        m.dr[at] += u * k * vdy;
        m.dk[at] += u * r * vdy;
        m.dw[at] *= m.plain[at];
        du_head[j] += (double)r * k * vdy;
      }
    }
    unpack(dr + key, H * K, m.dr, keys, n, K);
    unpack(dw + key, H * K, m.dw, keys, n, K);
    unpack(dk + key, H * K, m.dk, keys, n, K);
    unpack(dv + value, H * V, m.dv, values, n, V);
  }

  bool range(int64_t begin, int64_t end) const { return by_groups(*this, begin, end, size.H); }

  void run(int64_t first, int64_t heads, const Work& m) const {
    const int64_t K = size.K, V = size.V;
    const int64_t keys = round_up(K, LANES), area = round_up(V, TILE) * keys;
    memset(m.G, 0, 4 * heads * area);
    memset(m.du, 0, 8 * heads * keys);
    for (int64_t h = 0; h < heads; h++)
      transpose(m.G + h * area, keys, dlast + (first + h) * K * V, V, K, V);
    for (int64_t index = size.chunks() - 1; index >= 0; index--)
      for (int64_t h = 0; h < heads; h++)
        retreat(first + h, index, rows_ahead(h, heads, -size.L * size.H), m.G + h * area,
                m.du + h * keys, m);
    for (int64_t h = 0; h < heads; h++) {
      transpose(dstart + (first + h) * K * V, V, m.G + h * area, keys, V, K);
      for (int64_t j = 0; j < K; j++) du[(first + h) * K + j] = m.du[h * keys + j];
    }
  }
};

}  // namespace

EXPORT(wkv6_forward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                     float* const* out) {
  Wkv6Forward task = {head_sizes(sizes), in[0], in[1], in[2], in[3], in[4], in[5],
                      out[0], out[1], out[2]};
  return for_each(parallel, task.size.B * task.size.H, task.size.work(), task);
}

EXPORT(wkv6_backward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                      float* const* out) {
  Wkv6Backward task = {head_sizes(sizes), in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7],
                       out[0], out[1], out[2], out[3], out[4], out[5]};
  return for_each(parallel, task.size.B * task.size.H, task.size.work(), task);
}
