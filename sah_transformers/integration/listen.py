"""Hearing the queries and keys of a model's attention layers, after their rotary embedding, as a text goes through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sah_transformers.integration.attention_function import sah_attention, sah_mask
from sah_transformers.integration.models import _check_model, _configs, _restore, _snapshot, attention_modules, refuse
from sah_transformers.integration.plan import never_sparse, window_of

Hear = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the layer's index, its queries ``[B, H, Q, D]`` and its keys ``[B, G, K, D]``."""


LISTENING = "sah_listening"
"""The attention implementation's name: dense, and the module's ``_sah_hear`` is told."""


class Enough(Exception):
    """Raised by a ``Hear`` that needs no further layers of this call."""


def layers_to_hear(model: PreTrainedModel, windowed: bool = True) -> list[int]:
    """Indices of the layers that can be sparse; without those that the model windows itself unless ``windowed``.

    Raises:
        ValueError: for a model that cannot be sparse.
    """
    _check_model(model)
    refuse(model)
    modules = [module for _, module in attention_modules(model) if not never_sparse(module)]
    return sorted({module.layer_idx for module in modules if windowed or window_of(module) is None})


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    hear = module.__dict__.get("_sah_hear")
    if hear is not None:
        hear(module.layer_idx, query, key)
    return sah_attention(module, query, key, *args, **kwargs)


AttentionInterface.register(LISTENING, _attention)
AttentionMaskInterface.register(LISTENING, sah_mask)


@contextlib.contextmanager
def listening(model: PreTrainedModel, hear: Hear) -> Iterator[Callable[[torch.Tensor], None]]:
    """Lets ``hear`` know what every attention layer attends with, while the model attends densely.

    Yields:
        a function that runs token ids ``[B, n]`` through the model, without gradients and without a cache.

    Raises:
        ValueError: for a model that cannot be sparse.

    The model is as it was afterwards, whatever happens inside: attention, ``sparse_attention``, training mode.
    """
    layers_to_hear(model)  # refuses what cannot be heard
    modules = [module for _, module in attention_modules(model) if not never_sparse(module)]
    before, modes = _snapshot(model), [(module, module.training) for module in model.modules()]
    body = model.base_model  # no logits: a long block's would take more memory than all that is heard

    def read(ids: torch.Tensor) -> None:
        with torch.no_grad(), contextlib.suppress(Enough):
            body(input_ids=ids.to(model.device), use_cache=False)

    try:
        for config in [model.config, *_configs(model)]:
            config.__dict__.pop("sparse_attention", None)
        for config in _configs(model):
            config._attn_implementation_internal = LISTENING
        for module in modules:
            module.__dict__["_sah_hear"] = hear
        model.eval()
        yield read
    finally:
        _restore(before)
        for module, training in modes:
            module.training = training
        for module in modules:
            module.__dict__.pop("_sah_hear", None)
