"""The layers of a step repeat the first one's launches: they give the bits that every layer's own calls give.

Without a GPU a stand-in for compiled kernels runs the interpreter on the addresses that it is launched with.
"""

import ctypes
from dataclasses import replace

import pytest
import torch
from kernel_process import DEVICE, GPU, interpreter_test, kernel_test, mostly_slow, passes_in_the_interpreter
from sparse_models import build, left_padded, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import sah_transformers
from sah_transformers import AppendingCache, State, repeat, sparse_attention
from sah_transformers.kernels.tape import Address, Tape, new, note, recording

WINDOWS = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 3}]
STACKS = {
    "windows": WINDOWS,
    "top-k": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 3}],
    "top-k per kv head": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 0.2, "gqa": "group"}],
    "top-p": [*WINDOWS, {"type": "oracle_top_p", "top_p": 0.6}],
    "quest": [*WINDOWS, {"type": "quest", "heavy_size": 4, "page_size": 2}],
    "quest per kv head": [*WINDOWS, {"type": "quest", "heavy_size": 0.2, "page_size": 4, "gqa": "group"}],
}
all_stacks = pytest.mark.parametrize("name", mostly_slow(STACKS, "top-k", "quest per kv head"))
two_stacks = pytest.mark.parametrize("name", mostly_slow(["top-k", "quest per kv head"], "quest per kv head"))
LAYERS = 2


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__, poison=True)


def at(address, dtype):
    """A tensor there."""
    there = (ctypes.c_byte * 16).from_address(address)
    return torch.frombuffer(there, dtype=dtype, count=1)


def built(kernel, grid, args, constants, warps, cap=None, fuse=True):
    """What `kernels.built` gives where kernels are compiled."""
    kernel[grid](*args, **constants)
    kinds = [arg.dtype if isinstance(arg, torch.Tensor) else None for arg in args]

    def run(x, y, z, stream, function, metadata, hooks, enter, leave, *rest):
        given = [arg if kind is None else at(arg, kind) for arg, kind in zip(rest, kinds, strict=False)]
        kernel[x, y, z](*given, **dict(zip(constants, rest[len(kinds) :], strict=True)))

    return run, "function", "metadata", tuple(constants.values())


@pytest.fixture
def played(monkeypatch):
    """How often a tape was played."""
    from sah_transformers.kernels.approximate import pipeline, place
    from sah_transformers.kernels.decode import kernel

    if not GPU:
        few = replace(pipeline.tuning_of(4, 16), group_programs=8, head_programs=16)
        monkeypatch.setattr(pipeline, "tuning_of", lambda *_: few)
        monkeypatch.setattr(place, "built", built)
        monkeypatch.setattr(kernel, "built", built)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        monkeypatch.setattr(repeat, "on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(place, "_compiled", {})
    monkeypatch.setattr(kernel, "PLANS", {})
    monkeypatch.setattr(repeat, "_tapes", {})
    counted, original = [], Tape.play
    monkeypatch.setattr(Tape, "play", lambda self, given: counted.append(1) or original(self, given))
    return counted


def model_of(stack, kernel="triton", **options):
    model = build(dtype=torch.float32, num_hidden_layers=LAYERS, **options).to(DEVICE)
    return sah_transformers.enable(model, {"maskers": stack, "kernel": kernel, "prefill": "dense"})


class Steps:
    """A model and a cache, step by step."""

    def __init__(self, model, ids, cache=None, **inputs):
        self.model, self.cache = model, cache or AppendingCache(config=model.config)
        self.logits = [self.read(ids, **inputs)]

    @torch.no_grad()
    def read(self, ids, **inputs):
        return self.model(ids.to(DEVICE), past_key_values=self.cache, **inputs).logits

    def take(self, *tokens, **inputs):
        """One step per token."""
        for token in tokens:
            ids = torch.full((len(self.logits[-1]), 1), token)
            self.logits.append(self.read(ids, **inputs))


def check(story, *models, monkeypatch):
    """`story(*models)`, which gives `Steps`, tells the same with and without tapes."""
    found = story(*models)
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "attend", lambda run, *_: run())
        expected = story(*models)
    for ours, truth in zip(found, expected, strict=True):
        assert len(ours.logits) == len(truth.logits)
        for step, (one, other) in enumerate(zip(ours.logits, truth.logits, strict=True)):
            assert torch.equal(one, other), step


