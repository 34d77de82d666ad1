"""Running a language model from its graphs alone, without torch.

The same code drives the PyTorch model and its ONNX export; a ``run`` is either.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_core.adapter import Run
from rwkv_text.sampling import Sampler
from rwkv_text.tokenizer import BOUNDARY, StreamDecoder, tokenizer

__all__ = ["feed", "generate", "stream_tokens"]

State = dict[str, np.ndarray]
PIECE = 256  # tokens of a prompt read at once: a vocabulary's worth of logits comes with each


def feed(run: Run, tokens: Sequence[int], state: State | None = None) -> tuple[np.ndarray, State]:
    """Read tokens and return the logits after each of them [T, V], and the state.

    ``state`` None is a document's start.

    Raises:
        ValueError: a token id outside the vocabulary.
    """
    vocab_size = run.metadata["vocab_size"]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
    if state is None:
        state = run.initial_state("step", batch=1)
    if "prefill" in run.graphs:
        out = run("prefill", {"tokens": np.array([tokens], np.int64), **state})
        return out.pop("logits")[0], out
    rows = [np.empty((0, vocab_size), np.float32)]
    for token in tokens:
        out = run("step", {"tokens": np.array([[token]], np.int64), **state})
        rows.append(out.pop("logits"))
        state = out
    return np.concatenate(rows), state


def stream_tokens(
    run: Run, prompt: Sequence[int], sampler: Sampler, max_tokens: int, known_V: np.ndarray
) -> Iterator[int]:
    """Yield sampled tokens after a boundary and the prompt, until a boundary or ``max_tokens``.

    Ids outside ``known_V``, rows of the embedding that stand for nothing, are never drawn.
    """
    tokens, row = [BOUNDARY, *prompt], np.empty(0)
    state = run.initial_state("step", batch=1)
    for at in range(0, len(tokens), PIECE):
        logits, state = feed(run, tokens[at : at + PIECE], state)
        row = logits[-1]
    for _ in range(max_tokens):
        token = sampler(np.where(known_V, row, -np.inf))
        if token == BOUNDARY:
            return
        yield token
        out = run("step", {"tokens": np.array([[token]], np.int64), **state})
        row = out.pop("logits")[0]
        state = out


def generate(
    run: Run,
    prompt: str = "",
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    vocabulary: str | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, never part of a character.

    The model starts a new document; it ends the text itself where it predicts a boundary.
    ``vocabulary`` is the tokenizer's name or file instead of what the model names.

    Raises:
        DataError: the vocabulary is not found, or the prompt cannot be encoded.
        ConfigError: the vocabulary has more ids than the model.
    """
    rows = run.metadata["vocab_size"]
    tok = tokenizer(vocabulary or run.metadata["tokenizer"], beside=run.folder, rows=rows)
    known = np.zeros(rows, bool)
    known[: tok.vocab_size] = tok.byte_lengths()
    known[BOUNDARY] = True
    sampler = Sampler(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    decoder = StreamDecoder(tok)
    for token in stream_tokens(run, tok.encode(prompt), sampler, max_tokens, known):
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.flush():
        yield piece
