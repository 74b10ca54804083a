"""What the published methods need from outside: channel files and weights, made once per size in a folder of a run."""

import atexit
import itertools
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sah_transformers import MaskerRegistry, State, sparse_attention
from sah_transformers.maskers.hash_weights import FORMAT
from sah_transformers.maskers.socket import hyperplanes

FOLDER = Path(tempfile.mkdtemp(prefix="sah-methods-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


# Each method small, to be fitted to a model by `fit`.
DEFAULTS = {
    "quest": {"type": "quest", "heavy_size": 12, "page_size": 4},
    "double_sparsity": {"type": "double_sparsity", "heavy_size": 6, "group_factor": 2, "label_bits": 4},
    "pq_cache": {"type": "pq_cache", "heavy_size": 6, "pq_sub_dim": 8, "pq_bits": 2, "kmeans_iter": 2},
    "hash_attention": {"type": "hash_attention", "heavy_size": 6},
    "socket": {"type": "socket", "heavy_size": 6, "K": 3, "L": 8},
}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def channel_file(heads: int, dim: int, layers: int = 2, seed: int = 0) -> str:
    """Channels of each query head of each layer in a random order, in the format of Double Sparsity's authors."""
    generator = torch.Generator().manual_seed(seed)
    data = {
        f"model.layers.{layer}.self_attn.{what}_proj": [
            torch.randperm(dim, generator=generator).tolist() for _ in range(heads)
        ]
        for layer in range(layers)
        for what in ("qk", "q", "k")
    }
    path = FOLDER / f"channels-{layers}-{heads}-{dim}-{seed}.json"
    path.write_text(json.dumps(data))
    return str(path)


@cache
def weight_file(
    heads: int, groups: int, dim: int, bits: int = 32, shared: bool = False, seed: int = 0, layers: int = 2
) -> str:
    """Random weights of HashAttention's MLPs with 6 hidden numbers, per query head or (`shared`) per KV head."""
    many, sizes = groups if shared else heads, [dim, 6, 6, bits]
    tensors = {}
    names = [f"layers.{layer}.{side}.{i}" for layer in range(layers) for side in "qk" for i in range(3)]
    for number, name in enumerate(names):
        fan_in, fan_out = sizes[number % 3], sizes[number % 3 + 1]
        weight = draw(many, fan_out, fan_in, seed=1000 * seed + number) / fan_in**0.5
        tensors[f"{name}.weight"] = weight.float()
        tensors[f"{name}.bias"] = 0.1 * draw(many, fan_out, seed=1000 * seed + 500 + number).float()
    numbers = {"query_heads": heads, "kv_heads": groups, "head_dim": dim, "bits": bits}
    metadata = {"format": FORMAT, "made_from": json.dumps({"text": "none"}), **{k: str(v) for k, v in numbers.items()}}
    path = FOLDER / f"weights-{layers}-{heads}-{groups}-{dim}-{bits}-{shared}-{seed}.safetensors"
    save_file(tensors, path, metadata=metadata)
    return str(path)


def mlp_of(path: str, heads: int, layer: int, head: int, what: str) -> list:
    """The layers of one head's MLP in a weight file: [(weight [out, in], bias [out])] in float64."""
    tensors = load_file(path)
    name = f"layers.{layer}.{what[0]}"
    many = len(tensors[f"{name}.0.weight"])
    at = head // (heads // many)
    layers = [(tensors[f"{name}.{i}.weight"][at], tensors[f"{name}.{i}.bias"][at]) for i in range(3)]
    return [(weight.double().numpy(), bias.double().numpy()) for weight, bias in layers]


def double_sparsity(heads: int, dim: int, seed: int = 0, **fields) -> dict:
    """A config with channels for models of this size."""
    return {"type": "double_sparsity", **fields, "sorted_channel_file": channel_file(heads, dim, seed=seed)}


def hash_attention(heads: int, groups: int, dim: int, seed: int = 0, shared: bool = False, **fields) -> dict:
    """A config with weights for models of this size."""
    path = weight_file(heads, groups, dim, fields.get("hat_bits", 32), shared, seed)
    return {"type": "hash_attention", **fields, "hat_weight_file": path}


def fit(masker: dict, heads: int, groups: int, dim: int) -> dict:
    """The config of a published method for models of this size; any other as it is."""
    kind, masker = masker["type"], dict(masker)
    if kind == "double_sparsity":
        masker["group_factor"] = min(masker["group_factor"], dim)
        return double_sparsity(heads, dim, **{name: value for name, value in masker.items() if name != "type"})
    if kind == "hash_attention":
        return hash_attention(heads, groups, dim, **{name: value for name, value in masker.items() if name != "type"})
    if kind == "pq_cache":
        masker["pq_sub_dim"] = min(masker["pq_sub_dim"], dim)
    return masker


def given_to(case) -> dict:
    """What the loops are handed of what the package made or drew: planes, codebooks, and the weights of a file."""
    heads, dim = case.queries.shape[1], case.queries.shape[3]
    given = {}
    for masker in case.maskers:
        if masker["type"] == "socket":
            tables, planes = masker.get("L", 60), masker.get("K", 12)
            drawn = [hyperplanes(layer, tables, planes, dim).double().numpy() for layer in (0, 1)]
            given["socket"] = lambda layer, head, drawn=drawn: drawn[layer]
        if masker["type"] == "hash_attention":
            path = masker["hat_weight_file"]
            given["hash_attention"] = cache(lambda *at, path=path: mlp_of(path, heads, *at))
        if masker["type"] == "pq_cache":
            given["pq_cache"] = codebooks(case, masker)
    return given


def codebooks(case, masker: dict) -> dict:
    """{(b, g, m): (centroids, largest norm)} that the package made of the sequences with enough keys."""
    state, names = State(), ("attention_mask", "is_causal", "indices", "layer_idx")
    options = {name: case.options[name] for name in names if name in case.options}
    sparse_attention(case.queries, case.keys, case.values, [masker], state=state, return_mask=False, **options)
    (layer,) = state.layers.values()
    side = layer.side(MaskerRegistry.create_masker(masker))
    books = {}
    for b, ready in enumerate(side.get("ready", [])):
        for g, m in itertools.product(*map(range, side["centroids"].shape[1:3])) if ready else ():
            largest = 0.0
            if "radius" in side:
                largest = float(side["radius"][b, g, m]) ** 0.5 * float(side["step"][b, g, m])
            books[b, g, m] = side["centroids"][b, g, m].double().numpy(), largest
    return books


def put_preset_files(folder: Path, heads: int, groups: int, dim: int, layers: int = 2) -> None:
    """The files that presets name, for models of this size, in the folder that they are looked for in."""
    shutil.copy(channel_file(heads, dim, layers), folder / "model.channels.json")
    shutil.copy(weight_file(heads, groups, dim, layers=layers), folder / "model.hash.safetensors")
