"""From a name to a sparse model and back: keywords, opting out, saving, enabling, refusing. Proven by what runs."""

import contextlib
import copy
import importlib
import json
import re
import subprocess
import sys

import method_files
import pytest
import torch
import transformers
from sparse_models import (
    OTHER_STACK,
    SMALL_STACK,
    STACK,
    build,
    by_loops,
    differ,
    generate,
    layers_selected,
    logits,
    prompt,
    selections,
    sparse,
)
from tiny_models import tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

import sah_transformers
from sah_transformers import MaskerRegistry, SparseAttentionConfig
from sah_transformers.config import preset_names

IDS = prompt(14)
FLOAT64 = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved dense Llama."""
    path = tmp_path_factory.mktemp("llama")
    build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense():
    return logits(build(), IDS)


@pytest.fixture(scope="module")
def expected():
    """Logits of STACK on every layer, by loops."""
    return logits(by_loops(lambda *_: STACK), IDS)


def saved(path):
    return json.loads((path / "config.json").read_text())


def test_the_stack_matters(dense, expected):
    assert differ(dense, expected)
    assert differ(expected, logits(by_loops(lambda *_: OTHER_STACK), IDS))


# Stock loading


FORMS = {
    "dict": lambda path: {"maskers": STACK},
    "list": lambda path: STACK,
    "config": lambda path: SparseAttentionConfig.parse(STACK),
    "masker objects": lambda path: [MaskerRegistry.create_masker(c) for c in STACK],
    "masker objects in a dict": lambda path: {"maskers": [MaskerRegistry.create_masker(c) for c in STACK]},
    "masker configs": lambda path: list(SparseAttentionConfig.parse(STACK).maskers),
    "path": lambda path: path,
    "path as text": str,
}


@pytest.mark.parametrize("attn", [{"attn_implementation": "sah"}, {}], ids=["named", "keyword alone"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_stock_from_pretrained(checkpoint, expected, tmp_path, form, attn):
    (tmp_path / "stack.json").write_text(json.dumps({"maskers": STACK}))
    given = form(tmp_path / "stack.json")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=given, **attn, **FLOAT64)
    assert not differ(logits(model, IDS), expected)


@pytest.mark.parametrize("name", preset_names())
def test_presets_by_name(checkpoint, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method_files.put_preset_files(tmp_path, heads=4, groups=2, dim=16)
    if 1 in SparseAttentionConfig.parse(name).dense_layers:
        pytest.skip("leaves nothing sparse on two layers")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=name, **FLOAT64)
    assert model.config.sparse_attention == SparseAttentionConfig.parse(name).to_dict()
    with selections() as log:
        if model.config.sparse_attention["prefill"] == "dense":
            generate(model, IDS, new=2)
        else:
            logits(model, IDS)
    assert log


def test_a_concrete_class_takes_the_keyword(checkpoint, expected):
    model = LlamaForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK, **FLOAT64)
    assert not differ(logits(model, IDS), expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_another_attention_opts_out(checkpoint, dense, attn):
    options = {"sparse_attention": STACK, "attn_implementation": attn, **FLOAT64}
    config = AutoConfig.from_pretrained(checkpoint)
    for model in (
        AutoModelForCausalLM.from_pretrained(checkpoint, **options),
        AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **options),
        AutoModelForCausalLM.from_config(config, **options),
    ):
        with selections() as log:
            logits(model, IDS)
        assert not log
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    assert not differ(logits(model, IDS), dense)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_that_opts_out_says_so(checkpoint, attn, caplog):
    with caplog.at_level("WARNING"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK, attn_implementation=attn)
        assert f"attends densely: attn_implementation='{attn}'" in caplog.text
        layers = sah_transformers.supported(model).layers
        assert layers
        assert not any(layer.sparse for layer in layers)
        assert all(attn in str(layer) for layer in layers)
        caplog.clear()
        AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK)
        AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attn)
        assert "attends densely" not in caplog.text


def test_models_without_the_keyword_are_left_alone(checkpoint, dense):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **FLOAT64)
    assert model.config._attn_implementation != "sah"
    assert model.config.sparse_attention is None
    assert "sparse_attention" not in model.config.to_dict()
    assert not differ(logits(model, IDS), dense)


def test_saved_and_loaded_again_it_stays_sparse(checkpoint, tmp_path, expected):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK, **FLOAT64)
    model.save_pretrained(tmp_path)
    written = saved(tmp_path)["sparse_attention"]
    assert SparseAttentionConfig.from_dict(written) == SparseAttentionConfig.parse(STACK)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path, **FLOAT64),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path), **FLOAT64),
    ):
        assert not differ(logits(again, IDS), expected)
    opted_out = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa", **FLOAT64)
    with selections() as log:
        logits(opted_out, IDS)
    assert not log


def test_the_keyword_replaces_what_was_saved(tmp_path, expected):
    sparse(OTHER_STACK).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=STACK, **FLOAT64)
    assert not differ(logits(model, IDS), expected)


def test_none_loads_a_saved_sparse_model_densely(tmp_path, dense):
    sparse().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=None, **FLOAT64)
    assert not differ(logits(model, IDS), dense)


def test_saving_writes_one_key_and_nothing_else(tmp_path):
    """Whether it came by keyword or by `enable`, config.json differs from the dense model's in `sparse_attention`."""
    build().save_pretrained(tmp_path / "dense")
    sparse().save_pretrained(tmp_path / "sparse")
    extra = set(saved(tmp_path / "sparse")) ^ set(saved(tmp_path / "dense"))
    assert extra == {"sparse_attention"}


