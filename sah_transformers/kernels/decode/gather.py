"""Weighted sums of the selected values: by gathering rows, per head or per group, or by streaming all of them.

Keys in the boundary bin are not taken here but listed, and cut by the combine stage. All partial sums are relative
to the row's peak, which is known, so they only have to be added.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.values import dot_few, in_a_row, line_of, weight_of


@triton.jit
def cut_of(i_e, E, cuts, bounds):
    """What the threshold stage found for a selection row: its line, boundary, bands and ties."""
    scale, offset = tl.load(cuts + i_e), tl.load(cuts + E + i_e)
    low, top = tl.load(cuts + 2 * E + i_e), tl.load(cuts + 3 * E + i_e)
    first_end, last_start = tl.load(bounds + i_e), tl.load(bounds + E + i_e)
    return scale, offset, low, top, first_end, last_start, tl.load(bounds + 2 * E + i_e)


@triton.jit
def taken_of(b_v, o_k, cut, LOGARITHMIC: tl.constexpr):
    """(which keys are active for sure, which lie at the boundary) of one selection row."""
    scale, offset, low, top, first_end, last_start, tie = cut
    b_x = line_of(b_v, scale, offset, LOGARITHMIC)
    list_end = tl.where(tie < 0, last_start, 0)  # rows with a known cut list nothing
    m_band = (o_k < first_end) | (o_k >= last_start)
    m_low, m_top = b_x >= low, b_x >= top
    m_seen = b_v > float("-inf")
    m_taken = m_seen & (m_band | m_top | (m_low & (o_k <= tie)))
    return m_taken, m_seen & (o_k >= first_end) & (o_k < list_end) & m_low & (b_x < top)


@triton.jit
def streams(bounds, limits_n, E, i_bg, ROWS: tl.constexpr, BM: tl.constexpr):
    """Whether a KV head's rows keep so many keys that reading every value costs less than gathering."""
    o = tl.arange(0, BM)
    kept = tl.load(bounds + 3 * E + i_bg * ROWS + o, mask=o < ROWS, other=0)
    return tl.sum(kept.to(tl.int64)) * 3 > limits_n.to(tl.int64) * ROWS


@triton.jit
def keep_listed(b_v, o_k, m_listed, i_e, list_pos, list_val, list_count, LIST: tl.constexpr):
    """Append the keys at the boundary to the selection row's list; their order there does not matter."""
    o_slot = tl.atomic_add(list_count + i_e + o_k * 0, 1, mask=m_listed, sem="relaxed")
    m_listed = m_listed & (o_slot < LIST)
    tl.store(list_pos + i_e * LIST + o_slot, o_k, mask=m_listed)
    tl.store(list_val + i_e * LIST + o_slot, b_v, mask=m_listed)


