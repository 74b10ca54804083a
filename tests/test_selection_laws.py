"""Laws of the fixed and exact maskers: chunking, padding, order, independence, odd inputs."""

import threading

import method_files
import pytest
import torch
from cases import CONFIGS, tensors
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import as_mask, examples

from sah_transformers import Mask, MaskerRegistry, State, sparse_attention

STACKS = {
    "sink": [{"type": "sink", "sink_size": 3}],
    "sink share": [{"type": "sink", "sink_size": 0.13}],
    "local": [{"type": "local", "window_size": 4}],
    "local share": [{"type": "local", "window_size": 0.29}],
    "causal": [{"type": "causal"}],
    "top k": [{"type": "oracle_top_k", "heavy_size": 5}],
    "top k share": [{"type": "oracle_top_k", "heavy_size": 0.1}],
    "top k group": [{"type": "oracle_top_k", "heavy_size": 0.1, "gqa": "group"}],
    "top p": [{"type": "oracle_top_p", "top_p": 0.7}],
    "top p group": [{"type": "oracle_top_p", "top_p": 0.7, "gqa": "group"}],
    "top p total": [
        {"type": "sink", "sink_size": 2},
        {"type": "oracle_top_p", "top_p": 0.8, "coverage": "total"},
    ],
    "stack": [
        {"type": "sink", "sink_size": 2},
        {"type": "local", "window_size": 0.1},
        {"type": "oracle_top_k", "heavy_size": 0.1, "gqa": "group"},
        {"type": "oracle_top_p", "top_p": 0.4, "coverage": "total"},
    ],
    "random": [{"type": "random_sampling", "sampling_rate": 0.2}],
    "random after others": [
        {"type": "sink", "sink_size": 2},
        {"type": "local", "window_size": 0.1},
        {"type": "random_sampling", "sampling_rate": 0.1, "seed": 7},
    ],
    "dense": [],
    "pq without codebooks": [{"type": "pq_cache", "heavy_size": 5, "pq_sub_dim": 8}],
}
for kind, config in method_files.DEFAULTS.items():
    STACKS[kind] = [method_files.fit({**config, "heavy_size": 5}, 4, 2, 16)]
    STACKS[f"{kind} group"] = [STACKS["sink"][0], {**STACKS[kind][0], "gqa": "group"}]
each_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
# Codebooks are made by the first call with enough keys, whatever chunk that is.
each_chunkable_stack = pytest.mark.parametrize(
    "stack", [pytest.param(stack, id=name) for name, stack in STACKS.items() if not name.startswith("pq_cache")]
)
each_data = pytest.mark.parametrize("data", ["normal", "few distinct keys", "near ties", "zero queries"])


def draw(data="normal", dtype=torch.float32, B=2, H=4, G=2, Q=48, K=48, D=16, Dv=8, seed=0):
    return tensors(torch.Generator().manual_seed(seed), B, H, G, Q, K, D, Dv, dtype, data)


def select(q, k, v, stack, **kwargs):
    """(out, dense mask)"""
    out, mask = sparse_attention(q, k, v, stack, kernel="reference", return_mask=True, **kwargs)
    return out, mask.get_dense_mask()


def test_every_masker_is_in_a_stack_here():
    used = {c["type"] for stack in STACKS.values() for c in stack}
    assert used == set(CONFIGS)


# Invariances


@each_chunkable_stack
@each_data
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_select_what_one_prefill_selects(stack, data, dtype):
    """Bit-identical inputs give identical selections: no near-tie is excused."""
    q, k, v = draw(data, dtype)
    padded = torch.ones(2, 48, dtype=torch.long)
    padded[1, :5] = 0
    for sizes, mask in (([1] * 48, None), ([40, 1, 1, 6], None), ([17, 31], padded), ([7, 13, 28], padded)):
        _, whole = select(q, k, v, stack, attention_mask=mask)
        start, state = 0, State()
        for size in sizes:
            stop = start + size
            past = None if mask is None else mask[:, :stop]
            chunk = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
            _, part = select(*chunk, stack, attention_mask=past, state=state)
            assert torch.equal(part, whole[:, :, start:stop, :stop])
            assert not whole[:, :, start:stop, stop:].any()
            start = stop


