"""Launches of the prefill kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from sah_transformers.kernels.prefill import parts
from sah_transformers.kernels.prefill.attend import attend_kernel
from sah_transformers.kernels.prefill.bracket import bracket_kernel, bracket_mass_kernel
from sah_transformers.kernels.prefill.emit import emit_kernel
from sah_transformers.kernels.prefill.limits import FIELDS, limits_kernel
from sah_transformers.kernels.prefill.mass import mass_kernel
from sah_transformers.kernels.prefill.select import select_kernel
from sah_transformers.kernels.prefill.select_mass import select_mass_kernel
from sah_transformers.kernels.prefill.settle import settle_kernel
from sah_transformers.kernels.prefill.stack import Stack, bits_of, budget_arguments
from sah_transformers.kernels.prefill.tiles import FUSION, padded, precision_of, shared_of, tiles_for
from sah_transformers.kernels.select.reference import REACHED
from sah_transformers.selections import Best, Mass

if TYPE_CHECKING:
    from sah_transformers.attention import Call

FEW_PROGRAMS = 64
"""So few programs of the last kernel wait for loads more than they compute: their tiles are narrow."""

SETTLE_PROGRAMS = 1024
"""Programs to aim for that look for rows which a bracket missed."""

SELECT_WIDTH = 512
"""Scores of a quarter row's list per warp of the kernels that find the cut in the lists."""


