"""Running a language model from its graphs alone, without torch.

The same code drives the PyTorch model and its ONNX export; a ``run`` is either.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_core.adapter import Run, Stream
from rwkv_text.sampling import Sampler
from rwkv_text.tokenizer import BOUNDARY, StreamDecoder, tokenizer

__all__ = ["feed", "generate", "read", "stream_tokens"]

State = dict[str, np.ndarray]
PIECE = 256  # tokens read at once
CHUNK = 16  # tokens that the graph "chunk" reads


def feed(run: Run, tokens: Sequence[int], state: State | None = None) -> tuple[np.ndarray, State]:
    """Read tokens and return the logits after each of them [T, V], and the state.

    ``state`` None is a document's start.

    Raises:
        ValueError: a token id outside the vocabulary.
    """
    stream = run.stream(run.initial_state("step", batch=1) if state is None else state)
    rows = [np.empty((0, run.metadata["vocab_size"]), np.float32)]
    for at in range(0, len(tokens), PIECE):
        piece = tokens[at : at + PIECE]
        rows.append(read(run, stream, piece, range(len(piece))))
    return np.concatenate(rows), dict(stream.state)


def read(run: Run, stream: Stream, tokens: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
    """Read tokens, at once where the model can, and return the logits of some of them [R, V].

    Raises:
        ValueError: a token id outside the vocabulary.
    """
    vocab_size = run.metadata["vocab_size"]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
    if "prefill" in run.graphs and len(tokens) > 1:
        inputs = {"tokens": np.array([tokens], np.int64), "positions": np.array(wanted, np.int64)}
        return stream("prefill", inputs)["logits"][0]
    if "chunk" in run.graphs:
        return _read_chunks(stream, tokens, wanted)
    rows = [stream("step", {"tokens": np.array([[t]], np.int64)})["logits"] for t in tokens]
    return np.concatenate(rows)[np.array(wanted, np.int64)]


def _read_chunks(stream: Stream, tokens: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
    """Read whole chunks at once, and by steps what is left or has logits wanted inside."""
    rows, last = {}, np.array([CHUNK - 1])
    at = 0
    while at < len(tokens):
        piece = range(at, at + CHUNK)
        if at + CHUNK <= len(tokens) and not any(w in piece for w in wanted if w != piece[-1]):
            inputs = {"tokens": np.array([tokens[at : at + CHUNK]], np.int64), "positions": last}
            rows[piece[-1]] = stream("chunk", inputs)["logits"][0, 0]
            at += CHUNK
        else:
            rows[at] = stream("step", {"tokens": np.array([[tokens[at]]], np.int64)})["logits"][0]
            at += 1
    return np.stack([rows[w] for w in wanted])


def stream_tokens(
    run: Run, prompt: Sequence[int], sampler: Sampler, max_tokens: int, known_V: np.ndarray
) -> Iterator[int]:
    """Yield sampled tokens after a boundary and the prompt, until a boundary or ``max_tokens``.

    Ids outside ``known_V``, rows of the embedding that stand for nothing, are never drawn.
    """
    tokens, row = [BOUNDARY, *prompt], np.empty(0)
    stream = run.stream(run.initial_state("step", batch=1))
    for at in range(0, len(tokens), PIECE):
        piece = tokens[at : at + PIECE]
        row = read(run, stream, piece, [len(piece) - 1])[0]
    for _ in range(max_tokens):
        token = sampler(np.where(known_V, row, -np.inf))
        if token == BOUNDARY:
            return
        yield token
        row = stream("step", {"tokens": np.array([[token]], np.int64)})["logits"][0]


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
