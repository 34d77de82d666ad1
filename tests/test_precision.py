"""16-bit inference: what stays in fp32, how far the rest may drift, and that training is spared."""

import copy
import math

import pytest
import torch

from rwkv_core import precision
from rwkv_core.errors import ConfigError
from rwkv_core.mixers.base import Mixer
from rwkv_core.registry import ADAPTERS
from rwkv_core.testing import perturb
from rwkv_core.train.config import TrainSettings
from rwkv_core.train.optim import optimizer
from rwkv_text import CausalLM, TextConfig

GENERATIONS = ["rwkv4", "rwkv5", "rwkv6", "rwkv7"]
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half the distance of neighbours, relative
ROUNDED = 10
"""Tensors of one layer that are rounded on the way from stream to stream, one after the other.

In time mixing: the LayerNorm's output, the mixture, its projection, the recurrence's output, the
norm's, the gated one; in channel mixing: the LayerNorm's output, the hidden one, the output; and
the stream itself.
"""


def make_model(mixer: str, depth: int = 6) -> CausalLM:
    options = {} if mixer == "rwkv4" else {"head_dim": 32}
    config = TextConfig(
        dim=64, depth=depth, mixer=mixer, mixer_options=options, context=24, batch_size=2
    )
    model = CausalLM(config).eval()
    perturb(model)
    return model


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("mixer", GENERATIONS)
@torch.inference_mode()
def test_half_precision_stays_within_its_budget_over_4096_tokens(mixer, dtype):
    """A rounding is off by u/√3 in the mean, relative; independent ones add up as squares.

    So L layers of n roundings each are off by u √(n L / 3). The recurrence is in fp32: the last
    quarter of the sequence must be no worse than that either.
    """
    model = make_model(mixer)
    tokens = torch.randint(256, (1, 4096))
    exact = model(tokens).logits_BTV
    rounded = precision.cast(model, dtype)(tokens).logits_BTV
    assert rounded.dtype == dtype
    budget = UNIT[dtype] * math.sqrt(ROUNDED * len(model.backbone.blocks) / 3)
    error = (rounded.float() - exact).chunk(4, 1)
    for quarter in (0, 3):
        assert rms(error[quarter]) / rms(exact) < budget
    assert rms(error[0]) / rms(exact) > budget / 10, "nothing was rounded"


@pytest.mark.parametrize("mixer", GENERATIONS)
@torch.inference_mode()
def test_one_token_at_a_time_is_as_exact(mixer):
    model = make_model(mixer)
    half = precision.cast(model, torch.float16)
    tokens = torch.randint(256, (1, 64))
    exact, state, rows = model(tokens).logits_BTV, None, []
    for token in tokens[0]:
        out = half(token.view(1, 1), state)
        state = out.state
        rows.append(out.logits_BTV)
    budget = UNIT[torch.float16] * math.sqrt(ROUNDED * 6 / 3)
    assert rms(torch.cat(rows, 1).float() - exact) / rms(exact) < budget
    for name, tensor in state.packed().items():
        assert tensor.dtype == (torch.float16 if "shift" in name else torch.float32), name


@pytest.mark.parametrize("mixer", GENERATIONS)
def test_decays_and_bonuses_stay_in_fp32(mixer):
    half = precision.cast(make_model(mixer), torch.bfloat16)
    kept = {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert (
        kept
        == {
            "rwkv4": {"time_decay", "time_first"},
            "rwkv5": {"time_decay", "time_faaaa"},
            "rwkv6": {"time_decay", "time_faaaa"},
            "rwkv7": {"w0"},
        }[mixer]
    )


@pytest.mark.parametrize("mixer", GENERATIONS)
@torch.inference_mode()
def test_scaling_the_stream_costs_no_bit(mixer):
    model = make_model(mixer)
    scaled = copy.deepcopy(model)
    precision.scale_stream(scaled.backbone, 3)
    tokens = torch.randint(256, (2, 50))
    assert torch.equal(scaled(tokens).logits_BTV, model(tokens).logits_BTV)
    changed = not torch.equal(scaled.backbone.ln_in.weight, model.backbone.ln_in.weight)
    assert changed == (mixer != "rwkv7")  # whose stream fits


@torch.inference_mode()
def test_a_stream_too_large_for_fp16_fits_after_scaling(monkeypatch):
    model = make_model("rwkv4", depth=12)
    ends: list[torch.Tensor] = []
    model.backbone.ln_out.register_forward_pre_hook(lambda _, args: ends.append(args[0].abs()))
    last = model.backbone.blocks[-1].channel_mix.value.weight
    tokens = torch.randint(256, (1, 64))
    model(tokens)
    last.mul_(1.8e5 / ends[-1].amax())
    exact = model(tokens).logits_BTV
    assert ends[-1].amax() > 65504
    budget = UNIT[torch.float16] * math.sqrt(ROUNDED * 12 / 3)
    rounded = precision.cast(model, torch.float16)(tokens).logits_BTV
    assert rms(rounded.float() - exact) / rms(exact) < budget
    monkeypatch.setattr(precision, "LAYERS_PER_HALVING", 999)
    assert not precision.cast(model, torch.float16)(tokens).logits_BTV.isfinite().all()


@pytest.mark.parametrize("mixer", GENERATIONS)
def test_training_goes_on_as_if_nobody_had_cast_the_model(mixer):
    def train(interrupted: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = make_model(mixer).train()
        batch = next(ADAPTERS["text"].data(model.config, "train"))
        optim = optimizer(model, TrainSettings(lr=1e-3))
        for _ in range(2):
            loss, _ = ADAPTERS["text"].loss(model, batch, torch.Generator())
            loss.backward()
            optim.step()
            optim.zero_grad()
            if interrupted:
                half = precision.cast(model, torch.float16)
                assert not half.training
                assert not any(p.requires_grad for p in half.parameters())
                half(batch.tokens_BT[:, :8])
                assert model.training
        return model.state_dict()

    for a, b in zip(train(True).values(), train(False).values(), strict=True):
        assert torch.equal(a, b)


def test_every_scaled_weight_is_there():
    for mixer in GENERATIONS:
        for module in make_model(mixer).modules():
            if isinstance(module, Mixer):
                assert all(hasattr(getattr(module, n), "weight") for n in module.fp16_scaled)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"torch.int8: expected float16, bfloat16 or float32"):
        precision.cast(make_model("rwkv7"), torch.int8)
