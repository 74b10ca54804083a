"""Double Sparsity: keys ranked by a few important channels, four bits each (arXiv 2408.07092)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sah_transformers.budget import check_number
from sah_transformers.maskers.channel_file import FIELD, channels_on, read_channels
from sah_transformers.maskers.model_files import check_heads, check_path, local_heads, of_layer
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import Context, Rows, by_group, dot
from sah_transformers.selections import Estimated, Selection

UNQUANTISED = 16
"""``label_bits`` with which labels are kept as they are, in the keys' dtype."""


@dataclass(frozen=True)
class DoubleSparsityTopKMaskerConfig(TopKMaskerConfig):
    """``heavy_size`` keys by their labels: the first ``D // group_factor`` channels of each query head's order.

    Attributes:
        group_factor: how many times fewer channels than the head has; what is left over is rounded down.
        label_bits: bits per channel of a label, 1 to 8, or 16: not quantised.
        channel_selection: which order of the file: ``"qk_proj"`` (by mean |q k|), ``"q_proj"`` or ``"k_proj"``.
        sorted_channel_file: the JSON file, see ``write_channels``.
    """

    type: ClassVar[str] = "double_sparsity"
    group_factor: int = 8
    label_bits: int = 4
    channel_selection: str = "qk_proj"
    sorted_channel_file: str = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("group_factor", self.group_factor, "an int >= 1")
        if not isinstance(self.group_factor, int) or self.group_factor < 1:
            raise ValueError(f"group_factor must be an int >= 1, got {self.group_factor!r}")
        rule = "an int from 1 to 8, or 16 (not quantised)"
        check_number("label_bits", self.label_bits, rule)
        if not isinstance(self.label_bits, int) or self.label_bits not in (*range(1, 9), UNQUANTISED):
            raise ValueError(f"label_bits must be {rule}, got {self.label_bits!r}")
        if self.channel_selection not in ("qk_proj", "q_proj", "k_proj"):
            raise ValueError(
                f"channel_selection must be 'qk_proj', 'q_proj' or 'k_proj', got {self.channel_selection!r}"
            )
        check_path(FIELD, self.sorted_channel_file, "the channels of each head, sorted by importance")


