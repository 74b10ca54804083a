"""Stages of the decode kernels that select by side data, and what their launch parameters do: for tuning on a GPU.

    python -m benchmarks.approximate [--variants]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from sah_transformers.attention import run
from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import Step, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare, stage_us
from sah_transformers.kernels.approximate import pipeline
from sah_transformers.kernels.decode.kernel import PLANS
from sah_transformers.maskers.top_k import TopKMaskerConfig

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "head": [
        {"score_pages": 32},
        {"score_pages": 128, "score_warps": 8},
        {"score_pages": 32, "score_warps": 2},
        {"head_programs": 2048},
        {"head_programs": 1024},
        {"head_keys": 16, "head_programs": 2048},
        {"head_registers": 128},
        {"head_keys": 64, "head_warps": 2, "head_programs": 1024},
    ],
    "group": [
        {"group_programs": 528},
        {"group_programs": 396},
        {"group_keys": 32, "group_programs": 528},
        {"group_keys": 128, "group_programs": 264},
        {"group_stages": 1},
        {"group_stages": 1, "group_programs": 512},
        {"group_stages": 3},
        {"group_keys": 32, "group_warps": 2, "group_programs": 512, "group_stages": 1},
    ],
}


def measure(case: Case, changes: dict[str, Any], dense: bool, stages: bool) -> None:
    original = pipeline.tuning_of
    PLANS.clear()
    pipeline.tuning_of = lambda *sizes: replace(original(*sizes), **changes)
    try:
        inputs = tensors(case, "cuda")
        step = Step(case, inputs, "triton")

        def ours() -> torch.Tensor:
            return run(step.call())[0]

        sides = {"ours": ours, "append": step.call, **(dense_functions(inputs) if dense else {})}
        times = compare(sides, True, 0.3)
        found = {name: round(each.p50 * 1e3, 1) for name, each in times.items()}
        print(case.label, changes, found, {each.method for each in times.values()}, flush=True)
        if stages:
            print("   ", stage_us(ours, True), flush=True)
    except Exception as error:
        print(case.label, changes, f"{type(error).__name__}: {str(error)[:200]}", flush=True)
    finally:
        pipeline.tuning_of = original


def main() -> None:
    with torch.no_grad():
        cases = [case for case in load_suite("approximate") if not case.cpu]
        cases = [cases[int(i)] for i in sys.argv[1:] if i.isdigit()] or cases
        for case in cases:
            measure(case, {}, dense=True, stages=True)
        if "--variants" not in sys.argv:
            return
        for case in cases:
            config = case.maskers[-1]
            assert isinstance(config, TopKMaskerConfig)
            for changes in VARIANTS[config.gqa]:
                measure(case, changes, dense=False, stages=True)


if __name__ == "__main__":
    main()
