"""Launches of the prefill kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from sah_transformers.kernels.prefill import parts
from sah_transformers.kernels.prefill.attend import attend_kernel
from sah_transformers.kernels.prefill.bracket import bracket_kernel
from sah_transformers.kernels.prefill.emit import emit_kernel
from sah_transformers.kernels.prefill.select import select_kernel
from sah_transformers.kernels.prefill.settle import settle_kernel
from sah_transformers.kernels.prefill.stack import Stack, budget_arguments
from sah_transformers.kernels.prefill.tiles import FUSION, padded, precision_of, tiles_for

if TYPE_CHECKING:
    from sah_transformers.attention import Call


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
    """The exact cut of every row, without storing Q x K scores.

    ``bracket_kernel`` brackets the k-th score by a sample of the keys, ``emit_kernel`` computes all scores and writes
    those inside, ``select_kernel`` finds the cut among the written, ``settle_kernel`` redoes the few rows whose
    bracket missed. A cut is proven: fewer than k candidates have a score above it, and with the first ``need`` of
    those equal to it there are k.

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
    split = parts.Part.split(call, stack, tiles)
    scratch = parts.Scratch.empty(split, batch * heads, queries.device)
    start = 0
    for part in split:
        if part.chunks:
            block, sample, warps, stages = tiles.bracket
            bracket_kernel[(triton.cdiv(part.rows, block), batch * heads)](
                queries, keys, scratch.lows, scratch.highs, start, part.rows, *where, *budget, part.chunks,
                part.most, parts.DEVIATIONS, **shape, BM=block, BS=sample, STEPS=9, **flags, **ranks,
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
