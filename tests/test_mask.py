"""`Mask`: its algebra over all pairs of forms against plain Python, then a test per promise and per error."""

import itertools
import math
import pickle
import re
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sah_transformers.mask import Mask
from sah_transformers.mask_forms import DenseForm, Form, FullForm, IndexForm, RowWiseForm

EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)

# eighths: every sum and product below is exact in float32, so plain Python is the truth without a tolerance
WEIGHTS = st.sampled_from([0.0, 0.0, 0.0, 0.125, 0.25, 0.5, 0.625, 0.875, 1.0, 1.0])
SHAPES = st.one_of(
    st.sampled_from([(0,), (5,), (3, 0), (0, 4), (2, 0, 3), (1, 1, 1, 1)]),
    st.lists(st.integers(1, 3), min_size=0, max_size=3).flatmap(
        lambda lead: st.integers(1, 5).map(lambda n: (*lead, n))
    ),
)


def tensor(shape, weights, dtype=torch.float32):
    return torch.tensor(weights, dtype=dtype).reshape(shape)


def rows_of(shape, weights):
    n = shape[-1]
    return [weights[r * n : (r + 1) * n] for r in range(math.prod(shape[:-1]))]


def csr(shape, weights, keep_zeros=False):
    """Indices, ptr, data by a loop; with `keep_zeros` every other position of weight 0 is an entry."""
    indices, data, ptr = [], [], [0]
    for r, row in enumerate(rows_of(shape, weights)):
        for j, w in enumerate(row):
            if w > 0 or (keep_zeros and j % 2):
                indices.append(r * shape[-1] + j)
                data.append(w)
        ptr.append(len(indices))
    return torch.tensor(indices, dtype=torch.int64), torch.tensor(ptr), torch.tensor(data)


def slots(shape, weights):
    """Row-wise positions in descending order with unused slots between them, nan as their data."""
    idx, data = [], []
    for row in rows_of(shape, weights):
        for j in reversed(range(shape[-1])):
            idx += [-1, j if row[j] > 0 else -1]
            data += [math.nan, row[j] if row[j] > 0 else math.nan]
    k = (*shape[:-1], 2 * shape[-1])
    return torch.tensor(idx, dtype=torch.int64).reshape(k), torch.tensor(data).reshape(k)


def ones(weights):
    return [float(w > 0) for w in weights]


@dataclass(frozen=True, eq=False)
class ThresholdForm(Form):
    """A foreign form that answers `dense` alone, as the protocol of `Form` promises is enough."""

    weights: torch.Tensor
    name = "threshold"

    def dense(self):
        return self.weights.to(self.dtype)


# form -> (the weights that it can hold, the mask that holds them)
FORMS = {
    "full": (lambda w: [1.0] * len(w), lambda s, w: Mask.create_full_mask(s)),
    "empty": (lambda w: [0.0] * len(w), lambda s, w: Mask.create_empty_mask(s)),
    "dense": (list, lambda s, w: Mask.create_mask_from_dense_mask(s, tensor(s, w))),
    "dense_bool": (ones, lambda s, w: Mask.from_dense_unchecked(tensor(s, w) > 0)),
    "index": (list, lambda s, w: Mask.create_mask_from_indices(s, *csr(s, w, keep_zeros=True))),
    "index_ones": (ones, lambda s, w: Mask.create_mask_from_indices(s, *csr(s, w)[:2])),
    "row_wise": (list, lambda s, w: Mask.create_from_row_wise_idx(s, *slots(s, w))),
    "row_wise_ones": (ones, lambda s, w: Mask.create_from_row_wise_idx(s, slots(s, w)[0])),
    "foreign": (list, lambda s, w: Mask(ThresholdForm(s, torch.float32, torch.device("cpu"), tensor(s, w)))),
}
FORM_IDS = list(FORMS)
PAIRS = list(itertools.product(FORM_IDS, FORM_IDS))


@st.composite
def masks(draw, *forms):
    """A shape, and for each form the weights as a flat list and the mask that holds them."""
    shape = draw(SHAPES)
    size = math.prod(shape)
    out = []
    for form in forms:
        holdable, build = FORMS[form]
        weights = holdable(draw(st.lists(WEIGHTS, min_size=size, max_size=size)))
        out.append((weights, build(shape, weights)))
    return shape, *out


