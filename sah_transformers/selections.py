"""What a masker selects, in words that a kernel understands.

A kernel that realises a whole stack without a dense mask reads these descriptions, never a masker's name. A masker
without a description always takes the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from sah_transformers.budget import Budget


@dataclass(frozen=True)
class First:
    """The first ``size`` visible keys of the row."""

    size: Budget


@dataclass(frozen=True)
class Last:
    """The last ``size`` visible keys of the row."""

    size: Budget


@dataclass(frozen=True)
class Everything:
    """Every visible key."""


@dataclass(frozen=True)
class Best:
    """The ``budget`` candidates with the highest full score; per KV head (summed softmax) if ``group``."""

    budget: Budget
    group: bool


@dataclass(frozen=True)
class Mass:
    """The fewest best candidates that hold ``top_p`` of the softmax mass (``total``: of all visible mass)."""

    top_p: float
    total: bool
    group: bool


@dataclass(frozen=True)
class Pages:
    """All visible keys of the ``ceil(budget / size)`` pages of ``size`` real tokens with the highest bounds, among
    those that hold a candidate, the row's own first; per KV head (summed softmax of the other pages' bounds) if
    ``group``.

    The side data are ``low`` and ``high``, the elementwise bounds of a page's keys.
    """

    budget: Budget
    group: bool
    size: int


@dataclass(frozen=True)
class Estimated:
    """The ``budget`` candidates with the highest estimated score; per KV head by the sum of the heads' scores, or of
    their softmax (``reduce``), if ``group``.

    Attributes:
        estimate: how a score is computed from the side data, by the name that kernels know it under.
        options: numbers that tell estimates of one name apart, as far as they are fixed in the config.
    """

    budget: Budget
    group: bool
    reduce: Literal["softmax", "sum"]
    estimate: str
    options: tuple[tuple[str, float], ...] = ()


Selection = First | Last | Everything | Best | Mass | Pages | Estimated

T = TypeVar("T")


class Described(tuple[Selection | None, ...]):
    """The selections of a stack, in order; what kernels read from them is kept with them.

    Not in a table by value: a budget of 1 (a key) equals one of 1.0 (all keys).
    """

    @cached_property
    def _read(self) -> dict[Any, Any]:
        return {}

    def read(self, reader: Callable[..., T], *given: int) -> T:
        """``reader(self, *given)``, which depends on nothing else, computed once."""
        key = (reader, *given)
        if key not in self._read:
            self._read[key] = reader(self, *given)
        return self._read[key]

    def __reduce__(self) -> Any:
        return type(self), (tuple(self),)
