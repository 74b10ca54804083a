"""Shared machinery of maskers that take the fewest keys holding a share of the attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sah_transformers.kernels.select import select_top_p
from sah_transformers.kernels.select.reference import check_top_p
from sah_transformers.maskers.base import MaskerConfig
from sah_transformers.maskers.top_k import ScoredMasker, check_gqa
from sah_transformers.rows import Rows, by_group


@dataclass(frozen=True)
class TopPMaskerConfig(MaskerConfig):
    """Config of a top-p masker.

    Attributes:
        top_p: share of the mass to hold, a float in [0, 1].
        coverage: ``"remaining"``: the share is of the mass that earlier maskers left; ``"total"``: of all visible
            mass, what earlier maskers hold counts first.
        gqa: ``"head"``: each query head selects; ``"group"``: once per KV head, by the summed mass.
    """

    top_p: float
    coverage: Literal["remaining", "total"] = "remaining"
    gqa: Literal["head", "group"] = "head"

    def __post_init__(self) -> None:
        check_top_p(self.top_p)
        if self.coverage not in ("remaining", "total"):
            raise ValueError(f"coverage must be 'remaining' or 'total', got {self.coverage!r}")
        check_gqa(self.gqa)


class TopPMasker(ScoredMasker):
    """Takes the best-scored candidates until ``top_p`` of the softmax mass is held; ties at the cut are in."""

    config: TopPMaskerConfig

    def choose(self, rows: Rows, active: torch.Tensor | None, exact: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores = self.row_scores(rows)
        exact = exact or scores.dtype == torch.float64
        error = None if exact else self.score_error(rows, scores)
        total = self.config.coverage == "total"
        grouped = self.config.gqa == "group"
        candidates = self.group_candidates(rows, active) if grouped else rows.candidates(active)
        if grouped:
            mass = self.group_mass(rows, scores)
            visible = rows.group_visible()
            error = None if error is None else by_group(error, rows.keys.shape[1]).amax(dim=2)
        else:
            visible = rows.visible
            counted = visible if total else candidates
            shown = scores if counted is None else scores.masked_fill(~counted, float("-inf"))
            mass = shown.softmax(-1).nan_to_num(nan=0.0)
        held = None
        if total and active is not None:
            others = ~candidates if visible is None else visible & ~candidates  # type: ignore[operator]
            held = mass.masked_fill(~others, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
        margin = None if error is None else 2 * error + 1e-6
        return select_top_p(mass, candidates, self.config.top_p, held, margin)
