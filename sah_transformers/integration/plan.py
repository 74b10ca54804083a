"""What one attention module does: its stacks, or why it stays dense."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from sah_transformers.config import SparseAttentionConfig
from sah_transformers.integration.config_property import sparse_data
from sah_transformers.maskers import Masker, MaskerRegistry, MaskerStack

NO_MASKERS = MaskerStack()


@dataclass(frozen=True)
class LayerPlan:
    """The resolved configuration of one attention module.

    Attributes:
        source: the config's data this was resolved from (compared by identity).
        maskers: the layer's stack.
        prefill: ``"same"``, ``"dense"`` or the stack for calls that read a prompt.
        dense: why the layer stays dense; empty for a sparse layer.
        number: stands for this object, and no other of this process, in compiled code.
        keepers: the layer's maskers that keep side data, those for prompts included.
        first_heads: the global number of the first of so many local query heads, found once.
    """

    source: Any
    maskers: MaskerStack = NO_MASKERS
    prefill: str | MaskerStack = "same"
    decode_max_queries: int = 64
    kernel: str = "auto"
    min_keys: int = 0
    dense: str = ""
    number: int = field(init=False, compare=False)
    keepers: tuple[Masker, ...] = field(init=False, compare=False)
    first_heads: dict[int, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        prompt = () if isinstance(self.prefill, str) else self.prefill
        keepers = {masker.config: masker for masker in (*self.maskers, *prompt) if masker.needs_state}
        self.__setstate__({"keepers": tuple(keepers.values())})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, and what comes out of a file, gets a number of its own, and may be on another rank."""
        self.__dict__.update(state, number=next(_numbers), first_heads={})
        _plans[self.number] = self

    def stack(self, empty_before: bool, queries: int) -> MaskerStack:
        """The stack for a call; empty = dense."""
        if self.prefill == "same" or not (empty_before or queries > self.decode_max_queries):
            return self.maskers
        return NO_MASKERS if isinstance(self.prefill, str) else self.prefill

    def stack_of(self, empty_before: bool, queries: int, keys: int) -> MaskerStack:
        """The stack for a call over so many keys, too few of which make the layer dense."""
        return NO_MASKERS if self.dense or keys < self.min_keys else self.stack(empty_before, queries)

    def prompt_before(self, stack: MaskerStack, queries: int, keys: int) -> int:
        """Keys of a prompt that was read by other maskers before a call by ``stack``; 0 where none was."""
        return keys - queries if self.prefill != "same" and stack is self.maskers else 0


_numbers = itertools.count(1)
_plans: WeakValueDictionary[int, LayerPlan] = WeakValueDictionary()


def plan_number(number: int) -> LayerPlan:
    """The plan with this number.

    Raises:
        RuntimeError: when its model is gone or has another configuration by now.
    """
    plan = _plans.get(number)
    if plan is None:
        raise RuntimeError(
            "compiled code was called for a model, or a sparse_attention, that is gone: compile it again"
        )
    return plan


def plan_of(module: Any) -> LayerPlan:
    """The module's plan, resolved anew when its config's ``sparse_attention`` was assigned."""
    source = sparse_data(getattr(module, "config", None))
    plan = module.__dict__.get("_sah_plan")
    if plan is None or plan.source is not source:
        plan = _resolve(module, source)
        module.__dict__["_sah_plan"] = plan
    return plan


def _resolve(module: Any, source: Any) -> LayerPlan:
    if source is None:
        return LayerPlan(source, dense="no sparse_attention in its config")
    config = SparseAttentionConfig.from_dict(source)
    plan = LayerPlan(
        source,
        decode_max_queries=config.decode_max_queries,
        kernel=config.kernel,
        min_keys=config.min_keys,
    )
    reason = never_sparse(module)
    if reason:
        return replace(plan, dense=reason)
    index = module.layer_idx
    num_layers = layer_count(module.config, index)
    if index in {i % num_layers for i in config.dense_layers if -num_layers <= i < num_layers}:
        return replace(plan, dense="in dense_layers")
    if config.sliding_layers == "dense":
        window = window_of(module)
        if window is not None:
            return replace(plan, dense=f"the model windows it ({window}; sliding_layers='sparse' includes it)")
    stack = MaskerStack(MaskerRegistry.create_masker(c) for c in config.stack_of(index, num_layers))
    prefill: str | MaskerStack = "same"
    if isinstance(config.prefill, str):
        prefill = config.prefill
    else:
        prefill = MaskerStack(MaskerRegistry.create_masker(c) for c in config.prefill)
    heads = getattr(module.config, "num_attention_heads", None)
    for masker in (*stack, *(() if isinstance(prefill, str) else prefill)):
        masker.check_layer(index, heads if isinstance(heads, int) else None, key_dim(module))
        if masker.pages() and window_of(module) is not None:
            kind = masker.config.type
            return replace(plan, dense=f"the model windows it ({window_of(module)}) and {kind} needs whole pages")
    if not stack and (isinstance(prefill, str) or config.maskers):
        return replace(plan, dense="no maskers")
    return replace(plan, maskers=stack, prefill=prefill)


def never_sparse(module: Any) -> str:
    """Why a module can never be sparse, whatever the configuration; empty if it can."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return "it has no layer index"
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        return "cross attention"
    if getattr(module, "is_causal", True) is False:
        return "not causal"
    return ""


def key_dim(module: Any) -> int | None:
    """Dimensions of a key of the module, where it says."""
    dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    return dim if isinstance(dim, int) else None


def layer_count(config: Any, at_least: int) -> int:
    """Layers of the model that ``config`` describes."""
    count = getattr(config, "num_hidden_layers", None)
    return max(count if isinstance(count, int) else 0, at_least + 1)


def window_of(module: Any) -> str | None:
    """The model's own window on this layer in words, or None; one as long as the model's positions is none."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and module.layer_idx < len(kinds) else None
    if kind is not None and "sliding" not in kind and "chunked" not in kind:
        return None
    if kind is not None and "chunked" in kind:
        name, size = "chunks", getattr(config, "attention_chunk_size", None)
    else:
        name, size = "sliding window", getattr(module, "sliding_window", None)
        if size is None or isinstance(size, bool):
            size = getattr(config, "sliding_window", None)
    if kind is None and not isinstance(size, int):
        return None
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(size, int) and isinstance(longest, int) and size >= longest:
        return None
    return f"{name} of {size}" if isinstance(size, int) else name
