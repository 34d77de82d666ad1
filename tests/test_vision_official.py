"""The authors' weights, written down here on their own: names, shapes and counts of every model."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from rwkv_core.errors import CheckpointError
from rwkv_core.ops.bi_wkv import IMPLS, bi_wkv
from rwkv_core.testing import perturb, relative_error
from rwkv_vision import official
from rwkv_vision.official import bi_wkv_official_kernel, checkpoint_filter_fn, convert

Shapes = dict[str, tuple[int, ...]]
LAYER4: dict[str, Any] = {
    "att.spatial_decay": "C", "att.spatial_first": "C",
    "att.spatial_mix_k": "11C", "att.spatial_mix_v": "11C", "att.spatial_mix_r": "11C",
    "att.key.weight": "CC", "att.value.weight": "CC", "att.receptance.weight": "CC",
    "att.output.weight": "CC",
}  # fmt: skip
LAYER6: dict[str, Any] = {
    **{f"att.time_maa_{c}": "11C" for c in "xwkvrg"},
    "att.time_maa_w1": "CM", "att.time_maa_w2": "5RC", "att.time_decay": "11C",
    "att.time_decay_w1": "CD", "att.time_decay_w2": "DC", "att.time_faaaa": "HN",
    "att.receptance.weight": "CC", "att.key.weight": "CC", "att.value.weight": "CC",
    "att.gate.weight": "CC", "att.output.weight": "CC", "att.ln_x.weight": "C",
    "att.ln_x.bias": "C",
}  # fmt: skip
BOTH: dict[str, Any] = {
    **{f"{n}.{kind}": "C" for n in ("ln1", "ln2") for kind in ("weight", "bias")},
    "ffn.spatial_mix_k": "11C", "ffn.spatial_mix_r": "11C",
    "ffn.key.weight": "FC", "ffn.receptance.weight": "CC", "ffn.value.weight": "CF",
}  # fmt: skip
KEY_NORM = {
    f"{half}.key_norm.{kind}": width
    for half, width in (("att", "C"), ("ffn", "F"))
    for kind in ("weight", "bias")
}
GAMMA = {"gamma1": "C", "gamma2": "C"}


def shapes(
    C: int,
    layer: dict[str, str],
    *,
    depth: int = 12,
    gamma: bool = False,
    key_norm: bool = False,
    hidden: int = 0,
    patches: int = 196,
    classes: int = 1000,
    head_dim: int = 64,
) -> Shapes:
    """Return the names and shapes of a file, as mmcls and the trainer of the large model write."""
    sizes = {"C": C, "F": 4 * C, "R": 32, "M": 160, "D": 64, "H": C // head_dim, "N": head_dim}
    names = {**BOTH, **layer, **(GAMMA if gamma else {}), **(KEY_NORM if key_norm else {})}
    found: Shapes = {
        "backbone.pos_embed": (1, patches, C),
        "backbone.patch_embed.projection.weight": (C, 3, 16, 16),
        "backbone.patch_embed.projection.bias": (C,),
        "backbone.layers.0.ln0.weight": (C,),
        "backbone.layers.0.ln0.bias": (C,),
    }
    for i in range(depth):
        for name, axes in names.items():
            shape = tuple(sizes.get(a) or int(a) for a in axes)
            found[f"backbone.layers.{i}.{name}"] = shape
    found |= {"backbone.ln1.weight": (C,), "backbone.ln1.bias": (C,)}
    if hidden:
        found |= {"head.0.weight": (hidden, C), "head.0.bias": (hidden,)}
        found |= {"head.2.weight": (classes, hidden), "head.2.bias": (classes,)}
    else:
        found |= {"head.fc.weight": (classes, C), "head.fc.bias": (classes,)}
    return found


FILES = {  # model: its file, and how many tensors that holds
    "vrwkv_tiny_patch16_224": (shapes(192, LAYER4), 225),
    "vrwkv_small_patch16_224": (shapes(384, LAYER4, gamma=True), 249),
    "vrwkv_base_patch16_224": (shapes(768, LAYER4, gamma=True), 249),
    "vrwkv_large_patch16_384": (
        shapes(1024, LAYER4, depth=24, gamma=True, key_norm=True, hidden=3072, patches=144),
        587,
    ),
    "vrwkv6_tiny_patch16_224": (shapes(192, LAYER6), 345),
    "vrwkv6_small_patch16_224": (shapes(384, LAYER6, gamma=True), 369),
    "vrwkv6_base_patch16_224": (shapes(768, LAYER6, gamma=True), 369),
}
SMALL = {"depth": 3, "patches": 16}
TESTS = {
    "test_vrwkv": shapes(32, LAYER4, **SMALL),
    "test_vrwkv_large": shapes(
        32, LAYER4, depth=3, patches=4, gamma=True, key_norm=True, hidden=48
    ),
    "test_vrwkv6": shapes(32, LAYER6, **SMALL, head_dim=16),
}


def tensors(named: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return random tensors of these shapes."""
    return {name: torch.randn(shape, dtype=dtype) / 8 for name, shape in named.items()}


