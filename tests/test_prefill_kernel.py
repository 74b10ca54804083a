"""The prefill kernels against the reference: on a GPU, or on a CPU through Triton's interpreter.

Without a GPU the tests run in a process of their own, because the interpreter is chosen when triton is imported.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from kernel_process import DEVICE, GPU, INTERPRETED, gpu_test, interpreter_test, passes_in_the_interpreter

from sah_transformers.attention import _join, make_call, run
from sah_transformers.kernels.prefill import prefill, why_not
from sah_transformers.kernels.prefill.stack import Bands, stack_of
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.selections import Best, Estimated, Everything, First, Last, Mass, Pages

INTERPRETER = INTERPRETED and not GPU
HERE = GPU or INTERPRETED
SINK, LOCAL = {"type": "sink", "sink_size": 5}, {"type": "local", "window_size": 9}
runs_kernels = pytest.mark.skipif(not HERE, reason="runs in the interpreter's process or on a GPU")
on_gpu = [pytest.mark.gpu, gpu_test]


def best(budget, **more):
    return {"type": "oracle_top_k", "heavy_size": budget, **more}


def mass(top_p, coverage="remaining"):
    return {"type": "oracle_top_p", "top_p": top_p, "coverage": coverage}


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, "-m", "not gpu", timeout=500)


def data(kind, B, H, G, Q, K, D, Dv, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((B, H, Q, D), (B, G, K, D), (B, G, K, Dv)))
    if kind == "zero queries":
        q = torch.zeros_like(q)
    elif kind == "constant keys":
        k = k[:, :, :1].expand_as(k).clone()
    elif kind == "duplicated keys":
        k = k[:, :, torch.randint(0, 4, (K,), generator=generator)]
    elif kind == "small integers":  # every score is exact, most are equal to others
        q, k = q.round().clamp(-2, 2), k.round().clamp(-2, 2)
    elif kind == "signed zeros":
        q, k = q.sign(), torch.where(torch.rand(k.shape, generator=generator) < 0.8, 0.0, k.sign()) * -1.0
    elif kind == "huge":
        q, k = q * 50, k * 50
    elif kind == "tiny":
        q, k = q * 1e-3, k * 1e-3
    return tuple(x.to(dtype).to(DEVICE) for x in (q, k, v))


def make(tensors, maskers, **options):
    return make_call(*tensors, [MaskerRegistry.create_masker(m) for m in maskers], **options)


def kernel(call):
    """(out, keys per row), both poisoned first through torch's allocator."""
    assert why_not(call) == ""
    counts = torch.full(call.shape[:3], -7, dtype=torch.int32, device=DEVICE)
    empty = torch.Tensor.new_empty
    poison = pytest.MonkeyPatch()

    def poisoned(self, *shape, **options):
        out = empty(self, *shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    def torch_empty(*shape, **options):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        value = torch.nan if options.get("dtype", torch.float32).is_floating_point else -(2**30)
        return torch.full(shape, value, **options)

    with poison.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        patch.setattr(torch, "empty", torch_empty)
        out = prefill(call, counts)
    return out, counts


def reference(call):
    """(out, mask) of the definition."""
    masks = []
    out, _ = run(replace(call, kernel="reference") if call.kernel == "triton" else call, masks=masks)
    return out, _join(masks, call).active()


def exact(call, mask):
    """Float64 attention over ``mask``, and what eager PyTorch makes of it in the call's dtype."""
    groups = call.queries.shape[1] // call.keys.shape[1]
    results = []
    for dtype in (torch.float64, call.queries.dtype):
        q = call.queries.to(dtype)
        k, v = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (call.keys, call.values))
        scores = q @ k.transpose(-1, -2) * call.context.scaling
        if call.context.softcap is not None:
            scores = call.context.softcap * torch.tanh(scores / call.context.softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        softmax = torch.float64 if dtype == torch.float64 else torch.float32
        weights = scores.softmax(-1, dtype=softmax).to(dtype)[..., : k.shape[2]]
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        results.append((weights @ v).transpose(1, 2))
    return results


def check_output(call, out, mask):
    truth, eager = exact(call, mask)
    step = torch.finfo(out.dtype).eps * truth.abs().amax()
    limit = 2 * ((eager.double() - truth).abs().amax() + step)
    error = (out.double() - truth).abs().amax()
    assert out.isfinite().all()
    assert error <= limit, (error, limit)


def check(call):
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1)), "keys per row"
    check_output(call, out, mask)
    return out


