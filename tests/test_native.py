"""The native CPU ops: against float64, on bad input, and how they are built, found and refused."""

import importlib.util
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from rwkv_core.errors import NativeError
from rwkv_core.ops import WKV4State, bi_wkv, wkv4, wkv6, wkv7
from rwkv_core.ops.native import build, library
from rwkv_core.testing import check_op, relative_error

pytestmark = pytest.mark.usefixtures("native_library")

ROOT = Path(__file__).resolve().parents[1]
BOUND = {"output_bound": 2e-6, "gradient_bound": 2e-6}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Give a cache folder of its own, in which nothing is built."""
    monkeypatch.setenv("RWKV_CACHE", str(tmp_path / "cache"))
    library.forget()
    yield tmp_path / "cache" / "native"
    library.forget()


def own_test(op: str) -> ModuleType:
    """Return that op's own test, for its inputs."""
    spec = importlib.util.spec_from_file_location(f"_{op}", ROOT / "tests" / f"test_{op}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wkv7_inputs, wkv6_inputs = own_test("wkv7").make_inputs, own_test("wkv6").make_inputs
wkv4_inputs, wkv4_run = own_test("wkv4").make_inputs, own_test("wkv4").run
OPS = {"wkv7": (wkv7, wkv7_inputs), "wkv6": (wkv6, wkv6_inputs)}


def with_impl(
    op: Callable[..., tuple[Tensor, ...]], impl: str
) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *x: op(*x, impl=impl)


def bi_inputs(B: int, T: int, C: int, decay: float = 3.0, spread: float = 1.0) -> list[Tensor]:
    w_C = torch.linspace(-decay, decay, C)
    return [w_C, torch.randn(C), spread * torch.randn(B, T, C), torch.randn(B, T, C)]


def native_wkv4(*x: Tensor) -> tuple[Tensor, ...]:
    y_BTD, (num_BD, den_BD, _) = wkv4(*x[:4], WKV4State(*x[4:]), impl="native")
    return y_BTD, num_BD, den_BD


def native_bi(*x: Tensor) -> tuple[Tensor, ...]:
    return (bi_wkv(*x, impl="native"),)


def reference_bi(*x: Tensor) -> tuple[Tensor, ...]:
    return (bi_wkv(*x, impl="reference"),)


# ---- numbers


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("K", "V"), [(8, 12), (64, 64), (5, 3), (1, 17), (33, 40), (16, 128)])
@pytest.mark.parametrize("T", [1, 7, 32, 67])
def test_matches_float64_at_any_head_size(op: str, T: int, K: int, V: int, isa: str) -> None:
    run, make = OPS[op]
    for state in (True, False):
        inputs = make(2, T, 3, K, V, state=state)
        check_op(with_impl(run, "native"), with_impl(run, "reference"), inputs, **BOUND)


@pytest.mark.parametrize("at_floor", [True, False], ids=["floor", "spread"])
@pytest.mark.parametrize("repeated_keys", [True, False], ids=["repeated", "distinct"])
def test_wkv7_is_exact_over_2048_tokens(repeated_keys: bool, at_floor: bool, isa: str) -> None:
    inputs = wkv7_inputs(1, 2048, 2, 16, 24, repeated_keys=repeated_keys, at_floor=at_floor)
    check_op(with_impl(wkv7, "native"), with_impl(wkv7, "reference"), inputs, **BOUND)


@pytest.mark.parametrize("w", [0.0, -1e-4, -0.5, -0.75, -3.0, -20.0, -1e4])
def test_wkv7_takes_any_decay(w: float, isa: str) -> None:
    """At -0.69 the way a decay is applied changes; -3 and below overflow the chunked form."""
    inputs = wkv7_inputs(1, 70, 2, 16, 16)
    inputs[1][..., ::2] = w
    inputs[1][:, ::3] = w
    check_op(with_impl(wkv7, "native"), with_impl(wkv7, "reference"), inputs, **BOUND)


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-token"])
@pytest.mark.parametrize("ww", [(-8, 2), (-8, 4), (3, 4), (-8, 12), (-9, -8)], ids=str)
def test_wkv6_is_exact_at_any_decay(ww: tuple[int, int], static: bool, isa: str) -> None:
    inputs = wkv6_inputs(1, 300, 2, 16, 24, ww=ww, static=static)
    check_op(with_impl(wkv6, "native"), with_impl(wkv6, "reference"), inputs, **BOUND)


