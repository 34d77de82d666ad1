// WKV-4 of a block of channels, token by token:
//
//   y_t = (a_t + e^{u + k_t} v_t) / (b_t + e^{u + k_t})
//   a_{t+1} = e^w a_t + e^{k_t} v_t,   b_{t+1} = e^w b_t + e^{k_t}
//
// Every exponential is a mantissa and a whole exponent, e^k = m 2^n, and every channel's sums are
// on a scale 2^s of their own. A scale moves by whole numbers: no digit is lost, nothing overflows.
//
//   s_{t+1} = max(s_t + n_w, n_k)
//   now = m_k m_u 2^{n_k + n_u - s_t},   add = m_k 2^{n_k - s_{t+1}}
//   keep = m_w 2^{s_t + n_w - s_{t+1}}
//   y = (a + now v) / (b + now),   a ← keep a + add v,   b ← keep b + add
//
// The adjoint, with q = ∂y / (b + now) and ∂a, ∂b those after the token:
//
//   ∂v = now q + add ∂a,   ∂k = now q (v - y) + add (v ∂a + ∂b)
//   ∂u = Σ now q (v - y),   ∂w = Σ keep (a ∂a + b ∂b)
//   ∂a ← keep ∂a + q,   ∂b ← keep ∂b - q y
//
// m_w fades or grows the sums without moving the scale. At the start of every chunk of tokens it is
// moved so that 1 ≤ b < 2, and the sums are kept for the backward pass. They are kept in double: while
// the keys are negligible y stays the same, and only if it does to the last digit is ∂w free of it.

#pragma once

#include "channels.h"

namespace {

INLINE Ints at_least(Ints n, int limit) { return n < limit ? Ints{} + limit : n; }
INLINE Ints at_most(Ints n, int limit) { return n > limit ? Ints{} + limit : n; }

// 2^n; 0 for n < -126, and no more than 2^127.
INLINE Vec power_of_two(Ints n) { return (Vec)((at_most(at_least(n, -127), 127) + 127) << 23); }

// e^x = (1 + p) 2^n, |p| < 0.42; beyond ±1e6 as there.
struct Split {
  Vec p;
  Ints n;
};

INLINE Split split(Vec x) {
  x = x > 1e6f ? all(1e6f) : x;  // a NaN passes both and stays one
  x = x < -1e6f ? all(-1e6f) : x;
  const float shift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec f = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, |f| ≤ ln 2 / 2
  Vec p = 0.00836878084f + f * 0.00138144672f;              // fitted, within 3e-9
  p = 0.0416683927f + f * p;
  p = 0.166665196f + f * p;
  p = 0.49999994f + f * p;
  return {f + f * f * p, (Ints)shifted - (Ints)all(shift)};
}

// (1 + p) of e^x in double: that of a decay counts once for every token it lasts.
INLINE Half mantissa(Half x, Half n) {
  const Half f = x - n * 0.69314718055994530942;
  Half m = 1.0 - Half{};
  for (int i = 10; i > 0; i--) m = 1.0 + f * m * (1.0 / i);  // within 1e-12
  return m;
}

constexpr int64_t KEPT = 5 * WIDTH;  // floats that hold a, b and s

struct Wkv4 {
  int64_t B, T, C, L;  // L tokens of a chunk
  const float *w, *u, *k, *v, *num, *den, *max;
  float *y, *last_num, *last_den, *last_max;  // forward
  float* states;  // null unless a backward pass will follow: [B, chunks, blocks, KEPT]
  const float *kept, *kept_max, *dy, *dlast_num, *dlast_den;  // backward
  float *dw, *du, *dk, *dv, *dnum, *dden, *dmax;              // dw and du [B, C]

  int64_t blocks() const { return blocks_of(C); }
  int64_t chunks() const { return (T + L - 1) / L; }
};

// What a token does to the sums; keep without m_w.
struct Wkv4Step {
  float now[WIDTH], keep[WIDTH], add[WIDTH];
};

// The sums, or their gradients.
struct Wkv4Sums {
  Half a[HALVES], b[HALVES];
};

struct Wkv4Work {
  Scratch scratch;
  Wkv4Step* steps;                // [L]
  Wkv4Sums* before;               // [L] the sums before every token
  Row *k, *v, *y, *dy, *dk, *dv;  // [L], of a block that is not full
  bool ready;

