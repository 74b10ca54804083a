import torch, triton, triton.language as tl
from sah_transformers.kernels.approximate.best import rankable, NO_CANDIDATE

@triton.jit
def cut_bisect(b_i, room):
    low = tl.min(tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(b_i).to(tl.int64)
    count = tl.sum((b_i > NO_CANDIDATE).to(tl.int32))
    steps = 0
    while (low < high) & (count != room):
        middle = low + (high - low + 1) // 2
        reach = tl.sum((b_i >= middle.to(tl.int32)).to(tl.int32))
        count = tl.where(reach >= room, reach, count)
        low = tl.where(reach >= room, middle, low)
        high = tl.where(reach >= room, high, middle - 1)
        steps += 1
    return low.to(tl.int32), count, steps

@triton.jit
def cut_mixed(b_i, room):
    low = tl.min(tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF)).to(tl.float64).to(tl.int64)
    high = tl.max(b_i).to(tl.int64)
    count = tl.sum((b_i > NO_CANDIDATE).to(tl.int32))
    above = 0
    steps = 0
    while (low < high) & (count != room):
        span = high - low
        share = (count - room).to(tl.float32) / (count - above).to(tl.float32)
        guess = (span.to(tl.float32) * share).to(tl.int64)
        middle = tl.where(steps % 3 == 2, (span + 1) // 2, tl.minimum(tl.maximum(guess, 1), span))
        middle = low + middle
        reach = tl.sum((b_i >= middle.to(tl.int32)).to(tl.int32))
        enough = reach >= room
        count = tl.where(enough, reach, count)
        above = tl.where(enough, above, reach)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        steps += 1
    return low.to(tl.int32), count, steps

@triton.jit
def kernel(scores, lists, counts, P, stride, room, SEARCH: tl.constexpr, COMPACT: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr):
    i_e = tl.program_id(0)
    o_p = tl.arange(0, PAGES)
    if HEADS > 1:
        b_v = tl.zeros([PAGES], tl.float32)
        for i_h in range(HEADS):
            b_s = tl.load(scores + (i_e * HEADS + i_h) * stride + o_p, mask=o_p < P, other=float("-inf"))
            peak = tl.max(b_s)
            b_w = tl.exp(b_s - peak)
            b_v += b_w / tl.maximum(tl.sum(b_w), 1.0)
    else:
        b_v = tl.load(scores + i_e * stride + o_p, mask=o_p < P, other=float("-inf"))
    b_i = rankable(b_v, o_p < P)
    steps = 0
    cut = 0x41000000
    if SEARCH == 1:
        cut, count, steps = cut_bisect(b_i, room)
    if SEARCH == 2:
        cut, count, steps = cut_mixed(b_i, room)
    m = b_i >= cut
    if COMPACT == 1:
        b_rank = tl.cumsum(m.to(tl.int32), 0) - 1
        tl.store(lists + i_e * stride + b_rank, o_p, mask=m)
    if COMPACT == 2:
        b_m = tl.reshape(m.to(tl.int32), [PAGES // 16, 16])
        b_n = tl.sum(b_m, 1)
        b_rank = tl.cumsum(b_m, 1) - 1 + (tl.cumsum(b_n, 0) - b_n)[:, None]
        tl.store(lists + i_e * stride + b_rank, tl.reshape(o_p, [PAGES // 16, 16]), mask=b_m > 0)
    tl.store(counts + i_e, tl.sum(m.to(tl.int32)) + 100000 * steps)

def timed(f):
    f(); torch.cuda.synchronize()
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(20): f()
    best = 1e9
    for _ in range(10):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); g.replay(); b.record(); b.synchronize()
        best = min(best, a.elapsed_time(b) / 20 * 1e3)
    return best

P = 8192
for heads in (1, 4):
    scores = torch.randn(32, P, device="cuda") * (4 if heads == 1 else 1.0) + (100 if heads == 1 else 30)
    lists = torch.zeros(32, P, dtype=torch.int32, device="cuda"); counts = torch.zeros(32, dtype=torch.int32, device="cuda")
    for warps in (8, 16, 32):
        for search, compact in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (2, 1), (2, 2)):
            if warps == 8 and search and compact: continue
            t = timed(lambda: kernel[(32 // heads,)](scores, lists, counts, P, P, 410, search, compact, P, heads, num_warps=warps))
            c = counts[: 32 // heads]
            print(heads, warps, "search", search, "compact", compact, f"{t:.2f} us", "steps", (c // 100000).float().mean().item(), flush=True)
