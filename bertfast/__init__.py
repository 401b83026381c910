"""bertfast: fused kernels for BERT, and a pretraining and fine-tuning stack on top of them."""

from . import nn, ops
from .batch import PackedBatch
from .config import BertConfig
from .model import BertForMaskedLM, BertForNextSentencePrediction, BertForPreTraining, BertModel
from .ops import backends
from .version import __version__

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertModel",
    "PackedBatch",
    "__version__",
    "backends",
    "nn",
    "ops",
]
