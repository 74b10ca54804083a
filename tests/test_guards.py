"""Compiled decoding notices every change of the model between calls of `generate()`, and looks for them only then."""

import copy
import gc
import weakref

import pytest
import torch
from sparse_models import STACK, differ, left_padded, prompt, sparse
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation import CompileConfig

import sah_transformers
from sah_transformers.integration import guards
from sah_transformers.integration.guards import FILTER, MOST_CHANGES, ModelGuards

IDS, PADDING = left_padded([prompt(13), prompt(7, seed=1)])
QUEST = [{"type": "sink", "sink_size": 1}, {"type": "quest", "heavy_size": 4, "page_size": 2}]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(**settings):
    config = CompileConfig(**{"backend": "eager", "mode": None, **settings})
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def scores(model, **options):
    """Of the tokens that `generate` makes, ``[4, B, V]``."""
    out = model.generate(
        IDS, attention_mask=PADDING, max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits)


def run(model):
    return scores(model, **compiled())


def eager(model):
    return scores(model, cache_implementation="static", disable_compile=True)


def graphs():
    return counters["stats"]["unique_graphs"]


def kept_by(model, monkeypatch):
    """The guards of compiled code that stay, by (name, kind)."""
    found = []
    original = ModelGuards.keep

    def keep(self, entries):
        kept = original(self, entries)
        found.extend((one.name, one.guard_type) for one, is_kept in zip(entries, kept, strict=True) if is_kept)
        return kept

    monkeypatch.setattr(ModelGuards, "keep", keep)
    run(model)
    return found


@pytest.mark.core
def test_parameters_and_modules_are_not_looked_at_for_each_token(monkeypatch):
    model = sparse(QUEST)
    kept = kept_by(model, monkeypatch)
    kinds = {kind for name, kind in kept if name.startswith("self.")}
    assert not kinds & {"TENSOR_MATCH", "TYPE_MATCH", "SEQUENCE_LENGTH", "NOT_PRESENT_IN_GENERIC_DICT"}
    values = {name for name, kind in kept if name[:5] == "self." and kind in ("EQUALS_MATCH", "CONSTANT_MATCH")}
    assert len(values) == 1
    assert values.pop().endswith("['_sah_plan'].number")
    assert any("past_key_values" in name and kind == "TENSOR_MATCH" for name, kind in kept)
    with torch._dynamo.config.patch(error_on_recompile=True):
        right = eager(model)
        assert torch.equal(run(model), right)
        assert torch.equal(run(model), right)
    assert graphs() == 1


class Doubled(torch.nn.Module):
    def forward(self, hidden):
        return 2 * torch.nn.functional.silu(hidden)


def another_scaling(model):
    model.model.layers[1].self_attn.scaling *= 3


def another_epsilon(model):
    model.model.norm.variance_epsilon = 0.5


def another_module(model):
    model.model.layers[0].mlp.act_fn = Doubled()


def another_type(model):
    model.bfloat16()


def another_weight(model):
    layer = model.model.layers[1].mlp
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight.detach() * -2)


