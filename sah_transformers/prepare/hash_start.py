"""Where the training of hashes starts: MLPs whose codes are random planes, fitted to a layer's queries and keys.

``silu(x) - silu(-x) == x``, so two hidden channels carry one number through an MLP. Trained from planes, the codes are
after 150 steps as good as after 500 from the random weights that the authors start with.
"""

from __future__ import annotations

import torch

EPSILON = 1e-3
"""Of the mean channel: added to each channel's size, so that one which is always 0 has a scale."""


def first_weights(
    queries: torch.Tensor, keys: torch.Tensor, shared: bool, hidden: int, bits: int, seed: int
) -> dict[str, list[torch.Tensor]]:
    """Untrained MLPs for queries (``"q"``) and keys (``"k"``): weight, bias, weight, ... float32 on the CPU.

    The codes are signs of P (a (k - mean)) and P (q / a): one set of random planes P per layer, mean keys taken away
    (which changes no row's order of its keys), and per channel an ``a`` that makes both sides equally large (which
    changes no dot product).

    Args:
        queries, keys: what the statistics are of, ``[N, H, n, D]``, ``[N, G, n, D]``.
        shared: one pair of MLPs per KV head instead of one per query head.
    """
    groups, dim, share = keys.shape[1], keys.shape[3], queries.shape[1] // keys.shape[1]
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randn(bits, dim, generator=generator)
    mean, of_keys = _mean_and_size(keys, groups)
    shift, of_queries = _mean_and_size(queries, groups)
    of_queries = (of_queries**2 + shift**2).sqrt()
    of_keys, of_queries = (x + EPSILON * x.mean(-1, keepdim=True) + 1e-12 for x in (of_keys, of_queries))
    balance = (of_queries / of_keys).sqrt()
    norm = (of_keys * balance).norm(dim=-1, keepdim=True)  # the codes' size, the same on both sides
    to_key, to_query = balance / norm, 1 / (balance * norm)
    many = groups if shared else groups * share
    each = many // groups

    def mlps(scale: torch.Tensor, offset: torch.Tensor) -> list[torch.Tensor]:
        scale, offset = (x.float().repeat_interleave(each, dim=0) for x in (scale, offset))
        return carry(planes, scale, offset, hidden, generator)

    return {"q": mlps(to_query, torch.zeros_like(to_query)), "k": mlps(to_key, mean * to_key)}


def _mean_and_size(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of each KV head, float64 ``[G, D]`` on the CPU."""
    total, squares = 0.0, 0.0
    for block in x:
        rows = block.unflatten(0, (groups, -1)).flatten(1, 2).cpu().double()
        total, squares = total + rows.mean(1), squares + (rows**2).mean(1)
    mean, square = torch.as_tensor(total) / len(x), torch.as_tensor(squares) / len(x)
    return mean, (square - mean**2).clamp(min=0).sqrt()


def carry(
    planes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hidden: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """MLPs that map x to ``planes @ (scale * x - offset)``.

    That is as many of the planes as there are pairs of hidden channels; if those are fewer, the codes are mixtures.
    Hidden channels that are left over begin as in ``torch.nn.Linear`` and are not read yet.

    Args:
        planes: ``[bits, D]``; scale, offset: ``[S, D]``.
    """
    (sets, dim), bits = scale.shape, len(planes)
    carried = min(bits, hidden // 2)
    tensors = []
    for fan_in, fan_out in ((dim, hidden), (hidden, hidden), (hidden, bits)):
        for shape in ((sets, fan_out, fan_in), (sets, fan_out)):
            tensors.append((torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5)
    first, first_bias, second, second_bias, third, third_bias = tensors
    pairs = slice(0, 2 * carried)
    signs = torch.cat([torch.eye(carried), -torch.eye(carried)])  # [2 carried, carried]
    first[:, pairs] = (signs @ planes[:carried]) * scale[:, None]
    first_bias[:, pairs] = -offset @ (signs @ planes[:carried]).T
    second[:, pairs], second_bias[:, pairs], third_bias[:] = 0, 0, 0
    second[:, pairs, pairs] = signs @ signs.T
    mixed = torch.eye(bits) if carried == bits else torch.randn(bits, carried, generator=generator) / carried**0.5
    third[:] = 0
    third[:, :, pairs] = mixed @ signs.T
    return tensors
