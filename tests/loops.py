"""What the package must compute, as slow float64 loops: row by row, key by key, nothing of the package.

Every number that decides a selection carries a bound on the rounding of a float64 evaluation. Where that
bound does not settle the selection of a row (two keys on both sides of a float32 rounding step, a share on
the edge of `top_p`), the row is not `sure`, and only then may a test leave it out.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

ULP = 2.0**-52
SHARE_SLACK = 1e-6  # a share within this of top_p counts as reached
SHARE_EDGE = 1e-12  # a share this close to the decision is on the edge


def array(tensor) -> np.ndarray:
    """A float64 copy of a tensor of any dtype (exact)."""
    return tensor.detach().to(torch.float64).cpu().numpy()


def to_float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, dtype=np.float64).astype(np.float32)


# Visibility


def visibility(shape, attention_mask=None, is_causal=False, indices=None):
    """(visible, bias), both [B, H, Q, K], of a mask: None, 2-D, 4-D boolean, 4-D additive."""
    B, H, Q, K = shape
    visible = np.zeros(shape, dtype=bool)
    bias = np.zeros(shape, dtype=np.float64)
    if attention_mask is not None:
        mask = attention_mask.numpy() if attention_mask.dtype == torch.bool else array(attention_mask)
        additive = attention_mask.dim() == 4 and attention_mask.dtype != torch.bool
        hidden_from = torch.finfo(attention_mask.dtype).min / 2 if additive else None
    for b in range(B):
        for h in range(H):
            for i in range(Q):
                listed = None if indices is None else set(indices[b, i].tolist())
                for j in range(K):
                    sees = not is_causal or j <= i + K - Q
                    if attention_mask is not None and attention_mask.dim() == 2:
                        sees = sees and mask[b, j] != 0
                    elif attention_mask is not None:
                        value = mask[b, h if mask.shape[1] > 1 else 0, i, j]
                        if additive:
                            sees = sees and value > hidden_from
                            bias[b, h, i, j] = value if value > hidden_from else 0.0
                        else:
                            sees = sees and bool(value)
                    visible[b, h, i, j] = sees and (listed is None or j in listed)
    return visible, bias


# Scores


def lowest_bit(x: np.ndarray) -> np.ndarray:
    """The exponent of the last set bit of each number."""
    mantissa, exponent = np.frexp(x)
    whole = (mantissa * 2.0**53).astype(np.int64)
    return np.where(x == 0, np.inf, exponent - 53 + np.log2(np.maximum(whole & -whole, 1)))


def is_exact(terms: np.ndarray, bits: np.ndarray) -> bool:
    """Whether float64 sums `terms`, whose last set bits are `bits`, without rounding in every order."""
    size = float(np.abs(terms).sum())
    return size == 0 or math.log2(size) < 53 + bits.min()


def scores(queries, keys, visible, biases, scaling=None, softcap=None):
    """(score, error): softcap(scaling * q.k) + biases of the visible keys, a bound on its rounding."""
    q, k = array(queries), array(keys)
    H, D, G = q.shape[1], q.shape[3], k.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    q_bits, k_bits = lowest_bit(q), lowest_bit(k)
    score, error = np.zeros(visible.shape), np.zeros(visible.shape)
    for b, h, i, j in np.argwhere(visible):
        g = h // (H // G)
        products = q[b, h, i] * k[b, g, j]
        x = scaling * float(products.sum())
        wrong = 0.0 if math.frexp(scaling)[0] == 0.5 else ULP * abs(x)
        if not is_exact(products, q_bits[b, h, i] + k_bits[b, g, j]):
            wrong += (D + 2) * ULP * abs(scaling) * float(np.abs(products).sum())
        if softcap is not None:
            wrong *= 1 - math.tanh(max(abs(x) - wrong, 0) / softcap) ** 2  # the steepest slope nearby
            x = softcap * math.tanh(x / softcap)
            wrong += 6 * ULP * abs(x)
        terms = np.array([x, *(bias[b, h, i, j] for bias in biases)])
        if not is_exact(terms, lowest_bit(terms)):
            wrong += len(terms) * ULP * float(np.abs(terms).sum())
        score[b, h, i, j] = math.fsum(terms)
        error[b, h, i, j] = wrong
    return score, error


# Selection


@dataclass
class Inputs:
    """What the published methods look at besides the scores."""

    queries: np.ndarray  # [B, H, Q, D]
    keys: np.ndarray  # [B, G, K, D]
    values: np.ndarray  # [B, G, K, Dv]
    scaling: float
    real: np.ndarray  # [B, K]: keys that some row sees, whatever a model's own indexer says
    layer: int = 0
    given: dict = field(default_factory=dict)  # what a method was handed, by `type`: codebooks, planes


@dataclass
class Rows:
    """What a masker sees. All [B, H, Q, K]; `sure` [B, H, Q]."""

    visible: np.ndarray
    weights: np.ndarray
    score: np.ndarray
    error: np.ndarray
    sure: np.ndarray
    kv_heads: int
    inputs: Inputs | None = None

    def __iter__(self):
        B, H, Q, _ = self.visible.shape
        return iter((b, h, i) for b in range(B) for h in range(H) for i in range(Q))

    def groups(self):
        """Every (b, heads of one KV head, i)."""
        B, H, Q, _ = self.visible.shape
        size = H // self.kv_heads
        for b in range(B):
            for g in range(self.kv_heads):
                for i in range(Q):
                    yield b, range(g * size, (g + 1) * size), i


@dataclass
class Estimate:
    """What one row is ranked by: float64 values with bounds, and each of them rounded once to float32."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __post_init__(self):
        self.rank, self.rank_low, self.rank_high = (to_float32(x) for x in (self.value, self.low, self.high))


