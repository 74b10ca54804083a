"""The published methods against their slow float64 loops: the same weights in every row that rounding cannot change."""

import itertools

import loops
import loops_methods
import method_files
import numpy as np
import pytest
import torch
from cases import CONFIGS, DATA, MASKS, PUBLISHED, Case, cases, tensors
from hypothesis import given
from hypothesis import strategies as st
from method_files import DEFAULTS
from test_exactness import as_mask, check_mask, check_output, examples, sampled_weights

from sah_transformers import MaskerRegistry, State, sparse_attention
from sah_transformers.maskers.hash_weights import write_hash_weights

SMALL = {"heads": [(1, 1), (4, 2), (3, 1), (2, 2), (8, 1)], "rows": (1, 2, 5), "longest": 40}
# Nothing but near-ties, of which labels and centroids leave more undecided than float64 scores.
EDGY = {
    "quest": [],
    "double_sparsity": ["near ties", "cancelling", "small integers", "tiny"],
    "pq_cache": ["near ties", "cancelling", "small integers", "tiny"],
    "hash_attention": [],
    "socket": ["near ties", "cancelling"],
}
counted = {kind: {"seen": 0, "unsure": 0, "sparse": 0} for kind in PUBLISHED}
methods = pytest.mark.parametrize("kind", PUBLISHED)


def check(case, counts, previous=None):
    """As for the oracle maskers, but rows count apart: a few more of them hang on the rounding of a label or a sign."""
    out, mask = sparse_attention(
        case.queries,
        case.keys,
        case.values,
        case.maskers,
        previous_mask=None if previous is None else as_mask(previous),
        kernel="reference",
        **case.options,
    )
    given = method_files.given_to(case)
    truth = loops.sparse_attention(
        case.queries, case.keys, case.values, case.maskers, given=given, previous_mask=previous, **case.options
    )
    check_mask(mask, truth, case, counts)
    counts["sparse"] += int((((truth.weights > 0) != truth.visible).any(-1) & truth.sure).sum())
    del case.options["layer_idx"]
    check_output(out, truth, case)


def stacks_of(kind):
    """The method alone, or after one or two others."""
    before = st.lists(st.sampled_from(["sink", "local", "oracle_top_k"]).flatmap(CONFIGS.get), max_size=2)
    return st.tuples(before, CONFIGS[kind]).map(lambda parts: [*parts[0], parts[1]])


@methods
@examples(120)
@given(st.data())
def test_methods_equal_the_loops(kind, data):
    usual = [one for one in DATA if one not in EDGY[kind]]
    check(data.draw(cases(stacks=stacks_of(kind), data=usual, **SMALL)), counted[kind])


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind, every in EDGY.items() for data in every])
@examples(15)
@given(st.data())
def test_near_ties(kind, data, draw):
    case = draw.draw(cases(stacks=CONFIGS[kind].map(lambda c: [c]), data=[data], **SMALL))
    check(case, {"seen": 0, "unsure": 0, "sparse": 0})


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@methods
@examples(40)
@given(st.data())
def test_every_kind_of_mask(kind, mask, data):
    usual = [one for one in DATA if one not in EDGY[kind]]
    check(data.draw(cases(stacks=stacks_of(kind), masks=[mask], data=usual, **SMALL)), counted[kind])


@methods
@examples(20)
@given(st.data(), st.sampled_from([0.1, 0.5, 0.95]))
def test_earlier_weights_stay(kind, data, share):
    case = data.draw(cases(stacks=CONFIGS[kind].map(lambda c: [c]), data=["normal"], **SMALL))
    mask, is_causal = case.options["attention_mask"], case.options["is_causal"]
    visible, _ = loops.visibility(case.shape, mask, is_causal, case.options.get("indices"))
    check(case, counted[kind], sampled_weights(torch.Generator().manual_seed(0), visible, share))


@methods
def test_groups(kind):
    """Heads of one group that disagree, over all rows of a prefill: estimates are summed, each of its own size."""
    q, k, v = inputs(H=8, G=2, Q=14, K=34, seed=2)
    for factor, size in ((0.2, 4), (1.0, 7), (3.0, 0.3)):
        options = {"attention_mask": None, "layer_idx": 1}
        masker = method_files.fit({**DEFAULTS[kind], "heavy_size": size, "gqa": "group"}, 8, 2, 16)
        check(Case(factor * q, k, v, [masker], options, "groups"), counted[kind])


# What the papers promise and no weights are needed for


