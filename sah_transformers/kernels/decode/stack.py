"""A stack of maskers in the words that the decode kernels understand."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sah_transformers.budget import Budget
from sah_transformers.selections import Best, First, Last, Mass, Selection

MANY = 2**30

Size = tuple[int, float]
"""A budget as the kernels compute it: ``max(number, int(n * share))`` keys, at most ``n``."""

NO_KEYS: Size = (0, 0.0)
ALL_KEYS: Size = (0, 1.0)


@dataclass(frozen=True)
class Stack:
    """First and last keys, then at most one selection by score.

    Attributes:
        first, last: sizes of the bands.
        kind: ``"bands"``, ``"best"`` of each head, best of each ``"group"``, ``"mass"`` of each head.
        size: keys to take by score ("best", "group").
        top_p, total: share of the mass to hold, and whether of all visible mass ("mass").
    """

    first: Size = NO_KEYS
    last: Size = NO_KEYS
    kind: Literal["bands", "best", "group", "mass"] = "bands"
    size: Size = NO_KEYS
    top_p: float = 0.0
    total: bool = False


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def size_of(budget: Budget) -> Size:
    return (min(budget, MANY), 0.0) if isinstance(budget, int) else (1, budget)


def _larger(a: Size, b: Size) -> Size:
    return max(a[0], b[0]), max(a[1], b[1])


def bits_of(share: float) -> int:
    """The bits of a float64, which Triton's float arguments would round."""
    return struct.unpack("<q", struct.pack("<d", share))[0]


def read_stack(selections: Iterable[Selection | None], group_size: int) -> Stack | str:
    """The stack that ``selections`` describe (none: all keys), or why the decode kernels cannot realise it."""
    first, last, empty = NO_KEYS, NO_KEYS, True
    scored: Best | Mass | None = None
    for selection in selections:
        empty = False
        if scored is not None:
            return "a masker follows one that selects by score"
        if isinstance(selection, First):
            first = _larger(first, size_of(selection.size))
        elif isinstance(selection, Last):
            last = _larger(last, size_of(selection.size))
        elif isinstance(selection, Best | Mass):
            scored = selection
        else:
            return "the stack has a masker that is no sink, no window and no selection by exact score"
    if isinstance(scored, Best):
        kind: Literal["group", "best"] = "group" if scored.group and group_size > 1 else "best"
        return Stack(first, last, kind, size_of(scored.budget))
    if isinstance(scored, Mass):
        if scored.group and group_size > 1:
            return "top-p is selected per KV head"
        if not 1e-3 <= scored.top_p < 1.0:
            return f"top_p is {scored.top_p!r}, outside [0.001, 1)"
        return Stack(first, last, "mass", NO_KEYS, scored.top_p, scored.total)
    if first == last == NO_KEYS and not empty:
        return "the windows are empty"
    return Stack(ALL_KEYS if empty else first, last)
