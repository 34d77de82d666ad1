"""Where models leave Python: ONNX folders that carry the proof of their own equality.

``load`` needs numpy and onnxruntime alone; ``export`` needs torch, onnx and onnxscript.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_export._compress import Compressed, compress
    from rwkv_export._export import Report, export
    from rwkv_export.gate import Bounds, Quality
    from rwkv_export.runtime import Runtime, load

__all__ = ["Bounds", "Compressed", "Quality", "Report", "Runtime", "compress", "export", "load"]

_HOMES = {
    "Report": "_export", "export": "_export", "Runtime": "runtime", "load": "runtime",
    "Compressed": "_compress", "compress": "_compress", "Bounds": "gate", "Quality": "gate",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"rwkv_export.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rwkv_export' has no attribute {name!r}")