def test_later_layer_entries_still_win_after_a_round_trip(tmp_path):
    """`layers` means its order; config.json sorts keys."""
    config = {"maskers": STACK, "layers": {"0:2": [{"type": "causal"}], "0": OTHER_STACK}}
    truth = logits(by_loops(lambda layer, *_: OTHER_STACK if layer == 0 else []), IDS)
    model = sparse(config)
    assert not differ(logits(model, IDS), truth)
    model.save_pretrained(tmp_path)
    assert not differ(logits(AutoModelForCausalLM.from_pretrained(tmp_path, **FLOAT64), IDS), truth)


def test_a_config_object_with_the_keyword(checkpoint, expected):
    config = AutoConfig.from_pretrained(checkpoint)
    options = {"config": config, "sparse_attention": STACK, **FLOAT64}
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        assert not differ(logits(kind.from_pretrained(checkpoint, **options), IDS), expected)
    assert config.sparse_attention is None, "the user's config was changed"
    assert "sparse_attention" not in config.to_dict()


def test_a_config_that_carries_it(checkpoint, expected):
    config = AutoConfig.from_pretrained(checkpoint, sparse_attention=STACK)
    later = AutoConfig.from_pretrained(checkpoint)
    later.sparse_attention = STACK
    for one in (config, later):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=one, **FLOAT64)
        assert not differ(logits(model, IDS), expected)


def test_a_config_already_resolved_by_a_dense_model(expected, checkpoint):
    """Taking the config of a loaded model, whose attention Transformers has filled in by itself."""
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, sparse_attention=STACK, **FLOAT64)
    assert not differ(logits(model, IDS), expected)


@pytest.mark.parametrize("how", ["keyword", "attribute", "constructor"])
def test_from_config(how, dense):
    config = tiny_config("LlamaForCausalLM")
    if how == "keyword":
        model = AutoModelForCausalLM.from_config(config, sparse_attention=STACK)
        assert config.sparse_attention is None
    else:
        config.sparse_attention = STACK
        model = LlamaForCausalLM(config) if how == "constructor" else AutoModelForCausalLM.from_config(config)
    with selections() as log:
        logits(model, IDS)
    assert layers_selected(log) == [0, 1]


def test_setting_it_to_none_on_a_config_takes_it_back():
    config = tiny_config("LlamaForCausalLM")
    before = config.to_dict()
    config.sparse_attention = STACK
    config.sparse_attention = None
    assert config.to_dict() == before
    with selections() as log:
        logits(AutoModelForCausalLM.from_config(config), IDS)
    assert not log


@pytest.mark.parametrize("copied", [False, True])
def test_setting_it_to_none_on_a_loaded_models_config_makes_the_model_dense(copied, dense, expected):
    model = copy.deepcopy(sparse()) if copied else sparse()
    model.config.sparse_attention = None
    assert not differ(logits(model, IDS), dense)
    assert torch.equal(generate(model, IDS), generate(build(), IDS))
    model.config.sparse_attention = STACK
    assert not differ(logits(model, IDS), expected)


