"""Side data over a static cache: compiled steps write them in place, and give what eager steps over any cache give."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from kernel_process import DEVICE, GPU, interpreter_test, kernel_test, mostly_slow, passes_in_the_interpreter
from method_files import DEFAULTS, fit
from sparse_models import generate, left_padded, logits, prompt, sparse
from test_approximate_scores import left_padding, normal
from test_compile import compiled, graphs
from test_methods_state import METHODS, every_method, stack
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import sah_transformers
from sah_transformers.attention import make_call
from sah_transformers.integration import operator
from sah_transformers.integration.operator import attention_with_state_operator
from sah_transformers.integration.plan import plan_of
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.rows import Context
from sah_transformers.state import LayerState
from sah_transformers.static_state import CapturedState, StaticState, laid_out

IDS, PADDING = left_padded([prompt(13), prompt(11, seed=1)])
quick_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in ("quest", "pq_cache") else pytest.mark.slow) for name in METHODS]
)
BOTH = pytest.mark.parametrize("prefill", ["same", "dense"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def static(model, length=40):
    return StaticCache(config=model.config, max_cache_len=length)


def settings(fullgraph=True):
    return {"compile_config": compiled(fullgraph=fullgraph)["compile_config"]}


def continued(model, cache, ids=IDS, padding=PADDING, **options):
    return generate(model, ids, attention_mask=padding, past_key_values=cache, **{**settings(), **options})


def kept(state, masker):
    """Side data of the keys that a state knows of."""
    state._read()
    return {name: tensor.clone() for name, tensor in state.side(masker).items()}


def check_side_data(model, cache, padding):
    """What the cache's layers keep is what their keys alone give, under what was made once of the sequences."""
    for module, layer in zip(model.model.layers, cache.layers, strict=True):
        plan, state, fresh = plan_of(module.self_attn), layer.sah_state, LayerState()
        filled = int(layer.cumulative_length)
        assert filled == int(laid_out(state.memory, state.layout)["span"][1])
        keys, values = layer.keys[:, :, :filled], layer.values[:, :, :filled]
        real = torch.arange(filled)[None] >= padding[:, None]
        context = Context(layer_idx=module.self_attn.layer_idx, heads=model.config.num_attention_heads)
        for masker in plan.keepers:
            held = kept(state, masker)
            if masker.config in state._prepared:
                fresh._prepared[masker.config] = state._prepared[masker.config]
            fresh.update([masker], keys, values, context.heads, filled, real, context)
            expected = fresh.side(masker)
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], expected[name]) for name in expected), masker
        positions = torch.where(real, torch.arange(filled)[None] - padding[:, None], -1)
        assert torch.equal(state._positions.view()[:, 0], positions)


@pytest.mark.core
@BOTH
@every_method
def test_steps_are_one_graph_and_give_what_a_growing_cache_gives(method, prefill):
    model = sparse({"maskers": stack(method), "prefill": prefill})
    right, cache = generate(model, IDS, attention_mask=PADDING), static(model)
    assert torch.equal(continued(model, cache), right)
    assert not counters["graph_break"]
    assert graphs() == 1
    check_side_data(model, cache, torch.tensor([0, 2]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(continued(model, static(model)), right)


@pytest.mark.slow
@every_method
def test_inductor(method):
    model = sparse(stack(method))
    found = generate(model, IDS, attention_mask=PADDING, **compiled("inductor"))
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING))
    assert not counters["graph_break"]
    assert not counters["inductor"]["possibly_missed_reinplacing_bytes"]


@pytest.mark.core
@BOTH
@quick_methods
def test_a_second_prompt_on_the_same_cache(method, prefill):
    """Shorter than the first: nothing of that is left, and nothing is compiled again."""
    model, cache = sparse({"maskers": stack(method), "prefill": prefill}), None
    for ids, padding in ((IDS, PADDING), left_padded([prompt(5, seed=3), prompt(9, seed=4)])):
        right = generate(model, ids, attention_mask=padding)
        if cache is None:
            cache = static(model)
            assert torch.equal(continued(model, cache, ids, padding), right)
            places = [layer.sah_state.memory.data_ptr() for layer in cache.layers]
        else:
            cache.reset()
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert torch.equal(continued(model, cache, ids, padding), right)
        check_side_data(model, cache, (padding == 0).sum(-1))
    assert places == [layer.sah_state.memory.data_ptr() for layer in cache.layers]


