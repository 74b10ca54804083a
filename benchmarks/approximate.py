"""Stages of the decode kernels that select by side data, and what their launch parameters do: for tuning on a GPU.

    python -m benchmarks.approximate [NUMBERS OF CASES] [--variants] [--keys]

``--variants``: also with other launch parameters, the outputs compared; ``--keys``: keys by their exact score instead
of the cases' methods. Cases are numbered as the suite lists them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.tuned import apart, tuned
from sah_transformers.attention import make_call, run
from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import Step, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare, stage_us
from sah_transformers.kernels.approximate import pipeline
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import dot
from sah_transformers.selections import Estimated, Selection

PAGES: dict[str, list[dict[str, Any]]] = {
    "head": [{"select_warps": 16}],
    "group": [
        {"select_warps": 8, "select_scores": 2**14},
        {"select_warps": 16, "select_scores": 2**14},
        {"select_warps": 16, "select_scores": 2**15},
        {"select_warps": 8, "select_scores": 2**13},
    ],
}
KEYS: dict[str, list[dict[str, Any]]] = {
    "both": [
        {"level_bins": 64, "edge": 512, "edge_warps": 4},
        {"samples": 512},
        {"samples": 2048},
        {"sample_warps": 4},
        {"chunk": 2048},
        {"chunk": 512},
        {"level_warps": 2},
        {"level_warps": 8},
        {"list_warps": 2},
        {"level_cut_warps": 4},
        {"level_cut_warps": 16},
        {"edge_warps": 4},
        {"edge_warps": 16},
    ],
    "head": [{"even": False}, {"head_programs": 1716}, {"head_programs": 2048}],
    "group": [
        {"even": False, "key_group_programs": 396},
        {"key_group_programs": 512, "group_keys": 32},
        {"key_group_programs": 512, "group_keys": 128, "group_stages": 1},
        {"key_group_programs": 512, "group_stages": 1},
        {"key_group_programs": 396},
        {"key_group_programs": 264, "group_stages": 3},
    ],
}


def variants_of(config: TopKMaskerConfig) -> list[dict[str, Any]]:
    """Changes of the tuning that matter to a case."""
    return PAGES[config.gqa] if config.type == "quest" else KEYS["both"] + KEYS[config.gqa]


class Ranked(TopKMasker):
    """Keys by their exact score, said in the words of an estimate: what the stages after the scores cost."""

    def score(self, queries: Any, keys: Any, values: Any, ctx: Any) -> Any:
        return dot(queries, keys) * ctx.scaling

    def describe(self) -> Selection:
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "softmax", "exact")


def measure_keys(case: Case, whole: bool) -> None:
    """The stages of a selection of single keys; ``whole``: of scores that are few whole numbers."""
    q, k, v = tensors(case, "cuda")
    if whole:
        q, k = q.sign(), k.sign()
    config = case.maskers[-1]
    assert isinstance(config, TopKMaskerConfig)
    bands = [MaskerRegistry.create_masker(one) for one in case.maskers[:-1]]
    call = make_call(q, k, v, [*bands, Ranked(TopKMaskerConfig(config.heavy_size, config.gqa))], kernel="triton")
    times = compare({"ours": lambda: run(call)[0]}, True, 0.3)
    print("keys", config.gqa, "whole" if whole else "", round(times["ours"].p50 * 1e3, 1), flush=True)
    print("   ", stage_us(lambda: run(call)[0], True), flush=True)


def measure(case: Case, changes: dict[str, Any], dense: bool, expected: torch.Tensor | None) -> torch.Tensor | None:
    """Print times of a step and its stages, and how far its output is from ``expected``; returns the output."""
    try:
        with tuned(pipeline, changes):
            inputs = tensors(case, "cuda")
            step = Step(case, inputs, "triton")

            def ours() -> torch.Tensor:
                return run(step.call())[0]

            sides = {"ours": ours, "append": step.call, **(dense_functions(inputs) if dense else {})}
            times = compare(sides, True, 0.3)
            found = {name: round(each.p50 * 1e3, 1) for name, each in times.items()}
            out = ours().float()
            methods = {each.method for each in times.values()}
            print(case.label, changes, found, methods, f"apart {apart(out, expected):.1e}", flush=True)
            print("   ", stage_us(ours, True), flush=True)
            return out
    except Exception as error:
        print(case.label, changes, f"{type(error).__name__}: {str(error)[:200]}", flush=True)
        return None


def main() -> None:
    with torch.no_grad():
        cases = [case for case in load_suite("approximate") if not case.cpu]
        cases = [cases[int(i)] for i in sys.argv[1:] if i.isdigit()] or cases
        for case in cases:
            config = case.maskers[-1]
            assert isinstance(config, TopKMaskerConfig)
            if "--keys" in sys.argv:
                for whole in (False, True):
                    measure_keys(case, whole)
                continue
            out = measure(case, {}, dense=True, expected=None)
            if "--variants" in sys.argv:
                for changes in variants_of(config):
                    measure(case, changes, dense=False, expected=out)


if __name__ == "__main__":
    main()
