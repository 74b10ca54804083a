"""Every test runs offline, on one thread, quietly, and leaves the registry of maskers as it found it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


def pytest_configure(config):
    """Where the tests run, which is not where xdist hands them out: there nothing need be imported."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    from transformers.utils import logging

    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.speed_up()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _same_registry_afterwards(monkeypatch):
    """A test may register maskers of its own: the laws over all registered maskers must not meet them."""
    from sah_transformers import MaskerRegistry

    for table in ("_maskers", "_configs"):
        monkeypatch.setattr(MaskerRegistry, table, dict(getattr(MaskerRegistry, table)))
