"""The transformer that an RWKV-7 of the same size is measured against.

Pre-norm blocks of causal attention in PyTorch's fused form and a GELU network of four times the
width, learned positions, nothing tied: what a reader would write without us. At width 384, 6
layers, 256 bytes and 4,096 positions it has 12.4 million parameters, the RWKV-7 beside it 12.0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT"]


class Block(nn.Module):
    """Attention and a network of two layers, each behind a LayerNorm and a residual."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map a sequence [B, T, D]."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.ln1(x_BTD)).view(B, T, 3, D // self.head_dim, self.head_dim)
        y_BHTK = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.ln2(x_BTD))))


class GPT(nn.Module):
    """A causal language model: tokens [B, T] to logits [B, T, V]."""

    def __init__(
        self, vocab_size: int, dim: int, depth: int, *, context: int, head_dim: int = 64
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, dim)
        self.position_TD = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*(Block(dim, head_dim) for _ in range(depth)))
        self.ln_out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits of the token after each position."""
        x_BTD = self.emb(tokens_BT) + self.position_TD[: tokens_BT.shape[1]]
        return self.head(self.ln_out(self.blocks(x_BTD)))
