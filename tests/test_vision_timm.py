"""What timm asks of a model, asked of every model that this package registers with it."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import rwkv_vision
from rwkv_core.errors import CheckpointError, ConfigError, TrainingError
from rwkv_core.testing import perturb, relative_error
from rwkv_core.train.optim import param_groups

MODELS = timm.list_models(module="models")
SCRIPTED = [n for n in MODELS if "vrwkv6" not in n and "vrwkv7" not in n]
TESTS = [n for n in MODELS if n.startswith("test_")]
LARGEST = 384


def parameter(name: str) -> object:
    """Return a model's name as a parameter; what has more layers than a test can afford is slow."""
    small = name.startswith("test_") or name in ("vrwkv_nano_patch4_28", "vrwkv_tiny_patch16_224")
    return pytest.param(name, marks=() if small else pytest.mark.slow)


every_model = pytest.mark.parametrize("name", [parameter(n) for n in MODELS])
every_scripted_model = pytest.mark.parametrize("name", [parameter(n) for n in SCRIPTED])
# TorchScript is asked of these models; that torch will drop it one day is not for users to hear
scripting = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")


def create(name: str, **options: object) -> nn.Module:
    """Return a model in evaluation mode whose parameters are all at work."""
    model = timm.create_model(name, **options)
    perturb(model, 0.02)
    return model.eval()


def images(name: str, *, side: int | None = None, batch: int = 1) -> Tensor:
    """Return noise in the model's own size or a given one."""
    channels, height, width = timm.get_pretrained_cfg(name).input_size
    size = (side, side) if side else (min(height, LARGEST), min(width, LARGEST))
    return torch.randn(batch, channels, *size)


def traced(model: nn.Module) -> nn.Module:
    """Return the model as torch.fx sees it, down to its last node."""
    node = get_graph_node_names(model)[1][-1]
    return create_feature_extractor(model, [node])


PARAMETERS = {  # with 1000 classes; those of generations 4 and 6 are the published sizes
    "vrwkv_tiny_patch16_224": (6_155_176, 225),
    "vrwkv_small_patch16_224": (23_820_136, 249),
    "vrwkv_base_patch16_224": (93_645_544, 249),
    "vrwkv_large_patch16_384": (334_881_768, 587),
    "vrwkv6_tiny_patch16_224": (7_641_256, 345),
    "vrwkv6_small_patch16_224": (27_677_032, 369),
    "vrwkv6_base_patch16_224": (104_898_280, 369),
    "vrwkv7_tiny_patch16_224": (6_456_040, 402),
    "vrwkv7_small_patch16_224": (24_421_864, 426),
    "vrwkv7_base_patch16_224": (91_899_880, 426),
}


def test_importing_the_package_registers_its_models() -> None:
    nano = {f"vrwkv{g}_nano_patch4_28" for g in ("", "6", "7")}
    small = {f"test_vrwkv{kind}" for kind in ("", "_large", "_2d", "6", "7")}
    assert set(PARAMETERS) | nano | small == set(MODELS)
    assert isinstance(timm.create_model("test_vrwkv"), rwkv_vision.VRWKV)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_to_the_unit(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == PARAMETERS[name]
    assert f"{PARAMETERS[name][0]:,} parameters" in (timm.model_entrypoint(name).__doc__ or "")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameters_follow_the_published_formulas(size: str) -> None:
    C = {"tiny": 192, "small": 384, "base": 768}[size]
    scale = 0 if size == "tiny" else 2 * C
    rest = (2 + 769 + 196 + 2 + 1000) * C + 1000  # ln0, patches, positions, norm, head
    for family, layer in (("vrwkv", 13 * C * C + 11 * C), ("vrwkv6", 14 * C * C + 464 * C)):
        total = PARAMETERS[f"{family}_{size}_patch16_224"][0]
        assert total == 12 * (layer + scale) + rest, family


def test_large_has_positions_for_192_pixels_and_a_hidden_layer() -> None:
    with torch.device("meta"):
        model = timm.create_model("vrwkv_large_patch16_384")
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert model.default_cfg["input_size"] == (3, 384, 384)
    assert shapes["pos_embed"] == (1, 12 * 12, 1024)
    assert shapes["head.pre_logits.fc.weight"] == (3072, 1024)
    assert shapes["head.fc.weight"] == (1000, 3072)
    assert shapes["blocks.23.att.key_norm.weight"] == (1024,)
    assert shapes["blocks.23.ffn.key_norm.weight"] == (4096,)


@every_model
def test_forward(name: str) -> None:
    model, x = create(name), images(name, batch=2)
    with torch.no_grad():
        y = model(x)
    assert y.shape == (2, model.num_classes)
    assert y.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert any("pretrained" in k or k == "input_size" for k in model.default_cfg)


@every_model
def test_backward_reaches_every_parameter(name: str) -> None:
    model = create(name, num_classes=42).train()
    x = images(name, side=128)
    model(x).mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert not [n for n, g in grads.items() if g is None or not g.any() or not g.isfinite().all()]
    again = copy.deepcopy(model)
    again.zero_grad()
    again.set_grad_checkpointing()
    again(x).mean().backward()
    for n, p in again.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], msg=n)


