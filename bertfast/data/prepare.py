"""Text -> shards: documents are cut into sentences, sentences into WordPiece ids, ids written as flat arrays.

A prepared set is a folder:
  tokens.bin      ids of everything, end to end; uint16, or uint32 for vocabularies over 65,536
  sentences.bin   int64: sentence i is tokens[sentences[i] : sentences[i + 1]]
  documents.bin   int64: document d is the sentences documents[d] : documents[d + 1]
  vocab.txt, tokenizer.json, tokenizer_config.json
  manifest.json   counts, checksums, vocabulary hash, where the text came from
Little-endian, no headers: numpy.memmap reads them, and so does anything else. The folder appears as a whole, at the
end, and its content does not depend on the number of workers.
"""

import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencex
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bertfast.data import corpus
from bertfast.data.tokenizer import Tokenizer, WordCache
from bertfast.files import UserError, atomic_folder, read_json, sha256, write_json

VERSION = 1
FILES = {"tokens.bin", "sentences.bin", "documents.bin", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
         "manifest.json"}
LONGEST_SENTENCE = 128  # tokens; a longer one is text without full stops, cut at words into
PIECE = 32  # tokens: of two pieces as long as a sample both would lose all but their middles, in every epoch
WINDOW = 10_000  # characters of a line that sentences are looked for in at a time
VOCABULARY_TEXT = 64_000_000  # characters that a vocabulary is learned from, spread evenly over the input
DEFAULT_VOCAB_SIZE = 30_522

InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Track = Callable[[str, Iterable[Any], int], Iterator[Any]]


