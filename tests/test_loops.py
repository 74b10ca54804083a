"""The loops themselves against examples worked out by hand."""

import math

import loops
import numpy as np
import pytest
import torch


def run(scores, maskers, values=None, previous=None, group=1, **kwargs):
    """One row per query head with the given raw scores (D = 1: q = 1, k = score), all keys visible."""
    scores = torch.tensor(scores, dtype=torch.float64).reshape(-1, len(scores[0]))
    H, K = scores.shape
    q = torch.eye(H, dtype=torch.float64).reshape(1, H, 1, H)
    k = scores.t().reshape(1, 1, K, H).expand(1, H // group, K, H)
    v = torch.eye(K, dtype=torch.float64).expand(1, H // group, K, K) if values is None else values
    kwargs = {"is_causal": False, "scaling": 1.0, "previous_mask": previous, **kwargs}
    return loops.sparse_attention(q, k, v, maskers, **kwargs)


def active(truth):
    return [[j for j, w in enumerate(row) if w > 0] for row in truth.weights[0, :, 0]]


def test_visibility_is_lower_right_and_drops_padding():
    mask = torch.tensor([[0, 1, 1, 1]])
    visible, bias = loops.visibility((1, 1, 2, 4), mask, is_causal=True)
    assert visible[0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert not bias.any()
    more_queries, _ = loops.visibility((1, 1, 3, 2), None, is_causal=True)
    assert more_queries[0, 0].tolist() == [[False, False], [True, False], [True, True]]


def test_additive_masks_hide_from_half_the_minimum_and_bias_above():
    half = torch.finfo(torch.float16).min / 2
    mask = torch.tensor([0.0, -1.5, half + 16, half, -math.inf], dtype=torch.float16).reshape(1, 1, 1, 5)
    visible, bias = loops.visibility((1, 2, 1, 5), mask)
    assert visible[0, 1, 0].tolist() == [True, True, True, False, False]
    assert bias[0, 1, 0].tolist() == [0.0, -1.5, half + 16, 0.0, 0.0]


def test_indices_are_the_only_visible_keys():
    visible, _ = loops.visibility((1, 1, 1, 5), None, False, torch.tensor([[[3, -1, 3, 0]]]))
    assert visible[0, 0, 0].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(("size", "n", "count"), [(1, 9, 1), (1.0, 9, 9), (0.1, 30, 3), (0.05, 10, 1), (12, 5, 12)])
def test_budget(size, n, count):
    assert loops.budget(size, n) == count


def test_sink_and_local_count_visible_keys():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    stack = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 0.2}]
    assert active(run([[0.0] * 8], stack, attention_mask=mask)) == [[2, 3, 6]]


def test_top_k_takes_lower_positions_of_ties_and_skips_active_keys():
    top_2 = {"type": "oracle_top_k", "heavy_size": 2}
    assert active(run([[1.0, 3.0, 2.0, 3.0, 3.0]], [top_2])) == [[1, 3]]
    assert active(run([[1.0, 3.0, 2.0, 3.0, 3.0]], [top_2, top_2])) == [[1, 2, 3, 4]]
    almost = [[1.0, 1.0 + 1e-9, 1.0 + 2e-9]]  # equal in float32
    assert active(run(almost, [{"type": "oracle_top_k", "heavy_size": 1}])) == [[0]]


def test_group_top_k_ranks_summed_softmaxes():
    # head 0 softmax about (.98, .02, 0, 0); head 1 about (0, 0, .5, .5): sums .98, .02, .5, .5
    rows = [[4.0, 0.0, -40.0, -40.0], [-40.0, -40.0, 0.0, 0.0]]
    stack = [{"type": "oracle_top_k", "heavy_size": 2, "gqa": "group"}]
    assert active(run(rows, stack, group=2)) == [[0, 2], [0, 2]]
    # keys active in one head only are still candidates; those active in both are not
    previous = torch.tensor([[1.0, 1.0, 0, 0], [1.0, 0, 0, 0]]).reshape(1, 2, 1, 4)
    assert active(run(rows, stack, group=2, previous=previous)) == [[0, 1, 2, 3], [0, 2, 3]]


@pytest.mark.parametrize(
    ("weights", "top_p", "chosen"),
    [
        ([0.1, 0.3, 0.2, 0.4, 0.1], 0.8, [1, 2, 3]),
        ([0.5, 0.3, 0.1, 0.1], 0.8, [0, 1]),
        ([0.5, 0.3, 0.1, 0.1], 0.0, [0]),
        ([0.5, 0.3, 0.1, 0.1], 1.0, [0, 1, 2, 3]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [0, 1, 2, 3]),
        ([0.5, 0.3, 0.1, 0.1], 0.85, [0, 1, 2, 3]),
        ([0.8 - 5e-7, 0.1, 0.1 + 5e-7], 0.8, [0]),
        ([0.8 - 2e-6, 0.1, 0.1 + 2e-6], 0.8, [0, 2]),
    ],
)
def test_top_p(weights, top_p, chosen):
    rows = [[math.log(w) for w in weights]]
    assert active(run(rows, [{"type": "oracle_top_p", "top_p": top_p}])) == [chosen]
    threshold = loops.top_p_threshold(weights, top_p)
    assert [j for j, w in enumerate(weights) if w >= threshold] == chosen


def test_top_p_coverage():
    rows = [[math.log(w) for w in (0.5, 0.3, 0.15, 0.05)]]
    previous = torch.tensor([1.0, 0, 0, 0]).reshape(1, 1, 1, 4)

    def chosen(top_p, coverage):
        stack = [{"type": "oracle_top_p", "top_p": top_p, "coverage": coverage}]
        return active(run(rows, stack, previous=previous))[0]

    assert chosen(0.5, "remaining") == [0, 1]  # .3 of .5 remain
    assert chosen(0.7, "remaining") == [0, 1, 2]
    assert chosen(0.5, "total") == [0]
    assert chosen(0.8, "total") == [0, 1]
    assert chosen(0.0, "total") == [0, 1]
    assert chosen(1.0, "total") == [0, 1, 2, 3]


def test_group_top_p_counts_held_mass_of_keys_active_in_every_head():
    # the heads' softmaxes are (.6, .3, .1) and (.2, .3, .5): sums .8, .6, .6 of 2
    rows = [[math.log(w) for w in row] for row in ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5))]
    previous = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]).reshape(1, 2, 1, 3)

    def chosen(top_p, coverage):
        stack = [{"type": "oracle_top_p", "top_p": top_p, "coverage": coverage, "gqa": "group"}]
        return active(run(rows, stack, group=2, previous=previous))[0]

    assert chosen(0.4, "total") == [0]
    assert chosen(0.41, "total") == [0, 1, 2]  # .6 and .6 tie in float32
    assert chosen(0.3, "remaining") == [0, 1, 2]


