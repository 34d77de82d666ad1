// Bidirectional WKV of a block of channels, ω = w/T and b = u/T already divided:
//
//   y_t = N_t / D_t,   (N, D)_t = Σ_{i≠t} e^{-(|t-i|-1) ω + k_i} (v_i, 1) + e^{b + k_t} (v_t, 1)
//
// Two sweeps over time, one each way, add up x_t = e^{k_t - max k} (v_t, 1):  P ← e^{-ω} P + x_t. The
// largest key keeps D above e^{-|w|}, so that no running maximum is needed while |w| and |u| stay
// within RANGE. Sums are in double: e^{-ω} rounded to fp32 would be wrong the same way T times over.
//
// The weights between tokens are symmetric, hence the adjoint is the same pair of sweeps. With
// q = ∂y / D and Q, R the two sums of q and of q y in place of x:
//
//   ∂v = e Q,   ∂k = e (v Q - R),   ∂b = Σ q e^b e (v - y),   ∂ω = -Σ q (M[e v] - y M[e])
//
// where M weighs every term of P by its number of decays: M ← e^{-ω} (M + P). The forward pass keeps
// D and the last bracket.
//
// Channels out of RANGE take the careful way below: it carries the exponent of every sum.

#pragma once

#include <math.h>

#include "simd.h"

namespace {

constexpr float RANGE = 60.0f;
constexpr int64_t WIDTH = 16;  // channels of a block: a cache line

struct BiWkv {
  int64_t B, T, C;
  const float *w, *u, *k, *v;
  float *y, *den, *slope;  // forward; the last two null unless a backward pass will follow
  const float *kept_y, *kept_den, *kept_slope, *dy;  // backward
  float *dw, *du, *dk, *dv;

