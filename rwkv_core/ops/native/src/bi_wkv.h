// Bidirectional WKV of a block of channels, ω = w/T and b = u/T already divided:
//
//   y_t = N_t / D_t,   (N, D)_t = Σ_{i≠t} e^{-(|t-i|-1) ω + k_i} (v_i, 1) + e^{b + k_t} (v_t, 1)
//
// Two sweeps over time, one each way, add up x_t = e^{k_t - max k} (v_t, 1):  P ← e^{-ω} P + x_t.
// The largest key keeps D above e^{-|w|}, so that no running maximum is needed while |w| and |u|
// stay within RANGE. Sums are in double: e^{-ω} rounded to fp32 would be wrong the same way T times
// over, and so would a sum of equal keys.
//
// The weights between tokens are symmetric, hence the adjoint is the same pair of sweeps. With
// e = e^{k - max k}, q = ∂y / D, and P[x], F[x] the sums of x before and after a token:
//
//   ∂v = e Q,   ∂k = e (v Q - R),   Q = P[q] + e^b q + F[q],   R the same of q y
//   ∂b = Σ q e^b e (v - y)
//   ∂ω = -e^{-ω} Σ (P[ev] F[q] - P[e] F[qy] + F[ev] P[q] - F[e] P[qy])
//
// where v and y are taken from the mean of v: no gradient depends on it, and averages far from zero
// would make small differences of large numbers.
//
// A first pass over the tokens leaves the sums at the start of every chunk of them; a second one
// goes back through the chunks, sweeps each both ways and joins the sums. What a chunk needs stays
// in the first cache.
//
// Channels out of RANGE take the careful way below: it carries the exponent of every sum.

#pragma once

#include <math.h>

#include "channels.h"

namespace {

constexpr float RANGE = 60.0f;
constexpr int64_t TOKENS = 64;  // of a chunk

struct BiWkv {
  int64_t B, T, C;
  const float *w, *u, *k, *v;
  float *y, *den, *centred;  // forward; the last two null unless a backward pass will follow:
  const float *kept_den, *kept_centred, *dy;  // D, and y from the mean of v
  float *dw, *du, *dk, *dv;

  int64_t blocks() const { return blocks_of(C); }
  int64_t chunks() const { return (T + TOKENS - 1) / TOKENS; }
  int64_t tokens(int64_t chunk) const {
    return (chunk + 1) * TOKENS < T ? TOKENS : T - chunk * TOKENS;
  }
  int64_t width(int64_t block) const { return width_of(block, C); }
  bool within_range(int64_t block) const {
    for (int64_t c = block * WIDTH; c < block * WIDTH + width(block); c++)
      if (!(fabsf(w[c]) <= RANGE && fabsf(u[c]) <= RANGE)) return false;
    return true;
  }
};

// ---- within the range --------------------------------------------------------------------------

// e^x for x ≤ 0; below -87 as at -87.
INLINE Vec weight_of(Vec x) {
  x = -87.0f > x ? all(-87.0f) : x;  // a NaN stays one
  const float shift = 12582912.0f;   // 1.5·2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + shift;
  const Vec f = x - (shifted - shift) * 0.693147182f;  // x - n ln 2, |f| ≤ ln 2 / 2
  Vec p = 0.00836878084f + f * 0.00138144672f;         // fitted, within 3e-9
  p = 0.0416683927f + f * p;
  p = 0.166665196f + f * p;
  p = 0.49999994f + f * p;
  p = 1.0f + f * p;
  p = 1.0f + f * p;
  return p * (Vec)(((Ints)shifted << 23) + (127 << 23));  // e^f 2^n
}

// Of every channel, two sums that fade alike: Σ x y and Σ x.
struct Sums {
  Half xy[HALVES], x[HALVES];
};
struct NarrowSums {
  float xy[WIDTH], x[WIDTH];
};

// Fade and add n tokens, one after the other or (Step = -1) the last one first, y from `middle`;
// write the sums as they were before each of them.
template <int Step, bool Write>
NOINLINE void sweep(int64_t n, const Half* fade, const Half* middle, Sums& sums, Rows x, Rows y,
                    NarrowSums* before) {
  Sums s = sums;
  Half f[HALVES];
  for (int i = 0; i < HALVES; i++) f[i] = fade[i];
  for (int64_t t = Step > 0 ? 0 : n - 1; 0 <= t && t < n; t += Step) {
    for (int i = 0; i < HALVES; i++) {
      if (Write) store_narrow(before[t].xy + i * HALF, narrowed(s.xy[i]));
      if (Write) store_narrow(before[t].x + i * HALF, narrowed(s.x[i]));
      const Half xi = widened(x[t] + i * HALF);
      s.xy[i] = f[i] * s.xy[i] + xi * (widened(y[t] + i * HALF) - middle[i]);
      s.x[i] = f[i] * s.x[i] + xi;
    }
  }
  sums = s;
}

struct BiWkvWork {
  Scratch scratch;
  Row *e, *q;             // [T]
  Row *k, *v, *y;         // [T], of a block that is not full
  Sums *kept_e, *kept_q;  // [chunks] the sums at the start of each
  NarrowSums *past_e, *future_e, *past_q, *future_q;  // [TOKENS]
  bool ready;

