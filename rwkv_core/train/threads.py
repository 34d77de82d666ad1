"""How many threads to train with: measured, because small operations often run best on one."""

import os
import statistics
import time

import torch

from rwkv_core import checkpoint
from rwkv_core.registry import ADAPTERS
from rwkv_core.train.config import TrainConfig
from rwkv_core.train.optim import optimizer

__all__ = ["probe_threads"]

N_ROUNDS = 9


def probe_threads(config: TrainConfig) -> tuple[int, float]:
    """Return the faster of one thread and all cores, and its seconds per training step.

    Leaves torch's number of threads as it was.
    """
    adapter = ADAPTERS[config.adapter]
    model = checkpoint.build(config.adapter, config.task).train()
    batches = adapter.data(config.task, "train", seed=config.train.seed)
    rng = torch.Generator()
    optim = optimizer(model, config.train)
    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {threads: [] for threads in (1, os.cpu_count() or 1)}
    try:
        # interleaved, so that a busy moment does not decide; the first round only warms up
        for _ in range(1 + N_ROUNDS):
            for threads, times in seconds.items():
                torch.set_num_threads(threads)
                began = time.perf_counter()
                optim.zero_grad(set_to_none=True)
                adapter.loss(model, next(batches), rng)[0].backward()
                optim.step()
                times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    medians = {threads: statistics.median(times[1:]) for threads, times in seconds.items()}
    fastest = min(medians, key=lambda threads: medians[threads])
    return fastest, medians[fastest]
