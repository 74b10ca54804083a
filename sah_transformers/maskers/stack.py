"""A stack of maskers, and what is the same in every call by it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from sah_transformers.maskers.base import Masker
from sah_transformers.selections import Best, Described, First, Last, Mass, Pages


class MaskerStack(tuple[Masker, ...]):
    """Maskers in order. What they say of themselves is asked once: a decode step asks in every layer."""

    @cached_property
    def described(self) -> Described:
        """The maskers' selections in the words that kernels understand."""
        return Described(masker.described for masker in self)

    @cached_property
    def stateful(self) -> tuple[Masker, ...]:
        """Those that keep side data per key."""
        return tuple(masker for masker in self if masker.needs_state)

    @cached_property
    def needs_positions(self) -> bool:
        """Whether one of them reads the keys' positions."""
        return any(masker.needs_positions for masker in self)

    @cached_property
    def in_launches(self) -> int:
        """A number of stacks of these maskers, whose launches depend on no more than the call's tensors and the bounds
        of pages; 0 where they do, or kernels do not know the stack."""
        if not all(isinstance(masker.described, First | Last | Best | Mass | Pages) for masker in self):
            return 0
        same = tuple((type(masker), repr(masker.config.to_dict())) for masker in self)
        return _numbers.setdefault(same, len(_numbers) + 1)

    def __reduce__(self) -> Any:
        return type(self), (tuple(self),)


_numbers: dict[tuple[Any, ...], int] = {}