  int64_t blocks() const { return (C + WIDTH - 1) / WIDTH; }
  int64_t width(int64_t block) const {
    return (block + 1) * WIDTH < C ? WIDTH : C - block * WIDTH;
  }
  bool within_range(int64_t block) const {
    for (int64_t c = block * WIDTH; c < block * WIDTH + width(block); c++)
      if (!(fabsf(w[c]) <= RANGE && fabsf(u[c]) <= RANGE)) return false;
    return true;
  }
};

struct Row {
  float x[WIDTH];
};

// In whole vectors: memcpy moves 16 bytes at a time, which a wider load then has to wait for.
INLINE void copy(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(to + i, load(from + i));
}

INLINE Row row_at(const float* from, int64_t width) {
  Row row;
  if (width == WIDTH) {
    copy(row.x, from, WIDTH);
  } else {
    for (int c = 0; c < WIDTH; c++) row.x[c] = c < width ? from[c] : 0;
  }
  return row;
}

INLINE void put(float* to, const float* x, int64_t width) {
  if (width == WIDTH)
    copy(to, x, WIDTH);
  else
    memcpy(to, x, 4 * width);
}

// e^{k - top} in place.
INLINE void weigh(float* k, const float* top) {
  for (int c = 0; c < WIDTH; c += LANES) {
    const Power e = power_of(load(k + c) - load(top + c));
    store(k + c, e.scale + e.scale * e.p);
  }
}

// Two sums that fade together, of every channel, and the same with each term times its decays.
struct Sums {
  double num[WIDTH], den[WIDTH], num_slope[WIDTH], den_slope[WIDTH];
};

template <bool Slope>
INLINE void fade_and_add(Sums& s, const double* __restrict fade, const double* __restrict num,
                         const double* __restrict den) {
  for (int c = 0; c < WIDTH; c++) {
    if (Slope) s.num_slope[c] = fade[c] * (s.num_slope[c] + s.num[c]);
    if (Slope) s.den_slope[c] = fade[c] * (s.den_slope[c] + s.den[c]);
    s.num[c] = fade[c] * s.num[c] + num[c];
    s.den[c] = fade[c] * s.den[c] + den[c];
  }
}

template <bool Slope>
INLINE void remember(Sums& to, const Sums& s) {
  copy((float*)&to, (const float*)&s, (Slope ? sizeof s : sizeof s.num + sizeof s.den) / 4);
}

INLINE void constants(const BiWkv& f, int64_t block, double* fade, double* own) {
  for (int64_t c = 0; c < WIDTH; c++) {
    const bool inside = c < f.width(block);
    fade[c] = inside ? exp(-(double)f.w[block * WIDTH + c] / f.T) : 0;
    own[c] = inside ? exp((double)f.u[block * WIDTH + c] / f.T) : 0;
  }
}

INLINE void largest(const BiWkv& f, const float* k, int64_t width, float* top) {
  memset(top, 0, 4 * WIDTH);
  memcpy(top, k, 4 * width);
  for (int64_t t = 1; t < f.T; t++) {
    const Row row = row_at(k + t * f.C, width);
    for (int c = 0; c < WIDTH; c += LANES) {
      const Vec x = load(row.x + c), best = load(top + c);
      store(top + c, x > best ? x : best);
    }
  }
}

// One block of one sequence; `past` holds the sums before every token, `e` the weights.
template <bool Keep>
void bi_wkv_forward_block(const BiWkv& f, int64_t b, int64_t block, Sums* past, Row* e) {
  const int64_t T = f.T, width = f.width(block), at = b * T * f.C + block * WIDTH;
  double fade[WIDTH], own[WIDTH], x[WIDTH], weight[WIDTH];
  float top[WIDTH];
  constants(f, block, fade, own);
  largest(f, f.k + at, width, top);
  Sums sums = {};
  for (int64_t t = 0; t < T; t++) {
    remember<Keep>(past[t], sums);
    e[t] = row_at(f.k + at + t * f.C, width);
    weigh(e[t].x, top);
    const Row v = row_at(f.v + at + t * f.C, width);
    for (int c = 0; c < WIDTH; c++) weight[c] = e[t].x[c], x[c] = weight[c] * v.x[c];
    fade_and_add<Keep>(sums, fade, x, weight);
  }
  sums = {};
  for (int64_t t = T - 1; t >= 0; t--) {
    const Row v = row_at(f.v + at + t * f.C, width);
    Row y, den, slope;
    for (int c = 0; c < WIDTH; c++) {
      weight[c] = e[t].x[c], x[c] = weight[c] * v.x[c];
      const double d = past[t].den[c] + sums.den[c] + own[c] * weight[c];
      const double n = past[t].num[c] + sums.num[c] + own[c] * x[c];
      const double mean = Keep ? n / d : 0;
      y.x[c] = (float)n / (float)d;
      if (Keep) den.x[c] = d;
      if (Keep)
        slope.x[c] = (past[t].num_slope[c] + sums.num_slope[c]) -
                     mean * (past[t].den_slope[c] + sums.den_slope[c]);
    }
    put(f.y + at + t * f.C, y.x, width);
    if (Keep) put(f.den + at + t * f.C, den.x, width);
    if (Keep) put(f.slope + at + t * f.C, slope.x, width);
    fade_and_add<Keep>(sums, fade, x, weight);
  }
}

// The same for the gradients; adds those of decay and bonus to dw and du.
void bi_wkv_backward_block(const BiWkv& f, int64_t b, int64_t block, Sums* past, Row* e, double* dw,
                           double* du) {
  const int64_t T = f.T, width = f.width(block), at = b * T * f.C + block * WIDTH;
  double fade[WIDTH], own[WIDTH], q[WIDTH], qy[WIDTH];
  float top[WIDTH];
  constants(f, block, fade, own);
  largest(f, f.k + at, width, top);
  Sums sums = {};
  for (int64_t t = 0; t < T; t++) {
    const int64_t here = at + t * f.C;
    remember<false>(past[t], sums);
    e[t] = row_at(f.k + here, width);
    weigh(e[t].x, top);
    const Row dy = row_at(f.dy + here, width), y = row_at(f.kept_y + here, width);
    Row den = row_at(f.kept_den + here, width);
    const Row v = row_at(f.v + here, width), slope = row_at(f.kept_slope + here, width);
    for (int64_t c = width; c < WIDTH; c++) den.x[c] = 1;
    for (int c = 0; c < WIDTH; c++) {
      q[c] = (double)dy.x[c] / den.x[c], qy[c] = q[c] * y.x[c];
      dw[c] -= q[c] * slope.x[c];
      du[c] += q[c] * own[c] * e[t].x[c] * ((double)v.x[c] - y.x[c]);
    }
    fade_and_add<false>(sums, fade, q, qy);
  }
  sums = {};
  for (int64_t t = T - 1; t >= 0; t--) {
    const int64_t here = at + t * f.C;
    const Row dy = row_at(f.dy + here, width), y = row_at(f.kept_y + here, width);
    const Row v = row_at(f.v + here, width);
    Row den = row_at(f.kept_den + here, width), dk, dv;
    for (int64_t c = width; c < WIDTH; c++) den.x[c] = 1;
    for (int c = 0; c < WIDTH; c++) {
      q[c] = (double)dy.x[c] / den.x[c], qy[c] = q[c] * y.x[c];
      const double Q = past[t].num[c] + sums.num[c] + own[c] * q[c];
      const double R = past[t].den[c] + sums.den[c] + own[c] * qy[c];
      dv.x[c] = e[t].x[c] * Q;
      dk.x[c] = e[t].x[c] * (v.x[c] * Q - R);
    }
    put(f.dk + here, dk.x, width);
    put(f.dv + here, dv.x, width);
    fade_and_add<false>(sums, fade, q, qy);
  }
}

// ---- any decay ---------------------------------------------------------------------------------

// Sums as num·e^top and so on: nothing overflows, whatever the decay.
struct Scaled {
  double num = 0, den = 0, num_slope = 0, den_slope = 0, top = -INFINITY;