def launch(call: Call, stack: Stack, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Attention ``[B, Q, H, Dv]`` of ``call``."""
    queries, keys, values = (last_dim_dense(t) for t in (call.queries, call.keys, call.values))
    batch, heads, rows, total = call.shape
    dim, value_dim = queries.shape[-1], values.shape[-1]
    width, value_width = padded(dim), padded(value_dim)
    block, step, warps, stages = tiles_for(queries.dtype, max(width, value_width), shared_of(queries.device)).attend
    out = queries.new_empty(batch, rows, heads, value_dim)
    ranks = Ranks.of(call, stack)
    tiles = triton.cdiv(rows, block // ranks.heads)
    if tiles * batch * ranks.rows <= FEW_PROGRAMS:
        step = min(step, 32)
    cuts = needs = tied = totals = out  # not read without a cut
    sight = Sight.of(call, stack, queries)
    if stack.scored is not None:
        cuts, needs, tied, totals = find_cuts(call, stack, queries, keys, sight, ranks, block // ranks.heads)
    softcap = call.context.softcap
    arguments: Any = (
        queries, keys, values, out, cuts, needs, tied, out if call.sinks is None else call.sinks.contiguous(),
        out if counts is None else counts, *sight.tensors,
        ranks.rows, rows, total, heads // keys.shape[1], *sight.strides, *queries.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3],
        out.stride(0), out.stride(2), out.stride(1), *stack.bands.arguments(), *stack.before.arguments(),
        call.min_keys, float(call.context.scaling), float(softcap or 1.0), totals,
    )  # fmt: skip
    attend_kernel[(tiles, batch * ranks.rows)](
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
        CUT=stack.scored is not None,
        MASKED=sight.masked,
        HEADS=ranks.heads,
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


@dataclass
class Ranks:
    """What ranks keys: every query head, or every KV head by the sum over its query heads.

    Attributes:
        rows: how many rankings a query has in a sequence, H or G.
        heads: heads that rank together, as a power of two.
    """

    rows: int
    heads: int

    @classmethod
    def of(cls, call: Call, stack: Stack) -> Ranks:
        """Those of a stack's scored selection."""
        heads, groups = call.shape[1], call.keys.shape[1]
        if stack.scored is None or not stack.scored.group or heads == groups:
            return cls(heads, 1)
        return cls(groups, triton.next_power_of_2(heads // groups))


@dataclass
class Sight:
    """What the kernels read of a mask.

    Attributes:
        masked: whether there is one; without it nothing of the rest is read.
        tensors: the mask, uint8 ``[B|1, Q, K]``, and what ``limits_kernel`` found in it.
        strides: of the mask over batch and query, of the limits over batch.
    """

    masked: bool
    tensors: tuple[torch.Tensor, torch.Tensor]
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, call: Call, stack: Stack, unread: torch.Tensor) -> Sight:
        """The mask of a call and its limits; ``unread`` stands in where there is none."""
        visibility = call.visibility
        if visibility.is_prefix():
            return cls(False, (unread, unread), (0, 0, 0))
        if visibility.valid is not None:
            mask = visibility.valid[:, None].expand(-1, call.shape[2], -1)
        else:
            assert visibility.mask is not None
            mask = visibility.mask[:, 0]
        mask = last_dim_dense(mask).view(torch.uint8)
        batch, rows, total = mask.shape
        limits = torch.empty(batch, FIELDS, rows, dtype=torch.int32, device=mask.device)
        limits_kernel[(rows, batch)](
            mask, limits, mask.stride(0), mask.stride(1), rows, total, *stack.bands.arguments(),
            *stack.before.arguments(), CAUSAL=visibility.is_causal, **stack.bands.shares(),
            **stack.before.shares("_BEFORE"), BLOCK=min(4096, triton.next_power_of_2(total)), num_warps=4,
            num_stages=1, **FUSION,
        )  # fmt: skip
        if batch == 1:
            return cls(True, (mask, limits), (0, mask.stride(1), 0))
        return cls(True, (mask, limits), (mask.stride(0), mask.stride(1), FIELDS * rows))


def find_cuts(
    call: Call, stack: Stack, queries: torch.Tensor, keys: torch.Tensor, sight: Sight, ranks: Ranks, attend_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The exact cut of every row (of ``ranks``, as all that is said of rows here), without storing Q x K scores.

    ``bracket_kernel`` brackets the k-th score by a sample of the keys, ``emit_kernel`` computes all scores and writes
    those inside, ``select_kernel`` finds the cut among the written, ``settle_kernel`` redoes the few rows whose
    bracket missed. A cut is proven: fewer than k candidates have a score above it, and with the first ``need`` of
    those equal to it there are k.

    Returns:
        cuts float32 and needs int32 ``[B, H or G, Q]`` (how many keys equal to the cut a row takes), int32
        ``[B, H or G, tiles]``: which tiles of ``attend_rows`` rows do not take all of them, and, where KV heads rank,
        log2 of the mass that each row of a query head sees, float32 ``[B, H, Q]`` at least.
    """
    assert stack.scored is not None
    batch, heads, rows, total = call.shape
    ranked, stacked = batch * ranks.rows, ranks.heads
    width = padded(queries.shape[-1])
    tiles = tiles_for(queries.dtype, width, shared_of(queries.device))
    attend_tiles = triton.cdiv(rows, attend_rows)
    cuts = queries.new_empty(batch, ranks.rows, rows, dtype=torch.float32)
    needs, queue = (torch.empty(batch, ranks.rows, rows, dtype=torch.int32, device=queries.device) for _ in range(2))
    zeros = torch.zeros(ranked * (attend_tiles + 1), dtype=torch.int32, device=queries.device)
    tied, waiting = zeros[ranked:], zeros[:ranked]
    place: Any = (
        rows, total, heads // keys.shape[1], *sight.strides, *queries.stride()[:3], *keys.stride()[:3],
        *stack.before.arguments(),
    )  # fmt: skip
    where: Any = (ranks.rows, *place)
    softcap = call.context.softcap
    logits: Any = (float(call.context.scaling), float(softcap or 1.0))
    flags: dict[str, Any] = {
        "CAUSAL": call.visibility.is_causal, "MASKED": sight.masked, **stack.before.shares()
    }  # fmt: skip
    capped: dict[str, Any] = {"SOFTCAP": softcap is not None}
    summed: dict[str, Any] = {"HEADS": stacked, **capped}
    shape: dict[str, Any] = {"D": queries.shape[-1], "BD": width, "PRECISION": precision_of(queries)}
    mass = stack.scored if isinstance(stack.scored, Mass) else None
    stats = totals = cuts  # not read where no masses are needed
    if mass or stacked > 1:
        stats = torch.empty(3, batch, heads, rows, dtype=torch.float32, device=queries.device)
        block, step, warps, stages = tiles.emit
        mass_kernel[(triton.cdiv(rows, block), batch * heads)](
            queries, keys, stats, *sight.tensors, heads, *place, bits_of(mass.top_p - REACHED if mass else 0.0),
            *logits, **shape, BM=block, BN=step, **flags, TOTAL=stacked > 1 or (mass is not None and mass.total),
            **capped, SHARE=stacked > 1, num_warps=warps, num_stages=stages, **FUSION,
        )  # fmt: skip
    if stacked > 1:
        totals = stats
        stats = group_stats(totals[1], keys.shape[1], mass) if mass else cuts
    budget, budgets = (0, 0), {"BUDGET_IS_SHARE": False}
    if isinstance(stack.scored, Best):
        budget = budget_arguments(stack.scored.budget)
        budgets = {"BUDGET_IS_SHARE": isinstance(stack.scored.budget, float)}
    split = parts.Part.split(call, stack, ranked, tiles)
    scratch = parts.Scratch.empty(split, ranked, torch.float32 if mass else torch.int32, queries.device)
    start = 0
    for part in split:
        block, sample, warps, stages = tiles.masked_bracket if sight.masked else tiles.bracket
        grid = (triton.cdiv(part.rows, block // stacked), ranked)
        if part.chunks and mass:
            bracket_mass_kernel[grid](
                queries, keys, stats, scratch.lows, scratch.highs, *sight.tensors, start, part.rows, *where,
                part.chunks, part.most, parts.MASS_DEVIATIONS, *logits, totals, **shape, BM=block, BS=sample,
                STEPS=9, **flags, **summed, num_warps=warps, num_stages=stages, **FUSION,
            )  # fmt: skip
        elif part.chunks:
            bracket_kernel[grid](
                queries, keys, scratch.lows, scratch.highs, *sight.tensors, start, part.rows, *where, *budget,
                part.chunks, part.most, parts.DEVIATIONS, totals, *logits, **shape, BM=block, BS=sample, STEPS=9,
                **flags, **budgets, **summed, num_warps=warps, num_stages=stages, **FUSION,
            )  # fmt: skip
        block, step, warps, stages = tiles.emit
        emit_kernel[(triton.cdiv(part.rows, block // stacked), ranked)](
            queries, keys, scratch.lows, scratch.highs, stats, scratch.lists, scratch.counts, scratch.reached,
            *sight.tensors, start, part.rows, *where, part.capacity, *logits, totals, **shape, BM=block, BN=step,
            **flags, BRACKET=part.chunks > 0, MASS=mass is not None, **summed, ASM=queries.is_cuda, num_warps=warps,
            num_stages=stages, **FUSION,
        )  # fmt: skip
        listed = max(64, triton.next_power_of_2(part.capacity))
        lists: Any = (scratch.lows, scratch.highs, scratch.lists, scratch.counts, scratch.reached)
        seen: Any = (sight.tensors[1], start, part.rows, ranks.rows, rows, total, sight.strides[2])
        options: Any = {
            **flags, "BC": listed, "BRACKET": part.chunks > 0, "num_warps": min(8, max(1, listed // SELECT_WIDTH)),
            "num_stages": 1, **FUSION,
        }  # fmt: skip
        if mass:
            select_mass_kernel[(part.rows, ranked)](
                *lists, stats, cuts, needs, waiting, queue, *seen, *stack.before.arguments(), part.capacity, *logits,
                **summed, **options,
            )  # fmt: skip
        else:
            select_kernel[(part.rows, ranked)](
                *lists, cuts, needs, tied, waiting, queue, *seen, *stack.before.arguments(), *budget, part.capacity,
                attend_tiles, TILE=attend_rows, **budgets, **options,
            )  # fmt: skip
        start += part.rows
    if mass is None and not any(part.chunks for part in split):  # all candidates were listed: no row can be left
        return cuts, needs, tied, totals
    block, step, warps, pivots = tiles.settle
    block = max(block, stacked)
    programs = min(triton.cdiv(rows, block // stacked), max(1, SETTLE_PROGRAMS // ranked))
    settle_kernel[(programs, ranked)](
        queries, keys, stats, cuts, needs, tied, waiting, queue, *sight.tensors, *where, *budget, attend_tiles,
        *logits, totals, **shape, BM=block, BN=step, PIVOTS=pivots, TILE=attend_rows, **flags, **budgets,
        MASS=mass is not None, **summed, num_warps=warps, num_stages=2, **FUSION,
    )  # fmt: skip
    return cuts, needs, tied, totals


def group_stats(shares: torch.Tensor, groups: int, mass: Mass) -> torch.Tensor:
    """What ``mass_kernel`` finds, for KV heads: ``[3, B, G, Q]`` (the first unread) from ``shares`` ``[B, H, Q]``."""
    shares = shares.unflatten(1, (groups, -1))
    free, target = shares.sum(2), mass.top_p - REACHED
    goal = target * free - (1.0 - target) * (shares.shape[2] - free) if mass.total else target * free
    return torch.stack([free, goal, free - goal])
