"""The benchmark of a whole decode step: what it decodes is right, on every way, and the parts add up."""

import json
from dataclasses import replace

import pytest
import torch
from test_bench import last_line, sah_bench
from transformers import DynamicCache

from sah_transformers import attention
from sah_transformers.bench import check, step
from sah_transformers.bench.run import Setup, run_case
from sah_transformers.bench.suites import load_suite
from sah_transformers.maskers import MaskerRegistry

SETUP = Setup("cpu", "auto", 1e10)


def tiny(*maskers, **fields):
    one = next(case for case in load_suite("smoke") if case.op == "step")
    stack = tuple(map(MaskerRegistry.config_from, maskers)) or one.maskers
    return replace(one, maskers=stack, **fields)


def test_the_command(tmp_path):
    result = sah_bench("smoke", "--device", "cpu", "--only", "step top-k 5 %,")
    data = last_line(result)["cases"][0]
    assert set(data["steps"]) == {way.name for way in step.WAYS}
    for way in data["steps"].values():
        assert way["gpu_ms"] >= 0  # on a busy machine the longer of two generations may be the faster one
        assert set(way["parts_ms"]) == {*step.PARTS, "rest"}
    assert "ms per token of generate()" in result.stdout


@pytest.mark.parametrize("extra", [{"type": "oracle_top_k", "heavy_size": 0.2}, {"type": "quest", "heavy_size": 0.3}])
def test_every_way_generates_the_same(extra):
    steps = step.steps_of(tiny({"type": "sink", "sink_size": 4}, extra), "cpu", "auto")
    assert not any(one.error for one in steps.values())
    sparse, dense = [], []
    for way in step.WAYS:
        (sparse if way.sparse else dense).append(steps[way.name].tokens)
    assert sparse[0] == sparse[1] == sparse[2]
    assert dense[0] == dense[1]
    assert sparse[0] != dense[0]


def test_sequences_of_different_lengths_generate_what_they_do_alone():
    case = tiny(B=3, K=64, padding=0.5)
    real = step.attention_mask(case, "cpu")
    assert real.sum(-1).tolist() == [65, 49, 33]
    model = step.random_model(case, "cpu")
    cache = step.filled(case, model, step.WAYS[0], case.K + 4)
    token = torch.full((3, 1), 3)
    with torch.no_grad():
        places = real.sum(-1, keepdim=True) - 1
        together = model(token, attention_mask=real, position_ids=places, past_key_values=cache).logits
        step.rewind(cache, case.K)
        for i, length in enumerate((64, 48, 32)):
            own = DynamicCache(config=model.config)
            for layer, held in enumerate(cache.layers):
                own.update(held.keys[i : i + 1, :, -length:], held.values[i : i + 1, :, -length:], layer)
            alone = model(token[:1], past_key_values=own).logits
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_clock_stops_nothing():
    case, way, clock = tiny(), step.WAYS[0], step.Clock()
    model = step.random_model(case, "cpu")
    cache = step.filled(case, model, way, case.K + 8)
    right = step.generate(case, model, cache, way, 5)
    step.rewind(cache, case.K)
    assert torch.equal(step.generate(case, model, cache, way, 5, stopping_criteria=[clock]), right)
    assert len(clock.times) == 5
    assert clock.between(1, 4) == clock.times[4] - clock.times[1]


def test_prompts_are_read_alike_at_once_and_in_pieces():
    one = next(case for case in load_suite("smoke") if case.op == "prompt")
    result = run_case(one, SETUP)
    assert (result.status, result.note) == ("ok", "")
    assert list(result.prompts) == ["sah, at once", "sah, pieces of 128", "sdpa, at once", "sdpa, pieces of 128"]
    assert not any(prompt.error for prompt in result.prompts.values())
    assert json.loads(json.dumps(result.to_dict()))["prompts"]["sah, at once"]["seconds"] > 0


@pytest.mark.parametrize("fields", [{"padding": 1.0, "B": 2}, {"padding": 0.5}, {"padding": 0.5, "B": 2, "op": "host"}])
def test_padding_that_makes_no_sense(fields):
    with pytest.raises(ValueError, match="padding"):
        tiny(**fields)


def test_what_is_rewound_is_as_it_was():
    case = tiny()
    model = step.model_of(case.layers, 128, case.intermediate, case.vocab, 4, 2, 32, "float32", "cpu")
    for way in step.WAYS:
        cache = step.filled(case, model, way, case.K + 8)
        tokens = [step.generate(case, model, cache, way, 6).tolist() for _ in range(2) if not step.rewind(cache, 64)]
        assert tokens[0] == tokens[1]
        step.rewind(cache, case.K)
        assert int(cache.get_seq_length()) == case.K


def test_wrong_attention_is_not_timed(monkeypatch):
    original = attention.Call.attend

    def wrong(self, *arguments):
        out, *rest = original(self, *arguments)
        return -out, *rest

    monkeypatch.setattr(attention.Call, "attend", wrong)
    result = run_case(tiny(), SETUP)
    assert result.status == "FAILED"
    assert not result.steps
    with pytest.raises(check.CheckFailed):
        step.check_step(tiny(), "cpu", "auto")


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    original = step.generate

    def fails(case, model, cache, way, tokens, **options):
        if way.mode != step.GROWING or (isinstance(cache, DynamicCache) and not way.sparse):
            raise torch.OutOfMemoryError("too large")
        return original(case, model, cache, way, tokens, **options)

    monkeypatch.setattr(step, "generate", fails)
    step._dense_step.cache_clear()
    result = run_case(tiny(), SETUP)
    step._dense_step.cache_clear()
    assert result.status == "ok"
    assert not result.dense
    data = json.loads(json.dumps(result.to_dict()))
    assert [("error" in one) for one in data["steps"].values()] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matrix products"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("bands_kernel", "attention"),
        ("gather_group_kernel", "attention"),
        ("score_kernel", "selection"),
        ("sample_keys_kernel", "selection"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized", "cache"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "cache"),
        ("triton_poi_fused_index_copy_mul_3", "cache"),
        ("triton_red_fused_mean_pow_rsqrt_1", "rest"),
    ],
)
def test_kernels_by_name(name, part):
    assert step.part_of(name) == part
