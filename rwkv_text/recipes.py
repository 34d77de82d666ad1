"""Training runs as functions: each docstring says what it takes and what it gave."""

from rwkv_core.train.config import TrainConfig, TrainSettings
from rwkv_text.config import TextConfig

__all__ = ["pydoc", "text"]


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
    """TODO."""
    return TrainConfig(
        adapter="text",
        task=TextConfig(
            dim=128, depth=4, context=256, batch_size=8, mixer_options={"head_dim": 32}
        ),
        train=TrainSettings(steps=200, lr=4e-3, lr_final=1e-5, warmup_steps=10, weight_decay=0.1),
    )
