"""One rank of a tensor-parallel run: `python -m torch.distributed.run ... tensor_parallel.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import sah_transformers
from benchmarks.several_gpus import share_gpus

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
ids, tokens = torch.tensor(job["ids"]), []
shared = torch.cuda.device_count() == 1
if shared:
    share_gpus(0)
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
ids = ids.to(model.device)
for stack in job["stacks"]:
    sah_transformers.enable(model, stack)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["disable_compile"] = shared
    tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist())
rank = torch.distributed.get_rank()
(folder / f"rank{rank}.json").write_text(json.dumps(tokens))
torch.distributed.destroy_process_group()
