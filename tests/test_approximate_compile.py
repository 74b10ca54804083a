"""Every scoring and append kernel of the published methods compiles for the supported GPU generations without a GPU.

As `test_kernel_compile.py`. Run alone, `python tests/test_approximate_compile.py` prints registers, spills and memory.
"""

import importlib
import sys
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from kernel_process import ARCHITECTURES, Chosen, compiles
from test_kernel_compile import Launch, compile_all

FORMS = {
    "masses": {},
    "histogram": {"masses": False},
    "peaks": {"masses": False, "bins": 0},
    "peaks, masked": {"masses": False, "bins": 0, "masked": True, "dtype": torch.float16},
    "peaks, 2,097,152 keys": {"masses": False, "bins": 0, "K": 2**21, "apart": False},
    "5 queries, float32": {"Q": 5, "masked": True, "dtype": torch.float32, "D": 80, "apart": False},
    "summed": {"summed": True, "masses": False},
    "summed, few keys": {"summed": True, "masses": False, "K": 1024},
    "coarse": {"coarse": True, "masses": False, "bins": 0},
    "coarse, 7 heads": {"coarse": True, "masses": False, "bins": 0, "H": 28, "G": 4, "masked": True, "apart": False},
    "coarse, 16 planes": {"coarse": True, "masses": False, "bins": 0, "planes": 16, "K": 4096},
}
PROMPTS = {
    "prompt": {},
    "prompt, float32, D=80": {"dtype": torch.float32, "D": 80},
    "prompt, float16, 64 bits": {"dtype": torch.float16, "bits": 64},
}
USUAL = ("masses", "peaks", "peaks, masked", "summed", "coarse", "prompt")
METHODS = ("hash_attention", "double_sparsity", "pq_cache", "socket")
SUMMED, COARSE = ("hash_attention", "socket"), ("socket",)


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def recorder_of(recorded):
    """A class that stands for `place.Direct` and launches nothing."""

    class Recorder:
        def address(self, tensor):
            return tensor

        def __call__(self, kernel, grid, *args, warps=4, cap=None, **constants):
            recorded.append(Launch(kernel, args, constants, warps, {} if cap is None else {"maxnreg": cap}))

    return Recorder