def budget(size, n: int) -> int:
    return size if isinstance(size, int) else max(1, int(size * n))


def positions(flags) -> list[int]:
    return [j for j, flag in enumerate(flags) if flag]


def sink(config, rows: Rows) -> None:
    for row in rows:
        seen = positions(rows.visible[row])
        for j in seen[: budget(config["sink_size"], len(seen))]:
            rows.weights[row][j] = 1.0


def local(config, rows: Rows) -> None:
    for row in rows:
        seen = positions(rows.visible[row])
        for j in seen[::-1][: budget(config["window_size"], len(seen))]:
            rows.weights[row][j] = 1.0


def causal(config, rows: Rows) -> None:
    for row in rows:
        for j in positions(rows.visible[row]):
            rows.weights[row][j] = 1.0


def softmax(score, error, over: list[int]) -> Estimate:
    """Softmax weights over the keys `over` (0 elsewhere), with bounds for `error` and float64 rounding."""
    value, low, high = (np.zeros(len(score)) for _ in range(3))
    if not over:
        return Estimate(value, low, high)
    top = max(score[j] for j in over)
    e = {j: math.exp(score[j] - top) for j in over}
    total = math.fsum(e.values())
    spread = math.fsum(e[j] * error[j] for j in over) / total
    for j in over:
        value[j] = e[j] / total
        relative = error[j] + spread + ULP * (len(over) + 8 + abs(score[j] - top))
        low[j], high[j] = value[j] * math.exp(-min(relative, 700)), value[j] * math.exp(min(relative, 700))
    return Estimate(value, low, high)


def group_estimate(rows: Rows, b, heads, i) -> Estimate:
    """Sum over the group's heads of each head's softmax over its visible keys."""
    parts = []
    for h in heads:
        parts.append(softmax(rows.score[b, h, i], rows.error[b, h, i], positions(rows.visible[b, h, i])))
    slack = 1 + ULP * len(parts)
    return Estimate(sum(p.value for p in parts), sum(p.low for p in parts) / slack, sum(p.high for p in parts) * slack)


def group_candidates(rows: Rows, b, heads, i) -> list[int]:
    """Visible keys that are not active in every head of the group (that sees them)."""
    lacking = np.zeros(rows.visible.shape[-1], dtype=bool)
    for h in heads:
        lacking |= rows.visible[b, h, i] & (rows.weights[b, h, i] == 0)
    return positions(lacking)


def group_visible(rows: Rows, b, heads, i) -> list[int]:
    return positions(np.any([rows.visible[b, h, i] for h in heads], axis=0))


