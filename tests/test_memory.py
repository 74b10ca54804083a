"""Memory is linear in the number of keys: no mask, no score matrix, no repeated KV heads are ever whole."""

import subprocess
import sys

import pytest
import torch

from sah_transformers import MaskerRegistry
from sah_transformers.attention import BLOCK_ELEMENTS, make_call

MEASURE = """
import sys, torch
from sah_transformers import sparse_attention
torch.set_num_threads(1)

def resident(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) / 1024

def peak(length, gradients):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=gradients) for heads in (8, 2, 2))
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = resident("VmRSS")
    stack = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128},
             {"type": "oracle_top_k", "heavy_size": 0.05}]
    out = sparse_attention(q, k, v, stack, return_mask=False)
    if gradients:
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in (q, k, v))
    return resident("VmHWM") - before

peak(256, True)
print(peak(int(sys.argv[1]), False), peak(int(sys.argv[1]), True))
"""


def peak_mib(keys):
    """Peak memory above the inputs of a call, and of a call with its gradients, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(keys)], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    forward, gradients = map(float, done.stdout.split()[-2:])
    print(f"{keys} keys: {forward:.0f} MiB above the inputs, {gradients:.0f} MiB with gradients")
    return forward, gradients


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_memory_at_4096_keys():
    """One float32 score matrix of all heads would be 512 MiB, what autograd keeps of it several times that."""
    forward, gradients = peak_mib(4096)
    assert forward < 256
    assert gradients < 400


@linux
@pytest.mark.slow
def test_memory_at_16384_keys():
    """One float32 score matrix of all heads would be 8 GiB."""
    assert max(peak_mib(16384)) < 1024


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys"),
    [(1, 8, 4096, 4096), (1, 32, 700, 131072), (32, 32, 512, 512), (256, 16, 64, 64), (1, 64, 3000, 3000)],
)
def test_blocks_stay_within_their_limit(batch, heads, rows, keys, is_causal):
    """However many sequences and heads there are; a block of one row may be larger. Nothing is computed here."""
    expand = (batch, heads, rows, 1), (batch, heads, keys, 1)
    q, k = (torch.zeros(1, 1, 1, 1).expand(shape) for shape in expand)
    call = make_call(q, k, k, [MaskerRegistry.create_masker({"type": "causal"})], is_causal=is_causal)
    seen = 0
    for start, stop in call.blocks():
        assert start == seen
        seen = stop
        scores = batch * heads * (stop - start) * call.visibility.reach(stop)
        assert stop - start == 1 or scores <= 2 * BLOCK_ELEMENTS["cpu"], (start, stop)
    assert seen == rows
