"""Settings of the decode kernels on a GPU: `python -m benchmarks.decode_sweep [--only TEXT] [--jobs 12]`.

One line per case and setting: time over the present settings and over the best dense SDPA, then the kernels' times.
Every setting must give the same output. Other processes compile the settings' kernels first, a share each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import call_of, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare, stage_us
from sah_transformers.kernels.decode import decode_checked, kernel

LATER: dict[str, dict[str, Any]] = {  # of stored scores, for top-p and per KV head
    "histogram 512 x 4": {"histogram_chunk": 512},
    "histogram 512 x 2": {"histogram_chunk": 512, "histogram_warps": 2},
    "histogram 512 x 1": {"histogram_chunk": 512, "histogram_warps": 1},
    "histogram 1024 x 2": {"histogram_warps": 2},
    "histogram 1024 x 8": {"histogram_warps": 8},
    "histogram 2048 x 4": {"histogram_chunk": 2048},
    "histogram 2048 x 8": {"histogram_chunk": 2048, "histogram_warps": 8},
    "histogram 256 x 2": {"histogram_chunk": 256, "histogram_warps": 2},
    "sample 4 warps": {"sample_warps": 4},
    "sample 16 warps": {"sample_warps": 16},
    "threshold 4 warps": {"threshold_warps": 4},
    "threshold 16 warps": {"threshold_warps": 16},
    "combine 8 warps": {"combine_warps": 8},
    "combine 2 warps": {"combine_warps": 2},
}
SCORES: dict[str, dict[str, Any]] = {
    f"tile {tile} x {tiles}, {warps} warps{', 2 stages' * (stages - 1)}": {
        "tile": tile, "tiles": tiles, "score_warps": warps, "score_stages": stages
    }
    for tile, tiles, warps, stages in (
        (128, 2, 4, 2), (128, 2, 4, 1), (128, 1, 4, 1), (128, 4, 4, 1), (128, 2, 8, 1), (64, 2, 4, 1), (64, 4, 4, 1),
        (64, 8, 4, 1), (64, 2, 2, 1), (64, 4, 2, 1), (256, 1, 8, 1), (256, 2, 8, 1),
    )
}  # fmt: skip
GATHER: dict[str, dict[str, Any]] = {
    "gather 1024": {"gather_programs": 1024},
    "gather 4096": {"gather_programs": 4096},
    "gather any registers": {"gather_registers": None},
    "gather 96 registers": {"gather_registers": 96},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "best": {
        **SCORES,
        **GATHER,
        "combine 8 warps": {"combine_warps": 8},
        "sample 4 warps": {"sample_warps": 4},
        "sample 16 warps": {"sample_warps": 16},
        "threshold 16 warps": {"threshold_warps": 16},
    },
    "group": {
        **SCORES,
        **LATER,
        "gather 256": {"gather_programs": 256},
        "gather 384": {"gather_programs": 384},
        "gather 1024": {"gather_programs": 1024},
        "gather 8 warps": {"gather_warps": 8},
        "64 rows": {"rows": 64},
        "chunk 1024": {"chunk": 1024},
    },
    "mass": {
        **SCORES,
        **LATER,
        **GATHER,
        "stream 2 stages": {"stream_stages": 2},
        "stream 8 warps": {"stream_warps": 8},
        "stream 64": {"stream_tile": 64},
        "bins 1024": {"bins": 1024},
    },
}


def use(setting: dict[str, Any]) -> None:
    """Make the pipeline take ``setting``, and what it does not name as it is now."""

    def changed(*args: Any) -> Any:
        return dataclasses.replace(tuning_of(*args), **setting)

    kernel.tuning_of, kernel.PLANS = changed, plans.setdefault(str(setting), {})


tuning_of = kernel.tuning_of
plans: dict[str, dict[Any, Any]] = {}


def times(case: Case, settings: dict[str, dict[str, Any]], share: tuple[int, int] | None) -> None:
    inputs = tensors(case, "cuda")
    call = call_of(case, inputs, "triton")

    def run(setting: dict[str, Any]) -> torch.Tensor:
        use(setting)
        return decode_checked(call)

    reference = run({}).float()
    functions: dict[str, Callable[[], torch.Tensor]] = {"now": functools.partial(run, {})}
    for number, (name, setting) in enumerate(settings.items()):
        if share is not None and number % share[1] != share[0]:
            continue
        try:
            out = run(setting)
        except Exception as error:
            print(f"{case.label:44} {name:27} {type(error).__name__}: {str(error)[:60]}")
            continue
        apart = float((out.float() - reference).norm() / reference.norm())
        if apart > 1e-2:
            print(f"{case.label:44} {name:27} WRONG by {apart:.2e}")
        functions[name] = functools.partial(run, setting)
    if share is not None:
        return
    taken = compare({**dense_functions(inputs), **functions}, True, 1.0)
    dense = min(one.p50 for name, one in taken.items() if name not in functions)
    before: dict[str, float] = {}
    for name, function in functions.items():
        us, stages = taken[name].p50 * 1e3, stage_us(function, True)
        other = {stage: took for stage, took in stages.items() if abs(took - before.get(stage, 0)) > 0.15}
        before = before or stages
        print(f"{case.label:44} {name:27} {us:7.2f} us, {us / dense / 1e3:.3f} of dense", other, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose label this regular expression matches")
    parser.add_argument("--settings", default="", help="only settings whose name this regular expression matches")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.jobs:
        command = [sys.executable, "-m", "benchmarks.decode_sweep", "--only", options.only, "--settings"]
        shares = [
            subprocess.Popen([*command, options.settings, "--share", str(i), str(options.jobs)])
            for i in range(options.jobs)
        ]
        for one in shares:
            one.wait()
    print(torch.cuda.get_device_name())
    kinds = {"top-p": "mass", "per KV head": "group", "top-k": "best"}
    with torch.no_grad():
        for case in load_suite("decode"):
            kind = next((kind for name, kind in kinds.items() if name in case.label), None)
            if kind and re.search(options.only, case.label):
                chosen = {name: one for name, one in SETTINGS[kind].items() if re.search(options.settings, name)}
                times(case, chosen, options.share)


if __name__ == "__main__":
    main()