def activate(rows: Rows, b, heads, i, chosen, sure) -> None:
    for h in heads:
        rows.sure[b, h, i] &= sure
        for j in chosen:
            if rows.visible[b, h, i, j]:
                rows.weights[b, h, i, j] = 1.0


def best(candidates: list[int], estimate: Estimate, count: int):
    """(the `count` best, whether that is sure): highest float32 value first, lower position first."""
    order = sorted(candidates, key=lambda j: (-float(estimate.rank[j]), j))
    taken, left = order[:count], order[count:]
    low, high = estimate.rank_low, estimate.rank_high
    if all(low[j] == high[j] for j in order):
        return taken, True
    return taken, all(low[a] > high[b] or (low[a] == high[b] and a < b) for a in taken for b in left)


def oracle_top_k(config, rows: Rows) -> None:
    if config.get("gqa", "head") == "group":
        for b, heads, i in rows.groups():
            count = budget(config["heavy_size"], len(group_visible(rows, b, heads, i)))
            taken = best(group_candidates(rows, b, heads, i), group_estimate(rows, b, heads, i), count)
            activate(rows, b, heads, i, *taken)
        return
    for b, h, i in rows:
        visible, score, error = rows.visible[b, h, i], rows.score[b, h, i], rows.error[b, h, i]
        candidates = positions(visible & (rows.weights[b, h, i] == 0))
        estimate = Estimate(score, score - error, score + error)
        count = budget(config["heavy_size"], int(visible.sum()))
        activate(rows, b, [h], i, *best(candidates, estimate, count))


def reach(candidates: list[int], x: Estimate, held: float, top_p: float):
    """(keys at or above the top-p threshold, whether that is sure)."""
    if top_p == 1.0 or not candidates:
        return candidates, True
    total = held + math.fsum(x.value[j] for j in candidates)
    if total == 0:  # all underflow to 0 (beside a key that is already active): all tie at the threshold
        return candidates, True
    doubt = SHARE_EDGE + math.fsum(x.high[j] - x.low[j] for j in candidates) / total
    wanted = top_p - SHARE_SLACK
    if top_p > 0 and held / total >= wanted:
        return [], held / total >= wanted + doubt
    sure = top_p == 0 or held / total < wanted - doubt
    order = sorted(candidates, key=lambda j: (-float(x.rank[j]), j))
    running = held
    for last in order:
        running += x.value[last]
        if running / total >= wanted:
            break
    sure &= abs(running / total - wanted) > doubt and abs((running - x.value[last]) / total - wanted) > doubt
    for j in order:  # a key whose float32 value may fall on either side of the threshold
        exact = x.rank_low[j] == x.rank_high[j] and x.rank_low[last] == x.rank_high[last]
        apart = x.rank_low[j] > x.rank_high[last] or x.rank_high[j] < x.rank_low[last]
        sure &= j == last or exact or apart
    return [j for j in order if x.rank[j] >= x.rank[last]], bool(sure)


def oracle_top_p(config, rows: Rows) -> None:
    total = config.get("coverage", "remaining") == "total"
    if config.get("gqa", "head") == "group":
        for b, heads, i in rows.groups():
            candidates = group_candidates(rows, b, heads, i)
            x = group_estimate(rows, b, heads, i)
            others = set(group_visible(rows, b, heads, i)) - set(candidates)
            held = math.fsum(x.value[j] for j in others) if total else 0.0
            activate(rows, b, heads, i, *reach(candidates, x, held, config["top_p"]))
        return
    for b, h, i in rows:
        visible, active = rows.visible[b, h, i], rows.weights[b, h, i] > 0
        candidates = positions(visible & ~active)
        over = positions(visible) if total else candidates
        x = softmax(rows.score[b, h, i], rows.error[b, h, i], over)
        held = math.fsum(x.value[j] for j in positions(visible & active))
        activate(rows, b, [h], i, *reach(candidates, x, held, config["top_p"]))


def splitmix(*counters: int) -> float:
    """A number in [0, 1) for the counters: SplitMix64's finaliser after adding each to the state."""
    state, whole = 0, 2**64 - 1
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & whole
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & whole
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & whole
        state ^= state >> 31
    return (state >> 11) / 2**53


