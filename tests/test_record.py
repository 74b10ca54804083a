"""`record`: what it measures on a small model, and that it says when there is nothing to measure."""

import pytest
import torch
from sparse_models import build, generate, prompt, sparse

import sah_transformers

STACK = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 4}]


def test_a_dense_model_is_refused():
    model = build()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"attends densely.*enable\(model, \.\.\.\) first"):
            sah_transformers.record(model).__enter__()
        sah_transformers.enable(model, STACK)
        sah_transformers.disable(model)
    sah_transformers.enable(model, STACK)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attends densely"):
        sah_transformers.record(model).__enter__()


def test_an_empty_stack_measures_dense_attention():
    model = sah_transformers.enable(build(), [])
    with sah_transformers.record(model) as log:
        generate(model, prompt(10), new=2)
    assert log.entries
    assert {entry.maskers for entry in log.entries} == {"dense"}


def test_windows_are_counted():
    model = sparse(STACK)
    ids = prompt(10)
    unrecorded = generate(model, ids, new=3)
    with sah_transformers.record(model) as log:
        recorded = generate(model, ids, new=3)
    assert torch.equal(recorded, unrecorded)
    layers = model.config.num_hidden_layers
    assert len(log.entries) == 3 * layers
    assert log.mean("keys_per_row", "decode") == 6
    assert log.mean("density", "decode") == pytest.approx((6 / 11 + 6 / 12) / 2)
    assert 0 < log.mean("recall", "decode") < 1
    assert log.mean("output_error", "decode") > 0
    with sah_transformers.record(sparse([{"type": "causal"}])) as whole:
        assert whole.entries == []
