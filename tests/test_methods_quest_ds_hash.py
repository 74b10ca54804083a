"""Quest, Double Sparsity and HashAttention: their side data, their files, and what they refuse."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_models import build, sparse

import sah_transformers
from sah_transformers import MaskerRegistry, State, sparse_attention
from sah_transformers.maskers.channel_file import read_channels, write_channels
from sah_transformers.maskers.double_sparsity import dequantise, pack, quantise, unpack
from sah_transformers.maskers.hash_attention import hashes, mlp_outputs, pack_signs, popcount
from sah_transformers.maskers.hash_weights import FORMAT, read_hash_file, write_hash_weights
from sah_transformers.maskers.quest import page_bounds

B, H, G, K, D = 2, 4, 2, 37, 16


def tensors(seed=0, K=K, D=D, dtype=torch.float32, batch=B):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, H, K, D), (batch, G, K, D), (batch, G, K, 6)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def orders(layers=(0, 1), heads=H, dim=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)]) for n in layers}


def mlps(sets=H, dim=D, hidden=12, bits=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(hidden, dim), (hidden, hidden), (bits, hidden)]
    shapes = [((sets, *size), (sets, size[0])) for size in sizes]
    draws = [[torch.randn(shape, generator=generator) for shape in pair] for pair in shapes]
    return [(weight / weight.shape[2] ** 0.5, bias) for weight, bias in draws]


@pytest.fixture
def channels(tmp_path):
    path = tmp_path / "channels.json"
    write_channels(path, orders(), {"model": "tiny"})
    return str(path)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    layers = {n: {"q": mlps(seed=2 * n), "k": mlps(seed=2 * n + 1)} for n in (0, 1)}
    write_hash_weights(path, layers, H, G, {"model": "tiny"})
    return str(path)


def double_sparsity(path, **fields):
    return {"type": "double_sparsity", "heavy_size": 5, "sorted_channel_file": str(path), **fields}


def hash_attention(path, **fields):
    return {"type": "hash_attention", "heavy_size": 5, "hat_weight_file": str(path), **fields}


def side_of(config, q, k, v, **options):
    """The side data of a masker after one call on new sequences, and its state."""
    state = State()
    sparse_attention(q, k, v, [config], state=state, return_mask=False, **options)
    return state.layer(options.get("layer_idx", 0)).side(MaskerRegistry.create_masker(config)), state


def dense(q, k, v, stack, **options):
    return sparse_attention(q, k, v, stack, **options)[1].get_dense_mask()


# Quest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_bound_is_above_every_score_in_its_page(padding, dtype):
    """And reached by the best vector between the page's bounds; bounds are numbers that are in the page."""
    q, k, v = tensors(dtype=dtype)
    mask = torch.ones(B, K)
    mask[1, :padding] = 0
    config = {"type": "quest", "heavy_size": 8, "page_size": 4}
    masker = MaskerRegistry.create_masker(config)
    side, _ = side_of(config, q, k, v, attention_mask=mask)
    assert side["low"].dtype == dtype
    context = sah_transformers.Context(side=side)
    bounds = masker.score(q, k, v, context)  # [B, H, Q, P]
    scores = q.double() @ k.double().repeat_interleave(H // G, 1).transpose(-1, -2)
    for b, start in ((0, 0), (1, padding)):
        for j in range(start, K):
            page = (j - start) // 4
            assert (bounds[b, :, :, page] >= scores[b, :, :, j] - 1e-5).all()
            assert (side["low"][b, :, page] <= k[b, :, j]).all()
            assert (side["high"][b, :, page] >= k[b, :, j]).all()
        for page in range(-(-(K - start) // 4)):
            held = k[b, :, start + 4 * page : start + 4 * page + 4]
            assert torch.equal(side["low"][b, :, page], held.amin(1))
            assert torch.equal(side["high"][b, :, page], held.amax(1))
    assert page_bounds(context)[0].isfinite().all()


def test_bounds_take_32_bytes_per_key():
    q, k, v = tensors(K=64, D=128, dtype=torch.bfloat16)
    _, state = side_of({"type": "quest", "heavy_size": 8}, q, k, v)
    assert state.layer(0).bytes_per_key() == G * 32


@pytest.mark.parametrize("gqa", ["head", "group"])
@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_whole_pages_and_the_rows_own(size, gqa):
    """Every row takes ceil(budget / page) pages, its own among them, and every key that it sees of each."""
    q, k, v = tensors()
    budget = 7
    mask = dense(q, k, v, [{"type": "quest", "heavy_size": budget, "page_size": size, "gqa": gqa}])
    for row in range(K):
        for b in range(B):
            for h in range(H):
                taken = {j // size for j in mask[b, h, row].nonzero().flatten().tolist()}
                assert row // size in taken
                assert len(taken) == min(math.ceil(budget / size), row // size + 1)
                assert mask[b, h, row].tolist() == [j <= row and j // size in taken for j in range(K)]


@pytest.mark.parametrize("gqa", ["head", "group"])
def test_the_future_does_not_count(gqa):
    """Keys behind the row, in its own page and later ones, change nothing."""
    q, k, v = tensors()
    stack = [{"type": "quest", "heavy_size": 8, "page_size": 4, "gqa": gqa}]
    before = dense(q, k, v, stack)
    for row in (9, 21, 26):
        other = k.clone()
        other[:, :, row + 1 :] *= -50
        assert torch.equal(dense(q, other, v, stack)[:, :, row], before[:, :, row])


def test_pages_of_one_key_are_top_k():
    """The bound of a page of one key is its score."""
    q, k, v = tensors()
    for gqa in ("head", "group"):
        last = [{"type": "local", "window_size": 1}]
        fields = {"heavy_size": 6, "gqa": gqa}
        ours = dense(q, k, v, [*last, {"type": "quest", "page_size": 1, **fields}])
        if gqa == "head":  # in a group, the softmax leaves out the row's own page
            assert torch.equal(ours, dense(q, k, v, [*last, {"type": "oracle_top_k", **fields}]))
        assert (ours.sum(-1)[:, :, 10:] == 7).all()


def test_a_page_longer_than_the_sequence_is_everything():
    q, k, v = tensors()
    assert torch.equal(dense(q, k, v, [{"type": "quest", "heavy_size": 1, "page_size": 64}]), dense(q, k, v, []))


@pytest.mark.parametrize("length", [20, 18, 17, 16, 3])
def test_cropped_in_a_page_then_other_keys(length):
    """What is kept after a crop and other keys is what these keys alone give; so is what is selected."""
    (q, k, v), (q2, k2, v2) = tensors(), tensors(seed=1)
    mask = torch.ones(B, K)
    mask[1, :3] = 0
    config = {"type": "quest", "heavy_size": 8, "page_size": 4}
    _, state = side_of(config, q[:, :, :25], k[:, :, :25], v[:, :, :25], attention_mask=mask[:, :25])
    state.crop(length)
    mixed = [torch.cat([a[:, :, :length], b[:, :, length:]], 2) for a, b in ((q, q2), (k, k2), (v, v2))]
    masker = MaskerRegistry.create_masker(config)
    for stop in (length + 1, length + 3, length + 12):
        q3, k3, v3 = (t[:, :, :stop] for t in mixed)
        new = stop - state.layer(0).length
        ours = dense(q3[:, :, -new:], k3, v3, [config], state=state, attention_mask=mask[:, :stop])
        fresh, _ = side_of(config, q3, k3, v3, attention_mask=mask[:, :stop])
        kept = state.layer(0).side(masker)
        assert all(torch.equal(kept[name], fresh[name]) for name in ("low", "high"))
        assert torch.equal(ours, dense(q3, k3, v3, [config], attention_mask=mask[:, :stop])[:, :, -new:])


# Double Sparsity


@pytest.mark.parametrize("width", [1, 2, 7, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trips(bits, width):
    codes = torch.randint(0, 2**bits, (2, 3, 5, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == math.ceil(width / (8 // bits))
    assert torch.equal(unpack(packed, bits, width), codes)


def test_the_first_channel_is_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_labels_are_within_half_a_step(bits, scale):
    label = scale * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    codes, low, step = quantise(label, bits)
    error = (dequantise(codes, low, step) - label).abs().amax(-1)
    span = label.amax(-1) - label.amin(-1)
    assert (error <= span / (2**bits - 1) * 0.5 + label.abs().amax(-1) * 2**-10).all()
    assert (codes.amin(-1) == 0).all()
    assert (codes.amax(-1) >= 2**bits - 2).all()


def test_labels_of_constants_extremes_and_padding():
    for value in (0.0, 3.5, -1e-9, 1e5, -1e30):
        codes, low, step = quantise(torch.full((2, 4), value), 4)
        assert dequantise(codes, low, step).isfinite().all()
    assert dequantise(*quantise(torch.full((2, 4), 3.5), 4)).tolist() == [[3.5] * 4] * 2


def test_labels_take_12_bytes_per_query_head(tmp_path):
    write_channels(tmp_path / "c.json", orders(dim=128))
    q, k, v = tensors(K=20, D=128, dtype=torch.bfloat16)
    _, state = side_of(double_sparsity(tmp_path / "c.json"), q, k, v)
    assert state.layer(0).bytes_per_key() == H * 12


@pytest.mark.parametrize("bits", [4, 16])
def test_stored_labels_are_the_channels_of_each_head_and_layer(channels, bits):
    q, k, v = tensors()
    config = double_sparsity(channels, group_factor=4, label_bits=bits)
    masker = MaskerRegistry.create_masker(config)
    for layer, order in orders().items():
        side, _ = side_of(config, q, k, v, layer_idx=layer)
        labels = masker.labels(sah_transformers.Context(side=side), D // 4, torch.float32)
        for h in range(H):
            exact = k[:, h // (H // G)][..., order[h, : D // 4]]
            step = (exact.amax(-1) - exact.amin(-1))[..., None] / 15
            assert ((labels[:, h] - exact).abs() <= (0 if bits == 16 else 0.51 * step + 1e-2 * step)).all()
    assert not torch.equal(*(dense(q, k, v, [config], layer_idx=layer) for layer in (0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_channels_unquantised_are_oracle_top_k(channels, dtype):
    q, k, v = tensors(dtype=dtype)
    config = double_sparsity(channels, group_factor=1, label_bits=16)
    assert torch.equal(dense(q, k, v, [config]), dense(q, k, v, [{"type": "oracle_top_k", "heavy_size": 5}]))


def test_heads_of_a_shard(channels, weights):
    """`head_offset` names the first local head: shards select what the whole selects."""
    q, k, v = tensors()
    for config in (double_sparsity(channels, group_factor=2), hash_attention(weights)):
        for gqa in ("head", "group"):
            stack = [{**config, "gqa": gqa}]
            whole = dense(q, k, v, stack, layer_idx=1)
            for shard in range(2):
                local = q[:, 2 * shard : 2 * shard + 2], k[:, shard : shard + 1], v[:, shard : shard + 1]
                part = dense(*local, stack, layer_idx=1, head_offset=2 * shard)
                assert torch.equal(part, whole[:, 2 * shard : 2 * shard + 2])


# HashAttention


def test_popcount_and_packing():
    words = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 0x55555555, -2], dtype=torch.int32)
    assert popcount(words).tolist() == [0, 1, 32, 31, 1, 16, 31]
    numbers = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    numbers[0, :3] = torch.tensor([0.0, -0.0, -1e-30])
    packed = pack_signs(numbers)
    assert packed.shape == (5, 3)
    assert packed.dtype == torch.int32
    for row, signs in zip(packed.tolist(), (numbers >= 0).tolist(), strict=True):
        assert [bool(row[i // 32] >> (i % 32) & 1) for i in range(96)] == signs + [False] * 26


@pytest.mark.parametrize(("bits", "sets"), [(32, H), (7, G), (70, H)])
def test_scores_are_products_of_signs(tmp_path, bits, sets):
    path = tmp_path / "w.safetensors"
    query, key = mlps(sets, bits=bits), mlps(sets, bits=bits, seed=1)
    write_hash_weights(path, {0: {"q": query, "k": key}}, H, G)
    q, k, v = tensors()
    config = hash_attention(path, hat_bits=bits)
    side, state = side_of(config, q, k, v)
    assert state.layer(0).bytes_per_key() == sets * 4 * math.ceil(bits / 32)
    scores = MaskerRegistry.create_masker(config).score(q, k, v, sah_transformers.Context(side=side, heads=H))
    assert scores.dtype == torch.float32
    signs = [torch.where(by_hand(x, mlp) >= 0, 1.0, -1.0) for x, mlp in ((q, query), (k, key))]
    assert torch.equal(scores, (signs[0] @ signs[1].transpose(-1, -2)).float())


def by_hand(x, mlp):
    """[B, H, n, bits], head by head."""
    outs = []
    for h in range(H):
        y = x[:, h * x.shape[1] // H].double()
        for i, (weight, bias) in enumerate(mlp):
            at = h * len(bias) // H
            y = torch.nn.functional.linear(y, weight[at].double(), bias[at].double())
            y = y * torch.sigmoid(y) if i < 2 else y
        outs.append(y)
    return torch.stack(outs, 1)


def test_a_hash_depends_on_its_key_alone(monkeypatch):
    """However many keys are hashed at once; the MLPs can be trained through."""
    k, mlp = tensors()[1], mlps()
    whole = hashes(k, mlp)
    assert torch.equal(torch.cat([hashes(one, mlp) for one in k.split(1, 2)], 2), whole)
    monkeypatch.setitem(sys.modules["sah_transformers.maskers.hash_attention"].AT_ONCE, "cpu", 1)
    assert torch.equal(hashes(k, mlp), whole)
    trained = [(w.requires_grad_(), b) for w, b in mlp]
    mlp_outputs(k, trained).sum().backward()
    assert all(w.grad.abs().sum() > 0 for w, _ in trained)


def test_signs_are_those_of_float64():
    """Numbers that a rounding of float32 moves across zero."""
    k, mlp = tensors()[1], mlps()
    for key in range(5):
        weight, bias = mlp[-1]
        near = by_hand(k, [*mlp[:-1], (weight, torch.zeros_like(bias))])[0, :, key]
        moved = [*mlp[:-1], (weight, -near.float())]
        assert torch.equal(hashes(k, moved), pack_signs(by_hand(k, moved)))


# Files


def test_files_round_trip(tmp_path, channels, weights):
    for layer, order in orders().items():
        assert read_channels(channels, "qk_proj")[layer].tolist() == order.tolist()
    assert json.loads(Path(channels).read_text())["made_from"] == {"model": "tiny"}
    file = read_hash_file(weights)
    assert (file.query_heads, file.kv_heads, file.head_dim, file.bits) == (H, G, D, 32)
    assert (file.layers, file.made_from) == ({0: H, 1: H}, {"model": "tiny"})
    assert sorted(os.listdir(tmp_path)) == ["channels.json", "weights.safetensors"]


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model.", "model.decoder."])
def test_other_prefixes_load(tmp_path, prefix):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({f"{prefix}layers.3.self_attn.qk_proj": [[1, 0]], "other": 1}))
    assert read_channels(str(path), "qk_proj")[3].tolist() == [[1, 0]]


def test_a_changed_file_is_read_again(channels):
    q, k, v = tensors()
    stack = [double_sparsity(channels, group_factor=4)]
    before = dense(q, k, v, stack)
    write_channels(channels, orders(seed=1))
    os.utime(channels, ns=(1, 1))
    assert not torch.equal(dense(q, k, v, stack), before)


def broken_channels(change):
    data = {f"model.layers.{n}.self_attn.qk_proj": order.tolist() for n, order in orders().items()}
    return json.dumps(change(data) or data)


ONE = "model.layers.1.self_attn.qk_proj"
CHANNEL_FAULTS = {
    "truncated": (lambda d: None, -40, "cannot be read as JSON"),
    "a list": (lambda d: [1], None, "must hold a mapping"),
    "no layer": (lambda d: {"model.layers.0.self_attn.k_proj": [[0]]}, None, "no entry that ends in"),
    "no lists": (lambda d: d.update({ONE: 3}), None, f"{ONE} must be a list"),
    "an empty layer": (lambda d: d.update({ONE: []}), None, f"{ONE} must be a list"),
    "NaN": (lambda d: d[ONE][2].__setitem__(0, math.nan), None, f"{ONE}: head 2 must list whole numbers, got nan"),
    "a float": (lambda d: d[ONE][2].__setitem__(0, 1.0), None, f"{ONE}: head 2 must list whole numbers, got 1.0"),
    "true": (lambda d: d[ONE][2].__setitem__(0, True), None, f"{ONE}: head 2 must list whole numbers, got True"),
    "a channel twice": (lambda d: d[ONE][3].__setitem__(0, d[ONE][3][1]), None, f"{ONE}: head 3 must be a permutation"),
    "a channel too many": (lambda d: d[ONE][1].append(16), None, f"{ONE}: head 1 has 17 channels, head 0 has 16"),
    "a negative channel": (lambda d: d[ONE][0].__setitem__(0, -1), None, "head 0 must be a permutation"),
    "a layer twice": (lambda d: d.update({"m.layers.1.self_attn.qk_proj": d[ONE]}), None, "has layer 1 twice"),
}


@pytest.mark.parametrize("fault", CHANNEL_FAULTS.values(), ids=CHANNEL_FAULTS)
def test_broken_channel_files(tmp_path, fault):
    change, cut, message = fault
    path = tmp_path / "broken.json"
    path.write_text(broken_channels(change)[:cut])
    for use in (MaskerRegistry.create_masker, lambda config: sparse([config])):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            use(double_sparsity(path))
        assert "sorted_channel_file" in str(caught.value)
        assert "broken.json" in str(caught.value)


NAME = "layers.1.k.2.weight"
SIZES = {"format": FORMAT, "query_heads": str(H), "kv_heads": str(G), "head_dim": str(D), "bits": "32"}
WEIGHT_FAULTS = {
    "another format": (lambda t: None, {"format": "pickle"}, "must have the format"),
    "no metadata": (lambda t: None, None, "must have the format"),
    "no head_dim": (lambda t: None, {"head_dim": "many"}, "head_dim must be a whole number"),
    "heads and KV heads": (lambda t: None, {"kv_heads": "3"}, "query_heads must be a multiple of kv_heads"),
    "other heads": (lambda t: None, {"query_heads": "8"}, "weight must have shape [8 or 2"),
    "another dimension": (lambda t: None, {"head_dim": "8"}, "layers.0.q.0.weight must have shape [4 or 2"),
    "other bits": (lambda t: None, {"bits": "64"}, "layers.0.q.2.weight must have shape"),
    "a tensor missing": (lambda t: t.pop(NAME), {}, f"{NAME} is missing"),
    "a bias missing": (lambda t: t.pop("layers.0.q.1.bias"), {}, "layers.0.q.1.bias is missing"),
    "an unknown tensor": (lambda t: t.update({"x": t[NAME].clone()}), {}, "unknown tensor 'x'"),
    "a wrong shape": (lambda t: t.update({NAME: t[NAME][:, :, :-1].clone()}), {}, f"{NAME} must have shape"),
    "too flat": (lambda t: t.update({NAME: t[NAME][0].clone()}), {}, f"{NAME} must have shape"),
    "a wrong bias": (lambda t: t.update({"layers.1.k.2.bias": torch.zeros(H, 3)}), {}, "layers.1.k.2.bias must have"),
    "whole numbers": (lambda t: t.update({NAME: t[NAME].long()}), {}, f"{NAME} must have a floating-point dtype"),
    "nothing": (lambda t: t.clear(), {}, "holds no layer"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS.values(), ids=WEIGHT_FAULTS)
def test_broken_weight_files(tmp_path, weights, fault):
    change, metadata, message = fault
    held = load_file(weights)
    change(held)
    path = tmp_path / "broken.safetensors"
    save_file(held, path, None if metadata is None else {**SIZES, **metadata})
    for use in (MaskerRegistry.create_masker, lambda config: sparse([config])):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            use(hash_attention(path))
        assert "hat_weight_file" in str(caught.value)
        assert "broken.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 200, -8])
def test_truncated_weight_files(tmp_path, weights, size):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Path(weights).read_bytes()[:size])
    with pytest.raises(ValueError, match=r"hat_weight_file: .*cut.safetensors cannot be read as safetensors"):
        MaskerRegistry.create_masker(hash_attention(path))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["q", "k"])
def test_weights_that_are_not_finite(tmp_path, weights, side, value):
    """Found when their layer is first used, before anything of it is kept."""
    held = load_file(weights)
    held[f"layers.1.{side}.1.bias"][2, 3] = value
    path = tmp_path / "nan.safetensors"
    save_file(held, path, SIZES)
    q, k, v = tensors()
    state = State()
    sparse_attention(q, k, v, [hash_attention(path)], state=state)
    with pytest.raises(ValueError, match=rf"nan.safetensors: layers.1.{side}.1.bias must be finite"):
        sparse_attention(q, k, v, [hash_attention(path)], state=state, layer_idx=1)
    assert state.layer(1).length == 0
    assert not state.layer(1).bytes_per_key()


def test_missing_files(tmp_path):
    for config in (double_sparsity(tmp_path / "none"), hash_attention(tmp_path / "none")):
        with pytest.raises(
            ValueError, match=r"_file: cannot read .*none: No such file.*; `sah (calibrate|train) .*` writes one"
        ):
            MaskerRegistry.create_masker(config)
    for config in (double_sparsity(tmp_path), hash_attention(tmp_path)):
        with pytest.raises(ValueError, match="is not a file"):
            MaskerRegistry.create_masker(config)


def test_files_of_other_models(tmp_path):
    """Refused before anything is kept, at load for whole models, which stay as they were."""
    q, k, v = tensors()
    write_channels(tmp_path / "dim.json", orders(dim=8))
    write_channels(tmp_path / "heads.json", orders(heads=6))
    write_channels(tmp_path / "more.json", orders(heads=8))
    write_channels(tmp_path / "layers.json", orders(layers=(0,)))
    for name, sizes in {"dim": (H, G, 8), "heads": (6, 3, D), "more": (8, 4, D), "groups": (H, 1, D)}.items():
        both = {"q": mlps(sizes[0], sizes[2]), "k": mlps(sizes[0], sizes[2])}
        write_hash_weights(tmp_path / f"{name}.st", {0: both, 1: both}, *sizes[:2])
    both = {"q": mlps(), "k": mlps()}
    write_hash_weights(tmp_path / "layers.st", {0: both}, H, G)
    write_hash_weights(tmp_path / "shared.st", {n: {"q": mlps(1), "k": mlps(1)} for n in (0, 1)}, H, 1)
    cases = {
        "dim.json": "layer 1 has 8 channels per head, the model has 16",
        "heads.json": "layer 1 has 6 query heads, the model has 4",
        "layers.json": r"layer 1 is missing \(it has 0\)",
        "dim.st": "is for the head dimension 8, the model has 16",
        "heads.st": "layer 1 has 6 query heads, the model has 4",
        "layers.st": r"layer 1 is missing \(it has 0\)",
        "groups.st": "is for 4 query heads and 1 KV heads, the model has 4 and 2",
        "shared.st": "is for 4 query heads and 1 KV heads, the model has 4 and 2",
    }
    for name, message in cases.items():
        config = (double_sparsity if name.endswith("json") else hash_attention)(tmp_path / name)
        state = State()
        with pytest.raises(ValueError, match=rf"{name}.* {message}|{name}: {message}"):
            sparse_attention(q, k, v, [config], layer_idx=1, state=state)
        assert state.layer(1).length == 0
    for name in ("heads.json", "more.json", "layers.json", "heads.st", "more.st", "layers.st"):
        config = (double_sparsity if name.endswith("json") else hash_attention)(tmp_path / name)
        model = build()
        with pytest.raises(ValueError, match=rf"{name}: layer . (has . query heads, the model has 4|is missing)"):
            sah_transformers.enable(model, [config])
        assert model.config._attn_implementation == "sdpa"


def test_group_factor_beyond_the_head(channels):
    with pytest.raises(ValueError, match="group_factor must be at most the head dimension 16, got 17"):
        sparse_attention(*tensors(), [double_sparsity(channels, group_factor=17)])


def test_bits_are_those_of_the_file(weights):
    with pytest.raises(ValueError, match=r"hat_bits must be 32, that of .*weights.safetensors, got 64"):
        MaskerRegistry.create_masker(hash_attention(weights, hat_bits=64))


WRONG_FIELDS = [
    ({"type": "quest", "heavy_size": 4}, "page_size", [0, -1, 1.5, True, "16", None, math.nan]),
    (double_sparsity("c"), "group_factor", [0, -1, 2.0, True, "8", None]),
    (double_sparsity("c"), "label_bits", [0, 9, 32, 4.0, True, "4", None]),
    (double_sparsity("c"), "channel_selection", ["v_proj", "qk", None, 1]),
    (double_sparsity("c"), "sorted_channel_file", ["", None, 3]),
    (hash_attention("w"), "hat_bits", [0, -1, 32.0, True, "32", None]),
    (hash_attention("w"), "hat_weight_file", ["", None, 3]),
    (hash_attention("w"), "heavy_size", [0, 1.5, True]),
]


@pytest.mark.parametrize(("config", "field", "values"), WRONG_FIELDS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_fields(config, field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^maskers\[0\]\.{field} must be ") as caught:
            sah_transformers.SparseAttentionConfig.parse([{**config, field: value}])
        assert repr(value) in str(caught.value)
    for kind, name in (("double_sparsity", "sorted_channel_file"), ("hash_attention", "hat_weight_file")):
        with pytest.raises(ValueError, match=rf"^maskers\[0\]\.{name} is missing"):
            sah_transformers.SparseAttentionConfig.parse([{"type": kind, "heavy_size": 3}])


def test_no_file_is_read_when_a_config_is_made():
    for config in (double_sparsity("none.json"), hash_attention("none.safetensors")):
        parsed = sah_transformers.SparseAttentionConfig.parse([config])
        assert sah_transformers.SparseAttentionConfig.from_dict(parsed.to_dict()) == parsed


def test_files_are_read_under_any_default_device(channels, weights):
    """Models are built under `torch.device("meta")`: what is loaded meanwhile must not be meta itself."""
    q, k, v = tensors()
    stack = [double_sparsity(channels), hash_attention(weights)]
    with torch.device("meta"):
        for config in stack:
            MaskerRegistry.create_masker(config).check_layer(0, H, D)
    assert dense(q, k, v, stack).sum() > 0


def test_windowed_layers_have_no_pages():
    config = {"maskers": [{"type": "quest", "heavy_size": 4}], "sliding_layers": "sparse"}
    report = sah_transformers.supported(sparse(config, name="Gemma3ForCausalLM"))
    assert [layer.sparse for layer in report.layers] == [False, True]
    assert "quest needs whole pages" in report.layers[0].reason


def test_importing_needs_no_file():
    code = "import sah_transformers; print(sorted(sah_transformers.MaskerRegistry.types()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(kind in out for kind in ("quest", "double_sparsity", "hash_attention"))
