"""The attention function and the mask function that Transformers calls under the name ``"sah"``."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, eager_mask, prepare_padding_mask, sdpa_mask
from transformers.utils import logging

from sah_transformers import repeat
from sah_transformers.attention import Call, check_shapes, make_call, run
from sah_transformers.integration.cache_state import cache_layer, handed_out, is_static, state_of, undo
from sah_transformers.integration.captured import step_underway
from sah_transformers.integration.operator import (
    TENSORS,
    attention_operator,
    attention_with_state_operator,
    capturable,
    takes,
)
from sah_transformers.integration.plan import LayerPlan, plan_of
from sah_transformers.kernels.dense_attention import dense_attention
from sah_transformers.maskers import Masker
from sah_transformers.state import LayerState
from sah_transformers.static_state import StaticState

logger = logging.get_logger(__name__)

BEYOND_SDPA = ("softcap", "sinks", "position_bias", "indices")

LONG_BUFFER = 1024
"""Keys of a static cache from which on dense layers of compiled or captured steps are left to the kernels."""

LONG_PREFILL = 16_384
"""A sparse prefill of more keys than this, on a path without a kernel, is announced with an estimate."""


def sah_mask(
    *, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, config: Any = None, **kwargs: Any
) -> Any:
    """The mask that ``sah_attention`` gets: boolean, or None only where plain causal order is meant.

    A prompt, or a piece of one, up to the n-th token of a static cache gets ``[1, 1, 1, n]``: causal order within the
    first n keys, the rest being the buffer's empty tail. A whole mask of a long prompt would not fit into memory.
    """
    model_type = getattr(config, "model_type", None)
    if model_type == "deepseek_v4":  # adds float biases to the mask
        return eager_mask(q_length=q_length, kv_length=kv_length, config=config, **kwargs)
    if q_length == 1 and not allow_is_causal_skip and is_plain(**kwargs):
        return mask_of_step(kv_length=kv_length, **kwargs)
    if model_type == "doge" and q_length not in (1, kv_length):  # adds its own mask to a None
        allow_is_causal_skip = False
    if allow_is_causal_skip and q_length > 1 and is_plain(**kwargs) and not torch.compiler.is_compiling():
        end = int(kwargs.get("q_offset", 0)) + q_length
        if end <= kv_length and unpadded(end, **kwargs):
            return None if end == kv_length else torch.ones(1, 1, 1, end, dtype=torch.bool, device=kwargs["device"])
    mask = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        **kwargs,
    )
    if mask is None and allow_is_causal_skip and q_length not in (1, kv_length):
        return torch.ones(1, 1, 1, q_length, dtype=torch.bool, device=kwargs.get("device"))
    return mask


def is_plain(
    *, mask_function: Any = causal_mask_function, kv_offset: Any = 0, use_vmap: bool = False, **_: Any
) -> bool:
    """Whether a mask is causal order and padding, over all keys of a cache."""
    return mask_function is causal_mask_function and isinstance(kv_offset, int) and kv_offset == 0 and not use_vmap


def unpadded(keys: int, *, attention_mask: torch.Tensor | None = None, **_: Any) -> bool:
    """Whether all of the first ``keys`` are real tokens."""
    return attention_mask is None or (attention_mask.shape[-1] >= keys and bool(attention_mask[..., :keys].all()))


def mask_of_step(
    *,
    batch_size: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """What ``sdpa_mask`` gives for one query, ``[B, 1, 1, K]``, by four operators: ``generate`` makes a mask for each
    token while the device waits."""
    seen = (torch.arange(kv_length, device=device) <= q_offset)[None]
    padding = prepare_padding_mask(attention_mask, kv_length, 0)
    if padding is not None:
        seen = seen & padding[:, :kv_length]
    return seen[:, None, None].expand(batch_size, 1, 1, kv_length)


def sah_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    sah_cache: Any = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer, sparse or dense as the module's plan says.

    Args:
        module: the attention module; its config holds ``sparse_attention``.
        query, key, value: ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``, the cache included.
        attention_mask: boolean or additive ``[B|1, 1|H, Q, K]``; None = lower-right causal order.
        sah_cache: the cache, injected by the module's hook; None = side data are not kept.
        output_attentions: also return the weights.

    Returns:
        (out ``[B, Q, H, Dv]``, weights ``[B, H, Q, K]`` or None).

    Raises:
        ValueError: for what cannot be applied exactly (``block_indices``, paged caches).
    """
    if block_indices is not None:
        raise ValueError(
            f"{type(module).__name__} selects blocks of keys itself (block_indices); 'sah' does not support it"
        )
    if "block_table" in kwargs or "read_index" in kwargs:
        raise ValueError("continuous batching (a paged cache) is not supported by the attention 'sah'")
    plan = plan_of(module)
    held, prompt = key, _prompt(attention_mask, key)
    if prompt is not None:
        key, value, attention_mask = key[:, :, :prompt], value[:, :, :prompt], None
        is_causal = True  # some models say otherwise where they see a mask
        position_bias = None if position_bias is None else position_bias[..., :prompt]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)  # added to the scores, as eager attention does
    arguments = {
        "attention_mask": attention_mask,
        "is_causal": bool(causal) and attention_mask is None,
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux if sinks is None else sinks,
        "position_bias": position_bias,
        "indices": indices,
        "dropout": dropout if module.training else 0.0,
    }
    recorder = module.__dict__.get("_sah_recorder")
    compiling = torch.compiler.is_compiling()
    step = None if compiling else step_underway()
    in_graph = compiling or step is not None
    if is_causal is False or (plan.dense and recorder is None and not in_graph):
        return attend_dense(query, key, value, arguments, bool(output_attentions))
    if in_graph and recorder is None and not output_attentions:
        plain = all(arguments[name] is None for name in BEYOND_SDPA)
        if plan.dense and plain and not slow_with_mask(query, key, attention_mask):
            return attend_dense(query, key, value, arguments, False)
        layer = cache_layer(sah_cache, module.layer_idx, held) if plan.keepers else None
        state = handed_out(layer, plan.number)
        if takes(plan, query, key, value, arguments, state):
            tensors = [arguments[name] for name in TENSORS]
            numbers = (arguments["is_causal"], arguments["scaling"], softcap, plan.number)
            at = (module.layer_idx, first_head(module, plan, query.shape[1]))
            if layer is None or state is None:
                return attention_operator(query, key, value, *tensors, *numbers, *at), None
            side = (layer.cumulative_length, state.layout, state.memory)
            return attention_with_state_operator(query, key, value, *tensors, *numbers, *at, *side), None
    if step is not None:
        step.left(f"no kernel takes layer {module.layer_idx}")
    attend = attend_uncompiled if compiling else attend_or_undo
    return attend(module, plan, query, key, value, held, arguments, sah_cache, bool(output_attentions), recorder)