  explicit Wkv4Work(const Wkv4& f) {
    lay_out(f);
    ready = scratch.allocate();
    if (ready) lay_out(f);
  }
  void lay_out(const Wkv4& f) {
    steps = (Wkv4Step*)scratch.floats(f.L * sizeof(Wkv4Step) / 4);
    before = (Wkv4Sums*)scratch.floats(f.dy ? f.L * sizeof(Wkv4Sums) / 4 : 0);
    Row** rows[] = {&k, &v, &y, &dy, &dk, &dv};
    for (Row** row : rows) *row = (Row*)scratch.floats(f.C % WIDTH ? f.L * WIDTH : 0);
  }
};

// A block of channels of one sequence.
struct Wkv4Block {
  const Wkv4& f;
  const Wkv4Work& m;
  int64_t b, first, width;  // the sequence, the first channel, the number of channels
  Vec w[VECTORS], m_u[VECTORS];
  Half m_w[HALVES];
  Ints n_w[VECTORS], n_u[VECTORS];
  Ints scale[VECTORS];  // s
  Vec top[VECTORS];     // the largest key by the end: the caller's state is on the scale e^top

  Wkv4Block(const Wkv4& f, const Wkv4Work& m, int64_t index)
      : f(f), m(m), b(index / f.blocks()), first(index % f.blocks() * WIDTH),
        width(width_of(index % f.blocks(), f.C)) {
    Row x, n;
    for (int i = 0; i < VECTORS; i++) {
      w[i] = load_some(f.w + first + i * LANES, width - i * LANES);
      const Vec within = w[i] < -1e6f ? all(-1e6f) : w[i];
      const Split of_w = split(w[i]);
      const Split of_u = split(load_some(f.u + first + i * LANES, width - i * LANES));
      n_w[i] = of_w.n, n_u[i] = of_u.n, m_u[i] = 1.0f + of_u.p;
      store(x.x + i * LANES, within);
      store(n.x + i * LANES, __builtin_convertvector(of_w.n, Vec));
    }
    for (int i = 0; i < HALVES; i++)
      m_w[i] = mantissa(widened(x.x + i * HALF), widened(n.x + i * HALF));
  }

  int64_t tokens(int64_t chunk) const {
    return (chunk + 1) * f.L < f.T ? f.L : f.T - chunk * f.L;
  }
  int64_t row(int64_t chunk) const { return (b * f.T + chunk * f.L) * f.C + first; }

  Rows rows(const float* from, Row* padded, int64_t chunk) const {
    if (width == WIDTH) return {from + row(chunk), f.C};
    pack(padded->x, WIDTH, from + row(chunk), f.C, tokens(chunk), width);
    return {padded->x, WIDTH};
  }
  OutRows out_rows(float* to, Row* padded, int64_t chunk) const {
    if (width == WIDTH) return {to + row(chunk), f.C};
    return {padded->x, WIDTH};
  }
  void write_rows(float* to, const Row* padded, int64_t chunk) const {
    if (width < WIDTH) unpack(to + row(chunk), f.C, padded->x, WIDTH, tokens(chunk), width);
  }

  // A pair of rows, each number times its channel's factor, as sums and back.
  Wkv4Sums read(const float* a, const float* b, const Vec* factor) const {
    Row rows[2];
    for (int i = 0; i < VECTORS; i++) {
      const int64_t c = i * LANES;
      store(rows[0].x + c, factor[i] * load_some(a + c, width - c));
      store(rows[1].x + c, factor[i] * load_some(b + c, width - c));
    }
    Wkv4Sums s;
    for (int i = 0; i < HALVES; i++) {
      s.a[i] = widened(rows[0].x + i * HALF);
      s.b[i] = widened(rows[1].x + i * HALF);
    }
    return s;
  }
  void write(float* a, float* b, const Wkv4Sums& s, const Vec* factor) const {
    Row rows[2];
    for (int i = 0; i < HALVES; i++) {
      store_narrow(rows[0].x + i * HALF, narrowed(s.a[i]));
      store_narrow(rows[1].x + i * HALF, narrowed(s.b[i]));
    }
    for (int i = 0; i < VECTORS; i++) {
      const int64_t c = i * LANES;
      store_some(a + c, factor[i] * load(rows[0].x + c), width - c);
      store_some(b + c, factor[i] * load(rows[1].x + c), width - c);
    }
  }

