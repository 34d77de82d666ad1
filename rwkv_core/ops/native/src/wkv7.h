// WKV-7 of one head, token by token:
//
//   S_t = diag(e^w) S_{t-1} + k v' + b z',   z = S_{t-1}' a,   y = S_t' r          S is K×V
//
// The plain recurrence costs fewer operations than any form in chunks, and all of them are
// independent multiply-adds; see benchmarks/native.py for what that reaches.
//
// Forward: lanes over values. The columns of S do not see each other, so a block of columns goes
// through a whole chunk of tokens while it stays in the nearest cache. One pass over the block per
// token reads and writes it once and also gathers z of the token after.
//
// Backward, with G the gradient of S_t, lanes over keys (S and G are held as V×K):
//
//   G  += r dy'                                       (and G comes in from the token after)
//   dv  = G' k,  dz = G' b,  dk = G v,  db = G z,  dw = e^w (G ∘ S_{t-1}) 1
//   dr  = S_t dy = e^w (S_{t-1} dy) + k (v·dy) + b (z·dy)
//   da  = S_{t-1} dz,   G ← diag(e^w) G + a dz'
//
// S_{t-1} is computed again from the state that the forward pass kept at the start of each chunk.
// Running the recurrence backwards instead would divide by e^w, and lose three digits at the decays
// that trained models have.

#pragma once

#include "heads.h"

namespace {

// ---- forward -----------------------------------------------------------------------------------

struct Wkv7Chunk {
  int64_t n, K, key_stride, keys;
  const float *r, *k, *a, *b;  // rows of this chunk, `key_stride` apart
  const float *factor, *keep;  // rows `keys` apart
  Ahead ahead;
};

// Take a block of `Vectors` vectors of columns through a chunk. S holds the rows of the block one
// behind the other: at a power of two apart they would push each other out of the cache.
template <int Vectors, bool Strong>
void wkv7_columns(const Wkv7Chunk& c, float* S, int64_t padded, int64_t at, const float* v,
                  float* y, float* z) {
  Vec found[Vectors] = {};
  for (int64_t j = 0; j < c.K; j++)
    for (int i = 0; i < Vectors; i++) found[i] += c.a[j] * load(S + (j * Vectors + i) * LANES);
  for (int64_t t = 0; t < c.n; t++) {
    const float *r = c.r + t * c.key_stride, *k = c.k + t * c.key_stride;
    const float *b = c.b + t * c.key_stride;
    const float* next_a = c.a + (t + 1 < c.n ? t + 1 : t) * c.key_stride;
    const float *factor = c.factor + t * c.keys, *keep = c.keep + t * c.keys;
    c.ahead.fetch(t, at);
    Vec value[Vectors], removed[Vectors], read[Vectors] = {}, next[Vectors] = {};
    for (int i = 0; i < Vectors; i++) {
      value[i] = load(v + t * padded + i * LANES);
      removed[i] = found[i];
      store(z + t * padded + i * LANES, found[i]);
    }
    for (int64_t j = 0; j < c.K; j++) {
      // loaded before the first store, which the compiler must assume to change them
      const Vec f = all(factor[j]), kj = all(k[j]), bj = all(b[j]), rj = all(r[j]);
      const Vec aj = all(next_a[j]);
      const Ints kept = Strong ? (Ints)all(keep[j]) : Ints{};
      float* row = S + j * Vectors * LANES;
      for (int i = 0; i < Vectors; i++) {
        Vec s = decayed<Strong>(load(row + i * LANES), f, kept);
        s += kj * value[i];
        s += bj * removed[i];
        read[i] += rj * s;
        next[i] += aj * s;
        store(row + i * LANES, s);
      }
    }
    for (int i = 0; i < Vectors; i++) {
      store(y + t * padded + i * LANES, read[i]);
      found[i] = next[i];
    }
  }
}

struct Wkv7Forward {
  HeadSizes size;
  const float *r, *w, *k, *v, *a, *b, *start;
  float *y, *last, *z, *states;  // z and states are null unless a backward pass will follow

  struct Work {
    Scratch scratch;
    float *S, *v, *y, *z, *plain, *factor, *keep;
    bool ready;

