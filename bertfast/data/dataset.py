"""A prepared set, and the loader that makes `PackedBatch`es of it: any batch at any time, the same on every call."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bertfast.batch import PackedBatch
from bertfast.data import plan
from bertfast.data.prepare import VERSION
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError, read_json, sha256
from bertfast.ops.masked_vocab_projection import IGNORE_INDEX

VALIDATION_EVERY = 32  # documents
VERIFIED = 100_000_000  # bytes: checksums of smaller sets are compared, which is no wait
PREFETCH = 4  # batches


class Dataset:
    """One split of a prepared set, memory-mapped.

    tokens (n_tokens,) uint16 or uint32, sentences (n + 1,) int64 offsets into it, documents (d + 1,) int64 offsets into
    sentences: of the whole set; document_ids (c,) int64: the documents of this split.
    """

    def __init__(self, path: str | Path, split: str = "train"):
        """One in 32 documents, and one at least where there are two, is for validation: its index alone decides.

        Raises UserError, naming the file, where something is missing, cut off or changed.
        """
        self.path, self.split = Path(path), split
        if not self.path.is_dir():
            raise UserError(f"there is no prepared set {path}")
        self.manifest = _checked_manifest(self.path)
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.tokens = np.memmap(self.path / "tokens.bin", dtype, "r")
        self.sentences = np.memmap(self.path / "sentences.bin", "<i8", "r")
        self.documents = np.memmap(self.path / "documents.bin", "<i8", "r")
        for name, offsets, end in [
            ("sentences.bin", self.sentences, len(self.tokens)),
            ("documents.bin", self.documents, len(self.sentences) - 1),
        ]:
            if offsets[0] != 0 or offsets[-1] != end or not (offsets[1:] > offsets[:-1]).all():
                raise UserError(f"{self.path / name} is damaged: prepare the set again")
        held_out = _held_out(len(self.documents) - 1)
        self.document_ids = np.flatnonzero(held_out if split == "validation" else ~held_out)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.sha256 != self.manifest["vocabulary_sha256"]:
            raise UserError(f"{self.path / 'tokenizer.json'} is not the vocabulary this set was prepared with")
        return tokenizer

    @property
    def n_tokens(self) -> int:
        """Tokens in this split."""
        begins, ends = self.documents[self.document_ids], self.documents[self.document_ids + 1]
        return int((self.sentences[ends] - self.sentences[begins]).sum())

    def first_tokens(self, most: int) -> np.ndarray:
        """The first tokens of this split's documents one after another, (n,): `most`, or all there are."""
        documents = self.document_ids[:most]  # none is empty
        begins, ends = self.sentences[self.documents[documents]], self.sentences[self.documents[documents + 1]]
        offsets = np.minimum(np.append(0, (ends - begins).cumsum()), most)  # of each in what is returned
        places = np.repeat(begins - offsets[:-1], np.diff(offsets))
        places += np.arange(len(places))
        return self.tokens[places]


