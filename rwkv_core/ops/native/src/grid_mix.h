// What every layer of an image model does to its patches before its linear maps, and the gate after
// them, each in one pass over memory each way.
//
// Grid mix: channel group i of a patch sees the patch (dy, dx)_i away, zeros beyond the border:
//
//   out_n = s + (x - s) μ_n, s what the patch sees.   Backward, with own = Σ_n g_n μ_n:
//
//   dx_p = own_p + Σ_{q that sees p} (Σ_n g_n - own)_q,   dμ_n = Σ g_n (x - s)
//
// Gate:  out = σ(r) y,   dr = g y σ (1 - σ),   dy = g σ.
//
// Rows of patches are worked on one at a time, each with a sum of its own for every parameter; the
// caller adds them up in order, so that the number of threads plays no part.

#pragma once

#include "rwkv7_layer.h"

namespace {

struct Group {
  int64_t begin, size, dy, dx;
};

struct Grid {
  int64_t B, H, W, C, N, groups;
  const int64_t* table;  // [groups, 3]: size, dy, dx

  // Call visit(group) for the groups of one patch.
  template <typename Visit>
  void each_group(Visit visit) const {
    int64_t begin = 0;
    for (int64_t i = 0; i < groups; i++) {
      const int64_t* row = table + 3 * i;
      visit(Group{begin, row[0], row[1], row[2]});
      begin += row[0];
    }
  }
  // Where the channels of patch (y, x) of row `line` of all rows begin; -1 beyond the border.
  int64_t place(int64_t line, int64_t dy, int64_t x) const {
    const int64_t y = line % H + dy;
    return y < 0 || y >= H || x < 0 || x >= W ? -1 : ((line + dy) * W + x) * C;
  }
};

struct GridMix {
  Grid grid;
  const float *x, *mix;  // [B, H, W, C], [N, C]
  float* out[MIXES];

  bool range(int64_t begin, int64_t end) const {
    const Grid& g = grid;
    for (int64_t line = begin; line < end; line++)
      for (int64_t column = 0; column < g.W; column++)
        g.each_group([&](Group group) {
          const int64_t at = (line * g.W + column) * g.C + group.begin;
          const int64_t from = g.place(line, group.dy, column + group.dx);
          const float* seen = from < 0 ? nullptr : x + from + group.begin;
          each_vector(group.size, [&](int64_t c, auto read, auto write) {
            const Vec s = seen ? read(seen + c) : Vec{}, change = read(x + at + c) - s;
            for (int64_t n = 0; n < g.N; n++)
              write(out[n] + at + c, s + change * read(mix + n * g.C + group.begin + c));
          });
        });
    return true;
  }
};

struct GridMixBackward {
  Grid grid;
  const float *x, *mix;
  const float* grad[MIXES];  // [B, H, W, C] each
  float *dx, *dmix;          // [B, H, W, C], [B · H, N, C]

  bool range(int64_t begin, int64_t end) const {
    const Grid& g = grid;
    for (int64_t line = begin; line < end; line++) {
      float* sums = dmix + line * g.N * g.C;
      memset(sums, 0, 4 * g.N * g.C);
      for (int64_t column = 0; column < g.W; column++)
        g.each_group([&](Group group) {
          const int64_t at = (line * g.W + column) * g.C + group.begin;
          const int64_t from = g.place(line, group.dy, column + group.dx);
          const int64_t to = g.place(line, -group.dy, column - group.dx);  // who sees this patch
          const float* seen = from < 0 ? nullptr : x + from + group.begin;
          each_vector(group.size, [&](int64_t c, auto read, auto write) {
            const Vec change = read(x + at + c) - (seen ? read(seen + c) : Vec{});
            Vec sum = {};
            for (int64_t n = 0; n < g.N; n++) {
              const int64_t parameter = n * g.C + group.begin + c;
              const Vec share = read(mix + parameter), own = read(grad[n] + at + c);
              sum += own * share;
              if (to >= 0) {
                const Vec other = read(grad[n] + to + group.begin + c);
                sum += other - other * share;
              }
              write(sums + parameter, read(sums + parameter) + own * change);
            }
            write(dx + at + c, sum);
          });
        });
    }
    return true;
  }
};

struct Gate {
  int64_t n;
  const float *r, *y, *grad;  // grad is null in the forward pass
  float *out, *dr, *dy;

  static constexpr int64_t SPAN = 1 << 14;  // floats of one task

  bool range(int64_t begin, int64_t end) const {
    const int64_t at = begin * SPAN, stop = end * SPAN < n ? end * SPAN : n;
    each_vector(stop - at, [&](int64_t i, auto read, auto write) {
      const Vec open = sigmoid(read(r + at + i)), value = read(y + at + i);
      if (!grad) {
        write(out + at + i, open * value);
      } else {
        const Vec g = read(grad + at + i) * open;
        write(dy + at + i, g);
        write(dr + at + i, g * value * (1.0f - open));
      }
    });
    return true;
  }
};

}  // namespace

// n: B, H, W, C, N, groups, then size, dy and dx of each group.
EXPORT(grid_mix_forward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                         float* const* out) {
  GridMix task = {{n[0], n[1], n[2], n[3], n[4], n[5], n + 6}, in[0], in[1], {}};
  for (int64_t i = 0; i < n[4]; i++) task.out[i] = out[i];
  return for_each(parallel, n[0] * n[1], n[2] * n[3] * n[4], task);
}

EXPORT(grid_mix_backward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                          float* const* out) {
  GridMixBackward task = {{n[0], n[1], n[2], n[3], n[4], n[5], n + 6}, in[0], in[1], {},
                          out[0], out[1]};
  for (int64_t i = 0; i < n[4]; i++) task.grad[i] = in[2 + i];
  return for_each(parallel, n[0] * n[1], 3 * n[2] * n[3] * n[4], task);
}

EXPORT(gate_forward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                     float* const* out) {
  Gate task = {n[0], in[0], in[1], nullptr, out[0], nullptr, nullptr};
  return for_each(parallel, (n[0] + task.SPAN - 1) / task.SPAN, 20 * task.SPAN, task);
}

EXPORT(gate_backward)(ParallelFor parallel, const int64_t* n, const float* const* in,
                      float* const* out) {
  Gate task = {n[0], in[0], in[1], in[2], nullptr, out[0], out[1]};
  return for_each(parallel, (n[0] + task.SPAN - 1) / task.SPAN, 20 * task.SPAN, task);
}
