"""Where text comes from: files of several kinds, or the documentation that is on every machine with Python.

Everything is read as a stream of `Piece`s of about a megabyte, so memory does not grow with the input, and pieces do
not depend on how many workers there are.
"""

import ast
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import IO, Any, NamedTuple

from bertfast.files import UserError, siblings, without_links

KINDS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 20  # characters handed to a worker at a time
_BESIDE_VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "config.json")  # in a prepared set, a checkpoint


class Piece(NamedTuple):
    """Some documents, whole except that the first may continue the last one of the piece before."""

    documents: list[str]
    continues: bool
    disk_bytes: int  # of the input files, read since the piece before: what a progress bar counts


def find_files(inputs: list[str], out: Path) -> tuple[list[Path], list[str]]:
    """Files, the known kinds under folders, and globs, in the order given (sorted inside a folder or a glob).

    Links to folders are followed, and folders that a glob matches are inputs, too; a file that is reached in several
    ways is read once. What lies in `out`, or in what it is written as, is no input. Returned besides is what folders
    and globs led to and is left out, each with the reason: models' vocabularies, and links to nowhere whose name is of
    no known kind. Raises UserError for what is not there, cannot be read, is empty or of an unknown kind.
    """
    found: dict[str, Path] = {}  # by the path without links
    left_out: dict[Path, str] = {}
    out = without_links(out)
    written = (out, *siblings(out))
    try:
        for name in inputs:
            path = Path(name)
            reached = [path] if path.exists() else [Path(x) for x in sorted(glob.glob(name, recursive=True))]
            new = [x for top in reached for x in (_below(top) if top.is_dir() else [top])]
            if new != [path]:
                new = [x for x in new if not any(map(Path(os.path.realpath(x)).is_relative_to, written))]
                left_out |= {x: reason for x in new if (reason := _no_text(x))}
                new = [x for x in new if x not in left_out]
            if not new:
                kinds = " ".join(KINDS)
                raise UserError(f"{name} has no {kinds} files" if path.is_dir() else f"there is no file {name}")
            for path in new:
                found.setdefault(os.path.realpath(path), path)
        for path in found.values():
            if not path.name.lower().endswith(KINDS):
                raise UserError(f"{path} is of an unknown kind: known are {' '.join(KINDS)}")
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty")
    except OSError as error:  # too long a name, a folder that may not be entered, a link to nowhere
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    remarks = [f"{path} ({reason})" for path, reason in left_out.items() if os.path.realpath(path) not in found]
    return list(found.values()), remarks


def _below(folder: Path) -> list[Path]:
    """What is in a folder and those below it: files of the known kinds, and links to nowhere. Raises OSError."""
    entered: set[str] = set()
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in entered:  # links can lead back
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        paths = [Path(here, name) for name in names]
        found += [path for path in paths if path.name.lower().endswith(KINDS) or not os.path.exists(path)]
    return sorted(found)


def _no_text(path: Path) -> str:
    """Why a file that was not named itself is not read as text; empty if it is."""
    if path.name == "vocab.txt" and any(path.with_name(name).exists() for name in _BESIDE_VOCABULARIES):
        return "a model's vocabulary"
    return "" if path.name.lower().endswith(KINDS) or os.path.exists(path) else "a link to nowhere"


def read_files(files: list[Path], field: str = "text") -> Iterator[Piece]:
    """The documents of all files. Raises UserError, naming the file, for what cannot be read as text."""
    for path in files:
        read = _read_parquet if path.name.lower().endswith(".parquet") else _read_text
        batch: list[str] = []
        size, continues, done = 0, False, 0
        for document, starts, position in read(path, field):
            if batch and (size + len(document) > PIECE or not starts):
                yield Piece(batch, continues, position - done)
                batch, size, done = [], 0, position
            if not batch:
                continues = not starts
            batch.append(document)
            size += len(document)
        yield Piece(batch, continues, path.stat().st_size - done)


# A reader yields (text of a document or a part of one, whether a document starts here, position in the file on disk).
Reader = Iterator[tuple[str, bool, int]]


def _read_text(path: Path, field: str) -> Reader:
    """.txt and .jsonl, plain or gzipped."""
    name = path.name.lower()
    try:
        with open(path, "rb") as disk:
            raw: Any = gzip.GzipFile(fileobj=disk) if name.endswith(".gz") else disk
            text = io.TextIOWrapper(raw, encoding="utf-8-sig")
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _rows(path, text, field, disk.tell)
            else:
                yield from _documents(path, text, disk.tell)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _documents(path: Path, text: IO[str], tell: Callable[[], int]) -> Reader:
    """Blank lines part documents. One longer than a piece comes in parts, cut at a line end or at least at a space."""
    pending, starts = "", True
    while block := text.read(PIECE):
        if "\0" in block:
            raise UserError(f"{path} is a binary file")
        *whole, pending = re.split(r"\n[^\S\n]*\n\s*", pending + block)
        for document in whole:
            yield document, starts, tell()
            starts = True
        if len(pending) > PIECE:
            cut = max(pending.rfind("\n"), 0) or max(pending.rfind(" "), 0) or len(pending)
            yield pending[:cut], starts, tell()
            pending, starts = pending[cut:], False
    yield pending, starts, tell()


