"""The forms in which a `Mask` may hold its weights. `Form` is the protocol; a new form is one small class."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Form:
    """Weights of shape `[..., n]`, held in some way. Nothing here is checked and, but for `count`, `is_full`,
    `index` and a merge of two sparse forms, nothing waits for the device.

    A new form is a frozen dataclass with a `name`, its tensors (or None) as fields, and `dense`. It inherits:

    - `to(device)`: moves every tensor field; override when a field holds tensors in another way.
    - `active`, `index`, `count`, `is_full`: through `dense`; override what the form knows more cheaply.
    - `merge(other)`: None, "no better way than dense"; override for the partners that the form knows.
    - `unit`: False; True promises, without looking at a value, that every active weight is 1.
    - `sparse`: False; True promises that `index` is linear in the stored entries.

    Forms are immutable: no method writes into a stored tensor, so masks may share one. What a method returns
    may be a stored tensor, or a view that repeats one element: readers do not write into it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weights handed out; stored tensors may differ
    device: torch.device

    name: ClassVar[str]
    sparse: ClassVar[bool] = False

    @property
    def unit(self) -> bool:
        return False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def dense(self) -> Tensor:
        """The weights, `[..., n]` in `dtype`."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Form:
        changes: dict[str, Any] = {"device": device}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value.to(device)
        return replace(self, **changes)

    def active(self) -> Tensor:
        """Weight > 0, bool `[..., n]`."""
        return self.dense() > 0

    def compact(self) -> Tensor:
        """Weight > 0, bool, broadcastable to `[..., n]`: rows that are alike need not be written out."""
        return self.active()

    def index(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(indices, ptr, data)` of the active positions: flat int64 `[nnz]` ascending, int64 `[rows + 1]`,
        weights `[nnz]` in `dtype` (None = ones)."""
        active = self.active().reshape(self.rows, self.shape[-1])
        ptr = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.device)
        ptr[1:] = active.sum(-1).cumsum(0)
        indices = active.flatten().nonzero().squeeze(-1)
        return indices, ptr, None if self.unit else self.dense().flatten()[indices]

    def count(self, visible: Tensor | None = None) -> int:
        """Number of active positions, or of those True in `visible` (bool, expanded to `[..., n]`)."""
        if self.sparse and visible is not None:
            positions = torch.unravel_index(self.index()[0], self.shape)
            return int(visible[positions].sum())
        active = self.active()
        return int((active if visible is None else active & visible).sum())

    def is_full(self) -> bool:
        """Whether every weight is 1."""
        return self.count() == self.numel and (self.unit or bool((self.dense() == 1).all()))

    def merge(self, other: Form) -> Form | None:
        """The sum clamped to 1 with a form of the same shape, dtype and device, or None (see the class)."""
        return None


@dataclass(frozen=True, eq=False)
class UniformForm(Form):
    """Base of full and empty: one weight everywhere, nothing stored."""

    weight: ClassVar[int]

    @property
    def unit(self) -> bool:
        return True

    def dense(self) -> Tensor:
        return torch.full((), self.weight, dtype=self.dtype, device=self.device).expand(self.shape)

    def active(self) -> Tensor:
        return torch.full((), self.weight, dtype=torch.bool, device=self.device).expand(self.shape)

    def count(self, visible: Tensor | None = None) -> int:
        return self.weight * (self.numel if visible is None else int(visible.sum()))


@dataclass(frozen=True, eq=False)
class FullForm(UniformForm):
    name = "full"
    weight = 1

    def merge(self, other: Form) -> Form:
        return self


@dataclass(frozen=True, eq=False)
class EmptyForm(UniformForm):
    name = "empty"
    weight = 0

    def merge(self, other: Form) -> Form:
        return other


@dataclass(frozen=True, eq=False)
class DenseForm(Form):
    """`tensor`, broadcastable to `[..., n]`: weights in any real dtype, or bool (True = weight 1)."""

    tensor: Tensor
    name = "dense"

    @property
    def unit(self) -> bool:
        return self.tensor.dtype == torch.bool

    def dense(self) -> Tensor:
        weights = self.tensor.to(self.dtype)
        return weights if tuple(weights.shape) == self.shape else weights.expand(self.shape)

    def active(self) -> Tensor:
        active = self.compact()
        return active if tuple(active.shape) == self.shape else active.expand(self.shape)

    def compact(self) -> Tensor:
        return self.tensor if self.unit else self.tensor.to(self.dtype) > 0

    def merge(self, other: Form) -> Form | None:
        if not (isinstance(other, DenseForm) and self.unit and other.unit):
            return None
        return replace(self, tensor=self.tensor | other.tensor)