def test_output_divides_by_the_weights_and_counts_the_learned_sinks():
    previous = torch.tensor([0.5, 0.25, 0, 0]).reshape(1, 1, 1, 4)
    stack = [{"type": "local", "window_size": 1}]
    out = run([[0.0, 0.0, 9.0, 0.0]], stack, previous=previous).out[0, 0, 0]
    np.testing.assert_allclose(out, [2 / 7, 4 / 7, 0, 1 / 7], rtol=1e-14)
    sinks = torch.tensor([math.log(7.0)])
    out = run([[0.0, 0.0, 9.0, 0.0]], stack, previous=previous, sinks=sinks).out[0, 0, 0]
    np.testing.assert_allclose(out, [1 / 7, 2 / 7, 0, 1 / 14], rtol=1e-6)


def test_softcap_bias_and_empty_rows():
    bias = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64).reshape(1, 1, 1, 2)
    truth = run([[5.0, 5.0]], [], softcap=2.0, position_bias=bias)
    np.testing.assert_allclose(truth.score[0, 0, 0, 0], 2 * math.tanh(2.5), rtol=1e-15)
    np.testing.assert_allclose(truth.out[0, 0, 0], [0.25, 0.75], rtol=1e-14)
    empty = run([[5.0, 5.0]], [], attention_mask=torch.zeros(1, 2, dtype=torch.bool), sinks=torch.zeros(1))
    assert not empty.out.any()
    assert not empty.weights.any()


def test_a_row_is_unsure_only_when_rounding_decides():
    stack = [{"type": "oracle_top_k", "heavy_size": 1}]
    tie = run([[1.0, 1.0]], stack)
    assert tie.sure.all()
    halfway = 1 + 2.0**-24  # between two float32, exact in float64
    assert run([[1.0, halfway, 0.3]], stack).sure.all()
    q = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    k = torch.tensor([[1.0, 1e-20], [halfway, 1e-20]], dtype=torch.float64).reshape(1, 1, 2, 2)
    edge = loops.sparse_attention(q, k, torch.ones(1, 1, 2, 1), stack, scaling=1.0)
    assert not edge.sure.any()