def side_of(name, module, B, H, G, K, D, apart, planes=12):
    """(side data, what the kernels need besides)."""
    i32, u8, f16 = torch.int32, torch.uint8, torch.float16
    if name == "hash_attention":
        sizes = [D, 128, 128, 32]
        mlp = tuple((tensor(H, o, i), tensor(H, o)) for i, o in pairwise(sizes))
        return {"hash": tensor(B, H, K, 1, dtype=i32)}, module.Given(mlp, mlp, 32)
    if name == "double_sparsity":
        label = {"code": tensor(B, H, K, 8, dtype=u8), "low": tensor(B, H, K, dtype=f16)}
        return {**label, "step": tensor(B, H, K, dtype=f16)}, module.Given(tensor(H, 16, dtype=torch.int64), 4)
    if name == "pq_cache":
        radius = None if apart else tensor(B, G, 2, dtype=torch.float64)
        book = tensor(B, G, 2, 64, D // 2 + (radius is not None)), tensor(B, G, 2), tensor(B, dtype=torch.bool)
        return {"codes": tensor(B, G, K, 2, dtype=u8)}, module.Given(*book, radius)
    count = -(-60 * planes // 32)
    words = tensor(B, G, count, K, dtype=i32).mT if apart else tensor(B, G, K, count, dtype=i32)
    drawn = tensor(60, planes, D)
    return {"buckets": words, "norm": tensor(B, G, K)}, module.Given(drawn, 0.3, module.digits_of(drawn))


def launches(
    name, tile=None, dtype=torch.bfloat16, B=1, H=32, G=8, Q=1, K=131072, D=128, masked=False, masses=True, bins=1024,
    summed=False, apart=True, coarse=False, planes=12,
):  # fmt: skip
    """What a call and an append of one method would launch."""
    from sah_transformers.kernels.approximate.launch import Edges, Levels, Samples, Scoring
    from sah_transformers.kernels.approximate.methods import tiles_of

    module = importlib.import_module(f"sah_transformers.kernels.approximate.{name}")
    recorded = []
    Recorder = recorder_of(recorded)
    side, given = side_of(name, module, B, H, G, K, D, apart, planes)
    call = Scoring(
        tensor(B, H, Q, D, dtype=dtype), tensor(B, G, K, D, dtype=dtype), K, 0,
        tensor(B, Q, K, dtype=torch.bool), (Q * K, K, 1), tensor(1, dtype=torch.int32), tensor(1), tensor(1),
        tensor(1, dtype=torch.int32), tensor(1), tensor(1, dtype=torch.int32), tensor(1), 0.1, (128, 0, 128, 0),
        True, masked, masses, bins, summed, coarse,
    )  # fmt: skip
    assert module.why_not(given, D) == ""
    tile = tile or tiles_of(module, call, given)[0]
    call = call.long(-(-K // tile.span) * tile.span)
    scratch = {n: tensor(size, dtype=dtype) for n, (size, dtype) in module.scratch(call, side, given).items()}
    module.look_up(Recorder(), call, side, given, scratch)
    module.score(Recorder(), call, side, given, scratch, tile)
    if coarse:
        edges = Edges(tensor(1, dtype=torch.int32), tensor(1, dtype=torch.int32), 9, 5)
        module.settle(Recorder(), call, side, given, scratch, edges)
    levels = module.levels(call, given)
    arrays = tensor(1), tensor(1, dtype=torch.uint8), tensor(1, dtype=torch.int32)
    if levels:
        bins = 1 << max(6, levels.bit_length())
        module.level(Recorder(), call, side, given, scratch, Levels(*arrays, tile.span, bins, tile.warps))
    elif hasattr(module, "line") and not masses and not bins:
        module.line(Recorder(), call, side, given, scratch, Samples(tensor(1), (0, 1), 1024, 8, 16))
        module.level(Recorder(), call.long(-(-K // 1024) * 1024), side, given, scratch, Levels(*arrays, 1024, 16, 2))
    new = tensor(B, G, 1, D, dtype=dtype)
    span = tensor(2, dtype=torch.int64) if masked else (5, 6)
    with patch.multiple(module, create=True, Direct=Recorder, no_kernels=lambda tensor: ""):
        module.append(side, new, new, span, given)
    if name == "socket":
        keys = tensor(B, G, K, D, dtype=dtype)
        with patch("sah_transformers.kernels.approximate.socket_prompt.Direct", Recorder):
            module.append(side, keys, keys, (0, K), given)
    if name == "pq_cache":
        fit_launches(Recorder, side["codes"], given, tensor(B, G, K, D, dtype=dtype))
    return recorded


def fit_launches(recorder, codes, given, keys):
    """Launch what makes the codebooks and the codes of a whole prompt."""
    from sah_transformers.kernels.approximate import k_means

    with patch.object(k_means, "Direct", recorder):
        k_means.codebooks(keys, given.step.shape[2], given.centroids.shape[3], 1)
        k_means.codes_of(keys, given.centroids, given.step, codes)


def prompt_launches(architecture, dtype=torch.bfloat16, D=128, bits=32, H=32, G=8, K=32768):
    """What hashes the keys of a prompt."""
    from sah_transformers.kernels.approximate import hash_prompt
    from sah_transformers.kernels.approximate.hash_digits import digits_of

    recorded = []
    tiles = hash_prompt.COUNT if architecture == 90 else 1
    keys = tensor(1, G, K, D, dtype=dtype)
    mlp = tuple((tensor(H, o, i), tensor(H, o)) for i, o in pairwise([D, 128, 128, bits]))
    assert hash_prompt.fits(keys, mlp)
    with patch.multiple(hash_prompt, Direct=recorder_of(recorded), COUNT=tiles):
        hash_prompt.hash_prompt(keys, mlp, digits_of(mlp), tensor(1, H, K, bits // 32, dtype=torch.int32), 0)
    return recorded


def main(architectures, verbose, usual, once):
    for architecture in architectures:
        chosen = Chosen(once)
        for form, options in PROMPTS.items():
            if form in USUAL or not usual:
                compile_all(
                    prompt_launches(architecture, **options), chosen, verbose, architecture, "hash_attention", form
                )
        for name in METHODS:
            for form, options in FORMS.items():
                none = (options.get("summed") and name not in SUMMED) or (options.get("coarse") and name not in COARSE)
                if not none and (form in USUAL or not usual):
                    compile_all(launches(name, **options), chosen, verbose, architecture, name, form)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    """In a process of its own: the interpreter, once imported, cannot be left."""
    compiles(__file__, architecture, 70, 60, 20, "--quiet")


if __name__ == "__main__":
    numbers, words = [int(a) for a in sys.argv[1:] if a.isdigit()], sys.argv
    main(numbers or [90], "--quiet" not in words, "--usual" in words, "--once" in words)