BANDS = {
    "causal": ((1, 2, 1, 70, 70, 16, 16), [SINK, LOCAL], {}),
    "chunk": ((2, 4, 2, 33, 75, 20, 24), [{"type": "sink", "sink_size": 0.1}, LOCAL], {}),
    "more queries": ((1, 2, 2, 40, 20, 16, 80), [LOCAL], {}),
    "not causal": ((1, 3, 1, 20, 50, 96, 16), [SINK, {"type": "local", "window_size": 0.2}], {"is_causal": False}),
    "everything": ((1, 2, 1, 20, 45, 16, 16), [SINK, {"type": "causal"}], {"softcap": 2.0}),
    "dense": ((1, 2, 1, 20, 45, 16, 16), [], {"scaling": 0.3}),
    "short rows dense": ((1, 2, 1, 45, 45, 16, 16), [LOCAL], {"min_keys": 30}),
}


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", BANDS)
def test_bands(name, dtype):
    shape, maskers, options = BANDS[name]
    check(make(data("normal", *shape, dtype), maskers, **options))


@runs_kernels
def test_learned_sinks_also_of_rows_without_keys():
    tensors = data("normal", 1, 2, 1, 40, 20, 16, 16, torch.float32)
    out = check(make(tensors, [LOCAL], sinks=torch.randn(2, device=DEVICE)))
    assert (out[:, :20] == 0).all()


@runs_kernels
@pytest.mark.parametrize("budget", [1, 3, 47, 48, 100, 0.2, 1.0])
def test_budgets(budget):
    check(make(data("small integers", 1, 1, 1, 8, 48, 16, 16, torch.float16), [best(budget)]))


@runs_kernels
@pytest.mark.parametrize(
    "kind",
    ["normal", "zero queries", "constant keys", "duplicated keys", "small integers", "signed zeros", "huge", "tiny"],
)
def test_exactly_the_budget_and_lower_positions_first(kind, monkeypatch):
    """With the values a unit matrix the output shows the selection itself."""
    tensors = list(data(kind, 1, 2, 1, 12, 64, 16, 64, torch.float32))
    tensors[2] = torch.eye(64, device=DEVICE)[None, None].clone()
    call = make(tensors, [SINK, best(0.25), LOCAL], scaling=0.01)
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1))
    if kind != "huge":  # where weights vanish
        assert torch.equal(out.transpose(1, 2) > 0, mask)


@runs_kernels
@pytest.mark.parametrize("kind", ["normal", "constant keys", "duplicated keys"])
def test_bracket_and_tiles_of_queries(kind, monkeypatch):
    """Sampled brackets, lists that overflow, several tiles of queries: small scratch makes small shapes take them."""
    from sah_transformers.kernels.prefill import parts

    monkeypatch.setattr(parts, "ALWAYS_LISTED", 32)
    monkeypatch.setattr(parts, "SAMPLE_STRIDE", 1)
    monkeypatch.setattr(parts, "SCRATCH_BYTES", 2**15)
    check(make(data(kind, 1, 2, 1, 40, 160, 16, 16, torch.float32), [SINK, LOCAL, best(0.1)]))


@runs_kernels
@pytest.mark.parametrize(("deviations", "rows"), [(0.0, 12), (-2.0, 12), (-2.0, 40)])
def test_a_missed_bracket_is_settled(deviations, rows, monkeypatch):
    """By one program, three times where there are 40 rows."""
    from sah_transformers.kernels.prefill import launch, parts

    monkeypatch.setattr(parts, "ALWAYS_LISTED", 32)
    monkeypatch.setattr(parts, "SAMPLE_STRIDE", 1)
    monkeypatch.setattr(parts, "DEVIATIONS", deviations)
    monkeypatch.setattr(parts.Part, "sized", classmethod(lambda cls, rows, *_: cls(rows, 1, 96, 32)))
    monkeypatch.setattr(launch, "SETTLE_PROGRAMS", 1)
    check(make(data("small integers", 1, 1, 1, rows, 150, 16, 16, torch.float32), [SINK, best(0.1)]))


