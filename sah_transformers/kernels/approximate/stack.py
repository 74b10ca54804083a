"""A stack of maskers in the words that these kernels understand: bands, then one selection by side data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sah_transformers.kernels.approximate.methods import METHODS
from sah_transformers.kernels.decode.stack import Stack, read_stack
from sah_transformers.selections import Best, Estimated, Pages, Selection


@dataclass(frozen=True)
class SideStack:
    """The last masker's selection, and the stack with it as far as that of a top-k by exact score has the same."""

    selection: Pages | Estimated
    stack: Stack


def read_side_stack(selections: Sequence[Selection | None]) -> SideStack | str:
    """The stack that ``selections`` describe, or the reason why these kernels cannot realise it."""
    *bands, last = selections or [None]
    if not isinstance(last, Pages | Estimated):
        return "the stack does not end with a selection by side data"
    if isinstance(last, Estimated) and last.estimate not in METHODS:
        return f"there is no kernel for the estimate {last.estimate!r}"
    stack = read_stack([*bands, Best(last.budget, last.group)], 2)
    return stack if isinstance(stack, str) else SideStack(last, stack)
