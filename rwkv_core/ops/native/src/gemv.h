// y = W x for one token. Every weight is read once, so that the rate of memory is the limit.
//
// A core reaches that rate when it reads several places at once, each of them in order: with
// neighbouring rows of W one after the other, it waits for memory half of the time. So the rows are
// divided into STREAMS parts, and one row of each part is multiplied at a time.
//
// A matrix may lie in memory by rows or by columns. By columns, those whose x is 0 are not read.
//
// Weights are fp32 or bf16, x and y are the same or fp32; sums are in fp32. The order of a sum depends
// on nothing but the sizes and, by columns, on which x are 0.

#pragma once

#include "simd.h"

namespace {

constexpr int64_t STEP = 2 * LANES;  // weights that are taken at a time

struct VecPair {
  Vec a, b;
};

// A format says how STEP numbers become two vectors, and back; in which order does not matter, as
// long as it is the same for weights, x and y.
struct Fp32 {
  typedef float Number;

  INLINE VecPair read(const float* from) { return {load(from), load(from + LANES)}; }
  INLINE void write(float* to, VecPair x) { store(to, x.a), store(to + LANES, x.b); }
  INLINE float narrow(float x) { return x; }
  INLINE float widen(float x) { return x; }
};

// The upper half of fp32: even numbers into one vector, odd ones into the other.
struct Bf16 {
  typedef uint16_t Number;
  typedef Ints LooseInts __attribute__((aligned(2), may_alias));

  INLINE VecPair read(const uint16_t* from) {
    const Ints x = *(const LooseInts*)from;
    return {(Vec)(x << 16), (Vec)(x & -65536)};
  }
  INLINE void write(uint16_t* to, VecPair x) {
    *(LooseInts*)to = ((rounded(x.a) >> 16) & 65535) | (rounded(x.b) & -65536);
  }
  INLINE uint16_t narrow(float x) { return (uint32_t)rounded(all(x))[0] >> 16; }
  INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
  }

  // To the nearest, ties to even, in the upper 16 bits. A NaN stays one: it comes from a bf16 or is
  // the processor's own, so that its lower bits are 0 and nothing is carried.
  INLINE Ints rounded(Vec x) {
    const Ints bits = (Ints)x;
    return bits + 32767 + ((bits >> 16) & 1);
  }
};

// fp32 in the order of Bf16.
struct Fp32InPairs : Fp32 {
  INLINE VecPair read(const float* from) {
    VecPair x;
    for (int i = 0; i < LANES; i++) x.a[i] = from[2 * i], x.b[i] = from[2 * i + 1];
    return x;
  }
  INLINE void write(float* to, VecPair x) {
    for (int i = 0; i < LANES; i++) to[2 * i] = x.a[i], to[2 * i + 1] = x.b[i];
  }
};

// The last n < STEP numbers of a row, zeros behind them.
template <typename Format>
NOINLINE VecPair read_part(const typename Format::Number* from, int64_t n) {
  typename Format::Number padded[STEP] = {};
  memcpy(padded, from, n * sizeof *from);
  return Format::read(padded);
}

template <typename Format>
INLINE VecPair read_up_to(const typename Format::Number* from, int64_t n) {
  return n < STEP ? read_part<Format>(from, n) : Format::read(from);
}

// Weights of one format, x and y of another.
template <typename Format, typename Outer>
struct Gemv {
  typedef typename Format::Number Weight;
  typedef typename Outer::Number Number;

  int64_t out, in;
  const Weight* W;
  const Number* x;
  Number* y;
};

// ---- by rows: [out, in] ------------------------------------------------------------------------

template <typename Format, typename Outer = Format>
struct GemvRows : Gemv<Format, Outer> {
  typedef typename Format::Number Weight;
  typedef typename Outer::Number Number;
  static constexpr int STREAMS = 4;

  bool range(int64_t begin, int64_t end) const {
    Scratch scratch;
    scratch.floats(round_up(this->in, STEP));
    if (!scratch.allocate()) return false;
    float* x = scratch.floats(round_up(this->in, STEP));
    for (int64_t i = 0; i < this->in; i += STEP) {
      const VecPair pair = read_up_to<Outer>(this->x + i, this->in - i);
      store(x + i, pair.a), store(x + i + LANES, pair.b);
    }
    const int64_t part = (end - begin) / STREAMS, rest = begin + part * STREAMS;
    multiply<STREAMS>(this->W + begin * this->in, this->in, x, part, this->y + begin);
    multiply<1>(this->W + rest * this->in, this->in, x, end - rest, this->y + rest);
    return true;
  }