  void multiply(Wkv4Sums& s, const Vec* factor) const {
    Row row;
    for (int i = 0; i < VECTORS; i++) store(row.x + i * LANES, factor[i]);
    for (int i = 0; i < HALVES; i++) {
      s.a[i] *= widened(row.x + i * HALF);
      s.b[i] *= widened(row.x + i * HALF);
    }
  }

  // Move the scale to that of b. An empty sum goes to where its first token will be.
  void rescale(Wkv4Sums& s, const float* first_key) {
    Row size;
    Vec factor[VECTORS];
    for (int i = 0; i < HALVES; i++)
      store_narrow(size.x + i * HALF, narrowed(s.b[i] != 0 ? s.b[i] : s.a[i]));
    for (int i = 0; i < VECTORS; i++) {
      const Ints bits = (Ints)load(size.x + i * LANES) & 0x7fffffff;
      const Ints n = at_most(at_least((bits >> 23) - 127, -126), 126);
      scale[i] = bits ? scale[i] + n : split(load(first_key + i * LANES)).n + n_u[i];
      factor[i] = power_of_two(-n);
    }
    multiply(s, factor);
  }

  // The steps of a chunk; moves the scale.
  NOINLINE void weigh(int64_t chunk, Rows k, Rows v) {
    const int64_t n = tokens(chunk), left = f.T - 1 - chunk * f.L;  // tokens after the first
    Wkv4Step* steps = m.steps;
    for (int i = 0; i < VECTORS; i++) {
      const int64_t c = i * LANES;
      for (int64_t t = 0; t < n; t++) {
        fetch(v[t], WIDTH);  // for the sweep
        const Vec key = load(k[t] + c);
        const Split e = split(key);
        const Vec mantissa = 1.0f + e.p;
        const Ints faded = scale[i] + n_w[i], next = faded > e.n ? faded : e.n;
        const Ints now = at_most(e.n + n_u[i] - scale[i], 126);  // infinite beside the sums
        store(steps[t].now + c, mantissa * m_u[i] * power_of_two(now));
        store(steps[t].keep + c, power_of_two(faded - next));
        store(steps[t].add + c, mantissa * power_of_two(e.n - next));
        scale[i] = next;
        const Vec faded_key = key + w[i] * (float)(left - t);  // by the end
        top[i] = faded_key > top[i] ? faded_key : top[i];
      }
    }
  }

  NOINLINE void sweep(int64_t n, Wkv4Sums& sums, Rows v, OutRows y) const {
    Wkv4Sums s = sums;
    for (int64_t t = 0; t < n; t++) {
      const Wkv4Step& step = m.steps[t];
      for (int i = 0; i < HALVES; i++) {
        const int64_t c = i * HALF;
        const Half value = widened(v[t] + c), now = widened(step.now + c);
        const Half keep = m_w[i] * widened(step.keep + c), add = widened(step.add + c);
        store_narrow(y[t] + c, narrowed((s.a[i] + now * value) / (s.b[i] + now)));
        s.a[i] = keep * s.a[i] + add * value;
        s.b[i] = keep * s.b[i] + add;
      }
    }
    sums = s;
  }

