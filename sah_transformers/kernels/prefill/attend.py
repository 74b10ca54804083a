"""Triton: one flash pass over the bands of each row and the keys above its cut."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.group import (
    each_head,
    kv_head,
    load_queries,
    load_totals,
    ranking,
    tile_rows,
)
from sah_transformers.kernels.prefill.rows import (
    LOWEST,
    load_columns,
    logits,
    mask_rows,
    products,
    row_limits,
    shown,
)


@triton.jit
def attend_tiles(
    b_acc, b_m, b_l, b_kept, b_seen, b_q, b_total, p_k, p_v, p_mask, b_holes, b_begin, b_end, b_stop, b_start, b_cut,
    b_need, b_from, b_to, tie, i_first, i_last, K, stride_k, stride_v, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    CUT: tl.constexpr, TIES: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the tiles of keys from ``i_first`` to ``i_last`` into the running softmax.

    EDGE tiles may hold ends of bands or of what is visible; all keys of the others are candidates of every row.
    TIES: of the candidates ``[from, to)`` equal to its cut a row takes the first ``need``, ``seen`` were met before.
    Where ``tie`` is 0 a row takes all of them.
    """
    o_n = tl.arange(0, BN)
    o_v = tl.arange(0, BV)
    STAGES: tl.constexpr = 2 if EDGE and MASKED else None  # room for the mask, or one program less fits beside another
    for i_n in tl.range(i_first, i_last, BN, num_stages=STAGES):
        i_n = tl.multiple_of(i_n, BN)
        o_k = i_n + o_n
        b_k = load_columns(p_k, o_n, i_n, K, stride_k, D, BD, EDGE)
        b_s = products(b_q, b_k, PRECISION)
        b_r = ranking(b_s, b_total, scale, softcap, HEADS, SOFTCAP)
        if EDGE:
            m_k = shown(p_mask, o_k, b_begin, b_end, b_holes, MASKED)
        if CUT:
            if TIES:
                equal = (b_r == b_cut[:, None]) & (o_k[None, :] >= b_from[:, None]) & (o_k[None, :] < b_to[:, None])
                if EDGE:
                    equal = equal & m_k
                b_met = b_seen + tl.sum(equal.to(tl.int32), 1)
                keep = (b_r > b_cut[:, None]) | (equal & (b_met <= b_need)[:, None])
                m_split = (b_seen < b_need) & (b_met > b_need)
                if tie != 0:  # no branch on the rows: Triton 3.6 cannot reduce a reduced product on Blackwell
                    b_few, b_enough = b_need * 0 + i_n - 1, b_need * 0 + i_n + BN - 1  # keys up to few: too few
                    step = i_n * 0 + BN  # halved to 1
                    while step > 1:
                        b_half = (b_few + b_enough) // 2
                        b_rank = b_seen + tl.sum((equal & (o_k[None, :] <= b_half[:, None])).to(tl.int32), 1)
                        b_few = tl.where(b_rank < b_need, b_half, b_few)
                        b_enough = tl.where(b_rank < b_need, b_enough, b_half)
                        step //= 2
                    keep = keep | (equal & (m_split[:, None] & (o_k[None, :] <= b_enough[:, None])))
                b_seen = b_met
            else:
                keep = b_r >= b_cut[:, None]
            if EDGE:
                keep = keep | (o_k[None, :] < b_stop[:, None]) | (o_k[None, :] >= b_start[:, None])
                keep = keep & m_k
        else:
            keep = (o_k[None, :] < b_stop[:, None]) | (o_k[None, :] >= b_start[:, None])
            keep = keep & m_k
        m_x = keep
        if HEADS > 1:
            m_x = each_head(keep, HEADS)
        b_x = tl.where(m_x, b_s if not SOFTCAP else logits(b_s, scale, softcap, SOFTCAP), float("-inf"))
        if SOFTCAP:
            b_new = tl.maximum(b_m, tl.max(b_x, 1))
            b_p = tl.exp2(b_x - b_new[:, None])
        else:
            factor = scale * 1.4426950408889634
            b_new = tl.maximum(b_m, tl.max(b_x, 1) * factor)
            b_p = tl.exp2(b_x * factor - b_new[:, None])
        b_alpha = tl.exp2(b_m - b_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        p = p_v + tl.cast(i_n, tl.int64) * stride_v + (o_n[:, None] * stride_v + o_v[None, :])
        if EDGE:
            b_v = tl.load(p, mask=(o_k < K)[:, None] & (o_v < DV)[None, :], other=0.0)
        elif DV != BV:
            b_v = tl.load(p, mask=(o_v < DV)[None, :], other=0.0)
        else:
            b_v = tl.load(p)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_m = b_new
        if COUNT:
            b_kept += tl.sum(keep.to(tl.int32), 1)
    return b_acc, b_m, b_l, b_kept, b_seen


@triton.jit
def attend_kernel(
    q, k, v, out, cuts, needs, tied, sinks, counts, mask, limits,
    H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    stride_vb, stride_vg, stride_vk,
    stride_ob, stride_oh, stride_oq, first, first_bits, last, last_bits, first_before, first_bits_before, last_before,
    last_bits_before, min_keys, scale, softcap, totals,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr,
    FIRST_BEFORE_IS_SHARE: tl.constexpr, LAST_BEFORE_IS_SHARE: tl.constexpr, CUT: tl.constexpr,
    MASKED: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head, or with HEADS of one KV head, which then counts as the head.

    With CUT a key outside the bands is kept when ``q·k > cut``, or ``== cut`` and it is one of the first ``need`` such
    keys outside the bands before the scored masker; ``tied`` says which tiles of rows need to look at that at all.
    Rows that see fewer than ``min_keys`` keys are dense.
    """
    tiles = tl.num_programs(0)
    i_q = tiles - 1 - tl.program_id(0)  # the longest rows first
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_g = kv_head(i_h, group, HEADS)
    BQ: tl.constexpr = BM // HEADS
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < Q
    p_k = k + i_b * stride_kb + i_g * stride_kg
    p_v = v + i_b * stride_vb + i_g * stride_vg
    b_q = load_queries(q, stride_qb, stride_qh, stride_qq, o_q, m_q, i_b, i_h, group, D, BD, HEADS)
    b_total = load_totals(totals, o_q, m_q, i_bh, group, Q, HEADS)
    b_n, b_begin, b_end, b_stop, b_start = row_limits(
        limits, stride_l, i_b, o_q, m_q, Q, K, first, first_bits, last, last_bits, 3, MASKED, CAUSAL,
        FIRST_IS_SHARE, LAST_IS_SHARE,
    )  # fmt: skip
    p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
    b_holes = b_end - b_begin > b_n
    b_stop = tl.where(b_n < min_keys, b_end, b_stop)
    b_start = tl.maximum(b_start, b_stop)
    b_acc = tl.zeros([BM, BV], tl.float32)
    b_m = tl.full([BM], LOWEST, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_kept = tl.zeros([BQ], tl.int32)
    begin, end = 0, tl.max(b_end, 0)
    head = tl.minimum(tl.cdiv(tl.max(b_stop, 0), BN) * BN, end)
    if MASKED:
        begin = tl.minimum(tl.min(tl.where(b_n > 0, b_begin, 2147483647), 0), end) // BN * BN
        if CUT:
            head = tl.where(tl.max(b_holes.to(tl.int32), 0) > 0, end, head)  # masks are read in tiles at the edge
    tail = tl.min(tl.where(m_q, b_start, 2147483647), 0) // BN * BN
    tail = tl.maximum(tail, tl.cdiv(head, BN) * BN)
    b_cut = tl.zeros([BQ], tl.float32)
    b_need = tl.zeros([BQ], tl.int32)
    b_seen = tl.zeros([BQ], tl.int32)
    b_from, b_to = b_stop, b_start
    tie = 0
    if CUT:
        _, _, _, b_from, b_to = row_limits(
            limits, stride_l, i_b, o_q, m_q, Q, K, first_before, first_bits_before, last_before, last_bits_before, 5,
            MASKED, CAUSAL, FIRST_BEFORE_IS_SHARE, LAST_BEFORE_IS_SHARE,
        )  # fmt: skip
        b_cut = tl.load(cuts + i_bh * Q + o_q, mask=m_q, other=float("-inf"))
        b_need = tl.load(needs + i_bh * Q + o_q, mask=m_q, other=0)
        tie = tl.load(tied + i_bh * tiles + i_q)
    b_acc, b_m, b_l, b_kept, b_seen = attend_tiles(
        b_acc, b_m, b_l, b_kept, b_seen, b_q, b_total, p_k, p_v, p_mask, b_holes, b_begin, b_end, b_stop, b_start,
        b_cut, b_need, b_from, b_to, tie, begin, head, K, stride_kk, stride_vk, scale, softcap, D, DV, BD, BV, BN,
        True, CUT, CUT, MASKED, HEADS, SOFTCAP, COUNT, PRECISION,
    )  # fmt: skip
    if CUT:
        middle = tl.cdiv(head, BN) * BN
        plain = tl.where(tie == 0, tail, middle)  # a tile of rows without ties skips the second loop
        b_acc, b_m, b_l, b_kept, b_seen = attend_tiles(
            b_acc, b_m, b_l, b_kept, b_seen, b_q, b_total, p_k, p_v, p_mask, b_holes, b_begin, b_end, b_stop, b_start,
            b_cut, b_need, b_from, b_to, tie, middle, plain, K, stride_kk, stride_vk, scale, softcap, D, DV, BD, BV, BN,
            False, True, False, MASKED, HEADS, SOFTCAP, COUNT, PRECISION,
        )  # fmt: skip
        b_acc, b_m, b_l, b_kept, b_seen = attend_tiles(
            b_acc, b_m, b_l, b_kept, b_seen, b_q, b_total, p_k, p_v, p_mask, b_holes, b_begin, b_end, b_stop, b_start,
            b_cut, b_need, b_from, b_to, tie, plain, tail, K, stride_kk, stride_vk, scale, softcap, D, DV, BD, BV, BN,
            False, True, True, MASKED, HEADS, SOFTCAP, COUNT, PRECISION,
        )  # fmt: skip
    b_acc, b_m, b_l, b_kept, b_seen = attend_tiles(
        b_acc, b_m, b_l, b_kept, b_seen, b_q, b_total, p_k, p_v, p_mask, b_holes, b_begin, b_end, b_stop, b_start,
        b_cut, b_need, b_from, b_to, tie, tail, end, K, stride_kk, stride_vk, scale, softcap, D, DV, BD, BV, BN,
        True, CUT, CUT, MASKED, HEADS, SOFTCAP, COUNT, PRECISION,
    )  # fmt: skip
    o_x, m_x = o_q, m_q
    if HEADS > 1:
        o_x, m_x, b_h = tile_rows(o_q, m_q, i_h, group, HEADS)
    if SINKS:
        sink = tl.load(sinks + (i_h if HEADS == 1 else b_h), mask=None if HEADS == 1 else m_x)
        sink = sink.to(tl.float32) * 1.4426950408889634
        b_new = tl.maximum(b_m, sink)
        b_alpha = tl.exp2(b_m - b_new)
        b_l = b_l * b_alpha + tl.exp2(sink - b_new)
        b_acc = b_acc * b_alpha[:, None]
    b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    o_v = tl.arange(0, BV)
    p_out = out + i_b * stride_ob + (i_h if HEADS == 1 else b_h[:, None]) * stride_oh
    p_out = p_out + o_x.to(tl.int64)[:, None] * stride_oq + o_v[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_x[:, None] & (o_v < DV)[None, :])
    if COUNT:
        if HEADS == 1:
            tl.store(counts + i_bh * Q + o_q, b_kept, mask=m_q)
        else:
            tl.store(counts + (i_b * H * group + b_h) * Q + o_x, each_head(b_kept, HEADS), mask=m_x)
