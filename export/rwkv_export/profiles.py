"""The same graphs under the names and shapes that other people's generators expect.

A profile adds one graph to a folder, beside ``step`` and ``prefill`` and made of the same weights,
and the configuration file that the other runtime looks for:

    genai          onnxruntime-genai: ``og.Model(folder)``
    transformers   transformers.js: ``AutoModelForCausalLM.from_pretrained(folder, …)``
    embeddings     accelerators that want vectors: the step without its embedding, whose table is
                   written beside it for the host to look up

The first two keep two states per layer, one of a convolution [1, D, 2], whose columns are here the
last inputs of the layer's two token shifts, and one of a recurrence [1, H, K, V]; both start them
from zeros. They read one sequence, whole or token by token, and want the logits of its last token.

Past and present may share buffers: all past states are copied by the first nodes of the graph, and
all present ones are written by the last.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_core.adapter import ExportSpec
from rwkv_core.errors import ExportError, did_you_mean
from rwkv_core.graphs import StepGraph
from rwkv_export.tokenizer_json import tokenizer_json

__all__ = ["PROFILES", "Profile", "profiled"]

CONTEXT = 1 << 20  # tokens; a state has no limit, configuration files want a number
PROFILES = ("genai", "transformers", "embeddings")
BOUNDARY = 0  # the token that begins and ends a document


class Profile(NamedTuple):
    """A graph to add to a folder, and the files that go with it."""

    spec: ExportSpec
    files: dict[str, bytes]


class LayerStates(nn.Module):
    """A graph over a sequence [1, T] whose state is two tensors per layer; logits [1, 1, V].

    Args:
        graph: takes tokens, positions and packed states [L, 1, ...].
        ranks: of the packed states: 3 of a shift, 5 of the matrices.
        counted: whether in front of the states there is one more, [1, 1, P, 1], which grows by a
            zero for every token.
    """

    def __init__(self, graph: nn.Module, ranks: tuple[int, ...], *, counted: bool) -> None:
        super().__init__()
        self.graph, self.ranks, self.counted = graph, ranks, counted

    def forward(self, tokens_1T: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Read the tokens."""
        past, layers = (inputs[:1], inputs[1:]) if self.counted else ((), inputs)
        vectors_L1DC = torch.stack(layers[0::2])
        columns = iter(vectors_L1DC.unbind(-1))
        matrices = torch.stack(layers[1::2])
        packed = [next(columns) if rank == 3 else matrices for rank in self.ranks]
        last = torch.arange(tokens_1T.shape[1])[-1:]
        logits, *after = self.graph(tokens_1T, last, *packed)
        columns_after = [x for x, rank in zip(after, self.ranks, strict=True) if rank == 3]
        (matrices_after,) = (x for x, rank in zip(after, self.ranks, strict=True) if rank != 3)
        present = zip(torch.stack(columns_after, -1).unbind(), matrices_after.unbind(), strict=True)
        counts = [torch.cat([p, torch.zeros_like(tokens_1T)[:, None, :, None].to(p.dtype)], 2)
                  for p in past]  # fmt: skip
        return logits, *counts, *(x for layer in present for x in layer)


def profiled(
    name: str, specs: list[ExportSpec], metadata: Mapping[str, Any], files: Mapping[str, bytes]
) -> Profile:
    """Return what a profile adds to the graphs of a model.

    Args:
        name: of the profile.
        specs: the graphs of the model.
        metadata: of the model.
        files: that the folder carries, such as a vocabulary.

    Raises:
        ExportError: an unknown profile, a model that is no language model, or one whose states do
            not start from zeros: generation 4, and tuned states.
    """
    if name not in PROFILES:
        raise ExportError(f"unknown profile {name!r}; {did_you_mean(name, PROFILES)}")
    by_name = {spec.name: spec for spec in specs}
    if not {"step", "prefill"} <= by_name.keys() or "vocab_size" not in metadata:
        raise ExportError(f"the profile {name!r} is for language models")
    if name == "embeddings":
        return embeddings(by_name["step"])
    for state, array in by_name["prefill"].state.items():
        if array.any():
            raise ExportError(
                f"the profile {name!r} does not fit: its runtime starts every state from zeros, "
                f"{state!r} starts from other values"
            )
    make = genai if name == "genai" else transformers
    spec, own = make(by_name["prefill"], metadata["vocab_size"])
    return Profile(spec, {**own, **tokenizer_json(metadata.get("tokenizer", ""), files)})


