"""Exact attention over lists: of pages or of single keys, per query head or shared by the heads of a group.

A row attends to the first and last keys and to what its list names between them; every key counts once. The work is
cut into units of ``WIDE`` keys: first the entries of the list, then the bands. Parts are relative to peaks of their
own.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, reach_of
from sah_transformers.kernels.decode.score import capped, precise_scores
from sah_transformers.kernels.decode.values import dot_few, weight_of


@triton.jit
def bands_of(
    limits, i_b, i_q, B, K, first_end, last_start, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """(begin, keys of the first band, start of the last band, keys of both, end) of one row, as slots."""
    begin, end = 0, tl.minimum(reach_of(i_q, K, Q, CAUSAL), K)
    if MASKED:
        begin = tl.load(limits + 3 * B * Q + i_b * Q + i_q)
        end = tl.minimum(end, tl.load(limits + 4 * B * Q + i_b * Q + i_q))
    head_end = tl.minimum(first_end, end)
    tail = tl.maximum(last_start, tl.maximum(head_end, begin))
    head = tl.maximum(head_end - begin, 0)
    return begin, head, tail, head + tl.maximum(end - tail, 0), end


@triton.jit
def shift_of(shifts, n, begin, end, i, MASKED: tl.constexpr, SLOTS: tl.constexpr):
    """How far a token's slot lies behind its number, if row ``i`` sees all keys from ``begin`` to ``end``, else -1."""
    if SLOTS:
        shift = tl.load(shifts + i)
    elif MASKED:
        shift = tl.where(n == end - begin, 0, -1)
    else:
        shift = n * 0
    return shift