@torch.no_grad()
def steps(model, cache, ids, run=None):
    """Logits of ``ids``, one after the other; ``run``: the compiled model."""
    run = model if run is None else run
    return torch.cat([run(input_ids=one, past_key_values=cache).logits for one in ids.split(1, dim=1)], dim=1)


@quick_methods
def test_eager_and_compiled_steps_take_turns(method):
    """The host does not see what compiled steps append; a question of several tokens is read eagerly in between."""
    model = sparse({"maskers": stack(method), "prefill": "dense"})
    run = torch.compile(model, backend="eager")
    cache, truth = static(model), DynamicCache()
    more, question = prompt(9, seed=2), prompt(4, seed=5)
    for one in (cache, truth):
        logits(model, prompt(13), past_key_values=one)
    assert torch.equal(steps(model, cache, more[:, :3], run), steps(model, truth, more[:, :3]))
    assert torch.equal(steps(model, cache, more[:, 3:5]), steps(model, truth, more[:, 3:5]))
    assert torch.equal(logits(model, question, past_key_values=cache), logits(model, question, past_key_values=truth))
    assert torch.equal(steps(model, cache, more[:, 5:], run), steps(model, truth, more[:, 5:]))
    check_side_data(model, cache, torch.tensor([0]))


@pytest.mark.parametrize("back", [1, 9])
@quick_methods
def test_a_sequence_cut_back_by_hand(method, back):
    """Where `cumulative_length` is taken back, which is all that there is to a static cache's crop."""
    model = sparse(stack(method))
    run = torch.compile(model, backend="eager")
    cache, truth = static(model), DynamicCache()
    ids = prompt(13)
    for one in (cache, truth):
        logits(model, ids, past_key_values=one)
    steps(model, cache, prompt(8, seed=2), run)
    steps(model, truth, prompt(8, seed=2))
    for layer in cache.layers:
        layer.cumulative_length.sub_(back)
    truth.crop(-back)
    other = prompt(6, seed=7)
    assert torch.equal(steps(model, cache, other, run), steps(model, truth, other))
    check_side_data(model, cache, torch.tensor([0]))


@pytest.mark.parametrize(
    ("method", "prefill"),
    mostly_slow(
        [(method, prefill) for method in ("quest", "pq_cache") for prefill in ("same", "dense")],
        ("quest", "dense"),
        ("pq_cache", "same"),
    ),
)
def test_prompts_in_chunks(method, prefill):
    """Compiled by Transformers as well; what is not known to be a step leaves the graph."""
    model, options = sparse({"maskers": stack(method), "prefill": prefill}), {"prefill_chunk_size": 11}
    found = continued(model, static(model), **settings(fullgraph=False), **options)
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 9},
        {"prefill_chunk_size": 10},
        {"prefill_chunk_size": 24},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_codebooks_are_those_of_a_whole_prompt_however_it_was_read(options):
    """Densely, in chunks or at once, and whatever comes with the first call that selects."""
    rows = 64 if "prompt_lookup_num_tokens" in options else 1
    model = sparse({"maskers": stack("pq_cache"), "prefill": "dense", "decode_max_queries": rows})
    ids = torch.cat([prompt(13), prompt(13)], dim=1)
    right = generate(model, ids)
    assert torch.equal(generate(model, ids, **options), right)
    if rows == 1:
        cache = static(model)
        assert torch.equal(generate(model, ids, past_key_values=cache, disable_compile=True, **options), right)


@pytest.mark.parametrize("how", ["copy", "pickle"])
@quick_methods
def test_copies_of_a_cache_go_their_own_ways(method, how):
    model = sparse(stack(method))
    run = torch.compile(model, backend="eager")
    cache, truth = static(model), DynamicCache()
    for one in (cache, truth):
        logits(model, prompt(13), past_key_values=one)
        steps(model, one, prompt(2, seed=1), run if one is cache else None)
    other = copy.deepcopy(cache) if how == "copy" else pickle.loads(pickle.dumps(cache))
    for one, right, seed in ((cache, copy.deepcopy(truth), 2), (other, truth, 3)):
        assert torch.equal(steps(model, one, prompt(4, seed=seed), run), steps(model, right, prompt(4, seed=seed)))
        check_side_data(model, one, torch.tensor([0]))


