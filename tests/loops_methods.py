"""The published methods as slow float64 loops, written from their papers and the specification.

What float32 rounding may decide is not `sure`: a label, a sign or a code within `NEAR` of its boundary widens the
interval of its key's estimate, and a row is sure only if the intervals settle it. Keys whose side data are equal
tie exactly, whatever the rounding: the lower position comes first.
"""

import json
import math
from functools import cache

import loops
import numpy as np
from loops import (
    Estimate,
    Inputs,
    Rows,
    activate,
    budget,
    group_candidates,
    group_visible,
    positions,
    softmax,
    to_float32,
)

FLOAT32 = 2.0**-20  # a float32 dot product of up to 128 terms errs by less, of its absolute terms
NEAR = 2.0**-16  # a number this close to a decision, of its own scale, may fall on either side


def units(config, rows: Rows):
    """(b, heads that select together, i)."""
    if config.get("gqa", "head") == "group":
        yield from rows.groups()
    else:
        for b, h, i in rows:
            yield b, range(h, h + 1), i


def ranked(candidates: list[int], estimate: Estimate, kinds, count: int):
    """(the `count` best, whether that is sure); candidates of one kind are equal whatever the rounding."""
    order = sorted(candidates, key=lambda j: (-float(estimate.rank[j]), j))
    taken, left = np.array(order[:count], dtype=int), np.array(order[count:], dtype=int)
    low, high = estimate.rank_low[taken][:, None], estimate.rank_high[left][None, :]
    kinds = np.asarray(kinds)
    tie = (low == high) | (kinds[taken][:, None] == kinds[left][None, :])
    before = taken[:, None] < left[None, :]
    return taken.tolist(), bool(((low > high) | (tie & before)).all())


def kinds_of(side: np.ndarray, doubtful=None, keys=None) -> np.ndarray:
    """A number for each distinct row of `side` [n, ...]; where that is `doubtful` [n], of `keys` [n, D]."""
    side = side.reshape(len(side), -1).astype(float)
    if doubtful is not None:
        doubtful = doubtful[:, None]
        side = np.concatenate([np.where(doubtful, 0.0, side), doubtful, np.where(doubtful, keys, 0.0)], axis=1)
    return np.unique(side, axis=0, return_inverse=True)[1].reshape(-1)


def together(kinds: list[np.ndarray]) -> np.ndarray:
    """Keys that are of one kind in every head."""
    return kinds_of(np.stack(kinds, axis=1))


def take_best(config, rows: Rows, score, error, kinds, factor, reduce="softmax") -> None:
    """Top-k of the estimates `score` [B, H, Q, K] with bounds `error`; `kinds` [B, H, K]."""
    group = config.get("gqa", "head") == "group"
    for b, heads, i in units(config, rows):
        count = budget(config["heavy_size"], len(group_visible(rows, b, heads, i)))
        if not group or reduce == "sum":
            value = sum(score[b, h, i] for h in heads)
            wrong = sum(error[b, h, i] for h in heads)
            estimate, of = Estimate(value, value - wrong, value + wrong), [kinds[b, h] for h in heads]
        else:
            parts, of = [], []
            for h in heads:
                seen = rows.visible[b, h, i]
                parts.append(softmax(factor * score[b, h, i], factor * error[b, h, i], positions(seen)))
                of.append(np.where(seen, kinds[b, h], -1))
            low, high = sum(p.low for p in parts) * (1 - FLOAT32), sum(p.high for p in parts) * (1 + FLOAT32)
            estimate = Estimate(sum(p.value for p in parts), low, high)
        candidates = group_candidates(rows, b, heads, i)
        activate(rows, b, heads, i, *ranked(candidates, estimate, together(of), count))


def real_positions(real: np.ndarray) -> list[int]:
    """The number of each key among its sequence's real tokens, -1 for padding."""
    numbers, count = [], 0
    for one in real:
        numbers.append(count if one else -1)
        count += bool(one)
    return numbers


# Quest


def pages(inputs: Inputs, b: int, size: int) -> list[list[int]]:
    """The keys of each page of `size` consecutive real tokens."""
    of: list[list[int]] = []
    for j, number in enumerate(real_positions(inputs.real[b])):
        if number >= 0:
            if number // size == len(of):
                of.append([])
            of[-1].append(j)
    return of


def page_bound(query: np.ndarray, keys: np.ndarray) -> float:
    """The largest q·k of any vector between the smallest and the largest key of a page, channel by channel."""
    terms = []
    for d in range(len(query)):
        smallest, largest = min(keys[:, d]), max(keys[:, d])
        terms.append(max(query[d] * smallest, query[d] * largest))
    return math.fsum(terms)


