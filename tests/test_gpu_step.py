"""On CUDA devices: the cache that appends in place, CUDA graphs over a static cache, models spread over two devices."""

import gc
import threading
from dataclasses import replace

import pytest
import torch
from kernel_process import captured, never_waiting
from method_files import DEFAULTS, fit
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import sah_transformers
from sah_transformers import AppendingCache
from sah_transformers.attention import make_call, run
from sah_transformers.integration import captured as captured_steps
from sah_transformers.integration.attention_function import sah_attention
from sah_transformers.integration.operator import attention_with_state_operator
from sah_transformers.integration.plan import plan_of
from sah_transformers.rows import Context
from sah_transformers.state import LayerState
from sah_transformers.static_state import StaticState

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOWS = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 16}]
STACKS = {
    "windows": WINDOWS,
    "top-k": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 0.05}],
    "top-k per kv head": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 0.05, "gqa": "group"}],
}
QUEST = [*WINDOWS, {"type": "quest", "heavy_size": 0.1}]


def model_of(dtype=torch.float32, layers=3):
    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": layers, "vocab_size": 200}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config).to("cuda", dtype).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def prompts(padded):
    ids = torch.randint(1, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : 90 if padded else 0] = 0
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


def tokens(model, inputs, new=24, **options):
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", [*STACKS.values(), QUEST], ids=[*STACKS, "quest"])
def test_the_growing_cache_changes_no_token(stack, padded):
    model = sah_transformers.enable(model_of(), stack)
    inputs = prompts(padded)
    found = tokens(model, inputs, disable_compile=True)
    assert torch.equal(found, tokens(model, inputs, cache_implementation="dynamic"))


@pytest.fixture
def captures(monkeypatch):
    """How often steps were captured."""
    counted, original = [], captured_steps.capture

    def capture(run, stream):
        result = original(run, stream)
        counted.append(result)
        return result

    monkeypatch.setattr(captured_steps, "capture", capture)
    return counted


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", [*STACKS.values(), QUEST], ids=[*STACKS, "quest"])
def test_replayed_steps_change_no_token(stack, padded, captures):
    """As `generate()` does by itself; for a second prompt a step is captured anew."""
    model = sah_transformers.enable(model_of(), stack)
    inputs = prompts(padded)
    right = tokens(model, inputs, disable_compile=True)
    assert not captures
    assert torch.equal(tokens(model, inputs), right)
    assert torch.equal(tokens(model, inputs), right)
    assert len(captures) == 2
    one = {name: given[1:] for name, given in inputs.items()}
    assert torch.equal(tokens(model, one), right[1:])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["replayed", "compiled"])
def test_dense_layers_over_long_buffers_are_left_to_the_kernels(options, padded, monkeypatch):
    from sah_transformers.integration import attention_function

    torch.compiler.reset()
    model = sah_transformers.enable(model_of(), {"maskers": STACKS["top-k"], "dense_layers": [0, -1]})
    inputs = prompts(padded)
    right = tokens(model, inputs, disable_compile=True)
    assert torch.equal(tokens(model, inputs, **options), right)
    torch.compiler.reset()
    monkeypatch.setattr(attention_function, "LONG_BUFFER", 1)
    assert torch.equal(tokens(model, inputs, **options), right)


@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", DEFAULTS)
def test_side_data_of_replayed_steps_change_no_token(method, padded, gqa, captures):
    masker = fit({**DEFAULTS[method], "heavy_size": 0.1, "gqa": gqa}, 4, 2, 64)
    masker |= {"pq_bits": 4} if method == "pq_cache" else {}
    config = {"maskers": [*WINDOWS, masker], "prefill": "dense", "kernel": "triton"}
    model = sah_transformers.enable(model_of(layers=2), config)
    inputs = prompts(padded)
    assert torch.equal(tokens(model, inputs), tokens(model, inputs, disable_compile=True))
    assert len(captures) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_replayed_steps_sample_the_same(dtype, captures):
    model = sah_transformers.enable(model_of(dtype), STACKS["top-k"])
    inputs = prompts(True)
    found = []
    for options in ({"disable_compile": True}, {}):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, max_new_tokens=24, do_sample=True, top_k=5, temperature=0.5, **options))
    assert torch.equal(*found)
    assert len(captures) == 1


