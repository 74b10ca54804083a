"""Tiny models with sparse attention, the same models with attention by slow loops, and what was selected in them.

Weights are float64 unless a test says otherwise: then no near-tie hangs on rounding, and two ways to the same
sequence must select the same keys and generate the same tokens exactly.
"""

import contextlib
import copy
from dataclasses import dataclass

import loops
import torch
from tiny_models import WEIGHT_STD, tiny_config
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

import sah_transformers
from sah_transformers.attention import Call

STACK = [
    {"type": "sink", "sink_size": 2},
    {"type": "local", "window_size": 3},
    {"type": "oracle_top_k", "heavy_size": 3},
]
SMALL_STACK = [{"type": "local", "window_size": 1}, {"type": "oracle_top_k", "heavy_size": 1}]  # below WINDOW
OTHER_STACK = [{"type": "sink", "sink_size": 1}, {"type": "oracle_top_p", "top_p": 0.5}]


def build(name="LlamaForCausalLM", seed=0, dtype=torch.float64, attn="sdpa", **fields):
    """A tiny random dense model; `fields` replace fields of its config."""
    config = tiny_config(name)
    # Tied to the embeddings, the logits of some families would say little but the last token.
    config = type(config)(**{**config.to_dict(), "tie_word_embeddings": False, **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, WEIGHT_STD, generator=generator)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    return model.to(dtype)


def sparse(config=STACK, name="LlamaForCausalLM", **options):
    """The same model, sparse."""
    return sah_transformers.enable(build(name, **options), config)


def by_loops(stack_of, name="LlamaForCausalLM", min_keys=0, **options):
    """The same model with attention by loops: `stack_of(layer, queries, keys) -> stack`, empty for dense."""
    model = build(name, attn="loops", **options)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.loops = (stack_of, min_keys)
    return model


def _loop_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    stack_of, min_keys = module.loops
    stack = stack_of(module.layer_idx, query.shape[2], key.shape[2])
    options = {"attention_mask": attention_mask, "is_causal": attention_mask is None}
    options |= {"scaling": scaling, "softcap": softcap}
    truth = loops.sparse_attention(query, key, value, stack, **options)
    out = torch.from_numpy(truth.out)
    if min_keys:
        dense = torch.from_numpy(loops.sparse_attention(query, key, value, [], **options).out)
        few = torch.from_numpy(truth.visible.sum(-1) < min_keys)  # [B, H, Q]
        out = torch.where(few.transpose(1, 2)[..., None], dense, out)
    return out.to(query.dtype), None


def _loop_mask(*, q_length, kv_length, allow_is_causal_skip=True, **kwargs):
    skip = allow_is_causal_skip and q_length in (1, kv_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)


AttentionInterface.register("loops", _loop_attention)
AttentionMaskInterface.register("loops", _loop_mask)


def prompt(length, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (batch, length), generator=generator)


def left_padded(prompts):
    """(input_ids, attention_mask) of prompts `[1, n]`, padded on the left."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.arange(longest)[None] >= longest - p.shape[1] for p in prompts])
    return ids, mask.long()


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def generate(model, ids, new=8, **options):
    """The new tokens of a greedy generation, unless `options` say otherwise."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=new, **options)[:, ids.shape[1] :]


def differ(a, b):
    """Whether two logits are further apart than rounding explains (float64)."""
    return (a - b).abs().max().item() > 1e-4


@dataclass
class Selected:
    """What one block of rows of one call selected."""

    layer: int
    first_key: int  # keys before it are padding that this log's owner asked to cut
    rows: range  # positions of the rows among all keys of the call
    mask: torch.Tensor  # weights [B, H, q, K]
    scores: torch.Tensor  # [B, H, q, K]


@contextlib.contextmanager
def selections():
    """Collects a `Selected` for every block of rows that goes through the maskers."""
    log, original = [], Call.select

    def select(call, rows, start, stop):
        mask = original(call, rows, start, stop)
        queries, keys = call.shape[2:]
        weights = torch.nn.functional.pad(mask.get_dense_mask().clone(), (0, keys - mask.shape[-1]))
        scores = torch.nn.functional.pad(rows.scores().detach().clone(), (0, keys - mask.shape[-1]))
        positions = range(start + keys - queries, stop + keys - queries)
        log.append(Selected(rows.context.layer_idx, 0, positions, weights, scores))
        return mask

    Call.select = select
    try:
        yield log
    finally:
        Call.select = original


def layers_selected(log):
    return sorted({entry.layer for entry in log})


def by_position(log, sequence=0, padding=0):
    """{(layer, position of the row): (weights [H, keys up to it], scores)}; both counted without the padding."""
    table = {}
    for entry in log:
        for at, position in enumerate(entry.rows):
            if position >= padding:
                part = slice(padding, position + 1)
                row = (entry.mask[sequence, :, at, part], entry.scores[sequence, :, at, part])
                table[entry.layer, position - padding] = row
    return table


def operate(cache, operation, past):
    """Run `operation` on a cache with side data; `past` it: on its tensors alone, without the cache's own methods."""
    if not past:
        operation(cache)
        return
    behind = copy.deepcopy(cache)
    for layer in behind.layers:
        layer.__dict__.pop("sah_state")
        layer.__class__ = type(layer).__mro__[1]
    operation(behind)
    changed = [(layer.keys, layer.values) for layer in behind.layers]
    for layer, (keys, values) in zip(cache.layers, changed, strict=True):
        layer.keys, layer.values = keys, values
