"""From files to a prepared set: every kind of input, every mistake, interruption, and the files' own safety."""

import errno
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bertfast import files
from bertfast.data import corpus, dataset, plan
from bertfast.data import prepare as preparing
from bertfast.data.dataset import Dataset
from bertfast.data.prepare import prepare, split_sentences
from bertfast.files import UserError
from bertfast.finetune.read import open_table

DOCUMENTS = [
    "The cat sat. The dog ran!\nIt rained, e.g. in Dr. Fog's garden.",
    "One document more.",
    "今天天气很好。我们去公园吧！",
]
CUT = [
    ["The cat sat.", "The dog ran!", "It rained, e.g. in Dr. Fog's garden."],
    ["One document more."],
    ["今天天气很好。", "我们去公园吧！"],
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz,.!'今天气很好。我们去公园吧！"
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters)]))
    return path


def text_of(folder: Path) -> list[list[str]]:
    """The sentences of a set's documents, spelled from their ids without spaces."""
    d = Dataset(folder)
    pieces = [d.tokenizer.tokens[x].removeprefix("##") for x in d.tokens]
    spell = lambda i: "".join(pieces[d.sentences[i] : d.sentences[i + 1]])
    bounds = d.documents.tolist()
    return [[spell(i) for i in range(a, b)] for a, b in zip(bounds, bounds[1:])]


EXPECTED = [[sentence.lower().replace(" ", "") for sentence in document] for document in CUT]


def write(path: Path, documents: list[str]) -> Path:
    """One of the known kinds, by its name."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"n": list(range(len(documents))), "text": documents}), path)
        return path
    if ".jsonl" in name:
        content = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    else:
        content = "\n\n".join(documents)
    (gzip.open if name.endswith(".gz") else open)(path, "wb").write(content.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet", "A.JSONL.GZ", "A.Parquet"])
def test_every_kind_gives_the_same(name: str, tmp_path: Path, vocab: Path) -> None:
    write(tmp_path / name, DOCUMENTS)
    manifest = prepare([str(tmp_path)], tmp_path / "set", vocab=vocab, workers=1)
    assert text_of(tmp_path / "set") == EXPECTED
    assert (manifest["documents"], manifest["sentences"]) == (3, 6)
    assert manifest["tokens"] == sum(len(sentence) for document in EXPECTED for sentence in document)
    tokens = np.fromfile(tmp_path / "set" / "tokens.bin", "<u2")
    share = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert manifest["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum())


def test_folders_globs_and_a_mixture(tmp_path: Path, vocab: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, document in zip(["a.txt", "b.jsonl.gz", "deep/c.parquet"], DOCUMENTS):
        write(tmp_path / "in" / name, [document])
    (tmp_path / "in" / "notes.md").write_text("not read")
    prepare([str(tmp_path / "in")], tmp_path / "one", vocab=vocab, workers=1)
    inputs = [str(tmp_path / "in" / name) for name in ("*.txt", "b.jsonl.gz", "**/*.parquet")]
    prepare([*inputs, inputs[1]], tmp_path / "two", vocab=vocab, workers=1)
    (tmp_path / "in" / "notes.md").unlink()
    (tmp_path / "in" / "deep").rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep").symlink_to(tmp_path / "elsewhere")
    for out, name in (("three", "in"), ("four", "in/*")):  # with a link, and a folder that a glob matches
        prepare([str(tmp_path / name)], tmp_path / out, vocab=vocab, workers=1)
    for out in ("one", "two", "three", "four"):
        assert text_of(tmp_path / out) == EXPECTED


def test_a_file_is_read_once(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is named in several ways, or a link leads to it or to a folder around it."""
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in" / "a.txt", DOCUMENTS)
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "b.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    for inputs in (["in/**/*.txt"], ["in/a.txt", str(source), "in/../in/a.txt", "in"]):
        prepare(inputs, "set", vocab=vocab, workers=1)
        assert text_of(tmp_path / "set") == EXPECTED


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_names_that_are_no_utf8(tmp_path: Path, vocab: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    write(Path(source), DOCUMENTS)
    manifest = prepare([source], tmp_path / "set", vocab=vocab, workers=1)
    assert text_of(tmp_path / "set") == EXPECTED
    assert files.read_json(tmp_path / "set" / "manifest.json") == manifest
    before = (tmp_path / "set" / "manifest.json").stat().st_mtime_ns
    prepare([source], tmp_path / "set", vocab=vocab, workers=1)
    assert (tmp_path / "set" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("column", [pa.array(DOCUMENTS).dictionary_encode(), pa.array(DOCUMENTS, pa.large_string()),
                                    pa.array(DOCUMENTS, pa.string_view())], ids=["categories", "large", "view"])
def test_text_as_parquet_keeps_it(column: pa.Array, tmp_path: Path, vocab: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    prepare([str(tmp_path / "a.parquet")], tmp_path / "set", vocab=vocab, workers=1)
    assert text_of(tmp_path / "set") == EXPECTED


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_text_in_a_field_of_another_name(name: str, tmp_path: Path, vocab: Path) -> None:
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["no"] * 3, "body": DOCUMENTS}), tmp_path / name)
    else:
        rows = [json.dumps({"text": "no", "body": document}) for document in DOCUMENTS]
        (tmp_path / name).write_text("\n".join(rows))
    prepare([str(tmp_path / name)], tmp_path / "set", vocab=vocab, field="body", workers=1)
    assert text_of(tmp_path / "set") == EXPECTED


