"""The stacks under test, and the same stack over several budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from sah_transformers.budget import check_budget
from sah_transformers.config import SparseAttentionConfig

if TYPE_CHECKING:
    from sah_transformers.maskers import MaskerConfig

BUDGET = "heavy_size"


@dataclass(frozen=True)
class Stack:
    """A configuration under test. Its prompts are read densely, whatever ``config.prefill`` was.

    Attributes:
        name: how tables call it; all budgets of one stack share it.
        config: the configuration.
        budget: the ``heavy_size`` put into its maskers; None for its own.
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
    """The stack once per budget; unchanged and once where none of its maskers has a ``heavy_size``.

    Raises:
        ValueError: for a number that is no budget.
    """
    config, wanted = stack.config, list(budgets)
    for budget in wanted:
        check_budget("budgets", budget)
    everywhere = [config.maskers, *config.layers.values()]
    if not wanted or not any(_has_budget(masker) for maskers in everywhere for masker in maskers):
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


def _has_budget(masker: MaskerConfig) -> bool:
    return any(field.name == BUDGET for field in fields(masker))


def _with(maskers: Sequence[MaskerConfig], budget: float) -> tuple[MaskerConfig, ...]:
    return tuple(replace(one, **{BUDGET: budget}) if _has_budget(one) else one for one in maskers)
