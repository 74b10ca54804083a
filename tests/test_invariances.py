"""The four invariances of the specification, for every registered masker, through a whole model.

In float64 the selections must be equal. In float32 rounding in the layers below can flip a near-tie: then the
first row that differs is shown, its keys must be within 1e-5 of the score scale, and greedy tokens are equal.
"""

import copy
import itertools

import method_files
import pytest
import torch
from sparse_models import build, by_position, generate, left_padded, logits, prompt, selections, sparse
from transformers import DynamicCache

import sah_transformers
from sah_transformers import Mask, MaskerRegistry, sparse_attention
from sah_transformers.attention import BLOCK_ELEMENTS

# Stacks that show each registered masker: with a count, with a share, after others, per KV head.
GROUP = {"gqa": "group"}
BEFORE = [{"type": "sink", "sink_size": 1}, {"type": "local", "window_size": 2}]
STACKS = {
    "sink": [[{"type": "sink", "sink_size": 3}], [{"type": "sink", "sink_size": 0.4}]],
    "local": [[{"type": "local", "window_size": 3}], [{"type": "local", "window_size": 0.4}]],
    "causal": [[{"type": "causal"}]],
    "oracle_top_k": [
        [{"type": "oracle_top_k", "heavy_size": 3}],
        [*BEFORE, {"type": "oracle_top_k", "heavy_size": 0.3}],
        [*BEFORE, {"type": "oracle_top_k", "heavy_size": 2, "gqa": "group"}],
    ],
    "oracle_top_p": [
        [{"type": "oracle_top_p", "top_p": 0.7}],
        [*BEFORE, {"type": "oracle_top_p", "top_p": 0.6, "coverage": "total"}],
        [*BEFORE, {"type": "oracle_top_p", "top_p": 0.5, "gqa": "group"}],
    ],
    "quest": [
        [{"type": "quest", "heavy_size": 7, "page_size": 3}],
        [*BEFORE, {"type": "quest", "heavy_size": 0.5, "page_size": 2, "gqa": "group"}],
    ],
    "double_sparsity": [
        [method_files.double_sparsity(4, 16, heavy_size=3)],
        [*BEFORE, method_files.double_sparsity(4, 16, heavy_size=0.3, group_factor=2, label_bits=16)],
        [*BEFORE, method_files.double_sparsity(4, 16, heavy_size=2, group_factor=4, gqa="group")],
    ],
    "pq_cache": [  # the last has too few keys for its codebooks, always
        [{"type": "pq_cache", "heavy_size": 3, "pq_sub_dim": 8, "pq_bits": 1, "init_offset": 1}],
        [*BEFORE, {"type": "pq_cache", "heavy_size": 0.3, "pq_sub_dim": 4, "pq_bits": 1, "metric": "ip", **GROUP}],
        [*BEFORE, {"type": "pq_cache", "heavy_size": 2, "pq_sub_dim": 8}],
    ],
    "hash_attention": [
        [method_files.hash_attention(4, 2, 16, heavy_size=3)],
        [*BEFORE, method_files.hash_attention(4, 2, 16, heavy_size=0.3, hat_bits=40, shared=True)],
        [*BEFORE, method_files.hash_attention(4, 2, 16, heavy_size=2, gqa="group")],
    ],
    "socket": [
        [{"type": "socket", "heavy_size": 3, "K": 4, "L": 9}],
        [*BEFORE, {"type": "socket", "heavy_size": 0.3, **GROUP}],
    ],
    "random_sampling": [
        [{"type": "random_sampling", "sampling_rate": 0.3}],
        [*BEFORE, {"type": "random_sampling", "sampling_rate": 0.2, "seed": 5}],
    ],
}
FITS = ["pq_cache-0", "pq_cache-1"]  # made of the prompt by the first call that is long enough: chunks of it differ
EVERY = [pytest.param(stack, id=f"{kind}-{i}") for kind, stacks in STACKS.items() for i, stack in enumerate(stacks)]
every_stack = pytest.mark.parametrize("stack", EVERY)
every_chunkable_stack = pytest.mark.parametrize("stack", [one for one in EVERY if one.id not in FITS])
NEAR_TIE = 1e-5


def test_every_registered_masker_is_here():
    assert set(STACKS) == set(MaskerRegistry.types())
    for kind, stacks in STACKS.items():
        assert all(any(masker["type"] == kind for masker in stack) for stack in stacks)


def assert_same_selections(found, expected, exact, what=""):
    """Row by row, lowest layer first. Above a near-tie the layers' inputs differ and nothing can be said."""
    assert set(found) == set(expected)
    for layer in sorted({layer for layer, _ in expected}):
        differing = []
        for at in sorted(p for one, p in expected if one == layer):
            (mask, _), (right, scores) = found[layer, at], expected[layer, at]
            if not torch.equal(mask > 0, right > 0):
                differing.append((at, mask, right, scores))
        for at, mask, right, scores in differing:
            for head in (mask != right).any(-1).nonzero().flatten().tolist():
                keys = (mask[head] != right[head]).nonzero().flatten()
                edge = scores[head][(right[head] > 0)].min() if len(keys) == 1 else scores[head][keys].min()
                gap = (scores[head][keys].max() - edge).abs().item() / scores[head].abs().max().item()
                text = f"{what} layer {layer}, position {at}, head {head}: keys {keys.tolist()}, gap {gap:.1e}"
                print("near-tie:", text)
                assert not exact, text
                assert gap <= NEAR_TIE, text
        if differing:
            return


