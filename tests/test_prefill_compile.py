"""Every prefill kernel compiles for the supported GPU generations without a GPU.

The launches of representative calls are recorded instead of run, on tensors without storage, and each is compiled as
it would be launched. Run alone, `python tests/test_prefill_compile.py 90` prints shared memory and instructions.
"""

import sys

import pytest
import torch
from kernel_process import ARCHITECTURES, Chosen, compiles

SINK, LOCAL = {"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 0.1}
STACKS = {
    "bands": [SINK, LOCAL],
    "best": [SINK, {"type": "oracle_top_k", "heavy_size": 0.05}, LOCAL],
    "mass": [SINK, {"type": "oracle_top_p", "top_p": 0.9}, LOCAL],
    "mass of all": [SINK, {"type": "oracle_top_p", "top_p": 0.9, "coverage": "total"}],
    "best per KV head": [SINK, {"type": "oracle_top_k", "heavy_size": 0.05, "gqa": "group"}, LOCAL],
    "mass per KV head": [SINK, {"type": "oracle_top_p", "top_p": 0.9, "gqa": "group"}, LOCAL],
}
FORMS = {
    "bf16": {"dtype": torch.bfloat16, "D": 128},
    "fp16 D=64": {"dtype": torch.float16, "D": 64, "H": 28, "G": 4},
    "fp16 D=192 softcap": {"dtype": torch.float16, "D": 192, "softcap": 30.0, "sinks": True},
    "fp32 D=80": {"dtype": torch.float32, "D": 80, "H": 6, "G": 2},
    "bf16 masked": {"dtype": torch.bfloat16, "D": 128, "masked": True, "G": 1},
}
USUAL = {  # forms of stacks that launch every kernel
    "bands": ("bf16",),
    "best": ("bf16", "bf16 masked"),
    "mass": ("bf16",),
    "best per KV head": ("bf16",),
    "mass per KV head": ("bf16 masked",),
}
FEW = {  # forms of stacks that need no more
    "mass": ("bf16", "bf16 masked"),
    "mass of all": ("bf16",),
    "mass per KV head": ("fp16 D=64", "bf16 masked"),
}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            bound = {**dict(zip(self.function.arg_names, args, strict=False)), **options}
            self.launches.append((self.function, bound))

        return launch


def launches(stack, dtype, D, softcap=None, sinks=False, masked=False, Q=4096, K=8192, H=32, G=8):
    """What one prefill call would launch, each kernel and form of arguments once."""
    from sah_transformers.attention import make_call
    from sah_transformers.kernels.prefill import launch
    from sah_transformers.kernels.prefill.stack import stack_of
    from sah_transformers.maskers import MaskerRegistry

    found = []
    kernels = [name for name in vars(launch) if name.endswith("_kernel")]
    originals = {name: getattr(launch, name) for name in kernels}
    tensors = [torch.empty(1, heads, rows, D, dtype=dtype, device="meta") for heads, rows in ((H, Q), (G, K), (G, K))]
    maskers = [MaskerRegistry.create_masker(config) for config in STACKS[stack]]
    more = {"softcap": softcap, "sinks": torch.empty(H, dtype=dtype, device="meta") if sinks else None}
    if masked:
        more["attention_mask"] = torch.empty(1, 1, Q, K, dtype=torch.bool, device="meta")
    call = make_call(*tensors, maskers, **more)
    for name, function in originals.items():
        setattr(launch, name, Recorder(function, found))
    try:
        launch.launch(call, stack_of([masker.describe() for masker in maskers]))
    finally:
        for name, function in originals.items():
            setattr(launch, name, function)
    return list({(function.__name__, bound.get("BC")): (function, bound) for function, bound in found}.values())


def compiled(function, bound, architecture):
    """Triton's result for one launch, as if called with these arguments on a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    names |= {torch.uint8: "*u8", torch.bool: "*i1", torch.int64: "*i64"}
    options = {name: bound.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    if "ASM" in bound:
        bound["ASM"] = True  # the tensors here are on no GPU
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = names[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main(architectures, usual, once):
    for architecture in architectures:
        chosen = Chosen(once)
        for stack in STACKS:
            for form, options in FORMS.items():
                if form not in FEW.get(stack, FORMS) or (usual and form not in USUAL.get(stack, ())):
                    continue
                for function, bound in filter(lambda launch: chosen(launch[0]), launches(stack, **options)):
                    result = compiled(function, dict(bound), architecture)
                    used = result.metadata.shared, result.asm["ptx"].count(";")
                    print("compiled", architecture, stack, form, function.__name__, *used, flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    """In a process of its own: the interpreter, once imported, cannot be left."""
    compiles(__file__, architecture, 90, 28, 9)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:] if a.isdigit()] or [90], "--usual" in sys.argv, "--once" in sys.argv)
