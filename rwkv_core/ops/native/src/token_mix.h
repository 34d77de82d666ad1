// What every layer does to tokens before its linear maps, in one pass over memory each way.
//
// Token mix:  out_n = x + (x⁻ - x) μ_n, x⁻ the token before. Backward, with p_t = Σ_n g_n,t μ_n:
//
//   dx_t = Σ_n g_n,t - p_t + p_{t+1},   dμ_n = Σ_t g_n (x⁻ - x),   dlast = p_0
//
// Tokens are worked on in blocks of BLOCK, each with a sum of its own for every parameter; the caller
// adds them up in order, so that the number of threads plays no part.

#pragma once

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 64;  // tokens
constexpr int MIXES = 6;       // at most

struct TokenMix {
  int64_t B, T, D, N;
  const float *x, *last, *mix;  // [B, T, D], [B, D], [N, D]
  float* out[MIXES];            // [B, T, D] each

  int64_t blocks() const { return (T + BLOCK - 1) / BLOCK; }

  bool range(int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; at++) {
      const int64_t batch = at / blocks(), first = at % blocks() * BLOCK;
      for (int64_t t = first; t < T && t < first + BLOCK; t++) {
        const int64_t row = (batch * T + t) * D;
        const float* before = t ? x + row - D : last + batch * D;
        each_vector(D, [&](int64_t d, auto read, auto write) {
          const Vec now = read(x + row + d), change = read(before + d) - now;
          for (int64_t n = 0; n < N; n++)
            write(out[n] + row + d, now + change * read(mix + n * D + d));
        });
      }
    }
    return true;
  }
};

struct TokenMixBackward {
  int64_t B, T, D, N;
  const float *x, *last, *mix;
  const float* grad[MIXES];  // [B, T, D] each; null where nothing depends on that output
  float *dx, *dlast, *dmix;  // [B, T, D], [B, D], [B · blocks, N, D]

  int64_t blocks() const { return (T + BLOCK - 1) / BLOCK; }

  bool range(int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; at++) {
      const int64_t batch = at / blocks(), first = at % blocks() * BLOCK;
      float* sums = dmix + at * N * D;
      memset(sums, 0, 4 * N * D);
      for (int64_t t = first; t < T && t < first + BLOCK; t++) {
        const int64_t row = (batch * T + t) * D;
        const float* before = t ? x + row - D : last + batch * D;
        each_vector(D, [&](int64_t d, auto read, auto write) {
          const Vec change = read(before + d) - read(x + row + d);
          Vec own = {}, handed_back = {};
          for (int64_t n = 0; n < N; n++) {
            if (!grad[n]) continue;
            const Vec share = read(mix + n * D + d), g = read(grad[n] + row + d);
            own += g - g * share;
            handed_back += g * share;
            if (t + 1 < T) own += read(grad[n] + row + D + d) * share;
            write(sums + n * D + d, read(sums + n * D + d) + g * change);
          }
          write(dx + row + d, own);
          if (t == 0) write(dlast + batch * D + d, handed_back);
        });
      }
    }
    return true;
  }
};

INLINE Vec relu(Vec x) { return x < 0.0f ? Vec{} : x; }  // a NaN stays one

// relu(x)², and its derivative 2 relu(x).
struct SquaredRelu {
  int64_t n;
  const float *x, *grad;  // grad is null in the forward pass
  float* out;

  static constexpr int64_t SPAN = 1 << 14;  // floats of one task

  bool range(int64_t begin, int64_t end) const {
    const int64_t stop = end * SPAN < n ? end * SPAN : n;
    const float *from = x + begin * SPAN, *back = grad ? grad + begin * SPAN : nullptr;
    float* to = out + begin * SPAN;
    each_vector(stop - begin * SPAN, [&](int64_t i, auto read, auto write) {
      const Vec positive = relu(read(from + i));
      write(to + i, back ? 2.0f * positive * read(back + i) : positive * positive);
    });
    return true;
  }
};

}  // namespace

EXPORT(token_mix_forward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                          float* const* out) {
  TokenMix task = {n[0], n[1], n[2], n[3], in[0], in[1], in[2], {}};
  for (int64_t i = 0; i < task.N; i++) task.out[i] = out[i];
  return for_each(parallel, task.B * task.blocks(), BLOCK * task.D * task.N, task);
}

EXPORT(token_mix_backward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                           float* const* out) {
  TokenMixBackward task = {n[0], n[1], n[2], n[3], in[0], in[1], in[2], {}, out[0], out[1], out[2]};
  for (int64_t i = 0; i < task.N; i++) task.grad[i] = in[3 + i];
  return for_each(parallel, task.B * task.blocks(), 3 * BLOCK * task.D * task.N, task);
}

EXPORT(squared_relu)(ParallelFor parallel, const int64_t* n, const float* const* in,
                     float* const* out) {
  SquaredRelu task = {n[0], in[0], in[1], out[0]};
  return for_each(parallel, (n[0] + task.SPAN - 1) / task.SPAN, task.SPAN, task);
}