@runs_kernels
def test_strided_inputs_and_two_runs_give_the_same_bits():
    q, k, v = data("normal", 1, 2, 1, 16, 60, 16, 16, torch.float16)
    wide = torch.full((1, 1, 90, 16), torch.nan, dtype=k.dtype, device=DEVICE)
    wide[:, :, 10:70] = k
    strided = (q.transpose(1, 2).contiguous().transpose(1, 2), wide[:, :, 10:70], v.transpose(2, 3).contiguous().mT)
    maskers = [SINK, best(0.2)]
    first, _ = kernel(make((q, k, v), maskers))
    second, _ = kernel(make(strided, maskers))
    assert torch.equal(first, second)


def mask_of(kind, B, Q, K):
    """What a test's rows see: ``[B, K]`` or ``[B|1, 1, Q|1, K]``, causal order apart."""
    valid = torch.ones(B, K, dtype=torch.bool)
    for b in range(B):
        if kind == "left padding":
            valid[b, : b * K // 3] = False
        elif kind == "right padding":
            valid[b, K - b * K // 3 :] = False
        elif kind in ("holes", "holes for all queries"):
            valid[b, torch.randperm(K, generator=torch.Generator().manual_seed(b))[: K // 3]] = False
            valid[b, : K // 2 + b] = False
    if kind == "packed":
        document = torch.arange(K) // 13
        return (document[K - Q :, None] == document)[None, None].to(DEVICE)
    if kind == "window with holes":
        row, key = torch.arange(Q)[:, None] + K - Q, torch.arange(K)
        return ((row - key < 18) & ((row + key) % 5 != 0) & (row % 11 != 0))[None, None].to(DEVICE)
    return (valid[:, None, None] if kind == "holes for all queries" else valid).to(DEVICE)


MASKS = ["left padding", "right padding", "holes", "holes for all queries", "packed", "window with holes"]
STACKS = {
    "bands": [SINK, LOCAL],
    "shares": [{"type": "sink", "sink_size": 0.1}, best(0.2), {"type": "local", "window_size": 0.1}],
    "best": [SINK, LOCAL, best(7)],
    "mass": [SINK, mass(0.7), LOCAL],
    "mass of all": [SINK, mass(0.7, "total")],
}


def assert_rows_without_keys_are_zero(call, out, kind):
    """Rows that the mask of this ``kind`` leaves without keys, if it has such rows."""
    visible, _ = call.visibility.block(0, 20)
    nothing = ~visible.any(-1)[:, 0]
    assert nothing.any() == ("holes" in kind)
    assert (out[nothing.expand(2, -1)] == 0).all()


@runs_kernels
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, stack):
    tensors = data("small integers", 2, 1, 1, 20, 30, 16, 16, torch.float32)
    call = make(tensors, STACKS[stack], attention_mask=mask_of(kind, 2, 20, 30), scaling=0.1, min_keys=9)
    assert_rows_without_keys_are_zero(call, check(call), kind)


@runs_kernels
def test_a_mask_without_causal_order_and_with_sinks():
    tensors = data("normal", 2, 2, 1, 17, 50, 16, 32, torch.float16)
    more = {"is_causal": False, "softcap": 3.0, "sinks": torch.randn(2, device=DEVICE)}
    for stack in ("best", "mass"):
        check(make(tensors, STACKS[stack], attention_mask=mask_of("holes", 2, 17, 50), **more))


@runs_kernels
@pytest.mark.parametrize("kind", ["left padding", "holes", "packed"])
@pytest.mark.parametrize("stack", ["shares", "mass"])
def test_masked_samples(kind, stack, small_parts):
    """Brackets from samples of which some are hidden; rows whose bracket misses are settled."""
    tensors = data("normal", 2, 2, 1, 24, 150, 16, 16, torch.float32)
    mask = mask_of(kind, 2, 24, 150)
    if kind == "packed":
        mask = torch.nn.functional.pad(mask[..., 60:], (60, 0), value=True)
    check(make(tensors, STACKS[stack], attention_mask=mask))


@pytest.fixture
def small_parts(monkeypatch):
    """Small shapes take the ways of large ones: sampled brackets, several tiles of queries."""
    from sah_transformers.kernels.prefill import parts

    monkeypatch.setattr(parts, "ALWAYS_LISTED", 32)
    monkeypatch.setattr(parts, "SAMPLE_STRIDE", 1)
    monkeypatch.setattr(parts, "LEAST_SAMPLE", 64)
    monkeypatch.setattr(parts, "SCRATCH_BYTES", 2**15)


@runs_kernels
@pytest.mark.parametrize("coverage", ["remaining", "total"])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
def test_top_p(top_p, coverage):
    """With the values a unit matrix the output shows the selection itself."""
    tensors = list(data("normal", 1, 2, 1, 12, 64, 16, 64, torch.float32))
    tensors[2] = torch.eye(64, device=DEVICE)[None, None].clone()
    call = make(tensors, [SINK, mass(top_p, coverage), LOCAL])
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1))
    assert torch.equal(out.transpose(1, 2) > 0, mask)


@runs_kernels
@pytest.mark.parametrize(
    "kind", ["zero queries", "constant keys", "duplicated keys", "small integers", "signed zeros", "huge"]
)
def test_top_p_takes_all_keys_equal_to_its_cut(kind):
    tensors = data(kind, 1, 2, 1, 12, 64, 16, 16, torch.float32)
    check(make(tensors, [SINK, mass(0.6), LOCAL], scaling=0.01))


@runs_kernels
@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("coverage", ["remaining", "total"])
def test_brackets_of_masses(factor, coverage, small_parts):
    q, k, v = data("normal", 1, 2, 1, 40, 160, 16, 16, torch.float32)
    check(make((q * factor, k, v), [SINK, LOCAL, mass(0.9, coverage)]))


@runs_kernels
@pytest.mark.parametrize("deviations", [0.0, -2.0])
@pytest.mark.parametrize("kind", ["normal", "small integers"])
def test_a_missed_bracket_of_masses_is_settled(deviations, kind, small_parts, monkeypatch):
    from sah_transformers.kernels.prefill import parts

    monkeypatch.setattr(parts, "MASS_DEVIATIONS", deviations)
    monkeypatch.setattr(parts.Part, "sized", classmethod(lambda cls, rows, *_: cls(rows, 1, 96, 32)))
    tensors = data(kind, 1, 1, 1, 12, 150, 16, 16, torch.float32)
    check(make(tensors, [SINK, mass(0.8)], softcap=4.0 if kind == "normal" else None, scaling=0.2))


def test_what_is_not_covered_has_a_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = data("normal", 1, 2, 1, 4, 9, 16, 16, torch.float32)
    additive = torch.zeros(1, 1, 4, 9, device=DEVICE)
    if importlib.util.find_spec("triton") is None:
        assert "triton" in why_not(make((q, k, v), [SINK]))
        return
    assert why_not(make((q, k, v), [SINK, best(3), LOCAL])) == ""
    assert why_not(make((q, k, v), [SINK, mass(0.9)], attention_mask=additive[0, 0, :1] == 0)) == ""
    assert "additive" in why_not(make((q, k, v), [SINK], attention_mask=additive))
    assert "heads" in why_not(make((q, k, v), [SINK], attention_mask=(additive == 0).expand(1, 2, 4, 9)))
    assert "lists" in why_not(make((q, k, v), [SINK], indices=torch.zeros(1, 4, 2, dtype=torch.long)))
    assert "dropout" in why_not(make((q, k, v), [SINK], dropout=0.1))
    assert "more than one" in why_not(make((q, k, v), [best(3), best(4)]))
    assert "scaling" in why_not(make((q, k, v), [best(3)], scaling=-1.0))
    assert "top_p" in why_not(make((q, k, v), [mass(1.0)]))
    assert "more than one" in why_not(make((q, k, v), [best(3), mass(0.5)]))
    assert "gradients" in why_not(make((q.clone().requires_grad_(), k, v), [SINK]))
    assert "dtypes" in why_not(make((q.double(), k.double(), v.double()), [SINK]))


def test_stacks():
    assert Bands.of([First(3), First(5), Last(2)]) == Bands(5, 2)
    assert Bands.of([First(3), First(0.5)]) is None
    assert Bands.of([Everything(), First(0.5)]).last == 2**31 - 1
    stack = stack_of([First(3), Best(7, False), Last(2)])
    assert stack.before == Bands(3, 0)
    assert stack.bands == Bands(3, 2)
    assert stack.scored == Best(7, False)
    assert stack_of([Mass(0.9, False, False), Everything()]).scored is None
    assert isinstance(stack_of([None]), str)
    assert "side data" in stack_of([First(3), Pages(0.1, False, 16)])
    assert "side data" in stack_of([First(3), Estimated(0.1, False, "none", "exact")])


LARGE = {
    "D=128": ((1, 8, 2, 3000, 3000, 128, 128), 0.05),
    "D=64 chunk": ((2, 4, 2, 700, 2900, 64, 64), 0.05),
    "D=80 Dv=96": ((1, 2, 2, 1500, 1500, 80, 96), 100),
    "D=192 Dv=128": ((1, 2, 1, 1100, 2100, 192, 128), 0.3),
    "D=256": ((1, 4, 1, 600, 2600, 256, 256), 64),
    "half": ((1, 7, 1, 2100, 2100, 128, 128), 0.5),
    "MQA 32": ((1, 32, 1, 128, 4096, 64, 64), 0.02),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kind", ["normal", "small integers"])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large(name, dtype, kind):
    """Random scores: exact counts, selected scores not below the left-out by more than rounding, output error."""
    shape, budget = LARGE[name]
    call = make(data(kind, *shape, dtype), [SINK, LOCAL, best(budget)], scaling=0.1)
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1))
    again, _ = kernel(call)
    assert torch.equal(out, again)
    if kind == "small integers":  # no score is rounded, the selections are equal
        check_output(call, out, mask)
    else:
        truth, eager = exact(call, mask)
        rows = ((out.double() - truth).abs().amax(-1) > 2 * (eager.double() - truth).abs().amax() + 1e-2).sum()
        assert rows <= 2 + counts.numel() // 1000  # rows whose cut is a near-tie


def near(counts, mask, most=1):
    """Whether all rows have as many keys as the mask, but for a few that differ by a near-tie."""
    off = (counts.long() - mask.sum(-1)).abs()
    return int(off.max()) <= most and int((off > 0).sum()) <= 2 + off.numel() // 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_masses(name, dtype, factor):
    shape, _ = LARGE[name]
    q, k, v = data("normal", *shape, dtype)
    for coverage in ("remaining", "total"):
        call = make((q * factor, k, v), [SINK, LOCAL, mass(0.9, coverage)])
        out, counts = kernel(call)
        _, mask = reference(call)
        assert near(counts, mask)
        again, _ = kernel(call)
        assert torch.equal(out, again)
        truth, eager = exact(call, mask)
        rows = ((out.double() - truth).abs().amax(-1) > 2 * (eager.double() - truth).abs().amax() + 1e-2).sum()
        assert rows <= 2 + counts.numel() // 200


@pytest.mark.parametrize("kind", ["zero queries", "constant keys", "duplicated keys", "small integers"])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_masses_with_ties(kind):
    call = make(data(kind, 1, 4, 2, 1500, 3000, 64, 64, torch.bfloat16), [SINK, LOCAL, mass(0.9)], scaling=0.05)
    out, counts = kernel(call)
    _, mask = reference(call)
    assert near(counts, mask, most=3000)
    check_output(call, out, mask)


@pytest.mark.parametrize("stack", ["bands", "shares", "mass"])
@pytest.mark.parametrize("kind", ["left padding", "packed", "holes"])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_masks(kind, stack):
    B, Q, K = 2, 1900, 2500
    tensors = data("normal", B, 4, 2, Q, K, 128, 128, torch.bfloat16)
    mask = mask_of(kind, B, Q, K)
    if kind == "packed":
        document = torch.arange(K, device=DEVICE) // 1700
        mask = (document[K - Q :, None] == document)[None, None]
    call = make(tensors, STACKS[stack], attention_mask=mask)
    out, counts = kernel(call)
    _, chosen = reference(call)
    assert near(counts, chosen) if stack == "mass" else torch.equal(counts.long(), chosen.sum(-1))
    truth, eager = exact(call, chosen)
    rows = ((out.double() - truth).abs().amax(-1) > 2 * (eager.double() - truth).abs().amax() + 1e-2).sum()
    assert rows <= 2 + counts.numel() // 200
    if kind == "left padding":
        start = K // 3
        alone = make([x[1:, :, max(0, start - (K - x.shape[2])) :] for x in tensors], STACKS[stack])
        single, single_counts = kernel(alone)
        assert near(counts[1:, :, -single.shape[1] :], single_counts[..., None], most=int(stack == "mass"))
        assert (out[1:, -single.shape[1] :] - single).norm() < 1e-2 * single.norm()
