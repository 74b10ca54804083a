"""Kernel tests: on a GPU in this process, else in Triton's interpreter or its compiler, in processes of their own
(`make compile`, which runs nothing else, compiles in its own).

The interpreter is chosen when Triton is imported, and cannot be left.
"""

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from unittest import mock

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None

kernel_test = pytest.mark.skipif(not (GPU or INTERPRETED), reason="run by test_in_the_interpreter")
gpu_test = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def interpreter_test(test):
    """Marks a test that runs its file again in the interpreter."""
    test = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")(test)
    return pytest.mark.skipif(GPU or INTERPRETED, reason="the tests run in this process")(test)


def passes_in_the_interpreter(file, *options, timeout=580, poison=False):
    """Run the tests of ``file`` there; ``poison``: scratch and outputs are filled with NaN before use."""
    # NumPy multiplies matrices there. OpenBLAS's kernels for AVX2 round equal columns differently, Nehalem's never,
    # which tests of ties need whatever the machine is set to.
    blas = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **blas, "TRITON_INTERPRET": "1", **({"SAH_POISON": "1"} if poison else {})}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def in_triton(message, kind=RuntimeError):
    """A function that raises out of a frame of Triton's."""
    scope = {"__name__": "triton.backends.somewhere", "kind": kind, "message": message}
    exec("def fail(*arguments, **constants):\n    raise kind(message)", scope)
    return scope["fail"]


def mostly_slow(values, *usual):
    """Parameters, tuples of several or single ones, of which all but the ``usual`` are left to the slow tests."""

    def slow(value):
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in usual else slow(value) for value in values]


@contextlib.contextmanager
def never_waiting():
    """The host must not wait for the device here."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step):
    """(CUDA graph of ``step``, what its replays write), once it has run without waiting for the device."""
    with never_waiting():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


ARCHITECTURES = (80, 90, 100)
WHOLE = 90
"""The architecture that the slow tests compile every form of every kernel for; for the others the usual ones.

``KERNEL_FORMS=usual`` (`make compile`, newest Triton): the usual ones for it, each kernel once for the others;
``KERNEL_FORMS=once`` (oldest Triton): each once. Run alone, the files compile all."""


class Chosen:
    """Whether a kernel is to be compiled again: with ``once`` in the first of its forms alone."""

    def __init__(self, once):
        self.once, self.seen = once, set()

    def __call__(self, kernel):
        again = kernel in self.seen
        self.seen.add(kernel)
        return not (again and self.once)


def compiles(file, architecture, all, usual, once, *options, timeout=1200):
    """Run ``file``, which prints a line for each kernel that it compiles for ``architecture``.

    Args:
        all, usual, once: how many lines there are at least, of all forms, the usual ones, of one per kernel.
    """
    pytest.importorskip("triton")
    forms = os.environ.get("KERNEL_FORMS")  # nothing else runs in this process then
    least = all
    if forms == "once" or (forms and architecture != WHOLE):
        least, options = once, (*options, "--usual", "--once")
    elif forms or architecture != WHOLE:
        least, options = usual, (*options, "--usual")
    command = [file, str(architecture), *options]
    if forms and not INTERPRETED:
        with contextlib.redirect_stdout(io.StringIO()) as said, mock.patch.object(sys, "argv", command):
            runpy.run_path(file, run_name="__main__")
        assert said.getvalue().count("compiled") >= least
        return
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("compiled") >= least
