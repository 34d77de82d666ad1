"""The recurrences as pure functions: tensors in, tensors out."""

from rwkv_core.ops._common import WKVOutput
from rwkv_core.ops.bi_wkv import bi_wkv
from rwkv_core.ops.shift import token_shift
from rwkv_core.ops.wkv7 import wkv7, wkv7_step

__all__ = ["WKVOutput", "bi_wkv", "token_shift", "wkv7", "wkv7_step"]
