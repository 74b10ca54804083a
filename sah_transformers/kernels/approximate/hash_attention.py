"""HashAttention: 32 bits of a learned hash per word, key and query head; the score counts the bits that agree.

Levels (`levels.py`) take the place of scores: per key and query head 4 bytes are read and 1 written, 21 MB, 7 us; 63
instructions, most of them Triton 3.6's histogram: 15 us measured. ``summed``: 18 MB, 6 us: 11 us. Scores,
where a byte does not hold the levels: 4 bytes read and 4 written; 68 instructions, 50 of them the tail that all scoring
kernels share: **13 to 16 us**, ``summed`` **8 to 10 us**. The hashes of the queries, and of a new key, are one launch
of 6.9 us each: three layers in float64, one program per head and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate import launch as shared
from sah_transformers.kernels.approximate.hash_digits import Digits, digits_of
from sah_transformers.kernels.approximate.hash_layers import hash_vectors
from sah_transformers.kernels.approximate.hash_prompt import fits, hash_prompt
from sah_transformers.kernels.approximate.launch import MOST_ROWS, Levels, Scoring, Tile, steps, unit_of
from sah_transformers.kernels.approximate.levels import keep_levels
from sah_transformers.kernels.approximate.place import Direct, Span, many, programs_of
from sah_transformers.kernels.approximate.rows import bits_set, end_of, rows_of, seen_of
from sah_transformers.kernels.decode.limits import limits_of
from sah_transformers.kernels.decode.score import close_tally, keep_tile, open_tally
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.device import no_kernels
from sah_transformers.maskers.hash_attention import HashAttentionTopKMasker, hashes
from sah_transformers.maskers.hash_weights import Mlp
from sah_transformers.rows import Context

TILES = (Tile(512, 1, 4), Tile(256, 1, 2), Tile(256, 2, 4), Tile(1024, 1, 4), Tile(256, 4, 4))
MOST_WIDTH = 256
"""Numbers of a layer that a program of ``hash_kernel`` can hold."""


@dataclass(frozen=True)
class Given(shared.Given):
    """Weights of the local heads (``HashAttentionTopKMasker.mlp("q" | "k", ...)``) and the number of bits."""

    query: Mlp
    key: Mlp
    bits: int

    @cached_property
    def digits(self) -> Digits:
        """What prompts are hashed with."""
        return digits_of(self.key)


@lru_cache(maxsize=1024)
def given_of(
    masker: HashAttentionTopKMasker, layer_idx: int, heads: int, head_offset: int, dim: int, device: torch.device
) -> Given:
    """What the kernels need of a masker."""
    ctx = Context(layer_idx=layer_idx, heads=heads, head_offset=head_offset)
    query, key = (masker.mlp(side, ctx, heads, dim, device) for side in ("q", "k"))
    return Given(query, key, masker.config.hat_bits)


def why_not(given: Given, dim: int) -> str:
    """Why these kernels cannot take the method, or ""."""
    widest = max(dim, *(bias.shape[1] for _, bias in (*given.query, *given.key)))
    return "" if widest <= MOST_WIDTH else f"a layer of the hash has {widest} numbers, more than {MOST_WIDTH}"


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Given) -> dict[str, tuple[int, torch.dtype]]:
    return {"query_hash": (call.rows * side["hash"].shape[3], torch.int32)}


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]) -> None:
    """Hashes of the queries, int32 ``[R, words]``."""
    heads, rows = call.q.shape[1:3]
    words = side["hash"].shape[3]
    _hash(launch, call.q, given.query, s["query_hash"], (heads * rows * words, rows * words, words, 1), (0, rows))


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], tile: Tile
) -> None:
    kept = side["hash"]
    unit = unit_of(kept)
    bm = min(MOST_ROWS, power_of_2(call.in_group))
    launch(
        hash_score_kernel, (call.stride // tile.span, call.q.shape[0] * call.groups, -(-call.in_group // bm)),
        launch.address(kept), s["query_hash"], *call.arrays(), *call.numbers(tile.span),
        *steps(kept, unit), kept.stride(3),
        **call.shape(), SETS=kept.shape[1], WORDS=kept.shape[3], BITS=given.bits, SUM=call.summed,
        STEP=kept.stride(2), UNIT=unit, BM=bm, BN=tile.keys, COUNT=tile.count, warps=tile.warps,
    )  # fmt: skip


def levels(call: Scoring, given: Given) -> int:
    """Candidates have so many levels, whole numbers from 1 on; 0: more than a byte holds, or not these are ranked."""
    most = given.bits * (call.q.shape[1] // call.groups if call.summed else 1) + 1
    return most if most < 255 and not call.masses_too else 0


def level(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], cut: Levels
) -> None:
    """Levels in place of scores: one more than the bits that agree."""
    kept = side["hash"]
    unit = unit_of(kept)
    rows = call.q.shape[0] * call.groups * call.in_group
    launch(
        hash_level_kernel, (call.stride // cut.chunk, rows, 1),
        launch.address(kept), s["query_hash"], call.mask, call.limits, cut.levels, cut.histogram,
        *call.numbers(cut.chunk), *steps(kept, unit), kept.stride(3),
        **call.sight(), SETS=kept.shape[1], WORDS=kept.shape[3], BITS=given.bits, SUM=call.summed,
        STEP=kept.stride(2), UNIT=unit, CHUNK=cut.chunk, BINS=cut.bins, warps=cut.warps,
    )  # fmt: skip


def append(
    buffers: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, span: Span, given: Given
) -> None:
    """Hashes of ``keys [B, G, K, D]`` in ``span`` into ``buffers["hash"] [B, heads, >= K, words]``.

    Equal to the masker's: sums in float64 have another order here, which a sign sees within 1e-14 of zero.
    """
    storage = buffers["hash"]
    if isinstance(span, torch.Tensor) or not (many(span) or no_kernels(keys)):
        _hash(Direct(), keys, given.key, storage, storage.stride(), span)
    elif not no_kernels(keys) and fits(keys, given.key):
        hash_prompt(keys[:, :, : span[1]], given.key, given.digits, storage, span[0])
    else:
        storage[:, :, slice(*span)] = hashes(keys[:, :, slice(*span)], given.key)


def _hash(launch: Any, x: torch.Tensor, mlp: Mlp, out: Any, strides: tuple[int, ...], span: Span) -> None:
    """Hashes of ``x [B, heads, n, D]`` in ``span`` to ``out [B, max(heads, S), ..., words]``."""
    batch, heads, _, dim = x.shape
    start, n = programs_of(launch, span)
    sets = len(mlp[0][1])
    first, second, bits = (bias.shape[1] for _, bias in mlp)
    launch(
        hash_kernel, (max(heads, sets), batch * n, 1),
        launch.address(x), *(launch.address(t.contiguous()) for weight, bias in mlp for t in (weight.mT, bias)),
        launch.address(out) if isinstance(out, torch.Tensor) else out, start,
        n, *x.stride()[:3], *strides,
        HEADS=heads, SETS=sets, D=dim, H0=first, H1=second, BITS=bits, POINT=isinstance(span, torch.Tensor),
        BD=power_of_2(dim), B0=power_of_2(first), B1=power_of_2(second), BB=max(32, power_of_2(bits)), warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["span", "n", "sx_b", "sx_h", "sx_n", "so_b", "so_h", "so_n", "so_w"])
def hash_kernel(
    x, w0, b0, w1, b1, w2, b2, out, span, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, so_w,
    HEADS: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BITS: tl.constexpr,
    POINT: tl.constexpr, BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Packed signs of vectors under one head's MLP, each of ``n`` programs every ``n``-th of the span."""
    i_h, i_bn = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_bn // n).to(tl.int64), i_bn % n
    MOST: tl.constexpr = max(HEADS, SETS)
    i_s, i_x = i_h // (MOST // SETS), i_h // (MOST // HEADS)
    begin = tl.load(span) if POINT else span
    end = tl.load(span + 1) if POINT else span + n
    for i_k in tl.range(begin + i_n, end, n):  # nearly always once: weights kept from turn to turn would spill
        p_x = x + i_b * sx_b + i_x.to(tl.int64) * sx_h + tl.cast(i_k, tl.int64) * sx_n
        p_out = out + i_b * so_b + i_h.to(tl.int64) * so_h + tl.cast(i_k, tl.int64) * so_n
        hash_vectors(p_x, p_x, w0, b0, w1, b1, w2, b2, p_out, p_out, so_w, i_s, D, H0, H1, BITS, BD, B0, B1, BB, False)


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "sh_b", "sh_s",
        "sh_w",
    ]
)  # fmt: skip
def hash_score_kernel(
    kept, query_hash, mask, limits, lines, scores, histogram, peaks, aboves, masses,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sh_b, sh_s, sh_w,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, SETS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    SUM: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``COUNT * BN`` keys: ``bits - 2 popcount(query's hash xor key's)``."""
    i_c, i_bg = tl.program_id(0), tl.program_id(1)
    i_b, i_g = i_bg // G, i_bg % G
    HEADS: tl.constexpr = H // G if SUM else 1  # added up in a row
    IN_GROUP: tl.constexpr = Q if SUM else H // G * Q
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_q, o_r, m_m, first_end, last_start, reach = rows_of(
        limits, i_bg, o_m, B, K, first, first_share, last, last_share, IN_GROUP, G, Q, CAUSAL, MASKED
    )
    R = B * G * IN_GROUP
    b_peak, b_one, b_two, scale, offset = open_tally(lines, o_r, m_m, R, MASSES, BINS, BM, BN)
    p_kept = kept + i_b.to(tl.int64) * sh_b * UNIT
    for i_t in tl.range(0, COUNT):
        o_k = (i_c * COUNT + i_t) * BN + tl.arange(0, BN)
        b_d = tl.zeros([BM, BN], tl.int32)
        for i_h in tl.static_range(HEADS):
            o_h = i_g * (H // G) + (o_m // Q if HEADS == 1 else o_m * 0 + i_h)
            o_s = o_h // (H // SETS)
            for i_w in tl.static_range(WORDS):
                p_query = query_hash + ((i_b * H + o_h) * Q + o_q) * WORDS + i_w
                b_q = tl.load(p_query, mask=m_m, other=0)
                p_k = p_kept + o_s[:, None].to(tl.int64) * (sh_s * UNIT) + i_w * sh_w + (o_k.to(tl.int64) * STEP)[None]
                b_k = tl.load(p_k, mask=m_m[:, None] & (o_k < end_of(K, UNIT))[None, :], other=0)
                b_d += bits_set(b_q[:, None] ^ b_k)
        b_s = (HEADS * BITS - 2 * b_d).to(tl.float32)
        b_peak, b_one, b_two = keep_tile(
            b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach,
            first_end, last_start, K, stride, sm_b, sm_q, sm_k, Q, MASKED, MASSES, BINS,
        )  # fmt: skip
    close_tally(b_peak, b_one, b_two, peaks, aboves, masses, o_r, m_m, i_c, chunks, R, MASSES, BINS)


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "sh_b", "sh_s",
        "sh_w",
    ]
)  # fmt: skip
def hash_level_kernel(
    kept, query_hash, mask, limits, levels, histogram,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sh_b, sh_s, sh_w,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    SETS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, SUM: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One selection row, one chunk of keys: levels of the candidates, and how many of them each level has."""
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    HEADS: tl.constexpr = H // G if SUM else 1  # added up
    ROWS: tl.constexpr = H // HEADS * Q
    i_b, i_q = i_e // ROWS, i_e % Q
    _, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    b_l = tl.full([CHUNK], HEADS * BITS + 1, tl.int32)
    for i_h in tl.static_range(HEADS):
        o_h = i_e // Q % (H // HEADS) * HEADS + i_h
        p_k = kept + i_b.to(tl.int64) * sh_b * UNIT + (o_h // (H // SETS)).to(tl.int64) * (sh_s * UNIT)
        for i_w in tl.static_range(WORDS):
            b_q = tl.load(query_hash + ((i_b * H + o_h) * Q + i_q) * WORDS + i_w)
            b_k = tl.load(p_k + i_w * sh_w + o_k.to(tl.int64) * STEP, mask=o_k < end_of(K, UNIT), other=0)
            b_l -= bits_set(b_q ^ b_k)
    m_k = seen_of(mask, i_b, i_q, o_k, first_end, last_start, K, sm_b, sm_q, sm_k, Q, CAUSAL, MASKED)
    keep_levels(tl.where(m_k, b_l, 0), levels, histogram, i_e, i_c, stride, chunks, CHUNK, BINS)
