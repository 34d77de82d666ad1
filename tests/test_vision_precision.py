"""Image models under autocast: what half precision may change, and what it must not reach."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import rwkv_vision  # noqa: F401 - registers the models
from rwkv_core.ops.bi_wkv import IMPLS
from rwkv_core.ops.bi_wkv_2d import IMPLS as IMPLS_2D
from rwkv_core.testing import perturb

# half a unit in the last place of 1: the most that rounding changes a number by, relatively
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPS: dict[str, dict[str, Callable[..., Tensor]]] = {"test_vrwkv": IMPLS, "test_vrwkv_2d": IMPLS_2D}

halves = pytest.mark.parametrize("dtype", ROUNDING)


def create(name: str, **options: object) -> nn.Module:
    model = timm.create_model(name, **options).eval()
    perturb(model, 0.05)
    return model


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@halves
@pytest.mark.parametrize("name", [*OPS, "test_vrwkv_large", "test_vrwkv6", "test_vrwkv7"])
def test_autocast_stays_within_its_rounding(name: str, dtype: torch.dtype) -> None:
    model, x = create(name), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if "spatial_decay" in parameter:
                p.mul_(5)  # from -25 to 15: as far as training goes
        expected = model.forward_features(x)
        with torch.autocast("cpu", dtype):
            features = model.forward_features(x)
    assert features.dtype == torch.float32  # the residual stream and the norms
    # autocast rounds what goes into a linear map, its weights and what comes out, nothing else:
    # three relative errors of at most ρ, or ρ/√3 in the root mean square, independent from number
    # to number and from map to map. So a map is off by ρ, and n of them one after another by √n ρ,
    # where none amplifies more than the norm that follows takes back. Half of them stand side by
    # side in truth: measured is a fifth to three fifths of it
    n_maps = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    budget = math.sqrt(n_maps) * ROUNDING[dtype]
    assert rms(features - expected) <= budget * rms(expected)


@halves
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", OPS)
def test_the_recurrence_is_an_island_of_fp32(
    name: str, train: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    prefix = OPS[name]["prefix"]

    def spy(*inputs: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        y = prefix(*inputs)
        seen.extend(x.dtype for x in (*inputs, y))
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad.dtype))
        return y

    monkeypatch.setitem(OPS[name], "prefix", spy)
    model, x = create(name, impl="prefix"), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(train):
        loss = model(x).square().mean()
    if train:
        loss.backward()
        decays = [p for n, p in model.named_parameters() if "decay" in n or "first" in n]
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in decays)
        assert all(p.grad.any() for p in decays)
    assert set(seen) == {torch.float32}
    assert len(seen) >= 3 * (6 if train else 5)
