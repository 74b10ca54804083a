"""Attention over the first and last keys alone: only they are read."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, reach_of
from sah_transformers.kernels.decode.score import capped, precise_scores
from sah_transformers.kernels.decode.values import weight_of


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "per_split",
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
def bands_kernel(
    q, k, v, mask, limits, sums, peaks, totals,
    K, B, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sv_b, sv_g, sv_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, one part of the keys that any of the rows' bands hold."""
    i_s, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    i_b, i_g = i_bg // G, i_bg % G
    ROWS: tl.constexpr = H // G * Q
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < ROWS
    o_q, o_h, o_r = o_m % Q, i_g * (H // G) + o_m // Q, i_bg * ROWS + o_m
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BDV)
    p_q = q + i_b.to(tl.int64) * sq_b + o_h[:, None] * sq_h + o_q[:, None] * sq_q
    b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = k + i_b.to(tl.int64) * sk_b * UNIT + i_g.to(tl.int64) * (sk_g * UNIT)
    p_v = v + i_b.to(tl.int64) * sv_b * UNIT + i_g.to(tl.int64) * (sv_g * UNIT)
    _, first_end, last_start = limits_of(
        limits, i_b, o_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    reach = tl.minimum(reach_of(o_q, K, Q, CAUSAL), K)
    begin, end = 0, tl.max(reach)
    if MASKED:
        begin = tl.min(tl.load(limits + 3 * B * Q + i_b * Q + o_q))
        end = tl.minimum(end, tl.max(tl.load(limits + 4 * B * Q + i_b * Q + o_q)))
    head_end = tl.minimum(tl.max(first_end), end)
    tail = tl.maximum(tl.min(last_start), tl.maximum(head_end, begin))
    head = tl.maximum(head_end - begin, 0)
    slots = head + tl.maximum(end - tail, 0)
    each = tl.cdiv(tl.cdiv(slots, splits), BN) * BN
    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_peak, b_total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for start in range(i_s * each, tl.minimum((i_s + 1) * each, slots), BN):
        o_n = start + tl.arange(0, BN)
        o_k = tl.where(o_n < head, begin + o_n, tail + o_n - head)
        m_k = o_n < slots
        p_kt = p_k + o_k[:, None].to(tl.int64) * (sk_k * UNIT)
        p_vt = p_v + o_k[:, None].to(tl.int64) * (sv_k * UNIT) + o_e[None, :]
        b_v = tl.load(p_vt, mask=m_k[:, None] & (o_e < DV)[None, :], other=0.0)
        if k.dtype.element_ty == tl.float32:
            b_s = precise_scores(p_q, m_m, p_kt, m_k, scaling, D, BD)
        else:
            b_k = tl.load(p_kt + o_d[None, :], mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k)) * scaling
        b_s = capped(b_s, softcap, SOFTCAP)
        m_s = m_k[None, :] & (o_k[None, :] < reach[:, None])
        m_s = m_s & ((o_k[None, :] < first_end[:, None]) | (o_k[None, :] >= last_start[:, None]))
        if MASKED:
            p_mask = (
                mask + i_b.to(tl.int64) * sm_b + o_q[:, None].to(tl.int64) * sm_q + o_k[None, :].to(tl.int64) * sm_k
            )
            m_s = m_s & (tl.load(p_mask, mask=m_s, other=0) != 0)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = weight_of(b_s - b_safe[:, None], v.dtype.element_ty == tl.float32)
        b_shrink = weight_of(b_peak - b_safe, v.dtype.element_ty == tl.float32)
        b_acc = tl.dot(b_w.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
        b_total = b_total * b_shrink + tl.sum(b_w, 1)
        b_peak = b_new
    o_out = o_r.to(tl.int64) * splits + i_s
    tl.store(sums + o_out[:, None] * DV + o_e[None, :], b_acc, mask=m_m[:, None] & (o_e < DV)[None, :])
    tl.store(peaks + o_out, b_peak, mask=m_m)
    tl.store(totals + o_out, b_total, mask=m_m)


@triton.jit
def merge_kernel(
    sums, peaks, totals, sinks, out,
    splits, H: tl.constexpr, Q: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """One row, ``BDV`` numbers of it: its parts, each relative to a peak of its own, become the output."""
    PRECISE: tl.constexpr = out.dtype.element_ty == tl.float32
    i_r = tl.program_id(0)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    o_s, o_d = tl.arange(0, BS), tl.program_id(1) * BDV + tl.arange(0, BDV)
    m_s = o_s < splits
    p_s = i_r.to(tl.int64) * splits + o_s
    # Everything is asked for at once: waiting is what takes this launch's time.
    b_peak = tl.load(peaks + p_s, mask=m_s, other=float("-inf"))
    b_total = tl.load(totals + p_s, mask=m_s, other=0.0)
    b_part = tl.load(sums + p_s[:, None] * DV + o_d[None, :], mask=m_s[:, None] & (o_d < DV)[None, :], other=0.0)
    peak = tl.max(b_peak)
    if SINKS:
        sink = tl.load(sinks + i_h).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    b_w = weight_of(b_peak - peak, PRECISE)
    total = tl.sum(b_total * b_w)
    if SINKS:
        total += weight_of(sink - peak, PRECISE)
    b_out = tl.sum(b_part * b_w[:, None], 0) / tl.where(total > 0, total, 1.0)
    p_out = out + ((i_b * Q + i_q) * H + i_h).to(tl.int64) * DV + o_d
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_d < DV)
