"""A layer's attention as operators of PyTorch's: all that ``torch.compile`` and CUDA graphs see of it.

An operator takes tensors and the number of a ``LayerPlan``: everything that a call depends on is in the tensors, a
static cache's valid length as a boolean mask over its whole buffer. Side data come as tensors of static address beside
the keys, which the operator mutates, with the cache's length as a tensor. What is not covered leaves the graph
(``attend_planned``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sah_transformers.attention import Call, make_call, run
from sah_transformers.integration.plan import LayerPlan, key_dim, plan_number
from sah_transformers.kernels import approximate, decode
from sah_transformers.kernels.append import from_device
from sah_transformers.selections import Estimated, Pages
from sah_transformers.static_state import CapturedState, StaticState

TENSORS = ("attention_mask", "sinks", "position_bias", "indices")

CAPTURING = ("cuda",)
"""Types of devices on which compiled code is captured in graphs that the host is no part of."""

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor? sinks, Tensor? position_bias, "
    "Tensor? indices, bool is_causal, float scaling, float? softcap, int plan, int layer_idx, int head_offset"
)


def _call(
    state: StaticState | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    indices: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    plan: int,
    layer_idx: int,
    head_offset: int,
) -> Call:
    """The call of ``sparse_attention`` that the operator's arguments stand for."""
    settled = plan_number(plan)
    stack = settled.stack_of(key.shape[2] == query.shape[2], query.shape[2], key.shape[2])
    return make_call(
        query,
        key,
        value,
        stack,
        attention_mask=attention_mask,
        is_causal=is_causal,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        indices=indices,
        layer_idx=layer_idx,
        head_offset=head_offset,
        min_keys=settled.min_keys,
        kernel=settled.kernel,
        layer_state=state,
        kept=() if state is None else settled.keepers,
        prompt=settled.prompt_before(stack, query.shape[2], key.shape[2]),
    )


