"""How far a training of hashes has come: a folder beside the output with one safetensors file per layer."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sah_transformers.maskers.hash_weights import DEPTH
from sah_transformers.maskers.model_files import write_whole
from sah_transformers.prepare.hash_training import Recall


@dataclass
class Progress:
    """One layer's training.

    Attributes:
        weights: ``{"q": [weight, bias, weight, ...], "k": ...}``, float32.
        moments: Adam's first and second moments in the weights' order, queries first; empty before the first step.
        step: steps done.
        before, after: measured untrained, and once trained.
    """

    weights: dict[str, list[torch.Tensor]]
    moments: list[torch.Tensor] = field(default_factory=list)
    step: int = 0
    before: Recall | None = None
    after: Recall | None = None


def folder_of(output: Path) -> Path:
    """Where the checkpoint of a training into ``output`` lies."""
    return output.with_name(f"{output.name}.partial")


class Checkpoint:
    """The folder for one output and one ``run``: plain data on model, text and settings."""

    def __init__(self, output: Path, run: dict[str, Any]):
        self.folder = folder_of(output)
        self.run = json.loads(json.dumps(run))

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def save(self, layer: int, progress: Progress) -> None:
        """Put a layer's training beside the others."""
        self.folder.mkdir(exist_ok=True)
        tensors = {
            f"{side}.{i}": tensor for side, held in progress.weights.items() for i, tensor in enumerate(held)
        } | {f"moment.{i}": tensor for i, tensor in enumerate(progress.moments)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {name: None if one is None else asdict(one) for name, one in self._measures(progress).items()}
        metadata = {"run": json.dumps(self.run), "step": str(progress.step), "measures": json.dumps(about)}
        write_whole(self._file(layer), lambda part: save_file(tensors, part, metadata))

    @staticmethod
    def _measures(progress: Progress) -> dict[str, Recall | None]:
        return {"before": progress.before, "after": progress.after}

    def load(self, layer: int) -> Progress | None:
        """A layer's training on the CPU, or None where it has not begun.

        Raises:
            ValueError: for a file that cannot be read, or that is of another model, text or settings.
        """
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as held:
                metadata = held.metadata() or {}
                tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (no mapping)
            run, step = json.loads(metadata["run"]), int(metadata["step"])
            measures = json.loads(metadata["measures"])
            weights = {side: [tensors[f"{side}.{i}"] for i in range(2 * DEPTH)] for side in "qk"}
            moments = [tensors[f"moment.{i}"] for i in range(len(tensors) - 4 * DEPTH)]
            recalls = {name: None if one is None else Recall(**one) for name, one in measures.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint {file} cannot be read ({error}): start again with --restart") from None
        if run != self.run:
            other = ", ".join(sorted(name for name in run | self.run if run.get(name) != self.run.get(name)))
            raise ValueError(f"the checkpoint {self.folder} is of another {other}: start again with --restart")
        return Progress(weights, moments, step, recalls["before"], recalls["after"])

    def delete(self) -> None:
        """Remove the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
