"""The loops of the published methods against examples worked out by hand."""

import itertools
import json
import math

import loops
import loops_methods
import numpy as np
import pytest
import torch


def run(q, k, config, v=None, previous=None, **options):
    """Rows of one batch: q [H, Q, D], k [G, K, D] as nested lists; every key visible unless `options` say otherwise."""
    q, k = (torch.tensor(x, dtype=torch.float64)[None] for x in (q, k))
    v = torch.ones(*k.shape[:3], 2, dtype=torch.float64) if v is None else torch.tensor(v, dtype=torch.float64)[None]
    options = {"is_causal": False, "scaling": 1.0, "previous_mask": previous, **options}
    return loops.sparse_attention(q, k, v, [config], **options)


def active(truth, row=-1):
    return [[j for j, w in enumerate(head[row]) if w > 0] for head in truth.weights[0]]


def quest(size, **fields):
    return {"type": "quest", "heavy_size": size, "page_size": 2, **fields}


def test_quest_takes_pages_by_their_bound_and_always_its_own():
    k = [[[1.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.5], [0.0, 0.0], [0.0, 0.0], [-9.0, 0.0]]]
    # bounds of q = (1, 1): pages (0, 1): 1 + 2 = 3; (2, 3): 2.5; (4, 5): 0; the row's own page (6): -9
    q = [[[1.0, 1.0]]]
    assert active(run(q, k, quest(2))) == [[6]]
    assert active(run(q, k, quest(3))) == [[0, 1, 6]]
    assert active(run(q, k, quest(4))) == [[0, 1, 6]]
    assert active(run(q, k, quest(5))) == [[0, 1, 2, 3, 6]]
    assert active(run(q, k, quest(1.0))) == [[0, 1, 2, 3, 4, 5, 6]]
    # its own page holds no candidate any more: the others have the whole budget; a page half active is a candidate
    previous = torch.tensor([1.0, 0, 0, 0, 0, 0, 1.0]).reshape(1, 1, 1, 7)
    assert active(run(q, k, quest(2), previous=previous)) == [[0, 1, 6]]
    assert active(run(q, k, quest(3), previous=previous)) == [[0, 1, 2, 3, 6]]


def test_quest_counts_pages_from_the_first_real_token():
    k = [[[0.0], [1.0], [0.0], [0.0], [3.0], [3.0], [0.0]]]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    assert active(run([[[1.0]]], k, quest(4), attention_mask=mask)) == [[3, 4, 5, 6]]
    unpadded = [k[0][1:]]
    assert active(run([[[1.0]]], unpadded, quest(4))) == [[2, 3, 4, 5]]


def test_quest_ties_take_the_lower_page_and_groups_sum_softmaxes():
    k = [[[0.0], [1.0], [1.0], [0.0], [1.0], [0.5], [0.0]]]
    assert active(run([[[1.0]]], k, quest(3))) == [[0, 1, 6]]
    # bounds 1, 4, 1 | head 1: -1, 0, 3 (its own page holds the last key); softmax sums put page 1 before page 2
    k = [[[1.0, -1.0], [1.0, -1.0], [4.0, 0.0], [4.0, 0.0], [1.0, 3.0], [1.0, 3.0], [0.0, 0.0]]]
    truth = run([[[1.0, 0.0]], [[0.0, 1.0]]], k, quest(3, gqa="group"))
    e = math.exp
    first = [e(1), e(4), e(1)]
    second = [e(-1), e(0), e(3)]
    sums = [a / sum(first) + b / sum(second) for a, b in zip(first, second, strict=True)]
    best = int(np.argmax(sums))
    assert active(truth) == [[2 * best, 2 * best + 1, 6]] * 2


def test_labels():
    decoded, doubt = loops_methods.label(np.array([-1.0, 0.0, 2.0, 1.9]), 2)
    np.testing.assert_allclose(decoded, [-1, 0, 2, 2], atol=1e-12)
    assert not doubt.any()
    decoded, doubt = loops_methods.label(np.array([0.0, 1.5, 2.5, 3.0]), 2)  # half way: to even
    assert decoded.tolist() == [0, 2, 2, 3]
    assert not doubt.any()
    assert loops_methods.label(np.array([0.0, 1.500001, 3.0]), 2)[1].tolist() == [0, 1, 0]
    half = float(np.float16(0.3))  # the grid is kept in half precision
    assert loops_methods.label(np.array([0.3, 0.3]), 4)[0].tolist() == [half, half]
    assert loops_methods.label(np.array([0.3, -7e4]), 16)[0].tolist() == [0.3, -7e4]
    assert loops_methods.label(np.array([-1e5, 2.0]), 1)[0].tolist() == [-65504, 0]


def test_double_sparsity_reads_its_layers_channels(tmp_path):
    path = tmp_path / "channels.json"
    names = {f"model.layers.{n}.self_attn.qk_proj": [order] for n, order in enumerate(([0, 1, 2, 3], [3, 2, 1, 0]))}
    path.write_text(json.dumps(names))
    config = {"type": "double_sparsity", "heavy_size": 1, "group_factor": 2, "sorted_channel_file": str(path)}
    k = [[[5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0]]]
    q = [[[1.0, 1.0, 1.0, 1.0]]]
    assert active(run(q, k, config)) == [[0]]
    assert active(run(q, k, config, layer_idx=1)) == [[2]]