def assert_holds(mask, shape, weights):
    """Everything that a mask answers, against the flat list of its weights."""
    n = len(weights)
    share = sum(w > 0 for w in weights) / n if n else 0.0
    assert mask.shape == shape
    assert mask.dtype == torch.float32
    dense = mask.get_dense_mask()
    assert dense.dtype == torch.float32
    assert dense.is_contiguous()
    assert dense.shape == shape
    assert dense.flatten().tolist() == weights
    assert mask.active().dtype == torch.bool
    assert mask.active().shape == shape
    assert mask.active().flatten().tolist() == [w > 0 for w in weights]
    indices, ptr, data = mask.get_index_mask()
    assert (indices.dtype, ptr.dtype, data.dtype) == (torch.int64, torch.int64, torch.float32)
    for got, want in zip((indices, ptr, data), csr(shape, weights), strict=True):
        assert got.tolist() == want.tolist()
    density = mask.get_density()
    assert isinstance(density, float)
    assert density == share
    assert mask.is_full_mask() is all(w == 1 for w in weights)
    assert mask.is_empty_mask() is all(w == 0 for w in weights)
    assert f"shape={shape}" in repr(mask)
    assert f"density={share:.4g}" in repr(mask)


@pytest.mark.parametrize("form", FORM_IDS)
@EXAMPLES
@given(data=st.data())
def test_answers(form, data):
    shape, (weights, mask) = data.draw(masks(form))
    assert_holds(mask, shape, weights)


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=["+".join(p) for p in PAIRS])
@EXAMPLES
@given(data=st.data())
def test_merge(left, right, data):
    shape, (wa, a), (wb, b) = data.draw(masks(left, right))
    union = [min(1.0, x + y) for x, y in zip(wa, wb, strict=True)]
    merged = a.merge_mask(b)
    assert merged is not a
    assert merged is not b
    assert_holds(merged, shape, union)
    assert_holds(a, shape, wa)
    assert_holds(b, shape, wb)
    assert a.merge_mask(b, inplace=True) is a
    assert_holds(a, shape, union)
    assert_holds(b, shape, wb)


@pytest.mark.parametrize("form", FORM_IDS)
@EXAMPLES
@given(data=st.data())
def test_merge_with_itself(form, data):
    shape, (weights, mask) = data.draw(masks(form))
    twice = [min(1.0, 2 * w) for w in weights]
    assert_holds(mask.merge_mask(mask), shape, twice)
    assert_holds(mask, shape, weights)
    assert_holds(mask.merge_mask(mask, inplace=True), shape, twice)


@pytest.mark.parametrize("form", FORM_IDS)
@EXAMPLES
@given(data=st.data())
def test_density_among_visible(form, data):
    shape, (weights, mask) = data.draw(masks(form))
    axes = len(shape) - data.draw(st.integers(0, len(shape)))
    small = tuple(s if data.draw(st.booleans()) else 1 for s in shape[len(shape) - axes :])
    bits = data.draw(st.lists(st.booleans(), min_size=math.prod(small), max_size=math.prod(small)))
    visible = torch.tensor(bits, dtype=torch.bool).reshape(small)
    seen = visible.expand(shape).flatten().tolist() if weights else []
    hits = sum(w > 0 and v for w, v in zip(weights, seen, strict=True))
    density = mask.get_density(visible=visible)
    assert isinstance(density, float)
    assert density == (hits / sum(seen) if any(seen) else 0.0)


@pytest.mark.parametrize("form", FORM_IDS)
@EXAMPLES
@given(data=st.data())
def test_apply(form, data):
    shape, (weights, mask) = data.draw(masks(form))
    numbers = [(-1) ** i * (i + 3) / 8 for i in range(len(weights))]
    poison = itertools.cycle([math.inf, -math.inf, math.nan])
    x = tensor(shape, [v if w > 0 else next(poison) for v, w in zip(numbers, weights, strict=True)])
    before = x.clone()
    got, inverse = mask.apply_mask(x), mask.apply_inv_mask(x)
    assert got.flatten().tolist() == [v * w if w else 0.0 for v, w in zip(numbers, weights, strict=True)]
    exact = [torch.tensor(v / w).item() if w else 0.0 for v, w in zip(numbers, weights, strict=True)]
    assert inverse.flatten().tolist() == exact
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("form", FORM_IDS)
@pytest.mark.parametrize("mask_type", ["dense", "index"])
@EXAMPLES
@given(data=st.data())
def test_mask_type_only_chooses_the_form(form, mask_type, data):
    shape, (weights, mask) = data.draw(masks(form))
    if form == "full":
        mask = Mask.create_full_mask(shape, mask_type=mask_type)
    elif form == "empty":
        mask = Mask.create_empty_mask(shape, mask_type=mask_type)
    elif form.startswith("dense"):
        mask = Mask.create_mask_from_dense_mask(shape, mask.get_dense_mask(), mask_type=mask_type)
    elif form.startswith("index"):
        mask = Mask.create_mask_from_indices(shape, *csr(shape, weights), mask_type=mask_type)
    else:
        mask = Mask.create_from_row_wise_idx(shape, *slots(shape, weights), mask_type=mask_type)
    assert mask.form.name == mask_type
    assert_holds(mask, shape, weights)