    explicit Work(const HeadSizes& size) {
      lay_out(size);
      ready = scratch.allocate();
      if (ready) lay_out(size);
    }
    void lay_out(const HeadSizes& size) {
      int64_t padded = round_up(size.V, LANES), L = size.L;
      S = scratch.floats(GROUP * size.K * padded);
      v = scratch.floats(L * padded);
      y = scratch.floats(L * padded);
      z = scratch.floats(L * padded);
      float** key_rows[] = {&plain, &factor, &keep};
      for (float** rows : key_rows) *rows = scratch.floats(L * round_up(size.K, LANES));
    }
  };

  template <bool Strong>
  static void chunk(const Wkv7Chunk& c, float* S, const Work& work, int64_t padded) {
    each_block(padded, [&](int64_t at, int64_t width) {
      auto columns = width == LANES ? wkv7_columns<1, Strong> : wkv7_columns<FORWARD_VECTORS, Strong>;
      columns(c, S + at * c.K, padded, at, work.v + at, work.y + at, work.z + at);
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
    const int64_t soon = key + rows * K;
    Wkv7Chunk c = {n, K, H * K, keys, r + key, k + key, a + key, b + key, work.factor, work.keep,
                   {{r + soon, w + soon, k + soon, a + soon, b + soon, v + value + rows * V}, H * K}};
    strong ? chunk<true>(c, S, work, padded) : chunk<false>(c, S, work, padded);
    unpack(y + value, H * V, work.y, padded, n, V);
    if (z) unpack(z + value, H * V, work.z, padded, n, V);
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

// ---- backward ----------------------------------------------------------------------------------

constexpr int BACKWARD_VECTORS = 2;  // of a block of keys, held in registers
constexpr int64_t BACKWARD_KEYS = BACKWARD_VECTORS * LANES;

struct Wkv7Backward {
  HeadSizes size;
  const float *r, *w, *k, *v, *a, *b, *z, *states, *dy, *dlast;
  float *dr, *dw, *dk, *dv, *da, *db, *dstart;

  struct Work {
    Scratch scratch;
    float *r, *factor, *keep, *plain, *k, *a, *b;  // [L, Kp], Kp keys padded
    float *dr, *dw, *dk, *da, *db;                 // [L, Kp]
    float *v, *z, *dy, *dv;                        // [L, Vp], Vp values padded
    float *G;                                      // [GROUP, Vp, Kp]
    float *S;                                      // [L, TILE, Kp]
    float *dv_lanes, *dz_lanes, *dz;               // [TILE, BACKWARD_KEYS], the same, [TILE]
    bool ready;

    explicit Work(const HeadSizes& size) {
      lay_out(size);
      ready = scratch.allocate();
      if (ready) lay_out(size);
    }
    void lay_out(const HeadSizes& size) {
      const int64_t keys = round_up(size.K, BACKWARD_KEYS), values = round_up(size.V, TILE);
      float** key_rows[] = {&r, &factor, &keep, &plain, &k, &a, &b, &dr, &dw, &dk, &da, &db};
      float** value_rows[] = {&v, &z, &dy, &dv};
      for (float** rows : key_rows) *rows = scratch.floats(size.L * keys);
      for (float** rows : value_rows) *rows = scratch.floats(size.L * values);
      G = scratch.floats(GROUP * values * keys);
      S = scratch.floats(size.L * TILE * keys);
      dv_lanes = scratch.floats(TILE * LANES);
      dz_lanes = scratch.floats(TILE * LANES);
      dz = scratch.floats(TILE);
    }
  };

  // S_{t+1} of a tile from S_t, for every token of the chunk but the last.
  template <bool Strong>
  NOINLINE static void recompute(const Work& m, int64_t n, int64_t keys, const float* v, const float* z,
                        int64_t values) {
    constexpr int N = BACKWARD_VECTORS;
    for (int64_t t = 0; t + 1 < n; t++) {
      const float* from = m.S + t * TILE * keys;
      float* to = m.S + (t + 1) * TILE * keys;
      for (int64_t j = 0; j < keys; j += BACKWARD_KEYS) {
        Vec factor[N], k[N], b[N];
        Ints keep[N];
        for (int x = 0; x < N; x++) {
          const int64_t at = t * keys + j + x * LANES;
          factor[x] = load(m.factor + at), k[x] = load(m.k + at), b[x] = load(m.b + at);
          keep[x] = (Ints)load(m.keep + at);
        }
        for (int64_t i = 0; i < TILE; i++) {
          const Vec vi = all(v[t * values + i]), zi = all(z[t * values + i]);
          for (int x = 0; x < N; x++) {
            const int64_t here = i * keys + j + x * LANES;
            const Vec s = decayed<Strong>(load(from + here), factor[x], keep[x]);
            store(to + here, s + k[x] * vi + b[x] * zi);
          }
        }
      }
    }
  }

  // One token of one tile: everything but da and the decay of G, which need the sums dz.
  NOINLINE static void collect(const Work& m, int64_t t, int64_t keys, const float* S, float* G,
                      const float* v, const float* z, const float* dy) {
    constexpr int N = BACKWARD_VECTORS;
    float *dv_lanes = m.dv_lanes, *dz_lanes = m.dz_lanes;
    for (int64_t j = 0; j < keys; j += BACKWARD_KEYS) {
      Vec r[N], k[N], b[N], dr[N], dw[N], dk[N], db[N];
      const int64_t at = t * keys + j;
      for (int x = 0; x < N; x++) {
        const int64_t here = at + x * LANES;
        r[x] = load(m.r + here), k[x] = load(m.k + here), b[x] = load(m.b + here);
        dr[x] = load(m.dr + here), dw[x] = load(m.dw + here);
        dk[x] = load(m.dk + here), db[x] = load(m.db + here);
      }
      for (int64_t i = 0; i < TILE; i++) {
        Vec dv = j ? load(dv_lanes + i * LANES) : Vec{};
        Vec dz = j ? load(dz_lanes + i * LANES) : Vec{};
        const Vec dyi = all(dy[i]), vi = all(v[i]), zi = all(z[i]);
        for (int x = 0; x < N; x++) {
          const int64_t here = i * keys + j + x * LANES;
          const Vec s = load(S + here);
          const Vec g = load(G + here) + r[x] * dyi;
          store(G + here, g);
          dr[x] += s * dyi;
          dw[x] += s * g;
          dk[x] += g * vi;
          db[x] += g * zi;
          dv += g * k[x];
          dz += g * b[x];
        }
        store(dv_lanes + i * LANES, dv);
        store(dz_lanes + i * LANES, dz);
      }
      for (int x = 0; x < N; x++) {
        const int64_t here = at + x * LANES;
        store(m.dr + here, dr[x]), store(m.dw + here, dw[x]);
        store(m.dk + here, dk[x]), store(m.db + here, db[x]);
      }
    }
  }

  // The rest of that token: da, and G on its way to the token before.
  template <bool Strong>
  NOINLINE static void hand_back(const Work& m, int64_t t, int64_t keys, const float* S, float* G) {
    constexpr int N = BACKWARD_VECTORS;
    for (int64_t j = 0; j < keys; j += BACKWARD_KEYS) {
      Vec factor[N], a[N], da[N];
      Ints keep[N];
      for (int x = 0; x < N; x++) {
        const int64_t at = t * keys + j + x * LANES;
        factor[x] = load(m.factor + at), a[x] = load(m.a + at), da[x] = load(m.da + at);
        keep[x] = (Ints)load(m.keep + at);
      }
      const float* sums = m.dz;
      for (int64_t i = 0; i < TILE; i++) {
        const Vec dz = all(sums[i]);
        for (int x = 0; x < N; x++) {
          const int64_t here = i * keys + j + x * LANES;
          da[x] += load(S + here) * dz;
          store(G + here, decayed<Strong>(load(G + here), factor[x], keep[x]) + a[x] * dz);
        }
      }
      for (int x = 0; x < N; x++) store(m.da + t * keys + j + x * LANES, da[x]);
    }
  }

  template <bool Strong>
  static void tile(const Work& m, const Ahead& ahead, float* G, int64_t n, int64_t keys,
                   int64_t values, int64_t first) {
    const float *v = m.v + first, *z = m.z + first, *dy = m.dy + first;
    recompute<Strong>(m, n, keys, v, z, values);
    for (int64_t t = n - 1; t >= 0; t--) {
      const float* S = m.S + t * TILE * keys;
      const int64_t row = t * values;
      ahead.fetch(t, first);
      collect(m, t, keys, S, G, v + row, z + row, dy + row);
      for (int64_t i = 0; i < TILE; i += LANES) {
        lane_sums((Vec*)(m.dv_lanes + i * LANES), m.dv + row + first + i);
        lane_sums((Vec*)(m.dz_lanes + i * LANES), m.dz + i);
      }
      hand_back<Strong>(m, t, keys, S, G);
    }
  }

  // One chunk of one head; G is the gradient of the state after it, and becomes that before it. The
  // next chunk is `rows` further.
  void retreat(int64_t bh, int64_t index, int64_t rows, float* G, const Work& m) const {
    const auto [B, T, H, K, V, L] = size;
    const int64_t keys = round_up(K, BACKWARD_KEYS), values = round_up(V, TILE);
    const int64_t begin = index * L, n = begin + L < T ? L : T - begin;
    const int64_t key = size.key(bh) + begin * H * K, value = size.value(bh) + begin * H * V;
    const float* state = states + (bh * size.chunks() + index) * size.kept();

    pack(m.r, keys, r + key, H * K, n, K);
    pack(m.k, keys, k + key, H * K, n, K);
    pack(m.a, keys, a + key, H * K, n, K);
    pack(m.b, keys, b + key, H * K, n, K);
    pack(m.plain, keys, w + key, H * K, n, K);
    pack(m.v, values, v + value, H * V, n, V);
    pack(m.z, values, z + value, H * V, n, V);
    pack(m.dy, values, dy + value, H * V, n, V);
    const bool strong = decays(n * keys, m.plain, m.factor, m.keep);
    float* sums[] = {m.dr, m.dw, m.dk, m.da, m.db};
    for (float* sum : sums) memset(sum, 0, 4 * n * keys);
    const int64_t soon = key + rows * K, soon_value = value + rows * V;
    const Ahead ahead = {{r + soon, w + soon, k + soon, a + soon, b + soon, v + soon_value,
                          z + soon_value, dy + soon_value}, H * K};

    for (int64_t first = 0; first < values; first += TILE) {
      transpose(m.S, keys, state + first * K, TILE, K, TILE);
      float* g = G + first * keys;
      const int64_t next = first + TILE < values ? (first + TILE) * K : -size.kept();
      fetch(state + next, TILE * K);  // the next tile, or the first one of the chunk before
      auto run = strong ? tile<true> : tile<false>;
      run(m, ahead, g, n, keys, values, first);
    }

    for (int64_t t = 0; t < n; t++) {
      const float vdy = dot(m.v + t * values, m.dy + t * values, values);
      const float zdy = dot(m.z + t * values, m.dy + t * values, values);
      for (int64_t j = t * keys; j < (t + 1) * keys; j += LANES) {
        const Vec plain = load(m.plain + j);
        store(m.dr + j, plain * load(m.dr + j) + load(m.k + j) * vdy + load(m.b + j) * zdy);
        store(m.dw + j, plain * load(m.dw + j));
      }
    }
    unpack(dr + key, H * K, m.dr, keys, n, K);
    unpack(dw + key, H * K, m.dw, keys, n, K);
    unpack(dk + key, H * K, m.dk, keys, n, K);
    unpack(da + key, H * K, m.da, keys, n, K);
    unpack(db + key, H * K, m.db, keys, n, K);
    unpack(dv + value, H * V, m.dv, values, n, V);
  }

  bool range(int64_t begin, int64_t end) const { return by_groups(*this, begin, end, size.H); }

  void run(int64_t first, int64_t heads, const Work& m) const {
    const int64_t K = size.K, V = size.V;
    const int64_t keys = round_up(K, BACKWARD_KEYS), area = round_up(V, TILE) * keys;
    memset(m.G, 0, 4 * heads * area);
    for (int64_t h = 0; h < heads; h++)
      transpose(m.G + h * area, keys, dlast + (first + h) * K * V, V, K, V);
    for (int64_t index = size.chunks() - 1; index >= 0; index--)
      for (int64_t h = 0; h < heads; h++)
        retreat(first + h, index, rows_ahead(h, heads, -size.L * size.H), m.G + h * area, m);
    for (int64_t h = 0; h < heads; h++)
      transpose(dstart + (first + h) * K * V, V, m.G + h * area, keys, V, K);
  }
};

}  // namespace

EXPORT(wkv7_forward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                     float* const* out) {
  Wkv7Forward task = {head_sizes(sizes),
                      in[0], in[1], in[2], in[3], in[4], in[5], in[6],
                      out[0], out[1], out[2], out[3]};
  return for_each(parallel, task.size.B * task.size.H, task.size.work(), task);
}

EXPORT(wkv7_backward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                      float* const* out) {
  Wkv7Backward task = {head_sizes(sizes),
                       in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9],
                       out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
  return for_each(parallel, task.size.B * task.size.H, task.size.work(), task);
}
