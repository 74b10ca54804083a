"""PQCache's codebooks and codes of many keys: the bits of `maskers.pq_cache`, whose sums of whole numbers are exact.

A filter: points and centroids, whole numbers up to 2**20, are cut into two parts of 11 bits, exact in half
precision; four products on tensor cores give every distance, with a bound on its error (`centre_kernel`). Where one
centroid alone can be the nearest it is; all others are compared in float64, one by one.

32,768 keys, G=8, two sub-vectors of 64 dimensions, 64 centroids, H100: 10 iterations of 90 us, codes 74 us; with the
launches between 1.37 ms for all side data, where PyTorch takes 25. Reading the keys alone takes 22 us an iteration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.kernels.decode import DTYPES
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.decode.values import even, power_above
from sah_transformers.maskers.pq_cache import GRID, LARGEST, REACH

END = tl.constexpr(LARGEST)
"""Numbers of keys from this on count as zero."""

MOST_DIM = 128
"""Dimensions of a sub-vector that bounds of errors are for."""

MOST_BOOKS = 2**16 - 1
"""Codebooks of a launch: as high as a grid may be."""

POINTS = 2048
"""Points of a program: sums of their parts are exact in float32 (2**24)."""

TILE, WARPS = 64, 4
assert REACH == 8 * GRID == 2**23
assert POINTS * 1024 < 2**24
assert POINTS <= 32 * TILE  # a bit of an int32 for each tile


def fits(keys: torch.Tensor, width: int) -> bool:
    """Whether these kernels take sub-vectors of ``width`` dimensions of ``keys [B, G, K, D]``."""
    books = keys.shape[0] * keys.shape[1] * (keys.shape[3] // width)
    return keys.dtype in DTYPES and keys.stride(-1) == 1 and width <= MOST_DIM and books <= MOST_BOOKS


class Tables(NamedTuple):
    """What `nearest` needs of N codebooks.

    Attributes:
        parts: float16 ``[N, 2, BC, BS]``: top and low.
        squares: float32 ``[N, BC]``, in units of 2**12; inf where there is no centroid, or the same one before.
        gaps: float32 ``[N]``, in the same units: of distances that may be in another order.
    """

    parts: torch.Tensor
    squares: torch.Tensor
    gaps: torch.Tensor

    @classmethod
    def empty(cls, books: int, sizes: dict[str, int], device: torch.device) -> Tables:
        count, width = sizes["BC"], sizes["BS"]
        return cls(
            torch.empty(books, 2, count, width, dtype=torch.float16, device=device),
            torch.empty(books, count, device=device),
            torch.empty(books, device=device),
        )


def sizes_of(keys: torch.Tensor, parts: int, count: int) -> dict[str, int]:
    """Constants of all kernels."""
    width = keys.shape[3] // parts
    shape = {"G": keys.shape[1], "M": parts, "C": count, "S": width, "UNIT": unit_of(keys)}
    return shape | {"BC": max(16, power_of_2(count)), "BS": max(16, power_of_2(width))}


def warps_of(sizes: dict[str, int]) -> int:
    """Of a program that holds a whole codebook in float64."""
    return 8 if sizes["BC"] * sizes["BS"] <= 8192 else 16


def tiles_of(sizes: dict[str, int]) -> dict[str, int]:
    """Tiles of a program; the next ones are on their way where shared memory has room for them beside the codebook."""
    return {"BN": TILE, "COUNT": POINTS // TILE, "STAGES": 3 if sizes["BC"] * sizes["BS"] <= 16384 else 1}


def codebooks(keys: torch.Tensor, parts: int, count: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of ``parts`` sub-vectors of ``keys [B, G, n, D]``.

    Returns:
        ``count`` centroids float32 ``[B, G, M, C, S]``, whole multiples of ``step``, float32 ``[B, G, M]``.
    """
    batch, groups, n, dim = keys.shape
    launch, sizes, books = Direct(), sizes_of(keys, parts, count), batch * groups * parts
    steps = n, *(s // sizes["UNIT"] for s in keys.stride()[:3])
    programs = -(-n // POINTS), books, 1
    peaks = torch.zeros(books, 2, dtype=torch.int32, device=keys.device)
    few = {name: sizes[name] for name in ("G", "M", "S", "UNIT", "BS")}
    launch(peak_kernel, programs, keys, peaks, *steps, **few, BN=TILE, COUNT=POINTS // TILE, warps=WARPS)
    step = torch.empty(batch, groups, parts, device=keys.device)
    centroids = torch.empty(batch, groups, parts, count, dim // parts, device=keys.device)
    sums = torch.empty(centroids.shape, dtype=torch.float64, device=keys.device)
    members = torch.empty(centroids.shape[:4], dtype=torch.float64, device=keys.device)
    tables = Tables.empty(books, sizes, keys.device)
    for number in range(iterations + 1):
        launch(
            centre_kernel, (books, 1, 1), keys, peaks, step, centroids, sums, members, *tables, *steps,
            FIRST=number == 0, MEANS=number > 0, **sizes, warps=warps_of(sizes),
        )  # fmt: skip
        if number < iterations:
            launch(
                lloyd_kernel, programs, keys, step, centroids, *tables, sums, members, *steps,
                **sizes, **tiles_of(sizes), warps=WARPS,
            )  # fmt: skip
    return centroids, step


def codes_of(keys: torch.Tensor, centroids: torch.Tensor, step: torch.Tensor, codes: torch.Tensor) -> None:
    """Codes of ``keys [B, G, n, D]`` into uint8 ``codes [B, G, n, M]``.

    Args:
        centroids: float32 ``[B, G, M, C, S]``, whole multiples of ``step [B, G, M]``; both contiguous.
    """
    n, books = keys.shape[2], step.numel()
    launch, sizes = Direct(), sizes_of(keys, *centroids.shape[2:4])
    steps = n, *(s // sizes["UNIT"] for s in keys.stride()[:3])
    tables = Tables.empty(books, sizes, keys.device)
    launch(
        centre_kernel, (books, 1, 1), keys, step, step, centroids, step, step, *tables, *steps,
        FIRST=False, MEANS=False, **sizes, warps=warps_of(sizes),
    )  # fmt: skip
    launch(
        codes_kernel, (-(-n // POINTS), books, 1), keys, step, centroids, *tables, codes, *steps, *codes.stride(),
        **sizes, **tiles_of(sizes), warps=WARPS,
    )  # fmt: skip


def unit_of(keys: torch.Tensor) -> int:
    """What all strides of keys are multiples of, if they are: loads are then 16 bytes wide."""
    return 8 if not any(s % 8 for s in keys.stride()[:-1]) else 1


@triton.jit(do_not_specialize=["n", "sk_b", "sk_g", "sk_n"])
def peak_kernel(
    keys, peaks, n, sk_b, sk_g, sk_n,
    G: tl.constexpr, M: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The largest number of ``COUNT * BN`` sub-vectors, and the largest of their squares, into ``peaks [B, G, M, 2]``:
    as the bits of float32. NaN and numbers from ``END`` on are none."""
    i_n, i_book = tl.program_id(0), tl.program_id(1)
    p_keys = keys_of(keys, i_book, sk_b, sk_g, G, M, S, UNIT)
    b_peak, b_square = tl.zeros([BN, BS], tl.float32), tl.zeros([BN], tl.float32)
    for i_t in tl.range(0, COUNT):
        o_n = (i_n * COUNT + i_t) * BN + tl.arange(0, BN)
        b_x = finite(p_keys, o_n, n, sk_n, S, UNIT, BS)
        b_peak, b_square = tl.maximum(b_peak, tl.abs(b_x)), tl.maximum(b_square, tl.sum(b_x * b_x, 1))
    tl.atomic_max(peaks + 2 * i_book, tl.max(b_peak).to(tl.int32, bitcast=True), sem="relaxed")
    tl.atomic_max(peaks + 2 * i_book + 1, tl.max(b_square, 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def keys_of(keys, i_book, sk_b, sk_g, G: tl.constexpr, M: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr):
    """Where the sub-vectors of codebook ``(b * G + g) * M + m`` begin."""
    i_b, i_g, i_m = (i_book // (G * M)).to(tl.int64), (i_book // M % G).to(tl.int64), i_book % M
    return keys + (i_b * sk_b + i_g * sk_g) * UNIT + i_m * S


@triton.jit
def finite(p_keys, o_n, n, sk_n, S: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr):
    """Sub-vectors ``o_n`` of ``n``, float32 ``[BN, BS]``; 0 for NaN, from ``END`` on, and where there is none."""
    o_s = tl.arange(0, BS)
    p_x = p_keys + o_n.to(tl.int64)[:, None] * (sk_n * UNIT) + o_s[None, :]
    b_x = tl.load(p_x, mask=(o_n < n)[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float32)
    return tl.where(tl.abs(b_x) < END, b_x, 0.0)


@triton.jit
def whole(b_x):
    """float32 below 2**22, rounded to whole numbers, to even."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def cut(b_x):
    """Whole float32 numbers up to 2**22 as ``2**11 * top + low``, both of at most 11 bits."""
    b_top = whole(b_x * 0.00048828125)
    return b_top, b_x - b_top * 2048.0


@triton.jit(do_not_specialize=["n", "sk_b", "sk_g", "sk_n"])
def centre_kernel(
    keys, peaks, step, centroids, sums, sizes, parts, squares, gaps, n, sk_b, sk_g, sk_n,
    FIRST: tl.constexpr, MEANS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    UNIT: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One codebook: its centroids, and what ``nearest`` needs of them.

    ``FIRST``: they are keys, and the step is that of ``peaks``; ``MEANS``: those of clusters that are not empty are
    means. Both leave the sums zero.
    """
    i_book = tl.program_id(0)
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    o_cs = i_book.to(tl.int64) * (C * S) + o_c[:, None] * S + o_s[None, :]
    m_cs = (o_c < C)[:, None] & (o_s < S)[None, :]
    if FIRST or MEANS:
        peak = tl.load(peaks + 2 * i_book).to(tl.float32, bitcast=True).to(tl.float64)
        square = tl.load(peaks + 2 * i_book + 1).to(tl.float32, bitcast=True).to(tl.float64)
    if FIRST:
        unit = tl.maximum(power_above(peak), 2.0**-100) / 1048576.0
        inverse = 1.0 / unit
        tl.store(step + i_book, unit.to(tl.float32))
        o_n = tl.where(o_c < C, o_c.to(tl.int64) * n // C, n)
        p_keys = keys_of(keys, i_book, sk_b, sk_g, G, M, S, UNIT)
        b_c = even(finite(p_keys, o_n, n, sk_n, S, UNIT, BS).to(tl.float64) * inverse)
    else:
        unit = tl.load(step + i_book).to(tl.float64)
        inverse = 1.0 / unit
        b_c = tl.load(centroids + o_cs, mask=m_cs, other=0.0).to(tl.float64) * inverse
    if MEANS:
        b_size = tl.load(sizes + i_book * C + o_c, mask=o_c < C, other=0.0)[:, None]
        b_mean = even(tl.load(sums + o_cs, mask=m_cs, other=0.0) / tl.maximum(b_size, 1.0))
        b_c = tl.where(b_size > 0, b_mean, b_c)
    if FIRST or MEANS:
        tl.store(centroids + o_cs, (b_c * unit).to(tl.float32), mask=m_cs)
        tl.debug_barrier()  # they are read again below, and sums have been read
        tl.store(sums + o_cs, 0.0, mask=m_cs)
        tl.store(sizes + i_book * C + o_c, 0.0, mask=o_c < C)
    b_top, b_low = cut(b_c.to(tl.float32))
    p_part = parts + i_book.to(tl.int64) * (2 * BC * BS) + o_c[:, None] * BS + o_s[None, :]
    tl.store(p_part, b_top.to(tl.float16))
    tl.store(p_part + BC * BS, b_low.to(tl.float16))
    b_square = (tl.sum(b_c * b_c, 1) / 4096.0).to(tl.float32)
    # centroids like an earlier one are never the nearest
    b_first = tl.min(tl.where((b_square[:, None] == b_square[None, :]) & (o_c < C)[None, :], o_c[None, :], BC - 1), 1)
    o_other = i_book.to(tl.int64) * (C * S) + b_first[:, None] * S + o_s[None, :]
    b_other = tl.load(centroids + o_other, mask=m_cs, other=0.0).to(tl.float64) * inverse
    m_again = (b_first < o_c) & (tl.max(tl.abs(b_other - b_c), 1) == 0)
    tl.store(squares + i_book * BC + o_c, tl.where((o_c < C) & ~m_again, b_square, float("inf")))
    top = 512.0 * S**0.5  # 2-norms
    if FIRST or MEANS:
        sure = (peak > 2.0**-50) & (peak < 2.0**50)  # squares in float32 say more
        top = tl.where(sure, tl.minimum(top, 0.00048828125 * 1.01 * tl.sqrt(square) * inverse + 0.51 * S**0.5), top)
    of_top = tl.sqrt(tl.max(tl.sum(b_top * b_top, 1)))
    of_low = tl.sqrt(tl.max(tl.sum(b_low * b_low, 1)))
    high, rest = top * of_top, top * of_low + S**0.5 * 1024.0 * (of_top + of_low / 2048.0)
    error = 3 * S * 2.0**-22 * rest + 2.0**-22 * (tl.max(b_square) + rest + 2048.0 * high)
    error += tl.where(high < 2.0**24, 0.0, S * 2.0**-11 * high)
    tl.store(gaps + i_book, (2.04 * error).to(tl.float32))


@triton.jit
def book_of(parts, squares, gaps, i_book, BC: tl.constexpr, BS: tl.constexpr):
    """What ``centre_kernel`` left of a codebook."""
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    p_c = parts + i_book.to(tl.int64) * (2 * BC * BS) + o_c[:, None] * BS + o_s[None, :]
    c_t, c_l = tl.trans(tl.load(p_c)), tl.trans(tl.load(p_c + BC * BS))
    return c_t, c_l, tl.load(squares + i_book * BC + o_c), tl.load(gaps + i_book)


@triton.jit
def nearest(x_t, x_l, c_t, c_l, b_square, gap):
    """Which centroids may be the nearest, ``[BN, BC]``: one alone is."""
    b_z = tl.dot(x_t, c_l, tl.dot(x_l, c_t, tl.dot(x_l, c_l) * 0.00048828125))
    b_far = (b_square[None, :] - b_z) - 2048.0 * tl.dot(x_t, c_t)
    return b_far <= (tl.min(b_far, 1) + gap)[:, None]


@triton.jit
def snapped(p_x, o_s, S: tl.constexpr, inverse):
    """The sub-vector at ``p_x`` in whole numbers, as the masker has it in float64."""
    b_x = tl.load(p_x + o_s, mask=o_s < S, other=0.0).to(tl.float64)
    b_x = tl.where(tl.abs(b_x) < END, b_x, 0.0) * inverse  # not NaN
    coarse = tl.maximum(power_above(tl.max(tl.abs(b_x), 0)) / 8388608.0, 1.0)
    return even(b_x * (1.0 / coarse)) * coarse


@triton.jit
def exactly(p_x, p_c, inverse, C: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """(the centroid nearest to one sub-vector, that in whole numbers ``[BS]``), as the masker has them in float64."""
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    p_c = p_c + o_c[:, None] * S + o_s[None, :]
    b_c = tl.load(p_c, mask=(o_c < C)[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float64) * inverse
    b_x = snapped(p_x, o_s, S, inverse)
    b_far = tl.sum(b_c * b_c, 1) - 2 * tl.sum(b_c * b_x[None, :], 1)
    return tl.argmin(tl.where(o_c < C, b_far, float("inf")), 0), b_x


@triton.jit(do_not_specialize=["n", "sk_b", "sk_g", "sk_n"])
def lloyd_kernel(
    keys, step, centroids, parts, squares, gaps, sums, sizes, n, sk_b, sk_g, sk_n,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One codebook, ``COUNT * BN`` points: those nearest to each centroid summed up and counted."""
    i_n, i_book = tl.program_id(0), tl.program_id(1)
    o_c, o_s, o_t = tl.arange(0, BC), tl.arange(0, BS), tl.arange(0, BN)
    c_t, c_l, b_square, gap = book_of(parts, squares, gaps, i_book, BC, BS)
    inverse = 1.0 / tl.load(step + i_book).to(tl.float64)
    scale = inverse.to(tl.float32)
    p_keys = keys_of(keys, i_book, sk_b, sk_g, G, M, S, UNIT)
    b_top, b_low = tl.zeros([BS, BC], tl.float32), tl.zeros([BS, BC], tl.float32)
    b_size, b_open = tl.zeros([BN, BC], tl.float32), tl.zeros([BN], tl.int32)
    for i_t in tl.range(0, COUNT, num_stages=STAGES):
        o_n = (i_n * COUNT + i_t) * BN + o_t
        x_t, x_l = cut(whole(finite(p_keys, o_n, n, sk_n, S, UNIT, BS) * scale))
        x_t, x_l = x_t.to(tl.float16), x_l.to(tl.float16)
        b_one = tl.where(nearest(x_t, x_l, c_t, c_l, b_square, gap), 1.0, 0.0)
        b_sure = tl.sum(b_one, 1) == 1
        b_open |= (~b_sure & (o_n < n)).to(tl.int32) << i_t
        b_one *= tl.where(b_sure & (o_n < n), 1.0, 0.0)[:, None]
        b_size += b_one
        b_one = b_one.to(tl.float16)
        b_top = tl.dot(tl.trans(x_t), b_one, b_top)
        b_low = tl.dot(tl.trans(x_l), b_one, b_low)
    p_sum, p_size = sums + i_book.to(tl.int64) * (C * S), sizes + i_book * C
    b_sum = b_low.to(tl.float64) + b_top.to(tl.float64) * 2048.0
    tl.atomic_add(
        p_sum + o_c[None, :] * S + o_s[:, None], b_sum, mask=(o_c < C)[None, :] & (o_s < S)[:, None], sem="relaxed"
    )
    tl.atomic_add(p_size + o_c, tl.sum(b_size, 0).to(tl.float64), mask=o_c < C, sem="relaxed")
    if tl.max((b_open != 0).to(tl.int32), 0) != 0:
        p_c = centroids + i_book.to(tl.int64) * (C * S)
        for i_t in tl.range(0, COUNT):
            b_left = (b_open >> i_t) & 1
            for _ in tl.range(0, tl.sum(b_left, 0)):
                i_x = tl.min(tl.where(b_left != 0, o_t, BN), 0)
                b_left = tl.where(o_t == i_x, 0, b_left)
                i_x = ((i_n * COUNT + i_t) * BN + i_x).to(tl.int64)
                i_c, b_x = exactly(p_keys + i_x * (sk_n * UNIT), p_c, inverse, C, S, BC, BS)
                tl.atomic_add(p_sum + i_c * S + o_s, b_x, mask=o_s < S, sem="relaxed")
                tl.atomic_add(p_size + i_c, 1.0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "sk_b", "sk_g", "sk_n", "sc_b", "sc_g", "sc_n", "sc_m"])
def codes_kernel(
    keys, step, centroids, parts, squares, gaps, codes, n, sk_b, sk_g, sk_n, sc_b, sc_g, sc_n, sc_m,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Codes of one sub-vector of ``COUNT * BN`` keys, which may lie far beyond the prompt's."""
    i_n, i_book = tl.program_id(0), tl.program_id(1)
    o_c, o_t = tl.arange(0, BC), tl.arange(0, BN)
    c_t, c_l, b_square, gap = book_of(parts, squares, gaps, i_book, BC, BS)
    inverse = 1.0 / tl.load(step + i_book).to(tl.float64)
    scale = inverse.to(tl.float32)
    p_keys = keys_of(keys, i_book, sk_b, sk_g, G, M, S, UNIT)
    p_codes = codes + (i_book // (G * M)).to(tl.int64) * sc_b + (i_book // M % G).to(tl.int64) * sc_g
    p_codes += i_book % M * sc_m
    b_open = tl.zeros([BN], tl.int32)
    for i_t in tl.range(0, COUNT, num_stages=STAGES):
        o_n = (i_n * COUNT + i_t) * BN + o_t
        b_x = finite(p_keys, o_n, n, sk_n, S, UNIT, BS) * scale
        x_t, x_l = cut(whole(tl.where(tl.abs(b_x) <= 1048576.0, b_x, float("nan"))))  # near to nothing
        b_near = nearest(x_t.to(tl.float16), x_l.to(tl.float16), c_t, c_l, b_square, gap)
        b_code = tl.sum(tl.where(b_near, o_c.to(tl.float32)[None, :] + 256.0, 0.0), 1).to(tl.int32)
        b_sure = b_code >> 8 == 1  # 256 for each that is near
        tl.store(p_codes + o_n.to(tl.int64) * sc_n, b_code.to(tl.uint8), mask=b_sure & (o_n < n))
        b_open |= (~b_sure & (o_n < n)).to(tl.int32) << i_t
    if tl.max((b_open != 0).to(tl.int32), 0) != 0:
        p_c = centroids + i_book.to(tl.int64) * (C * S)
        for i_t in tl.range(0, COUNT):
            b_left = (b_open >> i_t) & 1
            for _ in tl.range(0, tl.sum(b_left, 0)):
                i_x = tl.min(tl.where(b_left != 0, o_t, BN), 0)
                b_left = tl.where(o_t == i_x, 0, b_left)
                i_x = ((i_n * COUNT + i_t) * BN + i_x).to(tl.int64)
                i_c, _ = exactly(p_keys + i_x * (sk_n * UNIT), p_c, inverse, C, S, BC, BS)
                tl.store(p_codes + i_x * sc_n, i_c.to(tl.uint8))