PROMPTS = [prompt(n, seed=n) for n in (17, 6, 11)]


def run_alone(model, ids, new=6):
    with selections() as log:
        tokens = generate(model, ids, new=new)
    return tokens, by_position(log)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_stack
def test_padding(stack, dtype):
    """A left-padded batch: token for token and key for key what each prompt alone gives."""
    model = sparse(stack, dtype=dtype)
    ids, mask = left_padded(PROMPTS)
    with selections() as log:
        together = generate(model, ids, new=6, attention_mask=mask)
    for row, one in enumerate(PROMPTS):
        tokens, expected = run_alone(model, one)
        assert torch.equal(together[row : row + 1], tokens)
        found = by_position(log, sequence=row, padding=ids.shape[1] - one.shape[1])
        assert_same_selections(found, expected, exact=dtype == torch.float64, what=f"sequence {row}")
        for entry in log:  # real rows take no padding; and rows that are padding take nothing at all
            padding = ids.shape[1] - one.shape[1]
            assert not entry.mask[row, :, :, :padding].any()


@every_stack
def test_right_padding(stack):
    """As in training: real tokens get what their sequence alone gives."""
    model = sparse(stack)
    longest = max(p.shape[1] for p in PROMPTS)
    ids = torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in PROMPTS])
    mask = torch.cat([torch.arange(longest)[None] < p.shape[1] for p in PROMPTS]).long()
    with selections() as log:
        together = logits(model, ids, attention_mask=mask)
    table = [by_position(log, sequence=row) for row in range(3)]
    for row, one in enumerate(PROMPTS):
        with selections() as alone:
            assert (together[row, : one.shape[1]] - logits(model, one)[0]).abs().max() < 1e-4
        found = {at: table[row][at] for at in table[row] if at[1] < one.shape[1]}
        assert_same_selections(found, by_position(alone), exact=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("chunk", [7, 1])
@every_chunkable_stack
def test_chunking(stack, chunk, dtype):
    """A prefill at once, in chunks of 7, token by token: the same keys per row and the same greedy tokens."""
    model, ids = sparse(stack, dtype=dtype), prompt(24, seed=3)
    tokens, expected = run_alone(model, ids)
    with selections() as log:
        again = generate(model, ids, new=6, prefill_chunk_size=chunk)
    assert torch.equal(tokens, again)
    assert_same_selections(by_position(log), expected, exact=dtype == torch.float64, what=f"chunks of {chunk}")


@pytest.mark.parametrize("chunk", [7, 1])
@pytest.mark.parametrize("stack", [one for one in EVERY if one.id in FITS])
def test_chunking_of_a_prompt_that_is_read_densely(stack, chunk):
    """What is made of the prompt is made at the first sparse call, however the prompt was chunked."""
    ids, tails, tokens = prompt(24, seed=3), prompt(3, seed=4), []
    for size in (24, chunk):
        model = sparse({"maskers": stack, "prefill": "dense", "decode_max_queries": 0})
        cache = DynamicCache()
        for part in ids.split(size, dim=1):
            logits(model, part, past_key_values=cache)
        model = sah_transformers.enable(model, {"maskers": stack, "prefill": "dense"})
        tokens.append(logits(model, tails, past_key_values=cache))
    assert (tokens[0] - tokens[1]).abs().max() < 1e-9
    assert (tokens[0] - logits(build(), torch.cat([ids, tails], 1))[:, -3:]).abs().max() > 1e-4


@every_stack
def test_chunks_are_no_blocks(stack, monkeypatch):
    """Nor does it matter how many rows the reference takes at once."""
    model, ids = sparse(stack), prompt(24, seed=3)
    with selections() as log:
        expected, right = logits(model, ids), by_position(log)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 1)
    with selections() as log:
        found = logits(model, ids)
    assert len(log) == 2 * 24
    assert (found - expected).abs().max() < 1e-4
    assert_same_selections(by_position(log), right, exact=True)


