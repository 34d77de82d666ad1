"""How many threads to train with: measured, because small operations often run best on one."""

import os
import time

import torch

from rwkv_core import checkpoint
from rwkv_core.registry import ADAPTERS
from rwkv_core.train.config import TrainConfig

__all__ = ["probe_threads"]


def probe_threads(config: TrainConfig) -> tuple[int, float]:
    """Return the faster of one thread and all cores, and its seconds per training step.

    Leaves torch's number of threads as it was.
    """
    adapter = ADAPTERS[config.adapter]
    model = checkpoint.build(config.adapter, config.task).train()
    batches = adapter.data(config.task, "train", seed=config.train.seed)
    rng = torch.Generator()
    before = torch.get_num_threads()
    best: dict[int, float] = {}
    try:
        # interleaved, so that a busy moment does not decide
        for _ in range(3):
            for threads in {1, os.cpu_count() or 1}:
                torch.set_num_threads(threads)
                began = time.perf_counter()
                adapter.loss(model, next(batches), rng)[0].backward()
                seconds = time.perf_counter() - began
                best[threads] = min(seconds, best.get(threads, seconds))
    finally:
        torch.set_num_threads(before)
    threads = min(best, key=lambda n: best[n])
    return threads, best[threads]
