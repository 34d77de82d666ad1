"""The contracts as code: our own tests call these, and so can a plugin's.

Each check raises AssertionError with what differed. ``tests/`` shows them at work.
"""

import copy
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_core import checkpoint
from rwkv_core.backbone import Backbone
from rwkv_core.config import from_dict, to_dict
from rwkv_core.mixers.base import Mixer, Shared
from rwkv_core.registry import ADAPTERS, MIXERS
from rwkv_core.state import pack
from rwkv_core.train.config import TrainSettings
from rwkv_core.train.optim import optimizer, param_groups

__all__ = [
    "Mutation", "check_adapter", "check_mixer", "check_op", "is_caught", "perturb",
    "relative_error",
]  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def perturb(module: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Add noise to every parameter, so that what starts at zero hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def check_op(
    run: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    output_bound: float = 2e-6,
    gradient_bound: float = 1e-5,
) -> None:
    """Compare an implementation in the inputs' dtype with the reference in fp64.

    Args:
        run: the implementation; takes ``inputs`` and returns a tuple of tensors.
        reference: the truth, called with the same values in fp64.
        inputs: tensors; a state may be among them.
        output_bound: allowed relative error of every output.
        gradient_bound: allowed relative error of the gradient of every input.
    """
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = tuple(run(*ours)), tuple(reference(*truth))
    for i, (y, e) in enumerate(zip(outputs, expected, strict=True)):
        error = relative_error(y, e)
        assert error <= output_bound, f"output {i} is off by {error:.2g} (bound {output_bound:g})"
    if not any(e.numel() for e in expected):
        return  # nothing to differentiate
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(e.shape, generator=generator, dtype=torch.float64) for e in expected]
    total = sum((y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, ours, allow_unused=True)  # type: ignore[arg-type]
    total = sum((e * w).sum() for e, w in zip(expected, weights, strict=True))
    grads_e = torch.autograd.grad(total, truth, allow_unused=True)  # type: ignore[arg-type]
    largest = max(float(e.abs().max()) for e in grads_e if e is not None and e.numel())
    for i, (g, e) in enumerate(zip(grads, grads_e, strict=True)):
        assert (g is None) == (e is None), f"gradient of input {i}: only one side has it"
        if g is not None and g.numel():
            # a gradient that is zero in truth may be off by a rounding of the others
            error = relative_error(g, e) if e.any() else float(g.abs().max()) / largest
            assert error <= gradient_bound, (
                f"gradient of input {i} is off by {error:.2g} (bound {gradient_bound:g})"
            )


def check_mixer(name: str, *, dim: int = 32, depth: int = 2, **options: Any) -> None:
    """Hold a registered causal mixer to its contract, in fp64 where numbers are compared.

    An untrained block is the identity; sequence equals step by step; two halves equal the whole;
    rows of a batch do not see each other; T = 0 changes nothing; every parameter gets a gradient,
    the same under activation checkpointing, and is in exactly one optimiser group; the state stays
    fp32 under bf16 autocast; the trunk compiles without graph breaks and exports strictly.

    Heads, where the mixer has them, are of half the width unless ``options`` say otherwise: one
    head would hide what goes to the wrong one.
    """
    if "head_dim" in MIXERS[name].options():
        options = {"head_dim": dim // 2, **options}
    trunk = Backbone(dim, depth, mixer=name, mixer_options=options)
    for half in ("time_mix", "channel_mix"):
        assert isinstance(getattr(trunk.blocks[0], half), Mixer), f"{half} is no Mixer"
    x_BTD = torch.randn(1, 3, dim)
    untrained, _, _ = trunk.blocks[0](x_BTD, trunk.init_state(1)[0], Shared())
    _close("an untrained block", untrained, x_BTD)
    perturb(trunk)
    trunk = trunk.double()
    generator = torch.Generator().manual_seed(0)
    B, T = 3, 37
    x_BTD = torch.randn(B, T, dim, generator=generator, dtype=torch.float64)
    y_BTD, state = trunk(x_BTD)
    packed_y = pack(state)

    packed = pack(trunk.init_state(B, dtype=torch.float64))
    steps = []
    for t in range(T):
        y_1BD, packed = trunk.step(x_BTD[None, :, t], packed)
        steps.append(y_1BD[0])
    _close("step by step", torch.stack(steps, 1), y_BTD)
    for kind, tensor in packed.items():
        _close(f"state {kind} step by step", tensor, packed_y[kind])

    first, halfway = trunk(x_BTD[:, : T // 3])
    second, state2 = trunk(x_BTD[:, T // 3 :], halfway)
    _close("in two parts", torch.cat([first, second], 1), y_BTD)
    for kind, tensor in pack(state2).items():
        _close(f"state {kind} in two parts", tensor, packed_y[kind])

    _close("one row alone", trunk(x_BTD[1:2])[0], y_BTD[1:2])
    empty, untouched = trunk(x_BTD[:, :0], state)
    assert empty.shape == (B, 0, dim), "T = 0 must give no output"
    for kind, tensor in pack(untouched).items():
        _close(f"state {kind} after T = 0", tensor, packed_y[kind])
    _close("mixing a state with itself", *_mixed(state))

    _check_groups(trunk)
    y_BTD.square().sum().backward()
    missing = [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, f"no gradient reaches {missing}"
    whole = {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    again, _ = torch.utils.checkpoint.checkpoint(trunk, x_BTD, use_reentrant=False)
    again.square().sum().backward()
    for n, p in trunk.named_parameters():
        assert p.grad is not None
        _close(f"checkpointed gradient of {n}", p.grad, whole[n])

    single = copy.deepcopy(trunk).float()
    x32 = x_BTD.float()
    with torch.autocast("cpu", torch.bfloat16):
        y16, state16 = single(x32)
    error = relative_error(y16, y_BTD)
    assert error < 0.1, f"under bf16 autocast the output is off by {error:.2g}"
    for kind, tensor in pack(state16).items():
        assert tensor.isfinite().all(), f"state {kind} is not finite under bf16 autocast"
        shift = "shift" in kind
        assert shift or tensor.dtype == torch.float32, f"state {kind} fell to {tensor.dtype}"

    torch._dynamo.reset()
    compiled = torch.compile(single, fullgraph=True, backend="eager")
    _close("compiled", compiled(x32)[0], single(x32)[0], bound=1e-5)
    exported = torch.export.export(single, (x32,), strict=True).module()
    _close("exported", exported(x32)[0], single(x32)[0], bound=1e-5)


def check_adapter(name: str, config: Any = None, *, steps: int = 8, onnx: bool = True) -> None:
    """Hold a registered domain to its contract, with its default configuration or a given one.

    The loss is finite and falls on one fixed batch, every parameter gets a gradient, the
    configuration survives JSON, a saved model computes the same, data is a function of seed and
    step, and the exported graphs agree with PyTorch at two sizes.
    """
    adapter = ADAPTERS[name]
    config = adapter.Config() if config is None else config
    assert from_dict(adapter.Config, to_dict(config)) == config, "configuration changed in JSON"

    stream = adapter.data(config, "train", seed=1)
    batch, later = next(stream), next(stream)
    again = next(adapter.data(config, "train", start=1, seed=1))
    for a, b in zip(_tensors(later), _tensors(again), strict=True):
        assert torch.equal(a, b), "batch 1 differs between reading on and starting there"

    torch.manual_seed(0)
    model = checkpoint.build(name, config).train()
    rng = torch.Generator().manual_seed(0)
    trained = copy.deepcopy(model)
    optim = optimizer(trained, TrainSettings(lr=1e-3, eps=1e-8))
    losses = []
    for _ in range(steps):
        optim.zero_grad()
        rng.manual_seed(0)
        loss, sums = adapter.loss(trained, batch, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optim.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))), f"losses {losses}"
    assert losses[-1] < losses[0], f"the loss does not fall on one fixed batch: {losses}"
    figures = adapter.metrics(config, {n: float(v) for n, v in sums.items()})
    assert figures, "metrics() returned no figure"

    perturb(model)
    rng.manual_seed(0)
    adapter.loss(model, batch, rng)[0].backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, f"no gradient reaches {missing}"
    _check_groups(model)

    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint.load(checkpoint.save(model, Path(folder) / "model"))
        with torch.no_grad():
            before = adapter.loss(model, batch, rng.manual_seed(0))[0]
            after = adapter.loss(loaded, batch, rng.manual_seed(0))[0]
        assert torch.equal(before, after), f"loss {before} became {after} after save and load"
        if onnx:
            import importlib

            exporter = importlib.import_module("rwkv_export")
            exporter.export(model, Path(folder) / "onnx", steps=(1, 16))


def _check_groups(model: nn.Module) -> None:
    names = [n for names, _, _ in param_groups(model) for n in names]
    expected = [n for n, _ in model.named_parameters()]
    assert sorted(names) == sorted(expected), "optimiser groups must hold each parameter once"


def _close(what: str, actual: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: off by {error:.2g} (bound {bound:g})"


def _mixed(state: Sequence[Any]) -> tuple[Tensor, Tensor]:
    def flat(layers: Sequence[Any]) -> Tensor:
        return torch.cat([t.flatten() for layer in layers for t in layer])

    return flat([layer.mix(layer, 0.3) for layer in state]), flat(state)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return [t for item in batch for t in _tensors(item)]
    return []


class Mutation(NamedTuple):
    """A fault to inject: in ``file``, ``old`` becomes ``new``; ``test`` must then fail.

    ``test`` is what follows ``pytest``: a file, a test's id, perhaps ``-k WORDS``. Some faults need
    a second replacement in the same file.
    """

    fault: str
    file: str
    old: str
    new: str
    test: str
    also: tuple[str, str] | None = None

    def apply(self, source: str) -> str:
        """Return the source with the fault.

        Raises:
            ValueError: what is to be replaced is not there exactly once.
        """
        for old, new in [(self.old, self.new), *([self.also] if self.also else [])]:
            if source.count(old) != 1:
                raise ValueError(f"{self.fault}: {self.file} has {source.count(old)} times {old!r}")
            source = source.replace(old, new)
        return source


def is_caught(mutation: Mutation, root: Path) -> bool:
    """Inject a fault into a copy of a project and say whether the named test fails there.

    Args:
        mutation: the fault; its paths are relative to ``root``.
        root: the project's folder, with its tests.

    Raises:
        RuntimeError: the test did not run: a syntax error in the fault, or no such test.
    """
    skipped = shutil.ignore_patterns(".*", "runs", "dist", "build", "__pycache__")
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(root, Path(folder) / "mutant", ignore=skipped))
        file = copied / mutation.file
        file.write_text(mutation.apply(file.read_text("utf-8")), "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
        paths = os.pathsep.join([str(copied), str(copied / "export")])
        result = subprocess.run(
            [*command, *shlex.split(mutation.test)],
            cwd=copied,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{mutation.test} did not run: {result.stdout}{result.stderr}")
    return result.returncode == 1