def test_reading_the_config_gives_a_copy():
    model = sparse()
    before = logits(model, IDS)
    model.config.sparse_attention["maskers"].clear()
    assert torch.equal(logits(model, IDS), before)


def test_assigning_to_a_loaded_models_config_takes_effect(expected):
    model = sparse(OTHER_STACK)
    logits(model, IDS)
    model.config.sparse_attention = STACK
    assert not differ(logits(model, IDS), expected)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_pipeline(tmp_path, tokenizer):
    build().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"sparse_attention": STACK, **FLOAT64}
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), model_kwargs=options)
    texts = [" ".join(f"w{i}" for i in prompt(n, seed=n)[0].tolist()) for n in (14, 9)]
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2, "return_full_text": False}
    answers = [answer[0]["generated_text"] for answer in pipe(texts, **options)]
    truth = by_loops(lambda *_: STACK)
    for n, answer in zip((14, 9), answers, strict=True):
        tokens = generate(truth, prompt(n, seed=n), new=6)[0]
        assert answer.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()


def gemma3(**options):
    """A tiny multimodal Gemma 3 (two text layers, the second attends fully) and inputs with one image."""
    torch.manual_seed(0)
    text = tiny_config("Gemma3ForCausalLM").to_dict() | {"vocab_size": 120}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 4}
    special = {"image_token_index": 100, "image_token_id": 100, "boi_token_index": 101, "eoi_token_index": 102}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    ids = torch.cat([prompt(5), torch.full((1, 4), 100), prompt(8, seed=1)], dim=1)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return config, {"input_ids": ids, "pixel_values": image, "token_type_ids": (ids == 100).long()}


@pytest.mark.parametrize("how", ["named", "keyword alone", "enable"])
def test_a_multimodal_model_is_sparse_in_its_text_and_dense_in_its_vision(tmp_path, how):
    config, inputs = gemma3()
    torch.manual_seed(0)
    plain = transformers.Gemma3ForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path)
    if how == "enable":
        model = sah_transformers.enable(copy.deepcopy(plain), STACK)
    else:
        named = {"attn_implementation": "sah"} if how == "named" else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=STACK, **named)
    vision = plain.get_image_features(inputs["pixel_values"])
    assert torch.allclose(model.get_image_features(inputs["pixel_values"])[0], vision[0], atol=1e-6)
    with selections() as log, torch.no_grad():
        model(**inputs)
    assert layers_selected(log) == [1]
    assert all(entry.mask.shape[1] == 4 and entry.mask.shape[-1] == 17 for entry in log)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again, transformers.Gemma3ForConditionalGeneration)
    with selections() as log, torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert layers_selected(log) == [1]
    sah_transformers.disable(model)
    model.save_pretrained(tmp_path / "dense")
    assert "sparse_attention" not in json.dumps(saved(tmp_path / "dense"))
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-5)


# enable, disable, supported


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_enable_and_disable(tmp_path, attn, dense, expected):
    model = build(attn=attn)
    assert sah_transformers.enable(model, STACK) is model
    assert not differ(logits(model, IDS), expected)
    sah_transformers.enable(model, OTHER_STACK)
    assert differ(logits(model, IDS), expected)
    assert sah_transformers.disable(model) is model
    assert model.config._attn_implementation == attn
    with selections() as log:
        assert not differ(logits(model, IDS), dense)
    assert not log
    model.save_pretrained(tmp_path)
    build(attn=attn).save_pretrained(tmp_path / "plain")
    assert saved(tmp_path) == saved(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **FLOAT64)
    assert not differ(logits(again, IDS), dense)
    sah_transformers.disable(model)  # harmless
    sah_transformers.enable(model, STACK)
    assert not differ(logits(model, IDS), expected)


def test_disable_after_a_sparse_load(checkpoint, tmp_path, dense):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK, **FLOAT64)
    sah_transformers.disable(model).save_pretrained(tmp_path)
    assert "sparse_attention" not in saved(tmp_path)
    assert not differ(logits(model, IDS), dense)
    model.set_attn_implementation("eager")
    assert not differ(logits(model, IDS), dense)


