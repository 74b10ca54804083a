"""HashAttention: keys ranked by how many bits of a learned hash agree with the query's (arXiv 2412.14468)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from sah_transformers.budget import check_number
from sah_transformers.maskers.hash_weights import FIELD, HashFile, Mlp, mlp_on, read_hash_file
from sah_transformers.maskers.model_files import check_heads, check_path, local_heads, of_layer
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import Context
from sah_transformers.selections import Estimated, Selection

WORD = 32
"""Bits of a stored word."""

AT_ONCE = {"cpu": 2**21, "cuda": 2**25}
"""Hidden numbers held at once while keys or queries are hashed, per device type."""


@dataclass(frozen=True)
class HashAttentionTopKMaskerConfig(TopKMaskerConfig):
    """``heavy_size`` keys by the agreement of ``hat_bits`` signs, per query head or (summed) per KV head.

    Attributes:
        hat_bits: bits of a hash; must be those of the file.
        hat_weight_file: the safetensors file, see ``write_hash_weights``.
    """

    type: ClassVar[str] = "hash_attention"
    hat_bits: int = 32
    hat_weight_file: str = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("hat_bits", self.hat_bits, "an int >= 1")
        if not isinstance(self.hat_bits, int) or self.hat_bits < 1:
            raise ValueError(f"hat_bits must be an int >= 1, got {self.hat_bits!r}")
        check_path(FIELD, self.hat_weight_file, "the trained weights, safetensors")


@MaskerRegistry.register(HashAttentionTopKMaskerConfig)
class HashAttentionTopKMasker(TopKMasker):
    """Selects the keys whose hashes differ least from the query's.

    Two MLPs of three layers with SiLU between them, per layer and query head (or KV head, as the file has it), map
    queries and keys to ``hat_bits`` numbers each; their signs (0 counts as +) are the hash. They are computed in
    float64, so that a sign does not depend on how a matrix product was tiled. Kept is the key's hash, 32 bits to an
    int32, bit i of a word its i-th sign, unused bits 0. score = bits - 2 popcount(query's xor key's), a whole number;
    ``gqa="group"`` sums it over the group's heads. The authors hash per query head too; sign(0) is 0 there.
    """

    config: HashAttentionTopKMaskerConfig
    group_reduce: ClassVar[Literal["softmax", "sum"]] = "sum"
    rounds: ClassVar[bool] = False

    def __init__(self, config: HashAttentionTopKMaskerConfig):
        bits = read_hash_file(config.hat_weight_file).bits
        if bits != config.hat_bits:
            raise ValueError(f"hat_bits must be {bits}, that of {config.hat_weight_file}, got {config.hat_bits}")
        super().__init__(config)

    def check_layer(self, layer_idx: int, heads: int | None, dim: int | None) -> None:
        file = read_hash_file(self.config.hat_weight_file)
        of_layer(f"{FIELD}: {file.path}", file.layers, layer_idx)
        check_heads(f"{FIELD}: {file.path}", layer_idx, file.query_heads, heads)
        if dim is not None:
            check_dim(file, dim)

    def mlp(self, side: str, ctx: Context, heads: int, dim: int, device: torch.device) -> Mlp:
        """The MLPs of the local heads, one per query head or one per KV head.

        Raises:
            ValueError: where the file does not fit the layer.
        """
        file = read_hash_file(self.config.hat_weight_file)
        where = f"{FIELD}: {file.path}"
        check_dim(file, dim)
        sets = of_layer(where, file.layers, ctx.layer_idx)
        local = local_heads(where, file.query_heads, ctx, heads)
        share = file.query_heads // sets  # query heads per MLP
        if local.start % share or heads % share:
            raise ValueError(f"{where}: an MLP serves {share} query heads, the model has {heads} from {local.start} on")
        local = slice(local.start // share, local.stop // share)
        pairs = mlp_on(self.config.hat_weight_file, ctx.layer_idx, side, device)
        if local == slice(0, sets):
            return pairs
        return tuple((weight[local], bias[local]) for weight, bias in pairs)

    def describe(self) -> Selection:
        options = (("bits", self.config.hat_bits),)
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "sum", "hash_attention", options)

    def given(self, ctx: Context, dim: int, device: torch.device) -> Any:
        from sah_transformers.kernels.approximate.hash_attention import given_of

        return given_of(self, ctx.layer_idx, ctx.heads, ctx.head_offset, dim, device)

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        mlp = self.mlp("k", ctx, ctx.heads, keys.shape[-1], keys.device)
        self.mlp("q", ctx, ctx.heads, keys.shape[-1], keys.device)  # a fault there shows before anything is kept
        groups, file = keys.shape[1], read_hash_file(self.config.hat_weight_file)
        if ctx.heads * file.kv_heads != groups * file.query_heads:
            raise ValueError(
                f"{FIELD}: {file.path} is for {file.query_heads} query heads and {file.kv_heads} KV heads, the model "
                f"has {ctx.heads} and {groups}; was it made for another?"
            )
        return {"hash": hashes(keys, mlp)}

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        heads = queries.shape[1]
        query = hashes(queries, self.mlp("q", ctx, heads, queries.shape[-1], queries.device))  # [B, H, q, words]
        kept = ctx.side["hash"]
        kept = kept.repeat_interleave(heads // kept.shape[1], dim=1)
        differing = torch.zeros(*queries.shape[:3], kept.shape[2], dtype=torch.int32, device=kept.device)
        for word in range(kept.shape[-1]):
            differing += popcount(query[..., word, None] ^ kept[:, :, None, :, word])
        return (self.config.hat_bits - 2 * differing).float()


def mlp_outputs(x: torch.Tensor, mlp: Mlp) -> torch.Tensor:
    """The numbers whose signs are the hash; differentiable.

    Args:
        x: ``[B, heads, n, D]``; mlp: for each head, or for each of S heads that read or are read by several.

    Returns:
        ``[B, max(heads, S), n, bits]`` in the dtype of ``x``.
    """
    batch, heads, n, dim = x.shape
    sets = len(mlp[0][1])
    if heads < sets:  # keys under one MLP per query head
        x = x[:, :, None].expand(-1, -1, sets // heads, -1, -1).flatten(1, 2)
    share = x.shape[1] // sets  # queries under one MLP per KV head
    x = x.unflatten(1, (sets, share)).transpose(0, 1).reshape(sets, batch * share * n, dim)
    for number, (weight, bias) in enumerate(mlp):
        x = torch.baddbmm(bias[:, None].to(x.dtype), x, weight.to(x.dtype).transpose(1, 2))
        if number < len(mlp) - 1:
            x = torch.nn.functional.silu(x)
    return x.view(sets, batch, share, n, x.shape[-1]).transpose(0, 1).flatten(1, 2)


def hashes(x: torch.Tensor, mlp: Mlp) -> torch.Tensor:
    """The packed signs of ``mlp_outputs``, int32 ``[B, max(heads, S), n, ceil(bits / 32)]``."""
    heads, width = max(x.shape[1], len(mlp[0][1])), max(weight.shape[1] for weight, _ in mlp)
    if not x.shape[2]:
        words = -(-mlp[-1][1].shape[1] // WORD)
        return torch.empty(x.shape[0], heads, 0, words, dtype=torch.int32, device=x.device)
    limit = AT_ONCE["cuda" if x.device.type == "cuda" else "cpu"]
    step = max(1, limit // max(1, x.shape[0] * heads * width))
    return torch.cat([pack_signs(mlp_outputs(part.double(), mlp)) for part in x.split(step, dim=2)], dim=2)


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """Bit i of word w is whether ``x[..., 32 w + i] >= 0``: int32 ``[..., ceil(bits / 32)]``."""
    bits = torch.nn.functional.pad(x >= 0, (0, -x.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    places = torch.arange(WORD, device=x.device)
    words = (bits.long() << places).sum(-1)
    return (words - ((words >> (WORD - 1)) << WORD)).to(torch.int32)


def popcount(x: torch.Tensor) -> torch.Tensor:
    """Bits set in each int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def check_dim(file: HashFile, dim: int) -> None:
    """Raise ``ValueError`` unless ``file`` is for keys of ``dim`` dimensions."""
    if file.head_dim != dim:
        raise ValueError(
            f"{FIELD}: {file.path} is for the head dimension {file.head_dim}, the model has {dim}; "
            "was it made for another?"
        )
