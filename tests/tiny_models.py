"""Tiny random instances of every causal language model class of the installed Transformers.

A config is shrunk by attribute name (`SIZES`), its per-layer lists are cut to a few layers that still show every
kind of layer (`_layers_to_keep`), and what a family needs on top stands in one table (`SPECIAL`). Weights are
drawn anew, large enough that attention decides the logits: at the usual std of 0.02 a tiny model hardly looks at
its context and a wrong mask would pass every comparison.
"""

import dataclasses
import functools
import math
import warnings

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, HIDDEN, HEADS, KV_HEADS, MAX_POSITIONS, WINDOW = 96, 32, 4, 2, 64, 4

SIZES = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "attention_hidden_size"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim",
                     "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "d_inner",
                     "shared_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
                     "moe_shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
                     "num_encoder_attention_heads", "num_decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "attention_head_dim", "swa_head_dim", "kv_channels", "d_head", "dim_head"], 16),
    # Latent attention: K and V of different widths.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "original_max_position_embeddings", "max_target_positions"], MAX_POSITIONS),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "window_size"], WINDOW),
    "attention_chunk_size": 8,
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    # State space and linear attention layers.
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 2,
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_chunk_size": 4, "mamba_n_groups": 1,
    "mamba_ngroups": 1, "mamba_d_ssm": 64, "state_size": 8, "ssm_state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "n_groups": 1, "chunk_size": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_heads": 4, "linear_head_dim": 8, "lru_width": HIDDEN,
    "conv1d_width": 4, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "num_kv_shared_layers": 0, "rotary_dim": 8,
    # Special tokens inside the vocabulary; no end token, so that generation runs its full length.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
MAX_LAYERS = 4
MAX_PARAMETERS = 3_000_000

MLA_HEAD = {"head_dim": SIZES["qk_rope_head_dim"]}
SMALL_VISION = {"image_size": 16, "patch_size": 8}

# What a family needs beyond the sizes; "base" are arguments without which its default config cannot be made.
SPECIAL: dict[str, dict] = {
    # Hybrids whose layer kinds follow from a period or come with no default.
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "full_attention"],
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ZambaForCausalLM": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "Gemma4ForCausalLM": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "global_head_dim": 24},
    "Gemma4UnifiedForCausalLM": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "global_head_dim": 24},
    "Gemma4ForConditionalGeneration": {"text_config": {"global_head_dim": 24}},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {"global_head_dim": 24}},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    # Sizes that must agree with each other.
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "HeliumForCausalLM": {"head_dim": HIDDEN // HEADS},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "XLNetLMHeadModel": {"d_head": HIDDEN // HEADS},
    "ReformerModelWithLMHead": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_attention_heads": 4,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "RoCBertForCausalLM": {
        "pronunciation_vocab_size": 32,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 32,
        "shape_embed_dim": 8,
    },
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},
    "XLMWithLMHeadModel": {"emb_dim": HIDDEN, "causal": True},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "CsmDepthDecoderForCausalLM": {"num_codebooks": 32, "backbone_hidden_size": HIDDEN},
    "GitForCausalLM": {"vision_config": SMALL_VISION},
    "Phi4MultimodalForCausalLM": {"vision_config": SMALL_VISION | {"crop_size": 16}, "audio_config": {"num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}},
    "BltForCausalLM": {"num_hidden_layers": 2, "vocab_size": 260, "encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 8, "patcher_config": {"vocab_size": 260}, "encoder_config": {"vocab_size": 260, "hidden_size_global": HIDDEN}, "decoder_config": {"vocab_size": 260, "hidden_size_global": HIDDEN}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8}, "ffn_config": {"moe_top_k": 2}},
    "LongcatFlashForCausalLM": {"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 2, **MLA_HEAD},
    "Qwen4ExpForCausalLM": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2, "hc_lowrank": 8},
    "Dots3NoteForCausalLM": {"num_hidden_layers": 3, "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse", "sparse"], "sliding_window": WINDOW, "head_dim": 16, "per_layer_config": {1: {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "head_dim": 24}}},
    "Gemma4AssistantForCausalLM": {"base": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}, "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}, "backbone_hidden_size": HIDDEN},
    "Gemma4UnifiedAssistantForCausalLM": {"backbone_hidden_size": HIDDEN},
}


def class_names() -> list[str]:
    """Names of all causal language model classes: the auto mapping's, then other exported `*ForCausalLM`."""
    mapped = {}
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        mapped.update(dict.fromkeys(value if isinstance(value, tuple) else (value,)))
    others = [
        n
        for n in dir(transformers)
        if n.endswith("ForCausalLM") and not n.startswith("Auto") and n not in mapped
    ]
    return sorted(mapped) + sorted(others)


def tiny_config(name: str):
    return _shrink(getattr(transformers, name).config_class, dict(SPECIAL.get(name, {})))


def _shrink(config_class, special: dict):
    fields = {f.name for f in dataclasses.fields(config_class)}
    default = config_class(**special.pop("base", {}))
    values = default.to_dict()
    kwargs = {k: v for k, v in SIZES.items() if k in fields}
    kwargs.update(
        {k: None for k in ("sliding_window", "q_lora_rank") if k in fields and values.get(k) is None}
    )
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        kwargs["num_key_value_heads"] = HEADS
        kwargs.pop("head_dim", None)
    if "is_decoder" in fields:
        kwargs["is_decoder"] = True
    for part in config_class.sub_configs:
        if part in fields and getattr(default, part) is not None:
            kwargs[part] = _shrink(type(getattr(default, part)), dict(special.pop(part, {})))
    count = next((c for c in LAYER_COUNTS if c in fields), None)
    if count:
        lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == values[count]}
        lists = {
            k: v for k, v in lists.items() if k in fields and not k.endswith(("_ids", "_idxs", "moe_layers"))
        }
        keep = (
            _layers_to_keep(list(zip(*[map(str, v) for v in lists.values()], strict=True)))
            if lists
            else [0, 1]
        )
        kwargs.update({k: [v[i] for i in keep] for k, v in lists.items()})
        kwargs.update({c: len(keep) for c in LAYER_COUNTS if c in fields})
    return config_class(**(kwargs | special))


def _layers_to_keep(kinds: list[tuple]) -> list[int]:
    """Indices of the first layer of each kind, filled up to two."""
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:MAX_LAYERS]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + rest[: max(0, 2 - len(first))])


def tiny(name: str, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A tiny random model in float32 and eval mode, attention "eager" unless `attn_implementation` says otherwise."""
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    kwargs.setdefault("attn_implementation", "eager")
    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config, **kwargs).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{name} is not tiny: {size / 1e6:.1f}M parameters")
    model = cls._from_config(config, **kwargs).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in parameter_name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model
