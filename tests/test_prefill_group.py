"""The prefill kernels with one selection per KV head, against the reference: run as those of test_prefill_kernel."""

from dataclasses import replace

import pytest
import torch
from kernel_process import DEVICE, GPU, HAS_TRITON, interpreter_test, passes_in_the_interpreter
from test_prefill_kernel import (
    LARGE,
    LOCAL,
    MASKS,
    SINK,
    assert_rows_without_keys_are_zero,
    best,
    check,
    check_output,
    data,
    exact,
    kernel,
    make,
    mask_of,
    mass,
    near,
    reference,
    runs_kernels,
    small_parts,  # noqa: F401
)

from sah_transformers.kernels.prefill import why_not


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, "-m", "not gpu", timeout=580)


def grouped(tensors, maskers, **options):
    """A call whose scored masker ranks per KV head."""
    maskers = [{**m, "gqa": "group"} if m["type"].startswith("oracle") else m for m in maskers]
    return make(tensors, maskers, kernel="triton", **options)


def selected(tensors, maskers, **options):
    """(bool ``[B, H, Q, K]`` that the kernel selects, shown by the unit matrix for values, the reference's)."""
    q, k, _ = tensors
    values = torch.eye(k.shape[2], dtype=k.dtype, device=DEVICE).expand(*k.shape[:2], -1, -1).contiguous()
    call = grouped((q, k, values), maskers, **options)
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1)), "keys per row"
    return out.transpose(1, 2) > 0, mask


SHAPES = {
    "2 heads": ((2, 4, 2, 17, 40, 64, 16), {}),
    "3 heads D=80": ((1, 6, 2, 20, 33, 80, 24), {}),
    "4 heads D=128": ((1, 4, 1, 20, 45, 128, 16), {}),
    "8 heads": ((1, 8, 1, 11, 45, 64, 16), {"scaling": 0.3}),
    "20 heads": ((1, 20, 1, 18, 30, 16, 16), {}),
    "more queries": ((1, 2, 1, 40, 30, 16, 16), {}),
    "not causal": ((1, 5, 1, 17, 40, 16, 16), {"is_causal": False}),
    "softcap": ((1, 4, 2, 20, 40, 16, 16), {"softcap": 2.0}),
    "short rows dense": ((1, 4, 2, 20, 40, 16, 16), {"min_keys": 30}),
}


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_top_k(name, dtype):
    shape, options = SHAPES[name]
    check(grouped(data("normal", *shape, dtype), [SINK, best(7), LOCAL], **options))


@runs_kernels
@pytest.mark.parametrize("coverage", ["remaining", "total"])
@pytest.mark.parametrize("name", ["2 heads", "20 heads", "softcap"])
def test_top_p(name, coverage):
    shape, options = SHAPES[name]
    check(grouped(data("normal", *shape, torch.float32), [SINK, mass(0.8, coverage), LOCAL], **options))


@runs_kernels
def test_learned_sinks():
    tensors = data("normal", 1, 6, 2, 20, 20, 16, 16, torch.float32)
    check(grouped(tensors, [best(3), LOCAL], sinks=torch.randn(6, device=DEVICE)))


@runs_kernels
@pytest.mark.parametrize("budget", [1, 3, 47, 48, 100, 0.2, 1.0])
def test_budgets(budget):
    check(grouped(data("small integers", 1, 2, 1, 8, 48, 16, 16, torch.float16), [best(budget)]))


@runs_kernels
@pytest.mark.parametrize("scored", [best(0.25), mass(0.6)], ids=["best", "mass"])
@pytest.mark.parametrize(
    "kind", ["normal", "zero queries", "constant keys", "duplicated keys", "small integers", "signed zeros"]
)
def test_ties_are_those_of_the_definition(kind, scored):
    """Lower positions first among the equal, and with a mass all of them."""
    tensors = data(kind, 1, 4, 2, 10, 64, 16, 16, torch.float32)
    shown, mask = selected(tensors, [SINK, scored, LOCAL], scaling=0.01)
    assert torch.equal(shown, mask)


@runs_kernels
def test_heads_count_by_their_softmax():
    """A head whose scores are equal decides nothing, however large they are."""
    q, k, v = data("normal", 1, 2, 1, 6, 40, 16, 16, torch.float32)
    k[..., 0] = 1.0
    q[:, 1] = 0.0
    q[:, 1, :, 0] = 1000.0
    shown, mask = selected((q, k, v), [best(5)])
    assert torch.equal(shown, mask)
    alone, _ = kernel(make((q[:, :1], k, torch.eye(40, device=DEVICE)[None, None]), [best(5)]))
    assert torch.equal(shown[:, 0], alone[:, :, 0] > 0)


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "scored"),
    [
        ("normal", best(0.1)),
        ("normal", mass(0.9)),
        ("normal", mass(0.9, "total")),
        ("constant keys", best(0.1)),
        ("duplicated keys", best(0.1)),
        ("duplicated keys", mass(0.9)),
    ],
    ids=["normal", "mass", "mass of all", "constant keys", "duplicated keys", "duplicated keys, mass"],
)
def test_bracket_and_tiles_of_queries(kind, scored, small_parts):  # noqa: F811
    """Sampled brackets, lists that overflow, several tiles of queries."""
    check(grouped(data(kind, 1, 4, 2, 22, 150, 16, 16, torch.float32), [SINK, LOCAL, scored]))


