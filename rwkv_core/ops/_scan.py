"""A loop over time that stays a loop in an exported graph, so that one file serves every length.

It becomes ONNX's ``Scan``. The chunked forms would be unrolled to the chunks of the example.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def scan_over_time(step: Step, start_BHKV: Tensor, inputs_BTH1X: Sequence[Tensor]) -> Tensor:
    """Return y [B, T, H, 1, V], T ≥ 1.

    Args:
        step: one token, ``step(state_BHKV, rows_BH1X) -> (state_BHKV, y_BH1V)``.
        start_BHKV: the state before the first token.
        inputs_BTH1X: what its rows are taken from.
    """
    # not public in torch yet; its exporters know it
    from torch._higher_order_ops import scan

    rows_TBH1X = tuple(x.transpose(0, 1) for x in inputs_BTH1X)
    _, y_TBH1V = scan(step, start_BHKV, rows_TBH1X)
    return y_TBH1V.transpose(0, 1)
