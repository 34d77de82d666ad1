// The rest of an RWKV-7 time mix: what lies between its linear maps and the recurrence (gates), and
// between the recurrence and the output map (finish). One pass over memory each way; the backward
// passes compute again what they need of the forward ones. Formulas: mixers/rwkv7.py.
//
// Gates, per channel of a head, u = k k_k and n = max(|u|, 1e-12) over the head:
//
//   w = -e^-½ σ(w0 + lw),  α = σ(a0 + la),  ν = σ(v0 + lv),  κ = u / n
//   v' = v + (v₁ - v) ν,   k' = k (1 - k_a + α k_a),   a = -κ,   b = κ α
//
//   dκ = α db - da,  du = (dκ - κ (κ·dκ)) / n,  dα = κ db + k k_a dk'
//   dk = (1 - k_a + α k_a) dk' + k_k du,  dk_k = Σ k du,  dk_a = Σ k (α - 1) dk'
//
// Finish, ŷ the head normalised, s = Σ r k r_k over the head:
//
//   out = z g,  z = ŷ γ + β + s v;   dz = g dgated,  dg = z dgated,  ds = v·dz
//   dy = (γ dz - mean(γ dz) - ŷ mean(ŷ γ dz)) / deviation,   dv = s dz
//   dr = ds k r_k,  dk = ds r r_k,  dr_k = Σ ds r k,  dγ = Σ ŷ dz,  dβ = Σ dz
//
// A head is a multiple of LANES channels; tokens in blocks as in token_mix.h.

#pragma once

#include "token_mix.h"

