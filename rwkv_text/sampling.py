"""Choosing the next token from its logits, without torch."""

import numpy as np

__all__ = ["Sampler"]


class Sampler:
    """Draw tokens: softmax, then top-p, then top-k, then temperature, the order RWKV's tools keep.

    Args:
        temperature: 0 takes the likeliest token; above 1 evens the chances out.
        top_p: keep the likeliest tokens whose chances add up to this much.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        seed: the same seed draws the same tokens; None draws anew each time.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, got {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits_V: np.ndarray) -> int:
        """Return one token id; ValueError if a logit is not a number."""
        logits = np.asarray(logits_V, np.float64)
        if np.isnan(logits).any():
            raise ValueError("the model's logits are not numbers (NaN): its weights are damaged")
        if self.temperature == 0:
            return int(logits.argmax())
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        order = np.argsort(-chances, kind="stable")
        # the token that crosses top_p stays in
        keep = 1 + int(np.searchsorted(np.cumsum(chances[order]), self.top_p))
        order = order[: min(keep, self.top_k or keep)]
        kept = (chances[order] / chances[order[0]]) ** (1 / self.temperature)
        return int(order[self._rng.choice(len(order), p=kept / kept.sum())])