@pytest.mark.parametrize("op", OPS)
def test_a_strong_decay_keeps_its_digits_where_nothing_is_written(op: str, isa: str) -> None:
    run, make = OPS[op]
    inputs = make(1, 1, 1, 8, 8)
    inputs[1].fill_(-9.0)
    inputs[2].zero_()
    if op == "wkv7":
        inputs[5].zero_()
    _, after = run(*inputs, impl="native")
    assert relative_error(after, inputs[-1].double() * torch.tensor(-9.0).double().exp()) < 1e-6


@pytest.mark.parametrize("decay", [3.0, 60.0, 61.0, 400.0, 1e5])
@pytest.mark.parametrize("T", [1, 2, 7, 196, 577])
def test_bi_wkv_matches_float64_at_any_decay(T: int, decay: float, isa: str) -> None:
    for spread in (1.0, 8.0):
        inputs = bi_inputs(2, T, 21, decay, spread)
        ours = [x.clone().requires_grad_() for x in inputs]
        truth = [x.double().requires_grad_() for x in inputs]
        (y,), (e,) = native_bi(*ours), reference_bi(*truth)
        assert relative_error(y, e) <= 2e-6
        weight = torch.randn_like(y)
        grads = torch.autograd.grad((y * weight).sum(), ours)
        expected = torch.autograd.grad(
            (e * weight).sum(), truth, allow_unused=True, materialize_grads=True
        )
        # what is zero in truth may be off by a rounding of the others
        floor = float(expected[3].abs().max())
        for g, t in zip(grads, expected, strict=True):
            scale = float(t.abs().max())
            assert float((g - t).abs().max()) <= 2e-6 * (scale if scale > 1e-9 else floor)


def test_bi_wkv_keeps_its_digits_at_equal_keys(isa: str) -> None:
    """A sum of equal numbers in fp32 is rounded the same way at every token."""
    w_C, u_C, k_BTC, v_BTC = bi_inputs(1, 1000, 20)
    check_op(native_bi, reference_bi, [w_C, u_C, k_BTC[:, :1] + 0 * k_BTC, v_BTC + 3], **BOUND)


@pytest.mark.slow
def test_bi_wkv_is_exact_over_4096_tokens() -> None:
    check_op(native_bi, reference_bi, bi_inputs(1, 4096, 20, 60.0), **BOUND)


@pytest.mark.parametrize("D", [1, 16, 21, 64])
@pytest.mark.parametrize("T", [1, 7, 32, 33, 67])
def test_wkv4_matches_float64_at_any_width(T: int, D: int, isa: str) -> None:
    for state in (True, False):
        inputs = wkv4_inputs(2, T, D, state=state)
        check_op(wkv4_run("native"), wkv4_run("reference"), inputs, **BOUND)


# a decay of -1e-4 sums hundreds of tokens, at -0.3466 its exponent hides all of it, -20 forgets
@pytest.mark.parametrize("w", [0.0, -1e-4, -0.3465, -0.3466, -1.0, -20.0, -1e4])
@pytest.mark.parametrize("keys", ["normal", "wide", "±60", "rising", "falling", "equal", "masked"])
def test_wkv4_is_exact_at_any_decay_and_key(keys: str, w: float, isa: str) -> None:
    inputs = wkv4_inputs(2, 300, 18, keys=30.0 if keys == "wide" else 1.0, state=keys != "±60")
    inputs[0][::2] = w
    k_BTD = inputs[2]
    ramp_BTD = torch.linspace(-60, 60, 300)[None, :, None].expand_as(k_BTD)
    inputs[2] = {
        "±60": torch.where(k_BTD > 0, 60.0, -60.0),
        "rising": ramp_BTD.clone(),
        "falling": -ramp_BTD,
        "equal": torch.full_like(k_BTD, 0.1),
        "masked": k_BTD.clone().index_fill_(1, torch.arange(40, 290), -1e4),
    }.get(keys, k_BTD)
    check_op(wkv4_run("native"), wkv4_run("reference"), inputs, **BOUND)