  explicit BiWkvWork(const BiWkv& f) {
    lay_out(f);
    ready = scratch.allocate();
    if (ready) lay_out(f);
  }
  void lay_out(const BiWkv& f) {
    const bool backward = f.dy, partial = f.C % WIDTH;
    const auto rows = [&](bool needed) { return (Row*)scratch.floats(needed ? f.T * WIDTH : 0); };
    e = rows(true), q = rows(backward);
    k = rows(partial), v = rows(partial), y = rows(partial && backward);
    Sums** kept[] = {&kept_e, &kept_q};
    for (Sums** sums : kept) *sums = (Sums*)scratch.floats(f.chunks() * sizeof(Sums) / 4);
    NarrowSums** sums[] = {&past_e, &future_e, &past_q, &future_q};
    for (NarrowSums** s : sums) *s = (NarrowSums*)scratch.floats(TOKENS * sizeof(NarrowSums) / 4);
  }
};

// A block of channels.
struct BiWkvBlock {
  const BiWkv& f;
  const BiWkvWork& m;
  int64_t width;
  Half fade[HALVES];  // e^{-ω}
  float own[WIDTH];   // e^b

  // of one sequence
  int64_t at;           // the first element
  float top[WIDTH];     // the largest key
  float mean[WIDTH];    // of the values
  Half middle[HALVES];  // the same
  Rows k, v, y, e, q;

  BiWkvBlock(const BiWkv& f, const BiWkvWork& m, int64_t block)
      : f(f), m(m), width(f.width(block)) {
    for (int64_t c = 0; c < WIDTH; c++) {
      const bool inside = c < width;
      fade[c / HALF][c % HALF] = inside ? exp(-(double)f.w[block * WIDTH + c] / f.T) : 0;
      own[c] = inside ? exp((double)f.u[block * WIDTH + c] / f.T) : 0;
    }
  }

  void start(int64_t b, int64_t block) {
    at = b * f.T * f.C + block * WIDTH;
    k = rows(f.k, m.k), v = rows(f.v, m.v);
    look();
    e = {m.e->x, WIDTH};
    if (!f.dy) return;
    y = rows(f.kept_centred, m.y);
    find_q();
    q = {m.q->x, WIDTH};
  }

  Rows rows(const float* from, Row* padded) const {
    if (width == WIDTH) return {from + at, f.C};
    pack(padded->x, WIDTH, from + at, f.C, f.T, width);
    return {padded->x, WIDTH};
  }

  // Find the largest key and the mean value.
  NOINLINE void look() {
    const float share = 1.0f / f.T;
    Vec top[VECTORS], mean[VECTORS] = {};
    for (int i = 0; i < VECTORS; i++) top[i] = load(k[0] + i * LANES);
    for (int64_t t = 0; t < f.T; t++) {
      for (int i = 0; i < VECTORS; i++) {
        const Vec x = load(k[t] + i * LANES);
        top[i] = x > top[i] ? x : top[i];
        mean[i] += load(v[t] + i * LANES) * share;
      }
    }
    for (int i = 0; i < VECTORS; i++) {
      store(this->top + i * LANES, top[i]);
      store(this->mean + i * LANES, mean[i]);
    }
    for (int i = 0; i < HALVES; i++) middle[i] = widened(this->mean + i * HALF);
  }

