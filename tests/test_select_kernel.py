"""The mask kernel against the reference and float64: the same tests in Triton's interpreter and on a GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, where `TRITON_INTERPRET` is set
before the kernel is imported. Outputs and scores are filled with True and NaN before use.
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

from sah_transformers import Mask, MaskerRegistry
from sah_transformers.attention import Call, make_call
from sah_transformers.budget import resolve_budget
from sah_transformers.kernels.select import MOST_KEYS, why_not


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned():
    """Torch fills memory that it hands out with True or NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

EXACT = ["constant", "duplicates", "zero queries", "signed zeros", "whole numbers"]
"""Data whose dot products are exact in float32, so that equal scores are equal in any order of summation."""


def tensors(B=1, H=4, G=2, Q=8, K=100, D=32, dtype=torch.float32, data="normal", seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)

    q, k = normal(B, H, Q, D), normal(B, G, K, D)
    if data in EXACT:
        q, k = (2 * q).round(), (2 * k).round()
    if data == "constant":
        k = k[:, :, :1].expand_as(k).clone()
    elif data == "duplicates":
        k = k[:, :, torch.randint(0, 5, (K,), generator=generator, device=DEVICE)]
    elif data == "zero queries":
        q = q * 0
    elif data == "signed zeros":
        q, k = q * 0, k.sign()
        q[:, :, ::2] = -q[:, :, ::2]
    elif data == "whole numbers":
        q, k = q.clamp(-1, 1), k.clamp(-1, 1)
    elif data == "huge":
        q, k = q * 1e3, k * 1e3
    elif data == "tiny":
        q, k = q * 1e-3, k * 1e-3
    return q.to(dtype), k.to(dtype), normal(B, G, K, 8).to(dtype)


def masker_of(budget, **options):
    return MaskerRegistry.create_masker({"type": "oracle_top_k", "heavy_size": budget, **options})


def mask_of(kernel, budget, q, k, v, previous=None, **options):
    options = {"is_causal": True, **options}
    before = None if previous is None else Mask.from_dense_unchecked(previous)
    return masker_of(budget).add_mask(k, q, v, previous_mask=before, kernel=kernel, **options)


def seen_of(q, k, attention_mask=None, is_causal=True, **_):
    B, H, Q, K = *q.shape[:3], k.shape[2]
    seen = torch.ones(B, H, Q, K, dtype=torch.bool, device=DEVICE)
    if is_causal:
        seen = seen.tril(K - Q)
    if attention_mask is not None:
        seen = seen & (attention_mask != 0)[:, None, None] if attention_mask.dim() == 2 else seen & attention_mask
    return seen


