"""Every kernel on small shapes, for `compute-sanitizer --tool memcheck|racecheck python -m benchmarks.sanitize`.

Parts (`caches`, `methods`, `float16`, `bfloat16`, `float32`; all where none is named) may run side by side. Run once
without the tool, they leave compiled kernels behind: most of the time goes into compiling.
Each tensor has its own allocation (PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set here), so that reads beyond one are seen.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

from dataclasses import replace

import torch

from sah_transformers import sparse_attention
from sah_transformers.attention import run
from sah_transformers.bench.inputs import Step
from sah_transformers.bench.inputs import tensors as tensors_of
from sah_transformers.bench.suites import load_suite
from sah_transformers.kernels.append import append_token
from sah_transformers.maskers import MaskerRegistry

BANDS = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 8}]
STACKS = {
    "sink local": BANDS,
    "top k": [*BANDS, {"type": "oracle_top_k", "heavy_size": 0.1}],
    "top k of groups": [*BANDS, {"type": "oracle_top_k", "heavy_size": 0.1, "gqa": "group"}],
    "top p of groups": [*BANDS, {"type": "oracle_top_p", "top_p": 0.8, "gqa": "group"}],
    "top p": [*BANDS, {"type": "oracle_top_p", "top_p": 0.8}],
    "peaked top p": [*BANDS, {"type": "oracle_top_p", "top_p": 0.1}],
}


def tensors(rows: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (2, 4, rows, 64), (2, 2, keys, 64), (2, 2, keys, 48)
    q, k, v = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    return q, k, v


def published_methods() -> None:
    """A decode step of each, per query head and per KV head: append, scores, selection, attention."""
    for case in load_suite("approximate"):
        if not case.cpu:
            continue
        for gqa in ("head", "group"):
            for dtype in ("bfloat16", "float32"):
                scored = replace(case.maskers[-1], gqa=gqa)  # type: ignore[call-arg]
                each = replace(case, maskers=(*case.maskers[:-1], scored), dtype=dtype, B=2)
                run(Step(each, tensors_of(each, "cuda"), "triton").call())
                torch.cuda.synchronize()
                print(f"{each.name}, per {gqa}, {dtype}", flush=True)


def appended_tokens() -> None:
    """A token behind others of a cache, small and larger than one program copies, up to the last place and beyond."""
    for dtype in (torch.bfloat16, torch.float32):
        for heads, dim in ((2, 48), (8, 128), (16, 256)):
            keys, values = (torch.zeros(3, heads, 10, size, dtype=dtype, device="cuda") for size in (dim, dim // 2))
            token = [torch.randn_like(t[:, :, :1]) for t in (keys, values)]
            for place in (0, 9, 10):
                for length in (place, torch.tensor(place, device="cuda")):
                    assert append_token(keys, values, *token, length)
            torch.cuda.synchronize()
            print(f"token of {heads} x {dim}, {dtype}", flush=True)


def exact_stacks(dtype: torch.dtype) -> None:
    """Decode steps and prompts, without a mask, with padding and with holes."""
    for rows, keys in ((1, 999), (3, 700), (130, 130), (70, 1300)):
        q, k, v = tensors(rows, keys, dtype)
        real = torch.arange(keys, device="cuda") >= torch.tensor([[0], [37]], device="cuda")
        holes = real & (torch.arange(keys, device="cuda") % 17 != 3)
        for name, stack in STACKS.items():
            if rows <= 16 and name == "top p of groups":  # the reference's
                continue
            for mask in (None, real, holes):
                sparse_attention(q, k, v, stack, attention_mask=mask, kernel="triton", return_mask=False)
                torch.cuda.synchronize()
            print(f"{name}, {rows} x {keys}, {dtype}", flush=True)
        masker = MaskerRegistry.create_masker(STACKS["top k"][-1])
        masker.add_mask(k, q, v, is_causal=True, kernel="triton")
        torch.cuda.synchronize()


@torch.no_grad()
def main(parts: list[str]) -> None:
    torch.manual_seed(0)
    for part in parts:
        if part == "caches":
            appended_tokens()
        elif part == "methods":
            published_methods()
        else:
            exact_stacks(getattr(torch, part))
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:] or ["caches", "methods", "float16", "bfloat16", "float32"])
