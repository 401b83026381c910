"""Every differentiable op as a table: inputs, the fused call, and the plain PyTorch it replaces.

Tests and benchmarks read the same table. `eager` is torch.nn.functional at its best, with the dropout mask handed
in, so that both sides drop the same elements.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops
from bertfast.ops.dropout import keep_mask, keep_scale

SEED = 0x1234_5678_9ABC_DEF
STREAM = 7


@dataclass
class Case:
    """One op. `inputs(shape, dtype)` gives all tensors by name; those in `differentiable` get gradients."""

    name: str
    inputs: Callable[..., dict[str, Tensor]]
    fused: Callable[..., Tensor]  # (inputs, p)
    eager: Callable[..., Tensor]  # (inputs, p), any floating dtype
    differentiable: tuple[str, ...]
    shapes: tuple
    dropout: bool = True


# even, odd rows, odd columns, one row, zero rows, and one beyond every vector and block size
ROW_SHAPES = ((64, 256), (37, 128), (33, 203), (1, 64), (0, 64), (300, 1024))


def _generator(shape) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, repr(shape))))


def _normal(generator, *shape, std=1.0, mean=0.0):
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean


def _cast(tensors: dict[str, Tensor], dtype) -> dict[str, Tensor]:
    """Through bf16 first, so that every dtype holds exactly the same values."""
    return {
        name: t.to(torch.bfloat16).to(dtype) if t.is_floating_point() else t for name, t in tensors.items()
    }


def _row_inputs(shape, dtype):
    rows, columns = shape
    g = _generator(shape)
    return _cast({
        "x": _normal(g, rows, columns),
        "bias": _normal(g, columns, std=0.5),
        "residual": _normal(g, rows, columns, std=2.0, mean=0.5),
        "weight": _normal(g, columns, std=0.3, mean=1.0),
        "ln_bias": _normal(g, columns, std=0.3),
        "dy": _normal(g, rows, columns),
        "row_key": torch.randint(0, 2**40, (rows,), generator=g),
        "seed": torch.tensor([SEED]),
    }, dtype)


def _drop(x, p, seed, row_key):
    if p == 0.0:
        return x
    mask = keep_mask(p, seed, row_key, x.shape[1], STREAM)[0]
    return x * mask.to(x.dtype) * keep_scale(p)


def _norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)


def _embedding_inputs(shape, dtype):
    rows, columns, words = (*shape, 50)[:3]
    g = _generator(shape)
    ids = torch.randint(0, words, (rows,), generator=g)
    ids[: rows // 2] = 7  # a hot token
    return _cast({
        "input_ids": ids,
        "position_ids": torch.arange(rows) % 64,
        "token_type_ids": torch.randint(0, 2, (rows,), generator=g),
        "word": _normal(g, words, columns),
        "position": _normal(g, 64, columns, std=0.5),
        "token_type": _normal(g, 2, columns, std=0.5),
        "weight": _normal(g, columns, std=0.3, mean=1.0),
        "bias": _normal(g, columns, std=0.3),
        "dy": _normal(g, rows, columns),
        "row_key": torch.randint(0, 2**40, (rows,), generator=g),
        "seed": torch.tensor([SEED]),
    }, dtype)


def _embedding_eager(t, p):
    z = (F.embedding(t["input_ids"], t["word"], padding_idx=0) + F.embedding(t["position_ids"], t["position"])
         + F.embedding(t["token_type_ids"], t["token_type"]))
    return _drop(_norm(z, t["weight"], t["bias"]), p, t["seed"], t["row_key"])


# lengths of the sequences (a zero among them), trailing rows beyond the last, heads, head dimension
ATTENTION_SHAPES = (
    ((64, 64), 0, 2, 64),
    ((37, 1, 0, 90), 5, 3, 32),
    ((129,), 0, 1, 40),
    ((1,), 0, 2, 16),
    ((), 4, 2, 64),
    ((200, 17), 3, 2, 24),
    ((70, 9), 1, 1, 72),
    ((33,), 0, 3, 20),
)


def _bounds(lengths) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def _attention_inputs(shape, dtype, subset=False):
    lengths, tail, heads, dim = shape
    g = _generator(shape)
    total = sum(lengths) + tail
    cu = _bounds(lengths)
    keys = [torch.arange(n) + (b << 32) for b, n in enumerate(lengths)]
    rows = torch.cat([*keys, torch.zeros(tail, dtype=torch.int64)])
    tensors = {
        "qkv": _normal(g, total, 3, heads, dim),
        "dy": _normal(g, total, heads, dim),
        "cu_seqlens": cu,
        "longest": torch.empty(max(lengths, default=0), 0),  # in its shape, which is known without asking a GPU
        "row_key": rows,
        "prefix_lens": torch.tensor([max(1, n // 3) if n else 0 for n in lengths], dtype=torch.int32),
        "seed": torch.tensor([SEED]),
    }
    if subset:  # every third query, and one more row past the end
        picked = [torch.arange(0, n, 3) + int(cu[b]) for b, n in enumerate(lengths)]
        read = torch.cat([*picked, torch.zeros(1, dtype=torch.int64)]) if total else torch.zeros(0, dtype=torch.int64)
        tensors["q_rows"] = read
        tensors["cu_seqlens_read"] = _bounds([len(x) for x in picked])
        tensors["dy"] = _normal(g, len(read), heads, dim)
    return _cast(tensors, dtype)


def _attention_fused(mask_mode, subset=False):
    def call(t, p):
        common = {"mask_mode": mask_mode, "prefix_lens": t["prefix_lens"], "p": p, "seed": t["seed"], "stream": STREAM}
        longest = len(t["longest"])
        if not subset:
            return ops.attention_packed(t["qkv"], t["cu_seqlens"], longest, row_key=t["row_key"], **common)
        q, k, v = t["qkv"].unbind(1)
        return ops.attention(
            q[t["q_rows"]], k, v, t["cu_seqlens_read"], t["cu_seqlens"], longest, longest,
            q_row_key=t["row_key"][t["q_rows"]], **common,
        )

    return call


def _attention_eager(mask_mode, subset=False):
    def call(t, p):
        outs = []
        heads, dim = t["qkv"].shape[2:]
        bounds = t["cu_seqlens"].tolist()
        read_bounds = t["cu_seqlens_read"].tolist() if subset else bounds
        n_rows = len(t["q_rows"]) if subset else t["qkv"].shape[0]
        for b in range(len(bounds) - 1):
            q, k, v = t["qkv"][bounds[b] : bounds[b + 1]].permute(1, 2, 0, 3)  # (3, N, S, D)
            keys = torch.arange(k.shape[1], device=k.device)
            queries = keys
            if subset:
                queries = t["q_rows"][read_bounds[b] : read_bounds[b + 1]] - bounds[b]
                q = q[:, queries]
            visible = torch.ones(len(queries), len(keys), dtype=torch.bool, device=k.device)
            if mask_mode != "full":
                visible = keys <= queries.unsqueeze(1)
            if mask_mode == "prefix":
                visible |= keys < t["prefix_lens"][b]
            scores = (q @ k.mT * dim**-0.5).masked_fill(~visible, -torch.inf)
            weights = scores.softmax(-1)
            if p > 0:
                key = t["row_key"][bounds[b] : bounds[b + 1]][queries]
                mask = keep_mask(p, t["seed"], key, len(keys), STREAM, heads)
                weights = weights * mask.to(weights.dtype) * keep_scale(p)
            outs.append((weights @ v).transpose(0, 1))
        outs.append(t["qkv"].new_zeros(n_rows - read_bounds[-1], heads, dim))
        return torch.cat(outs) + 0 * t["qkv"].sum()  # depends on qkv even where there is no sequence

    return call


def _attention_case(mask_mode, subset=False):
    return Case(
        f"attention_{mask_mode}{'_subset' if subset else ''}",
        lambda shape, dtype: _attention_inputs(shape, dtype, subset),
        _attention_fused(mask_mode, subset), _attention_eager(mask_mode, subset), ("qkv",), ATTENTION_SHAPES,
    )


# masked rows, hidden size, vocabulary
PROJECTION_SHAPES = ((40, 64, 1000), (37, 128, 203), (70, 100, 4099), (1, 64, 333), (0, 64, 64))


def _projection_inputs(shape, dtype):
    rows, hidden, vocab = shape
    g = _generator(shape)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[::3] = -100
    weight = _normal(g, vocab, hidden, std=hidden**-0.5)
    x = _normal(g, rows, hidden)
    if rows:  # some rows peaked at their label, so that the softmax is not flat
        peaked = labels[:: 2].clamp(min=0)
        x[::2] += 3 * hidden**0.5 * weight[peaked]
    return _cast({
        "hidden": x, "weight": weight, "bias": _normal(g, vocab, std=0.1), "labels": labels,
        "dy": torch.tensor(1.7),
    }, dtype)


def _projection_eager(t, p):
    """Eager in the inputs' dtype; the cross entropy itself in fp32, as autocast does."""
    keep = t["labels"] != -100
    logits = F.linear(t["hidden"], t["weight"], t["bias"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, t["labels"], reduction="sum") / keep.sum().clamp(min=1)


_rows = ("x", "bias", "residual", "weight", "ln_bias")
CASES = {
    case.name: case
    for case in (
        Case(
            "add_layer_norm", _row_inputs,
            lambda t, p: ops.add_layer_norm(*(t[n] for n in _rows), 1e-12, p, t["seed"], t["row_key"], STREAM),
            lambda t, p: _norm(_drop(t["x"] + t["bias"], p, t["seed"], t["row_key"]) + t["residual"], t["weight"],
                               t["ln_bias"]),
            _rows, ROW_SHAPES,
        ),
        Case(
            "dropout", _row_inputs,
            lambda t, p: ops.dropout(t["x"], p, t["seed"], t["row_key"], STREAM),
            lambda t, p: _drop(t["x"], p, t["seed"], t["row_key"]),
            ("x",), ROW_SHAPES,
        ),
        Case(
            "bias_gelu", _row_inputs,
            lambda t, p: ops.bias_gelu(t["x"], t["bias"]),
            lambda t, p: F.gelu(t["x"] + t["bias"]),
            ("x", "bias"), ROW_SHAPES, dropout=False,
        ),
        Case(
            "gelu_layer_norm", _row_inputs,
            lambda t, p: ops.gelu_layer_norm(t["x"], t["bias"], t["weight"], t["ln_bias"]),
            lambda t, p: _norm(F.gelu(t["x"] + t["bias"]), t["weight"], t["ln_bias"]),
            ("x", "bias", "weight", "ln_bias"), ROW_SHAPES, dropout=False,
        ),
        Case(
            "embedding_sum", _embedding_inputs,
            lambda t, p: ops.embedding_sum(
                t["input_ids"], t["position_ids"], t["token_type_ids"], t["word"], t["position"], t["token_type"],
                t["weight"], t["bias"], 1e-12, 0, p, t["seed"], t["row_key"], STREAM,
            ),
            _embedding_eager,
            ("word", "position", "token_type", "weight", "bias"), ROW_SHAPES,
        ),
        Case(
            "masked_vocab_projection", _projection_inputs,
            lambda t, p: ops.masked_vocab_projection(t["hidden"], t["weight"], t["bias"], t["labels"])[0],
            _projection_eager, ("hidden", "weight", "bias"), PROJECTION_SHAPES, dropout=False,
        ),
        _attention_case("full"),
        _attention_case("causal"),
        _attention_case("prefix"),
        _attention_case("full", subset=True),
        _attention_case("causal", subset=True),
        _attention_case("prefix", subset=True),
    )
}


def run(call: Callable, case: Case, tensors: dict[str, Tensor], p: float) -> dict[str, Tensor]:
    """Forward and backward of one side: {"y": …, "d<input>": …}."""
    tensors = dict(tensors)
    for name in case.differentiable:
        tensors[name] = tensors[name].detach().clone().requires_grad_()
    y = call(tensors, p)
    y.backward(tensors["dy"].to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": tensors[name].grad for name in case.differentiable}}
