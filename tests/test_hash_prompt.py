"""Hashes of prompts by kernels: the bits of float64, whatever the keys and the weights."""

import math
from itertools import pairwise, product

import pytest
import torch
from kernel_process import (
    DEVICE,
    GPU,
    INTERPRETED,
    captured,
    gpu_test,
    interpreter_test,
    kernel_test,
    mostly_slow,
    passes_in_the_interpreter,
)

from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.maskers.hash_attention import hashes, mlp_outputs

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SIZES = (40, 24, 32, 32)
N = 400 if GPU else 50
"""Keys: of two programs, the last tile not full."""

KEYS = {
    "normal": lambda k: k,
    "few distinct": lambda k: k[:, :, torch.arange(k.shape[2]) % 3],
    "zeros": torch.zeros_like,
    "whole": lambda k: k.round(),
    "a channel far away": lambda k: torch.where(torch.arange(k.shape[3], device=k.device) == 7, 300 + k, k),
    "one channel": lambda k: torch.where(torch.arange(k.shape[3], device=k.device) == 7, k, 0),
    "largest": lambda k: k.sign() * min(torch.finfo(k.dtype).max, 3e38),
    "large": lambda k: k * min(torch.finfo(k.dtype).max / 8, 1e25),
    "smallest": lambda k: k.sign() * torch.finfo(k.dtype).smallest_normal,
    "NaN and Inf": lambda k: torch.where(k > 2, math.nan, torch.where(k < -2, -math.inf, k)),
}


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    if INTERPRETED or GPU:
        from sah_transformers.kernels.approximate import hash_prompt

        monkeypatch.setattr(hash_prompt, "COUNT", 2)
        if INTERPRETED:
            monkeypatch.setattr(hash_prompt, "TILE", 16)
        monkeypatch.setattr(hash_prompt, "PROGRAMS", 5)


@interpreter_test
@pytest.mark.parametrize("tests", mostly_slow(["not slow", "slow"], "not slow"))
def test_in_the_interpreter(tests):
    passes_in_the_interpreter(__file__, "-m", tests)


