"""Tiny random instances of every causal language model class of the installed Transformers.

A config is shrunk by field name (`SIZES`), its per-layer lists are cut to the few layers that show every
kind of layer (`layers_to_keep`), and what a family needs on top stands in one table (`SPECIAL`). Weights are
drawn anew, large enough that attention decides the logits: at the usual std of 0.02 a tiny model hardly
looks at its context and a wrong mask would pass every comparison. Nothing is downloaded.
"""

import dataclasses
import functools

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, HIDDEN, HEADS, KV_HEADS, POSITIONS, WINDOW = 96, 32, 4, 2, 64, 4
WEIGHT_STD = 0.3  # scores of a few units at HIDDEN channels: attention is peaked but no row is one-hot
MAX_PARAMETERS = 3_000_000  # a size that this module forgot shows here, before the memory is taken

# fmt: off
SIZES = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size",
                     "decoder_vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "attention_hidden_size",
                     "lru_width"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "n_inner",
                     "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
                     "d_inner", "shared_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
                     "moe_shared_expert_intermediate_size"], 24),
    # Heads; head_dim is not hidden / heads, and latent attention has K and V of different widths.
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
                     "num_encoder_attention_heads", "num_decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "attention_head_dim", "swa_head_dim", "kv_channels", "d_head",
                     "dim_head"], 16),
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6, "rotary_dim": 8,
    # Windows shorter than the prompts of the tests, so that they bite.
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "original_max_position_embeddings", "max_target_positions"], POSITIONS),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size",
                     "window_size"], WINDOW),
    "attention_chunk_size": 8,
    # Experts.
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
                     "top_k_experts"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    # State space and linear attention layers.
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 2,
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_chunk_size": 4, "mamba_n_groups": 1,
    "mamba_ngroups": 1, "mamba_d_ssm": 64, "state_size": 8, "ssm_state_size": 8, "mamba_dt_rank": 4,
    "time_step_rank": 4, "n_groups": 1, "chunk_size": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "conv1d_width": 4, "hidden_size_per_layer_input": 8,
    "laurel_rank": 8, "num_kv_shared_layers": 0,
    # Special tokens inside the vocabulary.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None, "is_decoder": True,
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
MAX_LAYERS = 4

LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {"image_size": 16, "patch_size": 8}

