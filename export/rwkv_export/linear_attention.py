r"""The recurrences of generations 5, 6 and 7 by ``com.microsoft::LinearAttention``.

onnxruntime has had the operator since 1.25.1; for those without, the same file brings a function of
that name, a ``Scan`` over tokens.

Its rule "gated_delta", S ← e^g S + β k (v - (e^g S)ᵀ k)ᵀ, erases under the key it
writes to. With e_t = (e^w_t α_t)^-½, Z_t = diag(e_t) S_t and u_t = (α_t e^-w_t)^½ κ̂_t, generation 7
is Z_t = (I - u uᵀ) diag(e_t e^w_t / e_{t-1}) Z_{t-1} + e_t k_t v_tᵀ: two tokens of the operator,
one that erases, with value 0, and one that writes, with its key scaled by ε = 2^-40 and its value
by 1/ε, so that what it erases is lost in rounding. As |u|² < 2 nothing grows. Generations 5 and 6
are "gated" with keys, values and decays one token later, because their output reads the state
before the update.

Inputs and outputs of the operator are [B, T, H·X]: heads side by side.
"""

__all__ = ["MICROSOFT", "linear_attention"]

MICROSOFT = "com.microsoft"
EPSILON = 2.0**-40


def linear_attention(op: str, heads: int, size: int) -> tuple[str, str]:
    """Return the body of the function for ``op`` and that of LinearAttention where it is missing.

    ``heads`` of ``size`` keys and values each.
    """
    text, rule = {"WKV6": (LINEAR6, GATED), "WKV7": (LINEAR7, GATED_DELTA)}[op]
    for name, value in (("WIDTH", heads * size), ("HEADS", heads), ("SIZE", size)):
        text = text.replace(name, str(value))
    return text, rule


LINEAR6 = """(r, w, k, v, u, state) => (y, state_out) {
  zero = Constant<value_ints: ints = [0]>()
  one = Constant<value_ints: ints = [1]>()
  last = Constant<value_ints: ints = [-1]>()
  far_end = Constant<value_ints: ints = [9223372036854775807]>()
  flat = Constant<value_ints: ints = [0, 0, -1]>()
  at_front = Concat<axis: int = 0>(zero, one, zero, zero, zero, last, zero, zero)
  k_before = Pad(k, at_front)
  v_before = Pad(v, at_front)
  w_before = Pad(w, at_front)
  r_flat = Reshape(r, flat)
  k_flat = Reshape(k_before, flat)
  v_flat = Reshape(v_before, flat)
  w_flat = Reshape(w_before, flat)
  y_flat, S = com.microsoft.LinearAttention<q_num_heads: int = HEADS, kv_num_heads: int = HEADS,
    update_rule: string = "gated", scale: float = 1.0>(r_flat, k_flat, v_flat, state, w_flat)
  v_shape = Shape(v)
  y_past = Reshape(y_flat, v_shape)
  u_row = Unsqueeze(u, zero)
  ru = Mul(r, u_row)
  ruk = Mul(ru, k)
  bonus = ReduceSum(ruk, last)
  y_self = Mul(bonus, v)
  y = Add(y_past, y_self)
  k_last = Slice(k, last, far_end, one)
  v_last = Slice(v, last, far_end, one)
  w_last = Slice(w, last, far_end, one)
  k_column = Transpose<perm: ints = [0, 2, 3, 1]>(k_last)
  v_row = Transpose<perm: ints = [0, 2, 1, 3]>(v_last)
  w_column = Transpose<perm: ints = [0, 2, 3, 1]>(w_last)
  decay = Exp(w_column)
  S_decayed = Mul(decay, S)
  new = MatMul(k_column, v_row)
  state_out = Add(S_decayed, new)
}"""