@kernel_test
@all_stacks
def test_the_same_bits(name, played, monkeypatch):
    def story(model):
        steps = Steps(model, prompt(17))
        steps.take(5, 6, 7, 8)
        return [steps]

    check(story, model_of(STACKS[name]), monkeypatch=monkeypatch)
    assert len(played) >= 2 * (LAYERS - 1)  # the first steps compile


@kernel_test
@two_stacks
def test_what_is_done_to_the_cache(name, played, monkeypatch):
    """Cropping, beams, other batches, several tokens at once, keys that are replaced."""

    def story(model):
        steps = Steps(model, prompt(17))
        steps.take(5, 6, 7)
        steps.cache.crop(-2)
        steps.take(10, 11)
        steps.logits.append(steps.read(prompt(3)))
        steps.take(12)
        steps.cache.batch_repeat_interleave(2)
        steps.logits[-1] = steps.logits[-1].repeat_interleave(2, dim=0)
        steps.take(14, 15)
        steps.cache.reorder_cache(torch.tensor([1, 1], device=DEVICE))
        steps.take(17)
        steps.cache.layers[1].keys = steps.cache.layers[1].keys.clone()
        steps.take(19, 20)
        return [steps]

    check(story, model_of(STACKS[name]), monkeypatch=monkeypatch)
    assert len(played) >= 5 * (LAYERS - 1)


@kernel_test
@two_stacks
def test_sequences_and_models_side_by_side(name, played, monkeypatch):
    """Of the same shapes and step by step in turns, one of them with other budgets, padding, scaling."""
    stack = STACKS[name]
    models = [model_of(stack), model_of([*stack[:2], {**stack[2], "heavy_size": 6}]), model_of(stack, seed=1)]
    for layer in models[2].model.layers:
        layer.self_attn.scaling = 0.5
    ids, padding = left_padded([prompt(17), prompt(12, seed=1)])

    def story(*models):
        told = [Steps(model, prompt(17)) for model in models]
        for token in range(5, 9):
            for steps in told:
                steps.take(token)
        padded = Steps(models[0], ids, attention_mask=padding.to(DEVICE))
        for token in range(5, 8):
            grown = torch.nn.functional.pad(padding, (0, token - 4), value=1).to(DEVICE)
            padded.take(token, attention_mask=grown)
        return [*told, padded]

    check(story, *models, monkeypatch=monkeypatch)
    assert len(played) >= 6 * (LAYERS - 1)


@kernel_test
def test_another_configuration(played, monkeypatch):
    settings = {"kernel": "triton", "prefill": "dense"}

    def story(model):
        sah_transformers.enable(model, {"maskers": STACKS["quest"], **settings})
        steps = Steps(model, prompt(17))
        steps.take(5, 6, 7)
        sah_transformers.enable(model, {"maskers": STACKS["quest per kv head"], **settings})
        steps.take(8, 9, 10)
        sah_transformers.enable(model, {"maskers": STACKS["quest"], "min_keys": 25, **settings})
        steps.take(11, 12, 13)
        return [steps]

    check(story, model_of(WINDOWS), monkeypatch=monkeypatch)
    assert len(played) >= 3 * (LAYERS - 1)


@kernel_test
def test_side_data_of_a_static_cache(played, monkeypatch):
    """Nothing is left out for maskers that are kept up to date while others read a prompt."""
    settings = {"kernel": "triton", "prefill": WINDOWS, "decode_max_queries": 2}

    def story(model):
        sah_transformers.enable(model, {"maskers": STACKS["quest"], **settings})
        steps = Steps(model, prompt(5), StaticCache(config=model.config, max_cache_len=24))
        steps.logits += [steps.read(prompt(4, seed=seed)) for seed in range(3)]
        steps.take(5, 6)
        return [steps]

    check(story, model_of(WINDOWS), monkeypatch=monkeypatch)