@pytest.mark.parametrize("read", [lambda path: corpus.read_files([path]), open_table], ids=["prepare", "finetune"])
def test_parquet_is_read_as_a_stream(read: Any, tmp_path: Path) -> None:
    """Also where all rows are one row group."""
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(10_000)]}), tmp_path / "a.parquet",
                   use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    rows = iter(read(tmp_path / "a.parquet"))
    next(rows)
    assert pa.total_allocated_bytes() - before < 6 << 20


def test_a_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path, vocab: Path) -> None:
    content = "\ufeff\r\n \r\n" + "\r\n \t \r\n\r\n".join(x.replace("\n", "\r\n") for x in DOCUMENTS) + "\r\n\r\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    prepare([str(tmp_path / "a.txt")], tmp_path / "set", vocab=vocab, workers=1)
    assert text_of(tmp_path / "set") == EXPECTED


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        ("A heading\nIt begins. It goes on.", ["A heading", "It begins.", "It goes on."]),
        ("one sentence a line\nwithout stops", ["one sentence a line", "without stops"]),
        ("Hard-wrapped lines of text that go on and on are\njoined again, so that a sentence is whole. That is so\n"
         "with U.S. names and such.",
         ["Hard-wrapped lines of text that go on and on are joined again, so that a sentence is whole.",
          "That is so with U.S. names and such."]),
        ("部分。\n\n 部分！", ["部分。", "部分！"]),
        (" \n\t\n ", []),
        ("By J\u3000. Doe\xa0and A\u2003.", ["By J . Doe and A ."]),  # sentencex panics at an initial and a wide space
    ],
)  # fmt: skip
def test_sentences(document: str, sentences: list[str]) -> None:
    assert split_sentences(document) == sentences


def test_a_long_line_is_looked_at_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    segment, seen = preparing.sentencex.segment, []
    monkeypatch.setattr(preparing.sentencex, "segment", lambda code, x: seen.append(len(x)) or segment(code, x))
    monkeypatch.setattr(preparing, "WINDOW", 200)
    for sentence, between in [("Number {} comes after the one before.", " "), ("第{}个句子在这里结束。", "")]:
        sentences = [sentence.format(i) for i in range(300)]
        assert split_sentences(between.join(sentences)) == sentences
    assert max(seen) == 200
    assert split_sentences("abc" * 1000) == ["abc" * 1000]


