"""`sah bench`: its suites hold every target, its checks find what is wrong, its last line is JSON."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sah_transformers import attention
from sah_transformers.bench import check, dense, report, run, timing
from sah_transformers.bench.inputs import call_of, previous_mask, tensors, visible
from sah_transformers.bench.suites import AT_LEAST, AT_MOST, Case, load_suite, suite_names
from sah_transformers.cli import app
from sah_transformers.mask import Mask
from sah_transformers.maskers import MaskerRegistry

SINK, LOCAL = {"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 8}
TOP_K = {"type": "oracle_top_k", "heavy_size": 0.05}
TOP_P = {"type": "oracle_top_p", "top_p": 0.9}


def sah_bench(*arguments, code=0):
    """The result of the command, which must end with ``code``."""
    result = CliRunner().invoke(app, ["bench", *(str(one) for one in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def last_line(result):
    """The JSON that ends stdout, the only line of its kind."""
    lines = result.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1
    return json.loads(lines[-1])


def case(*maskers, **sizes):
    maskers = tuple(map(MaskerRegistry.config_from, maskers))
    return Case(suite="test", name="test", maskers=maskers, **{"H": 4, "G": 2, "D": 16, "dtype": "float32", **sizes})


def one_suite(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


# suites


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_parses(name):
    cases = load_suite(name)
    assert cases
    labels = [one.label for one in cases]
    assert len(set(labels)) == len(labels), "two cases of a suite cannot be told apart"
    for one in cases:
        assert json.loads(json.dumps(one.to_dict()))["K"] == one.K
        assert set(one.target) <= {*AT_MOST, *AT_LEAST}


WINDOWS = ["sink", "local"]
RATIOS = {  # (suite, last masker, its gqa, Q, K, B, q scale) to target, bfloat16, H=32, G=8, D=128
    ("decode", "oracle_top_k", "head", 1, 131072, 1, 1): {"dense_ratio": 0.84},
    ("decode", "oracle_top_k", "head", 1, 32768, 1, 1): {"dense_ratio": 1.07},
    ("decode", "oracle_top_k", "head", 1, 131072, 4, 1): {"dense_ratio": 0.76},
    ("decode", "oracle_top_k", "group", 1, 131072, 1, 1): {"dense_ratio": 0.80},
    ("decode", "oracle_top_p", "head", 1, 131072, 1, 1): {"dense_ratio": 1.25},
    ("decode", "oracle_top_p", "head", 1, 131072, 1, 2): {"dense_ratio": 1.2},
    ("decode", "oracle_top_p", "head", 1, 131072, 1, 3): {"dense_ratio": 0.9},
    ("decode", "local", None, 1, 131072, 1, 1): {"dense_speedup": 12},
    ("prefill", "oracle_top_k", "head", 8192, 8192, 1, 1): {"dense_ratio": 6.3},
    ("prefill", "oracle_top_k", "head", 32768, 32768, 1, 1): {"dense_ratio": 5.8},
    ("prefill", "oracle_top_p", "head", 8192, 8192, 1, 1): {"dense_ratio": 8},
    ("prefill", "oracle_top_p", "head", 32768, 32768, 1, 1): {"dense_ratio": 8},
    ("prefill", "oracle_top_k", "head", 131072, 131072, 1, 1): {"extra_mib": 2048},
    ("prefill", "oracle_top_p", "head", 131072, 131072, 1, 1): {"extra_mib": 2048},
    ("prefill", "local", None, 32768, 32768, 1, 1): {"dense_speedup": 10},
    ("prefill", "local", None, 131072, 131072, 1, 1): {"dense_speedup": 40},
}


@pytest.mark.parametrize("suite", ["decode", "prefill"])
def test_the_targets_against_dense_are_cases(suite):
    found = {}
    for one in load_suite(suite):
        last = one.maskers[-1]
        assert [masker.type for masker in one.maskers[:2]] == WINDOWS
        assert [one.maskers[0].sink_size, one.maskers[1].window_size] == [128, 128]
        assert (one.H, one.G, one.D, one.dtype, one.op) == (32, 8, 128, "bfloat16", "attention")
        assert getattr(last, "heavy_size", 0.05) == 0.05
        assert getattr(last, "top_p", 0.9) == 0.9
        key = (suite, last.type, getattr(last, "gqa", None), one.Q, one.K, one.B, one.q_scale)
        found[key] = dict(one.target)
    wanted = {key: target for key, target in RATIOS.items() if key[0] == suite}
    assert {key: target for key, target in found.items() if target} == wanted


UPDATES = {  # (B, H, G, S, share) to the predecessor's ms, float32 and bfloat16
    (1, 4, 4, 256, 0.1): (0.051, 0.074),
    (2, 8, 8, 512, 0.1): (0.336, 0.202),
    (4, 16, 16, 1024, 0.05): (3.65, 2.06),
    (4, 12, 12, 1024, 0.05): (2.50, 1.40),
    (1, 8, 8, 2048, 0.02): (1.33, 0.73),
    (1, 8, 8, 4096, 0.02): (4.31, 2.42),
    (2, 16, 4, 1024, 0.05): (1.73, 0.97),
}


def update_shape(one):
    (masker,) = one.maskers
    assert one.Q == one.K
    assert one.D == 64
    return one.B, one.H, one.G, one.K, masker.heavy_size


def test_the_mask_updates_are_cases():
    found = {}
    for one in load_suite("mask_update"):
        assert dict(one.target) == {"predecessor_speedup": 3, "dense_ratio": 6}
        assert (one.op, one.dtype) == ("attention", "bfloat16")
        found[update_shape(one)] = one.predecessor_ms
    assert found == {shape: half for shape, (_, half) in UPDATES.items()}
    masks = set()
    for one in load_suite("add_mask"):
        assert dict(one.target) == {"predecessor_speedup": 2}
        assert one.op == "add_mask"
        assert one.predecessor_ms == UPDATES[update_shape(one)][one.dtype == "bfloat16"]
        masks.add((update_shape(one), one.dtype, one.previous))
    assert len(masks) == 7 * 2 * 2


def test_host_and_plot_are_cases():
    host = load_suite("host")[0]
    assert (host.op, host.K, host.maskers[-1].type) == ("host", 131072, "oracle_top_k")
    assert host.target["host_us"] == 150
    assert host.target["extra_mib"] == 64
    assert [one.K for one in load_suite("plot")] == [2**i for i in range(12, 21)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cases: 3", "must hold a mapping with a list of cases"),
        ("case: []\ncases: []", "unknown field 'case', did you mean 'cases'?"),
        ("cases: [{name: a, K: 8, stack: x}]", "cases[0]: unknown stack 'x'"),
        ("stacks: {x: []}\ncases: [{name: a, K: 8, stack: x}]", "stack must name at least one masker"),
        ("cases: [{name: a, K: 8, stack: [{type: sink, sink_size: 0}]}]", "stack[0].sink_size must be"),
        ("cases: [{name: a, k: 8, stack: [{type: causal}]}]", "cases[0]: unknown field 'k'"),
        ("cases: [{name: a, K: 0, stack: [{type: causal}]}]", "K must be an int >= 1, got 0"),
        ("cases: [{name: a, K: 4, Q: 8, stack: [{type: causal}]}]", "Q must be at most K"),
        ("cases: [{name: a, K: 4, G: 3, stack: [{type: causal}]}]", "H must be a multiple of G"),
        ("cases: [{name: a, K: 4, dtype: int8, stack: [{type: causal}]}]", "dtype must be one of"),
        ("cases: [{name: a, K: 4, target: {ratio: 1}, stack: [{type: causal}]}]", "target: unknown measure 'ratio'"),
    ],
)
def test_wrong_suites_name_the_culprit(tmp_path, text, message):
    result = sah_bench(one_suite(tmp_path, text), "--device", "cpu", code=2)
    assert message in result.stderr


def test_lists_are_expanded(tmp_path):
    text = "cases: [{name: a, S: [8, 16], dtype: [float32, bfloat16], stack: [{type: causal}]}]"
    cases = load_suite(str(one_suite(tmp_path, text)))
    assert [(one.Q, one.K, one.dtype) for one in cases] == [
        (8, 8, "float32"), (8, 8, "bfloat16"), (16, 16, "float32"), (16, 16, "bfloat16")
    ]  # fmt: skip


# the command


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    monkeypatch.setattr(run, "CPU_SECONDS", 0.0)


def test_smoke_ends_in_one_line_of_json(tmp_path):
    out = tmp_path / "bench.json"
    result = sah_bench("--device", "cpu", "--json", out)
    data = last_line(result)
    assert json.loads(out.read_text()) == data
    assert data["copy_tb_s"] > 0
    assert "No GPU" in result.stdout
    assert "smoke" in result.stdout
    assert len(data["cases"]) == data["summary"]["ok"] == len(load_suite("smoke"))
    for one in data["cases"]:
        if one["op"] == "prompt":
            assert one["prompts"]["sah, at once"]["seconds"] > 0
        else:
            assert one["check"]["rows"] > 0
        if one["op"] == "attention":
            times = one["ours"]
            assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
            assert one["dense"]["sdpa"]["p50_ms"] > 0
            assert one["measures"]["dense_ratio"] > 0
            assert one["bytes"] > 0
            assert one["share_of_copy"] > 0
        if one["op"] == "host":
            assert one["measures"]["host_us"] > 0
            assert one["measures"]["api_us"] > 0


def test_what_needs_a_gpu_is_skipped_and_misses_nothing():
    result = sah_bench("prefill", "--device", "cpu")
    data = last_line(result)
    assert {one["status"] for one in data["cases"]} == {"skipped"}
    assert data["summary"]["targets missed"] == 0
    assert "needs a GPU" in result.stdout


def test_steps_are_checked_with_the_side_data_that_they_have():
    """PQCache's codebooks would be others if the reference made them anew."""
    data = last_line(sah_bench("approximate", "--device", "cpu", "--only", " 1,024"))
    assert [one["status"] for one in data["cases"]] == ["ok"] * 5