def test_enable_reads_the_configuration_before_it_touches_the_model():
    model = build(attn="sdpa")
    before = logits(model, IDS), model.config.to_dict()
    for wrong in ([{"type": "sink", "sink_size": 0}], "no preset", 5, {"dense_layers": [7], "maskers": STACK}):
        with pytest.raises(ValueError, match=r"sink_size|no preset|must be|layer 7"):
            sah_transformers.enable(model, wrong)
        assert model.config.to_dict() == before[1]
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(logits(model, IDS), before[0])
    sparse_model = sparse()
    with pytest.raises(ValueError, match="layer 7"):
        sah_transformers.enable(sparse_model, {"dense_layers": [7], "maskers": OTHER_STACK})
    assert torch.equal(logits(sparse_model, IDS), logits(sparse(), IDS))


@pytest.mark.parametrize("function", ["enable", "disable", "supported"])
def test_only_models_are_models(function):
    arguments = (torch.nn.Linear(1, 1), STACK) if function == "enable" else (None,)
    with pytest.raises(ValueError, match=r"model must be a Transformers model, got (Linear|NoneType)"):
        getattr(sah_transformers, function)(*arguments)


def test_supported_describes_each_layer():
    support = sah_transformers.supported(build())
    assert support
    assert [(layer.layer_idx, layer.sparse, layer.reason) for layer in support.layers] == [(0, True, ""), (1, True, "")]
    assert "supported" in str(support)
    support = sah_transformers.supported(sparse({"maskers": STACK, "dense_layers": [0]}))
    assert [layer.sparse for layer in support.layers] == [False, True]
    assert "dense_layers" in support.layers[0].reason
    assert "model.layers.0" in str(support)
    support = sah_transformers.supported(build("Gemma3ForCausalLM"))
    assert [layer.sparse for layer in support.layers] == [False, True]
    assert "sliding window of 4" in support.layers[0].reason
    support = sah_transformers.supported(tiny("BloomForCausalLM"))
    assert not support
    assert "AttentionInterface" in support.reason
    assert support.reason in str(support)


def test_supported_changes_nothing():
    model = build(attn="sdpa")
    before = logits(model, IDS), model.config.to_dict()
    sah_transformers.supported(model)
    assert model.config.to_dict() == before[1]
    with selections() as log:
        assert torch.equal(logits(model, IDS), before[0])
    assert not log


# What each field means


SEMANTICS = {
    "dense_layers": (
        {"dense_layers": [0, -1]},
        lambda layer, *_: [] if layer in (0, 3) else STACK,
    ),
    "layers by index": (
        {"layers": {"1": OTHER_STACK, -1: []}},
        lambda layer, *_: {1: OTHER_STACK, 3: []}.get(layer, STACK),
    ),
    "layers by range": (
        {"layers": {"1:3": OTHER_STACK}},
        lambda layer, *_: OTHER_STACK if 1 <= layer < 3 else STACK,
    ),
    "layers by open ranges": (
        {"layers": {":1": OTHER_STACK, "-2:": [{"type": "causal"}]}},
        lambda layer, *_: OTHER_STACK if layer == 0 else [] if layer >= 2 else STACK,
    ),
    "later entries win": (
        {"layers": {"0:4": OTHER_STACK, "2": STACK}},
        lambda layer, *_: STACK if layer == 2 else OTHER_STACK,
    ),
    "layers alone": ({"maskers": [], "layers": {"2": STACK}}, lambda layer, *_: STACK if layer == 2 else []),
    "dense_layers over layers": (
        {"layers": {"0:4": OTHER_STACK}, "dense_layers": [1]},
        lambda layer, *_: [] if layer == 1 else OTHER_STACK,
    ),
    "prefill dense": ({"prefill": "dense"}, lambda layer, queries, keys: [] if queries == keys else STACK),
    "prefill stack": (
        {"prefill": OTHER_STACK},
        lambda layer, queries, keys: OTHER_STACK if queries == keys else STACK,
    ),
    "prefill stack, dense otherwise": (
        {"maskers": [], "prefill": OTHER_STACK},
        lambda layer, queries, keys: OTHER_STACK if queries == keys else [],
    ),
    "prefill and dense_layers": (
        {"prefill": OTHER_STACK, "dense_layers": [2]},
        lambda layer, queries, keys: [] if layer == 2 else OTHER_STACK if queries == keys else STACK,
    ),
}