@each_stack
@each_data
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_row(stack, data, side):
    q, k, v = draw(data, B=3)
    lengths = [48, 31, 5]
    mask = torch.zeros(3, 48, dtype=torch.long)
    spans = []
    for b, n in enumerate(lengths):
        span = slice(48 - n, 48) if side == "left" else slice(0, n)
        mask[b, span] = 1
        spans.append(span)
    for x in (q, k, v):  # padding may hold anything finite
        x.masked_fill_((mask == 0)[:, None, :, None], 1e4)
    out, padded = select(q, k, v, stack, attention_mask=mask)
    for b, span in enumerate(spans):
        one = slice(b, b + 1)
        alone_out, alone = select(q[one, :, span], k[one, :, span], v[one, :, span], stack)
        assert torch.equal(padded[one, :, span, span], alone)
        assert (padded[one] > 0).sum() == (padded[one, :, :, span] > 0).sum(), "padding was selected"
        torch.testing.assert_close(out[one, span], alone_out, rtol=2e-6, atol=2e-6)
        if side == "left":
            assert not out[b, : span.start].any(), "rows that see nothing are zeros"


@each_stack
def test_sequences_and_kv_heads_do_not_see_each_other(stack):
    q, k, v = draw(B=3, H=6, G=3)
    stack = [method_files.fit(masker, 6, 3, 16) for masker in stack]
    out, whole = select(q, k, v, stack)
    for b in range(3):
        for g in range(3):
            one, heads, kv = slice(b, b + 1), slice(2 * g, 2 * g + 2), slice(g, g + 1)
            part_out, part = select(q[one, heads], k[one, kv], v[one, kv], stack, head_offset=2 * g)
            assert torch.equal(part, whole[one, heads])
            torch.testing.assert_close(part_out, out[one, :, heads], rtol=2e-6, atol=2e-6)


@each_stack
def test_maskers_only_add(stack):
    q, k, v = draw()
    weights = torch.tensor([0, 0, 0, 1.0, 0.5, 0.01])
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    before = weights[torch.randint(0, 6, (2, 4, 48, 48), generator=torch.Generator().manual_seed(3))] * causal
    _, after = select(q, k, v, stack or [{"type": "causal"}], previous_mask=as_mask(before))
    assert (after >= before).all()
    if not any(masker["type"] == "random_sampling" for masker in stack):
        assert (after[after != before] == 1.0).all(), "a deterministic selection has weight one"
    assert not (after > 0)[~causal.expand_as(after)].any()


@each_stack
def test_one_masker_object_serves_two_sequences(stack):
    maskers = [MaskerRegistry.create_masker(MaskerRegistry.config_from(c)) for c in stack]
    inputs = [draw(seed=seed) for seed in range(6)]
    expected = [select(*x, stack)[1] for x in inputs]
    results = [None] * len(inputs)

    def work(i):
        results[i] = [select(*inputs[i], maskers)[1] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for ours, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(one, wanted) for one in ours)


@each_stack
def test_inputs_are_left_alone_and_may_be_views(stack):
    q, k, v = draw()
    out, mask = select(q, k, v, stack)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    before = [x.clone() for x in strided]
    strided_out, strided_mask = select(*strided, stack)
    assert torch.equal(strided_mask, mask)
    torch.testing.assert_close(strided_out, out, rtol=2e-6, atol=2e-6)
    for x, y in zip(strided, before, strict=True):
        assert torch.equal(x, y)
    broadcast, other = select(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), stack)
    expanded, wanted = select(q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1), stack)
    assert torch.equal(other, wanted)
    torch.testing.assert_close(broadcast, expanded, rtol=2e-6, atol=2e-6)


