"""Scratch: sweep block shapes of the prefill kernels on the device."""
import json, os, sys, time
import torch
from sah_transformers.attention import make_call, run, _join
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.kernels.prefill import launch as la, prefill, why_not
from sah_transformers.kernels.prefill.stack import stack_of
from torch.nn.attention import SDPBackend, sdpa_kernel

print(torch.cuda.get_device_name())
S={"type":"sink","sink_size":128}; L={"type":"local","window_size":128}
T=lambda x:{"type":"oracle_top_k","heavy_size":x}
def call(B,H,G,Q,K,D,Dv,dt,stack,data="n",gen=0,**kw):
    torch.manual_seed(gen)
    q=torch.randn(B,H,Q,D,dtype=dt,device="cuda");k=torch.randn(B,G,K,D,dtype=dt,device="cuda");v=torch.randn(B,G,K,Dv,dtype=dt,device="cuda")
    if data=="zero": q.zero_()
    if data=="const": k=k[:,:,:1].expand_as(k).contiguous()
    if data=="dup": k=k[:,:,torch.randint(0,4,(K,),device="cuda")]
    return make_call(q,k,v,[MaskerRegistry.create_masker(m) for m in stack],**kw)
def check(label,c):
    w=why_not(c); assert not w,w
    B,H,Q,K=c.shape
    cnt=torch.full((B,H,Q),-7,dtype=torch.int32,device="cuda")
    o=prefill(c,cnt); o2=prefill(c); torch.cuda.synchronize()
    masks=[]; ref,_=run(c,masks=masks)
    n=_join(masks,c).active().sum(-1).int()
    print(label, tuple(c.shape), c.queries.shape[-1], c.queries.dtype, "err",f"{(o.float()-ref.float()).abs().max().item():.2e}","mean",f"{(o.float()-ref.float()).abs().mean().item():.2e}","count mismatch",(n!=cnt).sum().item(),"same bits",torch.equal(o,o2),flush=True)
def guarded(f,*a):
    try: return f(*a)
    except Exception as e: print("FAILED",a[0],type(e).__name__,str(e)[:300],flush=True)
bf=torch.bfloat16
t0=time.time()
mode=sys.argv[1]
def bench(f,n=6):
    f(); torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return sorted(ts)[len(ts)//2]
def profile(f,reps=2):
    f(); torch.cuda.synchronize()
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(reps): f()
        torch.cuda.synchronize()
    return {e.key[:14]:round(e.device_time_total/reps/1e3,3) for e in p.key_averages() if e.device_time_total>0}
c32=call(1,32,8,32768,32768,128,128,bf,[S,L,T(.05)])
st=stack_of([m.describe() for m in c32.maskers])
cuts=lambda c: (lambda: la.find_cuts(c,st,c.queries,c.keys,64))
base=la.tiles_for
import dataclasses
def variant(kind,shape,f=None):
    la.tiles_for=lambda dtype,dim: dataclasses.replace(base(dtype,dim),**{kind:shape})
    try:
        r=profile(f or (lambda: prefill(c32)),1); print(kind,shape,r,flush=True)
    except Exception as e: print(kind,shape,"failed",str(e)[:100],flush=True)
    la.tiles_for=base
if mode=="emit":
    for v in sys.argv[2].split(";"): variant("emit",tuple(map(int,v.split(","))),cuts(c32))
    if len(sys.argv)>3:
        la.DEVIATIONS=float(sys.argv[3]); variant("emit",(128,128,8,2),cuts(c32))
else:
    c8=call(1,32,8,8192,8192,128,128,bf,[S,L,T(.05)])
    for name,c in (("8k",c8),("32k",c32)):
        guarded(lambda *a: print(name,"ours",round(bench(lambda: prefill(c),4),3),profile(lambda: prefill(c)),flush=True),name)
        cu,ne,td=cuts(c)(); print(name,"tied rows",(ne!=2**31-1).sum().item(),"tied tiles",td.sum().item(),flush=True)
    for v in ((128,64,8,3),(64,64,4,2),(64,64,4,3),(128,128,8,2),(64,128,4,2)): variant("emit",v,cuts(c32))
    la.DEVIATIONS=3.5; print("3.5 sigma",profile(cuts(c8)),profile(cuts(c32))); la.DEVIATIONS=4.0
    cz=call(1,32,8,8192,8192,128,128,bf,[S,L,T(.05)],"zero"); guarded(lambda *a: print("zero queries 8k",bench(lambda: prefill(cz),2),profile(lambda: prefill(cz)),flush=True),"z")
print("total",time.time()-t0,flush=True)