def test_long_text_without_full_stops_is_cut_at_words(tmp_path: Path, vocab: Path) -> None:
    words = ["abcdefg"[: 1 + i % 7] for i in range(2000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    prepare([str(tmp_path / "a.txt")], tmp_path / "set", vocab=vocab, workers=1)
    dataset = Dataset(tmp_path / "set")
    assert text_of(tmp_path / "set")[0] and "".join(text_of(tmp_path / "set")[0]) == "".join(words)
    lengths = np.diff(dataset.sentences)
    assert lengths.max() <= 32 and lengths[:-1].min() > 32 - 7
    assert not dataset.tokenizer.is_continuation[dataset.tokens[dataset.sentences[:-1]]].any()
    seen = np.zeros((2, len(dataset.tokens)), bool)  # in the first epoch, in the others
    documents = np.array([0, len(lengths) // 2, len(lengths)])
    for epoch in range(8):
        for sample in plan.plan(dataset.sentences, documents, np.arange(2), 1, epoch, 128, True):
            for part in ("a", "b"):
                seen[min(epoch, 1) :, sample[part] : sample[part] + sample[f"{part}_len"]] = True
    assert seen[0].mean() > 0.9 and seen.any(0).mean() > 0.99  # pieces as long as a sample: 0.5 and 0.6


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl"])
def test_pieces_and_workers_change_nothing(
    kind: str, tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents longer than a piece come in parts; what is written does not show it."""
    rng = np.random.default_rng(0)
    sentence = lambda k: f"The cat sat on {'abcdefghij'[k : k + 4]}."
    documents = ["\n".join(map(sentence, rng.integers(0, 6, n))) for n in (3, 500, 1, 2000, 2)]
    write(tmp_path / kind, documents)
    expected = [[s.lower().replace(" ", "") for s in document.split("\n")] for document in documents]
    results = []
    for size, workers in [(1 << 20, 1), (5_000, 1), (5_000, 3)]:
        monkeypatch.setattr(corpus, "PIECE", size)
        prepare([str(tmp_path / kind)], tmp_path / f"{size}-{workers}", vocab=vocab, workers=workers)
        assert text_of(tmp_path / f"{size}-{workers}") == expected
        results.append(json.loads((tmp_path / f"{size}-{workers}" / "manifest.json").read_text()))
    assert results[0] == results[1] == results[2]


def test_learning_a_vocabulary_from_part_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 1000)
    monkeypatch.setattr(preparing, "VOCABULARY_TEXT", 10_000)
    (tmp_path / "a.txt").write_text("\n\n".join(f"Word number {i} is here." for i in range(3000)))
    pieces = list(corpus.read_files([tmp_path / "a.txt"]))
    kept = preparing._spread(pieces)
    assert 4_000 < sum(map(len, kept)) <= 10_000 and "number 0 " in kept[0] and int(kept[-1].split()[2]) > 2700
    one, two = (prepare([str(tmp_path / "a.txt")], tmp_path / str(n), vocab_size=120, workers=n) for n in (1, 2))
    assert one == two and 50 < one["vocab_size"] <= 120
    fewer = prepare([str(tmp_path / "a.txt")], tmp_path / "1", vocab_size=100, workers=1)
    assert fewer["vocab_size"] < one["vocab_size"]


def test_a_second_run_does_nothing_and_a_changed_input_is_prepared_anew(tmp_path: Path, vocab: Path) -> None:
    source, out = write(tmp_path / "a.txt", DOCUMENTS), tmp_path / "set[v2]"
    console = Console(record=True, width=300)
    prepare([str(source)], out, vocab=vocab, workers=1, console=console)
    before = (out / "manifest.json").stat().st_mtime_ns
    prepare([str(source)], out, vocab=vocab, workers=2, console=console)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    shown = console.export_text()
    assert f"{out}: 3 documents" in shown and f"{out} is up to date" in shown and "nothing to do" in shown
    write(source, DOCUMENTS[:2])
    assert prepare([str(source)], out, vocab=vocab, workers=1)["documents"] == 2
    assert prepare([str(source)], out, vocab=vocab, cased=True, workers=1)["cased"]
    good, manifest = (out / "tokens.bin").read_bytes(), json.loads((out / "manifest.json").read_text())
    damages = [("tokens.bin", b""), ("tokens.bin", b"\1" + good[1:]), ("tokens.bin", None),
               ("manifest.json", json.dumps({**manifest, "files": 3}).encode())]
    for name, content in damages:
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        assert prepare([str(source)], out, vocab=vocab, cased=True, workers=1) == manifest
        assert (out / "tokens.bin").read_bytes() == good and Dataset(out).n_tokens
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt", out.name]


def test_the_rules_of_a_vocabulary_count_as_input(tmp_path: Path, vocab: Path) -> None:
    source, folder = str(write(tmp_path / "a.txt", ["Á cat."] * 3)), tmp_path / "vocabulary"
    folder.mkdir()
    (folder / "vocab.txt").write_text(vocab.read_text())
    prepare([source], tmp_path / "set", vocab=folder, workers=1)
    assert text_of(tmp_path / "set") == [["acat."]] * 3
    (folder / "tokenizer_config.json").write_text('{"strip_accents": false}')
    prepare([source], tmp_path / "set", vocab=folder, workers=1)
    assert text_of(tmp_path / "set") == [["[UNK]cat."]] * 3


def test_its_own_output_is_no_input(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / ".set.tmp").mkdir()
    (tmp_path / ".set.tmp" / "vocab.txt").write_text("left by a run that was killed")
    monkeypatch.chdir(tmp_path)
    for inputs in (["."], ["**/*.txt"]):
        for _ in range(2):
            prepare(inputs, "set", vocab=vocab, workers=1)
            assert text_of(tmp_path / "set") == EXPECTED


def test_vocabularies_and_links_to_nowhere_are_left_out_and_named(
    tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "unmounted").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    prepare(["a.txt"], "model", vocab=vocab, workers=1)
    console = Console(file=io.StringIO())
    for inputs in (["."], ["*"]):
        prepare(inputs, "set", vocab=vocab, workers=1, console=console)
        assert text_of(tmp_path / "set") == EXPECTED
        told = console.file.getvalue().splitlines()[0]
        assert told == "left out: model/vocab.txt (a model's vocabulary), unmounted (a link to nowhere)"
    prepare([".", "model/vocab.txt"], "set", vocab=vocab, workers=1)  # named, it is read
    assert len(text_of(tmp_path / "set")) == len(EXPECTED) + 1
    (tmp_path / "words").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "words" / "vocab.txt")  # there is no model
    prepare(["words"], "set", vocab=vocab, workers=1)
    assert text_of(tmp_path / "set") == EXPECTED


def test_a_vocabulary_that_does_not_fit_the_text_is_told(tmp_path: Path, vocab: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    for name, text in (("fits", "a " * 99 + "7"), ("partly", "a " * 49 + "7"), ("other", "7 8 9")):
        write(tmp_path / f"{name}.txt", [text])
    prepare([str(tmp_path / "fits.txt")], tmp_path / "fits", vocab=vocab, workers=1, console=console)
    assert "[UNK]" not in console.file.getvalue()
    prepare([str(tmp_path / "partly.txt")], tmp_path / "partly", vocab=vocab, workers=1, console=console)
    assert "2% of the tokens are [UNK]: words that the vocabulary cannot spell\n" in console.file.getvalue()
    with pytest.raises(UserError, match="no word of the text is in the vocabulary"):
        prepare([str(tmp_path / "other.txt")], tmp_path / "other", vocab=vocab, workers=1)


# Mistakes, each one line


def mistake(tmp_path: Path, name: str, content: bytes | None, message: str, *, field: str = "text") -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    vocab = tmp_path / "v.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UserError, match=message) as caught:
        prepare([str(tmp_path / name)], tmp_path / "set", vocab=vocab, field=field, workers=1)
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()
    assert not list(tmp_path.glob(".*")), "something was left behind"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "there is no file .*absent.txt"),
        ("*.nothing", None, "there is no file"),
        (f"{'x' * 300}.txt", None, "cannot read .*: File name too long"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.pdf", b"%PDF", "unknown kind: known are .txt"),
        ("a.txt", b"text\0more", "binary file"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 text"),
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.txt", b" \n\n \n", "there is no text in"),
        ("a.txt.gz", b"not gzip", "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"a word. " * 9999)[:-20], "damaged gzip"),
        ("a.jsonl", b'{"text": "a."}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a."}\n', "line 1 has no text in a field 'text' .--field"),
        ("a.jsonl", b'["a."]\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "a."}\n{"text": "\\ud800."}\n', "line 2 has half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
        ("a.parquet", b"PAR1 no", "cannot read .* as parquet"),
    ],
)
def test_mistakes_in_the_input(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    mistake(tmp_path, name, content, message)


def test_mistakes_in_parquet_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", DOCUMENTS)
    mistake(tmp_path, "a.parquet", None, "no column 'body' .*it has n, text", field="body")
    mistake(tmp_path, "a.parquet", None, "column 'n' of .* does not hold text", field="n")
    pq.write_table(pa.table([DOCUMENTS, DOCUMENTS], names=["text", "text"]), tmp_path / "a.parquet")
    mistake(tmp_path, "a.parquet", None, "has several columns 'text'")
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}), tmp_path / "a.parquet")
    mistake(tmp_path, "a.parquet", None, "cannot read .* as parquet: 'utf-8' codec")
    (tmp_path / "empty").mkdir()
    mistake(tmp_path, "empty", None, "empty has no .txt .txt.gz .jsonl .jsonl.gz .parquet files")
    (tmp_path / "empty" / "gone.txt").symlink_to("nowhere")
    mistake(tmp_path, "empty", None, "cannot read .*gone.txt: No such file")


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "secret").mkdir(parents=True)
    write(tmp_path / "in" / "a.txt", DOCUMENTS)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if os.path.basename(path) == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may enter all
    mistake(tmp_path, "in", None, "cannot read .*secret: Permission denied")


def test_mistakes_in_the_output(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "a.txt", DOCUMENTS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    other = "is no prepared set"
    for out, message in [("mine", other), ("file", other), ("file/set", "cannot write .*set")]:
        with pytest.raises(UserError, match=message):
            prepare([source], tmp_path / out, vocab=vocab, workers=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    prepare([source], tmp_path / "set", vocab=vocab, workers=1)
    (tmp_path / "mine").rename(tmp_path / "set" / "run")
    with pytest.raises(UserError, match=r"holds more than a prepared set .run.: choose another"):
        prepare([source], tmp_path / "set", vocab_size=100, workers=1)
    assert (tmp_path / "set" / "run" / "thesis.txt").read_text() == "precious"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "disk")
    for out in (".", tmp_path, "disk"):
        with pytest.raises(UserError, match="mount point or the current folder"), files.atomic_folder(out):
            pass
    with pytest.raises(UserError, match="not both"):
        prepare([source], tmp_path / "set", vocab=vocab, vocab_size=100)


def test_a_full_disk(tmp_path: Path, vocab: Path) -> None:
    """A limit on file size stands in for the disk: the write fails at some byte."""
    source = str(write(tmp_path / "a.txt", ["The cat sat. " * 40_000]))
    code = f"""
import resource, signal
from bertfast.data.prepare import prepare
from bertfast.files import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    prepare([{source!r}], {str(tmp_path / "set")!r}, vocab={str(vocab)!r}, workers=1)
except UserError as error:
    print("told:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"told: cannot write .*set: File too large", done.stdout), done.stderr
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt"]


# A set that was damaged afterwards


def test_damaged_sets_are_named(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    prepare([str(write(tmp_path / "a.txt", DOCUMENTS))], out, vocab=vocab, workers=1)
    good = {path: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads(good[out / "manifest.json"])
    tokens = good[out / "tokens.bin"]
    cases = [
        ("tokens.bin", tokens[:-2], "tokens.bin is damaged .*bytes instead of"),
        ("tokens.bin", b"\1" + tokens[1:], "tokens.bin is damaged .its checksum"),
        ("sentences.bin", None, "sentences.bin is missing"),
        ("vocab.txt", good[out / "vocab.txt"] + b"x", "vocab.txt is damaged"),
        ("manifest.json", b'{"format', "manifest.json is damaged"),
        ("manifest.json", b"[]", "not the manifest"),
        ("manifest.json", json.dumps({**manifest, "version": 99}).encode(), "another version"),
        ("manifest.json", json.dumps({**manifest, "files": 3}).encode(), "manifest.json is damaged"),
        ("manifest.json", json.dumps({**manifest, "dtype": "eint16"}).encode(), "manifest.json is damaged"),
        ("manifest.json", json.dumps({**manifest, "unigram_entropy": "x"}).encode(), "manifest.json is damaged"),
        ("manifest.json", json.dumps({**manifest, "files": {}}).encode(), "manifest.json is damaged"),
        ("manifest.json", None, "is no prepared set"),
    ]
    for name, content, message in cases:
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            Dataset(out)
        (out / name).write_bytes(good[out / name])
    with pytest.raises(UserError, match="no prepared set"):
        Dataset(tmp_path / "absent")
    # Checksums not compared; but offsets that point elsewhere are refused, as C++ would read beyond the end.
    monkeypatch.setattr(dataset, "VERIFIED", 0)
    (out / "tokens.bin").write_bytes(b"\1" + tokens[1:])
    Dataset(out)
    (out / "documents.bin").write_bytes(np.array([0, 3, 4, 600], "<i8").tobytes())
    with pytest.raises(UserError, match="documents.bin is damaged"):
        Dataset(out)


# Interruption


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)],
)
def test_interrupting_leaves_nothing_behind(number: signal.Signals, code: int, tmp_path: Path, vocab: Path) -> None:
    write(tmp_path / "a.txt", ["The cat sat on a mat, and so it goes. " * 3000] * 200)
    command = [sys.executable, "-c", "from bertfast.cli import main; main()", "prepare", str(tmp_path / "a.txt")]
    command += ["--out", str(tmp_path / "set"), "--vocab", str(vocab), "--workers", "2"]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job of a shell would ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=default)
    for _ in range(1200):
        if (tmp_path / ".set.tmp" / "tokens.bin").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said and not (tmp_path / "set").exists()
    assert (tmp_path / ".set.tmp").exists() == (number == signal.SIGKILL)
    for _ in range(100):  # orphaned workers notice
        if subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers outlived their parent")
    small = write(tmp_path / "b.txt", DOCUMENTS)
    prepare([str(small)], tmp_path / "set", vocab=vocab, workers=1)  # and what a killed run left is no hindrance
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt", "b.txt", "set"]


# The documentation corpus


def test_docstrings_become_prose(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '''"""Say what the module does, in words
that are wrapped.

    >>> example(1)
    2

- A bullet that is a sentence.
- ``code`` and :class:`Thing` in a sentence of some length.

=====  =====
a      b
=====  =====

x : int
    The number of things to be counted here.
"""
raise SystemExit("never run")


class A:
    def f(self):
        """A method's docstring is read as well."""
'''
    )
    assert corpus.read_docstrings(tmp_path / "m.py") == [[
        "Say what the module does, in words that are wrapped.",
        "A bullet that is a sentence.",
        "code and Thing in a sentence of some length.",
        "The number of things to be counted here.",
        "A method's docstring is read as well.",
    ]]  # fmt: skip
    (tmp_path / "broken.py").write_text('"""Not Python."""\nprint "2"\n')
    assert corpus.read_docstrings(tmp_path / "broken.py") == []


def test_documentation_is_gathered_once_and_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = corpus.documentation_sources()
    names = [name for _, name, _ in sources]
    assert "pydoc_data/topics.py" in names and "json/__init__.py" in names
    assert corpus.documentation_fingerprint(sources) != corpus.documentation_fingerprint(sources[1:])
    paragraphs = ["A sentence that is used again and again. " * 4, "Another sentence stands here, and is long. " * 5]
    pieces = list(corpus.gather_documentation(iter([paragraphs, paragraphs, ["Too short."], paragraphs[::-1]])))
    assert [piece.documents for piece in pieces] == [["\n\n".join(paragraphs)]]
    monkeypatch.setattr(corpus, "DOCUMENTATION_LIMIT", 1000)
    many = ([f"Document {i} has something to say about itself. " * 9] for i in range(50))
    assert sum(len(piece.documents) for piece in corpus.gather_documentation(many)) == 3


def test_libraries_with_links_to_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("")
    (tmp_path / "b.py").symlink_to("nowhere")
    paths = dict.fromkeys(("stdlib", "platstdlib", "purelib", "platlib"), str(tmp_path))
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: paths)
    assert [name for _, name, _ in corpus.documentation_sources()] == ["a.py"]


def test_the_documentation_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source for source in corpus.documentation_sources() if source[1].split("/")[0] in ("json", "pydoc_data")]
    monkeypatch.setattr(corpus, "documentation_sources", lambda: sources)
    first = prepare(None, tmp_path / "one", vocab_size=1000, workers=2)
    assert first == prepare(None, tmp_path / "two", vocab_size=1000, workers=1)
    assert first["tokens"] > 50_000 and first["vocab_size"] == 1000


# The command line and the file writers


def test_the_command_line(tmp_path: Path, vocab: Path) -> None:
    from bertfast.cli import app

    write(tmp_path / "a.jsonl", DOCUMENTS)
    run = lambda *arguments: CliRunner().invoke(app, ["prepare", str(tmp_path / "a.jsonl"), *arguments])
    assert run("--out", str(tmp_path / "set"), "--vocab", str(vocab), "--workers", "1").exit_code == 0
    assert text_of(tmp_path / "set") == EXPECTED
    assert "blank line parts documents" in " ".join(CliRunner().invoke(app, ["prepare", "--help"]).output.split())
    assert run().exit_code == 2
    command = [sys.executable, "-c", "from bertfast.cli import main; main()", "prepare", "absent.txt", "--out", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "bertfast: there is no file absent.txt\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("terminal", [{}, {"TTY_COMPATIBLE": "1"}])
def test_a_set_outlives_what_it_is_told_to(terminal: dict, tmp_path: Path, vocab: Path) -> None:
    write(tmp_path / "a.txt", DOCUMENTS)
    reader, broken = os.pipe()
    os.close(reader)
    for out, stderr in (("one", broken), ("two", os.open("/dev/full", os.O_WRONLY))):
        done = subprocess.run([sys.executable, "-m", "bertfast", "prepare", "a.txt", "--vocab", str(vocab), "--workers",
                               "1", "--out", out], cwd=tmp_path, stderr=stderr, env={**os.environ, **terminal})
        os.close(stderr)
        assert done.returncode == 0 and text_of(tmp_path / out) == EXPECTED


def test_what_is_renamed_is_on_the_disk_first(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(files, "_sync", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"-> {os.path.basename(b)}"), replace(a, b))[1])
    files.write_bytes(tmp_path / "a", b"1")
    assert done == [f".a.{os.getpid()}.tmp", "-> a", tmp_path.name]
    done.clear()
    with files.atomic_folder(tmp_path / "set") as folder:
        (folder / "b").write_text("2")
    assert done == ["b", ".set.tmp", "-> set", tmp_path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two")
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    for content in ("one", "two"):
        with files.atomic_folder(tmp_path / "set") as folder:
            (folder / content).touch()
        monkeypatch.setattr(os, "replace", None)
    assert [x.name for x in (tmp_path / "set").iterdir()] == ["two"] and [*tmp_path.iterdir()] == [tmp_path / "set"]


def test_a_set_stays_where_its_successor_cannot_be_renamed(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("1")
    replace = os.replace

    def refused(a, b):
        if os.path.basename(a) == ".set.tmp":
            raise OSError(5, "Input/output error")
        replace(a, b)

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    with pytest.raises(files.UserError, match="Input/output error"), files.atomic_folder(tmp_path / "set") as folder:
        (folder / "new").write_text("2")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["old"]


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": 1})
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert files.read_json(tmp_path / "a.json") == {"é": 1}
    with pytest.raises(UserError, match="there is no folder"):
        files.write_bytes(tmp_path / "absent" / "a", b"")
    with pytest.raises(UserError, match="cannot write .*: Is a directory"):
        files.write_bytes(tmp_path, b"")
    with pytest.raises(UserError, match="cannot read"):
        files.sha256(tmp_path / "absent")
    (tmp_path / "link.json").symlink_to("a.json")  # stays, and what it points to is written
    files.write_json(tmp_path / "link.json", 1)
    assert files.read_json(tmp_path / "a.json") == 1 and (tmp_path / "link.json").is_symlink()

    for content in ("one", "two"):  # a folder is replaced as a whole
        with files.atomic_folder(tmp_path / "folder") as new:
            (new / content).write_text(content)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "folder") as new:
        raise KeyboardInterrupt
    with files.atomic_folder(tmp_path / "folder2"), pytest.raises(UserError, match="is being written by another"):
        with files.atomic_folder(tmp_path / "folder2"):
            pass
    assert [x.name for x in (tmp_path / "folder").iterdir()] == ["two"]
    (tmp_path / "link").symlink_to("folder")  # stays, and what it points to is replaced
    with files.atomic_folder(tmp_path / "link") as new:
        (new / "three").write_text("")
    assert [x.name for x in (tmp_path / "folder").iterdir()] == ["three"] and (tmp_path / "link").is_symlink()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json", "folder", "folder2", "link", "link.json"]


@pytest.mark.parametrize("atomic", [files.atomic_path, files.atomic_folder])
def test_what_cannot_be_read_is_named(atomic: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*absent: No such file"), atomic(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(UserError, match="cannot write .*out: "), atomic(tmp_path / "out") as new:
        (new / "folder" / "file").write_bytes(b"")


def test_a_current_folder_that_was_deleted(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    source = str(write(tmp_path / "a.txt", DOCUMENTS))
    with monkeypatch.context() as context:
        context.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        files.write_json(tmp_path / "a.json", 1)
        assert prepare([source], tmp_path / "set", vocab=vocab, workers=1)["documents"]
        for out in (lambda: files.write_json("a.json", 1), lambda: prepare([source], "set", vocab=vocab, workers=1)):
            with pytest.raises(UserError, match="there is no current folder"):
                out()


@pytest.mark.skipif(files.fcntl is None, reason="no locks there")
def test_a_file_system_without_locks_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers EBADF: an exclusive lock is for what is open for writing, which folders never are."""
    def flock(*_) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.atomic_folder(tmp_path / "folder") as new:
        (new / "a").write_text("")
    assert [x.name for x in (tmp_path / "folder").iterdir()] == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="no such errors there")
def test_errors_of_rust_libraries_are_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*: No space left on device"), files.atomic_path(tmp_path / "a"):
        raise Exception("I/O error: No space left on device (os error 28)")


def test_another_field_version_or_text_of_the_same_size_is_prepared_anew(tmp_path: Path, vocab: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "set"
    source.write_text('{"text": "A cat.", "body": "One dog."}\n')
    again = lambda field="text": prepare([str(source)], out, vocab=vocab, field=field, workers=1)
    made = again()
    (out / "manifest.json").write_text(json.dumps({**made, "version": 0}))  # an older bertfast's, which no loader reads
    assert again() == made and Dataset(out).n_tokens
    again("body")
    assert text_of(out) == [["onedog."]]
    again()
    source.write_text('{"text": "A dog.", "body": "One dog."}\n')
    os.utime(source, ns=(0, 0))
    again()
    assert text_of(out) == [["adog."]]


def test_a_long_line_is_read_in_parts_cut_at_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 50)
    words = [f"word{i}" for i in range(200)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    parts = [x for piece in corpus.read_files([tmp_path / "a.txt"]) for x in piece.documents]
    assert len(parts) > 10 and [word for part in parts for word in part.split()] == words


def test_a_cased_vocabulary_is_learned(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.txt", ["The Cat sat."] * 9))
    assert prepare([source], tmp_path / "set", vocab_size=100, cased=True, workers=1)["cased"]
    assert "C" in Dataset(tmp_path / "set").tokenizer.vocab