@pytest.mark.parametrize("case", SEMANTICS.values(), ids=SEMANTICS)
def test_fields_mean_what_they_say(case):
    config, stack_of = case
    options = {"num_hidden_layers": 4}
    model, truth = sparse({"maskers": STACK, **config}, **options), by_loops(stack_of, **options)
    assert not differ(logits(model, IDS), logits(truth, IDS))
    assert torch.equal(generate(model, IDS, new=5), generate(truth, IDS, new=5))
    steps = [torch.cat([m(IDS, past_key_values=c).logits, m(IDS[:, :1], past_key_values=c).logits], 1).detach()
             for m, c in ((m, transformers.DynamicCache()) for m in (model, truth))]  # fmt: skip
    assert not differ(*steps)


def run_calls(model, lengths, seed=0):
    """Logits of a sequence fed in calls of these lengths into one cache."""
    cache, ids, at, out = transformers.DynamicCache(), prompt(sum(lengths), seed=seed), 0, []
    for length in lengths:
        out.append(logits(model, ids[:, at : at + length], past_key_values=cache))
        at += length
    return torch.cat(out, 1)


@pytest.mark.parametrize("limit", [0, 1, 3, 64])
@pytest.mark.parametrize("prefill", ["dense", OTHER_STACK], ids=["dense", "stack"])
def test_decode_max_queries(limit, prefill):
    """After the prompt, calls of more queries than the limit count as reading a prompt."""
    reading = [] if prefill == "dense" else prefill

    def stack_of(layer, queries, keys):
        return reading if queries == keys or queries > limit else STACK

    model = sparse({"maskers": STACK, "prefill": prefill, "decode_max_queries": limit})
    lengths = (9, 1, 3, 4, 1)
    assert not differ(run_calls(model, lengths), run_calls(by_loops(stack_of), lengths))


def test_prefill_same_selects_in_every_call():
    lengths = (9, 1, 3, 4, 1)
    assert not differ(run_calls(sparse(), lengths), run_calls(by_loops(lambda *_: STACK), lengths))


def test_a_prompt_of_one_token_is_a_prompt():
    config = {"maskers": STACK, "prefill": "dense"}
    for lengths in ((1, 1, 12, 1), (1, 5)):
        truth = by_loops(lambda layer, queries, keys: [] if queries == keys else STACK)
        assert not differ(run_calls(sparse(config), lengths), run_calls(truth, lengths))


@pytest.mark.parametrize("min_keys", [0, 1, 7, 11, 14, 15, 1000])
def test_min_keys_is_per_row(min_keys):
    """A row with fewer visible keys is dense; padding does not count."""
    model = sparse({"maskers": STACK, "min_keys": min_keys})
    truth = by_loops(lambda *_: STACK, min_keys=min_keys)
    ids, mask = prompt(14, batch=2), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    found, right = (logits(m, ids, attention_mask=mask) for m in (model, truth))
    assert not differ(found[mask.bool()], right[mask.bool()])
    assert torch.equal(generate(model, IDS, new=5), generate(truth, IDS, new=5))


