"""What each op must at least do, by formula, and the least time that takes.

Bytes are the compulsory ones: every input read once from memory, every output written once (saved tensors included),
nothing left in a cache by the op before; vectors of length H and row statistics are left out. FLOPs are those of the
matrix products. An op's bound is max(FLOPs / peak, bytes / bandwidth), a step's their sum (the roofline model,
Williams, Waterman & Patterson 2009); small tensors that stay in cache can beat it. Rows for GPUs use datasheet peaks:
predicted, not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bertfast.config import BertConfig
from bertfast.files import UserError


@dataclass
class Cost:
    """Work of one call: FLOPs of its matrix products, bytes it must move."""

    flops: float
    bytes: float

    def seconds(self, machine: "Machine") -> float:
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@dataclass
class Machine:
    """flops: dense matrix FLOP/s in the step's dtype; bandwidth: bytes/s, reads and writes together."""

    name: str
    flops: float
    bandwidth: float
    predicted: bool = True


DATASHEETS = [  # dense bf16 tensor-core rate and memory bandwidth, as NVIDIA's datasheets state them
    Machine("A100 SXM 80 GB", 312e12, 2.039e12),
    Machine("H100 SXM", 989e12, 3.35e12),
    Machine("B200", 2250e12, 8.0e12),
]


def rows_cost(forward_tensors: int, backward_tensors: int) -> Callable:
    """Ops that stream (T, H) tensors: how many of them pass, forward and backward."""
    def cost(shape: tuple, itemsize: int) -> tuple[Cost, Cost]:
        size = shape[0] * shape[1] * itemsize
        return Cost(0, forward_tensors * size), Cost(0, backward_tensors * size)

    return cost


def embedding_cost(shape: tuple, itemsize: int) -> tuple[Cost, Cost]:
    """(T, H, V): the word rows are gathered in both directions; backward writes the whole table's gradient."""
    T, H, V = shape
    return Cost(0, 2 * T * H * itemsize), Cost(0, (2 * T + V) * H * itemsize)


def attention_cost(shape: tuple, itemsize: int) -> tuple[Cost, Cost]:
    """(lengths, unused rows, N, D): two products forward, five backward, as FlashAttention counts them (Dao 2022)."""
    lengths, _, heads, dim = shape
    tensor = sum(lengths) * heads * dim * itemsize
    product = 2 * heads * dim * sum(n * n for n in lengths)
    return Cost(2 * product, 4 * tensor), Cost(5 * product, 8 * tensor)


def projection_cost(shape: tuple, itemsize: int) -> tuple[Cost, Cost]:
    """(R, H, V): the forward forms loss and all gradients; the backward only scales them."""
    R, H, V = shape
    return Cost(6 * R * H * V, 2 * (R + V) * H * itemsize), Cost(0, 0)


COSTS: dict[str, Callable] = {
    "add_layer_norm": rows_cost(4, 4),  # x, residual -> z, y; dy, z -> dresidual, dx
    "bias_gelu": rows_cost(2, 3),
    "gelu_layer_norm": rows_cost(2, 3),
    "embedding_sum": embedding_cost,
    "attention_full": attention_cost,
    "masked_vocab_projection": projection_cost,
}


def optimizer_cost(parameters: int, itemsize: int) -> Cost:
    """AdamW: gradient in, master and two moments in and out; a bf16 parameter is half of its master."""
    return Cost(0, parameters * (itemsize + 3 * 8))


def gemm_cost(rows: int, inner: int, columns: int, itemsize: int) -> Cost:
    """x (rows, inner) @ W (inner, columns), its input and its weight gradient: three products."""
    moved = rows * inner + inner * columns + rows * columns
    return Cost(6 * rows * inner * columns, 3 * moved * itemsize)


def step_costs(config: BertConfig, tokens: int, length: int, itemsize: int) -> dict[str, Cost]:
    """One pretraining step of full sequences, forward and backward, kind of op by kind of op.

    The last layer computes its attention output and feed-forward part on the read rows only, as our model does; the
    word table's gradient is written once, by the projection.
    """
    H, I, L, N = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    sequences = max(1, tokens // length)
    predicted = round(0.15 * tokens)
    parameters = parameters_of(config)
    total: dict[str, Cost] = {}

    def add(name: str, *costs: Cost) -> None:
        sum_ = total.setdefault(name, Cost(0, 0))
        for cost in costs:
            sum_.flops, sum_.bytes = sum_.flops + cost.flops, sum_.bytes + cost.bytes

    add("embedding_sum", *embedding_cost((tokens, H, 0), itemsize))
    for layer in range(L):
        rows = tokens if layer < L - 1 else predicted + sequences
        add("linear layers", gemm_cost(tokens, H, 2 * H, itemsize), gemm_cost(rows, H, H, itemsize),
            gemm_cost(rows, H, H, itemsize), gemm_cost(rows, H, I, itemsize), gemm_cost(rows, I, H, itemsize))
        share = rows / tokens  # of the queries
        for cost in attention_cost(((length,) * sequences, 0, N, H // N), itemsize):
            add("attention", Cost(cost.flops * share, cost.bytes * (1 + share) / 2))
        add("add_layer_norm", *COSTS["add_layer_norm"]((2 * rows, H), itemsize))
        add("bias_gelu", *COSTS["bias_gelu"]((rows, I), itemsize))
    add("linear layers", gemm_cost(predicted, H, H, itemsize))
    add("gelu_layer_norm", *COSTS["gelu_layer_norm"]((predicted, H), itemsize))
    add("masked_vocab_projection", *projection_cost((predicted, H, config.vocab_size), itemsize))
    add("grad_norm and adamw_step", Cost(0, parameters * itemsize), optimizer_cost(parameters, itemsize))
    return total


def parameters_of(config: BertConfig) -> int:
    H, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = 4 * (H * H + H) + 2 * H * I + I + H + 4 * H
    tables = (V + config.max_position_embeddings + config.type_vocab_size) * H + 2 * H
    return tables + config.num_hidden_layers * layer + 2 * (H * H + H) + 2 * H + V + 2 * H + 2


def bounds(preset: str, tokens: int, length: int, vocab_size: int, here: list[Machine]) -> dict:
    """The lower bounds of a step on each machine: result rows for the report.

    here: this machine, measured, once a dtype (its name ends in it). Raises UserError for an unknown preset.
    """
    config = BertConfig.preset(preset, vocab_size=vocab_size)
    if tokens < length:
        raise UserError(f"{tokens} tokens hold no sequence of {length}")
    rows = []
    for machine in [*here, *DATASHEETS]:
        costs = step_costs(config, tokens, length, 4 if machine.name.endswith("fp32") else 2)
        seconds = {name: cost.seconds(machine) for name, cost in costs.items()}
        rows.append({
            "key": f"{preset} S={length} tokens={tokens}", "contender": machine.name, "failed": "",
            "label": "predicted, not measured" if machine.predicted else "from peaks measured here",
            "seconds": sum(seconds.values()), "tokens_per_second": tokens / sum(seconds.values()),
            "pieces": {name: {"flops": costs[name].flops, "bytes": costs[name].bytes, "seconds": s}
                       for name, s in seconds.items()},
        })
    settings = {"preset": preset, "tokens": tokens, "length": length, "vocab_size": vocab_size}
    return {"settings": settings, "rows": rows}
