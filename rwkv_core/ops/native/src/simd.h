// What every kernel shares: vectors of LANES floats, the decay of a token, torch's threads, scratch.
//
// Each kernel is written once over GCC's vector types and compiled once per instruction set, with
// LANES = 4, 8 or 16. Nothing here calls a library: a shared inline function compiled for AVX-512
// could be the copy that a lesser processor gets to run.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Half __attribute__((vector_size(4 * LANES)));  // LANES / 2 doubles
typedef int64_t HalfInts __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // a hot loop gets the registers to itself

// ISA is the suffix of every exported name: wkv7_forward_avx2
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) int JOIN(name, ISA)

INLINE Vec load(const float* p) { return *(const LooseVec*)p; }
INLINE void store(float* p, Vec x) { *(LooseVec*)p = x; }
INLINE Vec all(float x) { return x - (Vec){}; }
INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- the decay of one token --------------------------------------------------------------------

// e^w = scale + scale·p, scale a power of two and |p| < 0.42; beyond ±87 as at ±87.
struct Power {
  Vec scale, p;
};

INLINE Power power_of(Vec w) {
  w = w > 87.0f ? all(87.0f) : w;  // a NaN passes both and stays one
  w = w < -87.0f ? all(-87.0f) : w;
  const float shift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  Vec shifted = w * 1.44269504f + shift;
  Vec n = shifted - shift;
  Vec f = w - n * 0.693359375f + n * 2.12194440e-4f;  // w - n ln 2, |f| ≤ ln 2 / 2
  Vec p = 1.0f / 5040 + f * (1.0f / 40320);
  p = 1.0f / 720 + f * p;
  p = 1.0f / 120 + f * p;
  p = 1.0f / 24 + f * p;
  p = 1.0f / 6 + f * p;
  p = 0.5f + f * p;
  p = f + f * f * p;  // e^f - 1
  Ints exponent = (Ints)shifted - (Ints)all(shift);
  return {(Vec)((exponent + 127) << 23), p};
}

// e^w for one token, in the form in which it is applied: s e^w = s·factor + (s & keep).
//
// Near w = 0, factor is e^w - 1 and keep all ones: e^w itself would be rounded the same way at every
// token of a slow decay, and the errors would add up instead of averaging out. Below w = -ln 2,
// factor is e^w and keep is 0: there e^w - 1 would have lost the digits of a strong decay.
struct Decay {
  Vec factor, plain;  // plain is e^w
  Ints keep;
};

INLINE Decay decay_of(Vec w) {
  const Power e = power_of(w);
  Decay d;
  d.plain = e.scale + e.scale * e.p;
  d.keep = ~(w < -0.6931f);
  d.factor = d.keep ? (e.scale - 1.0f) + e.scale * e.p : d.plain;
  return d;
}

template <bool Strong>
INLINE Vec decayed(Vec s, Vec factor, Ints keep) {
  return s * factor + (Strong ? (Vec)((Ints)s & keep) : s);
}

// Turn n log-decays, a multiple of LANES, into e^w in place, and write the form above. Returns
// whether any of them is strong; if none is, keep is all ones.
INLINE bool decays(int64_t n, float* w, float* factor, float* keep) {
  Ints weak = ~Ints{};
  for (int64_t j = 0; j < n; j += LANES) {
    const Decay d = decay_of(load(w + j));
    store(w + j, d.plain);
    store(factor + j, d.factor);
    store(keep + j, (Vec)d.keep);
    weak &= d.keep;
  }
  bool strong = false;
  for (int lane = 0; lane < LANES; lane++) strong |= !weak[lane];
  return strong;
}

// ---- sums over lanes ---------------------------------------------------------------------------

// Of two vectors: the even and the odd lanes, within each four; then the even and the odd fours.
#if LANES == 4
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#define EVEN_FOURS EVEN_LANES
#define ODD_FOURS ODD_LANES
#elif LANES == 8
#define EVEN_LANES 0, 2, 8, 10, 4, 6, 12, 14
#define ODD_LANES 1, 3, 9, 11, 5, 7, 13, 15
#define EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define EVEN_LANES 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ODD_LANES 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#define EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#endif
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (Ints){__VA_ARGS__})
#endif

// Write the sums over the lanes of LANES vectors, in order; x is overwritten.
INLINE void lane_sums(Vec* x, float* sums) {
  int n = LANES / 2;
  for (; n > LANES / 8; n /= 2)
    for (int i = 0; i < n; i++)
      x[i] = SHUFFLE(x[2 * i], x[2 * i + 1], EVEN_LANES) + SHUFFLE(x[2 * i], x[2 * i + 1], ODD_LANES);
  for (; n > 0; n /= 2)
    for (int i = 0; i < n; i++)
      x[i] = SHUFFLE(x[2 * i], x[2 * i + 1], EVEN_FOURS) + SHUFFLE(x[2 * i], x[2 * i + 1], ODD_FOURS);
  store(sums, x[0]);
}