@every_method
def test_beams(method):
    model, options = sparse(stack(method)), {"num_beams": 3}
    found = generate(model, IDS, attention_mask=PADDING, **options, **compiled(fullgraph=False))
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING, **options))


def test_another_stack_on_the_same_cache():
    """Side data of the stack before are dropped; those of the new one are made of the keys that are there."""
    model = sparse(stack("quest"))
    cache, truth = static(model), DynamicCache()
    run = torch.compile(model, backend="eager")
    for name in ("quest", "socket", "double_sparsity", "quest"):
        sah_transformers.enable(model, stack(name))
        more = prompt(4, seed=3)
        assert torch.equal(steps(model, cache, more, run), steps(model, truth, more))
        check_side_data(model, cache, torch.tensor([0]))


@pytest.mark.parametrize("method", ["quest", "pq_cache"])
def test_a_prompt_in_inference_mode(method):
    """And steps outside of it, where the cache's own tensors allow it."""
    model = sparse(stack(method))
    cache, truth = static(model), DynamicCache()
    cache.early_initialization(1, 2, 16, torch.float64, torch.device("cpu"))
    logits(model, prompt(22), past_key_values=truth)
    with torch.inference_mode():
        model(input_ids=prompt(22), past_key_values=cache)
    run = torch.compile(model, backend="eager")
    more = prompt(5, seed=2)
    assert torch.equal(steps(model, cache, more[:, :2]), steps(model, truth, more[:, :2]))
    assert torch.equal(steps(model, cache, more[:, 2:], run), steps(model, truth, more[:, 2:]))
    check_side_data(model, cache, torch.tensor([0]))


def test_parts_of_a_stack_on_the_same_cache():
    """Some of the maskers, and the same in another order: whose side data compiled code finds where."""
    several = [*stack("quest"), METHODS["quest"] | {"page_size": 2}, METHODS["socket"]]
    model = sparse(several)
    cache, truth = static(model), DynamicCache()
    run = torch.compile(model, backend="eager")
    for part in (several, several[::-1], several[1:], several[:-1]):
        sah_transformers.enable(model, part)
        more = prompt(4, seed=3)
        assert torch.equal(steps(model, cache, more, run), steps(model, truth, more))
        check_side_data(model, cache, torch.tensor([0]))


def test_several_maskers_with_side_data_and_others_for_the_prompt():
    several = [*stack("quest"), METHODS["socket"], METHODS["pq_cache"]]
    model = sparse({"maskers": several, "prefill": stack("hash_attention"), "dense_layers": [1]})
    found = generate(model, IDS, attention_mask=PADDING, **compiled())
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING))
    assert graphs() == 1


@quick_methods
def test_the_operator_keeps_its_promises(method):
    """Schema, fake implementation and tracing, by PyTorch's own checks."""
    model = sparse(stack(method))
    cache, module = static(model), model.model.layers[0].self_attn
    logits(model, prompt(13), past_key_values=cache)
    layer = cache.layers[0]
    layer.cumulative_length.add_(1)
    layer.keys[:, :, 13] = 0.5
    query, mask = torch.randn(1, 4, 1, 16, dtype=torch.float64), (torch.arange(40) < 14)[None, None, None]
    given = (query, layer.keys, layer.values, mask, None, None, None, False, 0.25, None, plan_of(module).number, 0, 0)
    torch.library.opcheck(
        attention_with_state_operator, (*given, layer.cumulative_length, layer.sah_state.layout, layer.sah_state.memory)
    )


