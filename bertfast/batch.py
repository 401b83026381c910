"""PackedBatch: what one step reads. Sequences lie end to end in a fixed token budget, with no padding between them.

Every shape is a constant of the training phase (T tokens, B sequences, P predictions), and everything the step would
have to ask the device for is computed on the host beforehand: so a step never waits for a value, can be captured in
a CUDA graph, and its buffers are reused on CPUs. The idea of unpadding before the embedding is ModernBERT's, that of
fixed prediction slots the original BERT's (`max_predictions_per_seq`).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class PackedBatch:
    """T tokens, B sequences, P predictions, R = P + B read rows. Unused sequences are empty, unused indices 0.

    Rows at or after `cu_seqlens[-1]` are [PAD] at position 0 and belong to no sequence; slots of `read_rows` at or
    after `cu_seqlens_read[-1]` are 0 and belong to none either.
    """

    input_ids: torch.Tensor  # (T,) int64
    token_type_ids: torch.Tensor  # (T,) int64: 0 in [CLS] A [SEP], 1 in B [SEP]
    position_ids: torch.Tensor  # (T,) int64: position in its own sequence
    cu_seqlens: torch.Tensor  # (B + 1,) int32: sequence b is rows cu_seqlens[b] : cu_seqlens[b + 1]
    max_seqlen: int  # no sequence is longer: a constant of the phase, not this batch's longest
    row_key: torch.Tensor  # (T,) int64: sequence's index in the step's global batch << 32 | position; dropout's counter
    read_rows: torch.Tensor  # (R,) int64: rows the last layer computes, by sequence: [CLS], then its masked rows
    cu_seqlens_read: torch.Tensor  # (B + 1,) int32: where each sequence's rows lie in read_rows
    cls_index: torch.Tensor  # (B,) int64, into read_rows
    mask_index: torch.Tensor  # (P,) int64, into read_rows
    labels: torch.Tensor  # (P,) int64: the id that was masked, -100 where the slot is unused
    next_sentence_label: torch.Tensor  # (B,) int64: 0 = B continues A, 1 = random, -100 = unused
    n_tokens: int  # cu_seqlens[-1], as a host integer
    n_masked: int  # labels that are not -100; 0 where no pretraining loop reads the batch
    n_sequences: int  # sequences that are not empty; of a padded call all of them

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same batch with its tensors on `device`; the host integers stay. `non_blocking` wants pinned memory."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked host memory, from which a copy to a GPU need not wait."""
        return map_tensors(self, torch.Tensor.pin_memory)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A PackedBatch with each of its tensors through `function`, or a tensor itself; anything else as it is."""
    if isinstance(value, PackedBatch):
        return PackedBatch(**{field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)})
    return function(value) if isinstance(value, torch.Tensor) else value