@every_model
def test_default_cfg_says_what_the_model_is(name: str) -> None:
    model, x = create(name), images(name)
    cfg = model.default_cfg
    names = set(model.state_dict())
    assert f"{cfg['classifier']}.weight" in names
    assert f"{cfg['first_conv']}.weight" in names
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, *cfg["pool_size"], model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert isinstance(model.get_classifier(), nn.Identity)
        model.reset_classifier(0, "")
        expected = model.head.pre_logits(features) if "large" in name else features
        assert torch.equal(model(x), expected)
        bare = create(name, num_classes=0, global_pool="")
        assert bare(x).shape == expected.shape
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7)
    assert not {n for n in bare.state_dict() if n.startswith(cfg["classifier"])}


@every_model
def test_features_of_several_blocks(name: str) -> None:
    model = create(name, features_only=True)
    x = images(name, side=96)
    outputs = model(x)
    assert len(outputs) >= 3
    for y, channels, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert y.shape == (1, channels, 96 // reduction, 96 // reduction)
        assert y.isfinite().all()


@every_model
def test_intermediates_end_in_the_features(name: str) -> None:
    model, x = create(name), images(name, side=96)
    expected = model.forward_features(x)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        final, found = model.forward_intermediates(x)
        assert len(found) == len(model.blocks)
        torch.testing.assert_close(final, expected)
        last = model.forward_intermediates(
            x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True
        )
        torch.testing.assert_close(last[0], expected)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], found[0])
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    torch.testing.assert_close(model(x).permute(0, 3, 1, 2), found[1])


@scripting
@every_scripted_model
def test_torchscript(name: str) -> None:
    model, x = create(name), images(name, side=128)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@every_model
def test_fx_is_bit_equal(name: str) -> None:
    model, x = create(name), images(name)
    with torch.no_grad():
        (y,) = traced(model)(x).values()
        assert torch.equal(y, model(x))


@every_model
def test_fx_backward(name: str) -> None:
    model = traced(create(name, num_classes=42)).train()
    next(iter(model(images(name, side=128)).values())).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@scripting
@every_scripted_model
def test_fx_then_torchscript(name: str) -> None:
    model, x = create(name), images(name, side=128)
    with torch.no_grad():
        (y,) = torch.jit.script(traced(model))(x).values()
        torch.testing.assert_close(y, model(x))


@every_model
def test_parameter_groups_cover_the_model(name: str) -> None:
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert len(groups) >= len(model.blocks) + 1
    optim = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    still = {id(p) for g in optim.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    free = {n for n, p in model.named_parameters() if id(p) in still}
    assert model.no_weight_decay() == free
    assert {n for n, p in model.named_parameters() if p.ndim == 1} <= free
    # what timm cannot be told: the layers' own factors of the learning rate
    assert all("lr_scale" not in g for g in optim.param_groups)
    scaled = {n for names, scale, _ in param_groups(model) if scale != 1 for n in names}
    assert {n.rpartition(".")[2] for n in scaled} == {
        "vrwkv6": {"time_decay"}, "vrwkv7": {"w0"},
    }.get(name.removeprefix("test_").partition("_")[0], set())  # fmt: skip


@every_model
def test_layer_decay_slows_the_first_layers(name: str) -> None:
    model = timm.create_model(name)
    optim = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scales = {id(p): g["lr_scale"] for g in optim.param_groups for p in g["params"]}
    of = {n: scales[id(p)] for n, p in model.named_parameters()}
    depth = len(model.blocks)
    assert of["head.fc.weight"] == 1
    assert of["norm.weight"] == of[f"blocks.{depth - 1}.ln1.weight"]
    for i in range(depth):
        assert of[f"blocks.{i}.ln1.weight"] == pytest.approx(0.75 ** (depth - i))
    assert of["pos_embed"] == of["patch_embed.proj.weight"] == pytest.approx(0.75 ** (depth + 1))


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize(
    "size", [(64, 64), (1, 1), (5, 200), (200, 5), (17, 33), (3, 16), (1, 2000)]
)
def test_any_size_is_padded_to_whole_patches(size: tuple[int, int], name: str) -> None:
    model = create(name)
    x = torch.randn(1, 3, *size)
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, rows, columns, 32)
        assert features.isfinite().all()
        # padding is zeros at the right and below
        padded = torch.zeros(1, 3, 16 * rows, 16 * columns)
        padded[..., : size[0], : size[1]] = x
        assert torch.equal(model.forward_features(padded), features)


