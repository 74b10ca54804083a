"""The cache that appends in place holds what a DynamicCache holds, whatever is done to either, and copies nothing."""

import copy
import io
import pickle
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import STACK, build, generate, left_padded, logits, prompt, sparse
from tiny_models import tiny
from torch.autograd import forward_ad
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer

import sah_transformers
from sah_transformers import AppendingCache
from sah_transformers.integration import cache as module
from sah_transformers.integration.cache import AppendingLayer, append_in_place

pytestmark = pytest.mark.core

IDS = prompt(13)
QUEST = [{"type": "sink", "sink_size": 1}, {"type": "quest", "heavy_size": 4, "page_size": 2}]


def states(new, batch=2, heads=2, dim=4, value_dim=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, new, d, generator=generator).to(dtype) for d in (dim, value_dim)]


def same(ours, theirs):
    """Whether two caches hold equal keys and values and say the same of themselves."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == theirs.get_max_length()
    assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
    assert ours.is_compileable == theirs.is_compileable
    assert len(ours) == len(theirs)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        held = getattr(other, "keys", None)
        if held is not None and held.numel():
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)


OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 5)),
    st.tuples(st.just("crop"), st.integers(0, 4)),
    st.tuples(st.just("reorder"), st.integers(0, 3)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("select"), st.integers(1, 2)),
    st.tuples(st.just("assign"), st.just(0)),
    st.tuples(st.just("deepcopy"), st.just(0)),
    st.tuples(st.just("pickle"), st.just(0)),
    st.tuples(st.just("shallow copy"), st.integers(1, 3)),
)


def apply(cache, name, number, seed):
    """The cache after an operation; a shallow copy goes its own way from here."""
    batch = cache.layers[0].keys.shape[0]
    if name == "update":
        cache.update(*states(number, batch, seed=seed), 0)
    elif name == "crop":
        cache.crop(-min(number, cache.get_seq_length() - 1))
    elif name == "reorder":
        cache.reorder_cache((torch.arange(batch) + number) % batch)
    elif name == "repeat" and batch < 8:
        cache.batch_repeat_interleave(number)
    elif name == "select":
        cache.batch_select_indices(torch.arange(min(number, batch)))
    elif name == "assign":
        cache.layers[0].keys = cache.layers[0].keys[:, :, 1:].clone()
        cache.layers[0].values = cache.layers[0].values[:, :, 1:]
        if not cache.get_seq_length():
            cache.update(*states(1, batch, seed=seed), 0)
    elif name == "deepcopy":
        return copy.deepcopy(cache)
    elif name == "pickle":
        return pickle.loads(pickle.dumps(cache))
    elif name == "shallow copy":
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        other.update(*states(number, batch, seed=seed + 1000), 0)
    return cache


@settings(deadline=None, max_examples=60)
@given(st.lists(OPERATIONS, max_size=14), st.sampled_from([None, 4, 30]))
def test_a_dynamic_cache_in_all_but_speed(operations, most):
    """And no tensor that the cache ever gave out changes afterwards."""
    ours, theirs = AppendingCache(max_length=most), DynamicCache()
    given_out = []
    for cache in (ours, theirs):
        cache.update(*states(3), 0)
    for seed, (name, number) in enumerate(operations):
        for tensor in (ours.layers[0].keys, ours.layers[0].values):
            given_out.append((tensor, tensor.clone()))
        ours, theirs = apply(ours, name, number, seed), apply(theirs, name, number, seed)
        same(ours, theirs)
    for tensor, before in given_out:
        assert torch.equal(tensor, before)


def test_nothing_is_copied_while_there_is_room():
    cache = AppendingCache()
    cache.update(*states(200), 0)
    places = {cache.update(*states(1, seed=i), 0)[0].data_ptr() for i in range(20)}
    assert len(places) == 1
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.stride(-1) == values.stride(-1) == 1
    assert keys.shape == (2, 2, 220, 4)


def test_cropping_and_appending_copies_nothing_unless_somebody_looks():
    cache = AppendingCache()
    place = cache.update(*states(200), 0)[0].data_ptr()
    for i in range(5):
        cache.update(*states(3, seed=i), 0)
        cache.crop(-2)
    assert cache.layers[0].keys.data_ptr() == place
    keys, _ = cache.update(*states(3), 0)
    before = keys.clone()
    cache.crop(-2)
    cache.update(*states(3, seed=9), 0)
    assert torch.equal(keys, before)
    assert cache.layers[0].keys.data_ptr() != place


@pytest.mark.parametrize("most", [None, 1020, 1100, 4000])
def test_spare_room_is_at_most_an_eighth(most):
    cache = AppendingCache(max_length=most)
    cache.update(*states(1000, batch=1), 0)
    for i in range(400):
        cache.update(*states(1, batch=1, seed=i), 0)
        for room in (cache.layers[0].key_room, cache.layers[0].value_room):
            length, capacity = cache.get_seq_length(), room.buffer.shape[2]
            assert length <= capacity <= length * 1.125 + 16
            if most is not None and length <= most:
                assert capacity <= most


def test_sequences_that_end_as_foreseen_are_never_copied():
    cache = AppendingCache(max_length=1100)
    places = {cache.update(*states(n, batch=1), 0)[0].data_ptr() for n in [1000] + [1] * 100}
    assert len(places) == 1
    assert cache.layers[0].key_room.buffer.shape[2] == 1100


def test_where_pytorch_does_not_count_views(monkeypatch):
    monkeypatch.setattr(module, "_ALONE", 0)
    ours, theirs = AppendingCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*states(20), 0)
        cache.crop(-5)
        cache.update(*states(2, seed=1), 0)
    same(ours, theirs)


def test_gradients_reach_every_key():
    """With gradients keys are concatenated; a frozen past is not disturbed by what is appended later."""
    ours, theirs = AppendingCache(), DynamicCache()
    results = []
    for cache in (ours, theirs):
        first, second = states(4)[0].requires_grad_(), states(2, seed=1)[0].requires_grad_()
        cache.update(first, first[..., :3], 0)
        keys, _ = cache.update(second, second[..., :3], 0)
        keys.square().sum().backward()
        results.append((first.grad, second.grad))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)

    cache = AppendingCache()
    weight = torch.ones(4, requires_grad=True)
    loss = 0
    for i in range(3):
        keys, _ = cache.update(*states(2, seed=i), 0)
        loss = loss + (keys * weight).square().sum()
    loss.backward()
    assert weight.grad.isfinite().all()


def _transformed(name, kind):
    """What of a cache's keys goes through a transform of ``torch.func``, or forward-mode differentiation."""

    def keys(tensor):
        cache = kind()
        for part in (tensor[:3].detach(), tensor[3:4], tensor[4:]):
            held, _ = cache.update(part[None, None], part[None, None], 0)
        return held

    tensor = states(6, batch=1, heads=1)[0][0, 0]
    if name == "vmap":
        return torch.vmap(keys)(torch.stack([tensor, 2 * tensor]))
    if name == "grad":
        return torch.func.grad(lambda t: keys(t).square().sum())(tensor)
    if name == "jvp":
        return torch.func.jvp(keys, (tensor,), (tensor,))[1]
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(keys(forward_ad.make_dual(tensor, 3 * tensor))).tangent


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "dual numbers"])
def test_what_goes_through_transforms_of_torch(name):
    found, wanted = (_transformed(name, kind) for kind in (AppendingCache, DynamicCache))
    assert wanted.abs().sum() > 0
    assert torch.equal(found, wanted)


