"""Scores of every key and, in the same launch, the limits of a mask's rows, where scoring does not need them."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import bounds_of, count_row, store_bounds
from sah_transformers.kernels.decode.score import score_chunk


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sk_b", "sk_g", "sm_b", "sm_q", "first", "first_share", "last", "last_share",
        "least",
    ]
)  # fmt: skip
def score_and_look_kernel(
    q, k, mask, counts, limits, scores, peaks, masses,
    K, B, stride, chunks, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share, least,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, AT_ONCE: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Scores and one mass of a chunk, see ``score_chunk``; before them, a program per query looks at its row of the
    mask, which scoring hides: ``limits [5, B*Q]``, see ``bounds_of``."""
    i_c, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_c >= Q:
        score_chunk(
            q, k, mask, None, None, scores, None, peaks, None, masses, i_c - Q, i_bg, i_m,
            K, B, stride, chunks, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
            scaling, softcap, first, first_share, last, last_share,
            H, G, Q, D, BD, CAUSAL, MASKED, SOFTCAP, UNIT, 1, 0, BM, BN, TILES, STAGES,
        )  # fmt: skip
    elif (i_bg % G == 0) & (i_m == 0):
        i = (i_bg // G).to(tl.int64) * Q + i_c
        segments = count_row(mask, counts, i, K, sm_b, sm_q, sm_k, Q, CAUSAL, AT_ONCE, LENGTH)
        tl.debug_barrier()
        n, first_end, last_start, begin, end = bounds_of(
            mask, counts, i, K, segments, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
            Q, CAUSAL, SEGMENTS, LENGTH,
        )  # fmt: skip
        store_bounds(limits, i, B * Q, n, first_end, last_start, begin, end)
