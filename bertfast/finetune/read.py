"""Files of examples -> rows that know where they stand: CSV, TSV, JSONL, Parquet, CoNLL, CoNLL-U, SQuAD JSON.

Nothing is guessed silently: encoding, quoting and what was skipped go into `Table.notes`, which are printed, and what
cannot be understood is a UserError with file and line. Files are read twice where a look ahead is needed, and
streamed, so that prediction runs in the memory of one batch.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bertfast.data.corpus import open_parquet
from bertfast.files import UserError

CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]
NAMED = (".jsonl", ".json", ".parquet", ".conllu")  # with names in them, or fixed ones
PLAIN = (".tsv", ".txt")  # a sentence a line, or a word
csv.field_size_limit(2**31 - 1)  # a whole document may stand in one field


class Row(NamedTuple):
    """One record: column -> value, and "file:line" (or row, or question) for messages."""

    values: dict[str, Any]
    where: str


@dataclass
class Table:
    """A file of rows, read anew each time it is iterated over. notes: what was decided, in words."""

    path: Path
    format: str
    columns: list[str]
    rows: Callable[[], Iterator[Row]]
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return self.rows()


def refuse_names(path: str | Path, columns: list[str] | None) -> None:
    """Raises UserError where columns are given to a file that names its own."""
    if columns and Path(path).suffix.lower() in NAMED:
        raise UserError(f"{path} names its own columns: remove --columns")


def open_table(path: str | Path, columns: list[str] | None = None, words: bool = False,
               format: str | None = None) -> Table:
    """Understand a file by its ending: .csv .tsv .txt .jsonl .json .parquet .conllu, anything else by its lines.

    columns: names of the columns of a file without a header (CoNLL-U's are fixed). words: the file may be one word a
    line, a blank line between sentences; each Row is then a sentence, with a list of words for each column. format:
    whether such a .tsv or .txt is "CoNLL" or "TSV"; without, blank lines tell, which a single sentence has not.
    Raises UserError where the file is missing, empty or of another format; rows are checked when they are read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file" if path.is_dir() else f"there is no file {path}")
    kind = path.suffix.lower()
    if kind == ".gz":
        raise UserError(f"{path} is compressed: unpack it first (gunzip)")
    if kind == ".parquet":
        return _parquet(path)
    encoding, notes = _encoding(path)
    if kind in (".jsonl", ".json"):
        table = _json(path, encoding)
    elif kind == ".csv":
        table = _delimited(path, encoding, ",", columns)
    elif kind == ".conllu" or (words and (kind not in PLAIN or (
            format == "CoNLL" if format else _has_blank_lines(path, encoding)))):
        table = _word_lines(path, encoding, columns, conllu=kind == ".conllu")
    else:
        table = _delimited(path, encoding, "\t", columns)
    table.notes = notes + table.notes
    return table


def _encoding(path: Path) -> tuple[str, list[str]]:
    """The encoding of a text file, and a note where it is not plain UTF-8."""
    try:
        with open(path, "rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        for encoding, notes in [("utf-16", [f"{path.name} is UTF-16"])] if wide else [
            ("utf-8-sig", []),  # which drops a byte-order mark, where there is one
            ("cp1252", [f"{path.name} is not UTF-8: read as Windows-1252 (Latin-1 with quotation marks and dashes)"]),
        ]:
            try:
                with open(path, encoding=encoding, newline="") as text:
                    while text.read(1 << 20):
                        pass
                return encoding, notes
            except UnicodeDecodeError as error:
                if wide:
                    raise UserError(f"{path} is UTF-16, but damaged or cut off: {error.reason}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return "latin-1", [f"{path.name} is not UTF-8: read as Latin-1"]


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """(number, line without its end); only \\n and \\r\\n end a line."""
    with open(path, encoding=encoding, newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n")


# ---- a record a line


def _delimited(path: Path, encoding: str, delimiter: str, columns: list[str] | None) -> Table:
    """CSV and TSV. A header must fit every row; names given by hand may leave out columns at the end."""
    notes = []
    quoted = delimiter == "," or _is_quoted_tsv(path, encoding)
    if delimiter == "\t" and quoted:
        notes.append(f"{path.name}: fields are in quotes")

    def lines() -> Iterator[tuple[int, list[str]]]:
        if not quoted:
            yield from ((number, line.split("\t") if line else []) for number, line in _lines(path, encoding))
            return
        with open(path, encoding=encoding, newline="") as file:
            reader, number = csv.reader(file, delimiter=delimiter, strict=True), 1
            try:
                for record in reader:
                    yield number, record
                    number = reader.line_num + 1
            except csv.Error as error:
                raise UserError(f"{path}:{number}: {error}") from error

    def records() -> Iterator[tuple[int, list[str]]]:
        blank: list[int] = []
        for number, record in lines():
            if not record:
                blank.append(number)  # at the end of the file they are nothing
                continue
            yield from ((earlier, [""]) for earlier in blank)
            blank = []
            yield number, record

    line, first = next(((n, record) for n, record in records() if any(map(str.strip, record))), (0, []))
    if not first:
        raise UserError(f"{path} is empty")
    names = columns or [name.strip() for name in first]
    named = bool(columns) and _names(first, names)
    if named:
        notes.append(f"{path.name}: line {line} names the columns and is no row")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name: {', '.join(names)}")

    def rows() -> Iterator[Row]:
        reader = records()
        if named or not columns:
            next(record for _, record in reader if record == first)
        for number, record in reader:
            if len(names) > 1 and len(record) == 1 and not record[0].strip():
                continue  # a blank line; where there is one column it is an empty text
            if len(record) < len(names) or (len(record) > len(names) and not columns):
                raise UserError(
                    f"{path}:{number}: {len(record)} fields, but "
                    + (f"--columns names {len(names)}" if columns else f"the header on line {line} names {len(names)}")
                )
            yield Row(dict(zip(names, record)), f"{path}:{number}")

    return Table(path, "CSV" if delimiter == "," else "TSV", names, rows, notes)


def _names(record: list[str], names: list[str]) -> bool:
    """Whether a file's first record is the header that was thought missing."""
    return [field.strip().lower() for field in record[: len(names)]] == [name.lower() for name in names]


def _is_quoted_tsv(path: Path, encoding: str) -> bool:
    """Whether quotes mean something: a column is all in quotes, or lines only fit together when quotes are obeyed.

    Most TSV files hold stray quotes that are just characters.
    """
    widths, wrapped = set(), None
    for number, line in _lines(path, encoding):
        fields = line.split("\t")
        if not line.strip():
            continue
        widths.add(len(fields))
        if number > 1:
            here = {i for i, f in enumerate(fields) if len(f) > 1 and f[0] == f[-1] == '"'}
            wrapped = here if wrapped is None else wrapped & here
    if wrapped:
        return True
    if len(widths) == 1:
        return False
    try:
        with open(path, encoding=encoding, newline="") as file:
            return len({len(r) for r in csv.reader(file, delimiter="\t", strict=True) if r}) == 1
    except csv.Error:
        return False


def _json(path: Path, encoding: str) -> Table:
    """An object a line, whatever the ending; or one JSON value: a list of objects, or SQuAD's nested layout."""
    first = next((line for _, line in _lines(path, encoding) if line.strip()), None)
    if first is None:
        raise UserError(f"{path} is empty")
    try:
        value = json.loads(first)
        one_a_line = isinstance(value, dict) and (
            path.suffix.lower() == ".jsonl" or not isinstance(value.get("data"), list))
    except (ValueError, RecursionError):
        one_a_line = path.suffix.lower() == ".jsonl"  # its error is told with its line, below
    if not one_a_line:
        return _whole_json(path, encoding)

    def rows() -> Iterator[Row]:
        for number, line in _lines(path, encoding):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(value, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            _whole_characters(line, value, f"{path}:{number}")
            yield Row(value, f"{path}:{number}")

    return Table(path, "JSONL", _keys(rows()), rows)


def _keys(rows: Iterable[Row]) -> list[str]:
    """The columns of JSON objects, of which the first may lack some."""
    return list(dict.fromkeys(key for row in rows for key in row.values))


def _whole_characters(text: str, value: Any, where: str) -> None:
    """Raises UserError where JSON's escapes leave half of a surrogate pair, which no file can hold."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: half of a character (a \\ud… escape without its other half)") from None


def _whole_json(path: Path, encoding: str) -> Table:
    text = path.read_text(encoding=encoding)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    _whole_characters(text, value, str(path))
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        squad = list(_squad(path, value["data"]))
        return Table(path, "SQuAD JSON", list(squad[0].values) if squad else [], lambda: iter(squad))
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise UserError(f"{path}: expected a list of JSON objects, an object a line (.jsonl), or SQuAD's layout")
    rows = [Row(v, f"{path}: record {i}") for i, v in enumerate(value, 1)]
    return Table(path, "JSON", _keys(rows), lambda: iter(rows))


def _squad(path: Path, articles: list) -> Iterator[Row]:
    """SQuAD v1 and v2 (Rajpurkar et al. 2016, 2018): a row a question; answers: {"text": […], "answer_start": […]}."""
    where = str(path)
    try:
        for article in articles:
            for number, paragraph in enumerate(article["paragraphs"], 1):
                where = f"{path}: {article.get('title', 'article')!r}, paragraph {number}"
                for qa in paragraph["qas"]:
                    where = f"{path}: question {qa['id']}"
                    yield Row({
                        "id": str(qa["id"]), "title": article.get("title", ""), "context": paragraph["context"],
                        "question": qa["question"],
                        "answers": {key: [a[key] for a in qa.get("answers", [])] for key in ("text", "answer_start")},
                        "is_impossible": bool(qa.get("is_impossible", False)),
                    }, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not SQuAD's layout: {error!r}") from error


def _parquet(path: Path) -> Table:
    import pyarrow

    try:
        names = open_parquet(path).schema_arrow.names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error

    def rows() -> Iterator[Row]:
        number, batches = 0, open_parquet(path).iter_batches(1024)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path} is damaged after row {number}: {str(error).splitlines()[0]}") from error
            if batch is None:
                return
            for value in batch.to_pylist():
                number += 1
                yield Row(value, f"{path}: row {number}")

    return Table(path, "Parquet", names, rows)


# ---- a word a line


def _has_blank_lines(path: Path, encoding: str) -> bool:
    """Whether blank lines part the file into blocks (one at the very end is nothing)."""
    blank = False
    for _, line in _lines(path, encoding):
        if not line.strip():
            blank = True
        elif blank:
            return True
    return False


def _word_lines(path: Path, encoding: str, columns: list[str] | None, conllu: bool) -> Table:
    """CoNLL and CoNLL-U: a word a line, a blank line between sentences; fields parted by tabs, else by spaces.

    Skipped: comments (a line that starts with # and has not a word's fields; in a file that begins with "# " each such
    line before a sentence), -DOCSTART-, and CoNLL-U's word ranges (3-4) and empty nodes (5.1). Without names the
    columns are 1, 2, …; a Row holds a list of values for each.
    """
    comments = ("#", "-DOCSTART-") if conllu else ("# ", "-DOCSTART-")
    lines = (row for row in _lines(path, encoding) if row[1].strip() and not row[1].startswith(comments))
    at, first = next(lines, (0, ""))
    if not first:
        raise UserError(f"{path} is empty")
    separator = "\t" if "\t" in first else None
    width = len(first.split(separator))
    names = CONLLU if conllu else columns or [str(i) for i in range(1, width + 1)]
    if len(names) > width:
        raise UserError(f"{path}: {width} columns, but {len(names)} names ({', '.join(names)})")
    named = bool(columns) and _names(first.split(separator), names)
    # parted by spaces, a comment may have as many fields as a word
    commented = not conllu and next(line for _, line in _lines(path, encoding) if line.strip()).startswith("# ")
    skip = re.compile(r"\d+[-.]\d+\t") if conllu else re.compile(r"-DOCSTART-")

    def rows() -> Iterator[Row]:
        words: list[list[str]] = []
        begin = 0
        for number, line in _lines(path, encoding):
            fields = line.split(separator)
            if not line.strip():
                if words:
                    yield _sentence(names, words, f"{path}:{begin}")
                words = []
            elif ((named and number == at) or skip.match(line) or (line.startswith("#") and len(fields) != width)
                  or (commented and not words and line.startswith("# "))):
                continue
            elif len(fields) != width:
                raise UserError(f"{path}:{number}: {len(fields)} fields, but the first word has {width}")
            elif not fields[0].strip():
                raise UserError(f"{path}:{number}: an empty word")
            else:
                begin = begin if words else number
                words.append(fields)
        if words:
            yield _sentence(names, words, f"{path}:{begin}")

    notes = [f"{path.name}: lines before a sentence that start with '# ' are comments"] if commented else []
    notes += [f"{path.name}: line {at} names the columns and is no word"] if named else []
    return Table(path, "CoNLL-U" if conllu else "CoNLL", names, rows, notes)


def _sentence(names: list[str], words: list[list[str]], where: str) -> Row:
    return Row({name: list(values) for name, values in zip(names, zip(*words))}, where)
