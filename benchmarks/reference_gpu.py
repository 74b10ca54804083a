"""The PyTorch reference on a GPU: generation with random Llamas and the memory of a long sparse prefill.

    python -m benchmarks.reference_gpu

Prints what it measured and one JSON line. The figures are of the reference, before any custom kernel.
"""

from __future__ import annotations

import json
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import sah_transformers
from sah_transformers import sparse_attention

STACK = [
    {"type": "sink", "sink_size": 128},
    {"type": "local", "window_size": 128},
    {"type": "oracle_top_k", "heavy_size": 0.05},
]


def llama(size: str) -> LlamaForCausalLM:
    """A random Llama in bfloat16 on the GPU: ``tiny`` or in the shapes of Llama-3.1-8B."""
    shapes = {
        "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000},
        "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    }[size]
    heads = {"tiny": (8, 2), "8B": (32, 8)}[size]
    config = LlamaConfig(
        **shapes, num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=131072
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def generate(size: str, prompt: int, new_tokens: int) -> dict[str, object]:
    """Seconds and greedy agreement of dense attention as a masker with ``sdpa``, then a sparse generation."""
    torch.manual_seed(0)
    model = llama(size)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device="cuda")
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(ids, **options)
    sah_transformers.enable(model, [{"type": "causal"}])
    same = model.generate(ids, **options)
    sah_transformers.enable(model, STACK)
    start = time.perf_counter()
    with sah_transformers.record(model) as log:
        sparse = model.generate(ids, **options)
    torch.cuda.synchronize()
    return {
        "model": size,
        "prompt": prompt,
        "causal_masker_tokens_equal_sdpa": int((dense == same)[0, prompt:].sum()),
        "new_tokens": int(sparse.shape[1] - prompt),
        "sparse_seconds_recorded": round(time.perf_counter() - start, 2),
        "decode_density": round(log.mean("density", "decode"), 4),
        "decode_recall": round(log.mean("recall", "decode"), 4),
    }


def prefill(length: int) -> dict[str, object]:
    """Peak memory above inputs and output, and time, of one layer's sparse prefill at Llama-3.1-8B's shapes."""
    torch.manual_seed(0)
    q = torch.randn(1, 32, length, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    out = sparse_attention(q, k, v, STACK, kernel="reference", return_mask=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert out.isfinite().all()
    return {"prefill": length, "seconds": round(seconds, 2), "peak_extra_mib": round(peak / 2**20)}


def main() -> None:
    """Run everything and print it."""
    results = []
    for work in (
        lambda: prefill(4096),
        lambda: prefill(32768),
        lambda: generate("tiny", 300, 16),
        lambda: generate("8B", 1500, 8),
    ):
        results.append(work())
        torch.cuda.empty_cache()
        print(results[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"device": torch.cuda.get_device_name(), **versions, "results": results}))


if __name__ == "__main__":
    main()
