"""A number hidden in real prose, alone or among those of other cities, and the question for it.

The wording is that of RULER's niah_single and niah_multikey (arXiv 2404.06654).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TASKS = {"single": 1, "multi": 4}
"""Task -> hidden numbers, one of which is asked for."""

INTRODUCTIONS = {
    "single": "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.",
    "multi": "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz "
    "you about the numbers afterwards.",
}
NEEDLE = "One of the special magic numbers for {city} is: {number}."
QUESTION = "What is the special magic number for {city} mentioned in the provided text?"
ANSWER = "The special magic number for {city} mentioned in the provided text is"
CITIES = ("paris", "london", "tokyo", "cairo", "lima", "oslo", "delhi", "sydney", "boston", "madrid", "berlin", "rome")

HAYSTACK = Path(__file__).parent.parent / "texts" / "haystack.txt"


@dataclass(frozen=True)
class Prompt:
    """One question about a hidden number.

    Attributes:
        task: ``"single"`` or ``"multi"``.
        length: tokens that were asked for; ``ids`` has about as many.
        depth: where the needle lies, as a share of the text before the question.
        seed: chooses the city, the numbers and where the text starts.
        ids: int64 ``[1, n]``, the prompt with the start of the answer.
        answer: int64 ``[1, m]``, the tokens of the number.
        question: index of the question's first token.
        needle: indices of the tokens of the sentence that answers it.
        number: the number, seven digits.
    """

    task: str
    length: int
    depth: float
    seed: int
    ids: torch.Tensor
    answer: torch.Tensor
    question: int
    needle: range
    number: str


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in order.

    >>> sentences_of("It rains. Does it?\\n\\nYes!")
    ['It rains.', 'Does it?', 'Yes!']
    """
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def make_prompt(
    tokenizer: Any, text: str, task: str, length: int, depth: float, seed: int, chat: bool | None = None
) -> Prompt:
    """Hide numbers in as many sentences of ``text`` as make a prompt of at most ``length`` tokens.

    Args:
        depth: share of the sentences before the needle, in [0, 1].
        chat: with the tokenizer's chat template; None: if it has one.

    Raises:
        ValueError: for an unknown task, a depth out of range, or a length that the text cannot fill.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth!r}")
    chosen = random.Random(f"{task} {length} {depth} {seed}")
    cities = chosen.sample(CITIES, TASKS[task])
    needles = [NEEDLE.format(city=city, number=chosen.randrange(10**6, 10**7)) for city in cities]
    number = needles[0].split()[-1].rstrip(".")
    sentences = sentences_of(text)
    start = chosen.randrange(max(1, len(sentences)))
    sentences = sentences[start:] + sentences[:start]
    whole = _Text(tokenizer, task, cities[0], bool(tokenizer.chat_template) if chat is None else chat)
    sentences = _fit(whole, sentences, needles, length)
    for i, needle in reversed(list(enumerate(needles))):  # the one asked for last: nothing shifts it any more
        share = (depth + i / len(needles)) % 1 if i else depth
        sentences.insert(round(share * len(sentences)), needle)
    return _tokens(whole, sentences, needles[0], number, (task, length, depth, seed))


@dataclass(frozen=True)
class _Text:
    """What is put around the sentences."""

    tokenizer: Any
    task: str
    city: str
    chat: bool

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])

    def around(self, context: str) -> str:
        content = f"{INTRODUCTIONS[self.task]}\n{context}\n{QUESTION.format(city=self.city)}"
        answer = ANSWER.format(city=self.city)
        if not self.chat:
            return f"{content} {answer}"
        message = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + answer


def _fit(whole: _Text, sentences: Sequence[str], needles: Sequence[str], length: int) -> list[str]:
    """The first sentences, as many as leave room for the rest of the prompt."""
    room = length - len(whole.ids(whole.around(" ".join(needles))))
    bare = len(whole.ids(""))  # special tokens that every call adds
    fitting: list[str] = []
    for sentence in sentences:
        room -= len(whole.ids(" " + sentence)) - bare
        if room < 0:
            break
        fitting.append(sentence)
    else:
        raise ValueError(f"length {length:,} is more than the text gives, about {length - room:,} tokens with the task")
    if len(fitting) < len(needles):
        raise ValueError(f"length {length:,} leaves no room for text between the task and the question")
    return fitting


def _tokens(
    whole: _Text, sentences: Sequence[str], needle: str, number: str, about: tuple[str, int, float, int]
) -> Prompt:
    context = " ".join(sentences)
    prompt = whole.around(context)
    ids = whole.ids(f"{prompt} {number}")
    start = prompt.index(context)
    at = start + context.index(needle)

    def before(end: int) -> int:
        """Tokens of the prompt's first ``end`` characters."""
        return common(ids, whole.ids(prompt[:end].rstrip()))

    size = before(len(prompt))
    return Prompt(
        *about,
        ids=torch.tensor([ids[:size]]),
        answer=torch.tensor([ids[size:]]),
        question=before(start + len(context)),
        needle=range(before(at), before(at + len(needle))),
        number=number,
    )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start of two lists of tokens."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
