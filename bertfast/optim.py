"""Native mixed precision: parameters are leaves in the compute dtype, the optimiser owns the fp32 truth.

No casts in the step: masters and moments are fp32, and the update writes the parameters in its own pass
(bertfast.ops.optimizer_step); of a bf16 parameter's master only the half is kept that it does not hold itself.
Parameters are laid out one after another in one buffer per decay group, so that query, key and value are read as one
matrix (bertfast.ops.linear). Skipping, clipping and loss scaling are tensors on the device: a step reads nothing back.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .files import UserError
from .nn import Embeddings
from .ops.masked_vocab_projection import GradientSink

ALIGNMENT = 64  # bytes; a cache line, and more than any vector load wants
GROWTH_INTERVAL = 2000  # good steps in a row after which fp16's loss scale doubles (as torch.amp.GradScaler's)


def linear_schedule(peak: float, warmup: float, steps: int, step: int) -> float:
    """Linear warm-up over a share of the steps, then linear decay to 0 (Devlin et al. 2019); `step` counts from 0."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * max(0.0, (steps - step) / max(1, steps - rising))


def check_numbers(*, lr: float | None, weight_decay: float, max_grad_norm: float, dropout: float | None,
                  seed: int) -> None:
    """Raises UserError for what no training can have; None is a default."""
    if lr is not None and not (0 < lr <= torch.finfo(torch.float32).max):
        raise UserError(f"a learning rate of {lr} is out of range: more than 0, and no more than fp32 holds")
    if not (0 <= weight_decay < math.inf and 0 <= max_grad_norm < math.inf):
        raise UserError("--weight-decay and --max-grad-norm must be 0 or more")
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"a dropout of {dropout} is out of range: 0 to less than 1")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed {seed} does not fit 64 bits")