def meta(named: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in named.items()}


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **options)


# names and shapes


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_of_a_file_has_its_place(name: str) -> None:
    named, count = FILES[name]
    assert len(named) == count
    expected = {n: t.shape for n, t in on_meta(name).state_dict().items()}
    found = official.rename(meta(named))
    rows = ("maa_x", "maa_w", "maa_k", "maa_v", "maa_r", "maa_g", "decay")
    for i in range(12 if "vrwkv6" in name else 0):  # vectors of generation 6 are [C] with us
        for row in rows:
            assert named[f"backbone.layers.{i}.att.time_{row}"][:2] == (1, 1)
            expected[f"blocks.{i}.att.time_{row}"] = expected[f"blocks.{i}.att.time_{row}"][-1:]
    assert {n: t.shape for n, t in found.items()} == expected
    assert checkpoint_filter_fn(
        meta(named), on_meta(name, img_size=192 if "large" in name else 224)
    )
    assert official.nearest(found) == (name, [])


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("key", ["", "state_dict", "model", "model_ema"])
def test_values_arrive_under_our_names(name: str, key: str) -> None:
    given = tensors(TESTS[name])
    other = tensors(TESTS[name])
    wrapped: Any = {key: given, "meta": {"epoch": 300}} if key else given
    if key == "model_ema":
        wrapped["model"] = other  # the average is preferred, as timm does
    model = timm.create_model(name)
    found = checkpoint_filter_fn(wrapped, model)
    model.load_state_dict(found, strict=True)
    ours = model.state_dict()
    assert len(ours) == len(given)
    pairs = {
        "patch_embed.proj.bias": "backbone.patch_embed.projection.bias",
        "blocks.2.ln1.weight": "backbone.layers.2.ln1.weight",
        "blocks.0.ln0.bias": "backbone.layers.0.ln0.bias",
        "blocks.1.ffn.value.weight": "backbone.layers.1.ffn.value.weight",
        "norm.weight": "backbone.ln1.weight",
        "pos_embed": "backbone.pos_embed",
        "head.fc.weight": "head.2.weight" if "large" in name else "head.fc.weight",
    }
    if "large" in name:
        pairs["head.pre_logits.fc.bias"] = "head.0.bias"
        pairs["blocks.1.att.key_norm.weight"] = "backbone.layers.1.att.key_norm.weight"
    for mine, theirs in pairs.items():
        assert torch.equal(ours[mine], given[theirs]), mine


def test_the_linear_head_of_the_large_models_trainer() -> None:
    given = tensors(TESTS["test_vrwkv"])
    given = {n.replace("head.fc.", "head."): t for n, t in given.items()}
    model = timm.create_model("test_vrwkv")
    model.load_state_dict(given)
    assert torch.equal(model.head.fc.bias, given["head.bias"])


def mae(named: Shapes) -> dict[str, Tensor]:
    """Return a masked autoencoder: encoder and decoder, without a head."""
    C, D = named["backbone.pos_embed"][2], 24
    found = {n.replace("backbone.", "").replace("layers.", "blocks."): s for n, s in named.items()}
    decoder = {
        n.replace("blocks.", "decoder_blocks."): tuple(D if x == C else x for x in s)
        for n, s in found.items()
        if n.startswith("blocks.")
    }
    found = {n: s for n, s in found.items() if not n.startswith("head.")} | decoder
    found |= {
        "decoder_embed.weight": (D, C), "decoder_embed.bias": (D,), "mask_token": (1, 1, D),
        "decoder_pos_embed": (1, 16, D), "ln2.weight": (D,), "ln2.bias": (D,),
        "decoder_pred.weight": (768, D), "decoder_pred.bias": (768,),
    }  # fmt: skip
    return tensors(found)


