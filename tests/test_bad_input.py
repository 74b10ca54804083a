"""Bad input: a clear error before any work, or documented behaviour; and everything still works afterwards."""

import contextlib
import math

import pytest
import torch
from sparse_models import OTHER_STACK, STACK, differ, generate, logits, prompt, sparse
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from sah_transformers import Mask, MaskerRegistry, State, attention, sparse_attention

STACKS = {
    "top-k": STACK,
    "top-k per group": [*STACK[:2], {"type": "oracle_top_k", "heavy_size": 2, "gqa": "group"}],
    "top-p": OTHER_STACK,
    "top-p of all": [*STACK[:2], {"type": "oracle_top_p", "top_p": 0.9, "coverage": "total", "gqa": "group"}],
    "causal": [{"type": "causal"}],
    "empty": [],
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def tensors(B=2, H=4, G=2, Q=8, K=8, D=8, Dv=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Q, D), (B, G, K, D), (B, G, K, Dv)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


WRONG = {
    "H not divisible by G": ({"H": 5}, {}, "query heads must be a multiple of KV heads, got H=5, G=2"),
    "more KV heads than heads": ({"H": 2, "G": 4}, {}, "got H=2, G=4"),
    "no KV heads": ({"G": 0}, {}, "got H=4, G=0"),
    "kernel": ({}, {"kernel": "cuda"}, "kernel must be one of .*'cuda'"),
    "triton on CPU": ({}, {"kernel": "triton"}, "triton"),
    "dropout": ({}, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "dropout is nan": ({}, {"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
    "2-D mask": ({}, {"attention_mask": torch.ones(2, 7)}, r"attention_mask must have shape .*8.*got \[2, 7\]"),
    "1-D mask": ({}, {"attention_mask": torch.ones(8)}, r"attention_mask must have.*got \[8\]"),
    "4-D mask": ({}, {"attention_mask": torch.ones(2, 3, 8, 8).bool()}, r"attention_mask must have shape.*got"),
    "4-D mask of ints": ({}, {"attention_mask": torch.ones(2, 1, 8, 8).long()}, "attention_mask.*int64"),
    "sinks": ({}, {"sinks": torch.zeros(3)}, r"sinks must have shape \[4\].*got \[3\]"),
    "4-D sinks": ({}, {"sinks": torch.zeros(1, 3, 1, 1)}, r"sinks must have shape.*got \[1, 3, 1, 1\]"),
    "position bias": ({}, {"position_bias": torch.zeros(1, 1, 8, 9)}, r"position_bias must have shape.*got"),
    "indices": ({}, {"indices": torch.zeros(2, 7, 3).long()}, r"indices must have shape \[2, 8, n\], got \[2, 7, 3\]"),
    "previous mask": (
        {},
        {"previous_mask": Mask.create_empty_mask((2, 4, 8, 9))},
        r"previous_mask must have shape \[2, 4, 8, 8\], got \[2, 4, 8, 9\]",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(case):
    sizes, options, message = case
    with pytest.raises(ValueError, match=message):
        sparse_attention(*tensors(**sizes), STACK, **options)


MISMATCHED = {
    "keys' batch": (1, (3, 2, 8, 8), r"keys must have shape \[2, G, K, 8\], got \[3, 2, 8, 8\]"),
    "keys' width": (1, (2, 2, 8, 7), r"keys must have shape \[2, G, K, 8\], got \[2, 2, 8, 7\]"),
    "values' length": (2, (2, 2, 7, 6), r"values must have shape \[2, 2, 8\].*got \[2, 2, 7, 6\]"),
    "values' heads": (2, (2, 4, 8, 6), r"values must have shape \[2, 2, 8\].*got \[2, 4, 8, 6\]"),
    "queries' rank": (0, (2, 8, 8), r"queries must be a tensor \[B, heads, length, dim\], got \[2, 8, 8\]"),
    "keys' rank": (1, (2, 8), r"keys must be a tensor .*got \[2, 8\]"),
}


@pytest.mark.parametrize("case", MISMATCHED.values(), ids=MISMATCHED)
def test_mismatched_shapes(case):
    position, shape, message = case
    inputs = tensors()
    inputs[position] = torch.zeros(shape)
    state = State()
    with pytest.raises(ValueError, match=message):
        sparse_attention(*inputs, STACK, state=state)
    q, k, v = inputs
    with pytest.raises(ValueError, match=message):
        MaskerRegistry.create_masker(STACK[2]).add_mask(k, q, v)


@pytest.mark.parametrize("value", [None, [[1.0]], 3], ids=repr)
def test_only_tensors(value):
    q, k, _ = tensors()
    with pytest.raises(ValueError, match=r"values must be a tensor \[B, heads, length, dim\], got"):
        sparse_attention(q, k, value, STACK)


def test_only_floating_point():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"keys must .*float.*, got torch\.int64"):
        sparse_attention(q, k.long(), v, STACK)


def test_a_bad_stack_is_named():
    with pytest.raises(ValueError, match=r"sink_size must be .*got 0"):
        sparse_attention(*tensors(), [STACK[1], {"type": "sink", "sink_size": 0}])
    with pytest.raises(ValueError, match="did you mean 'sink'"):
        sparse_attention(*tensors(), [{"type": "sinks", "sink_size": 1}])
    for stack in ({"type": "sink", "sink_size": 1}, "sink", None, 5):
        with pytest.raises(ValueError, match="masker"):
            sparse_attention(*tensors(), stack)


@every_stack
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_key(stack, is_causal):
    q, k, v = tensors(Q=1, K=1)
    out, mask = sparse_attention(q, k, v, stack, is_causal=is_causal)
    assert torch.allclose(out[:, 0], v[:, :, 0].repeat_interleave(2, 1), atol=1e-6)
    assert mask.get_dense_mask().bool().all()


@every_stack
@pytest.mark.parametrize("block", [1, 2**21])
@pytest.mark.parametrize("keys", [1, 3])
def test_more_queries_than_keys(stack, keys, block, monkeypatch):
    """Lower-right causal order: the first rows see nothing and give zeros, the last ones are as if alone."""
    monkeypatch.setitem(attention.BLOCK_ELEMENTS, "cpu", block)
    q, k, v = tensors(Q=8, K=keys)
    out, mask = sparse_attention(q, k, v, stack)
    assert not out[:, : 8 - keys].any()
    assert not mask.get_dense_mask()[:, :, : 8 - keys].any()
    right, right_mask = sparse_attention(q[:, :, 8 - keys :], k, v, stack)
    assert torch.allclose(out[:, 8 - keys :], right, atol=1e-6)
    assert torch.equal(mask.get_dense_mask()[:, :, 8 - keys :], right_mask.get_dense_mask())
    assert not sparse_attention(q, k, v, stack, is_causal=False)[0].isnan().any()


@every_stack
@pytest.mark.parametrize("sizes", [{"B": 0}, {"Q": 0}, {"K": 0}, {"Q": 0, "K": 0}], ids=repr)
@pytest.mark.parametrize("is_causal", [True, False])
def test_empty(stack, sizes, is_causal):
    q, k, v = tensors(**sizes)
    out, mask = sparse_attention(q, k, v, stack, is_causal=is_causal)
    assert out.shape == (q.shape[0], q.shape[2], 4, 6)
    assert not out.any()
    assert tuple(mask.shape) == (*q.shape[:3], k.shape[2])
    q.requires_grad_()
    assert sparse_attention(q, k, v, stack, is_causal=is_causal, return_mask=False).shape == out.shape


@every_stack
def test_nothing_visible(stack):
    q, k, v = tensors()
    for mask in (torch.zeros(2, 8), torch.zeros(1, 1, 8, 8).bool(), torch.full((1, 1, 8, 8), -torch.inf)):
        out, selected = sparse_attention(q, k, v, stack, attention_mask=mask)
        assert not out.any()
        assert not selected.get_dense_mask().any()


BAD = [math.nan, math.inf, -math.inf]


@every_stack
@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.timeout(60)
def test_nan_and_inf_in_a_query_stay_in_their_row(stack, value):
    q, k, v = tensors()
    expected, right = sparse_attention(q, k, v, stack)
    q[0, 1, 3, 2] = value
    out, mask = sparse_attention(q, k, v, stack)
    hit = torch.zeros(2, 4, 8, dtype=torch.bool)
    hit[0, [0, 1] if "group" in str(stack) else 1, 3] = True  # heads that share their selection share the damage
    assert torch.allclose(out.transpose(1, 2)[~hit], expected.transpose(1, 2)[~hit], atol=1e-6)
    assert torch.equal(mask.get_dense_mask()[~hit], right.get_dense_mask()[~hit])


@every_stack
@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.timeout(60)
def test_nan_and_inf_in_a_key_reach_only_rows_that_see_it(stack, value):
    q, k, v = tensors()
    expected, right = sparse_attention(q, k, v, stack)
    k[0, 1, 5, 2] = value
    out, mask = sparse_attention(q, k, v, stack)
    hit = torch.zeros(2, 4, 8, dtype=torch.bool)
    hit[0, 2:, 5:] = True
    assert torch.equal(mask.get_dense_mask()[~hit], right.get_dense_mask()[~hit])
    assert torch.allclose(out.transpose(1, 2)[~hit], expected.transpose(1, 2)[~hit], atol=1e-6)


@every_stack
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_nan_and_inf_in_padding_are_never_seen(stack, value):
    """What a mask hides may hold anything: unfilled cache slots, padding."""
    q, k, v = tensors()
    real = torch.ones(2, 8)
    real[1, :3] = 0
    expected, right = sparse_attention(q, k, v, stack, attention_mask=real)
    k[1, :, :3] = value
    out, mask = sparse_attention(q, k, v, stack, attention_mask=real)
    assert torch.equal(mask.get_dense_mask(), right.get_dense_mask())
    assert torch.allclose(out, expected, atol=1e-6)


@every_stack
@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.timeout(60)
def test_all_nan_ends(stack, where):
    q, k, v = tensors()
    (q if where == "queries" else k).fill_(math.nan)
    out, _ = sparse_attention(q, k, v, stack)
    assert out.shape == (2, 8, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_stack
def test_finite_inputs_never_give_nan(stack, dtype):
    """The largest numbers of each dtype whose products still fit float32, with learned sinks and a softcap too."""
    q, k, v = tensors(dtype=dtype)
    large = 1e4 if dtype == torch.float16 else 1e15
    for options in ({}, {"softcap": 30.0}, {"sinks": torch.tensor([0.0, 1e4, -1e4, 3.0])}):
        out, _ = sparse_attention(q * large, k * large, v, stack, **options)
        assert out.isfinite().all()
        out, _ = sparse_attention(q / large, k / large, v, stack, **options)
        assert out.isfinite().all()


# In a model


def test_after_bad_input_the_same_model_and_cache_work():
    model, cache = sparse(), DynamicCache()
    ids = prompt(9)
    logits(model, ids, past_key_values=cache)
    expected = logits(sparse(), torch.cat([ids, prompt(2, seed=1)], 1))[:, -2:]
    embedded = model.get_input_embeddings()(prompt(2, seed=1)).detach()
    for bad in (torch.full((1, 2, 32), math.nan, dtype=torch.float64), torch.zeros(1, 2, 31, dtype=torch.float64)):
        length = cache.get_seq_length()
        with contextlib.suppress(RuntimeError):
            model(inputs_embeds=bad, past_key_values=cache)
        cache.crop(-(cache.get_seq_length() - length))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        logits(model, prompt(2), past_key_values=cache, attention_mask=torch.ones(1, 1, 2, 99, 3).bool())
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        found = model(inputs_embeds=embedded, past_key_values=cache).logits
    assert not differ(found, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.timeout(120)
def test_a_model_with_broken_weights_ends(value):
    model = sparse()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = value
    assert generate(model, prompt(9)).shape == (1, 8)
    assert torch.equal(generate(sparse(), prompt(9)), generate(sparse(), prompt(9)))


# Devices


class Pretend(TorchFunctionMode):
    """CPU tensors that say they are on another device; what is asked for there is made on the CPU."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self.device
        for kind in ("cuda", "mps", "xpu"):
            if getattr(func, "__self__", None) is getattr(torch.Tensor, f"is_{kind}", None):
                return self.device.type == kind
        if isinstance(kwargs.get("device"), torch.device | str):
            kwargs["device"] = "cpu"
        args = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
        return func(*args, **kwargs)


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda"])
@every_stack
def test_other_devices_take_the_reference(stack, device, monkeypatch):
    """MPS, XPU and ROCm (which calls itself cuda): `auto` must not reach for a kernel written for CUDA."""
    if device == "cuda":
        monkeypatch.setattr(torch.version, "hip", "6.0")
        monkeypatch.setattr(torch.version, "cuda", None)
    q, k, v = tensors()
    expected, right = sparse_attention(q, k, v, stack, kernel="reference")
    with Pretend(device):
        assert q.device.type == device
        out, mask = sparse_attention(q, k, v, stack)
        dense = mask.get_dense_mask()
    assert torch.equal(out, expected)
    assert torch.equal(dense, right.get_dense_mask())
    with Pretend(device), pytest.raises(ValueError, match="triton"):
        sparse_attention(q, k, v, stack, kernel="triton")
