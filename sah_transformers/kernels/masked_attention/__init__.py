"""Attention over the active keys of a mask.

    out = sum_{active j} exp(s_j)/w_j v_j  /  sum_{active j} exp(s_j)/w_j

in float32, with the row's maximum subtracted; learned sinks add to the denominator; a row without active keys gives
zeros.
"""

from sah_transformers.kernels.masked_attention.reference import masked_attention

__all__ = ["masked_attention"]