@pytest.mark.parametrize("key", [-200.0, -60.0, 60.0, 200.0])
def test_wkv4_takes_any_first_key(key: float, isa: str) -> None:
    """An empty state, and one whose maximum is 0 instead."""
    k, v = torch.full((1, 3, 2), key), torch.randn(1, 3, 2)
    zeros = torch.zeros(1, 2)
    for state in (None, WKV4State(zeros, zeros, zeros)):
        y, after = wkv4(torch.tensor([-0.5, -3.0]), zeros[0], k, v, state, impl="native")
        torch.testing.assert_close(y[:, 0], v[:, 0])
        assert all(x.isfinite().all() for x in (y, *after))


def test_wkv4_holds_the_same_state_as_the_loop(isa: str) -> None:
    w, u, k, v, *state = wkv4_inputs(2, 37, 18)
    states = [wkv4(w, u, k, v, WKV4State(*state), impl=i).state for i in ("reference", "native")]
    for a, b in zip(*states, strict=True):
        assert relative_error(b, a) < 2e-6


def test_wkv4_in_pieces_is_the_whole() -> None:
    w, u, k, v, *state = wkv4_inputs(2, 50, 18)
    y, after = wkv4(w, u, k, v, WKV4State(*state), impl="native")
    piece = WKV4State(*state)
    for t in range(50):
        one, piece = wkv4(w, u, k[:, t : t + 1], v[:, t : t + 1], piece, impl="native")
        assert relative_error(one, y[:, t : t + 1]) < 2e-6
    for a, b in zip(piece, after, strict=True):
        assert relative_error(a, b) < 4e-6


def all_ops() -> list[tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]]:
    """Return every native op with inputs that several threads share."""
    pairs = [(with_impl(run, "native"), make(3, 70, 5, 16, 24)) for run, make in OPS.values()]
    return [
        *pairs,
        (native_wkv4, wkv4_inputs(3, 70, 100)),
        (native_bi, bi_inputs(3, 70, 100, 20.0)),
        (native_bi, bi_inputs(3, 9, 40, 99.0)),
    ]


def outcome(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves)]


