"""Dropout as every backend draws it: one definition, the same bits in torch, C++ and Triton.

Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 7 is the fewest
that pass BigCrush). One call serves four column blocks of 16, so that in each group of 64 columns

    c0 = 16 * (col // 64) + col % 16          word = (col % 64) // 16 of the call's four
    c1 = position in the sequence             c2 = sequence index in the step's global batch
    c3 = stream << 8 | head                   key = the step's 64-bit seed

An element is kept where its word >= threshold. `row_key` (rows,) int64 = sequence index << 32 | position, so a
mask does not depend on packing, padding, micro-batching, ranks or tiling, and recomputing draws it again.
`stream` is a constant of layer and site.

The fused ops draw it themselves; `dropout` is for where there is nothing to fuse it with (the heads of fine-tuning).
"""

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, once_differentiable

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The 32-bit integer below which a word is dropped: P(word < threshold) = p to 2^-33."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return min(round(p * 2**32), 2**32 - 1)


def keep_scale(p: float) -> float:
    """1 / P(kept), exact for the threshold in use."""
    return 2.0**32 / (2**32 - threshold(p))


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-7 on int64 tensors that hold 32-bit counters (broadcast together); four words of 32 bits.

    int64 products wrap to the right 64 bits, so a shift and a mask give the high word of an unsigned product.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, ((product0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & _LOW, (k1 + KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(p: float, seed: Tensor, row_key: Tensor, n_columns: int, stream: int, n_heads: int = 1) -> Tensor:
    """The mask of kept elements, (n_heads, rows, n_columns) bool; the definition above in torch integer ops.

    seed: int64 with one element. row_key: (rows,) int64. Raises ValueError unless 0 <= p < 1.
    """
    device = row_key.device
    groups = torch.arange((n_columns + 63) // 64, device=device)
    c0 = (16 * groups.unsqueeze(1) + torch.arange(16, device=device)).view(1, 1, -1)  # (1, 1, groups * 16)
    c1 = (row_key & _LOW).view(1, -1, 1)
    c2 = ((row_key >> 32) & _LOW).view(1, -1, 1)
    c3 = (stream << 8) + torch.arange(n_heads, device=device).view(-1, 1, 1)
    words = philox(seed.view(1, 1, 1), c0, c1, c2, c3)
    shape = (n_heads, row_key.numel(), groups.numel(), 16)
    bits = torch.stack([torch.broadcast_to(w, (*shape[:2], shape[2] * 16)).view(shape) for w in words], dim=3)
    return bits.flatten(2)[..., :n_columns] >= threshold(p)  # (heads, rows, groups, 4, 16) -> columns


def dropout_scale(x: Tensor, p: float, seed: Tensor | None, row_key: Tensor | None, stream: int) -> Tensor:
    """x (rows, columns) times mask / P(kept): what each reference multiplies by; x unchanged at p = 0."""
    if p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device) if row_key is None else row_key
    mask = keep_mask(p, require_seed(seed), rows, x.shape[1], stream)[0]
    return torch.where(mask, x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))


def require_seed(seed: Tensor | None) -> Tensor:
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError("dropout (p > 0) needs a seed: an int64 tensor with one element")
    return seed


def draw_seed(device: torch.device) -> Tensor:
    """A forward's key, int64 (1,), from torch's generator, which `manual_seed` governs."""
    return torch.randint(-(2**62), 2**62, (1,), device=device)


def step_seed(seed: int, step: int, micro_batch: int = 0) -> int:
    """The dropout key of one forward: 64 well-mixed bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + micro_batch * 0x8CB92BA72F3D8DD7 + 1) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def _reference(x, p, seed, row_key, stream):
    return dropout_scale(x.to(accumulate_dtype(x)), p, seed, row_key, stream).to(x.dtype)


_op = define("dropout(Tensor x, float p, Tensor? seed, Tensor? row_key, int stream) -> Tensor", _reference,
             kernels="dropout")  # p > 0: an op may not return what it was given


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, row_key, stream):
        ctx.save_for_backward(seed, row_key)
        ctx.p, ctx.stream = p, stream
        return _op(x, p, seed, row_key, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        seed, row_key = ctx.saved_tensors
        return _op(dy, ctx.p, seed, row_key, ctx.stream), None, None, None, None


def dropout(x: Tensor, p: float, seed: Tensor | None = None, row_key: Tensor | None = None, stream: int = 0) -> Tensor:
    """`F.dropout(x, p)` with the mask defined here. x: (T, H), row_key: (T,) or None, which counts rows.

    Raises ValueError for p outside [0, 1) or p > 0 without a seed.
    """
    return x if p == 0.0 else _Dropout.apply(x, p, require_seed(seed), row_key, stream)
