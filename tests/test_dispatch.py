"""Which kernel a call gets, and what happens where a kernel cannot be built. No GPU: kernels are stand-ins."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from kernel_process import in_triton

from sah_transformers.kernels import decode, dispatch, prefill, select
from sah_transformers.kernels.approximate import place
from sah_transformers.kernels.decode.stack import Stack, read_stack
from sah_transformers.maskers import MaskerRegistry, MaskerStack


class Cuda(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = True


def call_of(kernel, queries=1, cuda=True, keys=40):
    def tensor(*shape):
        return torch.zeros(shape).as_subclass(Cuda) if cuda else torch.zeros(shape)

    stack = [MaskerRegistry.create_masker(config) for config in ({"type": "sink", "sink_size": 4},)]
    visibility = SimpleNamespace(mask=None, valid=None)
    return SimpleNamespace(
        kernel=kernel, visibility=visibility, queries=tensor(1, 4, queries, 16), keys=tensor(1, 2, keys, 16),
        values=tensor(1, 2, keys, 16), maskers=stack, described=tuple(masker.describe() for masker in stack),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing said, nothing known; kernels that take every call and return a name."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_unbuildable", {})
    monkeypatch.setattr(decode, "why_not", lambda call: "")
    monkeypatch.setattr(prefill, "why_not", lambda call: "")
    monkeypatch.setattr(decode, "decode_checked", lambda call: "decoded")
    monkeypatch.setattr(prefill, "prefill", lambda call: "prefilled")
    monkeypatch.setattr(select, "why_not", lambda call: "")
    monkeypatch.setattr(select, "select_mask", lambda call: "selected")


def test_auto_takes_the_kernels_on_cuda():
    assert dispatch.fast_attention(call_of("auto")) == "decoded"
    assert dispatch.fast_attention(call_of("auto", queries=17)) == "prefilled"
    assert dispatch.fast_selection(call_of("auto")) == "selected"


def test_reference_and_other_devices():
    assert dispatch.fast_attention(call_of("reference")) is None
    assert dispatch.fast_attention(call_of("auto", cuda=False)) is None
    assert dispatch.fast_attention(call_of("triton", cuda=False)) == "decoded"  # why_not decides


def test_what_no_kernel_takes_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(decode, "why_not", lambda call: "dropout is on")
    with caplog.at_level(logging.WARNING):
        assert dispatch.fast_attention(call_of("auto")) is None
        assert dispatch.fast_attention(call_of("auto")) is None
    assert [record.getMessage() for record in caplog.records] == ["kernel 'auto' takes the reference: dropout is on"]
    with pytest.raises(ValueError, match="kernel 'triton' cannot take this call: dropout is on"):
        dispatch.fast_attention(call_of("triton"))


def test_a_kernel_that_cannot_be_built(monkeypatch, caplog):
    """The reference, one line in the log, and no second attempt."""
    attempts = []
    fail = in_triton("out of resource: shared memory, Required: 196608, Hardware limit: 101376")
    monkeypatch.setattr(decode, "decode_checked", lambda call: attempts.append(1) or fail(call))
    with caplog.at_level(logging.WARNING):
        assert dispatch.fast_attention(call_of("auto")) is None
        assert dispatch.fast_attention(call_of("auto")) is None
    assert len(attempts) == 1
    (record,) = caplog.records
    assert "cannot be built here: RuntimeError: out of resource" in record.getMessage()
    assert dispatch.fast_attention(call_of("auto", queries=17)) == "prefilled"
    with pytest.raises(RuntimeError, match="out of resource"):
        dispatch.fast_attention(call_of("triton"))


def test_a_mask_kernel_that_cannot_be_built(monkeypatch, caplog):
    """Longer rows need more registers: the shorter ones keep their kernel, and so does attention."""
    fail = in_triton("out of resource: threads")
    monkeypatch.setattr(select, "select_mask", lambda call: "selected" if call.keys.shape[2] < 1000 else fail(call))
    with caplog.at_level(logging.WARNING):
        assert dispatch.fast_selection(call_of("auto", keys=5000)) is None
        assert dispatch.fast_selection(call_of("auto", keys=5001)) is None
    assert len(caplog.records) == 1
    assert dispatch.fast_selection(call_of("auto")) == "selected"
    assert dispatch.fast_attention(call_of("auto", keys=5000)) == "decoded"
    assert dispatch.fast_selection(call_of("auto", cuda=False)) is None
    with pytest.raises(RuntimeError, match="out of resource"):
        dispatch.fast_selection(call_of("triton", keys=5000))


@pytest.mark.parametrize(
    "error",
    [
        in_triton("Triton Error [CUDA]: an illegal memory access was encountered"),
        in_triton("CUDA out of memory", torch.cuda.OutOfMemoryError),
    ],
)
def test_faults_are_not_hidden(monkeypatch, error):
    monkeypatch.setattr(decode, "decode_checked", error)
    with pytest.raises(RuntimeError):
        dispatch.fast_attention(call_of("auto"))


def test_errors_of_our_own_are_not_hidden(monkeypatch):
    def fail(call):
        raise TypeError("a mistake")

    monkeypatch.setattr(decode, "decode_checked", fail)
    with pytest.raises(TypeError):
        dispatch.fast_attention(call_of("auto"))


def test_a_kernel_that_cannot_append(monkeypatch, caplog):
    """Side data are then PyTorch's, with one line in the log."""
    from sah_transformers import State, sparse_attention
    from sah_transformers.kernels import append

    monkeypatch.setattr(append, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(append, "fold", in_triton("out of resource: threads"))
    monkeypatch.setattr(append, "_unbuildable", set())
    stack = [{"type": "quest", "heavy_size": 8, "page_size": 4}]
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    state, other = State(), State()
    with caplog.at_level(logging.WARNING):
        for keys in (30, 31, 40):
            part = (q, k[:, :, :keys], v[:, :, :keys])
            out = sparse_attention(*part, stack, state=state, return_mask=False)
            expected = sparse_attention(*part, stack, state=other, return_mask=False, kernel="reference")
            assert torch.equal(out, expected)
    assert [record.getMessage() for record in caplog.records if "written by PyTorch" in record.getMessage()] == [
        "side data of QuestTopKMasker are written by PyTorch: out of resource: threads"
    ]


class Kernel:
    """A Triton kernel of two arguments and a constant."""

    arg_names = ("k", "n", "D")

    def __init__(self):
        self.looked_up, self.launched = 0, []

    @property
    def fn(self):
        return type(self)

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.looked_up += 1
            return SimpleNamespace(run=lambda *a: self.launched.append(a), function="f", packed_metadata="m")

        return launch


def test_launches_of_a_known_kind_are_not_looked_up_again(monkeypatch):
    monkeypatch.setattr(place, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    kernel, launch, keys = Kernel(), place.Direct(), torch.zeros(64)
    launch(kernel, (1, 2, 3), keys, 5, D=8)
    assert (kernel.looked_up, kernel.launched) == (1, [])
    launch(kernel, (4, 1, 1), keys, 6, D=8)
    assert kernel.launched == [(4, 1, 1, 7, "f", "m", None, None, None, keys.data_ptr(), 6, 8)]
    for n, of, dim in (
        (1, keys, 8),
        (16, keys, 8),
        (2**31, keys, 8),
        (5, keys[1:], 8),
        (5, keys.half(), 8),
        (5, keys, 4),
    ):
        looked_up = kernel.looked_up
        launch(kernel, (1, 1, 1), of, n, D=dim)
        assert kernel.looked_up == looked_up + 1
    assert len(kernel.launched) == 1


def stack_of(size):
    return MaskerStack([MaskerRegistry.create_masker({"type": "sink", "sink_size": size})])


def test_what_is_read_of_a_stack_is_its_own():
    """A budget of one key equals one of all keys as a number, and nothing else."""
    one, everything = stack_of(1), stack_of(1.0)
    assert one.described == everything.described
    assert one.described.read(read_stack, 1).first == (1, 0.0)
    assert everything.described.read(read_stack, 1).first == (1, 1.0)
    assert one.described.read(read_stack, 1) is one.described.read(read_stack, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_of_a_stack(copied):
    stack = stack_of(3)
    assert isinstance(stack.described.read(read_stack, 1), Stack)
    other = copied(stack)
    assert type(other) is MaskerStack
    assert other.described == stack.described
    assert other[0] is not stack[0]
