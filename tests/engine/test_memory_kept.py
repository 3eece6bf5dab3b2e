"""On a CPU, memory that a step frees serves the next one."""

import json
import resource
import subprocess
import sys

COUNT_FAULTS = """
import resource
import torch
from vitds.engine.process import joined_ranks

def faults_of_a_large_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with joined_ranks():
    print([faults_of_a_large_tensor() for _ in range(30)])
"""


def test_the_kernel_does_not_hand_out_a_steps_memory_anew() -> None:
    ran = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    first, *others = json.loads(ran.stdout)
    pages = 64 * 2**20 // resource.getpagesize()
    # Some of the first one may lie in pages that the process already had.
    assert first > 0.9 * pages
    # Small blocks come to lie in the freed one, a few times.
    assert sum(others[-8:]) < pages
