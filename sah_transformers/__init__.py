"""Sparse attention for Hugging Face Transformers.

Importing the package registers the attention ``"sah"`` and teaches ``from_pretrained`` the keyword
``sparse_attention``.
"""

from sah_transformers.attention import sparse_attention
from sah_transformers.config import SparseAttentionConfig
from sah_transformers.integration import (
    AppendingCache,
    CudaGraphConfig,
    LayerSupport,
    Support,
    disable,
    enable,
    install,
    supported,
)
from sah_transformers.kernels.select import top_p_thresholds
from sah_transformers.mask import Mask
from sah_transformers.maskers import (
    CausalMasker,
    CausalMaskerConfig,
    DoubleSparsityTopKMasker,
    DoubleSparsityTopKMaskerConfig,
    HashAttentionTopKMasker,
    HashAttentionTopKMaskerConfig,
    LocalMasker,
    LocalMaskerConfig,
    Masker,
    MaskerConfig,
    MaskerRegistry,
    OracleTopK,
    OracleTopKConfig,
    OracleTopPMasker,
    OracleTopPMaskerConfig,
    PQCache,
    PQCacheConfig,
    QuestTopKMasker,
    QuestTopKMaskerConfig,
    RandomSamplingMasker,
    RandomSamplingMaskerConfig,
    SinkMasker,
    SinkMaskerConfig,
    SocketMasker,
    SocketMaskerConfig,
    TopKMasker,
    TopKMaskerConfig,
    TopPMasker,
    TopPMaskerConfig,
)
from sah_transformers.record import Log, record
from sah_transformers.rows import Context, Rows
from sah_transformers.state import State

__version__ = "0.1.0"

__all__ = [
    "AppendingCache",
    "CausalMasker",
    "CausalMaskerConfig",
    "Context",
    "CudaGraphConfig",
    "DoubleSparsityTopKMasker",
    "DoubleSparsityTopKMaskerConfig",
    "HashAttentionTopKMasker",
    "HashAttentionTopKMaskerConfig",
    "LayerSupport",
    "LocalMasker",
    "LocalMaskerConfig",
    "Log",
    "Mask",
    "Masker",
    "MaskerConfig",
    "MaskerRegistry",
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
    "Rows",
    "SinkMasker",
    "SinkMaskerConfig",
    "SocketMasker",
    "SocketMaskerConfig",
    "SparseAttentionConfig",
    "State",
    "Support",
    "TopKMasker",
    "TopKMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
    "disable",
    "enable",
    "record",
    "sparse_attention",
    "supported",
    "top_p_thresholds",
]

install()