def test_on_a_gpu_each_way_has_a_process_of_its_own():
    from sah_transformers.bench.step import REPLAYED, Way, alone

    assert alone("cpu", os.getpid) == os.getpid() != alone("cuda", os.getpid)
    for case in load_suite("step"):
        assert pickle.loads(pickle.dumps((case, Way(True, REPLAYED))))[0] == case


def test_a_wrong_kernel_fails(monkeypatch):
    right = attention.fast_attention

    def wrong(call):
        if call.kernel == "reference":
            return right(call)
        return call.queries.new_ones(call.shape[0], call.shape[2], call.shape[1], call.values.shape[-1])

    monkeypatch.setattr(attention, "fast_attention", wrong)
    result = sah_bench("smoke", "--device", "cpu", "--only", "sink + local", code=1)
    data = last_line(result)
    assert {one["status"] for one in data["cases"]} == {"FAILED"}
    assert all("relative error" in one["note"] and "ours" not in one for one in data["cases"])
    assert "FAILED" in result.stdout
    assert "error: 2 of 2 cases failed" in result.stderr


def test_an_error_fails_its_case_alone(monkeypatch):
    monkeypatch.setattr(run, "check_mask", lambda *a: 1 / 0)
    data = last_line(sah_bench("smoke", "--device", "cpu", "--only", "Q=K", code=1))
    assert {one["op"] for one in data["cases"]} == {"attention", "add_mask"}
    for one in data["cases"]:
        assert (one["status"] == "FAILED") == (one["op"] == "add_mask")


