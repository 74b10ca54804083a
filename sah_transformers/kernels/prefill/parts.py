"""Tiles of queries: how many rows' lists of scores are held at once, and how long they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from sah_transformers.budget import most
from sah_transformers.kernels.prefill.stack import Stack
from sah_transformers.kernels.prefill.tiles import Tiles
from sah_transformers.selections import Mass

if TYPE_CHECKING:
    from sah_transformers.attention import Call

SCRATCH_BYTES = 2**30
"""Lists of scores held at once: queries are taken in tiles of about this many bytes."""

DEVIATIONS = 3.5
"""Half the bracket, in standard deviations of the rank that the sample estimates: 5 rows in 10,000 miss."""

MASS_DEVIATIONS = 3.2
"""The same for a mass: its variance is estimated from above."""

SAMPLE_STRIDE = 32
"""One key of this many is sampled."""

SAMPLE_SHARE = 8
"""One key of this many is sampled of short rows, within the next limits; twice as many where a mass is sought."""

LEAST_SAMPLE, ENOUGH_SAMPLE = 256, 1024
"""A row that the bracket misses costs a program of its own that reads all keys: a larger sample is cheaper."""

ALWAYS_LISTED = 512
"""Where no row has more candidates than this, all are listed, and no bracket is sought. Beside longer rows a row is
that has at most as many as are sampled, or as this."""


@dataclass(frozen=True)
class Part:
    """A tile of queries whose lists fit into the scratch.

    Attributes:
        rows: queries.
        chunks: samples taken for each row, 0 = every row lists all its candidates.
        capacity: length of each of a row's four lists.
        most: rows with at most this many candidates list them all.
    """

    rows: int
    chunks: int
    capacity: int
    most: int

    @classmethod
    def split(cls, call: Call, stack: Stack, ranked: int, tiles: Tiles) -> list[Part]:
        """All queries in tiles; ``ranked``: rankings of a query, over all sequences."""
        parts: list[Part] = []
        start = 0
        while start < call.shape[2]:
            parts.append(cls.of(call, stack, ranked, tiles, start))
            start += parts[-1].rows
        return parts

    @classmethod
    def of(cls, call: Call, stack: Stack, ranked: int, tiles: Tiles, start: int) -> Part:
        """The tile that starts at query ``start``: as many rows as the lists of its last row allow."""
        rows = call.shape[2] - start
        while True:
            seen = call.visibility.reach(start + rows)
            part = cls.sized(rows, seen, stack, tiles)
            fits = SCRATCH_BYTES // (ranked * 16 * part.capacity)
            if rows <= max(fits, 1):
                return part
            block = tiles.emit[0]
            rows = max(fits // block * block, min(rows - 1, block)) if rows > block else max(1, min(fits, rows - 1))

    @classmethod
    def sized(cls, rows: int, seen: int, stack: Stack, tiles: Tiles) -> Part:
        """The lists of rows that see up to ``seen`` keys."""
        scored = stack.scored
        assert scored is not None
        slack = tiles.emit[1] // 4
        if seen <= ALWAYS_LISTED:
            return cls(rows, 0, triton.cdiv(seen, 32) * 8 + 2 * slack, seen)
        sample = tiles.bracket[1]
        least = max(LEAST_SAMPLE, min(ENOUGH_SAMPLE, seen // SAMPLE_SHARE)) * (2 if isinstance(scored, Mass) else 1)
        chunks = max(1, least // sample, min(16, seen // (SAMPLE_STRIDE * sample)))
        if isinstance(scored, Mass):  # for normal scores
            inside = 2 * MASS_DEVIATIONS * math.sqrt((1.12 - scored.top_p) / (chunks * sample)) + 0.04
        else:
            share = min(1.0, most(scored.budget, seen) / seen)
            deviation = math.sqrt(max(share * (1 - share), 1 / sample) / (chunks * sample))
            inside = (2 * DEVIATIONS + 5.0) * deviation + 2 / sample + 0.005
        listed = min(seen, max(min(ALWAYS_LISTED, chunks * sample), int(seen * inside)))
        capacity = triton.cdiv(listed, 128) * 32 + 2 * slack
        return cls(rows, chunks, capacity, min(listed, 4 * (capacity - 2 * slack)))


@dataclass
class Scratch:
    """What the kernels of one tile of queries hand on; see ``emit_kernel``."""

    lows: torch.Tensor
    highs: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    reached: torch.Tensor

    @classmethod
    def empty(cls, parts: list[Part], heads: int, reached: torch.dtype, device: torch.device) -> Scratch:
        """Room for any one of ``parts``."""
        size = heads * max(part.rows for part in parts)
        listed = heads * max(part.rows * part.capacity for part in parts)
        lows, highs = torch.empty((2, size), dtype=torch.float32, device=device)
        counts = torch.empty(4 * size, dtype=torch.int32, device=device)
        lists = torch.empty(4 * listed, dtype=torch.float32, device=device)
        return cls(lows, highs, lists, counts, torch.empty(4 * size, dtype=reached, device=device))
