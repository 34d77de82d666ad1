// One token of one sequence through a layer of RWKV-7, as mixers/rwkv7.py does it for any number:
// decoding calls a layer's two halves, and not thirty small operations. Every piece is the kernel
// that a sequence gets.

#pragma once

#include "gemv.h"
#include "rwkv7_layer.h"
#include "wkv7.h"

namespace {

// tanh x = (e^2x - 1) / (e^2x + 1); power_of keeps the digits of e^2x - 1 near 0.
INLINE Vec tanh_of(Vec x) {
  const Power e = power_of(2.0f * x);
  const Vec less_one = (e.scale - 1.0f) + e.scale * e.p;
  return less_one / (less_one + 2.0f);
}

// x + (last - x)·mix, n channels.
INLINE void mix_token(const float* x, const float* last, const float* mix, int64_t n, float* to) {
  each_vector(n, [&](int64_t d, auto read, auto write) {
    const Vec now = read(x + d);
    write(to + d, now + (read(last + d) - now) * read(mix + d));
  });
}

template <typename Function>
INLINE void apply(float* x, int64_t n, Function function) {
  each_vector(n, [&](int64_t d, auto read, auto write) { write(x + d, function(read(x + d))); });
}

// Products of one token; remembers that one of them failed.
struct Products {
  ParallelFor parallel;
  int64_t format;  // of the weights: 0 fp32, 4 bf16, which gemv adds to how they lie in memory
  int failed = 0;

  void operator()(int64_t order, int64_t out, int64_t in, const void* W, const float* x, float* y) {
    failed |= JOIN(gemv, ISA)(parallel, order + format, out, in, W, x, y);
  }
  // x [in] through the low-rank map first [in, rank], function, second [rank, out]
  template <typename Function>
  void low_rank(int64_t rank, int64_t D, const float* first, const float* second, const float* x,
                float* hidden, float* y, Function function) {
    (*this)(1, rank, D, first, x, hidden);
    apply(hidden, rank, function);
    (*this)(1, D, rank, second, hidden, y);
  }
};

}  // namespace

// n: heads, head size; ranks of w, a, v, g (v: 0 in layer 0); the format of all matrices; how
// receptance, key, value and output lie in memory, as in gemv. in: the token, the one before, the state, the first layer's value; then
// the parameters in the order of mixers/rwkv7_token.py. out: y, the state after, the value.
EXPORT(time_mix7_token)(ParallelFor parallel, const int64_t* n, const float* const* in,
                        float* const* out) {
  const int64_t H = n[0], N = n[1], D = H * N;
  const float *x = in[0], *last = in[1], *const *p = in + 4;
  const float *const *mix = p, *w0 = p[6], *a0 = p[9], *v0 = p[12], *r_k = p[19];
  int64_t rank = 0;
  for (int i = 2; i < 6; i++) rank = n[i] > rank ? n[i] : rank;

  Scratch scratch;
  scratch.floats(19 * round_up(D, 16) + rank);
  if (!scratch.allocate()) return 1;
  const auto row = [&] { return scratch.floats(round_up(D, 16)); };
  float *mixed[6], *r = row(), *k = row(), *lw = row(), *la = row(), *lv = row(), *g = row();
  float *w = row(), *key = row(), *a = row(), *b = row(), *v = row(), *y = row(), *z = row();
  for (auto& one : mixed) one = row();
  float *hidden = scratch.floats(rank), *value = out[2];

  for (int i = 0; i < 6; i++) mix_token(x, last, mix[i], D, mixed[i]);
  const float *xr = mixed[0], *xw = mixed[1], *xk = mixed[2], *xv = mixed[3], *xa = mixed[4];
  const auto same = [](Vec x) { return x; };
  Products products = {parallel, n[6]};
  products(n[7], D, D, p[20], xr, r);
  products(n[8], D, D, p[21], xk, k);
  products(n[9], D, D, p[22], xv, value);
  products.low_rank(n[2], D, p[7], p[8], xw, hidden, lw, tanh_of);
  products.low_rank(n[3], D, p[10], p[11], xa, hidden, la, same);
  if (v0) products.low_rank(n[4], D, p[13], p[14], xv, hidden, lv, same);
  products.low_rank(n[5], D, p[15], p[16], mixed[5], hidden, g, sigmoid);

  const int64_t rows[] = {1, H, N}, sizes[] = {1, 1, H, N, N, 1};
  const float* gates[] = {lw, la, v0 ? lv : nullptr, k, value, in[3], w0, a0, v0, p[17], p[18]};
  float* found[] = {w, key, v, a, b};
  products.failed |= JOIN(gates7_forward, ISA)(parallel, rows, gates, found);
  const float* used = v0 ? v : value;
  const float* wkv[] = {r, w, key, used, a, b, in[2]};
  float* after[] = {y, out[1], nullptr, nullptr};
  products.failed |= JOIN(wkv7_forward, ISA)(parallel, sizes, wkv, after);
  const float* finish[] = {y, r, key, used, g, r_k, p[24], p[25], p[26]};
  products.failed |= JOIN(finish7_forward, ISA)(parallel, rows, finish, &z);
  products(n[10], D, D, p[23], z, out[0]);
  return products.failed;
}

// n: width, inner width, the format of the matrices, how key and value lie in memory. in: the token, the one before, their mix,
// key, value. out: y.
EXPORT(channel_mix7_token)(ParallelFor parallel, const int64_t* n, const float* const* in,
                           float* const* out) {
  const int64_t D = n[0], inner = n[1];
  Scratch scratch;
  scratch.floats(D), scratch.floats(inner);
  if (!scratch.allocate()) return 1;
  float *mixed = scratch.floats(D), *hidden = scratch.floats(inner);
  Products products = {parallel, n[2]};
  mix_token(in[0], in[1], in[2], D, mixed);
  products(n[3], inner, D, in[3], mixed, hidden);
  apply(hidden, inner, [](Vec x) {
    const Vec positive = relu(x);
    return positive * positive;
  });
  products(n[4], D, inner, in[4], hidden, out[0]);
  return products.failed;
}
