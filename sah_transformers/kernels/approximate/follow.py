"""The device takes up keys that the host does not count: where they begin and end, and their positions."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "B", "sp_b", "sr_b"])
def follow_kernel(length, span, positions, real, n, B, sp_b, sr_b, sr_k, BB: tl.constexpr):
    """One program: ``span`` becomes what is new up to ``length``, of which the last ``n`` keys came with this call.

    From there on ``positions [B, capacity]`` are set: numbers of the ``real [B, K]`` tokens, -1 for padding and for
    what is no longer there. Keys between what was known and the call's are new too. Where fewer are left than were
    known, somebody cut the sequence back: everything is new.
    """
    end = tl.load(length)
    known = tl.load(span + 1)
    first = tl.minimum(known, end - n)
    o_b = tl.arange(0, BB)
    m_b = o_b < B
    p_position, p_real = positions + o_b.to(tl.int64) * sp_b, real + o_b.to(tl.int64) * sr_b
    b_last = tl.where(m_b, -1, 0).to(tl.int64)  # position of the last real token before
    i_k = first - 1
    looking = (i_k >= 0).to(tl.int32)
    while looking > 0:
        b_last = tl.maximum(b_last, tl.load(p_position + i_k, mask=m_b, other=0))
        i_k -= 1
        looking = ((tl.min(b_last, 0) < 0) & (i_k >= 0)).to(tl.int32)
    for i_k in tl.range(first, end):
        m_real = tl.load(p_real + i_k * sr_k, mask=m_b, other=0) != 0
        b_last += m_real.to(tl.int64)
        tl.store(p_position + i_k, tl.where(m_real, b_last, -1), mask=m_b)
    for i_k in tl.range(end, known):
        tl.store(p_position + i_k, tl.zeros([BB], tl.int64) - 1, mask=m_b)
    tl.debug_barrier()  # every thread has read the span
    tl.store(span, tl.where(known > end - n, 0, known))
    tl.store(span + 1, end)