@MaskerRegistry.register(DoubleSparsityTopKMaskerConfig)
class DoubleSparsityTopKMasker(TopKMasker):
    """Selects the keys whose labels have the largest dot product with the same channels of the query.

    Every layer and query head has its own channels. A label is quantised per token and query head, in float32: ``low``
    is its smallest value rounded to float16 (saturating), ``step`` (largest - low) / (2**label_bits - 1), at least 0,
    rounded likewise, and ``code`` round((value - low) / step), to even and within 0 to 2**label_bits - 1; 0 where the
    step is 0. A code stands for low + step code. Kept are ``low``, ``step`` and the codes, ``8 // label_bits`` to a
    byte, the first channel in the lowest bits: 12 bytes for 16 channels of 4 bits. The score is the dot product with
    the query's channels; under ``gqa="group"`` times ``D**-0.5``.

    The authors quantise the query too, keep the grid unrounded and simulate both; 16 bits are unquantised there as
    here. Queries are not stored: quantising them would save nothing.
    """

    config: DoubleSparsityTopKMaskerConfig

    def __init__(self, config: DoubleSparsityTopKMaskerConfig):
        read_channels(config.sorted_channel_file, config.channel_selection)
        super().__init__(config)

    def check_layer(self, layer_idx: int, heads: int | None, dim: int | None) -> None:
        path, selection = self.config.sorted_channel_file, self.config.channel_selection
        channels = of_layer(f"{FIELD}: {path}", read_channels(path, selection), layer_idx)
        check_heads(f"{FIELD}: {path}", layer_idx, len(channels), heads)
        if dim is not None:
            self.check_dim(layer_idx, channels.shape[1], dim)

    def check_dim(self, layer_idx: int, held: int, dim: int) -> None:
        """Raise ``ValueError`` unless the file's layer has as many channels as a key, and at least one is kept."""
        if held != dim:
            raise ValueError(
                f"{FIELD}: {self.config.sorted_channel_file}: layer {layer_idx} has {held} channels per head, the "
                f"model has {dim}; was it made for another model?"
            )
        if self.config.group_factor > dim:
            raise ValueError(f"group_factor must be at most the head dimension {dim}, got {self.config.group_factor}")

    def channels(self, ctx: Context, heads: int, dim: int, device: torch.device) -> torch.Tensor:
        """The channels of the local query heads' labels, int64 ``[H, r]``.

        Raises:
            ValueError: where the file does not fit the layer.
        """
        path, group_factor = self.config.sorted_channel_file, self.config.group_factor
        channels = channels_on(path, self.config.channel_selection, ctx.layer_idx, device)
        self.check_dim(ctx.layer_idx, channels.shape[1], dim)
        return channels[local_heads(f"{FIELD}: {path}", len(channels), ctx, heads), : dim // group_factor]

    def describe(self) -> Selection:
        options = (("bits", self.config.label_bits),)
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "softmax", "double_sparsity", options)

    def given(self, ctx: Context, dim: int, device: torch.device) -> Any:
        from sah_transformers.kernels.approximate.double_sparsity import given_of

        return given_of(self, ctx.layer_idx, ctx.heads, ctx.head_offset, dim, device)

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        channels = self.channels(ctx, ctx.heads, keys.shape[-1], keys.device)
        batch, groups, new = keys.shape[:3]
        by_head = keys[:, :, None].expand(-1, -1, ctx.heads // groups, -1, -1)
        index = by_group(channels[None], groups)[:, :, :, None].expand(batch, -1, -1, new, -1)
        label = by_head.gather(-1, index).flatten(1, 2)  # [B, H, new, r]
        if self.config.label_bits == UNQUANTISED:
            return {"label": label}
        codes, low, step = quantise(label, self.config.label_bits)
        return {"code": pack(codes, self.config.label_bits), "low": low, "step": step}

    def labels(self, ctx: Context, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The stored labels ``[B, H, K, r]``; in ``dtype`` where they were quantised."""
        if self.config.label_bits == UNQUANTISED:
            return ctx.side["label"]
        codes = unpack(ctx.side["code"], self.config.label_bits, width)
        return dequantise(codes, ctx.side["low"], ctx.side["step"], dtype)

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        channels = self.channels(ctx, queries.shape[1], queries.shape[-1], queries.device)
        chosen = queries.gather(-1, channels[None, :, None].expand(*queries.shape[:3], -1))
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scores = dot(chosen, self.labels(ctx, channels.shape[1], dtype))
        return scores * queries.shape[-1] ** -0.5 if self.config.gqa == "group" else scores

    def score_error(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        width = rows.queries.shape[-1] // self.config.group_factor
        side = rows.context.side
        if self.config.label_bits == UNQUANTISED:
            largest = torch.linalg.vector_norm(side["label"], dim=-1, dtype=scores.dtype)
        else:
            low, step = side["low"].to(scores.dtype), side["step"].to(scores.dtype)
            high = low + (2**self.config.label_bits - 1) * step
            largest = width**0.5 * torch.maximum(low.abs(), high.abs())
        query = torch.linalg.vector_norm(rows.queries, dim=-1, keepdim=True, dtype=scores.dtype)
        error = (4 * width**0.5 + 4) * 2**-24 * query * largest.amax(-1)[:, :, None, None]
        return error.nan_to_num(nan=float("inf"), posinf=float("inf"))


def quantise(label: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Min-max quantisation of each token's label.

    Args:
        label: ``[..., r]``; bits: 1 to 8.

    Returns:
        (codes uint8 ``[..., r]``, low float16 ``[...]``, step float16 ``[...]``).
    """
    label = label.float()
    most = torch.finfo(torch.float16).max
    levels = torch.full((), 2**bits - 1, dtype=torch.float32, device=label.device)  # CUDA multiplies by 1 / a scalar
    low = label.amin(-1).clamp(-most, most).half()
    step = ((label.amax(-1) - low.float()) / levels).clamp(0, most).half()
    places = (label - low.float()[..., None]) / step.float()[..., None]
    codes = places.masked_fill(step[..., None] == 0, 0).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), low, step


def dequantise(
    codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``low + step * codes``, ``[..., r]`` in ``dtype`` (exact in float64)."""
    return torch.addcmul(low.to(dtype)[..., None], step.to(dtype)[..., None], codes.to(dtype))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``8 // bits`` codes to a byte, the first in the lowest bits: uint8 ``[..., r]`` to ``[..., bytes]``."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << (bits * place)
    return packed


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """The first ``width`` codes of ``pack``: uint8 ``[..., width]``."""
    codes = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :width]
