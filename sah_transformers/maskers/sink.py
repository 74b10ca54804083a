"""Attention sinks: the first keys of the sequence (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.budget import Budget, check_budget, resolve_budget
from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.rows import Rows
from sah_transformers.selections import First, Selection


@dataclass(frozen=True)
class SinkMaskerConfig(MaskerConfig):
    """``sink_size``: a number of keys, or a share of the row's visible keys."""

    type: ClassVar[str] = "sink"
    sink_size: Budget

    def __post_init__(self) -> None:
        check_budget("sink_size", self.sink_size)


@MaskerRegistry.register(SinkMaskerConfig)
class SinkMasker(Masker):
    """Selects the first ``sink_size`` visible keys of each row; padding does not count."""

    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        first = rows.ranks <= resolve_budget(self.config.sink_size, rows.counts)
        return first if rows.visible is None else first & rows.visible

    def describe(self) -> Selection:
        return First(self.config.sink_size)
