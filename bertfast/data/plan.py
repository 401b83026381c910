"""What a training sample is: from sentences to A/B pairs, their order, batches, and masks. All of it a pure function.

Every draw is Philox-4x32-7 (Salmon et al. 2011) of the seed and of counters that name what is drawn (epoch, purpose,
document or sample, draw), never the state of a generator. So a sample is the same in any process and at any time,
whatever was computed before it. Four steps, each in C++ in csrc/loader.cpp and here in Python with the same result bit
for bit; the C++ is used where it was built (BERTFAST_NO_EXT=1 declines it), and is 30 to 60 times faster:

  plan     walk each document, collect sentences up to a length, part them into segments A and B
  shuffle  the order of the epoch's samples
  pack     batches of samples that fill a token budget
  fill     the arrays of one batch, masked tokens included
"""

from typing import Any

import numpy as np

from bertfast.files import switch
from bertfast.ops.masked_vocab_projection import IGNORE_INDEX

_C: Any = None
if not switch("BERTFAST_NO_EXT"):
    try:
        from bertfast import _C  # type: ignore[no-redef]
    except ImportError:
        pass

PLAN, TRUNCATE, SHUFFLE, PICK, REPLACE = range(5)  # purposes
LOOK_AHEAD = 512  # samples that packing may choose from
SHORT, MASK, CHANGE = (round(share * 2**32) for share in (0.1, 0.8, 0.9))  # that many of all words are below
SAMPLE = np.dtype([("a", "<i8"), ("b", "<i8"), ("a_len", "<u2"), ("b_len", "<u2"), ("label", "<i4")])
"""A sample: where segments A and B begin in the tokens, their lengths, next_sentence_label (IGNORE_INDEX: no B)."""