def test_a_model_that_asks_the_host_is_not_replayed(captures, caplog):
    """A step that cannot be captured runs as ever, and what comes afterwards is sound."""
    model = sah_transformers.enable(model_of(), QUEST)
    inputs = prompts(True)
    right = tokens(model, inputs, disable_compile=True)
    asked, seen = {"cache_implementation": "static", "compile_config": sah_transformers.CudaGraphConfig()}, []
    hook = model.model.layers[1].register_forward_hook(lambda module, given, out: seen.append(out[0].sum().item()))
    captured_steps.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert torch.equal(tokens(model, inputs, **asked), right)
    assert "it cannot be captured" in caplog.text
    assert not captures
    torch.cuda.empty_cache()
    assert torch.rand(3, device="cuda").min() >= 0
    hook.remove()
    assert torch.equal(tokens(model, inputs), right)
    assert len(captures) == 1
    assert torch.equal(torch.ones(3, device="cuda").cumsum(0), torch.arange(1.0, 4, device="cuda"))


def test_random_numbers_while_another_thread_captures(monkeypatch):
    """Capturing takes nothing of the generator from other threads."""
    model, inputs, drawn = sah_transformers.enable(model_of(), QUEST), prompts(False), []
    original = captured_steps.CapturedSteps._run

    def run(self):
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=lambda: drawn.append(torch.rand(3, device="cuda")))
            thread.start()
            thread.join()
        return original(self)

    monkeypatch.setattr(captured_steps.CapturedSteps, "_run", run)
    torch.manual_seed(0)
    tokens(model, inputs)
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.rand(3, device="cuda"))


def test_dense_models_are_replayed_when_asked(captures):
    model, inputs = model_of(), prompts(True)
    right = tokens(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(
        tokens(model, inputs, cache_implementation="static", compile_config=sah_transformers.CudaGraphConfig()), right
    )
    assert len(captures) == 1


def test_memory_of_replayed_steps_is_given_back(captures):
    model, inputs = sah_transformers.enable(model_of(), QUEST), prompts(False)
    tokens(model, inputs)
    captures.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        tokens(model, inputs)
        captures.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_cuda_graphs_change_no_token(stack, padded):
    """As `generate(cache_implementation="static")` compiles by itself; nothing leaves the graph or is traced twice."""
    torch.compiler.reset()
    counters.clear()
    model = sah_transformers.enable(model_of(), stack)
    inputs = prompts(padded)
    right = tokens(model, inputs)
    found = tokens(model, inputs, cache_implementation="static")
    assert torch.equal(found, right)
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(tokens(model, inputs, cache_implementation="static"), right)


@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefill", ["same", "dense"])
@pytest.mark.parametrize("method", DEFAULTS)
def test_side_data_in_cuda_graphs_change_no_token(method, prefill, padded, gqa):
    """Captured once, replayed for a second prompt over another cache; side data are those of the cache's keys."""
    torch.compiler.reset()
    counters.clear()
    masker = fit({**DEFAULTS[method], "heavy_size": 0.1, "gqa": gqa}, 4, 2, 64)
    masker |= {"pq_bits": 4} if method == "pq_cache" else {}
    config = {"maskers": [*WINDOWS, masker], "prefill": prefill, "kernel": "triton"}
    config = config if prefill == "dense" else {**config, "kernel": "auto"}  # no kernel reads a prompt by side data
    model = sah_transformers.enable(model_of(layers=2), config)
    inputs = prompts(padded)
    right = tokens(model, inputs)
    if prefill == "same":
        assert torch.equal(tokens(model, inputs, cache_implementation="static"), right)
        return
    cache = StaticCache(config=model.config, max_cache_len=400)
    assert torch.equal(tokens(model, inputs, past_key_values=cache), right)
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
    for module, layer in zip(model.model.layers, cache.layers, strict=True):
        filled = int(layer.cumulative_length)
        keys, values, fresh = layer.keys[:, :, :filled], layer.values[:, :, :filled], LayerState()
        fresh._prepared = dict(layer.sah_state._prepared)
        layer.sah_state._read()
        real = torch.nn.functional.pad(inputs["attention_mask"], (0, filled - 300), value=1) > 0
        (keeper,) = plan_of(module.self_attn).keepers
        context = Context(layer_idx=module.self_attn.layer_idx, heads=4)
        fresh.update([keeper], keys, values, 4, filled, real, context)
        held = layer.sah_state.side(keeper)
        assert all(torch.equal(held[name], tensor) for name, tensor in fresh.side(keeper).items())
    with torch._dynamo.config.patch(error_on_recompile=True):
        cache.reset()
        assert torch.equal(tokens(model, inputs, past_key_values=cache), right)
        assert torch.equal(tokens(model, inputs, cache_implementation="static", max_cache_len=400), right)


@torch.no_grad()
@pytest.mark.parametrize("method", DEFAULTS)
def test_a_captured_step_with_side_data_never_waits(method):
    """A decode step of the operator itself, followed by its replays at other lengths: as an eager step gives them."""
    masker = fit({**DEFAULTS[method], "heavy_size": 0.1}, 4, 2, 64)
    masker |= {"pq_bits": 4} if method == "pq_cache" else {}
    config = {"maskers": [*WINDOWS, masker], "prefill": "dense", "kernel": "triton"}
    model = sah_transformers.enable(model_of(torch.bfloat16, layers=1), config)
    module, length = model.model.layers[0].self_attn, torch.zeros((), dtype=torch.int64, device="cuda")
    keys, values = (torch.randn(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    plan = plan_of(module)
    (keeper,) = plan.keepers

    def prompt(state, filled, stack):
        mask = torch.ones(2, filled, dtype=torch.bool, device="cuda")
        return make_call(
            query, keys[:, :, :filled], values[:, :, :filled], stack, mask, is_causal=False, scaling=0.125,
            layer_state=state, kernel="triton", kept=plan.keepers,
        )  # fmt: skip

    state = StaticState(512)
    prompt(state, 300, [])
    state.hand_out(plan.keepers, plan.number, True)
    mask = torch.zeros(2, 1, 1, 512, dtype=torch.bool, device="cuda")

    def step():
        given = (None, None, None, False, 0.125, None, plan.number, 0, 0, length, state.layout, state.memory)
        return attention_with_state_operator(query, keys, values, mask, *given)

    def fill(filled):
        length.fill_(filled)
        mask.copy_((torch.arange(512, device="cuda") < filled).expand_as(mask))

    for filled in (301, 302):
        fill(filled)
        step()
    graph, out = captured(step)
    for filled in (303, 304, 320, 310, 400):
        fill(filled)
        graph.replay()
        fresh = LayerState()
        fresh._prepared = dict(state._prepared)
        truth = run(replace(prompt(fresh, filled, plan.maskers), kernel="reference"))[0]
        close = (out - truth).abs().amax(-1) <= 2e-2 * truth.abs().max()
        assert close.sum() >= close.numel() - 1, filled  # a score closer than its rounding
        state._read()
        assert state.length == filled
        for name, tensor in fresh.side(keeper).items():
            assert torch.equal(state.side(keeper)[name], tensor), (name, filled)


@torch.no_grad()
def test_a_decode_layer_never_waits_for_the_device():
    model = sah_transformers.enable(model_of(torch.bfloat16), STACKS["top-k per kv head"])
    module = model.model.layers[0].self_attn
    cache = AppendingCache(config=model.config)
    past, new = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4096, 1))
    query = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)

    def layer():
        keys, values = cache.update(new, new, 0)
        return sah_attention(module, query, keys, values, None, scaling=0.125, sah_cache=cache)[0]

    cache.update(past, past, 0)
    for _ in range(3):
        layer()
    with never_waiting():
        for _ in range(20):
            layer()