def prepare(
    inputs: list[str] | None,
    out: str | Path,
    *,
    vocab: str | Path | None = None,
    vocab_size: int | None = None,
    cased: bool = False,
    field: str = "text",
    workers: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Prepare text files, folders and globs (None: the documentation on this machine) into the folder `out`.

    The vocabulary is `vocab` (a vocab.txt, tokenizer.json or folder of one), or `vocab_size` entries are learned from
    the text. Returns the manifest. Does nothing where `out` already holds just this. `console` (by default
    standard error, whose loss ends nothing) gets what was left out, the progress bar and a line at the end. Raises
    UserError for whatever is wrong with the input, the vocabulary or `out`.
    """
    stderr: Any = sys.stderr and _Unheard(sys.stderr)
    console = console or Console(file=stderr, stderr=True)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)  # a path as it is, not folded
    out = Path(out)
    workers = workers or _cores()
    if vocab is not None and vocab_size is not None:
        raise UserError("give either a vocabulary or the size of one to learn, not both")
    tokenizer = Tokenizer.load(vocab, cased or None) if vocab is not None else None
    if inputs is None:
        sources = corpus.documentation_sources()
        origin: Any = {"documentation": corpus.documentation_fingerprint(sources), "python": sys.version.split()[0]}
    else:
        files, left_out = corpus.find_files(inputs, out)
        if left_out:
            more = f" and {len(left_out) - 4:,} more" if len(left_out) > 4 else ""
            tell(f"left out: {', '.join(left_out[:4])}{more}")
        origin = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    recipe = {
        "text": origin,
        "field": field,
        "vocabulary": tokenizer.sha256 if tokenizer else vocab_size or DEFAULT_VOCAB_SIZE,
        "rules": tokenizer.rules if tokenizer else {"do_lower_case": not cased},
        "sentences": [LONGEST_SENTENCE, PIECE],
    }
    if done := _already(out, recipe):
        tell(f"{out} is up to date: {_counts(done)}; nothing to do")
        return done

    began = time.perf_counter()
    with atomic_folder(out) as folder, _processes(workers) as in_order, _progress(console) as progress:
        if inputs is None:
            pieces = _documentation([path for path, _, _ in sources], in_order, progress)
            read: Callable[[], Iterable[corpus.Piece]] = lambda: pieces
        else:
            read = partial(corpus.read_files, files, field)
        size = sum(piece.disk_bytes for piece in pieces) if inputs is None else sum(x.stat().st_size for x in files)
        if tokenizer is None:
            texts = _spread(progress("reading for the vocabulary", read(), size))
            for _ in progress("learning the vocabulary", [None], 1):
                tokenizer = Tokenizer.train(texts, vocab_size or DEFAULT_VOCAB_SIZE, cased)
            del texts
        assert tokenizer is not None
        tokenizer.save(folder)
        tokenise = partial(_tokenise, str(folder), sha256(folder / "tokenizer.json"))
        counts = _write_shards(folder, tokenizer, in_order(tokenise, progress("preparing", read(), size)))
        if not counts["tokens"]:
            raise UserError(f"there is no text in {', '.join(inputs or ['the documentation'])}")
        unknown = counts["unknown_tokens"] / counts["tokens"]
        if unknown == 1:
            raise UserError("no word of the text is in the vocabulary")
        manifest = {
            "format": "bertfast data",
            "version": VERSION,
            **counts,
            "vocab_size": tokenizer.vocab_size,
            "vocabulary_sha256": tokenizer.sha256,
            "cased": tokenizer.cased,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
            },
            "recipe": recipe,
        }
        write_json(folder / "manifest.json", manifest)
    if unknown > 0.01:
        tell(f"{unknown:.0%} of the tokens are [UNK]: words that the vocabulary cannot spell")
    tell(f"{out}: {_counts(manifest)} in {time.perf_counter() - began:.1f} s")
    return manifest


def _already(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an undamaged set made by the same recipe. Refuses to replace a folder that is something else."""
    if not out.exists():
        return None
    if not (out / "manifest.json").is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"{out} exists and is no prepared set: choose another folder")
        return None
    manifest = read_json(out / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != "bertfast data":
        raise UserError(f"{out} exists and is no prepared set: choose another folder")
    if others := sorted({path.name for path in out.iterdir()} - FILES):  # a run's folder, a user's notes
        raise UserError(f"{out} holds more than a prepared set ({', '.join(others[:4])}): choose another folder")
    if manifest.get("version") != VERSION or manifest.get("recipe") != recipe:
        return None
    try:
        whole = all(sha256(out / name) == entry["sha256"] for name, entry in manifest["files"].items())
    except (UserError, KeyError, TypeError, AttributeError):  # a file is missing, or the manifest is damaged
        return None
    return manifest if whole else None


def _documentation(paths: list[Path], in_order: InOrder, progress: Track) -> list[corpus.Piece]:
    batches = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    found = in_order(_read_docstrings, progress("reading docstrings", batches, len(batches)))
    return list(corpus.gather_documentation(chain.from_iterable(found)))


def _counts(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{manifest[what]:,} {what}" for what in ("documents", "sentences", "tokens"))


def _spread(pieces: Iterable[corpus.Piece]) -> list[str]:
    """Documents spread evenly over the stream: whenever there is too much, every other piece is let go."""
    kept: list[list[str]] = []
    size, stride = 0, 1
    for number, piece in enumerate(pieces):
        if number % stride == 0:
            kept.append(piece.documents)
            size += sum(map(len, piece.documents))
        while size > VOCABULARY_TEXT and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(document) for documents in kept for document in documents)
    return [document for documents in kept for document in documents]


def _write_shards(folder: Path, tokenizer: Tokenizer, tokenised: Iterable[tuple[bool, Any]]) -> dict[str, Any]:
    """Append what the workers return, in order. Returns the counts and the unigram entropy for the manifest."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    frequency = np.zeros(tokenizer.vocab_size, np.int64)
    n_tokens = n_sentences = n_documents = open_sentences = 0
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "sentences.bin", "wb") as sentences,
        open(folder / "documents.bin", "wb") as documents,
    ):
        sentences.write(np.zeros(1, "<i8").tobytes())
        documents.write(np.zeros(1, "<i8").tobytes())
        for continues, (ids, sentence_lengths, document_lengths) in tokenised:
            frequency += np.bincount(ids, minlength=tokenizer.vocab_size)
            tokens.write(ids.astype(dtype).tobytes())
            sentences.write((n_tokens + np.cumsum(sentence_lengths)).astype("<i8").tobytes())
            # A document ends where the next begins, so the last one stays open; those without a sentence vanish.
            lengths = document_lengths.copy()
            if len(lengths) and continues:
                lengths[0] += open_sentences
            else:
                lengths = np.concatenate([[open_sentences], lengths])
            closed = lengths[:-1][lengths[:-1] > 0]
            documents.write((n_sentences - open_sentences + np.cumsum(closed)).astype("<i8").tobytes())
            open_sentences = int(lengths[-1])
            n_documents += len(closed)
            n_sentences += len(sentence_lengths)
            n_tokens += len(ids)
        if open_sentences:
            documents.write(np.array([n_sentences], "<i8").tobytes())
            n_documents += 1
    share = frequency[frequency > 0] / max(n_tokens, 1)
    return {
        "documents": n_documents,
        "sentences": n_sentences,
        "tokens": n_tokens,
        "unknown_tokens": int(frequency[tokenizer.unk_id]),
        "dtype": dtype.name,
        "unigram_entropy": float(-(share * np.log(share)).sum()),  # nats: the loss of a model that knows only this
    }


# What runs in the workers.


def _read_docstrings(paths: list[Path]) -> list[list[str]]:
    return [document for path in paths for document in corpus.read_docstrings(path)]


@lru_cache(maxsize=1)
def _loaded(folder: str, checksum: str) -> tuple[Tokenizer, WordCache]:
    tokenizer = Tokenizer.load(folder)
    return tokenizer, WordCache(tokenizer)


def _tokenise(folder: str, checksum: str, piece: corpus.Piece) -> tuple[bool, Any]:
    """A piece's `continues`, and its ids (int32), tokens per sentence and sentences per document (int64)."""
    tokenizer, words = _loaded(folder, checksum)
    split = [split_sentences(document) for document in piece.documents]
    ids, lengths = words.encode_batch([sentence for sentences in split for sentence in sentences])
    document_of = np.repeat(np.arange(len(split)), [len(sentences) for sentences in split])
    if len(lengths) and lengths.max() > LONGEST_SENTENCE:
        ends = np.cumsum(lengths)
        cut = [_cut(tokenizer.is_continuation[ids[end - n : end]]) for end, n in zip(ends, lengths, strict=True)]
        document_of = np.repeat(document_of, [len(x) for x in cut])
        lengths = np.array([n for x in cut for n in x], np.int64)
    document_of, lengths = document_of[lengths > 0], lengths[lengths > 0]
    return piece.continues, (ids, lengths, np.bincount(document_of, minlength=len(split)))


def split_sentences(document: str) -> list[str]:
    """Sentences, by sentencex. A line end ends a sentence, as a blank line does, unless the lines are hard-wrapped.

    They are where 9 of 10 lines could not have taken the first word of the next one.
    """
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document):
        lines = [line for x in paragraph.split("\n") if (line := x.strip())]
        width = max(map(len, lines), default=0)
        if len(lines) > 1 and 40 <= width <= 120:
            wrapped = sum(
                len(line) + 1 + len(after.split(" ", 1)[0]) > width
                for line, after in zip(lines, lines[1:], strict=False)
            )
            if wrapped >= 0.9 * (len(lines) - 1):
                lines = [" ".join(lines)]
        for line in lines:
            line = re.sub(r"[^\S\0-\x7f]", " ", line)  # sentencex panics at a wide space after an initial: "J\u3000."
            sentences += [stripped for x in _segments(line) if (stripped := x.strip())]
    return sentences