def test_the_reference_leaves_the_graph_where_the_host_cannot_ask_for_lengths(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(operator, "CAPTURING", ("cpu",))
    model = sparse({"maskers": stack("quest"), "kernel": "reference"}, dtype=torch.float32)
    found = generate(model, IDS, attention_mask=PADDING, **compiled(fullgraph=False))
    assert torch.equal(found, generate(model, IDS, attention_mask=PADDING))
    assert counters["graph_break"]


# Kernels that follow a length on the device


@interpreter_test
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("tests", mostly_slow(["not slow", "slow"], "not slow"))
def test_in_the_interpreter(tests):
    passes_in_the_interpreter(__file__, "-m", tests, "-k", "device", timeout=1200, poison=True)


class Side:
    """One layer's keys in a buffer, a state over it, and the one that the host keeps of the same keys."""

    def __init__(self, config, B=2, padding=(0, 3), capacity=48, dtype=torch.float32):
        self.masker = MaskerRegistry.create_masker(fit(config, 4, 2, 16))
        self.keys, self.values = (normal(B, 2, capacity, 16, seed=seed, dtype=dtype) for seed in (1, 2))
        self.queries = normal(B, 4, 1, 16, dtype=dtype)
        self.mask, self.state = left_padding(capacity, *padding), StaticState(capacity)
        self.length = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def call(self, state, filled, whole=False):
        end = self.keys.shape[2] if whole else filled
        mask = (self.mask & (torch.arange(self.mask.shape[1], device=DEVICE) < filled))[:, None, None, :end]
        return make_call(
            self.queries, self.keys[:, :, :end], self.values[:, :, :end], [self.masker], mask, is_causal=False,
            layer_state=state, kernel="triton",
        )  # fmt: skip

    def read(self, filled):
        """As a prompt."""
        call = self.call(self.state, filled)
        self.state.hand_out([self.masker], 1, True)
        return call

    def step(self, filled):
        """As a captured step: nothing but tensors is known."""
        self.length.fill_(filled)
        state = CapturedState.over([self.masker], self.state.layout, self.state.memory, self.length)
        return self.call(state, filled, whole=True)

    def check(self, filled):
        """The tensors say what the host makes of the same keys, under the same codebooks."""
        fresh = LayerState()
        if self.masker.prepared:
            fresh._prepared = dict(self.state._prepared)
        expected = self.call(fresh, filled).side[-1]
        held = kept(self.state, self.masker)
        assert self.state.length == filled
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
        positions = self.state._positions.storage[:, 0]
        assert torch.equal(positions[:, :filled], fresh._positions.view()[:, 0])
        assert (positions[:, filled:] == -1).all()


@kernel_test
@pytest.mark.parametrize("name", DEFAULTS)
def test_side_data_follow_a_length_on_the_device(name):
    """Step by step, past keys that nobody saw, back over pages, and on."""
    side = Side(DEFAULTS[name])
    side.read(25)
    for filled in (26, 27, 28, 32, 33, 30, 31, 40):
        side.step(filled)
        side.check(filled)


@kernel_test
def test_positions_on_the_device_have_holes():
    """Padding on the right, and a sequence of which nothing is real yet."""
    side = Side(DEFAULTS["quest"], B=3, padding=(0, 20, 2))
    side.mask[2, 9:14] = False
    side.read(13)
    for filled in (14, 15, 16, 21, 22, 23):
        side.step(filled)
        side.check(filled)


@kernel_test
@pytest.mark.parametrize("gqa", mostly_slow(["head", "group"], "group"))
@pytest.mark.parametrize("name", DEFAULTS)
def test_attention_over_a_whole_buffer_on_the_device(name, gqa):
    """Budgets are shares of the valid length; the buffer's tail is never seen, whatever is in it."""
    from sah_transformers.attention import run

    side = Side({**DEFAULTS[name], "heavy_size": 0.3, "gqa": gqa})
    side.read(30)
    found = run(side.step(31))[0]
    side.keys[:, :, 31:] = float("nan")
    assert torch.equal(run(side.step(31))[0], found)
    fresh = LayerState()
    fresh._prepared = dict(side.state._prepared)
    truth = run(replace(side.call(fresh, 31), kernel="reference"))[0]
    assert (found - truth).abs().max() <= 2e-5 * truth.abs().max()


@kernel_test
@pytest.mark.parametrize("name", DEFAULTS)
def test_what_the_kernels_take_is_known_on_the_device(name, monkeypatch):
    """A compiled model's layer takes a step by kernels alone; with the reference it leaves the graph."""
    if not GPU:
        monkeypatch.setattr(operator, "CAPTURING", ("cpu",))
    masker = fit({**DEFAULTS[name], "heavy_size": 4}, 4, 2, 16)
    masker |= {"pq_bits": 1, "init_offset": 2} if name == "pq_cache" else {}
    for kernel in ("triton", "auto", "reference"):
        model = sparse({"maskers": [masker], "kernel": kernel, "prefill": "dense"}, dtype=torch.float32).to(DEVICE)
        cache = static(model)
        logits(model, IDS.to(DEVICE), attention_mask=PADDING.to(DEVICE), past_key_values=cache)
        assert all(layer.sah_state.captured == (kernel != "reference") for layer in cache.layers)
