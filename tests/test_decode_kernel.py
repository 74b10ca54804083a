"""The decode kernels against the reference: the same tests in Triton's interpreter and on a GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, where `TRITON_INTERPRET` is set
before the kernels are imported. Scratch and outputs are filled with NaN before use.
"""

import pytest
import torch
from kernel_process import (
    DEVICE,
    GPU,
    HAS_TRITON,
    INTERPRETED,
    captured,
    gpu_test,
    interpreter_test,
    kernel_test,
    passes_in_the_interpreter,
)

from sah_transformers.attention import make_call, run
from sah_transformers.kernels.decode import decode, why_not
from sah_transformers.kernels.masked_attention import masked_attention
from sah_transformers.maskers import MaskerRegistry


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, poison=True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    if GPU:
        from sah_transformers.kernels import tape

        monkeypatch.setattr(tape, "POISON", True)


def sink(size=16):
    return {"type": "sink", "sink_size": size}


def local(size=20):
    return {"type": "local", "window_size": size}


def top_k(size=0.05, **options):
    return {"type": "oracle_top_k", "heavy_size": size, **options}


def top_p(share=0.9, **options):
    return {"type": "oracle_top_p", "top_p": share, **options}


def tensors(B=1, H=4, G=2, Q=1, K=300, D=32, Dv=None, dtype=torch.float32, data="normal", seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)

    q, k, v = normal(B, H, Q, D), normal(B, G, K, D), normal(B, G, K, Dv or D)
    if data == "constant":
        k = k[:, :, :1].expand_as(k).clone()
    elif data == "duplicates":
        k = k[:, :, torch.randint(0, 5, (K,), generator=generator, device=DEVICE)]
    elif data == "zero queries":
        q = q * 0
    elif data == "signed zeros":
        q, k = q * 0, k.sign()
    elif data == "whole numbers":
        q, k = q.round().clamp(-1, 1), k.round().clamp(-1, 1)
    elif data == "huge":
        q, k = q * 30, k * 30
    elif data == "tiny":
        q, k = q * 1e-3, k * 1e-3
    elif data == "one heavy":
        k[:, :, K // 2] += 5 * q[:, :: H // G, 0]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def call_of(stack, q, k, v, **options):
    """The call; ``run`` takes the reference for it."""
    options = {"kernel": "reference", **options}
    return make_call(q, k, v, [MaskerRegistry.create_masker(config) for config in stack], **options)


def eager(call, active):
    """Attention over ``active`` keys as eager PyTorch computes it in the tensors' dtype."""
    q, k, v = call.queries, call.keys, call.values
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = (q @ k.mT) * call.context.scaling
    if call.context.softcap is not None:
        scores = call.context.softcap * torch.tanh(scores / call.context.softcap)
    scores = scores.masked_fill(~active, float("-inf"))
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., : active.shape[-1]]
    weights = weights.masked_fill(~active.any(-1, keepdim=True), 0.0)
    return (weights @ v).transpose(1, 2)


def as_right_as_eager(call, out, near_ties=0):
    """At most twice the error of eager PyTorch plus one rounding, against float64 over the reference's selection.

    In ``near_ties`` rows scores may be closer than their rounding.
    """
    masks = []
    run(call, masks=masks)
    visible, _ = call.visibility.block(0, call.shape[2])
    rows = call.rows(0, call.shape[2], call.queries.double(), call.keys.double(), call.values.double())
    sinks = call.block_sinks(0, call.shape[2])
    truth, _ = masked_attention(rows.scores(), rows.values, masks[0], visible, sinks)
    active = masks[0].active().expand(call.shape)
    active = active if visible is None else active & visible
    ordinary = (eager(call, active).double() - truth).abs().max()
    error = (out.double() - truth).abs().amax(-1)
    rounding = torch.finfo(out.dtype).eps * truth.abs().max()
    assert out.shape == truth.shape
    wrong = ~(error <= 2 * (ordinary + rounding))
    assert wrong.sum() <= near_ties, (error.max().item(), ordinary.item(), rounding.item())
    return out


