"""`random_sampling`: a uniform sample without replacement, another one in every row, head, layer and seed."""

import pytest
import torch

from sah_transformers import sparse_attention
from sah_transformers.maskers.random_sampling import uniform

SINK = {"type": "sink", "sink_size": 4}


def select(rate=0.25, seed=0, stack=(), K=64, Q=8, **options):
    """(out, weights) over random tensors of one fixed seed."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((4, Q), (2, K), (2, K)))
    maskers = [*stack, {"type": "random_sampling", "sampling_rate": rate, "seed": seed}]
    out, mask = sparse_attention(q, k, v, maskers, **options)
    return out, mask.get_dense_mask()


def test_a_row_takes_its_share_of_the_candidates():
    _, weights = select(stack=[SINK])
    for row in range(8):
        candidates = 57 + row - 4  # visible, without the sinks
        size = int(0.25 * candidates)
        taken = weights[0, :, row, 4:]
        assert ((taken > 0).sum(-1) == size).all()
        assert torch.equal(taken[taken > 0], torch.full((4 * size,), size / candidates))
        assert (weights[0, :, row, :4] == 1).all()
    assert ((select(rate=1e-9)[1] > 0).sum(-1) == 1).all()
    assert torch.equal(select(rate=1.0)[1], torch.ones(1, 4, 8, 64).tril(56))


def test_every_candidate_is_as_likely():
    """A key's share of 2,000 samples: binomial, so within five deviations of the rate; pairs are as independent."""
    taken = torch.cat([select(seed=seed, Q=5, is_causal=False)[1][0, :, :1] > 0 for seed in range(500)]).squeeze(1)
    share = taken.double().mean(0)
    assert taken.shape == (2000, 64)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    both = (taken.double().T @ taken.double() / 2000).triu(1)
    expected = 16 * 15 / (64 * 63)
    assert (both[both > 0] - expected).abs().max() < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_numerator_and_denominator_are_unbiased():
    """sum exp(s)/w over the sample: its mean over many seeds is the sum over all keys."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, 8, generator=generator) for n in (1, 40, 40))
    e = (q @ k.mT * 8**-0.5).exp()[0, 0, 0].double()
    sums = []
    for seed in range(1000):
        stack = [{"type": "random_sampling", "sampling_rate": 0.2, "seed": seed}]
        weight = sparse_attention(q, k, v, stack)[1].get_dense_mask()[0, 0, 0].double()
        sums.append((e / weight.masked_fill(weight == 0, float("inf"))).sum())
    sums = torch.stack(sums)
    assert abs(sums.mean() - e.sum()) < 5 * sums.std() / 1000**0.5


def test_samples_differ_by_row_head_layer_and_seed():
    _, one = select(K=400, Q=8)
    samples = [one[0, head, row, :393] > 0 for head in range(4) for row in range(8)]
    samples += [other[0, 0, 0, :393] > 0 for other in (select(K=400, seed=1)[1], select(K=400, layer_idx=1)[1])]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert 8 < (a & b).sum() < 48  # about a quarter of a quarter, 24; equal samples share 98
    assert torch.equal(one, select(K=400)[1])
    assert torch.equal(one[:, :2], select(K=400, head_offset=0)[1][:, :2])
    assert not torch.equal(one[:, :2], select(K=400, head_offset=2)[1][:, :2])


@pytest.mark.parametrize("counter", [0, 1, -1, 2**62, 2**63 - 1])
def test_numbers_hang_on_the_counters_alone(counter):
    from loops import splitmix

    both = uniform(3, torch.tensor([[counter], [7]]), torch.tensor([5, 6]))
    assert both.shape == (2, 2)
    expected = [[splitmix(3, x % 2**64, y) for y in (5, 6)] for x in (counter, 7)]
    assert both.tolist() == expected
    assert ((both >= 0) & (both < 1)).all()
