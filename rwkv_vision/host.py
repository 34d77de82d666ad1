"""Classifying pictures with a model's graphs alone: numpy and Pillow, no torch.

The same code drives the PyTorch model and its ONNX export; a ``run`` is either.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from rwkv_core.adapter import Run
from rwkv_core.errors import DataError

__all__ = ["Prediction", "decode", "from_array", "predict", "preprocess"]

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BATCH = 64

Picture = str | PathLike | Image.Image | np.ndarray


class Prediction(NamedTuple):
    """The likeliest class, its probability, and the logits of all classes [K]."""

    label: str
    confidence: float
    logits: np.ndarray


def predict(run: Run, pictures: Iterable[Picture]) -> list[Prediction]:
    """Return a prediction for each picture: a path, a Pillow image or an array.

    Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], of bytes or of floats within 0 and 1.

    Raises:
        DataError: a file that is no picture, an array of another shape or with values that are not
            numbers; the message says which.
    """
    labels = run.metadata["labels"]
    out = []
    for batch_BCHW in _batches(run.metadata, pictures):
        for logits in run("image", {"image": batch_BCHW})["logits"]:
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            best = int(logits.argmax())
            out.append(Prediction(labels[best], float(chances[best]), logits))
    return out


def preprocess(picture: Image.Image, metadata: Mapping[str, Any]) -> np.ndarray:
    """Return the normalised pixels [C, H, W] in fp32, as in evaluation during training."""
    height, width = metadata["image_size"]
    if picture.size != (width, height):
        picture = picture.resize((width, height), FILTERS[metadata["interpolation"]])
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    mean, std = (np.array(metadata[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def decode(source: str | PathLike | IO[bytes], channels: int, name: str = "") -> Image.Image:
    """Return a picture file as 8-bit grey or colour, upright.

    16 bits are scaled to 8, transparent pixels laid over white, palettes resolved.

    Raises:
        DataError: no picture, a damaged one, or one of floating-point numbers; ``name`` is named.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which nobody asked for
            with Image.open(source) as picture:
                picture.load()
                return _eight_bits(ImageOps.exif_transpose(picture), channels, name)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist") from error
    except Exception as error:  # decoders raise whatever they trip over
        raise DataError(f"{name} is damaged or no picture: {error}") from error


def from_array(pixels: np.ndarray, channels: int, name: str = "the array") -> Image.Image:
    """Return an array of pixels as 8-bit grey or colour.

    Raises:
        DataError: another shape, floats outside 0 and 1 or not numbers, or another dtype.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))) or not all(
        pixels.shape
    ):
        raise DataError(
            f"{name} has shape {pixels.shape}; expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise DataError(f"{name} holds pixels that are not numbers (NaN or infinite)")
        if pixels.min() < 0 or pixels.max() > 1:
            raise DataError(
                f"{name} holds floats from {pixels.min():g} to {pixels.max():g}; expected 0 to 1"
            )
        pixels = np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{name} has dtype {pixels.dtype}; expected uint8, uint16 or floats")
    if pixels.dtype == np.uint16:
        pixels = _from_sixteen(pixels)
    return _eight_bits(Image.fromarray(pixels), channels, name)


def _eight_bits(picture: Image.Image, channels: int, name: str) -> Image.Image:
    if picture.mode == "F":
        raise DataError(f"{name} holds floating-point pixels; convert it to 8 or 16 bits")
    if picture.mode.startswith("I"):
        picture = Image.fromarray(_from_sixteen(np.asarray(picture)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _from_sixteen(pixels: np.ndarray) -> np.ndarray:
    # 65535 = 257 · 255; 32-bit files hold 16-bit values in practice
    return np.round(np.clip(pixels, 0, 65535) / 257).astype(np.uint8)


def _batches(metadata: Mapping[str, Any], pictures: Iterable[Picture]) -> Iterator[np.ndarray]:
    waiting = []
    for i, picture in enumerate(pictures):
        waiting.append(preprocess(_picture(picture, metadata["channels"], i), metadata))
        if len(waiting) == BATCH:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)


def _picture(picture: Picture, channels: int, i: int) -> Image.Image:
    if isinstance(picture, Image.Image):
        return _eight_bits(picture, channels, f"picture {i}")
    if isinstance(picture, np.ndarray):
        return from_array(picture, channels, f"picture {i}")
    return decode(Path(picture), channels)
