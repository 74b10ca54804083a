"""SOCKET's buckets and norms of many keys by the tensor cores' kernel: the bits of the masker's, whatever the keys."""

import math

import pytest
import torch
from kernel_process import DEVICE, GPU, interpreter_test, kernel_test, passes_in_the_interpreter

from sah_transformers.maskers import socket
from sah_transformers.rows import Context

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
KEYS = {
    "normal": lambda k: k,
    "zeros": torch.zeros_like,
    "few numbers": lambda k: k.round(),
    "small beside large": lambda k: torch.where(k.abs() < 1, k * 1e-4, k),
    "largest": lambda k: k.sign() * torch.finfo(k.dtype).max,
    "smallest": lambda k: k.sign() * torch.finfo(k.dtype).tiny * torch.finfo(k.dtype).eps,
    "1e-30 and 1e30": lambda k: torch.where(k > 1, 1e30, torch.where(k < -1, 1e-30, k.float())).to(k.dtype),
    "NaN and Inf": lambda k: torch.where(k > 1.5, math.nan, torch.where(k < -1.5, -math.inf, k)),
}


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


def draw(*shape, seed=0, dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(DEVICE, dtype)


def check(keys, values, tables=5, planes=7, apart=False):
    """Of the keys from 3 on: the masker's bits, and nothing else is touched."""
    from sah_transformers.kernels.approximate.socket import append, given_of

    config = socket.SocketMaskerConfig(heavy_size=5, K=planes, L=tables)
    want = socket.SocketMasker(config).append(keys[:, :, 3:], values[:, :, 3:], Context(layer_idx=2))
    batch, groups, n, dim = keys.shape
    room, count = n + 6, want["buckets"].shape[3]
    words = torch.full((batch, groups, *((count, room) if apart else (room, count))), 7, dtype=torch.int32)
    words = words.to(DEVICE).mT if apart else words.to(DEVICE)
    buffers = {"buckets": words, "norm": torch.full((batch, groups, room), 7.0, device=DEVICE)}
    append(buffers, keys, values, (3, n), given_of(config, 2, dim, keys.device))
    for name, buffer in buffers.items():
        assert torch.equal(buffer[:, :, 3:n].nan_to_num(), want[name].nan_to_num()), name
        assert (buffer[:, :, :3] == 7).all(), name
        assert (buffer[:, :, n:] == 7).all(), name


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_wild_keys(kind, dtype):
    keys = KEYS[kind](draw(2, 2, 40, 64, dtype=dtype))
    keys[0, 0, 5] = 0
    check(keys, keys)


SHAPES = [
    (20, 16, 16, 1, 1),
    (70, 80, 33, 4, 12),
    (131, 128, 128, 11, 12),
    (300, 256, 200, 33, 1),
    (90, 8, 256, 60, 12),
]


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim", "value_dim", "tables", "planes"), SHAPES)
def test_shapes(n, dim, value_dim, tables, planes, dtype):
    for apart in (False, True):
        check(draw(1, 2, n, dim, dtype=dtype), draw(1, 2, n, value_dim, seed=1, dtype=dtype), tables, planes, apart)


@kernel_test
@pytest.mark.parametrize("dim", [48, 40])
def test_strides(dim):
    """Keys and values as projections leave them, in storages of their own strides."""
    both = draw(1, 90, 3, dim + 9).transpose(1, 2)
    check(both[..., :dim], draw(1, 90, 3, dim, seed=1).transpose(1, 2), apart=True)
    check(both[..., 4 : 4 + dim], both[..., :dim])


@kernel_test
@pytest.mark.parametrize("carry", [-1, 0, 1])
def test_sums_around_zero(carry):
    """Keys in a plane itself, or the smallest step beside it: bytes of six weights, and what they carry, cancel."""
    planes = socket.hyperplanes(2, 5, 7, 64, DEVICE).flatten(0, 1).float()
    keys = torch.zeros(1, 1, 64, 64, device=DEVICE)
    for i, normal in enumerate(planes[:32]):
        keys[0, 0, i, 0], keys[0, 0, i, 1] = normal[1], -normal[0]
        keys[0, 0, i, 2 + i] = carry * 2.0**-30 * 2 ** (1 + normal[:2].abs().max().log2().floor())
    check(keys, keys)
    keys[0, 0, 32:] = -keys[0, 0, :32]
    check(keys, keys)


@kernel_test
def test_largest_digits():
    """In 256 dimensions; a key and a plane of equal signs add all their products up."""
    from sah_transformers.kernels.approximate.socket_prompt import append_many, digits_of

    numbers = torch.tensor([socket.MOST, 127 * 256 - 128, 128, 1 - socket.MOST])
    numbers = numbers[torch.arange(32)[:, None] % 4] * draw(32, 256).cpu().sign()
    digits = digits_of((numbers.double() * socket.GRID)[None].to(DEVICE))
    assert torch.equal(digits[0, :32].long().cpu() + 256 * digits[1, :32].long().cpu(), numbers.long())
    keys = torch.tensor([0x3F7F7F80, 0x3FFFFFC0])[torch.arange(64)[:, None] % 2].float() * numbers.sign().repeat(2, 1)
    keys[32:] = keys[32:].roll(1, 0)
    words = torch.zeros(1, 1, 64, 1, dtype=torch.int32, device=DEVICE)
    norm = torch.zeros(1, 1, 64, device=DEVICE)
    append_many(keys[None, None].to(DEVICE), keys[None, None].to(DEVICE), words, norm, digits, 32)
    sums = keys.long() @ numbers.long().T
    assert int(sums.abs().max()) > 2**52
    assert torch.equal(words[0, 0].cpu(), socket.pack(sums >= 0))
