"""Vision-RWKV over pictures of any size, stripe by stripe, in memory that does not grow with them.

The features between two layers [1, H, W, C] lie in a temporary file, and a layer goes over it three
times, a stripe of rows at a time:

    from the last stripe to the first   keys and values, summed up for each stripe to one token:
                                        what comes after it
    from the first to the last          the same of what comes before, and the spatial mix in place
    from the first to the last          the channel mix in place

The Q-Shift needs one row above the stripe, as it was before it was overwritten, and one below. Keys
and values are computed twice, a seventh of the work; the result is that of the model on the whole
picture, up to rounding (ops/bi_wkv/tiles.py). In memory are one stripe, and a token for each; in
the file are H·W·C numbers, which are read and written, not mapped into memory. Where the folder for
temporary files is itself in memory, name another. Between stripes glibc keeps what was freed, with
holes: VRWKV-T took 99 MiB for 2048² pixels and 121 for 4096². MALLOC_MMAP_THRESHOLD_=131072 in the
environment, its own start value, keeps it from that: 41 MiB at most up to 8192², in twice the time.

Generation 4 alone; the models are ``vrwkv_*`` of :mod:`rwkv_vision.models`.

    net = timm.create_model("vrwkv_tiny_patch16_224", num_classes=10).eval()
    pixels = np.load("slide.npy", mmap_mode="r")  # [32768, 32768, 3] bytes, on disk
    logits = tiled_logits(net, PixelRows(pixels, mean, std))
"""

import tempfile
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_core.errors import ConfigError, DataError
from rwkv_core.ops.bi_wkv.tiles import Summary, bi_wkv_tile, summarise
from rwkv_vision.blocks import Block
from rwkv_vision.encoder import VRWKV
from rwkv_vision.mixers import ChannelMix, SpatialMix
from rwkv_vision.positions import along_axis

__all__ = ["Picture", "PixelRows", "tiled_features", "tiled_logits"]

TOKENS = 4096  # of a stripe


class Picture(Protocol):
    """A normalised picture that is read by rows, so that it need not be in memory."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows from ``top`` up to ``bottom`` [1, channels, bottom - top, width]."""


class PixelRows:
    """A picture in an array of bytes that is sliced by rows: numpy's, or one on disk like it.

    Args:
        pixels: [H, W, channels] of bytes.
        mean, std: one number for each channel, as the model's ``pretrained_cfg`` has them.

    Raises:
        DataError: an array of another shape, or not of bytes.
    """

    def __init__(self, pixels: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(pixels.shape) != 3 or pixels.dtype != np.uint8:
            raise DataError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; expected uint8 of "
                "[H, W, channels]"
            )
        self.pixels = pixels
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def read(self, top: int, bottom: int) -> Tensor:
        """Return normalised rows [1, channels, bottom - top, width]."""
        rows = np.array(self.pixels[top:bottom])  # a copy: what is on disk may be read-only
        x_CHW = torch.from_numpy(rows).permute(2, 0, 1) / 255
        return ((x_CHW - self.mean) / self.std)[None]


def tiled_logits(model: nn.Module, picture: Picture, **options: Any) -> Tensor:
    """Return what the model returns for a picture [1, num_classes].

    Args:
        model: one that pools by the mean, as all of :mod:`rwkv_vision.models` do by themselves.
        picture: its rows are read in order, each once.
        options: ``tokens`` and ``folder`` of :func:`tiled_features`.

    Raises:
        ConfigError, DataError: as :func:`tiled_features`, or another pooling.
    """
    _check(model)
    net = cast(VRWKV, model)
    if net.head.global_pool.pool_type != "avg":
        raise ConfigError(
            f"the model pools by {net.head.global_pool.pool_type!r}; over stripes it must be 'avg'"
        )
    sum_C, count = torch.zeros(net.embed_dim, dtype=torch.float64), 0
    for x_BHWC in tiled_features(net, picture, **options):
        sum_C += x_BHWC.double().sum((0, 1, 2)).cpu()
        count += x_BHWC.shape[1] * x_BHWC.shape[2]
    with torch.no_grad():
        return net.forward_head((sum_C / count).to(net.pos_embed)[None, None, None])