def one_layer_less(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def a_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def a_weight_without_strides(model):
    model.lm_head.weight = torch.nn.Parameter((model.lm_head.weight.detach() * 2).to_sparse_csr())


def another_forward(model):
    model.model.layers[1].mlp.forward = lambda hidden: hidden * 0.5


def another_stack(model):
    sah_transformers.enable(model, [{"type": "local", "window_size": 2}])


def dense(model):
    sah_transformers.disable(model)


CHANGES = [
    another_scaling, another_epsilon, another_module, another_type,
    pytest.param(another_weight, marks=pytest.mark.core), one_layer_less, a_hook, a_weight_without_strides,
    another_forward, pytest.param(another_stack, marks=pytest.mark.core), dense,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_noticed(change):
    model = sparse(STACK)
    before = run(model)
    assert torch.equal(before, eager(model))
    change(model)
    right = eager(model)
    assert differ(right, before)
    torch.testing.assert_close(run(model), right, rtol=1e-5, atol=1e-5)


class Perhaps(torch.nn.Module):
    """Multiplies by a factor, if it has one."""

    def forward(self, hidden):
        return hidden * self.factor if hasattr(self, "factor") else hidden


def test_an_attribute_that_was_missing():
    model = sparse(STACK)
    model.model.layers[0].mlp.act_fn = perhaps = Perhaps()
    assert torch.equal(run(model), eager(model))
    perhaps.factor = 3.0
    assert torch.equal(run(model), eager(model))


@pytest.mark.core
def test_side_data_after_a_change():
    model = sparse(QUEST)
    run(model)
    another_scaling(model)
    right = eager(model)
    for _ in range(2):
        assert torch.equal(run(model), right)


def test_the_users_own_compiled_code_checks_everything():
    model = sparse(STACK)
    run(model)
    another_scaling(model)
    with torch.no_grad():
        right = model(IDS[1:, 6:]).logits
        assert torch.equal(torch.compile(model, backend="aot_eager")(IDS[1:, 6:]).logits, right)


def test_a_change_that_is_undone():
    model = sparse(STACK)
    before = run(model)
    for change in (3.0, 1 / 3.0):
        model.model.layers[1].self_attn.scaling *= change
        assert torch.equal(run(model), eager(model))
    torch.testing.assert_close(run(model), before)


def test_models_of_one_class():
    one, other = sparse(STACK), sparse(STACK, seed=1)
    shorter = sparse(STACK, num_hidden_layers=1)
    twin = copy.deepcopy(one)
    for model in (one, other, shorter, twin, one, other):
        assert torch.equal(run(model), eager(model))
    another_scaling(twin)
    for model in (twin, one):
        assert torch.equal(run(model), eager(model))


@pytest.fixture
def _inductor_by_steps(monkeypatch):
    """The usual backend, equal for all models, without its compiler."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, graph, inputs: graph.forward)


@pytest.mark.core
@pytest.mark.usefixtures("_inductor_by_steps")
def test_models_that_share_layers():
    one, other = sparse(STACK), sparse(STACK)
    other.model, other.lm_head.weight = one.model, torch.nn.Parameter(one.lm_head.weight.detach().clone())
    other.lm_head.bias = torch.nn.Parameter(torch.linspace(-9, 9, 96, dtype=torch.float64))
    last = copy.copy(other)
    last._modules = {**other._modules, "lm_head": one.lm_head}
    usual = compiled(backend="inductor")
    for model in (one, other, one, other):
        assert torch.equal(scores(model, **usual), eager(model))
    del one, other
    gc.collect()
    assert torch.equal(scores(last, **usual), eager(last))


@pytest.mark.usefixtures("_inductor_by_steps")
def test_models_that_come_to_share_layers():
    one, other = sparse(STACK, num_hidden_layers=1), sparse(STACK, num_hidden_layers=1)
    other.lm_head.bias = torch.nn.Parameter(torch.linspace(-9, 9, 96, dtype=torch.float64))
    usual = compiled(backend="inductor")
    for model in (one, other):
        assert torch.equal(scores(model, **usual), eager(model))
    other.model = one.model
    for model in (one, other, one):
        assert torch.equal(scores(model, **usual), eager(model))


def test_a_change_of_the_model_is_none_of_its_plans():
    """So that what the model does does not depend on what it was compiled for before."""
    model = sparse({"maskers": STACK, "dense_layers": [-1]}, num_hidden_layers=3)
    run(model)
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    right = eager(model)
    assert torch.equal(run(model), right)
    assert torch.equal(eager(model), right)


class Factor(torch.nn.Module):
    """Depends on the last prompt's length, where that is not given."""

    def __init__(self, factor=None):
        super().__init__()
        self.factor, self.given = factor, factor is not None

    def forward(self, hidden):
        if not self.given and hidden.shape[1] > 1:
            self.factor = "long" if hidden.shape[1] > 9 else "short"
        return hidden * {"long": 2, "short": 1}[self.factor]


@pytest.mark.core
def test_a_model_that_a_prompt_changes():
    model = sparse(STACK)
    model.model.layers[0].mlp.act_fn = Factor()
    for length in (13, 5, 13):
        ids = prompt(length)
        options = {"max_new_tokens": 17 - length, "do_sample": False, "output_logits": True}
        options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
        static = {"cache_implementation": "static", "disable_compile": True}
        got = torch.stack(model.generate(ids, **options, **compiled()).logits)
        assert torch.equal(got, torch.stack(model.generate(ids, **options, **static).logits))


class Switch:
    """A streamer that changes the model and has it compiled again."""

    def __init__(self, module):
        self.module, self.tokens = module, 0

    def put(self, tokens):
        self.tokens += 1
        if self.tokens == 3:
            self.module.factor = "long"
            torch.use_deterministic_algorithms(True)

    def end(self):
        torch.use_deterministic_algorithms(False)


def test_a_change_that_only_later_code_knows_of():
    model = sparse(STACK)
    model.model.layers[0].mlp.act_fn = factor = Factor("short")
    ids = prompt(13)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for streamer in (None, Switch(factor)):
        model.generate(ids, streamer=streamer, **options, **compiled())
    static = {"cache_implementation": "static", "disable_compile": True}
    right = torch.stack(model.generate(ids, **options, **static).logits)
    assert torch.equal(torch.stack(model.generate(ids, **options, **compiled()).logits), right)


class Counting(torch.nn.Module):
    """Not the same function twice."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden):
        self.calls += 1
        return hidden * self.calls


def test_a_model_that_changes_itself():
    model = sparse(STACK)
    model.model.layers[0].mlp.act_fn = counting = Counting()
    right = eager(model)
    for _ in range(2):
        counting.calls = 0
        torch.testing.assert_close(run(model), right)


def test_a_model_that_changes_between_all_calls(monkeypatch):
    model = sparse(STACK)
    for i in range(MOST_CHANGES + 2):
        model.model.norm.variance_epsilon = 0.1 * (i + 1)
        assert torch.equal(run(model), eager(model))
    asked = []
    monkeypatch.setattr(ModelGuards, "keep", lambda self, entries: asked.append(1) or [True] * len(entries))
    model.model.norm.variance_epsilon = 7.0
    assert torch.equal(run(model), eager(model))
    assert not asked


@pytest.mark.core
def test_configurations_are_no_changes_of_the_model():
    model = sparse(STACK)
    for size in range(1, MOST_CHANGES + 3):
        torch.compiler.reset()
        sah_transformers.enable(model, [{"type": "local", "window_size": size}])
        assert torch.equal(run(model), eager(model))
    assert FILTER in model._last_compile_config.options


@pytest.mark.core
def test_the_users_filter_and_mode_stay():
    model = sparse(STACK)
    asked = []

    def own(entries):
        asked.append(len(entries))
        return [True] * len(entries)

    config = CompileConfig(backend="aot_eager", mode=None, options={FILTER: own})
    got = []
    guards.once_per_call(got.append, model, config)
    other = CompileConfig(backend="aot_eager", mode="default")
    guards.once_per_call(got.append, model, other)
    assert got == [config, other]
    usual = []
    guards.once_per_call(usual.append, model, CompileConfig())
    (settings,) = usual
    assert settings.mode is None
    assert settings.options.pop(FILTER)
    plain = torch._inductor.list_mode_options("reduce-overhead")
    assert plain.items() < settings.options.items()  # another backend to PyTorch, which shares code between equal ones
    assert settings.options == {**plain, "triton.cudagraph_trees": True}


@pytest.mark.core
def test_a_dense_model_is_compiled_as_ever(monkeypatch):
    model = sah_transformers.disable(sparse(STACK))
    monkeypatch.setattr(guards, "once_per_call", None)
    assert torch.equal(run(model), eager(model))


class Owner:
    pass


@pytest.mark.core
def test_nothing_of_a_call_is_held_on_to():
    """PyTorch evaluates what a guard is about, and keeps the owner of an attribute that is not there."""
    names = torch._dynamo.guards._get_closure_vars()
    model = sparse(QUEST)
    owner = Owner()
    names["tmp"] = names["tmp0"] = owner
    run(model)
    assert not [name for name in names if name.startswith("tmp")]
    cache = StaticCache(config=model.config, max_cache_len=32)
    scores(model, **{**compiled(), "cache_implementation": None}, past_key_values=cache)
    gone = weakref.ref(cache.layers[0].keys)
    del cache
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
