"""A block of rows: what a masker may look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

SCORE_EPS = 1e-5
"""Float32 scores closer than this share of the score scale may be ordered wrongly by a matrix product."""


@dataclass(frozen=True)
class Context:
    """What a masker's ``score`` and ``append`` may know besides the tensors.

    Attributes:
        layer_idx: index of the attention layer.
        scaling: factor on q·k.
        softcap: the model's cap on the scaled scores, or None.
        heads: query heads, H.
        head_offset: global number of the first local query head (tensor parallel).
        positions: int64 ``[B, K]``, the number of each key among the sequence's real tokens, -1 for padding.
        padded: whether some keys may be no real tokens; False: each key's position is its place.
        kernel: what may write side data, as for ``sparse_attention``.
        prompt: keys before this call that another stack read, or none: what is made once of a sequence is made of them.
        side: side data of this masker, one tensor ``[B, G or H, K, ...]`` per name that ``append`` returned.
    """

    layer_idx: int = 0
    scaling: float = 1.0
    softcap: float | None = None
    heads: int = 1
    head_offset: int = 0
    positions: torch.Tensor | None = None
    padded: bool = False
    kernel: str = "reference"
    prompt: int = 0
    side: dict[str, torch.Tensor] = field(default_factory=dict)

    def but(self, **changes: Any) -> Context:
        """A copy with other values of some attributes; made several times per call, where ``replace`` is slow."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy


