"""Triton, stage 2 of a cut: all scores, those inside the bracket written out, those at or above its low counted."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.group import kv_head, load_queries, load_totals, ranking, weights
from sah_transformers.kernels.prefill.rows import (
    SMALLEST,
    load_columns,
    mask_rows,
    products,
    row_limits,
    shown,
    tile_ranges,
)


@triton.jit
def write_between(
    b_s, b_low, b_high, p_list, b_end, b_1, b_2, b_3, BM: tl.constexpr, SIZE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Append the scores in ``[low, high]`` of ``b_s`` ``[BM, 4, SIZE]`` to the rows' four lists.

    A quarter of a row is what one thread holds of it in a matrix unit's result: no thread waits for another. Stores
    are the cost, so the last three scores wait in registers and four are stored together: of a row's lists, bytes
    ``64 i + 16 quarter + (0..15)`` hold scores 4i to 4i + 3. ``b_end``: byte 64 i + 16 j for a count of 4i + j. In
    Triton's words every score would first move to another thread, hence the assembler (not for the interpreter).
    """
    if SIZE == 1:
        b_x = tl.reshape(b_s, [BM, 4])
        if ASM:
            b_end, b_1, b_2, b_3 = tl.inline_asm_elementwise(
                """{ .reg .pred p, w; .reg .b64 a; .reg .b32 t;
                setp.ge.f32 p, $4, $5;
                setp.le.and.f32 p, $4, $6, p;
                mov.b32 $0, $7;
                @p add.s32 $0, $0, 16;
                and.b32 t, $0, 48;
                setp.eq.and.s32 w, t, 0, p;
                cvt.u64.u32 a, $0;
                add.u64 a, a, $11;
                @w st.global.v4.f32 [a + -64], {$4, $8, $9, $10};
                mov.b32 $1, $8; mov.b32 $2, $9; mov.b32 $3, $10;
                @p mov.b32 $3, $9; @p mov.b32 $2, $8; @p mov.b32 $1, $4; }""",
                "=&r,=&f,=&f,=&f,f,f,f,r,f,f,f,l",
                [b_x, b_low, b_high, b_end, b_1, b_2, b_3, p_list.to(tl.int64)],
                dtype=(tl.int32, tl.float32, tl.float32, tl.float32),
                is_pure=False,
                pack=1,
            )
        else:
            m_x = (b_x >= b_low) & (b_x <= b_high)
            tl.store(p_list + b_end // 64 * 16 + b_end // 16 % 4, b_x, mask=m_x)
            b_end += m_x.to(tl.int32) * 16
        return b_end, b_1, b_2, b_3
    else:
        b_left, b_right = tl.split(tl.reshape(b_s, [BM, 4, SIZE // 2, 2]))
        b_end, b_1, b_2, b_3 = write_between(b_left, b_low, b_high, p_list, b_end, b_1, b_2, b_3, BM, SIZE // 2, ASM)
        return write_between(b_right, b_low, b_high, p_list, b_end, b_1, b_2, b_3, BM, SIZE // 2, ASM)


@triton.jit
def emit_tiles(
    b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, p_mask, b_holes, b_full, b_low, b_high, b_peak, b_total,
    b_stop, b_start, i_first, i_last, K, stride_k, scale, softcap, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, MASS: tl.constexpr,
    HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Write the scores of the tiles of keys from ``i_first`` to ``i_last``; EDGE tiles hold other than candidates.

    From ``b_full`` on a list may not hold what a tile adds: its end is then overwritten and its row settled later.
    """
    o_n = tl.arange(0, BN)
    for i_n in range(i_first, i_last, BN):
        i_n = tl.multiple_of(i_n, BN)
        b_k = load_columns(p_k, o_n, i_n, K, stride_k, D, BD, EDGE)
        b_s = ranking(products(b_q, b_k, PRECISION), b_total, scale, softcap, HEADS, SOFTCAP)
        if EDGE:
            m_s = shown(p_mask, i_n + o_n, b_stop, b_start, b_holes, MASKED)
            b_s = tl.where(m_s, b_s, float("-inf"))
        if EDGE and MASKED:  # in the layout of a loaded mask Triton 3.6 sums the quarters below wrongly
            if MASS:
                b_w = weights(b_s, b_peak, scale, softcap, HEADS, SOFTCAP)
                b_row = tl.sum(tl.where(b_s > b_high, b_w, 0.0), 1)
            else:
                b_row = tl.sum((b_s >= b_low).to(tl.float32), 1)
            b_reached += tl.where(tl.arange(0, 4)[None, :] == 0, b_row[:, None], 0.0)
        b_s = tl.reshape(tl.permute(tl.reshape(b_s, [BM, BN // 8, 4, 2]), (0, 2, 1, 3)), [BM, 4, BN // 4])
        b_over = tl.maximum(b_end - b_full, 0)
        b_lost += b_over
        if not (EDGE and MASKED):
            if MASS:
                b_w = weights(b_s, b_peak[:, :, None], scale, softcap, HEADS, SOFTCAP)
                b_reached += tl.sum(tl.where(b_s > b_high[:, :, None], b_w, 0.0), 2)
            else:
                b_reached += tl.sum((b_s >= b_low[:, :, None]).to(tl.float32), 2)
        b_end, b_1, b_2, b_3 = write_between(
            b_s, b_low, b_high, p_list, b_end - b_over, b_1, b_2, b_3, BM, BN // 4, ASM
        )
    return b_end, b_reached, b_lost, b_1, b_2, b_3


@triton.jit
def emit_kernel(
    q, k, lows, highs, stats, lists, list_counts, list_reached, mask, limits,
    i_first, rows, H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb, stride_qh, stride_qq, stride_kb,
    stride_kg, stride_kk,
    first, first_bits, last, last_bits, capacity, scale, softcap, totals,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BRACKET: tl.constexpr, MASKED: tl.constexpr,
    MASS: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BM rows with all their candidates, those inside the bracket written out.

    ``lists`` ``[B*H, rows, capacity * 4]``; ``list_counts`` and ``list_reached`` ``[B*H, rows, 4]``: how many are in
    the bracket (negative where the list was too short) and how many at or above its lower end, with MASS the mass
    above its upper end.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    BQ: tl.constexpr = BM // HEADS
    o_r = i_t * BQ + tl.arange(0, BQ)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n, b_begin, b_last, b_stop, b_start = row_limits(
        limits, stride_l, i_b, o_q, m_r, Q, K, first, first_bits, last, last_bits, 5, MASKED, CAUSAL,
        FIRST_IS_SHARE, LAST_IS_SHARE,
    )  # fmt: skip
    p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
    b_holes = b_last - b_begin > b_n
    b_low = tl.where(m_r, SMALLEST, float("inf"))
    b_high = tl.full([BQ], float("inf"), tl.float32)
    if BRACKET:
        b_low = tl.load(lows + i_bh * rows + o_r, mask=m_r, other=float("inf"))
        b_high = tl.load(highs + i_bh * rows + o_r, mask=m_r, other=float("inf"))
    b_low, b_high = b_low[:, None], b_high[:, None]
    b_peak = b_low
    if MASS and HEADS == 1:
        b_peak = tl.load(stats + i_bh * Q + o_q, mask=m_r, other=0.0)[:, None]
    b_q = load_queries(q, stride_qb, stride_qh, stride_qq, o_q, m_r, i_b, i_h, group, D, BD, HEADS)
    b_total = load_totals(totals, o_q, m_r, i_bh, group, Q, HEADS)
    p_k = k + i_b * stride_kb + kv_head(i_h, group, HEADS) * stride_kg
    o_l = tl.arange(0, 4)
    o_c = (i_bh * rows + o_r)[:, None] * 4 + o_l[None, :]
    p_list = lists + o_l[None, :] * 4
    b_first = ((i_bh * rows + o_r)[:, None] * capacity * 16 + o_l[None, :] * 0).to(tl.int32)
    b_full = b_first + (capacity - BN // 4) * 16
    b_end = b_first
    begin, inner, inner_end, end = tile_ranges(b_stop, b_start, b_stop, b_start, m_r, b_holes, BN, MASKED)
    b_reached = tl.zeros([BQ, 4], tl.float64 if MASS else tl.float32)
    b_lost = tl.zeros([BQ, 4], tl.int32)
    b_1 = tl.zeros([BQ, 4], tl.float32)
    b_2 = tl.zeros([BQ, 4], tl.float32)
    b_3 = tl.zeros([BQ, 4], tl.float32)
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, p_mask, b_holes, b_full, b_low, b_high, b_peak,
        b_total, b_stop, b_start, begin, inner, K, stride_kk, scale, softcap, D, BD, BQ, BN, True, MASKED, MASS,
        HEADS, SOFTCAP, PRECISION, ASM,
    )  # fmt: skip
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, p_mask, b_holes, b_full, b_low, b_high, b_peak,
        b_total, b_stop, b_start, inner, inner_end, K, stride_kk, scale, softcap, D, BD, BQ, BN, False, MASKED, MASS,
        HEADS, SOFTCAP, PRECISION, ASM,
    )  # fmt: skip
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, p_mask, b_holes, b_full, b_low, b_high, b_peak,
        b_total, b_stop, b_start, inner_end, end, K, stride_kk, scale, softcap, D, BD, BQ, BN, True, MASKED, MASS,
        HEADS, SOFTCAP, PRECISION, ASM,
    )  # fmt: skip
    if ASM:  # the scores that still wait
        b_wait = tl.where(m_r[:, None], b_end // 16 % 4, 0)
        p_last = p_list + b_end // 64 * 16
        tl.store(p_last, b_1, mask=b_wait > 0)
        tl.store(p_last + 1, b_2, mask=b_wait > 1)
        tl.store(p_last + 2, b_3, mask=b_wait > 2)
    b_count = (b_end - b_first + b_lost) // 16
    tl.store(list_counts + o_c, tl.where(b_lost > 0, -b_count, b_count), mask=m_r[:, None])
    tl.store(list_reached + o_c, b_reached.to(list_reached.dtype.element_ty), mask=m_r[:, None])
