"""Exact selection of keys by estimate: the k best, or the fewest that hold a share of the mass.

Contract, for both: estimates ``[..., K]`` with any leading dimensions, candidates a bool tensor broadcastable to
them or None for all, ties broken towards the lower position, and each row decided on its own. ``cut_is_close``
flags the rows whose estimates cannot decide the cut within ``margin``; the caller decides those in float64.
"""

from sah_transformers.kernels.select.reference import select_top_k, select_top_p, top_p_thresholds

__all__ = ["select_top_k", "select_top_p", "top_p_thresholds"]
