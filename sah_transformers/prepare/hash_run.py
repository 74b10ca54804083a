"""Training the hashes of a whole model: as many layers at a time as fit into memory, continued where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sah_transformers.integration.listen import Enough, layers_to_hear, listening
from sah_transformers.maskers.hash_weights import write_hash_weights
from sah_transformers.prepare.hash_checkpoint import Checkpoint, Progress
from sah_transformers.prepare.hash_start import first_weights
from sah_transformers.prepare.hash_training import (
    HashSettings,
    Recall,
    as_mlp,
    loss_of,
    measure,
    rows_of_step,
)

HELD_BYTES = 2**30
"""At most so many bytes of queries and keys are held at once."""

SAVE_S = 30.0
"""Seconds between two checkpoints within a layer; one more is made after each layer."""

TRAINING = "training, steps of all layers"

Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, of how much."""


def train_hash_attention(
    model: Any,
    blocks: torch.Tensor,
    output: str | Path,
    made_from: Mapping[str, Any],
    settings: HashSettings | None = None,
    tell: Tell | None = None,
    restart: bool = False,
) -> dict[int, tuple[Recall, Recall]]:
    """Train the hashes of every layer that the model does not window itself, and write them to ``output``.

    Args:
        model: a Transformers model; it is left as it was and not trained.
        blocks: token ids ``[N, block]``, each read on its own; the last eighth of each is held out.
        output: the weight file. Until it is whole, ``<output>.partial`` holds what is done: the same call goes on.
        made_from: plain data on model and text, see ``origin_of``; written into the file.
        restart: throw away what ``<output>.partial`` holds.

    Returns:
        per layer, what was measured before and after.

    Raises:
        ValueError: for a model that cannot be sparse or whose layers differ in their heads; blocks that are too short,
            or too many for one layer's queries and keys in 1 GiB; a checkpoint that is broken or of something else;
            queries or keys that are not finite.
    """
    settings, tell = settings or HashSettings(), tell or (lambda what, done, total: None)
    settings.trained_rows(blocks.shape[1])
    layers = layers_to_hear(model, windowed=False)
    heads, groups, dim, size = shape_of(model, blocks, layers)
    fitting = HELD_BYTES // (blocks.numel() * (heads + groups) * dim * size)
    if not fitting:
        most = HELD_BYTES // ((heads + groups) * dim * size)
        raise ValueError(f"{blocks.numel():,} tokens are too many: a layer's queries and keys fit for {most:,}")
    checkpoint = Checkpoint(Path(output), {**made_from, **asdict(settings)})
    if restart:
        checkpoint.delete()
    done = {layer: one for layer in layers if (one := checkpoint.load(layer)) is not None}
    left = [layer for layer in layers if layer not in done or done[layer].after is None]
    for start in range(0, len(left), fitting):
        held = collect(model, blocks, left[start : start + fitting], tell)
        for layer in list(held):
            queries, keys = held.pop(layer)
            progress = done.get(layer)
            if progress is None:
                seen = slice(0, settings.trained_rows(blocks.shape[1]).stop)
                sizes = settings.shared, settings.hidden, settings.bits, 1_000_003 * settings.seed + layer
                weights = first_weights(queries[:, :, seen], keys[:, :, seen], *sizes)
                progress = done[layer] = Progress(weights)
            before, total = layers.index(layer) * settings.steps, len(layers) * settings.steps
            save, now = partial(checkpoint.save, layer, progress), partial(_now, tell, before, total)
            train_layer(queries, keys, progress, settings, layer, save, now)
    trained = {layer: {side: as_mlp(held) for side, held in done[layer].weights.items()} for layer in layers}
    measured = {layer: (done[layer].before, done[layer].after) for layer in layers}
    about = {**made_from, **asdict(settings), "recall": _means(measured)}
    write_hash_weights(output, trained, heads, groups, about)
    checkpoint.delete()
    return measured  # type: ignore[return-value]


def _now(tell: Tell, before: int, total: int, step: int) -> None:
    tell(TRAINING, before + step, total)


def _means(measured: Mapping[int, tuple[Any, Any]]) -> dict[str, dict[str, float]]:
    means = {}
    for at, when in enumerate(("before", "after")):
        all_layers = [asdict(pair[at]) for pair in measured.values()]
        means[when] = {name: sum(one[name] for one in all_layers) / len(all_layers) for name in all_layers[0]}
    return means


