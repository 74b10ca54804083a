"""Decode steps replayed as a graph: what `generate()` decides, copies and gives back, by a stand-in for CUDA's graphs.

The stand-in runs the model at every replay, into the outputs that capturing gave, and reads what the graph would read.
"""

import copy
import os

import pytest
import torch
from kernel_process import in_triton
from method_files import DEFAULTS, fit
from sparse_models import OTHER_STACK, STACK, generate, left_padded, prompt, sparse
from transformers import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import sah_transformers
from sah_transformers import AppendingCache, CudaGraphConfig
from sah_transformers.integration import captured

QUEST = [{"type": "sink", "sink_size": 1}, {"type": "quest", "heavy_size": 4, "page_size": 2}]
MODELS = {
    "llama": ("LlamaForCausalLM", STACK),
    "half dense": ("LlamaForCausalLM", {"maskers": STACK, "dense_layers": [0]}),
    "top-p": ("Qwen3ForCausalLM", OTHER_STACK),
    "dense prompt": ("LlamaForCausalLM", {"maskers": STACK, "prefill": "dense"}),
    "min keys": ("LlamaForCausalLM", {"maskers": STACK, "min_keys": 17}),
    "quest": ("LlamaForCausalLM", QUEST),
}
IDS, PADDING = left_padded([prompt(13), prompt(7, seed=1)])


class Graphs:
    """Counts captures and replays; `fault`: raised when capturing."""

    def __init__(self):
        self.captures, self.replays, self.fault = 0, 0, None

    def capture(self, run, stream):
        assert stream is None
        if self.fault is not None:
            raise self.fault
        self.captures += 1
        outputs = CausalLMOutputWithPast()

        def replay():
            self.replays += 1
            for name, value in run().items():
                outputs[name] = value

        return replay, outputs


