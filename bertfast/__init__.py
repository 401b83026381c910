"""bertfast: fused kernels for BERT, and a pretraining and fine-tuning stack on top of them."""

import importlib

from .version import __version__

_HOMES = {  # public name -> where it is defined; imported when first used, so that `bertfast --help` need not wait
    "BertConfig": "config",
    "BertForMaskedLM": "model",
    "BertForMultipleChoice": "heads",
    "BertForNextSentencePrediction": "model",
    "BertForPreTraining": "model",
    "BertForQuestionAnswering": "heads",
    "BertForSeq2Seq": "seq2seq",
    "BertForSequenceClassification": "heads",
    "BertForTokenClassification": "heads",
    "BertLMHeadModel": "model",
    "BertModel": "model",
    "PackedBatch": "batch",
    "parity": "patch_parity",
    "patch": "patching",
    "unpatch": "patching",
    "backends": "ops",
}
__all__ = ["__version__", "nn", "ops", *_HOMES]


def __getattr__(name: str):
    if name in ("nn", "ops"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
