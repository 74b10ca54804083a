"""``sah demo``: a number hidden in a long text, found again by dense and by sparse attention."""

from __future__ import annotations

import random
from typing import Annotated, Any

import typer

from sah_transformers.cli.models import DEVICE_HELP, MODEL_HELP, SPARSE_HELP

TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the number afterwards."
)
NEEDLE = "One of the special magic numbers for paris is: {number}."
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the special magic number for paris mentioned in the provided text?"
ANSWER = "The special magic number for paris mentioned in the provided text is"
"""The prompt of RULER's niah_single (arXiv 2404.06654)."""

MEASURED_ROWS = 128
"""Rows of the prompt that are compared with dense attention; all of them would take minutes."""


def demo(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "smollm2",
    sparse: Annotated[str, typer.Option(help=SPARSE_HELP)] = "oracle_top_k",
    tokens: Annotated[int, typer.Option(min=200, help="About this many tokens of text.")] = 2300,
    seed: Annotated[int, typer.Option(help="Which number is hidden.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Hide a number in a long text and ask a real model for it, with dense and with sparse attention."""
    from transformers import DynamicCache

    from sah_transformers.cli import models, run
    from sah_transformers.cli.presets import stack_in_words
    from sah_transformers.cli.screen import Failed, console
    from sah_transformers.integration import disable

    config = models.parse_sparse(sparse)
    loaded, tokenizer = models.load(model, device=device)
    number = str(random.Random(seed).randrange(10**6, 10**7))
    text = hide(number, tokens, lambda part: len(tokenizer(part)["input_ids"]))
    inputs = run.encode(loaded, tokenizer, text, bool(tokenizer.chat_template), ANSWER)
    length = inputs["input_ids"].shape[1]
    screen = console()
    screen.print(f"The number {number} is hidden in {length:,} tokens. {QUESTION}", markup=False)
    disable(loaded)
    dense = run.generate("dense attention", loaded, tokenizer, inputs, 12)
    screen.print(f"dense attention:  {ANSWER}{dense.text}", markup=False)
    models.enable(loaded, config)
    cache = DynamicCache(config=loaded.config)
    first = run.generate("sparse attention", loaded, tokenizer, inputs, 12, cache)
    screen.print(f"sparse attention: {ANSWER}{first.text}", markup=False)
    log = measure(loaded, inputs["input_ids"], first.tokens, cache)
    screen.print(f"stack: {stack_in_words(config)}", markup=False)
    screen.print(_table(dense, first, log))
    if str(loaded.device) == "cpu":
        screen.print(
            "On a CPU this is not faster: selection is exact and computed by the PyTorch reference, so every score is\n"
            "still computed. What is saved are the keys that each row attends to; recall is the share of dense\n"
            "attention's mass that they hold, output error is |sparse - dense| / |dense| of the layers' outputs."
        )
    wrong = [name for name, one in (("dense", dense), ("sparse", first)) if number not in one.text]
    if wrong:
        raise Failed(f"the {' and the '.join(wrong)} answer is wrong: {number} was hidden")
    screen.print("Both answers are right.")


def hide(number: str, tokens: int, count: Any) -> str:
    """The prompt: ``number`` in the middle of filler of about ``tokens`` tokens, as ``count`` counts them."""
    repeats = max(2, round((tokens - count(f"{TASK}\n{QUESTION}")) / count(" " + FILLER)))
    sentences = [FILLER] * repeats
    sentences.insert(repeats // 2, NEEDLE.format(number=number))
    return f"{TASK}\n{' '.join(sentences)}\n{QUESTION}"


def measure(model: Any, prompt: Any, generated: Any, cache: Any) -> Any:
    """Run the prompt's last rows and the generated tokens again on the keys that ``cache`` holds, recorded."""
    import torch

    from sah_transformers.cli.screen import spinner
    from sah_transformers.record import record

    start = max(0, prompt.shape[1] - MEASURED_ROWS)
    cache.crop(start - cache.get_seq_length())
    with spinner("comparing with dense attention"), torch.no_grad(), record(model) as log:
        model(prompt[:, start:], past_key_values=cache)
        for token in generated[:-1]:
            model(token.view(1, 1), past_key_values=cache)
    return log


def _table(dense: Any, sparse: Any, log: Any) -> Any:
    from rich.table import Table

    table = Table()
    for column in ("", "dense", "sparse"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("reading the prompt", f"{dense.prefill_s:.1f} s", f"{sparse.prefill_s:.1f} s")
    table.add_row("each further token", f"{dense.decode_step_s * 1e3:.0f} ms", f"{sparse.decode_step_s * 1e3:.0f} ms")
    for phase, rows in (("prefill", f"prompt's last {MEASURED_ROWS} rows"), ("decode", "generated tokens")):
        visible = [one.keys - (one.queries - 1) / 2 for one in log.entries if one.phase == phase]
        table.add_section()
        table.add_row(
            f"{rows}: keys per row", f"{sum(visible) / len(visible):,.0f}", f"{log.mean('keys_per_row', phase):,.0f}"
        )
        table.add_row("  density", "1", f"{log.mean('density', phase):.3f}")
        table.add_row("  recall", "1", f"{log.mean('recall', phase):.4f}")
        table.add_row("  output error", "0", f"{log.mean('output_error', phase):.4f}")
    return table
