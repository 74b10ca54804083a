"""`torch.compile` with a static cache: one graph, traced once, that gives what eager attention gives."""

import copy
import gc
import pickle

import pytest
import torch
from sparse_models import OTHER_STACK, STACK, generate, left_padded, logits, prompt, sparse
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation import CompileConfig

import sah_transformers
from sah_transformers.integration import operator
from sah_transformers.integration.operator import attention_operator
from sah_transformers.integration.plan import plan_number, plan_of

GROUP = [{"type": "sink", "sink_size": 2}, {"type": "oracle_top_k", "heavy_size": 0.2, "gqa": "group"}]
WINDOWS = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 3}]
QUEST = [{"type": "sink", "sink_size": 1}, {"type": "quest", "heavy_size": 4, "page_size": 2}]

MODELS = {
    "llama": ("LlamaForCausalLM", STACK),
    "half dense": ("LlamaForCausalLM", {"maskers": STACK, "dense_layers": [0]}),
    "per kv head": ("LlamaForCausalLM", GROUP),
    "windows": ("Qwen3ForCausalLM", WINDOWS),
    "top-p": ("Qwen3ForCausalLM", OTHER_STACK),
    "dense prompt": ("LlamaForCausalLM", {"maskers": STACK, "prefill": "dense"}),
    "min keys": ("LlamaForCausalLM", {"maskers": STACK, "min_keys": 17}),
    "softcap": ("Gemma2ForCausalLM", STACK),
    "learned sinks": ("GptOssForCausalLM", STACK),
}
IDS, PADDING = left_padded([prompt(13), prompt(7, seed=1)])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(backend="aot_eager", fullgraph=True):
    """Options of a `generate()` that compiles its decoding, on a CPU too."""
    config = CompileConfig(fullgraph=fullgraph, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def dtype_of(name):
    return torch.float32 if name == "learned sinks" else torch.float64  # experts are multiplied in float32


def eager(model, ids=IDS, padding=PADDING, **options):
    options = {"cache_implementation": "static", "disable_compile": True, **options}
    return generate(model, ids, attention_mask=padding, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_steps_and_calls(name):
    kind, config = MODELS[name]
    model = sparse(config, name=kind, attn="eager", dtype=dtype_of(name))
    right = eager(model)
    assert torch.equal(generate(model, IDS, attention_mask=PADDING, **compiled()), right)
    assert not counters["graph_break"]
    assert graphs() == (2 if kind in ("Gemma2ForCausalLM", "GptOssForCausalLM") else 1)  # a window that fills up
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(model, IDS, attention_mask=PADDING, **compiled()), right)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "half dense", "per kv head", "learned sinks"])
def test_inductor(name):
    kind, config = MODELS[name]
    model = sparse(config, name=kind, attn="eager", dtype=dtype_of(name))
    assert torch.equal(generate(model, IDS, attention_mask=PADDING, **compiled("inductor")), eager(model))
    assert not counters["graph_break"]


def test_tokens_are_those_of_the_growing_cache():
    model = sparse(GROUP)
    found = generate(model, IDS, attention_mask=PADDING, **compiled())
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING))


def test_another_stack_is_another_graph():
    model = sparse(STACK)
    generate(model, IDS, attention_mask=PADDING, **compiled())
    for change in (
        lambda: sah_transformers.enable(model, OTHER_STACK),
        lambda: setattr(model.config, "sparse_attention", GROUP),
        lambda: sah_transformers.enable(model, {"maskers": STACK, "dense_layers": [1]}),
        lambda: sah_transformers.disable(model),
    ):
        change()
        assert torch.equal(generate(model, IDS, attention_mask=PADDING, **compiled()), eager(model))


def test_copies_have_plans_of_their_own():
    model = sparse(STACK)
    generate(model, IDS, attention_mask=PADDING, **compiled())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(sparse(STACK)))]
    right = eager(model)
    numbers = {plan_of(m.model.layers[0].self_attn).number for m in (model, *others)}
    assert len(numbers) == 3
    del model
    gc.collect()
    for other in others:
        assert torch.equal(generate(other, IDS, attention_mask=PADDING, **compiled()), right)


