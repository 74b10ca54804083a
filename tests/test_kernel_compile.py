"""Every decode kernel, and the mask kernel, compiles for the supported GPU generations without a GPU.

The launches of representative calls are recorded instead of run, on tensors without storage, and each is compiled
as it would be launched. Run alone, `python tests/test_kernel_compile.py` prints registers, spills and shared memory.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_process import ARCHITECTURES, Chosen, compiles

STACKS = {
    "bands": [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}],
    "best": [
        {"type": "sink", "sink_size": 128},
        {"type": "local", "window_size": 128},
        {"type": "oracle_top_k", "heavy_size": 0.05},
    ],
    "wide": [{"type": "oracle_top_k", "heavy_size": 0.5}],
    "group": [{"type": "local", "window_size": 128}, {"type": "oracle_top_k", "heavy_size": 0.05, "gqa": "group"}],
    "mass": [{"type": "sink", "sink_size": 128}, {"type": "oracle_top_p", "top_p": 0.9}],
}
FORMS = {
    "bf16": {"dtype": torch.bfloat16},
    "float32 D=80": {"dtype": torch.float32, "D": 80},
    "fp16 D=256 masked": {"dtype": torch.float16, "D": 256, "masked": True, "softcap": 30.0},
    "many rows, narrow values": {"G": 2, "Q": 2, "D": 64, "DV": 48},
}
KEYS = {
    "2,097,152 keys": {"K": 2**21},
    "more levels": {"level_bins": 64},
}
PARTS = {
    "two parts": {"K": 131_088},
    "two parts, masked": {"K": 131_088, "masked": True},
    "two long parts, masked": {"K": 300_000, "masked": True},
}
ESTIMATES = {"hash_attention": "sum", "double_sparsity": "softmax", "pq_cache": "softmax", "socket": "sum"}
SIDE = {
    "quest": {"type": "quest", "heavy_size": 0.05},
    "quest per KV head": {"type": "quest", "heavy_size": 0.05, "gqa": "group"},
    "quest, pages of 7": {"type": "quest", "heavy_size": 100, "page_size": 7},
    "keys": ("none", "exact"),
    "keys per KV head": ("softmax", "exact"),
    "keys summed": ("sum", "exact"),
    **{name: ("none", name) for name in ESTIMATES},
    **{f"{name} per KV head": (reduce, name) for name, reduce in ESTIMATES.items()},
}
MASKS = {
    "256 keys": {"K": 256},
    "1,024 keys, previous": {"K": 1024, "previous": True, "dtype": torch.float32},
    "4,096 keys, share": {"K": 4096, "budget": 0.02},
    "8,192 keys, padded": {"K": 8192, "masked": True},
    "16,383 keys, everything": {"K": 16383, "masked": True, "previous": True, "budget": 0.05, "softcap": 30.0},
}
USUAL = {  # forms of stacks that launch every kernel
    "best": ("bf16", "fp16 D=256 masked"),
    "bands": ("bf16",),
    "wide": ("bf16",),
    "group": ("bf16", "fp16 D=256 masked"),
    "mass": ("bf16", "many rows, narrow values"),
    "quest": ("bf16", "fp16 D=256 masked", "two parts, masked"),
    "quest per KV head": ("bf16", "two parts, masked", "many rows, narrow values"),
    "keys": ("bf16", "fp16 D=256 masked"),
    "keys per KV head": ("bf16",),
    "hash_attention": ("bf16",),
    "hash_attention per KV head": ("bf16",),
    "socket": ("bf16",),
    "mask": ("256 keys", "8,192 keys, padded"),
}


@dataclass
class Launch:
    kernel: object
    args: tuple
    constants: dict
    warps: int
    options: dict


def launches(stack, dtype=torch.bfloat16, B=1, H=32, G=8, Q=1, K=131072, D=128, DV=None, masked=False, softcap=None):
    """What one decode call would launch."""
    from sah_transformers.kernels.decode import kernel
    from sah_transformers.kernels.decode.stack import read_stack
    from sah_transformers.maskers import MaskerRegistry

    recorded = []

    class Recorder(kernel.Launcher):
        def __call__(self, kernel, grid, *args, warps=4, cap=None, **constants):
            recorded.append(Launch(kernel, args, constants, warps, {} if cap is None else {"maxnreg": cap}))

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    described = [MaskerRegistry.create_masker(config).describe() for config in STACKS[stack]]
    inputs = kernel.Inputs(
        q=tensor(B, H, Q, D),
        k=tensor(B, G, K, D),
        v=tensor(B, G, K, DV or D),
        mask=tensor(B, Q, K, dtype=torch.bool) if masked else None,
        sinks=tensor(H) if masked else None,
        causal=True,
        scaling=0.1,
        softcap=softcap,
        least=0,
        stack=read_stack(described, H // G),
    )
    launcher, kernel.Launcher = kernel.Launcher, Recorder
    try:
        kernel.decode_rows(inputs)
    finally:
        kernel.Launcher = launcher
    return recorded


def side_launches(
    stack, dtype=torch.bfloat16, B=1, H=32, G=8, Q=1, K=131072, D=128, DV=None, masked=False, softcap=None, **tuning
):
    """What one decode call with a selection by side data would launch, the append included."""
    from sah_transformers.kernels import append
    from sah_transformers.kernels.approximate import pipeline
    from sah_transformers.kernels.approximate.methods import method_of
    from sah_transformers.kernels.approximate.stack import read_side_stack
    from sah_transformers.kernels.decode.kernel import Inputs
    from sah_transformers.maskers import MaskerRegistry
    from sah_transformers.selections import Estimated, First, Pages

    recorded = []

    class Recorder(pipeline.Launcher):
        def __call__(self, kernel, grid, *args, warps=4, cap=None, fuse=True, **constants):
            limits = {} if cap is None else {"maxnreg": cap}
            recorded.append(Launch(kernel, args, constants, warps, {**limits, "enable_fp_fusion": fuse}))

    class Direct:
        def __call__(self, kernel, grid, *args, warps=4, **constants):
            record(kernel, grid, args, constants, warps)

    def record(kernel, grid, args, constants, warps):
        recorded.append(Launch(kernel, args, constants, warps, {}))

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    chosen, side, given = SIDE[stack], {}, None
    if isinstance(chosen, tuple):
        reduce, estimate = chosen
        selection = Estimated(0.05, reduce != "none", reduce if reduce != "none" else "sum", estimate)
        if estimate != "exact":
            from test_approximate_compile import side_of

            side, given = side_of(estimate, method_of(estimate), B, H, G, K, D, True)
    else:
        selection = MaskerRegistry.create_masker(chosen).describe()
        side = {name: tensor(B, G, -(-K // selection.size), D) for name in ("low", "high")}
    read = read_side_stack([First(128), selection])
    keys, mask = tensor(B, G, K, D), tensor(B, Q, K, dtype=torch.bool) if masked else None
    positions = tensor(B, K, dtype=torch.int64)
    inputs = Inputs(
        q=tensor(B, H, Q, D), k=keys, v=tensor(B, G, K, DV or D), mask=mask, sinks=tensor(H) if masked else None,
        causal=True, scaling=0.1, softcap=softcap, least=0, stack=read.stack,
    )  # fmt: skip
    tuning_of = pipeline.tuning_of
    pipeline.tuning_of = lambda *sizes: replace(tuning_of(*sizes), **tuning)
    launcher, pipeline.Launcher = pipeline.Launcher, Recorder
    launch_once, append.Direct = append.Direct, Direct
    built, append.built = append.built, record
    try:
        pipeline.attend_rows(inputs, selection, side, given, positions)
        if isinstance(selection, Pages):
            append.fold(side["low"], side["high"], keys, K - 1, positions if masked else None, selection.size)
        if isinstance(selection, Pages) and masked:
            span, length = tensor(2, dtype=torch.int64), tensor(1, dtype=torch.int64)
            append.fold(side["low"], side["high"], keys, span, positions, selection.size)
            append.follow(length, span, positions, mask[:, 0].expand(B, -1), 1)
            for known in (length, K - 1):
                append.append_token(keys, keys, inputs.k[:, :, :1], inputs.v[:, :, :1], known)
    finally:
        pipeline.tuning_of, pipeline.Launcher = tuning_of, launcher
        append.Direct, append.built = launch_once, built
    return recorded


def mask_launches(K, budget=64, dtype=torch.bfloat16, masked=False, previous=False, softcap=None, B=2, H=8, G=2, D=64):
    """What one call of ``add_mask`` would launch, each width of rows once."""
    from sah_transformers import Mask, MaskerRegistry
    from sah_transformers.attention import make_call
    from sah_transformers.kernels.select import kernel

    recorded = []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, num_warps, enable_fp_fusion, **constants):
                recorded.append(Launch(original, args, constants, num_warps, {}))

            return launch

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    before = Mask.from_dense_unchecked(tensor(B, H, K, K, dtype=torch.bool)) if previous else None
    masker = MaskerRegistry.create_masker({"type": "oracle_top_k", "heavy_size": budget})
    call = make_call(
        tensor(B, H, K, D), tensor(B, G, K, D), tensor(B, G, K, D), [masker], previous_mask=before, softcap=softcap,
        attention_mask=tensor(B, K, dtype=torch.bool) if masked else None,
    )  # fmt: skip
    original, kernel.top_k_kernel = kernel.top_k_kernel, Recorder()
    try:
        kernel.top_k_mask(call, budget)
    finally:
        kernel.top_k_kernel = original
    return list({launch.constants["BLOCK"]: launch for launch in recorded}.values())


def compiled(launch, architecture):
    """Triton's result for one launch, as if called with these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1"}
    names |= {torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
    names |= {torch.uint8: "*u8", torch.float64: "*fp64"}
    function = launch.kernel
    signature, constants, attributes = {}, {}, {}
    plain = set(function.do_not_specialize or ())
    for i, (name, value) in enumerate(zip(function.arg_names, (*launch.args, *launch.constants.values()), strict=True)):
        if name in launch.constants:
            signature[name], constants[(i,)] = "constexpr", value
            assert function.arg_names[i] == list(launch.constants)[i - len(launch.args)], (function, name)
        elif isinstance(value, torch.Tensor):
            signature[name] = names[value.dtype]
            if name not in plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in plain:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target, options = GPUTarget("cuda", architecture, 32), {"enable_fp_fusion": True, **launch.options}
    result = triton.compile(source, target=target, options={"num_warps": launch.warps, **options})
    if not options["enable_fp_fusion"]:
        assert not re.search(r"fma|\b(mul|add|sub)\.f32", result.asm["ptx"]), "may be rounded once"
    return result


def compile_all(recorded, chosen, verbose, architecture, *what):
    """Compile the launches whose kernels are ``chosen``, and print a line for each."""
    for launch in filter(lambda launch: chosen(launch.kernel), recorded):
        result = compiled(launch, architecture)
        used = resources(result) if verbose else ""
        print("compiled", architecture, *what, launch.kernel.__name__, used, flush=True)


def main(architectures, verbose, usual, once):
    def of(stack, forms):
        return [(form, options) for form, options in forms.items() if not usual or form in USUAL.get(stack, ())]

    for architecture in architectures:
        chosen = Chosen(once)
        for stack in STACKS:
            for form, options in of(stack, FORMS):
                compile_all(launches(stack, **options), chosen, verbose, architecture, stack, form)
        for stack, side in SIDE.items():
            forms = FORMS
            if isinstance(side, tuple) and side[1] != "exact":
                forms = {"bf16": {}}  # in all forms: `test_approximate_compile.py`
            elif isinstance(side, tuple):
                forms = {**FORMS, **KEYS}
            else:
                forms = {**FORMS, **PARTS}
            for form, options in of(stack, forms):
                compile_all(side_launches(stack, **options), chosen, verbose, architecture, stack, form)
        for form, options in of("mask", MASKS):
            compile_all(mask_launches(**options), chosen, verbose, architecture, form)


def resources(result):
    """Registers, spills and shared memory by ptxas, where it is at hand."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.asm["ptx"])
        file.flush()
        found = re.search(r"\.target (sm_\w+)", result.asm["ptx"])
        ptxas = knobs.nvidia.ptxas_blackwell.path  # reads every version of PTX
        command = [ptxas, "-v", f"--gpu-name={found.group(1)}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    used = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill stores", text)
    return {
        "registers": used and int(used.group(1)),
        "spilled": spilled and int(spilled.group(1)),
        "shared": result.metadata.shared,
        "instructions": result.asm["ptx"].count(";"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    """In a process of its own: the interpreter, once imported, cannot be left."""
    compiles(__file__, architecture, 270, 100, 32, "--quiet")


if __name__ == "__main__":
    numbers, words = [int(a) for a in sys.argv[1:] if a.isdigit()], sys.argv
    main(numbers or [90], "--quiet" not in words, "--usual" in words, "--once" in words)
