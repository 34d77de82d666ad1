"""What a training step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

# page faults of a few steps that allocate 64 MB in pieces of 4 MB, after one that warms up
STEPS = """
import resource, sys, torch
from rwkv_core.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(16)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_pages_are_mapped_once() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", STEPS, how], check=True, capture_output=True)
        return int(done.stdout)

    assert 5 * faults("keep") < faults("default")  # all pages of 4 · 64 MB are 65,536