def shape_of(model: Any, blocks: torch.Tensor, layers: list[int]) -> tuple[int, int, int, int]:
    """(query heads, KV heads, head dimension, bytes of a number) of the layers' attention.

    Raises:
        ValueError: where they differ, or where no layer attends over all of the text.
    """
    shapes: dict[int, tuple[int, int, int, int]] = {}

    def hear(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if queries.shape[2:] != keys.shape[2:]:
            raise ValueError(f"layer {layer} has queries {list(queries.shape)} but keys {list(keys.shape)}")
        shape = (queries.shape[1], keys.shape[1], keys.shape[3], keys.element_size())
        if shapes.setdefault(layer, shape) != shape:
            raise ValueError(f"layer {layer} stands for attention of two shapes")

    with listening(model, hear) as read:
        read(blocks[:1, :16])
    found = {shapes[layer]: layer for layer in layers if layer in shapes}
    if len(found) != 1 or len(shapes) < len(layers):
        parts = ", ".join(f"layer {layer}: H {h}, G {g}, D {d}" for (h, g, d, _), layer in found.items()) or "none"
        raise ValueError(f"hashes need layers of one shape that attend to all of the text, the model has {parts}")
    return next(iter(found))


def collect(
    model: Any, blocks: torch.Tensor, layers: list[int], tell: Tell
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Queries ``[N, H, n, D]`` and keys ``[N, G, n, D]`` of some layers, on the model's device."""
    held: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {layer: ([], []) for layer in layers}

    def hear(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if layer in held:
            for one, kept in ((queries, held[layer][0]), (keys, held[layer][1])):
                if not bool(one.isfinite().all()):
                    raise ValueError(f"layer {layer}: queries or keys are not finite; try another dtype")
                kept.append(one.detach().clone())
        if layer == layers[-1]:
            raise Enough

    what = f"reading the text for layers {layers[0]} to {layers[-1]}"
    with listening(model, hear) as read:
        for number, ids in enumerate(blocks):
            tell(what, number, len(blocks))
            read(ids[None])
    tell(what, len(blocks), len(blocks))
    return {layer: (torch.cat(held[layer][0]), torch.cat(held.pop(layer)[1])) for layer in layers}


def train_layer(
    queries: torch.Tensor,
    keys: torch.Tensor,
    progress: Progress,
    settings: HashSettings,
    layer: int,
    save: Callable[[], None],
    tell: Callable[[int], None],
) -> None:
    """Bring ``progress`` to ``settings.steps`` steps, calling ``save`` now and then and at the end."""
    device = keys.device
    weights = {side: [tensor.to(device) for tensor in held] for side, held in progress.weights.items()}
    if progress.before is None:
        progress.before = measure(queries, keys, weights, settings, layer)
    parameters = [tensor.requires_grad_() for held in weights.values() for tensor in held]
    adam = torch.optim.Adam(parameters, lr=settings.lr)
    for i, parameter in enumerate(parameters if progress.moments else ()):
        first, second = (progress.moments[2 * i + j].to(device) for j in range(2))
        adam.state[parameter] = {"step": torch.tensor(float(progress.step)), "exp_avg": first, "exp_avg_sq": second}

    def keep(step: int) -> None:
        states = [adam.state[parameter] for parameter in parameters] if step else []
        progress.weights = {side: [tensor.detach() for tensor in held] for side, held in weights.items()}
        progress.moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        progress.step = step

    saved = time.monotonic()
    for step in range(progress.step, settings.steps):
        number, rows = rows_of_step(settings, layer, step, len(keys), keys.shape[2])
        adam.zero_grad()
        q, k = queries[number][:, rows.start : rows.stop].float(), keys[number].float()
        loss_of(q, k, rows, weights, settings).backward()
        adam.step()
        tell(step + 1)
        if time.monotonic() - saved >= SAVE_S:
            keep(step + 1)
            save()
            saved = time.monotonic()
    progress.after = measure(queries, keys, weights, settings, layer)
    progress.weights = {side: [tensor.detach().cpu() for tensor in held] for side, held in weights.items()}
    progress.moments, progress.step = [], settings.steps
    save()
