"""The exact top-k mask of many rows, one program per row; nothing here waits for the device.

A row lies in registers as integers in the order of its scores. The k-th is found bit by bit from the top, by counting
how many reach a trial cut, and the search ends as soon as exactly k do. Scores that tie at the cut are taken by
position. All of it is integers, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import size_of
from sah_transformers.kernels.decode.stack import bits_of
from sah_transformers.kernels.decode.stack import size_of as size_of_budget
from sah_transformers.kernels.decode.values import sortable
from sah_transformers.rows import dot, scores_of

if TYPE_CHECKING:
    from sah_transformers.attention import Call
    from sah_transformers.budget import Budget

BLOCK_ELEMENTS = 2**28
"""Scores held at once: 1 GiB."""

LEAST_WIDTH = 1024
"""Rows that reach fewer keys have no narrower program of their own: a launch costs more than it saves."""

LOWEST = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["H", "Q", "first", "rows", "held", "sm_b", "sm_h", "size", "share"])
def top_k_kernel(
    scores, previous, mask, out, H, Q, K, first, rows, held, reach, sm_b, sm_h, sm_q, sm_k, size, share, scaling,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PREVIOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``first:first + rows`` of ``out [B, H, Q, K]``, none of which sees a key beyond ``BLOCK``.

    Their scores are the first of ``scores [B, H, held, reach]``.
    """
    i = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i // rows, first + i % rows
    p_scores = scores + (i_bh * held + i % rows) * reach
    row = (i_bh * Q + i_q) * K
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    last = K - Q + i_q.to(tl.int32) if CAUSAL else K - 1 + i_q.to(tl.int32) * 0
    n = tl.maximum(last + 1, 0)
    seen = o_k < n
    if MASKED:
        p_mask = mask + (i_bh // H) * sm_b + (i_bh % H) * sm_h + i_q * sm_q
        seen = seen & (tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=seen, other=0) != 0)
        n = tl.sum(seen.to(tl.int32))
    b_s = tl.load(p_scores + o_k, mask=seen, other=0.0) * scaling
    had = tl.zeros([BLOCK], tl.int1)
    if PREVIOUS:
        had = tl.load(previous + row + o_k, mask=m_k, other=0) != 0
    candidate = seen & (had == 0)
    k = tl.minimum(size_of(n, size, share), tl.sum(candidate.to(tl.int32)))
    b_v = sortable(tl.where(b_s == b_s, b_s, float("-inf")))  # NaN ranks with -inf
    b_v = tl.where(candidate, b_v, LOWEST)
    count = tl.sum((b_v >= 0).to(tl.int32))  # the sign bit weighs the other way round
    cut = tl.where(count >= k, 0, LOWEST)
    count = tl.where(count >= k, count, BLOCK)
    bit = 30
    while (bit >= 0) & (count != k):
        trial = cut + (1 << bit)
        reached = tl.sum((b_v >= trial).to(tl.int32))
        cut = tl.where(reached >= k, trial, cut)
        count = tl.where(reached >= k, reached, count)
        bit -= 1
    taken = candidate & (b_v >= cut)
    if count != k:  # more tie at the cut than there is room for
        tied = candidate & (b_v == cut)
        room = k - (count - tl.sum(tied.to(tl.int32)))
        taken = candidate & ((b_v > cut) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room)))
    tl.store(out + row + o_k, taken | had, mask=m_k)
    for start in range(BLOCK, K, BLOCK):
        p_rest, m_rest = row + start + o_k, start + o_k < K
        b_rest = tl.zeros([BLOCK], tl.int1)
        if PREVIOUS:
            b_rest = tl.load(previous + p_rest, mask=m_rest, other=0) != 0
        tl.store(out + p_rest, b_rest, mask=m_rest)


def widths(call: Call, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, width) of the parts of ``start:stop``: early rows of a causal call reach fewer keys."""
    _, _, rows, total = call.shape
    while start < stop:
        reach = max(16, min(total, LEAST_WIDTH), call.visibility.reach(start + 1))
        width = triton.next_power_of_2(reach)
        last = min(stop, width - (total - rows)) if call.visibility.is_causal else stop
        yield start, last, width
        start = last


def top_k_mask(call: Call, budget: Budget) -> torch.Tensor:
    """What the call starts from, plus the ``budget`` best candidates of each row: bool ``[B, H, Q, K]``."""
    batch, heads, rows, total = call.shape
    context, sight = call.context, call.visibility
    queries, keys = call.queries, call.keys
    out = torch.empty(call.shape, dtype=torch.bool, device=queries.device)
    previous = None if call.previous is None else call.previous.contiguous()
    mask = sight.mask if sight.valid is None else sight.valid[:, None, None]
    mask = None if mask is None else mask.to(out.device).expand(call.shape)
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    size, share = size_of_budget(budget)
    for start, stop in call.blocks(BLOCK_ELEMENTS):
        reach = sight.reach(stop)
        block_queries, block_keys = queries[:, :, start:stop], keys[:, :, :reach]
        if context.softcap is None:  # a pass over the scores less
            scores, scaling = dot(block_queries, block_keys), context.scaling
        else:
            scores, scaling = scores_of(block_queries, block_keys, context), 1.0
        for first, last, width in widths(call, start, stop):
            part = scores[:, :, first - start :]
            top_k_kernel[(batch * heads * (last - first),)](
                part, out if previous is None else previous, out if mask is None else mask, out, heads, rows, total,
                first, last - first, stop - start, reach, *strides, size, bits_of(share), float(scaling),
                CAUSAL=sight.is_causal, MASKED=mask is not None, PREVIOUS=previous is not None, BLOCK=width,
                num_warps=min(32, max(1, width // 512)), enable_fp_fusion=True,
            )  # fmt: skip
            del part
        del scores
    return out
