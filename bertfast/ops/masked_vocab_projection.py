"""Loss of the masked-language-model head without keeping the logits: gather, project on the vocabulary, cross entropy.

hidden: (R, H)   weight: (V, H), the tied word table   bias: (V,)   labels: (R,) int64, -100 = no prediction
logits = hidden @ weight.T + bias on the rows with a label;  loss_sum = sum(logsumexp(logits) - logits[label])
dlogits = scale * (softmax(logits) - onehot(label))
dhidden = dlogits @ weight (zero on other rows)    dweight = dlogits.T @ hidden    dbias = sum(dlogits)

The forward forms the gradients while a tile of logits is at hand, already multiplied by `scale` (a tensor: the loss
scale over the masked count of the whole global batch); the backward only multiplies by the incoming scalar. The
logits exist as a whole nowhere (cf. Wijmans et al. 2024, "Cut your losses in large-vocabulary language models").
With no label at all the loss is 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import accumulate_dtype, define, forward_mode, once_differentiable

IGNORE_INDEX = -100
FP16_BOOST = 2.0**12  # of a mean's gradients in fp16: a loss scale comes after them, when those of most words are zero
FP16_MOST = 2.0**5  # of a label, boosted: hidden times this is to be a number in fp16


def _logits(hidden, weight, bias, labels):
    acc = accumulate_dtype(hidden)
    logits = hidden.to(acc) @ weight.to(acc).mT + bias.to(acc)
    masked = labels != IGNORE_INDEX
    target = torch.where(masked, labels, 0)
    loss = torch.logsumexp(logits, -1) - logits.gather(1, target.unsqueeze(1)).squeeze(1)
    correct = (logits.argmax(-1) == target) & masked
    return logits, masked, target, torch.where(masked, loss, 0.0).sum(), masked.sum(), correct.sum()


def _masked_vocab_projection_eval(hidden, weight, bias, labels):
    return _logits(hidden, weight, bias, labels)[3:]


def _masked_vocab_projection_fwd(hidden, weight, bias, labels, scale):
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    *sums, dhidden, dbias = _masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, False)
    return *sums, dhidden, dweight, dbias


def _masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, accumulate):
    logits, masked, target, loss_sum, n_masked, n_correct = _logits(hidden, weight, bias, labels)
    dlogits = (torch.softmax(logits, -1) - F.one_hot(target, weight.shape[0])) * (masked * scale).unsqueeze(1)
    dlogits = dlogits.to(logits.dtype)
    dhidden = (dlogits @ weight.to(logits.dtype)).to(hidden.dtype)
    gradient = dlogits.mT @ hidden.to(logits.dtype)
    dweight.add_(gradient) if accumulate else dweight.copy_(gradient)
    return loss_sum, n_masked, n_correct, dhidden, dlogits.sum(0).to(bias.dtype)


_eval = define(
    "masked_vocab_projection_eval(Tensor hidden, Tensor weight, Tensor bias, Tensor labels) "
    "-> (Tensor loss_sum, Tensor n_masked, Tensor n_correct)",
    _masked_vocab_projection_eval, kernels="masked_vocab_projection",
)
_fwd = define(
    "masked_vocab_projection_fwd(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, Tensor scale) "
    "-> (Tensor loss_sum, Tensor n_masked, Tensor n_correct, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _masked_vocab_projection_fwd, kernels="masked_vocab_projection",
)
# The same with dweight (V, H), in weight's dtype or fp32, written or added to in place: see GradientSink.
_fwd_into = define(
    "masked_vocab_projection_fwd_into(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, Tensor scale, "
    "Tensor(a!) dweight, bool accumulate) "
    "-> (Tensor loss_sum, Tensor n_masked, Tensor n_correct, Tensor dhidden, Tensor dbias)",
    _masked_vocab_projection_fwd_into, kernels="masked_vocab_projection",
)


@dataclass
class GradientSink:
    """One (V, H) buffer in which the gradients of a tied word table meet: the projection writes it in its forward, the
    embedding adds to it in its backward, and autograd sees no gradient of the table at all.

    Only for a loop that backpropagates the returned loss itself, once and unscaled (bertfast.optim.Optimizer hands it
    out where asked to): not under DDP or FSDP, nor in a patched model.
    """

    buffer: Tensor
    filled: bool = False  # whether this step has written it
    awaited: int = 0  # backwards that are still to come: the projection writes in its forward


class _MaskedVocabProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, sink, boost):
        boosted = scale if boost is None else scale * boost
        if sink is None:
            loss_sum, n_masked, n_correct, dhidden, dweight, dbias = _fwd(hidden, weight, bias, labels, boosted)
        else:
            loss_sum, n_masked, n_correct, dhidden, dbias = _fwd_into(
                hidden, weight, bias, labels, boosted, sink.buffer, sink.filled
            )
            dweight, sink.filled = None, True
            sink.awaited += not torch.compiler.is_compiling()  # a traced backward could not count down
        ctx.sink = sink
        ctx.save_for_backward(dhidden, dweight, dbias, boost)
        ctx.mark_non_differentiable(n_masked, n_correct)
        return loss_sum * scale, n_masked, n_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.sink is not None and not torch.compiler.is_compiling():
            ctx.sink.awaited -= 1
        *gradients, boost = ctx.saved_tensors
        factor = dloss if boost is None else dloss / boost
        return *(g if g is None else _scaled(g, factor) for g in gradients), None, None, None, None


def _scaled(g: Tensor, factor: Tensor) -> Tensor:
    """g * factor in g's dtype, factor (0-dim) unrounded: a CPU keeps it so by itself, a GPU in g's dtype."""
    return g * factor if g.device.type == "cpu" else (g.to(factor.dtype) * factor).to(g.dtype)


def masked_vocab_projection(hidden, weight, bias, labels, scale=None, sink=None) -> tuple[Tensor, Tensor, Tensor]:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum") * scale`, and two counts.

    hidden: (R, H); weight: (V, H); bias: (V,); labels: (R,) int64, -100 ignored; scale: a scalar tensor, 1 / masked
    count by default (a mean; 0 where nothing is masked); sink: a GradientSink for weight's gradient, or None. Returns
    (loss, n_masked, n_correct), all 0-dim: loss in fp32 (fp64 for fp64 input), the counts int64, not differentiable.
    """
    if scale is not None and scale.requires_grad:
        raise ValueError("scale is a constant of the step: it gets no gradient")
    boost = None
    if scale is None:
        acc = accumulate_dtype(hidden)
        scale = (labels != IGNORE_INDEX).sum().clamp(min=1).to(acc).reciprocal()
        if hidden.dtype == torch.float16 and sink is None:
            boost = (FP16_MOST / scale).clamp(max=FP16_BOOST)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias))
    if wanted or forward_mode():  # which the node refuses
        return _MaskedVocabProjection.apply(hidden, weight, bias, labels, scale, sink, boost)
    loss_sum, n_masked, n_correct = _eval(hidden, weight, bias, labels)
    return loss_sum * scale, n_masked, n_correct
