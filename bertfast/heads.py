"""Task heads on the encoder, with transformers' names: a thin linear layer on the rows that the task reads.

Packed:  model(batch, labels=…) with a PackedBatch: the last layer computes batch.read_rows only, which is [CLS] alone
         for sentences and [CLS] and the first piece of each word for tagging; question answering reads all rows.
Padded:  model(input_ids, attention_mask, token_type_ids, labels=…), as in transformers, with its losses, but for the
         question answering of padded sequences (see BertForQuestionAnswering).

A packed loss is the mean over the labels, or their sum times `scale` (0-dim: one over the count in the whole step's
batch, times the loss scale). Which loss a sequence head takes is config.extra["problem_type"], as in transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import PackedBatch
from .checkpoint import Checkpointed
from .config import BertConfig
from .model import BertModel, first_rows, initialise, packed
from .ops import dropout
from .ops.dropout import draw_seed
from .ops.masked_vocab_projection import IGNORE_INDEX
from .patched_rows import offsets


@dataclass
class HeadOutput:
    """loss: 0-dim or None; logits in the shape that the head's docstring gives."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str, scale: Tensor | None) -> Tensor:
    """The loss of (B, C) logits: labels (B,) int64; for multi-label (B, C) of 0 and 1; for regression floats."""
    logits = logits.float()
    if problem_type == "regression":
        loss, n = F.mse_loss(logits.flatten(), labels.flatten().float(), reduction="sum"), logits.numel()
    elif problem_type == "multi_label_classification":
        loss, n = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum"), logits.numel()
    else:
        return _cross_entropy(logits, labels, scale)
    return loss / max(1, n) if scale is None else loss * (scale / logits.shape[1])


def _cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / (labels != IGNORE_INDEX).sum().clamp(min=1) if scale is None else loss * scale


def _span_loss(logits: Tensor, cu_seqlens: Tensor, longest: int, span: tuple[Tensor, Tensor],
               scale: Tensor | None) -> Tensor:
    """Mean of the losses of a span's two ends, (B,) each; logits (rows, 2), the softmax over the rows of a sequence.

    An end outside its sequence is ignored, as transformers ignores one beyond the padded length.
    """
    lengths, n, longest = cu_seqlens.diff().long(), len(span[0]), max(1, longest)
    ends = [torch.where((end >= 0) & (end < lengths), end, IGNORE_INDEX) for end in span]
    row = torch.arange(len(logits), device=logits.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)
    padded = logits.new_full((n + 1, longest, 2), -torch.inf)  # the last for rows behind all sequences
    padded = padded.index_put((sequence, (row - cu_seqlens[sequence]).clamp(max=longest - 1)), logits)[:n]
    first, last = (_cross_entropy(padded[..., i], labels, scale) for i, labels in enumerate(ends))
    return (first + last) / 2


def options_apart(scores: Tensor, n_options: Sequence[int]) -> Tensor:
    """One score an option, all in a row, as (questions, most options), -inf where a question has fewer."""
    if len(set(n_options)) <= 1:
        return scores.view(len(n_options), max(n_options, default=0))
    return nn.utils.rnn.pad_sequence(scores.split(list(n_options)), batch_first=True, padding_value=-torch.inf)


class Headed(Checkpointed):
    """What the heads share: encoder, dropout and one linear layer: `n_outputs` per row that is read."""

    base_prefix = "bert."
    pooled = False  # whether [CLS] goes through the pooler first
    head = "classifier"
    classifier: nn.Linear
    qa_outputs: nn.Linear

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=self.pooled)
        dropout = config.extra.get("classifier_dropout")
        self.p = config.hidden_dropout_prob if dropout is None else dropout
        self.stream = 3 * config.num_hidden_layers + 1  # dropout's next free site: see bertfast.nn
        linear = nn.Linear(config.hidden_size, self.n_outputs(config))
        initialise(linear, config.initializer_range)
        setattr(self, self.head, linear)

    def n_outputs(self, config: BertConfig) -> int:
        return len(config.extra.get("id2label") or "01")  # transformers' default is two labels

    def _dropped(self, x: Tensor, row_key: Tensor, seed: Tensor | None) -> Tensor:
        return x if seed is None else dropout(x, self.p, seed, row_key, self.stream)

    def _seed(self, seed: Tensor | None, device: torch.device) -> Tensor | None:
        """The step's dropout key, which encoder and head share; None where nothing is dropped."""
        config = self.config
        if not self.training or max(config.hidden_dropout_prob, config.attention_probs_dropout_prob, self.p) == 0:
            return None
        return draw_seed(device) if seed is None else seed

    def _classify_cls(self, batch: PackedBatch, seed: Tensor | None) -> Tensor:
        """The head on pooled [CLS]; of a causal encoder on the last token, which alone has seen all (GPT)."""
        seed = self._seed(seed, batch.input_ids.device)
        causal = self.config.is_decoder
        x = self.bert.encode(batch, seed, read=not causal)
        bounds = batch.cu_seqlens if causal else batch.cu_seqlens_read
        pooled = self.bert.pool(first_rows(x, bounds, last=causal))
        if len(x):  # not all of it padding
            pooled = self._dropped(pooled, batch.row_key[batch.read_rows[batch.cls_index]], seed)
        return self.classifier(pooled)


