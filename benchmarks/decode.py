"""What launch parameters of the exact decode kernels do: for tuning on a GPU.

    python -m benchmarks.decode [NUMBERS OF CASES]

Cases are numbered as the suite `decode` lists them. Each is timed beside dense attention, then with other parameters,
whose outputs are compared.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.tuned import apart, tuned
from sah_transformers.attention import run
from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import call_of, tensors
from sah_transformers.bench.suites import Case, load_suite
from sah_transformers.bench.timing import compare, stage_us
from sah_transformers.kernels.decode import kernel
from sah_transformers.maskers.top_k import TopKMaskerConfig

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "best": [{"tiles": 1}, {"tiles": 4}, {"gather_programs": 1536}, {"threshold_warps": 4}, {"listed": 32}],
    "group": [{"tiles": 1}, {"samples": 512}, {"gather_programs": 396}, {"histogram_warps": 8}],
    "mass": [{"tiles": 1}, {"samples": 512}, {"stream_tile": 64}, {"histogram_warps": 8}],
    "bands": [{"band_programs": 256}],
}


def kind_of(case: Case) -> str:
    """The key of a case's variants."""
    last = case.maskers[-1]
    if isinstance(last, TopKMaskerConfig):
        return "group" if last.gqa == "group" else "best"
    return "mass" if "top_p" in vars(last) else "bands"


def measure(case: Case, changes: dict[str, Any], expected: torch.Tensor | None) -> torch.Tensor:
    """Print times of a call and its stages, and how far its output is from ``expected``; returns the output."""
    with tuned(kernel, changes):
        inputs = tensors(case, "cuda")
        call = call_of(case, inputs, "triton")

        def ours() -> torch.Tensor:
            return run(call)[0]

        times = compare({"ours": ours, **(dense_functions(inputs) if expected is None else {})}, True, 0.3)
        out = ours().float()
        found = {name: round(each.p50 * 1e3, 1) for name, each in times.items()}
        print(case.label, changes, found, f"apart {apart(out, expected):.1e}", stage_us(ours, True), flush=True)
        return out


@torch.no_grad()
def main() -> None:
    cases = load_suite("decode")
    for case in [cases[int(i)] for i in sys.argv[1:]] or cases:
        out = measure(case, {}, None)
        for changes in VARIANTS[kind_of(case)]:
            measure(case, changes, out)


if __name__ == "__main__":
    main()
