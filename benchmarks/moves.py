"""What each move of ours is worth in a pretraining step: the step with that move alone taken back, and the prediction.

A move is taken back by putting the plain PyTorch that it replaced in its place, in a process of its own; what that
adds to the step is what the move is worth. All must compute the same, dropout off, before anything is timed. Predicted
is the work that the move saves, counted as in roofline.py: FLOPs at the GEMM rate and bytes at the copy bandwidth, both
measured in the same run. Moves overlap (who projects all tokens loses the fused projection too): they don't add up.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bertfast.benchmarks import contest, plain, pretrain
from bertfast.benchmarks.contest import Contender
from bertfast.benchmarks.roofline import Cost, parameters_of, step_costs

import bertfast.ops.linear
import bertfast.optim
from bertfast import machine, model, nn, ops
from bertfast.config import BertConfig
from bertfast.data.dataset import Dataset
from bertfast.files import UserError
from bertfast.model import BertForPreTraining


@dataclass
class Shape:
    """A step: T tokens in B sequences of S, of which P are masked and R = P + B read; bytes an element."""

    T: int
    B: int
    S: int
    P: int
    config: BertConfig
    itemsize: int

    @property
    def R(self) -> int:
        return self.P + self.B

    def rows(self, tensors: float, width: int) -> float:
        """Bytes of so many (rows, width) tensors a layer, over all layers; the last one has only R rows."""
        return tensors * width * self.itemsize * ((self.config.num_hidden_layers - 1) * self.T + self.R)

    def logits(self, rows: int) -> float:
        """Bytes of rows of logits: written, to fp32, log-softmax, both backward, back, two products, the bias's sum."""
        passes = 44 if self.itemsize == 2 else 40
        return passes * rows * self.config.vocab_size


# ---- the moves: how each is taken back (in its process, before the model is made), and what it should save


def _every_row() -> None:
    """The last layer computes all rows, and all of them are projected on the vocabulary."""
    encode, kept = model.BertModel.encode, {}

    def all_rows(self, batch, seed=None, read=True, **more):
        x = encode(self, batch, seed, read=False, **more)
        kept["x"], kept["labels"] = x, torch.full((len(x),), -100)
        used = batch.labels != -100
        kept["labels"][batch.read_rows[batch.mask_index[used]]] = batch.labels[used]
        return x[batch.read_rows] if read else x

    model.BertModel.encode = all_rows
    _projection(lambda x, labels: (kept["x"], kept["labels"]))


def _projection(rows: Callable = lambda x, labels: (x, labels)) -> None:
    """Logits and cross entropy (in fp32, as autocast has it) as PyTorch's ops; the table has two gradients."""

    def forward(self, x, word_embeddings, labels, scale=None, sink=None):
        x, labels = rows(x, labels)
        loss = F.cross_entropy(self.logits(x, word_embeddings).float(), labels, reduction="sum")
        return loss * scale, (labels != -100).sum(), None

    nn.MLMHead.forward = forward
    bertfast.optim.GradientSink = lambda buffer: None


def _all_rows_of_the_last_layer() -> None:
    forward = model.BertLayer.forward

    def all_rows(self, x, rows, read=None, read_rows=None, **mask):
        x = forward(self, x, rows, **mask)
        return x if read is None else x[read_rows]

    model.BertLayer.forward = all_rows