@torch.no_grad()
def tiled_features(
    model: nn.Module,
    picture: Picture,
    *,
    tokens: int = TOKENS,
    folder: str | PathLike[str] | None = None,
) -> Iterator[Tensor]:
    """Yield ``model.forward_features`` of a picture, stripe by stripe [1, rows, W, C].

    For the features after an earlier block cut the model by ``prune_intermediate_layers``.

    Args:
        model: of generation 4, in evaluation mode.
        picture: its rows are read in order, each once.
        tokens: patches of a stripe and its neighbours, which memory grows with; a stripe has at
            least one row, and a row is never cut.
        folder: of the temporary file; None is the system's.

    Raises:
        ConfigError: a model of another generation, or one in training mode.
        DataError: no pixels, rows of another shape than asked for, or pixels that are not numbers.
    """
    _check(model)
    net = cast(VRWKV, model)
    height, width = picture.size
    if height < 1 or width < 1:
        raise DataError(f"the picture has {height} × {width} pixels; expected at least one")
    rows, columns = net.patch_embed.dynamic_feat_size((height, width))
    n_rows = max(1, tokens // columns - 2)  # and their neighbours
    blocks = cast(Sequence[Block], net.blocks)
    with tempfile.TemporaryFile(dir=folder) as file:
        features = _Rows(file, rows, columns, net.pos_embed)
        positions = _Positions(net, rows, columns)
        for start, stop in features.stripes(n_rows):
            x_BHWC = net.patch_embed(_pixels(net, picture, start, stop))
            features.write(start, blocks[0].ln0(x_BHWC + positions.rows(start, stop)))
        for block in blocks:
            _mix_space(block, features, n_rows)
            _mix_channels(block, features, n_rows)
        for start, stop in features.stripes(n_rows):
            yield net.norm(features.read(start, stop))


def _check(model: nn.Module) -> None:
    if not isinstance(model, VRWKV):
        raise ConfigError(f"expected a model of rwkv_vision.models, got a {type(model).__name__}")
    for i, block in enumerate(cast(Sequence[Block], model.blocks)):
        if type(block.att) is not SpatialMix:
            raise ConfigError(
                f"block {i} mixes by {type(block.att).__name__}; only SpatialMix, of vrwkv_* "
                "models, can carry its sums from stripe to stripe"
            )
    if model.training:
        raise ConfigError("the model is in training mode; call its eval() first")


def _pixels(net: VRWKV, picture: Picture, start: int, stop: int) -> Tensor:
    """Return the pixels of rows of patches, on the model's device and in its dtype."""
    (height, width), side = picture.size, net.patch_embed.patch_size[0]
    top, bottom = start * side, min(stop * side, height)
    x_BCHW = picture.read(top, bottom)
    expected = (1, net.in_chans, bottom - top, width)
    if x_BCHW.shape != expected:
        raise DataError(
            f"rows {top} to {bottom} of the picture have shape {tuple(x_BCHW.shape)}, expected "
            f"{expected}"
        )
    if not x_BCHW.isfinite().all():
        raise DataError(f"rows {top} to {bottom} of the picture hold pixels that are not numbers")
    return x_BCHW.to(net.pos_embed)


class _Positions:
    """The position embedding, resampled as the model does, but by rows."""

    def __init__(self, net: VRWKV, rows: int, columns: int) -> None:
        self.grid_HWC = net.pos_embed.float().view(*net.grid, -1)
        self.dtype = net.pos_embed.dtype
        self.to_rows, self.to_columns = (
            along_axis(old, new, net.pos_embed.device)
            for old, new in zip(net.grid, (rows, columns), strict=True)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the positions of rows of patches [1, stop - start, W, C]."""
        rows_RWC = torch.einsum("rh,hwc->rwc", self.to_rows[start:stop], self.grid_HWC)
        return (self.to_columns @ rows_RWC).to(self.dtype)[None]


class _Window(NamedTuple):
    """Rows of features [1, H, W, C] with a neighbour above and below, and which are between."""

    start: int
    x_BHWC: Tensor
    inner: slice


class _Rows:
    """Features [1, H, W, C] in a file, in the dtype of ``like`` [..., C]."""

    def __init__(self, file: IO[bytes], rows: int, columns: int, like: Tensor) -> None:
        self.file: Any = file
        self.rows, self.columns, self.channels = rows, columns, like.shape[-1]
        self.dtype, self.device = like.dtype, like.device
        self.row_bytes = columns * self.channels * like.element_size()

    def stripes(self, n_rows: int) -> list[tuple[int, int]]:
        """Return the first row of each stripe, and the row after its last."""
        return [(i, min(i + n_rows, self.rows)) for i in range(0, self.rows, n_rows)]

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows of features."""
        shape = (1, stop - start, self.columns, self.channels)
        x_BHWC = torch.empty(shape, dtype=self.dtype)
        self.file.seek(start * self.row_bytes)
        self.file.readinto(x_BHWC.view(torch.uint8).numpy())
        return x_BHWC.to(self.device)

    def write(self, start: int, x_BHWC: Tensor) -> None:
        """Write rows of features."""
        self.file.seek(start * self.row_bytes)
        x_BHWC = x_BHWC.to("cpu", self.dtype).contiguous()
        self.file.write(x_BHWC.view(torch.uint8).numpy())

    def window(self, start: int, stop: int) -> _Window:
        """Return rows with their neighbours."""
        top = max(start - 1, 0)
        x_BHWC = self.read(top, min(stop + 1, self.rows))
        return _Window(start, x_BHWC, slice(start - top, stop - top))

    def windows(self, n_rows: int) -> Iterator[_Window]:
        """Yield all rows in order; those between may be overwritten before the next ones."""
        above_BHWC: Tensor | None = None
        for start, stop in self.stripes(n_rows):
            window = self.window(start, stop)
            if above_BHWC is not None:
                window.x_BHWC[:, :1] = above_BHWC
            above_BHWC = window.x_BHWC[:, window.inner][:, -1:].clone()
            yield window


def _mix_space(block: Block, features: _Rows, n_rows: int) -> None:
    """Run the first half of a block, in place."""
    att = cast(SpatialMix, block.att)
    w, u, T = att.spatial_decay, att.spatial_first, features.rows * features.columns
    afterwards: list[Summary | None] = []
    after = before = None
    for start, stop in reversed(features.stripes(n_rows)):
        afterwards.append(after)
        *kv, _ = _keys_values(block, features.window(start, stop))
        k_BTC, v_BTC = (x.flip(1) for x in kv)
        after = summarise(w, k_BTC, v_BTC, after, length=T)
    for window in features.windows(n_rows):
        k_BTC, v_BTC, x_r_BHWC = _keys_values(block, window)
        y_BTC = bi_wkv_tile(w, u, k_BTC, v_BTC, before, afterwards.pop(), length=T, impl=att.impl)
        before = summarise(w, k_BTC, v_BTC, before, length=T)
        y_BHWC = att.finish(x_r_BHWC, y_BTC.reshape(x_r_BHWC.shape))
        features.write(window.start, block.add(window.x_BHWC[:, window.inner], y_BHWC))


def _keys_values(block: Block, window: _Window) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values [1, T, C] of the rows, and what the receptance reads."""
    att = cast(SpatialMix, block.att)
    x_BHWC = window.x_BHWC if block.post_norm else block.ln1(window.x_BHWC)
    x_k, x_v, x_r = (x_BHWC[:, window.inner] for x_BHWC in att.mix(x_BHWC))
    return att.key(x_k).flatten(1, 2), att.value(x_v).flatten(1, 2), x_r


def _mix_channels(block: Block, features: _Rows, n_rows: int) -> None:
    """Run the second half of a block, in place."""
    ffn = cast(ChannelMix, block.ffn)
    for window in features.windows(n_rows):
        x_BHWC = window.x_BHWC if block.post_norm else block.ln2(window.x_BHWC)
        y_BHWC = ffn.expand(*(x_BHWC[:, window.inner] for x_BHWC in ffn.mix(x_BHWC)))
        features.write(window.start, block.add_channels(window.x_BHWC[:, window.inner], y_BHWC))
