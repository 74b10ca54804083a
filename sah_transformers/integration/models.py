"""Switching a model's attention: which modules can be sparse, ``enable``, ``disable``, ``supported``."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from sah_transformers.attention import check_kernel
from sah_transformers.config import SparseAttentionConfig
from sah_transformers.integration.cache_state import remember
from sah_transformers.integration.config_property import NAME, note_built, sparse_data, text_config
from sah_transformers.integration.plan import layer_count, never_sparse, plan_of

logger = logging.get_logger(__name__)

NOT_THROUGH_INTERFACE = "its attention does not go through Transformers' AttentionInterface"


@dataclass(frozen=True)
class LayerSupport:
    """One attention layer: whether it is (or would be) sparse, and if not, why."""

    layer_idx: int
    name: str
    sparse: bool
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer_idx} ({self.name}): {'sparse' if self.sparse else 'dense: ' + self.reason}"


@dataclass(frozen=True)
class Support:
    """Answer of ``supported``: true when the model can be sparse; ``reason`` says why not."""

    supported: bool
    reason: str = ""
    layers: list[LayerSupport] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.supported

    def __str__(self) -> str:
        head = "supported" if self.supported else f"not supported: {self.reason}"
        return "\n".join([head, *map(str, self.layers)])


@cache
def _uses_interface(kind: Any) -> bool:
    """Whether a module's forward looks its attention up in Transformers' interface."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError, AttributeError):
        return False


def attention_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of the language model's attention layers, in order."""
    return [(name, module) for name, module in _interface_modules(model) if isinstance(module.layer_idx, int)]


def _interface_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The language model's modules that look their attention up in the interface; ``layer_idx`` may be None."""
    config: Any = getattr(model, "config", None)
    kind: Any = object if config is None else type(text_config(config))
    return [
        (name, module)
        for name, module in model.named_modules()
        if _uses_interface(module.__class__)
        and hasattr(module, "layer_idx")
        and isinstance(getattr(module, "config", None), kind)
    ]


def why_unsupported(model: PreTrainedModel) -> str:
    """Why no layer of the model can be sparse; empty if some can."""
    modules = attention_modules(model)
    if not modules:
        if _interface_modules(model):
            return "its attention modules have no layer index of their own"
        if not any("attention" in type(module).__name__.lower() for module in model.modules()):
            return "it has no attention layers"
        return NOT_THROUGH_INTERFACE
    if any("block_indices" in _forward_source(module.__class__) for _, module in modules):
        return "it selects blocks of keys itself (block_indices)"
    if all(never_sparse(module) for _, module in modules):
        return f"every attention layer is {never_sparse(modules[0][1])}"
    return ""


@cache
def _forward_source(kind: Any) -> str:
    return inspect.getsource(kind.forward)


def check_class(kind: type[PreTrainedModel], config: Any) -> None:
    """Raise for a model class that defines attention of its own outside the interface, before it is built.

    Raises:
        ValueError: naming the model and the reason.
    """
    module = sys.modules.get(kind.__module__)
    try:
        source = inspect.getsource(module) if module else ""
    except (OSError, TypeError):
        return
    by_table = "_CLASSES[config._attn_implementation]" in source  # would fail with a bare KeyError
    alone = not getattr(config, "sub_configs", None) and re.search(r"^class \w*Attention\w*\(", source, re.MULTILINE)
    if by_table or (alone and "ALL_ATTENTION_FUNCTIONS" not in source):
        raise ValueError(f"{kind.__name__} cannot use sparse attention: {NOT_THROUGH_INTERFACE}")