def check(call):
    """The kernels' output, which is as right as eager PyTorch's."""
    assert why_not(call) == ""
    return as_right_as_eager(call, decode(call))


BASE = [sink(), local()]
STACKS = {
    "all": [],
    "sink local": BASE,
    "window of a share": [local(0.3)],
    "top k": [*BASE, top_k()],
    "top k alone": [top_k(7)],
    "top k 1": [sink(1), top_k(1)],
    "top k most": [sink(4), top_k(0.8)],
    "top k all": [local(), top_k(1.0)],
    "top k beyond": [sink(4), top_k(10**6)],
    "several bands": [sink(3), local(0.1), sink(0.02), local(9), top_k(0.1)],
    "bands hold all": [sink(0.6), local(0.6), top_k()],
    "group": [*BASE, top_k(0.05, gqa="group")],
    "top p": [*BASE, top_p()],
    "top p total": [*BASE, top_p(0.5, coverage="total")],
    "top p half": [top_p(0.5)],
}
SHAPES = {
    "one key": {"K": 1},
    "few keys": {"K": 17},
    "one tile": {"K": 128},
    "ragged": {"K": 333},
    "MQA": {"H": 7, "G": 1, "K": 200},
    "MHA": {"H": 3, "G": 3, "K": 200},
    "wide group": {"H": 16, "G": 1, "K": 60},
    "batch": {"B": 3, "K": 130},
    "D=80, Dv=48": {"D": 80, "Dv": 48, "K": 150},
    "D=256": {"D": 256, "Dv": 96, "K": 100, "H": 2, "G": 1},
    "D=192, Dv=128": {"D": 192, "Dv": 128, "K": 100, "H": 2, "G": 2},
}
TIES = ["constant", "duplicates", "zero queries", "signed zeros", "whole numbers"]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SCORED = ["top k", "group", "top p"]


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_stacks(stack, dtype):
    check(call_of(stack, *tensors(dtype=dtype)))


@kernel_test
@pytest.mark.parametrize("stack", ["sink local", *SCORED])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, stack):
    if not GPU and stack in ("group", "top p") and shape not in (SHAPES["ragged"], SHAPES["MQA"], SHAPES["one key"]):
        pytest.skip("on a GPU only: the interpreter is slow")
    check(call_of(STACKS[stack], *tensors(**shape)))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", ["top k most", "top p"])
@pytest.mark.parametrize("shape", [{"H": 2, "K": 1200}, {"H": 16, "Q": 5, "K": 300}], ids=["keys", "rows"])
def test_values_that_are_all_read(shape, stack, dtype):
    """With keys at the boundary, which are listed meanwhile; with more rows in a group than a program takes."""
    check(call_of(STACKS[stack], *tensors(**shape, G=1, D=16, dtype=dtype)))


@kernel_test
@pytest.mark.parametrize("data", [*TIES, "huge", "tiny", "one heavy"])
@pytest.mark.parametrize("stack", SCORED)
def test_data(stack, data):
    """Ties at the cut go to the lower position, whether or not the bracket can tell the keys apart."""
    if stack != "top k" and data == "tiny":
        pytest.skip("weights that differ by less than their rounding")
    check(call_of(STACKS[stack], *tensors(data=data, K=260)))


@kernel_test
@pytest.mark.parametrize("data", ["constant", "duplicates"])
@pytest.mark.parametrize("stack", SCORED)
def test_ties_over_several_blocks(stack, data):
    """The exact search walks a row in blocks of 1,024 keys."""
    check(call_of(STACKS[stack], *tensors(H=2, G=1, K=2500, D=16, data=data)))


@kernel_test
@pytest.mark.parametrize("stack", ["sink local", *SCORED])
@pytest.mark.parametrize("rows", [2, 5])
def test_several_queries(stack, rows):
    """Each row sees the keys up to its own."""
    check(call_of(STACKS[stack], *tensors(H=2, G=1, Q=rows, K=150)))


