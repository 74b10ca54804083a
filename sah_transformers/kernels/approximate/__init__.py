"""Scores of keys from side data, for the decode pipeline: one module per method, each with the same functions.

- ``given_of(masker, queries, ctx)``: what the kernels need besides side data (weights, channels, codebooks).
- ``scratch(call, side, given)``: ``{name: (size, dtype)}`` of the arrays that ``look_up`` fills.
- ``look_up(launch, call, side, given, scratch)``: what depends on the query alone, once per call; may launch nothing.
- ``score(launch, call, side, given, scratch, tile)``: what `kernels.decode.score.score_kernel` does, with estimates from
  ``side`` in place of ``q.k``: the same outputs, with the same meaning.
- ``append(buffers, keys, values, start, given)``: side data of new keys, in place.

``TILES`` are the cuts into programs, best first; ``why_not(masker)`` says what a method's kernels do not cover. ``side``
holds the masker's tensors of these names, views ``[B, heads, >= K, ...]`` of storages with any strides; loads are
wide where strides over batches and heads are multiples of 16 elements. ``launch`` is a `decode.kernel.Launcher`.
Head order is that of the masker's ``score``: estimates equal it up to float32 rounding (HashAttention's exactly).
"""
