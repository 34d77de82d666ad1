"""Training runs as functions: each docstring says what it takes and what it gave."""

from dataclasses import replace

from rwkv_core.registry import MIXERS
from rwkv_core.train.config import TrainConfig, TrainSettings
from rwkv_text.config import TextConfig

__all__ = ["pydoc", "text", "with_mixer"]


def text() -> TrainConfig:
    """Byte-level RWKV-7 on your own text: ``rwkv train text --data FILE_OR_FOLDER``."""
    return TrainConfig(
        adapter="text",
        task=TextConfig(dim=256, depth=6, context=256, batch_size=16),
        train=TrainSettings(
            steps=2000, lr=1e-3, lr_final=1e-5, warmup_steps=10, weight_decay=0.1, eval_every=500
        ),
    )


def pydoc() -> TrainConfig:
    """Byte-level RWKV-7 of 615,840 parameters on CPython's own language reference.

    ``rwkv train pydoc``, or ``rwkv demo``, which fits the number of steps to the machine. Every
    tenth topic is held out: 32,208 bytes, on which xz -9e takes 2.648 bits/byte and an interpolated
    5-gram byte model 2.306. Measured on 2026-11-21, two threads of a shared AMD EPYC: 705 steps in
    68 s give 2.089 bits/byte, 905 steps in 95 s give 2.026.
    """
    return TrainConfig(
        adapter="text",
        task=TextConfig(dim=96, depth=4, context=128, batch_size=8, mixer_options={"head_dim": 32}),
        train=TrainSettings(
            steps=900, lr=4e-3, lr_final=1e-5, warmup_steps=10, weight_decay=0.1, log_every=50
        ),
    )


def with_mixer(config: TrainConfig, mixer: str) -> TrainConfig:
    """Return the same run with another generation; options that it does not take are left out."""
    taken = MIXERS[mixer].options()
    options = {n: v for n, v in config.task.mixer_options.items() if n in taken}
    return replace(config, task=replace(config.task, mixer=mixer, mixer_options=options))
