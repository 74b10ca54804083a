"""Triton: the exact k-th best score of every row, without storing Q x K scores.

Four kernels. ``bracket_kernel`` brackets the k-th score by a sample of the keys. ``emit_kernel`` computes all scores,
counts those at or above the bracket and writes those inside. ``select_kernel`` finds the exact cut among the written.
``settle_kernel`` redoes the few rows whose bracket missed or whose lists were too short, by a radix search. A cut is
proven: fewer than k candidates have a score above it, and with the first ``need`` of those equal to it there are k.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import (
    band_bounds,
    granted,
    load_columns,
    load_rows,
    products,
    visible_keys,
)

SMALLEST = tl.constexpr(-3.4028234663852886e38)
ALL = tl.constexpr(2147483647)
"""Where a row takes all keys equal to its cut, the number of them that it takes."""


@triton.jit
def mixed(x):
    """A hash of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bracket_kernel(
    q, k, lows, highs, i_first, rows, H, Q, K, group, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    first, first_bits, last, last_bits, budget, budget_bits, chunks, most, deviations,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``lows <= k-th best score <= highs`` for nearly every row, from ``chunks`` samples of BS keys each."""
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n = tl.where(m_r, visible_keys(o_q, Q, K, CAUSAL), 0)
    b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    b_c = b_start - b_stop
    b_k = granted(b_n, budget, budget_bits, BUDGET_IS_SHARE)
    b_low = tl.full([BM], SMALLEST, tl.float32)
    b_high = tl.full([BM], float("inf"), tl.float32)
    if tl.max(b_c, 0) > most:  # else all candidates fit into the lists
        begin = tl.max(tl.where(m_r, b_stop, 0), 0)
        length = tl.maximum(tl.min(tl.where(m_r, b_start, 2147483647), 0) - begin, 1)
        b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_r, stride_qq, D, BD)
        p_k = k + i_b * stride_kb + (i_h // group) * stride_kg
        total = chunks * BS
        b_p = tl.minimum(b_k.to(tl.float32) / tl.maximum(b_c, 1).to(tl.float32), 1.0)
        b_spread = deviations * tl.sqrt(b_p * (1.0 - b_p) / total) * BS + 1.0 / chunks
        b_skew = (deviations * deviations - 1.0) * (1.0 - 2.0 * b_p) * BS / (6.0 * total)  # of the binomial's tails
        b_below = tl.ceil(b_p * BS + b_spread + b_skew)  # this many of a chunk should be at or above low
        b_above = tl.floor(b_p * BS - b_spread + b_skew)  # at most this many should be above high
        b_lows = tl.zeros([BM], tl.float32)
        b_highs = tl.zeros([BM], tl.float32)
        for i_c in range(chunks):
            o_s = tl.arange(0, BS) * chunks + i_c
            seed = (o_s + i_t * 40503).to(tl.uint32) + (i_bh * 69069).to(tl.uint32)
            b_jitter = (mixed(seed) >> 1).to(tl.int32) % length
            o_k = begin + ((o_s.to(tl.int64) * length + b_jitter) // total).to(tl.int32)
            o_k = tl.minimum(o_k, K - 1)
            o_d = tl.arange(0, BD)
            p = p_k + o_k.to(tl.int64)[None, :] * stride_kk + o_d[:, None]
            b_s = products(b_q, tl.load(p, mask=(o_d < D)[:, None], other=0.0), PRECISION)
            b_min, b_max = tl.min(b_s, 1), tl.max(b_s, 1)
            b_la, b_lb, b_ha, b_hb = b_min, b_max, b_min, b_max
            for _ in range(STEPS):
                b_mid = 0.5 * b_la + 0.5 * b_lb
                b_reached = tl.sum((b_s >= b_mid[:, None]).to(tl.float32), 1) >= b_below
                b_la = tl.where(b_reached, b_mid, b_la)
                b_lb = tl.where(b_reached, b_lb, b_mid)
                b_mid = 0.5 * b_ha + 0.5 * b_hb
                b_few = tl.sum((b_s > b_mid[:, None]).to(tl.float32), 1) <= b_above
                b_hb = tl.where(b_few, b_mid, b_hb)
                b_ha = tl.where(b_few, b_ha, b_mid)
            b_lows += b_la
            b_highs += b_hb
        b_low = tl.where(b_below <= BS, b_lows / chunks, SMALLEST)
        b_high = tl.where(b_above >= 0, b_highs / chunks, float("inf"))
        b_low = tl.where(b_c <= b_k, float("inf"), b_low)  # nothing to find: write nothing
        b_high = tl.where(b_c <= b_k, float("inf"), b_high)
    tl.store(lows + i_bh * rows + o_r, b_low, mask=m_r)
    tl.store(highs + i_bh * rows + o_r, b_high, mask=m_r)


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
        b_end, b_1, b_2, b_3 = write_between(
            b_left, b_low, b_high, p_list, b_end, b_1, b_2, b_3, BM, SIZE // 2, ASM
        )
        return write_between(b_right, b_low, b_high, p_list, b_end, b_1, b_2, b_3, BM, SIZE // 2, ASM)


@triton.jit
def emit_tiles(
    b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, b_full, b_low, b_high, b_stop, b_start, i_first,
    i_last, K, stride_k, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Write the scores of the tiles of keys from ``i_first`` to ``i_last``; EDGE tiles hold other than candidates.

    From ``b_full`` on a list may not hold what a tile adds: its end is then overwritten and its row settled later.
    """
    o_n = tl.arange(0, BN)
    for i_n in range(i_first, i_last, BN):
        i_n = tl.multiple_of(i_n, BN)
        b_k = load_columns(p_k, o_n, i_n, K, stride_k, D, BD, EDGE)
        b_s = products(b_q, b_k, PRECISION)
        if EDGE:
            o_k = i_n + o_n
            m_s = (o_k[None, :] >= b_stop[:, None]) & (o_k[None, :] < b_start[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_s = tl.reshape(tl.permute(tl.reshape(b_s, [BM, BN // 8, 4, 2]), (0, 2, 1, 3)), [BM, 4, BN // 4])
        b_over = tl.maximum(b_end - b_full, 0)
        b_lost += b_over
        b_reached += tl.sum((b_s >= b_low[:, :, None]).to(tl.float32), 2)
        b_end, b_1, b_2, b_3 = write_between(
            b_s, b_low, b_high, p_list, b_end - b_over, b_1, b_2, b_3, BM, BN // 4, ASM
        )
    return b_end, b_reached, b_lost, b_1, b_2, b_3


@triton.jit
def emit_kernel(
    q, k, lows, highs, lists, list_counts, list_reached,
    i_first, rows, H, Q, K, group, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    first, first_bits, last, last_bits, capacity,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BRACKET: tl.constexpr, PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BM rows with all their candidates, those inside the bracket written out.

    ``lists`` ``[B*H, rows, capacity * 4]``; ``list_counts`` and ``list_reached`` ``[B*H, rows, 4]``: how many are in
    the bracket (negative where the list was too short) and how many at or above its lower end.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n = tl.where(m_r, visible_keys(o_q, Q, K, CAUSAL), 0)
    b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    b_low = tl.where(m_r, SMALLEST, float("inf"))
    b_high = tl.full([BM], float("inf"), tl.float32)
    if BRACKET:
        b_low = tl.load(lows + i_bh * rows + o_r, mask=m_r, other=float("inf"))
        b_high = tl.load(highs + i_bh * rows + o_r, mask=m_r, other=float("inf"))
    b_low, b_high = b_low[:, None], b_high[:, None]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_r, stride_qq, D, BD)
    p_k = k + i_b * stride_kb + (i_h // group) * stride_kg
    o_l = tl.arange(0, 4)
    o_c = (i_bh * rows + o_r)[:, None] * 4 + o_l[None, :]
    p_list = lists + o_l[None, :] * 4
    b_first = ((i_bh * rows + o_r)[:, None] * capacity * 16 + o_l[None, :] * 0).to(tl.int32)
    b_full = b_first + (capacity - BN // 4) * 16
    b_end = b_first
    begin = tl.min(tl.where(b_start > b_stop, b_stop, 2147483647), 0)
    end = tl.max(tl.where(b_start > b_stop, b_start, 0), 0)
    begin = tl.minimum(begin, end) // BN * BN
    inner = tl.cdiv(tl.max(b_stop, 0), BN) * BN
    inner_end = tl.min(tl.where(m_r, b_start, 2147483647), 0) // BN * BN
    inner = tl.maximum(tl.minimum(inner, tl.cdiv(end, BN) * BN), begin)
    inner_end = tl.maximum(inner_end, inner)
    b_reached = tl.zeros([BM, 4], tl.float32)
    b_lost = tl.zeros([BM, 4], tl.int32)
    b_1 = tl.zeros([BM, 4], tl.float32)
    b_2 = tl.zeros([BM, 4], tl.float32)
    b_3 = tl.zeros([BM, 4], tl.float32)
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, b_full, b_low, b_high, b_stop, b_start, begin, inner,
        K, stride_kk, D, BD, BM, BN, True, PRECISION, ASM,
    )  # fmt: skip
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, b_full, b_low, b_high, b_stop, b_start, inner, inner_end,
        K, stride_kk, D, BD, BM, BN, False, PRECISION, ASM,
    )  # fmt: skip
    b_end, b_reached, b_lost, b_1, b_2, b_3 = emit_tiles(
        b_end, b_reached, b_lost, b_1, b_2, b_3, b_q, p_k, p_list, b_full, b_low, b_high, b_stop, b_start, inner_end, end,
        K, stride_kk, D, BD, BM, BN, True, PRECISION, ASM,
    )  # fmt: skip
    if ASM:  # the scores that still wait
        b_wait = tl.where(m_r[:, None], b_end // 16 % 4, 0)
        p_last = p_list + b_end // 64 * 16
        tl.store(p_last, b_1, mask=b_wait > 0)
        tl.store(p_last + 1, b_2, mask=b_wait > 1)
        tl.store(p_last + 2, b_3, mask=b_wait > 2)
    b_count = (b_end - b_first + b_lost) // 16
    tl.store(list_counts + o_c, tl.where(b_lost > 0, -b_count, b_count), mask=m_r[:, None])
    tl.store(list_reached + o_c, b_reached.to(tl.int32), mask=m_r[:, None])


@triton.jit
def ordered(b_s):
    """Float32 as int32 of the same order; -0 counts as +0."""
    b_i = (b_s + 0.0).to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def restored(b_i):
    """The float32 of an ``ordered`` int32."""
    return (b_i ^ ((b_i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def search(p_list, p_count, inside, wanted, BC: tl.constexpr):
    """(cut, need) of the ``wanted`` best of a row's lists, by counting at interpolated pivots."""
    o_i = tl.arange(0, BC * 4)
    m_i = o_i // 16 * 4 + o_i % 4 < tl.load(p_count + o_i // 4 % 4)
    b_x = ordered(tl.load(p_list + o_i, mask=m_i, other=0.0))
    low = tl.min(tl.where(m_i, b_x, 2147483647), 0).to(tl.int64)
    b_x = tl.where(m_i, b_x, -2147483648)
    high = tl.max(b_x, 0).to(tl.int64) + 1
    at_low, at_high = inside, inside * 0  # at or above low: enough; at or above high: too few
    aside = 0.0
    step = 0
    while (high - low > 1) & (at_low != wanted):
        left = (at_low - at_high).to(tl.float32)
        share = ((at_low - wanted).to(tl.float32) + aside * tl.sqrt(left)) / left
        share = tl.where((step >= 8) & (step % 2 == 0), 0.5, share)  # whatever the values: the range is halved
        middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count = tl.sum((b_x >= middle.to(tl.int32)).to(tl.int32), 0)
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, count, at_low)
        high = tl.where(enough, high, middle)
        at_high = tl.where(enough, at_high, count)
        aside = tl.where(enough, 0.7, -0.7)  # aim beyond the cut, so that both ends come close to it
        step += 1
    return restored(low.to(tl.int32)), tl.where(at_low == wanted, ALL, wanted - at_high)


@triton.jit
def select_kernel(
    lows, highs, lists, list_counts, list_reached, cuts, needs, tied, waiting, queue,
    i_first, rows, Q, K, first, first_bits, last, last_bits, budget, budget_bits, capacity, tiles,
    BC: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr,
    LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr, BRACKET: tl.constexpr,
):  # fmt: skip
    """One program: the cut of one row from its lists; a row that they cannot decide joins the queue.

    It leaves its bracket to ``settle_kernel``: the low in ``cuts``, the bits of the high in ``needs``.
    """
    i_r = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_q = i_first + i_r
    n = visible_keys(i_q, Q, K, CAUSAL)
    stop, start = band_bounds(n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    wanted = granted(n, budget, budget_bits, BUDGET_IS_SHARE)
    cut = tl.full([], float("-inf"), tl.float32)
    need = n * 0 + ALL
    if wanted < start - stop:
        i_row = i_bh * rows + i_r
        p_count = list_counts + i_row * 4
        p_list = lists + i_row * capacity * 4
        o_l = tl.arange(0, 4)
        b_count = tl.load(p_count + o_l)
        inside = tl.sum(tl.abs(b_count), 0)
        wanted -= tl.sum(tl.load(list_reached + i_row * 4 + o_l), 0) - inside
        cut = tl.full([], SMALLEST, tl.float32)
        high = tl.full([], float("inf"), tl.float32)
        if BRACKET:
            cut = tl.load(lows + i_row)
            high = tl.load(highs + i_row)
        known = (wanted > 0) & (wanted <= inside)
        short = tl.min(b_count, 0) < 0
        if known & (short == 0):
            if tl.max(b_count, 0) <= BC // 2:
                cut, need = search(p_list, p_count, inside, wanted, BC // 2)
            else:
                cut, need = search(p_list, p_count, inside, wanted, BC)
        elif known & (cut == high):  # all of the bracket are equal
            need = wanted
        else:
            need = high.to(tl.int32, bitcast=True)
            place = tl.atomic_add(waiting + i_bh, 1, sem="relaxed")
            tl.store(queue + i_bh * Q + place, i_q)
        if known & (need != ALL):
            tl.store(tied + i_bh * tiles + i_q // TILE, 1)
    tl.store(cuts + i_bh * Q + i_q, cut)
    tl.store(needs + i_bh * Q + i_q, need)


@triton.jit
def settle_kernel(
    q, k, cuts, needs, tied, waiting, queue,
    H, Q, K, group, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    first, first_bits, last, last_bits, budget, budget_bits, tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head's queue; does nothing where the queue is shorter.

    Each pass counts the candidates at or above PIVOTS pivots: first around the bracket that missed, then evenly
    between the two that enclose the cut, in the integers of the same order as the scores.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    length = tl.load(waiting + i_bh)
    o_i = tl.program_id(0) * BM + tl.arange(0, BM)
    m_i = o_i < length
    if tl.program_id(0) * BM < length:
        i_b, i_h = i_bh // H, i_bh % H
        o_q = tl.load(queue + i_bh * Q + o_i, mask=m_i, other=0)
        b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_i, stride_qq, D, BD)
        p_k = k + i_b * stride_kb + (i_h // group) * stride_kg
        b_n = tl.where(m_i, visible_keys(o_q, Q, K, CAUSAL), 0)
        b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
        b_wanted = granted(b_n, budget, budget_bits, BUDGET_IS_SHARE)
        begin = tl.min(tl.where(m_i, b_stop, 2147483647), 0) // BN * BN
        end = tl.max(tl.where(m_i, b_start, 0), 0)
        o_n = tl.arange(0, BN)
        o_p = tl.arange(0, PIVOTS)[None, :]
        b_from = tl.load(cuts + i_bh * Q + o_q, mask=m_i, other=0.0)
        b_to = tl.load(needs + i_bh * Q + o_q, mask=m_i, other=0).to(tl.float32, bitcast=True)
        b_width = (b_to - b_from) * (3.0 / (PIVOTS - 1))  # inf where the bracket is open
        b_pivots = ordered(tl.minimum((b_from - (b_to - b_from))[:, None] + b_width[:, None] * o_p, 3.4e38))
        b_pivots = tl.where(b_width[:, None] < 1e37, b_pivots, ordered(b_from)[:, None] + o_p * 0)
        b_low = tl.full([BM], -2147483648, tl.int64)  # at or above low: enough candidates
        b_high = tl.full([BM], 2147483647, tl.int64)  # at or above high: too few
        b_at_low = b_start - b_stop
        b_at_high = b_n * 0
        m_open = m_i
        while tl.max(m_open.to(tl.int32), 0) > 0:
            b_counts = tl.zeros([BM, BN, PIVOTS], tl.int32)
            for i_n in range(begin, end, BN):
                o_k = i_n + o_n
                b_k = load_columns(p_k, o_n, i_n, K, stride_kk, D, BD, True)
                b_x = ordered(products(b_q, b_k, PRECISION))
                m_x = (o_k[None, :] >= b_stop[:, None]) & (o_k[None, :] < b_start[:, None])
                b_x = tl.where(m_x, b_x, -2147483648)
                b_counts += (b_x[:, :, None] >= b_pivots[:, None, :]).to(tl.int32)
            b_totals = tl.where(b_pivots > -2147483648, tl.sum(b_counts, 1), b_at_low[:, None])
            b_wide = b_pivots.to(tl.int64)
            m_low = m_open[:, None] & (b_totals >= b_wanted[:, None]) & (b_wide > b_low[:, None])
            m_high = m_open[:, None] & (b_totals < b_wanted[:, None]) & (b_wide < b_high[:, None])
            b_low = tl.maximum(b_low, tl.max(tl.where(m_low, b_wide, -2147483648), 1))
            b_high = tl.minimum(b_high, tl.min(tl.where(m_high, b_wide, 2147483647), 1))
            b_at_low = tl.minimum(b_at_low, tl.min(tl.where(m_low, b_totals, 2147483647), 1))
            b_at_high = tl.maximum(b_at_high, tl.max(tl.where(m_high, b_totals, 0), 1))
            m_open = m_i & (b_high - b_low > 1) & (b_at_low != b_wanted)
            b_pivots = (b_low[:, None] + (b_high - b_low)[:, None] * (o_p + 1) // (PIVOTS + 1)).to(tl.int32)
        b_need = tl.where(b_at_low == b_wanted, ALL, b_wanted - b_at_high)
        tl.store(cuts + i_bh * Q + o_q, restored(b_low.to(tl.int32)), mask=m_i)
        tl.store(needs + i_bh * Q + o_q, b_need, mask=m_i)
        tl.store(tied + i_bh * tiles + o_q // TILE, b_need * 0 + 1, mask=m_i & (b_need != ALL))
