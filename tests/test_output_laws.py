"""Gradients, dropout and weights of the output, against dense attention with the selection held fixed."""

import math

import pytest
import torch
from cases import tensors
from test_exactness import as_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sah_transformers import sparse_attention

STACKS = {
    "dense": [],
    "sink local": [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 0.2}],
    "top k": [{"type": "oracle_top_k", "heavy_size": 0.2}],
    "group": [{"type": "oracle_top_k", "heavy_size": 4, "gqa": "group"}],
    "top p": [{"type": "sink", "sink_size": 1}, {"type": "oracle_top_p", "top_p": 0.5, "coverage": "total"}],
}
each_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def dense(q, k, v, weights, scaling=None, softcap=None, sinks=None, bias=None, kept=None):
    """The formula of the specification in the tensors' own dtype; `weights` [B,H,Q,K] is a constant."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = (logits - weights.double().log().to(q.dtype)).masked_fill(weights == 0, -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    empty = (weights == 0).all(-1, keepdim=True)
    p = logits.masked_fill(empty, 0.0).softmax(-1)[..., : k.shape[2]].masked_fill(empty, 0.0)
    if kept is not None:
        p = p * kept
    return (p @ v).transpose(1, 2)


def check_gradients(inputs, stack, tolerance, call=None, previous=None, **extra):
    """Gradients of the tensors in `inputs` (q, k, v and those in `extra`) equal those of dense attention."""
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    extra = {n: x.clone().requires_grad_() for n, x in extra.items()}
    options = {**(call or {}), "previous_mask": previous}
    bias = extra.get("position_bias")
    out, mask = sparse_attention(q, k, v, stack, kernel="reference", **options, **extra)
    torch.manual_seed(0)
    weight = torch.randn(out.shape, dtype=torch.float64)
    (out.double() * weight).sum().backward()
    leaves = [q, k, v, *extra.values()]
    ours = [x.grad for x in leaves]

    twins = [x.detach().double().requires_grad_() for x in leaves]
    named = dict(zip(extra, twins[3:], strict=True))
    bias = named.get("position_bias")
    truth = dense(
        *twins[:3],
        mask.get_dense_mask(),
        scaling=options.get("scaling"),
        softcap=options.get("softcap"),
        sinks=named.get("sinks"),
        bias=bias,
    )
    (truth * weight).sum().backward()
    for leaf, got, twin in zip("qkv" + "x" * len(extra), ours, twins, strict=True):
        assert got is not None, f"no gradient reaches {leaf}"
        assert got.dtype == leaves[0].dtype
        assert torch.isfinite(got).all()
        error, size = (got.double() - twin.grad).abs().max(), twin.grad.abs().max()
        assert error <= tolerance * max(size, 1.0), (leaf, float(error), float(size))


def draw(B=2, H=4, G=2, Q=9, K=24, D=8, Dv=6, dtype=torch.float64, seed=0):
    return tensors(torch.Generator().manual_seed(seed), B, H, G, Q, K, D, Dv, dtype, "normal")


@each_stack
def test_gradients_of_queries_keys_values(stack):
    check_gradients(draw(), stack, 2e-6)
    check_gradients(draw(dtype=torch.float32), stack, 1e-5)
    check_gradients(draw(dtype=torch.bfloat16), stack, 3e-2)


@each_stack
def test_gradients_through_softcap_sinks_and_bias(stack):
    sinks = torch.randn(4, dtype=torch.float64)
    check_gradients(draw(), stack, 2e-6, {"softcap": 1.5, "scaling": 0.7}, sinks=sinks)
    for shape in ((2, 4, 9, 24), (1, 4, 9, 24), (1, 1, 9, 24)):
        bias = torch.randn(shape, dtype=torch.float64)
        check_gradients(draw(), stack, 2e-6, {"softcap": 30.0}, sinks=sinks, position_bias=bias)


@each_stack
def test_gradients_over_many_blocks_of_queries(stack):
    check_gradients(draw(B=1, H=2, G=1, Q=600, K=600, D=4, Dv=3), stack, 2e-6)


@each_stack
def test_gradients_with_rows_that_see_nothing(stack):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0] = 0
    mask[1, :20] = 0  # with causal order the first queries of this sequence see nothing
    check_gradients(draw(), stack, 2e-6, {"attention_mask": mask})
    check_gradients(draw(Q=30), stack, 2e-6)


def test_gradients_through_sampled_weights():
    generator = torch.Generator().manual_seed(5)
    drawn = torch.tensor([0, 0, 1.0, 0.3, 0.02])[torch.randint(0, 5, (2, 4, 9, 24), generator=generator)]
    previous = as_mask(drawn * torch.ones(9, 24).tril(15))
    check_gradients(draw(), [{"type": "sink", "sink_size": 1}], 2e-6, previous=previous)


def test_only_what_asks_gets_a_gradient():
    q, k, v = draw(dtype=torch.float32)
    v.requires_grad_()
    out, _ = sparse_attention(q, k, v, STACKS["top k"], kernel="reference")
    out.sum().backward()
    assert v.grad is not None
    assert q.grad is None
    assert k.grad is None
    out, _ = sparse_attention(q, k, v.detach(), STACKS["top k"], kernel="reference")
    assert not out.requires_grad


def test_gradients_may_be_taken_twice_over_the_same_graph():
    q, k, v = (x.requires_grad_() for x in draw())
    out, _ = sparse_attention(q, k, v, STACKS["top p"], kernel="reference")
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@each_stack
def test_memory_is_linear_in_the_keys(stack):
    """No tensor grows with queries times keys, forward or backward, when no mask is asked for."""

    def largest(n):
        q, k, v = (x.requires_grad_() for x in draw(B=1, H=2, G=1, Q=n, K=n, D=4, Dv=4, dtype=torch.float32))
        padding = torch.ones(1, n, dtype=torch.long)
        with Largest() as seen:
            out = sparse_attention(q, k, v, stack, attention_mask=padding, kernel="reference", return_mask=False)
            out.sum().backward()
        return seen.numel

    assert largest(2560) <= 2.8 * largest(1024)


# Dropout


def identity(B, H, G, Q, K, D=4):
    """Inputs whose output is the row of attention weights itself."""
    q, k, _ = tensors(torch.Generator().manual_seed(1), 1, H, G, Q, K, D, 1, torch.float32, "normal")
    v = torch.eye(K).expand(B, G, K, K)
    return q.expand(B, -1, -1, -1), k.expand(B, -1, -1, -1), v


@each_stack
def test_dropout_zeroes_or_rescales_normalised_weights(stack):
    q, k, v = identity(400, 2, 1, 3, 12)
    sinks = torch.tensor([0.3, -1.0])
    plain, selected = sparse_attention(q, k, v, stack, sinks=sinks, kernel="reference")
    torch.manual_seed(7)
    dropped, mask = sparse_attention(q, k, v, stack, sinks=sinks, dropout=0.25, kernel="reference")
    assert torch.equal(mask.get_dense_mask(), selected.get_dense_mask())
    active = plain > 0
    kept = dropped > 0
    assert not kept[~active].any()
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75, rtol=1e-5, atol=1e-7)
    n = int(active.sum())
    assert abs(int(kept.sum()) - 0.75 * n) <= 5 * math.sqrt(n * 0.25 * 0.75)
    spread = dropped.std(0) / math.sqrt(400)
    assert ((dropped.mean(0) - plain.mean(0)).abs() <= 6 * spread + 1e-6).all()
    pattern = kept.flatten(1).float()
    assert len({tuple(row) for row in pattern.tolist()}) > 200, "every sequence draws for itself"


def test_dropout_follows_the_seed_and_none_is_deterministic():
    q, k, v = identity(2, 2, 1, 5, 12)

    def run(seed, dropout):
        torch.manual_seed(seed)
        return sparse_attention(q, k, v, STACKS["sink local"], dropout=dropout, kernel="reference")[0]

    assert torch.equal(run(1, 0.5), run(1, 0.5))
    assert not torch.equal(run(1, 0.5), run(2, 0.5))
    assert torch.equal(run(1, 0.0), run(2, 0.0))
    before = torch.random.get_rng_state()
    sparse_attention(q, k, v, STACKS["top k"], kernel="reference")
    assert torch.equal(before, torch.random.get_rng_state()), "without dropout nothing is drawn"


@each_stack
@pytest.mark.parametrize("Q", [3, 400])
def test_the_backward_pass_uses_the_forwards_dropout(stack, Q):
    K = Q + 9
    q, k, v = (x.double().requires_grad_() for x in identity(1, 2, 1, Q, K))
    out, mask = sparse_attention(q, k, v, stack, dropout=0.4, kernel="reference")
    torch.rand(3)  # others draw in between
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    kept = (out.detach() > 0).transpose(1, 2) / 0.6
    truth = torch.autograd.grad((dense(q, k, v, mask.get_dense_mask(), kept=kept) * weight).sum(), (q, k, v))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Weights


def test_weights_are_divided_without_an_epsilon():
    """A weight of 1e-6 counts a million times: two keys of equal score are mixed 1 : 1e6."""
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    v = torch.eye(3).reshape(1, 1, 3, 3)
    previous = as_mask(torch.tensor([1.0, 1e-6, 0.0]).reshape(1, 1, 1, 3))
    out, mask = sparse_attention(
        q, k, v, [{"type": "sink", "sink_size": 1}], previous_mask=previous, kernel="reference"
    )
    expected = torch.tensor([1e-6, 1.0, 0.0], dtype=torch.float64) / (1 + 1e-6)
    torch.testing.assert_close(out.flatten().double(), expected, rtol=1e-5, atol=0)
    assert mask.get_dense_mask().flatten().tolist() == torch.tensor([1.0, 1e-6, 0.0]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_keep_float32_in_every_dtype(dtype):
    """0.3 is not 0.3 in bfloat16; the weights of a mask are not rounded to the model's dtype."""
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    previous = as_mask(torch.tensor([0.3, 0.0]).reshape(1, 1, 1, 2))
    stack = [{"type": "local", "window_size": 1}]
    inputs = (x.to(dtype) for x in (q, k, v))
    out, mask = sparse_attention(*inputs, stack, previous_mask=previous, kernel="reference")
    assert mask.get_dense_mask().flatten().tolist() == torch.tensor([0.3, 1.0]).tolist()
    assert float(out) == pytest.approx((1 / 0.3) / (1 / 0.3 + 1), rel=2 * torch.finfo(dtype).eps)


def test_sampled_weights_estimate_dense_attention():
    """Numerator and denominator are unbiased: over many samples both average to the dense ones."""
    generator = torch.Generator().manual_seed(3)
    K, samples, p = 40, 4000, 0.5
    q, k, _ = tensors(generator, 1, 1, 1, 1, K, 4, 1, torch.float32, "normal")
    v = torch.ones(1, 1, K, 1)
    kept = (torch.rand(samples, 1, 1, K, generator=generator) < p).float() * p
    sinks = torch.tensor([2.0])  # out = S / (S + e^2), from which S, the estimated denominator, follows
    stack = [{"type": "sink", "sink_size": 1}]
    out, _ = sparse_attention(
        q.expand(samples, -1, -1, -1),
        k.expand(samples, -1, -1, -1),
        v.expand(samples, -1, -1, -1),
        stack,
        sinks=sinks,
        previous_mask=as_mask(kept),
        kernel="reference",
    )
    share = out.flatten().double()
    estimate = math.exp(2.0) * share / (1 - share)
    exact = torch.exp((q.double() @ k.double().mT) * 0.5).sum()
    assert abs(estimate.mean() - exact) <= 5 * estimate.std() / math.sqrt(samples)
