"""What sparse attention keeps of a real model: numbers hidden in text, and next-token distributions.

Every prompt is read once, by dense attention, and each stack under test continues from a copy of that cache.
"""

from sah_transformers.evaluate.needle import Answer, Outcome, evaluate_needle
from sah_transformers.evaluate.prompts import Prompt, make_prompt
from sah_transformers.evaluate.stacks import Stack, over_budgets
from sah_transformers.evaluate.text import Fidelity, cut, evaluate_text

__all__ = [
    "Answer",
    "Fidelity",
    "Outcome",
    "Prompt",
    "Stack",
    "cut",
    "evaluate_needle",
    "evaluate_text",
    "make_prompt",
    "over_budgets",
]
