"""One launch that appends a token to a cache, against PyTorch's: in Triton's interpreter and on a GPU."""

import copy

import pytest
import test_cache
import test_repeat
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from kernel_process import DEVICE, GPU, INTERPRETED, in_triton, interpreter_test, kernel_test, passes_in_the_interpreter
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

from sah_transformers import AppendingCache
from sah_transformers.integration import cache, static_layer
from sah_transformers.integration.cache import AppendingLayer
from sah_transformers.integration.cache_state import carrying, state_of
from sah_transformers.integration.static_layer import OneLaunchLayer, one_launch_cache
from sah_transformers.kernels import append


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel was launched; growing caches launch it in the interpreter, too."""
    counted, original = [], static_layer.append_token

    def append_token(*given):
        counted.append(given)
        return original(*given)

    for module in (static_layer, cache):
        monkeypatch.setattr(module, "append_token", append_token)
    monkeypatch.setattr(cache, "on_a_gpu", lambda tensor: True)
    return counted


def token(B, G, n, D, DV, dtype, seed):
    """Keys and values as a model's projections give them: heads behind tokens."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (B, n, G, D), (B, n, G, DV)
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).transpose(1, 2) for s in shapes]


def held(layer):
    return layer.keys, layer.values, layer.cumulative_length


dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + [torch.bfloat16] * (not INTERPRETED))
sizes = pytest.mark.parametrize(
    ("B", "G", "D", "DV"), [(1, 1, 16, 16), (1, 8, 128, 128), (3, 2, 80, 96), (32, 8, 128, 64)]
)


@kernel_test
@dtypes
@sizes
@torch.no_grad()
def test_tokens_are_appended_as_pytorch_does(launches, B, G, D, DV, dtype):
    ours, truth = OneLaunchLayer(9), StaticLayer(9)
    for step, new in enumerate((3, 1, 2, 1, 1)):
        given = token(B, G, new, D, DV, dtype, step)
        assert all(map(torch.equal, ours.update(*given), truth.update(*given)))
        assert all(map(torch.equal, held(ours), held(truth)))
        assert ours.get_seq_length() == truth.get_seq_length()
    assert len(launches) == 3
    assert ours.cumulative_length.shape == ()


@kernel_test
@torch.no_grad()
def test_heads_of_other_strides_and_layers_that_carry_side_data(launches):
    """Keys in a packed projection; a layer that has learned to carry a state; its copy is its own."""
    ours, truth = OneLaunchLayer(6), StaticLayer(6)
    state_of(ours)
    assert type(ours) is carrying(OneLaunchLayer)
    packed = torch.randn(2, 1, 3, 40, device=DEVICE)
    for _ in range(4):
        given = packed[..., :16].transpose(1, 2), packed[..., 17:33].transpose(1, 2)
        ours.update(*given), truth.update(*given)
    assert len(launches) == 3
    copied = copy.deepcopy(ours)
    copied.update(*given), truth.update(*given)
    assert all(map(torch.equal, held(copied), held(truth)))
    assert int(ours.cumulative_length) == 4


@kernel_test
def test_what_the_kernel_does_not_take(launches):
    """Gradients, another dtype (refused by PyTorch), features that do not lie side by side."""
    layer = OneLaunchLayer(6)
    given = token(1, 2, 1, 16, 16, torch.float32, 0)
    layer.update(*given)
    layer.update(*given)  # outside of no_grad
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            layer.update(given[0].half(), given[1].half())
        layer.reset()
        apart = torch.randn(1, 2, 1, 32, device=DEVICE)[..., ::2]
        layer.update(apart, apart)
        layer.update(apart, apart)
    assert not launches


@kernel_test
@torch.no_grad()
def test_nothing_is_written_behind_the_buffer():
    layer = OneLaunchLayer(2)
    given = token(1, 2, 2, 16, 16, torch.float32, 0)
    layer.update(*given)
    before = layer.keys.clone()
    layer.update(*token(1, 2, 1, 16, 16, torch.float32, 1))
    assert torch.equal(layer.keys, before)


def test_layers_of_other_kinds_stay_what_they_are():
    config = LlamaConfig(num_hidden_layers=2)
    assert [type(layer) for layer in one_launch_cache(config, 8).layers] == [OneLaunchLayer] * 2
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 4
    assert [type(layer) is OneLaunchLayer for layer in one_launch_cache(config, 8).layers] == [False, True]
    without = one_launch_cache(LlamaConfig(num_hidden_layers=1), 8).layers[0]
    for new in (2, 1):
        given = torch.ones(1, 1, new, 4)
        assert without.update(given, given)[0].shape == (1, 1, 8, 4)  # on a CPU by PyTorch


# Growing caches


