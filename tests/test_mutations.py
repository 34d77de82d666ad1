"""The tests are tested: faults that implementations of RWKV really had, put into this project.

The list is the trap list of the field: what published re-implementations got wrong and what their
own checks let through. Each must turn the named test red.
"""

import re
from pathlib import Path

import pytest

from rwkv_core.testing import Mutation, is_caught

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mutations.md"

V4, V5, V6, V7 = (f"rwkv_core/mixers/rwkv{g}.py" for g in "4567")
BASE, TRUNK, PRECISION = (
    "rwkv_core/mixers/base.py",
    "rwkv_core/backbone.py",
    "rwkv_core/precision.py",
)
WKV4, WKV6, WKV7 = (f"rwkv_core/ops/wkv{g}" for g in "467")
LAYER7 = "rwkv_core/ops/rwkv7_layer.py"
NUMPY7 = "tests/test_rwkv7.py::test_model_matches_an_independent_numpy_forward"
NUMPY = "tests/test_generations.py::test_model_matches_an_independent_numpy_forward"
INIT = "tests/test_generations.py -k initial"
OP4, OP6, OP7 = "tests/test_wkv4.py", "tests/test_wkv6.py", "tests/test_wkv7.py"
GROUPS = "tests/test_generations.py -k optimiser"
CAST = "tests/test_precision.py -k 'bit or trained or training or fp32'"

GGMF, FORMATS = "rwkv_core/formats/ggmf.py", "rwkv_core/formats/__init__.py"
FILES = "tests/test_formats_ggmf.py tests/test_formats.py"

