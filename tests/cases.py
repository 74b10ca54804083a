"""Random calls of `sparse_attention` for hypothesis: shapes, masks, dtypes, stacks, data full of ties."""

import math
from dataclasses import dataclass, field

import loops_methods
import method_files
import torch
from hypothesis import strategies as st

HEADS = [(1, 1), (4, 2), (3, 1), (8, 8), (6, 2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BUDGETS = st.sampled_from([1, 2, 3, 5, 16, 100, 1e-4, 0.05, 0.1, 0.29, 0.3, 0.5, 0.9, 1.0])
TOP_P = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 0.999, 1.0]), st.floats(0.01, 0.9999))
GQA = st.sampled_from(["head", "group"])

# One strategy of config dicts per registered `type`.
CONFIGS = {
    "sink": st.fixed_dictionaries({"type": st.just("sink"), "sink_size": BUDGETS}),
    "local": st.fixed_dictionaries({"type": st.just("local"), "window_size": BUDGETS}),
    "causal": st.just({"type": "causal"}),
    "oracle_top_k": st.fixed_dictionaries(
        {"type": st.just("oracle_top_k"), "heavy_size": BUDGETS}, optional={"gqa": GQA}
    ),
    "oracle_top_p": st.fixed_dictionaries(
        {"type": st.just("oracle_top_p"), "top_p": TOP_P},
        optional={"gqa": GQA, "coverage": st.sampled_from(["remaining", "total"])},
    ),
    "random_sampling": st.fixed_dictionaries(
        {"type": st.just("random_sampling"), "sampling_rate": st.sampled_from([1e-4, 0.1, 0.29, 0.5, 1.0])},
        optional={"seed": st.integers(0, 3)},
    ),
}
ADDING = [kind for kind in CONFIGS if kind != "causal"]  # after `causal` nothing is left to add
STACKS = st.lists(st.sampled_from([*ADDING * 3, "causal"]).flatmap(CONFIGS.get), max_size=4)
# The published methods; what they need of the sizes of a case is filled in by `method_files.fit`.
PUBLISHED = {
    "quest": st.fixed_dictionaries({"page_size": st.sampled_from([1, 2, 4, 16, 100])}),
    "double_sparsity": st.fixed_dictionaries(
        {"group_factor": st.sampled_from([1, 2, 4, 8]), "label_bits": st.sampled_from([1, 2, 3, 4, 8, 16])},
        optional={"channel_selection": st.sampled_from(["qk_proj", "q_proj", "k_proj"])},
    ),
    "pq_cache": st.fixed_dictionaries(
        {"pq_sub_dim": st.sampled_from([1, 2, 4, 8]), "pq_bits": st.sampled_from([1, 2])},
        optional={
            "init_offset": st.sampled_from([0, 3]),
            "kmeans_iter": st.sampled_from([1, 3]),
            "metric": st.sampled_from(["euclidean", "ip"]),
        },
    ),
    "hash_attention": st.fixed_dictionaries({"hat_bits": st.sampled_from([1, 7, 32, 64]), "shared": st.booleans()}),
    "socket": st.fixed_dictionaries(
        {"K": st.sampled_from([1, 2, 4, 7]), "L": st.sampled_from([1, 5, 9]), "tau": st.sampled_from([0.3, 1.0])}
    ),
}
assert set(PUBLISHED) == set(loops_methods.METHODS)  # which are loops for `loops.LOOPS` by now


def published(kind):
    both = st.fixed_dictionaries({"type": st.just(kind), "heavy_size": BUDGETS}, optional={"gqa": GQA})
    return st.tuples(both, PUBLISHED[kind]).map(lambda parts: parts[0] | parts[1])


CONFIGS |= {kind: published(kind) for kind in PUBLISHED}
SCORED = ["oracle_top_k", "oracle_top_p"]
# Stacks that rank by score and leave something out, mostly.
RANKING = st.tuples(
    st.lists(st.sampled_from(["sink", "local", *SCORED]).flatmap(CONFIGS.get), max_size=1),
    st.lists(st.sampled_from(SCORED).flatmap(CONFIGS.get), min_size=1, max_size=2),
).map(lambda parts: parts[0] + parts[1])

MASKS = [
    "causal",
    "none",
    "left padding",
    "right padding",
    "holes",
    "sliding window",
    "packed",
    "static cache",
    "per head",
    "additive",
    "additive biased",
]
DATA = [
    "normal",
    "few distinct keys",
    "near ties",
    "cancelling",
    "small integers",
    "zero queries",
    "constant keys",
    "huge",
    "tiny",
]


@dataclass
class Case:
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    maskers: list
    options: dict = field(default_factory=dict)  # keyword arguments of sparse_attention
    label: str = ""

    @property
    def shape(self):
        return (*self.queries.shape[:3], self.keys.shape[2])

    def __repr__(self):
        options = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        kv_heads, dtype = self.keys.shape[1], self.queries.dtype
        return f"Case({self.label}, B,H,Q,K={self.shape}, G={kv_heads}, {dtype}, {self.maskers}, {options})"

    def _repr_pretty_(self, printer, cycle):  # hypothesis would print every number
        printer.text(repr(self))


