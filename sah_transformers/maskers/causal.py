"""Dense attention as a masker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.rows import Rows
from sah_transformers.selections import Everything, Selection


@dataclass(frozen=True)
class CausalMaskerConfig(MaskerConfig):
    """No fields: everything the row may see."""

    type: ClassVar[str] = "causal"


@MaskerRegistry.register(CausalMaskerConfig)
class CausalMasker(Masker):
    """Selects every visible key."""

    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        if rows.visible is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.keys.device)
        return rows.visible

    def describe(self) -> Selection:
        return Everything()