@pytest.mark.parametrize("sliding", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_sliding_layers(name, sliding):
    config = {"maskers": SMALL_STACK, "sliding_layers": sliding}
    if name == "MistralForCausalLM" and sliding == "dense":
        with pytest.raises(ValueError, match="leaves no layer") as caught:
            sparse(config, name=name)
        assert str(caught.value).count("sliding window of 4") == 2
        return
    truth = by_loops(lambda layer, *_: SMALL_STACK if sliding == "sparse" or layer == 1 else [], name=name)
    model = sparse(config, name=name)
    assert not differ(logits(model, IDS), logits(truth, IDS))
    assert torch.equal(generate(model, IDS), generate(truth, IDS))


def test_a_window_as_long_as_the_models_positions_is_none():
    model = sparse(STACK, name="MistralForCausalLM", sliding_window=64)
    truth = by_loops(lambda *_: STACK, name="MistralForCausalLM", sliding_window=64)
    assert not differ(logits(model, IDS), logits(truth, IDS))
    with pytest.raises(ValueError, match="sliding window of 63"):
        sparse(STACK, name="MistralForCausalLM", sliding_window=63)


def test_kernel_triton_is_not_silently_the_reference():
    """Asked for by name, a kernel that cannot run raises: at load, or at the latest in the forward call."""
    with pytest.raises(ValueError, match="triton"):
        logits(sparse({"maskers": STACK, "kernel": "triton"}), IDS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dense_layers": [0, 2]}, r"dense_layers.*2.*2 layers"),
        ({"dense_layers": [-3]}, r"dense_layers.*-3.*2 layers"),
        ({"layers": {"2": STACK}}, r"layers\['2'\].*2 layers"),
        ({"layers": {"5:9": STACK}}, r"layers\['5:9'\].*2 layers"),
    ],
)
def test_indices_out_of_range_raise(checkpoint, config, message):
    config = {"maskers": STACK, **config}
    for load in (
        lambda: sah_transformers.enable(build(), config),
        lambda: AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=config),
        lambda: AutoModelForCausalLM.from_config(tiny_config("LlamaForCausalLM"), sparse_attention=config),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_nothing_left_sparse_raises_with_every_layers_reason(checkpoint):
    config = {"maskers": STACK, "dense_layers": [0], "layers": {"1": []}}
    for load in (
        lambda: sah_transformers.enable(build(), config),
        lambda: AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=config),
    ):
        with pytest.raises(ValueError, match=r"leaves no layer of Llama\w+ sparse") as caught:
            load()
        lines = str(caught.value).splitlines()[1:]
        assert re.search(r"layer 0 .*dense_layers", lines[0])
        assert re.search(r"layer 1 .*no maskers", lines[1])


def test_an_empty_stack_is_dense_attention_and_no_error(dense):
    assert not differ(logits(sparse({"maskers": []}), IDS), dense)


def test_a_long_sparse_prefill_is_announced_once(monkeypatch):
    from sah_transformers.integration import attention_function

    said = set()
    monkeypatch.setattr(attention_function, "LONG_PREFILL", 10)
    monkeypatch.setattr(attention_function.logger, "warning_once", said.add)
    monkeypatch.setattr(attention_function.logger, "warning", said.add)
    model = sparse(num_hidden_layers=3)
    for length in (14, 15, 16):
        generate(model, prompt(length), new=3)
    assert len(said) == 1
    assert re.search(r"\d(\.\d+)? s", said.pop()), "no estimate of the time"
    for quiet in (sparse({"maskers": STACK, "prefill": "dense"}), build()):
        generate(quiet, IDS, new=3)
    assert not said
    assert set(model.config.to_dict()) - set(build().config.to_dict()) == {"sparse_attention"}


# Models and modes that are refused


OUTSIDE = ["BloomForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "MptForCausalLM", "GPTNeoForCausalLM"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_models_outside_the_interface_are_refused_at_load(tmp_path, name):
    model = tiny(name)
    before = logits(model, IDS)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    kind = getattr(transformers, name)
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sah", sparse_attention=STACK),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=STACK),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sah"),
        lambda: kind.from_pretrained(tmp_path, sparse_attention=STACK),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, config=config, sparse_attention=STACK),
        lambda: AutoModelForCausalLM.from_config(config, sparse_attention=STACK),
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation="sah"),
        lambda: sah_transformers.enable(model, STACK),
    ):
        with pytest.raises(ValueError, match=f"{name} cannot use sparse attention.*AttentionInterface"):
            load()
    assert torch.equal(logits(model, IDS), before)
    assert "sparse_attention" not in model.config.to_dict()
    assert not differ(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype), IDS), before)


def test_a_wrong_keyword_raises_at_load_and_leaves_loading_usable(checkpoint, dense):
    with pytest.raises(ValueError, match=r"maskers\[0\]\.sink_size must be"):
        AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=[{"type": "sink", "sink_size": 0}])
    with pytest.raises(ValueError, match="oracle_top_k"):
        AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention="oracle_topk")
    assert not differ(logits(AutoModelForCausalLM.from_pretrained(checkpoint, **FLOAT64), IDS), dense)