@pytest.mark.parametrize("form", FORM_IDS)
@EXAMPLES
@given(data=st.data())
def test_round_trips(form, data):
    shape, (weights, mask) = data.draw(masks(form))
    assert_holds(Mask.create_mask_from_dense_mask(shape, mask.get_dense_mask()), shape, weights)
    assert_holds(Mask.create_mask_from_indices(shape, *mask.get_index_mask()), shape, weights)
    assert_holds(pickle.loads(pickle.dumps(mask)), shape, weights)


FOUR = [0.25, 0.0, 1.0, 0.5]
BUILT = {name: (holds(FOUR), build((2, 2), holds(FOUR))) for name, (holds, build) in FORMS.items()}


@pytest.mark.parametrize("form", FORM_IDS)
def test_to_moves_a_copy(form):
    weights, mask = BUILT[form]
    moved = mask.to("meta")
    assert moved.device == torch.device("meta")
    assert moved.get_dense_mask().device == torch.device("meta")
    assert moved.active().device == torch.device("meta")
    assert "density=?" in repr(moved)
    assert_holds(mask, (2, 2), weights)
    assert_holds(mask.to("cpu"), (2, 2), weights)


@pytest.mark.parametrize("form", FORM_IDS)
def test_what_is_handed_out_is_not_the_mask(form):
    weights, mask = BUILT[form]
    same = mask.merge_mask(Mask.create_empty_mask((2, 2)))
    for mine in (mask, same):
        mine.get_dense_mask().fill_(0.5)
        for part in mine.get_index_mask():
            part.fill_(0)
    assert_holds(mask, (2, 2), weights)
    assert_holds(same, (2, 2), weights)


def test_public_constructors_copy():
    dense, boolean = tensor((2, 2), FOUR), tensor((2, 2), FOUR) > 0
    (indices, ptr, data), (idx, idx_data) = csr((2, 2), FOUR), slots((2, 2), FOUR)
    made = [
        (FOUR, Mask.create_mask_from_dense_mask((2, 2), dense)),
        (ones(FOUR), Mask.create_mask_from_dense_mask((2, 2), boolean)),
        (FOUR, Mask.create_mask_from_indices((2, 2), indices, ptr, data)),
        (ones(FOUR), Mask.create_mask_from_indices((2, 2), indices, ptr)),
        (FOUR, Mask.create_from_row_wise_idx((2, 2), idx, idx_data)),
        (ones(FOUR), Mask.create_from_row_wise_idx((2, 2), idx)),
    ]
    for given_tensor in (dense, boolean, indices, ptr, data, idx, idx_data):
        given_tensor.zero_()
    for weights, mask in made:
        assert_holds(mask, (2, 2), weights)


def test_constructors_do_not_write_to_their_arguments():
    idx, data = torch.tensor([[2, 0, -1]]), torch.tensor([[0.0, 0.5, 9.0]])
    Mask.create_from_row_wise_idx((1, 3), idx, data)
    assert idx.tolist() == [[2, 0, -1]]
    assert data.tolist() == [[0.0, 0.5, 9.0]]


def test_weights_that_need_gradients_are_detached():
    mask = Mask.create_mask_from_dense_mask((2,), torch.tensor([0.5, 1.0], requires_grad=True))
    assert not mask.get_dense_mask().requires_grad