def test_the_number_of_threads_changes_no_bit() -> None:
    for run, inputs in all_ops():
        expected = outcome(run, inputs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(outcome(run, inputs), expected, strict=True):
                assert torch.equal(a, b)
        torch.set_num_threads(1)


def test_a_row_alone_gives_the_same_bits() -> None:
    rows = slice(1, 2)
    w, u, k, v, *state4 = wkv4_inputs(3, 40, 20)
    y, after = wkv4(w, u, k, v, WKV4State(*state4), impl="native")
    alone, last = wkv4(w, u, k[rows], v[rows], WKV4State(*(x[rows] for x in state4)), impl="native")
    for a, b in zip((alone, *last), (y, *after), strict=True):
        assert torch.equal(a, b[rows])
    for op, make in OPS.values():
        *inputs, state = make(3, 40, 4, 16, 24)
        shared = [x if x.ndim == 2 else x[rows] for x in inputs]
        whole = op(*inputs, state, impl="native")
        for a, b in zip(op(*shared, state[rows], impl="native"), whole, strict=True):
            assert torch.equal(a, b[rows])


# ---- bad input


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_and_no_sequences(op: str) -> None:
    run, make = OPS[op]
    *inputs, state = make(2, 0, 3, 4, 6)
    y, after = run(*inputs, state, impl="native")
    assert y.shape == (2, 0, 3, 6)
    assert torch.equal(after, state)
    results = outcome(with_impl(run, "native"), make(0, 5, 3, 4, 6))
    assert results[0].shape == (0, 5, 3, 6)
    assert all(x.isfinite().all() for x in results)


def test_wkv4_without_tokens_or_sequences() -> None:
    w, u, k, v, *state = wkv4_inputs(2, 0, 20)
    y, after = wkv4(w, u, k, v, WKV4State(*state), impl="native")
    assert y.shape == (2, 0, 20)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    inputs = [x[:0] if x.ndim > 1 else x for x in wkv4_inputs(1, 5, 20)]
    y, *others = outcome(native_wkv4, inputs)
    assert y.shape == (0, 5, 20)
    assert not any(x.any() for x in others)


def test_bi_wkv_without_sequences() -> None:
    y, *grads = outcome(native_bi, bi_inputs(0, 5, 20))
    assert y.shape == (0, 5, 20)
    assert not any(g.any() for g in grads)


def test_layout_in_memory_does_not_matter() -> None:
    for run, inputs in all_ops():
        expected = outcome(run, inputs)
        misaligned = []
        strided = []
        for x in inputs:
            buffer = torch.full((x.numel() + 1,), torch.nan)
            misaligned.append(buffer[1:].view_as(x).copy_(x))
            strided.append(torch.stack([x, x], -1)[..., 0])
        flipped = [x.mT.contiguous().mT if x.ndim > 1 else x for x in inputs]
        for changed in (misaligned, strided, flipped):
            # used as they are: a clone of a leaf would be contiguous again
            for a, b in zip(run(*changed), expected, strict=False):
                assert torch.equal(a, b)
            total = sum(y.square().sum() for y in run(*[x.requires_grad_() for x in changed]))
            grads = torch.autograd.grad(total, changed)  # type: ignore[arg-type]
            for a, b in zip(grads, expected[-len(inputs) :], strict=True):
                assert torch.equal(a, b)


def test_gradients_that_are_not_contiguous() -> None:
    for run, inputs in all_ops():
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, *_ = run(*leaves)
        plain = torch.randn_like(y)
        expected = torch.autograd.grad(y, leaves, plain, retain_graph=True)
        for a, b in zip(
            torch.autograd.grad(y, leaves, plain.mT.contiguous().mT), expected, strict=True
        ):
            assert torch.equal(a, b)


def test_gradients_of_some_inputs_only() -> None:
    for run, inputs in all_ops():
        expected = outcome(run, inputs)[-len(inputs) :]
        for i in range(len(inputs)):
            leaves = [x.clone().requires_grad_(i == n) for n, x in enumerate(inputs)]
            sum(y.square().sum() for y in run(*leaves)).backward()  # type: ignore[union-attr]
            assert [x.grad is not None for x in leaves] == [i == n for n in range(len(inputs))]
            assert torch.equal(leaves[i].grad, expected[i])


def test_half_precision_is_computed_in_fp32() -> None:
    for op, make in OPS.values():
        half = [x.bfloat16() for x in make(1, 40, 2, 4, 6, state=False)]
        y, after = op(*half, impl="native")
        exact, last = op(*(x.float() for x in half), impl="native")
        assert torch.equal(y, exact.bfloat16())
        assert torch.equal(after, last)
    half = [x.bfloat16() for x in wkv4_inputs(1, 40, 20, state=False)]
    y, state = wkv4(*half, impl="native")
    exact, expected = wkv4(*(x.float() for x in half), impl="native")
    assert torch.equal(y, exact.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
    w, u, k, v = bi_inputs(2, 9, 4)
    y = bi_wkv(w, u, k.half(), v.half(), impl="native")
    assert torch.equal(y, bi_wkv(w, u, k.half().float(), v.half().float(), impl="native").half())


def test_nan_stays_where_it_belongs() -> None:
    for run, inputs in all_ops():
        clean = run(*inputs)[0]
        for i in [i for i, x in enumerate(inputs) if x.ndim > 2]:
            broken = [x.clone() for x in inputs]
            broken[i][1, 3] = torch.nan
            y = run(*broken)[0]
            assert torch.equal(y[0], clean[0])
            assert torch.equal(y[2], clean[2])
            assert y[1].isnan().any()


def test_second_derivatives_are_refused() -> None:
    for run, inputs in all_ops():
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, *_ = run(*leaves)
        (g, *_) = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with pytest.raises(NativeError, match="no second derivative; "):
            g.sum().backward()


def test_fp64_and_other_devices_are_refused_by_name_and_avoided_by_auto() -> None:
    for op, make in OPS.values():
        exact = make(1, 5, 2, 4, 6, dtype=torch.float64)
        with pytest.raises(NativeError, match=r"impl='native': .*the tensors are fp64"):
            op(*exact, impl="native")
        assert op(*exact).y_BTHV.dtype == torch.float64
    exact = wkv4_inputs(1, 5, 4, state=False, dtype=torch.float64)
    with pytest.raises(NativeError, match=r"wkv4: impl='native': .*the tensors are fp64"):
        wkv4(*exact, impl="native")
    assert wkv4(*exact).y_BTD.dtype == torch.float64
    with pytest.raises(NativeError, match="op: impl='native': tensors are on meta"):
        library.check("op", torch.empty(1, device="meta"))
    with pytest.raises(NativeError, match="fp64"):
        bi_wkv(*(x.double() for x in bi_inputs(1, 3, 4)), impl="native")


def test_many_python_threads_at_once() -> None:
    pairs = all_ops()
    expected = [outcome(*pair) for pair in pairs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: [outcome(*pair) for pair in pairs], range(16)):
            for ours, truth in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


class Rows(torch.utils.data.Dataset):
    """A dataset whose workers run every op."""

    def __init__(self) -> None:
        self.pairs = all_ops()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        results = [x.detach() for pair in self.pairs for x in outcome(*pair)]
        # torch's own operations would hang with more than the one thread a worker has
        torch.set_num_threads(2)
        results += [x for run, inputs in self.pairs for x in run(*inputs)]
        torch.set_num_threads(1)
        return results


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_after_threads_ran_in_the_parent() -> None:
    rows = Rows()
    expected = rows[0]
    for found in torch.utils.data.DataLoader(
        rows, num_workers=2, multiprocessing_context="fork", batch_size=None, timeout=60
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- what traces it


class Op(nn.Module):
    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *x: Tensor) -> Tensor:
        return self.run(*x)[0]


def test_compiles_without_graph_breaks() -> None:
    for run, inputs in all_ops()[:4]:
        torch._dynamo.reset()
        compiled = torch.compile(Op(run), fullgraph=True, backend="aot_eager")
        results = [outcome(lambda *x, f=f: (f(*x),), inputs) for f in (compiled, Op(run))]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_auto_is_native_in_eager_code_and_plain_operations_in_an_export() -> None:
    for op, make in OPS.values():
        inputs = make(1, 5, 2, 4, 6)
        assert torch.equal(op(*inputs).y_BTHV, op(*inputs, impl="native").y_BTHV)
        program = torch.export.export(Op(op), tuple(inputs), strict=True)
        assert "rwkv" not in str(program.graph)
    inputs = wkv4_inputs(1, 5, 4, state=False)
    assert torch.equal(wkv4(*inputs).y_BTD, wkv4(*inputs, impl="native").y_BTD)
    program = torch.export.export(Op(wkv4), tuple(inputs), strict=True)
    assert "rwkv" not in str(program.graph)
    inputs = bi_inputs(1, 5, 4)
    assert torch.equal(bi_wkv(*inputs), bi_wkv(*inputs, impl="native"))
    program = torch.export.export(Op(lambda *x: (bi_wkv(*x),)), tuple(inputs), strict=True)
    assert "rwkv" not in str(program.graph)


# ---- building and finding


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_not_built_runs_the_torch_forms_and_says_so(fresh: Path) -> None:
    inputs = wkv7_inputs(1, 5, 2, 4, 6)
    assert not library.available()
    assert torch.equal(wkv7(*inputs).y_BTHV, wkv7(*inputs, impl="chunked").y_BTHV)
    with pytest.raises(NativeError, match=r"wkv7: .*not built for torch .*rwkv build-native"):
        wkv7(*inputs, impl="native")
    assert not fresh.exists()


def test_build_fills_the_cache_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # one instruction set of three: a third of the compiling
    monkeypatch.setattr(build, "variants", lambda: build.PLAIN)
    first, second = build.build(), build.build()
    assert first.path == second.path == build.library_path()
    assert first.seconds > 0
    assert second.seconds == 0
    assert sorted(p.suffix for p in fresh.iterdir()) == [".log", ".sha256", ".so"]
    library.forget()
    assert library.loaded().path.parent == fresh


def test_no_compiler_is_an_error_with_advice(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeError, match=r"no C\+\+ compiler found .CXX=no-such-compiler"):
        build.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeError, match=r"no C\+\+ compiler found .c\+\+, g\+\+, clang\+\+"):
        build.build()


def test_a_compiler_that_fails_leaves_its_output_and_no_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'error: out of cheese'; exit 3"))
    with pytest.raises(
        NativeError, match=r"status 3: error: out of cheese\nIts output is in .*log"
    ):
        build.build()
    (log,) = fresh.iterdir()
    assert "out of cheese" in log.read_text()
    assert "-DISA=" in log.read_text()
    library.forget()
    assert not library.available()


def test_a_compiler_that_writes_nothing_is_a_failure(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "lazy", "exit 0"))
    with pytest.raises(NativeError, match="failed"):
        build.build()