def test_encoders_are_refused():
    config = tiny_config("BertLMHeadModel")
    config.is_decoder = False
    for kind in (transformers.BertLMHeadModel, transformers.BertForMaskedLM):
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot use sparse attention.*not causal"):
            sah_transformers.enable(kind(config), STACK)
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot use sparse attention.*not causal"):
            kind._from_config(copy.deepcopy(config), sparse_attention=STACK)


def test_models_that_pick_blocks_themselves_are_refused():
    names = [n for n in dir(transformers) if n.startswith("MiniMaxM3") and n.endswith("ForConditionalGeneration")]
    if not names:
        pytest.skip("this Transformers has no minimax_m3")
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as minimax

    reasons = [sah_transformers.integration.models._forward_source(v) for v in vars(minimax).values()
               if isinstance(v, type) and issubclass(v, torch.nn.Module) and v.forward is not torch.nn.Module.forward
               and v.__module__ == minimax.__name__]  # fmt: skip
    assert any("block_indices" in source for source in reasons), "the family changed; rewrite this test"
    model = tiny_minimax(names[0])
    support = sah_transformers.supported(model)
    assert not support
    assert "block_indices" in support.reason
    with pytest.raises(ValueError, match=r"cannot use sparse attention.*block_indices"):
        sah_transformers.enable(model, STACK)


def tiny_minimax(name):
    from tiny_models import shrink

    kind = getattr(transformers, name)
    return kind(shrink(kind.config_class, {})).eval()


def test_block_indices_are_refused_by_the_attention_function():
    from sah_transformers.integration.attention_function import sah_attention

    model = sparse()
    q = torch.randn(1, 4, 3, 16)
    module = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"LlamaAttention.*block_indices"):
        sah_attention(module, q, q[:, :2], q[:, :2], None, block_indices=torch.zeros(1, 3, 1))
    assert torch.equal(logits(model, IDS), logits(sparse(), IDS))


def test_paged_caches_are_refused():
    model = sparse()
    with pytest.raises(ValueError, match=r"continuous batching|paged"):
        generate(model, IDS, cache_implementation="paged")
    with pytest.raises(ValueError, match=r"continuous batching|paged"):
        model.generate_batch([IDS[0].tolist()], generation_config=model.generation_config)
    assert torch.equal(generate(model, IDS), generate(sparse(), IDS))


def test_set_attn_implementation_cannot_make_an_unsupported_model_say_sah():
    model = tiny("BloomForCausalLM")
    with contextlib.suppress(ValueError):
        model.set_attn_implementation("sah")
    assert model.config._attn_implementation != "sah"


@pytest.mark.parametrize("name", ["BartForCausalLM", "OPTForCausalLM", "MarianForCausalLM", "GPT2LMHeadModel"])
def test_older_decoders_take_the_keyword(tmp_path, name):
    """Including decoders whose config describes an encoder too."""
    build(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=STACK, **FLOAT64)
    truth = by_loops(lambda *_: STACK, name=name)
    assert not differ(logits(model, IDS), logits(truth, IDS))
    assert torch.equal(generate(model, IDS), generate(truth, IDS))


def test_an_encoder_decoder_model_is_sparse_in_its_decoder(tmp_path):
    config = tiny_config("BartForCausalLM").to_dict() | {"is_encoder_decoder": True, "is_decoder": False}
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**config)).eval()
    model.save_pretrained(tmp_path)
    for again in (
        transformers.BartForConditionalGeneration.from_pretrained(tmp_path, sparse_attention=STACK),
        sah_transformers.enable(model, STACK),
    ):
        with selections() as log:
            logits(again, IDS, decoder_input_ids=IDS[:, :11])
        assert layers_selected(log) == [0, 1]
        assert all(entry.mask.shape[-1] == 11 for entry in log)


@pytest.mark.parametrize("length", [1, 5, 13, 20])
def test_cross_attention_sees_the_whole_encoder(length):
    """However many queries: that it needs no mask does not mean causal order."""
    config = tiny_config("BartForCausalLM").to_dict() | {"is_encoder_decoder": True, "is_decoder": False}
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**config)).eval().double()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.3)
    options = {"decoder_input_ids": prompt(length, seed=1)}
    dense = logits(model, IDS, **options)
    generated = model.generate(IDS, **options, max_new_tokens=5, num_beams=2, use_cache=False)
    sah_transformers.enable(model, [{"type": "causal"}])
    assert not differ(logits(model, IDS, **options), dense)
    assert torch.equal(model.generate(IDS, **options, max_new_tokens=5, num_beams=2), generated)