@torch.no_grad()
def test_memory_while_decoding():
    """Weights, keys and values and a tenth; a DynamicCache needs a copy of a layer beside them."""
    model = sah_transformers.enable(model_of(torch.bfloat16, layers=2), STACKS["top-k per kv head"])
    past = torch.randn(1, 2, 400_000, 64, device="cuda", dtype=torch.bfloat16)
    peaks = {}
    for name, cache in (("ours", AppendingCache(max_length=400_020)), ("theirs", DynamicCache())):
        for layer in range(2):
            cache.update(past, past, layer)
        token = torch.ones(1, 1, dtype=torch.long, device="cuda")
        model(token, past_key_values=cache)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            model(token, past_key_values=cache)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del cache
    assert peaks["ours"] < 0.1 * 4 * past.nbytes
    assert peaks["theirs"] > past.nbytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("stack", [STACKS["top-k per kv head"], QUEST], ids=["top-k", "quest"])
def test_layers_on_two_devices(stack, tmp_path):
    """As `device_map="auto"` splits a model: same tokens as on one device, side data beside each layer's keys."""
    pytest.importorskip("accelerate")
    whole = sah_transformers.enable(model_of(layers=4), stack)
    whole.save_pretrained(tmp_path)
    first = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"]
    last = ["model.layers.2", "model.layers.3", "model.norm", "lm_head"]
    places = dict.fromkeys(first, 0) | dict.fromkeys(last, 1)
    spread = LlamaForCausalLM.from_pretrained(tmp_path, device_map=places, dtype=torch.float32)
    spread.generation_config.update(eos_token_id=None, pad_token_id=0)
    inputs = prompts(True)
    right = tokens(whole, inputs)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(tokens(spread, inputs, **options), right)
    out = tokens(spread, inputs, new=2, return_dict_in_generate=True)
    for i, layer in enumerate(out.past_key_values.layers):
        assert layer.keys.device.index == i // 2
        state = getattr(layer, "sah_state", None)
        if state is not None:
            assert all(buffer.storage.device == layer.keys.device for buffer in state._buffers())
