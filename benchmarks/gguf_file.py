"""An RWKV-7 in llama.cpp's file format, from an official ``.pth``.

The layout is the one that llama.cpp's own ``convert_hf_to_gguf.py`` writes (conversion/rwkv.py):
matrices [out, in], low-rank maps turned, the six interpolation vectors in one tensor, vectors and
the matrices of the decay's low-rank map in fp32. There is no tokenizer in it.
"""

import re
from pathlib import Path

import numpy as np
import torch

NAMES = {
    "emb.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "ln_out.": "output_norm.",
    "blocks.0.ln0.": "token_embd_norm.",
    ".ln1.": ".attn_norm.",
    ".ln2.": ".attn_norm_2.",
    ".att.ln_x.": ".time_mix_ln.",
    ".att.": ".time_mix_",
    ".ffn.x_k": ".channel_mix_lerp_k",
    ".ffn.": ".channel_mix_",
    "blocks.": "blk.",
}
ALWAYS_FP32 = ("time_mix_w1.weight", "time_mix_w2.weight", "time_mix_lerp_fused.weight")
MIXED = "rwkvag"


def write(source: Path, path: Path, kind: str) -> None:
    """Write the model in ``source`` to ``path``.

    Args:
        source: an official ``.pth`` of generation 7, in fp32.
        path: the file to write.
        kind: of the matrices: ``"F32"``, ``"F16"``, ``"Q8_0"``, ``"Q4_0"`` or ``"Q4_1"``.
    """
    import gguf

    tensors = torch.load(source, weights_only=True, mmap=True)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    (vocab_size, dim), rank = tensors["emb.weight"].shape, {}
    for letter in "wavg":
        rank[letter] = tensors[f"blocks.{layers - 1}.att.{letter}1"].shape[1]
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(tensors["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)  # required, unused
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(tensors["blocks.0.att.r_k"].shape[1])
    writer.add_decay_lora_rank(rank["w"])
    writer.add_iclr_lora_rank(rank["a"])
    writer.add_value_residual_mix_lora_rank(rank["v"])
    writer.add_gate_lora_rank(rank["g"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocab_size)
    for name, tensor in _renamed(tensors, layers).items():
        array = np.ascontiguousarray(tensor.float().numpy())
        vector = array.ndim == 1 or name.endswith(("_norm.weight", *ALWAYS_FP32))
        stored = gguf.GGMLQuantizationType["F32" if vector else kind]
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    found = {}
    for i in range(layers):
        vectors = [tensors[f"blocks.{i}.att.x_{letter}"].reshape(1, 1, -1) for letter in MIXED]
        found[f"blk.{i}.time_mix_lerp_fused.weight"] = torch.stack(vectors)
    for name, tensor in tensors.items():
        if re.search(r"\.att\.x_", name):
            continue
        low_rank = re.search(r"\.att\.[wavg][12]$", name)
        tensor = tensor.squeeze().T if low_rank else tensor.squeeze()
        tensor = tensor.flatten() if name.endswith("r_k") else tensor
        for theirs, gguf_name in NAMES.items():
            name = name.replace(theirs, gguf_name)
        found[name if name.endswith((".weight", ".bias")) else f"{name}.weight"] = tensor
    for part in "012":  # the first layer mixes no value in, but llama.cpp wants the tensors
        found[f"blk.0.time_mix_v{part}.weight"] = found[f"blk.0.time_mix_a{part}.weight"]
    return found
