"""A whole training step, forward to optimiser: the loop's one step, which a GPU may replay as one CUDA graph.

What changes from step to step lies in tensors: the packed batches (their shapes are constants of a phase), the dropout
seeds, the label counts and the learning rate. So a replay draws new masks, and what a captured step computes is what
the step launched kernel by kernel computes; the host launches once instead of some hundred times. After Nguyen et al.
2021, "Accelerating PyTorch with CUDA Graphs"; the packed batch is what keeps masked-only projection, the last layer's
subset and unpadding inside the graph.
"""

from dataclasses import fields

import torch
from torch import Tensor, nn

from .batch import PackedBatch
from .model import ModelOutput
from .optim import _COUNTERS, Optimizer

WARMUP = 3  # steps that compile kernels and fill caches before the capture


def _detach(out: ModelOutput) -> ModelOutput:
    """Rid it of autograd's graph: its gradient accumulators would live on, and bind a later capture to their stream."""
    for field in fields(out):
        if isinstance(value := getattr(out, field.name), Tensor):
            setattr(out, field.name, value.detach())
    return out


class StepGraph:
    """One step of `model` and `optimizer` on `len(micro)` packed batches; call it for each step of a phase.

    micro: the phase's first batches, on the host or on the model's device; later ones must have the same shapes and
    max_seqlen. replayed: capture the step as a CUDA graph first, which changes neither weights nor optimiser.
    `outputs` (one a batch), `scale` (the loss scale they carry) and the norm that a call returns are overwritten by
    the next call.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, micro: list[PackedBatch], replayed: bool = False):
        self.model, self.optimizer = model, optimizer
        device = next(model.parameters()).device
        self.micro = [batch._map(lambda t: t.to(device, copy=True)) for batch in micro]
        self.seeds = [torch.zeros(1, dtype=torch.int64, device=device) for _ in micro]
        self.lr, self.masked, self.pairs, self.scale, self.norm = (torch.zeros((), device=device) for _ in range(5))
        self.outputs: list[ModelOutput] = []
        self.graph = self.capture() if replayed else None

    def capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread pins memory meanwhile
            self.step()
        return graph

    def warm_up(self) -> None:
        """Steps whose loss is not a number: the optimiser skips them, so that only its counters need putting back."""
        counters = {name: getattr(self.optimizer, name) for name in _COUNTERS}
        before = {name: t.clone() for name, t in counters.items()}
        self.masked.fill_(torch.nan)
        self.pairs.fill_(torch.nan)
        for _ in range(WARMUP):
            self.step()
        for name, t in counters.items():
            t.copy_(before[name])

    def step(self) -> None:
        """The step itself, on the tensors of this object."""
        self.scale.copy_(self.optimizer.loss_scale)
        self.outputs = []
        for batch, seed in zip(self.micro, self.seeds):
            out = self.model(batch, seed=seed, mlm_scale=self.scale / self.masked, nsp_scale=self.scale / self.pairs)
            out.loss.backward()
            if len(self.micro) > 1:
                self.optimizer.accumulate()
            self.outputs.append(_detach(out))
        self.norm = self.optimizer.step(self.lr)

    def load(self, micro: list[PackedBatch], seeds: list[int], lr: float, masked: int, pairs: int) -> None:
        """Put a step's inputs into the tensors; masked, pairs: how many labels the whole step has.

        Raises ValueError for batches of other shapes than the first ones.
        """
        if len(micro) != len(self.micro):
            raise ValueError(f"the step was made for {len(self.micro)} batches, got {len(micro)}")
        for own, batch in zip(self.micro, micro):
            for field in fields(PackedBatch):
                to, of = getattr(own, field.name), getattr(batch, field.name)
                if isinstance(to, Tensor):
                    if to.shape != of.shape:
                        raise ValueError(
                            f"the step was made for {field.name} {tuple(to.shape)}, got {tuple(of.shape)}"
                        )
                    to.copy_(of, non_blocking=True)
            if own.max_seqlen != batch.max_seqlen:
                raise ValueError(f"the step was made for sequences of {own.max_seqlen}, got {batch.max_seqlen}")
        for target, seed in zip(self.seeds, seeds):
            target.fill_(seed)
        for to, value in ((self.lr, lr), (self.masked, masked), (self.pairs, pairs)):
            to.fill_(value)

    def __call__(self, micro: list[PackedBatch], seeds: list[int], lr: float, masked: int, pairs: int) -> Tensor:
        """One step; the gradient norm before clipping, 0-dim on the device. Arguments as for `load`."""
        self.load(micro, seeds, lr, masked, pairs)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        return self.norm