@pytest.fixture
def graphs(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(captured, "capture", graphs.capture)
    monkeypatch.setattr(captured, "CAPTURED", ("cpu",))
    return graphs


def in_place(model, ids=IDS, padding=PADDING, **options):
    return generate(model, ids, attention_mask=padding, disable_compile=True, **options)


@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_change_no_token(graphs, name):
    kind, config = MODELS[name]
    model = sparse(config, name=kind)
    right = in_place(model)
    assert graphs.replays == 0
    for ids, padding in ((IDS, PADDING), (IDS[:1], PADDING[:1])):
        found = generate(model, ids, attention_mask=padding)
        assert torch.equal(found, right[: len(ids)])
    assert graphs.captures == 2
    assert graphs.replays == 2 * 6  # of 8 tokens the prompt gives one, and one step runs before it is captured


@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize("method", DEFAULTS)
def test_side_data_of_replayed_steps(graphs, method, gqa):
    masker = fit({**DEFAULTS[method], "heavy_size": 0.2, "gqa": gqa}, 4, 2, 16)
    model = sparse({"maskers": [{"type": "sink", "sink_size": 1}, masker], "prefill": "dense"}, dtype=torch.float32)
    ids, padding = left_padded([prompt(40), prompt(31, seed=1)])
    right = in_place(model, ids, padding, new=14)
    assert torch.equal(generate(model, ids, attention_mask=padding, new=14), right)
    assert graphs.replays == 12


def test_sampling_streams_and_scores_are_as_ever(graphs):
    model = sparse()
    torch.manual_seed(3)
    right = in_place(model, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(generate(model, IDS, attention_mask=PADDING, do_sample=True, top_k=20), right)
    assert graphs.replays == 6


def cropped(model, ids, past_key_values, **_):
    """A way to generate that takes back what it read."""
    token = model(ids, past_key_values=past_key_values).logits[:, -1:].argmax(-1)
    past_key_values.crop(-1)
    return torch.cat([ids, token], dim=1)


def test_the_environment_stays_as_it_was(graphs, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    generate(sparse(), prompt(13))
    assert graphs.replays
    assert "TOKENIZERS_PARALLELISM" not in os.environ


ELSEWHERE = {
    "told not to": {"disable_compile": True},
    "the cache is returned": {"return_dict_in_generate": True},
    "beams": {"num_beams": 2},
    "another cache": {"cache_implementation": "dynamic"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
    "a loop of one's own": {"custom_generate": cropped},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_nothing_is_replayed(graphs, name):
    model, ids = sparse(), prompt(13)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, **ELSEWHERE[name])
    assert graphs.captures == graphs.replays == 0
    if name == "the cache is returned":
        assert type(found.past_key_values) is AppendingCache


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: sah_transformers.disable(model),
        lambda model: setattr(model, "forward", model.forward),
        lambda model: model.model.norm.register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "hf_device_map", {"": "cpu", "lm_head": "disk"}),
        lambda model: sah_transformers.enable(model, {"maskers": STACK, "kernel": "reference"}),
        lambda model: setattr(type(model), "_can_compile_fullgraph", False),
    ],
    ids=["training", "dense", "own forward", "hooked", "spread", "reference", "not one graph"],
)
def test_models_that_do_not_suit(graphs, monkeypatch, change):
    model = sparse()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", True)
    change(model)
    generate(model, prompt(13))
    assert graphs.captures == graphs.replays == 0


def test_models_with_windows_of_their_own_do_not_suit(graphs):
    model = sparse(name="Gemma2ForCausalLM", attn="eager")
    assert torch.equal(generate(model, IDS, attention_mask=PADDING), in_place(model))
    assert graphs.captures == 0


def test_recorded_calls_are_not_replayed(graphs):
    model = sparse()
    with sah_transformers.record(model) as log:
        generate(model, prompt(13))
    assert graphs.captures == 0
    assert len(log.entries) == 8 * len(model.model.layers)


def test_hooks_are_called_at_every_step(graphs):
    model, calls = sparse(), []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    generate(model, prompt(13))
    assert (graphs.captures, len(calls)) == (0, 8)
    hook.remove()
    generate(model, prompt(13))
    assert graphs.captures == 1


def test_autocast_is_as_ever(graphs):
    """Keys and values are of two dtypes there, which a static cache does not hold."""
    model = sparse(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(model, IDS, attention_mask=PADDING), in_place(model))
    assert graphs.captures == 0


def test_a_model_is_not_tried_for_ever(graphs):
    """PyTorch may keep the memory of a capture that failed."""
    model = sparse()
    right = in_place(model)
    graphs.fault = RuntimeError()
    for _ in range(captured.MOST_FAILURES):
        assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    graphs.fault = None
    assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert graphs.captures == 0
    generate(sparse(), prompt(13))
    assert graphs.captures == 1


def test_caches_that_pytorch_can_take_apart(graphs, monkeypatch):
    """As Transformers registers them when it exports a model: the step still writes into the cache itself."""
    from torch.utils import _pytree

    model = sparse(QUEST)
    right = in_place(model)
    node = _pytree.NodeDef(StaticCache, lambda cache: ([cache.layers[0].keys], cache), lambda *_: None, None)
    monkeypatch.setitem(_pytree.SUPPORTED_NODES, StaticCache, node)
    assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert graphs.replays == 6


def test_a_generation_within_another(graphs):
    inner, outer = sparse(), sparse(OTHER_STACK)
    rights = [in_place(model) for model in (inner, outer)]
    found = []
    original = outer.model.norm.forward

    def forward(*given):
        within = captured.step_underway()
        found.append(generate(inner, IDS, attention_mask=PADDING))
        assert captured.step_underway() is within
        return original(*given)

    outer.model.norm.forward = forward
    assert torch.equal(generate(outer, IDS, attention_mask=PADDING), rights[1])
    assert all(torch.equal(tokens, rights[0]) for tokens in found)
    assert captured.step_underway() is None


def test_what_cannot_be_captured_goes_on(graphs, caplog):
    """The step that failed to be captured, and those behind it, run as ever; the log says why, once."""
    model = sparse(QUEST)
    right = in_place(model)
    graphs.fault = RuntimeError("operation not permitted when stream is capturing\nand more")
    captured.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert graphs.replays == 0
    assert "not replayed as a CUDA graph: it cannot be captured: operation not permitted" in caplog.text
    assert "and more" not in caplog.text


def test_a_layer_without_kernels_is_not_captured(graphs, monkeypatch):
    from sah_transformers.integration import attention_function

    model = sparse()
    right = in_place(model)
    monkeypatch.setattr(attention_function, "takes", lambda *_: False)
    assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert graphs.captures == 0


def test_layers_that_are_ready_later_are_captured_then(graphs, monkeypatch):
    from sah_transformers.integration import attention_function

    model = sparse(QUEST)
    right, original, calls = in_place(model), attention_function.takes, []

    def takes(plan, *rest):
        calls.append(plan)
        return len(calls) > 3 * len(model.model.layers) and original(plan, *rest)

    monkeypatch.setattr(attention_function, "takes", takes)
    assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert (graphs.captures, graphs.replays) == (1, 3)


REPLAYED = {"cache_implementation": "static", "compile_config": CudaGraphConfig()}


def test_models_that_take_more_are_not_captured(graphs):
    model = sparse()
    right = in_place(model)
    original = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {**original(*args, **kwargs), "more": object()}
    assert torch.equal(generate(model, IDS, attention_mask=PADDING, **REPLAYED), right)
    assert graphs.captures == 0


def prompt_tuned(model, tokens=4):
    """``model`` with virtual tokens before every prompt, put there as prompt tuning does."""
    original, embed = model.prepare_inputs_for_generation, model.get_input_embeddings()
    virtual = torch.randn(1, tokens, embed.weight.shape[1], generator=torch.Generator().manual_seed(0))

    def prepare(ids, attention_mask=None, **kwargs):
        inputs = {**original(ids, **kwargs), "attention_mask": None, "position_ids": None}
        if int(kwargs["past_key_values"].get_seq_length()) == 0:
            inputs["inputs_embeds"] = torch.cat([virtual, embed(inputs.pop("input_ids"))], dim=1)
        return inputs

    model.prepare_inputs_for_generation = prepare
    return model


def test_tokens_that_the_cache_was_not_made_for(graphs):
    """Prompt tuning is not replayed by default; asked to be, it says that the cache is full."""
    model = prompt_tuned(sparse())
    right = generate(model, prompt(13), new=12, disable_compile=True)
    assert torch.equal(generate(model, prompt(13), new=12), right)
    assert graphs.captures == 0
    with pytest.raises(IndexError, match="the static cache is full: it has room for 24 tokens"):
        generate(model, prompt(13), new=12, **REPLAYED)
    assert graphs.captures == 1


@torch.no_grad()
def test_the_room_of_a_cache_that_is_used_again(graphs):
    """It is asked for anew: after a reset, and after tokens that came several at once."""
    model = sparse()
    cache = StaticCache(config=model.config, max_cache_len=8)
    steps = captured.CapturedSteps(model)
    for first, more in ((5, 3), (5, 3), (1, 7), (1, 2)):
        cache.reset()
        steps(input_ids=prompt(first), past_key_values=cache)
        for _ in range(more):
            steps(input_ids=prompt(1), past_key_values=cache)
    steps(input_ids=prompt(5), past_key_values=cache)
    with pytest.raises(IndexError, match="full: it has room for 8"):
        steps(input_ids=prompt(1), past_key_values=cache)


def test_a_token_that_no_kernel_can_append(graphs, monkeypatch, caplog):
    """The static cache then appends it as PyTorch does, with one line in the log."""
    from sah_transformers.integration import static_layer
    from sah_transformers.kernels import append

    model = sparse()
    right = in_place(model)
    monkeypatch.setattr(append, "built", in_triton("no compiler"))
    monkeypatch.setattr(append, "_token_launches", {})
    monkeypatch.setattr(append, "_unbuildable", set())
    monkeypatch.setattr(static_layer, "runs_kernels", lambda tensor: True)
    with caplog.at_level("WARNING"):
        assert torch.equal(generate(model, IDS, attention_mask=PADDING), right)
    assert graphs.replays == 6
    assert caplog.text.count("tokens are appended to caches by PyTorch: no compiler") == 1


def test_a_cache_of_ones_own(graphs):
    """Dense models replay when asked; a second call goes on from where the first ended."""
    model = sparse(QUEST)
    ids = prompt(13)
    right = in_place(model, ids, None, new=12)
    cache = StaticCache(config=model.config, max_cache_len=40)
    options = {"past_key_values": cache, "compile_config": CudaGraphConfig()}
    first = generate(model, ids, new=6, **options)
    so_far = torch.cat([ids, first], dim=1)
    rest = generate(model, so_far, new=6, **options)
    assert torch.equal(torch.cat([first, rest], dim=1), right)
    assert graphs.captures == 2
    dense = sah_transformers.disable(copy.deepcopy(model))
    right = generate(dense, ids)
    assert torch.equal(generate(dense, ids, cache_implementation="static", compile_config=CudaGraphConfig()), right)
    assert graphs.captures == 3


def test_calls_of_another_kind_are_not_replayed(graphs):
    """A step with other arguments than the captured one runs by itself; several tokens at once do."""
    model = sparse()
    cache = StaticCache(config=model.config, max_cache_len=40)
    steps = captured.CapturedSteps(model)
    ids, other = prompt(5), AppendingCache(config=model.config)
    with torch.no_grad():
        steps(input_ids=ids, past_key_values=cache)
        model(input_ids=ids, past_key_values=other)
        for i, extra in enumerate(({}, {}, {"logits_to_keep": 1}, {})):
            token = prompt(1, seed=i)
            seen = torch.arange(40)[None, None, None] <= 5 + i
            found = steps(input_ids=token, past_key_values=cache, attention_mask=seen, **extra).logits
            assert torch.allclose(found, model(input_ids=token, past_key_values=other).logits)
    assert graphs.captures == 1
    assert graphs.replays == 2
