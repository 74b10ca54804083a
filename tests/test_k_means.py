"""PQCache's codebooks and codes by kernels: the bits of the masker's, whatever the keys."""

import math

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
    passes_in_the_interpreter,
)

from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.maskers import MaskerRegistry, pq_cache
from sah_transformers.rows import Context
from sah_transformers.state import LayerState

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
KEYS = {
    "normal": lambda k: k,
    "few distinct": lambda k: k[:, torch.arange(k.shape[1]) % 3],
    "constant": lambda k: k[:, :1].expand_as(k).contiguous(),
    "zeros": torch.zeros_like,
    "whole": lambda k: k.round(),
    "one key far away": lambda k: torch.where(torch.arange(k.shape[1], device=k.device)[:, None] == 7, 900 * k, k),
    "large": lambda k: k.sign() * min(torch.finfo(k.dtype).max, 1e36),
    "largest": lambda k: torch.where(k > 1, torch.finfo(k.dtype).max, k),
    "smallest": lambda k: k.sign() * torch.finfo(k.dtype).smallest_normal,
    "NaN and Inf": lambda k: torch.where(k > 1.5, math.nan, torch.where(k < -1.5, -math.inf, k)),
}


def poisoned(*shape, **how):
    """For ``torch.empty``."""
    tensor = torch.zeros(*shape, **how)
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    if INTERPRETED or GPU:
        from sah_transformers.kernels.approximate import k_means

        monkeypatch.setattr(k_means, "POINTS", 128)
        monkeypatch.setattr(k_means.torch, "empty", poisoned)


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, poison=True)


def draw(*shape, seed=0, dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(DEVICE, dtype)


def reference(keys, parts, count, iterations):
    """(centroids, step) as `codebooks` has them, the centroids also in whole numbers."""
    points = pq_cache.split(keys, parts)
    step = pq_cache.step_of(points)
    whole = pq_cache.k_means(pq_cache.snap(points, step), count, iterations)
    return (whole * step[..., None, None]).float(), step.float(), whole


def check(keys, parts, count, iterations, later):
    """Codebooks of ``keys [B, G, n, D]``, and codes of ``later`` keys under them."""
    from sah_transformers.kernels.approximate import k_means

    books, step, whole = reference(keys, parts, count, iterations)
    centroids, units = k_means.codebooks(keys, parts, count, iterations)
    assert torch.equal(units, step)
    assert torch.equal(centroids, books)
    codes = torch.full((*later.shape[:3], parts), 255, dtype=torch.uint8, device=DEVICE)
    k_means.codes_of(later, books, step, codes)
    points = pq_cache.snap(pq_cache.split(later, parts), step.double())
    assert torch.equal(codes.mT.long(), pq_cache.nearest(points, whole))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_codebooks(kind, dtype):
    for n, dim, parts, bits in ((150, 32, 2, 3), (40, 40, 1, 5)):
        keys = KEYS[kind](draw(2, n, dim, seed=n, dtype=dtype))[None]
        few = keys[:, :, :25]
        check(keys, parts, 2**bits, 3, torch.cat([keys, few * 3000, few / 100], dim=2))


@kernel_test
def test_strides():
    keys = draw(2, 300, 2, 48)[..., 8:40].transpose(1, 2)
    check(keys, 2, 8, 3, keys)


def test_more_codebooks_than_a_grid_is_high():
    pytest.importorskip("triton")
    from sah_transformers.kernels.approximate import k_means

    keys = torch.zeros(128).expand(64, 8, 300, 128)
    assert k_means.fits(keys, 2)
    assert not k_means.fits(keys, 1)


@kernel_test
@pytest.mark.slow
def test_sequences_far_apart():
    """More than 2**31 numbers lie between them."""
    keys = torch.empty_strided((2, 1, 70, 16), (2**31 + 128, 1120, 16, 1), dtype=torch.float16, device=DEVICE)
    keys.copy_(draw(2, 1, 70, 16))
    check(keys, 1, 8, 1, keys)


@kernel_test
def test_points_as_near_to_several_centroids():
    """Of a grid: the codes are the lower ones', and so are the sums."""
    keys = torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 3)
    keys = torch.nn.functional.pad(keys, (0, 13)).to(DEVICE)[None, None]
    check(keys, 1, 16, 3, keys)
    check(keys[:, :, torch.randperm(343, generator=torch.Generator().manual_seed(0))], 1, 16, 3, keys / 2)


