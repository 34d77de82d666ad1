r"""The recurrences as ONNX functions: what stays of them in an exported graph is one node each.

Tracing leaves ``rwkv::WKV4``, ``WKV6`` or ``WKV7`` in the graph, with inputs and outputs as the
causal ops have them ([B, T, H, X] and the state); a file brings the function that says what the
node means, so one traced graph serves every *lane*:

    scan               opset 20 alone, any T ≥ 1. Chunks of 16 tokens in matrix products; what is
                       left for the ``Scan`` over chunks is ``S ← M S + C``, one product.
    chunk              the same for exactly 16 tokens: no ``Scan``, nothing depends on a length.
    linear_attention   the operator ``com.microsoft::LinearAttention`` of onnxruntime ≥ 1.25.1, and
                       in the same file a function of that name, for runtimes without it.
    triangle, mobile, web   as scan; they differ elsewhere (prefix_sums.py, mobile.py, web.py).

Chunks. C₁₆ₓ₁₆ constants turn log-decays into sums of them by a product, so that no sum is the
difference of two others. For generation 7, with R = (r, a) and W = (k, b) decayed from and to the
middle of the chunk, A = R Wᵀ where a token sees (a before its own update, r after it), and X =
(I - A_ab)⁻¹ by block substitution, X ← X + X N X with N the blocks of A_ab below the diagonal of
the next size (1, 2, 4, 8):

    near = X A_ak V,   far = X R_a,   Z = near + far S
    Y = A_r (V, near) + (R_r + A_rb far) S,     S' = (diag e^Σw + W_bᵀ far) S + Wᵀ (V, near)

For generations 5 and 6 a chunk is halved down to single tokens: those of a second half meet those
of the first at the middle, where both decays are ≤ 1, whatever the decays are.

Sources: arXiv 2503.14456 and 2404.05892; the algebra is that of ``rwkv_core/ops``.
"""

from collections.abc import Mapping

import numpy as np
from onnx import FunctionProto, helper, numpy_helper, parser

from rwkv_export.linear_attention import MICROSOFT, linear_attention

__all__ = ["CHUNK", "DOMAIN", "LANES", "functions"]

DOMAIN = "rwkv"
LANES = ("scan", "chunk", "linear_attention", "triangle", "mobile", "web")
CHUNK = L = 16  # tokens


def functions(op: str, lane: str, *, heads: int, size: int, opset: int) -> list[FunctionProto]:
    """Return the function ``rwkv::<op>`` of a lane, and the functions that it calls.

    Args:
        op: ``"WKV4"``, ``"WKV6"`` or ``"WKV7"``.
        lane: one of ``LANES``; WKV4 is a scan over time in all of them.
        heads: number of heads, which LinearAttention wants to be told.
        size: of a key and of a value.
        opset: version of the standard operators.
    """
    if op == "WKV4":
        return [_function(op, SCAN4, {}, opset)]
    if lane == "linear_attention":
        text, rule = linear_attention(op, heads, size)
        fallback = _function("LinearAttention", rule, {}, opset, domain=MICROSOFT)
        fallback.attribute.extend(("kv_num_heads", "q_num_heads", "scale", "update_rule"))
        return [_function(op, text, {}, opset), fallback]
    names, extra, inside, step, end, constants = {
        "WKV6": ("rwkv", ", u", INSIDE6, STEP6, END6, _constants6()),
        "WKV7": ("rwkvab", "", INSIDE7, STEP7, END7, _constants7()),
    }[op]
    inputs = ", ".join(f"{name}_in" for name in names)
    start, cut, over, join = ONE if lane == "chunk" else (MANY, CUT, OVER_CHUNKS, JOIN)
    cuts = "".join(cut.replace("#", name) for name in names)
    text = f"({inputs}{extra}, state) => (y, state_out) {{" + start + cuts + inside
    text += over.replace("STEP", step) + end + join + "}"
    rank = 4 if lane == "chunk" else 5
    text = text.replace("LEVELS_MT", _swap(rank + 1)).replace("MT", _swap(rank))
    return [_function(op, text, constants, opset)]


def _swap(rank: int) -> str:
    """Return the permutation that transposes matrices in the last two axes."""
    return ", ".join(map(str, [*range(rank - 2), rank - 1, rank - 2]))


def _function(
    name: str, text: str, constants: Mapping[str, np.ndarray], opset: int, domain: str = DOMAIN
) -> FunctionProto:
    imports = f'"" : {opset}' + (f', "{MICROSOFT}" : 1' if f"{MICROSOFT}." in text else "")
    header = f'<domain: "{domain}", opset_import: [{imports}]>\n{name} '
    function: FunctionProto = parser.parse_function(header + text)
    nodes = [
        helper.make_node("Constant", [], [key], value=numpy_helper.from_array(array))
        for key, array in constants.items()
    ]
    nodes += function.node
    del function.node[:]
    function.node.extend(nodes)
    return function


# ---- chunks: from [B, T, H, X] to [N, B, H, L, X] and back; of one chunk [B, H, L, X] ------------

