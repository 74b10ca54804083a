"""Whether Triton kernels run where a tensor is."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def no_kernels(tensor: torch.Tensor) -> str:
    """Why no Triton kernel runs where ``tensor`` is, or ""."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device.type}, not on a CUDA device"
    return _too_old(tensor.device) if tensor.is_cuda else ""


@cache
def _too_old(device: torch.device) -> str:
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return ""


def on_a_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels may be launched on the memory of ``tensor``, which is not one of ``torch.func``'s."""
    return tensor.is_cuda and not torch._C._are_functorch_transforms_active()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, where kernels are launched."""
    if tensor.is_cuda and torch.cuda.current_device() != tensor.device.index:
        return torch.cuda.device(tensor.device)
    return nullcontext()