def _attention() -> None:
    """Scores in memory, as batched products; sequences of one length."""

    def forward(self, x, rows, read=None, read_rows=None, **mask):
        n = len(x) // rows.max_seqlen
        qkv = nn.joined_linear(x, self.query, self.key, self.value).view(n, -1, 3, self.n_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = plain.attention(q, k, v, rows.dropout(self.p, 0)["p"]).transpose(1, 2).reshape(len(x), -1)
        return out if read is None else out[read_rows]

    nn.SelfAttention.forward = forward


def _three_linears() -> None:
    """Query, key and value in a GEMM each."""
    joined = nn.joined_linear
    nn.joined_linear = lambda x, *linears: torch.cat([joined(x, linear) for linear in linears], 1)


def _add_layer_norm() -> None:
    def forward(self, x, residual, rows, gelu_bias=None):
        x = x if gelu_bias is None else bertfast.ops.bias_gelu(x, gelu_bias)
        dropped = F.dropout(nn.joined_linear(x, self.dense), rows.dropout(self.p, 0)["p"])
        return self.LayerNorm(dropped + residual)

    nn.AddLayerNorm.forward = forward


def _bias_gelu() -> None:
    nn.FeedForward.forward = lambda self, x: (F.gelu(nn.joined_linear(x, self.dense)), None)


def _gelu_again() -> None:
    ops.linear._forms_again = lambda x, module: False


def _gemm() -> None:
    """oneDNN for all linear layers."""
    ops.linear.suits = lambda x, weight: False


def _embedding_sum() -> None:
    """Three gathers, two sums, LayerNorm, dropout; the table has two gradients."""

    def forward(self, input_ids, token_type_ids, position_ids, rows):
        x = (self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
             + self.token_type_embeddings(token_type_ids))
        return F.dropout(self.LayerNorm(x), rows.dropout(self.p, 0)["p"])

    nn.Embeddings.forward = forward
    bertfast.optim.GradientSink = lambda buffer: None


def _optimizer() -> None:
    """torch's fused AdamW on fp32 masters, gradients and parameters copied between them."""

    class Plain:
        def __init__(self, model, dtype, max_grad_norm, sink, **options):
            self.inner = plain.AdamW(list(model.to(dtype).parameters()), lr=pretrain.LR, **options)
            self.max_norm, self.loss_scale = max_grad_norm, torch.ones((), device=next(model.parameters()).device)

        def step(self, lr):
            return self.inner.step(self.max_norm)

    pretrain.Optimizer = Plain


def _table(s: Shape, tensors: float) -> float:
    return tensors * s.config.vocab_size * s.config.hidden_size * s.itemsize


def _saved_by_reading_few(s: Shape) -> Cost:
    """FLOPs of the last layer on T - R rows: three products for the forward and its two gradients each."""
    H, I = s.config.hidden_size, s.config.intermediate_size
    return Cost(6 * (s.T - s.R) * (2 * H * H + 2 * H * I), 0)


def _saved_by_masked_rows(s: Shape) -> Cost:
    H, V, unread = s.config.hidden_size, s.config.vocab_size, s.T - s.P
    return Cost(_saved_by_reading_few(s).flops + 6 * unread * H * (V + H), s.logits(s.T) + _table(s, 4))


MOVES: dict[str, tuple[Callable[[], None], Callable[[Shape], Cost]]] = {
    "masked rows alone are projected, read rows alone pass the last layer": (_every_row, _saved_by_masked_rows),
    "read rows alone pass the last layer": (_all_rows_of_the_last_layer, _saved_by_reading_few),
    # logits never whole; and the table's second gradient is not zeroed, written and added
    "masked_vocab_projection": (_projection, lambda s: Cost(0, s.logits(s.P) + _table(s, 4))),
    # passes over (B N, S, S): 5.5 forward and 9 backward, a mask of dropout being half of one; ours forms scores twice
    "attention": (_attention, lambda s: Cost(
        -2 * s.S * s.config.hidden_size * s.T * s.config.num_hidden_layers,
        14.5 * s.config.num_hidden_layers * s.T * s.S * s.config.num_attention_heads * s.itemsize)),
    # forward 7.5 passes, not 4; backward 8.5, not 4; twice a layer
    "add_layer_norm": (_add_layer_norm, lambda s: Cost(0, s.rows(2 * 8, s.config.hidden_size))),
    # the bias's gradient reads once more
    "bias_gelu": (_bias_gelu, lambda s: Cost(0, s.rows(1, s.config.intermediate_size))),
    # memory's price: one more forward pass
    "GELU formed again in the backward": (_gelu_again, lambda s: Cost(0, -s.rows(2, s.config.intermediate_size))),
    "embedding_sum": (_embedding_sum, lambda s: Cost(
        0, 13 * s.T * s.config.hidden_size * s.itemsize + _table(s, 4))),
    # joining reads and writes all three; the input's gradient is the sum of three
    "query, key and value in one GEMM": (_three_linears, lambda s: Cost(
        0, s.rows(6 + 2 + 6, s.config.hidden_size))),
    # in bf16; oneDNN's products of these shapes took 6 % longer alone, on 2 cores of Zen 4
    "gemm": (_gemm, lambda s: Cost(
        (0.06 if s.itemsize == 2 else 0) * step_costs(s.config, s.T, s.S, s.itemsize)["linear layers"].flops, 0)),
    # gradients to fp32 and clipped there, masters to bf16
    "grad_norm and adamw_step": (_optimizer, lambda s: Cost(
        0, parameters_of(s.config) * (22 if s.itemsize == 2 else 8))),
}
PAGES = "freed pages are kept"


def without(move: str, **arguments) -> Iterator[dict]:
    """A contender: our step, one move taken back."""
    MOVES[move][0]()
    yield from pretrain.bertfast(**arguments)


def run(*, data: str | None, preset: str, tokens: int, length: int, precision: str, rounds: int, threads: int) -> dict:
    """The result as JSON's types, a row a move. Raises UserError for settings that make no batch or no precision."""
    precision, _ = machine.choose_precision(precision, machine.choose_device())
    if precision == "fp16":
        raise UserError("bench moves runs in fp32 or bf16: say which with --precision")
    vocabulary = Dataset(data).tokenizer.vocab_size if data else 30522
    batches = {"data": data, "tokens": tokens, "length": length, "fill": 1.0, "vocab_size": vocabulary}
    sample = pretrain.make_batches(**batches, n=1)[0]
    config = pretrain.model_config(preset, vocabulary, length)
    ours = f"bertfast {precision}"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
        arguments = {"checkpoint": folder, "batches": batches, "precision": precision, "turn_steps": 2,
                     "replayed": False}  # torch's AdamW cannot be captured as it is
        entrants = [
            Contender(ours, pretrain.bertfast, arguments), Contender("machine", contest.yardstick, {}),
            *(Contender(f"{precision} without: {move}", without, {"move": move, **arguments}) for move in MOVES),
            Contender(f"{precision} without: {PAGES}", pretrain.bertfast, arguments, keep_pages=False),
        ]
        outcomes, stopped = contest.contest(entrants, rounds, threads,
                                            lambda facts: pretrain.agreement(facts, ours))
    peaks = contest.peaks(outcomes.pop("machine"))
    shape = Shape(sample.n_tokens, sample.n_sequences, length, sample.n_masked, config,
                  machine.DTYPES[precision].itemsize)
    rows = []
    for name, outcome in outcomes.items():
        row = {"key": f"{preset} S={length} {precision}", "contender": name, "failed": outcome.failed}
        if outcome.turns and not outcome.failed:
            row |= {"samples": outcome.values(), **contest.middle(outcome.values())}
        move = name.partition("without: ")[2]
        if move in MOVES and peaks:
            cost = MOVES[move][1](shape)
            row["predicted"] = cost.flops / peaks[precision] + cost.bytes / peaks["copy"]
        rows.append(row)
    settings = {"preset": preset, "tokens": sample.n_tokens, "length": length, "precision": precision,
                "vocab_size": vocabulary, "rounds": rounds}
    return {"suite": "moves", **contest.provenance(threads), "settings": settings, "machine": peaks,
            "stopped_early": stopped, "rows": rows}
