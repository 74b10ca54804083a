"""Channel orders and trained hashes: against loops, resumed, interrupted, and read by their maskers."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sparse_models import STACK, build, generate, logits, prompt, selections
from test_cli import folder, sah  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import sah_transformers
from sah_transformers.integration.listen import layers_to_hear, listening
from sah_transformers.maskers import hash_weights
from sah_transformers.maskers.channel_file import read_channels, write_channels
from sah_transformers.maskers.hash_attention import hashes, mlp_outputs, popcount
from sah_transformers.maskers.hash_weights import mlp_on, read_hash_file
from sah_transformers.prepare import (
    HashSettings,
    calibrate_double_sparsity,
    hash_run,
    hash_start,
    hash_training,
    origin_of,
    read_text,
    train_hash_attention,
)
from sah_transformers.prepare.hash_checkpoint import folder_of

BLOCKS = prompt(48, batch=2)
SMALL = {"bits": 16, "hidden": 16, "rows": 24, "top": 4, "sink": 2, "local": 4}


def train(path, model=None, blocks=BLOCKS, tell=None, restart=False, made_from=None, **settings):
    settings = HashSettings(**{**SMALL, "steps": 6, "lr": 1e-2, **settings})
    model = build(dtype=torch.float32) if model is None else model
    return train_hash_attention(model, blocks, path, made_from or {"text": "random"}, settings, tell, restart)


def contents(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def assert_same_file(a, b):
    (tensors, about), (others, other) = contents(a), contents(b)
    assert about == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def queries_and_keys(model, ids):
    """{layer: (queries [H, n, D], keys [G, n, D])}, made from the projections by hand."""
    found = {}

    def hook(module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        q, k = (one(hidden).view(shape).transpose(1, 2) for one in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        found[module.layer_idx] = q[0].detach(), k[0].detach()

    modules = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


# the text


def test_the_text_that_ships_is_prose_without_repetition():
    text = read_text()
    assert 2500 <= len(text.content.split()) <= 4000
    sentences = [one.strip() for one in re.split(r"(?<=[.?!])\s", text.content) if one.strip()]
    assert len(set(sentences)) == len(sentences)
    assert text.name == "sah_transformers/texts/essays.txt"


def test_bad_texts(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read_text(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_text(tmp_path / "latin.txt")


# listening


def test_heard_are_the_queries_and_keys_after_the_rotary_embedding():
    model, heard = build(), {}
    with listening(model, lambda layer, q, k: heard.update({layer: (q[0], k[0])})) as read:
        read(BLOCKS[:1])
    expected = queries_and_keys(model, BLOCKS[:1])
    assert heard.keys() == expected.keys() == {0, 1}
    for layer, pair in expected.items():
        for one, other in zip(heard[layer], pair, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_model_is_left_as_it_was(sparse, fails):
    """A sparse model is heard dense, and is sparse again."""
    model = build()
    dense = queries_and_keys(model, BLOCKS[:1])
    if sparse:
        sah_transformers.enable(model, STACK)
    model.train()
    model.model.layers[0].eval()
    before = logits(model, BLOCKS)
    state = model.config.to_dict(), model.config._attn_implementation, [m.training for m in model.modules()]
    held, heard = [set(m.__dict__) for m in model.modules()], {}

    def hear(layer, queries, keys):
        heard[layer] = queries[0]
        if fails and layer == 1:
            raise RuntimeError("in the midst")

    try:
        with listening(model, hear) as read:
            read(BLOCKS[:1])
    except RuntimeError:
        assert fails
    torch.testing.assert_close(heard[1], dense[1][0])
    assert (model.config.to_dict(), model.config._attn_implementation) == state[:2]
    assert [m.training for m in model.modules()] == state[2]
    assert [set(m.__dict__) - {"_sah_plan"} for m in model.modules()] == [one - {"_sah_plan"} for one in held]
    assert torch.equal(logits(model, BLOCKS), before)
    assert (model.config.sparse_attention is not None) == sparse


def test_layers_that_the_model_windows():
    model = build("Gemma3ForCausalLM")
    every, full = layers_to_hear(model), layers_to_hear(model, windowed=False)
    assert set(full) < set(every)
    assert sorted(calibrate_double_sparsity(model, BLOCKS)) == every


# channels


@pytest.mark.parametrize("selection", ["qk_proj", "q_proj", "k_proj"])
def test_channels_are_in_the_order_of_an_independent_loop(selection):
    model = build()
    calls = []
    channels = calibrate_double_sparsity(model, BLOCKS, selection, lambda *at: calls.append(at))
    assert calls == [(1, 2), (2, 2)]
    heard = [queries_and_keys(model, ids[None]) for ids in BLOCKS]
    for layer in (0, 1):
        assert channels[layer].shape == (4, 16)
        for head in range(4):
            mean = np.zeros(16)
            for both in heard:
                q, k = (one.numpy() for one in both[layer])
                for token in range(48):
                    for d in range(16):
                        one, other = q[head, token, d], k[head // 2, token, d]
                        mean[d] += abs({"qk_proj": one * other, "q_proj": one, "k_proj": other}[selection]) / 96
            assert channels[layer][head].tolist() == sorted(range(16), key=lambda d: (-mean[d], d))
    if selection == "k_proj":  # two query heads share a KV head
        assert torch.equal(channels[0][0], channels[0][1])
        assert not torch.equal(channels[0][0], channels[0][2])


def test_among_equal_channels_the_lower_one_is_first():
    model = build()
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    assert calibrate_double_sparsity(model, BLOCKS)[1].tolist() == [list(range(16))] * 4


def test_channels_are_not_ordered_by_nan():
    model = build()
    model.model.layers[0].self_attn.k_proj.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="layer 0: queries or keys are not finite"):
        calibrate_double_sparsity(model, BLOCKS)
    with pytest.raises(ValueError, match="selection must be one of"):
        calibrate_double_sparsity(model, BLOCKS, "v_proj")


def test_a_channel_file_is_read_by_the_masker_and_refused_by_another_model(tmp_path):
    path, model = str(tmp_path / "channels.json"), build()
    channels = calibrate_double_sparsity(model, BLOCKS)
    write_channels(path, channels, {"model": "tiny"})
    data = json.loads((tmp_path / "channels.json").read_text())
    assert data.pop("made_from") == {"model": "tiny"}
    assert list(data) == ["model.layers.0.self_attn.qk_proj", "model.layers.1.self_attn.qk_proj"]
    assert data["model.layers.1.self_attn.qk_proj"] == channels[1].tolist()
    assert read_channels(path, "qk_proj")[0].tolist() == channels[0].tolist()
    stack = [{"type": "double_sparsity", "heavy_size": 5, "group_factor": 4, "sorted_channel_file": path}]
    sah_transformers.enable(model, stack)
    with selections() as log:
        generate(model, prompt(20))
    assert {int(n) for entry in log for n in (entry.mask[..., -1, :] > 0).sum(-1).flatten()} == {5}
    with pytest.raises(ValueError, match="the model has 2; was it made for another model"):
        sah_transformers.enable(build(num_attention_heads=2, num_key_value_heads=2), stack)


# hashes: the parts


def drawn(seed=0, heads=4, groups=2, tokens=40, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(many, tokens, dim, generator=generator) for many in (heads, groups))


def loop_best(queries, keys, row, head, settings):
    """The candidates of a row in the order of their scores."""
    k = keys[head // (len(queries) // len(keys))]
    found = [j for j in range(settings.sink, row + 1) if j <= row - settings.local]
    return sorted(found, key=lambda j: -float(queries[head, row].double() @ k[j].double()))


def test_the_best_keys_and_the_loss_equal_loops():
    settings = HashSettings(bits=5, hidden=6, top=3, sink=2, local=4, alpha=7.0, threshold=0.5)
    (queries, keys), rows = drawn(), range(10, 30)
    generator = torch.Generator().manual_seed(1)
    sizes = [(4, 6, 8), (4, 6), (4, 6, 6), (4, 6), (4, 5, 6), (4, 5)]
    weights = {side: [torch.randn(size, generator=generator) for size in sizes] for side in "qk"}
    candidates, best = hash_training.best_keys(queries[:, 10:30], keys, rows, settings)

    def code(tensors, head, x):
        for i in range(3):
            x = tensors[2 * i][head].double().numpy() @ x + tensors[2 * i + 1][head].double().numpy()
            x = x / (1 + np.exp(-x)) if i < 2 else np.tanh(x)
        return x

    losses = []
    for head in range(4):
        for at, row in enumerate(rows):
            order = loop_best(queries, keys, row, head, settings)
            assert candidates[at].nonzero()[:, 0].tolist() == sorted(order)
            assert best[head, at].nonzero()[:, 0].tolist() == sorted(order[:3])
            q = code(weights["q"], head, queries[head, row].double().numpy())
            for j in order:
                p = 1 / (1 + np.exp(0.5 - q @ code(weights["k"], head, keys[head // 2, j].double().numpy())))
                losses.append(-7 * np.log(p) if j in order[:3] else -np.log(1 - p))
    loss = hash_training.loss_of(queries[:, 10:30], keys, rows, weights, settings)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_recall_is_that_of_the_hashes_in_the_file(tmp_path):
    """Measured again through the file, with packed signs and Hamming distances."""
    model, path = build(dtype=torch.float32), tmp_path / "hash.safetensors"
    measured = train(path, model, shared=True)
    settings = HashSettings(**SMALL)
    hits = near = total = 0
    for ids in BLOCKS:
        queries, keys = queries_and_keys(model, ids[None])[1]
        codes = [hashes(x[None], mlp_on(str(path), 1, side, x.device))[0] for side, x in (("q", queries), ("k", keys))]
        for head in range(4):
            for row in range(42, 48):
                order = loop_best(queries, keys, row, head, settings)
                score = {j: 16 - 2 * int(popcount(codes[0][head, row] ^ codes[1][head // 2, j])) for j in order}
                ranked = sorted(order, key=lambda j: (-score[j], j))
                hits += len(set(ranked[:4]) & set(order[:4]))
                near += len(set(ranked[: max(4, -(-len(order) // 10))]) & set(order[:4]))
                total += 4
    assert measured[1][1].same == pytest.approx(hits / total)
    assert measured[1][1].near == pytest.approx(near / total)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hidden", [7, 12, 16])
def test_untrained_codes_are_planes_through_centred_keys(hidden, shared):
    """Both sides in the same channels: what they multiply to differs from q k by a number per row."""
    queries, keys = (x[None] for x in drawn())
    queries[..., 3], keys[..., 5] = 0.0, 7.0
    weights = hash_start.first_weights(queries, keys, shared, hidden, 6, seed=0)
    mean = keys[0].double().mean(1)
    outputs = {}
    for side, x in (("q", queries), ("k", keys)):
        mlp = hash_training.as_mlp([tensor.double() for tensor in weights[side]])
        outputs[side] = mlp_outputs(x.double(), mlp)[0]
        assert len(mlp[0][1]) == (2 if shared else 4)
    scale, key_scale = (weights[side][0][:, :3].double() for side in "qk")
    planes_q, planes_k = (outputs[side] for side in "qk")
    rounding = torch.finfo(torch.float32).eps * weights["k"][1].abs().max()  # of the mean that is taken away
    assert planes_k.mean((0, 1)).abs().max() < 2 * rounding
    for head in range(4):
        at = head // 2 if shared else head
        if hidden >= 12:
            torch.testing.assert_close(planes_q[head][:, :3], queries[0, head].double() @ scale[at].T)
            centred = keys[0, head // 2].double() - mean[head // 2]
            torch.testing.assert_close(planes_k[at][:, :3], centred @ key_scale[at].T, atol=1e-4, rtol=1e-4)
            products = scale[at] * key_scale[at]  # of one plane with itself: a cancels, up to the common norm
            ratio = products / products[:, :1]
            planes = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()[:3] ** 2
            torch.testing.assert_close(ratio, planes / planes[:, :1], atol=1e-4, rtol=1e-4)


def test_bad_settings_and_blocks():
    for field, value in (("bits", 0), ("steps", -1), ("rows", 1.5), ("lr", 0.0), ("alpha", float("nan"))):
        with pytest.raises(ValueError, match=field):
            HashSettings(**{field: value})
    with pytest.raises(ValueError, match="block must be larger"):
        HashSettings().trained_rows(256)
    for step in range(20):
        number, rows = hash_training.rows_of_step(HashSettings(**SMALL), 0, step, 2, 48)
        assert number in (0, 1)
        assert (rows.start >= 10, rows.stop <= 42, len(rows)) == (True, True, 24)


# hashes: the run


def test_training_lowers_the_loss_and_raises_the_recall(tmp_path):
    path = tmp_path / "hash.safetensors"
    measured = train(path, blocks=prompt(64, batch=64), steps=200, alpha=5.0, hidden=32, lr=3e-3)
    for before, after in measured.values():
        assert after.loss < 0.7 * before.loss
        assert after.same > before.same
        assert after.near >= after.same > before.planes_same
    about = read_hash_file(str(path)).made_from
    assert about["text"] == "random"
    assert about["steps"] == 200
    assert about["recall"]["after"]["same"] > about["recall"]["before"]["same"]
    assert not folder_of(path).exists()


@pytest.mark.parametrize("shared", [False, True])
def test_a_weight_file_is_read_by_the_masker_and_refused_by_another_model(tmp_path, shared):
    path, model = tmp_path / "hash.safetensors", build()
    train(path, model, shared=shared)
    file = read_hash_file(str(path))
    assert (file.query_heads, file.kv_heads, file.head_dim, file.bits) == (4, 2, 16, 16)
    assert file.layers == dict.fromkeys((0, 1), 2 if shared else 4)
    stack = [{"type": "hash_attention", "heavy_size": 5, "hat_bits": 16, "hat_weight_file": str(path)}]
    sah_transformers.enable(model, stack)
    with selections() as log:
        generate(model, prompt(20))
    assert {int(n) for entry in log for n in (entry.mask[..., -1, :] > 0).sum(-1).flatten()} == {5}
    with pytest.raises(ValueError, match="the model has 2; was it made for another model"):
        sah_transformers.enable(build(num_attention_heads=2, num_key_value_heads=2), stack)


def test_the_model_is_frozen(tmp_path):
    model = build(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path / "hash.safetensors", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layer_by_layer_where_memory_is_short(tmp_path, monkeypatch):
    train(tmp_path / "a.safetensors")
    monkeypatch.setattr(hash_run, "HELD_BYTES", 96 * 6 * 16 * 4)  # one layer's
    read = []
    train(tmp_path / "b.safetensors", tell=lambda what, done, total: read.append(what))
    assert {what for what in read if what.startswith("reading")} == {
        f"reading the text for layers {layer} to {layer}" for layer in (0, 1)
    }
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    monkeypatch.setattr(hash_run, "HELD_BYTES", 96 * 6 * 16 * 4 - 1)
    with pytest.raises(ValueError, match="96 tokens are too many: a layer's queries and keys fit for 95"):
        train(tmp_path / "c.safetensors")


class Stop(Exception):
    pass


def stop_at(layer, step):
    def tell(what, done, total):
        if what == hash_run.TRAINING and done == 6 * layer + step:
            assert total == 12
            raise Stop

    return tell


@pytest.mark.parametrize(("layer", "step"), [(0, 1), (0, 4), (1, 3), (1, 6)])
def test_resumed_it_writes_the_same_file(tmp_path, monkeypatch, layer, step):
    train(tmp_path / "whole.safetensors")
    monkeypatch.setattr(hash_run, "SAVE_S", 0.0)
    path = tmp_path / "hash.safetensors"
    path.write_bytes(b"an older file")
    with pytest.raises(Stop):
        train(path, tell=stop_at(layer, step))
    assert path.read_bytes() == b"an older file"
    steps = []
    train(path, tell=lambda what, done, total: steps.append(done) if what == hash_run.TRAINING else None)
    assert steps == list(range(6 * layer + step, 13))  # the step before the stop was the last one saved
    assert_same_file(path, tmp_path / "whole.safetensors")
    assert [one.name for one in tmp_path.iterdir() if ".part" in one.name] == []


def test_a_checkpoint_that_is_broken_or_of_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hash_run, "SAVE_S", 0.0)
    path = tmp_path / "hash.safetensors"
    with pytest.raises(Stop):
        train(path, tell=stop_at(1, 3))
    with pytest.raises(ValueError, match="is of another lr, steps: start again with --restart"):
        train(path, steps=7, lr=2e-2)
    with pytest.raises(ValueError, match="is of another model_fingerprint"):
        train(path, made_from={"text": "random", "model_fingerprint": "other"})
    (held,) = folder_of(path).glob("layer-0.safetensors")
    whole = held.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        held.write_bytes(broken)
        with pytest.raises(ValueError, match=r"layer-0.safetensors cannot be read .* --restart"):
            train(path)
    assert not path.exists()
    train(path, restart=True)
    train(tmp_path / "whole.safetensors")
    assert_same_file(path, tmp_path / "whole.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    old = {}
    for name in ("channels.json", "hash.safetensors"):
        (tmp_path / name).write_bytes(b"old")
        old[name] = b"old"

    def half(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(hash_weights, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        train(tmp_path / "hash.safetensors")
    monkeypatch.setattr("pathlib.Path.write_text", lambda part, text, **_: half(None, part, None))
    with pytest.raises(OSError, match="disk full"):
        write_channels(tmp_path / "channels.json", {0: [[0, 1]]})
    left = {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
    assert left == old
    assert folder_of(tmp_path / "hash.safetensors").is_dir()  # what was trained is not lost


def test_models_that_have_no_hashes():
    with pytest.raises(ValueError, match="it has no attention layers"):
        train("x.safetensors", build("MambaForCausalLM", attn="eager"))
    with pytest.raises(ValueError, match="hashes need layers of one shape"):
        hash_run.shape_of(build("Gemma4ForCausalLM"), BLOCKS, [0, 1, 2, 3])


def test_queries_that_are_not_finite(tmp_path):
    model = build(dtype=torch.float32)
    model.model.layers[1].self_attn.q_proj.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="layer 1: queries or keys are not finite"):
        train(tmp_path / "hash.safetensors", model)


# the commands


def test_calibrate_command(folder, tmp_path):  # noqa: F811
    out = tmp_path / "channels.json"
    command = ["calibrate", "double-sparsity", folder, "--out", out]
    assert f"wrote {out}" in sah(*command, "--tokens", 1000, "--block", 100)
    about = json.loads(out.read_text())["made_from"]
    assert (about["model"], about["text"]) == (folder.name, "sah_transformers/texts/essays.txt")
    assert (about["tokens"], about["block"], about["selection"]) == (1000, 100, "qk_proj")
    assert about["text_sha256"] == read_text().sha256
    stack = [{"type": "double_sparsity", "heavy_size": 4, "group_factor": 2, "sorted_channel_file": str(out)}]
    sah("generate", folder, "x" * 50, "--sparse", json.dumps(stack), "--max-new-tokens", 2)


def test_train_command(folder, tmp_path):  # noqa: F811
    out, text = tmp_path / "hash.safetensors", tmp_path / "text.txt"
    text.write_text(read_text().content[:700])
    small = [f"--{name}={value}" for name, value in {**SMALL, "steps": 3, "block": 64}.items()]
    said = sah("train", "hash-attention", folder, "--out", out, "--text", text, *small)
    assert f"wrote {out}" in said
    for word in ("planes", "untrained", "trained", "all"):
        assert word in said
    about = read_hash_file(str(out)).made_from
    assert (about["text"], about["tokens"], about["bits"]) == ("text.txt", 640, 16)
    stack = [{"type": "hash_attention", "heavy_size": 4, "hat_bits": 16, "hat_weight_file": str(out)}]
    sah("generate", folder, "x" * 50, "--sparse", json.dumps(stack), "--max-new-tokens", 2)


def test_train_command_interrupted(folder, tmp_path, monkeypatch):  # noqa: F811
    """Ctrl-C in the midst of the second layer; the first is not trained again."""
    out, text, trained = tmp_path / "hash.safetensors", tmp_path / "text.txt", []
    text.write_text(read_text().content[:300])
    small = [f"--{name}={value}" for name, value in {**SMALL, "steps": 3, "block": 64}.items()]
    command = ["train", "hash-attention", folder, "--out", out, "--text", text, *small]
    train_layer = hash_run.train_layer

    def stopped(*arguments):
        trained.append(arguments[4])
        if trained == [0, 1]:
            raise KeyboardInterrupt
        train_layer(*arguments)

    monkeypatch.setattr(hash_run, "train_layer", stopped)
    assert f"the same command goes on from {folder_of(out)}" in sah(*command, code=130)
    assert "going on from" in sah(*command)
    assert trained == [0, 1, 1, 2]
    assert out.exists()


def test_wrong_use(folder, tmp_path):  # noqa: F811
    both = (["calibrate", "double-sparsity", folder], ["train", "hash-attention", folder, "--sink=2", "--local=4"])
    for command in both:
        assert "--text: cannot read" in sah(*command, "--text", tmp_path / "no.txt", code=2)
        assert "--out: no such folder" in sah(*command, "--out", tmp_path / "no" / "x", code=2)
        assert "--block must be at most 512" in sah(*command, "--block", 513, code=2)
        (tmp_path / "short.txt").write_text("short")
        assert "fewer than one block" in sah(*command, "--text", tmp_path / "short.txt", "--block", 128, code=2)
    assert "--selection must be one of" in sah(*both[0], "--selection", "v_proj", code=2)
    assert "--lr" in sah(*both[1], "--lr", -1, code=2)
    assert "--block must be larger" in sah("train", "hash-attention", folder, "--block", 256, code=2)


def test_the_record_tells_models_apart():
    text = read_text()
    records = [origin_of("tiny", build(seed=seed), text, BLOCKS) for seed in (0, 0, 1)]
    assert records[0] == records[1]
    assert records[0] != records[2]
    assert records[0]["model_shape"]["num_key_value_heads"] == 2