  // What this is worth on the scale e^other.
  double on(double x, double other) const { return x ? x * exp(top - other) : 0; }

  void fade_and_add(double decay, double exponent, double new_num, double new_den) {
    const double best = fmax(top - decay, exponent);
    const double keep = exp(top - decay - best), add = exp(exponent - best);
    num_slope = keep * (num_slope + num), den_slope = keep * (den_slope + den);
    num = keep * num + add * new_num, den = keep * den + add * new_den;
    top = best;
  }
};

// One channel of one sequence: y, and for every token the logarithm `scale` of the scale of its sums,
// its denominator and slope on that scale. T-long arrays, `stride` apart for y, k and v.
void bi_wkv_careful(const BiWkv& f, const float* k, const float* v, double decay, double bonus,
                    Scaled* past, double* y, double* scale, double* den, double* slope) {
  Scaled sums;
  for (int64_t t = 0; t < f.T; t++) {
    past[t] = sums;
    sums.fade_and_add(decay, k[t * f.C], v[t * f.C], 1);
  }
  sums = Scaled();
  for (int64_t t = f.T - 1; t >= 0; t--) {
    const Scaled& p = past[t];
    const double now = bonus + k[t * f.C];
    const double best = scale[t] = fmax(fmax(p.top, sums.top), now), own = exp(now - best);
    den[t] = p.on(p.den, best) + sums.on(sums.den, best) + own;
    y[t] = (p.on(p.num, best) + sums.on(sums.num, best) + own * v[t * f.C]) / den[t];
    slope[t] = p.on(p.num_slope, best) + sums.on(sums.num_slope, best) -
               y[t] * (p.on(p.den_slope, best) + sums.on(sums.den_slope, best));
    sums.fade_and_add(decay, k[t * f.C], v[t * f.C], 1);
  }
}

struct Careful {
  Scratch scratch;
  Scaled* past;
  double *y, *scale, *den, *slope;
  bool ready;

