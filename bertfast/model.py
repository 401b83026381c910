"""BERT out of the blocks in bertfast.nn: encoder, the pretraining heads, and the two ways to call them.

Packed:  model(batch) with a PackedBatch. Nothing is padded, shapes are fixed, the last layer computes only the rows
         that are read ([CLS] and masked), the vocabulary projection only the masked ones.
Padded:  model(input_ids, attention_mask, token_type_ids, ...), as in Hugging Face. Unpadded once before the
         embedding and padded back at the end; what is computed is the same.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch import PackedBatch
from .checkpoint import Checkpointed
from .config import BertConfig
from .nn import AddLayerNorm, Embeddings, FeedForward, MLMHead, Rows, SelfAttention
from .ops.dropout import draw_seed
from .ops.masked_vocab_projection import IGNORE_INDEX
from .patched_rows import Rows as PaddedRows
from .patched_rows import offsets


@dataclass
class ModelOutput:
    """What a call computed; None where it was not asked for. Padded calls get (batch, sequence, …) tensors back."""

    loss: Tensor | None = None  # 0-dim: the sum of the losses whose labels were given
    mlm_loss: Tensor | None = None  # of masked words, or by BertLMHeadModel of the next ones
    nsp_loss: Tensor | None = None
    n_masked: Tensor | None = None  # 0-dim int64 counts
    n_correct: Tensor | None = None
    n_pairs: Tensor | None = None
    n_pairs_correct: Tensor | None = None
    logits: Tensor | None = None  # vocabulary logits; only where no labels are given
    seq_relationship_logits: Tensor | None = None  # (B, 2)
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None  # (B, H)
    hidden_states: tuple[Tensor, ...] | None = None


class BertLayer(nn.Module):
    """Attention, then feed-forward, each ending in dropout, residual and LayerNorm (post-LN)."""

    def __init__(self, config: BertConfig, index: int):
        super().__init__()
        eps, p = config.layer_norm_eps, config.hidden_dropout_prob
        self.attention = nn.ModuleDict({
            "self": SelfAttention(
                config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob, 3 * index + 1
            ),
            "output": AddLayerNorm(config.hidden_size, config.hidden_size, eps, p, 3 * index + 2),
        })
        self.intermediate = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.output = AddLayerNorm(config.intermediate_size, config.hidden_size, eps, p, 3 * index + 3)

    def forward(self, x: Tensor, rows: Rows, read: Rows | None = None, read_rows: Tensor | None = None,
                **mask) -> Tensor:
        context = self.attention["self"](x, rows, read, read_rows, **mask)
        if read is not None:
            x, rows = x[read_rows], read
        return self.after_attention(context, x, rows)

    def after_attention(self, context: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The rest of the layer, from self-attention's output `context` and the layer's input x."""
        return self.feed_forward(self.attention["output"](context, x, rows), rows)

    def feed_forward(self, x: Tensor, rows: Rows) -> Tensor:
        up, gelu_bias = self.intermediate(x)
        return self.output(up, x, rows, gelu_bias)