def test_a_slice_of_the_batch_is_no_copy_to_write_into():
    ours, theirs = AppendingCache(), DynamicCache()
    given_out = []
    for cache in (ours, theirs):
        keys, _ = cache.update(*states(10, batch=4), 0)
        given_out.append((keys, keys.clone()))
        cache.crop(-4)
        cache.batch_select_indices(slice(1, 3))
        cache.update(*states(3, seed=1), 0)
    same(ours, theirs)
    for keys, before in given_out:
        assert torch.equal(keys, before)


def test_copies_of_a_layer_append_in_threads(monkeypatch):
    """Both see room behind the rows that they share; one of them has to copy."""
    original = module.Room.takes

    def slowly(room, length, new):
        taken = original(room, length, new)
        time.sleep(0.02)
        return taken

    monkeypatch.setattr(module.Room, "takes", slowly)
    cache = AppendingCache()
    cache.update(*states(100), 0)
    copies = [copy.copy(cache.layers[0]) for _ in range(3)]
    news = [states(2, seed=seed) for seed in range(3)]
    threads = [threading.Thread(target=layer.update, args=new) for layer, new in zip(copies, news, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer, (keys, values) in zip(copies, news, strict=True):
        assert torch.equal(layer.keys[:, :, 100:], keys)
        assert torch.equal(layer.values[:, :, 100:], values)


def test_values_without_channels():
    ours, theirs = AppendingCache(), DynamicCache()
    for cache in (ours, theirs):
        for seed in range(3):
            cache.update(*states(2, value_dim=0, seed=seed), 0)
    same(ours, theirs)
    assert ours.layers[0].values.shape == theirs.layers[0].values.shape


def test_inference_mode_and_out_of_it():
    ours, theirs = AppendingCache(), DynamicCache()
    for cache in (ours, theirs):
        with torch.inference_mode():
            cache.update(*states(5), 0)
        cache.update(*states(2, seed=1), 0)
        with torch.inference_mode():
            cache.update(*states(1, seed=2), 0)
    same(ours, theirs)


def test_what_does_not_fit_is_refused_or_promoted_as_by_a_dynamic_cache():
    ours, theirs = AppendingCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*states(5), 0)
        with pytest.raises(RuntimeError, match="size"):
            cache.update(*states(1, batch=3), 0)
        cache.update(*states(1, dtype=torch.float64), 0)
        cache.update(*states(1, dtype=torch.float64, seed=1), 0)
    same(ours, theirs)
    assert ours.layers[0].keys.dtype == torch.float64


def test_reset_starts_over_as_in_this_version():
    ours, theirs = AppendingCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*states(5), 0)
        cache.reset()
        cache.update(*states(3, seed=1), 0)
    same(ours, theirs)


