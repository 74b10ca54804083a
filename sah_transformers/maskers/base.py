"""The contract of a masker: a config of plain data and a class that selects keys for rows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from sah_transformers.mask import Mask
from sah_transformers.rows import Context, Rows
from sah_transformers.selections import Selection
from sah_transformers.spelling import unknown_name
from sah_transformers.state import Fold


@dataclass(frozen=True)
class MaskerConfig:
    """Base of every masker's config: frozen, plain numbers and strings, validated in ``__post_init__``.

    ``type`` is the tag by which configs, YAML and JSON name the masker.
    """

    type: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the ``type`` tag first; ``from_dict`` gives an equal config back."""
        return {"type": self.type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MaskerConfig:
        """Build the config from its fields (a ``type`` key is ignored).

        Raises:
            ValueError: for an unknown or missing field, or a value that the field refuses.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {name: value for name, value in data.items() if name != "type"}
        for name in given:
            if name not in fields:
                raise ValueError(unknown_name(name, "field", fields))
        missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in given]
        if missing:
            raise ValueError(f"{missing[0]} is missing ({cls.type} needs it)")
        return cls(**given)


class Masker(ABC):
    """Adds keys to what each row attends to. Stateless: side data per key lives on the cache.

    A subclass implements ``select``; one that ranks keys derives from ``TopKMasker`` or ``TopPMasker`` and
    implements ``score`` alone.
    """

    needs_positions: ClassVar[bool] = False
    """Whether ``select`` reads ``rows.context.positions`` (maskers with side data have them anyway)."""

    prepared: ClassVar[tuple[str, ...]] = ()
    """Names that ``prepare`` returns."""

    apart: ClassVar[tuple[str, ...]] = ()
    """Names of ``append``'s data ``[B, heads, n, words]`` that are stored as ``[B, heads, words, capacity]``: the same
    word of neighbouring keys side by side. ``ctx.side`` has views of the usual shape."""

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def create_from_config(cls, config: Any) -> Masker:
        """A masker of this class."""
        return cls(config)

    @abstractmethod
    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        """What this masker adds.

        Args:
            rows: the block of rows.
            active: bool ``[B|1, H|1, q|1, K]``, keys that earlier maskers of the stack made active, or None for none.

        Returns:
            ``[B|1, H|1, q|1, K|1]``: bool (weight 1) or float weights in [0, 1], zero at invisible keys.
        """

    def describe(self) -> Selection | None:
        """The selection in words that kernels understand, or None for the reference only."""
        return None

    @cached_property
    def described(self) -> Selection | None:
        """What ``describe`` says, asked once."""
        return self.describe()

    def given(self, ctx: Context, dim: int, device: torch.device) -> Any:
        """What the kernels of ``selections.Estimated`` need beside the side data: weights of the layer's local heads.

        Args:
            ctx: layer and heads; dim: the head dimension.
        """
        return None

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        """Side data of new keys, stored on the cache and handed back as ``ctx.side``.

        Args:
            keys, values: the new ones, ``[B, G, new, D]`` and ``[B, G, new, Dv]``.
            ctx: ``ctx.positions`` are the new keys' positions.

        Returns:
            ``{name: tensor [B, G or H, new, ...]}``; empty (the default) for maskers without side data.
        """
        return {}

    def pages(self) -> dict[str, tuple[int, Fold]]:
        """Names of ``append``'s data of which only the smallest or largest of each page is kept: ``{name: (keys per
        page, "amin" | "amax")}``. ``ctx.side[name]`` is then ``[B, G or H, pages, ...]``; pages count from the
        sequence's first real token, one without real tokens holds inf or -inf."""
        return {}

    def prepare(
        self, keys: torch.Tensor, values: torch.Tensor, ctx: Context
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """What is made once of each sequence, from all keys in the cache (codebooks); kept until the cache is empty.

        Asked at each call until every sequence is ready; what a ready sequence has stays as it is. Handed to
        ``append`` and ``score`` as ``ctx.side``, with ``ctx.side["ready"]``.

        Args:
            keys, values: all of them, ``[B, G, K, D]`` and ``[B, G, K, Dv]``; ``ctx.positions``: ``[B, K]``;
                ``ctx.side["ready"]``: bool ``[B]``, if it was asked before: what it returns for those is not used.

        Returns:
            ({name: tensor ``[B, ...]``}, which sequences are ready: bool ``[B]``), or None (the default).
        """
        return None

    def check_layer(self, layer_idx: int, heads: int | None, dim: int | None) -> None:  # noqa: B027 (few maskers ask)
        """Raise ``ValueError`` when this masker, or a file that it reads, does not fit a layer; asked at loading.

        Args:
            layer_idx: index of the layer.
            heads: query heads of the whole model; dim: dimensions of a key; None where the model does not say.
        """

    @property
    def needs_state(self) -> bool:
        """Whether this masker keeps side data per key."""
        return type(self).append is not Masker.append

    @property
    def prepares(self) -> bool:
        """Whether this masker makes something once of each sequence."""
        return type(self).prepare is not Masker.prepare

    def extend(self, rows: Rows, mask: Mask) -> Mask:
        """``mask`` (``[B, H, q, K]``) plus this masker's selection for ``rows``."""
        active = None if mask.form.name == "empty" else mask.form.compact()
        with torch.no_grad():
            selected = self.select(rows, active)
        if selected.ndim != 4 or any(n not in (1, of) for n, of in zip(selected.shape, rows.shape, strict=True)):
            shapes = f"[B|1, H|1, q|1, K|1] of {list(rows.shape)}, got {list(selected.shape)}"
            raise ValueError(f"{type(self).__name__}.select must return {shapes}")
        return mask.merge_mask(Mask.from_dense_unchecked(selected, shape=rows.shape))

    def add_mask(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sparse_meta_data: dict[str, Any] | None = None,
        previous_mask: Mask | None = None,
        **kwargs: Any,
    ) -> Mask:
        """``previous_mask`` plus this masker's selection.

        Args:
            keys, queries, values: ``[B, G, K, D]``, ``[B, H, Q, D]``, ``[B, G, K, Dv]``, H a multiple of G.
            attention_mask: what is visible. None = every key; 2-D ``[B, K]`` = non-zero for a real token; 4-D
                boolean (True = visible) or additive ``[B|1, 1|H, Q, K]``.
            scaling: factor on q·k, ``D**-0.5`` by default.
            dropout: accepted for the signature's sake; selection does not depend on it.
            sparse_meta_data: a dict that carries side data between calls of one sequence.
            previous_mask: ``[B, H, Q, K]`` of the maskers before, or None for nothing yet.
            **kwargs: ``is_causal`` (False) adds lower-right causal order; ``layer_idx``, ``softcap``,
                ``position_bias``, ``indices``, ``head_offset`` as in ``sparse_attention``; ``kernel``:
                ``"auto"`` (on CUDA the Triton kernel where it covers the call), ``"triton"`` or ``"reference"``.

        Returns:
            A new ``Mask`` of shape ``[B, H, Q, K]``; ``previous_mask`` is left as it was.

        Raises:
            ValueError: for shapes that do not fit together.
        """
        from sah_transformers.attention import selection

        return selection(
            self,
            queries,
            keys,
            values,
            attention_mask=attention_mask,
            scaling=scaling,
            sparse_meta_data={} if sparse_meta_data is None else sparse_meta_data,
            previous_mask=previous_mask,
            **kwargs,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"
