"""The examples run as they stand, offline, and are as short as they claim."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_under_40_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_the_example_masker_selects_what_it_says(monkeypatch, capsys):
    """The example's masker against its own sentence: the best sums of q over the signs of k."""
    import torch

    from sah_transformers import sparse_attention

    runpy.run_path(str(next(p for p in EXAMPLES if p.stem == "write_a_masker")), run_name="example")
    torch.manual_seed(1)
    queries, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 40, 8)
    _, mask = sparse_attention(queries, keys, keys, [{"type": "sign", "heavy_size": 5}])
    for head in range(4):
        best = (queries[0, head] @ keys[0, head // 2].sign().T).topk(5).indices
        assert set(mask.active()[0, head, 0].nonzero().flatten().tolist()) == set(best.flatten().tolist())


def test_the_readme_prints_what_it_says():
    """The first block of the README is eight lines, and the indented line after it is its output."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", text, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 8
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code[2]


def test_the_api_page_runs(tmp_path, monkeypatch, capsys):
    """Its blocks, one after the other; what it names exists."""
    import torch
    from tiny_models import tiny

    import sah_transformers

    monkeypatch.chdir(tmp_path)
    pytest.importorskip("pandas")
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    model = sah_transformers.enable(tiny("LlamaForCausalLM"), [{"type": "local", "window_size": 4}])
    known = {
        "sah_transformers": sah_transformers,
        "model": model,
        "inputs": {"input_ids": torch.arange(3, 11)[None]},
        **{name: torch.randn(1, 2, 12, 8) for name in "qkv"},
    }
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, known)
    assert "recall" in capsys.readouterr().out
    assert (tmp_path / "log.json").exists()
    for metric in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert known["log"].mean(metric) == known["log"].mean(metric)
    for name in re.findall(r"`(\w+)\([^`]*\)`", text.split("## `Mask`")[1].split("## Caches")[0]):
        assert hasattr(sah_transformers.Mask, name)
