"""On a CUDA device: the reference selects as on the CPU in every dtype, and models run on the Triton kernels."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sah_transformers
from sah_transformers import State, sparse_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STACKS = {
    "empty": [],
    "windows": [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 0.1}],
    "top-k": [{"type": "sink", "sink_size": 4}, {"type": "oracle_top_k", "heavy_size": 0.05}],
    "top-k group": [{"type": "local", "window_size": 8}, {"type": "oracle_top_k", "heavy_size": 9, "gqa": "group"}],
    "top-p": [{"type": "sink", "sink_size": 2}, {"type": "oracle_top_p", "top_p": 0.9}],
    "top-p total group": [{"type": "oracle_top_p", "top_p": 0.8, "coverage": "total", "gqa": "group"}],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(batch, heads, groups, queries, keys, dim, dtype):
    generator = torch.Generator().manual_seed(queries * keys + dim)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("shape", [(1, 8, 2, 257, 257, 64), (2, 4, 4, 1, 1500, 128), (2, 6, 2, 5, 333, 96)], ids=str)
def test_selections_are_those_of_the_cpu(shape, stack, dtype):
    q, k, v = tensors(*shape, dtype)
    k[:, :, 40:60] = k[:, :, 10:30]  # exact ties
    valid = torch.ones(shape[0], shape[4], dtype=torch.long)
    valid[0, :7] = 0
    out, mask = sparse_attention(q, k, v, stack, attention_mask=valid, kernel="reference")
    cuda = [t.cuda() for t in (q, k, v, valid)]
    there, mask_there = sparse_attention(*cuda[:3], stack, attention_mask=cuda[3], kernel="reference")
    assert torch.equal(mask_there.get_dense_mask().cpu(), mask.get_dense_mask())
    torch.testing.assert_close(there.cpu(), out)


def test_tf32_does_not_reach_the_selection():
    q, k, v = (t.cuda() for t in tensors(1, 4, 2, 64, 512, 64, torch.float32))
    stack = STACKS["top-k"]
    _, exact = sparse_attention(q, k, v, stack)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        _, rough = sparse_attention(q, k, v, stack)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(exact.get_dense_mask(), rough.get_dense_mask())


def test_gradients_in_bfloat16():
    q, k, v = (t.cuda().requires_grad_() for t in tensors(1, 4, 2, 40, 40, 32, torch.bfloat16))
    sparse_attention(q, k, v, STACKS["top-k"], return_mask=False).float().square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_generates_like_dense_where_everything_is_selected(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).to("cuda", dtype).eval()
    ids = torch.randint(1, 200, (2, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    steps = {}
    for name, kind in (("dense", None), ("causal", [{"type": "causal"}]), ("sparse", STACKS["top-k"])):
        if kind is not None:
            sah_transformers.enable(model, kind)
        for cache in ("dynamic", "static"):
            steps[name, cache] = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
                pad_token_id=0,
            )
    if dtype == torch.float32:
        assert torch.equal(steps["sparse", "dynamic"], steps["sparse", "static"])
        assert torch.equal(steps["dense", "dynamic"], steps["causal", "dynamic"])
        assert torch.equal(steps["dense", "dynamic"], steps["causal", "static"])


@pytest.mark.parametrize("stack", ["windows", "top-k"])
def test_a_model_generates_the_same_on_the_kernels_as_on_the_reference(stack):
    """Prompt and decode steps, in float32: the same tokens, and recording changes none."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 200}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config).cuda().eval()
    ids = torch.randint(1, 200, (2, 300), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = {}
    for kernel in ("reference", "triton"):
        sah_transformers.enable(model, {"maskers": STACKS[stack], "kernel": kernel})
        tokens[kernel] = model.generate(ids, **options)
    assert torch.equal(tokens["triton"], tokens["reference"])
    with sah_transformers.record(model) as log:
        assert torch.equal(model.generate(ids, **options), tokens["reference"])
    assert 0 < log.mean("density", "decode") <= 1


def test_side_data_live_on_the_device():
    from sah_transformers import Masker, MaskerConfig

    class Norms(Masker):
        def append(self, keys, values, ctx):
            return {"norm": keys.norm(dim=-1)}

        def select(self, rows, active):
            assert rows.context.side["norm"].device == rows.keys.device
            return rows.context.side["norm"][:, :1, None] > 0

    q, k, v = (t.cuda() for t in tensors(1, 4, 2, 6, 6, 16, torch.float16))
    state = State()
    for stop in (4, 6):
        new = slice(0 if stop == 4 else 4, stop)
        sparse_attention(q[:, :, new], k[:, :, :stop], v[:, :, :stop], [Norms(MaskerConfig())], state=state)
    assert state.layer(0).length == 6
