"""How a padded (B, S) call lies in packed rows, and which of them a patched model's last layer computes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.masked_vocab_projection import IGNORE_INDEX


@dataclass
class Reads:
    """What a head reads of the encoder's output, besides the attended rows.

    labels: (B, S); a labelled row is computed even where it is padding, as the original does. padding: any row may be
    read. first_only: nothing but column 0 is read. head: a BertLMPredictionHead to turn the labelled rows into `loss`
    within the encoder, where the other rows need not exist; `n_first` columns are returned for the pooler then.
    """

    labels: Tensor | None = None
    padding: bool = False
    first_only: bool = False
    head: Any = None
    n_first: int = 0
    loss: Tensor | None = None


@dataclass
class Rows:
    """How a padded (B, S) call lies in T packed rows, and what dropout counts by."""

    shape: torch.Size  # (B, S)
    longest: int  # no sequence is longer; a constant where shapes are symbols
    cu_seqlens: Tensor  # (B + 1,) int32
    indices: Tensor | None = None  # (T,) flat positions b * S + s; None: all of them, in order
    keys: Tensor | None = None  # rows that are attended to, where not all are; sequence by sequence, then any others
    cu_seqlens_k: Tensor | None = None
    row_key: Tensor | None = None  # (T,) int64 as in bertfast.ops.dropout, where something is dropped
    seed: Tensor | None = None

    def pack(self, padded: Tensor) -> Tensor:
        """(B, S, H) -> (T, H)."""
        flat = padded.reshape(-1, padded.shape[-1])
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def restore(self, rows: Tensor) -> Tensor:
        """(T, H) -> (B, S, H), zeros at padding."""
        if self.indices is None:
            return rows.view(*self.shape, -1)
        out = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1])
        return out.index_copy(0, self.indices, rows).view(*self.shape, rows.shape[1])

    def subset(self, index: Tensor, flat: Tensor, cu_seqlens: Tensor) -> "Rows":
        """The packed rows at `index`, whose flat positions are `flat`, grouped by the same sequences."""
        row_key = None if self.row_key is None else self.row_key[index]
        return Rows(self.shape, self.longest, cu_seqlens, flat, row_key=row_key)


def offsets(counts: Tensor) -> Tensor:
    """Where sequences of so many rows begin, and the last one's end: (B,) -> (B + 1,) int32."""
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def arrange(shape: torch.Size, longest: int, mask: Tensor | None, device: torch.device, labels: Tensor | None,
             every_row: bool) -> Rows:
    """Rows for a padding mask (B, S), nonzero = attended; None = no padding.

    every_row keeps padding rows as queries, with static shapes (the keys are sorted to the front): what tracing and
    whatever may read padding need. Otherwise the attended rows are kept, column 0, and those with a label.
    """
    n_sequences, length = shape
    if mask is not None and not every_row and bool(mask.all()):
        mask = None
    if mask is None or every_row:
        rows = Rows(shape, longest, torch.arange(n_sequences + 1, dtype=torch.int32, device=device) * length)
        if mask is not None:
            attended = mask.to(device) != 0
            rows.keys = torch.argsort((~attended).flatten().int(), stable=True)
            rows.cu_seqlens_k = offsets(attended.sum(1))
        return rows
    attended = mask.to(device) != 0
    kept = attended.clone()
    kept[:, 0] = True  # where the pooler looks, whatever stands there
    if labels is not None:
        kept |= labels != IGNORE_INDEX
    rows = Rows(shape, longest, offsets(kept.sum(1)), kept.flatten().nonzero().squeeze(1))
    if not torch.equal(kept, attended):
        rows.keys = attended.flatten()[rows.indices].nonzero().squeeze(1)
        rows.cu_seqlens_k = offsets(attended.sum(1))
    return rows


_mode, _kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey


def tracing() -> bool:
    """Whether what runs here is recorded, to run later on other values, or has no values (fake tensors)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _mode(_kinds.FAKE) is not None or _mode(_kinds.PROXY) is not None


def padding_mask(mask: Tensor | None, shape: torch.Size, attention: str) -> tuple[Tensor | None, str | None]:
    """(the (B, S) padding mask behind what the model made of it, None) or (None, why it is not a padding mask).

    `attention` is the implementation by which the original would read it.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != shape[1]:
        return None, f"an attention mask of another form, {getattr(mask, 'shape', type(mask))}"
    if mask.dim() == 2 and "flash" not in attention:
        mask = mask[None, None]  # (queries, keys)
    mask = mask.expand(shape[0], *mask.shape[1:])  # one for all sequences broadcasts
    if mask.dim() == 2:
        return mask, None
    if mask.shape[1] != 1 or tracing():
        return None, "a (batch, heads, queries, keys) attention mask"
    row = mask[:, 0, 0]
    if mask.shape[2] != 1 and not torch.equal(mask, row[:, None, None].expand_as(mask)):
        return None, "an attention mask that differs between queries"
    if mask.dtype == torch.bool and attention != "eager":
        return row, None
    attended = row == 0  # additive; so eager attention takes booleans too, True for 1
    if not bool((attended | (row <= -1e4)).all()):
        return None, "an attention mask that adds to the scores"
    return attended, None


def last_rows(rows: Rows, reads: Reads, labels: Tensor | None) -> tuple[Tensor | None, Rows]:
    """(index into the packed rows, the rows there) of what the last layer must compute; (None, all rows) if it is all.

    Column 0 is the first row of its sequence, in either arrangement.
    """
    n_sequences, length = rows.shape
    device = rows.cu_seqlens.device
    if reads.first_only:
        cu_seqlens = torch.arange(n_sequences + 1, dtype=torch.int32, device=device)
        index = rows.cu_seqlens[:-1].long()
        return index, rows.subset(index, cu_seqlens[:-1].long() * length, cu_seqlens)
    if reads.head is None or labels is None or tracing():
        return None, rows
    wanted = labels != IGNORE_INDEX
    wanted[:, : reads.n_first] = True
    flat = wanted.flatten()
    index = (flat if rows.indices is None else flat[rows.indices]).nonzero().squeeze(1)
    return index, rows.subset(index, flat.nonzero().squeeze(1), offsets(wanted.sum(1)))


def row_keys(shape: torch.Size, indices: Tensor | None, device: torch.device) -> Tensor:
    """Sequence << 32 | column, of all columns or the flat positions in `indices`."""
    n_sequences, length = shape
    flat = torch.arange(n_sequences * length, device=device) if indices is None else indices
    return (flat // length << 32) + flat % length
