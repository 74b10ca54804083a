"""The published methods: at every call, the side data on the cache are those that its keys alone give, bit for bit.

Codes are compared with those of all keys under the same centroids, and centroids with those of the fit.
"""

import contextlib
import copy
import threading

import method_files
import pytest
import torch
from sparse_models import build, generate, left_padded, logits, operate, prompt, sparse
from transformers import DynamicCache, StaticCache

from sah_transformers import MaskerRegistry, State, sparse_attention
from sah_transformers.state import LayerState

pytestmark = pytest.mark.core

FAR = 1e-9
SINK = {"type": "sink", "sink_size": 1}
METHODS = {
    "quest": {"type": "quest", "heavy_size": 5, "page_size": 4},
    "quest of pages of one": {"type": "quest", "heavy_size": 4, "page_size": 1, "gqa": "group"},
    "double_sparsity": method_files.double_sparsity(heads=4, dim=16, heavy_size=4, group_factor=2),
    "double_sparsity of 16 bits": method_files.double_sparsity(heads=4, dim=16, heavy_size=4, label_bits=8),
    "pq_cache": {"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 8, "pq_bits": 1, "init_offset": 2},
    "pq_cache by inner products": {
        "type": "pq_cache", "heavy_size": 3, "pq_sub_dim": 4, "pq_bits": 1, "metric": "ip", "init_offset": 0,
    },
    "hash_attention": method_files.hash_attention(heads=4, groups=2, dim=16, heavy_size=4),
    "hash_attention of 40 bits": method_files.hash_attention(
        heads=4, groups=2, dim=16, heavy_size=4, hat_bits=40, shared=True, gqa="group"
    ),
    "socket": {"type": "socket", "heavy_size": 4, "K": 3, "L": 9},
}  # fmt: skip
every_method = pytest.mark.parametrize("method", METHODS)
IDS = prompt(13)


def stack(method):
    return [SINK, METHODS[method]]


def fits(method):
    """Whether something is made of the prompt, so that it matters which call comes first."""
    return METHODS[method]["type"] == "pq_cache"


def recomputed(state, masker, keys, values, heads, real, context):
    """The side data of all keys at once, under what was prepared."""
    fresh = LayerState()
    known = state._prepared.get(masker.config)
    if known is not None:
        fresh._prepared[masker.config] = known
    UPDATE(fresh, [masker], keys, values, heads, keys.shape[2], real, context)
    return fresh.side(masker)


UPDATE = LayerState.update


class Watch:
    """Compares what the state holds with the keys at every update; `padding`: of each sequence that was given."""

    def __init__(self, padding=(0,)):
        self.padding, self.calls, self.made = list(padding), [], {}

    def update(self, state, maskers, keys, values, heads, new, real, context):
        positions = UPDATE(state, maskers, keys, values, heads, new, real, context)
        batch, size = keys.shape[0], keys.shape[2]
        each = batch // len(self.padding)
        padding = torch.tensor([p for p in self.padding for _ in range(each)])[:, None]
        truth = torch.arange(size)[None] >= padding
        right = torch.where(truth, torch.arange(size)[None] - padding, -1)
        assert torch.equal(positions, right), "positions"
        for masker in maskers:
            held = state.side(masker)
            expected = recomputed(state, masker, keys, values, heads, truth, context)
            assert set(held) == set(expected)
            for name, tensor in expected.items():
                assert held[name].dtype == tensor.dtype, name
                assert held[name].shape == tensor.shape, name
                assert torch.equal(held[name], tensor), f"stale {name} of {masker} at {size} keys"
            self.check_made(masker, context.layer_idx, held, each)
        self.calls.append((context.layer_idx, batch, size))
        return positions

    def check_made(self, masker, layer, side, each):
        """What was made once of a sequence stays."""
        if "ready" not in side:
            return
        for b in range(len(side["ready"])):
            if not side["ready"][b]:
                continue
            made = {name: side[name][b].clone() for name in masker.prepared if name in side}
            first = self.made.setdefault((masker.config, layer, b // each), made)
            assert all(torch.equal(made[name], first[name]) for name in made), "made again, or of another sequence"


@contextlib.contextmanager
def watched(padding=(0,)):
    watch = Watch(padding)
    LayerState.update = lambda self, *args: watch.update(self, *args)
    try:
        yield watch
    finally:
        LayerState.update = UPDATE
    assert watch.calls


def alone(ids, method, new=8, **options):
    """The truth of a generation: every step a forward call without a cache, hence without stored side data."""
    return generate(sparse(stack(method), **options), ids, new=new, use_cache=False)


@every_method
def test_the_methods_matter(method):
    model = sparse(stack(method))
    assert (logits(model, IDS) - logits(build(), IDS)).abs().max() > 1e-4


MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunks of one": {"prefill_chunk_size": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "other"},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@every_method
def test_every_mode(method, mode):
    model, ids = sparse(stack(method)), prompt(13)
    if mode.get("prompt_lookup_num_tokens"):
        ids = torch.cat([prompt(5), prompt(5), prompt(3)], dim=1)  # repeats itself: there is something to look up
    if mode.get("assistant_model"):
        mode = {"assistant_model": sparse(stack(method), seed=3)}
        mode["assistant_model"].load_state_dict(model.state_dict())
        for parameter in mode["assistant_model"].model.layers[1].mlp.parameters():
            parameter.data.mul_(0.7)  # right often, not always: some guesses are cropped
    with watched() as watch:
        watch.made = NoMemory() if "assistant_model" in mode else {}
        tokens = generate(model, ids, **mode)
    if not fits(method):
        assert torch.equal(tokens, alone(ids, method))
    elif not {"prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"} & set(mode):
        assert torch.equal(tokens, generate(model, ids))  # chunks and guesses change the call that fits


class NoMemory(dict):
    """Two models run at once: what one of them made is not what the other has."""

    def setdefault(self, key, value):
        return value


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
@every_method
def test_left_padded_batches(method, options):
    prompts = [prompt(n, seed=n) for n in (13, 5, 9)]
    ids, mask = left_padded(prompts)
    model = sparse(stack(method))
    with watched(padding=[0, 8, 4]):
        together = generate(model, ids, attention_mask=mask, **options)
    for row, one in zip(together, prompts, strict=True):
        if not fits(method):
            assert torch.equal(row[None], alone(one, method))
        elif not options.get("prefill_chunk_size"):
            assert torch.equal(row[None], generate(model, one))


@pytest.mark.parametrize("padded", [False, True])
@every_method
def test_beams(method, padded):
    ids, mask = left_padded([prompt(n, seed=n) for n in (13, 11)]) if padded else (prompt(13, batch=2), None)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"num_beams": 4, "attention_mask": mask, "new": 12}
    reorders, original = [], LayerState.reorder
    try:
        LayerState.reorder = lambda self, index: (reorders.append(index), original(self, index))[1]
        with watched(padding=[0, 2] if padded else [0, 0]):
            cached = generate(sparse(stack(method)), ids, **options)
    finally:
        LayerState.reorder = original
    assert sum(not torch.equal(i, torch.arange(len(i))) for i in reorders) > 4, "no beam was ever reordered"
    if not fits(method):
        assert torch.equal(cached, generate(sparse(stack(method)), ids, use_cache=False, **options))


def feed(model, ids, cache, **options):
    return logits(model, ids, past_key_values=cache, **options)


def same(a, b):
    return (a - b).abs().max().item() < FAR


@pytest.mark.parametrize("prefill", ["same", "dense"])
@every_method
def test_a_prefix_with_two_continuations(method, prefill):
    """A deep copy of a cache takes its side data along, and the two do not share them."""
    model, prefix = sparse({"maskers": stack(method), "prefill": prefill}), DynamicCache()
    with watched():
        feed(model, IDS, prefix)
        feed(model, prompt(1, seed=9), prefix)
        caches = copy.deepcopy(prefix), copy.deepcopy(prefix)
        ends = [prompt(4, seed=s) for s in (1, 2)]
        results = [feed(model, ids, c) for c, ids in zip(caches, ends, strict=True)]
        results = [torch.cat([r, feed(model, prompt(1, seed=5), c)], 1) for r, c in zip(results, caches, strict=True)]
        again = torch.cat([feed(model, ends[0], prefix), feed(model, prompt(1, seed=5), prefix)], 1)
    assert same(again, results[0])
    for end, result in zip(ends, results, strict=True):
        fresh = DynamicCache()
        for ids in (IDS, prompt(1, seed=9)):
            feed(model, ids, fresh)
        assert same(torch.cat([feed(model, end, fresh), feed(model, prompt(1, seed=5), fresh)], 1), result)


OPERATIONS = {
    "crop": (lambda c: c.crop(-6), lambda ids: ids[:, :-6]),
    "crop one": (lambda c: c.crop(-1), lambda ids: ids[:, :-1]),
    "crop everything": (lambda c: c.crop(-13), lambda ids: ids[:, :0]),
    "crop twice": (lambda c: (c.crop(-2), c.crop(-3)), lambda ids: ids[:, :-5]),
    "select": (lambda c: c.batch_select_indices(torch.tensor([2, 0])), lambda ids: ids[[2, 0]]),
    "select one": (lambda c: c.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]]),
    "select none twice": (lambda c: c.batch_select_indices(torch.tensor([2, 0, 0])), lambda ids: ids[[2, 0, 0]]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), lambda ids: ids[[1, 1, 0]]),
    "repeat, select, crop": (
        lambda c: (c.batch_repeat_interleave(2), c.batch_select_indices(torch.tensor([4, 1, 2])), c.crop(-3)),
        lambda ids: ids.repeat_interleave(2, 0)[[4, 1, 2]][:, :-3],
    ),
}
# Seen from the shapes alone, when someone changed the tensors without the cache's methods.
SHAPES_TELL = ("crop", "crop one", "crop everything", "crop twice", "select", "select one", "repeat")


