"""What the decode pipeline hands a scoring kernel, and how programs are cut."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

MOST_ROWS = 4
"""Rows of a program: more would not fit into registers with a tile of keys."""


@dataclass(frozen=True)
class Tile:
    """Keys per tile, tiles per program, warps: a chunk has ``keys * count`` keys."""

    keys: int
    count: int
    warps: int

    @property
    def span(self) -> int:
        return self.keys * self.count


@dataclass(frozen=True)
class Samples:
    """How a row's line is found before there are scores.

    Attributes:
        lines: float32 ``[3, R]``, see `line.py`.
        size: of the selection, as `decode.kernel.budgets` gives sizes.
        count: sampled keys; warps: of a row's program; bins: levels.
    """

    lines: Any
    size: tuple[int, int]
    count: int
    warps: int
    bins: int


@dataclass(frozen=True)
class Levels:
    """Where candidates' levels go, and how rows are cut into programs.

    Attributes:
        lines: float32 ``[3, R]`` that scores are laid on, unless they are whole numbers.
        levels: uint8 ``[R, stride]``, 0 where no candidate is; histogram: int32 ``[R, chunks, bins]``.
        chunk, warps: keys and warps of a program; bins: a power of two above the highest level.
    """

    lines: Any
    levels: Any
    histogram: Any
    chunk: int
    bins: int
    warps: int


@dataclass(frozen=True)
class Edges:
    """Keys that are left to be cut by their scores: ``lists [E, wide]`` from ``longest`` on, as ``cuts [5, E]`` say."""

    cuts: Any
    lists: Any
    wide: int
    longest: int


@dataclass(frozen=True)
class Scoring:
    """One call of a scoring kernel.

    Rows are numbered ``(b, h, q)``; with ``summed`` there is one per KV head, ``(b, g, q)``, which holds the sum of its
    heads' scores, and all arrays of R rows have ``B * G * Q``. Arrays are what `decode.kernel.Scratch` gives: tensors,
    or addresses once kernels are compiled.

    Attributes:
        q: ``[B, H, Q, D]``, the last dimension contiguous; k: ``[B, G, K, D]``, read by PQCache alone, where a sequence
            has no codebook.
        keys, stride: K, and the row length of ``scores``: whole chunks.
        mask, look: bool ``[B|1, Q|1, K]`` (or a stand-in) and its strides, 0 where the dimension is 1.
        limits: of `decode.limits.bounds_kernel`, if ``masked``.
        lines: ``[2, R]``, the brackets; histogram: int32 ``[R, bins]``; aboves: ``[R, chunks]``; unless ``masses_too``.
            ``bins`` 0: neither is touched, and there are peaks alone.
        scores: float32 ``[R, stride]``, -inf where invisible; peaks: ``[R, chunks]``.
        masses: ``[R, chunks]``, of all visible keys, with ``masses_too``.
        bands: sizes of the first and last keys, as `decode.kernel.budgets` gives them.
        coarse: whether scores may be off by the method's ``error``.
    """

    q: torch.Tensor
    k: torch.Tensor
    keys: int
    stride: int
    mask: Any
    look: tuple[int, int, int]
    limits: Any
    lines: Any
    scores: Any
    histogram: Any
    peaks: Any
    aboves: Any
    masses: Any
    scaling: float
    bands: tuple[int, int, int, int]
    causal: bool
    masked: bool
    masses_too: bool
    bins: int
    summed: bool = False
    coarse: bool = False

    def long(self, stride: int) -> Scoring:
        """The call with rows of ``stride``."""
        return replace(self, stride=stride)

    def on(self, s: dict[str, Any], mask: Any, look: tuple[int, int, int]) -> Scoring:
        """The call with its arrays, once their sizes are known: ``limits``, ``peaked``, ``masses``, ``scores``."""
        return replace(
            self, mask=mask, look=look, limits=s["limits"], lines=s["unused"], scores=s["scores"],
            histogram=s["unused"], peaks=s["peaked"], aboves=s["unused"], masses=s["masses"],
        )  # fmt: skip

    @property
    def groups(self) -> int:
        return self.k.shape[1]

    @property
    def rows(self) -> int:
        """Rows of ``q``, R unless ``summed``."""
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2]

    @property
    def in_group(self) -> int:
        """Rows of a KV head."""
        return self.q.shape[2] * (1 if self.summed else self.q.shape[1] // self.groups)

    def arrays(self) -> tuple[Any, ...]:
        """Pointers that every kernel takes."""
        outputs = (self.scores, self.histogram, self.peaks, self.aboves, self.masses)
        return (self.mask, self.limits, self.lines, *outputs)

    def numbers(self, span: int) -> tuple[int, ...]:
        """Integers that every kernel takes; ``span``: keys of a program."""
        return (self.keys, self.q.shape[0], self.stride // 16, self.stride // span, *self.look, *self.bands)

    def line_numbers(self, samples: Samples) -> tuple[int, ...]:
        """Integers that kernels take that find lines."""
        return (self.keys, self.q.shape[0], *self.look, *self.bands, *samples.size)

    def sight(self) -> dict[str, Any]:
        """Compile-time constants that every kernel takes, those of levels and lines too."""
        sizes = {"H": self.q.shape[1], "G": self.groups, "Q": self.q.shape[2]}
        return {**sizes, "CAUSAL": self.causal, "MASKED": self.masked}

    def shape(self) -> dict[str, Any]:
        """Compile-time constants that every kernel of scores takes."""
        return {**self.sight(), "MASSES": int(self.masses_too), "BINS": self.bins}


class Given:
    """What the kernels of a method need beside side data: dataclasses of tensors and numbers, fixed once made."""

    @cached_property
    def traits(self) -> tuple[Any, ...]:
        """What of it tells compiled kernels apart."""
        return tuple(traits_of(getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]


def traits_of(value: Any) -> Any:
    """A value, or of a tensor all but what it holds."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return tuple(map(traits_of, value)) if isinstance(value, tuple) else value


def form_of(t: torch.Tensor) -> tuple[Any, ...]:
    """What of side data ``[B, heads, K, ...]`` tells compiled kernels apart: neither K nor the capacity."""
    shape, strides = t.shape, t.stride()
    far = 16 * shape[-1]
    places = [s if s < far else s % 16 for s in strides[2:]]
    outer = strides[0] % 16, strides[1] % 16
    return t.dtype, shape[1], shape[3:], t.data_ptr() % 16, unit_of(t), *places, *outer, max(strides) < 2**31


def widest(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """``tensor [B, heads, K, width]`` of bytes as the longest words (8, 4, 2, 1 bytes) that hold whole keys' shares."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    for size, dtype in words.items():
        places = (width, tensor.data_ptr(), *tensor.stride()[:3])
        if tensor.stride(3) == 1 and not any(place % size for place in places):
            return tensor.view(dtype)
    return tensor


def unit_of(*tensors: torch.Tensor) -> int:
    """16 where storages hold a multiple of 16 keys, which may then be read in blocks beyond K, else 1.

    ``[B, heads, K, ...]``, the data of a key together, or next to those of its neighbours (``[..., words, capacity]``).
    """
    for t in tensors:
        batch, head, place, *words = t.stride()
        apart = len(words) == 1 and words[0] > place
        block = 16 if apart else 16 * place
        if batch % block or head % block or (apart and words[0] % 16):
            return 1
    return 16


def steps(tensor: torch.Tensor, unit: int) -> tuple[int, int]:
    """The strides over batches and heads, in units."""
    return tensor.stride(0) // unit, tensor.stride(1) // unit