MANY = f"""
  zero = Constant<value_ints: ints = [0]>()
  one = Constant<value_ints: ints = [1]>()
  size = Constant<value_ints: ints = [{L}]>()
  B = Shape<end: int = 1>(v_in)
  T = Shape<start: int = 1, end: int = 2>(v_in)
  short = Sub(size, one)
  longer = Add(T, short)
  N = Div(longer, size)
  filled = Mul(N, size)
  missing = Sub(filled, T)
  kept = Constant<value_ints: ints = [0, 0]>()
  pads = Concat<axis: int = 0>(kept, kept, zero, missing, kept)
"""
CUT = """
  #_filled = Pad(#_in, pads)
  #_HX = Shape<start: int = 2>(#_in)
  #_shape = Concat<axis: int = 0>(B, N, size, #_HX)
  #_BNLHX = Reshape(#_filled, #_shape)
  # = Transpose<perm: ints = [1, 0, 3, 2, 4]>(#_BNLHX)
"""
OVER_CHUNKS = """
  state_out, S = Scan<num_scan_inputs: int = 3, body: graph = chunk
    (float[b, h, k, v] s, float[b, h, k, 1] d, float[b, h, k, x] m, float[b, h, k, v] c)
    => (float[b, h, k, v] s_new, float[b, h, k, v] s_old)
    { STEP  s_old = Identity(s) }>(state, decay, M, C)
"""
JOIN = """
  y_BNLHV = Transpose<perm: ints = [1, 0, 3, 2, 4]>(y_chunks)
  y_shape = Concat<axis: int = 0>(B, filled, v_HX)
  y_filled = Reshape(y_BNLHV, y_shape)
  y = Slice(y_filled, zero, T, one)
"""
ONE = (
    "",
    "  # = Transpose<perm: ints = [0, 2, 1, 3]>(#_in)\n",
    "  s = Identity(state)  d = Identity(decay)  m = Identity(M)  c = Identity(C)  STEP"
    "  state_out = Identity(s_new)  S = Identity(state)",
    "  y = Transpose<perm: ints = [0, 2, 1, 3]>(y_chunks)\n",
)


# ---- generation 7 --------------------------------------------------------------------------------