def test_k_means():
    points = np.array([[0.0], [1.0], [10.0], [11.0], [12.0], [10.5]])
    centres, gap = loops_methods.k_means(points, 2, 1)  # from the keys 0 and 3: 0 | 11
    np.testing.assert_allclose(centres, [[0.5], [10.875]])
    assert gap > 0.1
    centres, gap = loops_methods.k_means(np.zeros((4, 1)), 2, 3)  # one cluster stays empty and keeps its centre
    np.testing.assert_allclose(centres, [[0.0], [0.0]])
    assert gap == math.inf


def test_pq_scores_the_decoded_key():
    books = {(0, 0, 0): (np.array([[0.0], [2.0]]), 2.0), (0, 0, 1): (np.array([[-1.0], [1.0]]), 1.0)}
    config = {"type": "pq_cache", "heavy_size": 1, "pq_sub_dim": 1, "pq_bits": 1}
    k = [[[1.8, -0.3], [0.9, 9.0], [-3.0, 0.1]]]
    # decoded: (2, -1), (0, 1), (0, 1)
    for q, best in (([2.0, 1.0], 0), ([0.4, 1.0], 1), ([0.0, -1.0], 0)):
        assert active(run([[q]], k, config, given={"pq_cache": books})) == [[best]]
    exact = run([[[1.0, 0.0]]], k, config, given={"pq_cache": {}})
    assert active(exact) == [[0]]
    near = [[[1.0, 0.0], [0.0, 0.0]]]  # as near to 0 as to 2
    assert not run([[[1.0, 0.0]]], near, config, given={"pq_cache": books}).sure.any()


def test_pq_with_inner_products_makes_all_keys_equally_long():
    points = loops_methods.augmented(np.array([[3.0, 0.0], [0.0, 5.0], [9.0, 0.0]]), "ip", 5.0)
    np.testing.assert_allclose(points, [[3, 0, 4], [0, 5, 0], [9, 0, 0]])


def test_codebooks_skip_padding_and_the_first_keys():
    keys = np.arange(12.0).reshape(1, 1, 12, 1)
    real = np.array([[False] * 2 + [True] * 10])
    inputs = loops.Inputs(keys, keys, keys, 1.0, real)
    assert loops_methods.fitted_keys(inputs, 0, 2) == list(range(4, 12))
    config = {"pq_sub_dim": 1, "pq_bits": 1, "init_offset": 2, "kmeans_iter": 9}
    centres, _, largest = loops_methods.codebooks(config, inputs, 0, 0, 0)
    np.testing.assert_allclose(centres, [[5.5], [9.5]])
    assert largest == 11
    assert loops_methods.codebooks({**config, "init_offset": 3}, inputs, 0, 0, 0) is None


def test_hash_scores_count_equal_bits_and_zero_is_positive():
    identity = [(np.eye(2), np.zeros(2))]
    numbers, _ = loops_methods.signs(np.array([0.0, -1e-3]), identity)
    assert numbers.tolist() == [1, -1]
    given = {"hash_attention": lambda layer, head, what: identity}
    k = [[[-1.0, -1.0], [1.0, -2.0], [3.0, 0.5]]]
    config = {"type": "hash_attention", "heavy_size": 1, "hat_bits": 2}
    assert active(run([[[9.0, 1.0]]], k, config, given=given)) == [[2]]
    assert active(run([[[-9.0, 1.0]]], k, config, given=given)) == [[0]]  # one bit of 0 and of 2: the lower position
    truth = run([[[9.0, 1.0]], [[-9.0, -1.0]]], k, {**config, "gqa": "group"}, given=given)
    assert active(truth) == [[0], [0]]  # every key scores 0


def test_an_mlp_is_silu_between_linear_layers():
    layers = [(np.array([[2.0], [-1.0]]), np.array([1.0, 0.0])), (np.array([[1.0, 3.0]]), np.array([-0.5]))]
    numbers, _ = loops_methods.mlp(np.array([0.5]), layers)
    silu = [2 / (1 + math.exp(-2)), -0.5 / (1 + math.exp(0.5))]
    assert numbers[0] == pytest.approx(silu[0] + 3 * silu[1] - 0.5)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_bucket_probabilities_are_the_softmax_over_all_corners(tau):
    h = np.tanh(np.array([0.3, -1.0, 0.0, 2.0]))
    corners = [np.array(c) for c in itertools.product([-1.0, 1.0], repeat=4)]
    found = [loops_methods.corner_probability(h, c, tau) for c in corners]
    weights = [math.exp(float(h @ c) / tau) for c in corners]
    np.testing.assert_allclose(found, np.array(weights) / sum(weights), rtol=1e-12)
    assert sum(found) == pytest.approx(1)


def test_socket_weighs_collisions_with_the_values_norm():
    planes = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two tables of one plane
    given = {"socket": lambda layer, head: planes}
    k = [[[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]]
    config = {"type": "socket", "heavy_size": 1, "K": 1, "L": 2, "tau": 0.3}
    assert active(run([[[3.0, 3.0]]], k, config, given=given)) == [[0]]
    # about 2, 1 and 0 tables collide: a long value makes up for it
    assert active(run([[[3.0, 3.0]]], k, config, v=[[[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]], given=given)) == [[1]]
