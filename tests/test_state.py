"""Side data per key: at every call of every kind of generation, what `append` stored is what the cache's keys say."""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from sparse_models import build, by_position, generate, left_padded, logits, operate, prompt, selections, sparse
from transformers import DynamicCache, StaticCache

import sah_transformers
from sah_transformers import MaskerRegistry, State, TopKMasker, TopKMaskerConfig, sparse_attention
from sah_transformers.maskers.top_k import by_group

pytestmark = pytest.mark.core


def reset_drops():
    """Whether a DynamicCache is empty after `reset`; in Transformers 5.17 it keeps its length, full of zeros."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.reset()
    return cache.get_seq_length() == 0


RESET_DROPS = reset_drops()
KEPT = "this Transformers' DynamicCache.reset keeps the length"

FAR = 1e-9


@dataclass(frozen=True)
class SketchConfig(TopKMaskerConfig):
    """Ranks keys by their first `width` channels and by their position modulo 3."""

    type: ClassVar[str] = "sketch"
    width: int = 5


class Sketch(TopKMasker):
    """Keeps the first channels of each key, per KV head, and its position. Not a dataclass: pickled by name."""

    calls: ClassVar[list] = []
    fail_at: ClassVar[int | None] = None

    def append(self, keys, values, ctx):
        positions = ctx.positions[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
        return {"sketch": sketch(keys, self.config.width), "position": positions.clone()}

    def score(self, queries, keys, values, ctx):
        """Checks that the side data fit the keys before using them."""
        kept, positions = ctx.side["sketch"], ctx.side["position"]
        assert kept.shape[:3] == keys.shape[:3]
        real = (ctx.positions >= 0)[:, None, :, None]
        if queries.dtype != torch.float64 or kept.dtype == torch.float64:
            fresh = sketch(keys.to(kept.dtype), self.config.width)
            assert (kept - fresh).masked_fill(~real, 0).abs().max() < 1e-4 * (1 + fresh.abs().max()), "stale side data"
        assert torch.equal(positions[:, 0, :, 0], ctx.positions), "stale positions"
        Sketch.calls.append((ctx.layer_idx, keys.shape[2]))
        if Sketch.fail_at is not None and len(Sketch.calls) >= Sketch.fail_at:
            raise RuntimeError("no luck")
        folded = by_group(queries[..., : self.config.width], keys.shape[1])
        scores = torch.einsum("bghqd,bgkd->bghqk", folded.to(kept.dtype), kept).flatten(1, 2)
        return scores.float() + positions[:, :1, None, :, 0].remainder(3).float()


def sketch(keys, width):
    return keys[..., :width] * 2


@pytest.fixture(autouse=True)
def _registered():
    MaskerRegistry.register(SketchConfig)(Sketch)
    Sketch.calls, Sketch.fail_at = [], None


CONFIG = [{"type": "sink", "sink_size": 1}, {"type": "sketch", "heavy_size": 4}]
IDS = prompt(13)


def alone(ids, new=8, config=CONFIG, **options):
    """The truth of a generation: every step a forward call without a cache, hence without stored side data."""
    return generate(sparse(config, **options), ids, new=new, use_cache=False)


def test_the_toy_matters():
    assert not torch.equal(alone(IDS), generate(build(), IDS))


def test_its_selection_is_what_it_says():
    """Against a loop over rows: top-k of the sketch's score among the visible keys that the sink left."""
    model = sparse(CONFIG)
    seen = {}

    def remember(module, args, kwargs, output):
        seen["hidden"] = kwargs["hidden_states"]

    handle = model.model.layers[0].self_attn.register_forward_hook(remember, with_kwargs=True)
    with selections() as log:
        logits(model, IDS)
    handle.remove()
    attention = model.model.layers[0].self_attn
    hidden = seen["hidden"]
    q = attention.q_proj(hidden).view(1, 13, 4, 16).transpose(1, 2)
    k = attention.k_proj(hidden).view(1, 13, 2, 16).transpose(1, 2)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = model.model.rotary_emb(hidden, torch.arange(13)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    for head in range(4):
        for row in range(13):
            score = (k[0, head // 2, : row + 1, :5] * 2 @ q[0, head, row, :5]) + torch.arange(row + 1) % 3
            best = {0, *sorted(range(1, row + 1), key=lambda j, s=score: -s[j].item())[:4]}
            assert set(log[0].mask[0, head, row].nonzero().flatten().tolist()) == best


MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunks of one": {"prefill_chunk_size": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "other"},
    "offloaded": {"cache_implementation": "offloaded"},
}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_generates_what_no_cache_generates(mode, name):
    model, ids = sparse(CONFIG, name=name), prompt(13)
    if mode.get("prompt_lookup_num_tokens"):
        ids = torch.cat([prompt(5), prompt(5), prompt(3)], dim=1)  # repeats itself: there is something to look up
    if mode.get("assistant_model"):
        mode = {"assistant_model": sparse(CONFIG, name=name, seed=3)}
        mode["assistant_model"].load_state_dict(model.state_dict())
        for parameter in mode["assistant_model"].model.layers[1].mlp.parameters():
            parameter.data.mul_(0.7)  # right often, not always: some guesses are cropped
    if mode.get("cache_implementation") == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("needs an accelerator")
    assert torch.equal(generate(model, ids, **mode), alone(ids, name=name))
    assert len(Sketch.calls) > 4


def test_left_padded_batches():
    prompts = [prompt(n, seed=n) for n in (13, 5, 9)]
    ids, mask = left_padded(prompts)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        together = generate(sparse(CONFIG), ids, attention_mask=mask, **options)
        for row, one in zip(together, prompts, strict=True):
            assert torch.equal(row[None], alone(one)), options


@pytest.mark.parametrize("padded", [False, True])
def test_beams(padded):
    """Many reorders; the toy's own check compares the side data with the keys at each call."""
    ids, mask = left_padded([prompt(n, seed=n) for n in (13, 8)]) if padded else (prompt(13, batch=2), None)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"num_beams": 4, "attention_mask": mask, "new": 12}
    reorders = []
    model = sparse(CONFIG)
    original = sah_transformers.state.LayerState.reorder
    try:
        sah_transformers.state.LayerState.reorder = lambda self, i: (reorders.append(i), original(self, i))[1]
        cached = generate(model, ids, **options)
    finally:
        sah_transformers.state.LayerState.reorder = original
    assert sum(not torch.equal(i, torch.arange(len(i))) for i in reorders) > 4, "no beam was ever reordered"
    assert torch.equal(cached, generate(sparse(CONFIG), ids, use_cache=False, **options))


def test_sampling_several_sequences():
    options = {"do_sample": True, "num_return_sequences": 3}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(sparse(CONFIG), IDS, use_cache=use_cache, **options))
    assert torch.equal(*results)


