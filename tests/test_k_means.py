"""PQCache's codebooks and codes by kernels: the bits of the masker's, whatever the keys."""

import math

import pytest
import torch
from kernel_process import DEVICE, GPU, INTERPRETED, interpreter_test, kernel_test, passes_in_the_interpreter

from sah_transformers.maskers import pq_cache

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
KEYS = {
    "normal": lambda k: k,
    "few distinct": lambda k: k[:, torch.arange(k.shape[1]) % 3],
    "constant": lambda k: k[:, :1].expand_as(k).contiguous(),
    "zeros": torch.zeros_like,
    "whole": lambda k: k.round(),
    "one key far away": lambda k: torch.where(torch.arange(k.shape[1], device=k.device)[:, None] == 7, 900 * k, k),
    "largest": lambda k: k.sign() * min(torch.finfo(k.dtype).max, 1e38),
    "smallest": lambda k: k.sign() * torch.finfo(k.dtype).smallest_normal,
    "NaN and Inf": lambda k: torch.where(k > 1.5, math.nan, torch.where(k < -1.5, -math.inf, k)),
}


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    if INTERPRETED or GPU:
        from sah_transformers.kernels.approximate import k_means

        monkeypatch.setattr(k_means, "POINTS", 128)


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, poison=True)


def draw(*shape, seed=0, dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(DEVICE, dtype)


def reference(keys, parts, count, iterations):
    points = pq_cache.split(keys, parts)
    step = pq_cache.step_of(points)
    return step, pq_cache.k_means(pq_cache.snap(points, step), count, iterations)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_codebooks(kind, dtype):
    from sah_transformers.kernels.approximate import k_means

    for n, dim, parts, bits in ((150, 32, 2, 3), (40, 40, 1, 5)):
        keys = KEYS[kind](draw(2, n, dim, seed=n, dtype=dtype))
        step, centroids = reference(keys, parts, 2**bits, 3)
        assert torch.equal(k_means.k_means(keys, step, 2**bits, 3), centroids)
        far = torch.cat([keys, keys * 3000, keys / 100], dim=1)
        points = pq_cache.snap(pq_cache.split(far, parts), step)
        codes = torch.full((1, 2, far.shape[1], parts), 255, dtype=torch.uint8, device=DEVICE)
        books = (centroids * step[..., None, None]).float()[None]
        k_means.codes_of(far[None], books, step.float()[None], codes)
        assert torch.equal(codes[0].mT.long(), pq_cache.nearest(points, centroids))


@kernel_test
def test_strides():
    from sah_transformers.kernels.approximate import k_means

    keys = draw(300, 2, 48)[:, :, 8:40].transpose(0, 1)
    step, centroids = reference(keys, 2, 8, 3)
    assert torch.equal(k_means.k_means(keys, step, 8, 3), centroids)
    codes = torch.empty(1, 2, 2, 300, dtype=torch.uint8, device=DEVICE).mT
    books = (centroids * step[..., None, None]).float()[None]
    k_means.codes_of(keys[None], books, step.float()[None], codes)
    assert torch.equal(codes[0].mT.long(), pq_cache.nearest(pq_cache.snap(pq_cache.split(keys, 2), step), centroids))
