"""Training runs as functions: each docstring says what it takes and what it gave."""

from rwkv_core.train.config import TrainConfig, TrainSettings
from rwkv_vision.config import ClassifyConfig

__all__ = ["classify", "digits", "mnist"]


def digits() -> TrainConfig:
    """Handwritten digits."""
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            model_options={"patch_size": 2},
            data="digits",
            channels=1,
            image_size=(8, 8),
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.8, 1.25),
        ),
        train=TrainSettings(
            steps=500, lr=2e-3, lr_final=2e-5, warmup_steps=20, weight_decay=0.05, log_every=50
        ),
    )


def mnist() -> TrainConfig:
    """Handwritten digits."""
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            data="mnist",
            channels=1,
            image_size=(28, 28),
            batch_size=128,
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.8, 1.25),
        ),
        train=TrainSettings(
            steps=1500, lr=2e-3, lr_final=2e-5, warmup_steps=50, weight_decay=0.05, log_every=100
        ),
    )


def classify() -> TrainConfig:
    """Your own pictures, one subfolder per class: ``rwkv train classify --data FOLDER``.

    The network is trained from nothing on 64 × 64 colour pictures, with timm's random crops, flips and
    colour jitter. For grey digits or letters, which must not be mirrored, see :func:`mnist`. On MNIST's
    folder as it is, 300 steps on one thread.
    """
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            model_options={"patch_size": 8},
            data="pictures",
            image_size=(64, 64),
            crop_scale=(0.35, 1.0),
            crop_ratio=(0.75, 1.3333),
            hflip=0.5,
            color_jitter=0.3,
            smoothing=0.1,
        ),
        train=TrainSettings(
            steps=2000, lr=2e-3, lr_final=2e-5, warmup_steps=50, weight_decay=0.05, eval_every=500
        ),
    )
