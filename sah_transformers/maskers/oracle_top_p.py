"""Oracle top-p: the fewest keys that hold a share of the exact attention mass (Twilight, arXiv 2502.02770)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_p import TopPMasker, TopPMaskerConfig
from sah_transformers.rows import Context, Rows, scores_of
from sah_transformers.selections import Mass, Selection


@dataclass(frozen=True)
class OracleTopPMaskerConfig(TopPMaskerConfig):
    """``top_p`` of the softmax mass of the candidates, or of all visible keys with ``coverage="total"``."""

    type: ClassVar[str] = "oracle_top_p"


@MaskerRegistry.register(OracleTopPMaskerConfig)
class OracleTopPMasker(TopPMasker):
    """Selects the highest-weighted visible keys that together hold ``top_p`` of the attention mass."""

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        return scores_of(queries, keys, ctx)

    def row_scores(self, rows: Rows) -> torch.Tensor:
        return rows.scores()

    def score_error(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        return rows.score_error()

    def describe(self) -> Selection:
        return Mass(self.config.top_p, self.config.coverage == "total", self.config.gqa == "group")