def test_offloading_gives_the_room_up():
    cache, truth = AppendingCache(), DynamicCache()
    for one in (cache, truth):
        one.update(*states(5), 0)
        one.layers[0].offload()
        one.layers[0].prefetch()
        one.update(*states(1, seed=1), 0)
    same(cache, truth)


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "JambaForCausalLM", "FalconH1ForCausalLM", "LlamaForCausalLM"])
def test_only_full_attention_layers_are_replaced(name):
    config = tiny(name).config
    ours, theirs = AppendingCache(config=config), DynamicCache(config=config)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is (AppendingLayer if type(other) is DynamicLayer else type(other))
    assert isinstance(ours, DynamicCache)


def test_nothing_of_transformers_own_caches_changes():
    assert type(DynamicCache(config=tiny("LlamaForCausalLM").config).layers[0]) is DynamicLayer


def test_a_filled_cache_is_turned():
    cache = DynamicCache()
    cache.update(*states(5), 0)
    append_in_place(cache)
    truth = DynamicCache()
    for one in (cache, truth):
        if one is truth:
            one.update(*states(5), 0)
        one.update(*states(2, seed=1), 0)
        one.update(*states(2, seed=1), 1)
    same(cache, truth)
    assert isinstance(cache.layers[1], AppendingLayer)


# In models


def kinds_seen(model):
    """Collects the class of every cache that the model is called with."""
    seen = set()

    def look(_, args, kwargs):
        seen.add(type(kwargs.get("past_key_values")))

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_generate_takes_it_where_it_may_choose():
    model = sparse()
    seen = kinds_seen(model)
    generate(model, IDS)
    assert seen == {AppendingCache}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (lambda model: {"past_key_values": DynamicCache(config=model.config)}, DynamicCache),
        (lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=40)}, StaticCache),
        (lambda model: {"cache_implementation": "dynamic"}, DynamicCache),
        (lambda model: {"cache_implementation": "static"}, StaticCache),
        (lambda model: {"use_cache": False}, type(None)),
    ],
    ids=["dynamic cache", "static cache", "dynamic", "static", "none"],
)
def test_what_the_user_chose_is_respected(options, kind):
    model = sparse()
    seen = kinds_seen(model)
    generate(model, IDS, **options(model))
    assert seen == {kind}


def test_dense_models_keep_theirs():
    model = build()
    seen = kinds_seen(model)
    generate(model, IDS)
    sah_transformers.disable(sah_transformers.enable(model, STACK))
    generate(model, IDS)
    assert seen == {DynamicCache}


