"""The public API against the loops: the mask is equal, the output is as close as eager PyTorch is."""

import os
from types import SimpleNamespace

import loops
import method_files
import numpy as np
import pytest
import torch
from cases import CONFIGS, DATA, MASKS, PUBLISHED, RANKING, cases, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sah_transformers import Mask, MaskerRegistry, State, sparse_attention

EXAMPLES = int(os.environ.get("SAH_EXAMPLES", 1))  # multiplies the number of random cases


def examples(count):
    return settings(
        max_examples=count * EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


rows = {"seen": 0, "unsure": 0}
method_rows = dict(rows)  # more of theirs hang on the rounding of a label or a centroid; see test_methods_exactness.py


def check_mask(mask, truth, case, counts=rows):
    """Equal weights in every row whose selection float64 rounding cannot change."""
    dense = mask.get_dense_mask()
    assert tuple(dense.shape) == truth.weights.shape
    sure = truth.sure
    counts["seen"] += sure.size
    counts["unsure"] += int((~sure).sum())
    ours = loops.array(dense)
    wrong = sorted({tuple(map(int, at[:3])) for at in np.argwhere(ours != truth.weights) if sure[tuple(at[:3])]})
    if wrong:
        b, h, i = wrong[0]
        row = slice(None) if truth.score.shape[-1] <= 40 else truth.visible[b, h, i]
        raise AssertionError(
            f"{len(wrong)} rows differ in {case}; first {wrong[0]}:\nours   {ours[b, h, i][row]}\n"
            f"truth  {truth.weights[b, h, i][row]}\nseen   {truth.visible[b, h, i][row].astype(int)}\n"
            f"scores {truth.score[b, h, i][row]}"
        )


def eager(case, truth, dtype):
    """The usual eager attention of Transformers in `dtype` under the selection of `truth`."""
    o = SimpleNamespace(**{"softcap": None, "sinks": None, "scaling": None, "position_bias": None, **case.options})
    B, H, Q, D = case.queries.shape
    repeats = H // case.keys.shape[1]
    q = case.queries.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (case.keys, case.values))
    logits = (q @ k.transpose(-1, -2)) * (D**-0.5 if o.scaling is None else o.scaling)
    if o.softcap is not None:
        logits = o.softcap * torch.tanh(logits / o.softcap)
    if o.attention_mask is not None and o.attention_mask.dim() == 4 and o.attention_mask.dtype != torch.bool:
        logits = logits + o.attention_mask.to(dtype)
    if o.position_bias is not None:
        logits = logits + o.position_bias.to(dtype)
    weights = torch.from_numpy(truth.weights * truth.visible)
    logits = (logits - weights.log().to(dtype)).masked_fill(weights == 0, -torch.inf)
    if o.sinks is not None:
        logits = torch.cat([logits, o.sinks.to(dtype).reshape(1, H, 1, 1).expand(B, H, Q, 1)], dim=-1)
    p = logits.softmax(dim=-1, dtype=torch.float32).to(dtype)[..., : k.shape[2]]
    p = p.masked_fill(weights.sum(-1, keepdim=True) == 0, 0.0)
    return (p @ v).transpose(1, 2)


def check_output(out, truth, case):
    """At most twice (the error of eager PyTorch in the same dtype + one rounding), against float64."""
    dtype = case.queries.dtype
    assert out.dtype == dtype
    assert tuple(out.shape) == truth.out.shape
    assert torch.isfinite(out).all()
    sure = truth.sure.transpose(0, 2, 1)
    if not sure.any():
        return

    def error(other):
        return np.abs(loops.array(other) - truth.out)[sure].max()

    usual = error(eager(case, truth, dtype))
    if not np.isfinite(usual):  # float16 scores overflow in eager
        usual = error(eager(case, truth, torch.float32))
    # Few numbers can be right by luck: eager's error is at least one float32 rounding inside the scores.
    active = truth.weights > 0
    repeats = case.queries.shape[1] // case.keys.shape[1]
    terms = case.queries.double().abs() @ case.keys.double().abs().repeat_interleave(repeats, dim=1).mT
    scaling = case.options.get("scaling") or case.queries.shape[-1] ** -0.5
    size = (scaling * terms.numpy() + np.abs(truth.score))[active].max(initial=0.0)
    usual = max(usual, 2.0**-24 * (size + 8) * float(case.values.abs().max()))
    exact = error(eager(case, truth, torch.float64))  # but for its float32 softmax
    assert exact <= 2.0**-21 * (size + 8) * float(case.values.abs().max()), "the loop and the formula disagree"
    rounding = max(torch.finfo(dtype).eps, 2.0**-23) * np.abs(truth.out).max()
    assert error(out) <= 2 * (usual + rounding), f"{error(out)} > 2 * ({usual} + {rounding}) in {case}"


