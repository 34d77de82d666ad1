"""What a training step frees is there for the next one."""

import os
import platform
import subprocess
import sys

import pytest

# page faults of a few steps that allocate 64 MB in pieces of 4 MB, after some that warm up
STEPS = """
import resource, sys, torch
from rwkv_core.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(16)]
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_pages_are_mapped_once() -> None:
    # what glibc would do by itself depends on where its heap happens to end
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", STEPS, how]
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        return int(done.stdout)

    assert faults("default") > 65_000  # all pages of 4 · 64 MB are 65,536
    assert faults("keep") < 6_500