@each_stack
def test_selection_ignores_torch_settings(stack):
    """Default dtype, autocast, gradients, matmul precision: the selection is exact under all of them."""
    q, k, v = draw("near ties")
    _, expected = select(q, k, v, stack)
    default, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(select(q, k, v, stack)[1], expected)
    finally:
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(q, k, v, stack)[1], expected)
    with torch.inference_mode():
        assert torch.equal(select(q, k, v, stack)[1], expected)
    assert torch.equal(select(*(x.clone().requires_grad_() for x in (q, k, v)), stack)[1], expected)


def test_autocast_does_not_round_scores():
    q, k, v = draw(Q=9, K=900)
    _, expected = select(q, k, v, STACKS["top k share"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(q, k, v, STACKS["top k share"])[1], expected)


@each_stack
def test_invisible_keys_may_hold_anything_finite(stack):
    q, k, v = draw(Q=5)
    visible = torch.rand(2, 1, 5, 48, generator=torch.Generator().manual_seed(4)) < 0.5
    visible[..., 30:] = False
    out, mask = select(q, k, v, stack, attention_mask=visible, is_causal=False)
    k[:, :, 30:], v[:, :, 30:] = 1e30, -1e30
    other_out, other = select(q, k, v, stack, attention_mask=visible, is_causal=False)
    assert torch.equal(other, mask)
    torch.testing.assert_close(other_out, out, rtol=2e-6, atol=2e-6)


@examples(30)
@given(st.data())
def test_repeating_a_fixed_masker_adds_nothing(data):
    config = data.draw(st.sampled_from(["sink", "local", "causal"]).flatmap(CONFIGS.get))
    q, k, v = draw(Q=7, K=20, seed=data.draw(st.integers(0, 99)))
    _, once = select(q, k, v, [config])
    _, twice = select(q, k, v, [config, config])
    assert torch.equal(once, twice)


@each_stack
def test_an_empty_mask_is_no_mask_in_every_form(stack):
    """Nothing, an empty mask and a mask of zeros mean the same: nothing is selected yet."""
    q, k, v = draw(Q=5, K=20)
    stack = stack or [{"type": "causal"}]
    out, expected = select(q, k, v, stack)
    shape = (2, 4, 5, 20)
    none = torch.zeros(0, dtype=torch.long)
    for empty in (
        Mask.create_empty_mask(shape, torch.float32, torch.device("cpu")),
        as_mask(torch.zeros(shape)),
        Mask.create_mask_from_indices(shape, none, torch.zeros(41, dtype=torch.long), None, torch.float32),
    ):
        other_out, mask = select(q, k, v, stack, previous_mask=empty)
        assert torch.equal(mask, expected)
        assert torch.equal(other_out, out)
        assert empty.is_empty_mask()


@pytest.mark.parametrize("kind", CONFIGS)
def test_add_mask_has_defaults(kind):
    config = {"sink": {"sink_size": 2}, "local": {"window_size": 2}, "oracle_top_k": {"heavy_size": 3}}
    config = {"oracle_top_p": {"top_p": 0.6}, "random_sampling": {"sampling_rate": 0.2}, **config}.get(kind, {})
    if kind in method_files.DEFAULTS:
        config = method_files.fit({**method_files.DEFAULTS[kind], "heavy_size": 3}, 4, 2, 16)
        config.pop("type")
    config = MaskerRegistry.config_class(kind)(**config)
    masker = MaskerRegistry.create_masker(config)
    q, k, v = draw(Q=5, K=20)
    shape = (2, 4, 5, 20)
    given = {"keys": k, "queries": q, "values": v, "attention_mask": None}
    given["previous_mask"] = as_mask(torch.zeros(shape))
    short = masker.add_mask(**given).get_dense_mask()
    full = masker.add_mask(**given, scaling=16**-0.5, dropout=0.0, sparse_meta_data={}, layer_idx=0)
    assert torch.equal(short, full.get_dense_mask())
    again = type(masker).create_from_config(config).add_mask(**given)
    assert torch.equal(short, again.get_dense_mask())


# Odd inputs


@each_stack
@pytest.mark.parametrize("shape", [{"B": 0}, {"Q": 0}, {"K": 0, "Q": 3}, {"K": 1, "Q": 1}, {"K": 1, "Q": 4}], ids=str)
def test_empty_and_single(stack, shape):
    q, k, v = (torch.randn(s) for s in sizes(**shape))
    stack = [method_files.fit(masker, 4, 2, 4) for masker in stack]
    out, mask = select(q, k, v, stack)
    B, H, Q, _ = q.shape
    assert out.shape == (B, Q, H, 8)
    assert mask.shape == (B, H, Q, k.shape[2])
    if k.shape[2] == 1:  # lower-right causal order: only the last query sees the one key
        assert not out[:, :-1].any()
        assert mask.sum() == B * H
        torch.testing.assert_close(out[:, -1], v[:, :, 0].repeat_interleave(2, dim=1))
    else:
        assert not out.any()


def sizes(B=2, H=4, G=2, Q=6, K=6, D=4, Dv=8):
    return (B, H, Q, D), (B, G, K, D), (B, G, K, Dv)


@each_stack
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_and_inf_stay_in_their_rows(stack, bad, where):
    """A bad query spoils its own row, a bad key its own sequence and KV head (at most)."""
    q, k, v = draw()
    clean_out, clean = select(q, k, v, stack)
    group = any(c.get("gqa") == "group" for c in stack)
    fine = torch.ones(2, 4, 48, dtype=torch.bool)
    if where == "query":
        q[0, 1, 20, 3] = bad
        fine[0, 0 if group else 1 : 2, 20] = False
    else:
        k[0, 1, 30, 3] = bad
        fine[0, 2:] = False
    out, mask = select(q, k, v, stack)
    assert torch.equal(mask[fine], clean[fine])
    ours, wanted = out.transpose(1, 2)[fine], clean_out.transpose(1, 2)[fine]
    torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=2e-6)
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    assert not mask[~causal.expand_as(mask)].any(), "an invisible key was selected"