def check(case, previous=None, kernel="reference"):
    earlier = None if previous is None else as_mask(previous)
    out, mask = sparse_attention(
        case.queries,
        case.keys,
        case.values,
        case.maskers,
        previous_mask=earlier,
        kernel=kernel,
        return_mask=True,
        **case.options,
    )
    truth = loops.sparse_attention(
        case.queries, case.keys, case.values, case.maskers, previous_mask=previous, **case.options
    )
    check_mask(mask, truth, case)
    check_output(out, truth, case)
    if previous is not None:
        assert torch.equal(earlier.get_dense_mask(), previous), "the previous mask was changed in place"
    return truth


def as_mask(dense):
    return Mask.create_mask_from_dense_mask(tuple(dense.shape), dense, dtype=torch.float32)


def sampled_weights(generator, visible, share):
    """Weights of a sampling masker that came earlier: some visible keys with probabilities in (0, 1]."""
    weights = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.003])
    drawn = weights[torch.randint(0, 5, visible.shape, generator=generator)]
    kept = torch.rand(visible.shape, generator=generator) < share
    return drawn * kept * torch.from_numpy(visible)


def registered():
    """The `type` of each of the package's own maskers (other tests may register more)."""
    types = MaskerRegistry.types()
    return sorted(t for t, config in types.items() if config.__module__.startswith("sah_transformers."))


@examples(400)
@given(cases())
def test_stacks_equal_the_loops(case):
    check(case)


@pytest.mark.parametrize("data", DATA)
@examples(40)
@given(st.data())
def test_every_kind_of_data(data, draw):
    check(draw.draw(cases(stacks=RANKING, data=[data])))


@pytest.mark.parametrize("mask", MASKS)
@examples(25)
@given(st.data())
def test_every_kind_of_mask(mask, draw):
    check(draw.draw(cases(masks=[mask])))


@examples(80)
@given(cases(), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.95]))
def test_earlier_weights_stay_and_divide_the_output(case, seed, share):
    if not case.maskers:
        case.maskers = [{"type": "sink", "sink_size": 1}]
    mask, is_causal = case.options["attention_mask"], case.options["is_causal"]
    visible, _ = loops.visibility(case.shape, mask, is_causal, case.options.get("indices"))
    check(case, sampled_weights(torch.Generator().manual_seed(seed), visible, share))


@pytest.mark.parametrize("kind", registered())
def test_every_registered_masker_has_a_loop(kind):
    assert kind in loops.LOOPS, f"write a loop for {kind!r} in tests/loops.py"
    assert kind in CONFIGS, f"write a strategy for {kind!r} in tests/cases.py"