def scores_of(q, k, scaling=None, softcap=None, **_):
    """Float64, rounded once."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scaling
    return (scores if softcap is None else softcap * torch.tanh(scores / softcap)).float()


def defined(budget, q, k, previous=None, **options):
    """The definition: a stable sort of the candidates."""
    seen = seen_of(q, k, **options)
    had = torch.zeros_like(seen) if previous is None else previous
    candidates = seen & ~had
    scores = scores_of(q, k, **options).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, candidates.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    taken = torch.arange(k.shape[2], device=DEVICE) < resolve_budget(budget, seen.sum(-1, keepdim=True))
    return had | (torch.zeros_like(seen).scatter(-1, order, taken.expand_as(seen)) & candidates)


def check(budget, q, k, v, previous=None, exact=False, **options):
    """The definition's mask, or (unless ``exact``) another only where scores are closer than their dot's rounding."""
    found = mask_of("triton", budget, q, k, v, previous, **options)
    reference = mask_of("reference", budget, q, k, v, previous, **options)
    wanted = defined(budget, q, k, previous, **options)
    mask = found.active()
    assert (found.shape, found.dtype, found.form.name) == (reference.shape, reference.dtype, "dense")
    assert torch.equal(reference.active(), wanted)
    assert torch.equal(mask.sum(-1), wanted.sum(-1))
    if exact:
        assert torch.equal(mask, wanted)
        return mask
    differs = mask != wanted
    assert differs.any(-1).sum() <= 2 + 0.01 * mask[..., 0].numel()
    scores = scores_of(q, k, **options)
    lowest = scores.masked_fill(~(differs & mask), float("inf")).amin(-1)
    highest = scores.masked_fill(~(differs & wanted), float("-inf")).amax(-1)
    scaling = options.get("scaling", q.shape[-1] ** -0.5)
    longest = k.float().norm(dim=-1).amax(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    product = q.float().norm(dim=-1) * longest[..., None]
    rounding = 4 * q.shape[-1] ** 0.5 * 2**-24 * abs(scaling) * product + 2**-21 * (options.get("softcap") or 0.0)
    assert (highest - lowest <= 2 * rounding).all()
    return mask


BUDGETS = {"1": 1, "n-1": 99, "n": 100, "more": 10**12, "7": 7, "5 %": 0.05, "29 %": 0.29, "all": 1.0}
SHAPES = {
    "one key": {"K": 1, "Q": 1},
    "one key, rows that see nothing": {"K": 1, "Q": 3},
    "more queries than keys": {"K": 7, "Q": 12},
    "square": {"K": 40, "Q": 40, "H": 2, "G": 1},
    "decode": {"K": 333, "Q": 1, "B": 3},
    "ragged": {"K": 301, "Q": 5},
    "MHA": {"H": 3, "G": 3, "Q": 4},
    "MQA": {"H": 7, "G": 1, "Q": 2},
    "D=80": {"D": 80, "Q": 3},
    "D=1": {"D": 1, "Q": 3},
    "two warps": {"H": 1, "G": 1, "K": 1030, "Q": 3},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@kernel_test
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_budgets(budget):
    check(budget, *tensors())
    check(budget, *tensors(H=2, data="whole numbers"), exact=True, is_causal=False)


@kernel_test
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    check(0.1, *tensors(**shape))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    check(0.1, *tensors(dtype=dtype))
    check(9, *tensors(H=2, dtype=dtype, data="duplicates"), exact=True)


@kernel_test
@pytest.mark.parametrize("data", EXACT)
@pytest.mark.parametrize("budget", [1, 0.3])
def test_ties_go_to_the_lower_position(data, budget):
    q, k, v = tensors(H=2, G=1, Q=6, data=data)
    mask = check(budget, q, k, v, exact=True)
    if data in ("constant", "zero queries", "signed zeros"):
        assert (mask.long().diff(dim=-1) <= 0).all()
    check(budget, q, k, v, exact=True, scaling=-0.3)


@kernel_test
@pytest.mark.parametrize("data", ["huge", "tiny"])
def test_scales(data):
    check(0.1, *tensors(data=data))
    check(0.1, *tensors(data=data), softcap=3.0, scaling=0.01)


@kernel_test
def test_scores_that_scaling_rounds_together_tie():
    q, k, v = tensors(H=2, Q=6, D=2)
    q[..., 0], q[..., 1] = 4096, 1
    k[..., 0], k[..., 1] = 4095, torch.arange(100, device=DEVICE) % 7
    scores = scores_of(q, k, scaling=0.375)
    assert len(scores[0, 0, 0].unique()) < 7, "nothing is rounded together"
    for scaling in (0.375, 0.0, -0.375):
        check(30, q, k, v, exact=True, scaling=scaling)


@kernel_test
def test_softcap():
    check(0.1, *tensors(Q=3), softcap=0.5)


@kernel_test
def test_nan_ranks_last():
    q, k, v = tensors(H=2, G=1, Q=6, K=40, data="whole numbers")
    k[:, :, ::3, 2] = float("nan")
    for budget in (3, 0.8, 1.0):
        check(budget, q, k, v, exact=True)
    k[:, :, 1, 2] = float("inf")
    q[..., 2] = 1.0
    assert check(1, q, k, v, exact=True)[..., -1, 1].all()
    q[:, 0] = float("nan")
    found = mask_of("triton", 0.5, q, k, v).active()
    assert torch.equal(found[:, 1], defined(0.5, q, k)[:, 1])
    assert (found[:, 0].long().diff(dim=-1) <= 0).all()


@kernel_test
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["empty", "half", "full"])
def test_previous_masks(share):
    q, k, v = tensors(B=2, Q=5, K=60)
    seen = seen_of(q, k)
    generator = torch.Generator().manual_seed(1)
    had = (torch.rand(seen.shape, generator=generator).to(DEVICE) < share) & seen
    before = had.clone()
    for budget in (5, 0.3, 1.0):
        check(budget, q, k, v, had)
    mask = check(0.3, q, k, v, had.mT.contiguous().mT)
    assert torch.equal(had, before)
    if share == 1.0:
        assert torch.equal(mask, had)


@kernel_test
def test_forms_of_previous_masks():
    """Every form with unit weights; what is active and hidden stays."""
    q, k, v = tensors(Q=5, K=60)
    shape = (1, 4, 5, 60)
    slots = torch.tensor([3, -1, 40, 58], device=DEVICE).expand(1, 4, 5, 4)
    for before in (
        Mask.create_full_mask(shape, device=DEVICE),
        Mask.create_empty_mask(shape, device=DEVICE),
        Mask.create_from_row_wise_idx(shape, slots),
        Mask.create_from_row_wise_idx(shape, slots, mask_type="index"),
    ):
        options = {"previous_mask": before, "is_causal": True}
        found = masker_of(4).add_mask(k, q, v, kernel="triton", **options).active()
        assert torch.equal(found, masker_of(4).add_mask(k, q, v, kernel="reference", **options).active())
        assert found[before.active()].all()


@kernel_test
def test_padding():
    """A padded sequence has the mask of the sequence alone."""
    q, k, v = tensors(B=3, H=2, G=1, Q=24, K=24, data="whole numbers")
    parts = [slice(0, 24), slice(13, 24), slice(0, 9)]
    valid = torch.zeros(3, 24, dtype=torch.long, device=DEVICE)
    for b, part in enumerate(parts):
        valid[b, part] = 1
    mask = check(0.3, q, k, v, exact=True, attention_mask=valid)
    for b, part in enumerate(parts):
        alone = mask_of("triton", 0.3, *(x[b : b + 1, :, part] for x in (q, k, v)))
        assert torch.equal(mask[b : b + 1, :, part, part], alone.active())


@kernel_test
def test_masks():
    """Holes per sequence, head and row, broadcast and strided; a row that sees nothing."""
    q, k, v = tensors(B=2, H=2, G=1, Q=3, K=50)
    holes = torch.rand(2, 2, 3, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    holes[1, 0, 1] = False
    for mask in (holes, holes[:, :1], holes[:1, :, :1], holes.mT.contiguous().mT):
        for causal in (False, True):
            check(0.2, q, k, v, attention_mask=mask, is_causal=causal)


@kernel_test
def test_strided_tensors():
    """Caches are read where they lie; what is outside the slice is NaN."""
    q, k, v = tensors(Q=3)
    wide = torch.full((1, 2, 300, 40), float("nan"), device=DEVICE)
    wide[:, :, 100:200, 3:35] = k
    check(0.1, q.transpose(1, 2).contiguous().transpose(1, 2), wide[:, :, 100:200, 3:35], v)


@kernel_test
@pytest.mark.parametrize("most", [1, 600, 2**28])
@pytest.mark.parametrize(("rows", "keys"), [(30, 40), (20, 5)])
def test_blocks_of_rows(monkeypatch, most, rows, keys):
    """However rows are taken together, the mask is the same; what was active beyond their reach stays."""
    from sah_transformers.kernels.select import kernel

    q, k, v = tensors(H=2, G=1, Q=rows, K=keys, data="whole numbers")
    had = torch.rand(1, 2, rows, keys, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.2
    monkeypatch.setattr(kernel, "BLOCK_ELEMENTS", most)
    monkeypatch.setattr(kernel, "LEAST_WIDTH", 1)
    monkeypatch.setattr("sah_transformers.attention.BLOCK_ELEMENTS", {"cpu": most, "cuda": most})
    check(0.3, q, k, v, had, exact=True)
    check(0.3, q, k, v, exact=True)


@kernel_test
@pytest.mark.parametrize("settings", ["autocast", "float64 by default", "gradients", "inference"])
def test_torch_settings(settings):
    q, k, v = tensors(H=2, Q=9, K=300)
    expected = mask_of("triton", 0.2, q, k, v).active()
    if settings == "autocast":
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = mask_of("triton", 0.2, q, k, v)
    elif settings == "inference":
        with torch.inference_mode():
            found = mask_of("triton", 0.2, q, k, v)
    elif settings == "gradients":
        found = mask_of("triton", 0.2, q.clone().requires_grad_(), k.clone().requires_grad_(), v)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            found = mask_of("triton", 0.2, q, k, v)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found.active(), expected)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_why_not():
    """Every refusal has a reason of its own, and ``kernel="triton"`` raises with it."""

    def reason(q, k, v, masker=None, **options):
        return why_not(make_call(q, k, v, [masker or masker_of(4)], **options))

    q, k, v = tensors(Q=3, K=40)
    if not GPU and not INTERPRETED:
        assert "CUDA" in reason(q, k, v)
        return
    whole = torch.zeros(1, 1, 3, 40, device=DEVICE)
    reasons = [
        reason(q, k, v, masker_of(4, gqa="group")),
        reason(q.double(), k.double(), v.double()),
        reason(q[:, :, :0], k, v),
        reason(*tensors(Q=1, H=1, G=1, D=1, K=MOST_KEYS + 1)),
        reason(q, k, v, position_bias=whole),
        reason(q, k, v, attention_mask=whole),
        reason(q, k, v, previous_mask=Mask.from_dense_unchecked(torch.full((1, 4, 3, 40), 0.5, device=DEVICE))),
    ]
    assert all(reasons), reasons
    assert len(set(reasons)) == len(reasons)
    assert reason(q, k, v) == ""
    window = MaskerRegistry.create_masker({"type": "local", "window_size": 3})
    assert reason(q, k, v, window) == reasons[0]
    with pytest.raises(ValueError, match=r"cannot take this call: masks have a kernel for top-k"):
        window.add_mask(k, q, v, kernel="triton")
    with pytest.raises(ValueError, match="kernel must be one of"):
        window.add_mask(k, q, v, kernel="fast")


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [256, 1000, 1024, 2048, 4096, 5000, 8192, MOST_KEYS])
def test_long(K, dtype):
    q, k, v = tensors(H=8, G=2, Q=min(K, 300), K=K, D=64, dtype=dtype)
    had = (torch.rand(1, 8, q.shape[2], K, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) < 0.5).tril(
        K - q.shape[2]
    )
    for previous in (None, had):
        check(0.05, q, k, v, previous)
    for data in EXACT:
        check(0.05, *tensors(H=4, G=2, Q=40, K=K, D=64, dtype=dtype, data=data), exact=True)
    assert torch.equal(mask_of("triton", 0.05, q, k, v).active(), mask_of("triton", 0.05, q, k, v).active())


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_tie(dtype):
    """Copies of a key anywhere in the row have the same score to the last bit, decode included."""
    for Q in (1, 4, 33, 300):
        q, k, v = tensors(H=4, G=2, Q=Q, K=900, D=64, dtype=dtype)
        k = k[:, :, torch.randint(0, 9, (900,), generator=torch.Generator().manual_seed(2)).to(DEVICE)]
        check(0.3, q, k, v, exact=True)


@gpu_test
@pytest.mark.gpu
def test_auto_takes_the_kernel(monkeypatch):
    def fail(call):
        raise AssertionError("the reference was taken")

    monkeypatch.setattr(Call, "masks", fail)
    mask_of("auto", 0.1, *tensors())
    with pytest.raises(AssertionError):
        mask_of("auto", 0.1, *tensors(), softcap=1.0, position_bias=torch.zeros(1, 1, 8, 100, device=DEVICE))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "half"])
def test_graph_without_synchronisation(dtype, filled):
    """No call waits for the device; a captured call follows its changed inputs."""
    shape = {"B": 2, "H": 8, "G": 2, "Q": 500, "K": 500, "D": 64, "dtype": dtype}
    q, k, v = tensors(**shape)
    had = torch.rand(2, 8, 500, 500, device=DEVICE).lt(0.5).tril() if filled else None
    valid = torch.ones(2, 500, dtype=torch.bool, device=DEVICE)

    def select():
        return mask_of("auto", 0.1, q, k, v, had, attention_mask=valid).active()

    select()
    graph, out = captured(select)
    for seed in range(1, 4):
        for old, new in zip((q, k, v), tensors(**shape, seed=seed), strict=True):
            old.copy_(new)
        valid[1, : 10 * seed] = False
        graph.replay()
        assert torch.equal(out, select())


@gpu_test
@pytest.mark.gpu
def test_memory():
    """Scores of one block at a time."""
    q, k, v = tensors(B=1, H=16, G=4, Q=8192, K=8192, D=64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = mask_of("triton", 0.02, q, k, v)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= mask.active().nbytes + 2**30 + 2**27
