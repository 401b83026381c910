"""The tiles of this GPU: each candidate is timed, the fastest are written where the launchers look for them.

What is shipped was chosen from what the kernels compile to (benchmarks/aot.py); this chooses by the clock. A candidate
that does not fit the GPU is left out. A training step tunes nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from bertfast.benchmarks.gpu_check import seconds
from bertfast.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    gelu_layer_norm,
    hardware,
    masked_vocab_projection,
)
from triton.errors import TritonError

from bertfast.files import UserError, create_folder, write_json

TOKENS, MASKED, VOCABULARY, HEADS = 16384, 2048, 30522, 12  # of the calls that are timed, in bf16
ATTENTION = ("fwd", "bwd_dq", "bwd_dkdv", "bwd_whole")  # the last is compared with the two before it
SHORT, LONG = 128, 512  # sequences: of the last kernel, of the others
SPILLING = 128, 64, 4, 1  # on sm_90, and still the fastest there for whole sequences without dropout
PER_THREAD = [8, 16, 32, 64]  # elements of a row
GELU = [[1, 2], [2, 2], [2, 4], [4, 4], [4, 8], [8, 8]]  # rows, warps
CROSS_ENTROPY = [[2048, 16], [4096, 8], [4096, 16], [8192, 16], [8192, 32]]  # columns, elements of a thread
PROJECTION = [  # rows, columns, depth, warps, stages
    [128, 128, 64, 8, 2], [128, 128, 32, 8, 2], [128, 128, 64, 8, 3], [128, 64, 64, 4, 2], [64, 128, 64, 4, 2],
    [64, 64, 64, 4, 3], [128, 256, 64, 8, 3],
]  # fmt: skip
Case = tuple[str, list, Callable[[], object]]  # a key of `hardware.tuned`, its candidates, the call that reads it


def attention_candidates(kernel: str) -> list[list[int] | None]:
    """The shipped tiles and one more; for the backward of whole sequences those that hold one, or None: the two."""
    nested = [tile for of_arch in attention.TILES.values() for tiles in of_arch.values() for tile in tiles.values()]
    flat = [t for tile in nested if tile for t in (tile if not isinstance(tile[0], int) else (tile,)) if t]
    more = [*attention.MASKED.values(), attention.CAUSAL_DROPOUT_120, SPILLING]
    found = [list(t) for t in dict.fromkeys([*flat, *more])]
    return [None, *(t for t in found if t[0] >= SHORT)] if kernel == "bwd_whole" else found


def attention_cases(head_size: int, device: str) -> Iterator[Case]:
    """With and without dropout, each mask; 16,384 tokens in sequences as long as the kernel is for."""
    q, k, v = torch.randn(TOKENS, 3, HEADS, head_size, device=device).bfloat16().unbind(1)
    out, lse = torch.randn_like(q), torch.zeros(HEADS, TOKENS, device=device)
    position, seed = torch.arange(TOKENS, device=device), torch.ones(1, dtype=torch.int64, device=device)
    for p in (0.0, 0.1):
        for mask_mode in (0, 1, 2):
            for kernel in ATTENTION:
                length = SHORT if kernel == "bwd_whole" else LONG
                bounds = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device=device)
                row_key = (position // length << 32) + position % length
                layout = (bounds, bounds, length, length, head_size**-0.5, mask_mode, bounds.diff() // 2, p, seed,
                          row_key, 1)  # fmt: skip
                forward = partial(attention.attention_fwd, q, k, v, *layout)
                backward = partial(attention.attention_packed_bwd, out, q, k, v, out, lse, *layout)
                key = attention.tile_key(kernel, head_size, p > 0.0, mask_mode)
                yield key, attention_candidates(kernel), forward if kernel == "fwd" else backward


def head_inputs(h: int, device: str) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, labels and scale of the projection on the vocabulary."""
    shapes = (MASKED, h), (VOCABULARY, h), (VOCABULARY,)
    hidden, weight, bias = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    return hidden, weight, bias, torch.arange(MASKED, device=device), torch.ones((), device=device)


def vocabulary_cases(device: str) -> Iterator[Case]:
    inputs = head_inputs(64, device)  # little beside the logits
    yield "cross_entropy", CROSS_ENTROPY, partial(masked_vocab_projection.cross_entropy, *inputs)


def row_cases(h: int, device: str) -> Iterator[Case]:
    """The row-wise kernels and the projection of a BERT with hidden size h; dropout on, as in training."""
    x, wide = (torch.randn(TOKENS, n, device=device).bfloat16() for n in (h, 4 * h))
    hidden, table, bias, labels, one = head_inputs(h, device)
    w, statistic, row_key = x[0], torch.ones(TOKENS, device=device), torch.arange(TOKENS, device=device)
    drop = 0.1, torch.ones(1, dtype=torch.int64, device=device), row_key, 1

    yield f"add_layer_norm_fwd H{h}", PER_THREAD, partial(
        add_layer_norm.add_layer_norm_fwd, x, w, x, w, w, 1e-12, *drop)
    yield f"add_layer_norm_bwd H{h}", PER_THREAD, partial(
        add_layer_norm.add_layer_norm_bwd, x, x, statistic, statistic, w, *drop)
    yield f"gelu_layer_norm_fwd H{h}", PER_THREAD, partial(
        gelu_layer_norm.gelu_layer_norm_fwd, hidden, w, w, w, 1e-12)
    yield f"gelu_layer_norm_bwd H{h}", PER_THREAD, partial(
        gelu_layer_norm.gelu_layer_norm_bwd, hidden, hidden, w, w, statistic[:MASKED], statistic[:MASKED])
    yield f"bias_gelu_fwd I{4 * h}", GELU, partial(bias_gelu.bias_gelu_fwd, wide, wide[0])
    yield f"bias_gelu_bwd I{4 * h}", GELU, partial(bias_gelu.bias_gelu_bwd, wide, wide, wide[0])

    def without_logits():
        softmax = masked_vocab_projection.statistics(hidden, table, bias, labels)[-1]
        masked_vocab_projection.gradients_without_logits(
            hidden, table, bias, labels, one, softmax, torch.empty_like(table), False
        )

    yield f"projection H{h}", PROJECTION, without_logits


def tune(gpu: str, head_sizes: list[int], hidden_sizes: list[int], measure: Callable = seconds, device: str = "cuda"
         ) -> dict[str, Any]:  # fmt: skip
    """Choose one after another, each with those before it in place; write and return what the launchers will read.

    measure(call): its seconds. Raises UserError where no candidate of a kernel runs.
    """
    tiles: dict[str, Any] = {}
    shipped, hardware.tuned_tiles = hardware.tuned_tiles, lambda: tiles
    try:
        cases = [partial(attention_cases, d) for d in head_sizes] + [partial(row_cases, h) for h in hidden_sizes]
        cases.append(vocabulary_cases)
        for key, candidates, call in chain.from_iterable(of_size(device) for of_size in cases):
            times = []
            for tiles[key] in candidates:
                try:
                    times.append((measure(call), tiles[key]))
                except TritonError:  # too much shared memory, or a compiler's limit
                    continue
            if not times:
                raise UserError(f"no tile of {key} runs on this GPU")
            tiles[key] = min(times, key=lambda pair: pair[0])[1]
    finally:
        hardware.tuned_tiles = shipped
    path = hardware.tiles_file(gpu)
    create_folder(path.parent)
    write_json(path, {"gpu": gpu, **hardware.made_with(), "tiles": tiles})
    return tiles
