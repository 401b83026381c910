"""The attention tiles of this GPU: each candidate is timed, the fastest are written where the kernels look for them.

What is shipped was chosen from what the kernels compile to (benchmarks/aot.py); this chooses by the clock. Candidates
are the tiles that the shipped tables hold; one that does not fit the GPU is left out. A training step tunes nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
from bertfast.benchmarks.gpu_check import seconds
from bertfast.kernels import attention, hardware
from triton.errors import TritonError

from bertfast.files import UserError, create_folder, write_json

KERNELS = ("fwd", "bwd_dq", "bwd_dkdv", "bwd_whole")  # the last is compared with the two before it
SHORT, LONG = 128, 512
Tile = list[int] | None


def candidates(kernel: str) -> list[Tile]:
    """All tiles in the shipped tables; for the backward of whole sequences those that hold one, or None: the two."""
    nested = [tile for of_arch in attention.TILES.values() for tiles in of_arch.values() for tile in tiles.values()]
    flat = [t for tile in nested if tile for t in (tile if not isinstance(tile[0], int) else (tile,)) if t]
    found = [list(t) for t in dict.fromkeys([*flat, *attention.MASKED.values(), attention.CAUSAL_DROPOUT_120])]
    return [None, *(t for t in found if t[0] >= SHORT)] if kernel == "bwd_whole" else found


def choose(measure: Callable[[str, dict], float], head_size: int, dropout: bool, mask_mode: int) -> dict[str, Tile]:
    """{key: tile} of the four kernels, one after another; measure(kernel, tiles): seconds with these tiles in place.

    Raises UserError where no candidate of a kernel runs.
    """
    key = partial(hardware.tile_key, head_size=head_size, dropout=dropout, mask_mode=mask_mode)
    chosen: dict[str, Tile] = {key("bwd_whole"): None}  # until the last kernel: the other two are what runs
    for kernel in KERNELS:
        times = []
        for tile in candidates(kernel):
            try:
                times.append((measure(kernel, {**chosen, key(kernel): tile}), tile))
            except TritonError:  # too much shared memory, or a compiler's limit
                continue
        if not times:
            raise UserError(f"no tile of {key(kernel)} runs on this GPU")
        chosen[key(kernel)] = min(times, key=lambda pair: pair[0])[1]
    return chosen


def attention_seconds(kernel: str, tiles: dict[str, Tile], head_size: int, dropout: bool, mask_mode: int) -> float:
    """Of forward and backward in bf16, 16,384 tokens of 12 heads, in sequences as long as the kernel is for."""
    length = SHORT if kernel == "bwd_whole" else LONG
    n, options = 16384, {"dtype": torch.bfloat16, "device": "cuda"}
    q, k, v = torch.randn(n, 3, 12, head_size, **options).unbind(1)
    bounds = torch.arange(0, n + 1, length, dtype=torch.int32, device="cuda")
    position = torch.arange(n, device="cuda")
    layout = (bounds, bounds, length, length, head_size**-0.5, mask_mode, bounds.diff() // 2, 0.1 * dropout,
              torch.ones(1, dtype=torch.int64, device="cuda"), (position // length << 32) + position % length, 1)
    shipped = attention.tuned_tiles
    attention.tuned_tiles = lambda: tiles
    try:
        out, lse = attention.attention_fwd(q, k, v, *layout)
        return seconds(lambda: attention.attention_fwd(q, k, v, *layout)) + seconds(
            lambda: attention.attention_packed_bwd(out, q, k, v, out, lse, *layout)
        )
    finally:
        attention.tuned_tiles = shipped


def tune(gpu: str, head_sizes: list[int], measure: Callable = attention_seconds) -> dict:
    """Choose for each head size, with and without dropout, each mask; write and return what the kernels will read."""
    tiles: dict[str, Tile] = {}
    for head_size in head_sizes:
        for dropout in (False, True):
            for mask_mode in (0, 1, 2):
                case = {"head_size": head_size, "dropout": dropout, "mask_mode": mask_mode}
                tiles |= choose(partial(measure, **case), **case)
    path = hardware.tiles_file(gpu)
    create_folder(path.parent)
    write_json(path, {"gpu": gpu, **hardware.made_with(), "tiles": tiles})
    return tiles