@triton.jit
def keys_of(
    lists, slots, mask, o_u, o_j, listed, i_b, i_q, i_e, stride, tokens, shift, first_end, last_start, begin, head,
    tail, banded, end, sm_b, sm_q, sm_k, BENT: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(slots of the keys ``o_j`` of units ``o_u``, which of them the row attends to); ``BENT``: ``shift`` is -1."""
    m_u = o_u < listed
    o_t = tl.load(lists + i_e.to(tl.int64) * stride + o_u, mask=m_u, other=0) * PAGE + o_j
    if SLOTS:
        if BENT:
            p_slot = slots + i_b.to(tl.int64) * tokens + o_t
            o_t = tl.load(p_slot, mask=m_u & (o_j < PAGE), other=-1)
        else:
            o_t += shift
    m_t = m_u & (o_j < PAGE) & (o_t >= tl.maximum(first_end, begin)) & (o_t < last_start)
    o_n = (o_u - listed) * WIDE + o_j
    o_k = tl.where(m_u, o_t, tl.where(o_n < head, begin + o_n, tail + o_n - head))
    m_k = (m_t | ((o_u >= listed) & (o_n < banded))) & (o_k < end)
    if BENT:
        p_mask = mask + i_b.to(tl.int64) * sm_b + i_q * sm_q + o_k.to(tl.int64) * sm_k
        m_k = m_k & (tl.load(p_mask, mask=m_k, other=0) != 0)
    return o_k, m_k


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "stride",
        "tokens",
        "sk_b",
        "sk_g",
        "sv_b",
        "sv_g",
        "sm_b",
        "sm_q",
        "first",
        "first_share",
        "last",
        "last_share",
    ]
)
def gather_head_kernel(
    q, k, v, mask, limits, lists, counts, slots, shifts, sums, peaks, totals,
    K, B, stride, tokens, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sv_b, sv_g, sv_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    SLOTS: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One row, one part of its units, ``UNITS`` at once; ``EVEN`` parts need not be whole ``UNITS``."""
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    PRECISE: tl.constexpr = v.dtype.element_ty == tl.float32
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    begin, head, tail, banded, end = bands_of(limits, i_b, i_q, B, K, first_end, last_start, Q, CAUSAL, MASKED)
    shift = shift_of(shifts, n, begin, end, i_b * Q + i_q, MASKED, SLOTS)
    o_d, o_e, o = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, UNITS * WIDE)
    p_q = q + i_b.to(tl.int64) * sq_b + i_h * sq_h + i_q * sq_q
    b_q = tl.load(p_q + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    p_k = k + i_b.to(tl.int64) * sk_b * UNIT + (i_h // (H // G)).to(tl.int64) * (sk_g * UNIT)
    p_v = v + i_b.to(tl.int64) * sv_b * UNIT + (i_h // (H // G)).to(tl.int64) * (sv_g * UNIT)
    listed = tl.load(counts + i_r)
    units = listed + tl.cdiv(banded, WIDE)
    each = tl.cdiv(units, splits)
    if not EVEN:
        each = tl.cdiv(each, UNITS) * UNITS
    b_acc = tl.zeros([BDV], tl.float32)
    b_total = tl.zeros([UNITS * WIDE], tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    for BENT in tl.static_range(2 if MASKED else 1):  # one of the two: what is read for nothing waits all the same
        if (shift < 0) if BENT else (shift >= 0):
            for start in range(i_s * each, tl.minimum((i_s + 1) * each, units), UNITS):
                o_k, m_k = keys_of(
                    lists, slots, mask, start + o // WIDE, o % WIDE, listed, i_b, i_q, i_r, stride, tokens, shift,
                    first_end, last_start, begin, head, tail, banded, end, sm_b, sm_q, sm_k, BENT, SLOTS, PAGE, WIDE,
                )  # fmt: skip
                if EVEN:
                    m_k = m_k & (start + o // WIDE < (i_s + 1) * each)
                o_k = o_k[:, None].to(tl.int64)
                p_kt, p_vt = p_k + o_k * (sk_k * UNIT) + o_d[None, :], p_v + o_k * (sv_k * UNIT) + o_e[None, :]
                b_k = tl.load(p_kt, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)
                b_v = tl.load(p_vt, mask=m_k[:, None] & (o_e < DV)[None, :], other=0.0)
                b_s = capped(tl.sum(b_k.to(tl.float32) * b_q[None, :], 1) * scaling, softcap, SOFTCAP)
                b_s = tl.where(m_k, b_s, float("-inf"))
                top = tl.maximum(peak, tl.max(b_s))
                safe = tl.where(top == float("-inf"), 0.0, top)
                b_w = weight_of(b_s - safe, PRECISE)
                shrink = weight_of(peak - safe, PRECISE)
                b_acc = b_acc * shrink + tl.sum(b_w[:, None] * b_v.to(tl.float32), 0)
                b_total = b_total * shrink + b_w
                peak = top
    o_out = i_r.to(tl.int64) * splits + i_s
    tl.store(sums + o_out * DV + o_e, b_acc, mask=o_e < DV)
    tl.store(peaks + o_out, peak)
    tl.store(totals + o_out, tl.sum(b_total))


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "stride",
        "tokens",
        "sk_b",
        "sk_g",
        "sv_b",
        "sv_g",
        "sm_b",
        "sm_q",
        "first",
        "first_share",
        "last",
        "last_share",
    ]
)
def gather_group_kernel(
    q, k, v, mask, limits, lists, counts, slots, shifts, sums, peaks, totals,
    K, B, stride, tokens, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sv_b, sv_g, sv_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    SLOTS: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query of one KV head, one part of its units: the group's heads share what is read."""
    i_s, i_e = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    i_bg, i_q = i_e // Q, i_e % Q
    i_b, i_g = i_bg // G, i_bg % G
    PRECISE: tl.constexpr = v.dtype.element_ty == tl.float32
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    begin, head, tail, banded, end = bands_of(limits, i_b, i_q, B, K, first_end, last_start, Q, CAUSAL, MASKED)
    shift = shift_of(shifts, n, begin, end, i_b * Q + i_q, MASKED, SLOTS)
    o_m, o_d, o_e, o = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, UNITS * WIDE)
    m_m = o_m < H // G
    p_q = q + i_b.to(tl.int64) * sq_b + (i_g * (H // G) + o_m)[:, None] * sq_h + i_q * sq_q
    b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = k + i_b.to(tl.int64) * sk_b * UNIT + i_g.to(tl.int64) * (sk_g * UNIT)
    p_v = v + i_b.to(tl.int64) * sv_b * UNIT + i_g.to(tl.int64) * (sv_g * UNIT)
    listed = tl.load(counts + i_e)
    units = listed + tl.cdiv(banded, WIDE)
    each = tl.cdiv(units, splits)
    if not EVEN:
        each = tl.cdiv(each, UNITS) * UNITS
    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_zero = b_acc + scaling * 0.0  # not a constant: Triton would turn the sum of tiles into one chain
    b_peak, b_total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for BENT in tl.static_range(2 if MASKED else 1):
        if (shift < 0) if BENT else (shift >= 0):
            for start in tl.range(i_s * each, tl.minimum((i_s + 1) * each, units), UNITS, num_stages=STAGES):
                o_k, m_k = keys_of(
                    lists, slots, mask, start + o // WIDE, o % WIDE, listed, i_b, i_q, i_e, stride, tokens, shift,
                    first_end, last_start, begin, head, tail, banded, end, sm_b, sm_q, sm_k, BENT, SLOTS, PAGE, WIDE,
                )  # fmt: skip
                if EVEN:
                    m_k = m_k & (start + o // WIDE < (i_s + 1) * each)
                p_kt = p_k + o_k[:, None].to(tl.int64) * (sk_k * UNIT)
                p_vt = p_v + o_k[:, None].to(tl.int64) * (sv_k * UNIT) + o_e[None, :]
                b_v = tl.load(p_vt, mask=m_k[:, None] & (o_e < DV)[None, :], other=0.0)
                if PRECISE:
                    b_s = precise_scores(p_q, m_m, p_kt, m_k, scaling, D, BD)
                else:
                    b_k = tl.load(p_kt + o_d[None, :], mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)
                    b_s = dot_few(b_q, tl.trans(b_k), tl.zeros([BM, UNITS * WIDE], tl.float32)) * scaling
                b_s = tl.where(m_k[None, :], capped(b_s, softcap, SOFTCAP), float("-inf"))
                b_top = tl.maximum(b_peak, tl.max(b_s, 1))
                b_safe = tl.where(b_top == float("-inf"), 0.0, b_top)
                b_w = weight_of(b_s - b_safe[:, None], PRECISE)
                b_shrink = weight_of(b_peak - b_safe, PRECISE)
                b_acc = b_acc * b_shrink[:, None]
                if PRECISE:  # a sum per tile, added to the others: less rounding than one chain
                    b_acc += tl.dot(b_w, b_v, b_zero, input_precision="ieee")
                else:
                    b_acc = dot_few(b_w.to(b_v.dtype), b_v, b_acc)
                b_total = b_total * b_shrink + tl.sum(b_w, 1)
                b_peak = b_top
    o_out = ((i_bg * (H // G) + o_m) * Q + i_q).to(tl.int64) * splits + i_s
    tl.store(sums + o_out[:, None] * DV + o_e[None, :], b_acc, mask=m_m[:, None] & (o_e < DV)[None, :])
    tl.store(peaks + o_out, b_peak, mask=m_m)
    tl.store(totals + o_out, b_total, mask=m_m)
