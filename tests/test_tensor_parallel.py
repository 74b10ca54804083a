"""Ranks with a share of the heads each select what one process selects: files know heads by their global number."""

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
from sparse_models import STACK, build, generate, prompt

import sah_transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


DEVICES = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("ranks", "heads", "groups", "gpus"),
    [
        (2, 4, 2, ""),
        (4, 8, 4, ""),
        pytest.param(2, 4, 2, "0", marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICES < 1, reason="needs a GPU")]),
        pytest.param(2, 4, 2, "0,1", marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICES < 2, reason="needs 2 GPUs")]),
    ],
    ids=["2 ranks", "4 ranks", "2 ranks on a GPU", "2 GPUs"],
)
def test_ranks_generate_what_one_process_does(tmp_path, ranks, heads, groups, gpus):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups}
    model, ids = build(dtype=torch.float32, **sizes), prompt(13)
    model.save_pretrained(tmp_path)
    stacks = [[method_files.fit({**DEFAULTS[kind], "heavy_size": 3}, heads, groups, 16)] for kind in PUBLISHED]
    stacks += [[{**stack[0], "gqa": "group"}] for stack in stacks]
    stacks.append([method_files.hash_attention(heads, groups, 16, heavy_size=3, shared=True)])
    stacks.append(STACK)
    (tmp_path / "job.json").write_text(json.dumps({"ids": ids.tolist(), "stacks": stacks}))
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = gpus
    command += [str(here / "tensor_parallel.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    for n, stack in enumerate(stacks):
        right = torch.cat([ids, generate(sah_transformers.enable(model, stack), ids, new=6)], 1).tolist()
        for rank in range(ranks):
            assert json.loads((tmp_path / f"rank{rank}.json").read_text())[n] == right, (rank, stack)


def test_the_benchmark_of_several_devices(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.several_gpus", "2", "400", "2", "2"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    stacks = json.loads(run.stdout.splitlines()[-1])["stacks"]
    assert len(stacks) == 3
    for found in stacks.values():
        assert found["ranks_agree"]
        assert found["tokens_as_alone"] == found["tokens"]