def test_explicit_zeros_are_not_active():
    idx = torch.tensor([[2, 0], [1, -1]])
    mask = Mask.create_from_row_wise_idx((2, 3), idx, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    assert_holds(mask, (2, 3), [0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    entries = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 3]), torch.tensor([0.5, 0.0, 0.0])
    assert_holds(Mask.create_mask_from_indices((2, 3), *entries), (2, 3), [0.5, 0.0, 0.0, 0.0, 0.0, 0.0])


def test_forms_by_default():
    assert [mask.form.name for _, mask in BUILT.values()] == [
        *("full", "empty", "dense", "dense", "index", "index", "row_wise", "row_wise", "threshold")
    ]


@pytest.mark.parametrize("given_dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float16])
def test_weights_are_float32_by_default(given_dtype):
    weights = torch.tensor([1, 0, 1]).to(given_dtype)
    idx, ptr = torch.arange(3), torch.tensor([0, 3])
    for mask in (
        Mask.create_mask_from_dense_mask((3,), weights),
        Mask.create_mask_from_indices((3,), idx, ptr, weights),
        Mask.create_from_row_wise_idx((3,), idx, weights),
    ):
        assert_holds(mask, (3,), [1.0, 0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_that_is_asked_for(dtype):
    weights, idx, ptr = torch.tensor([0.5, 0.0, 1.0]), torch.arange(3), torch.tensor([0, 3])
    made = [
        Mask.create_mask_from_dense_mask((3,), weights, dtype),
        Mask.create_mask_from_dense_mask((3,), weights > 0, dtype),
        Mask.create_mask_from_indices((3,), idx, ptr, weights, dtype),
        Mask.create_mask_from_indices((3,), idx, ptr, dtype=dtype),
        Mask.create_from_row_wise_idx((3,), idx, weights, dtype=dtype),
        Mask.create_from_row_wise_idx((3,), idx, dtype=dtype),
        Mask.create_full_mask((3,), dtype),
        Mask.create_empty_mask((3,), dtype),
        Mask.from_dense_unchecked(weights, dtype),
        Mask.from_dense_unchecked(weights > 0, dtype),
    ]
    for a, b in itertools.product(made, made):
        merged = a.merge_mask(b)
        for mask in (a, merged):
            assert mask.dtype == dtype
            assert mask.get_dense_mask().dtype == dtype
            assert mask.get_index_mask()[2].dtype == dtype
        assert torch.equal(merged.get_dense_mask(), (a.get_dense_mask() + b.get_dense_mask()).clamp(max=1))


def test_float64_weights_stay_float64():
    third = torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    for mask in (
        Mask.create_mask_from_dense_mask((2,), third),
        Mask.create_mask_from_indices((2,), torch.arange(2), torch.tensor([0, 2]), third),
        Mask.create_from_row_wise_idx((2,), torch.arange(2), third),
    ):
        assert mask.dtype == torch.float64
        assert mask.get_dense_mask().tolist() == [1 / 3, 1.0]
        assert mask.get_index_mask()[2].tolist() == [1 / 3, 1.0]


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_merge_takes_the_wider_dtype(left, right):
    (wa, narrow), (wb, wide) = BUILT[left], BUILT[right]
    wide = Mask.create_mask_from_dense_mask((2, 2), wide.get_dense_mask().double(), mask_type="index")
    for merged in (narrow.merge_mask(wide), wide.merge_mask(narrow)):
        assert merged.dtype == torch.float64
        assert merged.get_dense_mask().dtype == torch.float64
        assert merged.get_dense_mask().flatten().tolist() == [min(1.0, x + y) for x, y in zip(wa, wb, strict=True)]


def test_inverse_weights_are_exact_for_tiny_weights():
    mask = Mask.create_mask_from_dense_mask((3,), torch.tensor([1e-6, 1e-30, 1.0]))
    x = torch.tensor([1.0, 1e-10, 3.0])
    assert mask.apply_inv_mask(x).tolist() == (x / torch.tensor([1e-6, 1e-30, 1.0])).tolist()


def test_apply_promotes_low_precision():
    mask = Mask.create_mask_from_dense_mask((2,), torch.tensor([0.25, 0.0]))
    x = torch.tensor([3.0, 3.0], dtype=torch.bfloat16)
    assert mask.apply_mask(x).dtype == mask.apply_inv_mask(x).dtype == torch.float32
    assert mask.apply_inv_mask(torch.tensor([3, 3])).tolist() == [12.0, 0.0]


def test_apply_gives_finite_gradients():
    mask = Mask.create_mask_from_dense_mask((3,), torch.tensor([0.25, 0.0, 1.0]))
    for apply, want in ((mask.apply_mask, [0.25, 0.0, 1.0]), (mask.apply_inv_mask, [4.0, 0.0, 1.0])):
        x = torch.tensor([1.0, math.inf, 1.0], requires_grad=True)
        apply(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == want


def test_index_forms_stay_linear_in_their_entries():
    """2**42 positions: a dense intermediate would not fit anywhere."""
    shape, n = (2**10, 2**32), 2**32
    ptr = torch.arange(2**10 + 1)
    a = Mask.create_mask_from_indices(shape, torch.arange(2**10) * n, ptr, torch.full((2**10,), 0.5))
    b = Mask.create_from_row_wise_idx(shape, torch.tensor([[0, n - 1, -1]]).repeat(2**10, 1))
    merged = a.merge_mask(b).merge_mask(b)
    assert merged.get_density() == b.get_density() == 2 * 2**10 / 2**42
    assert not merged.is_empty_mask()
    assert not merged.is_full_mask()
    even = (torch.arange(2**10) % 2 == 0)[:, None]
    assert merged.get_density(visible=even) == 2 / n
    lists = b.merge_mask(b)
    assert lists.get_density() == b.get_density()
    indices, ptr, data = merged.get_index_mask()
    assert indices[:3].tolist() == [0, n - 1, n]
    assert ptr.tolist() == list(range(0, 2**11 + 1, 2))
    assert data.unique().tolist() == [1.0]


def test_full_and_empty_hold_nothing():
    shape = (2**21, 2**21)
    full, empty = Mask.create_full_mask(shape), Mask.create_empty_mask(shape)
    assert full.merge_mask(empty).is_full_mask()
    assert empty.merge_mask(empty).is_empty_mask()
    assert full.get_density() == 1.0


def test_unchecked_is_a_view():
    boolean = torch.tensor([[True, False]])
    mask = Mask.from_dense_unchecked(boolean)
    assert mask.active() is boolean
    assert mask.merge_mask(Mask.create_empty_mask((1, 2))).active() is boolean
    weights = torch.tensor([[0.5, 0.0]])
    form = Mask.from_dense_unchecked(weights).form
    assert isinstance(form, DenseForm)
    assert form.dense() is weights
    assert math.isnan(Mask.from_dense_unchecked(torch.tensor([math.nan])).get_dense_mask().item())


def test_boolean_merge_stays_boolean():
    a, b = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    mask = Mask.from_dense_unchecked(a).merge_mask(Mask.from_dense_unchecked(b))
    mask.merge_mask(Mask.create_from_row_wise_idx((3,), torch.tensor([0])), inplace=True)
    assert mask.active().tolist() == [True, True, False]
    assert isinstance(mask.form, DenseForm)
    assert mask.form.tensor.dtype == torch.bool
    assert a.tolist() == [True, False, False]


def test_dense_weights_without_fractions_are_kept_as_bool():
    for weights in (torch.tensor([True, False]), torch.tensor([1, 0])):
        form = Mask.create_mask_from_dense_mask((2,), weights).form
        assert isinstance(form, DenseForm)
        assert form.unit
        assert form.tensor.tolist() == [True, False]


def test_devices_that_are_the_same_by_another_name():
    mask = Mask.create_full_mask((2,), device="cpu:0")
    assert mask.device == torch.zeros(1, device="cpu:0").device
    assert mask.merge_mask(Mask.from_dense_unchecked(torch.zeros(2, device="cpu:0"))).is_full_mask()


def test_inplace_leaves_tensors_handed_out_before():
    boolean = torch.tensor([True, False])
    mask = Mask.from_dense_unchecked(boolean)
    seen, copy = mask.active(), mask.to("cpu")
    mask.merge_mask(Mask.create_full_mask((2,)), inplace=True)
    assert seen.tolist() == copy.active().tolist() == boolean.tolist() == [True, False]


def test_trusted_path_never_waits_for_the_device():
    """A meta tensor has no values: reading one raises."""
    meta = torch.device("meta")
    shape = (1, 2, 3, 8)
    idx = torch.zeros(1, 2, 3, 4, dtype=torch.int64, device=meta)
    trusted = [
        Mask.from_dense_unchecked(torch.zeros(shape, dtype=torch.bool, device=meta)),
        Mask.from_dense_unchecked(torch.zeros(shape, device=meta)),
        Mask(RowWiseForm(shape, torch.float32, meta, idx, None)),
        Mask(RowWiseForm(shape, torch.float32, meta, idx, torch.zeros(1, 2, 3, 4, device=meta))),
        Mask(IndexForm(shape, torch.float32, meta, idx.flatten(), idx.flatten()[:7], None)),
        Mask(FullForm(shape, torch.float32, meta)),
        Mask.create_empty_mask(shape, device="meta"),
    ]
    for a in trusted:
        assert a.active().shape == a.get_dense_mask().shape == shape
        for b in trusted[:2] + trusted[5:]:
            assert a.merge_mask(b).active().shape == shape
            assert b.merge_mask(a).active().shape == shape


def test_forms_as_kernels_build_them():
    cpu = torch.device("cpu")
    index = IndexForm((2, 3), torch.float32, cpu, torch.tensor([0, 5]), torch.tensor([0, 1, 2]), None)
    assert_holds(Mask(index), (2, 3), [1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    not_contiguous = torch.tensor([[0.0, 0.5], [1.0, 0.25], [0.0, 0.0]]).t()
    assert_holds(Mask.from_dense_unchecked(not_contiguous), (2, 3), [0.0, 1.0, 0.0, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_dtype_of_indices(int_dtype):
    idx = torch.tensor([2, 0]).to(int_dtype)
    assert_holds(Mask.create_from_row_wise_idx((3,), idx), (3,), [1.0, 0.0, 1.0])
    mask = Mask.create_mask_from_indices(
        (3,), torch.tensor([0, 2]).to(int_dtype), torch.tensor([0, 2], dtype=int_dtype)
    )
    assert_holds(mask, (3,), [1.0, 0.0, 1.0])


def test_expanded_tensors_are_accepted():
    mask = Mask.create_from_row_wise_idx(
        (3, 4), torch.tensor([1, 2]).expand(3, 2), torch.tensor([0.0, 0.5]).expand(3, 2)
    )
    assert_holds(mask, (3, 4), [0.0, 0.0, 0.5, 0.0] * 3)
    mask = Mask.create_mask_from_dense_mask((2, 2), torch.tensor([0.5, 0.0]).expand(2, 2))
    assert_holds(mask, (2, 2), [0.5, 0.0, 0.5, 0.0])


def test_shape_may_be_any_sequence_of_ints():
    for shape in ([2, 2], torch.Size([2, 2]), (2, 2)):
        assert Mask.create_full_mask(shape).shape == (2, 2)
        assert Mask.create_full_mask(shape).merge_mask(Mask.create_empty_mask((2, 2))).is_full_mask()


def test_threads_may_merge_into_one_operand():
    """No mask writes into a tensor that another may hold."""
    shared = Mask.create_mask_from_dense_mask((64,), torch.full((64,), 0.5))
    results = []

    def work():
        results.append(shared.merge_mask(Mask.create_empty_mask((64,))).merge_mask(shared, inplace=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mask.is_full_mask() for mask in results] == [True] * 4
    assert shared.get_dense_mask().tolist() == [0.5] * 64


def dense(mask, shape=(2, 2), **kwargs):
    return lambda: Mask.create_mask_from_dense_mask(shape, mask, **kwargs)


def index(indices, ptr, data=None, shape=(2, 3), **kwargs):
    as_tensor = [torch.tensor(x) if isinstance(x, list) else x for x in (indices, ptr, data)]
    return lambda: Mask.create_mask_from_indices(shape, *as_tensor, **kwargs)


def row_wise(idx, data=None, shape=(2, 3), **kwargs):
    as_tensor = [torch.tensor(x) if isinstance(x, list) else x for x in (idx, data)]
    return lambda: Mask.create_from_row_wise_idx(shape, *as_tensor, **kwargs)


def merge(other):
    return lambda: Mask.create_full_mask((2, 3)).merge_mask(other)


def density(visible):
    return lambda: Mask.create_full_mask((2, 3)).get_density(visible=visible)


HALF = torch.full((2, 2), 0.5)
NAN = math.nan
META = torch.device("meta")
ERRORS = {
    "shape_empty": (
        lambda: Mask.create_full_mask(()),
        "shape must be at least one size, each an int >= 0, got ()",
    ),
    "shape_negative": (lambda: Mask.create_empty_mask((2, -1)), "an int >= 0, got (2, -1)"),
    "shape_float": (lambda: Mask.create_full_mask((2.0,)), "shape must be a sequence of ints, got (2.0,)"),
    "shape_bool": (lambda: Mask.create_full_mask((True, 2)), "an int >= 0, got (True, 2)"),
    "shape_int": (lambda: Mask.create_full_mask(3), "shape must be a sequence of ints, got 3"),
    "dtype_full": (
        lambda: Mask.create_full_mask((2,), torch.int64),
        "dtype must be float32, float64, bfloat16 or",
    ),
    "dtype_dense": (dense(HALF, dtype=torch.bool), "float16, got torch.bool"),
    "dtype_index": (index([0], [0, 1, 1], dtype=torch.int8), "float16, got torch.int8"),
    "dtype_row": (row_wise([[0], [1]], dtype=torch.int8), "float16, got torch.int8"),
    "type_full": (
        lambda: Mask.create_full_mask((2,), mask_type="csr"),
        "mask_type must be None, 'dense' or 'index'",
    ),
    "type_empty": (lambda: Mask.create_empty_mask((2,), mask_type=1), "'index', got 1"),
    "type_dense": (dense(HALF, mask_type="row_wise"), "got 'row_wise'"),
    "type_index": (index([0], [0, 1, 1], mask_type="full"), "got 'full'"),
    "type_row": (row_wise([[0], [1]], mask_type=True), "got True"),
    "dense_list": (dense([[1.0]]), "mask must be a tensor, got list"),
    "dense_shape": (dense(torch.ones(4)), "mask must have shape [2, 2], got [4]"),
    "dense_broadcast": (dense(torch.ones(1, 2)), "mask must have shape [2, 2], got [1, 2]"),
    "dense_complex": (dense(HALF.to(torch.complex64)), "mask must be real, got torch.complex64"),
    "dense_high": (dense(HALF * 3), "mask must hold weights in [0, 1], got 1.5"),
    "dense_low": (dense(-HALF), "mask must hold weights in [0, 1], got -0.5"),
    "dense_nan": (dense(HALF * NAN), "mask must hold weights in [0, 1], got nan"),
    "dense_inf": (dense(HALF * math.inf), "mask must hold weights in [0, 1], got inf"),
    "dense_int": (dense(torch.tensor([[0, 1], [2, 1]])), "mask must hold weights in [0, 1], got 2"),
    "dense_underflow": (
        dense(HALF * 1e-9, dtype=torch.float16),
        "mask must hold weights that torch.float16 tells",
    ),
    "indices_list": (
        lambda: Mask.create_mask_from_indices((2,), [0], torch.tensor([0, 1])),
        "indices must be a tensor",
    ),
    "indices_2d": (index([[0]], [0, 1, 1]), "indices must have shape [*], got [1, 1]"),
    "indices_float": (index([0.0], [0, 1, 1]), "indices must have an integer dtype, got torch.float32"),
    "indices_bool": (index([True], [0, 1, 1]), "indices must have an integer dtype, got torch.bool"),
    "indices_high": (index([0, 6], [0, 1, 2]), "indices must be in range(0, 6), got 6"),
    "indices_low": (index([-1], [0, 1, 1]), "indices must be in range(0, 6), got -1"),
    "indices_n0": (index([0], [0, 1, 1], shape=(2, 0)), "indices must be in range(0, 0), got 0"),
    "indices_row": (index([0, 4], [0, 2, 2]), "indices must be in the row that ptr puts them in, got 4"),
    "indices_row_before": (
        index([0, 1], [0, 1, 2]),
        "indices must be in the row that ptr puts them in, got 1",
    ),
    "indices_unsorted": (index([2, 1], [0, 2, 2]), "indices must ascend within a row, got 1"),
    "indices_twice": (index([1, 1], [0, 2, 2]), "indices must name no position twice, got 1"),
    "ptr_list": (
        lambda: Mask.create_mask_from_indices((2,), torch.tensor([0]), [0, 1]),
        "ptr must be a tensor, got list",
    ),
    "ptr_short": (index([0], [0, 1]), "ptr must have shape [3], got [2]"),
    "ptr_float": (index([0], [0.0, 1.0, 1.0]), "ptr must have an integer dtype, got torch.float32"),
    "ptr_start": (index([0, 3], [1, 1, 2]), "ptr must start at 0, got 1"),
    "ptr_end": (index([0, 3], [0, 1, 1]), "ptr must end at the number of indices, 2, got 1"),
    "ptr_decreases": (index([0], [0, 2, 1]), "ptr must never decrease, got 1"),
    "ptr_device": (
        index([0], torch.zeros(3, dtype=torch.int64, device=META)),
        "ptr must be on cpu, got meta",
    ),
    "data_list": (
        lambda: Mask.create_from_row_wise_idx((2,), torch.tensor([0]), [1.0]),
        "data must be a tensor, got list",
    ),
    "data_shape": (index([0, 3], [0, 1, 2], [1.0]), "data must have shape [2], got [1]"),
    "data_high": (index([0, 3], [0, 1, 2], [1.0, 1.25]), "data must hold weights in [0, 1], got 1.25"),
    "data_nan": (index([0, 3], [0, 1, 2], [1.0, NAN]), "data must hold weights in [0, 1], got nan"),
    "data_device": (index([0], [0, 1, 1], torch.zeros(1, device=META)), "data must be on cpu, got meta"),
    "data_underflow": (
        index([0], [0, 1, 1], [1e-9], dtype=torch.float16),
        "data must hold weights that torch.float16",
    ),
    "row_list": (lambda: Mask.create_from_row_wise_idx((2,), [0]), "row_wise_idx must be a tensor, got list"),
    "row_shape": (row_wise([[0]]), "row_wise_idx must have shape [2, *], got [1, 1]"),
    "row_flat": (row_wise([0, 1]), "row_wise_idx must have shape [2, *], got [2]"),
    "row_float": (row_wise([[0.0], [1.0]]), "row_wise_idx must have an integer dtype, got torch.float32"),
    "row_high": (
        row_wise([[0], [3]]),
        "row_wise_idx must hold positions in -1..n-1 (n = 3; -1 = unused), got 3",
    ),
    "row_low": (
        row_wise([[0], [-2]]),
        "row_wise_idx must hold positions in -1..n-1 (n = 3; -1 = unused), got -2",
    ),
    "row_n0": (row_wise([[0], [-1]], shape=(2, 0)), "(n = 0; -1 = unused), got 0"),
    "row_twice": (
        row_wise([[0, 1, 0], [1, -1, -1]]),
        "row_wise_idx must name no position twice in a row, got 0",
    ),
    "row_data_shape": (row_wise([[0], [1]], [1.0, 1.0]), "data must have shape [2, 1], got [2]"),
    "row_data_low": (row_wise([[0], [1]], [[1.0], [-0.5]]), "data must hold weights in [0, 1], got -0.5"),
    "row_data_nan": (row_wise([[0], [1]], [[NAN], [0.5]]), "data must hold weights in [0, 1], got nan"),
    "merge_other": (merge(torch.ones(2, 3)), "other must be a Mask, got Tensor"),
    "merge_shape": (
        merge(Mask.create_full_mask((3,))),
        "other must have the shape of this mask, (2, 3), got (3,)",
    ),
    "merge_device": (merge(Mask.create_full_mask((2, 3), device="meta")), "other must be on cpu, got meta"),
    "visible_dtype": (density(torch.ones(2, 3)), "visible must be a bool tensor, got torch.float32"),
    "visible_list": (density([True]), "visible must be a bool tensor, got list"),
    "visible_shape": (
        density(torch.ones(2, dtype=torch.bool)),
        "visible must be broadcastable to [2, 3], got [2]",
    ),
    "visible_rank": (
        density(torch.ones(1, 2, 3, dtype=torch.bool)),
        "broadcastable to [2, 3], got [1, 2, 3]",
    ),
    "visible_device": (
        density(torch.ones(3, dtype=torch.bool, device=META)),
        "visible must be on cpu, got meta",
    ),
    "apply_shape": (lambda: BUILT["full"][1].apply_mask(torch.ones(2)), "x must have shape [2, 2], got [2]"),
    "apply_list": (lambda: BUILT["full"][1].apply_mask([1.0]), "x must be a tensor, got list"),
    "apply_inv_shape": (
        lambda: BUILT["full"][1].apply_inv_mask(torch.ones(1, 2)),
        "x must have shape [2, 2], got [1, 2]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_refused_merge_changes_nothing():
    mask = Mask.create_mask_from_dense_mask((2,), torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="other must have the shape"):
        mask.merge_mask(Mask.create_full_mask((1, 2)), inplace=True)
    assert_holds(mask, (2,), [0.5, 0.0])