@pytest.mark.parametrize(
    ("case", "past"), [*((n, False) for n in OPERATIONS), *((n, True) for n in SHAPES_TELL)], ids=str
)
@every_method
def test_cache_operations(method, case, past):
    """Followed through the cache's methods, and caught up where they were bypassed."""
    operation, on_ids = OPERATIONS[case]
    model, ids, cache = sparse(stack(method)), prompt(13, batch=3), DynamicCache()
    feed(model, ids, cache)
    operate(cache, operation, past)
    kept = on_ids(ids)
    more = prompt(3, batch=kept.shape[0], seed=4)
    with watched(padding=[0] * kept.shape[0]):
        results = [feed(model, new, cache) for new in (more[:, :2], more[:, 2:])]
    if fits(method):
        return
    fresh = DynamicCache()
    if kept.shape[1]:
        feed(model, kept, fresh)
    for new, result in zip((more[:, :2], more[:, 2:]), results, strict=True):
        assert same(result, feed(model, new, fresh))


@pytest.mark.parametrize("kind", ["the same cache", "another cache", "a static cache"])
@every_method
def test_a_second_sequence_of_equal_length(method, kind):
    model = sparse(stack(method))
    cache = StaticCache(config=model.config, max_cache_len=32) if kind == "a static cache" else DynamicCache()
    feed(model, IDS, cache)
    feed(model, prompt(1, seed=3), cache)
    if kind == "the same cache":
        cache.crop(-14)
    elif kind == "another cache":
        cache = DynamicCache()
    else:
        cache.reset()
    second, one = prompt(13, seed=1), prompt(1, seed=4)
    fresh = DynamicCache()
    with watched() as watch:
        for ids in (second, one):
            assert same(feed(model, ids, cache), feed(sparse(stack(method)), ids, fresh))
    assert len(watch.calls) == 8


