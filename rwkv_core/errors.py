"""The errors this package raises on purpose: what was got, what was expected, what to do."""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "NativeError",
    "RWKVError",
    "TrainingError",
    "UnknownNameError",
    "did_you_mean",
]


class RWKVError(Exception):
    """Base of every error whose message is meant for the person at the keyboard."""


class ConfigError(RWKVError, ValueError):
    """A configuration that names an unknown field or holds a value that cannot work."""


class DataError(RWKVError, ValueError):
    """Input data that cannot be used: empty, of the wrong encoding, too short."""


class CheckpointError(RWKVError, ValueError):
    """Saved weights that are damaged, unsafe or of another architecture."""


class TrainingError(RWKVError, RuntimeError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


class ExportError(RWKVError, RuntimeError):
    """A model that cannot leave Python, or an exported folder that is not what it says."""


class NativeError(RWKVError, RuntimeError):
    """A native op that was asked for and cannot be built or cannot run here."""


class UnknownNameError(RWKVError, KeyError):
    """A name that is not registered; the message lists the nearest ones."""

    def __str__(self) -> str:  # KeyError would print the repr, with escaped quotes
        return str(self.args[0])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest of the known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(known) or 'none'}"