def inputs(B=1, H=4, G=2, Q=3, K=60, D=16, seed=0, dtype=torch.float32):
    return tensors(torch.Generator().manual_seed(seed), B, H, G, Q, K, D, 8, dtype, "normal")


def seen_by(config, queries, keys, values, layer=0):
    """(the masker, its scores [B, H, Q, K or pages], its side data) of one call."""
    masker, state, caught = MaskerRegistry.create_masker(config), State(), {}
    kind, original = type(masker), type(masker).score

    def score(self, q, k, v, ctx):
        scores = original(self, q, k, v, ctx)
        caught.setdefault("scores", scores)
        return scores

    kind.score = score
    try:
        options = {"is_causal": False, "state": state, "layer_idx": layer, "return_mask": False}
        sparse_attention(queries, keys, values, [masker], kernel="reference", **options)
    finally:
        kind.score = original
    return masker, loops.array(caught["scores"]), state.layer(layer).side(masker)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quests_bound_is_above_every_score_of_its_page(dtype):
    q, k, v = inputs(dtype=dtype)
    _, bounds, _ = seen_by({"type": "quest", "heavy_size": 4, "page_size": 8}, q, k, v)
    exact = loops.array(q) @ loops.array(k).repeat(2, axis=1).swapaxes(-1, -2)
    assert bounds.shape[-1] == 8
    for page in range(8):
        best = exact[..., 8 * page : 8 * page + 8].max(-1)
        assert (bounds[..., page] >= best - 1e-5).all()
        assert (bounds[..., page] > best + 0.1).any(), "the very scores"


