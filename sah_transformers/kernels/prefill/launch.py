"""Launches of the prefill kernels: shapes, scratch, tiles of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from sah_transformers.budget import most
from sah_transformers.kernels.prefill.attend import attend_kernel
from sah_transformers.kernels.prefill.stack import Stack, budget_arguments
from sah_transformers.kernels.prefill.threshold import bracket_kernel, emit_kernel, select_kernel, settle_kernel

if TYPE_CHECKING:
    from sah_transformers.attention import Call

SCRATCH_BYTES = 2**30
"""Lists of scores held at once: queries are taken in tiles of about this many bytes."""

DEVIATIONS = 4.0
"""Half the bracket, in standard deviations of the rank that the sample estimates: 6 rows in 100,000 miss."""

SAMPLE_STRIDE = 32
"""One key of this many is sampled."""

LEAST_SAMPLE = 512
"""Keys that are sampled at least, where a sample is that large for the dtype."""

ALWAYS_LISTED = 1024
"""Rows with at most this many candidates list them all."""


FUSION = {"enable_fp_fusion": True}
"""Triton's default differs between its versions."""


@dataclass(frozen=True)
class Tiles:
    """Block shapes of the kernels for one dtype and head dimension.

    Attributes:
        attend, emit, bracket: rows, keys per tile, warps, stages (``bracket``: keys per sample).
        settle: rows, keys per tile, warps, pivots per pass.
    """

    attend: tuple[int, int, int, int]
    emit: tuple[int, int, int, int]
    bracket: tuple[int, int, int, int]
    settle: tuple[int, int, int, int]


def tiles_for(dtype: torch.dtype, dim: int) -> Tiles:
    """Block shapes, measured on an H100 for 16-bit numbers and ``dim`` 128, the larger head dimension padded."""
    if dtype == torch.float32:
        keys, sample = (32, 128) if dim <= 128 else (16, 64)
        return Tiles((32, keys, 4, 2), (32, 32, 4, 2), (32, sample, 4, 1), (16, 16, 4, 16))
    if dim <= 64:
        return Tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 256, 4, 1), (16, 64, 8, 16))
    if dim <= 128:
        return Tiles((64, 64, 4, 3), (64, 64, 4, 3), (64, 256, 4, 1), (16, 64, 8, 16))
    return Tiles((128, 64, 8, 2), (128, 64, 8, 2), (64, 256, 4, 1), (16, 64, 8, 16))


def padded(dim: int) -> int:
    """The width of a tile that holds ``dim`` columns."""
    return max(16, triton.next_power_of_2(dim))


def precision_of(tensor: torch.Tensor) -> str:
    """``input_precision`` of a product: float32 must be exact."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def launch(call: Call, stack: Stack, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Attention ``[B, Q, H, Dv]`` of ``call``."""
    queries, keys, values = (last_dim_dense(t) for t in (call.queries, call.keys, call.values))
    batch, heads, rows, total = call.shape
    dim, value_dim = queries.shape[-1], values.shape[-1]
    width, value_width = padded(dim), padded(value_dim)
    block, step, warps, stages = tiles_for(queries.dtype, max(width, value_width)).attend
    out = queries.new_empty(batch, rows, heads, value_dim)
    tiles = triton.cdiv(rows, block)
    cuts = needs = tied = out  # not read without a cut
    if stack.best is not None:
        cuts, needs, tied = find_cuts(call, stack, queries, keys, block)
    softcap = call.context.softcap
    arguments: Any = (
        queries, keys, values, out, cuts, needs, tied, out if call.sinks is None else call.sinks.contiguous(),
        out if counts is None else counts,
        heads, rows, total, heads // keys.shape[1], *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        out.stride(0), out.stride(2), out.stride(1), *stack.bands.arguments(), *stack.before.arguments(),
        call.min_keys, float(call.context.scaling), float(softcap or 1.0),
    )  # fmt: skip
    attend_kernel[(tiles, batch * heads)](
        *arguments,
        D=dim,
        DV=value_dim,
        BD=width,
        BV=value_width,
        BM=block,
        BN=step,
        CAUSAL=call.visibility.is_causal,
        **stack.bands.shares(),
        **stack.before.shares("_BEFORE"),
        CUT=stack.best is not None,
        SOFTCAP=softcap is not None,
        SINKS=call.sinks is not None,
        COUNT=counts is not None,
        PRECISION=precision_of(queries),
        num_warps=warps,
        num_stages=stages,
        **FUSION,
    )
    return out


