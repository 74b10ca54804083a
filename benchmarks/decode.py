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

SCORES: list[dict[str, Any]] = [
    {"tile": tile, "tiles": tiles, "score_warps": warps, "score_stages": stages}
    for tile, tiles, warps, stages in (
        (128, 2, 4, 2), (128, 2, 4, 1), (128, 4, 4, 1), (128, 2, 8, 1), (64, 2, 4, 1), (64, 4, 4, 1), (64, 8, 4, 1),
        (64, 2, 2, 1), (64, 4, 2, 1), (256, 1, 8, 1), (256, 2, 8, 1),
    )
]  # fmt: skip
GATHER: list[dict[str, Any]] = [
    {"gather_programs": 1024}, {"gather_programs": 4096}, {"gather_registers": None}, {"gather_registers": 96},
]  # fmt: skip
LATER: list[dict[str, Any]] = [  # of stored scores, for top-p and per KV head
    *({"histogram_chunk": chunk, "histogram_warps": warps} for chunk, warps in (
        (256, 2), (512, 1), (512, 2), (512, 4), (1024, 2), (1024, 8), (2048, 4), (2048, 8),
    )),
    {"sample_warps": 4}, {"sample_warps": 16}, {"samples": 512}, {"threshold_warps": 4}, {"threshold_warps": 16},
    {"combine_warps": 2}, {"combine_warps": 8},
]  # fmt: skip
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "best": [
        *SCORES, *GATHER, {"listed": 32}, {"combine_warps": 8}, {"sample_warps": 4}, {"sample_warps": 16},
        {"threshold_warps": 4}, {"threshold_warps": 16},
    ],
    "group": [
        *SCORES, *LATER, {"gather_programs": 384}, {"gather_programs": 512}, {"gather_programs": 1024},
        {"gather_warps": 8}, {"rows": 64}, {"chunk": 1024},
    ],
    "mass": [
        *SCORES, *LATER, *GATHER, {"stream_stages": 2}, {"stream_warps": 8}, {"stream_tile": 128}, {"bins": 1024},
    ],
    "bands": [{"band_programs": 256}],
}  # fmt: skip


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