  void forward() {
    Vec factor[VECTORS];
    for (int i = 0; i < VECTORS; i++) {
      top[i] = load_some(f.max + b * f.C + first + i * LANES, width - i * LANES);
      const Split e = split(top[i]);
      scale[i] = e.n, factor[i] = 1.0f + e.p;
      top[i] += w[i] * (float)f.T;
    }
    const int64_t state = b * f.C + first;
    Wkv4Sums s = read(f.num + state, f.den + state, factor);
    for (int64_t chunk = 0; chunk < f.chunks(); chunk++) {
      const Rows k = rows(f.k, m.k, chunk), v = rows(f.v, m.v, chunk);
      rescale(s, k[0]);
      if (f.states) keep(chunk, s);
      weigh(chunk, k, v);
      sweep(tokens(chunk), s, v, out_rows(f.y, m.y, chunk));
      write_rows(f.y, m.y, chunk);
    }
    to_scale_of(top, factor);
    write(f.last_num + state, f.last_den + state, s, factor);
    for (int i = 0; i < VECTORS; i++)
      store_some(f.last_max + state + i * LANES, top[i], width - i * LANES);
  }

  // What brings sums from our scale to that of e^max.
  void to_scale_of(const Vec* max, Vec* factor) const {
    for (int i = 0; i < VECTORS; i++) {
      const Split e = split(max[i]);
      factor[i] = power_of_two(scale[i] - e.n) / (1.0f + e.p);
    }
  }

  void keep(int64_t chunk, const Wkv4Sums& s) const {
    char* to = (char*)(f.states + kept_at(chunk));
    memcpy(to, &s, sizeof s);
    memcpy(to + sizeof s, scale, sizeof scale);
  }

  Wkv4Sums recall(int64_t chunk) {
    const char* from = (const char*)(f.kept + kept_at(chunk));
    Wkv4Sums s;
    memcpy(&s, from, sizeof s);
    memcpy(scale, from + sizeof s, sizeof scale);
    return s;
  }

  int64_t kept_at(int64_t chunk) const {
    return ((b * f.chunks() + chunk) * f.blocks() + first / WIDTH) * KEPT;
  }

  // The sums before each of n tokens.
  NOINLINE void recompute(int64_t n, Wkv4Sums s, Rows v) const {
    for (int64_t t = 0; t < n; t++) {
      const Wkv4Step& step = m.steps[t];
      m.before[t] = s;
      for (int i = 0; i < HALVES; i++) {
        const int64_t c = i * HALF;
        const Half keep = m_w[i] * widened(step.keep + c), add = widened(step.add + c);
        s.a[i] = keep * s.a[i] + add * widened(v[t] + c);
        s.b[i] = keep * s.b[i] + add;
      }
    }
  }

  // The gradients of n tokens from those of the sums after them, which become those before them;
  // adds to those of decay and bonus.
  NOINLINE void retreat(int64_t n, Wkv4Sums& grads, Rows v, Rows dy, OutRows dk, OutRows dv,
                        Half* dw, Half* du) const {
    for (int i = 0; i < HALVES; i++) {
      const int64_t c = i * HALF;
      Half da = grads.a[i], db = grads.b[i], dw_sum = dw[i], du_sum = du[i];
      for (int64_t t = n - 1; t >= 0; t--) {
        const Wkv4Step& step = m.steps[t];
        const Half a = m.before[t].a[i], b = m.before[t].b[i];
        const Half value = widened(v[t] + c), now = widened(step.now + c);
        const Half keep = m_w[i] * widened(step.keep + c), add = widened(step.add + c);
        const Half share = 1.0 / (b + now), y = (a + now * value) * share;
        const Half q = widened(dy[t] + c) * share, own = now * q * (value - y);
        store_narrow(dv[t] + c, narrowed(now * q + add * da));
        store_narrow(dk[t] + c, narrowed(own + add * (value * da + db)));
        du_sum += own;
        dw_sum += keep * (a * da + b * db);
        da = keep * da + q;
        db = keep * db - q * y;
      }
      grads.a[i] = da, grads.b[i] = db, dw[i] = dw_sum, du[i] = du_sum;
    }
  }