def _segments(line: str) -> Iterator[str]:
    """sentencex over a window at a time: its time grows with the square of the line, to minutes for a Chinese book.

    The last sentence in a window may go on beyond it, so the next window begins with it, or is a wider one.
    """
    start, width = 0, WINDOW
    while start + width < len(line):
        *whole, _ = sentencex.segment("en", line[start : start + width])
        start, width = start + sum(map(len, whole)), WINDOW if whole else 2 * width
        yield from whole
    yield from sentencex.segment("en", line[start:])


def _cut(is_continuation: np.ndarray) -> list[int]:
    """Lengths of the parts of a sentence: one, or of at most PIECE tokens each, none beginning inside a word."""
    parts, start, n = [], 0, len(is_continuation)
    while n > LONGEST_SENTENCE and n - start > PIECE:
        end = start + PIECE
        while end > start + 1 and is_continuation[end]:
            end -= 1
        parts.append(end - start)
        start = end
    return [*parts, n - start]


# The machinery: worker processes and the progress bar.


def _cores() -> int:
    """Cores this process may use: fewer than there are in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def _processes(workers: int) -> Iterator[InOrder]:
    """Yields in_order(function, items): results in the items' order, computed `workers` at a time, few held."""
    if workers == 1:
        yield map
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker)

    def in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, probably for lack of memory: try fewer --workers") from error

    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library would warn of its threads, which do not survive a fork
    try:
        pool.submit(int).result()  # forks all of them now, before this process starts threads of its own
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if previous is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = previous
    try:
        yield in_order
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed must not wait for ever."""
    gc.disable()  # nothing here makes cycles, and looking for them in syntax trees takes half the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()


def _outlive_no_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Unheard:
    """A stream whose loss ends nothing: from the first write that fails, what it is given goes nowhere."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # also for what it keeps till the end


@contextmanager
def _progress(console: Console) -> Iterator[Track]:
    """Yields track(what, items, total): the items, with a bar that says how far, how fast and how long still."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def track(what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
            task = progress.add_task(what, total=total, speed="")
            began, characters = time.perf_counter(), 0
            try:
                for item in items:
                    yield item
                    if isinstance(item, corpus.Piece):
                        characters += sum(map(len, item.documents))
                        speed = f"{characters / 1e6 / (time.perf_counter() - began):.1f} MB/s of text"
                        progress.update(task, advance=item.disk_bytes, speed=speed)
                    else:
                        progress.advance(task)
            except GeneratorExit:  # the documentation's limit was reached
                progress.update(task, completed=total)

        yield track