// Σ a b over n floats, a multiple of LANES.
INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec sums = {};
  for (int64_t i = 0; i < n; i += LANES) sums += load(a + i) * load(b + i);
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
  return sum;
}

// ---- rows of any length ------------------------------------------------------------------------

// Call visit(at, read, write) for floats 0 … n - 1, a vector at a time. The last few are a vector too,
// in which lanes beyond n read as zero and are not written.
template <typename Visit>
INLINE void each_vector(int64_t n, Visit visit) {
  int64_t at = 0;
  for (; at + LANES <= n; at += LANES)
    visit(at, [](const float* p) { return load(p); }, [](float* p, Vec x) { store(p, x); });
  const int64_t left = n - at;
  if (left == 0) return;
  auto read = [left](const float* p) {
    Vec x = {};
    for (int64_t lane = 0; lane < left; lane++) x[lane] = p[lane];
    return x;
  };
  visit(at, read, [left](float* p, Vec x) {
    for (int64_t lane = 0; lane < left; lane++) p[lane] = x[lane];
  });
}

// ---- memory ------------------------------------------------------------------------------------

// Floats handed out from one block, each piece aligned to a cache line. A first pass over the
// pieces with no block behind it adds up how much is needed.
struct Scratch {
  char* base = nullptr;
  size_t used = 0;

  float* floats(int64_t n) {
    float* piece = base ? (float*)(base + used) : nullptr;
    used += round_up(4 * n, 64);
    return piece;
  }
  bool allocate() {
    void* block = nullptr;
    if (posix_memalign(&block, 64, used ? used : 64)) return false;
    memset(block, 0, used);
    base = (char*)block;
    used = 0;
    return true;
  }
  ~Scratch() { free(base); }
};

// Copy n rows of `width` floats into rows of `padded`, zeros behind each.
INLINE void pack(float* to, int64_t padded, const float* from, int64_t stride, int64_t n,
                 int64_t width) {
  for (int64_t t = 0; t < n; t++) {
    memcpy(to + t * padded, from + t * stride, 4 * width);
    memset(to + t * padded + width, 0, 4 * (padded - width));
  }
}

INLINE void unpack(float* to, int64_t stride, const float* from, int64_t padded, int64_t n,
                   int64_t width) {
  for (int64_t t = 0; t < n; t++) memcpy(to + t * stride, from + t * padded, 4 * width);
}

// Ask for n floats that are needed soon; they need not exist.
INLINE void fetch(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(from + i);
}

// Write the rows × columns matrix `from` as its transpose, rows of `to` being `padded` long.
INLINE void transpose(float* to, int64_t padded, const float* from, int64_t stride, int64_t rows,
                      int64_t columns) {
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = 0; i < rows; i++) to[j * padded + i] = from[i * stride + j];
}

// ---- threads -----------------------------------------------------------------------------------

// torch's own parallel_for, from its stable C interface: (begin, end, grain, body, context).
typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// Call task.range(begin, end) for ranges that cover 0 … n - 1. `work` is the number of operations of
// one index, about: waking a thread costs as much as 100,000 of them. Returns 0, or 1 if a range
// reported that there was no memory.
template <typename Task>
INLINE int for_each(ParallelFor parallel, int64_t n, int64_t work, const Task& task) {
  struct Context {
    const Task* task;
    int failed;
  } context = {&task, 0};
  Body body = [](int64_t begin, int64_t end, void* opaque) {
    Context& context = *(Context*)opaque;
    if (!context.task->range(begin, end)) __atomic_store_n(&context.failed, 1, __ATOMIC_RELAXED);
  };
  if (n > 0 && parallel) {
    if (parallel(0, n, 1 + 100000 / (work + 1), body, &context)) return 1;
  } else if (n > 0) {
    body(0, n, &context);
  }
  return context.failed;
}

constexpr int64_t GROUP = 8;  // heads that one thread takes through time together

// Run task.run(first, count, work) for all heads [begin, end) of sequences of H heads.
//
// A thread takes neighbouring heads of a sequence through time together: a head alone reads 256 bytes
// here and there, and waits for memory as long as it computes. Which heads go together has no
// influence on their results.
template <typename Task>
INLINE bool by_groups(const Task& task, int64_t begin, int64_t end, int64_t H) {
  typename Task::Work work(task.size);
  if (!work.ready) return false;
  while (begin < end) {
    int64_t count = H - begin % H;
    count = count < end - begin ? count : end - begin;
    count = count < GROUP ? count : GROUP;
    task.run(begin, count, work);
    begin += count;
  }
  return true;
}
