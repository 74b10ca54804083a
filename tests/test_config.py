"""Configs: plain data in and out, and every wrong one refused with its path, the rule, the value, the right name."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import method_files
import pytest
import torch
import yaml
from sparse_models import STACK, build, differ, generate, logits, prompt, selections, sparse
from transformers import DynamicCache

import sah_transformers
from sah_transformers import MaskerRegistry, SparseAttentionConfig, TopKMasker, TopKMaskerConfig, config
from sah_transformers.config import preset_names, presets_folder
from sah_transformers.rows import scores_of

pytestmark = pytest.mark.core

parse = SparseAttentionConfig.parse

# Configs of every registered type, each field once away from its default.
EXAMPLES = {
    "sink": [{"sink_size": 4}, {"sink_size": 0.25}],
    "local": [{"window_size": 1}, {"window_size": 1.0}],
    "causal": [{}],
    "oracle_top_k": [{"heavy_size": 0.05}, {"heavy_size": 7, "gqa": "group"}],
    "oracle_top_p": [{"top_p": 0.0}, {"top_p": 1.0, "coverage": "total", "gqa": "group"}],
    "quest": [{"heavy_size": 0.2}, {"heavy_size": 64, "gqa": "group", "page_size": 8}],
    "double_sparsity": [
        {"heavy_size": 0.05, "sorted_channel_file": method_files.channel_file(4, 16)},
        {
            "heavy_size": 5,
            "gqa": "group",
            "group_factor": 2,
            "label_bits": 16,
            "channel_selection": "k_proj",
            "sorted_channel_file": method_files.channel_file(4, 16, seed=1),
        },
    ],
    "pq_cache": [
        {"heavy_size": 0.1, "pq_sub_dim": 8},
        {
            "heavy_size": 3,
            "gqa": "group",
            "pq_sub_dim": 4,
            "pq_bits": 2,
            "kmeans_iter": 3,
            "init_offset": 0,
            "metric": "ip",
        },
    ],
    "hash_attention": [
        {"heavy_size": 0.1, "hat_weight_file": method_files.weight_file(4, 2, 16)},
        {
            "heavy_size": 4,
            "gqa": "group",
            "hat_bits": 64,
            "hat_weight_file": method_files.weight_file(4, 2, 16, bits=64, shared=True),
        },
    ],
    "socket": [{"heavy_size": 0.1}, {"heavy_size": 9, "gqa": "group", "K": 4, "L": 10, "tau": 0.5}],
    "random_sampling": [{"sampling_rate": 0.1}, {"sampling_rate": 1.0, "seed": 3}],
}


def test_every_registered_masker_has_examples():
    assert set(EXAMPLES) == set(MaskerRegistry.types())
    for kind, examples in EXAMPLES.items():
        given = {name for example in examples for name in example}
        assert given == {field.name for field in dataclasses.fields(MaskerRegistry.config_class(kind))}


def stack(*maskers):
    return {"maskers": list(maskers)}


def top_k(**fields):
    return {"type": "oracle_top_k", **fields}


def sink(size=1):
    return {"type": "sink", "sink_size": size}


# (what is given, what the message must contain)
WRONG = {
    "unknown field": ({"masker": []}, "'masker', did you mean 'maskers'"),
    "unknown field of any kind": ({3: []}, "3"),
    "misspelt prefill": ({"prefil": "dense"}, "'prefil', did you mean 'prefill'"),
    "unknown type": (
        stack(sink(), {"type": "oracle_topk"}),
        "maskers[1]",
        "'oracle_topk', did you mean 'oracle_top_k'",
    ),
    "type is no string": (stack({"type": 3}), "maskers[0]", "3"),
    "type is missing": (stack({"sink_size": 3}), "maskers[0].type is missing"),
    "masker's unknown field": (
        stack({"type": "sink", "sinksize": 4}),
        "maskers[0]",
        "'sinksize', did you mean 'sink_size'",
    ),
    "masker's missing field": (stack(sink(), {"type": "local"}), "maskers[1].window_size is missing"),
    "masker is a name": (stack("sink"), "maskers[0]: ", "'sink'"),
    "masker is a list": (stack([sink()]), "maskers[0]: "),
    "masker is None": (stack(None), "maskers[0]: ", "None"),
    "stack is a masker": ({"maskers": sink()}, "maskers must be a list of maskers", "sink_size"),
    "stack is a name": ({"maskers": "quest"}, "maskers must be a list of maskers", "'quest'"),
    "stack is None": ({"maskers": None}, "maskers must be a list of maskers", "None"),
    "prefill": ({"prefill": "sparse"}, "prefill must be 'same', 'dense'", "'sparse'"),
    "prefill is None": ({"prefill": None}, "prefill must be", "None"),
    "prefill's stack": ({"prefill": [sink(), sink(0)]}, "prefill[1].sink_size must be", "0"),
    "prefill's type": ({"prefill": [{"type": "lokal"}]}, "prefill[0]", "did you mean 'local'"),
    "kernel": ({"kernel": "tritn"}, "kernel must be", "'triton'", "'tritn'"),
    "kernel is a list": ({"kernel": ["auto"]}, "kernel must be", "['auto']"),
    "sliding_layers": ({"sliding_layers": "none"}, "sliding_layers must be 'dense' or 'sparse'", "'none'"),
    "dense_layers is an int": ({"dense_layers": 0}, "dense_layers must be a list", "0"),
    "dense_layers is a string": ({"dense_layers": "0:2"}, "dense_layers must be a list", "'0:2'"),
    "dense_layers holds a float": ({"dense_layers": [0, 1.0]}, "dense_layers[1] must be an int", "1.0"),
    "dense_layers holds a bool": ({"dense_layers": [True]}, "dense_layers[0] must be an int", "True"),
    "dense_layers holds a string": ({"dense_layers": ["0"]}, "dense_layers[0] must be an int", "'0'"),
    "layers is a list": ({"layers": [sink()]}, "layers must be a mapping"),
    "layers' key": ({"layers": {"first": []}}, "layers", "'first'"),
    "layers' key is a bool": ({"layers": {True: []}}, "layers", "True"),
    "layers' key is a float": ({"layers": {1.5: []}}, "layers", "1.5"),
    "layers' key has three parts": ({"layers": {"0:4:2": []}}, "layers", "'0:4:2'"),
    "layers' stack": ({"layers": {"2": sink()}}, "layers['2'] must be a list of maskers"),
    "layers' value": ({"layers": {"0:2": [sink(), sink(0)]}}, "layers['0:2'][1].sink_size must be", "0"),
    "layers' field": ({"layers": {3: [{"type": "sink", "size": 1}]}}, "layers['3'][0]", "'size'"),
    "gqa": (stack(top_k(heavy_size=1, gqa="heads")), "maskers[0].gqa must be 'head'", "'heads'"),
    "coverage": (
        stack({"type": "oracle_top_p", "top_p": 0.5, "coverage": "all"}),
        "maskers[0].coverage must be 'remaining' or 'total'",
        "'all'",
    ),
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_wrong_configs_name_the_culprit(given):
    data, *parts = given
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        parse(data)
    for part in parts[1:]:
        assert part in str(caught.value)


LONE = {
    "as the whole": lambda one: one,
    "as the stack": lambda one: {"maskers": one},
    "as the prefill": lambda one: {"prefill": one},
    "as a layer's stack": lambda one: {"layers": {"2": one}},
}


@pytest.mark.parametrize("place", LONE.values(), ids=LONE)
def test_a_lone_masker_is_shown_as_a_list(place):
    with pytest.raises(ValueError, match="list of maskers") as caught:
        parse(place(sink()))
    listed = json.loads(re.search(r"\[\{.*\}\]", str(caught.value)).group(0))
    assert listed == [sink()]
    assert parse(listed).maskers == parse([sink()]).maskers
    with pytest.raises(ValueError, match=r"put it into a list: \[\.\.\.\]"):
        parse(place(MaskerRegistry.config_from(sink())))


WITHOUT_BUDGET = ("causal", "oracle_top_p", "random_sampling")
WRONG_BUDGETS = [True, False, math.nan, math.inf, 1.5, 0, 0.0, -1, -0.5, "5", "0.05", None, [1]]


@pytest.mark.parametrize("value", WRONG_BUDGETS, ids=repr)
@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in WITHOUT_BUDGET])
def test_budgets_are_checked(kind, value):
    field = next(iter(EXAMPLES[kind][0]))
    with pytest.raises(ValueError, match=rf"^maskers\[1\]\.{field} must be .*int.*float in \(0, 1\]") as caught:
        parse(stack({"type": "causal"}, {"type": kind, **EXAMPLES[kind][0], field: value}))
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [*WRONG_BUDGETS, 1, 2], ids=repr)
def test_sampling_rates_are_checked(value):
    with pytest.raises(ValueError, match=r"^maskers\[0\]\.sampling_rate must be a float in \(0, 1\]") as caught:
        parse(stack({"type": "random_sampling", "sampling_rate": value}))
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [-1, 2**62 + 1, 0.5, True, "1", None], ids=repr)
def test_seeds_are_checked(value):
    with pytest.raises(ValueError, match=r"^maskers\[0\]\.seed must be an int from 0 to 2\*\*62") as caught:
        parse(stack({"type": "random_sampling", "sampling_rate": 0.5, "seed": value}))
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [2, 1, 0, -0.1, 1.1, math.nan, True, "0.5", None], ids=repr)
def test_top_p_is_checked(value):
    with pytest.raises(ValueError, match=r"^maskers\[0\]\.top_p must be in range \[0, 1\]") as caught:
        parse(stack({"type": "oracle_top_p", "top_p": value}))
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [True, math.nan, 1.5, -1, "5", None, 2.0], ids=repr)
@pytest.mark.parametrize("field", ["min_keys", "decode_max_queries"])
def test_counts_are_checked(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be an int >= 0, got {re.escape(repr(value))}"):
        parse({field: value})


NO_CONFIGS = [5, 1.5, object(), b"quest", True, {1, 2}, STACK[0].items()]


@pytest.mark.parametrize("value", NO_CONFIGS, ids=lambda value: type(value).__name__)  # no address, no set's order
def test_only_configs_are_configs(value):
    with pytest.raises(ValueError, match=r"sparse_attention must be .*, got "):
        parse(value)


@pytest.mark.parametrize("written", ["1e-3", "125e-5", "1E-10", "5e-2"])
def test_yaml_numbers_without_a_dot_get_a_hint_that_works(tmp_path, written):
    path = tmp_path / "stack.yaml"
    path.write_text(f"maskers:\n  - {{type: oracle_top_k, heavy_size: {written}}}\n")
    with pytest.raises(ValueError, match=r"maskers\[0\]\.heavy_size must be") as caught:
        parse(path)
    hint = re.search(r"write ([^)\s]+)\)", str(caught.value)).group(1)
    assert yaml.safe_load(hint) == float(written), "the hint means another number"
    if written == "1e-3":
        assert hint == "1.0e-3"


@pytest.mark.parametrize("value", ["5", "7", "1e9"])
def test_hints_never_suggest_what_is_refused(value):
    with pytest.raises(ValueError, match="heavy_size") as caught:
        parse(stack(top_k(heavy_size=value)))
    for hint in re.findall(r"write ([^)\s]+)\)", str(caught.value)):
        parse(stack(top_k(heavy_size=yaml.safe_load(hint))))


def test_an_int_is_not_a_share():
    """1 is one key and 1.0 all of them, also after a round trip through YAML and JSON."""
    for size in (1, 1.0):
        data = parse([top_k(heavy_size=size)]).to_dict()
        for back in (yaml.safe_load(yaml.safe_dump(data)), json.loads(json.dumps(data))):
            assert type(parse(back).maskers[0].heavy_size) is type(size)


EVERY_MASKER = [{"type": kind, **fields} for kind, examples in EXAMPLES.items() for fields in examples]
CONFIGS = {
    "empty": {},
    "every masker": {"maskers": EVERY_MASKER},
    "every field": {
        "maskers": EVERY_MASKER[:2],
        "prefill": EVERY_MASKER[2:5],
        "decode_max_queries": 3,
        "kernel": "reference",
        "dense_layers": [0, -1],
        "min_keys": 17,
        "layers": {"3": [], "-2:": EVERY_MASKER[5:], ":2": [sink()]},
        "sliding_layers": "sparse",
    },
    "dense prefill": {"maskers": [sink()], "prefill": "dense"},
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(data):
    first = SparseAttentionConfig.from_dict(data)
    plain = first.to_dict()
    for back in (plain, json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))):
        assert SparseAttentionConfig.from_dict(back) == first
        assert repr(SparseAttentionConfig.from_dict(back)) == repr(first)


def test_round_trip_notices_every_field():
    """Equality is not vacuous: changing any field gives another config."""
    full = parse(CONFIGS["every field"])
    for field in dataclasses.fields(full):
        if field.name != "preset":
            default = getattr(SparseAttentionConfig(), field.name)
            assert dataclasses.replace(full, **{field.name: default}) != full, field.name


def test_data_do_not_alias_the_config():
    given = {"maskers": [sink()], "layers": {"0": [sink()]}, "dense_layers": [1]}
    one = parse(given)
    given["maskers"].append("nonsense")
    given["layers"]["7"] = given["layers"]["0"] = "nonsense"
    data = one.to_dict()
    data["maskers"][0]["sink_size"] = 99
    data["layers"].clear()
    assert one == parse({"maskers": [sink()], "layers": {"0": [sink()]}, "dense_layers": [1]})


def test_layer_keys_may_be_ints():
    assert parse({"layers": {3: [sink()], -1: []}}) == parse({"layers": {"3": [sink()], "-1": []}})


def test_a_bare_list_stands_for_its_stack(tmp_path):
    maskers = [MaskerRegistry.create_masker(c) for c in STACK]
    configs = [m.config for m in maskers]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(STACK))
    for given in (STACK, tuple(STACK), maskers, configs, [*STACK[:1], maskers[1], configs[2]], tmp_path / "list.yaml"):
        assert parse(given) == parse({"maskers": STACK})


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"my{suffix}"
    path.write_text((json.dumps if suffix == ".json" else yaml.safe_dump)(CONFIGS["every field"]))
    assert parse(str(path)) == parse(path) == parse(CONFIGS["every field"])


def test_errors_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("maskers:\n  - {type: sink, sink_size: 0}\n")
    with pytest.raises(ValueError, match=r"my\.yaml.*maskers\[0\]\.sink_size must be"):
        parse(path)


BROKEN = {
    "not yaml": ("a.yaml", b"maskers: [{type: sink, sink_size: 1}"),
    "tabs": ("a.yaml", b"maskers:\n\t- type: sink"),
    "not json": ("a.json", b'{"maskers": ['),
    "yaml as json": ("a.json", b"maskers: []"),
    "not text": ("a.yaml", b"\xff\xfe\x00maskers"),
    "empty": ("a.yaml", b""),
    "a word": ("a.yaml", b"quest"),
    "a number": ("a.json", b"5"),
    "nan": ("a.json", b'{"maskers": [{"type": "sink", "sink_size": NaN}]}'),
    "two documents": ("a.yaml", b"maskers: []\n---\nmaskers: []\n"),
}


@pytest.mark.parametrize("given", BROKEN.values(), ids=BROKEN)
def test_corrupted_files(tmp_path, given):
    name, content = given
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        parse(tmp_path / name)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir", "!mine"]
)
def test_yaml_cannot_construct_objects(tmp_path, tag):
    target = tmp_path / "made"
    path = tmp_path / "evil.yaml"
    path.write_text(f"maskers: {tag} ['{target}']\n")
    with pytest.raises(ValueError, match=r"evil\.yaml.*(tag|constructor)"):
        parse(path)
    assert not target.exists()


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*gone\.yaml"):
        parse(tmp_path / "gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.yaml"):
        parse(tmp_path / "folder.yaml")


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="oracle_topk") as caught:
        parse("oracle_topk")
    assert "did you mean 'oracle_top_k'" in str(caught.value)
    for name in preset_names():
        assert name in str(caught.value)


def test_a_dict_that_names_a_preset_is_not_silently_dense():
    """`preset` only tells where a config came from: alone it would ask for nothing at all."""
    try:
        asked = parse({"preset": "oracle_top_k"})
    except ValueError:
        return
    assert asked == parse("oracle_top_k")


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_where_their_numbers_come_from(name):
    head = (presets_folder() / f"{name}.yaml").read_text().split("maskers:")[0]
    assert head.startswith("#")
    assert re.search(r"arXiv \d{4}\.\d{5}|https?://", head)


@pytest.mark.parametrize(
    ("masker", "fault"),
    [
        ({"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 5}, "pq_sub_dim must divide the head dimension"),
        (method_files.double_sparsity(4, 32, heavy_size=4), "has 32 channels per head, the model has 16"),
        (method_files.double_sparsity(4, 16, heavy_size=4, group_factor=17), "at most the head dimension 16"),
        (method_files.hash_attention(4, 2, 32, heavy_size=4), "is for the head dimension 32, the model has 16"),
    ],
    ids=["pq_cache", "channels", "group_factor", "hash_attention"],
)
def test_what_does_not_fit_the_models_heads_is_refused_at_once(masker, fault):
    with pytest.raises(ValueError, match=fault):
        sparse([masker])


@pytest.mark.parametrize("name", ["double_sparsity", "hash_attention"])
def test_presets_say_how_to_make_their_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`sah (calibrate|train) .* MODEL --out model\.\w+(\.\w+)?` writes one"):
        sparse(name, num_hidden_layers=4)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method_files.put_preset_files(tmp_path, heads=4, groups=2, dim=16, layers=4)
    given = parse(name)
    assert given.preset == name
    assert given.maskers
    assert parse(given.to_dict()) == given
    options = {"num_hidden_layers": 4, "max_position_embeddings": 2048, "dtype": torch.float32}
    model = sparse(name, **options)
    sizes = [size for masker in given.maskers for size in dataclasses.asdict(masker).values()]
    ids = prompt(max(700, sum(size for size in sizes if type(size) is int and size > 99) * 3 // 2))
    with selections() as log:
        answer = generate(model, ids, new=2)
    dense = given.dense_layers
    assert {entry.layer for entry in log} == {0, 1, 2, 3} - {i % 4 for i in dense}
    assert answer.shape == (1, 2)
    sparsest = min(float((e.mask[:, :, -1] > 0).float().mean()) for e in log if e.rows[-1] >= 699)
    assert sparsest < 0.95, "selected (nearly) everything: it is dense"
    dense_model = build(**options)
    if given.prefill != "dense":
        assert differ(logits(model, ids), logits(dense_model, ids))

    def step(model):
        cache = DynamicCache()
        logits(model, ids[:, :-1], past_key_values=cache)
        return logits(model, ids[:, -1:], past_key_values=cache)

    assert differ(step(model), step(dense_model))


def write_preset(tmp_path, monkeypatch, data):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(config, "presets_folder", lambda: tmp_path)


def test_a_presets_indices_out_of_range_are_ignored(tmp_path, monkeypatch):
    """They are written for any model: ignored, and still so when a model saved with them is loaded again."""
    write_preset(tmp_path, monkeypatch, {"maskers": STACK, "dense_layers": [0, 99], "layers": {"50": []}})
    model = sparse("mine")
    with selections() as log:
        logits(model, prompt(9))
    assert {entry.layer for entry in log} == {1}
    model.save_pretrained(tmp_path / "model")
    reloaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(logits(reloaded, prompt(9)), logits(model, prompt(9)))


def test_a_presets_ignored_indices_are_logged(tmp_path, monkeypatch):
    from sah_transformers.integration import models

    said = []
    monkeypatch.setattr(models.logger, "warning_once", said.append)
    write_preset(tmp_path, monkeypatch, {"maskers": STACK, "dense_layers": [99]})
    sparse("mine")
    assert any("mine" in text and "99" in text for text in said)


def test_a_users_masker_works_in_configs_at_once():
    """A misspelt tag finds it, errors carry its path, the round trip holds, and the model runs it."""

    @dataclass(frozen=True)
    class ReversedConfig(TopKMaskerConfig):
        type: ClassVar[str] = "reversed_top_k"

    @MaskerRegistry.register(ReversedConfig)
    class Reversed(TopKMasker):
        def score(self, queries, keys, values, ctx):
            return -scores_of(queries, keys, ctx)

    given = parse([{"type": "reversed_top_k", "heavy_size": 2}])
    assert parse(given.to_dict()) == given
    with pytest.raises(ValueError, match=r"maskers\[0\].*did you mean 'reversed_top_k'"):
        parse([{"type": "reverse_top_k", "heavy_size": 2}])
    with pytest.raises(ValueError, match=r"maskers\[0\]\.heavy_size must be .*got 0"):
        parse([{"type": "reversed_top_k", "heavy_size": 0}])
    model = sparse(given)
    with selections() as log:
        logits(model, prompt(9))
    last = log[0].scores[0, 0, -1]
    assert log[0].mask[0, 0, -1].bool().tolist() == [s in last.sort().values[:2] for s in last]


def test_registering_again_replaces_and_a_bad_one_is_refused():
    for _ in range(2):

        @dataclass(frozen=True)
        class AgainConfig(TopKMaskerConfig):
            type: ClassVar[str] = "again"

        @MaskerRegistry.register(AgainConfig)
        class Again(TopKMasker):
            def score(self, queries, keys, values, ctx):
                return scores_of(queries, keys, ctx)

    assert MaskerRegistry.config_class("again") is AgainConfig
    assert type(MaskerRegistry.create_masker({"type": "again", "heavy_size": 1})) is Again

    class Narrow(Again):
        def score(self, queries, keys, values, ctx):
            return scores_of(queries, keys, ctx)[..., 1:]

    class Flat(Again):
        def select(self, rows, active):
            return rows.queries.new_ones(rows.shape[2:], dtype=torch.bool)

    for wrong, method in ((Narrow, "score"), (Flat, "select")):
        masker = wrong(AgainConfig(heavy_size=1))
        with pytest.raises(ValueError, match=rf"{wrong.__name__}.{method} must return .*\[1, 2, 3, 5\], got"):
            sah_transformers.sparse_attention(torch.ones(1, 2, 3, 4), *[torch.ones(1, 2, 5, 4)] * 2, [masker])

    @dataclass(frozen=True)
    class Untagged(TopKMaskerConfig):
        pass

    with pytest.raises(ValueError, match="type must be a tag"):
        MaskerRegistry.register(Untagged)

    @dataclass(frozen=True)
    class Mine(TopKMaskerConfig):
        type: ClassVar[str] = "sink"

    with pytest.raises(ValueError, match="'sink' is taken by SinkMaskerConfig"):
        MaskerRegistry.register(Mine)
    with pytest.raises(ValueError, match="subclass of MaskerConfig"):
        MaskerRegistry.register(dict)
    assert sah_transformers.MaskerRegistry is MaskerRegistry
