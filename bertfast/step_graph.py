"""A whole training step, forward to optimiser: the loops' one step, which a GPU may replay as one CUDA graph.

What changes from step to step lies in tensors: the packed batches and what else the model is called with, the dropout
seeds, the counts that losses are divided by and the learning rate. So a replay draws new masks, and what a captured
step computes is what the step launched kernel by kernel computes; the host launches once instead of some hundred
times. After Nguyen et al. 2021, "Accelerating PyTorch with CUDA Graphs"; the packed batch is what keeps masked-only
projection, the last layer's subset and unpadding inside the graph.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .batch import PackedBatch, map_tensors
from .config import BertConfig
from .files import UserError
from .model import ModelOutput
from .ops import why_slow
from .ops.attention import HEAD_SIZES
from .optim import COUNTERS, Optimizer

WARMUP = 3  # steps that compile kernels and fill caches before the capture

Call = tuple[PackedBatch | Tensor, dict[str, Any]]  # a micro-batch: what the model is called with, but seed and scales


def replayable(device: torch.device, config: BertConfig) -> bool:
    """Whether a step may be captured there: on a GPU whose attention is no reference, which reads lengths back."""
    takes_heads = config.hidden_size // config.num_attention_heads in HEAD_SIZES
    return device.type == "cuda" and takes_heads and not why_slow(device.type)


def on_device(call: Call, device: torch.device, copy: bool = False) -> Call:
    """A call's tensors on `device`; copy: none of them shared with the call."""
    move = lambda t: t.to(device, non_blocking=True, copy=copy)
    batch, rest = call
    return map_tensors(batch, move), {name: map_tensors(value, move) for name, value in rest.items()}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedBatch):
        return [t for field in fields(value) for t in _tensors(getattr(value, field.name))]
    return [value] if isinstance(value, Tensor) else []


def signature(micro: Sequence[Call]) -> tuple:
    """What steps must have in common to be one graph: the tensors' shapes and dtypes, and all that is no tensor."""
    def of(value: Any) -> Any:
        tensors = tuple((tuple(t.shape), t.dtype) for t in _tensors(value))
        return (tensors, value.max_seqlen) if isinstance(value, PackedBatch) else tensors or value

    return tuple((of(batch), *((name, of(value)) for name, value in rest.items())) for batch, rest in micro)


def _detach(out: ModelOutput) -> ModelOutput:
    """Rid it of autograd's graph: its gradient accumulators would live on, and bind a later capture to their stream."""
    for field in fields(out):
        if isinstance(value := getattr(out, field.name), Tensor):
            setattr(out, field.name, value.detach())
    return out


class StepGraph:
    """One step of `model` and `optimizer` on packed batches; call it for each step.

    scales: the model's arguments that say what a loss is multiplied by. captured: batches, on the host or on the
    model's device, for which the step is captured as a CUDA graph; all later ones must have their shapes. Capturing
    changes neither weights nor optimiser. beside: an earlier graph, whose memory this one shares (they never run at the
    same time). `outputs` (one a batch), `scale` (the loss scale they carry) and the norm that a call returns are
    overwritten by the next call. Raises UserError for a step that cannot be captured.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scales: tuple[str, ...] = ("mlm_scale", "nsp_scale"),
                 captured: Sequence[Call] | None = None, beside: "StepGraph | None" = None):
        self.model, self.optimizer, self.beside = model, optimizer, beside
        self.device = device = next(model.parameters()).device
        self.micro: list[Call] = []
        self.seeds: list[Tensor] = []
        self.lr, self.scale, self.norm = (torch.zeros((), device=device) for _ in range(3))
        self.counts = {name: torch.zeros((), device=device) for name in scales}
        self.outputs: list[ModelOutput] = []
        self.graph = None
        if captured is not None:
            self.signature = signature(captured)
            self.micro = [on_device(call, device, copy=True) for call in captured]
            self.seeds = self._seeds([0] * len(captured))
            try:
                self.graph = self.capture()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"the step cannot be replayed as a CUDA graph ({reason}): use --no-cuda-graph"
                ) from error

    def _seeds(self, seeds: Sequence[int]) -> list[Tensor]:
        return [torch.full((1,), seed, dtype=torch.int64, device=self.device) for seed in seeds]

    def capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = self.beside.graph.pool() if self.beside and self.beside.graph else None
        # thread_local: the loader's thread pins memory meanwhile
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            self.step()
        return graph

    def warm_up(self) -> None:
        """Steps whose loss is not a number: the optimiser skips them, so that only its counters need putting back."""
        counters = {name: getattr(self.optimizer, name) for name in COUNTERS}
        before = {name: t.clone() for name, t in counters.items()}
        for count in self.counts.values():
            count.fill_(torch.nan)
        for _ in range(WARMUP):
            self.step()
        for name, t in counters.items():
            t.copy_(before[name])

    def step(self) -> None:
        """The step itself, on the tensors of this object."""
        self.scale.copy_(self.optimizer.loss_scale)
        self.outputs = []
        for (batch, rest), seed in zip(self.micro, self.seeds):
            scales = {name: self.scale / count for name, count in self.counts.items()}
            out = self.model(batch, **rest, **scales, seed=seed)
            out.loss.backward()
            if len(self.micro) > 1:
                self.optimizer.accumulate()
            self.outputs.append(_detach(out))
        self.norm = self.optimizer.step(self.lr)

    def load(self, micro: Sequence[Call], seeds: Sequence[int], lr: float, counts: Sequence[int]) -> None:
        """Put a step's inputs into the tensors; counts: how many labels the whole step has, for each of `scales`.

        Raises ValueError for batches of other shapes than the captured ones.
        """
        if self.graph is None:
            self.micro, self.seeds = [on_device(call, self.device) for call in micro], self._seeds(seeds)
        else:
            if (given := signature(micro)) != self.signature:
                raise ValueError(f"the step was made for batches of {self.signature}, got {given}")
            for (own_batch, own), (batch, rest) in zip(self.micro, micro):
                for to, of in [(own_batch, batch), *((own[name], value) for name, value in rest.items())]:
                    for target, tensor in zip(_tensors(to), _tensors(of)):
                        target.copy_(tensor, non_blocking=True)
            for target, seed in zip(self.seeds, seeds):
                target.fill_(seed)
        for to, value in zip((self.lr, *self.counts.values()), (lr, *counts)):
            to.fill_(value)

    def __call__(self, micro: Sequence[Call], seeds: Sequence[int], lr: float, counts: Sequence[int]) -> Tensor:
        """One step; the gradient norm before clipping, 0-dim on the device. Arguments as for `load`."""
        self.load(micro, seeds, lr, counts)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        return self.norm
