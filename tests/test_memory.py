"""Memory is linear in the number of keys: no mask, no score matrix, no repeated KV heads are ever whole."""

import subprocess
import sys

import pytest
import torch

from sah_transformers import MaskerRegistry
from sah_transformers.attention import BLOCK_ELEMENTS, make_call

MEASURE = """
import resource, sys, threading, torch
from sah_transformers import sparse_attention
torch.set_num_threads(1)
keys, gradients = int(sys.argv[1]), sys.argv[2] == "gradients"

def resident(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) / 1024

def run(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=gradients) for heads in (8, 2, 2))
    before = resident("VmRSS")
    stack = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128},
             {"type": "oracle_top_k", "heavy_size": 0.05}]
    out = sparse_attention(q, k, v, stack, return_mask=False)
    if gradients:
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in (q, k, v))
    return before

run(256)
before = run(keys)
print(resident("VmHWM") - before)
"""


def peak_mib(keys, what):
    """Peak memory of a call above its inputs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(keys), what], capture_output=True, text=True, timeout=570
    )
    assert done.returncode == 0, done.stderr
    mib = float(done.stdout.split()[-1])
    print(f"{what}, {keys} keys: {mib:.0f} MiB above the inputs")
    return mib


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("what", ["forward", "gradients"])
def test_memory_at_4096_keys(what):
    """One float32 score matrix of all heads would be 512 MiB, what autograd keeps of it several times that."""
    assert peak_mib(4096, what) < 400


@linux
@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "gradients"])
def test_memory_at_16384_keys(what):
    """One float32 score matrix of all heads would be 8 GiB."""
    assert peak_mib(16384, what) < 1024


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