  explicit Careful(int64_t T) {
    lay_out(T);
    ready = scratch.allocate();
    if (ready) lay_out(T);
  }
  void lay_out(int64_t T) {
    past = (Scaled*)scratch.floats(T * sizeof(Scaled) / 4);
    double** rows[] = {&y, &scale, &den, &slope};
    for (double** row : rows) *row = (double*)scratch.floats(2 * T);
  }
};

bool bi_wkv_forward_careful(const BiWkv& f, int64_t b, int64_t block) {
  Careful work(f.T);
  if (!work.ready) return false;
  for (int64_t c = block * WIDTH; c < block * WIDTH + f.width(block); c++) {
    const int64_t at = b * f.T * f.C + c;
    bi_wkv_careful(f, f.k + at, f.v + at, (double)f.w[c] / f.T, (double)f.u[c] / f.T, work.past,
                   work.y, work.scale, work.den, work.slope);
    for (int64_t t = 0; t < f.T; t++) f.y[at + t * f.C] = work.y[t];
  }
  return true;
}

bool bi_wkv_backward_careful(const BiWkv& f, int64_t b, int64_t block, double* dw, double* du) {
  Careful work(f.T);
  if (!work.ready) return false;
  for (int64_t c = 0; c < f.width(block); c++) {
    const int64_t channel = block * WIDTH + c, at = b * f.T * f.C + channel;
    const double decay = (double)f.w[channel] / f.T, bonus = (double)f.u[channel] / f.T;
    bi_wkv_careful(f, f.k + at, f.v + at, decay, bonus, work.past, work.y, work.scale, work.den,
                   work.slope);
    Scaled sums;
    for (int64_t t = 0; t < f.T; t++) {
      work.past[t] = sums;
      const double q = f.dy[at + t * f.C] / work.den[t];
      const double own = exp(bonus + f.k[at + t * f.C] - work.scale[t]);
      dw[c] -= q * work.slope[t];
      du[c] += q * own * (f.v[at + t * f.C] - work.y[t]);
      sums.fade_and_add(decay, -work.scale[t], q, q * work.y[t]);
    }
    sums = Scaled();
    for (int64_t t = f.T - 1; t >= 0; t--) {
      const Scaled& p = work.past[t];
      const double q = f.dy[at + t * f.C] / work.den[t], k = f.k[at + t * f.C];
      const double own = exp(bonus + k - work.scale[t]);
      const double Q = p.on(p.num, -k) + sums.on(sums.num, -k) + own * q;
      const double R = p.on(p.den, -k) + sums.on(sums.den, -k) + own * q * work.y[t];
      f.dv[at + t * f.C] = Q;
      f.dk[at + t * f.C] = f.v[at + t * f.C] * Q - R;
      sums.fade_and_add(decay, -work.scale[t], q, q * work.y[t]);
    }
  }
  return true;
}

// ---- all blocks --------------------------------------------------------------------------------

struct BiWkvWork {
  Scratch scratch;
  Sums* past;
  Row* e;
  bool ready;

  explicit BiWkvWork(int64_t T) {
    lay_out(T);
    ready = scratch.allocate();
    if (ready) lay_out(T);
  }
  void lay_out(int64_t T) {
    past = (Sums*)scratch.floats(T * sizeof(Sums) / 4);
    e = (Row*)scratch.floats(T * sizeof(Row) / 4);
  }
};

struct BiWkvForward {
  BiWkv f;

  bool range(int64_t begin, int64_t end) const {
    BiWkvWork work(f.T);
    if (!work.ready) return false;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / f.blocks(), block = i % f.blocks();
      if (!f.within_range(block)) {
        if (!bi_wkv_forward_careful(f, b, block)) return false;
      } else if (f.den) {
        bi_wkv_forward_block<true>(f, b, block, work.past, work.e);
      } else {
        bi_wkv_forward_block<false>(f, b, block, work.past, work.e);
      }
    }
    return true;
  }
};

// One thread takes a block through all sequences, so that the sums over them have one order.
struct BiWkvBackward {
  BiWkv f;

  bool range(int64_t begin, int64_t end) const {
    BiWkvWork work(f.T);
    if (!work.ready) return false;
    for (int64_t block = begin; block < end; block++) {
      double dw[WIDTH] = {}, du[WIDTH] = {};
      for (int64_t b = 0; b < f.B; b++) {
        if (f.within_range(block))
          bi_wkv_backward_block(f, b, block, work.past, work.e, dw, du);
        else if (!bi_wkv_backward_careful(f, b, block, dw, du))
          return false;
      }
      for (int64_t c = 0; c < f.width(block); c++) {
        f.dw[block * WIDTH + c] = dw[c] / f.T;
        f.du[block * WIDTH + c] = du[c] / f.T;
      }
    }
    return true;
  }
};

}  // namespace

EXPORT(bi_wkv_forward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                       float* const* out) {
  BiWkv f = {};
  f.B = sizes[0], f.T = sizes[1], f.C = sizes[2];
  f.w = in[0], f.u = in[1], f.k = in[2], f.v = in[3];
  f.y = out[0], f.den = out[1], f.slope = out[2];
  return for_each(parallel, f.B * f.blocks(), 20 * f.T * WIDTH, BiWkvForward{f});
}

EXPORT(bi_wkv_backward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                        float* const* out) {
  BiWkv f = {};
  f.B = sizes[0], f.T = sizes[1], f.C = sizes[2];
  f.w = in[0], f.u = in[1], f.k = in[2], f.v = in[3];
  f.kept_y = in[4], f.kept_den = in[5], f.kept_slope = in[6], f.dy = in[7];
  f.dw = out[0], f.du = out[1], f.dk = out[2], f.dv = out[3];
  return for_each(parallel, f.blocks(), 40 * f.B * f.T * WIDTH, BiWkvBackward{f});
}