def quest(config, rows: Rows) -> None:
    x, size = rows.inputs, config.get("page_size", 16)
    repeats = x.queries.shape[1] // rows.kv_heads
    group = config.get("gqa", "head") == "group"
    for b, heads, i in units(config, rows):
        paged = pages(x, b, size)
        page_of = {j: p for p, keys in enumerate(paged) for j in keys}
        seen, candidates = group_visible(rows, b, heads, i), group_candidates(rows, b, heads, i)
        open_pages = sorted({page_of[j] for j in candidates})
        if not open_pages:
            continue
        own = page_of[seen[-1]]
        count = math.ceil(budget(config["heavy_size"], len(seen)) / size)
        parts = []
        for h in heads:
            bound, wrong = np.zeros(len(paged)), np.zeros(len(paged))
            for p, keys in enumerate(paged):
                held = x.keys[b, h // repeats, keys]
                bound[p] = page_bound(x.queries[b, h, i], held)
                largest = np.abs(x.queries[b, h, i] * np.abs(held).max(axis=0)).sum()
                wrong[p] = 4 * loops.ULP * largest
            if not group:
                parts.append(Estimate(bound, bound - wrong, bound + wrong))
                continue
            shown = sorted({page_of[j] for j in positions(rows.visible[b, h, i])} - own_page(own))
            parts.append(softmax(x.scaling * bound, x.scaling * wrong, shown))
        slack = FLOAT32 if group else 0.0
        low, high = sum(p.low for p in parts), sum(p.high for p in parts)
        low, high = low - slack * np.abs(low), high + slack * np.abs(high)
        estimate = Estimate(sum(p.value for p in parts), low, high)
        forced = [own] if own in open_pages else []
        others = [p for p in open_pages if p not in forced]
        kinds = kinds_of(np.array([bounds_of(x.keys[b, heads[0] // repeats, keys]) for keys in paged]))
        chosen, sure = ranked(others, estimate, kinds, count - len(forced))
        activate(rows, b, heads, i, [j for p in forced + chosen for j in paged[p]], sure)


def own_page(own: int) -> set[int]:
    """Pages that no softmax over the bounds counts: the row's own, whose bound knows keys behind the row."""
    return {own}


def bounds_of(keys: np.ndarray) -> np.ndarray:
    return np.stack([keys.min(axis=0), keys.max(axis=0)])


# Double Sparsity


@cache
def channel_file(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def float16(x: float) -> float:
    return float(np.float16(min(max(x, -65504.0), 65504.0)))


def label(x: np.ndarray, bits: int):
    """(each number after min-max quantisation to `bits`, how far another rounding could put it).

    The grid is what is stored of it: its lowest value and its step in half precision, not beyond its largest number.
    """
    if bits == 16:
        return x, np.zeros(len(x))
    levels, smallest = 2**bits - 1, to_float32(min(x))
    low = float16(float(smallest))
    exact = max(0.0, float(to_float32(max(x))) - low) / levels
    step, slack = float16(exact), 2.0**-21 * abs(exact) + 2.0**-149
    doubt = levels * (float16(exact + slack) - float16(exact - slack))
    if step == 0:
        return np.full(len(x), low), np.full(len(x), doubt)
    places = (x - low) / step
    codes = np.clip(np.rint(places), 0, levels)
    beside = np.abs(places - np.floor(places) - 0.5)
    near = (beside < NEAR * (1 + np.abs(places))) & ((beside > 0) | (step != exact) | (to_float32(x - low) != x - low))
    return low + codes * step, doubt + np.where(near & (places > 0) & (places < levels), step, 0.0)


def double_sparsity(config, rows: Rows) -> None:
    x = rows.inputs
    _, H, _, D = x.queries.shape
    name = f"model.layers.{x.layer}.self_attn.{config.get('channel_selection', 'qk_proj')}"
    order = channel_file(config["sorted_channel_file"])[name]
    width, bits = D // config.get("group_factor", 8), config.get("label_bits", 4)
    score, error = np.zeros(rows.visible.shape), np.zeros(rows.visible.shape)
    kinds = np.zeros((score.shape[0], H, score.shape[3]), dtype=int)
    for b in range(score.shape[0]):
        for h in range(H):
            channels = order[h][:width]
            labels, doubtful = [], []
            for j in range(score.shape[3]):
                key = x.keys[b, h // (H // rows.kv_heads), j, channels]
                decoded, doubt = label(key, bits)
                labels.append(decoded)
                doubtful.append(doubt.any())
                for i in range(score.shape[2]):
                    query = x.queries[b, h, i, channels]
                    score[b, h, i, j] = math.fsum(query * decoded)
                    reach = np.abs(query) * np.abs(key).max(initial=0.0)
                    error[b, h, i, j] = FLOAT32 * reach.sum() + (np.abs(query) * doubt).sum()
            kinds[b, h] = kinds_of(np.array(labels), np.array(doubtful), x.keys[b, h // (H // rows.kv_heads)])
    take_best(config, rows, score, error, kinds, D**-0.5)


# PQCache


def k_means(points: np.ndarray, centroids: int, iterations: int):
    """(centroids, the smallest relative gap between the best two of any key): fixed rounds from evenly spaced keys."""
    n = len(points)
    centres = np.array([points[c * n // centroids] for c in range(centroids)])
    closest = math.inf
    for _ in range(iterations):
        members: list[list[int]] = [[] for _ in range(centroids)]
        for j in range(n):
            distances = np.array([((points[j] - c) ** 2).sum() for c in centres])
            best = int(distances.argmin())
            members[best].append(j)
            others = distances[[c for c in range(centroids) if not np.array_equal(centres[c], centres[best])]]
            scale = (points[j] ** 2).sum() + (centres[best] ** 2).sum()
            if len(others) and scale:
                closest = min(closest, (others.min() - distances[best]) / scale)
        for c in range(centroids):
            if members[c]:
                centres[c] = points[members[c]].mean(axis=0)
    return centres, closest


def fitted_keys(inputs: Inputs, b: int, init_offset: int) -> list[int]:
    """The keys that the codebooks of a sequence are made of."""
    return [j for j, number in enumerate(real_positions(inputs.real[b])) if number >= init_offset]


def augmented(sub: np.ndarray, metric: str, largest: float) -> np.ndarray:
    """Sub-vectors [n, s], for inner products with the channel that makes all equally long."""
    if metric != "ip":
        return sub
    missing = [math.sqrt(max(0.0, largest**2 - float((one**2).sum()))) for one in sub]
    return np.concatenate([sub, np.array(missing)[:, None]], axis=1)


def codebooks(config, inputs: Inputs, b: int, g: int, m: int):
    """(k-means of sub-vector `m`, its gap, its largest norm), or None where there are too few keys."""
    keys = fitted_keys(inputs, b, config.get("init_offset", 4))
    centroids = 2 ** config.get("pq_bits", 6)
    if len(keys) < 4 * centroids:
        return None
    width = config["pq_sub_dim"]
    sub = inputs.keys[b, g, keys, m * width : (m + 1) * width]
    largest = math.sqrt(max(float((one**2).sum()) for one in sub))
    points = augmented(sub, config.get("metric", "euclidean"), largest)
    return (*k_means(points, centroids, config.get("kmeans_iter", 10)), largest)


def pq_cache(config, rows: Rows) -> None:
    """With `given["pq_cache"]`: {(b, g, m): (centroids, largest norm)}; sequences without codebooks are exact."""
    x = rows.inputs
    books = x.given["pq_cache"]
    B, H, Q, D = x.queries.shape
    K, width, metric = x.keys.shape[2], config["pq_sub_dim"], config.get("metric", "euclidean")
    score, error = np.zeros(rows.visible.shape), np.zeros(rows.visible.shape)
    kinds = np.zeros((B, H, K), dtype=int)
    for b in range(B):
        for h in range(H):
            g = h // (H // rows.kv_heads)
            if (b, g, 0) not in books:
                score[b, h] = x.queries[b, h] @ x.keys[b, g].T
                error[b, h] = FLOAT32 * np.abs(x.queries[b, h]) @ np.abs(x.keys[b, g]).T
                kinds[b, h] = kinds_of(x.keys[b, g])
                continue
            codes, doubtful = np.zeros((K, D // width), dtype=int), np.zeros(K, dtype=bool)
            for m in range(D // width):
                centres, largest = books[b, g, m]
                part = slice(m * width, (m + 1) * width)
                for j, point in enumerate(augmented(x.keys[b, g, :, part], metric, largest)):
                    distances = ((centres - point) ** 2).sum(axis=1)
                    best = codes[j, m] = int(distances.argmin())
                    scale = (point**2).sum() + (centres**2).sum(axis=1)
                    near = [c for c in range(len(centres)) if distances[c] - distances[best] <= NEAR * scale[c]]
                    doubtful[j] |= len(near) > 1
                    for i in range(Q):
                        query = x.queries[b, h, i, part]
                        products = centres[:, :width] @ query
                        score[b, h, i, j] += products[best]
                        spread = max(abs(products[c] - products[best]) for c in near)
                        error[b, h, i, j] += spread + FLOAT32 * float(np.abs(centres[best, :width] * query).sum())
            kinds[b, h] = kinds_of(codes, doubtful, x.keys[b, g])
    take_best(config, rows, score, error, kinds, x.scaling)


# HashAttention


def mlp(x: np.ndarray, layers: list) -> tuple[np.ndarray, np.ndarray]:
    """(the numbers whose signs are the code, their scale); `layers`: weights [out, in] and biases [out], in order."""
    scale = np.abs(x)
    for number, (weight, bias) in enumerate(layers):
        scale = np.abs(weight) @ np.abs(x) + np.abs(bias)
        x = np.array([math.fsum(row * x) for row in weight]) + bias
        if number < len(layers) - 1:
            x = np.array([one / (1 + math.exp(-one)) if one > -700 else 0.0 for one in x])  # SiLU
    return x, scale


def signs(x: np.ndarray, layers: list) -> tuple[np.ndarray, np.ndarray]:
    """(+-1 per bit, 0 counting as +; whether rounding may flip it)."""
    numbers, scale = mlp(x, layers)
    return np.where(numbers >= 0, 1, -1), np.abs(numbers) < NEAR * scale


def hash_attention(config, rows: Rows) -> None:
    """With `given["hash_attention"](layer, head, "query" or "key")`: the layers of that MLP."""
    x, mlps = rows.inputs, rows.inputs.given["hash_attention"]
    B, H, Q, _ = x.queries.shape
    K = x.keys.shape[2]
    score, error = np.zeros(rows.visible.shape), np.zeros(rows.visible.shape)
    kinds = np.zeros((B, H, K), dtype=int)
    for b in range(B):
        for h in range(H):
            g = h // (H // rows.kv_heads)
            keys = [signs(key, mlps(x.layer, h, "key")) for key in x.keys[b, g]]
            for i in range(Q):
                query, unsure = signs(x.queries[b, h, i], mlps(x.layer, h, "query"))
                for j, (key, doubt) in enumerate(keys):
                    score[b, h, i, j] = (query * key).sum()  # bits that agree less bits that differ
                    error[b, h, i, j] = 2 * (unsure | doubt).sum()
            doubtful = np.array([doubt.any() for _, doubt in keys])
            kinds[b, h] = kinds_of(np.array([key for key, _ in keys]), doubtful, x.keys[b, g])
    take_best(config, rows, score, error, kinds, 1.0, reduce="sum")


# SOCKET


def corner_probability(h: np.ndarray, corner: np.ndarray, tau: float) -> float:
    """The probability of the bucket at `corner` (+-1 per plane) for a query of soft hash `h`."""
    p = 1.0
    for soft, side in zip(h, corner, strict=True):
        p *= 1 / (1 + math.exp(-2 * soft * side / tau))
    return p


def socket(config, rows: Rows) -> None:
    """With `given["socket"](layer, head)`: the planes [L, K, D] of that query head."""
    x = rows.inputs
    B, H, Q, _ = x.queries.shape
    size, tau = x.keys.shape[2], config.get("tau", 0.3)
    score, error = np.zeros(rows.visible.shape), np.zeros(rows.visible.shape)
    kinds = np.zeros((B, H, size), dtype=int)
    for b in range(B):
        for h in range(H):
            g, planes = h // (H // rows.kv_heads), x.given["socket"](x.layer, h)
            keys, lengths = x.keys[b, g], np.sqrt((x.values[b, g] ** 2).sum(axis=1))
            sides = np.einsum("lpd,jd->jlp", planes, keys)
            scale = np.einsum("lpd,jd->jlp", np.abs(planes), np.abs(keys))
            corners = np.where(sides >= 0, 1.0, -1.0)
            doubt = (np.abs(sides) < NEAR * scale).any(axis=2)  # [K, L]
            for i in range(Q):
                soft = np.tanh(planes @ x.queries[b, h, i])
                for j in range(size):
                    found = [corner_probability(soft[t], corners[j, t], tau) for t in range(len(planes))]
                    total = math.fsum(found)
                    score[b, h, i, j] = total * lengths[j]
                    error[b, h, i, j] = 16 * FLOAT32 * score[b, h, i, j] + doubt[j].sum() * lengths[j]
            side = np.concatenate([corners.reshape(size, -1), lengths[:, None]], axis=1)
            kinds[b, h] = kinds_of(side, doubt.any(axis=1), np.concatenate([keys, lengths[:, None]], axis=1))
    take_best(config, rows, score, error, kinds, 1.0, reduce="sum")


METHODS = {
    "quest": quest,
    "double_sparsity": double_sparsity,
    "pq_cache": pq_cache,
    "hash_attention": hash_attention,
    "socket": socket,
}
loops.LOOPS.update(METHODS)