@torch.library.custom_op("sah::attention", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def attention_operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Attention ``[B, Q, H, Dv]`` of a layer by its plan; the arguments are ``ARGUMENTS``."""
    mask = rest[0]
    if mask is not None and mask.dtype == torch.bool and key.device.type == "cpu":
        key, value, rest = _until(_end(mask), key, value, *rest)
    return run(_call(None, query, key, value, *rest))[0].contiguous()


@torch.library.custom_op(
    "sah::attention_with_state",
    mutates_args=("state",),
    schema=f"({ARGUMENTS}, Tensor length, str layout, Tensor(a!) state) -> Tensor",
)
def attention_with_state_operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """As ``attention_operator``, for stacks with side data, which it appends to.

    ``key`` is the buffer of a static cache, ``length`` how much of it is filled; ``state`` and ``layout`` are a
    ``StaticState``'s ``memory`` and its layout.
    """
    given, (length, layout, memory) = rest[:-3], rest[-3:]
    keepers = plan_number(given[7]).keepers
    state: StaticState
    if key.device.type in CAPTURING:
        state = CapturedState.over(keepers, layout, memory, length)
    else:
        state = StaticState.of(keepers, layout, memory)
        key, value, given = _until(int(length), key, value, *given)
    return run(_call(state, query, key, value, *given))[0].contiguous()


@attention_with_state_operator.register_fake
@attention_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _until(
    end: int, key: torch.Tensor, value: torch.Tensor, mask: Any, sinks: Any, bias: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """The operators' arguments (keys, values, and the rest) over the first ``end`` keys."""
    mask, bias = (None if tensor is None else tensor[..., :end] for tensor in (mask, bias))
    return key[:, :, :end], value[:, :, :end], (mask, sinks, bias, *rest)


def _end(mask: torch.Tensor) -> int:
    """Keys up to the last that any row of ``mask [B|1, 1|H, Q, K]`` sees: what is behind is a buffer's empty tail."""
    seen = mask.flatten(0, 2).any(dim=0).nonzero()
    return int(seen[-1]) + 1 if seen.numel() else 0


def takes(
    plan: LayerPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Any, state: Any
) -> bool:
    """Whether the operator can stand for a call; asked while it is traced.

    Not for gradients or dropout, not before the side data (of ``state``) have been handed out, not where the choice of
    the stack needs the number of keys before the call, and on a GPU, where it may be captured in a CUDA graph, not
    unless the kernels take it.
    """
    rows = query.shape[2]
    if arguments["dropout"] or (plan.prefill != "same" and 1 < rows <= plan.decode_max_queries):
        return False
    if plan.keepers and state is None:
        return False
    given = [query, key, value, *(arguments[name] for name in TENSORS)]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return False
    if query.device.type not in CAPTURING:
        return True
    batch, heads, _, dim = query.shape
    keys, mask, sinks = key.shape[2], arguments["attention_mask"], arguments["sinks"]
    many = (
        rows > decode.MOST_QUERIES or keys > decode.MOST_KEYS or 4 * batch * heads * rows * keys > decode.MOST_SCRATCH
    )
    if many or arguments["position_bias"] is not None or arguments["indices"] is not None:
        return False
    if mask is None and keys - rows + 1 < plan.min_keys:
        return False
    if plan.keepers:
        plain = mask is not None and mask.dtype == torch.bool and mask.shape[1] == 1 and keys >= plan.min_keys
        return state.captured and rows == 1 and plain and (sinks is None or sinks.dim() == 1)
    kind = (heads, key.shape[1], dim, value.shape[3], query.dtype, key.dtype, value.dtype, str(query.device))
    seen = None if mask is None else (mask.dtype, mask.shape[1] == 1)
    sunk = None if sinks is None else (sinks.dtype, sinks.dim())
    return _captured(plan.number, kind, rows > 1, seen, sunk, arguments["is_causal"], arguments["softcap"])


def capturable(
    plan: LayerPlan, state: StaticState, query: torch.Tensor, keys: torch.Tensor, value: torch.Tensor, **given: Any
) -> bool:
    """Whether the kernels take calls of one row over a static cache, and the appends to its side data.

    Args:
        query: ``[B, H, Q, D]``; keys: ``[B, G, K, D]``, the whole buffer; value: ``[B, G, n, Dv]``, part of it.
        given: ``layer_idx``, ``scaling``, ``softcap``, ``sinks``, ``head_offset`` of the layer.
    """
    if query.device.type not in CAPTURING or plan.kernel == "reference" or not state.complete():
        return False
    values = value[:, :, :1].expand(-1, -1, keys.shape[2], -1)
    mask = torch.ones(1, dtype=torch.bool, device=keys.device).expand(1, 1, 1, keys.shape[2])
    bands = [masker for masker in plan.maskers if not masker.needs_state]
    call = make_call(
        query[:, :, -1:],
        keys,
        values,
        bands,
        mask,
        is_causal=False,
        min_keys=plan.min_keys,
        kernel=plan.kernel,
        **given,
    )
    side = {masker: state.side(masker) for masker in plan.keepers}
    call = replace(call, maskers=plan.maskers, side=[side.get(masker, {}) for masker in plan.maskers])
    if (approximate if approximate.by_side_data(call) else decode).why_not(call):
        return False
    contexts = {masker: replace(call.context, side=tensors) for masker, tensors in side.items()}
    return all(from_device(masker, keys, values, side[masker], contexts[masker]) for masker in side)


def could_take(plan: LayerPlan, module: Any, model: Any) -> bool:
    """Whether the kernels are likely to take steps of a module over a static cache; asked before there is one."""
    if plan.dense:
        return True
    if plan.kernel == "reference":
        return False
    heads, dim = getattr(module.config, "num_attention_heads", None), key_dim(module)
    if not isinstance(heads, int) or dim is None or getattr(module, "v_head_dim", dim) != dim:
        return False
    groups = getattr(module.config, "num_key_value_heads", None) or heads
    if model.device.type not in CAPTURING:
        return True
    kind = (heads, groups, dim, dim, model.dtype, model.dtype, model.dtype, str(model.device))
    if not plan.keepers:
        return _captured(plan.number, kind, False, (torch.bool, True), None, False, None)
    if [masker for masker in plan.maskers if masker.needs_state] != list(plan.maskers[-1:]):
        return False
    known, number = isinstance(plan.maskers[-1].described, Pages | Estimated), _of_all_keys(plan.kernel).number
    return known and not _objection(decode.unfit, number, kind, False, (torch.bool, True), None, False, None)


@cache
def _of_all_keys(kernel: str) -> LayerPlan:
    """A plan that leaves nothing out."""
    return LayerPlan(None, kernel=kernel)


@torch.compiler.assume_constant_result
def _captured(
    plan: int, kind: tuple[Any, ...], several: bool, mask: Any, sinks: Any, is_causal: bool, softcap: float | None
) -> bool:
    """Whether the decode kernels, which never wait for the device, take calls of a kind, whatever B, Q and K."""
    return not _objection(decode.why_not, plan, kind, several, mask, sinks, is_causal, softcap)


@lru_cache(maxsize=256)
def _objection(
    why_not: Callable[[Call], str],
    plan: int,
    kind: tuple[Any, ...],
    several: bool,
    mask: Any,
    sinks: Any,
    is_causal: bool,
    softcap: float | None,
) -> str:
    """What ``why_not`` has against a call of a kind."""
    heads, groups, dim, value_dim, *dtypes, device = kind
    rows, keys = (decode.MOST_QUERIES if several else 1), 2**14 + plan_number(plan).min_keys
    shapes = ((1, heads, rows, dim), (1, groups, keys, dim), (1, groups, keys, value_dim))
    with FakeTensorMode(), torch.device(device):
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        if mask is not None:
            mask = torch.empty(1, 1 if mask[1] else heads, rows, keys, dtype=mask[0])
        if sinks is not None:
            sinks = torch.empty([heads] if sinks[1] == 1 else [1, heads, 1, 1], dtype=sinks[0])
        arguments: Any = (*tensors, mask, sinks, None, None, is_causal, dim**-0.5, softcap, plan, 0, 0)
        call = _call(None, *arguments)
        return "the kernel is 'reference'" if call.kernel == "reference" else why_not(call)
