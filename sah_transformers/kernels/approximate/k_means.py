"""PQCache's codebooks and codes of many keys: the bits of `maskers.pq_cache`, whose sums of whole numbers are exact.

A point's numbers, at most 2**21 (2**23 for keys that come later), are cut into three digits of a byte each, so that
products with centroids are nine products of bytes, summed exactly by the tensor cores; the members of a cluster are
summed as two digits of 11 bits, exact in float32. Keys are read as they are and snapped in registers.

32,768 keys, G=8, two sub-vectors of 64 dimensions, 64 centroids, H100. One iteration reads 67 MB (22 us), makes 39 G
operations on bytes and 17 G in half precision (20 and 17 us at full speed), and 20 instructions per number and 25 per
distance (23 and 28 us), one after the other in each of 62 tiles per SM: 80 to 130 us, ten of them, the codes and
what PyTorch does between 1.2 to 1.8 ms. Measured: 5.6 ms for all side data, where PyTorch alone took 25.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.kernels.decode import DTYPES
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.decode.values import even, power_above
from sah_transformers.maskers.pq_cache import GRID, REACH

MOST_DIM = 128
"""Dimensions of a sub-vector: sums of products of digits stay in 32 bits."""

POINTS = 2048
"""Points of a program: sums of their digits are exact in float32 (2**24)."""

TILE, WARPS = 64, 8
assert REACH == 8 * GRID == 2**23
assert POINTS * 1024 < 2**24


def fits(keys: torch.Tensor, width: int) -> bool:
    """Whether these kernels take sub-vectors of ``width`` dimensions of ``keys [..., K, D]``."""
    return keys.dtype in DTYPES and keys.stride(-1) == 1 and width <= MOST_DIM


def k_means(keys: torch.Tensor, step: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """``count`` centroids float64 ``[G, M, count, S]`` of ``keys [G, n, D]`` in whole numbers of ``step [G, M]``."""
    (groups, n, dim), parts = keys.shape, step.shape[1]
    width = dim // parts
    launch, step = Direct(), step.float().contiguous()
    every = torch.arange(count, device=keys.device) * n // count
    first = keys[:, every].double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    first = first.unflatten(-1, (parts, width)).transpose(1, 2)  # [G, M, C, S]
    centroids = (first / step.double()[..., None, None]).round().contiguous()
    unit = unit_of(keys)
    for _ in range(iterations):
        sums, sizes = torch.zeros_like(centroids), torch.zeros_like(centroids[..., :1])
        launch(
            lloyd_kernel, (-(-n // POINTS), groups * parts, 1),
            keys, step, centroids, sums, sizes, n, *(s // unit for s in keys.stride()[:2]),
            M=parts, C=count, S=width, UNIT=unit, BC=max(16, power_of_2(count)), BS=max(32, power_of_2(width)),
            BN=TILE, COUNT=POINTS // TILE, warps=WARPS,
        )  # fmt: skip
        centroids = torch.where(sizes > 0, (sums / sizes.clamp(min=1)).round(), centroids)
    return centroids


def codes_of(keys: torch.Tensor, centroids: torch.Tensor, step: torch.Tensor, codes: torch.Tensor) -> None:
    """Codes of ``keys [B, G, n, D]`` into uint8 ``codes [B, G, n, M]``.

    Args:
        centroids: float32 ``[B, G, M, C, S]``, whole multiples of ``step [B, G, M]``; both contiguous.
    """
    batch, groups, n, _ = keys.shape
    parts, count, width = centroids.shape[2:]
    unit = unit_of(keys)
    Direct()(
        codes_kernel, (-(-n // TILE), batch * groups * parts, 1),
        keys, step, centroids, codes, n, *(s // unit for s in keys.stride()[:3]), *codes.stride(),
        G=groups, M=parts, C=count, S=width, UNIT=unit, BC=max(16, power_of_2(count)), BS=max(32, power_of_2(width)),
        BN=TILE, warps=WARPS,
    )  # fmt: skip


def unit_of(keys: torch.Tensor) -> int:
    """What all strides of keys are multiples of, if they are: loads are then 16 bytes wide."""
    return 8 if not any(s % 8 for s in keys.stride()[:-1]) else 1


@triton.jit
def digits(b_x):
    """int32 numbers up to 2**23 as ``low + 2**8 * middle + 2**16 * high``: int8, int8, int32 up to 2**7."""
    b_1 = (b_x + 128) >> 8
    return b_x.to(tl.int8), b_1.to(tl.int8), (b_1 + 128) >> 8


@triton.jit
def book_of(centroids, i_book, unit, C: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Centroids in whole numbers: (digits ``[BS, BC]``, three of them; squares, int64 ``[BC]``)."""
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    p_c = centroids + i_book.to(tl.int64) * (C * S) + o_c[:, None] * S + o_s[None, :]
    b_c = tl.load(p_c, mask=(o_c < C)[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float64) / unit
    low, middle, high = digits(b_c.to(tl.int32))
    return tl.trans(low), tl.trans(middle), tl.trans(high.to(tl.int8)), tl.sum(b_c * b_c, 1).to(tl.int64)


@triton.jit
def products(x_0, x_1, x_2, c_0, c_1, c_2):
    """Products of points and centroids by their digits, int64 ``[BN, BC]``."""
    b_p = ((tl.dot(x_0, c_1) + tl.dot(x_1, c_0)) * 256 + tl.dot(x_0, c_0)).to(tl.int64)
    b_p += ((tl.dot(x_1, c_2) + tl.dot(x_2, c_1)) * 256 + tl.dot(x_0, c_2) + tl.dot(x_1, c_1) + tl.dot(x_2, c_0)).to(
        tl.int64
    ) * 65536
    return b_p + tl.dot(x_2, c_2).to(tl.int64) * 4294967296


@triton.jit
def products_of_rest(x_2, c_0, c_1, c_2):
    """What ``products`` gives for a third digit alone."""
    b_p = (tl.dot(x_2, c_1) * 256 + tl.dot(x_2, c_0)).to(tl.int64)
    return (b_p + tl.dot(x_2, c_2).to(tl.int64) * 65536) * 65536


@triton.jit(do_not_specialize=["n", "sk_g", "sk_n"])
def lloyd_kernel(
    keys, step, centroids, sums, sizes, n, sk_g, sk_n,
    M: tl.constexpr, C: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One codebook, ``COUNT * BN`` points: those nearest to each centroid summed up and counted.

    A distance less the point's square, and the centroid's number below it, make one number: the smallest is the
    nearest, of equals the lower.
    """
    i_n, i_book = tl.program_id(0), tl.program_id(1)
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    c_0, c_1, c_2, b_square = book_of(centroids, i_book, 1.0, C, S, BC, BS)
    b_square = tl.where(o_c < C, b_square * 256 + o_c, 1 << 62)
    inverse = (1.0 / tl.load(step + i_book).to(tl.float64)).to(tl.float32)
    p_keys = keys + (i_book // M).to(tl.int64) * (sk_g * UNIT) + i_book % M * S
    b_low, b_high = tl.zeros([BC, BS], tl.float32), tl.zeros([BC, BS], tl.float32)
    b_size = tl.zeros([BC, BN], tl.int32)
    for i_t in tl.range(0, COUNT):
        o_n = (i_n * COUNT + i_t) * BN + tl.arange(0, BN)
        p_x = p_keys + o_n.to(tl.int64)[:, None] * (sk_n * UNIT) + o_s[None, :]
        b_x = tl.load(p_x, mask=(o_n < n)[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float32)
        b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)  # neither NaN nor Inf
        b_x = (b_x * inverse + 12582912.0) - 12582912.0  # whole, to even
        x_0, x_1, x_2 = digits(b_x.to(tl.int32))
        b_far = b_square[None, :] - 512 * products(x_0, x_1, x_2.to(tl.int8), c_0, c_1, c_2)
        b_code = tl.where(o_n < n, tl.min(b_far, 1).to(tl.int32) & 255, -1)
        b_member = o_c[:, None] == b_code[None, :]
        b_size += b_member.to(tl.int32)
        b_top = (b_x * 0.00048828125 + 12582912.0) - 12582912.0
        b_low = tl.dot(b_member.to(tl.float16), (b_x - b_top * 2048.0).to(tl.float16), b_low)
        b_high = tl.dot(b_member.to(tl.float16), b_top.to(tl.float16), b_high)
    b_sum = b_low.to(tl.float64) + b_high.to(tl.float64) * 2048.0
    p_sum = sums + i_book.to(tl.int64) * (C * S) + o_c[:, None] * S + o_s[None, :]
    tl.atomic_add(p_sum, b_sum, mask=(o_c < C)[:, None] & (o_s < S)[None, :], sem="relaxed")
    tl.atomic_add(sizes + i_book * C + o_c, tl.sum(b_size, 1).to(tl.float64), mask=o_c < C, sem="relaxed")


@triton.jit(do_not_specialize=["n", "sk_b", "sk_g", "sk_n", "sc_b", "sc_g", "sc_n", "sc_m"])
def codes_kernel(
    keys, step, centroids, codes, n, sk_b, sk_g, sk_n, sc_b, sc_g, sc_n, sc_m,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Codes of one sub-vector of ``BN`` keys, which may lie far beyond the prompt's: distances as the masker's, in
    float64 of exact products."""
    i_n, i_book = tl.program_id(0), tl.program_id(1)
    i_b, i_g, i_m = (i_book // (G * M)).to(tl.int64), (i_book // M % G).to(tl.int64), i_book % M
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    unit = tl.load(step + i_book).to(tl.float64)
    c_0, c_1, c_2, b_square = book_of(centroids, i_book, unit, C, S, BC, BS)
    p_x = keys + i_b * (sk_b * UNIT) + i_g * (sk_g * UNIT) + i_m * S + o_n[:, None] * (sk_n * UNIT) + o_s[None, :]
    b_x = tl.load(p_x, mask=(o_n < n)[:, None] & (o_s < S)[None, :], other=0.0).to(tl.float64)
    b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0) * (1.0 / unit)  # neither NaN nor Inf; exact
    b_coarse = tl.maximum(power_above(tl.max(tl.abs(b_x), 1)) / 8388608.0, 1.0)
    x_0, x_1, x_2 = digits(even(b_x * (1.0 / b_coarse)[:, None]).to(tl.int32))
    b_p = products(x_0, x_1, (x_2 >> 1).to(tl.int8), c_0, c_1, c_2)
    b_p += products_of_rest((x_2 - (x_2 >> 1)).to(tl.int8), c_0, c_1, c_2)
    b_far = b_square.to(tl.float64)[None, :] - (2.0 * b_coarse)[:, None] * b_p.to(tl.float64)
    b_code = tl.argmin(tl.where((o_c < C)[None, :], b_far, float("inf")), 1)
    p_code = codes + i_b * sc_b + i_g * sc_g + i_m * sc_m + o_n * sc_n
    tl.store(p_code, b_code.to(tl.uint8), mask=o_n < n)
