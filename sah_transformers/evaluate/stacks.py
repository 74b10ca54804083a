"""The stacks under test, and the same stack over several budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from sah_transformers.budget import check_budget
from sah_transformers.config import SparseAttentionConfig

if TYPE_CHECKING:
    from sah_transformers.maskers import MaskerConfig

BUDGETS = ("heavy_size", "sampling_rate")
"""Fields of maskers that hold a budget."""


@dataclass(frozen=True)
class Stack:
    """A configuration under test. Its prompts are read densely, whatever ``config.prefill`` was.

    Attributes:
        name: how tables call it; all budgets of one stack share it.
        config: the configuration.
        budget: the one put into its maskers' fields of ``BUDGETS``; None for their own.
    """

    name: str
    config: SparseAttentionConfig
    budget: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", replace(self.config, prefill="dense"))

    @property
    def label(self) -> str:
        """Name and budget."""
        return self.name if self.budget is None else f"{self.name} @ {self.budget:g}"


def over_budgets(stack: Stack, budgets: Iterable[float]) -> list[Stack]:
    """The stack once per budget; unchanged and once where none of its maskers has a field of ``BUDGETS``.

    Raises:
        ValueError: for a number that is no budget, or none of theirs.
    """
    config, wanted = stack.config, list(budgets)
    for budget in wanted:
        check_budget("budgets", budget)
    everywhere = [config.maskers, *config.layers.values()]
    if not wanted or not any(_budget_fields(masker) for maskers in everywhere for masker in maskers):
        return [stack]
    return [
        Stack(
            stack.name,
            replace(
                config,
                maskers=_with(config.maskers, budget),
                layers={where: _with(maskers, budget) for where, maskers in config.layers.items()},
            ),
            budget,
        )
        for budget in wanted
    ]


def _budget_fields(masker: MaskerConfig) -> list[str]:
    return [field.name for field in fields(masker) if field.name in BUDGETS]


def _with(maskers: Sequence[MaskerConfig], budget: float) -> tuple[MaskerConfig, ...]:
    return tuple(replace(one, **dict.fromkeys(_budget_fields(one), budget)) for one in maskers)
