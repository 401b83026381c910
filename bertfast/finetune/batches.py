"""Token sequences in packed batches: how a step's examples become rows end to end, with no padding between them."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F

from bertfast.batch import PackedBatch
from bertfast.data import plan
from bertfast.ops.masked_vocab_projection import IGNORE_INDEX

WINDOW = 64  # batches among which an epoch evens out lengths


class Sequence(NamedTuple):
    """Token ids of one sequence, [CLS] and [SEP] included; `second`: where segment B begins (or the end)."""

    ids: np.ndarray  # (n,) int32
    second: int
    reads: np.ndarray = np.zeros(0, np.int64)  # positions that the head reads besides [CLS]
    labels: np.ndarray = np.zeros(0, np.int64)  # their labels, -100 where unknown


class Item(NamedTuple):
    """What is batched: one example, or one window of it; target: what its loss needs."""

    example: int  # index into the examples
    sequences: list[Sequence]
    target: Any
    extra: Any = None  # what turning outputs into predictions needs
    features: torch.Tensor | None = None  # the encoder's outputs, where they are cached: see BertForFeatures

    @property
    def n_tokens(self) -> int:
        return sum(len(s.ids) for s in self.sequences)


def sequence(encoding: tokenizers.Encoding, reads=None, labels=None) -> Sequence:
    """A `tokenizers` encoding as a Sequence."""
    ids = np.array(encoding.ids, np.int32)
    types = encoding.type_ids
    second = types.index(1) if 1 in types else len(ids)
    if reads is None:
        return Sequence(ids, second)
    return Sequence(ids, second, np.array(reads, np.int64), np.array(labels, np.int64))


def pack(sequences: list[Sequence], first: int = 0) -> PackedBatch:
    """Sequences end to end, exactly as many rows as they have tokens; `first`: index in the step of the first one."""
    lengths = np.array([len(s.ids) for s in sequences])
    bounds = np.concatenate([[0], lengths.cumsum()])
    position = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    n_reads = np.array([1 + len(s.reads) for s in sequences])
    read_bounds = np.concatenate([[0], n_reads.cumsum()])
    cls_index = read_bounds[:-1]
    is_read = np.ones(read_bounds[-1], bool)
    is_read[cls_index] = False
    read_rows = np.repeat(bounds[:-1], n_reads)
    read_rows[is_read] += np.concatenate([s.reads for s in sequences])
    labels = np.concatenate([s.labels for s in sequences])
    tensor = torch.from_numpy
    return PackedBatch(
        input_ids=tensor(np.concatenate([s.ids for s in sequences]).astype(np.int64)),
        token_type_ids=tensor((position >= np.repeat([s.second for s in sequences], lengths)).astype(np.int64)),
        position_ids=tensor(position),
        cu_seqlens=tensor(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        row_key=tensor((np.repeat(np.arange(len(lengths)), lengths) + first << 32) + position),
        read_rows=tensor(read_rows),
        cu_seqlens_read=tensor(read_bounds.astype(np.int32)),
        cls_index=tensor(cls_index),
        mask_index=tensor(np.flatnonzero(is_read)),
        labels=tensor(labels),
        next_sentence_label=torch.full((len(sequences),), IGNORE_INDEX),
        n_tokens=int(bounds[-1]), n_masked=0, n_sequences=len(sequences),
    )


def _round_up(n: int) -> int:
    """To one of the sizes that are at most an eighth apart, and at least 64."""
    step = max(64, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def rounded(batch: PackedBatch, positions: int) -> PackedBatch:
    """The same batch with rows, predictions and max_seqlen rounded up, so that steps have few different shapes.

    positions: of the model, which max_seqlen must not exceed. Where more than half the rows are read, as words are by
    a tagger, there is room for all: the last layer computes a few more, and no second size varies.
    """
    n_rows, n_slots = len(batch.input_ids), len(batch.mask_index)
    rows = _round_up(n_rows) - n_rows
    slots = (n_rows + rows if 2 * n_slots > n_rows else _round_up(n_slots)) - n_slots
    more = {"input_ids": rows, "token_type_ids": rows, "position_ids": rows, "row_key": rows, "read_rows": slots,
            "mask_index": slots}
    changed: dict[str, Any] = {name: F.pad(getattr(batch, name), (0, n)) for name, n in more.items()}
    labels = F.pad(batch.labels, (0, slots), value=IGNORE_INDEX)
    longest = 1 << max(7, (batch.max_seqlen - 1).bit_length())  # 128, 256, …: attention's empty tiles cost little
    longest = max(batch.max_seqlen, min(longest, positions))
    return replace(batch, **changed, labels=labels, max_seqlen=longest)


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """An epoch in batches of `batch_size` items that all hold about the same number of tokens.

    lengths: (n,) tokens of each item. The items are shuffled; in each stretch of WINDOW batches they are sorted by
    length and cut into `batch_size` strata, of which every batch gets one item each, at random. So a batch is still a
    fair sample of short and long, and no step waits for a heavy one. A pure function of its arguments.
    """
    random = lambda purpose, n: plan.philox(seed, epoch, purpose, np.arange(n), 0)[:, 0]
    order = np.argsort(random(plan.SHUFFLE, len(lengths)), kind="stable")
    deal = random(plan.PICK, len(lengths))
    batches = []
    for start in range(0, len(order), WINDOW * batch_size):
        stretch = order[start : start + WINDOW * batch_size]
        n_batches = -(-len(stretch) // batch_size)
        stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
        strata = [stretch[i : i + n_batches] for i in range(0, len(stretch), n_batches)]
        strata = [s[np.argsort(deal[s], kind="stable")] for s in strata]
        batches += [np.array([s[b] for s in strata if b < len(s)]) for b in range(n_batches)]
    return batches


def by_budget(items: list[Item], budget: int, balanced: bool = False) -> list[list[Item]]:
    """Items in order, in groups of at most `budget` tokens (one item may exceed it alone).

    balanced: as few groups as that takes, all of about the same size, which may exceed the budget by half an item.
    """
    if balanced:
        total = sum(item.n_tokens for item in items)
        budget = -(-total // max(1, -(-total // budget)))
    groups: list[list[Item]] = [[]]
    room = budget
    for item in items:
        n = item.n_tokens
        if groups[-1] and (room <= n // 2 if balanced else room < n):
            groups.append([])
            room = budget
        groups[-1].append(item)
        room -= n
    return groups
