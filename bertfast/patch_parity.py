"""bertfast.parity: how far a patched model is from the original, on the user's own batch."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .patching import patch, projects, unpatch


@dataclass
class Deviation:
    """The largest deviation from the original in fp32, over the largest value of the original.

    A gradient's is taken over a thousandth of the largest gradient at least: those of key biases are zero in truth.
    """

    patched: float
    original_bf16: float
    patched_bf16: float


def parity(model: nn.Module, batch: Mapping[str, Any]) -> "Parity":
    """Compare `model`, patched or not, as the original and as patched, on model(**batch) in fp32 and in bf16.

    Of a SentenceTransformer, give it the model of transformers within, `model[0].auto_model`.
    Works on copies, dropout off. What is compared: every floating-point output (of those with a row or a number for
    each token, the attended ones), and the gradient of every parameter, of the loss, or without one of a fixed mixture
    of the outputs. BertForMaskedLM and BertForPreTraining with labels run again as in training, for "loss without
    logits" and the gradients.
    Returns a Parity: deviations by name, which print as a table. Raises ValueError if there is nothing to compare.
    """
    runs = {}
    for patched in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            one = unpatch(copy.deepcopy(model)).to(dtype).eval()
            if patched:
                patch(one)
            found = runs[patched, dtype] = _run(one, batch)
            heads = [module for module in one.modules() if projects(module)]
            if heads and "loss" in found:
                for head in heads:
                    head.training = True  # alone: inside, dropout stays off
                one.zero_grad()
                again = _run(one, batch)
                found["loss without logits"] = again["loss"]
                found |= {name: t for name, t in again.items() if name.startswith("grad of ")}
    truth = runs[False, torch.float32]
    if not truth:
        raise ValueError(f"{type(model).__name__} gives no floating-point output on this batch")
    others = runs[True, torch.float32], runs[False, torch.bfloat16], runs[True, torch.bfloat16]
    scale = {name: float(t.abs().max()) for name, t in truth.items()}
    least = 1e-3 * max((s for name, s in scale.items() if name.startswith("grad of ")), default=0.0)
    result = Parity()
    for name, t in truth.items():
        if not all(name in other for other in others):
            continue
        size = max(scale[name], least if name.startswith("grad of ") else 0.0, 1e-30)
        result[name] = Deviation(*(float((other[name] - t).abs().max()) / size for other in others))
    result.not_given = sorted({name for run in runs.values() for name in run} - result.keys())
    return result


class Parity(dict[str, Deviation]):
    """Deviations by name: outputs as the model names them, gradients as "grad of <parameter>".

    not_given: names of what not every one of the compared models gave.
    """

    not_given: Sequence[str] = ()

    def worst(self) -> tuple[str, Deviation]:
        """The output or gradient where patching deviates most in fp32."""
        return max(self.items(), key=_size)

    def __str__(self) -> str:
        gradients = {name: d for name, d in self.items() if name.startswith("grad of ")}
        lines = [f"{'largest relative deviation':42s} {'patched':>9s} {'bf16':>9s} {'patched bf16':>13s}"]
        shown = [(name, d) for name, d in self.items() if name not in gradients]
        shown += sorted(gradients.items(), key=_size, reverse=True)[:5]  # the worst of many
        for name, d in shown:
            short = name if len(name) <= 42 else f"{name[:12]}...{name[-27:]}"
            lines.append(f"{short:42s} {d.patched:9.1e} {d.original_bf16:9.1e} {d.patched_bf16:13.1e}")
        lines += [f"not given by all: {name}" for name in self.not_given]
        return "\n".join(lines)


def _size(item: tuple[str, Deviation]) -> float:
    return math.inf if math.isnan(item[1].patched) else item[1].patched


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output; those in tuples are named by their number."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield name or "output", output
    elif isinstance(output, (Mapping, tuple, list)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _tensors(value, f"{name}.{key}".lstrip("."))


def _run(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    tensors = dict(_tensors(model(**inputs)))
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() in (2, 3):
        mask = mask.flatten(0, -2)  # multiple choice has (B, C, S)
        classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
        flat = "ElectraForPreTraining" in classes  # one number for each token; elsewhere (B, S) may be S classes
        for name, t in tensors.items():
            if t.shape[:2] == mask.shape and (t.dim() == 3 or flat or name in ("start_logits", "end_logits")):
                tensors[name] = t[mask.bool()]
    found = {name: tensor.detach().float() for name, tensor in tensors.items()}
    goal: Any = tensors.get("loss")
    if goal is None:
        generator = torch.Generator().manual_seed(0)
        goal = sum((t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors.values())
    if isinstance(goal, Tensor) and goal.requires_grad:
        goal.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad of {name}"] = parameter.grad.float()
    return found