@triton.jit(do_not_specialize=["K", "B", "stride", "per_split", "sv_b", "sv_g"])
def gather_kernel(
    values, scores, cuts, bounds, stats, packed, list_pos, list_val, list_count, sums, totals,
    K, B, stride, per_split, sv_b, sv_g, sv_k,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    UNIT: tl.constexpr, LIST: tl.constexpr, EITHER: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """One row, ``per_split`` chunks of keys: compact what is taken, gather its values, add."""
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    PRECISE: tl.constexpr = values.dtype.element_ty == tl.float32
    R = B * H * Q
    i_bg = i_r // (H // G * Q)
    run = True
    if EITHER:
        run = streams(bounds, K, R, i_bg, H // G * Q, BM) == 0
    if run:
        peak = tl.load(stats + i_r)
        cut = cut_of(i_r, R, cuts, bounds)
        p_v = values + (i_bg // G).to(tl.int64) * sv_b * UNIT + (i_bg % G).to(tl.int64) * (sv_g * UNIT)
        p_s = scores + i_r.to(tl.int64) * (stride * 16)
        p_mine = packed + (i_r.to(tl.int64) * splits + i_s) * CHUNK
        o_d = tl.arange(0, BDV)
        b_acc = tl.zeros([BDV], tl.float32)
        b_total = tl.zeros([BT], tl.float32)
        for i_c in range(i_s * per_split, tl.minimum((i_s + 1) * per_split, tl.cdiv(K, CHUNK))):
            o_k = i_c * CHUNK + tl.arange(0, CHUNK)
            b_s = tl.load(p_s + o_k, mask=o_k < stride * 16, other=float("-inf"), eviction_policy="evict_first")
            m_taken, m_listed = taken_of(b_s, o_k, cut, False)
            b_rank = tl.cumsum(m_taken.to(tl.int32), 0) - 1
            counts = tl.sum(m_taken.to(tl.int32) + (m_listed.to(tl.int32) << 16))
            if counts >= 65536:
                keep_listed(b_s, o_k, m_listed, i_r, list_pos, list_val, list_count, LIST)
            count = counts & 65535
            b_bits = weight_of(b_s - peak, PRECISE).to(tl.int32, bitcast=True)  # weights are not negative
            tl.store(p_mine + b_rank, (o_k.to(tl.int64) << 32) | b_bits.to(tl.int64), mask=m_taken)
            tl.debug_barrier()
            for i_t in range(0, count, BT):
                o_t = i_t + tl.arange(0, BT)
                m_t = o_t < count
                b_pair = tl.load(p_mine + o_t, mask=m_t, other=0)
                b_w = (b_pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
                p_vt = p_v + (b_pair >> 32)[:, None] * (sv_k * UNIT) + o_d[None, :]
                b_v = tl.load(p_vt, mask=m_t[:, None] & (o_d < DV)[None, :], other=0.0)
                b_acc += tl.sum(b_w[:, None] * b_v.to(tl.float32), 0)
                b_total += b_w
            tl.debug_barrier()
        o_out = i_r.to(tl.int64) * splits + i_s
        tl.store(sums + o_out * DV + o_d, b_acc, mask=o_d < DV)
        tl.store(totals + o_out, tl.sum(b_total))


@triton.jit(do_not_specialize=["K", "B", "stride", "per_split", "sv_b", "sv_g"])
def gather_group_kernel(
    values, ranking, weights, cuts, bounds, packed, list_pos, list_val, list_count, sums, totals,
    K, B, stride, per_split, sv_b, sv_g, sv_k,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    UNIT: tl.constexpr, LIST: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One query of one KV head, ``per_split`` chunks: the group's heads share the gathered values."""
    i_s, i_e = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    E = B * G * Q
    i_bg = i_e // Q
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BDV)
    m_m = o_m < H // G
    o_r = (i_bg * (H // G) + o_m) * Q + i_e % Q
    cut = cut_of(i_e, E, cuts, bounds)
    p_v = values + (i_bg // G).to(tl.int64) * sv_b * UNIT + (i_bg % G).to(tl.int64) * (sv_g * UNIT)
    p_e = ranking + i_e.to(tl.int64) * (stride * 16)
    p_mine = packed + (i_e.to(tl.int64) * splits + i_s) * CHUNK
    p_w = weights + i_e.to(tl.int64) * (stride * (16 * HEADS))
    b_acc, b_total = tl.zeros([BM, BDV], tl.float32), tl.zeros([BM, BT], tl.float32)
    for i_c in range(i_s * per_split, tl.minimum((i_s + 1) * per_split, tl.cdiv(K, CHUNK))):
        o_k = i_c * CHUNK + tl.arange(0, CHUNK)
        b_e = tl.load(p_e + o_k, mask=o_k < stride * 16, other=float("-inf"))
        m_taken, m_listed = taken_of(b_e, o_k, cut, True)
        b_rank = tl.cumsum(m_taken.to(tl.int32), 0) - 1
        counts = tl.sum(m_taken.to(tl.int32) + (m_listed.to(tl.int32) << 16))
        if counts >= 65536:
            keep_listed(b_e, o_k, m_listed, i_e, list_pos, list_val, list_count, LIST)
        count = counts & 65535
        tl.store(p_mine + b_rank, o_k, mask=m_taken)
        tl.debug_barrier()
        for i_t in range(0, count, BT):
            o_t = i_t + tl.arange(0, BT)
            m_t = o_t < count
            o_v = tl.load(p_mine + o_t, mask=m_t, other=0)
            b_w = tl.load(p_w + o_v[None, :] * HEADS + o_m[:, None], mask=m_m[:, None] & m_t[None, :], other=0.0)
            p_vt = p_v + o_v[:, None].to(tl.int64) * (sv_k * UNIT) + o_d[None, :]
            b_v = tl.load(p_vt, mask=m_t[:, None] & (o_d < DV)[None, :], other=0.0)
            b_acc = tl.dot(b_w, b_v, b_acc, input_precision="ieee")
            b_total += b_w.to(tl.float32)
        tl.debug_barrier()
    o_out = o_r.to(tl.int64) * splits + i_s
    tl.store(sums + o_out[:, None] * DV + o_d[None, :], b_acc, mask=m_m[:, None] & (o_d < DV)[None, :])
    tl.store(totals + o_out, tl.sum(b_total, 1), mask=m_m)


@triton.jit(do_not_specialize=["K", "B", "stride", "per_split", "sv_b", "sv_g"])
def stream_kernel(
    values, scores, cuts, bounds, stats, list_pos, list_val, list_count, sums, totals,
    K, B, stride, per_split, sv_b, sv_g, sv_k,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    UNIT: tl.constexpr, LIST: tl.constexpr, EITHER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    MANY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of one KV head, ``per_split`` tiles of keys: read every value, weigh the taken ones."""
    i_s, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    R = B * H * Q
    ROWS: tl.constexpr = H // G * Q
    PRECISE: tl.constexpr = values.dtype.element_ty == tl.float32
    run = True
    if EITHER:
        run = streams(bounds, K, R, i_bg, ROWS, MANY)
    if run:
        o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BDV)
        m_m = o_m < ROWS
        o_r = i_bg * ROWS + o_m
        o_e = tl.where(m_m, o_r, 0)[:, None]
        peak = tl.load(stats + o_r, mask=m_m, other=0.0)
        cut = cut_of(o_e, R, cuts, bounds)
        p_v = values + (i_bg // G).to(tl.int64) * sv_b * UNIT + (i_bg % G).to(tl.int64) * (sv_g * UNIT)
        b_acc, b_total = tl.zeros([BM, BDV], tl.float32), tl.zeros([BM, BN], tl.float32)
        b_zero = b_acc + (peak * 0.0)[:, None]  # not a constant: Triton would turn the sum of tiles into one chain
        for i_c in tl.range(i_s * per_split, tl.minimum((i_s + 1) * per_split, tl.cdiv(K, BN)), num_stages=STAGES):
            o_k = i_c * BN + tl.arange(0, BN)
            p_s = scores + o_r[:, None].to(tl.int64) * (stride * 16) + o_k[None, :]
            m_in = m_m[:, None] & (o_k < stride * 16)[None, :]
            b_s = tl.load(p_s, mask=m_in, other=float("-inf"), eviction_policy="evict_first")
            p_vt = p_v + o_k[:, None].to(tl.int64) * (sv_k * UNIT) + o_d[None, :]
            m_vt = (o_k < K)[:, None] & (o_d < DV)[None, :]
            b_v = tl.load(p_vt, mask=m_vt, other=0.0, eviction_policy="evict_first")
            m_taken, m_listed = taken_of(b_s, o_k[None, :], cut, False)
            if tl.max(in_a_row(m_listed.to(tl.int32))) > 0:
                o_all = tl.broadcast_to(o_k[None, :], [BM, BN])
                keep_listed(b_s, o_all, m_listed, o_e, list_pos, list_val, list_count, LIST)
            b_w = tl.where(m_taken, weight_of(b_s - peak[:, None], PRECISE), 0.0)
            if PRECISE:  # a sum per tile, added to the others: less rounding than one chain
                b_acc += tl.dot(b_w, b_v, b_zero, input_precision="ieee")
            else:
                b_acc = dot_few(b_w.to(b_v.dtype), b_v, b_acc)
            b_total += b_w
        o_out = o_r.to(tl.int64) * splits + i_s
        tl.store(sums + o_out[:, None] * DV + o_d[None, :], b_acc, mask=m_m[:, None] & (o_d < DV)[None, :])
        tl.store(totals + o_out, tl.sum(b_total, 1), mask=m_m)