def test_the_prompt_of_a_static_cache_where_a_mask_means_no_causal_order():
    """Moonshine passes `is_causal=False` with every mask."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    sizes |= {f"{part}_num_hidden_layers": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_num_attention_heads": 4 for part in ("encoder", "decoder")}
    torch.manual_seed(0)
    model = transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**sizes)).eval().double()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.3)
    options = {"decoder_input_ids": prompt(5), "max_new_tokens": 4, "do_sample": False}
    options |= {"input_values": torch.randn(1, 4000, dtype=torch.float64), "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    dense = model.generate(**options)
    sah_transformers.enable(model, [{"type": "causal"}])
    for cache in (None, "static"):
        found = model.generate(**options, cache_implementation=cache)
        assert torch.equal(found.sequences, dense.sequences)
        assert not any(differ(a, b) for a, b in zip(found.logits, dense.logits, strict=True))


# Registration, several models, the cost of importing


def test_a_second_import_and_reloads_are_harmless(expected, checkpoint):
    before = sparse()
    for module in ("sah_transformers", "sah_transformers.integration.loading", "sah_transformers.integration"):
        importlib.reload(sys.modules[module])
    for _ in range(3):
        sah_transformers.integration.install()
    assert not differ(logits(before, IDS), expected)
    after = AutoModelForCausalLM.from_pretrained(checkpoint, sparse_attention=STACK, **FLOAT64)
    assert not differ(logits(after, IDS), expected)
    wrapped = transformers.PreTrainedModel.__dict__["from_pretrained"].__func__
    depth = 0
    while hasattr(wrapped, "__wrapped__"):
        wrapped, depth = wrapped.__wrapped__, depth + 1
    bare = transformers.PreTrainedModel.__dict__["_from_config"].__func__
    assert depth <= 2, f"from_pretrained is wrapped {depth} times"
    assert bare is not None


def test_a_second_copy_of_the_package_takes_over(checkpoint):
    """Dropped from sys.modules and imported again, as development tools do."""
    code = f"""
import sys, torch, sah_transformers
for name in [n for n in sys.modules if n.startswith("sah_transformers")]:
    del sys.modules[name]
import sah_transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, sparse_attention=[{{"type": "sink", "sink_size": 1}}])
one = model(torch.arange(3, 12)[None]).logits
sah_transformers.disable(model)
two = model(torch.arange(3, 12)[None]).logits
assert (one - two).abs().max() > 1e-3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_two_models_with_different_stacks(expected):
    first, second, plain = sparse(STACK), sparse(OTHER_STACK), build()
    alone = [logits(sparse(c), IDS) for c in (STACK, OTHER_STACK)]
    for _ in range(2):
        assert torch.equal(logits(first, IDS), alone[0])
        assert torch.equal(logits(second, IDS), alone[1])
        assert not differ(logits(plain, IDS), logits(build(), IDS))
    sah_transformers.disable(second)
    assert torch.equal(logits(first, IDS), alone[0])
    assert not differ(alone[0], expected)


def test_other_configs_never_get_the_key():
    sparse()
    for name in ("gpt2", "llama", "gemma3"):
        assert "sparse_attention" not in AutoConfig.for_model(name).to_dict()
    assert isinstance(vars(PreTrainedConfig).get("sparse_attention"), object)


def test_importing_is_light():
    """No plotting, tables, command line or kernels; the time on top of Transformers is printed, not asserted."""
    code = """
import sys, time, torch, transformers.modeling_utils
before, start = set(sys.modules), time.perf_counter()
import sah_transformers
print(time.perf_counter() - start)
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    seconds, modules = done.stdout.splitlines()[-2:]
    print(f"import sah_transformers costs {float(seconds):.2f} s on top of torch and transformers.modeling_utils")
    added = {name.split(".")[0] for name in modules.split()} - set(sys.stdlib_module_names)
    assert added <= {"sah_transformers", "torch", "transformers", "tokenizers", "yaml", "_yaml", "numpy", "safetensors"}