def test_what_a_kernel_does_not_cover_is_no_failure(monkeypatch):
    def refuses(call):
        if call.kernel == "reference":
            return None
        raise ValueError("kernel 'triton' cannot take this call: it is Sunday")

    monkeypatch.setattr(attention, "fast_attention", refuses)
    data = last_line(sah_bench("smoke", "--device", "cpu", "--only", "decode sink"))
    assert [(one["status"], one["note"]) for one in data["cases"]] == [("not covered", "it is Sunday")]


def test_stages_are_listed():
    result = sah_bench("smoke", "--device", "cpu", "--only", "decode sink", "--stages")
    assert "aten::" in result.stdout
    assert last_line(result)["cases"][0]["stages_us"]


def test_the_plot_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    small = [case(SINK, LOCAL, TOP_K, K=k, cpu=True) for k in (256, 512)]
    small = [replace(one, suite="plot") for one in small]
    monkeypatch.setattr("sah_transformers.bench.suites.load_suite", lambda name: {"plot": small}[name])
    out = tmp_path / "time.png"
    data = last_line(sah_bench("--device", "cpu", "--plot", out))
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert [one["K"] for one in data["cases"]] == [256, 512]
    refused = sah_bench("--device", "cpu", "--plot", out, "--kernel", "triton", code=1)
    assert {one["status"] for one in last_line(refused)["cases"]} == {"not covered"}
    assert "nothing was measured that could be drawn" in refused.stderr


