"""Which model and which text a prepared file was made from, as plain data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sah_transformers.prepare.text import Text

SAMPLE = 64
"""Numbers of each parameter that a model is recognised by."""


def origin_of(name: str, model: Any, text: Text, blocks: torch.Tensor) -> dict[str, Any]:
    """The record that a file carries: the model's name, type, shape and fingerprint; the text's name, hash and size.

    Args:
        name: what the model was asked for by; of a path, only the last part is kept.
        blocks: the token ids ``[N, block]`` that were read.
    """
    config = model.config.get_text_config()
    fields = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    shape = {field: getattr(config, field) for field in fields if isinstance(getattr(config, field, None), int)}
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "model_type": getattr(config, "model_type", type(model).__name__),
        "model_shape": shape,
        "model_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": text.name,
        "text_sha256": text.sha256,
        "tokens": blocks.numel(),
        "block": blocks.shape[1],
        "tokens_sha256": hashlib.sha256(blocks.cpu().numpy().tobytes()).hexdigest(),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of every parameter's name, shape and first numbers: the same weights give the same one."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()
