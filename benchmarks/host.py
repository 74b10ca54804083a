"""Where the host's time goes in an uncompiled decode step: a layer's attention function and its cache's update, then
Python's functions, by their own time.

python -m benchmarks.host [quest|oracle_top_k|dense] [cached tokens] [layers]

Sizes as Llama-3.1-8B on a GPU, a tiny model on a CPU (where kernels are the reference's).
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
import time
from typing import Any
from unittest.mock import patch

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sah_transformers
from sah_transformers.bench.step import GROWING, Way, filled, generate, model_of, rewind
from sah_transformers.bench.suites import Case

TOKENS = 24
WINDOWS = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}]


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "quest"
    cached = int(sys.argv[2]) if len(sys.argv) > 2 else 131_072
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (4096, 14336, 128256, 32, 8, 128, "bfloat16") if device == "cuda" else (64, 64, 64, 4, 2, 16, "float32")
    model = model_of(layers, *sizes, device)
    stack = [*WINDOWS, {"type": kind, "heavy_size": 0.05, "gqa": "group"}]
    sparse = kind != "dense"
    if sparse:
        sah_transformers.enable(model, stack)
    way, (heads, groups, dim) = Way(sparse, GROWING), sizes[3:6]
    maskers = (sah_transformers.CausalMaskerConfig(),)  # a case has some; the model's are the ones above
    case = Case(suite="", name="", K=cached, B=1, H=heads, G=groups, D=dim, maskers=maskers)
    cache = filled(case, model, way, cached + TOKENS)

    def seconds() -> float:
        start = time.perf_counter()
        generate(case, model, cache, way, TOKENS).tolist()
        spent = time.perf_counter() - start
        rewind(cache, cached)
        return spent

    seconds(), seconds()
    print(f"{kind}, {cached:,} keys: {min(seconds() for _ in range(3)) / TOKENS * 1e3:.2f} ms per token of generate()")
    attention, update = timed(ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]), timed(type(cache).update)
    named = {model.config._attn_implementation: attention}
    with patch.dict(AttentionInterface._global_mapping, named), patch.object(type(cache), "update", update):
        seconds()
    for name, function in (("attention", attention), ("cache", update)):
        spent = function.times[layers:]  # without the first step
        print(f"{name}: {statistics.median(spent):.0f} us per layer, at least {min(spent):.0f}")
    profile = cProfile.Profile()
    profile.runcall(seconds)
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(40)


def timed(function: Any) -> Any:
    """The function, which notes in its list ``times`` how many microseconds each call takes on the host."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        noting.times.append((time.perf_counter() - start) * 1e6)  # type: ignore[attr-defined]
        return result

    noting.times = []  # type: ignore[attr-defined]
    return noting


if __name__ == "__main__":
    main()
