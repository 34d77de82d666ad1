"""VRWKV with distances in the plane: its wiring, its start, the range of its decays."""

import pytest
import timm
import torch

import rwkv_vision  # noqa: F401 - registers the models
from rwkv_core.errors import CheckpointError, TrainingError
from rwkv_core.ops.bi_wkv_2d.reference import bi_wkv_2d_reference
from rwkv_core.testing import perturb, relative_error
from rwkv_core.train.optim import param_groups
from rwkv_vision.mixers import SpatialMix
from rwkv_vision.mixers2d import SpatialMix2d


@pytest.mark.parametrize("impl", ["auto", "prefix", "reference"])
@pytest.mark.parametrize("grid", [(1, 1), (5, 3), (2, 7)])
def test_mixes_by_columns_and_rows_apart(grid: tuple[int, int], impl: str) -> None:
    mixer = SpatialMix2d(8, depth=2, impl=impl).double()
    perturb(mixer, 0.5)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    x_k, x_v, x_r = mixer.mix(x)
    k, v = mixer.key(x_k), mixer.value(x_v)
    w_x, w_y, u = mixer.spatial_decay_x, mixer.spatial_decay_y, mixer.spatial_first
    expected = mixer.finish(x_r, bi_wkv_2d_reference(w_x, w_y, u, k, v))
    assert relative_error(mixer(x), expected) <= 1e-12


def test_starts_as_the_one_of_rows_alone() -> None:
    torch.manual_seed(0)
    mixer = SpatialMix2d(8, layer=1, depth=4)
    torch.manual_seed(0)
    rows = dict(SpatialMix(8, layer=1, depth=4).named_parameters())
    decay = rows.pop("spatial_decay")
    ours = dict(mixer.named_parameters())
    for name in ("spatial_decay_x", "spatial_decay_y"):
        assert torch.equal(ours.pop(name), decay)
    assert ours.keys() == rows.keys()
    assert all(torch.equal(ours[name], p) for name, p in rows.items())


def test_any_model_of_the_family_takes_it() -> None:
    model = timm.create_model("vrwkv_nano_patch4_28", mixer="vrwkv_2d", in_chans=1).eval()
    assert all(type(block.att) is SpatialMix2d for block in model.blocks)
    rows = timm.create_model("vrwkv_nano_patch4_28", in_chans=1)
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in rows.parameters())
    assert more == 4 * 64  # a second decay in each layer
    still = {n for names, _, decays in param_groups(model) if not decays for n in names}
    assert {"blocks.0.att.spatial_decay_x", "blocks.0.att.spatial_decay_y"} <= still
    with pytest.raises(RuntimeError, match="spatial_decay_x"):
        model.load_state_dict(rows.state_dict())


def test_decays_out_of_range_are_refused_on_loading_and_named() -> None:
    model = timm.create_model("test_vrwkv_2d")
    weights = model.state_dict()
    weights["blocks.1.att.spatial_decay_x"][3] = 31.0
    weights["blocks.1.att.spatial_decay_y"][3] = -28.0
    model.load_state_dict(weights)
    weights["blocks.1.att.spatial_decay_y"][3] = -30.0
    message = r"spatial mix of layer 1.*rows and columns together: \|decay\| reaches 61.*'reference"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("test_vrwkv_2d").load_state_dict(weights)
    with pytest.raises(TrainingError, match="spatial mix of layer 1"):
        model.check_decay(TrainingError)
    unlimited = timm.create_model("test_vrwkv_2d", impl="reference")
    unlimited.load_state_dict(weights)
    unlimited.check_decay(TrainingError)
