"""``config.sparse_attention`` on every Transformers config."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedConfig

from sah_transformers.config import SparseAttentionConfig

NAME = "sah"
"""The attention implementation's name."""

_unbuilt: WeakValueDictionary[int, PreTrainedConfig] = WeakValueDictionary()
"""Configs, by id, whose attention was selected by the property and that no model was built from."""


class SparseAttentionProperty:
    """Data descriptor: takes whatever ``SparseAttentionConfig.parse`` takes and keeps plain data.

    The data lie in the config's ``__dict__`` so that Transformers saves them; a config that never had any saves none.
    Setting it selects the attention ``"sah"`` unless another one was asked for. Reading gives a copy: assign a new
    value to change it. None takes both back; a built model's attention stays ``"sah"``, which then is dense, because
    Transformers makes no mask for a model that names none.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type) -> Any:
        return self if config is None else copy.deepcopy(config.__dict__.get("sparse_attention"))

    def __set__(self, config: PreTrainedConfig, value: Any) -> None:
        data = None if value is None else SparseAttentionConfig.parse(value).to_dict()
        for one in (config, text_config(config)):
            if data is None:
                one.__dict__.pop("sparse_attention", None)
                if one.__dict__.get("_attn_implementation_internal") == NAME and _unbuilt.get(id(one)) is one:
                    one._attn_implementation_internal = None
            else:
                one.__dict__["sparse_attention"] = data
        inner = text_config(config)
        if data is not None and inner.__dict__.get("_attn_implementation_internal") is None:
            inner._attn_implementation_internal = NAME
            _unbuilt[id(inner)] = inner


def note_built(config: PreTrainedConfig) -> None:
    """A model was built from the config of its language model."""
    _unbuilt.pop(id(config), None)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model inside ``config``; ``config`` itself where that is no part of it.

    Transformers answers with a renamed copy for flat encoder-decoder configs, and fails while the parts of a config
    do not exist yet.
    """
    try:
        inner = config.get_text_config(decoder=True)
    except (AttributeError, ValueError, TypeError):
        return config
    return inner if any(part is inner for part in _parts(config)) else config


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return parts + [inner for part in parts for inner in _parts(part)]


def sparse_data(config: Any) -> dict[str, Any] | None:
    """The plain data of ``config.sparse_attention``, uncopied, or None."""
    return getattr(config, "__dict__", {}).get("sparse_attention")


def is_sparse(config: Any) -> bool:
    """Whether a language model of this config attends by its ``sparse_attention``."""
    return config._attn_implementation == NAME and sparse_data(config) is not None