def tensors(seed=0, batch=2, rows=9):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, rows, 16), (batch, 2, 9, 16), (batch, 2, 9, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@every_stack
def test_order(stack):
    """However far the stack before it has come, a masker only adds; what it selects for sure has weight 1."""
    q, k, v = tensors()
    generator = torch.Generator().manual_seed(1)
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    for share in (0.0, 0.3, 1.0):
        weights = torch.rand(2, 4, 9, 9, generator=generator)
        weights *= (torch.rand(weights.shape, generator=generator) < share) & visible
        mask = Mask.create_mask_from_dense_mask(weights.shape, weights, torch.float32)
        for config in stack:
            before = mask.get_dense_mask().clone()
            masker = MaskerRegistry.create_masker(config)
            previous, mask = mask, masker.add_mask(k, q, v, previous_mask=mask, is_causal=True)
            after = mask.get_dense_mask()
            assert torch.equal(previous.get_dense_mask(), before), "changed the mask it was given"
            assert (after >= before).all(), "lowered a weight"
            assert after.max() <= 1
            assert not (after * ~visible).any()
            fresh = masker.add_mask(k, q, v, is_causal=True).get_dense_mask()
            assert ((after != before) <= (after == 1)).all() or ((fresh > 0) & (fresh < 1)).any()


@every_stack
def test_order_of_sparse_attention(stack):
    q, k, v = tensors()
    masks = [sparse_attention(q, k, v, stack[:n])[1].get_dense_mask() for n in range(1, len(stack) + 1)]
    for less, more in itertools.pairwise(masks):
        assert (more >= less).all()


def step_by_step(model, ids, cache):
    """A generator of tokens, so that two sequences can take turns."""
    out = logits(model, ids, past_key_values=cache)
    while True:
        token = out[:, -1:].argmax(-1)
        yield token
        out = logits(model, token, past_key_values=cache)


@every_stack
def test_no_hidden_state(stack):
    """Two sequences taking turns on one model, equally long, give what each alone gives; maskers do not change."""
    model = sparse(stack)
    sequences = [prompt(12, seed=s) for s in (1, 2)]
    expected = [generate(sparse(stack), ids, new=8) for ids in sequences]
    runs = [step_by_step(model, ids, DynamicCache()) for ids in sequences]
    tokens = [[], []]
    for _ in range(8):
        for run, out in zip(runs, tokens, strict=True):
            out.append(next(run))
    for out, right in zip(tokens, expected, strict=True):
        assert torch.equal(torch.cat(out, 1), right)
    q, k, v = tensors()
    for config in stack:
        masker = MaskerRegistry.create_masker(config)
        before = copy.deepcopy(vars(masker))
        first = masker.add_mask(k, q, v, is_causal=True).get_dense_mask()
        masker.add_mask(*tensors(seed=5)[1::-1], v, is_causal=True)
        assert torch.equal(masker.add_mask(k, q, v, is_causal=True).get_dense_mask(), first)
        assert vars(masker) == before, "a masker keeps something between calls"


def with_ties(stack, how, dtype):
    """Zero queries: every score of every row ties. No positions and few distinct tokens: many do.

    Those come of sums that float32 holds exactly: else matrix products may round equal rows differently, as
    processors without AVX-512 do.
    """
    model = sparse(stack, dtype=dtype)
    for layer in model.model.layers:
        if how == "zero queries":
            layer.self_attn.q_proj.weight.data.zero_()
    if how == "no positions":
        model.model.rotary_emb.inv_freq.zero_()
        model.model.embed_tokens.weight.data.sign_()
        first = model.model.layers[0]
        first.input_layernorm.variance_epsilon = 0.0
        for projection in (first.self_attn.q_proj, first.self_attn.k_proj):
            weight = projection.weight.data
            weight.div_(weight.std()).round_().div_(16)
    return model


def duplicated(length, seed):
    return 5 + torch.randint(0, 2, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["zero queries", "no positions"])
@every_chunkable_stack
def test_exact_ties(stack, how, dtype):
    """Rows of exact ties, padded and chunked: selections of the first layer are equal whatever the dtype."""
    model = with_ties(stack, how, dtype)
    prompts = [duplicated(n, seed=n) for n in (19, 8, 13)]
    ids, mask = left_padded(prompts)
    with selections() as log:  # positions as in `generate`: hashes of rotated keys know them
        logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row, one in enumerate(prompts):
        with selections() as alone:
            logits(model, one)
        with selections() as chunks:
            cache = DynamicCache()
            for part in one.split(5, dim=1):
                logits(model, part, past_key_values=cache)
        expected = by_position(alone)
        for found in (by_position(log, row, ids.shape[1] - one.shape[1]), by_position(chunks)):
            for (layer, at), (right, scores) in expected.items():
                if layer == 0 or (how == "zero queries" and dtype == torch.float64):
                    assert torch.equal(found[layer, at][0], right), (row, layer, at, scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ties_take_the_lower_positions(dtype):
    """With zero queries top-k is the first visible keys, whatever the padding."""
    model = with_ties([{"type": "oracle_top_k", "heavy_size": 3}], "zero queries", dtype)
    ids, mask = left_padded([prompt(12), prompt(5)])
    with selections() as log:
        generate(model, ids, new=3, attention_mask=mask)
    for row, padding in ((0, 0), (1, 7)):
        for (_, at), (selected, _) in by_position(log, row, padding).items():
            assert selected.bool().tolist() == [[j < 3 for j in range(at + 1)]] * 4
