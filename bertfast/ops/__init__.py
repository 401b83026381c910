"""The fused ops: each file says what its op means (formula, shapes, reference, schema, autograd, public function)."""

from ._define import OPS, implementation, load_backends
from .add_layer_norm import add_layer_norm
from .attention import attention, attention_packed
from .bias_gelu import bias_gelu
from .dropout import dropout
from .embedding_sum import embedding_sum
from .few_rows_linear import few_rows_linear
from .gelu_layer_norm import gelu_layer_norm
from .gemm import gemm
from .masked_vocab_projection import masked_vocab_projection
from .optimizer_step import adamw_step, grad_norm, lamb_step

__all__ = [
    "adamw_step",
    "add_layer_norm",
    "attention",
    "attention_packed",
    "backends",
    "bias_gelu",
    "dropout",
    "embedding_sum",
    "few_rows_linear",
    "gelu_layer_norm",
    "gemm",
    "grad_norm",
    "lamb_step",
    "masked_vocab_projection",
]

_loaded = load_backends()


def backends() -> dict[str, dict[str, str]]:
    """Which implementation of each op runs on each device, and why: {op: {"cpu": ..., "cuda": ...}}."""
    return {name: {device: implementation(name, device, _loaded) for device in _loaded} for name in OPS}


def why_slow(device: str) -> str:
    """Why the ops run as the slow references on devices of this type, or nothing."""
    where = implementation("attention_fwd", device, _loaded) if device in _loaded else ""
    return where.removeprefix("reference: ") if where.startswith("reference: ") else ""
