"""The published methods at the edges: nothing to select from, numbers beyond a dtype, NaN, files of another model."""

import math

import method_files
import pytest
import torch
from cases import DATA, PUBLISHED
from cases import tensors as case_tensors
from method_files import DEFAULTS
from sparse_models import build, generate, logits, prompt, sparse
from transformers import DynamicCache

import sah_transformers
from sah_transformers import MaskerRegistry, State, record, sparse_attention

methods = pytest.mark.parametrize("kind", PUBLISHED)
both_gqa = pytest.mark.parametrize("gqa", ["head", "group"])


def stack(kind, gqa="head", heads=4, groups=2, dim=16, **fields):
    return [method_files.fit({**DEFAULTS[kind], "gqa": gqa, **fields}, heads, groups, dim)]


def tensors(B=2, H=4, G=2, Q=5, K=40, D=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Q, D), (B, G, K, D), (B, G, K, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(q, k, v, maskers, **options):
    """The selection without a state, with one, and token by token's last: all the same."""
    out, mask = sparse_attention(q, k, v, maskers, **options)
    again, kept = sparse_attention(q, k, v, maskers, state=State(), **options)
    assert torch.isfinite(out).all()
    assert torch.equal(out, again)
    assert torch.equal(mask.get_dense_mask(), kept.get_dense_mask())
    return mask.get_dense_mask()


@both_gqa
@methods
@pytest.mark.parametrize("sizes", [{"B": 0}, {"Q": 0}, {"K": 0}, {"B": 0, "Q": 0, "K": 0}], ids=str)
def test_nothing_at_all(kind, gqa, sizes):
    q, k, v = tensors(**sizes)
    assert masks(q, k, v, stack(kind, gqa)).sum() == 0
    state = State()
    for _ in range(2):
        sparse_attention(q, k, v, stack(kind, gqa), state=state, return_mask=False)


@both_gqa
@methods
def test_one_key_and_more_queries_than_keys(kind, gqa):
    assert (masks(*tensors(Q=1, K=1), stack(kind, gqa)) == 1).all()
    selected = masks(*tensors(Q=7, K=3), stack(kind, gqa))
    assert not selected[:, :, :4].any()
    assert (selected[:, :, -1] == 1).all()


@both_gqa
@methods
def test_a_sequence_of_nothing_but_padding(kind, gqa):
    q, k, v = tensors(B=3)
    mask = torch.ones(3, 40)
    mask[1], mask[2, :13] = 0, 0
    selected = masks(q, k, v, stack(kind, gqa), attention_mask=mask)
    assert not selected[1].any()
    assert not selected[2, :, :, :13].any()
    assert (selected[0].sum(-1) > 0).all()
    alone = masks(*(t[:1] for t in (q, k, v)), stack(kind, gqa))
    assert torch.equal(selected[:1], alone)


@both_gqa
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (8, 8), (16, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@methods
def test_half_precision_and_groups_of_any_size(kind, heads, dtype, gqa):
    H, G = heads
    selected = masks(*tensors(H=H, G=G, dtype=dtype), stack(kind, gqa, H, G, heavy_size=8))
    assert (selected.sum(-1)[:, :, -1] == 8).all()
    if gqa == "group":
        by_group = selected.unflatten(1, (G, H // G))
        assert (by_group == by_group[:, :, :1]).all()


@both_gqa
@methods
def test_equal_keys_tie(kind, gqa):
    q, k, v = tensors()
    k, v = (t[:, :, :1].expand_as(t).clone() for t in (k, v))
    selected = masks(q, k, v, stack(kind, gqa, heavy_size=8))[0, 0, -1].nonzero().flatten().tolist()
    assert selected == ([0, 1, 2, 3, 36, 37, 38, 39] if kind == "quest" else list(range(8)))


@both_gqa
@pytest.mark.parametrize("factor", ["largest", "smallest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@methods
def test_numbers_at_the_ends_of_a_dtype(kind, dtype, factor, gqa):
    limits = torch.finfo(dtype)
    factor = limits.max / 8 if factor == "largest" else limits.tiny
    q, k, v = tensors(dtype=torch.float64)
    selected = masks((q * factor).to(dtype), (k * factor).to(dtype), v.to(dtype), stack(kind, gqa, heavy_size=8))
    assert (selected.sum(-1)[:, :, -1] == 8).all()


@both_gqa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("what", ["queries", "keys", "values"])
@methods
def test_a_broken_number_stays_where_it_is(kind, what, at, value, gqa):
    """Rows that do not see it, other groups and other sequences select what they did."""
    clean = tensors(Q=40)
    broken = [t.clone() for t in clean]
    broken[["queries", "keys", "values"].index(what)][0, 0, at, 3] = value
    right, selected = (
        sparse_attention(*one, stack(kind, gqa, heavy_size=8))[1].get_dense_mask() for one in (clean, broken)
    )
    assert torch.equal(selected[1], right[1])
    if kind == "pq_cache" and what == "keys":  # codebooks are made of every key of the prompt
        assert ((selected > 0).sum(-1)[0, 2:] == (right > 0).sum(-1)[0, 2:]).all()
        return
    assert torch.equal(selected[0, 2:], right[0, 2:])
    assert torch.equal(selected[0, :, :at], right[0, :, :at])
    if what == "queries":
        assert torch.equal(selected[0, :, at + 1 :], right[0, :, at + 1 :])


WRONG = {
    "sub-vectors": (lambda: stack("pq_cache", pq_sub_dim=5), r"pq_sub_dim must divide the head dimension.*5.*16"),
    "a wide sub-vector": (lambda: stack("pq_cache", dim=32, pq_sub_dim=32), "pq_sub_dim must divide.*32.*16"),
    "channels of other sizes": (lambda: stack("double_sparsity", dim=32), "sorted_channel_file.*32.*16"),
    "channels of fewer heads": (lambda: stack("double_sparsity", heads=2, groups=2), "sorted_channel_file.*2.*4"),
    "fewer channels than one": (lambda: stack("double_sparsity", dim=64, group_factor=17), "channel"),
    "weights of other sizes": (lambda: stack("hash_attention", dim=32), "hat_weight_file.*32.*16"),
    "weights of other heads": (lambda: stack("hash_attention", heads=8, groups=2), "hat_weight_file.*8.*4"),
    "weights of other KV heads": (lambda: stack("hash_attention", heads=4, groups=4), "hat_weight_file.*4"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_raises_before_anything_is_kept(case):
    make, message = case
    state, cache = State(), DynamicCache()
    with pytest.raises(ValueError, match=message):
        sparse_attention(*tensors(), make(), state=state)
    assert all(layer.length == 0 for layer in state.layers.values())
    with pytest.raises(ValueError, match=message):
        logits(sparse(make()), prompt(13), past_key_values=cache)
    model = sparse([{"type": "sink", "sink_size": 2}, {"type": "quest", "heavy_size": 4, "page_size": 2}])
    assert torch.equal(logits(model, prompt(13), past_key_values=cache), logits(model, prompt(13)))


def test_a_file_for_fewer_layers_is_refused_when_the_model_is_loaded():
    for kind, field in (("double_sparsity", "sorted_channel_file"), ("hash_attention", "hat_weight_file")):
        with pytest.raises(ValueError, match=rf"{field}.*2"):
            sparse(stack(kind), num_hidden_layers=3)
        with pytest.raises(ValueError, match=rf"{field}.*8.*4"):  # not even as a shard of a larger model
            sparse(stack(kind, heads=8))


# Ways of running a model that are not `generate` under `no_grad`


@methods
def test_a_cache_filled_in_inference_mode_goes_on_without(kind):
    model, ids = sparse(stack(kind, heavy_size=4)), [prompt(13), prompt(1, seed=2), prompt(1, seed=3)]
    for inside in (1, 2):
        cache, fresh = DynamicCache(), DynamicCache()
        with torch.inference_mode():
            for part in ids[:inside]:
                model(input_ids=part, past_key_values=cache)
        for part in ids[:inside]:
            logits(model, part, past_key_values=fresh)
        for part in [*ids[inside:], prompt(1, seed=4)]:
            assert torch.equal(logits(model, part, past_key_values=cache), logits(model, part, past_key_values=fresh))
        cache.crop(-1)
        logits(model, prompt(1, seed=5), past_key_values=cache)


@both_gqa
@methods
def test_training(kind, gqa):
    """Gradients are those of attention over the selection, which itself is not differentiated."""
    q, k, v = (t.requires_grad_() for t in tensors(dtype=torch.float64, Q=40))
    out, mask = sparse_attention(q, k, v, stack(kind, gqa, heavy_size=8))
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    keys, values = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = (q @ keys.mT / 4).masked_fill(mask.get_dense_mask() == 0, -math.inf)
    right = torch.autograd.grad((scores.softmax(-1) @ values).square().sum(), (q, k, v))
    for a, b in zip(ours, right, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    model = sparse(stack(kind, gqa, heavy_size=4), dtype=torch.float32).train()
    model(input_ids=prompt(13), labels=prompt(13)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@methods
def test_other_default_dtypes_change_nothing(kind):
    model = sparse(stack(kind, heavy_size=4))
    right = logits(model, prompt(13))
    fresh = sparse(stack(kind, heavy_size=4), seed=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(logits(model, prompt(13)), right)
        other = logits(fresh, prompt(13))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(fresh, prompt(13)), other)


@methods
def test_record_counts_side_data(kind):
    model = sparse(stack(kind, heavy_size=4), dtype=torch.float32)
    with record(model) as log:
        generate(model, prompt(13), new=3)
    assert "density" in str(log) or log.to_json()


@methods
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "DeepseekV3ForCausalLM", "Gemma3ForCausalLM"])
def test_other_families(kind, name):
    """Latent attention, layers that the model windows: the cache changes nothing."""
    shapes = {"Qwen3ForCausalLM": (4, 2), "DeepseekV3ForCausalLM": (4, 4), "Gemma3ForCausalLM": (4, 2)}
    H, G = shapes[name]
    D = key_size(name)
    maskers = stack(kind, "head", H, G, D, heavy_size=4)
    if kind == "pq_cache":
        maskers[0]["pq_bits"] = 6  # too few keys: exact, at every call
    model = sah_transformers.enable(build(name), maskers)
    assert torch.equal(generate(model, prompt(13), new=6), generate(model, prompt(13), new=6, use_cache=False))


def key_size(name):
    """The head dimension of the keys that attention sees."""
    seen, original = [], sah_transformers.integration.attention_function.make_call

    def make_call(q, k, v, *arguments, **options):
        seen.append(k.shape[-1])
        return original(q, k, v, *arguments, **options)

    sah_transformers.integration.attention_function.make_call = make_call
    try:
        logits(sah_transformers.enable(build(name), [{"type": "sink", "sink_size": 1}]), prompt(5))
    finally:
        sah_transformers.integration.attention_function.make_call = original
    return seen[0]


PUBLISHED_SIZES = {
    "quest": {"page_size": 16},
    "double_sparsity": {"group_factor": 8, "label_bits": 4},
    "pq_cache": {"pq_sub_dim": 64, "pq_bits": 6},
    "hash_attention": {"hat_bits": 32},
    "socket": {"L": 60, "K": 12},
}
BYTES = {"quest": 32 * 2, "double_sparsity": 12 * 8, "pq_cache": 2 * 2, "hash_attention": 4 * 8, "socket": 96 * 2}


@methods
def test_side_data_are_as_small_as_published(kind):
    """Bytes per key: 32 per KV head for Quest, 12 per query head for Double Sparsity, ..."""
    q, k, v = tensors(B=1, H=8, G=2, Q=1, K=512, D=128, dtype=torch.bfloat16)
    state = State()
    sparse_attention(q, k, v, stack(kind, "head", 8, 2, 128, **PUBLISHED_SIZES[kind]), state=state)
    assert state.layer(0).bytes_per_key() <= BYTES[kind]
    assert state.layer(0).bytes_per_key() > 0


@both_gqa
@methods
def test_scores_read_the_side_data_alone(kind, gqa, monkeypatch):
    """No pass over keys and values once they are stored: a decode step may find anything in their place."""
    config = stack(kind, gqa, heavy_size=8)
    q, k, v = tensors(Q=1)
    masker, right = type(MaskerRegistry.create_masker(config[0])), sparse_attention(q, k, v, config)[1]
    original, calls = masker.score, []

    def score(self, queries, keys, values, ctx):
        calls.append(1)
        return original(self, queries, torch.full_like(keys, math.nan), torch.full_like(values, math.nan), ctx)

    monkeypatch.setattr(masker, "score", score)
    assert torch.equal(sparse_attention(q, k, v, config)[1].get_dense_mask(), right.get_dense_mask())
    assert calls


@methods
def test_two_budgets_that_compare_equal(kind):
    """1 == 1.0 in Python: maskers whose configs differ only so are two maskers, of one key and of all."""
    q, k, v = tensors()
    few, every = (stack(kind, heavy_size=size) for size in (1, 1.0))
    state = State()
    for maskers in (few, every, [*few, *every]):
        _, kept = sparse_attention(q, k, v, maskers, state=state)
        _, fresh = sparse_attention(q, k, v, maskers)
        assert torch.equal(kept.get_dense_mask(), fresh.get_dense_mask())


def test_masker_objects_may_serve_several_models():
    maskers = [MaskerRegistry.create_masker(stack(kind, heavy_size=3)[0]) for kind in PUBLISHED]
    first, second = (sah_transformers.enable(build(seed=seed), maskers) for seed in (0, 1))
    truth = [generate(sparse([m.config for m in maskers], seed=seed), prompt(13)) for seed in (0, 1)]
    assert torch.equal(generate(first, prompt(13)), truth[0])
    assert torch.equal(generate(second, prompt(13)), truth[1])
    assert torch.equal(generate(first, prompt(13)), truth[0])


@both_gqa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", [kind for kind in PUBLISHED if kind != "pq_cache"])
def test_rounding_never_depends_on_the_call(kind, data, dtype, gqa):
    """Row by row, alone and behind padding: the very selection of one prefill, near-ties and all."""
    size, padding = 26, 7
    qkv = case_tensors(torch.Generator().manual_seed(3), 2, 4, 2, size, size, 16, 8, dtype, data)
    maskers = [{"type": "sink", "sink_size": 1}, *stack(kind, gqa, heavy_size=4)]
    whole = sparse_attention(*qkv, maskers)[1].get_dense_mask()
    state = State()
    for i in range(size):
        q, k, v = (t[:, :, : i + 1] for t in qkv)
        row = sparse_attention(q[:, :, i:], k, v, maskers, state=state)[1].get_dense_mask()
        assert torch.equal(row[:, :, 0], whole[:, :, i, : i + 1]), i
    alone = sparse_attention(*(t[1:] for t in qkv), maskers)[1].get_dense_mask()
    assert torch.equal(alone, whole[1:])
    padded = [torch.cat([torch.full_like(t[:, :, :padding], 9.0), t], 2) for t in qkv]
    mask = torch.arange(size + padding)[None].expand(2, -1) >= padding
    selected = sparse_attention(*padded, maskers, attention_mask=mask)[1].get_dense_mask()
    assert torch.equal(selected[:, :, padding:, padding:], whole)
