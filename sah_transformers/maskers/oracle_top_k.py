"""Oracle top-k: the keys with the best exact scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import Context, Rows, scores_of
from sah_transformers.selections import Best, Selection


@dataclass(frozen=True)
class OracleTopKConfig(TopKMaskerConfig):
    """``heavy_size`` keys (or a share of the row's visible keys), per query head or per KV head."""

    type: ClassVar[str] = "oracle_top_k"


@MaskerRegistry.register(OracleTopKConfig)
class OracleTopK(TopKMasker):
    """Selects the ``heavy_size`` visible keys with the highest attention scores among those not yet active."""

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        return scores_of(queries, keys, ctx)

    def row_scores(self, rows: Rows) -> torch.Tensor:
        return rows.scores()  # shared with the attention itself, the mask's bias included

    def score_error(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        return rows.score_error()

    def rescore(self, rows: Rows) -> Callable[[torch.Tensor], torch.Tensor]:
        return rows.exact_scores

    def describe(self) -> Selection:
        return Best(self.config.heavy_size, self.config.gqa == "group")