def random_sampling(config, rows: Rows) -> None:
    place = np.cumsum(rows.inputs.real, axis=-1) - 1
    for b, h, i in rows:
        seen = positions(rows.visible[b, h, i])
        candidates = [j for j in seen if rows.weights[b, h, i, j] == 0]
        if not candidates:
            continue
        at = (config.get("seed", 0), rows.inputs.layer, h, int(place[b, seen[-1]]))
        order = sorted(candidates, key=lambda j: (-splitmix(*at, int(place[b, j])), j))
        size = budget(config["sampling_rate"], len(candidates))
        for j in order[:size]:
            rows.weights[b, h, i, j] = to_float32(size / len(candidates))


LOOPS = {
    "sink": sink,
    "local": local,
    "causal": causal,
    "oracle_top_k": oracle_top_k,
    "oracle_top_p": oracle_top_p,
    "random_sampling": random_sampling,
}


def top_p_threshold(weights: list[float], top_p: float) -> float:
    """The threshold of one row of non-negative weights."""
    ordered = sorted(weights, reverse=True)
    if top_p == 1.0:
        return ordered[-1]
    running, total = 0.0, math.fsum(weights)
    for x in ordered:
        running += x
        if running / total >= top_p - SHARE_SLACK:
            return x
    raise AssertionError("the last share is 1")


# Output


def attend(score, weights, visible, values, sinks=None):
    """[B, Q, H, Dv]: sum exp(s)/w v / sum exp(s)/w over the active keys; a row without one is zeros."""
    v = array(values)
    B, H, Q, _ = score.shape
    G = v.shape[1]
    out = np.zeros((B, Q, H, v.shape[-1]))
    for b, h, i in np.ndindex(B, H, Q):
        active = positions(visible[b, h, i] & (weights[b, h, i] > 0))
        if not active:
            continue
        logit = {j: score[b, h, i, j] - math.log(weights[b, h, i, j]) for j in active}
        top = max(logit.values())
        denominator = 0.0
        if sinks is not None:
            learned = float(sinks[h])
            top = max(top, learned)
            denominator = math.exp(learned - top)
        for j in active:
            share = math.exp(logit[j] - top)
            denominator += share
            out[b, i, h] += share * v[b, h // (H // G), j]
        out[b, i, h] /= denominator
    return out


@dataclass
class Truth:
    out: np.ndarray  # [B, Q, H, Dv]
    weights: np.ndarray  # [B, H, Q, K]
    sure: np.ndarray  # [B, H, Q]
    visible: np.ndarray
    score: np.ndarray


def sparse_attention(
    queries,
    keys,
    values,
    maskers: list[dict],
    attention_mask=None,
    is_causal=True,
    scaling=None,
    softcap=None,
    sinks=None,
    position_bias=None,
    indices=None,
    previous_mask=None,
    layer_idx=0,
    given=None,
) -> Truth:
    """The whole computation; `previous_mask` a dense tensor of weights, `given` what methods were handed."""
    B, H, Q, _ = queries.shape
    shape = (B, H, Q, keys.shape[2])
    visible, bias = visibility(shape, attention_mask, is_causal, indices)
    biases = [bias]
    if position_bias is not None:
        biases.append(np.broadcast_to(array(position_bias), shape))
    score, error = scores(queries, keys, visible, biases, scaling, softcap)
    weights = np.zeros(shape) if previous_mask is None else array(previous_mask).copy()
    seen = visible if indices is None else visibility(shape, attention_mask, is_causal)[0]
    factor = queries.shape[3] ** -0.5 if scaling is None else scaling
    tensors = (array(queries), array(keys), array(values))
    inputs = Inputs(*tensors, factor, seen.any(axis=(1, 2)), layer_idx, given or {})
    rows = Rows(visible, weights, score, error, np.ones(shape[:3], dtype=bool), keys.shape[1], inputs)
    for config in maskers or [{"type": "causal"}]:
        LOOPS[config["type"]](config, rows)
    out = attend(score, rows.weights, visible, values, None if sinks is None else array(sinks))
    return Truth(out, rows.weights, rows.sure, visible, score)
