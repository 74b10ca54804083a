"""The cut by levels against a slow one: in Triton's interpreter and on a GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, as in `test_decode_kernel.py`.
Arrays hold nonsense before.
"""

import pytest
import torch
from kernel_process import DEVICE, interpreter_test, kernel_test, mostly_slow, passes_in_the_interpreter

CHUNK, FIRST, LAST = 64, 5, 9


@interpreter_test
@pytest.mark.parametrize("tests", mostly_slow(["not slow", "slow"], "not slow"))
def test_in_the_interpreter(tests):
    passes_in_the_interpreter(__file__, "-m", tests)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def empty(*shape, dtype=torch.int32):
    return torch.full(shape, 77 if dtype == torch.uint8 else -77, dtype=dtype, device=DEVICE)


def best(values, candidates, budget):
    """The slow cut: positions by descending value, NaN last, the lower position first among equals."""
    ranked = sorted(
        candidates.nonzero().flatten().tolist(),
        key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0, i),
    )
    return sorted(ranked[:budget])


class Rows:
    """Scores ``[heads, K]`` of one query of one sequence, their arrays, and the candidates between the bands."""

    def __init__(self, scores, budget):
        self.heads, self.keys = scores.shape
        self.chunks = -(-self.keys // CHUNK)
        self.stride = self.chunks * CHUNK
        self.scores = torch.nn.functional.pad(scores, (0, self.stride - self.keys), value=float("-inf")).contiguous()
        place = torch.arange(self.keys, device=DEVICE)
        self.between = (place >= FIRST) & (place < self.keys - LAST)
        self.budget, self.longest = budget, min(budget, self.keys) + 1
        self.bands, self.size = (FIRST, 0, LAST, 0), (budget, 0)
        self.wide = self.longest + self.keys

    def counted(self, rows, bins, coarse=False):
        """Arrays of levels and their counts."""
        self.bins, self.coarse = bins, coarse
        self.levels = empty(rows, self.stride, dtype=torch.uint8)
        self.histogram = empty(rows * (1 + coarse), self.chunks, 8 if bins == 16 else bins)

    def listed(self, ranking, width):
        """Positions that the last stages list; ``ranking``: what edges are cut by, if levels are not all."""
        from sah_transformers.kernels.approximate import levels

        rows, edges = len(self.levels), ranking is not None
        self.cuts = cuts = empty(5, rows)
        offsets, counts = empty(2, rows, self.chunks), empty(rows)
        lists, limits = empty(rows, self.wide), empty(1)
        most = 1 << (self.chunks - 1).bit_length()
        levels.level_cut_kernel[(rows,)](
            self.histogram, limits, cuts, offsets, counts, self.keys, 1, self.chunks, *self.bands, *self.size,
            Q=1, CAUSAL=True, MASKED=False, ROWS=rows, EDGES=edges, COARSE=self.coarse, CHUNKS=most, BINS=self.bins,
        )  # fmt: skip
        levels.level_list_kernel[(self.chunks, rows)](
            self.levels, cuts, offsets, lists, self.stride // 16, self.chunks, self.wide, self.longest,
            EDGES=edges, COARSE=self.coarse, CHUNK=CHUNK,
        )  # fmt: skip
        if edges:
            levels.edge_kernel[(rows,)](
                ranking, cuts, lists, self.stride // 16, self.wide, self.longest, WIDTH=width, BLOCK=32
            )
        return [row[:n].tolist() for row, n in zip(lists, counts.tolist(), strict=True)]


def levelled(scores, budget, line=None, softmax=False, bins=16, logarithmic=False, error=0.0):
    """(rows with levels, numbers that rank); ``line``: (middle, levels per unit) instead of the sampled one; ``error``:
    how far scores may be off."""
    from sah_transformers.kernels.approximate import levels
    from sah_transformers.kernels.approximate.line import line_kernel

    x = Rows(scores, budget)
    rows = 1 if softmax else x.heads
    x.counted(rows, bins, error > 0)
    stats = torch.full((2, x.heads), float("nan"), device=DEVICE)
    ranking = torch.full((rows, x.stride), float("nan"), device=DEVICE) if softmax else x.scores
    peaks = x.scores.view(x.heads, x.chunks, CHUNK).amax(-1)
    base = peaks.clamp(min=-1e30)[..., None]
    masses = (x.scores.view(x.heads, x.chunks, CHUNK) - base).exp().sum(-1)
    lines, limits = torch.full((3, rows), float("nan"), device=DEVICE), empty(1)
    kinds = {"H": x.heads, "G": 1 if softmax else x.heads, "Q": 1, "CAUSAL": True, "MASKED": False, "SOFTMAX": softmax}
    kinds["LOGARITHMIC"] = softmax or logarithmic
    numbers = (x.keys, 1, x.stride // 16, x.chunks)
    line_kernel[(rows,)](
        x.scores, limits, peaks, masses, stats, lines, *numbers, *x.bands, *x.size,
        **kinds, CHUNKS=1 << (x.chunks - 1).bit_length(), SAMPLES=128, HEADS=x.heads if softmax else 1, BINS=bins,
    )  # fmt: skip
    assert bool(lines.isfinite().all())
    assert bool((lines[1:] > 0).all())
    if line is not None:
        lines[0], lines[1:] = line
    levels.level_kernel[(x.chunks, rows)](
        x.scores, ranking, limits, stats, lines, x.levels, x.histogram, *numbers, *x.bands,
        **kinds, CHUNK=CHUNK, BINS=bins, ERROR=error,
    )  # fmt: skip
    return x, ranking


def by_scores(scores, budget, line=None, width=64, softmax=False, **options):
    """(lists, the slow cut's lists) by numbers."""
    x, ranking = levelled(scores, budget, line, softmax, **options)
    values = ranking[:, : x.keys]
    visible = (scores > float("-inf")) | (scores != scores)
    visible = visible.all(0, keepdim=True) if softmax else visible
    if softmax:
        truth = scores.double().softmax(-1).sum(0, keepdim=True)
        torch.testing.assert_close(values[visible].double(), truth[visible], rtol=1e-5, atol=1e-9)
    wanted = [best(row.tolist(), x.between & seen, budget) for row, seen in zip(values, visible, strict=True)]
    return x.listed(ranking, width), wanted


def same(lists, wanted):
    """Also ascending, where no edge follows."""
    for row, truth in zip(lists, wanted, strict=True):
        assert sorted(row) == truth
    return True


BUDGETS = [1, 64, 285, 286, 1000]
"""Of 300 keys 286 are candidates."""
DATA = {
    "normal": lambda: normal(2, 300),
    "few values": lambda: (normal(2, 300) * 2).round(),
    "constant": lambda: torch.ones(2, 300, device=DEVICE),
    "zeros of both signs": lambda: normal(2, 300).sign() * 0.0,
    "two values": lambda: (normal(2, 300) > 1).float(),
    "one apart": lambda: torch.full((2, 300), 3.0, device=DEVICE).index_fill(1, torch.tensor([77], device=DEVICE), -9),
    "neighbours": lambda: 1 + torch.randint(0, 40, (2, 300), device=DEVICE) * 2.0**-23,
    "large": lambda: normal(2, 300) * 1e37,
    "small": lambda: normal(2, 300) * 1e-37,
    "infinite": lambda: normal(2, 300).masked_fill(normal(2, 300, seed=1) > 1.5, float("inf")),
    "NaN": lambda: normal(2, 300).masked_fill(normal(2, 300, seed=1) > 0.5, float("nan")),
    "invisible": lambda: normal(2, 300).masked_fill(normal(2, 300, seed=1) > 0.5, float("-inf")),
    "nothing visible": lambda: torch.full((2, 300), float("-inf"), device=DEVICE),
    "ascending": lambda: torch.arange(600.0, device=DEVICE).view(2, 300),
}


@kernel_test
@pytest.mark.parametrize("budget", mostly_slow(BUDGETS, 64, 286))
@pytest.mark.parametrize("data", DATA)
def test_numbers(data, budget):
    assert same(*by_scores(DATA[data](), budget))


@kernel_test
@pytest.mark.parametrize("budget", mostly_slow(BUDGETS, 64))
@pytest.mark.parametrize("data", DATA)
def test_logarithmic(data, budget):
    """Exact of any numbers, negative ones too."""
    assert same(*by_scores(DATA[data](), budget, logarithmic=True))
    assert same(*by_scores(DATA[data]().abs(), budget, logarithmic=True))


def by_coarse_scores(exact, budget, error, least=0.0, **options):
    """(lists, the slow cut's lists) by scores off by up to ``error``, below ``least`` by more."""
    noise = 2 * torch.rand(exact.shape, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE) - 1
    coarse = (exact / (1 + 0.99 * error * noise)).clamp(max=torch.finfo(torch.float32).max)
    coarse = torch.where(exact < least, -least, coarse)
    coarse[exact == float("-inf")] = float("-inf")
    x, _ = levelled(coarse, budget, logarithmic=True, error=error, **options)
    between = [x.between & (row != float("-inf")) for row in exact]
    ranking = torch.nn.functional.pad(exact, (0, x.stride - x.keys)).contiguous()
    wanted = [best(row.tolist(), seen, budget) for row, seen in zip(exact, between, strict=True)]
    return x.listed(ranking, 64), wanted


CLOSE = {
    **DATA,
    "close": lambda: 1 + normal(2, 300) * 1e-4,
    "closer than the error": lambda: 1 + normal(2, 300) * 1e-3,
    "close pairs": lambda: (normal(2, 150) * 3).exp().repeat_interleave(2, 1) * (1 + normal(2, 300) * 1e-4),
    "skewed": lambda: (normal(2, 300) * 6).exp(),
}


COARSE = [(data, error, 64) for data in CLOSE for error in (0.002, 0.9)]
COARSE += [("closer than the error", 0.05, budget) for budget in BUDGETS]


@kernel_test
@pytest.mark.parametrize(
    ("data", "error", "budget"), mostly_slow(COARSE, ("close pairs", 0.002, 64), ("closer than the error", 0.05, 64))
)
def test_coarse_scores(data, error, budget):
    """The cut of the exact ones, whatever coarse ones within the error are, on whatever line."""
    exact = CLOSE[data]()
    exact = torch.where(exact == float("-inf"), exact, exact.abs())
    assert same(*by_coarse_scores(exact, budget, error, least=1.0))
    assert same(*by_coarse_scores(exact, budget, error, line=(1.0e9, 1e-7)))
    assert same(*by_coarse_scores(exact, budget, error))


@kernel_test
def test_coarse_scores_have_short_edges():
    """The keys of the cut's level and those within the error of it."""
    exact = (normal(1, 2000) * 2).exp()
    edges = []
    for error in (0.0, 0.002, 0.05):
        x, ranking = levelled(exact, 200, logarithmic=True, error=error)
        x.listed(ranking, 2048)
        edges.append(int(x.cuts[4]))
    assert edges[0] <= edges[1] <= edges[0] + 10 < edges[2] < 200


@kernel_test
def test_skewed_scores_have_short_edges():
    """Where a line through the values has nearly all keys in one level."""
    scores = (normal(1, 4000) * 6).exp()
    edges = []
    for logarithmic in (False, True):
        x, ranking = levelled(scores, 200, logarithmic=logarithmic)
        x.listed(ranking, 4096)
        edges.append(int(x.cuts[4]))
    assert edges[1] < 200 < 3000 < edges[0]


@kernel_test
@pytest.mark.parametrize("budget", BUDGETS)
def test_more_levels(budget):
    assert same(*by_scores(normal(2, 300), budget, bins=64))
    assert same(*by_scores((normal(2, 300) * 2).round(), budget, bins=64))


@kernel_test
@pytest.mark.parametrize("line", [(0.0, 1e-9), (9.0, 30.0), (-9.0, 30.0), (0.0, 1e30), (1.2, 40.0)], ids=str)
@pytest.mark.parametrize("width", [16, 512])
def test_lines_that_miss(line, width):
    """Exact all the same, in registers or, where the edge is long, in several rounds."""
    for budget in (1, 60):
        assert same(*by_scores(normal(1, 200), budget, line, width))
        assert same(*by_scores((normal(1, 200) * 3).round(), budget, line, width))


@kernel_test
@pytest.mark.parametrize("keys", [15, 16, 63, 64, 65, 128, 129])
def test_ends_of_chunks(keys):
    for budget in (1, max(1, keys - 15), keys - 14, keys):
        assert same(*by_scores(normal(2, keys), budget))


@kernel_test
@pytest.mark.parametrize("budget", BUDGETS)
def test_groups(budget):
    """By summed softmax."""
    assert same(*by_scores(normal(4, 300), budget, softmax=True))
    assert same(*by_scores(torch.ones(4, 300, device=DEVICE), budget, softmax=True))
    assert same(*by_scores((normal(4, 300) * 40).round(), budget, softmax=True))
    hidden = normal(1, 300, seed=2).expand(2, 300) > 0.3
    assert same(*by_scores(normal(2, 300).masked_fill(hidden, float("-inf")), budget, softmax=True))


@kernel_test
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("most", mostly_slow([1, 3, 33, 63, 129, 254], 3, 129))
def test_whole_numbers(most, budget):
    """Levels that are scores: the list is ascending, and of the cut's level it has the first."""
    x = Rows(normal(3, 300), budget)
    x.counted(3, max(64, 1 << most.bit_length()))
    generator = torch.Generator(DEVICE).manual_seed(most)
    x.levels[:, :300] = torch.randint(1, most + 1, (3, 300), generator=generator, device=DEVICE).to(torch.uint8)
    x.levels[0, :300] = most
    x.levels[:, :300] *= x.between
    x.levels[2, 100:180] = 0
    x.levels[:, 300:] = 0
    for row in range(3):
        for i, chunk in enumerate(x.levels[row].view(x.chunks, CHUNK)):
            x.histogram[row, i] = torch.bincount(chunk.int(), minlength=x.bins).int()
    wanted = [best(row.tolist(), row > 0, budget) for row in x.levels[:, :300].float()]
    assert x.listed(None, 0) == wanted
