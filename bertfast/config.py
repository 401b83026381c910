"""BertConfig: Hugging Face's field names, the published sizes, and what we refuse to misread."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import UserError, read_json, write_json
from .nn import ACTIVATIONS


@dataclass
class BertConfig:
    """Sizes and rates of a BERT; the defaults are BERT base, uncased (Devlin et al. 2019)."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    is_decoder: bool = False  # causal: a token sees those before it and itself
    extra: dict[str, Any] = field(default_factory=dict)  # fields of the file that we carry through unread

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of 1 or more, got {value!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"):
            if not isinstance(value := getattr(self, name), (int, float)):
                raise UserError(f"{name} must be a number, got {value!r}")
        if type(self.is_decoder) is not bool:
            raise UserError(f"is_decoder must be true or false, got {self.is_decoder!r}")
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(f"pad_token_id {self.pad_token_id!r} is not in the vocabulary of {self.vocab_size}")
        if self.hidden_act not in ("gelu", *ACTIVATIONS):
            raise UserError(f"hidden_act {self.hidden_act!r} is unknown; known: gelu, {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @classmethod
    def preset(cls, name: str, **changes) -> "BertConfig":
        """One of the published sizes, `tiny` to `large`; keyword arguments change further fields.

        Raises UserError for another name, and for values that no BERT can have.
        """
        if name not in PRESETS:
            raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
        layers, hidden = PRESETS[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_file(cls, path: Path) -> "BertConfig":
        """Read a config.json. Raises UserError for another architecture or a variant we would compute wrongly."""
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> "BertConfig":
        """The same from the file's content."""
        if not isinstance(values, dict) or "hidden_size" not in values or "num_hidden_layers" not in values:
            raise UserError(f"{path} is not a BERT configuration")
        if values.get("model_type", "bert") != "bert":
            raise UserError(f"{path} describes a {values['model_type']} model; this class reads BERT")
        for name, wanted in (("position_embedding_type", "absolute"), ("add_cross_attention", False),
                             ("tie_word_embeddings", True)):
            if values.get(name, wanted) != wanted:
                raise UserError(f"{path}: {name}={values[name]!r} is not supported, only {wanted!r}")
        known = {f.name for f in fields(cls)} - {"extra"}
        values["pad_token_id"] = values.get("pad_token_id") or 0
        return cls(**{k: v for k, v in values.items() if k in known},
                   extra={k: v for k, v in values.items() if k not in known})

    def save(self, path: Path, architecture: str) -> None:
        """Write a config.json for the model class `architecture`. Raises UserError where it cannot be written."""
        values = asdict(self)
        extra = values.pop("extra")
        extra.pop("torch_dtype", None)  # of the file that was read, as an older transformers calls dtype
        own = {"architectures": [architecture], "model_type": "bert", "dtype": "float32"}
        write_json(path, {**extra, **own, **values})


PRESETS = {  # (layers, hidden size); heads of 64, intermediate size 4 H (Turc et al. 2019; Devlin et al. 2019)
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