class Pooler(nn.Module):
    """tanh(dense([CLS])): (B, H) -> (B, H)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls))


def unpad(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
          next_sentence_label=None) -> tuple[PackedBatch, PaddedRows]:
    """A padded call as a PackedBatch with just the attended tokens; all arguments (B, S) except the last, (B,).

    Raises ValueError for an argument of another shape (token_type_ids and position_ids may be one row for all), a label
    on a padded position, or a sequence whose first token is padding though others are not ([CLS] is read there).
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, sequence), got {tuple(input_ids.shape)}")
    n_sequences, length = input_ids.shape
    device = input_ids.device
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be a padding mask of shape {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    for name, given, shapes in (
        ("token_type_ids", token_type_ids, ((n_sequences, length), (1, length), (length,))),
        ("position_ids", position_ids, ((n_sequences, length), (1, length), (length,))),
        ("labels", labels, ((n_sequences, length),)),
        ("next_sentence_label", next_sentence_label, ((n_sequences,), (n_sequences, 1))),
    ):
        if given is not None and tuple(given.shape) not in shapes:
            raise ValueError(f"{name} must be of shape {shapes[0]}, got {tuple(given.shape)}")
    attended = attention_mask != 0
    if bool((attended.any(1) & ~attended[:, 0]).any()):
        raise ValueError("the first token of a sequence is padding: pad on the right")
    indices = attended.flatten().nonzero().squeeze(1)
    columns = torch.arange(length, device=device)
    cu_seqlens = offsets(attended.sum(1))
    pick = lambda t: t.expand(n_sequences, length).reshape(-1)[indices]
    position = pick(columns)  # dropout counts by the column, so that a mask does not depend on how a row was padded
    kept = torch.zeros_like(attended) if labels is None else labels != IGNORE_INDEX
    if bool((kept & ~attended).any()):
        raise ValueError("a label stands on a padded position (attention_mask 0)")
    reads = kept | ((columns == 0) & attended)  # [CLS] first, then the masked rows
    cu_seqlens_read = offsets(reads.sum(1))
    cls_index = cu_seqlens_read[:-1].clamp(max=max(int(cu_seqlens_read[-1]) - 1, 0)).long()
    batch = PackedBatch(
        input_ids=pick(input_ids),
        token_type_ids=pick(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids),
        position_ids=position if position_ids is None else pick(position_ids),
        cu_seqlens=cu_seqlens,
        max_seqlen=length,
        row_key=(indices // length << 32) + position,
        read_rows=pick(reads).nonzero().squeeze(1),
        cu_seqlens_read=cu_seqlens_read,
        cls_index=cls_index,
        mask_index=kept[reads].nonzero().squeeze(1),
        labels=labels[kept] if labels is not None else input_ids.new_empty(0),
        next_sentence_label=(
            input_ids.new_full((n_sequences,), IGNORE_INDEX) if next_sentence_label is None
            else next_sentence_label.view(-1)
        ),
        n_tokens=indices.numel(), n_masked=0, n_sequences=n_sequences,
    )
    return batch, PaddedRows(input_ids.shape, length, cu_seqlens, indices)


class BertModel(Checkpointed):
    """The encoder, with or without pooler; `recompute` keeps only layer inputs and computes the rest again."""

    base_prefix = ""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(
            config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
            config.pad_token_id, config.layer_norm_eps, config.hidden_dropout_prob,
        )
        layers = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = Pooler(config.hidden_size) if add_pooling_layer else None
        self.recompute = False
        self.apply(lambda module: initialise(module, config.initializer_range))

    def dropout_seed(self, seed: Tensor | None, device: torch.device) -> Tensor | None:
        """The key of a forward's dropout: `seed`, or in training drawn from torch's generator; None drops nothing."""
        if not self.training:
            return None
        if seed is None and max(self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob) > 0:
            return draw_seed(device)
        return seed

    def encode(self, batch: PackedBatch, seed: Tensor | None = None, read: bool = True,
               hidden_states: list[Tensor] | None = None, **mask) -> Tensor:
        """Packed rows after the last layer: (R, H) at batch.read_rows, or (T, H) where `read` is false.

        seed: the step's dropout key, int64 with one element; in training it is drawn from torch's generator if None.
        hidden_states: a list that collects embeddings and layer outputs, each (T, H); it implies all rows.
        mask: mask_mode and prefix_lens as in bertfast.ops.attention; without, causal where config.is_decoder says so.
        Raises ValueError under autocast, and where max_seqlen exceeds the model's positions.
        """
        if self.config.is_decoder and not mask:
            mask = {"mask_mode": "causal"}
        seed = self.dropout_seed(seed, batch.input_ids.device)
        if torch.is_autocast_enabled(batch.input_ids.device.type):
            raise ValueError("bertfast's own models take no autocast: give bertfast.optim.Optimizer a compute dtype")
        if batch.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"sequences of up to {batch.max_seqlen} tokens, but the model has "
                f"{self.config.max_position_embeddings} positions"
            )
        rows = Rows(batch.cu_seqlens, batch.max_seqlen, batch.row_key, seed)
        x = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids, rows)
        layers: Any = self.encoder["layer"]
        for layer in layers:
            if hidden_states is not None:
                hidden_states.append(x)
            subset: tuple = ()
            if read and layer is layers[-1]:
                subset = rows.subset(batch.read_rows, batch.cu_seqlens_read), batch.read_rows
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rows, *subset, **mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rows, *subset, **mask)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def pool(self, cls: Tensor) -> Tensor:
        """[CLS] rows (B, H) -> (B, H). Raises ValueError for a model without pooler."""
        if self.pooler is None:
            raise ValueError("this model has no pooler")
        return self.pooler(cls)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, *, seed=None,
                output_hidden_states: bool = False) -> ModelOutput:
        """input_ids: a PackedBatch, or (B, S) ids with the usual padded arguments."""
        batch, padding = packed(input_ids, attention_mask, token_type_ids, position_ids)
        states: list[Tensor] | None = [] if output_hidden_states else None
        x = self.encode(batch, seed, read=False, hidden_states=states)
        restore = padding.restore if padding else lambda rows: rows
        return ModelOutput(
            last_hidden_state=restore(x),
            pooler_output=self.pool(first_rows(x, batch.cu_seqlens)) if self.pooler else None,
            hidden_states=tuple(restore(s) for s in states) if states is not None else None,
        )


