"""The local window: the last keys of the sequence, the row's own included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.budget import Budget, check_budget, resolve_budget
from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.rows import Rows
from sah_transformers.selections import Last, Selection


@dataclass(frozen=True)
class LocalMaskerConfig(MaskerConfig):
    """``window_size``: a number of keys, or a share of the row's visible keys."""

    type: ClassVar[str] = "local"
    window_size: Budget

    def __post_init__(self) -> None:
        check_budget("window_size", self.window_size)


@MaskerRegistry.register(LocalMaskerConfig)
class LocalMasker(Masker):
    """Selects the last ``window_size`` visible keys of each row, its own included."""

    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        last = rows.ranks > rows.counts - resolve_budget(self.config.window_size, rows.counts)
        return last if rows.visible is None else last & rows.visible

    def describe(self) -> Selection:
        return Last(self.config.window_size)