@pytest.mark.parametrize("kind", [kind for kind in registered() if kind in CONFIGS])
@examples(50)
@given(st.data())
def test_add_mask_equals_the_loops(kind, data):
    sizes = {"rows": (1, 2, 5), "longest": 40} if kind in PUBLISHED else {}
    case = data.draw(cases(stacks=CONFIGS[kind].map(lambda c: [c]), extras=False, **sizes))
    scaling = data.draw(st.sampled_from([case.queries.shape[-1] ** -0.5, 1.0]))
    mask, is_causal = case.options["attention_mask"], case.options["is_causal"]
    visible, _ = loops.visibility(case.shape, mask, is_causal)
    share = data.draw(st.sampled_from([0.0, 0.3]))
    previous = sampled_weights(torch.Generator().manual_seed(0), visible, share)
    earlier = as_mask(previous)
    config = MaskerRegistry.config_class(kind)(**{k: v for k, v in case.maskers[0].items() if k != "type"})
    result = MaskerRegistry.create_masker(config).add_mask(
        keys=case.keys,
        queries=case.queries,
        values=case.values,
        attention_mask=mask,
        scaling=scaling,
        dropout=0.0,
        sparse_meta_data={},
        previous_mask=earlier,
        layer_idx=case.options.get("layer_idx", 0),
        **({"is_causal": True} if is_causal else {}),
    )
    truth = loops.sparse_attention(
        case.queries,
        case.keys,
        case.values,
        case.maskers,
        attention_mask=mask,
        is_causal=is_causal,
        scaling=scaling,
        previous_mask=previous,
        layer_idx=case.options.get("layer_idx", 0),
        given=method_files.given_to(case),
    )
    check_mask(result, truth, case, method_rows if kind in PUBLISHED else rows)
    assert torch.equal(earlier.get_dense_mask(), previous), "the previous mask was changed in place"


def test_many_rows_at_once():
    """Longer than any block of queries that the reference takes at a time."""
    generator = torch.Generator().manual_seed(0)
    B, H, G, Q, K = 1, 2, 1, 520, 520
    case = SimpleNamespace(shape=(B, H, Q, K), label="long", options={"attention_mask": None})
    case.queries, case.keys, case.values = tensors(generator, B, H, G, Q, K, 8, 4, torch.float32, "normal")
    case.maskers = [
        {"type": "sink", "sink_size": 2},
        {"type": "local", "window_size": 0.01},
        {"type": "oracle_top_k", "heavy_size": 0.05},
        {"type": "oracle_top_p", "top_p": 0.3, "gqa": "group"},
    ]
    check(case)


