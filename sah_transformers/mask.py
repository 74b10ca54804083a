"""`Mask`: which positions are active and with what weight. The only thing that maskers hand on."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .mask_forms import (
    DenseForm,
    EmptyForm,
    Form,
    FullForm,
    IndexForm,
    RowWiseForm,
    merge_forms,
    to_dense,
    to_index,
)

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Mask:
    """The weight of each position of `shape [..., n]` (in attention `[B, H, Q, K]`); the last axis is a row.

    0 = not active; w in (0, 1] = active, included with probability w (1 for a deterministic selection). An
    empty mask selects nothing. How the weights are held (the form, see `mask_forms.Form`) changes no result.

    The `create_*` constructors copy and check what they are given and raise ValueError with argument, rule
    and value. `mask_type` (None, "dense" or "index") only chooses the form kept. `dtype` is that of the
    weights: by default float64 for float64 weights, else float32. `Mask(form)` and `from_dense_unchecked` are
    for tensors that maskers and kernels made: no check, no copy, no synchronisation; whoever calls them never
    writes to the tensors again.
    """

    __slots__ = ("_form",)

    def __init__(self, form: Form) -> None:
        self._form = form

    @classmethod
    def create_full_mask(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mask_type: str | None = None,
    ) -> Mask:
        """Weight 1 everywhere."""
        return cls(_kept(FullForm(_shape(shape), _dtype(dtype), _device(device)), mask_type))

    @classmethod
    def create_empty_mask(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mask_type: str | None = None,
    ) -> Mask:
        """Weight 0 everywhere."""
        return cls(_kept(EmptyForm(_shape(shape), _dtype(dtype), _device(device)), mask_type))

    @classmethod
    def create_mask_from_dense_mask(
        cls,
        shape: Sequence[int],
        mask: Tensor,
        dtype: torch.dtype | None = None,
        mask_type: str | None = None,
    ) -> Mask:
        """From the weights themselves: `mask` of exactly `shape`; bool, or numbers in [0, 1]."""
        shape = _shape(shape)
        _tensor("mask", mask, shape)
        weights = _weights("mask", mask, dtype)
        if not mask.is_floating_point():
            return cls(_kept(DenseForm(shape, weights.dtype, mask.device, weights > 0), mask_type))
        return cls(_kept(DenseForm(shape, weights.dtype, mask.device, weights), mask_type))

    @classmethod
    def create_mask_from_indices(
        cls,
        shape: Sequence[int],
        indices: Tensor,
        ptr: Tensor,
        data: Tensor | None = None,
        dtype: torch.dtype | None = None,
        mask_type: str | None = None,
    ) -> Mask:
        """From CSR over rows: the entries of row r are `ptr[r]:ptr[r + 1]`.

        `indices [nnz]` are flat positions (`dense.view(-1)[indices]`), each in its row and ascending there,
        none twice; `ptr [rows + 1]`; both of an integer dtype. `data [nnz]` are weights in [0, 1] (None =
        ones); an entry of weight 0 is not active.
        """
        shape = _shape(shape)
        _tensor("indices", indices, (-1,), integer=True)
        _tensor("ptr", ptr, (math.prod(shape[:-1]) + 1,), integer=True, device=indices.device)
        indices, ptr = indices.to(torch.int64, copy=True), ptr.to(torch.int64, copy=True)
        _check_csr(shape, indices, ptr)
        if data is None:
            form: Form = IndexForm(shape, _dtype(dtype), indices.device, indices, ptr, None)
            return cls(_kept(form, mask_type))
        _tensor("data", data, tuple(indices.shape), device=indices.device)
        weights = _weights("data", data, dtype)
        active = weights > 0
        ptr = torch.cat([ptr.new_zeros(1), active.cumsum(0)])[ptr]
        form = IndexForm(shape, weights.dtype, indices.device, indices[active], ptr, weights[active])
        return cls(_kept(form, mask_type))

    @classmethod
    def create_from_row_wise_idx(
        cls,
        shape: Sequence[int],
        row_wise_idx: Tensor,
        data: Tensor | None = None,
        mask_type: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mask:
        """From a list of positions per row.

        `row_wise_idx [..., k]` of an integer dtype: positions 0..n-1 of the row in any order, none twice,
        -1 = unused slot. `data [..., k]` are weights in [0, 1] (None = ones), ignored in unused slots; a
        position of weight 0 is not active.
        """
        shape = _shape(shape)
        _tensor("row_wise_idx", row_wise_idx, (*shape[:-1], -1), integer=True)
        slots = row_wise_idx.to(torch.int64, copy=True)
        rule = f"hold positions in -1..n-1 (n = {shape[-1]}; -1 = unused)"
        _refuse((slots < -1) | (slots >= shape[-1]), slots, "row_wise_idx", rule)
        ordered = slots.sort(-1).values
        twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
        _refuse(twice, ordered[..., 1:], "row_wise_idx", "name no position twice in a row")
        if data is None:
            form = RowWiseForm(shape, _dtype(dtype), slots.device, slots, None)
        else:
            _tensor("data", data, tuple(slots.shape), device=slots.device)
            weights = _weights("data", torch.where(slots < 0, torch.zeros_like(data), data), dtype)
            form = RowWiseForm(shape, weights.dtype, slots.device, slots.masked_fill_(weights == 0, -1), weights)
        return cls(_kept(form, mask_type))

    @classmethod
    def from_dense_unchecked(
        cls, tensor: Tensor, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None
    ) -> Mask:
        """A dense mask around `tensor [..., n]`: bool (True = weight 1, the cheap case) or weights in [0, 1].
        Neither checked nor copied, no synchronisation; `dtype` is that of the weights handed out; `shape` that of
        the mask where the tensor is only broadcastable to it."""
        return cls(DenseForm(tuple(tensor.shape if shape is None else shape), dtype, tensor.device, tensor))

    @property
    def form(self) -> Form:
        """How the weights are held; read-only, for kernels that have a path for a form."""
        return self._form

    @property
    def shape(self) -> tuple[int, ...]:
        return self._form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        return self._form.device

    def get_dense_mask(self) -> Tensor:
        """The weights, a new contiguous tensor of `shape` and `dtype`."""
        weights = self._form.active() if self._form.unit else self._form.dense()
        return torch.empty(self.shape, dtype=self.dtype, device=self.device).copy_(weights)

    def get_index_mask(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(indices, ptr, data)` of the active positions, new tensors: flat int64 `[nnz]` ascending, int64
        `[rows + 1]`, weights above 0 `[nnz]` in `dtype`."""
        indices, ptr, data = self._form.index()
        data = torch.ones_like(indices, dtype=self.dtype) if data is None else data.clone()
        return indices.clone(), ptr.clone(), data

    def active(self) -> Tensor:
        """Weight > 0, bool of `shape`. It may be the stored tensor (dense bool): do not write into it."""
        return self._form.active()

    def is_full_mask(self) -> bool:
        """Whether every weight is 1, in any form (true for a shape of no positions)."""
        return self._form.is_full()

    def is_empty_mask(self) -> bool:
        """Whether no position is active, in any form (true for a shape of no positions)."""
        return self._form.count() == 0

    def get_density(self, visible: Tensor | None = None) -> float:
        """Share of positions that are active; with `visible` (bool, broadcastable to `shape`) the share of
        the visible positions that are active. 0.0 where there is no (visible) position."""
        numel = self._form.numel
        if visible is None:
            return self._form.count() / numel if numel else 0.0
        _check_visible(visible, self.shape, self.device)
        if visible.numel() == 0 or numel == 0:
            return 0.0
        total = int(visible.sum()) * (numel // visible.numel())
        return self._form.count(visible.expand(self.shape)) / total if total else 0.0

    def __repr__(self) -> str:
        density = "?" if self.device.type == "meta" else f"{self.get_density():.4g}"
        what = f"shape={self.shape}, form={self._form.name}, density={density}"
        return f"Mask({what}, dtype={self.dtype}, device={self.device})"

    def merge_mask(self, other: Mask, inplace: bool = False) -> Mask:
        """Both masks together: weights add and clamp to 1, in the wider of the two dtypes.

        Shapes and devices must match. Neither operand changes, except that `inplace` makes `self` the result
        and returns it; tensors that `self` handed out before stay as they were.
        """
        if not isinstance(other, Mask):
            raise ValueError(f"other must be a Mask, got {type(other).__name__}")
        if other.shape != self.shape:
            raise ValueError(f"other must have the shape of this mask, {self.shape}, got {other.shape}")
        _same_device("other", other.device, self.device)
        form = merge_forms(self._form, other._form)
        if not inplace:
            return Mask(form)
        self._form = form
        return self

    def apply_mask(self, x: Tensor) -> Tensor:
        """`x * w`, 0 where not active (also for inf, nan). `x` of exactly `shape`; dtypes are promoted."""
        _tensor("x", x, self.shape, device=self.device)
        return torch.where(self.active(), x * self._form.dense(), 0)

    def apply_inv_mask(self, x: Tensor) -> Tensor:
        """`x / w`, 0 where not active (also for inf, nan). `x` of exactly `shape`; dtypes are promoted."""
        _tensor("x", x, self.shape, device=self.device)
        active = self.active()
        return torch.where(active, x / torch.where(active, self._form.dense(), 1), 0)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on `device`; this one stays where it is."""
        return Mask(self._form.to(_device(device)))


def _kept(form: Form, mask_type: str | None) -> Form:
    if mask_type is None:
        return form
    if mask_type == "dense":
        return to_dense(form)
    if mask_type == "index":
        return to_index(form)
    raise ValueError(f"mask_type must be None, 'dense' or 'index', got {mask_type!r}")


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(f"shape must be a sequence of ints, got {shape!r}") from None
    if not sizes or min(sizes) < 0 or any(isinstance(size, bool) for size in shape):
        raise ValueError(f"shape must be at least one size, each an int >= 0, got {shape!r}")
    return sizes


def _dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return dtype or torch.float32


def _device(device: torch.device | str) -> torch.device:
    # through a tensor: "cuda" becomes "cuda:0", which is what other tensors' devices are compared with
    return torch.empty(0, device=device).device


def _same_device(name: str, device: torch.device, expected: torch.device) -> None:
    if device != expected:
        raise ValueError(f"{name} must be on {expected}, got {device}")


def _tensor(
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    integer: bool = False,
    device: torch.device | None = None,
) -> None:
    """Checks type, shape (-1 = any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    same = len(shape) == value.ndim and all(want in (-1, got) for want, got in zip(shape, value.shape, strict=True))
    if not same:
        wanted = ", ".join("*" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}")
    if integer and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} must have an integer dtype, got {value.dtype}")
    if device is not None:
        _same_device(name, value.device, device)


def _refuse(bad: Tensor, values: Tensor, name: str, rule: str) -> None:
    if bad.any():
        raise ValueError(f"{name} must {rule}, got {values[bad][0].item()}")


def _weights(name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A checked copy of `values` in `dtype` (default: see `Mask`)."""
    dtype = _dtype(torch.float64 if dtype is None and values.dtype == torch.float64 else dtype)
    values = values.detach()
    _refuse(~((values >= 0) & (values <= 1)), values, name, "hold weights in [0, 1]")
    weights = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # such a position would silently stop being active
    _refuse((weights == 0) & (values > 0), values, name, f"hold weights that {dtype} tells from 0")
    return weights


def _check_csr(shape: tuple[int, ...], indices: Tensor, ptr: Tensor) -> None:
    lengths = ptr.diff()
    _refuse(ptr[:1] != 0, ptr[:1], "ptr", "start at 0")
    _refuse(lengths < 0, ptr[1:], "ptr", "never decrease")
    _refuse(ptr[-1:] != indices.numel(), ptr[-1:], "ptr", f"end at the number of indices, {indices.numel()}")
    numel = math.prod(shape)
    _refuse((indices < 0) | (indices >= numel), indices, "indices", f"be in range(0, {numel})")
    starts = torch.arange(lengths.numel(), device=ptr.device).repeat_interleave(lengths) * shape[-1]
    outside = (indices < starts) | (indices >= starts + shape[-1])
    _refuse(outside, indices, "indices", "be in the row that ptr puts them in")
    steps = indices.diff()
    _refuse(steps == 0, indices[1:], "indices", "name no position twice")
    _refuse(steps < 0, indices[1:], "indices", "ascend within a row")


def _check_visible(visible: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        raise ValueError(f"visible must be a bool tensor, got {getattr(visible, 'dtype', type(visible).__name__)}")
    tail = shape[len(shape) - visible.ndim :] if visible.ndim <= len(shape) else None
    if tail is None or any(got not in (1, want) for got, want in zip(visible.shape, tail, strict=True)):
        raise ValueError(f"visible must be broadcastable to {list(shape)}, got {list(visible.shape)}")
    _same_device("visible", visible.device, device)