# What a family needs beyond the sizes, as fields of its config and of its parts' configs.
SPECIAL: dict[str, dict] = {
    # Hybrids whose kinds of layers follow from a period, or have no default.
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 3, "num_dense_layers": 1,
                           "layer_types": ["conv", "full_attention", "full_attention"]},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ZambaForCausalLM": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
                         "attention_hidden_size": 64},
    # Windows that the default config leaves unused.
    "LagunaForCausalLM": {"layer_types": LOCAL_GLOBAL},
    "MellumForCausalLM": {"layer_types": LOCAL_GLOBAL},
    "Qwen2ForCausalLM": {"layer_types": LOCAL_GLOBAL, "use_sliding_window": True, "sliding_window": WINDOW},
    "Dots3NoteForCausalLM": {
        "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "sliding_window": WINDOW,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "head_dim": 16,
        "per_layer_config": {1: {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "head_dim": 24}}},
    # Layers that read the keys and values of earlier ones.
    "Gemma3nForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": LOCAL_GLOBAL * 2,
                           "intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "Gemma4ForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": LOCAL_GLOBAL * 2,
                          "global_head_dim": 24},
    "Gemma4UnifiedForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 24,
                                 "layer_types": LOCAL_GLOBAL * 2},
    # Parts of a multimodal model.
    "Gemma4ForConditionalGeneration": {"text_config": {"global_head_dim": 24}},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {"global_head_dim": 24}},
    "GitForCausalLM": {"vision_config": VISION},
    "Phi4MultimodalForCausalLM": {
        "vision_config": VISION | {"crop_size": 16},
        "audio_config": {"num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
                         "nemo_conv_channels": 8}},
    "CsmDepthDecoderForCausalLM": {"num_codebooks": 32, "backbone_hidden_size": HIDDEN},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    # Sizes that must agree with each other.
    "BltForCausalLM": {
        "num_hidden_layers": 2, "vocab_size": 260, "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": 8, "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260, "hidden_size_global": HIDDEN},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": HIDDEN}},
    "CohereCompassForCausalLM": {"head_dim": HIDDEN // HEADS,
                                 "rope_parameters": {"full_attention": ROPE | {"mrope_section": [1, 1, 2]}}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8},
                        "ffn_config": {"moe_top_k": 2}},
    "HeliumForCausalLM": {"head_dim": HIDDEN // HEADS},
    "LongcatFlashForCausalLM": {"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 2, "head_dim": 8},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2,
        "hc_lowrank": 8},
    "ReformerModelWithLMHead": {
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
        "feed_forward_size": 48, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 32, "pronunciation_embed_dim": 8,
                           "shape_vocab_size": 32, "shape_embed_dim": 8},
    "XLMWithLMHeadModel": {"emb_dim": HIDDEN, "causal": True},
    "XLNetLMHeadModel": {"d_head": HIDDEN // HEADS},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},
}
# fmt: on

NOT_ALONE = dict.fromkeys(
    ["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"],
    "a draft head without keys and values of its own; it runs only inside its target model's generate()",
)


def class_names() -> list[str]:
    """Names of all causal language model classes: the auto mapping's, then other exported `*ForCausalLM`."""
    mapped = sorted(model_types())
    exported = [n for n in dir(transformers) if n.endswith("ForCausalLM") and not n.startswith("Auto")]
    return mapped + [n for n in exported if n not in mapped]


@functools.cache
def model_types() -> dict[str, list[str]]:
    """Class name -> the model types that `AutoModelForCausalLM` loads as it."""
    types: dict[str, list[str]] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in names if isinstance(names, tuple) else (names,):
            types.setdefault(name, []).append(model_type)
    return types


def tiny(name: str, seed: int = 0, attn_implementation: str = "eager") -> PreTrainedModel:
    """A tiny random model of a class or model type ("LlamaForCausalLM", "llama"): float32, eval mode.

    Raises `ValueError` for a class of `NOT_ALONE`, else whatever Transformers raises when it builds one.
    """
    if not hasattr(transformers, name):
        name = next(cls for cls, types in model_types().items() if name in types)
    if name in NOT_ALONE:
        raise ValueError(f"{name}: {NOT_ALONE[name]}")
    cls, config = getattr(transformers, name), tiny_config(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls._from_config(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"{name} is not tiny: {parameters / 1e6:.1f}M parameters; shrink them in SPECIAL")
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attn_implementation).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in parameter_name:  # state space decays keep their meaning
            parameter.data.normal_(0, WEIGHT_STD, generator=generator)
    # No end token, so that generation runs its full length; the rest is what MusicGen's own generate() needs.
    model.generation_config.update(
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=1,
        num_beams=1,
        num_return_sequences=1,
    )
    return model


def tiny_config(name: str) -> PreTrainedConfig:
    return shrink(getattr(transformers, name).config_class, SPECIAL.get(name, {}))


def shrink(config_class: type[PreTrainedConfig], special: dict) -> PreTrainedConfig:
    special = dict(special)
    fields = {field.name for field in dataclasses.fields(config_class)}
    default = config_class()
    values = default.to_dict()
    kwargs = {name: size for name, size in SIZES.items() if name in fields}
    # None switches these off; a size would switch them on.
    kwargs.update({n: None for n in ("sliding_window", "q_lora_rank") if n in fields and values.get(n) is None})
    if {"kv_lora_rank", "num_key_value_heads"} <= fields:  # latent attention: as many KV heads as heads
        kwargs["num_key_value_heads"] = HEADS
        kwargs.pop("head_dim", None)
    for part in config_class.sub_configs:
        if part in fields and getattr(default, part) is not None:
            kwargs[part] = shrink(type(getattr(default, part)), special.pop(part, {}))
    if count := next((name for name in LAYER_COUNTS if name in fields), None):
        lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == values[count] and n in fields}
        lists = {n: v for n, v in lists.items() if not n.endswith(("_ids", "_idxs", "moe_layers"))}
        keep = layers_to_keep(list(zip(*lists.values(), strict=True))) if lists else [0, 1]
        kwargs.update({name: [value[i] for i in keep] for name, value in lists.items()})
        kwargs.update({name: len(keep) for name in LAYER_COUNTS if name in fields})
    return config_class(**(kwargs | special))


def layers_to_keep(kinds: list[tuple]) -> list[int]:
    """Indices of the first layer of each kind, at most MAX_LAYERS, and of more to make two.

    >>> layers_to_keep(["local"] * 5 + ["global"] + ["local"] * 5 + ["global"])
    [0, 5]
    """
    first = sorted({str(kind): i for i, kind in reversed(list(enumerate(kinds)))}.values())[:MAX_LAYERS]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + rest[: max(0, 2 - len(first))])


def why_not(name: str) -> str | None:
    """Why no tiny model of this class can be built here, or None."""
    if name in NOT_ALONE:
        return NOT_ALONE[name]
    try:
        tiny(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def buildable() -> dict[str, str | None]:
    """Every class name -> None where `tiny` builds it, else the reason."""
    return {name: why_not(name) for name in class_names()}