def tensors(generator, B, H, G, Q, K, D, Dv, dtype, data):
    """Queries, keys and values of the named kind."""
    queries, keys, values = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((B, H, Q, D), (B, G, K, D), (B, G, K, Dv))
    )
    if data == "few distinct keys":
        keys = keys[:, :, torch.randint(0, min(K, 4), (K,), generator=generator)]
    elif data == "near ties":  # scores differ by about one rounding of a float32 dot product
        keys = keys[:, :, :1] + torch.randn(keys.shape, generator=generator, dtype=torch.float64) * 3e-7
    elif data == "cancelling":  # small scores out of large products
        queries, keys = queries.clone(), keys.clone()
        if D > 1:
            queries[..., D // 2 :] = queries[..., : D // 2]
            keys = keys * 1e3
            noise = torch.randn(keys[..., : D // 2].shape, generator=generator, dtype=torch.float64)
            keys[..., D // 2 :] = noise * 1e-2 - keys[..., : D // 2]
    elif data == "small integers":
        queries, keys = queries.round().clamp(-1, 1), keys.round().clamp(-1, 1)
    elif data == "zero queries":
        queries = torch.zeros_like(queries)
    elif data == "constant keys":
        keys = keys[:, :, :1].expand_as(keys).clone()
    elif data in ("huge", "tiny"):
        factor = {"huge": 300.0, "tiny": 1e-6}[data]
        queries, keys = queries * factor, keys * factor
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def causal_order(Q, K):
    return torch.ones(Q, K, dtype=torch.bool).tril(K - Q)


def attention_mask(generator, kind, B, H, Q, K, dtype):
    """(attention_mask, whether causal order is left to `is_causal`)."""
    position = torch.arange(K)
    if kind in ("causal", "none"):
        return None, kind == "causal"
    if kind in ("left padding", "right padding", "holes"):
        real = torch.randint(1, K + 1, (B, 1), generator=generator)
        if kind == "holes":
            mask = torch.rand(B, K, generator=generator) < 0.7
        else:
            mask = position >= K - real if kind == "left padding" else position < real
        return (mask if B % 2 else mask.long()), True
    causal = causal_order(Q, K).expand(B, 1, Q, K)
    if kind == "sliding window":
        width = int(torch.randint(1, K + 1, (1,), generator=generator))
        return causal & ~torch.ones(Q, K, dtype=torch.bool).tril(K - Q - width), False
    if kind == "packed":
        document = (torch.rand(B, K, generator=generator) < 0.2).cumsum(-1)
        own = document[:, max(0, K - Q) :]
        own = torch.nn.functional.pad(own, (Q - own.shape[1], 0), value=-1)
        return causal & (own[:, None, :, None] == document[:, None, None, :]), False
    if kind == "static cache":
        used = int(torch.randint(1, K + 1, (1,), generator=generator))
        return torch.nn.functional.pad(causal_order(Q, used), (0, K - used)).expand(B, 1, Q, K).clone(), False
    if kind == "per head":
        return torch.rand(B, H, Q, K, generator=generator) < 0.6, False
    lowest = torch.finfo(dtype).min
    hidden = torch.full(causal.shape, lowest, dtype=dtype)
    hidden[torch.rand(causal.shape, generator=generator) < 0.5] = -math.inf
    visible = torch.zeros(causal.shape, dtype=dtype)
    if kind == "additive biased":
        visible = torch.randn(causal.shape, generator=generator).to(dtype)
        drawn = torch.rand(causal.shape, generator=generator)
        visible[drawn < 0.1] = -10000.0  # an old style of masking, but a bias here
        visible[drawn > 0.95] = lowest / 2  # hidden
    return torch.where(causal, visible, hidden), False


@st.composite
def cases(draw, stacks=STACKS, masks=MASKS, data=DATA, extras=True, heads=HEADS, rows=(1, 2, 5, 17), longest=80):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B, (H, G), Q = draw(st.integers(1, 3)), draw(st.sampled_from(heads)), draw(st.sampled_from(rows))
    K = draw(st.one_of(st.integers(20, longest), st.integers(1, longest), st.just(Q), st.integers(1, Q)))
    D, Dv = draw(st.sampled_from([1, 4, 16, 64])), draw(st.sampled_from([1, 4, 8, 24]))
    dtype, kind, numbers = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(masks)),
        draw(st.sampled_from(data)),
    )
    queries, keys, values = tensors(generator, B, H, G, Q, K, D, Dv, dtype, numbers)
    mask_dtype = draw(st.sampled_from([dtype, torch.float32]))
    mask, is_causal = attention_mask(generator, kind, B, H, Q, K, mask_dtype)
    options = {"attention_mask": mask, "is_causal": is_causal}
    if mask is not None and not is_causal and draw(st.booleans()):
        options["is_causal"] = True  # causal order on top of a 4-D mask
    if extras:
        options["scaling"] = draw(st.sampled_from([None, None, 1.0, 0.3]))
        options["softcap"] = draw(st.sampled_from([None, None, 2.0, 30.0]))
        if draw(st.booleans()):
            options["sinks"] = torch.randn(H, generator=generator).to(dtype)
        if draw(st.integers(0, 3)) == 0:
            shape = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), Q, K)
            options["position_bias"] = torch.randn(shape, generator=generator).to(dtype)
        if draw(st.integers(0, 5)) == 0:
            listed = torch.randint(-1, K, (B, Q, draw(st.integers(1, 12))), generator=generator)
            options["indices"] = listed
    maskers = [method_files.fit(masker, H, G, D) for masker in draw(stacks)]
    if any(masker["type"] in PUBLISHED for masker in maskers):
        options["layer_idx"] = draw(st.integers(0, 1))
    return Case(queries, keys, values, maskers, options, f"{kind}, {numbers}")