  // q = ∂y / D
  NOINLINE void find_q() const {
    Row* q = m.q;
    for (int64_t t = 0; t < f.T; t++) {
      const int64_t from = at + t * f.C;
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const Vec dy = load_some(f.dy + from + c, width - c);
        store(q[t].x + c, dy / load_some(f.kept_den + from + c, width - c));
      }
    }
  }

  // e = e^{k - max k} of n tokens
  NOINLINE void weigh(int64_t first, int64_t n) const {
    Row* e = m.e;
    Vec top[VECTORS];
    for (int i = 0; i < VECTORS; i++) top[i] = load(this->top + i * LANES);
    for (int64_t t = first; t < first + n; t++) {
      for (int i = 0; i < VECTORS; i++)
        store(e[t].x + i * LANES, weight_of(load(k[t] + i * LANES) - top[i]));
    }
  }

  // y from the sums
  NOINLINE void join(int64_t first, int64_t n) const {
    for (int64_t t = 0; t < n; t++) {
      const NarrowSums &past = m.past_e[t], &future = m.future_e[t];
      fetch(v[first + t - TOKENS], WIDTH);  // for the chunk before this one
      fetch(e[first + t - TOKENS], WIDTH);
      fetch(f.y + at + (first + t - TOKENS) * f.C, WIDTH);
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const Vec own = load(this->own + c) * load(e[first + t] + c);
        const Vec den = load(past.x + c) + load(future.x + c) + own;
        const Vec mean = load(this->mean + c), v = load(this->v[first + t] + c) - mean;
        const Vec y = (load(past.xy + c) + load(future.xy + c) + own * v) / den;
        const int64_t to = at + (first + t) * f.C + c;
        store_some(f.y + to, mean + y, width - c);
        if (!f.den) continue;
        store_some(f.den + to, den, width - c);
        store_some(f.centred + to, y, width - c);
      }
    }
  }

  void forward() const {
    Sums past = {}, future = {};
    for (int64_t chunk = 0; chunk < f.chunks(); chunk++) {
      m.kept_e[chunk] = past;
      const int64_t first = chunk * TOKENS;
      weigh(first, f.tokens(chunk));
      if (chunk + 1 == f.chunks()) break;
      sweep<1, false>(TOKENS, fade, middle, past, e.from(first), v.from(first), nullptr);
    }
    for (int64_t chunk = f.chunks() - 1; chunk >= 0; chunk--) {
      const int64_t first = chunk * TOKENS, n = f.tokens(chunk);
      sweep<1, true>(n, fade, middle, m.kept_e[chunk], e.from(first), v.from(first), m.past_e);
      sweep<-1, true>(n, fade, middle, future, e.from(first), v.from(first), m.future_e);
      join(first, n);
    }
  }

  // The gradients from the sums; adds those of decay and bonus to dw and du.
  NOINLINE void join_gradients(int64_t first, int64_t n, double* dw, double* du) const {
    Vec dfade[VECTORS] = {}, down[VECTORS] = {};
    for (int64_t t = 0; t < n; t++) {
      const NarrowSums &past_e = m.past_e[t], &future_e = m.future_e[t];
      const NarrowSums &past_q = m.past_q[t], &future_q = m.future_q[t];
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const Vec own = load(this->own + c), e = load(this->e[first + t] + c);
        const Vec v = load(this->v[first + t] + c) - load(mean + c);
        const Vec y = load(this->y[first + t] + c);
        const Vec q = load(this->q[first + t] + c);
        const Vec past_Q = load(past_q.x + c), future_Q = load(future_q.x + c);
        const Vec past_R = load(past_q.xy + c), future_R = load(future_q.xy + c);
        const Vec Q = past_Q + future_Q + own * q;
        const Vec R = past_R + future_R + own * q * y;
        const int64_t to = at + (first + t) * f.C + c;
        store_some(f.dv + to, e * Q, width - c);
        store_some(f.dk + to, e * (v * Q - R), width - c);
        down[c / LANES] += e * q * (v - y);
        dfade[c / LANES] += (load(past_e.xy + c) * future_Q - load(past_e.x + c) * future_R) +
                            (load(future_e.xy + c) * past_Q - load(future_e.x + c) * past_R);
      }
    }
    for (int64_t c = 0; c < width; c++) {
      dw[c] -= fade[c / HALF][c % HALF] * dfade[c / LANES][c % LANES];
      du[c] += own[c] * down[c / LANES][c % LANES];
    }
  }

  void backward(double* dw, double* du) const {
    const Half zero[HALVES] = {};
    Sums past_e = {}, future_e = {}, past_q = {}, future_q = {};
    for (int64_t chunk = 0; chunk < f.chunks(); chunk++) {
      const int64_t first = chunk * TOKENS;
      m.kept_e[chunk] = past_e, m.kept_q[chunk] = past_q;
      weigh(first, f.tokens(chunk));
      if (chunk + 1 == f.chunks()) break;
      sweep<1, false>(TOKENS, fade, middle, past_e, e.from(first), v.from(first), nullptr);
      sweep<1, false>(TOKENS, fade, zero, past_q, q.from(first), y.from(first), nullptr);
    }
    for (int64_t chunk = f.chunks() - 1; chunk >= 0; chunk--) {
      const int64_t first = chunk * TOKENS, n = f.tokens(chunk);
      const Rows e = this->e.from(first), v = this->v.from(first);
      const Rows q = this->q.from(first), y = this->y.from(first);
      sweep<1, true>(n, fade, middle, m.kept_e[chunk], e, v, m.past_e);
      sweep<1, true>(n, fade, zero, m.kept_q[chunk], q, y, m.past_q);
      sweep<-1, true>(n, fade, middle, future_e, e, v, m.future_e);
      sweep<-1, true>(n, fade, zero, future_q, q, y, m.future_q);
      join_gradients(first, n, dw, du);
    }
  }
};

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