@pytest.mark.slow
def test_a_damaged_library_is_not_loaded_and_is_built_again(fresh: Path) -> None:
    path = build.build().path
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no library at all"):
        path.write_bytes(damaged)
        library.forget()
        with pytest.raises(NativeError, match="is damaged; run `rwkv build-native`"):
            library.loaded()
    assert build.build().seconds > 0
    library.forget()
    assert library.available()


@pytest.mark.slow
def test_a_library_for_another_torch_is_ignored(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build().path
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    library.forget()
    assert build.library_path() != path
    assert not library.available()


def test_a_library_for_another_machine_is_ignored(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = build.library_path()
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert build.library_path() != here
    assert list(build.variants()) == ["scalar"]


@pytest.mark.slow
def test_a_foreign_file_with_a_right_checksum_is_refused(fresh: Path) -> None:
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF of another machine")
    digest = build.hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".sha256").write_text(digest)
    with pytest.raises(NativeError, match=r"cannot be loaded .*build-native --force"):
        library.loaded()
    assert build.build(force=True).seconds > 0


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rwkv_core.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_command_builds_and_doctor_says_what_is_used(tmp_path: Path) -> None:
    cache = {"RWKV_CACHE": str(tmp_path)}
    before = command("doctor", **cache).stdout
    assert "op wkv7       reference, chunked, native; auto is chunked (native: not built" in before
    built = command("build-native", **cache)
    assert built.returncode == 0, built.stderr
    assert "compiled with" in built.stdout
    assert str(tmp_path) in built.stdout
    assert "in the cache already" in command("build-native", **cache).stdout
    after = command("doctor", **cache).stdout
    for op in ("wkv4", "wkv6", "wkv7", "bi_wkv"):
        (line,) = (line for line in after.splitlines() if line.startswith(f"op {op} "))
        assert line.endswith("native; auto is native (on CPU in fp32)")


def test_command_fails_with_advice_unless_told_not_to(tmp_path: Path) -> None:
    nothing = {"RWKV_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    failed = command("build-native", **nothing)
    assert failed.returncode == 2
    assert "no C++ compiler found" in failed.stderr
    quiet = command("build-native", "--if-possible", **nothing)
    assert quiet.returncode == 0
    assert "torch forms are used" in quiet.stderr


def test_a_cache_that_cannot_be_written_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed = command("build-native", RWKV_CACHE=str(tmp_path / "file"))
    assert failed.returncode == 2
    assert "file" in failed.stderr
    assert "Traceback" not in failed.stderr