def test_position_embedding_resamples_to_another_input_size() -> None:
    model = create("test_vrwkv")
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        y = model(x)
        # bicubic, without antialiasing where it shrinks
        for rows, columns in ((6, 5), (2, 3)):
            grid = model.pos_embed.view(1, 4, 4, 32).permute(0, 3, 1, 2)
            grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic")
            expected = grid.permute(0, 2, 3, 1).flatten(1, 2)
            torch.testing.assert_close(model._resampled(rows, columns), expected)
        model.set_input_size((96, 80))
        assert model.pos_embed.shape == (1, 30, 32)
        assert torch.equal(model(x), y)
    # a size that is no multiple of the patch has its own position for the padded patch
    assert create("test_vrwkv", img_size=(40, 70)).pos_embed.shape == (1, 3 * 5, 32)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_and_stochastic_depth(name: str, channels: int) -> None:
    model = create(name, in_chans=channels, drop_path_rate=0.9).train()
    x = torch.randn(4, channels, 64, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_compiles_without_graph_breaks_and_exports_strictly(name: str) -> None:
    model, x = create(name, depth=2), torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), model(x)) <= 1e-5
    torch._dynamo.reset()
    free = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=True)
        assert relative_error(program.module()(x[:1]), model(x[:1])) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "vrwkv5"}, "unknown mixer 'vrwkv5'; did you mean 'vrwkv"),
        ({"mixer": "vrwkv6", "head_dim": 24}, "dim 32 is not a multiple of head_dim 24"),
        ({"mixer": "vrwkv7", "head_dim": 24}, "dim 32 is not a multiple of head_dim 24"),
        ({"mixer": "vrwkv7", "head_dim": 16, "key_norm": True}, "'vrwkv7' has no key_norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        timm.create_model("test_vrwkv", **options)
    with pytest.raises(ValueError, match="global_pool 'catavgmax' changes the width"):
        timm.create_model("test_vrwkv_large", global_pool="catavgmax")


def test_more_channels_than_the_model_has_are_refused() -> None:
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        timm.create_model("test_vrwkv")(torch.randn(1, 4, 64, 64))


@pytest.mark.parametrize(("name", "depth"), [("vrwkv", 1), ("vrwkv6", 1), ("vrwkv7", 2)])
def test_every_pixel_is_seen_everywhere(name: str, depth: int) -> None:
    """After one layer that reads both ways, or after two that read in turn."""
    model = timm.create_model(f"test_{name}", depth=depth).double()
    perturb(model, 0.3)
    model.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    y = model.forward_features(x)
    for patch in (slice(0, 16), slice(48, 64)):
        other = x.clone()
        other[..., patch, patch] += 1
        assert ((model.forward_features(other) - y).abs().amax(-1) > 1e-9).all()


def test_a_head_for_other_classes_does_not_load_silently(tmp_path: Path) -> None:
    weights = timm.create_model("test_vrwkv", num_classes=3).state_dict()
    message = r"head\.fc\.weight tells 3 classes apart, the model 5\. .*reset_classifier\(5\)"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("test_vrwkv", num_classes=5).load_state_dict(weights)
    # what it says works
    path = tmp_path / "three.safetensors"
    save_file(weights, path)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    for model in (
        timm.create_model("test_vrwkv", num_classes=3),
        timm.create_model("test_vrwkv", num_classes=5, **options),
    ):
        if model.num_classes == 3:
            model.load_state_dict(weights)
            model.reset_classifier(5)
        assert model.head.fc.weight.shape == (5, 32)
        assert torch.equal(model.patch_embed.proj.weight, weights["patch_embed.proj.weight"])


def test_decay_out_of_range_is_refused_on_loading_and_named() -> None:
    model = timm.create_model("test_vrwkv")
    weights = model.state_dict()
    weights["blocks.1.att.spatial_decay"][3] = 61.0
    with pytest.raises(CheckpointError, match=r"spatial mix of layer 1: \|decay\| reaches 61"):
        timm.create_model("test_vrwkv").load_state_dict(weights)
    with pytest.raises(TrainingError, match="spatial mix of layer 1"):
        model.check_decay(TrainingError)
    unlimited = timm.create_model("test_vrwkv", impl="reference")
    unlimited.load_state_dict(weights)
    unlimited.check_decay(TrainingError)
    assert unlimited(torch.randn(1, 3, 64, 64)).isfinite().all()
