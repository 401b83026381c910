"""bertfast: fused kernels for BERT, and a pretraining and fine-tuning stack on top of them."""

from .ops import backends
from .version import __version__

__all__ = ["__version__", "backends"]