@every_method
def test_static_caches_by_hand(method):
    model = sparse(stack(method))
    static = StaticCache(config=model.config, max_cache_len=32)
    for round_ in range(2):
        dynamic = DynamicCache()
        with watched():
            for ids in (IDS, prompt(1, seed=1), prompt(5, seed=2), prompt(1, seed=3)):
                assert same(feed(model, ids, static), feed(model, ids, dynamic)), round_
        static.reset()


@every_method
def test_a_prompt_read_densely_is_caught_up_once(method):
    model, cache = sparse({"maskers": stack(method), "prefill": "dense"}), DynamicCache()
    feed(model, IDS, cache)
    assert not hasattr(cache.layers[0], "sah_state") or cache.layers[0].sah_state.length == 0
    with watched() as watch:
        both = torch.cat([IDS, prompt(4, seed=1)], dim=1)
        generate(model, both, past_key_values=cache, new=4)
    assert [size for layer, _, size in watch.calls if layer == 0] == [17, 18, 19, 20]


@every_method
def test_side_data_are_computed_once_per_key(method, monkeypatch):
    """The work per step does not grow with old keys: `append` sees each key of each layer once."""
    masker, seen = type(MaskerRegistry.create_masker(METHODS[method])), []
    original = masker.append

    def counted(self, keys, values, ctx):
        seen.append(keys.shape[2])
        return original(self, keys, values, ctx)

    monkeypatch.setattr(masker, "append", counted)
    generate(sparse(stack(method)), IDS, new=6)
    if fits(method):  # again when the codebooks are made, at a prompt of enough keys at once
        assert sum(seen) <= 2 * (13 + 5) + 2 * 13
    else:
        assert sum(seen) == 2 * (13 + 5)


