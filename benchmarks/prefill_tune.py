"""Scratch: sweep block shapes of the prefill kernels on the device."""

import json, os, sys, time
import torch
from sah_transformers.attention import make_call, run, _join
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.kernels.prefill import launch as la, prefill, why_not
from sah_transformers.kernels.prefill.stack import stack_of
from torch.nn.attention import SDPBackend, sdpa_kernel

print(torch.cuda.get_device_name())
S = {"type": "sink", "sink_size": 128}
L = {"type": "local", "window_size": 128}
T = lambda x: {"type": "oracle_top_k", "heavy_size": x}


def call(B, H, G, Q, K, D, Dv, dt, stack, data="n", gen=0, **kw):
    torch.manual_seed(gen)
    q = torch.randn(B, H, Q, D, dtype=dt, device="cuda")
    k = torch.randn(B, G, K, D, dtype=dt, device="cuda")
    v = torch.randn(B, G, K, Dv, dtype=dt, device="cuda")
    if data == "zero":
        q.zero_()
    if data == "const":
        k = k[:, :, :1].expand_as(k).contiguous()
    if data == "dup":
        k = k[:, :, torch.randint(0, 4, (K,), device="cuda")]
    return make_call(q, k, v, [MaskerRegistry.create_masker(m) for m in stack], **kw)


def check(label, c):
    w = why_not(c)
    assert not w, w
    B, H, Q, K = c.shape
    cnt = torch.full((B, H, Q), -7, dtype=torch.int32, device="cuda")
    o = prefill(c, cnt)
    o2 = prefill(c)
    torch.cuda.synchronize()
    masks = []
    ref, _ = run(c, masks=masks)
    n = _join(masks, c).active().sum(-1).int()
    print(
        label,
        tuple(c.shape),
        c.queries.shape[-1],
        c.queries.dtype,
        "err",
        f"{(o.float() - ref.float()).abs().max().item():.2e}",
        "mean",
        f"{(o.float() - ref.float()).abs().mean().item():.2e}",
        "count mismatch",
        (n != cnt).sum().item(),
        "same bits",
        torch.equal(o, o2),
        flush=True,
    )


def guarded(f, *a):
    try:
        return f(*a)
    except Exception as e:
        print("FAILED", a[0], type(e).__name__, str(e)[:300], flush=True)


bf = torch.bfloat16
t0 = time.time()
guarded(check, "bands", call(1, 8, 2, 1000, 1000, 128, 128, bf, [S, L]))
guarded(check, "best", call(1, 8, 2, 3000, 3000, 128, 128, bf, [S, L, T(0.05)]))
guarded(check, "best", call(2, 4, 2, 700, 2900, 64, 64, bf, [S, L, T(0.05)]))
guarded(check, "best", call(1, 2, 2, 1500, 1500, 80, 96, torch.float16, [S, T(100), L]))
guarded(check, "best", call(1, 2, 2, 1500, 1500, 64, 64, torch.float32, [S, T(100), L]))
for d in ("zero", "const", "dup"):
    guarded(check, "best " + d, call(1, 2, 1, 1300, 2500, 128, 128, bf, [S, L, T(0.05)], d))
print("checks", time.time() - t0)


def profile(c, reps=2):
    prefill(c)
    torch.cuda.synchronize()
    from torch.profiler import profile, ProfilerActivity

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(reps):
            prefill(c)
        torch.cuda.synchronize()
    r = {}
    for e in p.key_averages():
        if e.device_time_total > 0:
            r[e.key[:18]] = round(e.device_time_total / reps / 1e3, 3)
    return r


def bench(f, n=8):
    f()
    torch.cuda.synchronize()
    ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        torch.cuda.synchronize()
        ts.append(a.elapsed_time(b))
    return sorted(ts)[len(ts) // 2]


c8 = call(1, 32, 8, 8192, 8192, 128, 128, bf, [S, L, T(0.05)])
c32 = call(1, 32, 8, 32768, 32768, 128, 128, bf, [S, L, T(0.05)])
sd = lambda c: (
    lambda: torch.nn.functional.scaled_dot_product_attention(
        c.queries, c.keys, c.values, is_causal=True, enable_gqa=True
    )
)
with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
    print("cudnn", bench(sd(c8)), bench(sd(c32)))
for name, c in (("8k", c8), ("32k", c32)):
    guarded(lambda: print(name, "ours", round(bench(lambda: prefill(c), 4), 3), profile(c), flush=True))
    st = stack_of([m.describe() for m in c.maskers])
    cu, ti, td = la.find_cuts(c, st, c.queries, c.keys, 128)
    K = c.shape[3]
    print(name, "settled rows", (ti != K).sum().item(), "tied tiles", td.sum().item(), "parts", flush=True)
    torch.cuda.reset_peak_memory_stats()
    b0 = torch.cuda.memory_allocated()
    o = prefill(c)
    torch.cuda.synchronize()
    print("peak MiB above", (torch.cuda.max_memory_allocated() - b0 - o.numel() * 2) / 2**20)
cb = call(1, 32, 8, 32768, 32768, 128, 128, bf, [S, L])
print("bands 32k", bench(lambda: prefill(cb)))
base = la.tiles_for
import dataclasses


def variant(kind, shape):
    def f(dtype, dim):
        return dataclasses.replace(base(dtype, dim), **{kind: shape})

    la.tiles_for = f
    try:
        r = profile(c32, 1)
        key = [k for k in r if k.startswith(kind)][0]
        print(kind, shape, r[key], flush=True)
    except Exception as e:
        print(kind, shape, "failed", str(e)[:100], flush=True)
    la.tiles_for = base


for v in (
    (128, 128, 8, 3),
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (128, 256, 8, 2),
):
    variant("emit", v)
for v in (
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 64, 4, 3),
    (128, 128, 8, 3),
):
    variant("attend", v)
for v in ((64, 256, 8, 1), (64, 256, 4, 1), (32, 512, 8, 1), (64, 512, 16, 1)):
    variant("bracket", v)
print("total", time.time() - t0)
