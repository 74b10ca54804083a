"""PQCache and SOCKET: what their docstrings promise (`test_methods_exactness.py` has the slow loops)."""

import copy
import itertools
import math

import pytest
import torch

from sah_transformers import (
    Context,
    MaskerRegistry,
    PQCache,
    PQCacheConfig,
    SocketMaskerConfig,
    State,
    sparse_attention,
)
from sah_transformers.maskers import pq_cache, socket

PQ = {"type": "pq_cache", "heavy_size": 6, "pq_sub_dim": 4, "pq_bits": 2, "init_offset": 3}
IP = {**PQ, "metric": "ip"}
SOCKET = {"type": "socket", "heavy_size": 6, "K": 5, "L": 7}
METRICS = pytest.mark.parametrize("config", [PQ, IP], ids=["euclidean", "ip"])
METHODS = pytest.mark.parametrize("config", [PQ, IP, SOCKET], ids=["pq", "pq ip", "socket"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def draw(B=1, H=4, G=2, Q=5, K=40, D=8, Dv=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Q, D), (B, G, K, D), (B, G, K, Dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(q, k, v, config, state=None, **options):
    return sparse_attention(q, k, v, [config], state=state, **options)[1].get_dense_mask()


def side_of(state, config, layer=0):
    return state.layer(layer).side(MaskerRegistry.create_masker(config))


def side_data(q, k, v, config, **options):
    """What the state holds after one call."""
    state = State()
    run(q, k, v, config, state, **options)
    return side_of(state, config)


def scores_of(q, k, v, config, side, scaling=1.0):
    return MaskerRegistry.create_masker(config).score(q, k, v, Context(scaling=scaling, side=side))


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# Configs and bad input

BAD = [
    *(({**PQ, "pq_sub_dim": value}, "pq_sub_dim must be an int >= 1") for value in (0, -8, 1.5, 0.0, math.nan, True)),
    ({**PQ, "pq_sub_dim": "8"}, "pq_sub_dim must be .*got '8'"),
    ({**PQ, "pq_sub_dim": None}, "pq_sub_dim must be"),
    ({"type": "pq_cache", "heavy_size": 4}, "pq_sub_dim is missing"),
    *(({**PQ, "pq_bits": value}, "pq_bits must be an int from 1 to 8") for value in (0, 9, 6.0, False, "6")),
    *(({**PQ, "kmeans_iter": value}, "kmeans_iter must be an int >= 1") for value in (0, 2.0, True)),
    *(({**PQ, "init_offset": value}, "init_offset must be an int >= 0") for value in (-1, 0.5, math.inf)),
    ({**PQ, "metric": "cosine"}, "metric must be 'euclidean' or 'ip', got 'cosine'"),
    ({**PQ, "gqa": "kv"}, "gqa must be"),
    ({**PQ, "heavy_size": 0}, "heavy_size must be"),
    *(({**SOCKET, "K": value}, "K must be an int from 1 to 16") for value in (0, 17, 4.0, True)),
    *(({**SOCKET, "L": value}, "L must be an int >= 1") for value in (0, -1, 1.0, "60")),
    *(
        ({**SOCKET, "tau": value}, "tau must be a number > 0")
        for value in (0, 0.0, -0.3, math.inf, math.nan, True, "1")
    ),
    ({**SOCKET, "gqa": None}, "gqa must be"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=str)
def test_bad_fields(config, message):
    with pytest.raises(ValueError, match=message):
        MaskerRegistry.create_masker(config)


def test_configs_are_plain_data():
    for config in (PQCacheConfig(0.1, 16, 4), PQCacheConfig(8, 0.5, gqa="group"), SocketMaskerConfig(heavy_size=0.05)):
        assert type(config).from_dict(config.to_dict()) == config
    assert PQCacheConfig(0.1, 16, 4).pq_bits == 4
    assert SocketMaskerConfig(1).to_dict()["tau"] == 0.3


@pytest.mark.parametrize("width", [3, 16, 0.3, 0.01])
def test_a_head_dimension_that_does_not_divide_raises_and_leaves_no_half_built_state(width):
    q, k, v = draw()
    state = State()
    with pytest.raises(ValueError, match=rf"pq_sub_dim must divide .*pq_sub_dim={width}.* 8$"):
        run(q, k, v, {**PQ, "pq_sub_dim": width}, state)
    assert state.layer(0).length == 0
    assert run(q, k, v, PQ, state).equal(run(q, k, v, PQ))


def test_a_share_of_the_head_dimension():
    q, k, v = draw()
    assert same(side_data(q, k, v, {**PQ, "pq_sub_dim": 0.5}), side_data(q, k, v, PQ))


def test_bytes_per_key():
    q, k, v = draw(K=300, D=128)
    limits = [({"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 64}, 2), ({"type": "socket", "heavy_size": 4}, 96)]
    for config, most in limits:
        state = State()
        run(q, k, v, config, state)
        assert state.layer(0).bytes_per_key() == 2 * most  # two KV heads


# PQCache


@METRICS
@DTYPES
def test_scores_are_products_with_the_decoded_keys(config, dtype):
    q, k, v = draw(B=2, dtype=dtype)
    side = side_data(q, k, v, config)
    assert side["ready"].all()
    scores = scores_of(q, k, v, config, side, scaling=0.3)
    for b, h, i, j in itertools.product(range(2), range(4), range(5), range(40)):
        centroids, codes = side["centroids"][b, h // 2, ..., :4].double(), side["codes"][b, h // 2, j].long()
        decoded = torch.cat([centroids[m, codes[m]] for m in range(2)])
        assert scores[b, h, i, j] == pytest.approx(0.3 * float(q[b, h, i].double() @ decoded), rel=1e-12, abs=1e-12)


@METRICS
def test_every_key_has_its_nearest_centroids_code(config):
    """The first ones too, which had no part in the fit, and those that came later."""
    q, k, v = draw(K=60)
    k[:, :, :3] *= 20
    state = State()
    run(q, k[:, :, :40], v[:, :, :40], config, state)
    run(q[:, :, :1], k, v, config, state)
    side = side_of(state, config)
    step = side["step"].double()
    for g, m, j in itertools.product(range(2), range(2), range(60)):
        point = k[0, g, j, 4 * m : 4 * m + 4].double()
        if config is IP:
            missing = side["radius"][0, g, m] * step[0, g, m] ** 2 - point.square().sum()
            point = torch.cat([point, missing.clamp(min=0).sqrt()[None]])
        distances = (side["centroids"][0, g, m].double() - point).square().sum(-1)
        assert distances[side["codes"][0, g, j, m].long()] <= distances.min() * (1 + 1e-4)
    everything = run(q[:, :, :1], k, v, {**config, "heavy_size": 60}, copy.deepcopy(state))
    assert everything.all()
    k[0, 0, 0], q[0, :, 0] = (
        side["centroids"][0, 0, :, 0, :4].flatten() * 9,
        9 * side["centroids"][0, 0, :, 0, :4].flatten(),
    )
    assert run(q[:, :, :1], k, v, {**config, "heavy_size": 20})[0, 0, 0, 0], "the first keys cannot be selected"


def place(tensor, length, start, fill):
    """The keys at `start` of a longer buffer full of `fill`."""
    padded = torch.full((*tensor.shape[:2], length, tensor.shape[3]), fill, dtype=tensor.dtype)
    padded[:, :, start : start + tensor.shape[2]] = tensor
    return padded


@METHODS
@DTYPES
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
@pytest.mark.parametrize("left", [True, False])
def test_side_data_and_selections_do_not_know_of_padding_or_of_the_batch(config, dtype, fill, left):
    """Bit for bit, and whatever stands in the padding (NaN in keys that nobody sees)."""
    lengths, most = (50, 31, 9, 1), 50
    parts = [draw(K=n, Q=n, seed=n, dtype=dtype) for n in lengths]
    starts = [most - n if left else 0 for n in lengths]
    q, k, v = (torch.cat([place(p[i], most, s, fill) for p, s in zip(parts, starts, strict=True)]) for i in range(3))
    q = q.nan_to_num()
    real = torch.zeros(4, most)
    for b, (n, s) in enumerate(zip(lengths, starts, strict=True)):
        real[b, s : s + n] = 1
    state = State()
    together = run(q, k, v, config, state, attention_mask=real)
    held = side_of(state, config)
    for b, (n, s) in enumerate(zip(lengths, starts, strict=True)):
        alone_state, span = State(), slice(s, s + n)
        assert run(*parts[b], config, alone_state).equal(together[b : b + 1, :, span, span])
        for name, tensor in side_of(alone_state, config).items():
            one = held[name][b : b + 1]
            assert torch.equal(tensor, one[:, :, span] if name in ("codes", "buckets", "norm") else one), name
    if "ready" in held:
        assert held["ready"].tolist() == [True, True, False, False]


@METRICS
def test_kv_heads_have_codebooks_of_their_own(config):
    q, k, v = draw()
    whole, other = side_data(q, k, v, config), k.clone()
    other[:, 1] += 1
    changed = side_data(q, other, v, config)
    for name in ("centroids", "step", "codes"):
        assert torch.equal(whole[name][:, 0], changed[name][:, 0])
    assert not torch.equal(whole["centroids"][:, 1], changed["centroids"][:, 1])


@METHODS
def test_blocks_of_any_size_give_the_same_bits(config, monkeypatch):
    q, k, v = draw(B=2, K=70)
    whole = side_data(q, k, v, config)
    for elements in (1, 40, 300):
        for module in (pq_cache, socket):
            monkeypatch.setitem(module.ELEMENTS, "cpu", elements)
        assert same(side_data(q, k, v, config), whole)


@METRICS
@pytest.mark.parametrize("data", ["constant", "few distinct", "zeros", "integers"])
def test_ties_take_the_lower_centroid_and_empty_clusters_keep_their_centre(config, data):
    q, k, v = draw(K=60)
    k = {
        "constant": k[:, :, :1].expand_as(k),
        "few distinct": k[:, :, torch.arange(60) % 3],
        "zeros": torch.zeros_like(k),
        "integers": k.round(),
    }[data]
    side = side_data(q, k, v, config)
    assert side["centroids"].isfinite().all()
    if data in ("constant", "zeros"):
        assert not side["codes"].any()
        assert torch.allclose(side["centroids"][..., :4], k[:, :, :1].unflatten(-1, (2, 4)).transpose(2, 3), atol=1e-5)
        assert run(q[:, :, -1:], k, v, config)[..., :6].all(), "lower positions first"
    same_key = (k[:, :, :, None] == k[:, :, None]).all(-1)
    same_code = (side["codes"][:, :, :, None] == side["codes"][:, :, None]).all(-1)
    assert same_code[same_key].all(), "equal keys with unequal codes"


def test_k_means_by_hand():
    points = torch.tensor([0.0, 4.0, 100.0, 120.0, 110.0, 104.0]).double()[:, None]
    assert pq_cache.k_means(points, 2, 1).flatten().tolist() == [2, 108]  # from the keys 0 and 3: 108.5, to even
    assert pq_cache.k_means(points, 3, 1).flatten().tolist() == [2, 102, 115]  # from the keys 0, 2 and 4
    empty = torch.tensor([5.0, 5.0, 9.0, 9.0]).double()[:, None]
    assert pq_cache.k_means(empty, 4, 5).flatten().tolist() == [5, 5, 9, 9]  # the second and fourth stay empty
    assert pq_cache.nearest(torch.tensor([[7.0]]).double(), empty).tolist() == [0]


def test_distances_are_exact():
    """Against Python's whole numbers: no order of the products and sums can matter."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(30, 128, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-3, 1, (30, 1))
    fitted, later = pq_cache.split(k[:20], 1), pq_cache.split(k * 3e4, 1)
    step = pq_cache.step_of(fitted)
    centroids, points = pq_cache.snap(fitted, step)[0], pq_cache.snap(later, step)[0]
    assert 2**19 <= centroids.abs().max() <= 2**20
    whole = [[int(x) for x in one] for one in centroids.tolist()]
    assert centroids.tolist() == whole
    products = points @ centroids.T
    for i, point in enumerate(points.tolist()):
        assert all(x == int(x) for x in point)
        exact = [sum(int(x) * c for x, c in zip(point, one, strict=True)) for one in whole]
        assert [int(x) for x in products[i].tolist()] == exact
        distances = [sum(c * c for c in one) - 2 * x for one, x in zip(whole, exact, strict=True)]
        assert pq_cache.nearest(points[i : i + 1], centroids).item() == distances.index(min(distances))
    assert torch.allclose(points * step, later[0], rtol=0, atol=float(later.abs().max()) * 2**-23)


@METRICS
def test_too_few_keys_are_scored_exactly_until_there_are_enough(config):
    """Four keys per centroid after the first three: 19 of them."""
    q, k, v = draw(K=24, Q=24, H=4, G=2)
    oracle = {"type": "oracle_top_k", "heavy_size": 6}
    state, fitted = State(), None
    for n in range(1, 25):
        part = q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]
        mask = run(*part, config, state)
        side = side_of(state, config)
        assert bool(side["ready"]) == (n >= 19)
        if n < 19:
            assert mask.equal(run(*part, oracle))
            assert not side["codes"].any()
            assert run(*part, {**config, "gqa": "group"}).equal(run(*part, {**oracle, "gqa": "group"}))
            continue
        fitted = fitted or {name: side[name].clone() for name in ("centroids", "step")}
        assert same(fitted, {name: side[name] for name in fitted}), "fitted again"
        if n == 19:
            assert same(side, side_data(*part, config)), "codes of the keys before are those of the codebooks"
        scores = scores_of(*part, config, side)
        best = scores.topk(6, dim=-1).values[..., -1:]
        assert int(mask.sum()) == 4 * 6
        assert (scores.masked_fill(mask == 0, math.inf).amin(-1, keepdim=True) >= best).all()


def test_sequences_become_ready_one_by_one_and_none_is_fitted_twice(monkeypatch):
    q, k, v = draw(B=2, K=40)
    real = torch.ones(2, 40)
    real[1, :20] = 0  # 19 real keys at length 39
    fits = []
    original = pq_cache.k_means
    monkeypatch.setattr(pq_cache, "k_means", lambda *a: (fits.append(a[0].shape[-2]), original(*a))[1])
    state = State()
    for n in range(36, 41):
        part = q[:, :, :1], k[:, :, :n], v[:, :, :n]
        mask = run(*part, PQ, state, attention_mask=real[:, :n])
        side = side_of(state, PQ)
        assert side["ready"].tolist() == [True, n >= 39]
        exact = run(*part, {"type": "oracle_top_k", "heavy_size": 6}, attention_mask=real[:, :n])
        assert mask[1].equal(exact[1]) == (n < 39)
        assert not mask[0].equal(exact[0])
    assert fits == [33, 16]


@METRICS
def test_later_keys_beyond_the_prompts_reach_have_a_code(config):
    q, k, v = draw(K=60)
    k[:, :, 40:] *= torch.logspace(0, 30, 20)[:, None]
    state = State()
    run(q, k[:, :, :40], v[:, :, :40], config, state)
    run(q[:, :, :1], k, v, config, state)
    assert scores_of(q, k, v, config, side_of(state, config)).isfinite().all()
    again = State()
    run(q, k[:, :, :40], v[:, :, :40], config, again)
    for n in range(41, 61):
        run(q[:, :, :1], k[:, :, :n], v[:, :, :n], config, again)
    assert same(side_of(state, config), side_of(again, config))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 300.0, 1e18])
@METHODS
def test_powers_of_two_change_nothing_and_other_scales_stay_finite(config, scale):
    q, k, v = draw(dtype=torch.float64)
    usual = run(q, k * scale, v, config)
    assert usual.equal(run(q, k * scale * 2.0**20, v, config))
    assert int((usual > 0).sum(-1).min()) == 6


# Both: state


@METHODS
@DTYPES
def test_a_chunked_decode_keeps_what_all_keys_at_once_would_have(config, dtype):
    """The fit with the first chunk; every later code bit for bit that of all keys under the same centroids."""
    q, k, v = draw(B=2, K=70, dtype=dtype)
    state, n = State(), 0
    for chunk in (40, 1, 1, 7, 13, 1, 7):
        n += chunk
        run(q[:, :, :1], k[:, :, :n], v[:, :, :n], config, state)
        held = side_of(state, config)
        masker = MaskerRegistry.create_masker(config)
        made = {name: held[name] for name in (*masker.prepared, "ready") if name in held}
        fresh = masker.append(k[:, :, :n], v[:, :, :n], Context(side=made))
        assert same(held, {**fresh, **made})
    if config is SOCKET:
        assert same(held, side_data(q, k, v, config))
    else:
        first = side_data(q, k[:, :, :40], v[:, :, :40], config)
        assert torch.equal(held["centroids"], first["centroids"])


@METHODS
def test_crop_and_two_continuations_of_a_copy(config):
    q, k, v = draw(B=2, K=60)
    state = State()
    run(q, k[:, :, :45], v[:, :, :45], config, state)
    before = {name: tensor.clone() for name, tensor in side_of(state, config).items()}
    ends = [draw(B=2, K=60, seed=s) for s in (1, 2)]
    copies = [copy.deepcopy(state), copy.deepcopy(state)]
    kept = []
    for one, (q2, k2, v2) in zip(copies, ends, strict=True):
        one.crop(41)
        k2, v2 = torch.cat([k[:, :, :41], k2[:, :, 41:]], 2), torch.cat([v[:, :, :41], v2[:, :, 41:]], 2)
        for n in (42, 43, 60):
            mask = run(q2[:, :, :1], k2[:, :, :n], v2[:, :, :n], config, one)
        side = side_of(one, config)
        masker = MaskerRegistry.create_masker(config)
        made = {name: before[name] for name in (*masker.prepared, "ready") if name in before}
        fresh = {**masker.append(k2, v2, Context(side=made)), **made}
        assert same(side, fresh)
        scores = scores_of(q2[:, :, :1], k2, v2, config, fresh).float()
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :6]
        assert mask.equal(torch.zeros_like(mask).scatter(-1, order, 1.0))
        kept.append(side)
    assert not same(*kept)
    assert same(side_of(state, config), before), "the copies wrote into the original"


@METRICS
def test_an_empty_cache_forgets_the_codebooks(config):
    q, k, v = draw()
    state = State()
    run(q, k, v, config, state)
    state.crop(0)
    other = draw(seed=4)
    run(*other, config, state)
    assert same(side_of(state, config), side_data(*other, config))


@METHODS
def test_a_nan_in_a_key_reaches_the_rows_that_see_it_alone(config):
    q, k, v = draw(K=40, Q=40, dtype=torch.float64)
    usual = run(q[:, :, :30], k[:, :, :40], v, config, is_causal=False)
    assert usual.sum() == 4 * 30 * 6
    broken = k.clone()
    broken[0, 0, 39] = math.nan
    broken[0, 1, 38, 2] = math.inf
    side = side_data(q, broken, v, config)
    assert all(tensor.isfinite().all() for tensor in side.values())
    zeroed = broken.nan_to_num(nan=0.0, posinf=0.0)
    assert same(side, side_data(q, zeroed, v, config)), "not counted as zero"
    if config is SOCKET:
        clean = side_data(q, k, v, config)
        assert torch.equal(side["buckets"][:, 0, :39], clean["buckets"][:, 0, :39])
        assert run(q, broken, v, config)[:, :, :38].equal(run(q, k, v, config)[:, :, :38])


@METHODS
def test_inference_mode_and_gradients_take_turns(config):
    q, k, v = draw()
    socket.hyperplanes.cache_clear()
    with torch.inference_mode():
        first = run(q, k, v, config)
    q.requires_grad_()
    out, mask = sparse_attention(q, k, v, [config])
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert first.equal(mask.get_dense_mask())


# SOCKET


@pytest.mark.parametrize("planes", [1, 2, 5, 12])
@pytest.mark.parametrize("tau", [0.01, 0.3, 5.0])
def test_bucket_probabilities_sum_to_one_and_are_the_softmax_over_all_buckets(planes, tau):
    soft = torch.tanh(torch.randn(3, planes, generator=torch.Generator().manual_seed(planes), dtype=torch.float64))
    found = socket.probabilities(soft, tau)
    corners = torch.tensor([[1.0 if r >> p & 1 else -1.0 for p in range(planes)] for r in range(2**planes)]).double()
    assert torch.allclose(found.sum(-1), torch.ones(3).double(), rtol=1e-13)
    assert torch.allclose(found, (soft @ corners.T / tau).softmax(-1), rtol=1e-9, atol=1e-15)
    assert torch.equal(socket.probabilities(soft[:, :0], tau), torch.ones(3, 1).double())


@pytest.mark.parametrize("gqa", ["head", "group"])
def test_scores_are_bucket_probabilities_times_the_values_norm(gqa):
    q, k, v = draw(Q=2)
    v[:, :, 7] = 0
    config = {**SOCKET, "gqa": gqa}
    side = side_data(q, k, v, config)
    scores = scores_of(q, k, v, config, side)
    planes = socket.hyperplanes(0, 7, 5, 8)
    for h, i, j in itertools.product(range(4), range(2), range(0, 40, 3)):
        total = 0.0
        for table in planes:
            h_q, c_k = (
                torch.tanh(table @ q[0, h, i].double()),
                torch.where(table @ k[0, h // 2, j].double() >= 0, 1.0, -1.0),
            )
            total += float(torch.sigmoid(2 * h_q * c_k / 0.3).prod())
        assert scores[0, h, i, j] == pytest.approx(total * float(v[0, h // 2, j].norm()), rel=1e-6)
    assert not scores[..., 7].any()
    selected = run(q, k, v, config, is_causal=False)
    rank = scores if gqa == "head" else scores.unflatten(1, (2, 2)).sum(2).repeat_interleave(2, dim=1)
    assert (rank.masked_fill(selected == 0, math.inf).amin(-1) >= rank.masked_fill(selected > 0, -1).amax(-1)).all()


@pytest.mark.parametrize(("tables", "planes"), [(60, 12), (1, 1), (5, 16), (9, 7), (3, 11), (33, 1), (7, 13)])
def test_buckets_are_packed_32_to_a_word(tables, planes):
    bits = torch.rand(2, 3, 50, tables * planes, generator=torch.Generator().manual_seed(0)) < 0.5
    bits[0, 0, 0], bits[0, 0, 1] = True, False
    words = socket.pack(bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, 50, math.ceil(tables * planes / 32))
    for i in range(tables * planes):
        assert torch.equal(words[..., i // 32] >> i % 32 & 1, bits[..., i].int())
    for table in range(tables):
        part = bits[..., table * planes : (table + 1) * planes].long()
        assert torch.equal(socket.unpack(words, table, planes), (part << torch.arange(planes)).sum(-1))


def test_hyperplanes_are_the_layers_own_and_always_the_same():
    first = socket.hyperplanes(3, 60, 12, 64).clone()
    socket.hyperplanes.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(socket.hyperplanes(3, 60, 12, 64), first)
    assert not torch.equal(socket.hyperplanes(4, 60, 12, 64), first)
    assert abs(float(first.mean())) < 0.02
    assert abs(float(first.std()) - 1) < 0.02
    state = torch.get_rng_state()
    socket.hyperplanes.cache_clear()
    socket.hyperplanes(3, 60, 12, 64)
    assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"


@DTYPES
def test_a_sign_of_exactly_zero_is_positive_and_no_sign_hangs_on_rounding(dtype):
    """Keys in the plane itself: the sums cancel exactly, in every order."""
    planes = socket.hyperplanes(0, 7, 5, 8)
    _, k, v = draw(K=36, dtype=dtype)
    for i, normal in enumerate(planes.flatten(0, 1)):
        k[:, :, i] = 0
        if dtype == torch.float64:  # 12 + 12 bits: no rounding in the key
            k[:, :, i, 0], k[:, :, i, 5] = normal[5], -normal[0]
    k[:, :, 35] = 0
    masker = MaskerRegistry.create_masker(SOCKET)
    buckets = masker.append(k, v, Context())["buckets"]
    for i in range(35):
        assert (buckets[..., i, i // 32] >> i % 32 & 1).all()
    snapped, drawn = socket.snap(k[0, 0]), planes.flatten(0, 1) * 2**12
    products = (snapped @ drawn.T).tolist()
    for i, j in itertools.product(range(36), range(35)):
        key, plane = snapped[i].tolist(), drawn[j].tolist()
        assert products[i][j] == sum(int(a) * int(b) for a, b in zip(key, plane, strict=True))
        assert all(x == int(x) for x in (*key, *plane))
    each = torch.cat(
        [masker.append(k[:, :, i : i + 1], v[:, :, i : i + 1], Context())["buckets"] for i in range(36)], 2
    )
    assert torch.equal(each, buckets)
    assert (buckets[:, :, 35, 0] == -1).all()


def test_the_query_finds_keys_like_itself():
    """Keys in the direction of the query collide most; with more tables the ranking is that of the angle."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 64, generator=generator), torch.randn(1, 1, 400, 64, generator=generator)
    k[0, 0, 17] = 0.9 * q[0, 0, 0] + 0.4 * k[0, 0, 17]
    v = torch.ones(1, 1, 400, 2)
    assert run(q, k, v, {"type": "socket", "heavy_size": 1}, is_causal=False)[0, 0, 0].nonzero().tolist() == [[17]]
    cosine = torch.cosine_similarity(q[0, 0], k[0, 0], dim=-1)

    def rank_correlation(**fields):
        config = {"type": "socket", "heavy_size": 1, **fields}
        scores = scores_of(q, k, v, config, side_data(q, k, v, config))[0, 0, 0]
        return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (scores, cosine)]))[0, 1])

    assert rank_correlation(K=4, L=600) > 0.85 > 0.55 > rank_correlation(K=4, L=10)


def test_the_masker_classes_keep_nothing():
    masker = PQCache(PQCacheConfig(6, 4, pq_bits=2))
    q, k, v = draw()
    masker.add_mask(k, q, v, is_causal=True)
    assert list(vars(masker)) == ["config"]
