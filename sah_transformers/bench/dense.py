"""Dense attention as a user has it: every SDPA backend that takes the case."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sah_transformers.bench.inputs import Tensors

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_functions(inputs: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """By name: SDPA with ``enable_gqa`` as it chooses itself, and on a GPU with each backend that takes the case."""
    q, k, v = inputs
    causal = q.shape[2] > 1
    assert q.shape[2] in (1, k.shape[2]), "SDPA's causal order is upper-left"

    def default() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def forced(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def function() -> torch.Tensor:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                return default()

        return function

    functions: dict[str, Callable[[], torch.Tensor]] = {"sdpa": default}
    for name, backend in BACKENDS.items() if q.is_cuda else ():
        function = forced(backend)
        try:
            function()
        except RuntimeError:  # the backend does not take the case
            continue
        functions[name] = function
    return functions
