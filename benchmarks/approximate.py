"""Stages of the decode kernels that select by side data, and what their launch parameters do: for tuning on a GPU.

python -m benchmarks.approximate [--variants]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from sah_transformers.attention import make_call, run
from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import Step, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare, stage_us
from sah_transformers.kernels.approximate import pipeline
from sah_transformers.kernels.decode.kernel import PLANS
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import dot
from sah_transformers.selections import Estimated, Selection

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "head": [{"select_warps": 16}],
    "group": [
        {"select_warps": 8, "select_scores": 2**14},
        {"select_warps": 16, "select_scores": 2**14},
        {"select_warps": 16, "select_scores": 2**15},
        {"select_warps": 8, "select_scores": 2**13},
    ],
}


class Ranked(TopKMasker):
    """Keys by their exact score, said in the words of an estimate: what the stages after the scores cost."""

    def score(self, queries: Any, keys: Any, values: Any, ctx: Any) -> Any:
        return dot(queries, keys) * ctx.scaling

    def describe(self) -> Selection:
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "softmax", "exact")


def measure_keys(case: Case, whole: bool, changes: dict[str, Any]) -> None:
    """The stages of a selection of single keys; ``whole``: of scores that are few whole numbers."""
    original = pipeline.tuning_of
    PLANS.clear()
    pipeline.tuning_of = lambda *sizes: replace(original(*sizes), **changes)
    q, k, v = tensors(case, "cuda")
    if whole:
        q, k = q.sign(), k.sign()
    config = case.maskers[-1]
    assert isinstance(config, TopKMaskerConfig)
    bands = [MaskerRegistry.create_masker(one) for one in case.maskers[:-1]]
    call = make_call(q, k, v, [*bands, Ranked(TopKMaskerConfig(config.heavy_size, config.gqa))], kernel="triton")
    times = compare({"ours": lambda: run(call)[0]}, True, 0.3)
    print("keys", config.gqa, "whole" if whole else "", changes, round(times["ours"].p50 * 1e3, 1), flush=True)
    print("   ", stage_us(lambda: run(call)[0], True), flush=True)
    pipeline.tuning_of = original


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
            config = case.maskers[-1]
            assert isinstance(config, TopKMaskerConfig)
            if "--keys" in sys.argv:
                for whole in (False, True):
                    measure_keys(case, whole, {})
            else:
                measure(case, {}, dense=True, stages=True)
            if "--variants" in sys.argv:
                for changes in VARIANTS[config.gqa]:
                    measure(case, changes, dense=False, stages=True)


if __name__ == "__main__":
    main()
