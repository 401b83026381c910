"""One optimiser step over many tensors: fp32 masters and moments, written once, the compute copy refreshed with them.

    g = gradient * grad_scale              grad_scale folds unscaling and clipping; skip != 0 leaves all unchanged
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    u = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)
AdamW (Loshchilov & Hutter 2019):  master = master (1 - lr weight_decay) - lr u
LAMB  (You et al. 2020):           u = u + weight_decay master;  master = master - lr |master| / |u| u
                                   (biases and LayerNorms are not adapted, as in the authors' code: AdamW's, above)
    param = master in the compute dtype

params, grads: compute dtype   masters, exp_avgs, exp_avg_sqs: float32   lr, step, grad_scale, skip: 0-dim float32
`masters` is empty where the parameters are fp32 themselves. Those of bf16 parameters may be int16: a bf16 is the upper
half of an fp32 number, and such a master is what it leaves of one (split_master), so that both together take 4 bytes
an element instead of 6 (after Kalamkar et al. 2020, "Optimizing deep learning recommender systems training on CPU
cluster architectures", split SGD). Nothing is read back from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._define import define


def split_master(value: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> bf16, to the nearest (ties away from zero), and the signed rest of its bits, int16."""
    bits = value.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join_master(param: Tensor, rest: Tensor) -> Tensor:
    """What `split_master` split, bit for bit."""
    return ((param.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def values(params: Sequence[Tensor], masters: Sequence[Tensor]) -> list[Tensor]:
    """The fp32 values of the parameters, to read."""
    if masters and masters[0].dtype == torch.int16:
        return [join_master(param, rest) for param, rest in zip(params, masters)]
    return list(masters or params)


def _targets(param, master, new):
    """What holds a new value, and what becomes of it there; master: None without one."""
    if master is None:
        return [(param, new)]
    if master.dtype == torch.int16:
        return list(zip((param, master), split_master(new)))
    return [(master, new), (param, new)]


def set_values(params: Sequence[Tensor], masters: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Have parameters and masters hold these values."""
    kept: Sequence[Tensor | None] = masters or [None] * len(params)
    for param, master, value in zip(params, kept, new):
        for target, part in _targets(param, master, value if master is None else value.float()):
            target.copy_(part)


def _each(params, grads, masters, exp_avgs, exp_avg_sqs):
    """What belongs to each parameter, with its fp32 value. Raises ValueError for what would only broadcast to it."""
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, *[masters] * bool(masters)):
        if any(t.shape != tensors[0].shape for t in tensors):
            raise ValueError("gradients, moments and masters must have the parameters' shapes")
    return zip(params, grads, masters or [None] * len(params), values(params, masters), exp_avgs, exp_avg_sqs)


def _moments(grad, exp_avg, exp_avg_sq, step, grad_scale, beta1, beta2, eps):
    """New moments and the bias-corrected direction, all fp32."""
    g = grad.float() * grad_scale
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    # in fp64: 1 - beta^step cancels, and fp32 would be off by 3e-5 at the first step
    correction1, correction2 = (1 - torch.pow(beta, step.double()) for beta in (beta1, beta2))
    return m, v, (m / correction1 / ((v / correction2).sqrt() + eps)).float()


def _store(skip, *pairs):
    for target, value in pairs:
        target.copy_(torch.where(skip != 0, target, value.to(target.dtype)))


def _adamw_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    for param, grad, master, value, exp_avg, exp_avg_sq in _each(params, grads, masters, exp_avgs, exp_avg_sqs):
        m, v, u = _moments(grad, exp_avg, exp_avg_sq, step, grad_scale, beta1, beta2, eps)
        new = value * (1 - lr * weight_decay) - lr * u
        _store(skip, (exp_avg, m), (exp_avg_sq, v), *_targets(param, master, new))


def _lamb_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    for param, grad, master, value, exp_avg, exp_avg_sq in _each(params, grads, masters, exp_avgs, exp_avg_sqs):
        m, v, u = _moments(grad, exp_avg, exp_avg_sq, step, grad_scale, beta1, beta2, eps)
        u = u + weight_decay * value
        size, length = value.norm(), u.norm()
        trust = torch.where((size > 0) & (length > 0), size / length, 1.0)  # as in the paper's code: 1 at zero
        new = value - lr * trust * u
        _store(skip, (exp_avg, m), (exp_avg_sq, v), *_targets(param, master, new))


def _grad_norm(grads):
    return torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()


_STATE = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor lr, Tensor step, Tensor grad_scale, Tensor skip, float beta1, float beta2, float eps, float weight_decay) "
    "-> ()"
)
_adamw = define("adamw_step" + _STATE, _adamw_step, kernels="optimizer_step")
_lamb = define("lamb_step" + _STATE, _lamb_step, kernels="optimizer_step")
grad_norm_op = define("grad_norm(Tensor[] grads) -> Tensor", _grad_norm, kernels="optimizer_step")


@torch.no_grad()
def adamw_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, *, beta1=0.9, beta2=0.999, eps=1e-6,
    weight_decay=0.01,
) -> None:
    """AdamW in place on lists of tensors; shapes, dtypes and formula above. Raises ValueError for uneven lists."""
    _check(params, grads, masters, exp_avgs, exp_avg_sqs)
    _adamw(params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay)
    _changed(params)


@torch.no_grad()
def lamb_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, *, beta1=0.9, beta2=0.999, eps=1e-6,
    weight_decay=0.01,
) -> None:
    """LAMB in place on lists of tensors, one trust ratio a tensor; otherwise as `adamw_step`."""
    _check(params, grads, masters, exp_avgs, exp_avg_sqs)
    _lamb(params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay)
    _changed(params)


@torch.no_grad()
def grad_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-dim float32, summed in fp32 in a fixed order."""
    return grad_norm_op(grads) if grads else torch.zeros(())


def _changed(params) -> None:
    """A backward that still needs what they were then says so."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)


def _check(params, grads, masters, exp_avgs, exp_avg_sqs) -> None:
    n = len(params)
    if not (len(grads) == len(exp_avgs) == len(exp_avg_sqs) == n and len(masters) in (0, n)):
        raise ValueError("params, grads, exp_avgs and exp_avg_sqs need the same length, masters as well or 0")
