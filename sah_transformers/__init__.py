from sah_transformers.attention import sparse_attention
from sah_transformers.kernels.select import top_p_thresholds
from sah_transformers.mask import Mask
from sah_transformers.maskers import *  # noqa: F403
from sah_transformers.state import State