// One channel of one sequence: y, and for every token the logarithm `scale` of the scale of its
// sums, its denominator and slope on that scale. T-long arrays; k and v are C apart.
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

struct BiWkvForward {
  BiWkv f;

  bool range(int64_t begin, int64_t end) const {
    BiWkvWork work(f);
    if (!work.ready) return false;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / f.blocks(), block = i % f.blocks();
      if (!f.within_range(block)) {
        if (!bi_wkv_forward_careful(f, b, block)) return false;
        continue;
      }
      BiWkvBlock one(f, work, block);
      one.start(b, block);
      one.forward();
    }
    return true;
  }
};

// One thread takes a block through all sequences, so that the sums over them have one order.
struct BiWkvBackward {
  BiWkv f;

  bool range(int64_t begin, int64_t end) const {
    BiWkvWork work(f);
    if (!work.ready) return false;
    for (int64_t block = begin; block < end; block++) {
      double dw[WIDTH] = {}, du[WIDTH] = {};
      if (f.within_range(block)) {
        BiWkvBlock one(f, work, block);
        for (int64_t b = 0; b < f.B; b++) {
          one.start(b, block);
          one.backward(dw, du);
        }
      } else {
        for (int64_t b = 0; b < f.B; b++)
          if (!bi_wkv_backward_careful(f, b, block, dw, du)) return false;
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
  f.y = out[0], f.den = out[1], f.centred = out[2];
  return for_each(parallel, f.B * f.blocks(), 10 * f.T * WIDTH, BiWkvForward{f});
}

EXPORT(bi_wkv_backward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                        float* const* out) {
  BiWkv f = {};
  f.B = sizes[0], f.T = sizes[1], f.C = sizes[2];
  f.w = in[0], f.u = in[1], f.k = in[2], f.v = in[3];
  f.kept_den = in[4], f.kept_centred = in[5], f.dy = in[6];
  f.dw = out[0], f.du = out[1], f.dk = out[2], f.dv = out[3];
  return for_each(parallel, f.blocks(), 40 * f.B * f.T * WIDTH, BiWkvBackward{f});
}
