"""The kernels for selections by side data against the reference: the same tests in Triton's interpreter and on a GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, as in `test_decode_kernel`.
`ExactEstimate` stands for the methods that rank keys by side data: its estimate is the score itself.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from kernel_process import (
    DEVICE,
    GPU,
    INTERPRETED,
    captured,
    gpu_test,
    interpreter_test,
    kernel_test,
    mostly_slow,
    passes_in_the_interpreter,
)
from method_files import fit
from test_decode_kernel import (
    DTYPES,
    TIES,
    as_right_as_eager,
    left_padding,
    local,
    poisoned,  # noqa: F401 (a fixture)
    sink,
    tensors,
)

from sah_transformers.attention import make_call, run
from sah_transformers.kernels.approximate import attend, why_not
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import dot
from sah_transformers.selections import Estimated
from sah_transformers.state import LayerState, State


@interpreter_test
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("part", ["test_methods", "not test_methods"])
@pytest.mark.parametrize("tests", mostly_slow(["not slow", "slow"], "not slow"))
def test_in_the_interpreter(tests, part):
    passes_in_the_interpreter(__file__, "-m", tests, "-k", part, timeout=1200, poison=True)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after the other."""
    if INTERPRETED and not GPU:
        from sah_transformers.kernels.approximate import pipeline

        original = pipeline.tuning_of
        few = {"head_programs": 8, "group_programs": 8, "key_group_programs": 8, "look_programs": 1}
        few |= {"samples": 128, "edge": 32, "edge_block": 64}
        monkeypatch.setattr(pipeline, "tuning_of", lambda *sizes: replace(original(*sizes), **few))


@dataclass(frozen=True)
class ExactEstimateConfig(TopKMaskerConfig):
    type: ClassVar[str] = "exact_estimate"
    reduce: str = "softmax"


class ExactEstimate(TopKMasker):
    """Keys by ``scaling * q.k``, said in the words of an estimate."""

    def __init__(self, config):
        super().__init__(config)
        self.group_reduce = config.reduce

    def score(self, queries, keys, values, ctx):
        return dot(queries, keys) * ctx.scaling

    def describe(self):
        return Estimated(self.config.heavy_size, self.config.gqa == "group", self.config.reduce, "exact")


def quest(size=0.1, **options):
    return {"type": "quest", "heavy_size": size, **options}


def best(size=0.1, gqa="head"):
    return ExactEstimate(ExactEstimateConfig(size, gqa))


def made(stack):
    """The maskers of a stack."""
    return [one if isinstance(one, ExactEstimate) else MaskerRegistry.create_masker(one) for one in stack]


def call_of(stack, q, k, v, **options):
    """The call; ``run`` takes the reference for it."""
    maskers = made(stack)
    return make_call(q, k, v, maskers, **{"kernel": "reference", **options})


def check(call, near_ties=0):
    """The kernels' output, which is as right as eager PyTorch's in all rows but ``near_ties``."""
    assert why_not(call) == ""
    return as_right_as_eager(call, attend(call), near_ties)


BASE = [sink(), local()]
STACKS = {
    "pages": [*BASE, quest()],
    "pages alone": [quest(20)],
    "one page": [sink(3), quest(1)],
    "pages most": [sink(4), quest(0.8)],
    "pages all": [local(), quest(1.0)],
    "pages beyond": [sink(4), quest(10**6)],
    "pages of one": [*BASE, quest(0.1, page_size=1)],
    "pages of 7": [sink(3), local(0.1), sink(0.02), quest(0.1, page_size=7)],
    "bands hold all": [sink(0.6), local(0.6), quest()],
    "group pages": [*BASE, quest(gqa="group")],
    "group pages most": [sink(40), quest(0.6, gqa="group", page_size=5)],
    "keys": [*BASE, best()],
    "keys alone": [best(7)],
    "one key": [sink(1), best(1)],
    "keys most": [sink(4), best(0.8)],
    "keys all": [local(), best(1.0)],
    "keys beyond": [sink(4), best(10**6)],
    "bands hold all keys": [sink(0.6), local(0.6), best()],
    "group keys": [*BASE, best(gqa="group")],
}
METHODS = {
    "quest": {"type": "quest", "heavy_size": 0.1, "page_size": 4},
    "double_sparsity": {"type": "double_sparsity", "heavy_size": 0.1, "group_factor": 8, "label_bits": 4},
    "pq_cache": {"type": "pq_cache", "heavy_size": 0.1, "pq_sub_dim": 0.5, "pq_bits": 3, "kmeans_iter": 2},
    "hash_attention": {"type": "hash_attention", "heavy_size": 0.1},
    "socket": {"type": "socket", "heavy_size": 0.1, "K": 5, "L": 8},
}
CALLS = [(name, gqa) for name in METHODS for gqa in ("head", "group")]
LONG = {f"{name} {gqa}": [*BASE, fit({**METHODS[name], "gqa": gqa}, 8, 2, 64)] for name, gqa in CALLS}
"""For 8 heads on 2 of 64 dimensions."""
FEW = ["pages", "group pages", "keys", "group keys"]
SHAPES = {
    "one key": {"K": 1},
    "few keys": {"K": 17},
    "whole pages": {"K": 128},
    "ragged": {"K": 333},
    "MQA": {"H": 7, "G": 1, "K": 200},
    "MHA": {"H": 3, "G": 3, "K": 200},
    "wide group": {"H": 16, "G": 1, "K": 60},
    "batch": {"B": 3, "K": 130},
    "D=80, Dv=48": {"D": 80, "Dv": 48, "K": 150},
    "D=64, Dv=128": {"D": 64, "Dv": 128, "K": 100, "H": 2, "G": 2},
    "D=128": {"D": 128, "K": 150, "H": 4, "G": 1},
}


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_stacks(stack, dtype):
    check(call_of(stack, *tensors(dtype=dtype)))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, stack):
    check(call_of(STACKS[stack], *tensors(**shape)))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