def philox(seed: int, epoch: int, purpose: int, index: np.ndarray | int, draw: np.ndarray | int) -> np.ndarray:
    """Four random words for each (index, draw): (…) -> (…, 4) uint64 below 2^32."""
    index, draw = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(draw, np.uint64))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2 = draw & low, index & low, index >> half
    c3 = np.full_like(c0, (epoch << 8 | purpose) & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = b >> half ^ c1 ^ np.uint64(k0), b & low, a >> half ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def below(word: Any, n: Any) -> Any:
    """Random words as integers in [0, n): multiply and shift, biased by n / 2^32 at most."""
    return word * n >> 32


def plan(
    sentences: np.ndarray,
    documents: np.ndarray,
    chosen: np.ndarray,
    seed: int,
    epoch: int,
    max_seqlen: int,
    nsp: bool,
) -> np.ndarray:
    """An epoch's samples, in the order of the documents.

    sentences (n + 1,), documents (d + 1,): offsets of a prepared set; chosen (c,): the documents to use, all int64.
    Returns (n_samples,) SAMPLE. The algorithm of Google's BERT (create_pretraining_data), with these differences: the
    short target is drawn per sample, not per document; a chunk of one sentence takes in a second one where B is to be
    the true continuation, and a document's last sentence alone is split in two, so that really half are true.
    """
    if _C is not None:
        return _C.plan(sentences, documents, chosen, seed, epoch, max_seqlen, nsp, SHORT).view(SAMPLE)
    room = max_seqlen - (3 if nsp else 2)
    samples: list[tuple[int, int, int, int, int]] = []

    def emit(a: int, a_len: int, b: int, b_len: int, label: int, document: int, k: int) -> None:
        """Segments longer than `room` together lose tokens one at a time: the longer one, at a random end."""
        excess = max(0, a_len + b_len - room)
        words = philox(seed, epoch, TRUNCATE, document, k * 16 + np.arange((excess + 127) // 128)).reshape(-1)
        for cut in range(excess):
            front = int(words[cut // 32]) >> cut % 32 & 1
            if a_len > b_len:
                a, a_len = a + front, a_len - 1
            else:
                b, b_len = b + front, b_len - 1
        samples.append((a, b, a_len, b_len, label))

    for rank, document in enumerate(chosen.tolist()):
        begin, end = int(documents[document]), int(documents[document + 1])
        at = sentences[begin : end + 1].tolist()  # token offsets of this document's sentences
        draws = philox(seed, epoch, PLAN, document, np.arange(2 * (end - begin))).tolist()
        i, k, n = 0, -1, end - begin
        while i < n:
            k += 1
            w, v = draws[2 * k], draws[2 * k + 1]
            target = 2 + below(w[1], room - 1) if w[0] < SHORT else room
            j = i + 1
            while j < n and at[j] - at[i] < target:
                j += 1
            if not nsp:
                emit(at[i], at[j] - at[i], 0, 0, IGNORE_INDEX, document, k)
                i = j
                continue
            true_next = w[3] < 0x80000000
            if true_next and j == i + 1 and j < n:
                j += 1  # a true continuation needs a second sentence
            a_end = j if j == i + 1 else i + 1 + below(w[2], j - i - 1)
            a_len = at[a_end] - at[i]
            true_next = true_next and at[j] - at[i] > 1  # a single token cannot continue itself
            b_begin, b_stop = -1, 0  # sentences of a random B
            if not true_next and len(chosen) > 1:
                other = below(v[0], len(chosen) - 1)
                source = int(chosen[other + (other >= rank)])
                b_stop = int(documents[source + 1])
                b_begin = int(documents[source]) + below(v[1], b_stop - int(documents[source]))
            elif not true_next and n > j - i:  # the only document: a sentence of it that is not in this chunk
                b_begin = begin + below(v[1], n - (j - i))
                if b_begin >= begin + i:
                    b_begin += j - i
                b_stop = begin + i if b_begin < begin + i else end
            if b_begin >= 0:
                b_end, b = b_begin + 1, int(sentences[b_begin])
                while b_end < b_stop and int(sentences[b_end]) - b < target - a_len:
                    b_end += 1
                emit(at[i], a_len, b, int(sentences[b_end]) - b, 1, document, k)
                i = a_end  # what A left of the chunk is put back
            elif a_end < j:
                emit(at[i], a_len, at[a_end], at[j] - at[a_end], 0, document, k)
                i = j
            else:  # a lone sentence continues itself
                if a_len > 1:
                    half = 1 + below(v[2], a_len - 1)
                    emit(at[i], half, at[i] + half, a_len - half, 0, document, k)
                i = j
    return np.array(samples, SAMPLE)


def shuffle(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of n samples, (n,) int64: Fisher-Yates."""
    if _C is not None:
        return _C.shuffle(n, seed, epoch)
    words = philox(seed, epoch, SHUFFLE, np.arange(n), np.zeros(n)).tolist()
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = (words[i][1] << 32 | words[i][0]) * (i + 1) >> 64
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def lengths(samples: np.ndarray) -> np.ndarray:
    """Tokens of each sample, [CLS] and [SEP]s included, (n,) int64."""
    return samples["a_len"].astype(np.int64) + samples["b_len"] + np.where(samples["b_len"] > 0, 3, 2)


def pack(
    samples: np.ndarray, shuffled: np.ndarray, token_budget: int, max_sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the order of their batches (n,) int64, and where each batch begins (n_batches + 1,) int64.

    A batch takes samples as they come while they fit; then, of the next LOOK_AHEAD, always the longest that still does.
    None waits for long, since each batch begins with the first in line.
    """
    if _C is not None:
        return _C.pack(samples.view(np.uint8), shuffled, token_budget, max_sequences, LOOK_AHEAD)
    n_tokens = lengths(samples)[shuffled].tolist()
    window: list[int] = []
    order: list[int] = []
    offsets, fed = [0], 0
    while len(order) < len(shuffled):
        while fed < len(shuffled) and len(window) < LOOK_AHEAD:
            window.append(fed)
            fed += 1
        room, free = token_budget, max_sequences
        while free and window and n_tokens[window[0]] <= room:
            order.append(window.pop(0))
            room, free = room - n_tokens[order[-1]], free - 1
        while free and (fitting := [x for x in window if n_tokens[x] <= room]):
            order.append(max(fitting, key=n_tokens.__getitem__))
            window.remove(order[-1])
            room, free = room - n_tokens[order[-1]], free - 1
        offsets.append(len(order))
    return shuffled[order], np.array(offsets, np.int64)


def fill(
    tokens: np.ndarray,
    samples: np.ndarray,
    chosen: np.ndarray,
    seed: int,
    epoch: int,
    vocabulary: tuple[int, int, int, int],
    is_continuation: np.ndarray,
    mlm_probability: float,
    whole_word_masking: bool,
    first_sequence: int,
    out: dict[str, np.ndarray],
) -> tuple[int, int]:
    """Write the batch of the samples `chosen` into the arrays of a PackedBatch (zeroed; labels IGNORE_INDEX).

    vocabulary: its size and the ids of [CLS], [SEP], [MASK]; is_continuation (V,) uint8: pieces that begin with ##.
    Of a sample's m tokens, specials not counted, exactly max(1, round(mlm_probability * m)) are to be predicted, all
    subsets equally likely: 80 % become [MASK], 10 % a random id of the whole vocabulary, 10 % stay. By whole words:
    words in random order, passing over those too long for what is left. With mlm_probability 0 nothing is masked:
    every token but a sample's last is a read row, and its label is the next one. Returns (tokens, labels).
    """
    if _C is not None:
        return _C.fill(
            tokens, samples.view(np.uint8), chosen, seed, epoch, vocabulary, is_continuation, mlm_probability,
            whole_word_masking, first_sequence, out,
        )  # fmt: skip
    size, cls_id, sep_id, mask_id = vocabulary
    row = read = n_masked = 0
    for s, index in enumerate(chosen.tolist()):
        a, b, a_len, b_len, label = samples[index].tolist()
        m = a_len + b_len
        ids = np.concatenate(
            [[cls_id], tokens[a : a + a_len], [sep_id], tokens[b : b + b_len], [sep_id] * (b_len > 0)]
        ).astype(np.int64)
        n, position = len(ids), np.arange(len(ids))
        if mlm_probability:
            token_rows = np.concatenate([np.arange(1, a_len + 1), np.arange(a_len + 2, m + 2)])
            wanted = max(1, round(mlm_probability * m))
            if whole_word_masking:
                starts = is_continuation[ids[token_rows]] == 0
                starts[[0, a_len] if b_len else [0]] = True
                picked = _pick_words(seed, epoch, index, wanted, starts)
            else:
                picked = np.array(sorted(_steps(seed, epoch, index, list(range(m)), wanted)), np.int64)
            masked = token_rows[picked]
            reads, labels = np.concatenate([[0], masked]), ids[masked]
            words = philox(seed, epoch, REPLACE, index, picked)
            replaced = np.where(words[:, 0] < CHANGE, below(words[:, 1], np.uint64(size)).astype(np.int64), labels)
            ids[masked] = np.where(words[:, 0] < MASK, mask_id, replaced)
        else:
            reads, labels = position[:-1], ids[1:]

        here, there = slice(row, row + n), slice(n_masked, n_masked + len(labels))
        out["input_ids"][here] = ids
        out["token_type_ids"][here] = position > a_len + 1
        out["position_ids"][here] = position
        out["row_key"][here] = (first_sequence + s) << 32 | position
        out["cls_index"][s] = read
        out["read_rows"][read : read + len(reads)] = row + reads
        row, read, n_masked = row + n, read + len(reads), n_masked + len(labels)
        out["mask_index"][there] = np.arange(read - len(labels), read)
        out["labels"][there] = labels
        out["next_sentence_label"][s] = label
        out["cu_seqlens"][s + 1], out["cu_seqlens_read"][s + 1] = row, read
    out["next_sentence_label"][len(chosen) :] = IGNORE_INDEX
    out["cu_seqlens"][len(chosen) + 1 :] = row
    out["cu_seqlens_read"][len(chosen) + 1 :] = read
    return row, n_masked


def _steps(seed: int, epoch: int, index: int, items: list[int], n: int) -> list[int]:
    """n of the items, in random order: the first n steps of Fisher-Yates."""
    words = philox(seed, epoch, PICK, index, np.arange((n + 3) // 4)).reshape(-1).tolist()
    for i in range(n):
        j = i + below(words[i], len(items) - i)
        items[i], items[j] = items[j], items[i]
    return items[:n]


def _pick_words(seed: int, epoch: int, index: int, n: int, starts: np.ndarray) -> np.ndarray:
    """At most n positions, those of whole words; where every word is longer than n, the beginning of one."""
    begins = np.flatnonzero(starts).tolist()
    length = dict(zip(begins, np.diff([*begins, len(starts)]).tolist(), strict=True))
    shuffled = _steps(seed, epoch, index, begins, len(begins))
    picked: list[int] = []
    for begin in shuffled:
        if length[begin] <= n - len(picked):
            picked += range(begin, begin + length[begin])
    return np.array(sorted(picked) or range(shuffled[0], shuffled[0] + n), np.int64)