def feed(model, ids, cache, **options):
    return logits(model, ids, past_key_values=cache, **options)


def same(a, b):
    return (a - b).abs().max().item() < FAR


@pytest.mark.parametrize("prefill", ["same", "dense", "another stack"])
def test_a_prefix_with_two_continuations(prefill):
    """A deep copy of a cache takes its side data along, and the two do not share them."""
    stack = [{"type": "local", "window_size": 2}, {"type": "sketch", "heavy_size": 2, "width": 3}]
    config = {"maskers": CONFIG, "prefill": stack if prefill == "another stack" else prefill}
    model, prefix = sparse(config), DynamicCache()
    feed(model, IDS, prefix)
    feed(model, prompt(1, seed=9), prefix)
    one, other = copy.deepcopy(prefix), copy.deepcopy(prefix)
    ends = [prompt(4, seed=s) for s in (1, 2)]
    results = [feed(model, ids, c) for c, ids in zip((one, other), ends, strict=True)]
    results = [torch.cat([r, feed(model, prompt(1, seed=5), c)], 1) for r, c in zip(results, (one, other), strict=True)]
    again = torch.cat([feed(model, ends[0], prefix), feed(model, prompt(1, seed=5), prefix)], 1)
    assert same(again, results[0])
    for end, result in zip(ends, results, strict=True):
        fresh = DynamicCache()
        for ids in (IDS, prompt(1, seed=9)):
            feed(model, ids, fresh)
        assert same(torch.cat([feed(model, end, fresh), feed(model, prompt(1, seed=5), fresh)], 1), result)


