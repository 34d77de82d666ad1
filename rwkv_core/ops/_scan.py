"""A loop over time that stays a loop in an exported graph, so that one file serves every length.

It becomes ONNX's ``Scan``. The chunked forms would be unrolled to the chunks of the example.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def scan_over_time(step: Step, start_BHKV: Tensor, inputs_BTHX: Sequence[Tensor]) -> Tensor:
    """Return y [B, T, H, V] of ``step(state_BHKV, rows_BH1X) -> (state_BHKV, y_BH1V)``, T ≥ 1."""
    # not public in torch yet; its exporters know it
    from torch._higher_order_ops import scan

    rows_TBH1X = tuple(x.transpose(0, 1).unsqueeze(-2) for x in inputs_BTHX)
    _, y_TBH1V = scan(step, start_BHKV, rows_TBH1X)
    return y_TBH1V.squeeze(-2).transpose(0, 1)
