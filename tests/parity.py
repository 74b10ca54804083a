"""Does a model answer the same with the attention "sah" as with its own "eager" attention?

`outputs(model)` runs a model in every mode a user meets: plain and left-padded forward, a prompt in two
chunks, greedy generation with a dynamic and a static cache (the latter also without padding), beam search.
`differences(expected, actual)` compares two such runs. What eager itself cannot do (a static cache in some
hybrids) is recorded as its exception and left out; what only sah cannot do is a difference. `verify(name)` does
this for one class and every configuration that means dense attention; the tests assert its verdict and
`make_model_table.py` prints it.

`using(model, attention)` runs a model on any attention function: `dense_attention`, written from
Transformers' contract alone, and the mutants below it, which the harness must notice.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from tiny_models import tiny, why_not
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import sah_transformers

PROMPT, REAL, NEW_TOKENS, BEAMS, FIRST_CHUNK = 12, 7, 7, 3, 8
MODES = ("forward", "padded", "chunked", "dynamic", "static", "unpadded", "beams")

# Largest difference of two float32 runs, as a share of the largest logit. `test_parity.py` measures that
# eager in float32 is within half of this of eager in float64, and that a wrong mask is a hundredfold beyond.
TOLERANCE = 1e-4

# With left padding the first queries that MusicGen generates from see no key at all; what attention then
# gives is anything (eager averages hidden keys, sdpa and sah give zeros); eager's own two caches disagree.
PADDING_UNDEFINED = ("MusicgenForCausalLM",)

CAUSAL = [{"type": "causal"}]
CONFIGS = {
    # Every layer through the maskers; none; and those that the model windows left as they are.
    "causal": {"maskers": CAUSAL, "kernel": "reference", "sliding_layers": "sparse"},
    "empty": {"maskers": []},
    "mixed": {"maskers": CAUSAL, "kernel": "reference", "sliding_layers": "dense"},
}


@dataclass
class Output:
    """What one mode gave: logits of real tokens and generated tokens; or why it gave nothing."""

    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    error: str | None = None


@dataclass
class Verdict:
    """How one class fared. `differences` is keyed by "configuration/mode"."""

    name: str
    unbuilt: str | None = None
    unsupported: str | None = None
    layers: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    differences: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return not (self.unbuilt or self.unsupported or self.differences)


def verify(name: str) -> Verdict:
    """Compare eager with sah in every mode and every configuration that means dense attention."""
    if reason := why_not(name):
        return Verdict(name, unbuilt=reason)
    model = tiny(name)
    support = sah_transformers.supported(model)
    if not support:
        return Verdict(name, unsupported=support.reason)
    expected = outputs(model)
    verdict = Verdict(name, skipped={mode: out.error for mode, out in expected.items() if out.error})
    windowed = any(not layer.sparse for layer in support.layers)
    for label, config in CONFIGS.items():
        if label == "mixed" and (not windowed or all(not layer.sparse for layer in support.layers)):
            continue
        with counting_layers() as layers, enabled(model, config):
            found = differences(expected, outputs(model))
        verdict.layers = max(verdict.layers, len(layers))
        verdict.differences |= {f"{label}/{mode}": how for mode, how in found.items()}
        if not layers:
            verdict.differences[label] = "the attention function was never called"
    if found := differences(expected, outputs(model, ("forward",)), tolerance=0.0):
        verdict.differences |= {f"after disable/{mode}": how for mode, how in found.items()}
    return verdict


@contextlib.contextmanager
def enabled(model: PreTrainedModel, config: dict) -> Iterator[PreTrainedModel]:
    sah_transformers.enable(model, config)
    try:
        yield model
    finally:
        sah_transformers.disable(model)


@contextlib.contextmanager
def counting_layers() -> Iterator[set[int]]:
    """Collects the attention modules that call sah: without a call, agreement with eager means nothing."""
    layers: set[int] = set()
    function = AttentionInterface._global_mapping["sah"]

    def counted(module, *args, **kwargs):
        layers.add(id(module))
        return function(module, *args, **kwargs)

    AttentionInterface.register("sah", counted)
    try:
        yield layers
    finally:
        AttentionInterface.register("sah", function)


def prompt(model: PreTrainedModel, padded: bool) -> dict[str, torch.Tensor]:
    """Two prompts `[2, PROMPT]`; padded: the second has REAL tokens and padding on its left."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    input_ids = torch.randint(3, vocab, (2, PROMPT), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, : PROMPT - REAL] = 0
    inputs = {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
    if type(model).__name__ == "CsmDepthDecoderForCausalLM":  # starts from its backbone's last state
        size = (2, model.config.backbone_hidden_size)
        inputs["backbone_last_hidden_state"] = torch.randn(size, generator=generator)
    return inputs


def outputs(model: PreTrainedModel, modes: tuple[str, ...] = MODES) -> dict[str, Output]:
    """Each mode's output; all but "forward" and "unpadded" take the padded prompts."""
    result: dict[str, Output] = {}
    for mode in modes:
        padded = mode not in ("forward", "unpadded") and (
            mode == "padded" or type(model).__name__ not in PADDING_UNDEFINED
        )
        try:
            result[mode] = output(model, mode, prompt(model, padded))
        except Exception as error:  # whatever it is, it is the mode's outcome
            lines = str(error).strip().splitlines() or [""]
            result[mode] = Output(error=f"{type(error).__name__}: {lines[0]}")
    return result


@torch.no_grad()
def output(model: PreTrainedModel, mode: str, inputs: dict[str, torch.Tensor]) -> Output:
    torch.manual_seed(0)
    if mode == "chunked":
        input_ids, attention_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        first = {"input_ids": input_ids[:, :FIRST_CHUNK], "attention_mask": attention_mask[:, :FIRST_CHUNK]}
        cache = model(**first, **inputs, use_cache=True).past_key_values
        rest = {"input_ids": input_ids[:, FIRST_CHUNK:], "attention_mask": attention_mask}
        return Output(logits=model(**rest, past_key_values=cache, use_cache=True).logits)
    if mode in ("forward", "padded"):
        logits = model(**inputs).logits
        return Output(logits=logits[inputs["attention_mask"][:, -logits.shape[1] :].bool()])
    static = {"cache_implementation": "static"}
    options = {"static": static, "unpadded": static, "beams": {"num_beams": BEAMS}}.get(mode, {})
    result = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    logits = result.sequences_scores if mode == "beams" else torch.stack(result.logits)
    return Output(logits=logits, tokens=result.sequences)


def differences(expected: dict[str, Output], actual: dict[str, Output], tolerance: float = TOLERANCE) -> dict[str, str]:
    """Modes in which `actual` is not `expected`, and how; a mode that `expected` could not do is left out."""
    found = {}
    for mode, got in actual.items():
        want = expected[mode]
        if want.error:
            continue
        if got.error:
            found[mode] = got.error
        elif want.tokens is not None and not torch.equal(want.tokens, got.tokens):
            found[mode] = f"tokens {got.tokens.tolist()}, not {want.tokens.tolist()}"
        elif (share := relative_error(want.logits, got.logits)) > tolerance:
            found[mode] = f"logits differ by {share:.1e} of the largest"
    return found


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference over the largest value; inf when `got` is not finite where `want` is."""
    finite = want.isfinite()
    if not finite.any() or not got[finite].isfinite().all():
        return float("inf")
    return ((want - got)[finite].abs().max() / want[finite].abs().max()).item()


def dense_attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Dense attention as Transformers calls it: query [B, H, Q, D], key [B, G, K, D] -> [B, Q, H, Dv]."""
    groups, q_len, k_len = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        scores = scores + attention_mask[..., :k_len]
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., :k_len], lowest)
    elif q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        scores = scores.masked_fill(~torch.ones(q_len, k_len).bool().tril(k_len - q_len), lowest)
    if kwargs.get("indices") is not None:
        indices = kwargs["indices"].long()  # [B, Q, n]
        chosen = torch.zeros(*indices.shape[:-1], k_len).bool().scatter(-1, indices, True)
        scores = scores.masked_fill(~chosen[:, None], lowest)
    sinks = kwargs.get("sinks")
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].reshape(1, -1, 1, 1)
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
    """A mutant that is nearly right: each row's own key weighs a little less than it should."""
    bias = torch.zeros(query.shape[2], key.shape[2])
    bias.diagonal(key.shape[2] - query.shape[2]).fill_(-0.5)
    if kwargs.get("position_bias") is not None:
        bias = bias + kwargs["position_bias"]
    return dense_attention(module, query, key, value, attention_mask, **(kwargs | {"position_bias": bias}))


def unambiguous_mask(*, q_length, kv_length, allow_is_causal_skip=True, **kwargs):
    """`sdpa_mask` whose None always means causal up to the last key."""
    skip = allow_is_causal_skip and (q_length == 1 or kv_length == q_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)


@contextlib.contextmanager
def using(model: PreTrainedModel, attention: Callable) -> Iterator[PreTrainedModel]:
    """The model on another attention function, back on eager afterwards."""
    AttentionInterface.register("parity", attention)
    AttentionMaskInterface.register("parity", unambiguous_mask)
    try:
        model.set_attn_implementation("parity")
        yield model
    finally:
        model.set_attn_implementation("eager")
        del AttentionInterface._global_mapping["parity"], AttentionMaskInterface._global_mapping["parity"]
