"""Shifts, scans and mixers of images: their properties, and an independent formulation in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_core.ops import bi_wkv
from rwkv_core.testing import perturb, relative_error
from rwkv_core.train.optim import param_groups
from rwkv_vision.encoder import VRWKV
from rwkv_vision.mixers import ChannelMix, SpatialMix
from rwkv_vision.scan import ColumnScan, FourWayScan, RowScan, Scan, StrideScan, ZigzagScan
from rwkv_vision.shift import QShift

SCANS = [RowScan(), ColumnScan(), ZigzagScan(), StrideScan(1), StrideScan(2), FourWayScan()]
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 5), (4, 6)]
by_name = pytest.mark.parametrize(
    "scan", SCANS, ids=[f"{type(s).__name__}{getattr(s, 'step', '')}" for s in SCANS]
)


@by_name
@pytest.mark.parametrize("grid", GRIDS)
def test_undo_takes_a_scan_back(scan: Scan, grid: tuple[int, int]) -> None:
    x_BTC = torch.randn(2, grid[0] * grid[1], 3)
    there = scan.apply(x_BTC, grid)
    assert torch.equal(scan.undo(there, grid), x_BTC)
    # each order reads every token of its own image once
    for part in there.chunk(len(there) // 2):
        assert torch.equal(part.sort(1).values, x_BTC.sort(1).values)


@pytest.mark.parametrize(
    ("scan", "expected"),
    [
        (RowScan(), [[0, 1, 2, 3, 4, 5]]),
        (ColumnScan(), [[0, 3, 1, 4, 2, 5]]),
        (ZigzagScan(), [[0, 1, 2, 5, 4, 3]]),
        (StrideScan(2), [[0, 2, 1, 3, 5, 4]]),
        (
            FourWayScan(),
            [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]],
        ),
    ],
)
def test_scan_reads_in_its_order(scan: Scan, expected: list[list[int]]) -> None:
    x_BTC = torch.arange(6.0).view(1, 6, 1)
    assert scan.apply(x_BTC, (2, 3))[..., 0].tolist() == expected


def test_scan_refuses_a_grid_of_another_size() -> None:
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 2 × 4"):
        RowScan().apply(torch.zeros(1, 6, 1), (2, 4))


def through(scan: Scan, k_BHWC: Tensor, v_BHWC: Tensor) -> Tensor:
    """Return bidirectional WKV over an image, read by a scan."""
    grid = k_BHWC.shape[1:3]
    w, u = torch.linspace(-3, 5, k_BHWC.shape[-1]).double(), torch.zeros(k_BHWC.shape[-1]).double()
    k, v = (scan.apply(x.flatten(1, 2), grid) for x in (k_BHWC, v_BHWC))
    return scan.undo(bi_wkv(w, u, k, v), grid).view(v_BHWC.shape)


def test_a_symmetric_scan_commutes_with_transposing_the_image() -> None:
    k, v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    transposed = through(FourWayScan(), k.transpose(1, 2), v.transpose(1, 2))
    expected = through(FourWayScan(), k, v).transpose(1, 2)
    torch.testing.assert_close(transposed, expected, rtol=0, atol=1e-12)
    rows = through(RowScan(), k.transpose(1, 2), v.transpose(1, 2))
    assert (rows - through(RowScan(), k, v).transpose(1, 2)).abs().max() > 1e-2


def q_shift(x_BHWC: np.ndarray, pixels: int) -> np.ndarray:
    """Return the Q-Shift by copying one channel of one pixel at a time."""
    out = np.zeros_like(x_BHWC)
    B, H, W, C = x_BHWC.shape
    g = C // 4
    for b, y, x, c in np.ndindex(B, H, W, C):
        dy, dx = [(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0), (0, 0)][min(c // g, 4)]
        if 0 <= y + dy < H and 0 <= x + dx < W:
            out[b, y, x, c] = x_BHWC[b, y + dy, x + dx, c]
    return out


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 1, 5, 9), (1, 4, 1, 11), (1, 1, 1, 4)])
def test_q_shift_looks_left_right_up_and_down(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for pixels in (1, 2) if min(shape[1:3]) > 1 else (1,):
        shifted = QShift(shape[-1], shift_pixel=pixels)(x)
        np.testing.assert_array_equal(shifted.numpy(), q_shift(x.numpy(), pixels))


def test_q_shift_keeps_what_gamma_leaves() -> None:
    x = torch.randn(1, 3, 3, 10)
    shifted = QShift(10, gamma=0.1)(x)
    assert torch.equal(shifted[..., 4:], x[..., 4:])
    assert torch.equal(shifted[:, :, 1:, 0], x[:, :, :-1, 0])
    for wrong in ({"gamma": 0.3}, {"shift_pixel": 0}):
        with pytest.raises(ValueError, match="must be"):
            QShift(8, **wrong)


# the block once more, in float64 NumPy, from the paper's formulas


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def norm(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def spatial_mix(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    s = q_shift(x, 1)
    mixed = {n: x * p[f"att.spatial_mix_{n}"] + s * (1 - p[f"att.spatial_mix_{n}"]) for n in "rkv"}
    r, k, v = (
        mixed[n] @ p[f"att.{name}.weight"].T
        for n, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    B, H, W, C = x.shape
    k, v = k.reshape(B, -1, C), v.reshape(B, -1, C)
    y = np.empty_like(v)
    T = H * W
    for t in range(T):
        num = den = 0.0
        for i in range(T):
            bonus = p["att.spatial_first"] / T
            score = bonus if i == t else -(abs(t - i) - 1) * p["att.spatial_decay"] / T
            weight = np.exp(score + k[:, i])
            num, den = num + weight * v[:, i], den + weight
        y[:, t] = num / den
    return (sigmoid(r) * y.reshape(r.shape)) @ p["att.output.weight"].T


def channel_mix(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    s = q_shift(x, 1)
    x_k, x_r = (x * p[f"ffn.spatial_mix_{n}"] + s * (1 - p[f"ffn.spatial_mix_{n}"]) for n in "kr")
    k = np.maximum(x_k @ p["ffn.key.weight"].T, 0) ** 2
    return sigmoid(x_r @ p["ffn.receptance.weight"].T) * (k @ p["ffn.value.weight"].T)


@pytest.mark.parametrize("grid", [(3, 5), (1, 4)])
def test_network_equals_an_independent_one(grid: tuple[int, int]) -> None:
    net = VRWKV(img_size=(6, 10), patch_size=2, num_classes=3, embed_dim=8, depth=2).double().eval()
    perturb(net)
    p = {n: t.detach().numpy() for n, t in net.state_dict().items()}
    image = torch.randn(2, 3, 2 * grid[0], 2 * grid[1], dtype=torch.float64)

    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).numpy()
    x = np.einsum("bchwij,ocij->bhwo", patches, p["patch_embed.proj.weight"])
    x = x + p["patch_embed.proj.bias"]
    if grid == (3, 5):  # other grids resample the position embedding
        x = x + p["pos_embed"].reshape(1, *grid, 8)
    else:
        x = x + net._resampled(*grid).detach().numpy().reshape(1, *grid, 8)
    for i in range(2):
        q = {n.removeprefix(f"blocks.{i}."): t for n, t in p.items()}
        x = norm(x, q, "ln0") if i == 0 else x
        x = x + spatial_mix(norm(x, q, "ln1"), q)
        x = x + channel_mix(norm(x, q, "ln2"), q)
    features = norm(x, p, "norm")
    logits = features.mean((1, 2)) @ p["head.fc.weight"].T + p["head.fc.bias"]

    # a position embedding is resampled in fp32, on both sides
    assert relative_error(net.forward_features(image), torch.from_numpy(features)) <= 1e-12
    assert relative_error(net(image), torch.from_numpy(logits)) <= 1e-12


@pytest.mark.parametrize("impl", ["reference", "prefix"])
def test_spatial_mix_runs_either_implementation(impl: str) -> None:
    torch.manual_seed(0)
    mixer = SpatialMix(8, depth=2, impl=impl)
    torch.manual_seed(0)
    other = SpatialMix(8, depth=2)
    x = torch.randn(1, 4, 3, 8)
    assert relative_error(mixer(x), other(x)) <= 1e-5
    assert not mixer.causal


def test_init_follows_its_table() -> None:
    C, layer, depth = 8, 1, 4
    mixer = SpatialMix(C, layer=layer, depth=depth)
    j = torch.arange(C)
    torch.testing.assert_close(
        mixer.spatial_decay, -5 + 8 * (j / (C - 1)) ** (0.7 + 1.3 / 3), check_dtype=False
    )
    assert mixer.spatial_decay.aminmax() == (-5, 3)
    first = [math.log(0.3) + 0.5 * step for step in (0, 1, -1, 0, 1, -1, 0, 1)]
    torch.testing.assert_close(mixer.spatial_first, torch.tensor(first))
    torch.testing.assert_close(mixer.spatial_mix_k[0, 0], (j / C) ** 0.75)
    torch.testing.assert_close(mixer.spatial_mix_v[0, 0], (j / C) ** 0.75 + 0.1)
    torch.testing.assert_close(mixer.spatial_mix_r[0, 0], (j / C) ** 0.375)
    wide = SpatialMix(256, depth=2)
    assert wide.key.weight.std().item() == pytest.approx(
        0.88 / 16, rel=0.02
    )  # a normal cut off at 2 σ
    narrow = ChannelMix(256, depth=2, weight_std=0.02)
    assert narrow.key.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.02)
    for degenerate in (SpatialMix(4, depth=1), SpatialMix(1, depth=1), ChannelMix(4, depth=1)):
        assert all(p.isfinite().all() for p in degenerate.parameters())


def test_only_matrices_decay() -> None:
    net = VRWKV(img_size=8, patch_size=2, num_classes=3, embed_dim=8, depth=2)
    decayed = {n for names, _, decays in param_groups(net) if decays for n in names}
    assert decayed == {n for n, p in net.named_parameters() if n.endswith("weight") and p.ndim > 1}
    assert not any("spatial" in n or n == "pos_embed" for n in decayed)
    assert {"pos_embed", "blocks.0.att.spatial_mix_k", "blocks.1.ffn.spatial_mix_r"} <= (
        net.no_weight_decay()
    )
