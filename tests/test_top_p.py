"""The top-p rule: the public function and the oracle's shares."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import top_p_threshold
from test_exactness import examples

from sah_transformers import TopPMaskerConfig, sparse_attention, top_p_thresholds

VALUES = st.sampled_from([0.0, 1e-30, 0.001, 0.1, 0.2, 0.3, 0.7, 1.0, 5.0])


@pytest.mark.parametrize(
    ("weights", "top_p", "threshold"),
    [
        ([0.1, 0.3, 0.2, 0.4, 0.1], 0.8, 0.2),
        ([0.5, 0.3, 0.1, 0.1], 0.8, 0.3),
        ([0.5, 0.3, 0.1, 0.1], 0.0, 0.5),
        ([0.5, 0.3, 0.1, 0.1], 1.0, 0.1),
        ([1.0, 0.0, 0.0], 1.0, 0.0),
        ([1.0, 1e-9, 1e-12], 1.0, 1e-12),
        ([1.0, 1e-9, 1e-12], 0.999, 1.0),
        ([0.25] * 4, 0.5, 0.25),
        ([3.0], 0.3, 3.0),
        ([0.8 - 5e-7, 0.1, 0.1 + 5e-7], 0.8, 0.8 - 5e-7),  # within 1e-6 is reached
        ([0.8 - 2e-6, 0.1, 0.1 + 2e-6], 0.8, 0.1 + 2e-6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_examples(weights, top_p, threshold, dtype):
    weights = torch.tensor(weights, dtype=dtype)
    for shape in ((-1,), (1, -1), (1, 1, 1, -1)):
        result = top_p_thresholds(weights.reshape(shape), top_p)
        assert result.shape == (*weights.reshape(shape).shape[:-1], 1)
        torch.testing.assert_close(result.flatten(), torch.tensor([threshold], dtype=result.dtype), rtol=1e-7, atol=0)


@examples(200)
@given(st.data(), st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)))
def test_thresholds_equal_the_loop(data, top_p):
    rows, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    weights = data.draw(
        st.lists(
            st.lists(st.one_of(VALUES, st.floats(0, 1, width=32)), min_size=n, max_size=n).filter(
                lambda row: sum(row) > 1e-20
            ),
            min_size=rows,
            max_size=rows,
        )
    )
    weights = torch.tensor(weights, dtype=torch.float32)
    before = weights.clone()
    ours = top_p_thresholds(weights.reshape(rows, 1, n), top_p).flatten().tolist()
    assert ours == [top_p_threshold(row, top_p) for row in weights.double().tolist()]
    assert torch.equal(weights, before)


def test_a_row_without_mass_has_a_number():
    for top_p in (0.0, 0.5, 1.0):
        assert top_p_thresholds(torch.zeros(2, 3), top_p).tolist() == [[0.0], [0.0]]


def one_row(weights, stack):
    """The keys that a stack takes from one row with these softmax weights."""
    scores = torch.tensor(weights, dtype=torch.float64).log()
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.float64), scores.reshape(1, 1, -1, 1)
    _, mask = sparse_attention(q, k, k, stack, is_causal=False, scaling=1.0, kernel="reference")
    return mask.get_dense_mask().flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("coverage", ["remaining", "total"])
@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize(
    ("weights", "top_p", "taken"),
    [
        ([0.1, 0.3, 0.2, 0.4, 0.1], 0.8, [1, 2, 3]),
        ([0.5, 0.3, 0.1, 0.1], 0.8, [0, 1]),
        ([0.8 - 5e-7, 0.1, 0.1 + 5e-7], 0.8, [0]),
        ([0.8 - 2e-6, 0.1, 0.1 + 2e-6], 0.8, [0, 2]),
        ([0.2, 0.5, 0.3], 0.0, [1]),
        ([1.0, 1e-9, 1e-300], 1.0, [0, 1, 2]),
        ([0.2] * 5, 0.3, [0, 1, 2, 3, 4]),
    ],
)
def test_oracle_examples(weights, top_p, taken, coverage, gqa):
    stack = [{"type": "oracle_top_p", "top_p": top_p, "coverage": coverage, "gqa": gqa}]
    assert one_row(weights, stack) == taken


@pytest.mark.parametrize("gqa", ["head", "group"])
def test_what_earlier_maskers_hold(gqa):
    weights = [0.5, 0.3, 0.15, 0.05]

    def taken(top_p, coverage):
        masker = {"type": "oracle_top_p", "top_p": top_p, "coverage": coverage, "gqa": gqa}
        return one_row(weights, [{"type": "sink", "sink_size": 1}, masker])

    assert taken(0.5, "remaining") == [0, 1]
    assert taken(0.7, "remaining") == [0, 1, 2]
    assert taken(0.5, "total") == [0], "already reached"
    assert taken(0.5 + 5e-7, "total") == [0], "within 1e-6 is reached"
    assert taken(0.5 + 2e-6, "total") == [0, 1]
    assert taken(0.8, "total") == [0, 1]
    assert taken(0.0, "total") == [0, 1], "top_p 0 takes the best candidate"
    assert taken(1.0, "total") == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [-0.1, 1.1, 0, 1, float("nan"), True, "0.9", None], ids=repr)
def test_top_p_is_a_float_in_range(value):
    with pytest.raises(ValueError, match=r"top_p must be in range \[0, 1\]"):
        TopPMaskerConfig(top_p=value)
    with pytest.raises(ValueError, match="top_p"):
        top_p_thresholds(torch.ones(3), math.inf)


def test_top_p_bounds_are_allowed():
    assert TopPMaskerConfig(top_p=0.0).top_p == 0.0
    assert TopPMaskerConfig(top_p=1.0).top_p == 1.0