def draw(*shape, seed=0, dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(DEVICE, dtype)


def mlp_of(sets=2, sizes=SIZES, dtype=torch.float32, change=lambda weights: None):
    weights = [
        [draw(sets, o, i, seed=10 + n) / i**0.5, 0.1 * draw(sets, o, seed=20 + n)]
        for n, (i, o) in enumerate(pairwise(sizes))
    ]
    change(weights)
    return tuple((weight.to(dtype).mT.contiguous().mT, bias.to(dtype)) for weight, bias in weights)


def scaled(layer, factor):
    def change(weights):
        weights[layer][0] *= factor

    return change


def cancelling(weights):
    """Half of the outputs are zero, of two hidden numbers that are alike: in every order, with and without fma."""
    weights[1][0][:, :2], weights[1][1][:, :2] = 0, 0
    weights[1][0][:, :2, 5] = 1.3
    weights[2][0][:, ::2], weights[2][1][:, ::2] = 0, 0
    weights[2][0][:, ::2, 0], weights[2][0][:, ::2, 1] = 2, -2


def nearly_cancelling(weights):
    cancelling(weights)
    weights[2][1][:, ::4], weights[2][1][:, 2::4] = 1e-9, -1e-9


def dead(weights):
    """Rows of zeros, with and without a bias."""
    weights[0][0][:, 3], weights[1][0][:, 5:9], weights[2][0][:, ::2] = 0, 0, 0
    weights[2][1][:, ::4], weights[2][1][:, 1::8] = 0, -1e-40


def nothing(weights):
    for layer in weights:
        layer[0].zero_()
        layer[1].zero_()


WEIGHTS = {
    "normal": lambda weights: None,
    "cancelling": cancelling,
    "nearly cancelling": nearly_cancelling,
    "dead rows": dead,
    "nothing": nothing,
    "huge": scaled(1, 1e30),
    "larger still": scaled(0, 1e37),
    "tiny": scaled(0, 1e-30),
    "tiny at the end": scaled(2, 1e-37),
    "rows of many sizes": lambda weights: weights[1][0].mul_(torch.logspace(-6, 4, 32, device=DEVICE)[:, None]),
}


def prompt(keys, mlp, start=0, run=None):
    """Hashes of ``keys`` by the kernels, of those from ``start`` on; what was there before is 77."""
    from sah_transformers.kernels.approximate import hash_prompt
    from sah_transformers.kernels.approximate.hash_digits import digits_of

    words = -(-mlp[-1][1].shape[1] // 32)
    out = torch.full((keys.shape[0], max(keys.shape[1], len(mlp[0][1])), keys.shape[2], words), 77, dtype=torch.int32)
    out = out.to(DEVICE)
    assert hash_prompt.fits(keys, mlp)
    (run or hash_prompt.hash_prompt)(keys, mlp, digits_of(mlp), out, start)
    return out


@kernel_test
@pytest.mark.parametrize(
    ("kind", "dtype"),
    mostly_slow(
        list(product(KEYS, DTYPES)),
        *product(("normal", "few distinct", "one channel", "largest"), [torch.float32]),
        ("NaN and Inf", torch.float16),
    ),
)
def test_any_keys(kind, dtype):
    keys, mlp = KEYS[kind](draw(1, 2, N, SIZES[0], dtype=dtype)), mlp_of()
    assert torch.equal(prompt(keys, mlp), hashes(keys, mlp))


@kernel_test
@pytest.mark.parametrize("kind", mostly_slow(list(WEIGHTS), "normal", "cancelling", "dead rows", "huge", "tiny"))
def test_any_weights(kind):
    mlp = mlp_of(change=WEIGHTS[kind])
    for dtype in DTYPES[1:]:
        keys = draw(1, 2, N, SIZES[0], dtype=dtype)
        assert torch.equal(prompt(keys, mlp), hashes(keys, mlp)), dtype


FORMS = [
    (2, 4, (64, 128, 128, 32)),
    (2, 2, (80, 6, 6, 40)),
    (4, 2, SIZES),
    (1, 1, (16, 1, 3, 1)),
    (1, 2, (128, 100, 128, 128)),
]
WEIGHT_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@kernel_test
@pytest.mark.parametrize(
    ("dtype", "heads", "sets", "sizes"),
    mostly_slow(
        [(dtype, *form) for dtype in WEIGHT_DTYPES for form in FORMS],
        (torch.float16, *FORMS[0]),
        (torch.float32, *FORMS[1]),
        (torch.bfloat16, *FORMS[2]),
    ),
)
def test_sizes(dtype, heads, sets, sizes):
    """Of layers and batches, weights of any dtype, places that do not begin at zero or lie apart."""
    mlp = mlp_of(sets, sizes, dtype)
    keys = draw(2, N + 11, heads, sizes[0] + 8, dtype=DTYPES[1])[..., 3 : sizes[0] + 3].transpose(1, 2)
    want = hashes(keys, mlp)
    want[:, :, :11] = 77
    assert torch.equal(prompt(keys, mlp, 11), want)


@kernel_test
def test_each_launch_alone():
    """Without float64 all keys that are not listed are right, and with every key listed all are."""
    from sah_transformers.kernels.approximate import hash_prompt

    keys, mlp = draw(1, 3, 67, 64), mlp_of(3, (64, 64, 64, 32))
    want, listed = hashes(keys, mlp), []

    class First(Direct):
        def __call__(self, kernel, grid, *args, **options):
            if kernel is hash_prompt.prompt_kernel:
                super().__call__(kernel, grid, *args, **options)
                listed.extend(args[9][: args[10]].tolist())

    class Second(Direct):
        def __call__(self, kernel, grid, *args, **options):
            if kernel is hash_prompt.listed_kernel:
                args[8].copy_(torch.randperm(len(args[8])))  # neighbours of several MLPs, an odd number
                args[9].fill_(len(args[8]))
                super().__call__(kernel, grid, *args, **options)

    def by(launcher):
        def run(*args):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hash_prompt, "Direct", launcher)
                hash_prompt.hash_prompt(*args)

        return prompt(keys, mlp, run=run)

    sure = torch.ones(201, dtype=torch.bool, device=DEVICE)
    first = by(First)
    sure[listed] = False
    assert 0 < len(set(listed)) == len(listed) < 15
    assert torch.equal(first.flatten()[sure], want.flatten()[sure])
    assert torch.equal(by(Second), want)


def by_parts(keys, mlp):
    """Outputs as the kernel has them, and the bounds on their error."""
    from sah_transformers.kernels.approximate.hash_digits import digits_of

    digits, x, error = digits_of(mlp), keys.float(), torch.zeros(())
    layers = zip(digits.parts, digits.rows, digits.bounds.unbind(1), strict=True)
    for number, (parts, rows, bounds) in enumerate(layers):
        x = torch.nn.functional.pad(x, (0, parts.shape[2] - x.shape[-1]))
        norm = x.square().sum(-1).sqrt() * 1.002 + 2.0**-58
        unit = torch.exp2(torch.floor(torch.log2(norm * 1.01)) - 10)
        x_high = (x / unit[..., None]).round()
        rest = x / unit[..., None] - x_high
        x_low, (w_high, w_low) = rest.half().float(), parts.float().unbind(1)
        exact = x_high.double() @ w_high.double()
        assert not bool((exact.abs() > 2**24).any())
        assert not bool((x_high.norm(dim=-1) > 2**11).any())
        assert not bool((w_high.norm(dim=-2) > 2**13).any())
        y = (exact.float() + (x_low @ w_low + x_low @ w_high + x_high @ w_low)) * unit[..., None]
        y = y * rows[:, None, 0] + rows[:, None, 1]
        gain, of_norm, of_rest, more = (bound[:, None] for bound in bounds.unbind(1))
        missed = 0 if number == 0 and keys.dtype != torch.float32 else 2**-11
        rest = rest.norm(dim=-1) * unit
        error = gain * (error + missed * rest) + of_norm * norm + of_rest * rest + more
        x = torch.nn.functional.silu(y)
    return y, error[..., None] * rows[:, None, 2] + rows[:, None, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["normal", "a channel far away", "one channel"])
def test_bounds(kind, dtype):
    """Ten times what errors are at least, and small enough that few keys are uncertain."""
    sizes = (128, 128, 128, 32)
    keys, mlp = KEYS[kind](draw(1, 2, 2000, 128, dtype=dtype)), mlp_of(2, sizes)
    y, bound = by_parts(keys[0], mlp)
    error = (y - mlp_outputs(keys.double(), mlp)[0]).abs()
    assert (error / bound).max() < 0.1
    assert ((y.abs() < bound).any(-1)).float().mean() < 0.02


@pytest.mark.parametrize("kind", WEIGHTS)
def test_bounds_of_any_weights(kind):
    mlp = mlp_of(change=WEIGHTS[kind])
    keys = draw(1, 2, 500, SIZES[0])
    y, bound = by_parts(keys[0], mlp)
    error = (y - mlp_outputs(keys.double(), mlp)[0]).abs()
    assert bool(((error <= bound) | ~(bound < math.inf) | ~(y.abs() < math.inf)).all())


@kernel_test
def test_what_does_not_fit_is_left_to_pytorch(monkeypatch):
    from sah_transformers.kernels.approximate import hash_attention, hash_prompt

    keys, mlp = draw(1, 2, 40, SIZES[0]), mlp_of()
    monkeypatch.setattr(hash_prompt, "MOST_WIDTH", 16)
    assert not hash_prompt.fits(keys, mlp)
    out = torch.zeros(1, 2, 40, 1, dtype=torch.int32, device=DEVICE)
    hash_attention.append({"hash": out}, keys, keys, (0, 40), hash_attention.Given(mlp, mlp, 32))
    assert torch.equal(out, hashes(keys, mlp))


@gpu_test
def test_the_host_does_not_wait():
    from sah_transformers.kernels.approximate import hash_attention

    keys, mlp = draw(1, 8, 4000, 128, dtype=torch.bfloat16), mlp_of(32, (128, 128, 128, 32))
    given = hash_attention.Given(mlp, mlp, 32)
    out = torch.zeros(1, 32, 4000, 1, dtype=torch.int32, device=DEVICE)
    graph, _ = captured(lambda: hash_attention.append({"hash": out}, keys, keys, (0, 4000), given))
    out.zero_()
    graph.replay()
    assert torch.equal(out, hashes(keys, mlp))