def test_room_for_what_generate_may_add():
    model = sparse()
    out = model.generate(prompt(200), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].key_room.buffer.shape[2] == 208  # the last token is never put on the cache


def test_an_encoder_decoders_cache():
    cache = EncoderDecoderCache(AppendingCache(), AppendingCache())
    cache.self_attention_cache.update(*states(3), 0)
    cache.crop(-1)
    assert cache.get_seq_length() == 2


MODELS = {
    "llama": ("LlamaForCausalLM", STACK),
    "llama quest": ("LlamaForCausalLM", QUEST),
    "qwen3": ("Qwen3ForCausalLM", STACK),
    "gemma3": ("Gemma3ForCausalLM", STACK),
    "gemma3n": ("Gemma3nForCausalLM", STACK),
    "deepseek v3": ("DeepseekV3ForCausalLM", STACK),
    "deepseek v32": ("DeepseekV32ForCausalLM", STACK),
    "jamba": ("JambaForCausalLM", STACK),
    "falcon h1": ("FalconH1ForCausalLM", STACK),
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
REPEATING = torch.cat([prompt(6), prompt(6), prompt(3)], dim=1)  # something to look up


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_bit_for_bit_those_with_a_dynamic_cache(name, mode):
    kind, stack = MODELS[name]
    ids, padding = (REPEATING, None) if mode == "prompt lookup" else left_padded([prompt(13), prompt(6, seed=1)])
    if name in ("jamba", "falcon h1") and mode in ("chunked prefill", "prompt lookup"):
        pytest.skip("Transformers does not offer it for models with a recurrent state")
    dtype = torch.float32 if name in ("jamba", "deepseek v32") else torch.float64  # experts are multiplied in float32
    answers = []
    for options in ({}, {"cache_implementation": "dynamic"}):
        model = sparse(stack, name=kind, dtype=dtype)
        torch.manual_seed(0)
        mask = torch.ones_like(ids) if padding is None else padding
        answers.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=9, **{"do_sample": False, **MODES[mode]}, **options,
                return_dict_in_generate=True, output_logits=True,
            )
        )  # fmt: skip
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for ours, theirs in zip(answers[0].logits, answers[1].logits, strict=True):
        assert torch.equal(ours, theirs)
    same(answers[0].past_key_values, answers[1].past_key_values)


@pytest.mark.parametrize("stack", [STACK, QUEST], ids=["top-k", "quest"])
def test_an_assistant_whose_guesses_are_cropped(stack):
    model, assistant = sparse(stack), sparse(stack)
    for parameter in assistant.model.layers[1].mlp.parameters():
        parameter.data.mul_(0.7)
    seen = kinds_seen(model) | kinds_seen(assistant)
    crops = []
    original = AppendingCache.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AppendingCache, "crop", lambda self, n: (crops.append(n), original(self, n)))
        answer = generate(model, IDS, new=16, assistant_model=assistant)
    assert any(crops)
    assert seen <= {AppendingCache}
    assert torch.equal(answer, generate(sparse(stack), IDS, new=16, cache_implementation="dynamic"))


def test_a_prefix_that_is_copied_for_each_continuation():
    model = sparse(QUEST)
    prefix = AppendingCache(config=model.config)
    logits(model, IDS, past_key_values=prefix)
    before = copy.deepcopy(prefix)
    for seed in (1, 2):
        ids = torch.cat([IDS, prompt(3, seed=seed)], 1)
        found = generate(model, ids, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(found, generate(model, ids, past_key_values=DynamicCache(config=model.config)))
    same(prefix, before)


def test_saved_with_torch():
    cache = AppendingCache()
    cache.update(*states(5), 0)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    same(other, cache)
    other.update(*states(1), 0)
    assert cache.get_seq_length() == 5


def test_a_failed_call_leaves_it_usable(monkeypatch):
    from sah_transformers.integration import attention_function

    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    model = sparse()
    cache = AppendingCache(config=model.config)
    logits(model, IDS, past_key_values=cache)
    before = copy.deepcopy(cache)
    with monkeypatch.context() as patch:
        patch.setattr(attention_function, "run", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            logits(model, prompt(2), past_key_values=cache)
    same(cache, before)
    ids = torch.cat([IDS, prompt(2, seed=5)], 1)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
