"""One launch that appends a token to a static cache, against PyTorch's: in Triton's interpreter and on a GPU."""

import copy

import pytest
import torch
from kernel_process import DEVICE, INTERPRETED, interpreter_test, kernel_test, passes_in_the_interpreter
from transformers import LlamaConfig
from transformers.cache_utils import StaticLayer

from sah_transformers.integration import static_layer
from sah_transformers.integration.cache_state import carrying, state_of
from sah_transformers.integration.static_layer import OneLaunchLayer, one_launch_cache


@interpreter_test
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel was launched."""
    counted, original = [], static_layer.append_token

    def append_token(*given):
        counted.append(given)
        return original(*given)

    monkeypatch.setattr(static_layer, "append_token", append_token)
    return counted


def token(B, G, n, D, DV, dtype, seed):
    """Keys and values as a model's projections give them: heads behind tokens."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (B, n, G, D), (B, n, G, DV)
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).transpose(1, 2) for s in shapes]


def held(layer):
    return layer.keys, layer.values, layer.cumulative_length


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + [torch.bfloat16] * (not INTERPRETED))
@pytest.mark.parametrize(("B", "G", "D", "DV"), [(1, 1, 16, 16), (1, 8, 128, 128), (3, 2, 80, 96), (32, 8, 128, 64)])
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