MUTATIONS = [
    # generation 7
    Mutation("7: group-norm eps 1e-5", V7, "norm_eps: float = 64e-5", "norm_eps: float = 1e-5", NUMPY7),
    Mutation("7: k_a ignored", LAYER7, "k = k * (1 - k_a + alpha * k_a)", "pass", NUMPY7),
    Mutation("7: bonus r_k dropped", LAYER7, "bias_D, eps) + bonus_H1V", "bias_D, eps)", NUMPY7),
    Mutation("7: bonus before the norm", LAYER7, "head_norm(y_H1V, weight_D, bias_D, eps) + bonus_H1V", "head_norm(y_H1V + bonus_H1V, weight_D, bias_D, eps)", NUMPY7),
    Mutation("7: decay 0.1 % off", LAYER7, "math.exp(-0.5)\n", "math.exp(-0.501)\n", NUMPY7),
    Mutation("7: no value residual", LAYER7, "v = v + (v_first - v)", "v = v + 0 * (v_first - v)", NUMPY7),
    Mutation("7: v_first of the layer before", V7, "        k_k_HK = self", "        shared = shared._replace(v_first=v)\n        k_k_HK = self", NUMPY7),
    Mutation("7: key norm √(Σ + 1e-6)", LAYER7, "kappa / kappa.norm(dim=-1, keepdim=True).clamp_min(1e-12)", "kappa / (kappa.square().sum(-1, keepdim=True) + 1e-6).sqrt()", NUMPY7),
    Mutation("7: removal key from the rescaled key", LAYER7, "    kappa = (k *", "    k = k * (1 + (alpha - 1) * _rows(k_a, *size))\n    kappa = (k *", NUMPY7),
    Mutation("7: no tanh in the decay", V7, "torch.tanh(product(x_w, self.w1))", "product(x_w, self.w1)", NUMPY7),
    Mutation("7: a nonlinearity in α", V7, "product(product(x_a, self.a1), self.a2)", "product(torch.tanh(product(x_a, self.a1)), self.a2)", NUMPY7),
    Mutation("7: gate without σ", V7, "torch.sigmoid(product(x_g, self.g1))", "product(x_g, self.g1)", NUMPY7),
    Mutation("7: w0 trained at the common rate", V7, '"w0": 2.0', '"w0": 1.0', "tests/test_rwkv7.py -k optimiser"),
    Mutation("7: k_a starts at 1", V7, "self.k_a.fill_(1.02)", "self.k_a.fill_(1.0)", "tests/test_rwkv7.py -k initial"),
    Mutation("7: delta term dropped", f"{WKV7}/reference.py", " + b_BH1K.mT @ removed_BH1V", "", OP7),
    Mutation("7: read before the update", f"{WKV7}/reference.py", "    state_BHKV = w", "    before = state_BHKV\n    state_BHKV = w", OP7, ("return r_BH1K @ state_BHKV", "return r_BH1K @ before")),
    Mutation("7: state V×K", f"{WKV7}/reference.py", "removed_BH1V = a_BH1K @ state_BHKV", "removed_BH1V = a_BH1K @ state_BHKV.mT", OP7),
    Mutation("7: chunk inverse as a product", f"{WKV7}/chunked.py", "torch.linalg.solve_triangular(unit - A_ab, unit, upper=False, unitriangular=True)", "(unit + A_ab) @ (unit + A_ab @ A_ab)", OP7),
    Mutation("7: chunk drops the state", f"{WKV7}/chunked.py", "torch.baddbmm(decay_n * state, written_n.mT, both)", "written_n.mT @ both", OP7),
    Mutation("7: what does not see is multiplied by 0", f"{WKV7}/chunked.py", "(read @ written.mT).masked_fill(above, 0)", "(read @ written.mT) * ~above", OP7),
    Mutation("7: decay's gradient without the state's", f"{WKV7}/chunked.py", "dg[..., -1, :] += (after * dafter).sum(-1)", "pass", OP7),
    # generation 6
    Mutation("6: shift order r w k v g", V6, "x_w, x_k, x_v, x_r, x_g = mixed", "x_r, x_w, x_k, x_v, x_g = mixed", NUMPY),
    Mutation("6: no tanh in the shift", V6, "h_R = torch.tanh(torch.addcmul(x_D, d_D, self.time_maa_x) @ self.time_maa_w1)", "h_R = torch.addcmul(x_D, d_D, self.time_maa_x) @ self.time_maa_w1", NUMPY),
    Mutation("6: no tanh in the decay", V6, "torch.tanh(x_w @ self.time_decay_w1)", "(x_w @ self.time_decay_w1)", NUMPY),
    Mutation("6: decay's sign", V6, "(r, -raw_D.exp(), k, v)", "(r, -(-raw_D).exp(), k, v)", NUMPY),
    Mutation("6: group-norm eps 1e-5", V6, "norm_eps: float = 64e-5", "norm_eps: float = 1e-5", NUMPY),
    Mutation("6: key not stabilised", V6, "if self.stabilize_key:", "if False:", NUMPY),
    Mutation("6: gate σ for silu", V6, "F.silu(self.gate(x_g))", "torch.sigmoid(self.gate(x_g))", NUMPY),
    Mutation("6: channel receptance dropped", V6, "torch.sigmoid(receptance_D) * ", "", NUMPY),
    Mutation("6: bonus dropped", f"{WKV6}/reference.py", "state_BHKV + u_H1K.mT * new_BHKV", "state_BHKV", OP6),
    Mutation("6: read after the update", f"{WKV6}/reference.py", "state_BHKV + u_H1K.mT * new_BHKV", "w_BH1K.exp().mT * state_BHKV + new_BHKV", OP6),
    Mutation("6: decay on the value axis", f"{WKV6}/reference.py", "decay_BH1K.mT * state_BHKV", "decay_BH1K * state_BHKV", OP6),
    Mutation("6: exponents as differences of sums", f"{WKV6}/chunked.py", "read_2 * total_1.exp()", "read_2 * (total_1 + total_2 - total_2).exp()", OP6),
    Mutation("6: halves meet at the wrong place", f"{WKV6}/chunked.py", "written_1 * total_2.exp()", "written_1", OP6),
    Mutation("6: decay of half a block", f"{WKV6}/chunked.py", "(total_1 + total_2).squeeze(-2)", "total_2.squeeze(-2)", OP6),
    Mutation("6: decay's gradient without the state's", f"{WKV6}/chunked.py", "dtotal = (decay * (states * dafter).sum(-1, keepdim=True)).mT", "dtotal = 0 * decay.mT", OP6),
    # generation 5
    Mutation("5.0: bonus not exponentiated", V5, "u_H1K = u_H1K.exp()", "pass", NUMPY),
    Mutation("5.2: bonus exponentiated", V5, 'if self.bonus_name == "time_first":\n            u_H1K', 'if True:\n            u_H1K', NUMPY),
    Mutation("5: decay exponentiated once", V5, "-self.time_decay.double().exp()", "self.time_decay.double()", NUMPY),
    Mutation("5: group-norm eps 1e-5", V5, "norm_eps: float = 64e-5", "norm_eps: float = 1e-5", NUMPY),
    Mutation("5: gate dropped", V5, "y_D if g_D is None else y_D * g_D", "y_D", NUMPY),
    Mutation("5: time_first trained at the common rate", V5, '"time_first": 3.0', '"time_first": 1.0', GROUPS),
    Mutation("5: width 4 D", V5, "int(3.5 * dim)", "int(4 * dim)", "tests/test_generations.py -k widths"),
    # generation 4
    Mutation("4: u ignored", f"{WKV4}/reference.py", "now = u_D + k_BD", "now = k_BD", OP4),
    Mutation("4: maximum starts at 0", f"{WKV4}/__init__.py", "EMPTY = -1e30", "EMPTY = 0.0", OP4),
    Mutation("4: no running maximum", f"{WKV4}/reference.py", "best = torch.maximum(faded, k_BD).detach()", "best = torch.zeros_like(faded)", OP4),
    Mutation("4: bonus decays", f"{WKV4}/reference.py", "now = u_D + k_BD", "now = u_D + k_BD + w_D", OP4),
    Mutation("4: scan joins with one decay", f"{WKV4}/scan.py", "+ n * w_D", "+ w_D", OP4),
    Mutation("4: states mixed as if linear", V4, "torch.lerp(a * self.wkv_num_BD, b * other.wkv_num_BD", "torch.lerp(self.wkv_num_BD, other.wkv_num_BD", "tests/test_generations.py -k mixture"),
    Mutation("4: receptance without σ", V4, "torch.sigmoid(self.receptance(x_r)), self.key", "self.receptance(x_r), self.key", NUMPY),
    Mutation("4: mixing turned round", V4, "torch.addcmul(previous_BTD, x_BTD - previous_BTD, mix_3D)", "torch.addcmul(x_BTD, previous_BTD - x_BTD, mix_3D)", NUMPY),
    Mutation("4: time_first all ones", V4, "math.log(0.3) + 0.5 * ((n + 1) % 3 - 1)", "torch.ones(self.dim)", INIT),
    # what all share
    Mutation("norm over the width, not the head", "rwkv_core/ops/head_norm.py", "y_H1V = F.layer_norm(y_H1V, rows[-1:], eps=eps)", "y_H1V = F.layer_norm(y_H1V, y_H1V.shape[-3:], eps=eps)", NUMPY),
    Mutation("first norm left out", TRUNK, "shared, after = Shared(tokens_BT), []\n        x_BTD = self.ln_in(x_BTD)", "shared, after = Shared(tokens_BT), []", NUMPY),
    Mutation("shift sees the same token", "rwkv_core/ops/shift.py", "x_BSD[:, :-1], x_BSD", "x_BSD[:, 1:], x_BSD", NUMPY),
    Mutation("one layer divides by zero", V5, "rho = self.layer / max(self.depth - 1, 1)", "rho = self.layer / (self.depth - 1)", "tests/test_generations.py -k one_layer"),
    Mutation("weight decay on low-rank factors", BASE, 'p.ndim >= 2 and name.endswith(".weight")', "p.ndim >= 2", GROUPS),
    Mutation("state in half precision", "rwkv_core/ops/_common.py", "else torch.float32", "else x.dtype", f"{OP6} -k dtypes"),
    Mutation("16 bit in place", PRECISION, "copy.deepcopy(model).eval()", "model.eval()", CAST),
    Mutation("fp16 scale forgets the eps", PRECISION, "norm.eps *= scale**2", "pass", CAST),
    Mutation("fp16 scale of generation 7", V7, '    state_type', '    fp16_scaled = ("output",)\n    state_type', CAST, ('    official_rows = frozenset(("x_k",))', '    official_rows = frozenset(("x_k",))\n    fp16_scaled = ("value",)')),
    # weight files and tokens
    Mutation("ggmf: low-rank factors of 7 as stored", GGMF, 'if generation == 7 and re.fullmatch(r"[wavg][12]", part):', "if False:", FILES),
    Mutation("ggmf: decay of 5 as stored", GGMF, "return _log_of(_without_last_one(rate.clamp(1e-30, 200.0)))", "return _without_last_one(rate).float()", FILES),
    Mutation("ggmf: decay of 4 as stored", GGMF, "tensor = _log_of(-tensor.double())", "tensor = tensor.float()", FILES),
    Mutation("ggmf: bonus of 5.0 exponentiated twice", GGMF, 'if part == "time_first":', "if False:", FILES),
    Mutation("ggmf: shift factors of 6 as stored", GGMF, "return tensor.transpose(1, 2)", "return tensor", FILES),
    Mutation("ggmf: eps 64e-5 for generation 5", FORMATS, "ggmf.NORM_EPS_5 if generation == 5 else None", "None", FILES),
    Mutation("ggmf: mixes of 7 in another order", GGMF, "zip(MIXES, tensor, strict=True)", "zip(MIXES[::-1], tensor, strict=True)", FILES),
    Mutation("Q5: fifth bits from the top", "rwkv_core/formats/blocks.py", 'bitorder="little"', 'bitorder="big"', FILES),
    Mutation("Q4: halves of a block exchanged", "rwkv_core/formats/blocks.py", "out[:, :16] = low & 15\n        out[:, 16:] = low >> 4", "out[:, 16:] = low & 15\n        out[:, :16] = low >> 4", FILES),
    Mutation("fla: five-way map of 6 not reordered", "rwkv_core/formats/hf_names.py", '"wkvrg", "rwkvg"', '"wkvrg", "wkvrg"', "tests/test_formats_huggingface.py"),
    Mutation("tuned state K×V taken for V×K", "rwkv_core/formats/official.py", 'tensor.transpose(-1, -2) if name.endswith(".time_state") else tensor', "tensor", "tests/test_formats.py"),
    Mutation("generation told by the gate alone", "rwkv_core/formats/official.py", 'exp_bonus = "blocks.0.att.time_first" in model.found', 'exp_bonus = "blocks.0.att.gate.weight" not in model.found', "tests/test_formats.py"),
    Mutation("World: first match, not the longest", "rwkv_text/world.py", "best, start = token, at", "best, start = token, at\n                    break", "tests/test_tokenizer.py"),
    Mutation("streaming breaks characters", "rwkv_text/tokenizer.py", "return self._decoder.decode(self._tokenizer.decode_bytes([token]))", 'return self._tokenizer.decode_bytes([token]).decode("utf-8", "replace")', "tests/test_tokenizer.py"),
    Mutation("no token 0 at the start", "rwkv_text/host.py", "tokens, row = [BOUNDARY, *prompt]", "tokens, row = [*prompt]", "tests/test_text.py tests/test_tokenizer_model.py"),
    Mutation("hold on large logits dropped", "rwkv_text/adapter.py", "(nats + 0.5e-4 * hold) / n", "nats / n", "tests/test_text.py"),
]  # fmt: skip


