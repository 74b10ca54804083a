"""Whether a model generates the same tokens on the Triton kernels as on the reference, on a GPU.

    python -m benchmarks.same_tokens MODEL... (a hub id, a folder, a .gguf file, smollm2, or 8B: random weights)

Where the tokens part, prints how close the two best logits were there, and how far the two runs' logits are apart.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import sah_transformers
from benchmarks.reference_gpu import STACK, llama
from sah_transformers.cli.demo import FILLER
from sah_transformers.cli.models import load

STEPS = 64
STACKS = {
    "top-k": STACK,
    "group": [*STACK[:2], {**STACK[2], "gqa": "group"}],
    "top-p": [*STACK[:2], {"type": "oracle_top_p", "top_p": 0.9}],
}


def generated(
    model: Any, ids: torch.Tensor, stack: list[dict[str, Any]], kernel: str
) -> tuple[list[int], torch.Tensor]:
    """(tokens, logits ``[steps, vocabulary]``) of a greedy generation."""
    sah_transformers.enable(model, {"maskers": stack, "kernel": kernel})
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences[0, ids.shape[1] :].tolist(), torch.cat(result.logits).float()


def compare(model: Any, ids: torch.Tensor, stack: list[dict[str, Any]]) -> dict[str, Any]:
    """Equal tokens up to the first difference, and what the logits say of it."""
    tokens, logits = generated(model, ids, stack, "reference")
    others, other_logits = generated(model, ids, stack, "triton")
    with sah_transformers.record(model) as log:  # on the kernels: records, and changes nothing
        recorded, _ = generated(model, ids, stack, "auto")
    same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), STEPS)
    result = {"equal": same, "of": STEPS, "recorded_density": round(log.mean("density", "decode"), 4)}
    result["recorded_equal"] = next((i for i, (a, b) in enumerate(zip(tokens, recorded, strict=True)) if a != b), STEPS)
    apart = (logits[: same + 1] - other_logits[: same + 1]).abs().amax(-1)
    result["logits_apart"] = round(apart.max().item(), 5)
    if same < STEPS:
        gap = logits[same, tokens[same]] - logits[same, others[same]]
        result |= {"gap_at_difference": round(gap.item(), 5), "apart_there": round(apart[same].item(), 5)}
    return result


def main() -> None:
    """Compare for every model named, stack by stack."""
    results = []
    for name in sys.argv[1:] or ["smollm2"]:
        torch.manual_seed(0)
        for dtype in ("bfloat16",) if name == "8B" else ("float32", "bfloat16"):
            if name == "8B":
                model = llama("8B")
                ids = torch.randint(0, model.config.vocab_size, (1, 3000), device="cuda")
            else:
                model, tokenizer = load(name, dtype, "cuda")
                text = FILLER * 140 + " The number is 4711. " + FILLER * 10
                ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :2500].to("cuda")
            for kind, stack in STACKS.items():
                results.append({"model": name, "dtype": dtype, "stack": kind, **compare(model, ids, stack)})
                print(results[-1], flush=True)
            del model
            torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "prompt": ids.shape[1], "results": results}))


if __name__ == "__main__":
    main()
