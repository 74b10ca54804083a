"""The attention "sah" with a stack that selects everything answers as the model's own eager attention."""

import socket

import pytest
import transformers
from parity import (
    CAUSAL,
    MODES,
    TOLERANCE,
    differences,
    forgetful_attention,
    outputs,
    padding_blind_attention,
    relative_error,
    unmasked_attention,
    using,
    verify,
)
from tiny_models import NOT_ALONE, class_names, layers_to_keep, tiny

import sah_transformers

CORE = {
    "LlamaForCausalLM": "grouped heads",
    "MistralForCausalLM": "a window on every layer",
    "Qwen3ForCausalLM": "normalised queries and keys",
    "Gemma2ForCausalLM": "softcap, windows on half of the layers",
    "Gemma3ForCausalLM": "windows, two rotary embeddings",
    "GPT2LMHeadModel": "learned positions, no grouped heads",
    "GptOssForCausalLM": "learned sinks, windows",
    "DeepseekV3ForCausalLM": "latent attention: the cache does not hold the keys, K and V differ in width",
    "DeepseekV32ForCausalLM": "an indexer of its own",
    "Qwen3MoeForCausalLM": "experts",
    "Phi3ForCausalLM": "one projection for queries, keys and values",
    "JambaForCausalLM": "state space layers between",
}

# Classes that cannot be sparse, with words of the reason that the package must give. Every other class that
# can be built must be exact.
OUTSIDE = "AttentionInterface"
REFUSED = {
    **dict.fromkeys(
        [
            *["BigBirdForCausalLM", "BloomForCausalLM", "ClvpForCausalLM", "CodeGenForCausalLM"],
            *["CpmAntForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM"],
            *["GPTNeoXJapaneseForCausalLM", "GitForCausalLM", "MegatronBertForCausalLM", "MptForCausalLM"],
            *["MvpForCausalLM", "OpenAIGPTLMHeadModel", "ProphetNetForCausalLM", "ReformerModelWithLMHead"],
            *["RemBertForCausalLM", "RoFormerForCausalLM", "TrOCRForCausalLM", "XGLMForCausalLM"],
            *["XLMWithLMHeadModel", "XLNetLMHeadModel"],
        ],
        OUTSIDE,
    ),
    **dict.fromkeys(["FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"], "no attention layers"),
    **dict.fromkeys(["RwkvForCausalLM", "xLSTMForCausalLM"], ""),
    "ZambaForCausalLM": "no layer index of their own",  # its modules serve several layers, told at each call
    "MiniMaxM3VLForCausalLM": "block_indices",
    "BigBirdPegasusForCausalLM": "not causal",  # its decoder's modules say so, wrongly
    "BltForCausalLM": "",  # four transformers, each with layer indices of its own
}
OPTIONAL_PACKAGES = {"Gemma3nForConditionalGeneration": "requires the"}  # timm, pillow: for the vision tower


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a tiny model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def assert_exact(name: str) -> None:
    verdict = verify(name)
    if verdict.unbuilt and OPTIONAL_PACKAGES.get(name, "\0") in verdict.unbuilt:
        pytest.skip(verdict.unbuilt)
    assert not verdict.unbuilt, f"cannot be built tiny, add what it needs to SPECIAL: {verdict.unbuilt}"
    assert not verdict.unsupported, verdict.unsupported
    assert not verdict.differences, "\n".join(f"{where}: {how}" for where, how in verdict.differences.items())
    assert len(verdict.skipped) < len(MODES), f"eager itself does nothing: {verdict.skipped}"


def assert_refused(name: str) -> None:
    """Refused by name and with the reason, by `enable` and by stock loading; the model still works."""
    model = tiny(name)
    expected = outputs(model, ("forward",))
    support = sah_transformers.supported(model)
    assert not support
    assert REFUSED[name] in support.reason
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[name]}"):
        sah_transformers.enable(model, {"maskers": CAUSAL})
    assert not differences(expected, outputs(model, ("forward",)), tolerance=0.0)
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[name]}"):
        type(model)._from_config(model.config, attn_implementation="sah", sparse_attention={"maskers": CAUSAL})


@pytest.mark.core
@pytest.mark.parametrize("name", CORE)
def test_core_families_answer_as_eager(name):
    """Plain, left-padded, generated with either cache and with beams: the same logits and tokens."""
    assert_exact(name)


@pytest.mark.core
@pytest.mark.parametrize("name", ["BloomForCausalLM", "FalconForCausalLM", "MambaForCausalLM"])
def test_models_outside_the_interface_are_refused(name):
    """A model that no registered attention can reach is never silently dense."""
    assert_refused(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in class_names() if n not in NOT_ALONE])
def test_every_class_answers_as_eager_or_is_refused(name):
    """Each causal language model class of the installed Transformers."""
    if name in REFUSED:
        assert_refused(name)
    else:
        assert_exact(name)


@pytest.mark.core
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_saved_model_answers_as_eager_when_loaded_sparse(name, tmp_path):
    """`save_pretrained`, then stock `from_pretrained(attn_implementation="sah", sparse_attention=...)`."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    config = {"maskers": CAUSAL, "kernel": "reference"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sah", sparse_attention=config
    )
    assert type(loaded) is type(model)
    assert loaded.config._attn_implementation == "sah"
    assert not differences(outputs(model), outputs(loaded.eval()))


@pytest.mark.parametrize("name", CORE)
def test_the_tolerance_is_above_rounding(name):
    """Eager in float32 stays within half the tolerance of eager in float64."""
    modes = ("forward", "padded")
    model = tiny(name)
    single = outputs(model, modes)
    model.set_experts_implementation("eager")  # the default one has no float64
    double = outputs(model.double(), modes)
    for mode in modes:
        assert not double[mode].error, double[mode].error
        assert relative_error(double[mode].logits, single[mode].logits.double()) < TOLERANCE / 2


MUTANTS = {
    # A wrong attention, and the mode that shows it.
    unmasked_attention: "forward",
    padding_blind_attention: "padded",
    forgetful_attention: "forward",
}


def assert_mutants_noticed(name: str) -> None:
    model = tiny(name)
    expected = outputs(model, ("forward", "padded"))
    for mutant, mode in MUTANTS.items():
        if expected[mode].error:
            continue
        with using(model, mutant):
            got = outputs(model, (mode,))
        assert differences(expected, got), f"{mutant.__name__} passes"
        if not got[mode].error:
            share = relative_error(expected[mode].logits, got[mode].logits)
            assert share > 100 * TOLERANCE, f"{mutant.__name__} changes logits by {share:.0e} only"


@pytest.mark.parametrize("name", CORE)
def test_the_harness_notices_a_wrong_attention(name):
    """Lost causality, lost padding and a slightly wrong weight each move logits a hundred tolerances."""
    assert_mutants_noticed(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in class_names() if n not in {*NOT_ALONE, *REFUSED}])
def test_the_harness_notices_a_wrong_attention_in_every_class(name):
    if name in OPTIONAL_PACKAGES:
        pytest.skip("needs packages that the tests do not")
    assert_mutants_noticed(name)


def test_layers_to_keep():
    """The first layer of each kind, two at least, in order."""
    assert layers_to_keep(["local"] * 5 + ["global"] + ["local"] * 5) == [0, 5]
    assert layers_to_keep([("full", "dense")] + [("full", "moe")] * 9) == [0, 1]
    assert layers_to_keep(["full"] * 9) == [0, 1]
    assert layers_to_keep([str(i) for i in range(9)]) == [0, 1, 2, 3]
    assert layers_to_keep(["full"]) == [0]
