// What bi_wkv and wkv4 share: blocks of channels, whose sums over time are in double.

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

constexpr int64_t WIDTH = 16;           // channels of a block: a cache line
constexpr int VECTORS = WIDTH / LANES;  // of floats
constexpr int HALF = LANES / 2;         // doubles of a vector
constexpr int HALVES = WIDTH / HALF;    // vectors of doubles

INLINE int64_t blocks_of(int64_t C) { return (C + WIDTH - 1) / WIDTH; }
INLINE int64_t width_of(int64_t block, int64_t C) {
  return (block + 1) * WIDTH < C ? WIDTH : C - block * WIDTH;
}

typedef float Narrow __attribute__((vector_size(2 * LANES)));  // as many floats as Half has doubles
typedef float LooseNarrow __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

// GCC would take this conversion apart.
INLINE Half widened(const float* p) {
#if defined(__x86_64__) && LANES == 16
  return (Half)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__x86_64__) && LANES == 8
  return (Half)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return __builtin_convertvector(*(const LooseNarrow*)p, Half);
#endif
}

INLINE Narrow narrowed(Half x) { return __builtin_convertvector(x, Narrow); }
INLINE void store_narrow(float* p, Narrow x) { *(LooseNarrow*)p = x; }

// The first n floats of a vector, zeros behind them.
INLINE Vec load_some(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
  Vec x = {};
  for (int64_t i = 0; i < n; i++) x[i] = p[i];
  return x;
}

INLINE void store_some(float* p, Vec x, int64_t n) {
  if (n >= LANES) return store(p, x);
  for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

struct Row {
  float x[WIDTH];
};

// Rows of WIDTH channels somewhere, to read or to write.
template <typename Float>
struct RowsOf {
  Float* first;
  int64_t stride;

  Float* operator[](int64_t t) const { return first + t * stride; }
  RowsOf from(int64_t t) const { return {first + t * stride, stride}; }
};

typedef RowsOf<const float> Rows;
typedef RowsOf<float> OutRows;

}  // namespace
