"""Does a model answer the same with the attention "sah" as with its own "eager" attention?

`outputs(model)` runs a model in every mode a user meets: plain and left-padded forward, greedy generation with a
dynamic and a static cache, beam search. `differences(expected, actual)` compares two such runs. What eager itself
cannot do (a static cache in some hybrids) is recorded as its exception and skipped; what only sah cannot do is a
difference. `using(model, attention)` runs a model on any attention function: `dense_attention`, written from the
contract alone, and the mutants that the harness must notice.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

PROMPT, REAL, NEW_TOKENS, BEAMS = 12, 7, 7, 3
MODES = ("forward", "padded", "dynamic", "static", "beams")

# Largest difference of two float32 runs, as a share of the largest logit. `test_parity.py` measures that eager in
# float32 is within half of this of eager in float64, and that a wrong mask is beyond it a hundredfold.
TOLERANCE = 1e-4


@dataclass
class Output:
    """What one mode gave: logits of real tokens, generated tokens, beam scores; or why it gave nothing."""

    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    error: str | None = None


def prompt(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the second left-padded to the first one's length: (input_ids, attention_mask), both [2, PROMPT]."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, PROMPT), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, : PROMPT - REAL] = 0
    return input_ids.masked_fill(attention_mask == 0, 0), attention_mask


@torch.no_grad()
def output(model: PreTrainedModel, mode: str, padded: bool = True) -> Output:
    torch.manual_seed(0)
    input_ids, attention_mask = prompt(model)
    if mode == "forward" or not padded:
        attention_mask = torch.ones_like(attention_mask)
        input_ids[1] = input_ids[0].flip(0)
    if mode in ("forward", "padded"):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return Output(logits=logits[attention_mask[:, -logits.shape[1] :].bool()])
    options = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": BEAMS}}.get(mode, {})
    result = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, output_scores=True, disable_compile=True, **options,
    )  # fmt: skip
    logits = result.sequences_scores if mode == "beams" else torch.stack(result.logits)
    return Output(logits=logits, tokens=result.sequences)


def outputs(model: PreTrainedModel, modes: tuple[str, ...] = MODES) -> dict[str, Output]:
    """Every mode's output. Generation takes the padded prompts where the padded forward works, else whole ones."""
    result: dict[str, Output] = {}
    for mode in modes:
        padded = mode == "padded" or not result.get("padded", Output()).error
        try:
            result[mode] = output(model, mode, padded)
        except Exception as error:  # the report of a mode that failed is its reason, whatever it is
            result[mode] = Output(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return result


def differences(expected: dict[str, Output], actual: dict[str, Output]) -> dict[str, str]:
    """Modes in which `actual` is not `expected`, and how. A mode that `expected` could not do is left out."""
    found = {}
    for mode, want in expected.items():
        got = actual[mode]
        if want.error:
            continue
        if got.error:
            found[mode] = got.error
        elif want.tokens is not None and not torch.equal(want.tokens, got.tokens):
            found[mode] = f"tokens {got.tokens.tolist()}, not {want.tokens.tolist()}"
        elif (share := relative_error(want.logits, got.logits)) > TOLERANCE:
            found[mode] = f"logits differ by {share:.1e} of the largest"
    return found


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference over the largest value; inf when `got` is not finite where `want` is."""
    finite = want.isfinite()
    if not got[finite].isfinite().all():
        return float("inf")
    return ((want - got)[finite].abs().max() / want[finite].abs().max()).item()


def dense_attention(
    module, query, key, value, attention_mask, scaling=None, is_causal=None, softcap=None, s_aux=None, sinks=None,
    position_bias=None, indices=None, **kwargs,
):  # fmt: skip
    """Dense attention as Transformers calls it: query [B, H, Q, D], key [B, G, K, D] -> [B, Q, H, Dv]."""
    groups, (q_len, k_len) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        scores = scores + attention_mask[..., :k_len]
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., :k_len], lowest)
    elif q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        causal = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
        scores = scores.masked_fill(~causal, lowest)
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:-1], k_len, dtype=torch.bool).scatter(-1, indices.clamp(min=0).long(), True)
        scores = scores.masked_fill(~chosen[:, None], lowest)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1)[..., :k_len].to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def unmasked_attention(module, query, key, value, attention_mask, **kwargs):
    """A mutant: every query sees every key, later ones too."""
    return dense_attention(module, query, key, value, None, **(kwargs | {"is_causal": False}))


def padding_blind_attention(module, query, key, value, attention_mask, **kwargs):
    """A mutant: causal, but padding and windows are ignored."""
    return dense_attention(module, query, key, value, None, **(kwargs | {"is_causal": True}))


def forgetful_attention(module, query, key, value, attention_mask, **kwargs):
    """A mutant as subtle as an off-by-one: each row's last key weighs a little less."""
    bias = torch.zeros(query.shape[2], key.shape[2])
    bias.diagonal(key.shape[2] - query.shape[2]).fill_(-0.5)
    if kwargs.get("position_bias") is not None:
        bias = bias + kwargs["position_bias"]
    return dense_attention(module, query, key, value, attention_mask, **(kwargs | {"position_bias": bias}))


def mask_without_ambiguity(*, q_length, kv_length, allow_is_causal_skip=True, **kwargs):
    """`sdpa_mask` whose None always means causal aligned to the last key."""
    skip = allow_is_causal_skip and (q_length == 1 or kv_length == q_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)


@contextlib.contextmanager
def using(model: PreTrainedModel, attention: Callable) -> Iterator[PreTrainedModel]:
    """The model on another attention function, back on eager afterwards."""
    AttentionInterface.register("parity", attention)
    AttentionMaskInterface.register("parity", mask_without_ambiguity)
    try:
        model.set_attn_implementation("parity")
        yield model
    finally:
        model.set_attn_implementation("eager")
        del AttentionInterface._global_mapping["parity"], AttentionMaskInterface._global_mapping["parity"]