  void backward() {
    const int64_t state = b * f.C + first;
    Vec factor[VECTORS];
    Ints next[VECTORS];  // the scale at the start of the chunk after
    Wkv4Sums grads, params = {};
    for (int64_t chunk = f.chunks() - 1; chunk >= 0; chunk--) {
      const Rows k = rows(f.k, m.k, chunk), v = rows(f.v, m.v, chunk), dy = rows(f.dy, m.dy, chunk);
      const Wkv4Sums s = recall(chunk);
      Ints start[VECTORS];
      memcpy(start, scale, sizeof start);
      weigh(chunk, k, v);
      if (chunk + 1 == f.chunks()) {
        Vec max[VECTORS];
        for (int i = 0; i < VECTORS; i++)
          max[i] = load_some(f.kept_max + state + i * LANES, width - i * LANES);
        to_scale_of(max, factor);
        grads = read(f.dlast_num + state, f.dlast_den + state, factor);
      } else {
        for (int i = 0; i < VECTORS; i++) factor[i] = power_of_two(scale[i] - next[i]);
        multiply(grads, factor);
      }
      memcpy(next, start, sizeof next);
      recompute(tokens(chunk), s, v);
      retreat(tokens(chunk), grads, v, dy, out_rows(f.dk, m.dk, chunk), out_rows(f.dv, m.dv, chunk),
              params.a, params.b);
      write_rows(f.dk, m.dk, chunk);
      write_rows(f.dv, m.dv, chunk);
    }
    Row dmax;
    for (int i = 0; i < HALVES; i++) {
      const Half a = m.before[0].a[i], b = m.before[0].b[i];
      store_narrow(dmax.x + i * HALF, narrowed(a * grads.a[i] + b * grads.b[i]));
    }
    Vec ones[VECTORS];
    for (int i = 0; i < VECTORS; i++) {
      store_some(f.dmax + state + i * LANES, load(dmax.x + i * LANES), width - i * LANES);
      const Split e = split(load_some(f.max + state + i * LANES, width - i * LANES));
      factor[i] = (1.0f + e.p) * power_of_two(e.n - next[i]);
      ones[i] = all(1.0f);
    }
    multiply(grads, factor);
    write(f.dnum + state, f.dden + state, grads, ones);
    write(f.dw + state, f.du + state, params, ones);
  }
};

struct Wkv4Forward {
  Wkv4 f;

  bool range(int64_t begin, int64_t end) const {
    Wkv4Work work(f);
    if (!work.ready) return false;
    for (int64_t i = begin; i < end; i++) Wkv4Block(f, work, i).forward();
    return true;
  }
};

struct Wkv4Backward {
  Wkv4 f;

  bool range(int64_t begin, int64_t end) const {
    Wkv4Work work(f);
    if (!work.ready) return false;
    for (int64_t i = begin; i < end; i++) Wkv4Block(f, work, i).backward();
    return true;
  }
};

}  // namespace

EXPORT(wkv4_forward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                     float* const* out) {
  Wkv4 f = {};
  f.B = sizes[0], f.T = sizes[1], f.C = sizes[2], f.L = sizes[3];
  f.w = in[0], f.u = in[1], f.k = in[2], f.v = in[3], f.num = in[4], f.den = in[5], f.max = in[6];
  f.y = out[0], f.last_num = out[1], f.last_den = out[2], f.last_max = out[3], f.states = out[4];
  return for_each(parallel, f.B * f.blocks(), 20 * f.T * WIDTH, Wkv4Forward{f});
}

EXPORT(wkv4_backward)(ParallelFor parallel, const int64_t* sizes, const float* const* in,
                      float* const* out) {
  Wkv4 f = {};
  f.B = sizes[0], f.T = sizes[1], f.C = sizes[2], f.L = sizes[3];
  f.w = in[0], f.u = in[1], f.k = in[2], f.v = in[3], f.num = in[4], f.den = in[5], f.max = in[6];
  f.kept = in[7], f.kept_max = in[8], f.dy = in[9], f.dlast_num = in[10], f.dlast_den = in[11];
  f.dw = out[0], f.du = out[1], f.dk = out[2], f.dv = out[3];
  f.dnum = out[4], f.dden = out[5], f.dmax = out[6];
  return for_each(parallel, f.B * f.blocks(), 40 * f.T * WIDTH, Wkv4Backward{f});
}
