"""What a text's next byte costs without a neural network: the yardsticks of the results table."""

import lzma
import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["ngram_bits_per_byte", "xz_bits_per_byte"]


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Return the size under ``xz -9e`` of the texts as one file, in bits per byte."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def ngram_bits_per_byte(train: Sequence[str], held_out: Sequence[str], order: int = 5) -> float:
    """Return the cost of ``held_out`` under an interpolated byte n-gram model of ``train``.

    Each order n backs off to n - 1 with the weight of Witten and Bell: the number of different
    bytes seen after a context over that number plus the context's count. Below order 1 every byte
    is as likely as any other. Each text begins and ends with a zero byte.
    """
    follow: list[dict[bytes, Counter[int]]] = [{} for _ in range(order)]
    for text in train:
        data = b"\0" + text.encode() + b"\0"
        for i in range(1, len(data)):
            for n in range(min(order, i + 1)):
                follow[n].setdefault(data[i - n : i], Counter())[data[i]] += 1
    totals = [{context: c.total() for context, c in level.items()} for level in follow]

    bits, n_bytes = 0.0, 0
    for text in held_out:
        data = b"\0" + text.encode() + b"\0"
        n_bytes += len(data) - 2
        for i in range(1, len(data)):
            chance = 1 / 256
            for n in range(min(order, i + 1)):
                context = data[i - n : i]
                seen = follow[n].get(context)
                if seen is None:
                    break
                kinds, total = len(seen), totals[n][context]
                chance = (seen[data[i]] + kinds * chance) / (total + kinds)
            bits -= math.log2(chance)
    return bits / n_bytes