def _rows(path: Path, text: IO[str], field: str, tell: Callable[[], int]) -> Reader:
    """A JSON object a line, a document each."""
    for number, line in enumerate(text, 1):
        if "\0" in line:
            raise UserError(f"{path} is a binary file")
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{path}, line {number} has no text in a field {field!r} (--field names another)")
        if not row[field].isascii() and re.search(r"[\ud800-\udfff]", row[field]):
            raise UserError(f"{path}, line {number} has half a surrogate pair, which is no character")
        yield row[field], True, tell()


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile that is streamed: by itself it holds whole columns of a row group, maybe the file.

    Raises pyarrow's exceptions, and OSError.
    """
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _read_parquet(path: Path, field: str) -> Reader:
    """A row of a string column, a document each."""
    import pyarrow

    try:
        with open_parquet(path) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path} has no column {field!r} (--field names another); it has {names}")
            if table.schema_arrow.names.count(field) > 1:
                raise UserError(f"{path} has several columns {field!r}")
            kind = table.schema_arrow.field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f"the column {field!r} of {path} does not hold text")
            size, read = path.stat().st_size, 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                read += batch.num_rows
                for document in batch.column(0).to_pylist():
                    yield document or "", True, size * read // table.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from error


# The documentation corpus: what the docstrings of the standard library and of the installed packages say.

DOCUMENTATION_LIMIT = 12_000_000  # characters: enough to learn from, and gathered in seconds
_SKIP = {"test", "tests", "testing", "__pycache__", "site-packages", "dist-packages", "idlelib", "_vendor", "_vendored"}


def documentation_sources() -> list[tuple[Path, str, int]]:
    """(file, name below its library, bytes) of every Python source here, the standard library's first."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib"))
    sources = []
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _SKIP)
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith(".py") and os.access(path, os.R_OK):  # not so: links to nowhere
                    sources.append((path, path.relative_to(root).as_posix(), path.stat().st_size))
    return sources


def documentation_fingerprint(sources: list[tuple[Path, str, int]]) -> str:
    """Changes when a package comes, goes or changes, and not with the place it is installed in."""
    names = "\n".join(f"{name} {size}" for _, name, size in sources)
    return hashlib.sha256(f"{sys.version}\n{names}".encode()).hexdigest()


def gather_documentation(found: Iterable[list[str]]) -> Iterator[Piece]:
    """Pieces of the documents that `read_docstrings` found, in order, up to DOCUMENTATION_LIMIT characters.

    Docstrings are copied a lot: a paragraph that was there before is left out, and documents of which little is left.
    """
    seen: set[str] = set()
    total, size, batch = 0, 0, []
    for paragraphs in found:
        new = [x for x in dict.fromkeys(paragraphs) if x not in seen]
        seen.update(new)
        document = "\n\n".join(new)
        if len(document) < 300:
            continue
        batch.append(document)
        total += len(document)
        size += len(document)
        if size > PIECE:
            yield Piece(batch, False, size)
            size, batch = 0, []
        if total >= DOCUMENTATION_LIMIT:
            break
    yield Piece(batch, False, size)


def read_docstrings(path: Path) -> list[list[str]]:
    """The documents in one Python source, parsed and never run: its docstrings are one document of paragraphs."""
    source = path.read_bytes()
    if path.name == "topics.py" and path.parent.name == "pydoc_data":  # one dict literal: the language reference
        return [_paragraphs(topic) for topic in ast.literal_eval(ast.parse(source).body[-1].value).values()]  # type: ignore[attr-defined]
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are not our business
            nodes: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # templates, Python 2, nests too deep
        return []
    paragraphs: list[str] = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            paragraphs += _paragraphs(ast.get_docstring(node) or "")
            nodes += reversed(node.body)
    return [paragraphs]


def _paragraphs(text: str) -> list[str]:
    """The prose in a docstring: wrapped lines joined, markup taken off; examples, tables, signatures left out.

    Lines of one indentation that follow each other are a paragraph; a bullet begins one. What does not read like
    a sentence is dropped: too few words, or too many characters that are no letters.
    """
    paragraphs: list[list[str]] = []
    indent, in_example = -1, False
    for line in cleandoc(text).splitlines():
        words = line.strip()
        if not words:
            indent, in_example = -1, False
            continue
        in_example = in_example or words.startswith((">>>", "In [", "$ "))
        if in_example:
            continue
        bullet = re.match(r"(?:[-*+•]|\d+[.)]|:\w+ [\w ]+:|:\w+:)\s+", words)
        here = len(line) - len(line.lstrip())
        if bullet or here != indent or not paragraphs:
            paragraphs.append([])
            indent = here + (bullet.end() if bullet and not bullet[0].startswith(":") else 0)
        paragraphs[-1].append(words[bullet.end() :] if bullet else words)
    prose = []
    for lines in paragraphs:
        joined = re.sub(r"(?::[\w:]+:)?`+([^`]*)`+_*", r"\1", " ".join(lines)).replace("**", "")
        n_words = len(re.findall(r"\b[A-Za-z]{2,}\b", joined))
        letters = sum(map(str.isalpha, joined)) + joined.count(" ")
        if n_words >= (4 if joined.endswith((".", "!", "?", ":")) else 8) and letters >= 0.85 * len(joined):
            prose.append(joined)
    return prose
