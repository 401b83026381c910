"""The strongest baseline: BERT as an expert writes it in plain PyTorch, without any kernel of ours.

Equal in function to bertfast's training model: both losses, dropout at every site (attention included), fp32 masters
under bf16 parameters, clipping. It has our structural savings that plain PyTorch can express: query, key and value in
one GEMM, no padding outside attention, the vocabulary projected on masked rows only, the last layer after its attention
on read rows only, no casts in the step. How it was tuned, and what each attempt gave, stands in README.md beside this
file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.batch import PackedBatch
from bertfast.config import BertConfig


def attention(q: Tensor, k: Tensor, v: Tensor, p: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) with dropout, times v: (n, heads, S, D) each; mask (n, 1, 1, S) bool, True = attend.

    On CPUs scaled_dot_product_attention has no fast path with dropout; the batched products are faster there.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, p)
    n, heads, length, dim = q.shape
    q, k, v = (t.reshape(n * heads, length, dim) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=dim**-0.5)
    if mask is not None:
        scores = scores.view(n, heads, length, length).masked_fill(~mask, -torch.inf).view(n * heads, length, length)
    return torch.bmm(F.dropout(scores.softmax(-1), p), v).view(n, heads, length, dim)


class PlainLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps
        self.p, self.p_attention = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
        self.norm1, self.norm2 = nn.LayerNorm(H, self.eps), nn.LayerNorm(H, self.eps)

    def forward(self, x: Tensor, n: int, length: int, rows: Tensor | None, mask: Tensor | None,
                read: Tensor | None = None) -> Tensor:
        """x (T, H); n sequences; rows (T,) of (n, length) where something is padded, and its mask; else None. read:
        the rows of x to return, instead of all."""
        qkv = self.qkv(x)
        if rows is not None:
            qkv = qkv.new_zeros(n * length, qkv.shape[1]).index_copy(0, rows, qkv)
        q, k, v = qkv.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (n, heads, length, D) each
        context = attention(q, k, v, self.p_attention if self.training else 0.0, mask)
        context = context.transpose(1, 2).reshape(n * length, -1)
        if rows is not None:
            context = context[rows]
        if read is not None:
            x, context = x[read], context[read]
        x = self.norm1(x + F.dropout(self.out(context), self.p, self.training))
        return self.norm2(x + F.dropout(self.down(F.gelu(self.up(x))), self.p, self.training))


class PlainBert(nn.Module):
    """BERT for pretraining on (T, H) rows; `inputs` makes its arguments out of a PackedBatch."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H, V = config.hidden_size, config.vocab_size
        self.p, self.eps = config.hidden_dropout_prob, config.layer_norm_eps
        self.word = nn.Embedding(V, H, padding_idx=config.pad_token_id)
        self.position, self.kind = nn.Embedding(config.max_position_embeddings, H), nn.Embedding(2, H)
        self.norm, self.head_norm = nn.LayerNorm(H, self.eps), nn.LayerNorm(H, self.eps)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers))
        self.head, self.pooler, self.nsp = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, 2)
        self.bias = nn.Parameter(torch.zeros(V))

    def forward(self, ids, types, positions, n: int, length: int, rows, mask, read, predicted, labels, first, pairs):
        """The sum of both losses; read (R,) are the last layer's rows, which predicted (P,) and first (n,) index."""
        x = self.word(ids) + self.position(positions) + self.kind(types)
        x = F.dropout(self.norm(x), self.p, self.training)
        for layer in self.layers[:-1]:
            x = layer(x, n, length, rows, mask)
        x = self.layers[-1](x, n, length, rows, mask, read)
        hidden = self.head_norm(F.gelu(self.head(x[predicted])))
        logits = F.linear(hidden, self.word.weight, self.bias)
        related = self.nsp(torch.tanh(self.pooler(x[first])))
        return F.cross_entropy(logits.float(), labels) + F.cross_entropy(related.float(), pairs)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> "PlainBert":
        """Weights of a BertForPreTraining checkpoint, under Hugging Face's names."""
        joined = lambda prefix, kind: torch.cat([state[f"{prefix}.{n}.{kind}"] for n in ("query", "key", "value")])
        places = {"bert.embeddings.LayerNorm": self.norm, "cls.predictions.transform.dense": self.head,
                  "cls.predictions.transform.LayerNorm": self.head_norm, "bert.pooler.dense": self.pooler,
                  "cls.seq_relationship": self.nsp}
        for i, layer in enumerate(self.layers):
            prefix = f"bert.encoder.layer.{i}"
            layer.qkv.weight.copy_(joined(f"{prefix}.attention.self", "weight"))
            layer.qkv.bias.copy_(joined(f"{prefix}.attention.self", "bias"))
            places |= {f"{prefix}.attention.output.dense": layer.out, f"{prefix}.intermediate.dense": layer.up,
                       f"{prefix}.attention.output.LayerNorm": layer.norm1, f"{prefix}.output.dense": layer.down,
                       f"{prefix}.output.LayerNorm": layer.norm2}
        for name, module in places.items():
            module.weight.copy_(state[f"{name}.weight"])
            module.bias.copy_(state[f"{name}.bias"])
        for name, table in (("word", self.word), ("position", self.position), ("token_type", self.kind)):
            table.weight.copy_(state[f"bert.embeddings.{name}_embeddings.weight"])
        self.bias.copy_(state["cls.predictions.bias"])
        return self


def inputs(batch: PackedBatch) -> tuple:
    """PlainBert's arguments out of a packed batch, made before the clock starts: used rows and slots only."""
    n, total = batch.n_sequences, batch.n_tokens
    starts = batch.cu_seqlens[:n].long()
    lengths = batch.cu_seqlens.diff()[:n].long()
    length = int(lengths.max())
    used = batch.labels != -100
    rows = mask = None
    if total != n * length:
        sequence = torch.repeat_interleave(torch.arange(n), lengths)
        rows = sequence * length + torch.arange(total) - starts[sequence]
        mask = (torch.arange(length) < lengths.unsqueeze(1)).view(n, 1, 1, length)
    return (batch.input_ids[:total], batch.token_type_ids[:total], batch.position_ids[:total], n, length, rows, mask,
            batch.read_rows[: int(batch.cu_seqlens_read[n])], batch.mask_index[used], batch.labels[used],
            batch.cls_index[:n], batch.next_sentence_label[:n])


class AdamW:
    """torch's fused AdamW after clipping. bf16 parameters have fp32 masters, and every pass is one foreach call."""

    def __init__(self, parameters: list[nn.Parameter], **options):
        self.parameters = self.masters = parameters
        if parameters[0].dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().float()) for p in parameters]
            for master in self.masters:
                master.grad = torch.empty_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **options)

    def step(self, max_norm: float) -> Tensor:
        """Clip, update, refresh the parameters, drop their gradients; returns the norm before clipping."""
        apart = self.masters is not self.parameters
        if apart:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        norm = nn.utils.clip_grad_norm_(self.masters, max_norm, foreach=True)
        self.optimizer.step()
        if apart:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        for p in self.parameters:
            p.grad = None
        return norm