def test_a_plan_that_is_gone_says_so():
    model = sparse(STACK)
    number = plan_of(model.model.layers[0].self_attn).number
    assert plan_number(number) is plan_of(model.model.layers[0].self_attn)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="compile it again"):
        plan_number(number)


@pytest.mark.parametrize(
    ("stack", "captured"),
    [
        (STACK, True),
        (GROUP, True),
        (WINDOWS, True),
        ([{"type": "oracle_top_p", "top_p": 0.5, "gqa": "group"}], False),
        ({"maskers": STACK, "kernel": "reference"}, False),
    ],
    ids=["top-k", "per kv head", "windows", "top-p per kv head", "reference"],
)
def test_only_what_the_kernels_take_is_captured(stack, captured, monkeypatch):
    """Where code is captured in CUDA graphs, nothing in it may wait for the device; the reference does."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(operator, "CAPTURING", ("cpu",))
    model = sparse(stack, dtype=torch.float32)
    found = generate(model, IDS, attention_mask=PADDING, **compiled(fullgraph=captured))
    assert torch.equal(found, eager(model))
    assert bool(counters["graph_break"]) is not captured


@pytest.mark.parametrize("capturing", [False, True])
def test_longer_and_longer_caches(capturing, monkeypatch):
    """From the second length on PyTorch takes it for a variable: one more graph, and no other."""
    if capturing:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(operator, "CAPTURING", ("cpu",))
    model = sparse(STACK, dtype=torch.float32)
    for length in (13, 20, 30, 50):
        ids = prompt(length)
        assert torch.equal(generate(model, ids, **compiled()), eager(model, ids, torch.ones_like(ids)))
    assert graphs() == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("chunk", [4, 70])
def test_first_prompts_with_side_data_and_unknown_ones_leave_the_graph(chunk):
    """Quest's pages have no place before; whether a chunk of a few rows is a prompt, the host has to look up."""
    ids = prompt(80 if chunk > 64 else 16)
    for stack in ({"maskers": QUEST}, {"maskers": STACK, "prefill": "dense"}):
        model = sparse(stack)
        options = {"prefill_chunk_size": chunk}
        found = generate(model, ids, **options, **compiled("eager", fullgraph=False))
        assert torch.equal(found, eager(model, ids, torch.ones_like(ids), **options))


def test_a_recorded_model_leaves_the_graph():
    model = sparse(STACK)
    with sah_transformers.record(model) as log:
        found = generate(model, IDS, attention_mask=PADDING, **compiled(fullgraph=False))
    assert torch.equal(found, eager(model))
    assert log.mean("density", "decode") < 1


def test_training_a_compiled_model():
    model = sparse(STACK).train()
    model(IDS, labels=IDS, attention_mask=PADDING).loss.backward()
    right = model.lm_head.weight.grad.clone()
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(IDS, labels=IDS, attention_mask=PADDING).loss.backward()
    assert torch.allclose(model.lm_head.weight.grad, right)


def test_a_model_compiled_by_the_user():
    """The prompt and every step, over a static cache, traced whole."""
    model = sparse(STACK)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache, truth = (StaticCache(config=model.config, max_cache_len=24) for _ in range(2))
    cache.early_initialization(1, 2, 16, torch.float64, torch.device("cpu"))
    ids = prompt(13)
    for part in (ids, *prompt(3, seed=2).split(1, dim=1)):
        with torch.no_grad():
            found = run(input_ids=part, past_key_values=cache).logits
        assert torch.allclose(found, logits(model, part, past_key_values=truth), atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_keeps_its_promises(masked):
    """Schema, fake implementation and tracing, by PyTorch's own checks."""
    model = sparse(STACK)
    number = plan_of(model.model.layers[0].self_attn).number
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d, generator=generator) for h, n, d in ((4, 1, 16), (2, 9, 16), (2, 9, 12)))
    mask = torch.arange(9)[None, None, None] < torch.tensor([5, 7])[:, None, None, None] if masked else None
    arguments = (q, k, v, mask, None, None, None, mask is None, 0.25, None, number, 0, 0)
    torch.library.opcheck(attention_operator, arguments)
