"""How Transformers meets the attention ``"sah"``. The only files of the package that import ``transformers``."""

from sah_transformers.integration.cache import AppendingCache
from sah_transformers.integration.captured import CudaGraphConfig
from sah_transformers.integration.loading import install
from sah_transformers.integration.models import LayerSupport, Support, disable, enable, supported

__all__ = ["AppendingCache", "CudaGraphConfig", "LayerSupport", "Support", "disable", "enable", "install", "supported"]