def test_pq_scores_are_products_with_the_decoded_key():
    q, k, v = inputs(K=200)
    config = {"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 4, "pq_bits": 3}
    _, scores, side = seen_by(config, q, k, v)
    codes, centroids = side["codes"].long(), loops.array(side["centroids"])
    assert side["ready"].all()
    for h, j in itertools.product(range(4), range(200)):
        decoded = np.concatenate([centroids[0, h // 2, m, codes[0, h // 2, j, m]] for m in range(4)])
        np.testing.assert_allclose(scores[0, h, :, j], loops.array(q)[0, h] @ decoded / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_codebooks_are_those_of_the_loop(dtype, metric):
    q, k, v = inputs(B=2, K=90, seed=3, dtype=dtype)
    config = {"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 8, "pq_bits": 3, "metric": metric, "kmeans_iter": 6}
    mask = torch.ones(2, 90)
    mask[1, :11] = 0
    state = State()
    sparse_attention(q, k, v, [config], attention_mask=mask, state=state)
    side = state.layer(0).side(MaskerRegistry.create_masker(config))
    given_inputs = loops.Inputs(*(loops.array(t) for t in (q, k, v)), 1.0, mask.numpy() > 0)
    compared = 0
    for b, g, m in itertools.product(range(2), range(2), range(2)):
        centres, gap, _ = loops_methods.codebooks(config, given_inputs, b, g, m)
        if gap > 1e-4:
            compared += 1
            np.testing.assert_allclose(loops.array(side["centroids"][b, g, m]), centres, atol=2e-4)
    assert compared >= 4


def test_codebooks_wait_for_four_keys_per_centroid():
    for keys, ready in ((34, False), (35, False), (36, True)):
        q, k, v = inputs(K=keys)
        config = {"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 8, "pq_bits": 3, "init_offset": 4}
        assert bool(seen_by(config, q, k, v)[2]["ready"].all()) == ready, keys


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [1, 31, 32, 33, 64])
def test_hamming_scores_are_products_of_signs(bits, shared):
    q, k, v = inputs()
    config = method_files.hash_attention(4, 2, 16, hat_bits=bits, shared=shared, heavy_size=4)
    _, scores, _ = seen_by(config, q, k, v, layer=1)
    path = config["hat_weight_file"]
    for h in range(4):
        mlps = [method_files.mlp_of(path, 4, 1, h, what) for what in ("query", "key")]
        signs = [
            np.array([loops_methods.signs(x, m)[0] for x in xs]) for xs, m in zip(rows_of(q, k, h), mlps, strict=True)
        ]
        np.testing.assert_array_equal(scores[0, h], signs[0] @ signs[1].T)


@pytest.mark.parametrize(("bias", "agree"), [(1.0, 32), (0.0, 32), (-0.0, 32), (-1e-30, -32)])
def test_a_zero_is_a_positive_sign(tmp_path, bias, agree):
    nothing = [(torch.zeros(4, n, m), torch.zeros(4, n)) for m, n in ((16, 6), (6, 6), (6, 32))]
    biased = [*nothing[:2], (nothing[2][0], torch.full((4, 32), bias))]
    write_hash_weights(tmp_path / "zero", {0: {"q": biased, "k": nothing}}, query_heads=4, kv_heads=2)
    config = {"type": "hash_attention", "heavy_size": 4, "hat_weight_file": str(tmp_path / "zero")}
    _, scores, _ = seen_by(config, *inputs())
    assert (scores == agree).all()


def rows_of(q, k, h):
    return loops.array(q)[0, h], loops.array(k)[0, h // 2]


@pytest.mark.parametrize("planes", [1, 3, 12])
@pytest.mark.parametrize("tau", [0.05, 0.3, 2.0])
def test_bucket_probabilities_are_the_softmax_over_all_buckets(planes, tau):
    """Each key's share, over the value's norm: the softmax of h·c / tau over the corners, summed over tables."""
    q, k, v = inputs(Q=1, K=30)
    config = {"type": "socket", "heavy_size": 4, "K": planes, "L": 2, "tau": tau}
    _, scores, _ = seen_by(config, q, k, v, layer=1)
    drawn = method_files.hyperplanes(1, 2, planes, 16).double().numpy()
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=planes)))
    for h in range(4):
        query, keys = rows_of(q, k, h)
        total = np.zeros(30)
        for table in drawn:
            logits = corners @ np.tanh(table @ query[0]) / tau
            weights = np.exp(logits - logits.max())
            bucket = (keys @ table.T >= 0) @ (2 ** np.arange(planes)[::-1])
            total += (weights / weights.sum())[bucket]
        norms = np.sqrt((loops.array(v)[0, h // 2] ** 2).sum(-1))
        np.testing.assert_allclose(scores[0, h, 0], total * norms, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gqa", ["head", "group"])
def test_double_sparsity_of_every_channel_and_16_bits_is_the_oracle(dtype, gqa):
    q, k, v = inputs(B=2, Q=20, seed=1, dtype=dtype)
    for size in (1, 7, 0.3):
        config = method_files.double_sparsity(4, 16, heavy_size=size, gqa=gqa, group_factor=1, label_bits=16)
        _, mask = sparse_attention(q, k, v, [config], layer_idx=1)
        _, right = sparse_attention(q, k, v, [{"type": "oracle_top_k", "heavy_size": size, "gqa": gqa}])
        assert torch.equal(mask.get_dense_mask(), right.get_dense_mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_labels_are_those_of_the_loop(dtype, bits):
    """Read back through the score of unit queries."""
    D = 8
    _, k, v = inputs(H=1, G=1, K=70, D=D, seed=bits, dtype=torch.float64)
    scale = torch.tensor([1e-5, 1e-2, 1.0, 300.0, 1e5]).repeat(14).double()[:, None] if dtype != torch.float16 else 1.0
    q, k, v = torch.eye(D, dtype=dtype)[None, None], (k * scale).to(dtype), v.to(dtype)
    k[0, 0, 3] = k[0, 0, 3, 0]
    config = method_files.double_sparsity(1, D, heavy_size=4, group_factor=2, label_bits=bits)
    _, scores, _ = seen_by(config, q, k, v)
    order = loops_methods.channel_file(config["sorted_channel_file"])["model.layers.0.self_attn.qk_proj"][0][: D // 2]
    sure = 0
    for j in range(70):
        decoded, doubt = loops_methods.label(loops.array(k)[0, 0, j, order], bits)
        if not doubt.any():
            sure += 1
            np.testing.assert_allclose(scores[0, 0, order, j], decoded, rtol=2e-6, atol=2e-6 * np.abs(decoded).max())
    assert sure > 40
    assert not np.delete(scores[0, 0], order, axis=0).any(), "other channels count"


@methods
def test_scaling_of_the_scores_changes_no_heads_selection(kind):
    """Per head a positive factor keeps the order."""
    q, k, v = inputs(Q=9)
    config = method_files.fit(DEFAULTS[kind], 4, 2, 16)
    masks = [sparse_attention(q, k, v, [config], scaling=s)[1].get_dense_mask() for s in (0.25, 0.01, 3.0)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_hardly_any_row_was_on_a_razors_edge():
    """Runs last: leaving rows out must stay the exception that it claims to be, and rows must leave keys out."""
    for kind, counts in counted.items():
        assert counts["unsure"] <= 0.01 * counts["seen"], (kind, counts)
        assert counts["sparse"] >= 0.2 * counts["seen"], (kind, counts)
    print(counted)
