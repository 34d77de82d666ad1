"""How fast an exported folder is here: tokens or pictures a second."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rwkv_export.manifest import GraphInfo
from rwkv_export.runtime import Runtime

__all__ = ["Speed", "jobs", "measure"]

ROUNDS = 5


class Speed(NamedTuple):
    """One figure: calls of a graph, tokens (or pictures) in each, and seconds of the median call.

    ``cpu`` counts all threads' work; on a machine that others use it is the steadier one.
    """

    name: str
    tokens: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        """Tokens or pictures a second."""
        return self.tokens / self.wall

    @property
    def per_cpu_second(self) -> float:
        """Tokens or pictures a second of processor time."""
        return self.tokens / max(self.cpu, 1e-9)


def measure(runtime: Runtime, *, tokens: int = 64, prompt: int = 256) -> list[Speed]:
    """Return the speeds of a folder's graphs, measured in turns; the median of 5 rounds.

    Args:
        runtime: the exported model.
        tokens: decoded per round, one after the other.
        prompt: length that is read at once.
    """
    calls = jobs(runtime, tokens, prompt)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, (call, _) in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            seen[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return [
        Speed(name, n, *(statistics.median(times) for times in zip(*seen[name], strict=True)))
        for name, (_, n) in calls.items()
    ]


def jobs(runtime: Runtime, tokens: int, prompt: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return graph → what to time, and how many tokens or pictures it takes in."""
    return {name: _job(runtime, name, tokens, prompt) for name in runtime.graphs}


def _job(runtime: Runtime, name: str, tokens: int, prompt: int) -> tuple[Callable[[], Any], int]:
    info = runtime.graphs[name]
    is_sequence = any("time" in t.shape for t in info.inputs)
    inputs = _inputs(runtime, info, prompt)
    if not info.state:
        return (lambda: runtime(name, inputs)), 1
    stream = runtime.stream(runtime.initial_state(name, 1))
    if is_sequence:
        return (lambda: stream(name, inputs)), prompt
    return (lambda: [stream(name, inputs) for _ in range(tokens)]), tokens


def _inputs(runtime: Runtime, info: GraphInfo, prompt: int) -> dict[str, np.ndarray]:
    """Return inputs of one sequence or picture: random tokens, the last position, noise."""
    rng = np.random.default_rng(0)
    height, width = runtime.metadata.get("image_size", (224, 224))
    sizes = {"batch": 1, "time": prompt, "rows": 1, "height": height, "width": width}
    made = {}
    for t in info.inputs:
        shape = [sizes.get(n, 1) if isinstance(n, str) else n for n in t.shape]
        if t.name == "positions":
            made[t.name] = np.full(shape, prompt - 1, t.dtype)
        elif np.issubdtype(np.dtype(t.dtype), np.integer):
            high = runtime.metadata.get("vocab_size", 256)
            made[t.name] = rng.integers(high, size=shape).astype(t.dtype)
        else:
            made[t.name] = rng.normal(size=shape).astype(t.dtype)
    return made
