"""What a masker selects, in words that a kernel understands.

A kernel that realises a whole stack without a dense mask reads these descriptions, never a masker's name. A masker
without a description always takes the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

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


Selection = First | Last | Everything | Best | Mass