@kernel_test
def test_a_launch_that_fails(played, monkeypatch):
    """Neither keys nor side data stay."""
    fails = []

    def story(model):
        steps = Steps(model, prompt(17))
        steps.take(5, 6, 7, 8)
        if not fails:
            monkeypatch.setattr(Tape, "play", failing)
            with pytest.raises(RuntimeError, match="no luck"):
                steps.take(9)
            monkeypatch.setattr(Tape, "play", original)
            assert fails
            assert steps.cache.get_seq_length() == 21
        steps.take(10, 11, 12)
        return [steps]

    def failing(self, given):
        fails.append(original(self, given))
        raise RuntimeError("no luck")

    original = Tape.play
    check(story, model_of(STACKS["quest"]), monkeypatch=monkeypatch)


@kernel_test
def test_gradients_weights_and_recorders_take_no_tape(played, monkeypatch):
    model = model_of(STACKS["top-k"], kernel="auto")
    steps = Steps(model, prompt(17))
    steps.take(5, 6, 7)
    before = len(played)
    with sah_transformers.record(model):
        steps.take(8)
    model(torch.full((1, 1), 9, device=DEVICE), past_key_values=steps.cache).logits.sum().backward()
    assert len(played) == before


@kernel_test
@all_stacks
def test_nothing_but_launches_is_left_out(name, played, monkeypatch):
    """PyTorch computes nothing in a call that is recorded."""

    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names, tapes = set(), 0
    original = repeat.recording

    def heard(given):
        recorded = original(given)
        modes.append(Heard())

        class Both:
            def __enter__(self):
                modes[-1].__enter__()
                return recorded.__enter__()

            def __exit__(self, *error):
                recorded.__exit__(*error)
                modes[-1].__exit__(*error)

        return Both()

    modes = []
    steps = Steps(model_of(STACKS[name]), prompt(17))
    steps.take(*range(5, 10))  # compiled, and room for more pages is made
    monkeypatch.setattr(repeat, "recording", heard)
    if not GPU:  # the interpreter computes with PyTorch
        from sah_transformers.kernels.approximate import place
        from sah_transformers.kernels.decode import kernel

        silent = (lambda *args: None, None, None)
        for plan in kernel.PLANS.values():
            plan.compiled = [(*silent, entry[3]) for entry in plan.compiled]
        known = {kind: (*silent, entry[3]) for kind, entry in place._compiled.items()}
        monkeypatch.setattr(place, "_compiled", known)
    tapes = len(repeat._tapes)
    steps.take(10)
    assert len(repeat._tapes) == tapes + 1
    assert names <= {"empty", "fill_", "slice", "expand", "view", "detach", "alias", "unsqueeze", "arange"}