LINEAR7 = f"""(r, w, k, v, a, b, state) => (y, state_out) {{
  zero = Constant<value_ints: ints = [0]>()
  one = Constant<value_ints: ints = [1]>()
  two = Constant<value_ints: ints = [2]>()
  last = Constant<value_ints: ints = [-1]>()
  far_end = Constant<value_ints: ints = [9223372036854775807]>()
  flat = Constant<value_ints: ints = [0, -1, WIDTH]>()
  apart = Constant<value_ints: ints = [0, -1, HEADS, SIZE]>()
  pair = Constant<value_ints: ints = [0, -1, 2, HEADS, SIZE]>()
  at_front = Concat<axis: int = 0>(zero, one, zero, zero, zero, last, zero, zero)
  nothing = Constant<value_float: float = 0.0>()
  unit = Constant<value_float: float = 1.0>()
  half = Constant<value_float: float = 0.5>()
  tiny = Constant<value_float: float = 1e-30>()
  least = Constant<value_float: float = 1e-10>()
  scale_k = Constant<value_float: float = {EPSILON!r}>()
  scale_v = Constant<value_float: float = {1 / EPSILON!r}>()
  a_size = Abs(a)
  b_size = Abs(b)
  is_there = Greater(a_size, tiny)
  a_divides = Where(is_there, a_size, unit)
  rate_there = Div(b_size, a_divides)
  rate_above = Max(rate_there, least)
  rate = Where(is_there, rate_above, unit)
  log_rate = Log(rate)
  log_both = Add(w, log_rate)
  log_root = Mul(log_both, half)
  log_e = Sub(nothing, log_root)
  log_e_before = Pad(log_e, at_front)
  e = Exp(log_e)
  e_inverse = Exp(log_root)
  log_ratio = Sub(log_rate, w)
  log_ratio_root = Mul(log_ratio, half)
  ratio = Exp(log_ratio_root)
  u = Mul(ratio, a)
  w_e = Add(w, log_e)
  g = Sub(w_e, log_e_before)
  k_e = Mul(e, k)
  k_scaled = Mul(k_e, scale_k)
  v_scaled = Mul(v, scale_v)
  q = Mul(r, e_inverse)
  none_k = Mul(k, nothing)
  none_v = Mul(v, nothing)
  u_1 = Unsqueeze(u, two)
  k_1 = Unsqueeze(k_scaled, two)
  v_1 = Unsqueeze(v_scaled, two)
  g_1 = Unsqueeze(g, two)
  q_1 = Unsqueeze(q, two)
  none_k_1 = Unsqueeze(none_k, two)
  none_v_1 = Unsqueeze(none_v, two)
  keys = Concat<axis: int = 2>(u_1, k_1)
  values = Concat<axis: int = 2>(none_v_1, v_1)
  decays = Concat<axis: int = 2>(g_1, none_k_1)
  queries = Concat<axis: int = 2>(none_k_1, q_1)
  k_flat = Reshape(keys, flat)
  v_flat = Reshape(values, flat)
  g_flat = Reshape(decays, flat)
  q_flat = Reshape(queries, flat)
  keys_apart = Reshape(keys, apart)
  beta_shape = Shape<end: int = 3>(keys_apart)
  beta = ConstantOfShape<value: tensor = float[1] {{1.0}}>(beta_shape)
  y_flat, Z = com.microsoft.LinearAttention<q_num_heads: int = HEADS, kv_num_heads: int = HEADS,
    update_rule: string = "gated_delta", scale: float = 1.0>
    (q_flat, k_flat, v_flat, state, g_flat, beta)
  y_pairs = Reshape(y_flat, pair)
  y_second = Slice(y_pairs, one, two, two)
  y = Squeeze(y_second, two)
  last_root = Slice(log_root, last, far_end, one)
  last_inverse = Exp(last_root)
  e_column = Transpose<perm: ints = [0, 2, 3, 1]>(last_inverse)
  state_out = Mul(e_column, Z)
}}"""

# what an onnxruntime without the operator runs: the same rules, token by token
HEADS_APART = """
  H = Shape<start: int = 1, end: int = 2>(past_state)
  front = Constant<value_ints: ints = [0, 0]>()
  last = Constant<value_ints: ints = [-1]>()
  column = Constant<value_ints: ints = [-1]>()
  row = Constant<value_ints: ints = [-2]>()
  apart = Concat<axis: int = 0>(front, H, last)
  q_heads = Reshape(query, apart)
  k_heads = Reshape(key, apart)
  v_heads = Reshape(value, apart)
  g_heads = Reshape(decay, apart)
  factor = Exp(g_heads)
  q_rows = Unsqueeze(q_heads, row)
  k_columns = Unsqueeze(k_heads, column)
  v_rows = Unsqueeze(v_heads, row)
  f_columns = Unsqueeze(factor, column)
"""
TOGETHER = """
  y_heads = Squeeze(y_rows, row)
  together = Concat<axis: int = 0>(front, last)
  output = Reshape(y_heads, together)
}"""
GATED = (
    "(query, key, value, past_state, decay) => (output, present_state) {"
    + HEADS_APART
    + """
  present_state, y_rows = Scan<num_scan_inputs: int = 4, scan_input_axes: ints = [1, 1, 1, 1],
    scan_output_axes: ints = [1], body: graph = token
    (float[b, h, k, v] s0, float[b, h, 1, k] q, float[b, h, k, 1] c, float[b, h, 1, v] x,
     float[b, h, k, 1] f) => (float[b, h, k, v] s1, float[b, h, 1, v] o)
    {
      s_decayed = Mul(f, s0)
      s_new = Mul(c, x)
      s1 = Add(s_decayed, s_new)
      o = MatMul(q, s1)
    }>(past_state, q_rows, k_columns, v_rows, f_columns)
"""
    + TOGETHER
)
GATED_DELTA = (
    "(query, key, value, past_state, decay, beta) => (output, present_state) {"
    + HEADS_APART
    + """
  k_rows = Unsqueeze(k_heads, row)
  beta_1 = Unsqueeze(beta, row)
  beta_rows = Transpose<perm: ints = [0, 1, 3, 2]>(beta_1)
  beta_cells = Unsqueeze(beta_rows, column)
  present_state, y_rows = Scan<num_scan_inputs: int = 6,
    scan_input_axes: ints = [1, 1, 1, 1, 1, 1], scan_output_axes: ints = [1], body: graph = token
    (float[b, h, k, v] s0, float[b, h, 1, k] q, float[b, h, k, 1] c, float[b, h, 1, k] l,
     float[b, h, 1, v] x, float[b, h, k, 1] f, float[b, h, 1, 1] z)
    => (float[b, h, k, v] s1, float[b, h, 1, v] o)
    {
      s_decayed = Mul(f, s0)
      found = MatMul(l, s_decayed)
      missing = Sub(x, found)
      wanted = Mul(z, missing)
      s_new = Mul(c, wanted)
      s1 = Add(s_decayed, s_new)
      o = MatMul(q, s1)
    }>(past_state, q_rows, k_columns, k_rows, v_rows, f_columns, beta_cells)
"""
    + TOGETHER
)
