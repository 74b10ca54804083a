"""HashAttention's MLPs in float64: hashes of one vector or two by one program."""

import triton
import triton.language as tl


@triton.jit
def layer_of(weight, bias, i_s, IN: tl.constexpr, OUT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Weights ``[BI, BO]`` and biases ``[BO]`` of a layer, 0 beyond its sizes; ``weight [S, IN, OUT]``."""
    o_i, o_o = tl.arange(0, BI), tl.arange(0, BO)
    o_w = tl.max_contiguous(o_o, 2)  # four to a thread: twice as many threads would hold a sum, and work with it
    p_w = weight + i_s * (IN * OUT) + o_i[:, None] * OUT + o_w[None, :]
    b_w = tl.load(p_w, mask=(o_i < IN)[:, None] & (o_o < OUT)[None, :], other=0.0)
    return b_w, tl.load(bias + i_s * OUT + o_o, mask=o_o < OUT, other=0.0)


@triton.jit
def wide(b_w):
    """Weights in float64; of float32 ones 2**-896: their bits are moved, in half the time of a conversion."""
    if b_w.dtype == tl.float32:
        b_i = (b_w.to(tl.int32, bitcast=True).to(tl.int64) << 29) & -0x7000000000000001
        b_w = b_i.to(tl.float64, bitcast=True)
    return b_w.to(tl.float64)


@triton.jit
def through(b_x, b_y, b_w, b_b, TWO: tl.constexpr):
    """``x @ w + b`` and, if ``TWO``, ``y @ w + b`` in float64."""
    ROOT: tl.constexpr = 2.0**448 if b_w.dtype == tl.float32 else 1.0
    b_w, b_b = wide(b_w), b_b.to(tl.float64)
    b_x = tl.sum(b_w * (b_x * ROOT)[:, None], 0) * ROOT + b_b
    b_y = tl.sum(b_w * (b_y * ROOT)[:, None], 0) * ROOT + b_b if TWO else b_x
    return b_x, b_y


@triton.jit
def silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def keep_signs(b_x, p_out, so_w, BITS: tl.constexpr, BB: tl.constexpr):
    """Packed signs to ``p_out``."""
    o, o_w = tl.arange(0, BB), tl.arange(0, BB // 32)
    b_bit = ((b_x >= 0) & (o < BITS)).to(tl.int32) << (o % 32)
    b_word = tl.sum(tl.reshape(b_bit, (BB // 32, 32)), 1)
    tl.store(p_out + o_w * so_w, b_word, mask=o_w < (BITS + 31) // 32)


@triton.jit
def hash_vectors(
    p_x, p_y, w0, b0, w1, b1, w2, b2, p_out, p_other, so_w, i_s,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BITS: tl.constexpr,
    BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Packed signs of the vector at ``p_x`` under MLP ``i_s`` to ``p_out``; ``TWO``: of that at ``p_y`` to ``p_other``
    by the same weights."""
    o_d = tl.arange(0, BD)
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    b_y = tl.load(p_y + o_d, mask=o_d < D, other=0.0).to(tl.float64) if TWO else b_x
    b_w0, b_b0 = layer_of(w0, b0, i_s, D, H0, BD, B0)  # all are under way before the first is needed
    b_w1, b_b1 = layer_of(w1, b1, i_s, H0, H1, B0, B1)
    b_w2, b_b2 = layer_of(w2, b2, i_s, H1, BITS, B1, BB)
    b_x, b_y = through(b_x, b_y, b_w0, b_b0, TWO)
    b_x, b_y = through(silu(b_x), silu(b_y), b_w1, b_b1, TWO)
    b_x, b_y = through(silu(b_x), silu(b_y), b_w2, b_b2, TWO)
    keep_signs(b_x, p_out, so_w, BITS, BB)
    if TWO:
        keep_signs(b_y, p_other, so_w, BITS, BB)
