"""Where Transformers loads a model: the keyword ``sparse_attention`` is taken and the built model is checked; and where
``generate()`` makes its cache and compiles the model.

Transformers has no entry point for plugins, so this wraps five methods of ``PreTrainedModel`` and two of
``GenerationMixin``. Each wrapper does nothing for a model that is not asked to be sparse.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from sah_transformers.integration.attention_function import sah_attention, sah_mask
from sah_transformers.integration.cache import AppendingCache, append_in_place
from sah_transformers.integration.captured import CapturedSteps, CudaGraphConfig, default_cache
from sah_transformers.integration.config_property import (
    NAME,
    SparseAttentionProperty,
    is_sparse,
    sparse_data,
    text_config,
)
from sah_transformers.integration.guards import once_per_call
from sah_transformers.integration.models import attach, check_class, refuse

logger = logging.get_logger(__name__)

MARK = "_sah_wrapper"

PARALLELISM = "TOKENIZERS_PARALLELISM"


def install() -> None:
    """Register the attention ``"sah"`` and teach stock loading the keyword. Doing it again changes nothing."""
    AttentionInterface.register(NAME, sah_attention)
    AttentionMaskInterface.register(NAME, sah_mask)
    if not isinstance(PreTrainedConfig.__dict__.get("sparse_attention"), SparseAttentionProperty):
        setattr(PreTrainedConfig, "sparse_attention", SparseAttentionProperty())  # noqa: B010
    _wrap(PreTrainedModel, "post_init", _post_init)
    _wrap(PreTrainedModel, "get_correct_attn_implementation", _get_correct_attn_implementation)
    _wrap(PreTrainedModel, "from_pretrained", _from_pretrained)
    _wrap(PreTrainedModel, "_from_config", _from_config)
    _wrap(PreTrainedModel, "get_compiled_call", _get_compiled_call)
    _wrap(GenerationMixin, "_prepare_cache_for_generation", _prepare_cache_for_generation)
    _wrap(GenerationMixin, "_sample", _sample)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    held = owner.__dict__[name]
    is_classmethod = isinstance(held, classmethod)
    original = held.__func__ if is_classmethod else held
    original = getattr(original, MARK, original)  # a reload replaces the wrapper

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, MARK, original)
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def _post_init(original: Callable[..., Any], self: PreTrainedModel) -> None:
    original(self)
    attach(self)


def _get_correct_attn_implementation(
    original: Callable[..., Any],
    self: PreTrainedModel,
    requested_attention: str | None,
    *args: Any,
    **kwargs: Any,
) -> str:
    if requested_attention == NAME:
        check_class(type(self), self.config)
    return original(self, requested_attention, *args, **kwargs)


def _from_pretrained(original: Callable[..., Any], cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("config")
    if "sparse_attention" in kwargs and isinstance(config, PreTrainedConfig):
        kwargs["config"] = _with_keyword(config, kwargs.pop("sparse_attention"), kwargs)
    return _checked(original(cls, *args, **kwargs))


def _from_config(
    original: Callable[..., Any], cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any
) -> Any:
    if "sparse_attention" in kwargs:
        config = _with_keyword(config, kwargs.pop("sparse_attention"), kwargs)
    return _checked(original(cls, config, **kwargs))


def _checked(loaded: Any) -> Any:
    """What loading returned (a model, or a model and its loading report), the model checked as a whole."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    config = text_config(model.config)
    if is_sparse(config):
        refuse(model)
    elif sparse_data(config) is not None:
        logger.warning(
            f"{type(model).__name__} attends densely: attn_implementation={config._attn_implementation!r} was asked "
            "for, which sets its sparse_attention aside"
        )
    return loaded


def _is_sparse(model: Any) -> bool:
    return is_sparse(text_config(model.config))


def _prepare_cache_for_generation(
    original: Callable[..., Any],
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    result = original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    users = generation_config.cache_implementation is not None or getattr(cache, "_is_user_defined", False)
    cache = getattr(cache, "self_attention_cache", cache)
    if type(cache) is DynamicCache and not users and not cache.offloading and _is_sparse(self):
        append_in_place(cache, max_cache_length)
    return result


def _sample(original: Callable[..., Any], self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own loop of greedy search and sampling, the only one that asks for nothing but steps."""
    cache: Any = kwargs.get("past_key_values")
    settings: Any = kwargs.get("generation_config")
    users = settings is None or kwargs.get("synced_gpus") or getattr(cache, "_is_user_defined", False)
    if type(cache) is AppendingCache and not users and cache.get_seq_length() == 0 and _is_sparse(self):
        embeddings = kwargs.get("inputs_embeds")
        prompt = input_ids.shape[1] if embeddings is None else embeddings.shape[1]
        most: list[Any] = [getattr(layer, "most", None) for layer in cache.layers]
        static = default_cache(self, settings, len(input_ids), prompt, most[0]) if most and all(most) else None
        if static is not None:
            settings = copy.copy(settings)
            settings.compile_config = CudaGraphConfig()
            kwargs |= {"past_key_values": static, "generation_config": settings}
            with _kept(PARALLELISM):  # Transformers turns it off for compilers, which nobody starts
                return original(self, input_ids, *args, **kwargs)
    return original(self, input_ids, *args, **kwargs)


@contextlib.contextmanager
def _kept(variable: str) -> Iterator[None]:
    """An environment variable is afterwards as it was before."""
    before = os.environ.get(variable)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _get_compiled_call(original: Callable[..., Any], self: Any, compile_config: Any) -> Any:
    if isinstance(compile_config, CudaGraphConfig):
        return CapturedSteps(self)
    if not _is_sparse(self):
        return original(self, compile_config)
    return once_per_call(functools.partial(original, self), self, compile_config or self._default_compile_config())


def _with_keyword(config: PreTrainedConfig, value: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """A copy of the user's config with the keyword's value; an explicit other attention stays what it is."""
    config = copy.deepcopy(config)
    config.sparse_attention = value
    if value is not None and "attn_implementation" not in kwargs:  # what an earlier model resolved it to says nothing
        text_config(config)._attn_implementation_internal = NAME
    return config