OPERATIONS = {
    "crop": (lambda c: c.crop(-6), lambda ids: ids[:, :-6]),
    "crop everything": (lambda c: c.crop(-13), lambda ids: ids[:, :0]),
    "crop twice": (lambda c: (c.crop(-2), c.crop(-3)), lambda ids: ids[:, :-5]),
    "select": (lambda c: c.batch_select_indices(torch.tensor([2, 0])), lambda ids: ids[[2, 0]]),
    "select as many": (lambda c: c.batch_select_indices(torch.tensor([2, 0, 0])), lambda ids: ids[[2, 0, 0]]),
    "select one": (lambda c: c.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), lambda ids: ids[[1, 1, 0]]),
    "reset": (lambda c: c.reset(), lambda ids: ids[:, :0]),
    "repeat, select, crop": (
        lambda c: (c.batch_repeat_interleave(2), c.batch_select_indices(torch.tensor([4, 1, 2])), c.crop(-3)),
        lambda ids: ids.repeat_interleave(2, 0)[[4, 1, 2]][:, :-3],
    ),
}


# Seen from the shapes alone, when someone changed the tensors without the cache's methods.
SHAPES_TELL = ("crop", "crop everything", "crop twice", "select", "select one", "repeat")


@pytest.mark.parametrize(
    ("case", "past"), [*((n, False) for n in OPERATIONS), *((n, True) for n in SHAPES_TELL)], ids=str
)
def test_cache_operations(case, past):
    """Followed through the cache's methods, and caught up where they were bypassed."""
    if case == "reset" and not RESET_DROPS:
        pytest.skip(KEPT)
    operation, on_ids = OPERATIONS[case]
    model, ids, cache = sparse(CONFIG), prompt(13, batch=3), DynamicCache()
    feed(model, ids, cache)
    operate(cache, operation, past)
    kept = on_ids(ids)
    more = prompt(3, batch=kept.shape[0], seed=4)
    fresh = DynamicCache()
    if kept.shape[1]:
        feed(model, kept, fresh)
    for new in (more[:, :2], more[:, 2:]):
        assert same(feed(model, new, cache), feed(model, new, fresh))


@pytest.mark.skipif(not RESET_DROPS, reason=KEPT)
def test_a_second_sequence_of_equal_length():
    """The same cache object reset, or another one: nothing of the first sequence is left."""
    model, cache = sparse(CONFIG), DynamicCache()
    feed(model, IDS, cache)
    cache.reset()
    second = prompt(13, seed=1)
    truth = logits(sparse(CONFIG), second)
    assert same(feed(model, second, cache), truth)
    assert same(feed(model, second, DynamicCache()), truth)


def test_static_caches_by_hand():
    model = sparse(CONFIG)
    static = StaticCache(config=model.config, max_cache_len=32)
    dynamic = DynamicCache()
    for round_ in range(2):
        for ids in (IDS, prompt(1, seed=1), prompt(5, seed=2), prompt(1, seed=3)):
            assert same(feed(model, ids, static), feed(model, ids, dynamic)), round_
        static.reset()
        dynamic = DynamicCache()


def test_a_prefilled_cache_continued_with_a_question():
    model = sparse({"maskers": CONFIG, "prefill": "dense"})
    cache = DynamicCache()
    feed(model, IDS, cache)
    question = prompt(4, seed=1)
    both = torch.cat([IDS, question], dim=1)
    answer = generate(model, both, past_key_values=cache)
    cache = DynamicCache()
    feed(model, IDS, cache)
    step, out = feed(model, question, cache)[:, -1:], []
    for _ in range(8):
        for layer in cache.layers:  # the truth keeps no side data at all
            layer.__dict__.pop("sah_state", None)
            layer.__class__ = next(c for c in type(layer).__mro__ if not c.__name__.startswith("Sah"))
        out.append(step.argmax(-1))
        step = feed(model, out[-1], cache)
    assert torch.equal(answer, torch.cat(out, 1))


@pytest.mark.parametrize("how", ["pickle", "torch.save", "copy.deepcopy"])
def test_caches_with_side_data_can_be_stored(how):
    model, cache = sparse(CONFIG), DynamicCache()
    feed(model, IDS, cache)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(cache)
    more = prompt(2, seed=1)
    assert other.layers[0].sah_state.length == 13
    assert same(feed(model, more, other), feed(model, more, cache))


def test_side_data_are_computed_once_per_key():
    """The work per step does not grow with old keys: `append` sees each key of each layer once."""
    seen = []
    original = Sketch.append

    def counted(self, keys, values, ctx):
        seen.append(keys.shape[2])
        return original(self, keys, values, ctx)

    Sketch.append = counted
    try:
        generate(sparse(CONFIG), IDS, new=6)
    finally:
        Sketch.append = original
    assert sum(seen) == 2 * (13 + 5)