class BertForSequenceClassification(Headed):
    """One decision a sequence, on pooled [CLS]: logits (B, num_labels). Classification, multi-label, regression."""

    pooled = True

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
                orders: int = 1, seed=None, scale: Tensor | None = None) -> HeadOutput:
        """input_ids: a PackedBatch or (B, S) ids; labels: as in `sequence_loss`.

        orders: so many sequences in a row are one example in different orders, whose logits are averaged.

        A labelled call without config.extra["problem_type"] decides as transformers does: one label is regression,
        integer labels single-label, floats multi-label.
        """
        batch, _ = packed(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self._classify_cls(batch, seed)
        if orders > 1:
            logits = logits.view(-1, orders, logits.shape[1]).mean(1)
        if labels is None:
            return HeadOutput(None, logits)
        kind = self.config.extra.get("problem_type") or (
            "regression" if logits.shape[1] == 1
            else "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        )
        return HeadOutput(sequence_loss(logits, labels, kind, scale), logits)


class BertForMultipleChoice(Headed):
    """One score an option, on pooled [CLS]; softmax over the options of a question: logits (questions, options)."""

    pooled = True

    def n_outputs(self, config: BertConfig) -> int:
        return 1

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
                n_options: Sequence[int] | None = None, seed=None, scale: Tensor | None = None) -> HeadOutput:
        """input_ids: (questions, options, S) ids, or a PackedBatch of the options one after another.

        n_options: with the packed call, how many sequences each question has; the logits of those with fewer than the
        most are -inf at the end. labels: (questions,) int64. Raises ValueError for a packed call without n_options.
        """
        if isinstance(input_ids, PackedBatch):
            if n_options is None:
                raise ValueError("a packed call needs n_options, the number of sequences of each question")
            batch = input_ids
        else:
            n_options = [input_ids.shape[1]] * input_ids.shape[0]
            flat = [None if t is None else t.flatten(0, 1)
                    for t in (input_ids, attention_mask, token_type_ids, position_ids)]
            batch, _ = packed(*flat)
        scores = self._classify_cls(batch, seed).squeeze(1)
        logits = options_apart(scores, n_options)
        return HeadOutput(_cross_entropy(logits, labels, scale) if labels is not None else None, logits)


class BertForTokenClassification(Headed):
    """One decision a token. Packed: logits (P, num_labels) at batch.mask_index, labels (P,), else batch.labels."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
                seed=None, scale: Tensor | None = None) -> HeadOutput:
        """input_ids: a PackedBatch (which may hold its labels), or (B, S) ids with labels (B, S): logits (B, S, C).

        Raises ValueError for a label on a padded position, which has no logits.
        """
        batch, padding = packed(input_ids, attention_mask, token_type_ids, position_ids, labels)
        seed = self._seed(seed, batch.input_ids.device)
        if padding is None:
            x, rows = self.bert.encode(batch, seed)[batch.mask_index], batch.read_rows[batch.mask_index]
            logits = self.classifier(self._dropped(x, batch.row_key[rows], seed))
            return HeadOutput(_cross_entropy(logits, batch.labels if labels is None else labels, scale), logits)
        x = self.bert.encode(batch, seed, read=False)
        logits = padding.restore(self.classifier(self._dropped(x, batch.row_key, seed)))
        loss = None if labels is None else _cross_entropy(logits.flatten(0, 1), labels.flatten(), scale)
        return HeadOutput(loss, logits)


class BertForQuestionAnswering(Headed):
    """Where an answer begins and ends. Packed: start and end logits (T,); padded: (B, S).

    The softmax is over the tokens of a sequence, question included, as in BERT (Devlin et al. 2019). In transformers'
    class padding takes part, so that its loss depends on how much there is: it is ours only where there is none.
    """

    head = "qa_outputs"

    def n_outputs(self, config: BertConfig) -> int:
        return 2

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, start_positions=None,
                end_positions=None, *, seed=None, scale: Tensor | None = None) -> HeadOutput:
        """start_positions, end_positions: (B,) or (B, 1) int64, positions in their sequences (0 = [CLS] = no answer
        here); one outside its sequence is ignored."""
        batch, padding = packed(input_ids, attention_mask, token_type_ids, position_ids)
        x = self.bert.encode(batch, self._seed(seed, batch.input_ids.device), read=False)
        logits = self.qa_outputs(x)
        out = HeadOutput(logits=logits)
        if start_positions is not None and end_positions is not None:
            span = start_positions.flatten(), end_positions.flatten()
            out.loss = _span_loss(logits, batch.cu_seqlens, batch.max_seqlen, span, scale)
        if padding is not None:
            logits = padding.restore(logits)
        out.start_logits, out.end_logits = logits.unbind(-1)
        return out


class ScalarMix(nn.Module):
    """γ · Σₖ softmax(w)ₖ hₖ over the layers of an encoder (ELMo, Peters et al. 2018): (N, L + 1, H) -> (N, H)."""

    def __init__(self, n_layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: Tensor) -> Tensor:
        # one pass over the layers, and no copy of them: a row vector times each (L + 1, H) matrix
        return torch.matmul((self.gamma * self.weight.softmax(0)).to(layers.dtype), layers)


class BertForFeatures(Headed):
    """Feature-based transfer: the encoder is never trained, a learned mix of its layers feeds one linear layer.

    What is mixed is each sequence's mean over its tokens, or where config.extra["features"] is "tokens" the words'
    first pieces, where it is "rows" all tokens, for the span of an answer ("options": one output a sequence).
    With config.extra["static"] there is nothing to mix but the word table's rows, normalised: static vectors, as
    word2vec's are used (Mikolov et al. 2013). `features` computes it once, (N, layers + 1 or 1, H) in fp16, and
    `decide` is all that training runs. The rounding to fp16 belongs to the model: cached or not, the same numbers.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.mix = ScalarMix(1 if config.extra.get("static") else config.num_hidden_layers + 1)
        self.bert.requires_grad_(False)

    def n_outputs(self, config: BertConfig) -> int:
        return {"options": 1, "rows": 2}.get(config.extra.get("features", "")) or super().n_outputs(config)

    @torch.no_grad()
    def features(self, batch: PackedBatch) -> Tensor:
        """What `decide` reads of a batch, (B, P or T, layers + 1 or 1, H) fp16; without dropout, in training too."""
        states: list[Tensor] = []
        if self.config.extra.get("static"):
            words = self.bert.embeddings.word_embeddings(batch.input_ids)
            states.append(F.layer_norm(words, words.shape[1:], eps=max(self.config.layer_norm_eps, 1e-12)))
        else:
            training = self.bert.training
            self.bert.eval()
            self.bert.encode(batch, read=False, hidden_states=states)
            self.bert.train(training)
        if self.config.extra.get("features") == "rows":
            return torch.stack([x[: batch.n_tokens] for x in states], 1).half()
        if self.config.extra.get("features") == "tokens":
            rows = batch.read_rows[batch.mask_index]
            return torch.stack([x[rows] for x in states], 1).half()
        lengths = batch.cu_seqlens.diff().long()
        mean = partial(torch.segment_reduce, reduce="mean", lengths=lengths, initial=0, unsafe=True)
        return torch.stack([mean(x[: batch.n_tokens].float()) for x in states], 1).half()

    def decide(self, features: Tensor, labels: Tensor | None = None, *, n_options: Sequence[int] | None = None,
               orders: int = 1, lengths: Tensor | None = None, start_positions: Tensor | None = None,
               end_positions: Tensor | None = None, seed=None, scale: Tensor | None = None) -> HeadOutput:
        """The head on features; arguments as the other heads take them. lengths: (B,) rows of each sequence (spans)."""
        x = self.mix(features.to(self.classifier.weight.dtype))
        seed = self._seed(seed, x.device)
        logits = self.classifier(self._dropped(x, torch.arange(len(x), device=x.device), seed))
        if lengths is not None:
            out = HeadOutput(None, logits, *logits.unbind(-1))
            if start_positions is not None and end_positions is not None:
                span = start_positions, end_positions
                out.loss = _span_loss(logits, offsets(lengths), int(lengths.max()), span, scale)
            return out
        if n_options is not None:
            logits = options_apart(logits.squeeze(1), n_options)
        elif orders > 1:
            logits = logits.view(-1, orders, logits.shape[1]).mean(1)
        if labels is None:
            return HeadOutput(None, logits)
        kind = self.config.extra.get("problem_type", "single_label_classification")
        return HeadOutput(sequence_loss(logits, labels, kind, scale), logits)

    def forward(self, batch: PackedBatch | Tensor, labels: Tensor | None = None, **arguments) -> HeadOutput:
        """The decision on a packed batch, or on its features."""
        return self.decide(batch if isinstance(batch, Tensor) else self.features(batch), labels, **arguments)