def left_padding(K, *padded):
    return torch.arange(K, device=DEVICE)[None] >= torch.tensor(padded, device=DEVICE)[:, None]


@kernel_test
@pytest.mark.parametrize("stack", ["all", "sink local", *SCORED])
def test_left_padding(stack):
    """A padded sequence has the result of the sequence alone; padding holds nothing that counts."""
    q, k, v = tensors(B=3, H=2, G=1, K=150)
    padded = [0, 37, 149]
    out = check(call_of(STACKS[stack], q, k, v, attention_mask=left_padding(150, *padded)))
    for b, start in enumerate(padded):
        alone = decode(call_of(STACKS[stack], q[b : b + 1], k[b : b + 1, :, start:], v[b : b + 1, :, start:]))
        torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-5, atol=1e-6)


@kernel_test
def test_masks():
    """Holes, a row that sees nothing, a static cache with an unused tail, several rows."""
    q, k, v = tensors(B=2, H=2, G=1, Q=3, K=100)
    holes = torch.rand(2, 1, 3, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    holes[1, 0, 1] = False
    out = check(call_of([sink(3), local(4), top_k(5)], q, k, v, attention_mask=holes, is_causal=False))
    assert not out[1, 1].any()
    used = torch.ones(3, 100, dtype=torch.bool, device=DEVICE).tril(57).expand(2, 1, 3, 100)
    check(call_of([sink(3), local(4), top_k(5)], q, k, v, attention_mask=used, is_causal=False))
    check(call_of([sink(3), local(4)], q, k, v, attention_mask=holes))
    check(call_of([], q, k, v, attention_mask=holes, is_causal=False))
    check(call_of([sink(3), local(4), top_k(5)], q, k, v, attention_mask=holes, min_keys=61))


def holes(B, Q, K):
    """``[B, 1, Q, K]``, where the first row of the last sequence sees nothing."""
    seen = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    seen[-1, :, 0] = False
    return seen


def used(Q, K, free=40):
    """``[1, 1, Q, K]`` of a static cache: the last ``free`` places are empty, each row sees the keys up to its own."""
    return torch.ones(Q, K, dtype=torch.bool, device=DEVICE).tril(K - free - Q)[None, None]


MASKS = {
    "left padding": lambda Q, K: {"attention_mask": left_padding(K, 0, 61)},
    "the same padding": lambda Q, K: {"attention_mask": left_padding(K, 61)},
    "static cache": lambda Q, K: {"attention_mask": used(Q, K), "is_causal": False},
    "one row for all": lambda Q, K: {"attention_mask": used(1, K), "is_causal": False},
    "holes": lambda Q, K: {"attention_mask": holes(2, Q, K), "is_causal": False},
    "holes, causal": lambda Q, K: {"attention_mask": holes(2, Q, K)},
    "some rows dense": lambda Q, K: {"attention_mask": holes(2, Q, K), "is_causal": False, "min_keys": K * 6 // 10},
}


@kernel_test
@pytest.mark.parametrize(("rows", "groups"), [(1, 2), (2, 1), (5, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_groups(mask, rows, groups):
    """The rows' limits, found in the launch that scores, whatever they see."""
    if not GPU and rows > 1 and mask not in ("left padding", "one row for all", "some rows dense"):
        pytest.skip("on a GPU only: the interpreter is slow")
    q, k, v = tensors(B=2, H=2 * groups, G=groups, Q=rows, K=110, D=16)
    check(call_of(STACKS["group"], q, k, v, **MASKS[mask](rows, 110)))


@kernel_test
def test_long_masks_of_groups():
    """Several segments of a mask, of which some hold nothing that a row sees, more than are counted at once."""
    seen = holes(1, 2, 9300)
    seen[..., 1, :2100], seen[..., 1, -1500:] = False, False
    stack = [sink(1500), local(0.2), top_k(0.05, gqa="group")]
    check(call_of(stack, *tensors(H=2, G=1, Q=2, K=9300, D=16), attention_mask=seen, is_causal=False))


@kernel_test
@pytest.mark.parametrize("stack", ["sink local", *SCORED])
def test_softcap_and_sinks(stack):
    q, k, v = tensors(K=200)
    sinks = torch.linspace(-3, 5, 4, device=DEVICE)
    check(call_of(STACKS[stack], q * 4, k, v, softcap=3.0, sinks=sinks, scaling=0.3))


@kernel_test
@pytest.mark.parametrize("stack", ["sink local", *SCORED])
def test_strided_caches(stack):
    """Caches are read where they lie: sliced, and with the heads inside; what is outside the slice is NaN."""
    q, k, v = tensors(K=150)
    nan = torch.full((1, 2, 400, 40), float("nan"), device=DEVICE)
    wide = nan.clone()
    wide[:, :, 100:250, 3:35] = k
    inside = torch.full((1, 170, 2, 32), float("nan"), device=DEVICE).transpose(1, 2)
    inside[:, :, 9:159] = v
    call = call_of(STACKS[stack], q, wide[:, :, 100:250, 3:35], inside[:, :, 9:159])
    torch.testing.assert_close(check(call), decode(call_of(STACKS[stack], q, k, v)), rtol=1e-6, atol=1e-6)


@kernel_test
@pytest.mark.parametrize("stack", SCORED)
def test_two_runs_give_the_same_bits(stack):
    call = call_of(STACKS[stack], *tensors(K=250))
    assert torch.equal(decode(call), decode(call))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_why_not():
    """Every refusal has a reason of its own, and ``decode`` raises with it."""
    q, k, v = tensors(K=40)
    stack = [top_k(4)]
    whole = {"attention_mask": torch.zeros(1, 1, 1, 40, device=DEVICE), "is_causal": False}
    if not GPU and not INTERPRETED:
        assert "CUDA" in why_not(call_of(stack, q, k, v))
        return
    reasons = [
        why_not(call_of(stack, q.double(), k.double(), v.double())),
        why_not(call_of(stack, *tensors(Q=17, K=40))),
        why_not(call_of(stack, *tensors(D=264, K=40))),
        why_not(call_of(stack, q, k, v, dropout=0.1)),
        why_not(call_of(stack, q, k, v, **whole)),
        why_not(call_of(stack, q.clone().requires_grad_(), k, v)),
        why_not(call_of(stack, q, k, v, min_keys=50)),
        why_not(call_of([top_k(4), sink()], q, k, v)),
        why_not(call_of([{"type": "causal"}], q, k, v)),
        why_not(call_of([top_p(0.9, gqa="group")], q, k, v)),
        why_not(call_of([top_p(1.0)], q, k, v)),
        why_not(call_of(stack, q, k.mT.contiguous().mT, v)),
    ]
    assert all(reasons), reasons
    assert len(set(reasons)) == len(reasons)
    with pytest.raises(ValueError, match="dropout"):
        decode(call_of(stack, q, k, v, dropout=0.1))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("data", ["normal", *TIES, "huge", "one heavy"])
@pytest.mark.parametrize("stack", ["top k", "top k most", "group", "top p", "top p total"])
def test_long(stack, data):
    """Selection at length: nearly uniform weights, where one wrong key in thousands shows."""
    q, k, v = tensors(H=8, G=2, K=40_000, D=64, data=data)
    q = q * 0.02 if data == "normal" and "top p" not in stack else q
    call = call_of(STACKS[stack], q, k, v)
    out, truth = decode(call), run(call)[0]
    close = (out - truth).abs().amax(-1) <= 2e-5 * truth.abs().max()
    assert close.sum() >= close.numel() - (1 if "top p" in stack else 0)
    assert torch.equal(out, decode(call))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (6, 2), (8, 2), (7, 1), (8, 1), (16, 1), (32, 1)], ids=str)
def test_groups_and_dtypes(heads, dtype):
    for stack in ("sink local", *SCORED):
        for dim in (16, 64, 96):
            check(call_of(STACKS[stack], *tensors(H=heads[0], G=heads[1], K=1500, D=dim, dtype=dtype)))


@gpu_test
@pytest.mark.gpu
def test_a_million_keys():
    """Offsets beyond 2**31 elements; a cut among 50 thousand."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (1, 8, 1, 256), (1, 8, 2**20, 256), (1, 8, 2**20, 256)
    q, k, v = (torch.randn(s, generator=generator, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
    for stack in ("sink local", "top k", "top p"):
        out = decode(call_of(STACKS[stack], q, k, v))
        for head in range(8):  # the reference needs eight times the keys' memory
            one = slice(head, head + 1)
            truth = run(call_of(STACKS[stack], q[:, one], k[:, one], v[:, one]))[0]
            assert ((out[:, :, one] - truth).double().norm() / truth.double().norm()) < 1e-2


@kernel_test
@pytest.mark.parametrize("kind", ["random", "all", "none", "one", "padded", "few"])
def test_bounds_of_masks(kind):
    """Where the first and the last keys of a row lie, against a list of what it sees."""
    from sah_transformers.kernels.approximate.place import Direct
    from sah_transformers.kernels.decode.kernel import find_limits

    generator = torch.Generator().manual_seed(0)
    for keys, rows, causal, first, last, least in (
        (1, 1, False, 3, 2, 0),
        (700, 2, True, 5, 40, 0),
        (2500, 1, True, 0, 0, 9),
    ):
        mask = torch.rand(2, rows, keys, generator=generator) < {"random": 0.5, "few": 0.004}.get(kind, 1.1)
        if kind == "none":
            mask[:] = False
        elif kind == "one":
            mask[:] = torch.arange(keys) == keys // 3
        elif kind == "padded":
            mask[1, :, : keys // 2] = False
        mask = mask.to(DEVICE)
        limits = torch.full((5, 2, rows), -7, dtype=torch.int32, device=DEVICE)
        counts = torch.full((2 * rows, 3), -7, dtype=torch.int32, device=DEVICE)
        sizes, bands = (2, rows, keys), (first, 0, last, 0, least)
        find_limits(Direct(), mask, counts, limits, sizes, mask.stride(), bands, causal, 4096)
        for b in range(2):
            for q in range(rows):
                seen = mask[b, q, : keys - rows + 1 + q if causal else keys].nonzero().flatten().tolist()
                n = len(seen)
                head, tail = min(first, n), n - min(last, n)
                first_end = keys if n < least else seen[head - 1] + 1 if head else 0
                ends = (seen[0], seen[-1] + 1) if n else (keys, 0)
                assert limits[:, b, q].tolist() == [n, first_end, seen[tail] if tail < n else keys, *ends]


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["sink local", *SCORED])
def test_graph_without_synchronisation(stack):
    """No call waits for the device; a captured call follows its changed inputs."""
    q, k, v = tensors(H=8, G=2, K=5000, D=64, dtype=torch.bfloat16)
    call = call_of(STACKS[stack], q, k, v)
    decode(call)
    graph, out = captured(lambda: decode(call))
    for seed in range(1, 4):
        for old, new in zip((q, k, v), tensors(H=8, G=2, K=5000, D=64, dtype=torch.bfloat16, seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, decode(call))


@gpu_test
@pytest.mark.gpu
def test_growing_cache_does_not_recompile():
    """Steps of a generation share compiled kernels until the length doubles."""
    from sah_transformers.kernels.decode import kernel

    q, k, v = tensors(H=8, G=2, K=3000, D=64, dtype=torch.bfloat16)
    kernel.PLANS.clear()
    for length in range(2100, 2140):
        call = call_of(STACKS["top k"], q, k[:, :, :length], v[:, :, :length])
        torch.testing.assert_close(decode(call), run(call)[0], rtol=2e-2, atol=2e-2)
    assert len(kernel.PLANS) == 1
