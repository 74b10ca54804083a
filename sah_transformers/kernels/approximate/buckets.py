"""Look-ups of keys' buckets in tables of their probabilities."""

import triton
import triton.language as tl


@triton.jit
def none():
    """No tensors: what ``more`` begins with."""
    return ()


@triton.jit
def more(tensors, b_x):
    """``tensors`` and one more; a tuple stays in registers, and loops may carry it."""
    return tensors + (b_x,)  # noqa: RUF005 (Triton does not unpack)


@triton.jit
def zeros(COUNT: tl.constexpr, BN: tl.constexpr):
    """Sums to begin with."""
    sums = none()
    for _ in tl.static_range(COUNT):
        sums = more(sums, tl.zeros([BN], tl.float32))
    return sums


@triton.jit
def buckets_of(p_key, m_k, i_l, sw_w, PLANES: tl.constexpr, WORDS: tl.constexpr):
    """The bits of keys from table ``i_l`` on: uint64."""
    begin = i_l * PLANES
    i_w = begin // 32
    b_bits = tl.load(p_key + i_w * sw_w, mask=m_k, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    b_more = tl.load(p_key + tl.minimum(i_w + 1, WORDS - 1) * sw_w, mask=m_k, other=0).to(tl.uint32, bitcast=True)
    return (b_bits | (b_more.to(tl.uint64) << 32)) >> (begin % 32)


@triton.jit
def look_pieces_up(
    p_key, m_k, p_table, sw_w, L: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over tables of each head: a tuple of ``AT_ONCE`` and up to three more.

    The pieces of four heads lie in shared memory at a time; one look-up brings a piece of two heads.
    """
    SIZE: tl.constexpr = 2**BITS
    PAIRS: tl.constexpr = (AT_ONCE + 1) // 2
    o = tl.arange(0, 8 * SIZE)  # of up to four pieces the numbers of two pairs
    i_piece, i_two = o // (2 * SIZE), o // SIZE % 2
    p_pairs = p_table.to(tl.pointer_type(tl.int64))
    sums = zeros(4 * ((PAIRS + 1) // 2), BN)
    for i_l in tl.range(0, L, RUN):
        b_bits = buckets_of(p_key, m_k, i_l, sw_w, PLANES, WORDS)
        for i_run in tl.static_range(RUN):
            b_place = places_of(b_bits >> (i_run * PLANES), PLANES, BITS, PIECES, 2 * SIZE)
            b_place = tl.reshape(tl.join(b_place, b_place + SIZE), [8 * BN])
            grown = none()
            for i_pair in tl.static_range(0, PAIRS, 2):
                p_o = p_pairs + (i_piece * PAIRS + i_pair + i_two) * SIZE + o % SIZE
                b_t = tl.load(p_o, mask=(i_piece < PIECES) & (i_pair + i_two < PAIRS), other=0)
                b_x, b_y = tl.split(tl.reshape(tl.gather(b_t, b_place, 0), [BN, 2, 2, 2]))
                b_one, b_two = product_of(b_x, PIECES)
                grown = more(more(grown, sums[2 * i_pair] + b_one), sums[2 * i_pair + 1] + b_two)
                b_one, b_two = product_of(b_y, PIECES)
                grown = more(more(grown, sums[2 * i_pair + 2] + b_one), sums[2 * i_pair + 3] + b_two)
            sums = grown
            p_pairs += PIECES * PAIRS * SIZE
    return sums


@triton.jit
def look_coarse_pieces_up(
    p_key, m_k, p_table, sw_w, L: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`look_pieces_up` with 16 bits of a number: one look-up brings a piece of four heads."""
    SIZE: tl.constexpr = 2**BITS
    PAIRS: tl.constexpr = (AT_ONCE + 1) // 2
    o = tl.arange(0, 4 * SIZE)  # of up to four pieces
    m_piece = o < PIECES * SIZE
    p_pairs = p_table.to(tl.pointer_type(tl.int64)) + (o // SIZE * PAIRS * SIZE + o % SIZE)
    sums = zeros(4 * ((PAIRS + 1) // 2), BN)
    for i_l in tl.range(0, L, RUN):
        b_bits = buckets_of(p_key, m_k, i_l, sw_w, PLANES, WORDS)
        for i_run in tl.static_range(RUN):
            b_place = tl.reshape(places_of(b_bits >> (i_run * PLANES), PLANES, BITS, PIECES, SIZE), [4 * BN])
            grown = none()
            for i_pair in tl.static_range(0, PAIRS, 2):
                b_t = short(tl.load(p_pairs + i_pair * SIZE, mask=m_piece, other=0)).to(tl.uint32).to(tl.int64)
                if i_pair + 1 < PAIRS:
                    b_t |= short(tl.load(p_pairs + (i_pair + 1) * SIZE, mask=m_piece, other=0)).to(tl.int64) << 32
                b_x, b_y = tl.split(tl.reshape(tl.gather(b_t, b_place, 0), [BN, 2, 2]))
                b_0, b_1 = tl.split(b_x)
                b_2, b_3 = tl.split(b_y)
                pieces = (b_0, b_1, b_2, b_3)
                products = four_of(b_0)
                for i in tl.static_range(1, PIECES):
                    products = times(products, four_of(pieces[i]))
                for i in tl.static_range(4):
                    grown = more(grown, sums[2 * i_pair + i] + products[i])
            sums = grown
            p_pairs += PIECES * PAIRS * SIZE
    return sums


@triton.jit
def short(b_x):
    """The two float32 numbers in int64, not negative, in int32: the second in the lower 16 bits, the first as a whole.

    Each is off by at most half of the last of 16 bits: what the second adds to the first is known when that is rounded.
    """
    b_one, b_two = b_x.to(tl.int32), (b_x >> 32).to(tl.int32)
    b_two = (b_two + 0x8000 >> 16) & 0x7FFF  # even where a head has no second one and memory holds anything
    return ((b_one - b_two + 0x8000) & -0x10000) | b_two


@triton.jit
def four_of(b_x):
    """The float32 numbers of two `short` in int64."""
    b_one, b_two = b_x.to(tl.int32), (b_x >> 32).to(tl.int32)
    b_0, b_1 = b_one.to(tl.float32, bitcast=True), (b_one << 16).to(tl.float32, bitcast=True)
    return b_0, b_1, b_two.to(tl.float32, bitcast=True), (b_two << 16).to(tl.float32, bitcast=True)


@triton.jit
def times(one, two):
    return one[0] * two[0], one[1] * two[1], one[2] * two[2], one[3] * two[3]


@triton.jit
def piece_of(b_bits, FIRST: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr):
    """Up to ``BITS`` bits of buckets from ``FIRST`` on: int32."""
    return (b_bits >> FIRST).to(tl.int32) & (2 ** min(BITS, PLANES - FIRST) - 1)


@triton.jit
def places_of(b_bits, PLANES: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, APART: tl.constexpr):
    """Where four pieces of buckets lie, ``APART`` numbers from one to the next: ``[BN, 2, 2]``."""
    places = none()
    for i in tl.static_range(4):  # what is not looked at is not looked up
        places = more(places, piece_of(b_bits, min(i, PIECES - 1) * BITS, PLANES, BITS) + i * APART)
    return tl.join(tl.join(places[0], places[1]), tl.join(places[2], places[3]))


@triton.jit
def product_of(b_x, PIECES: tl.constexpr):
    """The products over pieces ``[BN, 2, 2]`` of both heads."""
    b_first, b_second = tl.split(b_x)
    b_0, b_1 = tl.split(b_first)
    b_2, b_3 = tl.split(b_second)
    pieces = (b_0, b_1, b_2, b_3)
    b_one, b_two = two_of(b_0)
    for i in tl.static_range(1, PIECES):
        b_p, b_r = two_of(pieces[i])
        b_one, b_two = b_one * b_p, b_two * b_r
    return b_one, b_two


@triton.jit
def two_of(b_x):
    """The float32 numbers in the lower and upper halves of int64."""
    return b_x.to(tl.int32).to(tl.float32, bitcast=True), (b_x >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def look_buckets_up(
    p_key, m_k, p_table, sw_w, L: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, AT_ONCE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over tables and heads. All buckets of a table, the heads summed, lie in shared memory at a time."""
    o_e = tl.arange(0, 2 ** (PLANES - 2))[:, None]  # four buckets with the same upper piece
    o_low, o_high = (o_e % 2 ** (BITS - 2)) * 4 + tl.arange(0, 4)[None, :], o_e >> (BITS - 2)
    b_s = tl.zeros([BN], tl.float32)
    for i_l in tl.range(0, L, RUN):
        b_bits = buckets_of(p_key, m_k, i_l, sw_w, PLANES, WORDS)
        for i_run in tl.static_range(RUN):
            b_sum = tl.zeros([2 ** (PLANES - 2), 4], tl.float32)
            for i_h in tl.static_range(AT_ONCE):
                b_low = tl.load(p_table + i_h * 2**BITS + o_low)
                b_sum += b_low * tl.load(p_table + (AT_ONCE + i_h) * 2**BITS + o_high)
            b_e = (b_bits >> (i_run * PLANES)).to(tl.int32) & (2**PLANES - 1)
            b_s += tl.gather(tl.reshape(b_sum, [2**PLANES]), b_e, 0)
            p_table += 2 * AT_ONCE * 2**BITS
    return b_s