def test_wrong_use():
    error = sah_bench("decod", code=2).stderr
    assert "unknown suite 'decod', did you mean 'decode'?" in error
    assert ", ".join(suite_names()) in error
    assert "no such file" in sah_bench("missing.yaml", code=2).stderr
    assert "leaves no case" in sah_bench("smoke", "--only", "sunday", code=2).stderr
    assert "--kernel must be one of" in sah_bench("--kernel", "cuda", code=2).stderr
    assert "--device must be" in sah_bench("--device", "tpu", code=2).stderr
    assert "--plot must end in" in sah_bench("--plot", "x.jpg", code=2).stderr
    assert "--json: no such folder" in sah_bench("--json", "missing/x.json", code=2).stderr


# the checks find what is wrong


def kernel_that(change):
    """The reference, with the keys of each row changed by ``change(active)``."""

    def fast(call):
        if call.kernel == "reference":
            return None
        (mask,) = call.masks()
        rows = call.rows(0, call.shape[2], call.queries, call.keys, call.values)
        chosen = Mask.from_dense_unchecked(change(mask.active().clone()))
        out, _ = attention.masked_attention(rows.scores(), rows.values, chosen, rows.visible)
        return out.to(call.queries.dtype)

    return fast


def checked(one, monkeypatch, change):
    """The check of attention, passed by such a kernel."""
    monkeypatch.setattr(attention, "fast_attention", kernel_that(change))
    inputs = tensors(one, "cpu")
    call = call_of(one, inputs, "auto")
    return check.check_attention(one, inputs, call, attention.run(call)[0])


def checked_rows(one, monkeypatch, change):
    """(rows, rows apart) of its check of the selection."""
    monkeypatch.setattr(attention, "fast_attention", kernel_that(change))
    return check.check_rows(one, "auto", "cpu")


def swap(active, rows):
    """One wrong key in each of the rows: the first that is not active in place of the last that is."""
    for i in range(rows):
        row = active.flatten(0, 2)[i]
        on, off = row.nonzero()[-1], (~row).nonzero()[0]
        row[on], row[off] = False, True
    return active


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stack", [[], [TOP_K], [TOP_P]], ids=["windows", "top-k", "top-p"])
def test_the_right_keys_pass(monkeypatch, stack, dtype):
    found = checked(case(SINK, LOCAL, *stack, K=3000, dtype=dtype), monkeypatch, lambda active: active)
    assert found.apart == 0
    assert found.rows == 4
    assert found.kept > 10


def test_one_wrong_key_of_thousands_in_each_row_is_found(monkeypatch):
    one = case(SINK, LOCAL, {**TOP_K, "heavy_size": 2000}, K=4000, Q=8, dtype="bfloat16")
    with pytest.raises(check.CheckFailed, match="selection differs in 32 of 32 rows"):
        checked_rows(one, monkeypatch, lambda active: swap(active, 32))


def test_near_ties_are_allowed_in_few_rows(monkeypatch):
    one = case(SINK, LOCAL, TOP_K, K=4000, Q=8)
    assert checked_rows(one, monkeypatch, lambda active: swap(active, 2)) == (32, 2)


def test_many_wrong_keys_of_one_row_are_no_near_tie(monkeypatch):
    def shift(active):
        active[0, 1, 2] = active[0, 1, 2].roll(1)
        return active

    with pytest.raises(check.CheckFailed, match=r"selection differs: a row of 21\d keys"):
        checked_rows(case(SINK, LOCAL, TOP_K, K=4000, Q=8), monkeypatch, shift)


def test_windows_have_no_near_ties(monkeypatch):
    with pytest.raises(check.CheckFailed, match="selection differs: a row of 12 keys"):
        checked_rows(case(SINK, LOCAL, K=4000, Q=8), monkeypatch, lambda active: swap(active, 1))


def test_many_wrong_keys_of_a_sum_are_found(monkeypatch):
    def drop(active):
        active[..., ::40] = False
        return active

    with pytest.raises(check.CheckFailed, match="selection differs: a row of"):
        checked_rows(case(SINK, LOCAL, TOP_P, K=4000), monkeypatch, drop)
    with pytest.raises(check.CheckFailed, match="relative error"):
        checked(case(SINK, LOCAL, TOP_P, K=4000), monkeypatch, drop)