def _checked_manifest(path: Path) -> dict[str, Any]:
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path} is no prepared set: make one of your text with bertfast prepare")
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != "bertfast data":
        raise UserError(f"{path / 'manifest.json'} is not the manifest of a prepared set")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} was prepared by another version of bertfast: prepare it again")
    try:
        files = {path / name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        np.dtype(manifest["dtype"]), float(manifest["unigram_entropy"]), manifest["vocabulary_sha256"]
        manifest["files"]["tokens.bin"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'manifest.json'} is damaged: prepare the set again") from error
    for file, (size, _) in files.items():
        if not file.is_file():
            raise UserError(f"{file} is missing: prepare the set again")
        if file.stat().st_size != size:
            raise UserError(f"{file} is damaged ({file.stat().st_size} bytes instead of {size}): prepare the set again")
    if sum(size for size, _ in files.values()) < VERIFIED:
        for file, (_, checksum) in files.items():
            if sha256(file) != checksum:
                raise UserError(f"{file} is damaged (its checksum differs): prepare the set again")
    return manifest


def _held_out(n: int) -> np.ndarray:
    """Which of n documents are for validation, (n,) bool: of each 32 one, at random; of fewer, the last."""
    index = np.arange(n)
    block = index // VALIDATION_EVERY
    place = plan.below(plan.philox(0, 0, 0, block, 0)[..., 0], np.uint64(VALIDATION_EVERY))
    held_out = place == index % VALIDATION_EVERY
    if n > 1 and not held_out.any():
        held_out[-1] = True
    return held_out


def drawn(dataset: Dataset, seed: int, epoch: int, max_seqlen: int, nsp: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's samples (n,) plan.SAMPLE, in the order of the documents, and a random order of them (n,) int64.

    A pure function of the arguments; 24 + 8 bytes a sample. Raises UserError where the text is too little for one.
    """
    samples = plan.plan(dataset.sentences, dataset.documents, dataset.document_ids, seed, epoch, max_seqlen, nsp)
    if not len(samples):
        raise UserError(
            f"{dataset.path} holds too little text for a single {dataset.split} sample: more documents are needed, "
            "of which one in 32 is for validation (in .txt blank lines part them)"
        )
    return samples, plan.shuffle(len(samples), seed, epoch)


class _Epoch(NamedTuple):
    samples: np.ndarray
    order: np.ndarray  # (n_samples,): samples in the order of the batches
    offsets: np.ndarray  # (n_batches + 1,): where each batch begins in `order`


class Loader:
    """Batches of a fixed shape, numbered from 0 over the whole phase, epochs following each other.

    A step takes `micro_batches * world_size` consecutive batches; batch i of rank r is number i * world_size + r of all
    ranks. The sequence index in `row_key` counts through a step's batches, so neither masks nor dropout depend on how
    the step is spread over ranks and micro-batches. Iterating prefetches in a thread; `state_dict` says where we are.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        max_seqlen: int,
        token_budget: int,
        *,
        nsp: bool = True,
        mlm_probability: float = 0.15,
        whole_word_masking: bool = False,
        causal: bool = False,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        pin_memory: bool = False,
    ):
        """Raises UserError for settings that make no batch.

        causal: nothing is masked, every token's label is the next token (mlm_probability counts as 0).
        """
        if not 8 <= max_seqlen <= 65_535:
            raise UserError(f"a sequence length of {max_seqlen} is out of range: 8 to 65535")
        if token_budget < max_seqlen:
            raise UserError(f"a budget of {token_budget} tokens is smaller than a sequence of {max_seqlen}")
        if causal:
            mlm_probability = 0.0
        elif not 0 < mlm_probability < 1:
            raise UserError(f"a masking probability of {mlm_probability} is out of range: between 0 and 1")
        self.dataset, self.seed, self.max_seqlen, self.token_budget = dataset, seed % 2**64, max_seqlen, token_budget
        self.nsp, self.mlm_probability, self.whole_word_masking = nsp, mlm_probability, whole_word_masking
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.pin_memory = pin_memory
        tokenizer = dataset.tokenizer
        self.vocabulary = (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
        self.pad_id = tokenizer.pad_id
        self.is_continuation = tokenizer.is_continuation.astype(np.uint8)
        self.position = 0  # this rank's next batch
        self._starts = {0: 0}  # epoch -> its first batch
        self._epochs: dict[int, Future[_Epoch]] = {}
        # Executors and not bare threads: Python waits for them at exit, whereas a thread caught inside C++ would abort.
        self._planner = ThreadPoolExecutor(1, "bertfast-plan")
        self._prefetcher = ThreadPoolExecutor(1, "bertfast-prefetch")
        self._lock = threading.Lock()
        samples, order = drawn(dataset, self.seed, 0, max_seqlen, nsp)
        # A fifth more than fit on average: a batch of many short samples may leave a few tokens unused.
        fit = token_budget / plan.lengths(samples).mean()
        self.max_sequences = ceil(1.2 * fit) + 2
        self.max_predictions = token_budget if causal else ceil(mlm_probability * token_budget) + self.max_sequences
        self._epochs[0] = Future()
        self._epochs[0].set_result(self._packed(samples, order))

    def batches_in_epoch(self, epoch: int = 0) -> int:
        """Of all ranks together."""
        return len(self._epoch(epoch).offsets) - 1

    def batch(self, i: int) -> PackedBatch:
        """This rank's batch i."""
        number = i * self.world_size + self.rank
        step = self.micro_batches * self.world_size
        with self._lock:
            epoch, local = self._locate(number)
            first_sequence, before = 0, number - number % step
            while before < number:  # sequences in the step's earlier batches, which an older epoch may have begun
                other, begin = self._locate(before)
                end = min(number - self._starts[other], self.batches_in_epoch(other))
                offsets = self._epoch(other).offsets
                first_sequence += int(offsets[end] - offsets[begin])
                before = self._starts[other] + end
            samples, order, offsets = self._epoch(epoch)
        return self._fill(samples, order[offsets[local] : offsets[local + 1]], epoch, first_sequence)

    def __iter__(self) -> Iterator[PackedBatch]:
        """From `position` on, without end."""
        pending: deque[Future[PackedBatch]] = deque()
        upcoming = count(self.position)
        try:
            while True:
                while len(pending) < PREFETCH:
                    pending.append(self._prefetcher.submit(self._prefetch, next(upcoming)))
                batch = pending.popleft().result()
                self.position += 1
                yield batch
        finally:
            for future in pending:
                future.cancel()

    def validation_batches(self, limit: int | None = None) -> Iterator[PackedBatch]:
        """This rank's share of epoch 0, or of its first `limit` batches: the same on every call."""
        n = self.batches_in_epoch(0)
        for i in range(self.rank, min(n, limit or n), self.world_size):
            yield self.batch(i // self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Where iterating stands, in JSON's types: the batch after the last one handed out."""
        number = self.position * self.world_size
        with self._lock:
            epoch, local = self._locate(number)
        return {"batch": number, "epoch": epoch, "epoch_start": number - local, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError where the data or the settings are others."""
        theirs, ours = state["settings"], self._settings()
        if changed := [f"{key} was {theirs.get(key)}, is {ours[key]}" for key in ours if theirs.get(key) != ours[key]]:
            raise UserError(f"cannot resume, the batches would differ: {'; '.join(changed)}")
        if state["batch"] % self.world_size:
            raise UserError(f"cannot resume on {self.world_size} ranks: {state['batch']} batches were used so far")
        self.position = state["batch"] // self.world_size
        self._starts[state["epoch"]] = state["epoch_start"]

    def _settings(self) -> dict[str, Any]:
        """All that decides which batch is which."""
        names = ("seed", "max_seqlen", "token_budget", "max_sequences", "nsp", "mlm_probability", "whole_word_masking")
        checksum = self.dataset.manifest["files"]["tokens.bin"]["sha256"]
        return {"data": checksum, **{name: getattr(self, name) for name in names}}

    def _prefetch(self, i: int) -> PackedBatch:
        batch = self.batch(i)
        with self._lock:  # plan the next epoch while this one is used
            self._plan_ahead(self._locate(i * self.world_size + self.rank)[0] + 1)
        return batch.pin_memory() if self.pin_memory else batch

    def _locate(self, number: int) -> tuple[int, int]:
        """Epoch and batch in it of a batch number of all ranks."""
        epoch = max(e for e, start in self._starts.items() if start <= number)
        while number >= (end := self._starts[epoch] + self.batches_in_epoch(epoch)):
            epoch += 1
            self._starts[epoch] = end
        return epoch, number - self._starts[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        self._plan_ahead(epoch)
        return self._epochs[epoch].result()

    def _plan_ahead(self, epoch: int) -> None:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._planner.submit(
                lambda: self._packed(*drawn(self.dataset, self.seed, epoch, self.max_seqlen, self.nsp))
            )
            for old in [e for e in self._epochs if abs(e - epoch) > 2]:
                del self._epochs[old]

    def _packed(self, samples: np.ndarray, order: np.ndarray) -> _Epoch:
        return _Epoch(samples, *plan.pack(samples, order, self.token_budget, self.max_sequences))

    def _fill(self, samples: np.ndarray, chosen: np.ndarray, epoch: int, first_sequence: int) -> PackedBatch:
        n_rows, n_sequences, n_predictions = self.token_budget, self.max_sequences, self.max_predictions
        zeros = lambda n, dtype=torch.int64: torch.zeros(n, dtype=dtype)
        tensors = {
            "input_ids": torch.full((n_rows,), self.pad_id),
            "token_type_ids": zeros(n_rows),
            "position_ids": zeros(n_rows),
            "cu_seqlens": zeros(n_sequences + 1, torch.int32),
            "row_key": zeros(n_rows),
            "read_rows": zeros(n_predictions + n_sequences),
            "cu_seqlens_read": zeros(n_sequences + 1, torch.int32),
            "cls_index": zeros(n_sequences),
            "mask_index": zeros(n_predictions),
            "labels": torch.full((n_predictions,), IGNORE_INDEX),
            "next_sentence_label": zeros(n_sequences),
        }
        n_tokens, n_masked = plan.fill(
            self.dataset.tokens, samples, chosen, self.seed, epoch, self.vocabulary, self.is_continuation,
            self.mlm_probability, self.whole_word_masking, first_sequence,
            {name: tensor.numpy() for name, tensor in tensors.items()},
        )  # fmt: skip
        return PackedBatch(
            **tensors, max_seqlen=self.max_seqlen, n_tokens=n_tokens, n_masked=n_masked, n_sequences=len(chosen)
        )