def _constants7() -> dict[str, np.ndarray]:
    """Return what sums log-decays, what sees what, and the blocks of the inverse."""
    t = np.arange(L)
    until, before = t[:, None] >= t, t[:, None] > t
    middle = until[L // 2 - 1]
    grow, grow_before = until * 1.0 - middle, before * 1.0 - middle
    sums = np.concatenate([grow, -grow, grow_before, [middle], [~middle], [np.ones(L)]])
    seen = np.block([[until, until], [before, before]])
    found = {"sums": sums.astype(np.float32), "seen": seen, "eye": np.eye(L, dtype=np.float32)}
    for h in (1, 2, 4, 8):
        is_pair = t[:, None] // (2 * h) == t // (2 * h)
        found[f"below{h}"] = (is_pair & (t[:, None] // h > t // h)).astype(np.float32)
    return found


INSIDE7 = f"""
  none = Constant<value_float: float = 0.0>()
  sums_w = MatMul(sums, w)
  decays = Exp(sums_w)
  parts = Constant<value_ints: ints = [{L}, {L}, {L}, 1, 1, 1]>()
  grow, shrink, grow_before, from_start, to_end, total = Split<axis: int = -2>(decays, parts)
  r_grown = Mul(r, grow)
  a_grown = Mul(a, grow_before)
  k_shrunk = Mul(k, shrink)
  b_shrunk = Mul(b, shrink)
  read = Concat<axis: int = -2>(r_grown, a_grown)
  written = Concat<axis: int = -2>(k_shrunk, b_shrunk)
  written_T = Transpose<perm: ints = [MT]>(written)
  A_all = MatMul(read, written_T)
  A = Where(seen, A_all, none)
  A_r, A_a = Split<axis: int = -2, num_outputs: int = 2>(A)
  A_rk, A_rb = Split<axis: int = -1, num_outputs: int = 2>(A_r)
  A_ak, A_ab = Split<axis: int = -1, num_outputs: int = 2>(A_a)
  N1 = Mul(A_ab, below1)
  X1 = Add(eye, N1)
  N2 = Mul(A_ab, below2)
  N2X = MatMul(N2, X1)
  XN2X = MatMul(X1, N2X)
  X2 = Add(X1, XN2X)
  N4 = Mul(A_ab, below4)
  N4X = MatMul(N4, X2)
  XN4X = MatMul(X2, N4X)
  X4 = Add(X2, XN4X)
  N8 = Mul(A_ab, below8)
  N8X = MatMul(N8, X4)
  XN8X = MatMul(X4, N8X)
  X = Add(X4, XN8X)
  R = Mul(read, from_start)
  W = Mul(written, to_end)
  W_T = Transpose<perm: ints = [MT]>(W)
  R_r, R_a = Split<axis: int = -2, num_outputs: int = 2>(R)
  W_kT, W_bT = Split<axis: int = -1, num_outputs: int = 2>(W_T)
  A_akV = MatMul(A_ak, v)
  near = MatMul(X, A_akV)
  far = MatMul(X, R_a)
  V = Concat<axis: int = -2>(v, near)
  C = MatMul(W_T, V)
  M = MatMul(W_bT, far)
  decay = Transpose<perm: ints = [MT]>(total)
"""
STEP7 = """
      decayed = Mul(d, s)  turned = MatMul(m, s)  moved = Add(decayed, turned)
      s_new = Add(moved, c)
"""
END7 = """
  y_near = MatMul(A_r, V)
  A_rb_far = MatMul(A_rb, far)
  Q = Add(R_r, A_rb_far)
  y_far = MatMul(Q, S)
  y_chunks = Add(y_near, y_far)
"""


# ---- generations 5 and 6 -------------------------------------------------------------------------


def _constants6() -> dict[str, np.ndarray]:
    """Return what sums log-decays up to and from the middles of 4 levels, and who meets there."""
    t = np.arange(L)
    row, column = t[:, None], t
    reads, writes, meets = [], [], []
    for h in (1, 2, 4, 8):
        middle = row // (2 * h) * 2 * h + h  # of the row's block: the second half starts there
        reads.append((column >= middle) & (column < row))
        writes.append((column > row) & (column < middle))
        is_pair = row // (2 * h) == column // (2 * h)
        meets.append(is_pair & (row // h > column // h))
    ends = np.concatenate([row > column, row < column, np.ones((1, L), bool)])
    return {
        "levels": np.stack(reads + writes).astype(np.float32),
        "ends": ends.astype(np.float32),
        "meets": np.stack(meets),
    }


INSIDE6 = f"""
  none = Constant<value_float: float = 0.0>()
  floor = Constant<value_float: float = -10000.0>()
  minus3 = Constant<value_ints: ints = [-3]>()
  last = Constant<value_ints: ints = [-1]>()
  w_finite = Max(w, floor)
  w_1 = Unsqueeze(w_finite, minus3)
  level_sums = MatMul(levels, w_1)
  level_decays = Exp(level_sums)
  grow, shrink = Split<axis: int = -3, num_outputs: int = 2>(level_decays)
  r_1 = Unsqueeze(r, minus3)
  k_1 = Unsqueeze(k, minus3)
  read = Mul(r_1, grow)
  written = Mul(k_1, shrink)
  written_T = Transpose<perm: ints = [LEVELS_MT]>(written)
  A_levels = MatMul(read, written_T)
  A_met = Where(meets, A_levels, none)
  A = ReduceSum<keepdims: int = 0>(A_met, minus3)
  end_sums = MatMul(ends, w_finite)
  end_decays = Exp(end_sums)
  parts = Constant<value_ints: ints = [{L}, {L}, 1]>()
  from_start, to_end, total = Split<axis: int = -2>(end_decays, parts)
  Q = Mul(r, from_start)
  W = Mul(k, to_end)
  W_T = Transpose<perm: ints = [MT]>(W)
  C = MatMul(W_T, v)
  decay = Transpose<perm: ints = [MT]>(total)
  M = Identity(decay)
"""
STEP6 = "decayed = Mul(d, s)  s_new = Add(decayed, c)"
END6 = """
  minus2 = Constant<value_ints: ints = [-2]>()
  u_row = Unsqueeze(u, minus2)
  ru = Mul(r, u_row)
  ruk = Mul(ru, k)
  bonus = ReduceSum(ruk, last)
  y_self = Mul(bonus, v)
  y_near = MatMul(A, v)
  y_far = MatMul(Q, S)
  y_past = Add(y_near, y_far)
  y_chunks = Add(y_past, y_self)
"""


# ---- generation 4: a running maximum keeps every exponent ≤ 0 ------------------------------------

SCAN4 = """(w, u, k, v, num, den, top) => (y, num_out, den_out, top_out) {
  num_out, den_out, top_out, y = Scan<num_scan_inputs: int = 2,
    scan_input_axes: ints = [1, 1], scan_output_axes: ints = [1], body: graph = token
    (float[b, d] n0, float[b, d] d0, float[b, d] m0, float[b, d] k1, float[b, d] v1)
    => (float[b, d] n1, float[b, d] d1, float[b, d] m1, float[b, d] y1)
    {
      uk = Add(u, k1)
      both = Max(m0, uk)
      past_e = Sub(m0, both)
      past = Exp(past_e)
      self_e = Sub(uk, both)
      self = Exp(self_e)
      n_past = Mul(past, n0)
      n_self = Mul(self, v1)
      n_both = Add(n_past, n_self)
      d_past = Mul(past, d0)
      d_both = Add(d_past, self)
      y1 = Div(n_both, d_both)
      aged = Add(m0, w)
      m1 = Max(aged, k1)
      keep_e = Sub(aged, m1)
      keep = Exp(keep_e)
      new_e = Sub(k1, m1)
      new = Exp(new_e)
      n_keep = Mul(keep, n0)
      n_new = Mul(new, v1)
      n1 = Add(n_keep, n_new)
      d_keep = Mul(keep, d0)
      d1 = Add(d_keep, new)
    }>(num, den, top, k, v)
}"""