@pytest.mark.parametrize("scaling", [None, 0.3, 128**-0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sums_that_cancel_tie_under_any_scaling(dtype, scaling):
    """`scaling * (q.k)`: products that add up to zero are ties, also where a scaled query would round."""
    generator = torch.Generator().manual_seed(5)
    half = torch.randint(-40, 41, (2, 4, 17, 8), generator=generator).to(dtype)
    queries = torch.cat([half, half], dim=-1)
    half = torch.randint(-999, 1000, (2, 2, 64, 8), generator=generator).to(dtype)
    keys = torch.cat([half, -half], dim=-1)
    keys[:, :, ::5, 0] += 1  # every fifth key scores, positive or negative, the others exactly 0
    values = torch.randn(2, 2, 64, 4, generator=generator).to(dtype)
    stacks = [
        [{"type": "oracle_top_k", "heavy_size": 0.29}, {"type": "oracle_top_k", "heavy_size": 0.05}],
        [{"type": "sink", "sink_size": 3}, {"type": "oracle_top_k", "heavy_size": 0.5, "gqa": "group"}],
        [{"type": "oracle_top_k", "heavy_size": 2}, {"type": "oracle_top_p", "top_p": 0.1}],
    ]
    for stack in stacks:
        case = SimpleNamespace(queries=queries, keys=keys, values=values, maskers=stack)
        case.options = {"attention_mask": None, "scaling": scaling}
        assert check(case).sure.all()


def giants(dtype):
    """Scores beyond float32: +-inf once rounded, so equal; the sign alone decides."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = tensors(generator, 2, 4, 2, 5, 24, 4, 3, torch.float64, "small integers")
    return (q * 2.0**83).to(dtype), (k * 2.0**83).to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_beyond_float32_still_select_and_stay_finite(dtype):
    q, k, v = giants(dtype)
    for size in (1, 3, 0.5, 1.0):
        stack = [{"type": "sink", "sink_size": 1}, {"type": "oracle_top_k", "heavy_size": size}]
        out, mask = sparse_attention(q, k, v, stack, kernel="reference")
        truth = loops.sparse_attention(q, k, v, stack)
        check_mask(mask, truth, stack)
        assert torch.isfinite(out).all()
        assert out.abs().max() <= v.abs().max() * 1.01
    for stack in (
        [{"type": "oracle_top_p", "top_p": 0.9}],
        [{"type": "oracle_top_k", "heavy_size": 3, "gqa": "group"}],
    ):
        out, mask = sparse_attention(q, k, v, stack, kernel="reference")
        assert torch.isfinite(out).all()
        assert (mask.get_dense_mask().sum(-1) > 0).all()


def test_biases_beyond_float32_are_visible():
    """A float64 mask hides from half *its* minimum: -1e300 is a bias, and the keys stay in the count."""
    q, k, v = tensors(torch.Generator().manual_seed(2), 1, 2, 1, 3, 10, 4, 4, torch.float32, "normal")
    mask = torch.zeros(1, 1, 3, 10, dtype=torch.float64)
    mask[..., :8] = -1e300
    mask[:, :, 2] = -1e300
    for stack in ([{"type": "oracle_top_k", "heavy_size": 0.5}], [{"type": "sink", "sink_size": 0.5}], []):
        out, result = sparse_attention(q, k, v, stack, attention_mask=mask, is_causal=False, kernel="reference")
        truth = loops.sparse_attention(q, k, v, stack, attention_mask=mask, is_causal=False)
        check_mask(result, truth, stack)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_groups_rank_rounded_softmaxes_not_scores(heads):
    """Equal float32 scores may differ as softmaxes, and far keys underflow to a tie; a group of one too."""
    q = torch.ones(1, heads, 1, 2)
    close = torch.tensor([[10.0, 0.0], [10.0, 2e-7], [10.0, 1e-7]]).reshape(1, 1, 3, 2)
    far = torch.tensor([[0.0, 0.0], [-1e4, 0.0], [-1e4, 1.0]]).reshape(1, 1, 3, 2)
    top_k = {"type": "oracle_top_k", "heavy_size": 1, "gqa": "group"}
    top_p = {"type": "oracle_top_p", "top_p": 0.5, "gqa": "group"}
    for keys, stack, taken in (
        (close, [top_k], [1]),
        (far, [top_k, top_k], [0, 1]),
        (far, [top_k, top_p], [0, 1, 2]),
    ):
        _, mask = sparse_attention(q, keys, keys, stack, is_causal=False, scaling=1.0, kernel="reference")
        dense = mask.get_dense_mask()
        assert [dense[0, h, 0].nonzero().flatten().tolist() for h in range(heads)] == [taken] * heads
        truth = loops.sparse_attention(q, keys, keys, stack, is_causal=False, scaling=1.0)
        assert (loops.array(dense) == truth.weights).all()


@examples(40)
@given(cases(stacks=st.just([])))
def test_an_empty_stack_is_dense_attention(case):
    truth = check(case)
    assert (truth.weights == truth.visible).all()


@examples(25)
@given(cases())
def test_auto_state_and_masker_objects_change_nothing(case):
    maskers = [dict(c) for c in case.maskers]
    _, first = sparse_attention(case.queries, case.keys, case.values, maskers, kernel="reference", **case.options)
    configs = []
    for c in maskers:
        fields = {k: v for k, v in c.items() if k != "type"}
        configs.append(MaskerRegistry.config_class(c["type"])(**fields))
    objects = [MaskerRegistry.create_masker(c) for c in configs]
    for stack, extra in ((configs, {"state": State()}), (objects, {"kernel": "auto"})):
        out, mask = sparse_attention(case.queries, case.keys, case.values, stack, **extra, **case.options)
        assert torch.equal(mask.get_dense_mask(), first.get_dense_mask())
        alone = sparse_attention(
            case.queries, case.keys, case.values, stack, return_mask=False, **extra, **case.options
        )
        assert torch.equal(alone, out)


def test_hardly_any_row_was_on_a_razors_edge():
    """Runs last: leaving rows out must stay the exception that it claims to be."""
    assert rows["unsure"] <= 1e-3 * rows["seen"], rows
    print(rows)