def test_the_same_masker_twice_in_a_stack():
    config = [*CONFIG, {"type": "local", "window_size": 2}, CONFIG[1]]
    model = sparse(config)
    assert torch.equal(generate(model, IDS), alone(IDS, config=config))
    cache = DynamicCache()
    feed(model, IDS, cache)
    side = cache.layers[0].sah_state.side(MaskerRegistry.create_masker(CONFIG[1]))
    assert {data.shape[2] for data in side.values()} == {13}


def test_configs_that_only_compare_equal_do_not_share(monkeypatch):
    """1 == 1.0 in Python: two maskers whose fields differ only so still have side data of their own length."""
    config = [{"type": "sketch", "heavy_size": 1}, {"type": "sketch", "heavy_size": 1.0}]
    assert torch.equal(generate(sparse(config), IDS), alone(IDS, config=config))


def test_several_maskers_with_side_data():
    config = [*CONFIG, {"type": "sketch", "heavy_size": 0.3, "width": 2}]
    prompts = [prompt(n, seed=n) for n in (13, 7)]
    ids, mask = left_padded(prompts)
    together = generate(sparse(config), ids, attention_mask=mask)
    for row, one in zip(together, prompts, strict=True):
        assert torch.equal(row[None], alone(one, config=config))


def test_save_and_reload(tmp_path):
    model = sparse(CONFIG)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    again.generation_config.update(eos_token_id=None)
    assert torch.equal(generate(again, IDS), generate(model, IDS))
    assert again.config.sparse_attention["maskers"][1]["width"] == 5


# Failures inside a forward call


def caches(name):
    config = build(name).config
    yield "dynamic", lambda: DynamicCache(config=config)
    yield "static", lambda: StaticCache(config=config, max_cache_len=48)