def test_the_encoder_of_a_masked_autoencoder(tmp_path: Path) -> None:
    given = mae(shapes(32, LAYER4, **SMALL, gamma=True, key_norm=True))
    options = {"num_classes": 0, "key_norm": True, "init_values": 1.0}
    torch.save({"model": given, "epoch": 800, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    path = tmp_path / "m.safetensors"
    assert convert(tmp_path / "m.pth", path, "test_vrwkv", **options) == "test_vrwkv"
    for file in (tmp_path / "m.pth", path):
        model = timm.create_model("test_vrwkv", checkpoint_path=file, **options)
        assert torch.equal(model.blocks[2].ln2.bias, given["blocks.2.ln2.bias"])
        assert torch.equal(model.norm.bias, given["ln1.bias"])
    # a head is nothing it has
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias is missing"):
        timm.create_model("test_vrwkv", checkpoint_path=tmp_path / "m.pth", key_norm=True)


# through timm


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("wrap", ["pth", "safetensors", "converted"])
def test_timm_loads_a_file(name: str, wrap: str, tmp_path: Path) -> None:
    given = tensors(TESTS[name])
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": given, "meta": {"CLASSES": ("a", "b")}}, path)
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(given, path)
    elif wrap == "converted":
        assert convert(path, tmp_path / "ours.safetensors") == name
        path = tmp_path / "ours.safetensors"
    x = torch.randn(1, 3, 64, 64)
    reference = timm.create_model(name).eval()
    reference.load_state_dict(official.rename(given))
    overlay = {"file": str(path)}
    by_overlay = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    by_path = timm.create_model(name, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        y = reference(x)
        assert torch.equal(by_overlay(x), y)
        assert torch.equal(by_path(x), y)
    ten = timm.create_model(
        name, pretrained=True, num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay
    )
    assert ten.head.fc.weight.shape[0] == 10
    assert torch.equal(ten.norm.weight, reference.norm.weight)
    summed = reference.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(ten.patch_embed.proj.weight, summed)
    features = timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay
    ).eval()
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(features(x), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side", [(96, 96), (32, 128), (40, 64)])
def test_positions_are_resampled_for_another_image_size(
    side: tuple[int, int], tmp_path: Path
) -> None:
    given = tensors(TESTS["test_vrwkv"])
    torch.save(given, path := tmp_path / "weights.pth")
    grid = given["backbone.pos_embed"].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    rows, columns = -(-side[0] // 16), side[1] // 16
    grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic")
    expected = grid.permute(0, 2, 3, 1).flatten(1, 2)
    overlay = {"file": str(path)}
    for how in (
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": overlay},
    ):
        model = timm.create_model("test_vrwkv", img_size=side, **how)
        torch.testing.assert_close(model.pos_embed, expected)
    wrapped = checkpoint_filter_fn({"model": given}, model)
    torch.testing.assert_close(wrapped["pos_embed"], expected)
    # our own names: by timm's filter, in which every model adapts; not by load_state_dict
    ours = timm.create_model("test_vrwkv", img_size=(32, 128)).state_dict()
    again = timm.create_model("test_vrwkv", img_size=(32, 128))
    assert torch.equal(checkpoint_filter_fn(ours, again)["pos_embed"], ours["pos_embed"])
    with pytest.raises(RuntimeError, match="pos_embed"):
        timm.create_model("test_vrwkv", img_size=96).load_state_dict(ours)


def test_positions_of_the_large_model_are_made_for_192_pixels() -> None:
    given = tensors(TESTS["test_vrwkv_large"])
    model = timm.create_model("test_vrwkv_large")
    model.load_state_dict(given)
    assert torch.equal(model.pos_embed, given["backbone.pos_embed"])
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


# weights of the wrong model, broken files


def fault(change: str) -> dict[str, Tensor]:
    given = tensors(TESTS["test_vrwkv"])
    first = "backbone.layers.1.att.key.weight"
    if change == "missing":
        del given[first]
    elif change == "missing everywhere":
        given = {n: t for n, t in given.items() if not n.endswith("spatial_first")}
    elif change == "unexpected":
        given["backbone.layers.1.att.gate.weight"] = torch.zeros(32, 32)
    elif change == "shape":
        given[first] = torch.zeros(32, 31)
    elif change == "twice":
        given[first.replace("backbone.", "")] = given[first].clone()
    elif change == "no tensor":
        given[first] = "text"  # type: ignore[assignment]
    elif change == "positions":
        given["backbone.pos_embed"] = torch.zeros(1, 15, 32)
    elif change == "headless":
        given = {n: t for n, t in given.items() if not n.startswith("head.")}
    elif change == "decay":
        given["backbone.layers.1.att.spatial_decay"][3] = 61
    return given


FAULTS = {
    "missing": r"blocks\.1\.att\.key\.weight is missing\. .*nearest model is test_vrwkv$",
    "missing everywhere": r"blocks\.\*\.att\.spatial_first \(3 layers\) is missing",
    "unexpected": r"blocks\.1\.att\.gate\.weight is unexpected",
    "shape": r"blocks\.1\.att\.key\.weight is \[32, 31\], expected \[32, 32\]",
    "twice": r"layers\.1\.att\.key\.weight comes twice",
    "no tensor": r"layers\.1\.att\.key\.weight is a str, expected a tensor",
    "positions": r"15 positions, which are no square, and the model's grid is 4 × 4",
    "headless": r"head\.fc\.bias is missing; head.* those of test_vrwkv with num_classes=0$",
    "decay": r"spatial mix of layer 1: \|decay\| reaches 61",
}


@pytest.mark.parametrize("change", FAULTS)
def test_a_broken_dictionary_is_refused_by_name(change: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=FAULTS[change]):
        timm.create_model("test_vrwkv").load_state_dict(fault(change))
    safe = {n: t for n, t in fault(change).items() if isinstance(t, Tensor)}
    if change != "no tensor":
        safetensors.torch.save_file(safe, path := tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=FAULTS[change]):
            timm.create_model(
                "test_vrwkv", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
            )


@pytest.mark.parametrize(
    ("into", "named", "differs"),
    [
        (
            "vrwkv_tiny_patch16_224",
            "vrwkv_small_patch16_224",
            r"gamma1 \(12 layers\) is unexpected",
        ),
        ("vrwkv_small_patch16_224", "vrwkv_tiny_patch16_224", r"gamma1 \(12 layers\) is missing"),
        ("vrwkv_tiny_patch16_224", "vrwkv6_tiny_patch16_224", r"time_maa_x \(12 layers\) is unexp"),
        (
            "vrwkv_base_patch16_224",
            "vrwkv_small_patch16_224",
            r"proj\.weight is \[384, 3, 16, 16\], expected \[768, 3, 16, 16\]",
        ),
    ],
)
def test_weights_of_the_wrong_model_name_the_right_one(into: str, named: str, differs: str) -> None:
    with pytest.raises(CheckpointError, match=differs) as caught:
        checkpoint_filter_fn(meta(FILES[named][0]), on_meta(into))
    assert str(caught.value).endswith(f"By name and shape they are those of {named}")


class Runs:
    """An object that would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_what_a_trainer_pickled_is_passed_over_and_what_could_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = tensors(TESTS["test_vrwkv"], torch.float16)
    import numpy as np

    record = {"mean": np.float64(1), "of": [np.arange(3)], "args": argparse.Namespace(seed={1})}
    torch.save({"state_dict": given, "meta": record}, "mm.pth")
    with pytest.raises(RuntimeError, match="weights_only=True blocked"):
        timm.create_model("test_vrwkv", checkpoint_path="mm.pth")
    assert convert("mm.pth", "ours.safetensors") == "test_vrwkv"
    found = safetensors.torch.load_file("ours.safetensors")
    assert torch.equal(found["norm.bias"], given["backbone.ln1.bias"])
    assert found["norm.bias"].dtype == torch.float16
    torch.save({"state_dict": given, "meta": Runs()}, "bad.pth")
    with pytest.raises(
        CheckpointError, match=r"bad\.pth asks for .*pathlib\.Path.*, which no file"
    ):
        convert("bad.pth", "no.safetensors")
    assert not Path("ran").exists()
    assert not Path("no.safetensors").exists()


def test_convert_refuses(tmp_path: Path) -> None:
    given = tensors(TESTS["test_vrwkv"])
    torch.save(given, good := tmp_path / "good.pth")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(good, tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.\*\.gamma1 \(3 layers\) is missing"):
        convert(good, out, "test_vrwkv", init_values=1.0)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read"):
        convert(tmp_path / "cut.pth", out)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a dictionary"):
        convert(tmp_path / "list.pth", out)
    given["backbone.ln1.bias"][0] = math.nan
    torch.save(given, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"not finite: norm\.bias"):
        convert(tmp_path / "nan.pth", out)
    assert not out.exists()
    convert(good, out)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(good, out)


# what the released kernel computes


def simulated(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, segments: int) -> Tensor:
    """Compute as the kernel does, without its rescaling: a state per segment, then sweeps."""
    T = k_BTC.shape[1]
    n, w, u = math.ceil(T / segments), w_C / T, u_C / T
    sums = []
    for x in (k_BTC.exp() * v_BTC, k_BTC.exp()):
        past, future = [], []
        for s in range(segments):
            tokens = range(n * s, min(n * (s + 1), T))
            zero = torch.zeros_like(x[:, 0])
            end = tokens.stop
            past.append(sum((x[:, i] * torch.exp(-w * (end - i)) for i in tokens), zero))
            future.append(sum((x[:, i] * torch.exp(-w * (i - n * s)) for i in tokens), zero))
        outputs = []
        for s in range(segments):
            tokens = range(n * s, min(n * (s + 1), T))
            if not len(tokens):
                break
            a = sum((past[i] * torch.exp(-w * n * (s - i - 1)) for i in range(s)), zero)
            c = sum((future[i] * torch.exp(-w * n * (i - s)) for i in range(s, segments)), zero)
            c = c - x[:, tokens.start]
            for t in tokens:
                outputs.append(a + c + u.exp() * x[:, t])
                a = a * torch.exp(-w) + x[:, t]
                c = (c - x[:, (t + 1) % T]) * torch.exp(w)
        sums.append(torch.stack(outputs, 1))
    return sums[0] / sums[1]


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 97, 196])
@pytest.mark.parametrize("segments", [16, 32])
def test_the_closed_form_is_the_kernel(T: int, segments: int) -> None:
    C = 12
    w = torch.linspace(-20, 20, C, dtype=torch.float64)
    u = torch.randn(C, dtype=torch.float64)
    k, v = torch.randn(2, 2, T, C, dtype=torch.float64)
    y = bi_wkv_official_kernel(w, u, k, v, segments=segments)
    assert relative_error(y, simulated(w, u, k, v, segments)) <= 1e-12


def test_the_kernel_differs_from_the_formula_by_less_than_a_hundredth() -> None:
    C, T = 192, 196
    w = -5 + 8 * torch.linspace(0, 1, C, dtype=torch.float64) ** 0.7
    u = math.log(0.3) + 0.5 * ((torch.arange(C) + 1) % 3 - 1).double()
    k, v = torch.randn(2, 1, T, C, dtype=torch.float64)
    gap = (bi_wkv_official_kernel(w, u, k, v) - bi_wkv(w, u, k, v)).abs().max() / v.abs().max()
    assert 1e-5 < gap < 1e-2
    # without decay nothing is left of it
    whole = bi_wkv_official_kernel(torch.zeros_like(w), u, k, v)
    assert relative_error(whole, bi_wkv(torch.zeros_like(w), u, k, v)) <= 1e-12


def test_a_whole_model_runs_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLS, "official_kernel", bi_wkv_official_kernel)
    model = timm.create_model("test_vrwkv").double().eval()
    perturb(model, 0.02)
    kernel = timm.create_model("test_vrwkv", impl="official_kernel").double().eval()
    kernel.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert 0 < relative_error(kernel(x), model(x)) < 1e-2
