"""Making what Double Sparsity and HashAttention need of a model: channel orders, trained hashes."""

from sah_transformers.prepare.channels import calibrate_double_sparsity
from sah_transformers.prepare.hash_run import train_hash_attention
from sah_transformers.prepare.hash_training import HashSettings
from sah_transformers.prepare.origin import origin_of
from sah_transformers.prepare.text import DEFAULT_TEXT, Text, read_text

__all__ = [
    "DEFAULT_TEXT",
    "HashSettings",
    "Text",
    "calibrate_double_sparsity",
    "origin_of",
    "read_text",
    "train_hash_attention",
]