def test_runs_that_differ_are_found(monkeypatch):
    one = case(SINK, LOCAL, K=100)
    inputs = tensors(one, "cpu")
    call = call_of(one, inputs, "auto")
    with pytest.raises(check.CheckFailed, match="two runs differ"):
        check.check_attention(one, inputs, call, attention.run(call)[0] + 1e-6)


def test_long_prefills_are_checked_in_places(monkeypatch):
    monkeypatch.setattr(check, "WHOLE", 1000)
    one = case(SINK, LOCAL, TOP_K, K=300, Q=300)
    places = check.places(one)
    assert places[0] == (0, 64)
    assert places[-1] == (236, 300)
    assert len(places) == 4
    assert checked(one, monkeypatch, lambda active: active).rows == 4 * 64 * 4


def test_budgets_are_counted():
    one = case(SINK, LOCAL, TOP_K, K=400, Q=300, B=2)
    call = call_of(one, tensors(one, "cpu"), "auto")
    _, counts = check.reference(call_of(one, tensors(one, "cpu"), "reference"))
    check._check_budgets(call, counts)
    counts[1, 17, 2] += 1
    with pytest.raises(check.CheckFailed, match="1 of 2400 rows have another number of keys"):
        check._check_budgets(call, counts)


@pytest.mark.parametrize("previous", ["empty", "half"])
def test_masks_are_held_against_the_definition(previous):
    one = case(TOP_K, K=80, Q=80, previous=previous, B=2)
    inputs = tensors(one, "cpu")
    queries, keys, values = inputs
    before = previous_mask(one, "cpu")
    masker = MaskerRegistry.create_masker(one.maskers[0])
    mask = masker.add_mask(keys, queries, values, is_causal=True, previous_mask=before)
    found = check.check_mask(one, inputs, before, mask)
    assert found.rows == 2 * 4 * 80
    assert found.kept == mask.active().sum() / found.rows
    new = mask.active() if before is None else mask.active() & ~before.active()

    def fails(change, message):
        active = mask.active().clone()
        change(active[1, 3, 70])
        with pytest.raises(check.CheckFailed, match=message):
            check.check_mask(one, inputs, before, Mask.from_dense_unchecked(active))

    taken = new[1, 3, 70].nonzero()[0]
    left = (~mask.active()[1, 3, 70] & visible(one, "cpu")[70]).nonzero()
    scores = (queries[1, 3, 70] * keys[1, 1]).sum(-1)
    worst = left[scores[left].argmin()]

    def exchange(row):
        row[taken], row[worst] = False, True

    fails(lambda row: row.__setitem__(79, True), "hidden keys selected")
    fails(lambda row: row.__setitem__(taken, False), "exactly their budget")
    fails(lambda row: row.__setitem__(worst, True), "exactly their budget")
    fails(exchange, "a key was left out that scores")
    if before is not None:
        held = before.active()[1, 3, 70].nonzero()[0]
        fails(lambda row: row.__setitem__(held, False), "keys were lost")


def test_a_targets_sense():
    one = case(SINK, K=8, target={"dense_ratio": 0.5, "dense_speedup": 2, "extra_mib": 1})
    result = run.Result(one, measures={"dense_ratio": 0.6, "dense_speedup": 3})
    assert [result.met(name) for name in one.target] == [False, True, None]
    assert report.summary([result])["targets missed"] == 2


def test_dense_is_dense():
    one = case(SINK, K=64, Q=64)
    q, k, v = tensors(one, "cpu")
    (function,) = dense.dense_functions((q, k, v)).values()
    scores = (q @ k.repeat_interleave(2, 1).mT * 16**-0.5).masked_fill(~visible(one, "cpu"), -torch.inf)
    torch.testing.assert_close(function(), scores.softmax(-1) @ v.repeat_interleave(2, 1))


def test_sides_take_turns():
    order = []
    times = timing.compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, cuda=False, seconds=0.0)
    assert order == ["a", "b"] * (1 + timing.LEAST)
    assert times["a"].method == "clock"


def test_calls_back_to_back_must_give_the_same():
    left = [torch.ones(3) * i for i in range(9)]
    with pytest.raises(RuntimeError, match="back to back"):
        timing.compare({"a": left.pop}, cuda=False, seconds=0.0, expected=torch.ones(3) * 8)
