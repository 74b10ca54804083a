"""Maskers: one file per method, config and algorithm together."""

from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.causal import CausalMasker, CausalMaskerConfig
from sah_transformers.maskers.double_sparsity import DoubleSparsityTopKMasker, DoubleSparsityTopKMaskerConfig
from sah_transformers.maskers.hash_attention import HashAttentionTopKMasker, HashAttentionTopKMaskerConfig
from sah_transformers.maskers.local import LocalMasker, LocalMaskerConfig
from sah_transformers.maskers.oracle_top_k import OracleTopK, OracleTopKConfig
from sah_transformers.maskers.oracle_top_p import OracleTopPMasker, OracleTopPMaskerConfig
from sah_transformers.maskers.pq_cache import PQCache, PQCacheConfig
from sah_transformers.maskers.quest import QuestTopKMasker, QuestTopKMaskerConfig
from sah_transformers.maskers.random_sampling import RandomSamplingMasker, RandomSamplingMaskerConfig
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.sink import SinkMasker, SinkMaskerConfig
from sah_transformers.maskers.socket import SocketMasker, SocketMaskerConfig
from sah_transformers.maskers.stack import MaskerStack
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.maskers.top_p import TopPMasker, TopPMaskerConfig

__all__ = [
    "CausalMasker",
    "CausalMaskerConfig",
    "DoubleSparsityTopKMasker",
    "DoubleSparsityTopKMaskerConfig",
    "HashAttentionTopKMasker",
    "HashAttentionTopKMaskerConfig",
    "LocalMasker",
    "LocalMaskerConfig",
    "Masker",
    "MaskerConfig",
    "MaskerRegistry",
    "MaskerStack",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopPMasker",
    "OracleTopPMaskerConfig",
    "PQCache",
    "PQCacheConfig",
    "QuestTopKMasker",
    "QuestTopKMaskerConfig",
    "RandomSamplingMasker",
    "RandomSamplingMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
    "SocketMasker",
    "SocketMaskerConfig",
    "TopKMasker",
    "TopKMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
]
