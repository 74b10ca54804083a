"""Benchmarks behind ``sah bench``: cases from YAML, checked against the reference, timed beside dense attention.

``suites`` reads the cases, ``inputs`` makes their tensors and calls, ``check`` says whether the operation is right
(nothing is timed before), ``timing`` takes times and memory, ``dense`` has the other side, ``run`` leads one case from
tensors to a result, ``report`` and ``plot`` show it.
"""