@pytest.mark.parametrize("data", [*TIES, "huge", "one heavy"])
def test_data(data, stack):
    """Ties at the cut go to the lower page or key, however many there are."""
    check(call_of(STACKS[stack], *tensors(data=data, K=260)))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
@pytest.mark.parametrize("data", ["normal", "constant", "duplicates", "whole numbers"])
def test_several_chunks(data, stack):
    check(call_of(STACKS[stack], *tensors(H=2, G=1, K=2500, D=16, data=data)))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
@pytest.mark.parametrize("rows", [2, 5])
def test_several_queries(stack, rows):
    """Each row sees the keys up to its own."""
    check(call_of(STACKS[stack], *tensors(H=4, G=2, Q=rows, K=150)))


@kernel_test
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("stack", [*FEW, "pages of 7"])
def test_left_padding(stack, rows):
    """A padded sequence has the result of the sequence alone; padding holds nothing that counts."""
    q, k, v = tensors(B=3, H=2, G=1, K=150, Q=rows)
    padded = [0, 37, 150 - rows]
    out = check(call_of(STACKS[stack], q, k, v, attention_mask=left_padding(150, *padded)))
    for b, start in enumerate(padded):
        alone = attend(call_of(STACKS[stack], q[b : b + 1], k[b : b + 1, :, start:], v[b : b + 1, :, start:]))
        torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-5, atol=1e-6)


