"""Running a model for a command: prompts, generation with a spinner, and its times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from transformers.generation.streamers import BaseStreamer

from sah_transformers.cli.screen import WrongUse, spinner


@dataclass(frozen=True)
class Run:
    """One generation: the new tokens, their text, and seconds until and after the first of them."""

    tokens: Any
    text: str
    prefill_s: float
    decode_s: float

    @property
    def decode_step_s(self) -> float:
        """Mean seconds per token after the first."""
        return self.decode_s / max(1, self.tokens.numel() - 1)


class Watch(BaseStreamer):
    """Told by ``generate`` of each token: keeps a spinner up to date and remembers when the first one came."""

    def __init__(self, status: Any, name: str, limit: int):
        self.status, self.name, self.limit = status, name, limit
        self.count, self.first = -1, 0.0  # the prompt itself comes first

    def put(self, value: Any) -> None:
        self.count += 1
        if self.count == 1:
            self.first = time.perf_counter()
        if self.count:
            self.status.update(f"{self.name}: token {self.count} of at most {self.limit}")

    def end(self) -> None:
        pass


def generate(name: str, model: Any, tokenizer: Any, inputs: dict[str, Any], limit: int, cache: Any = None) -> Run:
    """Generate greedily under a spinner; ``cache`` keeps the keys for the caller."""
    import torch

    length = inputs["input_ids"].shape[1]
    with spinner(f"{name}: reading {length:,} tokens") as status, torch.no_grad():
        watch = Watch(status, name, limit)
        start = time.perf_counter()
        kept = {} if cache is None else {"past_key_values": cache}
        out = model.generate(**inputs, **kept, max_new_tokens=limit, do_sample=False, streamer=watch)
        stop = time.perf_counter()
    new = out[0, length:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Run(new, text, watch.first - start, stop - watch.first)


def encode(model: Any, tokenizer: Any, text: str, chat: bool = False, answer: str = "") -> dict[str, Any]:
    """Inputs of a prompt, with the model's chat template around it if ``chat``; ``answer`` starts the reply.

    Raises:
        WrongUse: for an empty prompt.
    """
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text + answer, return_tensors="pt", add_special_tokens=not chat)
    inputs.pop("token_type_ids", None)
    if inputs["input_ids"].shape[1] == 0:
        raise WrongUse("the prompt is empty")
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
