"""BERT's blocks as plain nn.Modules on the fused ops, with Hugging Face's parameter names.

All of them work on packed rows (T, H): sequences one after another, no padding. What a block must know about the
rows besides their values is in `Rows`. Dropout streams are constants of layer and site (see bertfast.ops.dropout):
0 for the embeddings, 3 i + 1, 3 i + 2, 3 i + 3 for attention, its output and the feed-forward output of layer i.
Fused ops read the weights of the modules inside; a module that is more than its weights (a subclass, an adapter, one
with a hook) is called instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .ops.linear import is_plain, joined_linear, linear
from .ops.masked_vocab_projection import GradientSink

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}  # besides "gelu" (erf), the one BERT was trained with, which is fused


@dataclass
class Rows:
    """How T rows fall into B sequences, and what dropout counts by.

    cu_seqlens: (B + 1,) int32; max_seqlen: an upper bound, constant for a phase; row_key: (T,) int64, sequence
    index << 32 | position; seed: int64 with one element, or None where nothing is dropped (eval).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    row_key: Tensor
    seed: Tensor | None = None

    def subset(self, rows: Tensor, cu_seqlens: Tensor) -> "Rows":
        """The rows at indices `rows`, which `cu_seqlens` groups by the same sequences."""
        return Rows(cu_seqlens, self.max_seqlen, self.row_key[rows], self.seed)

    def dropout(self, p: float, stream: int) -> dict:
        return {"p": 0.0 if self.seed is None else p, "seed": self.seed, "row_key": self.row_key, "stream": stream}


class Embeddings(nn.Module):
    """dropout(LayerNorm(word + position + token type)): ids (T,) -> (T, H)."""

    def __init__(self, vocab_size, hidden_size, max_positions=512, type_vocab_size=2, padding_idx=0, eps=1e-12, p=0.1):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps)
        self.p = p
        self.sink: GradientSink | None = None  # set by bertfast.optim.Optimizer

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: a copy is not the optimiser's, which alone reads the sink."""
        return {**self.__dict__, "sink": None}

    def _is_plain(self) -> bool:
        """Whether the tables and the LayerNorm are what the fused op computes."""
        return is_plain(self.LayerNorm, nn.LayerNorm) and all(
            is_plain(t, nn.Embedding) and t.max_norm is None and not (t.sparse or t.scale_grad_by_freq)
            for t in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        )

    def _sink(self) -> GradientSink | None:
        """The optimiser's, unless the table was frozen since."""
        return self.sink if self.word_embeddings.weight.requires_grad else None

    def tied(self) -> tuple[Tensor, GradientSink | None]:
        """For a tied projection, after `forward`: the word table's weight as it is, its sink if `forward` used it."""
        return self.word_embeddings.weight, self._sink() if self._is_plain() else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, rows: Rows) -> Tensor:
        word, position, token_type = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        norm, dropout = self.LayerNorm, rows.dropout(self.p, stream=0)
        if not self._is_plain():
            return ops.dropout(norm(word(input_ids) + position(position_ids) + token_type(token_type_ids)), **dropout)
        return ops.embedding_sum(
            input_ids, position_ids, token_type_ids, word.weight, position.weight, token_type.weight, norm.weight,
            norm.bias, norm.eps, word.padding_idx, **dropout, sink=self._sink(),
        )


class SelfAttention(nn.Module):
    """Multi-head attention over each sequence: (T, H) -> (T, H), or (R, H) where only R rows are read.

    mask_mode and prefix_lens as in bertfast.ops.attention.
    """

    def __init__(self, hidden_size, n_heads, p=0.1, stream=1):
        super().__init__()
        if hidden_size % n_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of {n_heads} attention heads")
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.n_heads, self.head_dim, self.p, self.stream = n_heads, hidden_size // n_heads, p, stream

    def forward(self, x: Tensor, rows: Rows, read: Rows | None = None, read_rows: Tensor | None = None,
                mask_mode: str = "full", prefix_lens: Tensor | None = None) -> Tensor:
        mask = {"mask_mode": mask_mode, "prefix_lens": prefix_lens}
        if read is None:
            qkv = joined_linear(x, self.query, self.key, self.value).view(-1, 3, self.n_heads, self.head_dim)
            out = ops.attention_packed(qkv, rows.cu_seqlens, rows.max_seqlen, **mask,
                                       **rows.dropout(self.p, self.stream))
        else:
            q = self.query(x[read_rows]).view(-1, self.n_heads, self.head_dim)
            k, v = joined_linear(x, self.key, self.value).view(-1, 2, self.n_heads, self.head_dim).unbind(1)
            dropout = read.dropout(self.p, self.stream)
            dropout["q_row_key"] = dropout.pop("row_key")
            out = ops.attention(q, k, v, read.cu_seqlens, rows.cu_seqlens, read.max_seqlen, rows.max_seqlen, **mask,
                                **dropout)
        return out.flatten(1)


class AddLayerNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): (T, I), (T, H) -> (T, H); the end of both halves of a layer.

    With `gelu_bias` (I,), x stands for GELU(x + gelu_bias).
    """

    def __init__(self, in_features, hidden_size, eps=1e-12, p=0.1, stream=2):
        super().__init__()
        self.dense = nn.Linear(in_features, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps)
        self.p, self.stream = p, stream

    def forward(self, x: Tensor, residual: Tensor, rows: Rows, gelu_bias: Tensor | None = None) -> Tensor:
        y, bias = linear(x, self.dense, gelu_bias)
        norm, dropout = self.LayerNorm, rows.dropout(self.p, self.stream)
        if not is_plain(norm, nn.LayerNorm):
            return norm(ops.dropout(y + bias, **dropout) + residual)
        return ops.add_layer_norm(y, bias, residual, norm.weight, norm.bias, norm.eps, **dropout)


class FeedForward(nn.Module):
    """activation(dense(x)): (T, H) -> (T, I); Hugging Face's `intermediate`, its way back is an AddLayerNorm.

    Returns that and None, or for "gelu", which is left to the way back, dense(x) without its bias, and the bias.
    """

    def __init__(self, hidden_size, intermediate_size, activation="gelu"):
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)
        self.activation = activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.activation == "gelu":
            return linear(x, self.dense)
        return ACTIVATIONS[self.activation](self.dense(x)), None


class MLMHead(nn.Module):
    """The masked-language-model head: transform, then the tied vocabulary. (P, H) -> loss, or logits (P, V)."""

    def __init__(self, vocab_size, hidden_size, eps=1e-12, activation="gelu"):
        super().__init__()
        dense, norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.activation = activation

    def hidden(self, x: Tensor) -> Tensor:
        """The transform: (P, H) -> (P, H)."""
        dense: Any = self.transform["dense"]
        norm: Any = self.transform["LayerNorm"]
        if self.activation != "gelu":
            return norm(ACTIVATIONS[self.activation](dense(x)))
        y, bias = linear(x, dense)
        if not is_plain(norm, nn.LayerNorm):
            return norm(ops.bias_gelu(y, bias))
        return ops.gelu_layer_norm(y, bias, norm.weight, norm.bias, norm.eps)

    def logits(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """(P, H) -> (P, V) by the word table (V, H)."""
        return F.linear(self.hidden(x), word_embeddings, self.bias)

    def forward(self, x: Tensor, word_embeddings: Tensor, labels: Tensor, scale: Tensor | None = None,
                sink: GradientSink | None = None):
        """(loss, n_masked, n_correct) as in bertfast.ops.masked_vocab_projection."""
        return ops.masked_vocab_projection(self.hidden(x), word_embeddings, self.bias, labels, scale, sink)