@kernel_test
@pytest.mark.parametrize("stack", [*FEW, "pages of 7", "group pages most"])
def test_masks(stack):
    """Holes, a row that sees nothing, a static cache with an unused tail, several rows, rows too short to be sparse."""
    q, k, v = tensors(B=2, H=4, G=2, Q=3, K=100)
    holes = torch.rand(2, 1, 3, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    holes[1, 0, 1] = False
    out = check(call_of(STACKS[stack], q, k, v, attention_mask=holes, is_causal=False))
    assert not out[1, 1].any()
    used = torch.ones(3, 100, dtype=torch.bool, device=DEVICE).tril(57).expand(2, 1, 3, 100)
    check(call_of(STACKS[stack], q, k, v, attention_mask=used, is_causal=False))
    check(call_of(STACKS[stack], q, k, v, attention_mask=holes, min_keys=61))


@kernel_test
@pytest.mark.parametrize("stack", ["pages alone", "pages all", "pages of 7", "group pages", "keys"])
def test_rows_that_see_a_stretch_of_the_keys(stack):
    """Which begins and ends within a page, others rows seeing what lies before and behind."""
    q, k, v = tensors(B=2, H=4, G=2, Q=3, K=100)
    o_k = torch.arange(100, device=DEVICE)
    seen = torch.stack([(o_k >= 5) & (o_k < 78), o_k < 61, o_k >= 33])
    check(call_of(STACKS[stack], q, k, v, attention_mask=seen[None, None], is_causal=False))
    seen = torch.stack([seen, seen.roll(1, 0) & (o_k != 50)])[:, None]
    check(call_of(STACKS[stack], q, k, v, attention_mask=seen, is_causal=False))


@kernel_test
@pytest.mark.parametrize("stack", ["pages alone", "pages of 7", "group pages"])
def test_rows_that_see_padding_between_the_tokens(stack):
    """Keys that were no tokens when they came, and that a later call sees nevertheless: tokens lie apart there."""
    q, k, v = tensors(B=2, H=4, G=2, K=100)
    state, real = LayerState(), torch.ones(2, 99, dtype=torch.bool, device=DEVICE)
    real[0, 40:52] = False
    call_of(STACKS[stack], q, k[:, :, :99], v[:, :, :99], attention_mask=real, layer_state=state)
    call = call_of(STACKS[stack], q, k, v, layer_state=state)
    assert call.context.padded
    check(call)


@pytest.fixture
def short_parts(monkeypatch):
    """Rows of a few more pages than a power of two lie in registers in two parts, however short they are."""
    from sah_transformers.kernels.approximate import pipeline

    monkeypatch.setattr(pipeline, "LEAST_SPLIT", 32)
    return pipeline.parts_of


PARTS = {33: (32, 4), 34: (32, 4), 40: (32, 8), 41: (64, 0), 65: (64, 8), 80: (64, 16), 64: (64, 0)}


def test_parts_of_a_row():
    """A long row is not much wider than its pages; as it grows, it gets wider a few times only."""
    pytest.importorskip("triton")
    from sah_transformers.kernels.approximate.pipeline import parts_of

    widths = [parts_of(pages) for pages in range(1, 40_000)]
    assert all(sum(parts) >= pages for pages, parts in enumerate(widths, 1))
    assert parts_of(8192) == (8192, 0)
    assert parts_of(8193) == parts_of(9216) == (8192, 1024)
    assert parts_of(9217) == (8192, 2048)
    assert parts_of(10_241) == parts_of(16_384) == (16_384, 0)
    assert parts_of(2049) == (4096, 0)


@kernel_test
@pytest.mark.parametrize("pages", mostly_slow(list(PARTS), 33, 40, 65))
@pytest.mark.parametrize("gqa", ["head", "group"])
def test_rows_in_two_parts(gqa, pages, short_parts):
    """Budgets that end in either part, none and all of the pages; the last page is whole or has one key."""
    assert short_parts(pages) == PARTS[pages]
    for missing, size in ((0, 1), (3, 0.1), (0, 0.5), (3, 0.9), (0, 4 * pages - 4), (3, 10**6)):
        q, k, v = tensors(H=4, G=2, K=4 * pages - missing, D=16, seed=pages)
        check(call_of([quest(size, page_size=4, gqa=gqa)], q, k, v))
    check(call_of([*BASE, quest(0.2, page_size=4, gqa=gqa)], q, k, v))


@kernel_test
@pytest.mark.parametrize("data", mostly_slow([*TIES, "huge", "one heavy"], "constant", "duplicates"))
@pytest.mark.parametrize("gqa", ["head", "group"])
def test_ties_across_both_parts(gqa, data, short_parts):
    """Equal pages go by their place, whichever part they lie in; the best may all lie in one."""
    for pages, size in ((40, 0.3), (40, 0.85), (40, 0.95), (33, 124), (65, 250)):
        check(call_of([quest(size, page_size=4, gqa=gqa)], *tensors(H=4, G=2, K=4 * pages, D=16, data=data)))
    q, k, v = tensors(H=4, G=2, K=160, D=16, data=data)
    k[:, :, 128:] *= 8
    check(call_of([sink(3), quest(20, page_size=4, gqa=gqa)], q, k, v))
    k[:, :, 128:] = 0
    check(call_of([sink(3), quest(0.9, page_size=4, gqa=gqa)], q, k, v))


@kernel_test
@pytest.mark.parametrize("gqa", ["head", "group"])
def test_masks_of_rows_in_two_parts(gqa, short_parts):
    """Left padding, holes, rows that see a stretch or nothing, an unused tail, padding between the tokens."""
    stack = [sink(2), quest(0.3, page_size=4, gqa=gqa)]
    q, k, v = tensors(B=2, H=4, G=2, Q=3, K=159)
    check(call_of(stack, q, k, v, attention_mask=left_padding(159, 0, 37)))
    holes = torch.rand(2, 1, 3, 159, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    holes[1, 0, 1] = False
    check(call_of(stack, q, k, v, attention_mask=holes, is_causal=False))
    o_k = torch.arange(159, device=DEVICE)
    seen = torch.stack([o_k >= 131, o_k < 141, (o_k >= 5) & (o_k < 130)])
    check(call_of(stack, q, k, v, attention_mask=seen[None, None], is_causal=False))
    check(call_of(stack, q, k, v, attention_mask=(seen & (o_k != 140))[None, None], is_causal=False))


@kernel_test
@pytest.mark.parametrize("K", [150, 2500])
@pytest.mark.parametrize("gqa", ["head", "group"])
def test_padding_between_tokens_of_rows_in_two_parts(gqa, K, short_parts):
    """In every segment of the keys, looked at by several programs."""
    page, (q, k, v) = K // 37, tensors(B=2, H=4, G=2, K=K, D=16)
    state, real = LayerState(), torch.ones(2, K - 1, dtype=torch.bool, device=DEVICE)
    real[0, 40:52], real[0, K - 40 : K - 37], real[1, K - 9 :] = False, False, False
    stack = [sink(3), local(4), quest(0.3, page_size=page, gqa=gqa)]
    assert short_parts(-(-K // page))[1] > 0
    call_of(stack, q, k[:, :, : K - 1], v[:, :, : K - 1], attention_mask=real, layer_state=state)
    call = call_of(stack, q, k, v, layer_state=state)
    assert call.context.padded
    check(call)
    mask = torch.rand(2, K, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.9
    check(call_of(stack, q, k, v, layer_state=state, attention_mask=mask))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
def test_softcap_and_sinks(stack):
    q, k, v = tensors(K=200)
    sinks = torch.linspace(-3, 5, 4, device=DEVICE)
    check(call_of(STACKS[stack], q * 4, k, v, softcap=3.0, sinks=sinks, scaling=0.3))


@kernel_test
@pytest.mark.parametrize("stack", FEW)
def test_two_runs_give_the_same_bits(stack):
    call = call_of(STACKS[stack], *tensors(K=250))
    assert torch.equal(attend(call), attend(call))


def steps(stack, q, k, v, first, **options):
    """The last call of a sequence that came as ``first`` keys at once, then key by key."""
    maskers = made(stack)
    state = LayerState()
    for length in range(first, k.shape[2] + 1):
        masks = {name: mask[:, :length] for name, mask in options.items()}
        call = make_call(q, k[:, :, :length], v[:, :, :length], maskers, layer_state=state, kernel="triton", **masks)
    return call


@kernel_test
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", ["pages", "pages of 7"])
def test_side_data_in_place(stack, padded):
    """Key by key, over boundaries of pages and buffers, side data are those of all keys at once, bit for bit."""
    q, k, v = tensors(B=2, K=60, D=24, dtype=torch.float16)
    options = {"attention_mask": left_padding(60, 0, 9)} if padded else {}
    call = steps(STACKS[stack], q, k, v, 17, **options)
    whole = call_of(STACKS[stack], q, k, v, **options)
    for name, tensor in whole.side[-1].items():
        assert torch.equal(call.side[-1][name], tensor)
    assert torch.equal(attend(call), attend(whole))
    assert call.context.padded == padded


def generate(config, rows=1, padded=(), lengths=(87, 88, 89), H=4, D=64, dtype=torch.float32, data="normal"):
    """The last call of a sequence of so many keys, on a state kept by kernels; all are checked against the reference's
    selection by the same side data, which are those of all keys at once."""
    K = max(lengths)
    q, k, v = tensors(B=max(1, len(padded)), H=H, G=2, Q=rows, K=K, D=D, dtype=dtype, data=data)
    masker = MaskerRegistry.create_masker(fit(config, H, 2, D))
    maskers = [MaskerRegistry.create_masker(one) for one in (sink(4), local(8))] + [masker]
    real, state = left_padding(K, *padded) if padded else None, LayerState()
    for n in lengths:
        seen = None if real is None else real[:, :n]
        keys, values = k[:, :, :n], v[:, :, :n]
        call = make_call(q, keys, values, maskers, seen, layer_state=state, kernel="triton")
        check(replace(call, kernel="reference"))
        if not masker.pages():
            made = masker.append(keys, values, replace(call.context, side=call.side[-1]))
            assert all(torch.equal(call.side[-1][name], tensor) for name, tensor in made.items())
    return call


@kernel_test
@pytest.mark.parametrize("rows", mostly_slow([1, 3], 1))
@pytest.mark.parametrize(("name", "gqa"), CALLS)
def test_methods(name, gqa, rows):
    generate({**METHODS[name], "gqa": gqa}, rows)


@kernel_test
@pytest.mark.parametrize(("name", "gqa"), mostly_slow(CALLS, *((name, "group") for name in METHODS)))
def test_methods_with_left_padding(name, gqa):
    """A sequence with too few keys for codebooks beside one that has them."""
    generate({**METHODS[name], "gqa": gqa}, padded=(0, 60))
    generate({**METHODS[name], "gqa": gqa}, rows=3, padded=(7, 0), lengths=(70, 90))


@kernel_test
@pytest.mark.parametrize("name", METHODS)
def test_methods_go_on_after_a_crop(name):
    """And over boundaries of pages, blocks of keys and buffers."""
    generate(METHODS[name], lengths=(80, 81, 61, 62, 97))


@kernel_test
@pytest.mark.parametrize("name", METHODS)
def test_methods_in_half_precision(name):
    generate(METHODS[name], D=128, dtype=torch.float16, lengths=(70, 71))


@kernel_test
@pytest.mark.parametrize("data", mostly_slow(["constant", "duplicates", "zero queries"], "duplicates"))
@pytest.mark.parametrize(("name", "gqa"), CALLS)
def test_methods_with_ties(name, gqa, data):
    """More equal scores in a chunk than the cut's registers take: the row is searched as a whole."""
    generate({**METHODS[name], "gqa": gqa}, data=data, lengths=(420,))


@kernel_test
@pytest.mark.parametrize("name", METHODS)
def test_methods_with_several_chunks(name):
    generate(METHODS[name], lengths=(2400, 2401), D=32)


@kernel_test
@pytest.mark.parametrize("heavy_size", [1, 83, 84, 1000])
@pytest.mark.parametrize(("name", "gqa"), CALLS)
def test_any_budget(name, gqa, heavy_size):
    """One key, all 84 candidates but one, all, more than there are."""
    generate({**METHODS[name], "gqa": gqa, "heavy_size": heavy_size}, lengths=(96,))


COARSE = [
    (heads, tau, *buckets)
    for heads in (1, 3, 4, 7, 8)
    for tau in (1e-3, 0.1, 0.3, 1e6)
    for buckets in ((12, 16), (5, 8))
]


@kernel_test
@pytest.mark.parametrize(
    ("heads", "tau", "planes", "tables"), mostly_slow(COARSE, (3, 1e6, 5, 8), (4, 0.3, 5, 8), (1, 0.3, 5, 8))
)
def test_coarse_scores_of_socket(heads, tau, planes, tables, monkeypatch):
    """Many keys that only exact scores can tell from the cut for the first head, and equal ones."""
    from sah_transformers.kernels.approximate import socket

    settled, settle = [], socket.settle
    monkeypatch.setattr(socket, "settle", lambda *args: settled.append(settle(*args)))
    q, k, v = tensors(H=heads, G=1, K=250, D=64)
    stack = [*BASE, {"type": "socket", "heavy_size": 0.2, "K": planes, "L": tables, "tau": tau}]
    call = call_of(stack, q, k, v / v.norm(dim=-1, keepdim=True))
    sums = call.maskers[-1].score(q.double(), k, v, replace(call.context, side=call.side[-1]))[:, :1, 0, :, None]
    spread = 1 + 1e-4 * torch.linspace(-3, 3, 250, device=DEVICE).roll(130)[:, None]
    v = (v / v.norm(dim=-1, keepdim=True) * spread * (sums.mean() / sums.clamp(min=1e-30)).clamp(max=1e3)).float()
    k[:, :, 200:220], v[:, :, 200:220] = k[:, :, 180:200], v[:, :, 180:200]
    check(call_of(stack, q, k, v))
    assert len(settled) == (heads > 2 and tau >= 0.1)


@kernel_test
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rows": 3, "padded": (7, 0)}, {"lengths": (2400, 2401)}, {"data": "constant"}])
def test_coarse_scores_of_any_call(options):
    generate(METHODS["socket"], H=8, **options)


@kernel_test
@pytest.mark.parametrize("name", ["hash_attention", "pq_cache"])
def test_holes_softcap_and_sinks_of_methods(name):
    q, k, v = tensors(B=2, H=8, G=2, Q=3, K=100, D=64)
    holes = torch.rand(2, 1, 3, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    sinks = torch.linspace(-3, 5, 8, device=DEVICE)
    for gqa in ("head", "group"):
        check(call_of(LONG[f"{name} {gqa}"], q, k, v, attention_mask=holes, is_causal=False, softcap=3.0, sinks=sinks))


@kernel_test
@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize("bits", [64, 160])
def test_long_hashes(bits, gqa):
    """160 bits of two heads are more levels than a byte holds: their scores are cut as numbers."""
    generate({**METHODS["hash_attention"], "hat_bits": bits, "gqa": gqa}, lengths=(120,))


@kernel_test
@pytest.mark.parametrize("stack", ["pages", "keys"])
def test_a_prompt_by_side_data(stack):
    """No kernel reads one: the reference does, unless the kernels are insisted on."""
    q, k, v = tensors(H=2, G=1, Q=40, K=50, D=16)
    truth = run(call_of(STACKS[stack], q, k, v))[0]
    assert torch.equal(run(call_of(STACKS[stack], q, k, v, kernel="auto"))[0], truth)
    with pytest.raises(ValueError, match="kernel 'triton' cannot take this call"):
        run(call_of(STACKS[stack], q, k, v, kernel="triton"))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("data", ["normal", *TIES, "one heavy"])
@pytest.mark.parametrize("stack", [*FEW, "keys most"])
def test_long(stack, data):
    """Selection at length: nearly uniform weights, where one wrong key in thousands shows."""
    q, k, v = tensors(H=8, G=2, K=40_000, D=64, data=data)
    q = q * 0.02 if data == "normal" else q
    call = call_of(STACKS[stack], q, k, v)
    out, truth = attend(call), run(call)[0]
    close = (out - truth).abs().amax(-1) <= 2e-5 * truth.abs().max()
    assert close.sum() >= close.numel() - (1 if data in ("normal", "one heavy") else 0)
    assert torch.equal(out, attend(call))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("data", ["normal", "constant", "duplicates"])
@pytest.mark.parametrize("stack", LONG)
def test_methods_long(stack, data):
    """As ``test_long``; scores closer than their rounding may be ordered otherwise."""
    q, k, v = tensors(H=8, G=2, K=40_000, D=64, data=data)
    call = call_of(LONG[stack], q * 0.02 if data == "normal" else q, k, v)
    out, truth = attend(call), run(call)[0]
    close = (out - truth).abs().amax(-1) <= 2e-5 * truth.abs().max()
    assert close.sum() >= close.numel() - (4 if data == "normal" else 0)
    assert torch.equal(out, attend(call))


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", [*FEW, *LONG])
def test_graph_without_synchronisation(stack, padded):
    """A whole step, the append included, waits for nothing; a captured one follows its changed inputs."""
    q, k, v = tensors(B=2, H=8, G=2, K=5000, D=64, dtype=torch.bfloat16)
    options = {"attention_mask": left_padding(5000, 0, 900)} if padded else {}
    maskers = made({**STACKS, **LONG}[stack])
    state = State().layer(0)
    earlier = {name: mask[:, :4999] for name, mask in options.items()}
    make_call(q, k[:, :, :4999], v[:, :, :4999], maskers, layer_state=state, **earlier)

    def step():
        if state._positions is not None:
            state._positions.length = 4999
        state.length, state._lengths = 4999, dict.fromkeys(state._lengths, 4999)
        return attend(make_call(q, k, v, maskers, layer_state=state, kernel="triton", **options))

    step()
    graph, out = captured(step)
    for seed in range(1, 4):
        q.copy_(tensors(B=2, H=8, G=2, K=5000, D=64, dtype=torch.bfloat16, seed=seed)[0])
        v.copy_(tensors(B=2, H=8, G=2, K=5000, D=64, dtype=torch.bfloat16, seed=seed)[2])
        graph.replay()
        assert torch.equal(out, step())


@gpu_test
@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["pages", "keys", *(f"{name} head" for name in METHODS)])
def test_growing_cache_does_not_recompile(stack):
    """Steps of a generation share compiled kernels until the length doubles."""
    from sah_transformers.kernels.decode import kernel

    q, k, v = tensors(H=8, G=2, K=3000, D=64, dtype=torch.float32)
    maskers = made({**STACKS, **LONG}[stack])
    state = LayerState()
    apart = 0
    kernel.PLANS.clear()
    for length in range(2100, 2200):
        call = make_call(q, k[:, :, :length], v[:, :, :length], maskers, layer_state=state, kernel="triton")
        truth = run(replace(call, kernel="reference"))[0]
        apart += ((attend(call) - truth).abs().amax(-1) > 1e-4 * truth.abs().max()).sum()
    assert len(kernel.PLANS) == 1
    assert apart <= 4  # of 800 rows: scores closer than their rounding