  template <int N>
  static NOINLINE void multiply(const Weight* W, int64_t in, const float* x, int64_t part,
                                Number* y) {
    const int64_t whole = in / STEP * STEP;
    for (int64_t o = 0; o < part; o++) {
      const Weight* row[N];
      VecPair sums[N] = {};
      for (int n = 0; n < N; n++) row[n] = W + (n * part + o) * in;
      const auto add = [&](int64_t i, auto read) {
        for (int n = 0; n < N; n++) {
          const VecPair w = read(row[n] + i);
          sums[n].a += w.a * load(x + i);
          sums[n].b += w.b * load(x + i + LANES);
        }
      };
      for (int64_t i = 0; i < whole; i += STEP) add(i, [](auto* w) { return Format::read(w); });
      if (whole < in) add(whole, [&](auto* w) { return read_part<Format>(w, in - whole); });
      for (int n = 0; n < N; n++) {
        const Vec sum = sums[n].a + sums[n].b;
        float total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        y[n * part + o] = Outer::narrow(total);
      }
    }
  }
};

// ---- by columns: [in, out] in memory -----------------------------------------------------------

template <typename Format, typename Outer = Format>
struct GemvColumns : Gemv<Format, Outer> {
  typedef typename Format::Number Weight;
  typedef typename Outer::Number Number;
  static constexpr int STREAMS = 8;

  // Of the columns with x ≠ 0, where they begin and x; of the results, the sums.
  struct Work {
    Scratch scratch;
    float *x, *sums;
    const Weight** columns;
    bool ready;

    Work(int64_t in, int64_t out) {
      lay_out(in, out);
      ready = scratch.allocate();
      if (ready) lay_out(in, out);
    }
    void lay_out(int64_t in, int64_t out) {
      x = scratch.floats(round_up(in, STEP)), sums = scratch.floats(round_up(out, STEP));
      columns = (const Weight**)scratch.floats(in * sizeof *columns / 4);
    }
  };

  // Indices count groups of STEP results.
  bool range(int64_t begin, int64_t end) const {
    const int64_t first = begin * STEP, last = end * STEP < this->out ? end * STEP : this->out;
    Work work(this->in, last - first);
    if (!work.ready) return false;
    int64_t found = 0;
    for (int64_t i = 0; i < this->in; i++) {
      work.columns[found] = this->W + i * this->out + first;
      work.x[found] = Outer::widen(this->x[i]);
      found += work.x[found] != 0;
    }
    const int64_t part = found / STREAMS, rest = part * STREAMS;
    add<STREAMS>(work.columns, work.x, part, last - first, work.sums);
    add<1>(work.columns + rest, work.x + rest, found - rest, last - first, work.sums);
    for (int64_t o = first; o < last; o += STEP) {
      const float* sums = work.sums + o - first;
      Number padded[STEP];
      Outer::write(padded, {load(sums), load(sums + LANES)});
      memcpy(this->y + o, padded, (last - o < STEP ? last - o : STEP) * sizeof *padded);
    }
    return true;
  }

  template <int N>
  static NOINLINE void add(const Weight* const* columns, const float* x, int64_t part, int64_t out,
                           float* sums) {
    const int64_t whole = out / STEP * STEP;
    for (int64_t i = 0; i < part; i++) {
      const Weight* column[N];
      Vec factor[N];
      for (int n = 0; n < N; n++) {
        column[n] = columns[n * part + i];
        factor[n] = all(x[n * part + i]);
      }
      const auto add = [&](int64_t o, auto read) {
        VecPair sum = {};
        for (int n = 0; n < N; n++) {
          const VecPair w = read(column[n] + o);
          sum.a += w.a * factor[n];
          sum.b += w.b * factor[n];
        }
        store(sums + o, load(sums + o) + sum.a);
        store(sums + o + LANES, load(sums + o + LANES) + sum.b);
      };
      for (int64_t o = 0; o < whole; o += STEP) add(o, [](auto* w) { return Format::read(w); });
      if (whole < out) add(whole, [&](auto* w) { return read_part<Format>(w, out - whole); });
    }
  }
};

}  // namespace

// form: 0 by rows, 1 by columns; plus 2 if the numbers are bf16, not fp32; plus 4 if only the weights
// are bf16.
EXPORT(gemv)(ParallelFor parallel, int64_t form, int64_t out, int64_t in, const void* W,
             const void* x, void* y) {
  const auto run = [&](auto task, int64_t indices, int64_t work) {
    typedef typename decltype(task)::Number Number;
    task.out = out, task.in = in;
    task.W = (decltype(task.W))W, task.x = (const Number*)x, task.y = (Number*)y;
    return for_each(parallel, indices, work, task);
  };
  const int64_t groups = (out + STEP - 1) / STEP;
  switch (form) {
    case 0: return run(GemvRows<Fp32>{}, out, 4 * in);
    case 1: return run(GemvColumns<Fp32>{}, groups, 4 * in * STEP);
    case 2: return run(GemvRows<Bf16>{}, out, 2 * in);
    case 3: return run(GemvColumns<Bf16>{}, groups, 2 * in * STEP);
    case 4: return run(GemvRows<Bf16, Fp32InPairs>{}, out, 2 * in);
    default: return run(GemvColumns<Bf16, Fp32InPairs>{}, groups, 2 * in * STEP);
  }
}