@kernel_test
@dtypes
@sizes
@torch.no_grad()
def test_growing_layers_append_tokens_as_pytorch_does(launches, B, G, D, DV, dtype):
    """By a launch where there is room, and into the same buffer."""
    ours, truth, expected = AppendingLayer(), DynamicLayer(), 0
    for step, new in enumerate((3, 1, 2, *[1] * 15)):
        given = token(B, G, new, D, DV, dtype, step)
        room = ours.key_room
        assert all(map(torch.equal, ours.update(*given), truth.update(*given)))
        assert torch.equal(ours.keys, truth.keys)
        assert torch.equal(ours.values, truth.values)
        expected += new == 1 and ours.key_room is room
    assert len(launches) == expected == 15
    assert ours.get_seq_length() == 21


def on_the_device(*args, **options):
    return [tensor.to(DEVICE) for tensor in states(*args, **options)]


states = test_cache.states


@kernel_test
@settings(deadline=None, max_examples=40)
@for_all(st.lists(test_cache.OPERATIONS | st.tuples(st.just("update"), st.just(1)), max_size=14))
@torch.no_grad()
def test_a_dynamic_cache_in_all_but_speed(operations):
    """And no tensor that the cache ever gave out changes afterwards."""
    ours, theirs, given_out = AppendingCache(), DynamicCache(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cache, "states", on_the_device)
        patch.setattr(cache, "on_a_gpu", lambda tensor: True)
        for one in (ours, theirs):
            one.update(*on_the_device(3), 0)
        for seed, (name, number) in enumerate(operations):
            for tensor in (ours.layers[0].keys, ours.layers[0].values):
                given_out.append((tensor, tensor.clone()))
            ours, theirs = (test_cache.apply(one, name, number, seed) for one in (ours, theirs))
            test_cache.same(ours, theirs)
    for tensor, before in given_out:
        assert torch.equal(tensor, before)


@kernel_test
@torch.no_grad()
def test_cropped_rows_are_written_again_unless_somebody_sees_them(launches):
    growing = AppendingCache()
    place = growing.update(*on_the_device(20), 0)[0].data_ptr()
    for seed in range(3):
        growing.update(*on_the_device(1, seed=seed), 0)
        growing.crop(-1)
    assert growing.layers[0].keys.data_ptr() == place
    assert len(launches) == 3
    seen = growing.update(*on_the_device(1, seed=7), 0)
    before = [tensor.clone() for tensor in seen]
    growing.crop(-1)
    growing.update(*on_the_device(1, seed=9), 0)
    assert all(map(torch.equal, seen, before))
    assert growing.layers[0].keys.data_ptr() != place
    assert len(launches) == 4


@kernel_test
@pytest.mark.skipif(GPU, reason="kernels are compiled there")
@torch.no_grad()
def test_compiled_kernels_are_launched_on_addresses(launches, monkeypatch):
    """Of both kinds of caches, of one program and of several, which do not count."""
    monkeypatch.setattr(append, "built", test_repeat.built)
    monkeypatch.setattr(append, "_token_launches", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    for B in (2, 40):
        static, growing, truth = OneLaunchLayer(9), AppendingLayer(), DynamicLayer()
        for step, new in enumerate((3, 1, 1, 1)):
            given = token(B, 2, new, 64, 48, torch.float32, step)
            held_keys, held_values = truth.update(*given)
            assert all(map(torch.equal, growing.update(*given), (held_keys, held_values)))
            keys, values = static.update(*given)
            assert torch.equal(keys[:, :, : 3 + step], held_keys)
            assert torch.equal(values[:, :, : 3 + step], held_values)
            assert int(static.cumulative_length) == 3 + step
    assert len(launches) == 12
    assert len(append._token_launches) == 4


@kernel_test
def test_what_growing_layers_leave_to_pytorch(launches):
    """The first token, gradients, another type (promoted), features that do not lie side by side, buffers apart."""
    given = token(1, 2, 1, 16, 16, torch.float32, 0)
    apart = torch.randn(1, 2, 1, 32, device=DEVICE)[..., ::2]
    ours, truth = AppendingLayer(), DynamicLayer()
    for layer in (ours, truth):
        with torch.no_grad():
            layer.update(*given)
        layer.update(*given)  # outside of no_grad
        with torch.no_grad():
            layer.update(apart, given[1])
            layer.update(given[0], apart)
            layer.values = layer.values.clone()
            layer.update(*given)  # the values' buffer is a new one
            if layer is ours:
                assert not launches
            layer.update(given[0].double(), given[1])
            layer.update(given[0].double(), given[1])
            layer.update(given[0], given[1].half())
    assert torch.equal(ours.keys, truth.keys)
    assert torch.equal(ours.values, truth.values)
    assert ours.keys.dtype == torch.float64
    assert not launches


@kernel_test
@torch.no_grad()
def test_where_the_kernel_cannot_be_built(launches, monkeypatch, caplog):
    monkeypatch.setattr(append, "built", in_triton("out of resource: shared memory"))
    monkeypatch.setattr(append, "_token_launches", {})
    monkeypatch.setattr(append, "_unbuildable", set())
    ours, truth = AppendingLayer(), DynamicLayer()
    for step in range(5):
        given = token(1, 2, 1, 24, 24, torch.float32, step)
        assert all(map(torch.equal, ours.update(*given), truth.update(*given)))
    assert caplog.text.count("appended to caches by PyTorch") == 1
