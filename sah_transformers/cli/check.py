"""``sah check``: whether a model can be sparse, layer by layer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sah_transformers.cli.models import MODEL_HELP, SPARSE_HELP


def check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    sparse: Annotated[str | None, typer.Option(help=SPARSE_HELP + " Default: a stack on every layer.")] = None,
) -> None:
    """Say whether a model is supported, which layers stay dense and why; reads no weights."""
    from sah_transformers.cli import models
    from sah_transformers.cli.presets import stack_in_words
    from sah_transformers.cli.screen import Failed, console
    from sah_transformers.integration import supported

    config = None if sparse is None else models.parse_sparse(sparse)
    built = models.build_without_weights(model)
    if config is not None:
        models.enable(built, config)
    support = supported(built)
    if not support:
        raise Failed(f"{type(built).__name__} is not supported: {support.reason}")
    screen = console()
    screen.print(f"{type(built).__name__} is supported: {len(support.layers)} attention layers", markup=False)
    if config is not None:
        screen.print(f"stack: {stack_in_words(config)}", markup=False)
    for what, indices in _groups(support.layers):
        screen.print(f"{what}: layers {ranges(indices)} ({len(indices)})", markup=False)
    others = getattr(built.config.get_text_config(), "num_hidden_layers", len(support.layers)) - len(support.layers)
    if others > 0:
        screen.print(f"no softmax attention: {others} of the model's layers, which stay as they are", markup=False)


def _groups(layers: list[Any]) -> list[tuple[str, list[int]]]:
    """Layers by what becomes of them, in order of their first layer."""
    groups: dict[str, list[int]] = {}
    for layer in layers:
        groups.setdefault("sparse" if layer.sparse else f"dense, {layer.reason}", []).append(layer.layer_idx)
    return list(groups.items())


def ranges(indices: list[int]) -> str:
    """``0-4, 6, 8-9``."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
