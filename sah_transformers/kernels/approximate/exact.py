"""The exact score as an estimate, for keys that are ranked by themselves: no side data."""

from __future__ import annotations

from typing import Any

import torch

from sah_transformers.kernels.approximate.launch import Scoring, Tile
from sah_transformers.kernels.decode.score import score_kernel
from sah_transformers.kernels.decode.stack import power_of_2

TILES = (Tile(64, 4, 4),)


def why_not(given: Any, dim: int) -> str:
    return ""


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Any) -> dict[str, tuple[int, torch.dtype]]:
    return {}


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Any, scratch: dict[str, Any]) -> None:
    """Nothing depends on the query alone."""


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Any, scratch: dict[str, Any], tile: Tile
) -> None:
    """``scaling * q.k`` of every key."""
    heads, dim = call.q.shape[1], call.q.shape[3]
    rows = max(16, power_of_2(min(64, call.in_group)))
    launch(
        score_kernel, (call.stride // tile.span, call.q.shape[0] * call.groups, -(-call.in_group // rows)),
        launch.address(call.q), launch.address(call.k), *call.arrays(),
        *call.numbers(tile.span)[:4], *call.q.stride()[:3], *call.k.stride()[:3], *call.look, call.scaling, 1.0,
        *call.bands,
        H=heads, G=call.groups, Q=call.q.shape[2], D=dim, BD=max(16, power_of_2(dim)),
        CAUSAL=call.causal, MASKED=call.masked, SOFTCAP=False, UNIT=1, MASSES=int(call.masses_too), BINS=call.bins,
        BM=rows, BN=tile.keys, TILES=tile.count, STAGES=2, warps=tile.warps,
    )  # fmt: skip


def levels(call: Scoring, given: Any) -> int:
    """0: scores are no whole numbers."""
    return 0
