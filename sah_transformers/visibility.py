"""Which keys a row may see: the model's own attention mask in every form Transformers hands it over."""

from __future__ import annotations

import torch


class Visibility:
    """Visible keys of all rows of one attention call, answered block by block so that memory stays linear.

    Args:
        batch, heads, queries, keys: B, H, Q, K of the call.
        attention_mask: ``None`` (every key), 2-D ``[B, K]`` (non-zero = a real token), or 4-D
            ``[B|1, 1|H, Q, K]``, boolean (True = visible) or additive. An additive value at or below
            ``finfo(dtype).min / 2`` hides the key, any other is a bias on the score.
        is_causal: adds lower-right causal order: row ``i`` sees keys up to ``i + K - Q``.
        position_bias: ``[B|1, 1|H, Q, K]`` added to the scores, or None.
        indices: ``[B, Q, n]`` the only keys a row may see (a model's own indexer), -1 = unused, or None.
        device: where the tensors are.

    Raises:
        ValueError: for a mask of another rank, shape or dtype.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        attention_mask: torch.Tensor | None,
        is_causal: bool,
        device: torch.device,
        position_bias: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
    ):
        self.batch, self.heads, self.queries, self.keys = batch, heads, queries, keys
        self.is_causal, self.device = is_causal, device
        self.valid: torch.Tensor | None = None  # [B, K]
        self.mask: torch.Tensor | None = None  # [B|1, 1|H, Q, K]
        if attention_mask is not None:
            if attention_mask.dim() == 2:
                _check_shape("attention_mask", attention_mask, [(batch, 1), (keys,)])
                self.valid = attention_mask.to(device) != 0
            else:
                _check_4d("attention_mask", attention_mask, (batch, heads, queries, keys))
                if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
                    raise ValueError(
                        "attention_mask with 4 dimensions must be boolean (True = visible) or floating point "
                        f"(additive), got {attention_mask.dtype}"
                    )
                self.mask = attention_mask.expand(-1, -1, queries, -1)
        if position_bias is not None:
            _check_4d("position_bias", position_bias, (batch, heads, queries, keys))
            position_bias = position_bias.expand(-1, -1, queries, -1)
        if indices is not None and (
            indices.dim() != 3 or indices.shape[1] != queries or indices.shape[0] not in (1, batch)
        ):
            raise ValueError(f"indices must have shape [{batch}, {queries}, n], got {list(indices.shape)}")
        self.position_bias, self.indices = position_bias, indices

    def reach(self, stop: int) -> int:
        """Keys ``[0, reach)`` hold everything that rows before ``stop`` can see."""
        if self.is_causal:
            return max(0, min(self.keys, stop + self.keys - self.queries))
        return self.keys

    def is_prefix(self) -> bool:
        """Whether every row sees exactly the first ``n`` keys (no padding, no mask of its own)."""
        return self.valid is None and self.mask is None and self.indices is None

    def block(self, start: int, stop: int, indexed: bool = True) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Visibility and bias of rows ``start:stop`` over their first ``reach(stop)`` keys.

        Returns:
            (visible, bias): bool ``[B|1, 1|H, q, K']`` or None where every row sees every key of the reach, and
            the additive part ``[B|1, 1|H, q, K']`` (0 where hidden) or None.
        """
        reach = self.reach(stop)
        visible: torch.Tensor | None = None
        bias: torch.Tensor | None = None
        if self.is_causal and not (stop - start == 1 and reach):  # one row: its reach is what it sees
            last = torch.arange(start, stop, device=self.device) + (self.keys - self.queries)
            visible = (torch.arange(reach, device=self.device) <= last[:, None])[None, None]
        if self.valid is not None:
            visible = _both(visible, self.valid[:, None, None, :reach])
        if self.mask is not None:
            mask = self.mask[:, :, start:stop, :reach].to(self.device)
            if mask.dtype != torch.bool:
                shown = mask > torch.finfo(mask.dtype).min / 2
                bias = mask.masked_fill(~shown, 0.0)
                mask = shown
            visible = _both(visible, mask)
        if self.indices is not None and indexed:
            chosen = self.indices[:, start:stop].to(self.device).long()
            inside = (chosen >= 0) & (chosen < reach)
            listed = torch.zeros(*chosen.shape[:2], reach + 1, dtype=torch.bool, device=self.device)
            listed.scatter_(-1, torch.where(inside, chosen, reach), True)  # the extra column takes the unused
            visible = _both(visible, listed[:, None, :, :reach])
        if self.position_bias is not None:
            extra = self.position_bias[:, :, start:stop, :reach].to(self.device)
            if visible is not None and extra.is_floating_point():
                extra = extra.masked_fill(~visible, 0.0)
            bias = extra if bias is None else bias.float() + extra.float()
        return visible, bias

    def real(self) -> torch.Tensor | None:
        """Which keys are real tokens, bool ``[B, K]``: those that the mask shows to some row of the call; None = all.

        What a model's own indexer leaves out is real all the same.
        """
        if self.mask is None:
            return self.valid
        if self.mask.dtype == torch.bool and self.mask.shape[1:3] == (1, 1):
            return self.mask[:, 0, 0].to(self.device).expand(self.batch, -1)
        seen = torch.zeros(self.batch, self.keys, dtype=torch.bool, device=self.device)
        step = max(1, 2**24 // max(1, self.keys * self.batch))
        for start in range(0, self.queries, step):
            visible, _ = self.block(start, min(start + step, self.queries), indexed=False)
            if visible is None:
                return None
            seen[:, : visible.shape[-1]] |= visible.any(dim=1).any(dim=1)
        return seen


def _both(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a & b


def _check_shape(name: str, tensor: torch.Tensor, allowed: list[tuple[int, ...]]) -> None:
    if any(size not in choices for size, choices in zip(tensor.shape, allowed, strict=True)):
        want = ", ".join("|".join(str(c) for c in dict.fromkeys(choices)) for choices in allowed)
        raise ValueError(f"{name} must have shape [{want}], got {list(tensor.shape)}")


def _check_4d(name: str, tensor: torch.Tensor, sizes: tuple[int, int, int, int]) -> None:
    if tensor.dim() != 4:
        also = "2 dimensions [B, K] or " if name == "attention_mask" else ""
        raise ValueError(f"{name} must have {also}4 dimensions [B, H, Q, K], got {list(tensor.shape)}")
    batch, heads, queries, keys = sizes
    _check_shape(name, tensor, [(batch, 1), (1, heads), (queries, 1), (keys,)])