def refuse(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` with the reason for a model of which no layer can be sparse."""
    reason = why_unsupported(model)
    if reason:
        raise ValueError(f"{type(model).__name__} cannot use sparse attention: {reason}")


def attach(model: PreTrainedModel) -> None:
    """Make a built model ready: check it against its configuration and give its attention modules their hooks.

    Raises:
        ValueError: when the model cannot be sparse, an index names no layer, or nothing is left sparse.
    """
    config = text_config(model.config)
    if config._attn_implementation != NAME:
        return
    note_built(config)
    if why_unsupported(model):
        if isinstance(model, GenerationMixin):  # others may be parts of a model that is supported
            refuse(model)
        return
    if sparse_data(config) is None:
        return
    modules = attention_modules(model)
    parsed = SparseAttentionConfig.from_dict(sparse_data(config) or {})
    count = layer_count(config, max(module.layer_idx for _, module in modules))
    for problem in parsed.check_layers(count):
        logger.warning_once(f"preset {parsed.preset!r}: ignored {problem}")
    layers = _report(modules)
    check_kernel(parsed.kernel)
    wanted = parsed.maskers or parsed.layers or not isinstance(parsed.prefill, str)
    if wanted and not any(layer.sparse for layer in layers):
        lines = "\n".join(f"  {layer}" for layer in layers)
        raise ValueError(f"sparse_attention leaves no layer of {type(model).__name__} sparse:\n{lines}")
    for _, module in modules:
        install_hook(module)


def _report(modules: list[tuple[str, Any]]) -> list[LayerSupport]:
    report = []
    for name, module in modules:
        plan = plan_of(module)
        report.append(LayerSupport(module.layer_idx, name, not plan.dense, plan.dense))
    return sorted(report, key=lambda layer: layer.layer_idx)


def install_hook(module: Any) -> None:
    """Let the module's forward hand its cache on to the attention function, once."""
    if module.__dict__.get("_sah_hooked") or not _passes_keywords(module.__class__):
        return
    module.register_forward_pre_hook(hand_cache_on, with_kwargs=True)
    module.__dict__["_sah_hooked"] = True


@cache
def _passes_keywords(kind: Any) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


@cache
def _cache_position(kind: Any) -> int | None:
    """Index of the cache among a forward's positional arguments (without self)."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return next((names.index(n) for n in ("past_key_values", "layer_past", "past_key_value") if n in names), None)


def hand_cache_on(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: the call's cache becomes the keyword ``sah_cache``; it is not kept anywhere."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("layer_past")
    if cache is None:
        at = _cache_position(module.__class__)
        cache = args[at] if at is not None and at < len(args) else None
    if cache is None:
        return None
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if isinstance(hidden, torch.Tensor):
        remember(cache, getattr(module, "layer_idx", None), hidden.shape[1])
    return args, {**kwargs, "sah_cache": cache}


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object of the language model: parts may hold copies."""
    inner = text_config(model.config)
    found = {id(inner): inner}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(config, type(inner)):
            found[id(config)] = config
    return list(found.values())


def enable(model: PreTrainedModel, sparse_attention: Any) -> PreTrainedModel:
    """Make a loaded model sparse.

    Args:
        model: any Transformers decoder model whose attention goes through ``AttentionInterface``.
        sparse_attention: a dict, a list of maskers, a ``SparseAttentionConfig``, a preset's name or a file's path.

    Returns:
        The same model.

    Raises:
        ValueError: for a bad configuration or a model that cannot be sparse; the model is left as it was.
    """
    _check_model(model)
    data = SparseAttentionConfig.parse(sparse_attention).to_dict()
    refuse(model)
    before = _snapshot(model)
    for config in _configs(model):
        if config._attn_implementation != NAME:
            model.__dict__["_sah_before"] = config._attn_implementation
        config._attn_implementation_internal = NAME
        config.__dict__["sparse_attention"] = data
    model.config.__dict__["sparse_attention"] = data
    try:
        attach(model)
    except ValueError:
        _restore(before)
        raise
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable`` (or a sparse load): the model attends densely, and saves no ``sparse_attention``.

    Returns:
        The same model.
    """
    _check_model(model)
    before = model.__dict__.pop("_sah_before", None) or model.get_correct_attn_implementation(None)
    for config in _configs(model):
        config.__dict__.pop("sparse_attention", None)
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = before
    model.config.__dict__.pop("sparse_attention", None)
    return model


def supported(model: PreTrainedModel) -> Support:
    """Whether the model can be sparse, and each attention layer's state under its present configuration.

    A model without a configuration is described as it would be with a stack on every layer.
    """
    _check_model(model)
    reason = why_unsupported(model)
    if reason:
        return Support(False, reason)
    modules = attention_modules(model)
    config = text_config(model.config)
    if sparse_data(config) is not None:
        layers = _report(modules)
        if config._attn_implementation != NAME:
            reason = f"attn_implementation={config._attn_implementation!r} sets sparse_attention aside"
            layers = [replace(layer, sparse=False, reason=layer.reason or reason) for layer in layers]
        return Support(True, "", layers)
    before = _snapshot(model)
    data = SparseAttentionConfig.parse([{"type": "causal"}]).to_dict()
    for config in _configs(model):
        config.__dict__["sparse_attention"] = data
    try:
        return Support(True, "", _report(modules))
    finally:
        _restore(before)


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a Transformers model, got {type(model).__name__}")


def _snapshot(model: PreTrainedModel) -> list[tuple[Any, dict[str, Any]]]:
    names = ("sparse_attention", "_attn_implementation_internal")
    configs = {id(c): c for c in [model.config, *_configs(model)]}.values()
    return [(c, {name: c.__dict__[name] for name in names if name in c.__dict__}) for c in configs]


def _restore(snapshot: list[tuple[Any, dict[str, Any]]]) -> None:
    for config, values in snapshot:
        for name in ("sparse_attention", "_attn_implementation_internal"):
            if name in values:
                config.__dict__[name] = values[name]
            else:
                config.__dict__.pop(name, None)