def last_dim_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with stride 1 in its last dimension."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def find_cuts(
    call: Call, stack: Stack, queries: torch.Tensor, keys: torch.Tensor, attend_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The exact cut of every row.

    Returns:
        cuts float32 and needs int32 ``[B, H, Q]`` (how many keys equal to the cut a row takes), and int32
        ``[B, H, tiles]``: which tiles of ``attend_rows`` rows do not take all of them.
    """
    assert stack.best is not None
    batch, heads, rows, total = call.shape
    width = padded(queries.shape[-1])
    tiles = tiles_for(queries.dtype, width)
    attend_tiles = triton.cdiv(rows, attend_rows)
    cuts = queries.new_empty(batch, heads, rows, dtype=torch.float32)
    needs, queue = (torch.empty(batch, heads, rows, dtype=torch.int32, device=queries.device) for _ in range(2))
    zeros = torch.zeros(batch * heads * (attend_tiles + 1), dtype=torch.int32, device=queries.device)
    tied, waiting = zeros[batch * heads :], zeros[: batch * heads]
    where: Any = (
        heads, rows, total, heads // keys.shape[1], *queries.stride()[:3], *keys.stride()[:3],
        *stack.before.arguments(),
    )  # fmt: skip
    budget = budget_arguments(stack.best.budget)
    flags: dict[str, Any] = {"CAUSAL": call.visibility.is_causal, **stack.before.shares()}
    ranks: dict[str, Any] = {"BUDGET_IS_SHARE": isinstance(stack.best.budget, float)}
    shape: dict[str, Any] = {"D": queries.shape[-1], "BD": width, "PRECISION": precision_of(queries)}
    parts = Part.split(call, stack, tiles)
    scratch = Scratch.empty(parts, batch * heads, queries.device)
    start = 0
    for part in parts:
        if part.chunks:
            block, sample, warps, stages = tiles.bracket
            bracket_kernel[(triton.cdiv(part.rows, block), batch * heads)](
                queries, keys, scratch.lows, scratch.highs, start, part.rows, *where, *budget, part.chunks,
                part.most, DEVIATIONS, **shape, BM=block, BS=sample, STEPS=9, **flags, **ranks,
                num_warps=warps, num_stages=stages, **FUSION,
            )  # fmt: skip
        block, step, warps, stages = tiles.emit
        emit_kernel[(triton.cdiv(part.rows, block), batch * heads)](
            queries, keys, scratch.lows, scratch.highs, scratch.lists, scratch.counts, scratch.reached, start,
            part.rows, *where, part.capacity, **shape, BM=block, BN=step, **flags, BRACKET=part.chunks > 0,
            ASM=queries.is_cuda, num_warps=warps, num_stages=stages, **FUSION,
        )  # fmt: skip
        listed = max(64, triton.next_power_of_2(part.capacity))
        select_kernel[(part.rows, batch * heads)](
            scratch.lows, scratch.highs, scratch.lists, scratch.counts, scratch.reached, cuts, needs, tied, waiting,
            queue, start, part.rows, rows, total, *stack.before.arguments(), *budget, part.capacity, attend_tiles,
            BC=listed, TILE=attend_rows, **flags, **ranks, BRACKET=part.chunks > 0,
            num_warps=min(8, max(1, listed // 256)), num_stages=1, **FUSION,
        )  # fmt: skip
        start += part.rows
    block, step, warps, pivots = tiles.settle
    settle_kernel[(triton.cdiv(rows, block), batch * heads)](
        queries, keys, cuts, needs, tied, waiting, queue, *where, *budget, attend_tiles, **shape, BM=block, BN=step,
        PIVOTS=pivots, TILE=attend_rows, **flags, **ranks, num_warps=warps, num_stages=2,
        **FUSION,
    )  # fmt: skip
    return cuts, needs, tied


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
    def split(cls, call: Call, stack: Stack, tiles: Tiles) -> list[Part]:
        """All queries in tiles."""
        parts: list[Part] = []
        start = 0
        while start < call.shape[2]:
            parts.append(cls.of(call, stack, tiles, start))
            start += parts[-1].rows
        return parts

    @classmethod
    def of(cls, call: Call, stack: Stack, tiles: Tiles, start: int) -> Part:
        """The tile that starts at query ``start``: as many rows as the lists of its last row allow."""
        batch, heads, queries, keys = call.shape
        rows = queries - start
        while True:
            seen = call.visibility.reach(start + rows)
            part = cls.sized(rows, seen, stack, tiles)
            fits = SCRATCH_BYTES // (batch * heads * 16 * part.capacity)
            if rows <= max(fits, 1):
                return part
            block = tiles.emit[0]
            rows = max(fits // block * block, min(rows - 1, block)) if rows > block else max(1, min(fits, rows - 1))

    @classmethod
    def sized(cls, rows: int, seen: int, stack: Stack, tiles: Tiles) -> Part:
        """The lists of rows that see up to ``seen`` keys."""
        assert stack.best is not None
        slack = tiles.emit[1] // 4
        if seen <= ALWAYS_LISTED:
            return cls(rows, 0, triton.cdiv(seen, 32) * 8 + 2 * slack, seen)
        sample = tiles.bracket[1]
        chunks = max(1, LEAST_SAMPLE // sample, min(16, seen // (SAMPLE_STRIDE * sample)))
        share = min(1.0, most(stack.best.budget, seen) / seen)
        deviation = math.sqrt(max(share * (1 - share), 1 / sample) / (chunks * sample))
        inside = (2 * DEVIATIONS + 5.0) * deviation + 2 / sample + 0.005
        listed = min(seen, max(ALWAYS_LISTED, int(seen * inside)))
        capacity = triton.cdiv(listed, 128) * 32 + slack
        return cls(rows, chunks, capacity, min(listed, 4 * (capacity - 2 * slack)))


@dataclass
class Scratch:
    """What the kernels of one tile of queries hand on; see ``threshold``."""

    lows: torch.Tensor
    highs: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    reached: torch.Tensor

    @classmethod
    def empty(cls, parts: list[Part], heads: int, device: torch.device) -> Scratch:
        """Room for any one of ``parts``."""
        size = heads * max(part.rows for part in parts)
        listed = heads * max(part.rows * part.capacity for part in parts)
        lows, highs = torch.empty((2, size), dtype=torch.float32, device=device)
        counts, reached = torch.empty((2, 4 * size), dtype=torch.int32, device=device)
        lists = torch.empty(4 * listed, dtype=torch.float32, device=device)
        return cls(lows, highs, lists, counts, reached)