def embeddings(step: ExportSpec) -> Profile:
    """Return the graph ``embedded`` and ``embedding.bin``: fp32 [V, D], little-endian."""
    table_VD = step.module.embed.weight.detach().numpy()
    original = step.sample
    assert original is not None

    def sample(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {"embeddings": table_VD[original(rng, sizes)["tokens"]]}

    spec = dataclasses.replace(
        step,
        name="embedded",
        module=StepGraph(nn.Identity(), step.module.backbone, step.module.head),
        inputs={"embeddings": table_VD[step.inputs["tokens"]]},
        dynamic={**{n: step.dynamic[n] for n in step.state}, "embeddings": step.dynamic["tokens"]},
        sample=sample,
    )
    return Profile(spec, {"embedding.bin": table_VD.astype("<f4").tobytes()})


def genai(prefill: ExportSpec, vocab_size: int) -> Profile:
    """Return the graph ``genai`` and ``genai_config.json``."""
    past = "past_key_values.%d"
    spec = _per_layer(prefill, "genai", [f"{past}.conv_state", f"{past}.recurrent_state"])
    layers, _, heads, size = _sizes(prefill)
    present = "present.%d"
    decoder = {
        "filename": "genai.onnx",
        "session_options": {"provider_options": []},
        "head_size": size,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "inputs": {"input_ids": "input_ids", "past_key_names": f"{past}.key",
                   "past_value_names": f"{past}.value"},
        "outputs": {"logits": "logits", "present_key_names": f"{present}.key",
                    "present_value_names": f"{present}.value"},
    }  # fmt: skip
    model = {**_ids(), "type": "decoder", "vocab_size": vocab_size, "context_length": CONTEXT}
    search = {"do_sample": False, "max_length": 1024, "past_present_share_buffer": True}
    config = {"model": {**model, "decoder": decoder}, "search": search}
    return Profile(spec, {"genai_config.json": _json(config)})


def transformers(prefill: ExportSpec, vocab_size: int) -> Profile:
    """Return the graph ``model``, ``config.json`` and ``generation_config.json``.

    transformers.js knows hybrid models of linear and full attention. All layers are of the first
    kind; of the second there is one more, without heads worth the name, from whose keys it tells
    how many tokens were read: one zero for each.
    """
    layers, dim, heads, size = _sizes(prefill)
    spec = _per_layer(prefill, "model", ["past_conv.%d", "past_recurrent.%d"])
    count = f"past_key_values.{layers}.key"
    sample = spec.sample
    assert sample is not None

    def counted(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {**sample(rng, sizes), count: np.zeros((1, 1, sizes["past"], 1), np.float32)}

    spec = dataclasses.replace(
        spec,
        module=LayerStates(prefill.module, spec.module.ranks, counted=True),
        inputs={**spec.inputs, count: np.zeros((1, 1, 3, 1), np.float32)},
        outputs=(*spec.outputs, count.replace("past_key_values", "present")),
        dynamic={**spec.dynamic, count: {2: "past"}},
        sample=counted,
        sizes=tuple(
            {**size, "past": past} for size, past in zip(spec.sizes, (0, 5, 2), strict=True)
        ),
    )
    config = {
        **_ids(),
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "num_hidden_layers": layers + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": size,
        "layer_types": ["linear_attention"] * layers + ["full_attention"],
        "transformers.js_config": {"dtype": "fp32"},
    }
    files = {"config.json": _json(config), "generation_config.json": _json(_ids())}
    return Profile(spec, files)


def _per_layer(prefill: ExportSpec, name: str, states: list[str]) -> ExportSpec:
    """Return a graph over a sequence with states of its own for every layer."""
    layers, dim, heads, size = _sizes(prefill)
    ranks = tuple(array.ndim for array in prefill.state.values())
    zeros = np.zeros((1, dim, 2), np.float32), np.zeros((1, heads, size, size), np.float32)
    original = prefill.sample
    assert original is not None

    def sample(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {"input_ids": original(rng, {"batch": 1, "rows": 1, **sizes})["tokens"]}

    return ExportSpec(
        name=name,
        module=LayerStates(prefill.module, ranks, counted=False),
        inputs={"input_ids": prefill.inputs["tokens"][:1]},
        outputs=("logits",),
        state={states[j] % i: zeros[j] for i in range(layers) for j in (0, 1)},
        dynamic={"input_ids": {1: "time"}},
        sample=sample,
        sizes=({"time": 64}, {"time": 1}, {"time": 7}),
        tolerance=prefill.tolerance,
    )


def _sizes(prefill: ExportSpec) -> tuple[int, int, int, int]:
    """Return layers, width, heads and the size of a key.

    Raises:
        ExportError: states other than two vectors and a matrix per layer.
    """
    shapes = sorted((array.shape for array in prefill.state.values()), key=len)
    if [len(shape) for shape in shapes] != [3, 3, 5] or shapes[2][3] != shapes[2][4]:
        raise ExportError("a profile needs two shifts and one matrix of heads in every layer")
    return shapes[0][0], shapes[0][2], shapes[2][2], shapes[2][3]


def _ids() -> dict[str, int]:
    return {f"{name}_token_id": BOUNDARY for name in ("bos", "eos", "pad")}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
