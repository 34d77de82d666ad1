"""The classifier on top of the trunk, with a hidden layer where a model has one."""

from collections import OrderedDict

from timm.layers import ClassifierHead
from torch import Tensor, nn

__all__ = ["HiddenHead"]


class HiddenHead(ClassifierHead):
    """Pool → linear → tanh → dropout → linear: ``pre_logits.fc`` and ``fc``.

    Args:
        in_features: width of the trunk.
        hidden_size: width between the linear maps.
        num_classes: outputs; 0 leaves the last map out.
        pool_type: timm's name of the pooling, one that keeps the width.
        drop_rate: dropout before the last map.

    Raises:
        ValueError: a pooling that changes the width.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        num_classes: int,
        *,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(
            hidden_size, num_classes, pool_type=pool_type, drop_rate=drop_rate, input_fmt="NHWC"
        )
        if self.global_pool.feat_mult() != 1:
            raise ValueError(
                f"global_pool {pool_type!r} changes the width, and a hidden layer follows it; "
                "expected 'avg', 'max', 'avgmax' or ''"
            )
        layers = OrderedDict(fc=nn.Linear(in_features, hidden_size), act=nn.Tanh())
        self.pre_logits = nn.Sequential(layers)

    def forward(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features [B, H, W, C] to logits, or to the hidden layer's output."""
        x = self.drop(self.pre_logits(self.global_pool(x_BHWC)))
        return x if pre_logits else self.fc(x)
