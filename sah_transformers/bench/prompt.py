"""Reading a prompt of a whole model, up to the first new token: time and largest memory, at once and in pieces.

The prompt is read with dense attention (``prefill: dense``); sparse models differ by their cache and by the side data
that they build.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

import sah_transformers
from sah_transformers.bench.step import peak, random_model
from sah_transformers.bench.suites import Case

PIECE = 4096
"""Tokens per piece: ``prefill_chunk_size`` of ``generate()``; on small cases a quarter of the prompt.

Pieces of no more than ``decode_max_queries`` tokens would be read sparsely."""


@dataclass
class Prompt:
    """What reading a prompt takes one way.

    Attributes:
        seconds: up to the first token.
        peak_gib: largest memory of the device meanwhile; of_need: over weights, keys and values; None on a CPU.
        token: of the first sequence, to compare.
        error: why there is nothing.
    """

    seconds: float = 0.0
    peak_gib: float | None = None
    of_need: float | None = None
    token: int = 0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        if self.error:
            return {"error": self.error}
        data = {"seconds": self.seconds, "peak_gib": self.peak_gib, "of_need": self.of_need}
        return {name: float(f"{value:.4g}") for name, value in data.items() if value is not None}


def prompts_of(case: Case, device: str, kernel: str) -> dict[str, Prompt]:
    """Every way of reading, by name."""
    model = random_model(case, device)
    piece = min(PIECE, -(-case.K // 4))
    maskers = [one.to_dict() for one in case.maskers]
    found = {}
    for sparse in (True, False):
        if sparse:
            sah_transformers.enable(model, {"maskers": maskers, "kernel": kernel, "prefill": "dense"})
        for size in (None, piece):
            name = f"{'sah' if sparse else 'sdpa'}, {'at once' if size is None else f'pieces of {size:,}'}"
            found[name] = _prompt(case, model, size)
        if sparse:
            sah_transformers.disable(model)
    return found


def _prompt(case: Case, model: Any, piece: int | None) -> Prompt:
    try:
        return _measured(case, model, piece)
    except Exception as error:  # out of memory: the other ways go on
        return Prompt(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(case: Case, model: Any, piece: int | None) -> Prompt:
    cuda = model.device.type == "cuda"
    generator = torch.Generator(model.device).manual_seed(2)
    size = (case.B, case.K)
    ids = torch.randint(1, model.config.vocab_size, size, generator=generator, device=model.device)
    if cuda:
        _first_token(model, ids[:, : 2 * PIECE], piece)  # kernels are compiled and loaded once
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    token = _first_token(model, ids, piece)
    prompt = Prompt(time.perf_counter() - start, token=token)
    if cuda:
        prompt.peak_gib, prompt.of_need = peak(case, model, case.K)
    return prompt


def _first_token(model: Any, ids: torch.Tensor, piece: int | None) -> int:
    """Of the first sequence behind ``ids``; waits for the device."""
    ones = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=ones, max_new_tokens=1, do_sample=False, prefill_chunk_size=piece)
    return int(out[0, -1])