def tensors(seed, keys=17, rows=1, dtype=torch.float32):
    """Queries, keys and values of a call without a model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, 4, rows, 16), (1, 2, keys, 16), (1, 2, keys, 16)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def without_tapes(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "attend", lambda run, *_, **__: run())
        return call()


@kernel_test
@all_stacks
@torch.no_grad()
def test_calls_without_a_model(name, played, monkeypatch):
    """From the third of a kind on; what tells two calls apart tells their tapes apart."""
    kinds = [{}, {"scaling": 1.5}, {"is_causal": False}, {"softcap": 2.0}, {"sinks": torch.arange(4.0, device=DEVICE)}]
    for kind in kinds if name in ("windows", "top-k") else kinds[:1]:
        before = len(played)
        for given in map(tensors, range(4)):

            def call(given=given, kind=kind):
                state = State()  # of one sequence, which comes at once
                options = {"kernel": "triton", "return_mask": False, "state": state, **kind}
                return sparse_attention(*given, STACKS[name], **options)

            assert torch.equal(call(), without_tapes(monkeypatch, call)), kind
        assert len(played) - before == (0 if "quest" in name else 2)  # the first key of a sequence is no step


@kernel_test
@torch.no_grad()
def test_layers_without_a_model(played, monkeypatch):
    """Side data of layers that follow a sequence; budgets that are equal numbers but not the same."""

    def story(stack):
        state, outs = State(), []
        for keys in range(17, 20):
            for layer in range(3):
                given = tensors(layer, 24)
                given = [given[0], *(tensor[:, :, :keys] for tensor in given[1:])]
                options = {"kernel": "triton", "return_mask": False, "state": state, "layer_idx": layer}
                outs.append(sparse_attention(*given, stack, **options))
        return outs

    for stack in (STACKS["quest"], STACKS["top-k"]):
        before = len(played)
        found = story(stack)
        assert len(played) - before >= 2
        assert all(map(torch.equal, found, without_tapes(monkeypatch, lambda stack=stack: story(stack))))
    one, all_of_them = ([{"type": "oracle_top_k", "heavy_size": size}] for size in (1, 1.0))
    for stack in (one, all_of_them, one, one, all_of_them):

        def call(stack=stack):
            return sparse_attention(*tensors(0), stack, kernel="triton", return_mask=False)

        assert torch.equal(call(), without_tapes(monkeypatch, call))
    assert not torch.equal(call(), call(one))


@kernel_test
@torch.no_grad()
def test_calls_without_a_model_that_are_not_repeated(played):
    """Masks, and whatever is refused is refused after calls of its shapes as well."""
    given, stack = tensors(0), STACKS["top-k"]
    for _ in range(4):
        sparse_attention(*given, stack, attention_mask=torch.ones(1, 17), kernel="triton", return_mask=False)
        sparse_attention(*given, stack, kernel="triton")
        sparse_attention(*given, stack, kernel="reference", return_mask=False)
    assert not played
    for _ in range(4):
        sparse_attention(*given, stack, kernel="triton", return_mask=False)
    assert len(played) == 2
    for wrong, message in (
        ([given[0], None, given[2]], "keys must be"),
        ([*given[:2], given[2][:, :, 1:]], "values must"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(*wrong, stack, kernel="triton", return_mask=False)


def recorded(*args, given, whole=True):
    """A tape of one launch."""
    with recording(given) as record:
        out = new((4,), torch.float32, torch.device("cpu"))
        note((lambda *got: got, "f", "m", (8,)) if whole else None, (1, 2, 3), [out, *args])
    return record.tape(out)


def test_tapes_know_what_they_cannot_repeat():
    x, y = torch.zeros(4), torch.zeros(4)
    assert recorded(x, 5, given=[x])
    assert recorded(Address(x.data_ptr()), 5, given=[x])
    assert not recorded(x, y, given=[x])  # a tensor of its own
    assert not recorded(x, given=[x, x[:2]])  # which of the two?
    assert not recorded(x, given=[x], whole=False)
    with recording([x]) as record:
        note((print, "f", "m", ()), (1, 1, 1), [x])
    assert not record.tape(torch.zeros(4))  # what the call gave was made elsewhere


def test_a_tape_is_played_on_other_tensors(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    x, y, launched = torch.zeros(4), torch.zeros(4), []
    with recording([x]) as record:
        out, scratch = new((4,), torch.float32, x.device), new((512,), torch.uint8, x.device)
        part = Address(scratch.data_ptr() + 256)
        note((lambda *got: launched.append(got), "f", "m", (8,)), (1, 2, 3), [out, x, part, int(x.data_ptr()), 0.5])
    number, found = x.data_ptr(), record.tape(out).play([y])
    assert found.shape == out.shape
    (got,) = launched
    assert got[:9] == (1, 2, 3, 7, "f", "m", None, None, None)
    assert got[9:11] == (found.data_ptr(), y.data_ptr())
    assert got[12:] == (number, 0.5, 8)


def test_calls_within_a_recorded_one_are_not_noted():
    x = torch.zeros(4)
    with recording([x]) as record:
        with recording([x]):
            note(None, (1, 1, 1), [])
        assert record.whole
    note(None, (1, 1, 1), [])
