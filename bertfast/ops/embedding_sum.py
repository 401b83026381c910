"""y = dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

ids: (T,) integer   word: (V, H)   position: (max positions, H)   token_type: (types, H)   weight, bias: (H,)
y: (T, H)   mean, rstd: (T,) float32
The sum z is not saved: the backward gathers it again (as many bytes read, none written). Gradients of the tables
are segment sums, in a fixed order, so that a step is reproducible; the row of `padding_idx` gets none.
"""

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, once_differentiable
from .add_layer_norm import layer_norm, layer_norm_backward
from .dropout import dropout_scale, require_seed


def _gather_sum(input_ids, position_ids, token_type_ids, word, position, token_type):
    acc = accumulate_dtype(word)
    return word[input_ids].to(acc) + position[position_ids].to(acc) + token_type[token_type_ids].to(acc)


def _embedding_sum_fwd(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, padding_idx, p, seed,
    row_key, stream,
):
    z = _gather_sum(input_ids, position_ids, token_type_ids, word, position, token_type)
    y, mean, rstd = layer_norm(z, weight.to(z.dtype), bias.to(z.dtype), eps)
    return dropout_scale(y, p, seed, row_key, stream).to(word.dtype), mean, rstd


def _embedding_sum_bwd(
    dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, mean, rstd, padding_idx, p, seed,
    row_key, stream,
):
    dword = word.new_zeros(word.shape, dtype=accumulate_dtype(word))
    others = _embedding_sum_bwd_into(
        dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, mean, rstd, padding_idx, p,
        seed, row_key, stream, dword,
    )
    return dword.to(word.dtype), *others


def _embedding_sum_bwd_into(
    dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, mean, rstd, padding_idx, p, seed,
    row_key, stream, dword,
):
    z = _gather_sum(input_ids, position_ids, token_type_ids, word, position, token_type)
    dy = dropout_scale(dy.to(z.dtype), p, seed, row_key, stream)
    dz, dweight, dbias = layer_norm_backward(dy, z, mean, rstd, weight.to(z.dtype))

    def segment_sum(table, ids, rows):  # in a fixed order: index_add_ adds by atomics on a GPU, index_put_ on a CPU
        total = z.new_zeros(table.shape)
        return total.index_put_((ids,), rows, accumulate=True) if ids.is_cuda else total.index_add_(0, ids, rows)

    read = dz if padding_idx is None else torch.where((input_ids == padding_idx).unsqueeze(-1), 0.0, dz)
    dword.copy_(dword + segment_sum(word, input_ids, read))
    return (
        segment_sum(position, position_ids, dz).to(position.dtype),
        segment_sum(token_type, token_type_ids, dz).to(token_type.dtype),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
    )


_fwd = define(
    "embedding_sum_fwd(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, "
    "Tensor token_type, Tensor weight, Tensor bias, float eps, int? padding_idx, float p, Tensor? seed, "
    "Tensor? row_key, int stream) -> (Tensor y, Tensor mean, Tensor rstd)",
    _embedding_sum_fwd,
)
_bwd = define(
    "embedding_sum_bwd(Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, int? padding_idx, float p, "
    "Tensor? seed, Tensor? row_key, int stream) "
    "-> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    _embedding_sum_bwd,
)
# The same with the word table's gradient added into `dword` (V, H), in the compute dtype or float32: see GradientSink.
_bwd_into = define(
    "embedding_sum_bwd_into(Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, int? padding_idx, float p, "
    "Tensor? seed, Tensor? row_key, int stream, Tensor(a!) dword) "
    "-> (Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    _embedding_sum_bwd_into,
)


class _EmbeddingSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, padding_idx, p,
        seed, row_key, stream, sink,
    ):
        ids = (input_ids, position_ids, token_type_ids)
        tables = (word, position, token_type)
        y, mean, rstd = _fwd(*ids, *tables, weight, bias, eps, padding_idx, p, seed, row_key, stream)
        ctx.save_for_backward(*ids, *tables, weight, mean, rstd, seed, row_key)
        ctx.padding_idx, ctx.p, ctx.stream, ctx.sink = padding_idx, p, stream, sink
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *saved, seed, row_key = ctx.saved_tensors
        args = (dy, *saved, ctx.padding_idx, ctx.p, seed, row_key, ctx.stream)
        if ctx.sink is None:
            gradients = _bwd(*args)
        else:
            if not ctx.sink.filled:
                ctx.sink.buffer.zero_()
                ctx.sink.filled = True
            gradients = None, *_bwd_into(*args, ctx.sink.buffer)
        return None, None, None, *gradients, *(None,) * 7


def embedding_sum(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps=1e-12, padding_idx=None,
    p=0.0, seed=None, row_key=None, stream=0, sink=None,
) -> Tensor:
    """BERT's embedding: three gathers, their sum, LayerNorm and dropout in one pass; (T, H) in the tables' dtype.

    Shapes above; p, seed, row_key, stream: see bertfast.ops.dropout; sink: a GradientSink for the word table's
    gradient (bertfast.ops.masked_vocab_projection), or None. Raises IndexError for an id outside a table
    (CPU), ValueError for p outside [0, 1) or p > 0 without a seed.
    """
    if p > 0.0:
        require_seed(seed)
    return _EmbeddingSum.apply(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, padding_idx, p, seed,
        row_key, stream, sink,
    )
