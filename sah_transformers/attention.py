"""Sparse attention without a model: a stack of maskers, then attention over what they selected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sah_transformers import repeat
from sah_transformers.config import parse_stack
from sah_transformers.kernels.device import HAS_TRITON
from sah_transformers.kernels.dispatch import fast_attention, fast_selection
from sah_transformers.kernels.masked_attention import masked_attention
from sah_transformers.mask import Mask
from sah_transformers.maskers import Masker, MaskerConfig, MaskerRegistry, MaskerStack
from sah_transformers.rows import Context, Rows
from sah_transformers.selections import Described
from sah_transformers.state import LayerState, State, positions_of
from sah_transformers.visibility import Visibility

BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Scores held at once by the reference, per device type: rows are taken in blocks of about this many."""

KERNELS = ("auto", "reference", "triton")


@dataclass
class Call:
    """One attention call, checked: what every block of rows has in common.

    Attributes:
        queries, keys, values: ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``.
        maskers: the stack, in order.
        visibility: which keys each row may see.
        context: layer, scaling, softcap, positions.
        side: side data of each masker of the stack.
        sinks: learned sink logits ``[H]`` or ``[B|1, H, Q|1, 1]``, or None.
        previous: mask ``[B, H, Q, K]`` that the stack starts from, or None.
        min_keys: rows that see fewer keys are dense.
        dropout: share of the normalised weights to drop.
        kernel: ``"auto"``, ``"reference"`` or ``"triton"``.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    maskers: MaskerStack
    visibility: Visibility
    context: Context
    side: list[dict[str, torch.Tensor]]
    sinks: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    min_keys: int = 0
    dropout: float = 0.0
    kernel: str = "auto"

    @property
    def described(self) -> Described:
        """The maskers' selections in the words that kernels understand."""
        return self.maskers.described

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        return (*self.queries.shape[:3], self.keys.shape[2])

    def blocks(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Row ranges that keep the scores of a block within ``most``, by default ``BLOCK_ELEMENTS``."""
        batch, heads, rows, keys = self.shape
        if most is None:
            most = BLOCK_ELEMENTS["cuda" if self.queries.device.type == "cuda" else "cpu"]
        limit = most / max(1, batch * heads)
        start = 0
        while start < rows:
            if self.visibility.is_causal:  # step * reach(start + step) <= limit: early rows reach fewer keys
                before = start + keys - rows
                step = int(((before**2 + 4 * limit) ** 0.5 - before) / 2)
            else:
                step = int(limit / max(1, keys))
            step = max(1, step)
            yield start, min(start + step, rows)
            start += step

    def rows(self, start: int, stop: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Rows:
        """The block of rows ``start:stop`` (``queries`` are theirs) with the keys in their reach."""
        visible, bias = self.visibility.block(start, stop)
        reach = self.visibility.reach(stop)
        context = self.context
        if context.positions is not None:
            context = context.but(positions=context.positions[:, :reach])
        prefix = self.visibility.is_prefix()
        return Rows(queries, keys[:, :, :reach], values[:, :, :reach], visible, bias, prefix, context)

    def select(self, rows: Rows, start: int, stop: int) -> Mask:
        """Run the stack over a block of rows."""
        size = rows.shape[-1]
        if self.previous is None:
            mask = Mask.create_empty_mask(rows.shape, device=rows.keys.device)
        else:
            mask = Mask.from_dense_unchecked(self.previous[:, :, start:stop, :size])
        if size == 0:
            return mask
        context = rows.context
        for masker, side in zip(self.maskers, self.side, strict=True):
            rows.context = context.but(side=_within(masker, side, size)) if side else context
            mask = masker.extend(rows, mask)
        rows.context = context
        if not self.maskers and self.previous is None:
            return _visible_mask(rows)
        if self.min_keys > 1:
            short = rows.counts < self.min_keys
            everything = short if rows.visible is None else short & rows.visible
            mask = mask.merge_mask(Mask.from_dense_unchecked(everything.expand(rows.shape)))
        return mask

    @torch.no_grad()
    def masks(self) -> list[Mask]:
        """The mask of each block of ``blocks()``, without the attention."""
        found = []
        for start, stop in self.blocks():
            rows = self.rows(start, stop, self.queries[:, :, start:stop], self.keys, self.values)
            found.append(self.select(rows, start, stop))
        return found

    def block_sinks(self, start: int, stop: int) -> torch.Tensor | None:
        """The sink logits of rows ``start:stop``, broadcastable to ``[B, H, q, 1]``."""
        if self.sinks is None:
            return None
        sinks = self.sinks.view(1, -1, 1, 1) if self.sinks.dim() == 1 else self.sinks
        return sinks if sinks.shape[2] == 1 else sinks[:, :, start:stop]

    def attend(
        self, start: int, stop: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Mask, Rows]:
        """(out ``[B, q, H, Dv]``, weights ``[B, H, q, K']``, mask, rows) of one block."""
        rows = self.rows(start, stop, queries, keys, values)
        rows.scores()  # with gradients, before the selection asks for them without
        mask = self.select(rows, start, stop)
        sinks = self.block_sinks(start, stop)
        out, weights = masked_attention(rows.scores(), rows.values, mask, rows.visible, sinks, self.dropout)
        suspect = out.detach().abs().sum(-1)  # not finite, or nothing at all: scores may be beyond float32
        if not bool((suspect.isfinite() & (suspect > 0)).all()) and rows.widen():
            mask = self.select(rows, start, stop)
            out, weights = masked_attention(rows.scores(), rows.values, mask, rows.visible, sinks, self.dropout)
        return out.to(self.queries.dtype), weights, mask, rows


def _within(masker: Masker, side: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Side data of the first ``size`` keys; pages and what was prepared once stay whole."""
    whole = {*masker.pages(), *masker.prepared, "ready"}
    return {name: data if name in whole else data[:, :, :size] for name, data in side.items()}


def _visible_mask(rows: Rows) -> Mask:
    if rows.visible is None:
        return Mask.create_full_mask(rows.shape, device=rows.keys.device)
    return Mask.from_dense_unchecked(rows.visible.expand(rows.shape))


def make_call(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    maskers: Sequence[Masker],
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    previous_mask: Mask | None = None,
    dropout: float = 0.0,
    layer_idx: int = 0,
    head_offset: int = 0,
    min_keys: int = 0,
    layer_state: LayerState | None = None,
    kernel: str = "auto",
    kept: Sequence[Masker] = (),
    prompt: int = 0,
) -> Call:
    """Check the arguments of ``sparse_attention`` and bring the side data up to date.

    Args (others are ``sparse_attention``'s):
        kept: maskers whose side data are brought up to date, where not the stack's alone.
        prompt: as in ``Context``.

    Raises:
        ValueError: naming the argument, the rule and the value, before any work.
    """
    check_shapes(queries, keys, values)
    batch, heads, rows, dim = queries.shape
    total = keys.shape[2]
    if sinks is not None and not (tuple(sinks.shape) == (heads,) or (sinks.dim() == 4 and sinks.shape[1] == heads)):
        raise ValueError(f"sinks must have shape [{heads}] or [B|1, {heads}, Q|1, 1], got {list(sinks.shape)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    visibility = Visibility(
        batch, heads, rows, total, attention_mask, is_causal, queries.device, position_bias, indices
    )
    previous = None
    if previous_mask is not None:
        if tuple(previous_mask.shape) != (batch, heads, rows, total):
            raise ValueError(
                f"previous_mask must have shape {[batch, heads, rows, total]}, got {list(previous_mask.shape)}"
            )
        previous = previous_mask.active() if previous_mask.form.unit else previous_mask.get_dense_mask()
    context = Context(
        layer_idx=layer_idx,
        scaling=dim**-0.5 if scaling is None else float(scaling),
        softcap=softcap,
        heads=heads,
        head_offset=head_offset,
        kernel=kernel,
        prompt=prompt,
    )
    stack = maskers if isinstance(maskers, MaskerStack) else MaskerStack(maskers)
    side: list[dict[str, torch.Tensor]] = [{} for _ in stack]
    stateful = kept or stack.stateful
    if stateful:
        state = LayerState() if layer_state is None else layer_state
        new = rows if layer_state is not None else total
        positions = state.update(stateful, keys, values, heads, min(new, total), visibility.real(), context)
        context = context.but(positions=positions, padded=state.padded)
        side = [state.side(masker) if masker in stack.stateful else {} for masker in stack]
    elif stack.needs_positions:
        real = visibility.real()
        everything = torch.ones(batch, total, dtype=torch.bool, device=keys.device)
        positions = positions_of(everything if real is None else real.expand(batch, -1))
        context = context.but(positions=positions, padded=real is not None)
    return Call(queries, keys, values, stack, visibility, context, side, sinks, previous, min_keys, dropout, kernel)


def check_shapes(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ``ValueError`` unless the three fit together, with H a multiple of G."""
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor [B, heads, length, dim], got {got}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if tensor.dtype != queries.dtype:
            raise ValueError(f"{name} must have the queries' dtype {queries.dtype}, got {tensor.dtype}")
    (batch, heads, _, dim), shape = queries.shape, keys.shape
    groups = shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got H={heads}, G={groups} "
            "(tensors are [B, heads, length, dim])"
        )
    if shape[0] != batch or shape[3] != dim:
        raise ValueError(f"keys must have shape [{batch}, G, K, {dim}], got {list(shape)}")
    if values.shape[:3] != shape[:3]:
        raise ValueError(f"values must have shape {list(shape[:3])} + [Dv], got {list(values.shape)}")


def sparse_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    maskers: Sequence[MaskerConfig | Mapping[str, Any] | Masker],
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    previous_mask: Mask | None = None,
    dropout: float = 0.0,
    layer_idx: int = 0,
    head_offset: int = 0,
    kernel: str = "auto",
    state: State | None = None,
    return_mask: bool = True,
) -> Any:
    """Attention of each row over the keys that a stack of maskers selects for it.

    Memory is linear in K: rows are taken block by block, with gradients blocks are recomputed in the backward pass.
    Selection is as if every score were computed in float64 and rounded once to float32; it is not differentiated.
    A NaN or Inf in ``queries`` or ``keys`` affects the rows that see it and no others.

    Args:
        queries: ``[B, H, Q, D]``; keys: ``[B, G, K, D]``; values: ``[B, G, K, Dv]``; H a multiple of G.
        maskers: the stack, in order: configs, dicts with a ``type``, or maskers. ``[]`` is dense attention.
        attention_mask: what is visible: None = every key; 2-D ``[B, K]`` = non-zero for a real token; 4-D boolean
            (True = visible) or additive ``[B|1, 1|H, Q, K]`` (hidden at or below ``finfo.min / 2``).
        is_causal: adds lower-right causal order: row ``i`` sees keys up to ``i + K - Q``.
        scaling: factor on q·k, ``D**-0.5`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: learned sink logits ``[H]`` (or ``[B|1, H, Q|1, 1]``) in the softmax's denominator.
        position_bias: ``[B|1, 1|H, Q, K]`` added to the scores.
        indices: ``[B, Q, n]``, the only keys a row may see, -1 = unused.
        previous_mask: ``[B, H, Q, K]`` that the stack starts from.
        dropout: share of the normalised weights to drop.
        layer_idx, head_offset: which layer and which global head the call starts at (per-layer side data, seeds).
        kernel: ``"reference"`` (PyTorch, any device), ``"triton"`` (raises for what the kernels do not cover) or
            ``"auto"``: on CUDA the Triton kernels where they cover the call and no mask is asked for, else the
            reference.
        state: carries side data per key from call to call of the same sequences.
        return_mask: False returns ``out`` alone and builds no mask.

    Returns:
        ``(out, mask)``: ``[B, Q, H, Dv]`` in the queries' dtype and the ``Mask`` ``[B, H, Q, K]``; or ``out``.

    Raises:
        ValueError: for arguments that do not fit together, before any work.
    """
    check_kernel(kernel)
    configs = parse_stack(maskers, "maskers")
    if any(isinstance(masker, Masker) for masker in maskers):
        stack = MaskerStack(map(MaskerRegistry.create_masker, maskers))
    else:
        stack = MaskerRegistry.stack_of(configs)
    layer_state = None if state is None else state.layer(layer_idx)

    def call() -> Call:
        return make_call(
            queries,
            keys,
            values,
            stack,
            attention_mask=attention_mask,
            is_causal=is_causal,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            position_bias=position_bias,
            indices=indices,
            previous_mask=previous_mask,
            dropout=dropout,
            layer_idx=layer_idx,
            head_offset=head_offset,
            layer_state=layer_state,
            kernel=kernel,
        )

    if return_mask:
        whole, masks = call(), list[Mask]()
        out, _ = run(whole, masks=masks)
        return out, _join(masks, whole)
    given = [queries, keys, values] if sinks is None else [queries, keys, values, sinks]
    others = (attention_mask, position_bias, indices, previous_mask)
    alike = kernel != "reference" and not dropout and all(other is None for other in others)
    if not alike or not all(type(tensor) is torch.Tensor for tensor in given) or torch.compiler.is_compiling():
        return run(call())[0]
    numbers = (is_causal, scaling, softcap, kernel, *[tensor.device for tensor in given])
    tensors = (queries, keys, values, None, sinks, layer_state if stack.stateful else None)
    return repeat.attend(lambda: run(call())[0], stack, *tensors, *numbers, seldom=True)


def check_kernel(kernel: str) -> None:
    """Raise ``ValueError`` for an unknown kernel, and for ``"triton"`` where Triton is not installed."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}")
    if kernel == "triton" and not HAS_TRITON:
        raise ValueError("kernel 'triton' needs Triton: pip install 'sah-transformers[triton]'")


def run(
    call: Call, return_weights: bool = False, masks: list[Mask] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of all rows, by a Triton kernel or block by block.

    Args:
        call: the checked call.
        return_weights: also return the normalised weights (``[B, H, Q, K]``, quadratic memory).
        masks: receives the mask of each block.

    Returns:
        (out ``[B, Q, H, Dv]``, weights or None).

    Raises:
        ValueError: for ``kernel="triton"`` where no kernel takes the call.
    """
    if return_weights and call.kernel == "triton":
        raise ValueError("kernel 'triton' gives no attention weights; use 'auto' or 'reference'")
    if not return_weights and (masks is None or call.kernel == "triton"):
        fast = fast_attention(call)
        if fast is not None:
            if masks is not None:
                masks.extend(call.masks())
            return fast, None
    batch, heads, rows, _ = call.shape
    inputs = (
        call.queries,
        call.keys,
        call.values,
        call.sinks,
        call.visibility.position_bias,
        call.visibility.mask,
    )
    recompute = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out = call.queries.new_empty(batch, rows, heads, call.values.shape[-1]) if not recompute else None
    parts: list[torch.Tensor] = []
    weights = None
    if return_weights:
        weights = torch.zeros(call.shape, dtype=call.queries.dtype, device=call.queries.device)
    for start, stop in call.blocks():
        tensors = (call.queries[:, :, start:stop], call.keys, call.values)
        if recompute and not return_weights:
            part = checkpoint(lambda *t, b=(start, stop): call.attend(*b, *t)[0], *tensors, use_reentrant=False)
            parts.append(part)  # type: ignore[arg-type]
            continue
        part, block_weights, mask, _ = call.attend(start, stop, *tensors)
        if weights is not None:
            weights[:, :, start:stop, : block_weights.shape[-1]] = block_weights.to(weights.dtype)
        if masks is not None:
            masks.append(mask)
        if out is None:
            parts.append(part)
        else:
            out[:, start:stop] = part
    if recompute and masks is not None and not masks:
        masks.extend(call.masks())
    if out is None:
        out = torch.cat(parts, dim=1) if parts else call.queries.new_empty(batch, 0, heads, call.values.shape[-1])
    return out, weights


def _join(masks: list[Mask], call: Call) -> Mask:
    """One mask ``[B, H, Q, K]`` of the blocks' masks; beyond a block's reach it is what the call starts from."""
    if len(masks) == 1 and masks[0].shape == call.shape:
        return masks[0]
    unit = all(mask.form.unit for mask in masks)
    joined = torch.zeros(call.shape, dtype=torch.bool if unit else torch.float32, device=call.queries.device)
    if call.previous is not None:
        joined.copy_(call.previous)
    for (start, stop), mask in zip(call.blocks(), masks, strict=True):
        part = mask.active() if unit else mask.get_dense_mask()
        joined[:, :, start:stop, : part.shape[-1]] = part
    return Mask.from_dense_unchecked(joined)


def selection(
    masker: Masker,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sparse_meta_data: dict[str, Any] | None = None,
    previous_mask: Mask | None = None,
    is_causal: bool = False,
    layer_idx: int = 0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    head_offset: int = 0,
    kernel: str = "auto",
    **_: Any,
) -> Mask:
    """``previous_mask`` plus what ``masker`` selects: the work behind ``Masker.add_mask``."""
    check_kernel(kernel)
    layer_state = None
    if sparse_meta_data is not None and masker.needs_state:
        layer_state = sparse_meta_data.setdefault("state", State()).layer(layer_idx)
    call = make_call(
        queries,
        keys,
        values,
        [masker],
        attention_mask=attention_mask,
        is_causal=is_causal,
        scaling=scaling,
        softcap=softcap,
        position_bias=position_bias,
        indices=indices,
        previous_mask=previous_mask,
        layer_idx=layer_idx,
        head_offset=head_offset,
        layer_state=layer_state,
        kernel=kernel,
    )
    fast = fast_selection(call)
    return _join(call.masks(), call) if fast is None else Mask.from_dense_unchecked(fast)
