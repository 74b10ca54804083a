"""Next-token distributions over real text, sparse against dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from sah_transformers.evaluate.mass import measuring
from sah_transformers.evaluate.reading import Tell, decode, read, silent, sparse
from sah_transformers.evaluate.stacks import Stack


@dataclass(frozen=True)
class Fidelity:
    """How near one stack stays to dense attention over one segment of text.

    Attributes:
        stack: the stack.
        segment: number of the segment.
        tokens: predictions compared.
        kl: Kullback-Leibler divergence of the sparse from the dense distribution in nats, mean over the tokens.
        agreement: share of the tokens after which both think the same token likeliest.
        density, recall: see ``Mass``; None where nothing was sparse.
    """

    stack: Stack
    segment: int
    tokens: int
    kl: float
    agreement: float
    density: float | None
    recall: float | None


def cut(tokenizer: Any, text: str, length: int, count: int) -> list[torch.Tensor]:
    """``count`` segments ``[1, length]`` of the text's tokens, evenly spaced, none overlapping another.

    A token that the tokenizer puts before every text (BOS) is put before every segment and counts.

    Raises:
        ValueError: for a text that is too short.
    """
    ids = tokenizer(text)["input_ids"]
    begins = ids[:1] if ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else []
    ids, size = ids[len(begins) :], length - len(begins)
    if len(ids) < size * count:
        raise ValueError(
            f"{count} segments of {length:,} tokens need {size * count:,} tokens, the text has {len(ids):,}"
        )
    gap = (len(ids) - size * count) // max(1, count - 1)
    return [torch.tensor([begins + ids[start : start + size]]) for start in range(0, count * (size + gap), size + gap)]


def evaluate_text(
    model: Any, segments: Sequence[torch.Tensor], context: int, stacks: Sequence[Stack], tell: Tell = silent
) -> Iterator[list[Fidelity]]:
    """Read ``context`` tokens of each segment densely, then the rest with each stack, as token by token.

    Args:
        model: a dense model; it is dense again after each segment.
        segments: int64 ``[1, n]``, n > context.
        tell: called once per segment for dense attention, then once per stack.

    Yields:
        For each segment one ``Fidelity`` per stack.
    """
    for number, segment in enumerate(segments):
        ids = segment.to(model.device)
        cache = read(model, ids[:, :context])
        rest = ids[:, context:]
        dense = decode(model, rest, deepcopy(cache), rest.shape[1]).double().log_softmax(-1)
        tell("dense attention")
        found = []
        for stack in stacks:
            own = deepcopy(cache)
            with sparse(model, stack.config), measuring(model) as mass:
                logits = decode(model, rest, own, stack.config.decode_max_queries)
            kl, agreement = compare(dense, logits.double().log_softmax(-1))
            found.append(Fidelity(stack, number, len(logits), kl, agreement, mass.density, mass.recall))
            tell(stack.label)
        yield found


def compare(dense: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(mean divergence KL(dense || other) in nats, share of equal argmax) of log-probabilities ``[n, vocabulary]``."""
    ruled_out = dense == float("-inf")  # 0 log 0 = 0
    kl = torch.where(ruled_out, 0.0, dense.exp() * (dense - other)).sum(-1)
    same = dense.argmax(-1) == other.argmax(-1)
    return float(kl.mean()), float(same.double().mean())