@pytest.mark.parametrize("when", ["prompt", "continuation", "one token"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_a_failure_inside_a_forward_leaves_model_and_cache_usable(name, kind, layer, when):
    if name.startswith("Gemma3") and layer == 0:
        pytest.skip("layer 0 slides and stays dense")
    model = sparse(CONFIG, name=name)
    make = dict(caches(name))[kind]
    cache, fresh = make(), make()
    before = {"prompt": [], "continuation": [IDS], "one token": [IDS, prompt(2, seed=7)]}[when]
    ids = {"prompt": IDS, "continuation": prompt(4, seed=1), "one token": prompt(1, seed=1)}[when]
    for one in before:
        feed(model, one, cache)
        feed(model, one, fresh)
    Sketch.calls = []
    Sketch.fail_at = 1
    original = Sketch.score

    def only_there(self, queries, keys, values, ctx):
        if ctx.layer_idx == layer:
            return original(self, queries, keys, values, ctx)
        return torch.zeros(*queries.shape[:3], keys.shape[2])

    Sketch.score = only_there
    try:
        with pytest.raises(RuntimeError, match="no luck"):
            feed(model, ids, cache)
    finally:
        Sketch.score = original
        Sketch.fail_at = None
    for one in (ids, prompt(1, seed=3), prompt(3, seed=4)):
        assert same(feed(model, one, cache), feed(model, one, fresh))


def test_generation_after_a_failed_generation():
    model = sparse(CONFIG)
    truth = generate(model, IDS)
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        Sketch.calls, Sketch.fail_at = [], 6
        with pytest.raises(RuntimeError, match="no luck"):
            generate(model, IDS, **options)
        Sketch.fail_at = None
        assert torch.equal(generate(model, IDS), truth)
        if "cache_implementation" in options:
            assert torch.equal(generate(model, IDS, **options), truth)


def append_of(result):
    def append(self, keys, values, ctx):
        return result(keys)

    return append


WRONG = {
    "a tensor": (lambda keys: keys, r"append must return \{name: tensor"),
    "None": (lambda keys: None, r"append must return \{name: tensor"),
    "a list in it": (lambda keys: {"sketch": [1]}, "'sketch'.*got list"),
    "one key too few": (lambda keys: {"sketch": keys[:, :, 1:]}, "'sketch'.*got"),
    "another batch": (lambda keys: {"sketch": keys.repeat(2, 1, 1, 1)}, "'sketch'.*got"),
    "three heads": (lambda keys: {"sketch": keys[:, :1].expand(-1, 3, -1, -1)}, "'sketch'.*got"),
    "neither G nor H heads": (lambda keys: {"sketch": keys.repeat(1, 3, 1, 1)}, "'sketch'.*got"),
    "no heads": (lambda keys: {"sketch": keys[:, :0]}, "'sketch'.*got"),
    "too flat": (lambda keys: {"sketch": keys[:, :, 0]}, "'sketch'.*got"),
    "too flat for a key": (lambda keys: {"sketch": keys.sum((1, 3))}, "'sketch'.*got"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_append_of_a_wrong_shape_raises(monkeypatch, case):
    result, message = case
    model, cache = sparse(CONFIG), DynamicCache()
    feed(model, IDS, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Sketch, "append", append_of(result))
        with pytest.raises(ValueError, match=f"Sketch.*{message}|{message}"):
            feed(model, prompt(2, seed=1), cache)
        with pytest.raises(ValueError, match=f"Sketch.*{message}|{message}"):
            logits(model, IDS)
    fresh = DynamicCache()
    feed(model, IDS, fresh)
    assert same(feed(model, prompt(2, seed=1), cache), feed(model, prompt(2, seed=1), fresh))


CHANGED = {
    "another width": lambda keys: {"sketch": keys[..., :4], "position": keys[..., :1].long()},
    "a name forgotten": lambda keys: {"sketch": keys[..., :5]},
    "a new name": lambda keys: {"sketch": keys[..., :5], "position": keys[..., :1].long(), "more": keys},
    "other heads": lambda keys: {"sketch": keys[..., :5].repeat(1, 2, 1, 1), "position": keys[..., :1].long()},
    "nothing": lambda keys: {},
}


@pytest.mark.parametrize("result", CHANGED.values(), ids=CHANGED)
def test_append_that_changes_its_mind_raises(monkeypatch, result):
    """Later calls must return what the first returned, for the new keys: else old and new would not fit."""
    model, cache = sparse(CONFIG), DynamicCache()
    feed(model, IDS, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Sketch, "append", append_of(result))
        with pytest.raises(ValueError, match=r"append.*'(sketch|position|more)'"):
            feed(model, prompt(2, seed=1), cache)
    fresh = DynamicCache()
    feed(model, IDS, fresh)
    for new in (prompt(2, seed=1), prompt(1, seed=2)):
        assert same(feed(model, new, cache), feed(model, new, fresh))


# Without a model


def tensors(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def call(q, k, v, rows, state=None, config=CONFIG, **options):
    return sparse_attention(q[:, :, -rows:], k, v, config, state=state, **options)


def as_without_state(q, k, v, rows, state):
    out, mask = call(q, k, v, rows, state)
    right, right_mask = call(q, k, v, rows)
    assert torch.equal(mask.get_dense_mask(), right_mask.get_dense_mask())
    assert torch.allclose(out, right, atol=1e-12)


def test_state_follows_crop_reorder_repeat_reset():
    q, k, v = tensors(16)
    state = State()
    as_without_state(q[:, :, :9], k[:, :, :9], v[:, :, :9], 9, state)
    as_without_state(q[:, :, :12], k[:, :, :12], v[:, :, :12], 3, state)
    state.crop(10)
    changed = [torch.cat([t[:, :, :10], t[:, :, 12:]], 2) for t in (q, k, v)]
    as_without_state(*(t[:, :, :11] for t in changed), 1, state)
    state.reorder(torch.tensor([1, 0]))
    changed = [t[[1, 0]] for t in changed]
    as_without_state(*(t[:, :, :12] for t in changed), 1, state)
    state.repeat(2)
    changed = [t.repeat_interleave(2, 0) for t in changed]
    as_without_state(*(t[:, :, :13] for t in changed), 1, state)
    state.reorder(torch.tensor([0, 3, 3]))
    changed = [t[[0, 3, 3]] for t in changed]
    as_without_state(*changed, 1, state)
    state.reset()
    as_without_state(*tensors(14, seed=5), 14, state)


def test_state_catches_up():
    """Calls that it did not see, fewer keys than it knows, another batch size, another length."""
    q, k, v = tensors(16)
    state = State()
    as_without_state(*(t[:, :, :5] for t in (q, k, v)), 5, state)
    as_without_state(*(t[:, :, :12] for t in (q, k, v)), 2, state)
    as_without_state(*(t[:, :, :7] for t in (q, k, v)), 1, state)
    as_without_state(*tensors(11, batch=3, seed=1), 11, state)
    as_without_state(*tensors(11, batch=3, seed=2), 11, state)


def test_states_of_layers_are_apart():
    state = State()
    first, second = tensors(9), tensors(9, seed=1)
    for layer, (q, k, v) in enumerate((first, second)):
        call(q[:, :, :8], k[:, :, :8], v[:, :, :8], 8, state, layer_idx=layer)
    for layer, (q, k, v) in enumerate((first, second)):
        out, _ = call(q, k, v, 1, state, layer_idx=layer)
        assert torch.allclose(out, call(q, k, v, 1, layer_idx=layer)[0], atol=1e-12)


def test_positions_count_real_tokens():
    q, k, v = tensors(10)
    mask = torch.ones(2, 10)
    mask[1, :4] = 0
    state = State()
    call(q[:, :, :8], k[:, :, :8], v[:, :, :8], 8, state, attention_mask=mask[:, :8])
    _, selected = call(q, k, v, 2, state, attention_mask=mask)
    q1, k1, v1 = (t[1:, :, 4:] for t in (q, k, v))
    _, one = call(q1, k1, v1, 2)
    assert torch.equal(selected.get_dense_mask()[1:, :, :, 4:], one.get_dense_mask())
    assert not selected.get_dense_mask()[1, :, :, :4].any()


def test_positions_do_not_depend_on_a_models_own_indexer():
    """A key that no row of the call may attend to (`indices`) is not padding: it keeps its position."""
    q, k, v = tensors(10, batch=1)
    state, seen = State(), []
    original = Sketch.append

    def remember(self, keys, values, ctx):
        seen.append(ctx.positions.clone())
        return original(self, keys, values, ctx)

    Sketch.append = remember
    try:
        call(q[:, :, :8], k[:, :, :8], v[:, :, :8], 8, state, indices=torch.zeros(1, 8, 1, dtype=torch.long))
        call(q, k, v, 1, state, indices=torch.tensor([[[1, 3]]]))
    finally:
        Sketch.append = original
    assert torch.cat(seen, 1).tolist() == [list(range(10))]


@pytest.mark.parametrize("alias", ["view", "expanded", "the keys themselves"])
def test_stored_side_data_never_alias_the_users_tensors(monkeypatch, alias):
    """`append` may return views: cropping and continuing must not write into the tensors they look at."""
    views = {
        "view": lambda keys: {"sketch": keys[..., :5], "position": keys[..., :1]},
        "expanded": lambda keys: {"sketch": keys[..., :5], "position": keys[:1, :1, :1, :1].expand(*keys.shape[:3], 1)},
        "the keys themselves": lambda keys: {"sketch": keys, "position": keys},
    }
    monkeypatch.setattr(Sketch, "append", append_of(views[alias]))
    monkeypatch.setattr(Sketch, "score", lambda self, q, k, v, ctx: torch.zeros(*q.shape[:3], k.shape[2]))
    q, k, v = tensors(12)
    before, state = k.clone(), State()
    call(q, k, v, 12, state)
    state.crop(6)
    other = [torch.cat([t[:, :, :6], u[:, :, :2]], 2) for t, u in zip((q, k, v), tensors(2, seed=1), strict=True)]
    call(*other, 2, state)
    assert torch.equal(k, before)


def test_add_mask_keeps_side_data_in_its_dict():
    q, k, v = tensors(9)
    masker, data = MaskerRegistry.create_masker(CONFIG[1]), {}
    for length, rows in ((6, 6), (9, 3)):
        part = {"queries": q[:, :, length - rows : length], "keys": k[:, :, :length], "values": v[:, :, :length]}
        kept = masker.add_mask(**part, attention_mask=None, sparse_meta_data=data, is_causal=True)
        fresh = masker.add_mask(**part, attention_mask=None, is_causal=True)
        assert torch.equal(kept.get_dense_mask(), fresh.get_dense_mask())
    assert data


def test_selections_under_every_mode_are_those_without_a_cache():
    model = sparse(CONFIG)
    with selections() as right:
        sequence = torch.cat([IDS, generate(model, IDS, new=5)], 1)
        right.clear()
        logits(model, sequence[:, :-1])
    truth = by_position(right)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        with selections() as log:
            generate(model, IDS, new=5, **options)
        found = by_position(log)
        assert set(found) == set(truth)
        for at, (mask, _) in found.items():
            assert torch.equal(mask, truth[at][0]), (options, at)


def test_error_messages_of_append_name_the_masker(monkeypatch):
    monkeypatch.setattr(Sketch, "append", append_of(lambda keys: {"sketch": keys[:, :, 1:]}))
    with pytest.raises(ValueError, match=r"Sketch\.append must return"):
        logits(sparse(CONFIG), IDS)
