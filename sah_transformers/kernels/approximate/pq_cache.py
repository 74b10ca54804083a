"""PQCache: a byte per sub-vector and key, and a table of ``scaling * q.centroid`` per row and sub-vector.

2 x 6 bits: 2 bytes read per key and KV head, 4 written per key and query head; 75 instructions per key and query
head, with one look-up per sub-vector among 64 numbers (two per bank: at most two turns of the load unit). 19 MB are 6
us, the look-ups 3 us, the instructions 11 us: **12 to 15 us**, and 3 us for the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate import launch as shared
from sah_transformers.kernels.approximate.k_means import codes_of, fits, snapped
from sah_transformers.kernels.approximate.launch import (
    MOST_ROWS,
    Levels,
    Samples,
    Scoring,
    Tile,
    steps,
    unit_of,
    widest,
)
from sah_transformers.kernels.approximate.levels import keep_scores, open_row
from sah_transformers.kernels.approximate.line import keep_line, sampled_keys
from sah_transformers.kernels.approximate.place import Direct, Span, many, programs_of
from sah_transformers.kernels.approximate.rows import end_of, rows_of, seen_of
from sah_transformers.kernels.decode.score import close_tally, keep_tile, open_tally
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.decode.values import even
from sah_transformers.kernels.device import no_kernels
from sah_transformers.maskers.pq_cache import encode

TILES = (Tile(512, 1, 4), Tile(256, 1, 4), Tile(256, 1, 2), Tile(256, 2, 4), Tile(1024, 1, 8), Tile(256, 4, 4))
LEVEL_WARPS = 4


@dataclass(frozen=True)
class Given(shared.Given):
    """Codebooks of the sequences: float32 ``[B, G, M, C, S]``, ``step [B, G, M]``, float64 ``radius [B, G, M]`` for the
    metric ``"ip"``, and bool ``ready [B]``; all contiguous."""

    centroids: torch.Tensor
    step: torch.Tensor
    ready: torch.Tensor
    radius: torch.Tensor | None = None


def given_of(side: dict[str, torch.Tensor]) -> Given:
    """What the kernels need of a masker whose codebooks are in ``side``."""
    return Given(side["centroids"], side["step"], side["ready"], side.get("radius"))


def why_not(given: Given, dim: int) -> str:
    """Why these kernels cannot take the method, or ""."""
    return ""


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Given) -> dict[str, tuple[int, torch.dtype]]:
    return {"table": (call.rows * given.centroids.shape[2] * given.centroids.shape[3], torch.float32)}


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]) -> None:
    """``scaling * q.centroid`` of every row, sub-vector and centroid: float32 ``[R, M, C]``."""
    _, groups, parts, count, width = given.centroids.shape
    _, heads, rows, dim = call.q.shape
    launch(
        table_kernel, (call.rows, parts, 1),
        launch.address(call.q), launch.address(given.centroids), s["table"], *call.q.stride()[:3], call.scaling,
        H=heads, G=groups, Q=rows, M=parts, C=count, S=width, SUB=dim // parts, BC=power_of_2(count),
        BS=min(32, power_of_2(dim // parts)), warps=4,
    )  # fmt: skip


def read(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, int]]:
    """What kernels take that look codes up: pointers, numbers, compile-time constants."""
    parts = side["codes"].shape[3]
    codes = widest(side["codes"], parts)
    unit = unit_of(codes)
    pointers = (*map(launch.address, (call.q, call.k, codes)), s["table"], launch.address(given.ready))
    places = (*call.q.stride()[:3], *call.k.stride()[:3], call.scaling, *steps(codes, unit), codes.stride(3))
    sizes = {"D": call.q.shape[3], "M": parts, "C": given.centroids.shape[3]}
    return pointers, places, {**sizes, "STEP": codes.stride(2), "UNIT": unit}


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], tile: Tile
) -> None:
    pointers, numbers, constants = read(launch, call, side, given, s)
    bm = min(MOST_ROWS, power_of_2(call.in_group))
    launch(
        code_score_kernel, (call.stride // tile.span, call.q.shape[0] * call.groups, -(-call.in_group // bm)),
        *pointers, *call.arrays(), *call.numbers(tile.span), *numbers,
        **call.shape(), **constants, BM=bm, BN=tile.keys, COUNT=tile.count, warps=tile.warps,
    )  # fmt: skip


def line(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], samples: Samples
) -> None:
    """Lines from the scores of sampled keys."""
    pointers, numbers, constants = read(launch, call, side, given, s)
    launch(
        code_line_kernel, (call.rows, 1, 1), *pointers, call.mask, call.limits, samples.lines,
        *call.line_numbers(samples), *numbers,
        **call.sight(), **constants, SAMPLES=samples.count, BINS=samples.bins, warps=samples.warps,
    )  # fmt: skip


def levels(call: Scoring, given: Given) -> int:
    """0: scores are no whole numbers."""
    return 0


def level(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], cut: Levels
) -> None:
    """Levels on the rows' lines beside scores."""
    pointers, numbers, constants = read(launch, call, side, given, s)
    launch(
        code_level_kernel, (call.stride // cut.chunk, call.rows, 1),
        *pointers, call.mask, call.limits, cut.lines, call.scores, cut.levels, cut.histogram,
        *call.numbers(cut.chunk), *numbers,
        **call.sight(), **constants, CHUNK=cut.chunk, BINS=cut.bins, warps=cut.warps,
    )  # fmt: skip


def append(
    buffers: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, span: Span, given: Given
) -> None:
    """Codes of ``keys [B, G, K, D]`` in ``span`` into ``buffers``: the masker's, as all sums are exact."""
    storage = buffers["codes"]
    batch, groups, _, dim = keys.shape
    parts, count, width = given.centroids.shape[2:]
    if not isinstance(span, torch.Tensor) and (many(span) or no_kernels(keys)):
        keys, storage = keys[:, :, slice(*span)], storage[:, :, slice(*span)]
        if given.radius is None and fits(keys, width) and not no_kernels(keys):
            codes_of(keys, given.centroids, given.step, storage)
            return
        encode(keys, given.centroids, given.step, given.radius, storage)
        return
    launch = Direct()
    start, n = programs_of(launch, span)
    launch(
        code_kernel, (groups * parts, batch * n, 1),
        keys, given.centroids, given.step, given.step if given.radius is None else given.radius, storage,
        start, n, *keys.stride()[:3], *storage.stride(),
        G=groups, M=parts, C=count, S=width, SUB=dim // parts, POINT=isinstance(span, torch.Tensor),
        BC=power_of_2(count), BS=power_of_2(dim // parts), warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["span", "n", "sk_b", "sk_g", "sk_n", "sc_b", "sc_g", "sc_n", "sc_m"])
def code_kernel(
    keys, centroids, step, radius, codes, span, n, sk_b, sk_g, sk_n, sc_b, sc_g, sc_n, sc_m,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr, POINT: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Codes of one sub-vector, each of ``n`` programs for every ``n``-th key of the span.

    Whole numbers in float64, so that every order of sums agrees.
    """
    i_gm, i_bn = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_bn // n).to(tl.int64), i_bn % n
    i_g, i_m = i_gm // M, i_gm % M
    o_s, o_c = tl.arange(0, BS), tl.arange(0, BC)
    i_book = (i_b * G + i_g) * M + i_m
    m_c = o_c < C
    p_c = centroids + i_book * (C * S) + o_c[:, None] * S  # under way before it is known which key is new
    b_c = tl.load(p_c + o_s[None, :], mask=m_c[:, None] & (o_s < SUB)[None, :], other=0.0)
    b_last = tl.load(centroids + i_book * (C * S) + o_c * S + SUB, mask=m_c & (S > SUB), other=0.0)
    inverse = 1.0 / tl.load(step + i_book).to(tl.float64)  # of a power of two
    begin = tl.load(span) if POINT else span
    end = tl.load(span + 1) if POINT else span + n
    b_c, b_last = b_c.to(tl.float64) * inverse, b_last.to(tl.float64) * inverse
    b_square = tl.sum(b_c * b_c, 1) + b_last * b_last
    for i_k in tl.range(begin + i_n, end, n):
        i_key = tl.cast(i_k, tl.int64)
        p_key = keys + i_b * sk_b + i_g.to(tl.int64) * sk_g + i_key * sk_n + i_m * SUB
        b_x = snapped(p_key, o_s, SUB, inverse)
        b_far = b_square - 2 * tl.sum(b_c * b_x[None, :], 1)
        if S > SUB:
            more = tl.maximum(tl.load(radius + i_book) - tl.sum(b_x * b_x), 0.0)
            b_far -= 2 * b_last * even(tl.sqrt(more))
        code = tl.argmin(tl.where(o_c < C, b_far, float("inf")), 0)
        p = codes + i_b * sc_b + i_g.to(tl.int64) * sc_g + i_key * sc_n + i_m * sc_m
        tl.store(p, code.to(tl.uint8))


@triton.jit(do_not_specialize=["scaling"])
def table_kernel(
    q, centroids, table, sq_b, sq_h, sq_q, scaling,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    SUB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One row and sub-vector, in float64 as the masker."""
    i_r, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    o_c = tl.arange(0, BC)
    p_q = q + i_b.to(tl.int64) * sq_b + i_h * sq_h + i_q * sq_q + i_m * SUB
    p_c = centroids + ((i_b.to(tl.int64) * G + i_h // (H // G)) * M + i_m) * (C * S) + o_c[:, None] * S
    b_t = tl.zeros([BC], tl.float64)
    for i_s in tl.static_range(0, SUB, BS):
        o_s = i_s + tl.arange(0, BS)
        b_q = tl.load(p_q + o_s, mask=o_s < SUB, other=0.0).to(tl.float64)
        b_c = tl.load(p_c + o_s[None, :], mask=(o_c < C)[:, None] & (o_s < SUB)[None, :], other=0.0).to(tl.float64)
        b_t += tl.sum(b_c * b_q[None, :], 1)
    tl.store(table + (i_r.to(tl.int64) * M + i_m) * C + o_c, (b_t * scaling).to(tl.float32), mask=o_c < C)


@triton.jit
def code_scores(
    q, k, codes, table, ready, i_b, i_g, i_h, i_q, i_r, o_k, K, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, scaling,
    sc_b, sc_g, sc_w,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """As ``code_score_kernel``'s, of one row's keys ``o_k``."""
    EACH: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // 8
    i_b, i_g = i_b.to(tl.int64), i_g.to(tl.int64)
    p_codes = codes + i_b * sc_b * UNIT + i_g * (sc_g * UNIT)
    p_table = table + i_r.to(tl.int64) * (M * C)
    b_s = tl.zeros_like(o_k).to(tl.float32)
    if tl.load(ready + i_b) != 0:
        for i_w in tl.range(0, M // EACH, loop_unroll_factor=4 if M > EACH else 1):
            b_word = tl.load(p_codes + o_k.to(tl.int64) * STEP + i_w * sc_w, mask=o_k < end_of(K, UNIT), other=0)
            for i in tl.static_range(EACH):
                b_code = ((b_word >> (8 * i)) & 0xFF).to(tl.int32)
                b_s += tl.load(p_table + (i_w * EACH + i) * C + b_code, mask=o_k < K, other=0.0)
    else:
        p_q = q + i_b * sq_b + i_h.to(tl.int64) * sq_h + i_q * sq_q
        p_k = k + i_b * sk_b + i_g * sk_g + o_k.to(tl.int64) * sk_k
        for i_d in tl.range(0, D):
            b_k = tl.load(p_k + i_d, mask=o_k < K, other=0.0).to(tl.float32)
            b_s += tl.load(p_q + i_d).to(tl.float32) * b_k
        b_s = b_s * scaling
    return b_s


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "sk_b", "sk_g",
        "sk_k", "scaling", "sc_b", "sc_g", "sc_w",
    ]
)  # fmt: skip
def code_score_kernel(
    q, k, codes, table, ready, mask, limits, lines, scores, histogram, peaks, aboves, masses,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k,
    scaling, sc_b, sc_g, sc_w,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``COUNT * BN`` keys: the sum of the table's entries at a key's codes.

    A sequence without codebooks has ``scaling * q.k`` instead, a channel at a time: it is short.
    """
    i_c, i_bg = tl.program_id(0), tl.program_id(1)
    i_b, i_g = i_bg // G, i_bg % G
    EACH: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // 8
    IN_GROUP: tl.constexpr = H // G * Q
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_q, o_r, m_m, first_end, last_start, reach = rows_of(
        limits, i_bg, o_m, B, K, first, first_share, last, last_share, IN_GROUP, G, Q, CAUSAL, MASKED
    )
    p_codes = codes + i_b.to(tl.int64) * sc_b * UNIT + i_g.to(tl.int64) * (sc_g * UNIT)
    p_table = table + o_r[:, None].to(tl.int64) * (M * C)
    coded = tl.load(ready + i_b) != 0
    R = B * G * IN_GROUP
    b_peak, b_one, b_two, scale, offset = open_tally(lines, o_r, m_m, R, MASSES, BINS, BM, BN)
    for i_t in tl.range(0, COUNT):
        o_k = (i_c * COUNT + i_t) * BN + tl.arange(0, BN)
        b_s = tl.zeros([BM, BN], tl.float32)
        if coded:
            for i_w in tl.range(0, M // EACH, loop_unroll_factor=4 if M > EACH else 1):
                o_word = o_k.to(tl.int64)[None, :] * STEP + o_m[:, None] * 0  # in the tile's form: no exchange of codes
                p_word = p_codes + o_word + i_w * sc_w
                b_word = tl.load(p_word, mask=m_m[:, None] & (o_k < end_of(K, UNIT))[None, :], other=0)
                for i in tl.static_range(EACH):
                    b_code = ((b_word >> (8 * i)) & 0xFF).to(tl.int32)
                    p_entry = p_table + (i_w * EACH + i) * C + b_code
                    b_s += tl.load(p_entry, mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
        else:
            o_h = i_g * (H // G) + o_m // Q
            p_q = q + i_b.to(tl.int64) * sq_b + o_h.to(tl.int64) * sq_h + o_q * sq_q
            p_k = k + i_b.to(tl.int64) * sk_b + i_g.to(tl.int64) * sk_g + o_k.to(tl.int64) * sk_k
            for i_d in tl.range(0, D):
                b_q = tl.load(p_q + i_d, mask=m_m, other=0.0).to(tl.float32)
                b_k = tl.load(p_k + i_d, mask=o_k < K, other=0.0).to(tl.float32)
                b_s += b_q[:, None] * b_k[None, :]
            b_s = b_s * scaling
        b_peak, b_one, b_two = keep_tile(
            b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach,
            first_end, last_start, K, stride, sm_b, sm_q, sm_k, Q, MASKED, MASSES, BINS,
        )  # fmt: skip
    close_tally(b_peak, b_one, b_two, peaks, aboves, masses, o_r, m_m, i_c, chunks, R, MASSES, BINS)


@triton.jit(
    do_not_specialize=[
        "K", "B", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "size", "share", "sk_b", "sk_g",
        "sk_k", "scaling", "sc_b", "sc_g", "sc_w",
    ]
)  # fmt: skip
def code_line_kernel(
    q, k, codes, table, ready, mask, limits, lines,
    K, B, sm_b, sm_q, sm_k, first, first_share, last, last_share, size, share, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k,
    scaling, sc_b, sc_g, sc_w,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, SAMPLES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The line of one row."""
    i_e = tl.program_id(0)
    i_b, i_h, i_q = i_e // (H * Q), i_e // Q % H, i_e % Q
    n, begin, end, o_k = sampled_keys(
        limits, i_b, i_q, K, B, first, first_share, last, last_share, Q, CAUSAL, MASKED, SAMPLES
    )
    b_s = code_scores(
        q, k, codes, table, ready, i_b, i_h // (H // G), i_h, i_q, i_e, o_k, K,
        sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, scaling, sc_b, sc_g, sc_w, D, M, C, STEP, UNIT,
    )  # fmt: skip
    m_k = seen_of(mask, i_b, i_q, o_k, begin, end, K, sm_b, sm_q, sm_k, Q, CAUSAL, MASKED) & (b_s > float("-inf"))
    keep_line(b_s, m_k, lines, i_e, n, first, first_share, last, last_share, size, share, False, BINS)


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "sk_b", "sk_g",
        "sk_k", "scaling", "sc_b", "sc_g", "sc_w",
    ]
)  # fmt: skip
def code_level_kernel(
    q, k, codes, table, ready, mask, limits, lines, scores, levels, histogram,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k,
    scaling, sc_b, sc_g, sc_w,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One row, one chunk of keys: scores, levels and their counts."""
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    row = open_row(limits, lines, i_e, K, B, first, first_share, last, last_share, Q, CAUSAL, MASKED)
    i_b, i_h = i_e // (H * Q), i_e // Q % H
    b_s = code_scores(
        q, k, codes, table, ready, i_b, i_h // (H // G), i_h, i_e % Q, i_e,
        i_c * CHUNK + tl.arange(0, CHUNK), K, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, scaling, sc_b, sc_g, sc_w,
        D, M, C, STEP, UNIT,
    )  # fmt: skip
    keep_scores(
        b_s, row, mask, scores, levels, histogram, i_e, i_c, K, B, stride, chunks,
        sm_b, sm_q, sm_k, Q, CAUSAL, MASKED, CHUNK, BINS,
    )  # fmt: skip