class Optimizer:
    """AdamW or LAMB on a whole model, with gradient clipping, non-finite steps skipped, and fp16 loss scaling.

    compute_dtype: dtype of the parameters from now on (the model is converted in place; tied parameters stay tied).
    weight_decay applies to matrices and tables only, never to biases and LayerNorm (BERT); nor does LAMB adapt those,
    as in its authors' code: they move as under AdamW. max_grad_norm 0 = no clipping. `loss_scale` is the factor that
    the caller's loss must carry (1 unless fp16). lr_scale: parameter name -> factor of its learning rate (layer-wise
    decay); None: 1 for all. sink: save the passes that add up a tied word table's two gradients (GradientSink): only
    for a loop that backpropagates every loss of the model as it is, once, or calls `zero_grad` where it does not.
    all_reduce: makes one buffer of gradients, fp32, the sum of several processes' own, in place.
    A parameter without a gradient, one frozen since say, counts as one whose gradient is 0: its weight still decays and
    its momentum runs out. What others write to parameters is taken up (load_state_dict, `p.data = t`), but not what
    they write in place through `.data`, which nothing counts. torch.save of a part of the model writes the whole buffer
    behind it: save clones.
    """

    def __init__(self, model: nn.Module, compute_dtype=torch.float32, *, kind="adamw", betas=(0.9, 0.999), eps=1e-6,
                 weight_decay=0.01, max_grad_norm=1.0, lr_scale: Callable[[str], float] | None = None,
                 sink: bool = False, all_reduce: Callable[[Tensor], None] | None = None):
        self.all_reduce = all_reduce
        self.kind, self.betas, self.eps, self.max_grad_norm = kind, betas, eps, max_grad_norm
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise UserError("the model has nothing to train: no parameter requires a gradient")
        device = next(iter(named.values())).device
        self.groups = []
        members: dict[tuple[bool, float], dict[str, nn.Parameter]] = {}
        for name, p in named.items():
            members.setdefault((p.dim() <= 1, lr_scale(name) if lr_scale else 1.0), {})[name] = p
        for (is_vector, scale), group in sorted(members.items(), key=lambda item: item[0]):
            self.groups.append(_Group(group, 0.0 if is_vector else weight_decay, compute_dtype, scale))
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.parts: list[_Part] = [*self.groups, *([_Part(frozen, compute_dtype)] if frozen else [])]
        self.sinks = [(e.word_embeddings.weight, e) for e in model.modules() if isinstance(e, Embeddings)]
        for table, embeddings in self.sinks:
            embeddings.sink = GradientSink(torch.empty_like(table)) if sink and table.requires_grad else None
            weakref.finalize(self, _release, embeddings, embeddings.sink)
        scalar = lambda value: torch.full((), value, dtype=torch.float32, device=device)
        self.loss_scale = scalar(2.0**16 if compute_dtype == torch.float16 else 1.0)
        self.dynamic = compute_dtype == torch.float16
        self.lr, self.step_count, self.skip = scalar(0.0), scalar(0.0), scalar(0.0)
        self.good_steps, self.n_skipped, self.skipped_in_a_row = scalar(0.0), scalar(0.0), scalar(0.0)

    def accumulate(self) -> None:
        """Add this micro-batch's gradients to fp32 sums; call after each backward of a step of several (`step` does
        it for the last)."""
        self._collect_sinks()
        for group in self.groups:
            group.accumulate()

    def zero_grad(self) -> None:
        """Drop all gradients: of a step that is given up, after an error say."""
        for _, embeddings in self.sinks:
            if embeddings.sink is not None:
                embeddings.sink.filled, embeddings.sink.awaited = False, 0
        for group in self.groups:
            group.drop_gradients()

    def _collect_sinks(self) -> None:
        for table, embeddings in self.sinks:
            if embeddings.sink is not None and embeddings.sink.awaited > 0:
                raise RuntimeError("a loss was computed for training and never backpropagated, but the word table's "
                                   "gradient holds its share: call Optimizer.zero_grad() where a step is given up")
            if embeddings.sink is not None and embeddings.sink.filled:
                buffer, embeddings.sink.filled = embeddings.sink.buffer, False
                # beside what autograd saw of it: of a batch in which the table had a hook, say
                table.grad = buffer if table.grad is None else table.grad + buffer

    def step(self, lr: float | Tensor) -> Tensor:
        """One update from the gradients, which are dropped; returns their norm before clipping, 0-dim on the device.

        Where the norm is not finite nothing changes but the counters (and the loss scale, which halves).
        """
        self._collect_sinks()
        for group in self.groups:
            group.take_up()
        if self.all_reduce:
            for group in self.groups:
                self.all_reduce(group.sums())
        gradients = [g for group in self.groups for g in group.gradients()]
        norm = ops.grad_norm(gradients) / self.loss_scale
        self.skip.copy_(~torch.isfinite(norm))
        clip = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0) if self.max_grad_norm > 0 else 1.0
        grad_scale = torch.nan_to_num(clip / self.loss_scale)
        self.step_count += 1 - self.skip
        update = {"adamw": ops.adamw_step, "lamb": ops.lamb_step}[self.kind]
        for group in self.groups:
            self.lr.fill_(lr * group.lr_scale)
            (ops.adamw_step if group.is_vector else update)(
                group.params, group.gradients(), group.masters, group.exp_avgs, group.exp_avg_sqs, self.lr,
                self.step_count, grad_scale, self.skip, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                weight_decay=group.weight_decay)
            group.written = group.versions()
            group.drop_gradients()
        self._count()
        return norm

    def _count(self) -> None:
        """Skipped steps, and fp16's loss scale: halved by a skip, doubled after a run of good steps."""
        self.n_skipped += self.skip
        self.skipped_in_a_row.mul_(self.skip).add_(self.skip)
        if not self.dynamic:
            return
        self.good_steps.add_(1).mul_(1 - self.skip)
        grow = self.good_steps >= GROWTH_INTERVAL
        self.loss_scale.mul_(torch.where(self.skip != 0, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.mul_(1 - grow.float())

    def master_state(self) -> dict[str, Tensor]:
        """{parameter name: fp32 tensor}: what a checkpoint's model file holds instead of the parameters."""
        return {n: t for part in self.parts for n, t in zip(part.names, part.values())}

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters, flat, ready for safetensors; the masters are in the model file."""
        state = {name: getattr(self, name) for name in COUNTERS}
        for group in self.groups:
            for kind in ("exp_avg", "exp_avg_sq"):
                state.update({f"{kind}.{n}": t for n, t in zip(group.names, getattr(group, kind + "s"))})
        return {name: t.detach().cpu().clone() for name, t in state.items()}

    def load_state_dict(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Restore both. Raises UserError where tensors are missing or of another shape."""
        targets: dict[str, Tensor] = {name: getattr(self, name) for name in COUNTERS}
        for group in self.groups:
            for kind in ("exp_avg", "exp_avg_sq"):
                targets.update({f"{kind}.{n}": t for n, t in zip(group.names, getattr(group, kind + "s"))})
        wrong = [n for n, t in targets.items() if n not in state or state[n].shape != t.shape]
        wrong += [n for n, t in self.master_state().items() if n not in masters or masters[n].shape != t.shape]
        if wrong:
            raise UserError(f"the checkpoint's optimiser state does not fit this model: {', '.join(wrong[:5])}")
        for name, t in targets.items():
            t.copy_(state[name])
        for part in self.parts:
            part.set_values([masters[name] for name in part.names])

    def culprit(self) -> str:
        """The first parameter whose value is not finite, for the message that stops a run; "" if all are."""
        bad = (n for n, t in self.master_state().items() if not bool(torch.isfinite(t).all()))
        return next((f"parameter {name}" for name in bad), "")


def _release(embeddings: Embeddings, sink: GradientSink | None) -> None:
    """An optimiser is gone: without it the word table's gradient goes the ordinary way again."""
    if embeddings.sink is sink:
        embeddings.sink = None


COUNTERS = ("step_count", "loss_scale", "good_steps", "n_skipped", "skipped_in_a_row")


class _Part:
    """Parameters in the compute dtype, and what they cannot hold of their fp32 values."""

    def __init__(self, members: dict[str, nn.Parameter], compute_dtype: torch.dtype):
        self.names, self.params, self.dtype = list(members), list(members.values()), compute_dtype
        values = [p.detach().clone() for p in self.params]
        for p, view in zip(self.params, _flat_views(values, compute_dtype)):
            p.data = view
        kept = {torch.float16: torch.float32, torch.bfloat16: torch.int16}  # the rest of a bf16's bits
        self.masters = _flat_views(values, kept[compute_dtype]) if compute_dtype in kept else []
        self.written: list[tuple[int, int]] = []  # each parameter's version and place when it was last written here
        self.set_values(values)

    def __getstate__(self) -> dict[str, Any]:
        self.take_up()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of deepcopy and pickle: a copy's parameters count their versions anew."""
        self.__dict__.update(state)
        self.written = self.versions()

    def versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.params]

    @torch.no_grad()
    def take_up(self) -> None:
        """Parameters that somebody else has written (load_state_dict, say): what they hold is their masters' value."""
        if cast := {p.dtype for p in self.params} - {self.dtype}:
            raise RuntimeError(f"the model was cast to {cast.pop()} since its Optimizer was made: make a new one")
        others = [i for i, version in enumerate(self.versions()) if version != self.written[i]]
        if others and self.masters:
            params, masters = [self.params[i] for i in others], [self.masters[i] for i in others]
            ops.optimizer_step.set_values(params, masters, params)
            self.written = self.versions()

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """The parameters in fp32, to read."""
        self.take_up()
        return ops.optimizer_step.values(self.params, self.masters)

    @torch.no_grad()
    def set_values(self, values: list[Tensor]) -> None:
        ops.optimizer_step.set_values(self.params, self.masters, values)
        self.written = self.versions()


class _Group(_Part):
    """Vectors, or all others, of one learning rate, and their moments and sums of gradients, flat and fp32."""

    def __init__(self, members: dict[str, nn.Parameter], weight_decay: float, compute_dtype: torch.dtype,
                 lr_scale: float):
        super().__init__(members, compute_dtype)
        self.weight_decay, self.lr_scale, self.is_vector = weight_decay, lr_scale, self.params[0].dim() <= 1
        self.exp_avgs, self.exp_avg_sqs = (_flat_views(self.params, torch.float32) for _ in range(2))
        self._sums: list[Tensor] | None = None
        self._accumulating = False

    def accumulate(self) -> None:
        gradients = self._raw_gradients()
        if self._sums is None:
            self._sums = _flat_views(gradients, torch.float32)
        if self._accumulating:
            torch._foreach_add_(self._sums, gradients)
        else:
            torch._foreach_copy_(self._sums, gradients)
        self._accumulating = True
        for p in self.params:
            p.grad = None

    def sums(self) -> Tensor:
        """The fp32 sums as one buffer."""
        if not self._accumulating or self._sums is None:
            self.accumulate()
        first = self.gradients()[0]
        return first.as_strided((first.untyped_storage().nbytes() // first.itemsize,), (1,))

    def gradients(self) -> list[Tensor]:
        if self._accumulating and any(p.grad is not None for p in self.params):  # the last batch's
            self.accumulate()
        return self._sums if self._accumulating and self._sums is not None else self._raw_gradients()

    def _raw_gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]

    def drop_gradients(self) -> None:
        self._accumulating = False
        for p in self.params:
            p.grad = None


def _flat_views(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeroed tensors of the given shapes, one after another in one buffer."""
    step = ALIGNMENT // dtype.itemsize
    sizes = [-(-t.numel() // step) * step for t in like]
    buffer = torch.zeros(sum(sizes), dtype=dtype, device=like[0].device)
    views, start = [], 0
    for t, size in zip(like, sizes):
        views.append(buffer[start : start + t.numel()].view(t.shape))
        start += size
    return views
