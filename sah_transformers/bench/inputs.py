"""Random tensors of a case and its call."""

from __future__ import annotations

import torch

from sah_transformers.attention import Call, make_call
from sah_transformers.bench.suites import Case
from sah_transformers.mask import Mask
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.state import LayerState

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(case: Case, device: str, q_scale: float | None = None, seed: int = 0) -> Tensors:
    """q ``[B, H, Q, D]`` times ``q_scale`` (default: the case's), k and v ``[B, G, K, D]``, all from N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((case.H, case.Q), (case.G, case.K), (case.G, case.K))
    q, k, v = (
        torch.randn(
            (case.B, heads, length, case.D), generator=generator, device=device, dtype=getattr(torch, case.dtype)
        )
        for heads, length in shapes
    )
    return q * (case.q_scale if q_scale is None else q_scale), k, v


def call_of(case: Case, inputs: Tensors, kernel: str, start: int = 0, stop: int | None = None) -> Call:
    """The case's call, or that of its rows ``start:stop`` alone with the keys in their reach."""
    q, k, v = inputs
    stop = case.Q if stop is None else stop
    reach = stop + case.K - case.Q
    maskers = [MaskerRegistry.create_masker(config) for config in case.maskers]
    return make_call(q[:, :, start:stop], k[:, :, :reach], v[:, :, :reach], maskers, kernel=kernel)


class Step:
    """A decode step, to be run again and again: the state has seen all keys but the step's."""

    def __init__(self, case: Case, inputs: Tensors, kernel: str):
        self.case, self.inputs, self.kernel = case, inputs, kernel
        self.maskers = [MaskerRegistry.create_masker(config) for config in case.maskers]
        self.state = LayerState()
        q, k, v = inputs
        self.before = case.K - case.Q
        make_call(q[:, :, :1], k[:, :, : self.before], v[:, :, : self.before], self.maskers, layer_state=self.state)

    def call(self) -> Call:
        """The step's call, its keys appended. Appending them again writes what is there."""
        self.state.length = self.before
        self.state._lengths = dict.fromkeys(self.state._lengths, self.before)
        return make_call(*self.inputs, self.maskers, layer_state=self.state, kernel=self.kernel)

    def side_bytes(self) -> int:
        """Side data of all keys."""
        return round(self.state.bytes_per_key() * self.case.B * self.case.K)


def previous_mask(case: Case, device: str) -> Mask | None:
    """What ``add_mask`` starts from: nothing, or half of the visible keys."""
    if case.previous == "empty":
        return None
    shape = (case.B, case.H, case.Q, case.K)
    chosen = torch.rand(shape, generator=torch.Generator(device).manual_seed(1), device=device) < 0.5
    return Mask.create_mask_from_dense_mask(shape, chosen & visible(case, device))


def visible(case: Case, device: str) -> torch.Tensor:
    """Lower-right causal order, bool ``[Q, K]``."""
    last = torch.arange(case.Q, device=device)[:, None] + (case.K - case.Q)
    return torch.arange(case.K, device=device) <= last