namespace {

INLINE Vec sigmoid(Vec x) {
  const Power e = power_of(-x);
  return 1.0f / (1.0f + (e.scale + e.scale * e.p));
}

INLINE float lanes_sum(Vec x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

INLINE void add(float* to, Vec x) { store(to, load(to) + x); }

constexpr float MAX_LOG_DECAY = 0.60653066f;  // e^-½

struct Gates7 {
  int64_t M, H, N;                                   // tokens, heads, head size
  const float *lw, *la, *lv, *k, *v, *first;         // [M, D]; lv and first are null in layer 0
  const float *w0, *a0, *v0, *k_k, *k_a;             // [D]
  float *w, *k_out, *v_out, *a, *b;                  // [M, D]

  bool range(int64_t begin, int64_t end) const {
    const int64_t stop = end * BLOCK < M ? end * BLOCK : M;
    for (int64_t row = begin * BLOCK * H; row < stop * H; row++) {
      const int64_t at = row * N, channel = row % H * N;
      Vec squares = {};
      for (int64_t d = 0; d < N; d += LANES) {
        const Vec u = load(k + at + d) * load(k_k + channel + d);
        squares += u * u;
      }
      const float square = lanes_sum(squares);
      const float inverse = square > 1e-24f ? 1.0f / __builtin_sqrtf(square) : 1e12f;
      for (int64_t d = 0; d < N; d += LANES) {
        const int64_t i = at + d, c = channel + d;
        const Vec key = load(k + i), share = load(k_a + c);
        const Vec alpha = sigmoid(load(a0 + c) + load(la + i));
        const Vec kappa = key * load(k_k + c) * inverse;
        store(w + i, -MAX_LOG_DECAY * sigmoid(load(w0 + c) + load(lw + i)));
        store(k_out + i, key * (1.0f - share + alpha * share));
        store(a + i, -kappa);
        store(b + i, kappa * alpha);
        if (lv) {
          const Vec value = load(v + i), nu = sigmoid(load(v0 + c) + load(lv + i));
          store(v_out + i, value + (load(first + i) - value) * nu);
        }
      }
    }
    return true;
  }
};

struct Gates7Backward {
  int64_t M, H, N;
  const float *lw, *la, *lv, *k, *v, *first, *w0, *a0, *v0, *k_k, *k_a;
  const float *dw, *dk_out, *dv_out, *da, *db;
  float *dlw, *dla, *dlv, *dk, *dv, *dfirst;  // [M, D]
  float* sums;                                // [blocks, 5, D]: w0 a0 v0 k_k k_a

  bool range(int64_t begin, int64_t end) const {
    const int64_t D = H * N;
    for (int64_t block = begin; block < end; block++) {
      float *dw0 = sums + block * 5 * D, *da0 = dw0 + D, *dv0 = da0 + D, *dk_k = dv0 + D;
      float* dk_a = dk_k + D;
      memset(dw0, 0, 4 * 5 * D);
      const int64_t stop = (block + 1) * BLOCK < M ? (block + 1) * BLOCK : M;
      for (int64_t row = block * BLOCK * H; row < stop * H; row++) {
        const int64_t at = row * N, channel = row % H * N;
        // alpha is kept where dla will be, dκ where dk will be
        Vec squares = {}, along = {};
        for (int64_t d = 0; d < N; d += LANES) {
          const int64_t i = at + d, c = channel + d;
          const Vec u = load(k + i) * load(k_k + c);
          const Vec alpha = sigmoid(load(a0 + c) + load(la + i));
          const Vec dkappa = alpha * load(db + i) - load(da + i);
          squares += u * u;
          along += u * dkappa;
          store(dla + i, alpha);
          store(dk + i, dkappa);
        }
        const float square = lanes_sum(squares);
        const float inverse = square > 1e-24f ? 1.0f / __builtin_sqrtf(square) : 1e12f;
        const float project = square > 1e-24f ? lanes_sum(along) * inverse * inverse : 0.0f;
        for (int64_t d = 0; d < N; d += LANES) {
          const int64_t i = at + d, c = channel + d;
          const Vec key = load(k + i), share = load(k_a + c), unit = load(k_k + c);
          const Vec alpha = load(dla + i), dkey = load(dk_out + i);
          const Vec u = key * unit, du = (load(dk + i) - u * project) * inverse;
          const Vec dalpha = u * inverse * load(db + i) + key * share * dkey;
          const Vec dlogit = dalpha * alpha * (1.0f - alpha);
          const Vec sigma = sigmoid(load(w0 + c) + load(lw + i));
          const Vec dlogit_w = -MAX_LOG_DECAY * load(dw + i) * sigma * (1.0f - sigma);
          store(dla + i, dlogit), add(da0 + c, dlogit);
          store(dlw + i, dlogit_w), add(dw0 + c, dlogit_w);
          store(dk + i, dkey * (1.0f - share + alpha * share) + du * unit);
          add(dk_k + c, key * du);
          add(dk_a + c, key * (alpha - 1.0f) * dkey);
          if (lv) {
            const Vec value = load(v + i), change = load(first + i) - value, dvalue = load(dv_out + i);
            const Vec nu = sigmoid(load(v0 + c) + load(lv + i));
            const Vec dlogit_v = dvalue * change * nu * (1.0f - nu);
            store(dlv + i, dlogit_v), add(dv0 + c, dlogit_v);
            store(dv + i, dvalue - dvalue * nu);
            store(dfirst + i, dvalue * nu);
          }
        }
      }
    }
    return true;
  }
};

struct Finish7 {
  int64_t M, H, N;
  const float *y, *r, *k, *v, *g;           // [M, D]
  const float *r_k, *weight, *bias, *eps;   // [D], [D], [D], [1]
  float* out;

  bool range(int64_t begin, int64_t end) const {
    const int64_t stop = end * BLOCK < M ? end * BLOCK : M;
    for (int64_t row = begin * BLOCK * H; row < stop * H; row++) {
      const int64_t at = row * N, channel = row % H * N;
      Vec total = {}, bonus = {}, squares = {};
      for (int64_t d = 0; d < N; d += LANES) {
        total += load(y + at + d);
        bonus += load(r + at + d) * load(k + at + d) * load(r_k + channel + d);
      }
      const float mean = lanes_sum(total) / N, s = lanes_sum(bonus);
      for (int64_t d = 0; d < N; d += LANES) {
        const Vec off = load(y + at + d) - mean;
        squares += off * off;
      }
      const float inverse = 1.0f / __builtin_sqrtf(lanes_sum(squares) / N + *eps);
      for (int64_t d = 0; d < N; d += LANES) {
        const Vec unit = (load(y + at + d) - mean) * inverse;
        const Vec z = unit * load(weight + channel + d) + load(bias + channel + d) +
                      load(v + at + d) * s;
        store(out + at + d, z * load(g + at + d));
      }
    }
    return true;
  }
};

struct Finish7Backward {
  int64_t M, H, N;
  const float *y, *r, *k, *v, *g, *r_k, *weight, *bias, *eps, *dgated;
  float *dy, *dr, *dk, *dv, *dg;  // [M, D]
  float* sums;                    // [blocks, 3, D]: r_k weight bias

  bool range(int64_t begin, int64_t end) const {
    const int64_t D = H * N;
    for (int64_t block = begin; block < end; block++) {
      float *dr_k = sums + block * 3 * D, *dweight = dr_k + D, *dbias = dweight + D;
      memset(dr_k, 0, 4 * 3 * D);
      const int64_t stop = (block + 1) * BLOCK < M ? (block + 1) * BLOCK : M;
      for (int64_t row = block * BLOCK * H; row < stop * H; row++) head(row, dr_k, dweight, dbias);
    }
    return true;
  }

  void head(int64_t row, float* dr_k, float* dweight, float* dbias) const {
    const int64_t at = row * N, channel = row % H * N;
    Vec total = {}, bonus = {}, squares = {}, dbonus = {}, plain = {}, along = {};
    for (int64_t d = 0; d < N; d += LANES) {
      const int64_t i = at + d;
      total += load(y + i);
      bonus += load(r + i) * load(k + i) * load(r_k + channel + d);
      dbonus += load(dgated + i) * load(g + i) * load(v + i);
    }
    const float mean = lanes_sum(total) / N, s = lanes_sum(bonus), ds = lanes_sum(dbonus);
    for (int64_t d = 0; d < N; d += LANES) {
      const Vec off = load(y + at + d) - mean;
      const Vec dunit = load(dgated + at + d) * load(g + at + d) * load(weight + channel + d);
      squares += off * off;
      plain += dunit;
      along += dunit * off;
    }
    const float inverse = 1.0f / __builtin_sqrtf(lanes_sum(squares) / N + *eps);
    const float mean_plain = lanes_sum(plain) / N;
    const float mean_along = lanes_sum(along) * inverse / N;
    for (int64_t d = 0; d < N; d += LANES) {
      const int64_t i = at + d, c = channel + d;
      const Vec unit = (load(y + i) - mean) * inverse, scale = load(weight + c);
      const Vec value = load(v + i), out = load(dgated + i), dz = out * load(g + i);
      store(dg + i, out * (unit * scale + load(bias + c) + value * s));
      store(dy + i, (dz * scale - mean_plain - unit * mean_along) * inverse);
      store(dv + i, dz * s);
      const Vec read = load(r + i), key = load(k + i), share = load(r_k + c);
      store(dr + i, key * share * ds);
      store(dk + i, read * share * ds);
      add(dr_k + c, read * key * ds);
      add(dweight + c, unit * dz);
      add(dbias + c, dz);
    }
  }
};

}  // namespace

EXPORT(gates7_forward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                       float* const* out) {
  Gates7 task = {n[0], n[1], n[2], in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7],
                 in[8], in[9], in[10], out[0], out[1], out[2], out[3], out[4]};
  return for_each(parallel, (n[0] + BLOCK - 1) / BLOCK, 60 * BLOCK * n[1] * n[2], task);
}

EXPORT(gates7_backward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                        float* const* out) {
  Gates7Backward task = {n[0], n[1], n[2], in[0], in[1], in[2], in[3], in[4], in[5], in[6],
                         in[7], in[8], in[9], in[10], in[11], in[12], in[13], in[14], in[15],
                         out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
  return for_each(parallel, (n[0] + BLOCK - 1) / BLOCK, 120 * BLOCK * n[1] * n[2], task);
}

EXPORT(finish7_forward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                        float* const* out) {
  Finish7 task = {n[0], n[1], n[2], in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8],
                  out[0]};
  return for_each(parallel, (n[0] + BLOCK - 1) / BLOCK, 20 * BLOCK * n[1] * n[2], task);
}

EXPORT(finish7_backward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                         float* const* out) {
  Finish7Backward task = {n[0], n[1], n[2], in[0], in[1], in[2], in[3], in[4], in[5], in[6],
                          in[7], in[8], in[9], out[0], out[1], out[2], out[3], out[4], out[5]};
  return for_each(parallel, (n[0] + BLOCK - 1) / BLOCK, 40 * BLOCK * n[1] * n[2], task);
}