FIXED = ["sink", "sink share", "local", "local share", "causal"]


@pytest.mark.parametrize("name", FIXED)
def test_fixed_maskers_do_not_look_at_scores(name):
    q, k, v = draw()
    _, clean = select(q, k, v, STACKS[name])
    _, spoiled = select(torch.full_like(q, torch.nan), k, v, STACKS[name])
    assert torch.equal(clean, spoiled)


# Failures: a ValueError that names the argument, before any work


def refuse(match, *tensors, stack=({"type": "sink", "sink_size": 2},), **kwargs):
    with pytest.raises(ValueError, match=match):
        sparse_attention(*tensors, list(stack), kernel=kwargs.pop("kernel", "reference"), **kwargs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (2, 5, 6, 4)}, "heads"),
        ({"q": (2, 4, 6, 5)}, "keys|queries"),
        ({"q": (2, 6, 4)}, "queries"),
        ({"q": (3, 4, 6, 4)}, "keys|queries"),
        ({"v": (2, 2, 5, 8)}, "values"),
        ({"v": (2, 1, 6, 8)}, "values"),
        ({"v": (1, 2, 6, 8)}, "values"),
        ({"k": (2, 2, 6)}, "keys"),
    ],
    ids=str,
)
def test_mismatched_tensors(change, match):
    shapes = dict(zip("qkv", sizes(), strict=True)) | change
    refuse(match, *(torch.randn(shapes[x]) for x in "qkv"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (2, 5)),
        ("attention_mask", (3, 6)),
        ("attention_mask", (2, 1, 6, 5)),
        ("attention_mask", (2, 3, 6, 6)),
        ("attention_mask", (2, 1, 5, 6)),
        ("attention_mask", (2, 6, 6)),
        ("sinks", (3,)),
        ("sinks", (1, 4)),
        ("position_bias", (2, 4, 6, 5)),
        ("position_bias", (2, 3, 6, 6)),
        ("position_bias", (6, 6)),
        ("indices", (2, 5, 3)),
        ("indices", (2, 6)),
    ],
    ids=str,
)
def test_misshapen_arguments(name, shape):
    value = torch.zeros(shape, dtype=torch.long if name == "indices" else torch.float32)
    refuse(name, *(torch.randn(s) for s in sizes()), **{name: value})


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("previous_mask", {"previous_mask": as_mask(torch.zeros(2, 4, 6, 5))}),
        ("kernel", {"kernel": "cuda"}),
        ("sink_sise", {"stack": [{"type": "sink", "sink_sise": 2}]}),
        ("oracle_topk", {"stack": [{"type": "oracle_topk", "heavy_size": 2}]}),
        ("dropout", {"dropout": 1.5}),
        ("dropout", {"dropout": -0.1}),
    ],
)
def test_other_refusals(match, kwargs):
    refuse(match, *(torch.randn(s) for s in sizes()), **kwargs)