def table() -> str:
    rows = ["| fault | where | seen by |", "|---|---|---|"]
    rows += [f"| {m.fault} | `{m.file}` | `{m.test}` |" for m in MUTATIONS]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.fault)
def test_the_fault_can_be_injected(mutation):
    source = (ROOT / mutation.file).read_text("utf-8")
    assert mutation.apply(source) != source


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.fault)
def test_the_fault_is_caught(mutation):
    assert is_caught(mutation, ROOT)


def test_a_harmless_change_is_not_taken_for_a_fault(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "number.py").write_text("ANSWER = 42\n")
    (tmp_path / "tests" / "test_it.py").write_text(
        "import number\ndef test_it():\n    assert number.ANSWER > 40\n"
    )
    harmless = Mutation("harmless", "number.py", "42", "43", "tests/test_it.py")
    assert not is_caught(harmless, tmp_path)
    assert is_caught(harmless._replace(new="4"), tmp_path)
    with pytest.raises(RuntimeError, match="did not run"):
        is_caught(harmless._replace(test="tests/test_other.py"), tmp_path)
    with pytest.raises(ValueError, match="has 0 times 'x'"):
        is_caught(harmless._replace(old="x"), tmp_path)


def test_the_page_holds_the_table():
    """To renew it, paste what this prints."""
    written = re.search(r"^\| fault .*(?:\n\|.*)*\n", PAGE.read_text("utf-8"), re.M)
    assert written is not None
    assert written.group() == table(), table()
