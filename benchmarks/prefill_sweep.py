"""Settings of the prefill kernels on a GPU: `python -m benchmarks.prefill_sweep [mask_update prefill] [--only TEXT]`.

One line per case and setting: time over the best dense SDPA, and over the present settings. Every setting must give the
same output.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import call_of, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare
from sah_transformers.kernels.prefill import launch, parts, prefill, tiles

NOW = {
    "ALWAYS_LISTED": parts.ALWAYS_LISTED, "LEAST_SAMPLE": parts.LEAST_SAMPLE, "ENOUGH_SAMPLE": parts.ENOUGH_SAMPLE,
    "SAMPLE_SHARE": parts.SAMPLE_SHARE, "DEVIATIONS": parts.DEVIATIONS, "MASS_DEVIATIONS": parts.MASS_DEVIATIONS,
    "SELECT_WIDTH": launch.SELECT_WIDTH, "tiles": {},
}  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "listed 1024": {"ALWAYS_LISTED": 1024},
    "listed 128": {"ALWAYS_LISTED": 128},
    "sample 128": {"LEAST_SAMPLE": 128, "SAMPLE_SHARE": 16, "tiles": {"bracket": (64, 128, 4, 1)}},
    "bracket 128 rows": {"tiles": {"bracket": (128, 256, 8, 1)}},
    "bracket 32 rows": {"tiles": {"bracket": (32, 256, 4, 1)}},
    "select 256": {"SELECT_WIDTH": 256},
    "attend 64x64": {"tiles": {"attend": (64, 64, 4, 3)}},
    "attend 64x32": {"tiles": {"attend": (64, 32, 4, 3)}},
    "attend 32x64": {"tiles": {"attend": (32, 64, 2, 3)}},
    "attend 16x64": {"tiles": {"attend": (16, 64, 1, 3)}},
    "attend 128x64x4": {"tiles": {"attend": (128, 64, 4, 3)}},
    "emit 32x64": {"tiles": {"emit": (32, 64, 2, 3)}},
    "emit 128x64": {"tiles": {"emit": (128, 64, 8, 3)}},
    "emit 64x32": {"tiles": {"emit": (64, 32, 4, 3)}},
}
LARGE: dict[str, dict[str, Any]] = {
    "listed 256": {"ALWAYS_LISTED": 256},
    "listed 1024": {"ALWAYS_LISTED": 1024},
    "deviations 4": {"DEVIATIONS": 4.0, "MASS_DEVIATIONS": 3.5},
    "deviations 3": {"DEVIATIONS": 3.0, "MASS_DEVIATIONS": 3.0},
    "select 256": {"SELECT_WIDTH": 256},
    "sample 2048": {"LEAST_SAMPLE": 2048, "ENOUGH_SAMPLE": 2048},
    "sample 512": {"LEAST_SAMPLE": 512, "ENOUGH_SAMPLE": 512},
    "bracket 64 rows": {"tiles": {"bracket": (64, 256, 4, 1)}},
    "attend 128x64": {"tiles": {"attend": (128, 64, 8, 3)}},
}


def use(setting: dict[str, Any]) -> None:
    """Make the kernels' launcher take ``setting``, and what it does not name as it is now."""
    for name, value in {**NOW, **setting}.items():
        if name != "tiles":
            setattr(launch if name == "SELECT_WIDTH" else parts, name, value)
            continue

        def changed(*args: Any, changes: dict[str, Any] = value) -> tiles.Tiles:
            return dataclasses.replace(tiles.tiles_for(*args), **changes)

        launch.tiles_for = changed  # type: ignore[assignment]


def times(case: Case, settings: dict[str, dict[str, Any]]) -> None:
    inputs = tensors(case, "cuda")
    call = call_of(case, inputs, "triton")

    def run(setting: dict[str, Any]) -> torch.Tensor:
        use(setting)
        return prefill(call)

    reference = run({}).float()
    functions: dict[str, Callable[[], torch.Tensor]] = {"now": functools.partial(run, {})}
    for name, setting in settings.items():
        try:
            out = run(setting)
        except Exception as error:
            print(f"{case.label:44} {name:18} {type(error).__name__}: {str(error)[:60]}")
            continue
        apart = float((out.float() - reference).norm() / reference.norm())
        if apart > 1e-2:
            print(f"{case.label:44} {name:18} WRONG by {apart:.2e}")
        functions[name] = functools.partial(run, setting)
    taken = compare({**dense_functions(inputs), **functions}, True, 1.0)
    dense = min(one.p50 for name, one in taken.items() if name not in functions)
    for name in functions:
        ms = taken[name].p50
        print(f"{case.label:44} {name:18} {ms:8.4f} ms {ms / dense:6.2f} of dense {ms / taken['now'].p50:6.2f} of now")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=["mask_update", "prefill"])
    parser.add_argument("--only", default="", help="only cases whose label contains this")
    options = parser.parse_args()
    print(torch.cuda.get_device_name())
    with torch.no_grad():
        for name in options.suites:
            for case in load_suite(name):
                if options.only in case.label and case.K <= 32768 and "local" not in case.name:
                    times(case, SMALL if name == "mask_update" else LARGE)


if __name__ == "__main__":
    main()