@pytest.mark.parametrize("dtypes", ["fdf", "ffd", "lll"])
def test_dtypes_that_do_not_fit(dtypes):
    names = {"f": torch.float32, "d": torch.float64, "l": torch.int64}
    refuse("dtype", *(torch.ones(s, dtype=names[d]) for s, d in zip(sizes(), dtypes, strict=True)))


BAD_BUDGETS = [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, False, "4", "1e-3", None]


@pytest.mark.parametrize("value", BAD_BUDGETS, ids=repr)
@pytest.mark.parametrize(
    ("kind", "field"), [("sink", "sink_size"), ("local", "window_size"), ("oracle_top_k", "heavy_size")]
)
def test_budgets_that_are_none(kind, field, value):
    with pytest.raises(ValueError, match=field) as caught:
        MaskerRegistry.config_class(kind)(**{field: value})
    assert repr(value).strip("'") in str(caught.value)
    if value == "1e-3":
        assert "1.0e-3" in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 0, 1, float("nan"), True, "0.9", None], ids=repr)
def test_top_p_that_is_none(value):
    with pytest.raises(ValueError, match=r"top_p must be in range \[0, 1\]"):
        MaskerRegistry.config_class("oracle_top_p")(top_p=value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("oracle_top_k", {"heavy_size": 4, "gqa": "groups"}),
        ("oracle_top_p", {"top_p": 0.5, "gqa": None}),
        ("oracle_top_p", {"top_p": 0.5, "coverage": "all"}),
    ],
)
def test_words_that_are_none(kind, fields):
    with pytest.raises(ValueError, match=list(fields)[-1]):
        MaskerRegistry.config_class(kind)(**fields)


def test_indices_limit_what_is_visible():
    """DeepSeek's indexer: repeated entries count once, -1 is unused, `n` is what is left."""
    q, k, v = draw(B=1, Q=3, K=10)
    indices = torch.tensor([[[0, 2, 2, -1, 9], [4, 4, 4, 4, 4], [-1, -1, -1, -1, -1]]])
    _, mask = select(q, k, v, [], indices=indices)
    listed = [[j for j in range(10) if mask[0, 0, i, j]] for i in range(3)]
    assert listed == [[0, 2], [4], []]  # the first row does not see key 9 yet
    _, mask = select(q, k, v, [{"type": "sink", "sink_size": 0.5}], indices=indices)
    assert mask[0, 3].sum(-1).tolist() == [1, 1, 0]


def test_weights_at_invisible_keys_do_not_reach_the_output():
    q, k, v = draw(B=1, Q=3, K=6)
    before = torch.full((1, 4, 3, 6), 0.5)
    out, _ = select(q, k, v, [{"type": "sink", "sink_size": 1}], previous_mask=as_mask(before))
    visible = before * torch.ones(3, 6).tril(3)
    expected, _ = select(q, k, v, [{"type": "sink", "sink_size": 1}], previous_mask=as_mask(visible))
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