# Without a model


def tensors(length, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, length, 16), (batch, 2, length, 16), (batch, 2, length, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_method
def test_a_state_follows_crop_reorder_repeat_reset(method, dtype):
    def call(q, k, v, rows):
        with watched(padding=[0] * k.shape[0]) as watch:
            watch.made = NoMemory()
            return sparse_attention(q[:, :, -rows:], k, v, stack(method), state=state)[1].get_dense_mask()

    def check(qkv, rows):
        found = call(*qkv, rows)
        if not fits(method):
            right = sparse_attention(qkv[0][:, :, -rows:], *qkv[1:], stack(method))[1].get_dense_mask()
            assert torch.equal(found, right)

    state, qkv = State(), tensors(28, dtype=dtype)
    for length, rows in ((9, 9), (12, 3), (13, 1), (21, 2)):  # the last call missed six keys
        check([t[:, :, :length] for t in qkv], rows)
    state.crop(10)
    qkv = [torch.cat([t[:, :, :10], t[:, :, 12:]], 2) for t in qkv]
    check([t[:, :, :11] for t in qkv], 1)
    state.reorder(torch.tensor([1, 0]))
    qkv = [t[[1, 0]] for t in qkv]
    check([t[:, :, :12] for t in qkv], 1)
    state.repeat(2)
    qkv = [t.repeat_interleave(2, 0) for t in qkv]
    check([t[:, :, :13] for t in qkv], 1)
    state.reorder(torch.tensor([0, 3, 3]))
    qkv = [t[[0, 3, 3]] for t in qkv]
    check(qkv, 1)
    check([t[:, :, :7] for t in qkv], 1)  # fewer than it knows
    check(tensors(11, batch=4, seed=1, dtype=dtype), 11)  # another batch
    state.reset()
    check(tensors(14, seed=5, dtype=dtype), 14)


@every_method
def test_rolling_through_many_lengths(method):
    """One key at a time, over every boundary of a page and of a buffer."""
    state, qkv = State(), tensors(70, batch=2)
    mask = torch.ones(2, 70)
    mask[1, :7] = 0
    with watched(padding=[0, 7]):
        for length in range(1, 71):
            q, k, v = (t[:, :, :length] for t in qkv)
            options = {"attention_mask": mask[:, :length], "state": state, "return_mask": False}
            sparse_attention(q[:, :, -1:], k, v, stack(method), **options)


def walk(method, seed, steps, dtype=torch.float64):
    """Whatever happens to the keys, in any order, on sequences of different padding; keys that went unseen too."""
    drawn = torch.Generator().manual_seed(seed)

    def dice(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=drawn))

    batch, state = dice(1, 3), State()
    padding = [dice(0, 9) for _ in range(batch)]
    keys = tensors(dice(1, 20), batch, seed=seed, dtype=dtype)
    for step in range(steps):
        batch, size = keys[1].shape[0], keys[1].shape[2]
        what = ["crop", "reorder", "repeat", "nothing", "nothing", "nothing"][dice(0, 5)]
        if what == "crop" and size > 1:
            size = dice(1, size - 1)
            keys = [t[:, :, :size] for t in keys]
            if dice(0, 3):  # else the caller forgot: a shorter length tells
                state.crop(size)
        elif what == "reorder" or (what == "repeat" and batch > 3):
            index = torch.tensor([dice(0, batch - 1) for _ in range(dice(1, 3))])
            keys, padding = [t[index] for t in keys], [padding[i] for i in index]
            state.reorder(index)
        elif what == "repeat":
            keys, padding = [t.repeat_interleave(2, 0) for t in keys], [p for p in padding for _ in range(2)]
            state.repeat(2)
        batch, new, rows = keys[1].shape[0], dice(1, 7), dice(1, 3)
        more = tensors(new, batch, seed=1000 * seed + step, dtype=dtype)
        keys = [torch.cat([old, fresh], 2) for old, fresh in zip(keys, more, strict=True)]
        rows = min(max(rows, new) if what == "crop" else rows, keys[1].shape[2])
        mask = torch.arange(keys[1].shape[2])[None] >= torch.tensor(padding)[:, None]
        with watched(padding=padding) as watch:
            watch.made = NoMemory()
            options = {"attention_mask": mask, "state": state}
            _, found = sparse_attention(keys[0][:, :, -rows:], *keys[1:], stack(method), **options)
        if not fits(method):
            _, right = sparse_attention(keys[0][:, :, -rows:], *keys[1:], stack(method), attention_mask=mask)
            assert torch.equal(found.get_dense_mask(), right.get_dense_mask())