def _prompt(mask: torch.Tensor | None, key: torch.Tensor) -> int | None:
    """The number of keys that ``sah_mask`` says are a prompt's, where the others are a static cache's empty tail."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[:3] != (1, 1, 1):
        return None
    return mask.shape[3] if mask.shape[3] < key.shape[2] else None


def slow_with_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether SDPA, which does not split the keys of one query where there is a mask, takes several times as long as
    the kernel for windows does over all keys."""
    masked = mask is not None and mask.dtype == torch.bool
    return masked and query.device.type == "cuda" and query.shape[2] == 1 and key.shape[2] >= LONG_BUFFER


def attend_dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any], weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention, by SDPA where that is exact."""
    if weights or any(arguments[name] is not None for name in BEYOND_SDPA):
        return run(make_call(query, key, value, [], **arguments), return_weights=weights)
    plain = {name: value for name, value in arguments.items() if name not in BEYOND_SDPA}
    return dense_attention(query, key, value, **plain), None


def attend_planned(
    module: Any,
    plan: LayerPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: torch.Tensor,
    arguments: dict[str, Any],
    cache: Any,
    weights: bool,
    recorder: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a layer whose plan is not simply dense; ``held``: the keys as the cache gave them."""
    rows, total = query.shape[2], key.shape[2]
    layer = cache_layer(cache, getattr(module, "layer_idx", None), held)
    in_static = layer is not None and is_static(layer)
    static = in_static and key is held
    prompt = plan.prefill != "same" and 1 < rows <= plan.decode_max_queries
    if layer is not None and static and (plan.keepers or prompt or key.device.type == "cpu"):
        total = int(layer.cumulative_length)
        key, value = key[:, :, :total], value[:, :, :total]
        if arguments["attention_mask"] is not None:
            arguments = {**arguments, "attention_mask": arguments["attention_mask"][..., :total]}
        static = False
    empty_before = not static and total == rows
    stack = plan.stack_of(empty_before, rows, total)
    state: LayerState | None = None
    kept: tuple[Masker, ...] = ()
    if plan.keepers and layer is not None and not getattr(layer, "is_sliding", False):
        kept = plan.keepers if in_static else ()
        state = state_of(layer) if kept or stack.stateful else None
        if isinstance(state, StaticState):
            unasked = [masker for masker in kept if masker.config not in {one.config for one in stack}]
            state.read_on(total - rows, total, unasked)

    def call() -> Call:
        at = {"layer_idx": module.layer_idx, "head_offset": first_head(module, plan, query.shape[1])}
        made = make_call(
            query,
            key,
            value,
            stack,
            min_keys=plan.min_keys,
            layer_state=state,
            kernel=plan.kernel,
            kept=kept,
            prompt=plan.prompt_before(stack, rows, total),
            **at,
            **arguments,
        )
        if isinstance(state, StaticState):
            given = {name: arguments[name] for name in ("scaling", "softcap", "sinks")} | at
            known = state.captured and state.keeper == plan.number
            state.hand_out(kept, plan.number, known or capturable(plan, state, query, held, value, **given))
        return made

    if not stack:
        check_shapes(query, key, value)
        if isinstance(state, StaticState):
            call()
        if recorder is None:
            return attend_dense(query, key, value, arguments, weights)

        def attend() -> Any:
            return attend_dense(query, key, value, arguments, weights)

        return recorder.dense(module.layer_idx, rows, total, attend)

    if rows > 1 and total > LONG_PREFILL:
        announce(call())
    if recorder is not None:
        side_bytes = (lambda: 0.0) if state is None else state.bytes_per_key
        return recorder.sparse(module.layer_idx, call, side_bytes, weights)
    beyond = arguments["position_bias"] is not None or arguments["indices"] is not None or arguments["dropout"]
    if weights or beyond:
        return run(call(), return_weights=weights)
    tensors = (query, key, value, arguments["attention_mask"], arguments["sinks"])
    numbers = (arguments["is_causal"], arguments["scaling"], arguments["softcap"], plan.min_keys, plan.kernel)
    return repeat.attend(lambda: run(call())[0], stack, *tensors, state, *numbers), None


