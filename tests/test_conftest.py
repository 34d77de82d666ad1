"""The fixtures themselves: a guard that cannot fail guards nothing."""

import types
from collections.abc import Callable

import pytest
import torch

# stands in for a module of ours that allocates without writing
OURS = """
import torch

def floats(): return torch.empty(2), torch.empty_like(torch.zeros(2)), torch.zeros(2).new_empty(2)
def parameter(): return torch.nn.Parameter(torch.empty(2))
def integers(): return torch.empty(2, dtype=torch.int64)
def written(x): return x + torch.empty(2).fill_(1.0) + x.new_empty(2).fill_(2.0)
"""


@pytest.fixture
def ours() -> types.ModuleType:
    module = types.ModuleType("rwkv_core.pretended")
    exec(OURS, module.__dict__)
    return module


def test_unwritten_memory_of_our_packages_is_poisoned(ours: types.ModuleType) -> None:
    assert all(x.isnan().all() for x in ours.floats())
    assert ours.parameter().isnan().all()
    assert ours.parameter().requires_grad
    assert (ours.integers() == torch.iinfo(torch.int64).max).all()


def test_poison_stays_out_of_tracing_and_of_torch(ours: types.ModuleType) -> None:
    x = torch.zeros(2)
    compiled = torch.compile(ours.written, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), x + 3)
    with torch.device("meta"):
        assert ours.parameter().is_meta
    assert torch.nn.Linear(2, 2).weight.isfinite().all()


def test_every_test_starts_from_the_same_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=generator))
    assert torch.get_num_threads() == 1


def test_blocked_modules_cannot_be_imported(run_python: Callable[..., str]) -> None:
    code = "try:\n import json.decoder\nexcept ImportError as e: print(e)"
    assert run_python(code, block=("json",)) == "No module named 'json'\n"
    assert run_python("import json; print(1)", block=()) == "1\n"
    with pytest.raises(AssertionError, match="it broke"):
        run_python("raise SystemExit('it broke')")
