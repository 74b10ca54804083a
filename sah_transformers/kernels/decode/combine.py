"""The exact cut among the listed keys of the boundary bin, and the sum of all partial results."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.values import fixed_mass, unit_of, weight_of


@triton.jit(do_not_specialize=["K", "B", "stride", "splits", "sv_b", "sv_g"])
def combine_kernel(
    values, scores, lines, needs, stats, list_pos, list_val, list_count, sums, totals, sinks, out,
    K, B, stride, splits, sv_b, sv_g, sv_k,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    UNIT: tl.constexpr, LIST: tl.constexpr, KIND: tl.constexpr, SINKS: tl.constexpr, FIXED: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One row, ``BDV`` numbers of its output. Ranks the row's listed keys (ties: lower position first), takes those it
    needs, in order of rank."""
    i_r = tl.program_id(0)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    i_bg = i_b * G + i_h // (H // G)
    i_e = i_bg * Q + i_q if KIND == "group" else i_r
    E = B * G * Q if KIND == "group" else B * H * Q
    o_d, o = tl.program_id(1) * BDV + tl.arange(0, BDV), tl.arange(0, LIST)
    p_pos, p_val = list_pos + i_e * LIST, list_val + i_e * LIST
    # Everything is asked for at once, what the list does not hold as well: waiting is what takes this launch's time.
    peak, need = tl.load(stats + i_r), tl.load(needs + i_e)
    top = tl.load(lines + 2 * E + i_e) if KIND == "mass" else 0.0
    n = tl.minimum(tl.load(list_count + i_e), LIST)
    b_pos, b_val = tl.load(p_pos + o), tl.load(p_val + o)
    b_next, b_other = tl.load(p_pos + o)[None, :], tl.load(p_val + o)[None, :]
    b_acc, b_total = tl.zeros([BDV], tl.float32), tl.zeros([BS], tl.float32)
    for i_s in range(0, splits, BS):
        o_s = i_s + tl.arange(0, BS)
        p_s = i_r.to(tl.int64) * splits + o_s
        b_part = tl.load(
            sums + p_s[:, None] * DV + o_d[None, :], mask=(o_s < splits)[:, None] & (o_d < DV)[None, :], other=0.0
        )
        b_acc += tl.sum(b_part, 0)
        b_total += tl.load(totals + p_s, mask=o_s < splits, other=0.0)
    total = tl.sum(b_total)
    if n > 0:
        m_pair = (o < n)[:, None] & (o < n)[None, :]
        m_more = m_pair & (b_other > b_val[:, None])
        m_tie = m_pair & (b_other == b_val[:, None]) & (b_next < b_pos[:, None])
        b_rank = tl.sum((m_more | m_tie).to(tl.int32), 1)
        if KIND == "mass":
            b_known = tl.where((o < n)[None, :], b_other, float("-inf"))
            b_fixed = fixed_mass(b_known, peak, unit_of(top, peak, FIXED))
            m_take = (o < n) & (tl.sum(tl.where(m_more, b_fixed, 0), 1) < need)
        else:
            m_take = (o < n) & (b_rank < need)
        p_v = values + (i_bg // G).to(tl.int64) * sv_b * UNIT + (i_bg % G).to(tl.int64) * (sv_g * UNIT)
        b_more = tl.zeros([BT], tl.float32)
        for i_t in range(0, n, BT):
            o_t = i_t + tl.arange(0, BT)
            m_at = m_take[:, None] & (b_rank[:, None] == o_t[None, :])
            m_t = tl.sum(m_at.to(tl.int32), 0) > 0
            o_v = tl.sum(tl.where(m_at, b_pos[:, None], 0), 0)
            if KIND == "group":  # the list holds what the heads share
                b_s = tl.load(scores + i_r.to(tl.int64) * (stride * 16) + o_v, mask=m_t, other=float("-inf"))
            else:
                b_s = tl.sum(tl.where(m_at, b_val[:, None], 0.0), 0)
            b_w = tl.where(m_t, weight_of(b_s - peak, values.dtype.element_ty == tl.float32), 0.0)
            p_vt = p_v + o_v[:, None].to(tl.int64) * (sv_k * UNIT) + o_d[None, :]
            b_v = tl.load(p_vt, mask=m_t[:, None] & (o_d < DV)[None, :], other=0.0)
            b_acc += tl.sum(b_w[:, None] * b_v.to(tl.float32), 0)
            b_more += b_w
        total += tl.sum(b_more)
    if SINKS:
        sink = tl.load(sinks + i_h).to(tl.float32)
        total += tl.where(total > 0, weight_of(tl.minimum(sink - peak, 80.0), out.dtype.element_ty == tl.float32), 0.0)
    b_out = b_acc / tl.where(total > 0, total, 1.0)
    p_out = out + ((i_b * Q + i_q) * H + i_h).to(tl.int64) * DV + o_d
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_d < DV)