def attend_or_undo(
    module: Any, plan: LayerPlan, query: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``attend_planned``; a failure takes the call's keys out of the cache (the argument before the last two)."""
    try:
        return attend_planned(module, plan, query, *rest)
    except Exception:
        undo(rest[-3], module.layer_idx, query.shape[2])
        raise


attend_uncompiled = torch.compiler.disable(attend_or_undo, recursive=True)
"""Where compiled code meets what the operator does not cover, the graph breaks; not inside a ``try``, where it would be
traced all the same."""


def first_head(module: Any, plan: LayerPlan, heads: int) -> int:
    """The global number of the first of a module's ``heads`` local query heads: not 0 on a tensor-parallel shard."""
    if heads not in plan.first_heads:
        plan.first_heads[heads] = _first_head(module, heads)
    return plan.first_heads[heads]


def _first_head(module: Any, heads: int) -> int:
    total = getattr(module.config, "num_attention_heads", None)
    if not isinstance(total, int) or heads >= total:
        return 0
    for parameter in module.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        names = mesh.mesh_dim_names or ()
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard(0) and (mesh.ndim == 1 or (dim < len(names) and names[dim] == "tp")):
                return mesh.get_local_rank(dim) * heads
    return 0


def announce(call: Call) -> None:
    """Say once per stack how long a long sparse prefill takes, extrapolated from its last rows."""
    what = tuple(masker.config for masker in call.maskers)
    if what in _announced:
        return
    _announced.add(what)
    stop = call.shape[2]
    rows = min(16, stop)
    _synchronize(call.queries)
    start = time.perf_counter()
    with torch.no_grad():
        call.attend(stop - rows, stop, call.queries[:, :, stop - rows :], call.keys, call.values)
    _synchronize(call.queries)
    seconds = (time.perf_counter() - start) * stop / rows * (0.5 if stop == call.shape[3] else 1.0)
    logger.warning(
        f"A sparse prefill of {stop:,} queries over {call.shape[3]:,} keys takes the reference about {seconds:.1f} s "
        "in each layer. prefill='dense' reads the prompt with dense attention instead."
    )


_announced: set[tuple[object, ...]] = set()


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
