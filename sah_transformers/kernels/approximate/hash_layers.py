"""HashAttention's MLPs in float64: the hash of one vector by one program."""

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
def through(b_x, b_w, b_b):
    """``x @ w + b`` in float64."""
    if b_w.dtype == tl.float32:  # its bits moved into a float64 are 2**-896 of it, in half the time of a conversion
        b_i = (b_w.to(tl.int32, bitcast=True).to(tl.int64) << 29) & -0x7000000000000001
        b_y = tl.sum(b_i.to(tl.float64, bitcast=True) * (b_x * 2.0**448)[:, None], 0) * 2.0**448
    else:
        b_y = tl.sum(b_w.to(tl.float64) * b_x[:, None], 0)
    return b_y + b_b.to(tl.float64)


@triton.jit
def silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def hash_one(
    p_x, w0, b0, w1, b1, w2, b2, p_out, so_w, i_s,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BITS: tl.constexpr,
    BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Packed signs of the vector at ``p_x`` under MLP ``i_s`` to ``p_out``."""
    o_d = tl.arange(0, BD)
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    b_w0, b_b0 = layer_of(w0, b0, i_s, D, H0, BD, B0)  # all are under way before the first is needed
    b_w1, b_b1 = layer_of(w1, b1, i_s, H0, H1, B0, B1)
    b_w2, b_b2 = layer_of(w2, b2, i_s, H1, BITS, B1, BB)
    b_x = silu(through(b_x, b_w0, b_b0))
    b_x = silu(through(b_x, b_w1, b_b1))
    b_x = through(b_x, b_w2, b_b2)
    o = tl.arange(0, BB)
    b_bit = ((b_x >= 0) & (o < BITS)).to(tl.int32) << (o % 32)
    b_word = tl.sum(tl.reshape(b_bit, (BB // 32, 32)), 1)
    o_w = tl.arange(0, BB // 32)
    tl.store(p_out + o_w * so_w, b_word, mask=o_w < (BITS + 31) // 32)
