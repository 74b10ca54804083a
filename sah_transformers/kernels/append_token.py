"""One token's keys and values into a cache's buffers: a launch, where PyTorch's operations take two, or five."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "new_keys", "new_values", "keys", "values", "length", "rows", "capacity", "G", "sk_b", "sk_g", "sv_b", "sv_g"
    ]
)  # fmt: skip
def append_token_kernel(
    new_keys, new_values, keys, values, length, rows, capacity, G, sk_b, sk_g, sv_b, sv_g,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, POINT: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """Rows ``(b, g)`` of ``new_keys [B, G, 1, D]`` become key ``length`` of ``keys [B, G, capacity, D]``; values too.

    ``BR`` rows per program. ``POINT``: ``length`` is an address, and a program ``ALONE`` counts the token there.
    """
    i_k = tl.load(length) if POINT else length
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    b, g = (o_r // G).to(tl.int64)[:, None], (o_r % G).to(tl.int64)[:, None]
    m_r = (o_r < tl.where(i_k < capacity, rows, 0))[:, None]
    at = (o_r.to(tl.int64) * capacity + i_k)[:, None]
    o_d, o_v = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    b_k = tl.load(new_keys + b * sk_b + g * sk_g + o_d, mask=m_r & (o_d < D))
    b_v = tl.load(new_values + b * sv_b + g * sv_g + o_v, mask=m_r & (o_v < DV))
    tl.store(keys + at * D + o_d, b_k, mask=m_r & (o_d < D))
    tl.store(values + at * DV + o_v, b_v, mask=m_r & (o_v < DV))
    if POINT and ALONE:
        tl.debug_barrier()  # every thread has read the length
        tl.store(length, i_k + 1)
