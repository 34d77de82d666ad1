"""The recurrences as pure functions: tensors in, tensors out."""

from rwkv_core.ops._common import WKVOutput
from rwkv_core.ops.bi_wkv import bi_wkv
from rwkv_core.ops.bi_wkv6 import bi_wkv6
from rwkv_core.ops.bi_wkv_2d import bi_wkv_2d
from rwkv_core.ops.gate import gate
from rwkv_core.ops.grid_mix import grid_mix, grid_shift
from rwkv_core.ops.rwkv7_layer import finish7, gates7
from rwkv_core.ops.shift import token_shift
from rwkv_core.ops.squared_relu import squared_relu
from rwkv_core.ops.token_mix import token_mix
from rwkv_core.ops.wkv4 import WKV4Output, WKV4State, wkv4, wkv4_step
from rwkv_core.ops.wkv6 import wkv6, wkv6_step
from rwkv_core.ops.wkv7 import wkv7, wkv7_step

__all__ = [
    "WKV4Output", "WKV4State", "WKVOutput", "bi_wkv", "bi_wkv6", "bi_wkv_2d", "finish7", "gate",
    "gates7", "grid_mix", "grid_shift", "squared_relu", "token_mix", "token_shift", "wkv4",
    "wkv4_step", "wkv6", "wkv6_step", "wkv7", "wkv7_step",
]  # fmt: skip
