"""The scoring kernels of the published methods against their maskers: in Triton's interpreter and on a GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, as in `test_decode_kernel.py`.
Outputs hold NaN before; storages are larger than K and full of noise behind it.
"""

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch
from kernel_process import DEVICE, GPU, interpreter_test, kernel_test, mostly_slow, passes_in_the_interpreter
from method_files import fit

from sah_transformers.maskers import MaskerRegistry
from sah_transformers.rows import Context

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


@interpreter_test
@pytest.mark.parametrize("tests", mostly_slow(["not slow", "slow"], "not slow"))
def test_in_the_interpreter(tests):
    passes_in_the_interpreter(__file__, "-m", tests)


CONFIGS = {
    "hash_attention": {"type": "hash_attention", "heavy_size": 5},
    "double_sparsity": {"type": "double_sparsity", "heavy_size": 5, "group_factor": 8, "label_bits": 4},
    "pq_cache": {"type": "pq_cache", "heavy_size": 5, "pq_sub_dim": 0.5, "pq_bits": 3, "kmeans_iter": 2},
    "socket": {"type": "socket", "heavy_size": 5, "K": 12, "L": 4},
}
SUMMED = ("hash_attention", "socket")


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def module_of(name):
    return importlib.import_module(f"sah_transformers.kernels.approximate.{name}")


def roomy(tensor, words_apart=False):
    """``tensor [B, heads, K, ...]`` as a view of a storage with more rows, which hold noise; optionally keys next to
    each other."""
    room = 41 if tensor.shape[2] % 2 else 16 + -tensor.shape[2] % 16  # odd, or whole blocks of 16
    shape = (*tensor.shape[:2], tensor.shape[2] + room, *tensor.shape[3:])
    if words_apart:
        storage = torch.zeros((*shape[:2], shape[3], shape[2]), dtype=tensor.dtype, device=DEVICE).mT
    else:
        storage = torch.zeros(shape, dtype=tensor.dtype, device=DEVICE)
    storage.copy_(normal(*shape, seed=9) * 50)
    storage[:, :, : tensor.shape[2]] = tensor
    return storage


class Case:
    """Tensors, side data and the masker's scores of one call."""

    def __init__(
        self, config, B=1, H=4, G=2, Q=1, K=300, D=64, dtype=torch.float32, real=None, scaling=None, apart=False
    ):
        self.name = config["type"]
        self.q, self.k = normal(B, H, Q, D, dtype=dtype), normal(B, G, K, D, seed=1, dtype=dtype)
        self.v = normal(B, G, K, D, seed=2, dtype=dtype)
        self.masker = MaskerRegistry.create_masker(fit(config, H, G, D))
        positions = torch.arange(K, device=DEVICE).expand(B, K)
        if real is not None:
            positions = (real.cumsum(-1) - 1).masked_fill(~real, -1)
        self.ctx = Context(scaling=D**-0.5 if scaling is None else scaling, heads=H, positions=positions)
        self.real = real
        prepared = self.masker.prepare(self.k, self.v, self.ctx)
        side = {} if prepared is None else {**prepared[0], "ready": prepared[1]}
        self.ctx = replace(self.ctx, side=side)
        self.made = self.masker.append(self.k, self.v, self.ctx)
        self.buffers = {n: roomy(t, words_apart=apart and t.dim() == 4) for n, t in self.made.items()}
        self.side = {name: buffer[:, :, :K] for name, buffer in self.buffers.items()}
        self.ctx = replace(self.ctx, side={**side, **self.side})
        self.truth = self.masker.score(self.q.double(), self.k.double(), self.v.double(), self.ctx).double()

    @property
    def module(self):
        return module_of(self.name)

    def given(self):
        return self.masker.given(self.ctx, self.q.shape[3], self.q.device)


def visible_of(case, mask, causal):
    rows, keys = case.q.shape[2], case.k.shape[2]
    visible = torch.ones(case.q.shape[0], 1, rows, keys, dtype=torch.bool, device=DEVICE)
    if causal:
        visible = visible.tril(keys - rows)
    return visible if mask is None else visible & mask[:, None]


def empty(*shape, dtype=torch.float32):
    nonsense = {torch.float32: float("nan"), torch.uint8: 77}
    return torch.full(shape, nonsense.get(dtype, -7), dtype=dtype, device=DEVICE)