@pytest.mark.parametrize("seed", range(4))
@every_method
def test_random_walks(method, seed):
    walk(method, seed, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(100, 130))
@every_method
def test_many_random_walks(method, seed, dtype):
    walk(method, seed, steps=40, dtype=dtype)


# No hidden state


def test_two_models_with_files_of_their_own():
    """Channels and weights belong to a model's config: two models side by side do not mix them up."""
    for make, sizes in ((method_files.double_sparsity, {}), (method_files.hash_attention, {"groups": 2})):
        models = [sparse([SINK, make(heads=4, dim=16, heavy_size=3, seed=seed, **sizes)]) for seed in (0, 1)]
        truth = [generate(model, IDS, use_cache=False) for model in models]
        first = [logits(model, IDS) for model in models]
        assert not torch.equal(*first), "the files make no difference"
        caches = [DynamicCache(), DynamicCache()]
        tokens = [[], []]
        steps = [feed(model, IDS, cache)[:, -1:] for model, cache in zip(models, caches, strict=True)]
        for _ in range(8):
            for n, (model, cache) in enumerate(zip(models, caches, strict=True)):
                tokens[n].append(steps[n].argmax(-1))
                steps[n] = feed(model, tokens[n][-1], cache)
        assert all(torch.equal(torch.cat(t, 1), right) for t, right in zip(tokens, truth, strict=True))


@every_method
def test_threads_do_not_meet(method):
    model = sparse(stack(method))
    prompts = [prompt(13, seed=s) for s in range(4)]
    truth = [generate(model, ids) for ids in prompts]
    found = [None] * 4

    def work(n):
        found[n] = generate(model, prompts[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
