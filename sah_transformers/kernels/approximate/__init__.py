"""Scores of keys from side data, for the decode pipeline: one module per method, each with the same functions.

- ``given_of(masker, queries, ctx)``: what the kernels need besides side data (weights, channels, codebooks);
  ``why_not(given, dim)``: what of it they do not cover, or "".
- ``scratch(call, side, given)``: ``{name: (size, dtype)}`` of the arrays that ``look_up`` fills.
- ``look_up(launch, call, side, given, scratch)``: what depends on the query alone, once per call.
- ``score(launch, call, side, given, scratch, tile)``: what `decode.score.score_kernel` does, with estimates from side
  data in place of ``q.k``: the same outputs, with the same meaning.
- ``append(buffers, keys, values, start, given)``: side data of new keys, in place.

``TILES`` are the cuts into programs, best first. ``call`` is a `launch.Scoring`, ``launch`` a
`decode.kernel.Launcher`. ``side`` holds the masker's tensors ``[B, heads, >= K, ...]`` by name, views of storages
with any strides; storages of a multiple of 16 keys are read in wide loads. Estimates equal the masker's ``score``, in
its head order and with its sign, up to float32 rounding, HashAttention's exactly. Figures below are estimates for an
H100, not yet measured: B=1, H=32, G=8, K=131,072, 3 TB/s, 1.755 GHz, instructions counted in the sm_90 code of the
variant with masses.
"""
