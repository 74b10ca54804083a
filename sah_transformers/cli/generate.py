"""``sah generate``: a prompt through a model with sparse attention."""

from __future__ import annotations

from typing import Annotated

import typer

from sah_transformers.cli.models import DTYPE_HELP, MODEL_HELP, SPARSE_HELP


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads stdin.")],
    sparse: Annotated[str | None, typer.Option(help=SPARSE_HELP + " Default: what the model's config holds.")] = None,
    prefill: Annotated[str | None, typer.Option(help="'same' or 'dense': how the prompt is read.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens.")] = 64,
    dense: Annotated[bool, typer.Option("--dense", help="Also generate densely and compare.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Measure every call against dense; slow.")] = False,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With the chat template or not. Default: if there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...; auto takes cuda where there is one.")] = "auto",
) -> None:
    """Generate text with sparse attention (greedy)."""
    import sys

    from sah_transformers.cli import models, run
    from sah_transformers.cli.screen import WrongUse, console
    from sah_transformers.integration import disable
    from sah_transformers.record import record as recording

    stack = models.held_sparse(model) if sparse is None else sparse
    if stack is None:
        raise WrongUse("nothing to make sparse: give --sparse (see 'sah presets')")
    config = models.parse_sparse(stack, prefill)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = models.load(model, dtype, device)
    models.enable(loaded, config)
    if chat and not tokenizer.chat_template:
        raise WrongUse("--chat: this model has no chat template; use --raw")
    inputs = run.encode(loaded, tokenizer, text, bool(tokenizer.chat_template) if chat is None else chat)
    screen = console()
    if record:
        with recording(loaded) as log:
            first = run.generate("sparse, recorded", loaded, tokenizer, inputs, max_new_tokens)
    else:
        first = run.generate("sparse", loaded, tokenizer, inputs, max_new_tokens)
    if not dense:
        screen.print(first.text.strip(), markup=False)
    else:
        disable(loaded)
        second = run.generate("dense", loaded, tokenizer, inputs, max_new_tokens)
        screen.print(f"sparse: {first.text.strip()}", markup=False)
        screen.print(f"dense:  {second.text.strip()}", markup=False)
        same = first.tokens.tolist() == second.tokens.tolist()
        screen.print("the same tokens" if same else f"the same up to token {_common(first.tokens, second.tokens)}")
        for name, one in (("sparse", first), ("dense", second)):
            screen.print(f"{name}: prompt {one.prefill_s:.1f} s, then {one.decode_step_s * 1e3:.0f} ms per token")
    if record:
        screen.print(log.table())


def _common(a: object, b: object) -> int:
    """Length of the common start of two sequences of tokens."""
    pairs = zip(a.tolist(), b.tolist(), strict=False)  # type: ignore[attr-defined]
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))  # type: ignore[arg-type]
