"""Numbers hidden in a text, asked of the same model dense and with each stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from sah_transformers.evaluate.mass import measuring
from sah_transformers.evaluate.prompts import Prompt
from sah_transformers.evaluate.reading import Tell, decode, read, silent, sparse
from sah_transformers.evaluate.stacks import Stack

SETUPS = {"A": "only the answer is sparse", "B": "the text is read densely, question and answer are sparse"}


@dataclass(frozen=True)
class Answer:
    """What one stack made of one prompt.

    Attributes:
        stack: the stack.
        setup: a key of ``SETUPS``.
        right, tokens: tokens of the number that were the likeliest ones, the right ones before them given; of how many.
        rows: sparse queries of each sparse layer.
        density, recall, needle_recall: see ``Mass``; None where nothing was sparse.
    """

    stack: Stack
    setup: str
    right: int
    tokens: int
    rows: int
    density: float | None
    recall: float | None
    needle_recall: float | None

    @property
    def found(self) -> bool:
        """Whether greedy decoding gives the number: every token of it is the likeliest."""
        return self.right == self.tokens


@dataclass(frozen=True)
class Outcome:
    """A prompt, whether dense attention answers it, and if so what the stacks made of it."""

    prompt: Prompt
    dense: bool
    answers: list[Answer] = field(default_factory=list)


def evaluate_needle(
    model: Any,
    prompts: Iterable[Prompt],
    stacks: Sequence[Stack],
    setups: Sequence[str] = tuple(SETUPS),
    tell: Tell = silent,
) -> Iterator[Outcome]:
    """Ask ``model`` every prompt, densely first; the stacks are asked what dense attention answers.

    The last token of the prompt is the first sparse row of setup A: its row gives the answer's first token, so that no
    token of the number comes from dense attention.

    Args:
        model: a dense model; it is dense again after each outcome.
        setups: keys of ``SETUPS``.
        tell: called once per prompt for dense attention, then once per stack and setup.

    Yields:
        One ``Outcome`` per prompt.
    """
    for prompt in prompts:
        ids, answer = prompt.ids.to(model.device), prompt.answer.to(model.device)
        # what decoding is fed: the prompt's last token and the right answer but for its own last
        fed = torch.cat([ids[:, -1:], answer[:, :-1]], dim=1)
        context, question = ids[:, : prompt.question], ids[:, prompt.question : -1]
        after_context = read(model, context)
        after_question = read(model, question, deepcopy(after_context))
        logits = decode(model, fed, deepcopy(after_question), fed.shape[1])
        dense = _right(logits, answer) == answer.shape[1]
        tell(f"dense attention {'answers' if dense else 'fails'}")
        outcome = Outcome(prompt, dense)
        for stack in stacks if dense else ():
            for setup in setups:
                cache = deepcopy(after_question if setup == "A" else after_context)
                rest = question if setup == "B" else question[:, :0]
                outcome.answers.append(_ask(model, stack, setup, rest, fed, answer, cache, prompt.needle))
                tell(f"{stack.label}, setup {setup}")
        yield outcome


def _ask(
    model: Any,
    stack: Stack,
    setup: str,
    question: torch.Tensor,
    fed: torch.Tensor,
    answer: torch.Tensor,
    cache: Any,
    needle: range,
) -> Answer:
    """Read ``question`` and decode ``fed``, both sparse, onto a cache of this stack's own."""
    step = max(1, stack.config.decode_max_queries)  # longer calls would be dense
    with sparse(model, stack.config), measuring(model, needle) as mass:
        for start in range(0, question.shape[1], step):
            read(model, question[:, start : start + step], cache)
        logits = decode(model, fed, cache, step)
    rows = max(mass.rows.values(), default=0)
    right = _right(logits, answer)
    return Answer(stack, setup, right, answer.shape[1], rows, mass.density, mass.recall, mass.needle_recall)


def _right(logits: torch.Tensor, answer: torch.Tensor) -> int:
    """How many tokens of the answer ``[1, m]`` are the likeliest in logits ``[m, vocabulary]``."""
    return int((logits.argmax(-1) == answer[0]).sum())
