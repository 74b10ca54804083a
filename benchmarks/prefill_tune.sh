
export PYTHONUNBUFFERED=1
PYTHONPATH=. timeout 100 python3 benchmarks/prefill_tune.py full 2>&1 | grep -v -i warn
echo == base; PYTHONPATH=. python3 benchmarks/prefill_tune.py emit "128,128,8,2;64,64,4,2" 1.0 2>&1 | grep -v -i warn
v() { rm -rf /tmp/v; mkdir /tmp/v; cp -r sah_transformers /tmp/v/; echo "== $1"; sed -i "$2" /tmp/v/sah_transformers/kernels/prefill/$3; PYTHONPATH=/tmp/v timeout 60 python3 benchmarks/prefill_tune.py emit "128,128,8,2" 2>&1 | grep -v -i warn; }
v nostore '/@p st.global/d' threshold.py
v maxnreg 's/ASM=queries.is_cuda,/ASM=queries.is_cuda, maxnreg=128,/' launch.py
v noalloc 's/@p st.global.f32/@p st.global.L1::no_allocate.f32/' threshold.py
v wt 's/@p st.global.f32/@p st.global.cs.f32/' threshold.py
