"""Random tensors of a case and its call."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from sah_transformers.attention import Call, make_call
from sah_transformers.bench.suites import Case
from sah_transformers.mask import Mask
from sah_transformers.maskers import MaskerConfig, MaskerRegistry
from sah_transformers.maskers.base import Masker
from sah_transformers.maskers.channel_file import write_channels
from sah_transformers.maskers.double_sparsity import DoubleSparsityTopKMaskerConfig
from sah_transformers.maskers.hash_attention import HashAttentionTopKMaskerConfig
from sah_transformers.maskers.hash_weights import write_hash_weights
from sah_transformers.state import LayerState

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

RANDOM = "random"
"""A file by this name is made for the case, of random channels or weights."""


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


def maskers_of(case: Case) -> list[Masker]:
    """The case's maskers."""
    return [MaskerRegistry.create_masker(fitted(config, case)) for config in case.maskers]


def fitted(config: MaskerConfig, case: Case) -> MaskerConfig:
    """A config with files made for the case where it asks for random ones."""
    if isinstance(config, DoubleSparsityTopKMaskerConfig) and config.sorted_channel_file == RANDOM:
        return replace(config, sorted_channel_file=random_channels(case.H, case.D))
    if isinstance(config, HashAttentionTopKMaskerConfig) and config.hat_weight_file == RANDOM:
        return replace(config, hat_weight_file=random_weights(case.H, case.G, case.D, config.hat_bits))
    return config


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where files lie as long as the process runs."""
    return tempfile.TemporaryDirectory(prefix="sah-bench-")


@cache
def random_channels(heads: int, dim: int) -> str:
    """A channel file of one layer."""
    generator = torch.Generator().manual_seed(0)
    path = Path(_folder().name, f"channels-{heads}-{dim}.json")
    write_channels(path, {0: [torch.randperm(dim, generator=generator).tolist() for _ in range(heads)]})
    return str(path)


@cache
def random_weights(heads: int, groups: int, dim: int, bits: int) -> str:
    """Weights of the hash of one layer, of the size that ``sah train hash-attention`` makes, per query head."""
    generator = torch.Generator().manual_seed(0)

    def mlp() -> list[tuple[torch.Tensor, torch.Tensor]]:
        sizes = [dim, dim, dim, bits]
        return [
            (torch.randn(heads, o, i, generator=generator) / i**0.5, torch.zeros(heads, o)) for i, o in pairwise(sizes)
        ]

    path = Path(_folder().name, f"weights-{heads}-{groups}-{dim}-{bits}.safetensors")
    write_hash_weights(path, {0: {side: mlp() for side in "qk"}}, heads, groups)
    return str(path)


def call_of(case: Case, inputs: Tensors, kernel: str, start: int = 0, stop: int | None = None) -> Call:
    """The case's call, or that of its rows ``start:stop`` alone with the keys in their reach."""
    q, k, v = inputs
    stop = case.Q if stop is None else stop
    reach = stop + case.K - case.Q
    return make_call(q[:, :, start:stop], k[:, :, :reach], v[:, :, :reach], maskers_of(case), kernel=kernel)


class Step:
    """A decode step, to be run again and again: the state has seen all keys but the step's."""

    def __init__(self, case: Case, inputs: Tensors, kernel: str):
        self.case, self.inputs, self.kernel = case, inputs, kernel
        self.maskers = maskers_of(case)
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
