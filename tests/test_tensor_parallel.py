"""Two ranks with half of the heads each select what one process selects: files know heads by their global number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import method_files
import pytest
import torch
from cases import PUBLISHED
from method_files import DEFAULTS
from sparse_models import build, generate, prompt

import sah_transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def test_two_ranks(tmp_path):
    model, ids = build(dtype=torch.float32), prompt(13)
    model.save_pretrained(tmp_path)
    stacks = [[method_files.fit({**DEFAULTS[kind], "heavy_size": 3}, 4, 2, 16)] for kind in PUBLISHED]
    stacks += [[{**stack[0], "gqa": "group"}] for stack in stacks]
    stacks.append([method_files.hash_attention(4, 2, 16, heavy_size=3, shared=True)])
    (tmp_path / "job.json").write_text(json.dumps({"ids": ids.tolist(), "stacks": stacks}))
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    command += [str(here / "tensor_parallel.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for n, stack in enumerate(stacks):
        right = torch.cat([ids, generate(sah_transformers.enable(model, stack), ids, new=6)], 1).tolist()
        for rank in (0, 1):
            assert json.loads((tmp_path / f"rank{rank}.json").read_text())[n] == right, (rank, stack)