class _Pretraining(Checkpointed):
    """What the four pretraining models share; `mlm` and `nsp` say which heads there are."""

    base_prefix = "bert."
    mlm = nsp = True

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=self.nsp)
        self.cls = nn.ModuleDict()
        if self.mlm:
            self.cls["predictions"] = MLMHead(
                config.vocab_size, config.hidden_size, config.layer_norm_eps, config.hidden_act
            )
        if self.nsp:
            self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)
        self.cls.apply(lambda module: initialise(module, config.initializer_range))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
                next_sentence_label=None, *, seed=None, mlm_scale: Tensor | None = None,
                nsp_scale: Tensor | None = None) -> ModelOutput:
        """input_ids: a PackedBatch (which holds its labels), or (B, S) ids with the usual padded arguments.

        A loss is the mean over its labels, or their sum times `mlm_scale` / `nsp_scale` (0-dim tensors: one over the
        count in the whole global batch, times the loss scale). Without labels, logits are returned instead.
        """
        packed_call = isinstance(input_ids, PackedBatch)
        batch, padding = packed(input_ids, attention_mask, token_type_ids, position_ids, labels, next_sentence_label)
        with_labels = packed_call or labels is not None or next_sentence_label is not None
        x = self.bert.encode(batch, seed, read=with_labels)
        heads: Any = self.cls
        out = ModelOutput()
        if self.mlm and (packed_call or labels is not None):
            table, sink = self.bert.embeddings.tied()
            out.mlm_loss, out.n_masked, out.n_correct = heads["predictions"](
                x[batch.mask_index], table, batch.labels, mlm_scale, sink
            )
        elif self.mlm and not with_labels:
            logits = heads["predictions"].logits(x, self.bert.embeddings.word_embeddings.weight)
            out.logits = padding.restore(logits) if padding else logits
        if self.nsp:
            cls = first_rows(x, batch.cu_seqlens_read if with_labels else batch.cu_seqlens)
            out.seq_relationship_logits = heads["seq_relationship"](self.bert.pool(cls))
            if packed_call or next_sentence_label is not None:
                self._next_sentence_loss(out, out.seq_relationship_logits.float(), batch.next_sentence_label, nsp_scale)
        losses = [loss for loss in (out.mlm_loss, out.nsp_loss) if loss is not None]
        out.loss = torch.stack(losses).sum() if losses else None
        return out

    def _next_sentence_loss(self, out: ModelOutput, logits: Tensor, labels: Tensor, scale: Tensor | None) -> None:
        used = labels != IGNORE_INDEX
        out.n_pairs, out.n_pairs_correct = used.sum(), ((logits.argmax(-1) == labels) & used).sum()
        if scale is None:
            scale = out.n_pairs.clamp(min=1).float().reciprocal()
        out.nsp_loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") * scale


class BertForPreTraining(_Pretraining):
    """Masked language model and next-sentence prediction: the original BERT pretraining."""


class BertForMaskedLM(_Pretraining):
    """Masked language model alone, no pooler."""

    nsp = False


class BertForNextSentencePrediction(_Pretraining):
    """Next-sentence prediction alone."""

    mlm = False

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
                next_sentence_label=None, **named) -> ModelOutput:
        """As the others; `labels` (B,), as Hugging Face calls them here, are the next_sentence_label."""
        if next_sentence_label is None:
            next_sentence_label = labels
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, None, next_sentence_label,
                               **named)


class BertLMHeadModel(_Pretraining):
    """Causal language model (GPT, Radford et al. 2018): every token predicts the next one, and sees none behind it."""

    nsp = False

    def __init__(self, config: BertConfig):
        super().__init__(replace(config, is_decoder=True))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
                *arguments, **named) -> ModelOutput:
        """As the others; labels (B, S) stand at their own tokens, whose predictions come from the rows before them."""
        if labels is not None:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, labels, *arguments, **named)


def packed(input_ids, attention_mask, token_type_ids, position_ids, labels=None, next_sentence_label=None):
    if isinstance(input_ids, PackedBatch):
        return input_ids, None
    return unpad(input_ids, attention_mask, token_type_ids, position_ids, labels, next_sentence_label)


def first_rows(x: Tensor, cu_seqlens: Tensor, last: bool = False) -> Tensor:
    """[CLS]: the first row of every sequence, zeros for an empty one, (T, H) -> (B, H); (R, H) with cu_seqlens_read.

    last: the last row instead.
    """
    rows, empty = cu_seqlens[1:].long() - 1 if last else cu_seqlens[:-1].long(), cu_seqlens[1:] == cu_seqlens[:-1]
    if x.shape[0] == 0:
        return x.new_zeros(rows.numel(), x.shape[1])
    return x[rows.clamp(0, x.shape[0] - 1)].masked_fill(empty.unsqueeze(1), 0.0)


def initialise(module: nn.Module, std: float) -> None:
    """Linear and embedding weights N(0, std), biases 0, LayerNorm 1 and 0, the padding row 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


def useful_flops(config: BertConfig, batch: PackedBatch) -> float:
    """FLOPs of a training step on a packed batch that the result needs: real tokens, last layer on read rows,
    masked-only projection; the backward is twice the forward."""
    H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = batch.cu_seqlens.diff().double()
    reads = batch.cu_seqlens_read.diff().double()
    tokens, read = float(lengths.sum()), float(reads.sum())
    rows = tokens * ((L - 1) * (4 * H * H + 2 * H * I) + 2 * H * H) + read * (2 * H * H + 2 * H * I)
    rows += batch.n_masked * (H * H + config.vocab_size * H)
    scores = (L - 1) * float((lengths * lengths).sum()) + float((lengths * reads).sum())
    if config.is_decoder:  # half of them are masked
        scores /= 2
    return 3 * (2 * rows + 4 * H * scores)