@kernel_test
def test_keys_far_beyond_the_prompts_are_rounded():
    """So that sums stay exact: beside a number of 2**24 steps one of a single step decides nothing."""
    from sah_transformers.kernels.approximate import k_means
    from sah_transformers.kernels.approximate import pq_cache as kernels

    books, keys = torch.zeros(1, 1, 1, 2, 16, device=DEVICE), torch.zeros(1, 1, 3, 16, device=DEVICE)
    books[..., 1] = torch.tensor([-1.0, 1.0], device=DEVICE)
    keys[..., 0], keys[..., 1] = torch.tensor([2.0**24, 2.0**23 - 1, 0.0], device=DEVICE), 1.0
    step, ready = torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    many, few, masker = torch.full((3, 1, 1, 3, 1), 255, dtype=torch.uint8, device=DEVICE)
    k_means.codes_of(keys, books, step, many)
    kernels.append({"codes": few}, keys, keys, (0, 3), kernels.Given(books, step, ready))
    pq_cache.encode(keys, books, step, None, masker)
    for codes in (many, few, masker):
        assert codes.flatten().tolist() == [0, 1, 1]


def after(name, change):
    """A ``Direct`` that does ``change`` to the arguments of each launch of the kernel ``name``, once it has run."""

    class Changed(Direct):
        def __call__(self, kernel, grid, *args, **options):
            super().__call__(kernel, grid, *args, **options)
            if kernel.fn.__name__ == name:
                change(*args)

    return Changed


@kernel_test
@pytest.mark.parametrize("kind", ["normal", "constant", "NaN and Inf"])
def test_where_no_distance_is_certain(kind, monkeypatch):
    from sah_transformers.kernels.approximate import k_means

    def forget(keys, peaks, step, centroids, sums, members, parts, squares, gaps, *_):
        gaps.fill_(math.inf)

    monkeypatch.setattr(k_means, "Direct", after("centre_kernel", forget))
    keys = KEYS[kind](draw(1, 140, 32))[None]
    check(keys, 2, 8, 2, keys[:, :, :70])


@kernel_test
@pytest.mark.parametrize("kind", KEYS)
def test_bounds(kind, monkeypatch):
    """Distances by parts err by far less than the bounds, which are small enough for most to be certain."""
    from sah_transformers.kernels.approximate import k_means

    tables = []

    def keep(keys, step, centroids, parts, squares, gaps, *_):
        tables.append((step.double(), centroids.double(), parts.float(), squares.clone(), gaps.double()))

    monkeypatch.setattr(k_means, "Direct", after("lloyd_kernel", keep))
    keys = KEYS[kind](draw(2, 400, 64))[None]
    k_means.codebooks(keys, 1, 16, 2)
    for step, centroids, parts, squares, gaps in tables:
        points = pq_cache.snap(pq_cache.split(keys, 1), step).flatten(0, 2)  # [N, n, S]
        centroids = (centroids / step[..., None, None]).flatten(0, 2)
        top = (points / 2048).round()
        low = (points - top * 2048).float()
        c_top, c_low = parts.mT.unbind(1)
        rest = (low @ c_low) / 2048 + low @ c_top + top.float() @ c_low
        got = (squares[:, None] - rest) - 2048 * (top.float() @ c_top)
        want = (centroids.square().sum(-1)[:, None] - 2 * points @ centroids.mT) / 4096
        alone = squares < math.inf
        error = (got - want).abs().amax(1)
        assert bool((error <= gaps[:, None] / 16)[alone].all())
        again = (centroids[:, :, None] == centroids[:, None]).all(-1).tril(-1).any(-1)
        assert torch.equal(alone, ~again)
        if kind == "normal":
            near = got <= got.amin(-1, keepdim=True) + gaps[:, None, None]
            assert (near.sum(-1) > 1).float().mean() < 0.01


@kernel_test
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_side_data_of_a_prompt(metric, padded):
    """Of a batch, and of keys that come after it, many or few at once; some numbers are too large to count."""
    config = {"type": "pq_cache", "heavy_size": 8, "pq_sub_dim": 16, "pq_bits": 3, "kmeans_iter": 2, "metric": metric}
    masker = MaskerRegistry.create_masker(config)
    keys, real = draw(2, 2, 95, 32), torch.ones(2, 95, dtype=torch.bool, device=DEVICE)
    keys[:, :, [30, 80, 92], :3] = torch.finfo(keys.dtype).max
    real[1, :9] = not padded
    found = []
    for kernel in ("reference", "triton"):
        state = LayerState()
        for start, stop in ((0, 20), (20, 70), (70, 90), (90, 95)):  # the first has not enough keys
            part, seen = keys[:, :, :stop], real[:, :stop] if padded else None
            state.update([masker], part, part, 2, stop - start, seen, Context(heads=2, kernel=kernel))
        found.append(state.side(masker))
    assert bool(found[0]["ready"].all())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


@gpu_test
def test_the_host_does_not_wait():
    from sah_transformers.kernels.approximate import k_means

    keys = draw(2, 8, 4000, 128, dtype=torch.bfloat16)
    graph, (centroids, step) = captured(lambda: k_means.codebooks(keys, 2, 64, 3))
    centroids.zero_()
    graph.replay()
    books, steps, _ = reference(keys, 2, 64, 3)
    assert torch.equal(centroids, books)
    assert torch.equal(step, steps)