def call_of(case, span, mask, causal, summed, masses, bands, line, bins, coarse):
    """The call, the method's scratch, and what depends on the query looked up; ``span``: keys of a program."""
    from sah_transformers.kernels.approximate.launch import Scoring
    from sah_transformers.kernels.approximate.place import Direct
    from sah_transformers.kernels.decode.kernel import find_limits

    batch, heads, rows, _ = case.q.shape
    groups, keys = case.k.shape[1:3]
    chunks = -(-keys // span)
    R, stride = batch * (groups if summed else heads) * rows, chunks * span
    limits, look = empty(5 * batch * rows, dtype=torch.int32), (0, 0, 0)
    if mask is not None:
        look = tuple(0 if mask.shape[i] == 1 else mask.stride(i) for i in range(3))
        counts = empty(batch * rows * -(-keys // 1024), dtype=torch.int32)
        sizes = (batch, rows, keys)
        find_limits(Direct(), mask, counts, limits, sizes, look, (*bands, 0), causal, 4096)
    lines = torch.tensor(line, device=DEVICE)[:, None].expand(2, R).contiguous()
    call = Scoring(
        case.q, case.k, keys, stride, case.q if mask is None else mask, look, limits, lines, empty(R, stride),
        torch.zeros(R, max(1, bins), dtype=torch.int32, device=DEVICE), empty(R, chunks),
        empty(R, chunks, dtype=torch.int32), empty(R, chunks),
        case.ctx.scaling, bands, causal, mask is not None, masses, bins, summed, coarse,
    )  # fmt: skip
    given, module = case.given(), case.module
    assert module.why_not(given, case.q.shape[3]) == ""
    sizes = module.scratch(call, case.side, given)
    scratch = {name: empty(size, dtype=dtype) for name, (size, dtype) in sizes.items()}
    if coarse:
        scratch["table"].fill_(-1.0)  # where a pair has one head alone
    module.look_up(Direct(), call, case.side, given, scratch)
    return call, scratch


def truth_of(case, mask, causal, summed, first, last):
    """(scores, -inf where invisible, which keys are candidates), each ``[R, K]``."""
    truth = case.truth
    if summed:
        truth = truth.unflatten(1, (case.k.shape[1], -1)).sum(2)
    visible = visible_of(case, mask, causal).expand(truth.shape)
    truth = truth.masked_fill(~visible, float("-inf"))
    rank = visible.cumsum(-1)
    count = visible.sum(-1, keepdim=True)
    free = visible & (rank > first) & (rank <= count - last)
    return truth.flatten(0, 2), free.flatten(0, 2)


def scored(
    case, tile=(64, 2, 1), mask=None, causal=True, summed=False, masses=True, first=3, last=5, line=(1.0, 0.0), bins=64,
    coarse=False,
):  # fmt: skip
    """(what the kernel stored, what it should have stored); ``coarse`` scores are then made exact at every second key
    from the third on, and both are stored: ``[2, R, stride]``."""
    from sah_transformers.kernels.approximate.launch import Edges, Tile
    from sah_transformers.kernels.approximate.place import Direct

    tile, given, module, keys = Tile(*tile), case.given(), case.module, case.k.shape[2]
    call, scratch = call_of(case, tile.span, mask, causal, summed, masses, (first, 0, last, 0), line, bins, coarse)
    module.score(Direct(), call, case.side, given, scratch, tile)
    if coarse:
        edge = torch.arange(2, keys, 2, device=DEVICE, dtype=torch.int32)
        R = len(call.scores)
        cuts = torch.tensor([-7, -7, -7, 1, len(edge)], device=DEVICE, dtype=torch.int32)[:, None].expand(5, R)
        lists = torch.nn.functional.pad(edge, (7, 2), value=-7).expand(R, -1).contiguous()
        exact = replace(call, scores=call.scores.clone())
        module.settle(Direct(), exact, case.side, given, scratch, Edges(cuts.contiguous(), lists, lists.shape[1], 7))
        call = replace(call, scores=torch.stack([call.scores, exact.scores]))
    truth, free = truth_of(case, mask, causal, summed, first, last)
    return call, truth, free, call.stride // tile.span, tile.span


def check(case, exact=False, **options):
    """Scores to float32 rounding (or exactly), and what is summed up of each chunk to that of the stored scores."""
    call, truth, free, chunks, span = scored(case, **options)
    keys = case.k.shape[2]
    scores = call.scores[:, :keys].double()
    assert torch.equal(scores.isinf(), truth.isinf())
    assert bool((call.scores[:, keys:] == float("-inf")).all())
    seen = truth > float("-inf")
    scale = truth[seen].abs().max() if bool(seen.any()) else 1.0
    error = (scores[seen] - truth[seen]).abs().max() / scale if bool(seen.any()) else 0.0
    assert error == 0 if exact else error < 4e-6, error
    padded = torch.nn.functional.pad(call.scores[:, :keys], (0, chunks * span - keys), value=float("-inf"))
    free = torch.nn.functional.pad(free, (0, chunks * span - keys)).view(len(scores), chunks, span)
    tiles = padded.view(len(scores), chunks, span)
    peaks = tiles.amax(-1)
    assert torch.equal(call.peaks, peaks)
    if call.masses_too:
        weights = (tiles.double() - peaks.double().nan_to_num(neginf=0.0)[..., None]).exp()
        torch.testing.assert_close(call.masses.double(), weights.sum(-1), rtol=1e-5, atol=1e-6)
    elif call.bins:
        line = call.lines.double()[:, :, None, None]
        x = (tiles.double() * line[0] + line[1]).float()  # as one fma rounds it
        assert torch.equal(call.aboves, (free & (x >= call.bins)).sum(-1, dtype=torch.int32))
        inside = free & (x >= 0) & (x < call.bins)
        counts = torch.zeros(len(scores), call.bins, dtype=torch.int32, device=DEVICE)
        for row in range(len(scores)):
            counts[row] = torch.bincount(x[row][inside[row]].int(), minlength=call.bins).int()
        assert torch.equal(call.histogram, counts)


LEVELLED = ("double_sparsity", "pq_cache")
CHUNK, WARPS, BEST = 64, 1, 20


def check_levels(case, mask=None, causal=True, first=3, last=5):
    """Scores of the candidates, levels on a line that is found before, and how many keys of each chunk have them."""
    from sah_transformers.kernels.approximate.launch import Levels, Samples
    from sah_transformers.kernels.approximate.place import Direct

    given, module, keys = case.given(), case.module, case.k.shape[2]
    call, scratch = call_of(case, CHUNK, mask, causal, False, False, (first, 0, last, 0), (1.0, 0.0), 0, False)
    R, chunks = len(call.scores), call.stride // CHUNK
    lines, levels = empty(3, R), empty(R, call.stride, dtype=torch.uint8)
    histogram = empty(R, chunks, 8, dtype=torch.int32)
    module.line(Direct(), call, case.side, given, scratch, Samples(lines, (BEST, 0), 128, WARPS, 16))
    cut = Levels(lines, levels, histogram, CHUNK, 16, WARPS)
    module.level(Direct(), call, case.side, given, scratch, cut)
    truth, free = truth_of(case, mask, causal, False, first, last)
    scores, found = call.scores[:, :keys], levels[:, :keys]
    scale = truth[free].abs().max() if bool(free.any()) else 1.0
    assert bool(((scores - truth).abs()[free] < 4e-6 * scale).all())
    assert torch.equal(found > 0, free)
    assert not bool(levels[:, keys:].any())
    middle, below, above = lines[:, :, None].double()
    assert bool((below > 0).all())
    torch.testing.assert_close(below, above, rtol=1e-3, atol=0)
    exact = ((scores.double() - middle) * below + 8.5)[free].clamp(1, 15)
    assert bool(((found[free] - exact).abs() < 1.01).all())
    order = scores.masked_fill(~free, float("-inf")).argsort(-1)
    assert bool((found.gather(-1, order).int().diff(dim=-1) >= 0).all())
    counts = torch.nn.functional.one_hot(levels.long().unflatten(1, (chunks, CHUNK)), 16).sum(2)
    assert torch.equal(histogram.long(), counts[..., :8] | counts[..., 8:] << 16)
    many = free.sum(-1) > 3 * BEST
    assert bool(((found == 15).sum(-1) < BEST)[many].all())
    assert bool(((found > 1).sum(-1) > BEST)[many].all())


def left_padding(K, *padded):
    return torch.arange(K, device=DEVICE)[None] >= torch.tensor(padded, device=DEVICE)[:, None]


SHAPES = {
    "one key": {"K": 1},
    "few keys": {"K": 17},
    "chunks": {"K": 256},
    "ragged": {"K": 333},
    "MQA of 7": {"H": 7, "G": 1, "K": 150},
    "MHA": {"H": 3, "G": 3, "K": 150},
    "batch, D=128": {"B": 2, "K": 150, "D": 128},
    "D=80": {"D": 80, "K": 150},
    "2 queries": {"Q": 2, "K": 150},
    "5 queries, 7 heads": {"Q": 5, "K": 70, "H": 7, "G": 1},
}


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_scores(name, shape, dtype):
    check(Case(CONFIGS[name], dtype=dtype, **shape), exact=name == "hash_attention")


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", LEVELLED)
def test_levels(name, shape, dtype):
    check_levels(Case(CONFIGS[name], dtype=dtype, **shape))


@kernel_test
@pytest.mark.parametrize("shape", ["few keys", "ragged", "MQA of 7", "batch, D=128", "5 queries, 7 heads"])
@pytest.mark.parametrize("name", SUMMED)
def test_summed_over_the_group(name, shape):
    case = Case({**CONFIGS[name], "gqa": "group"}, **SHAPES[shape])
    check(case, exact=name == "hash_attention", summed=True, masses=False)


@kernel_test
def test_group_of_double_sparsity_is_scaled():
    check(Case({**CONFIGS["double_sparsity"], "gqa": "group"}))


@kernel_test
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_histograms(name, summed):
    """Between the values that a bracket maps onto the bins."""
    if summed and name not in SUMMED:
        pytest.skip("groups sum the softmax of this method's scores")
    case = Case(CONFIGS[name], K=333)
    middle, width = case.truth.median().item(), case.truth.std().item() * (2 if summed else 1)
    line = (64 / width, -64 * middle / width * (2 if summed else 1))
    if name == "hash_attention":
        line = (0.5, 16.0)
    check(case, exact=name == "hash_attention", summed=summed, masses=False, line=line)


@kernel_test
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_peaks_alone(name):
    check(Case(CONFIGS[name], K=150), exact=name == "hash_attention", masses=False, bins=0)


@kernel_test
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_masks(name, rows):
    real = left_padding(160, 0, 70)
    case = Case(CONFIGS[name], B=2, H=2, G=1, K=160, Q=rows, real=real)
    mask = real[:, None].expand(2, rows, 160).clone()
    mask[:, :, 100:110] = False
    check(case, exact=name == "hash_attention", mask=mask)
    check(case, exact=name == "hash_attention", mask=mask, causal=False, masses=False)
    if name in LEVELLED:
        for causal in (True, False):
            check_levels(case, mask=mask, causal=causal)
        check_levels(case, mask=mask, first=0, last=0)


@kernel_test
@pytest.mark.parametrize("name", CONFIGS)
def test_many_keys_and_every_tile(name):
    case = Case(CONFIGS[name], H=2, G=1, K=2500)
    for tile in module_of(name).TILES:
        check(case, exact=name == "hash_attention", tile=(tile.keys, tile.count, tile.warps))


@kernel_test
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [7, 32, 40, 64])
def test_hashes_of_any_width(bits, shared):
    config = {**CONFIGS["hash_attention"], "hat_bits": bits, "shared": shared}
    check(Case(config, K=70), exact=True)
    check(Case(config, K=70), exact=True, summed=True)


@kernel_test
@pytest.mark.parametrize("factor", [1, 4, 7, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_labels_of_any_width(bits, factor):
    case = Case({**CONFIGS["double_sparsity"], "group_factor": factor, "label_bits": bits}, K=70)
    check(case)
    check_levels(case)


@kernel_test
@pytest.mark.parametrize("metric", ["euclidean", "ip"])
@pytest.mark.parametrize("parts", [1, 4, 8, 64])
def test_codes_of_any_width(parts, metric):
    case = Case({**CONFIGS["pq_cache"], "pq_sub_dim": 64 // parts, "pq_bits": 3, "metric": metric}, K=100)
    check(case)
    check_levels(case)


@kernel_test
def test_a_negative_scaling_turns_the_order():
    case = Case(CONFIGS["pq_cache"], K=100, scaling=-0.3)
    check(case)
    check_levels(case)


@kernel_test
def test_sequences_without_codebooks_score_their_keys():
    case = Case(CONFIGS["pq_cache"], B=2, K=100, real=left_padding(100, 0, 90))
    assert case.given().ready.tolist() == [True, False]
    check(case, mask=case.real[:, None])
    check_levels(case, mask=case.real[:, None])


@kernel_test
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("planes", "tables"), [(1, 5), (3, 7), (5, 60), (12, 8), (10, 6), (13, 3), (16, 4)])
def test_hash_tables_of_any_size(planes, tables, summed):
    check(Case({**CONFIGS["socket"], "K": planes, "L": tables}, K=70), summed=summed)


@kernel_test
@pytest.mark.parametrize("tile", [(64, 2, 1), (256, 1, 4)])
@pytest.mark.parametrize(
    ("planes", "tables"), mostly_slow([(4, 5), (5, 60), (7, 6), (11, 3), (12, 8)], (4, 5), (12, 8))
)
def test_buckets_looked_up_as_a_whole(planes, tables, tile, monkeypatch):
    """As many keys of all KV heads make worth while."""
    monkeypatch.setattr(module_of("socket"), "WHOLE_KEYS", 1)
    for shape in ({}, SHAPES["MQA of 7"], SHAPES["MHA"], SHAPES["5 queries, 7 heads"]):
        case = Case({**CONFIGS["socket"], "K": planes, "L": tables, "gqa": "group"}, **shape)
        check(case, tile=tile, summed=True, masses=False)


COARSE = {
    "heads of a group": [({"H": heads, "G": 1}, {}) for heads in (1, 3, 4, 7, 8)],
    "groups, queries": [({"H": 8, "G": 2, "B": 2, "Q": 2, "apart": True}, {}), ({"H": 12, "G": 1, "D": 128}, {})],
    "planes": [({}, {"K": planes, "L": tables}) for planes, tables in ((1, 5), (5, 60), (13, 3), (16, 70))],
    "tau": [({}, {"tau": tau}) for tau in (1e-3, 0.05, 2.0, 1e6)],
}


@kernel_test
@pytest.mark.parametrize("kind", mostly_slow([*COARSE], "heads of a group"))
def test_coarse_scores(kind):
    """Within the bound of their error, even where they would not be used; those too small for it are marked."""
    for shape, options in COARSE[kind]:
        config = {**CONFIGS["socket"], **options}
        case = Case(config, **{"K": 100, "H": 4, "G": 1, **shape})
        call, truth, *_ = scored(case, masses=False, bins=0, coarse=True)
        error = module_of("coarse").error_of(config["L"], -(-config["K"] // case.module.PIECE))
        coarse, exact = call.scores[:, :, :100].double()
        seen = truth > float("-inf")
        assert torch.equal(coarse > float("-inf"), seen)
        at = torch.zeros_like(seen)
        at[:, 2::2] = seen[:, 2::2]
        assert torch.equal(exact[~at], coarse[~at])
        assert (exact - truth)[at].abs().max() < 4e-6 * truth[seen].max()
        assert bool((truth <= coarse.abs() * (1 + error))[seen].all())
        sure = seen & (coarse > 0)
        assert bool((truth >= coarse * (1 - error))[sure].all())
        assert not bool((seen & ~sure & (truth > 1e-28)).any())


@kernel_test
@pytest.mark.parametrize("name", CONFIGS)
def test_words_of_keys_may_lie_apart(name):
    case = Case(CONFIGS[name], K=150, apart=True)
    check(case, exact=name == "hash_attention")
    if name in LEVELLED:
        check_levels(case)


APPENDED = {
    "hash_attention": [{}, {"hat_bits": 40, "shared": True}],
    "double_sparsity": [{}, {"label_bits": 3, "group_factor": 3}, {"label_bits": 8}, {"label_bits": 1}],
    "pq_cache": [{}, {"pq_sub_dim": 8, "metric": "ip"}, {"pq_bits": 1, "pq_sub_dim": 1.0}],
    "socket": [{}, {"K": 5, "L": 7}],
}


@kernel_test
@pytest.mark.parametrize(("dtype", "on_device"), [(DTYPES[0], True), *((dtype, False) for dtype in DTYPES[1:])])
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, several in APPENDED.items() for o in several])
def test_append(name, options, dtype, on_device):
    """Bit for bit the masker's, and nothing else is touched, where the host knows the keys' places and where not."""
    config = {**CONFIGS[name], **options}
    case = Case(config, B=2, K=90, D=80 if name != "pq_cache" else 64, dtype=dtype, apart=on_device)
    for start, n in [(37, 1), (80, 3), (10, 40)]:
        k, v = (normal(2, 2, 90, t.shape[3], seed=seed + n, dtype=dtype) for seed, t in ((3, case.k), (4, case.v)))
        k[0, 0, start] = 0
        if n > 1:
            k[1, 0, start] *= 1e4 if dtype != torch.float16 else 100
        part = slice(start, start + n)
        new = case.masker.append(k[:, :, part], v[:, :, part], replace(case.ctx, heads=4))
        want = {name: buffer.clone() for name, buffer in case.buffers.items()}
        for key, tensor in new.items():
            want[key][:, :, part] = tensor
        span = torch.tensor([start, start + n], device=DEVICE) if on_device else (start, start + n)
        case.module.append(case.buffers, k, v, span, case.given())
        for key in want:
            assert torch.equal(case.buffers[key], want[key]), key


def test_labels_that_are_not_quantised_are_refused():
    pytest.importorskip("triton")
    from sah_transformers.kernels.approximate import double_sparsity

    given = double_sparsity.Given(torch.zeros(2, 4, dtype=torch.int64), 16)
    assert "not quantised" in double_sparsity.why_not(given, 64)
