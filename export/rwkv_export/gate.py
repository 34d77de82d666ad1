"""What quantisation costs in answers, measured on data, and the bounds that it may not pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_core.errors import ExportError
from rwkv_export.runtime import Runtime

__all__ = ["ANYTHING", "BOUNDS", "Bounds", "Quality", "compare_answers"]

GREEDY = 64  # tokens that the original writes on its own, for the other to agree with
PROMPT = 16  # tokens they follow


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How the answers of a folder differ from those of the folder it was made from.

    Attributes:
        loss: mean cross entropy in nats, of tokens or labels; NaN without labels.
        loss_before: that of the original.
        kl: mean divergence from the original's distribution, in nats.
        top1: share of the places where both find the same token or label likeliest.
        worst_logit: largest difference of a logit.
        greedy: of the tokens that the original writes greedily, the share that the other would
            write in the same places; 1 where nothing is written.
        drop: share of correct labels that was lost; of text 0.
    """

    loss: float
    loss_before: float
    kl: float
    top1: float
    worst_logit: float
    greedy: float = 1.0
    drop: float = 0.0

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over that of the original."""
        return float(np.exp(self.loss - self.loss_before))


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may be lost; see :class:`Quality`."""

    kl: float
    perplexity_ratio: float = 1.01
    top1: float = 0.96
    greedy: float = 0.9
    worst_logit: float = float("inf")
    drop: float = 0.005

    def broken(self, quality: Quality) -> list[str]:
        """Return what a quality breaks, in words."""
        found = [
            (quality.kl > self.kl, f"KL {quality.kl:.2g} above {self.kl:.2g}"),
            (
                quality.perplexity_ratio > self.perplexity_ratio,
                f"perplexity × {quality.perplexity_ratio:.4f}, allowed {self.perplexity_ratio}",
            ),
            (quality.top1 < self.top1, f"top-1 agreement {quality.top1:.1%} below {self.top1:.1%}"),
            (quality.greedy < self.greedy, f"greedy {quality.greedy:.1%} below {self.greedy:.1%}"),
            (
                quality.worst_logit > self.worst_logit,
                f"a logit off by {quality.worst_logit:.2g}, allowed {self.worst_logit:.2g}",
            ),
            (quality.drop > self.drop, f"accuracy {quality.drop:.2%} lower"),
            (not np.isfinite(quality.kl), "answers that are not numbers"),
        ]
        return [text for is_broken, text in found if is_broken]


BOUNDS: Mapping[str, Bounds] = {
    "fp16": Bounds(kl=1e-5, top1=0.995, greedy=0.98),
    "int8": Bounds(kl=2e-4, top1=0.99, greedy=0.96),
    "int8-dynamic": Bounds(kl=1e-3, top1=0.98),
    "int4": Bounds(kl=5e-3),
}
ANYTHING = Bounds(  # for a model whose quality is of no interest, or to be measured
    kl=float("inf"), perplexity_ratio=float("inf"), top1=0.0, greedy=0.0, drop=1.0
)


def compare_answers(
    before: Runtime, after: Runtime, data: np.ndarray, labels: np.ndarray | None = None
) -> Quality:
    """Return how far the answers of ``after`` are from those of ``before``.

    Args:
        before: the original.
        after: the quantised one.
        data: tokens [N, T] of held-out text, or for a whole-input graph its inputs [N, ...].
        labels: the right classes [N], for a whole-input graph.

    Raises:
        ExportError: data without rows, or of one token.
    """
    if not len(data) or ("step" in before.graphs and data.shape[1] < 2):
        raise ExportError(f"cannot measure quality on data of shape {list(data.shape)}")
    if "step" not in before.graphs:
        graph = next(iter(before.graphs))
        (name,) = (t.name for t in before.graphs[graph].inputs)
        answers = (run(graph, {name: data}) for run in (before, after))
        p, q = (next(iter(out.values())) for out in answers)
        return _quality([(p, q, labels)])
    rows = []
    for tokens in data:
        p, q = (_logits(run, tokens) for run in (before, after))
        rows.append((p[:-1], q[:-1], tokens[1:]))
    path = _greedy(before, data[0][:PROMPT])
    own = [_logits(run, path)[PROMPT - 1 : -1].argmax(-1) for run in (before, after)]
    greedy = float((own[0] == own[1]).mean())
    return dataclasses.replace(_quality(rows), greedy=greedy, drop=0.0)


def _quality(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Quality:
    n = kl = same = right = 0.0
    nats, worst = np.zeros(2), 0.0
    for p, q, targets in rows:
        log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (p, q))
        n += len(p)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        worst = max(worst, float(np.abs(p - q).max()))
        if targets is None:
            nats += np.nan
            continue
        at = (np.arange(len(targets)), targets)
        nats -= np.array([log_p[at].sum(), log_q[at].sum()])
        right += float((p.argmax(-1) == targets).sum() - (q.argmax(-1) == targets).sum())
    return Quality(
        loss=float(nats[1] / n),
        loss_before=float(nats[0] / n),
        kl=kl / n,
        top1=same / n,
        worst_logit=worst,
        drop=right / n,
    )


def _logits(run: Runtime, tokens: np.ndarray) -> np.ndarray:
    """Return the logits after each token [T, V] of a document's start."""
    from rwkv_text.host import feed

    if any(t.dtype == "float16" for t in run.graphs["step"].state):  # rounds after every call
        stream = run.stream(run.initial_state("step", 1))
        rows = [stream("step", {"tokens": np.array([[t]], np.int64)})["logits"] for t in tokens]
        return np.concatenate(rows)
    return feed(run, [int(t) for t in tokens])[0]


def _greedy(run: Runtime, prompt: np.ndarray) -> np.ndarray:
    """Return a prompt and the likeliest tokens after it."""
    stream: Any = run.stream(run.initial_state("step", 1))
    tokens = [int(t) for t in prompt]
    for at in range(len(prompt) + GREEDY - 1):
        out = stream("step", {"tokens": np.array([[tokens[at]]], np.int64)})
        if at + 1 >= len(tokens):
            tokens.append(int(out["logits"][0].argmax()))
    return np.array(tokens)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