@dataclass
class Rows:
    """Query rows ``[B, H, q, D]`` with the keys in their reach and what is visible of them.

    Attributes:
        queries: ``[B, H, q, D]``.
        keys, values: ``[B, G, K, D]`` and ``[B, G, K, Dv]``.
        visible: bool ``[B|1, 1|H, q, K]``, or None where every row sees every key.
        bias: additive part of the attention mask ``[B|1, 1|H, q, K]``, or None.
        prefix: every row sees exactly its first ``n`` keys (no padding).
        context: layer, scaling, positions, side data.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor | None
    bias: torch.Tensor | None
    prefix: bool
    context: Context
    _cache: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q, K)."""
        return (*self.queries.shape[:3], self.keys.shape[2])

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """``n``, the visible keys of each row: int64 ``[B|1, 1|H, q|1, 1]``."""
        if "counts" not in self._cache:
            if self.visible is None:
                count = torch.full((1, 1, 1, 1), self.keys.shape[2], device=self.keys.device)
            else:
                count = self.visible.sum(-1, keepdim=True)
            self._cache["counts"] = count
        return self._cache["counts"]

    @property
    def ranks(self) -> torch.Tensor:
        """1-based number of each key among the row's visible keys, int32 ``[B|1, 1|H, q|1, K]``.

        Meaningful at visible keys only.
        """
        if "ranks" not in self._cache:
            if self.prefix or self.visible is None:
                size = self.keys.shape[2]
                rank = torch.arange(1, size + 1, device=self.keys.device, dtype=torch.int32)[None, None, None]
            else:
                rank = self.visible.cumsum(-1, dtype=torch.int32)
            self._cache["ranks"] = rank
        return self._cache["ranks"]

    def scores(self) -> torch.Tensor:
        """Full scores ``softcap(scaling * q·k) + bias``, ``[B, H, q, K]`` in at least float32.

        Values at invisible keys are meaningless.
        """
        if "scores" not in self._cache:
            self._cache["scores"] = self._scores(self.queries, self.keys)
        return self._cache["scores"]

    def widen(self) -> bool:
        """Compute scores that are beyond float32 again: they stay finite, and equal at its limits.

        Returns:
            Whether there were any.
        """
        scores = self.scores()
        if scores.dtype != torch.float32 or bool(scores.sum().isfinite()):
            return False
        limit = torch.finfo(torch.float32).max
        wide = self._scores(self.queries.double(), self.keys.double())
        self._cache["scores"] = wide.clamp(-limit, limit).float()
        return True

    def _scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        scores = scores_of(queries, keys, self.context)
        return scores if self.bias is None else scores + self.bias

    def score_error(self) -> torch.Tensor:
        """Bound on the rounding error of each row's ``scores()``, ``[B, H, q, 1]``.

        A float32 dot product of D terms errs by a few times ``sqrt(D)`` roundings of ``|q| |k|``. For a few rows over
        many keys the largest ``|k|`` is taken as twice that of a sample: a pass over the keys would cost a quarter of
        the attention.
        """
        if "score_error" not in self._cache:
            keys, safety = self.keys, 1.0
            if self.shape[2] <= 4 and self.shape[3] > 2048:
                keys, safety = keys[:, :, :: self.shape[3] // 256], 2.0
            dtype = torch.promote_types(keys.dtype, torch.float32)
            query = torch.linalg.vector_norm(self.queries, dim=-1, keepdim=True, dtype=dtype)
            key = torch.linalg.vector_norm(keys, dim=-1, dtype=dtype).amax(-1)  # [B, G]
            scale = safety * query * key.repeat_interleave(self.group_size, dim=1)[:, :, None, None]
            error = 4 * self.queries.shape[-1] ** 0.5 * 2**-24 * abs(self.context.scaling) * scale
            if self.context.softcap is not None:
                error = error + 2**-21 * self.context.softcap
            if self.bias is not None:
                error = error + 2**-22 * self.bias.abs().amax(-1, keepdim=True)
            self._cache["score_error"] = error.nan_to_num(nan=float("inf"), posinf=float("inf"))
        return self._cache["score_error"]

    def exact_scores(self, index: torch.Tensor) -> torch.Tensor:
        """``scores()`` at the positions ``[n, 4]`` (batch, head, row, key), in float64 rounded to float32, ``[n]``."""
        b, h, i, k = index.unbind(-1)
        products = self.queries[b, h, i].double() * self.keys[b, h // self.group_size, k].double()
        scores = capped(products.sum(-1) * self.context.scaling, self.context)
        if self.bias is not None:
            scores = scores + self.bias.expand(self.shape)[b, h, i, k].double()
        return scores.float()

    def candidates(self, active: torch.Tensor | None) -> torch.Tensor | None:
        """Visible keys that are not yet active, bool ``[B|1, H|1, q, K]``; None = all keys."""
        if active is None:
            return self.visible
        return ~active if self.visible is None else self.visible & ~active

    def group_visible(self) -> torch.Tensor | None:
        """Keys that some head of the group sees, bool ``[B|1, 1|G, q, K]``; None = all keys."""
        if self.visible is None or self.visible.shape[1] == 1:
            return self.visible
        return by_group(self.visible, self.keys.shape[1]).any(dim=2)

    def exact(self, batch: int, group: int, index: torch.Tensor) -> Rows:
        """The rows ``index`` of one KV group in float64, for cuts that float32 cannot decide."""
        heads = slice(group * self.group_size, (group + 1) * self.group_size)

        def rows_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            one = tensor[batch if tensor.shape[0] > 1 else 0]
            one = one[heads] if one.shape[0] > 1 or self.queries.shape[1] == 1 else one
            return (one[:, index] if one.shape[1] > 1 or self.queries.shape[2] == 1 else one)[None]

        def side_of(tensor: torch.Tensor) -> torch.Tensor:
            one = tensor[batch : batch + 1]
            if tensor.dim() == 1:
                return one
            return one[:, group : group + 1] if tensor.shape[1] == self.keys.shape[1] else one[:, heads]

        bias = rows_of(self.bias)
        positions = self.context.positions
        context = self.context.but(
            positions=None if positions is None else positions[batch : batch + 1],
            side={name: side_of(tensor) for name, tensor in self.context.side.items()},
            heads=self.group_size,
            head_offset=self.context.head_offset + heads.start,
        )
        return Rows(
            queries=self.queries[batch : batch + 1, heads][:, :, index].double(),
            keys=self.keys[batch : batch + 1, group : group + 1].double(),
            values=self.values[batch : batch + 1, group : group + 1],
            visible=rows_of(self.visible),
            bias=None if bias is None else bias.double(),
            prefix=self.prefix,
            context=context,
        )


def by_group(per_head: torch.Tensor, groups: int) -> torch.Tensor:
    """View ``[B, H, ...]`` as ``[B, G, H//G, ...]``."""
    return per_head.unflatten(1, (groups, per_head.shape[1] // groups))


def dot(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q·k of every head with the keys of its KV head, in at least float32, without repeating KV heads.

    Args:
        queries: ``[B, H, q, D]``; keys: ``[B, G, K, D]``.

    Returns:
        ``[B, H, q, K]``.
    """
    device = queries.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):  # it would round the products
        with torch.autocast(device, enabled=False):
            return dot(queries, keys)
    batch, heads, rows, dim = queries.shape
    groups, size = keys.shape[1:3]
    folded = queries.reshape(batch, groups, heads // groups * rows, dim)
    if _half_on_cuda(queries, keys):  # half-precision products are exact in float32: no float32 copy of the keys
        flat = torch.bmm(folded.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.view(batch, heads, rows, size)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    if queries.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        dtype = torch.float64  # TF32 has the mantissa of half precision
    scores = (folded.to(dtype) @ keys.to(dtype).transpose(-1, -2)).view(batch, heads, rows, size)
    return scores if queries.dtype == torch.float64 else scores.to(torch.promote_types(queries.dtype, torch.float32))


def _half_on_cuda(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    half = queries.dtype in (torch.bfloat16, torch.float16) and keys.dtype == queries.dtype
    differentiable = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    return queries.device.type == "cuda" and half and not differentiable


def scores_of(queries: torch.Tensor, keys: torch.Tensor, ctx: Context) -> torch.Tensor:
    """``softcap(scaling * q·k)``, ``[B, H, q, K]`` in at least float32."""
    if queries.dtype == torch.float32:
        scores = dot(queries * ctx.scaling, keys)  # one pass over the scores less
    else:  # float64 decides ties: scaling the queries first would round their products apart
        scores = dot(queries, keys).mul_(ctx.scaling)
    return capped(scores, ctx)


def capped(scores: torch.Tensor, ctx: Context) -> torch.Tensor:
    """``softcap * tanh(scores / softcap)`` where the model has a cap."""
    return scores if ctx.softcap is None else ctx.softcap * torch.tanh(scores / ctx.softcap)
