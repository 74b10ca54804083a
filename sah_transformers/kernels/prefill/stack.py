"""What a stack of selections asks of the prefill kernels."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sah_transformers.budget import Budget
from sah_transformers.selections import Best, Everything, First, Last, Mass, Selection

ALL = 2**31 - 1


@dataclass
class Bands:
    """The first and the last keys of every row, as budgets (0 = none)."""

    first: Budget = 0
    last: Budget = 0

    @classmethod
    def of(cls, selections: Iterable[Selection | None]) -> Bands | None:
        """The bands that ``selections`` hold together; None where a count and a share would have to be compared."""
        bands = cls()
        for selection in selections:
            if isinstance(selection, Everything):
                bands.first, bands.last = 0, ALL
            elif isinstance(selection, First | Last):
                name = "first" if isinstance(selection, First) else "last"
                held = getattr(bands, name)
                if held not in (0, ALL) and isinstance(held, int) != isinstance(selection.size, int):
                    return None
                if held != ALL:
                    setattr(bands, name, max(held, selection.size))
        return bands

    def arguments(self) -> tuple[int, int, int, int]:
        """(first, its share's bits, last, its share's bits) for a kernel."""
        return (*budget_arguments(self.first), *budget_arguments(self.last))

    def shares(self, which: str = "") -> dict[str, bool]:
        """Which of the two are shares, for a kernel."""
        shares = {"FIRST": isinstance(self.first, float), "LAST": isinstance(self.last, float)}
        return {f"{name}{which}_IS_SHARE": is_share for name, is_share in shares.items()}


def bits_of(share: float) -> int:
    """The bits of a float64, which Triton's float arguments would round."""
    return struct.unpack("<q", struct.pack("<d", share))[0]


def budget_arguments(budget: Budget) -> tuple[int, int]:
    """(count, bits of the float64 share), one of them 0."""
    if isinstance(budget, float):
        return 0, bits_of(budget)
    return min(budget, ALL), 0


@dataclass
class Stack:
    """Bands before and after one scored selection, or bands alone.

    Attributes:
        before: bands that the scored selection does not choose from.
        bands: all bands of the stack.
        scored: the scored selection, or None.
    """

    before: Bands = field(default_factory=Bands)
    bands: Bands = field(default_factory=Bands)
    scored: Best | Mass | None = None


def stack_of(selections: Sequence[Selection | None]) -> Stack | str:
    """The stack, or why the prefill kernels do not cover it."""
    scored = [i for i, selection in enumerate(selections) if not isinstance(selection, First | Last | Everything)]
    if len(scored) > 1:
        return "more than one masker of the stack ranks or samples keys"
    ranked = selections[scored[0]] if scored else None
    if scored and ranked is None:
        return "a masker of the stack is not described"
    bands = Bands.of(selections)
    before = Bands.of(selections[: scored[0]]) if scored else bands
    if bands is None or before is None:
        return "bands of the stack mix counts and shares"
    if not selections:
        bands = Bands.of([Everything()])
        assert bands is not None
    if ranked is not None and not isinstance(ranked, Best | Mass):
        return "a masker of the stack ranks keys by side data"
    return Stack(before, bands, None if bands.last == ALL else ranked)