@dataclass(frozen=True, eq=False)
class IndexForm(Form):
    """CSR over rows: flat `indices [nnz]` strictly ascending, `ptr [rows + 1]`, both int64; `data [nnz]` of
    weights above 0 (None = ones)."""

    indices: Tensor
    ptr: Tensor
    data: Tensor | None
    name = "index"
    sparse = True

    @property
    def unit(self) -> bool:
        return self.data is None

    def dense(self) -> Tensor:
        if self.data is None:
            return self.active().to(self.dtype)
        flat = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        return flat.scatter_(0, self.indices, self.data.to(self.dtype)).view(self.shape)

    def active(self) -> Tensor:
        flat = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        return flat.scatter_(0, self.indices, True).view(self.shape)

    def index(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.indices, self.ptr, None if self.data is None else self.data.to(self.dtype)

    def count(self, visible: Tensor | None = None) -> int:
        return self.indices.numel() if visible is None else super().count(visible)

    def merge(self, other: Form) -> Form | None:
        if not other.sparse:
            return None
        more, _, more_data = other.index()
        indices, entry = torch.cat([self.indices, more]).unique(return_inverse=True)
        starts = torch.arange(self.rows + 1, device=self.device) * self.shape[-1]
        data = None
        if self.data is not None or more_data is not None:
            both = [
                torch.ones_like(i, dtype=self.dtype) if w is None else w.to(self.dtype)
                for i, w in ((self.indices, self.data), (more, more_data))
            ]
            data = torch.zeros_like(indices, dtype=self.dtype).index_add_(0, entry, torch.cat(both))
            data = data.clamp_(max=1)
        return replace(self, indices=indices, ptr=torch.searchsorted(indices, starts), data=data)


@dataclass(frozen=True, eq=False)
class RowWiseForm(Form):
    """`positions [..., k]` int64 in each row, in any order, none twice, -1 = unused slot; `data [..., k]` of
    weights above 0 where the slot is used (None = ones)."""

    positions: Tensor
    data: Tensor | None
    name = "row_wise"
    sparse = True

    @property
    def unit(self) -> bool:
        return self.data is None

    def _targets(self) -> Tensor:
        """Positions with the unused slots pointing one past the row, `[rows, k]`."""
        slots = self.positions.reshape(self.rows, self.positions.shape[-1])
        return torch.where(slots < 0, self.shape[-1], slots)

    def dense(self) -> Tensor:
        if self.data is None:
            return self.active().to(self.dtype)
        padded = torch.zeros(self.rows, self.shape[-1] + 1, dtype=self.dtype, device=self.device)
        padded.scatter_(1, self._targets(), self.data.to(self.dtype).reshape(self.rows, self.data.shape[-1]))
        return padded[:, :-1].reshape(self.shape)

    def active(self) -> Tensor:
        padded = torch.zeros(self.rows, self.shape[-1] + 1, dtype=torch.bool, device=self.device)
        return padded.scatter_(1, self._targets(), True)[:, :-1].reshape(self.shape)

    def index(self) -> tuple[Tensor, Tensor, Tensor | None]:
        slots, order = self._targets().sort(dim=1)
        used = slots < self.shape[-1]
        starts = torch.arange(self.rows, device=self.device)[:, None] * self.shape[-1]
        ptr = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.device)
        ptr[1:] = used.sum(1).cumsum(0)
        if self.data is None:
            return (starts + slots)[used], ptr, None
        data = self.data.to(self.dtype).reshape(self.rows, self.data.shape[-1]).gather(1, order)
        return (starts + slots)[used], ptr, data[used]

    def count(self, visible: Tensor | None = None) -> int:
        return int((self.positions >= 0).sum()) if visible is None else super().count(visible)

    def merge(self, other: Form) -> Form | None:
        return to_index(self).merge(other) if other.sparse else None


def to_dense(form: Form) -> DenseForm:
    """The same weights in the dense form (bool where `form.unit`)."""
    tensor = form.active() if form.unit else form.dense()
    return DenseForm(form.shape, form.dtype, form.device, tensor.contiguous())


def to_index(form: Form) -> IndexForm:
    """The same weights in the index form."""
    return IndexForm(form.shape, form.dtype, form.device, *form.index())


def merge_forms(a: Form, b: Form) -> Form:
    """The sum of two forms' weights clamped to 1, in the wider dtype: by `merge` of either, else densely."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = replace(a, dtype=dtype), replace(b, dtype=dtype)
    for one, other in ((a, b), (b, a)):
        merged = one.merge(other)
        if merged is not None:
            return merged
    tensor = a.active() | b.active() if a.unit and b.unit else (a.dense() + b.dense()).clamp_(max=1)
    return DenseForm(a.shape, dtype, a.device, tensor)