@runs_kernels
@pytest.mark.parametrize("deviations", [0.0, -2.0])
@pytest.mark.parametrize("scored", [best(0.1), mass(0.8)], ids=["best", "mass"])
def test_a_missed_bracket_is_settled(deviations, scored, small_parts, monkeypatch):  # noqa: F811
    from sah_transformers.kernels.prefill import parts

    monkeypatch.setattr(parts, "DEVIATIONS", deviations)
    monkeypatch.setattr(parts, "MASS_DEVIATIONS", deviations)
    monkeypatch.setattr(parts.Part, "sized", classmethod(lambda cls, rows, *_: cls(rows, 1, 96, 32)))
    for kind, softcap in (("small integers", None), ("normal", 4.0)):
        tensors = data(kind, 1, 3, 1, 12, 150, 16, 16, torch.float32)
        check(grouped(tensors, [SINK, scored], scaling=0.2, softcap=softcap))


@runs_kernels
@pytest.mark.parametrize("scored", [best(0.2), mass(0.7, "total")], ids=["best", "mass"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, scored):
    tensors = data("normal", 2, 2, 1, 20, 30, 16, 16, torch.float32)
    call = grouped(tensors, [SINK, scored, LOCAL], attention_mask=mask_of(kind, 2, 20, 30), min_keys=9)
    assert_rows_without_keys_are_zero(call, check(call), kind)


@runs_kernels
@pytest.mark.parametrize("scored", [best(0.1), mass(0.8)], ids=["best", "mass"])
@pytest.mark.parametrize("kind", ["left padding", "holes"])
def test_masked_samples(kind, scored, small_parts):  # noqa: F811
    tensors = data("normal", 2, 4, 2, 24, 150, 16, 16, torch.float32)
    check(grouped(tensors, [SINK, scored], attention_mask=mask_of(kind, 2, 24, 150)))


@runs_kernels
def test_chunks_and_strides():
    q, k, v = data("normal", 1, 4, 2, 20, 40, 16, 16, torch.float16)
    maskers = [SINK, best(0.2)]
    whole, _ = kernel(grouped((q, k, v), maskers))
    strided = (q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v)
    assert torch.equal(kernel(grouped(strided, maskers))[0], whole)
    chunk, _ = kernel(grouped((q[:, :, :13], k[:, :, :33], v[:, :, :33]), maskers))
    assert torch.allclose(chunk, whole[:, :13], atol=2e-3)


def test_what_takes_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    call = grouped(data("normal", 1, 4, 2, 20, 30, 16, 16, torch.float32), [SINK, best(3)])
    assert why_not(call) == why_not(replace(call, kernel="auto")) == ""
    alone = grouped(data("normal", 1, 2, 2, 20, 30, 16, 16, torch.float32), [best(3)])
    assert why_not(replace(alone, kernel="auto")) == ""
    many = grouped(data("normal", 1, 33, 1, 20, 30, 16, 16, torch.float32), [best(3)])
    assert "beyond 32" in why_not(many)


def close(call, out, mask, share):
    """All rows but a few, whose cut is a near-tie, come from the keys of ``mask``."""
    truth, eager = exact(call, mask)
    apart = ((out.double() - truth).abs().amax(-1) > 2 * (eager.double() - truth).abs().amax() + 1e-2).sum()
    return apart <= 2 + truth[..., 0].numel() * share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", [name for name, (shape, _) in LARGE.items() if shape[1] > shape[2]])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large(name, dtype, factor):
    """Every kernel computes the same bits of a summed score: else rows would miss the key at their cut."""
    shape, budget = LARGE[name]
    q, k, v = data("normal", *shape, dtype)
    for softcap in (None, 20.0):
        call = grouped((q * factor, k, v), [SINK, LOCAL, best(budget)], softcap=softcap)
        out, counts = kernel(call)
        _, mask = reference(call)
        assert torch.equal(counts.long(), mask.sum(-1))
        assert torch.equal(kernel(call)[0], out)
        assert close(call, out, mask, 0.001)
        call = grouped((q * factor, k, v), [SINK, LOCAL, mass(0.9)], softcap=softcap)
        out, counts = kernel(call)
        _, mask = reference(call)
        share = shape[1] // shape[2]  # heads that select together
        assert near(counts[:, ::share], mask[:, ::share])
        assert torch.equal(kernel(call)[0], out)
        assert close(call, out, mask, 0.005)


@pytest.mark.parametrize("kind", ["zero queries", "constant keys", "duplicated keys", "small integers"])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_ties(kind):
    tensors = data(kind, 1, 8, 2, 1500, 3000, 64, 64, torch.bfloat16)
    call = grouped(tensors, [SINK, LOCAL, best(0.05)], scaling=0.05)
    out, counts = kernel(call)
    _, mask = reference(call)
    assert torch.equal(counts.long(), mask.sum(-1))
    if kind == "small integers":
        assert close(call, out, mask, 0.005)
    else:
        check_output(call, out, mask)


@pytest.mark.parametrize("scored", [best(0.1), mass(0.8, "total")], ids=["best", "mass"])
@pytest.mark.parametrize("kind", ["left padding", "packed", "holes"])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_masks(kind, scored):
    B, Q, K = 2, 1900, 2500
    mask = mask_of(kind, B, Q, K)
    if kind == "packed":
        document = torch.arange(K, device=DEVICE) // 1700
        mask = (document[K - Q :, None] == document)[None, None]
    tensors = data("normal", B, 8, 2, Q, K, 128, 128, torch.bfloat16)
    call = grouped(tensors, [SINK, LOCAL, scored], attention_mask=mask)
    out, counts = kernel(call)
    _, chosen = reference(call)
    assert near(counts, chosen) if scored["type"] == "oracle_top_p" else torch.equal(counts.long(), chosen.sum(-1))
    assert close(call, out, chosen, 0.005)
