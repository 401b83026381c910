"""From ids to batches: the tokenizer, the plan of an epoch, masking, packing, the loader."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from bertfast.batch import PackedBatch
from bertfast.data import plan, tokenizer
from bertfast.data.dataset import Dataset, Loader, _held_out, drawn
from bertfast.data.prepare import prepare
from bertfast.data.tokenizer import Tokenizer, WordCache
from bertfast.files import UserError

SYLLABLES = "ba ko ti re su mon dal per fin gor ast ul en ing ed ly ness ther wo qui".split()


def make_text(seed: int, n_documents: int, sentences: int = 30, words: int = 18) -> str:
    """Text of made-up words, frequent ones short, with documents and sentences of very different lengths."""
    rng = np.random.default_rng(seed)
    lexicon = ["".join(rng.choice(SYLLABLES, 1 + i // 300)) for i in range(1500)]
    documents = []
    for _ in range(n_documents):
        lines = []
        for _ in range(rng.integers(1, 2 * sentences)):
            chosen = np.minimum(rng.zipf(1.3, rng.integers(1, 2 * words)), len(lexicon)) - 1
            lines.append(" ".join(lexicon[i] for i in chosen).capitalize() + ".")
        documents.append("\n".join(lines))
    return "\n\n".join(documents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "text.txt").write_text(make_text(0, 200))
    prepare([str(root / "text.txt")], root / "set", vocab_size=600, workers=1)
    return root / "set"


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return Dataset(folder)


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    for field in dataclasses.fields(PackedBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


# The tokenizer


AWKWARD = [
    "", " ", "Hello, World!", "naïve Café ÉCOLE ÅNGSTRÖM", "e\u0301 a\u0308 \u0301x", "don't can't ’tis",
    "今天天气很好。我们去公园吧！", "日本語のテキスト と English", "한국어 문장입니다", "a\u200bb\u00adc\ufeffd",
    "tab\tnew\nline\r\n\x0bvt\x1csep\x85nel\u2028ls\u00a0nbsp\u3000wide", "\x00nul\ufffdrep\x07bell",
    "x" * 101 + " " + "y" * 100, "İstanbul ΣΟΦΟΣ ﬁne ǅ ß ẞ", "🙂👩‍👩‍👧 a.b@c.d #tag $5 50% ^_^ `x` ~",
    "[MASK] [CLS] [mask] [ MASK ]", "a  b   c ", "##ing ## # unaffable", "العربية עברית हिन्दी ไทย", "…—–«»„“”",
    "\ud7a3\u1100\u1161 \U00020000\U0002f800 \u4e00\u9fff",
]  # fmt: skip


@pytest.fixture(scope="module")
def wordpieces() -> dict[str, int]:
    words = "hello world na naive cafe can don un aff able the a b c e mail tag new line tab fine sep nel".split()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'#$%^&*()[]-_@~`:ßσς今天好本語éİ한국어"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *("##" + x for x in letters + "ing")]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


@pytest.mark.parametrize("cased", [False, True])
def test_ids_equal_transformers(wordpieces: dict[str, int], cased: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=wordpieces, do_lower_case=not cased)
    ours = Tokenizer(wordpieces, cased)
    for text in AWKWARD:
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
    assert ours.encode("hello", "world") == theirs("hello", "world")["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6))
def test_word_cache_equals_whole_texts(texts: list[str]) -> None:
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b [ ] mask 0 é".split()
    cache = WordCache(Tokenizer({piece: i for i, piece in enumerate(pieces)}))
    for _ in range(2):  # empty, then warm
        ids, lengths = cache.encode_batch([*AWKWARD, *texts])
        expected = [cache.backend.encode(text, add_special_tokens=False).ids for text in [*AWKWARD, *texts]]
        assert ids.tolist() == [x for e in expected for x in e] and lengths.tolist() == [len(e) for e in expected]
    assert not set(ids) & {0, 2, 3, 4}, "a special token written in the text is ordinary text"


def test_word_cache_forgets(wordpieces: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WordCache(Tokenizer(wordpieces))
    first = cache.encode_batch(["hello world", "unaffable"])
    monkeypatch.setattr(WordCache, "LIMIT", 1)
    again = cache.encode_batch(["hello world", "unaffable"])
    assert np.array_equal(first[0], again[0]) and len(cache.index) == 3
    monkeypatch.setattr(WordCache, "LIMIT", 100)
    monkeypatch.setattr(WordCache, "CHARACTERS", 30)  # 19 are held
    for texts, words in (["x" * 40], 4), (["y"], 1):
        cache.encode_batch(texts)
        assert len(cache.index) == words


def test_tokenizer_round_trip(wordpieces: dict[str, int], tmp_path: Path) -> None:
    for cased in (False, True):
        saved = Tokenizer(wordpieces, cased)
        saved.save(tmp_path)
        for path, says in [(tmp_path, None), (tmp_path / "tokenizer.json", None), (tmp_path / "vocab.txt", cased)]:
            loaded = Tokenizer.load(path, says)
            assert (loaded.cased, loaded.sha256) == (cased, saved.sha256)
            assert all(loaded.encode(text) == saved.encode(text) for text in AWKWARD)
        (tmp_path / "tokenizer.json").unlink()
        assert Tokenizer.load(tmp_path).cased == cased  # tokenizer_config.json says
        saved.save(tmp_path)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert all(theirs(text)["input_ids"] == saved.encode(text) for text in AWKWARD)


@pytest.mark.parametrize("rules", [{"strip_accents": False}, {"tokenize_chinese_chars": False},
                                   {"do_lower_case": False, "strip_accents": True}])
def test_the_rules_of_a_vocabulary_file_are_kept(rules: dict, wordpieces: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(wordpieces))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(rules))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=wordpieces, **rules)
    expected = [theirs(text)["input_ids"] for text in AWKWARD]
    assert expected != [Tokenizer(wordpieces).encode(text) for text in AWKWARD]
    for _ in range(2):  # the file, and what we save of it
        loaded = Tokenizer.load(tmp_path)
        assert [loaded.encode(text) for text in AWKWARD] == expected and rules.items() <= loaded.rules.items()
        loaded.save(tmp_path)
        (tmp_path / "tokenizer.json").unlink()


def test_a_normalizer_within_a_sequence_says_the_casing(wordpieces: dict[str, int], tmp_path: Path) -> None:
    for cased in (False, True):
        backend = Tokenizer(wordpieces, cased, strip_accents=False).backend
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([backend.normalizer])])
        backend.save(str(tmp_path / "tokenizer.json"))
        loaded = Tokenizer.load(tmp_path)
        assert loaded.cased == cased and loaded.rules["strip_accents"] is False


@pytest.mark.parametrize("decoder", [False, True])
def test_tokens_added_to_a_vocabulary_file(decoder: bool, wordpieces: dict[str, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    n = len(wordpieces)
    wide = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(n + 1): {"content": "[e2]", **wide, "lstrip": False}, str(n): {"content": "<E1>", **wide}}
    (tmp_path / "vocab.txt").write_text("\n".join(wordpieces))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[e2]": n + 1, "<E1>": n} if not decoder else {"x": 0}))
    config = {"tokenizer_class": "BertTokenizer", **({"added_tokens_decoder": added} if decoder else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = [*AWKWARD, "the <E1>a [e2] b", "<e1> [E2] hello<E1>[e2]"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = [theirs(text)["input_ids"] for text in texts]
    assert {n, n + 1} <= set(expected[-2])
    loaded = Tokenizer.load(tmp_path)
    ids, _ = WordCache(loaded).encode_batch(texts)
    assert ids.max() < n, "text to pretrain on has no added tokens"
    for name in ("once", "twice"):
        assert [loaded.encode(text) for text in texts] == expected and loaded.vocab_size == n + 2
        assert loaded.tokens[n:] == ["<E1>", "[e2]"] and not loaded.cased
        ids = [wordpieces["a"], n]
        assert loaded.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        (tmp_path / name).mkdir()
        loaded.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert [theirs(text)["input_ids"] for text in texts] == expected
        loaded = Tokenizer.load(tmp_path / name)
    if not decoder:
        for index, said in (n + 3, "do not go together"), ("one", "is damaged"):
            (tmp_path / "added_tokens.json").write_text(json.dumps({"<E1>": index}))
            with pytest.raises(UserError, match=said):
                Tokenizer.load(tmp_path)


def test_a_file_that_leaves_out_cls_and_sep_gets_them(wordpieces: dict[str, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    Tokenizer(wordpieces).save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**description, "post_processor": None}))
    theirs, loaded = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for texts in (["hello world"], ["hello", "world"]):
        encoding = loaded.backend.encode(*texts)
        assert loaded.encode(*texts) == encoding.ids == theirs(*texts)["input_ids"]
        assert encoding.type_ids == theirs(*texts)["token_type_ids"]


def test_training_a_vocabulary_repeats_itself() -> None:
    texts = make_text(3, 40).split("\n") + ["今天天气很好。", "我们去公园吧！"] * 50
    vocabularies = [Tokenizer.train(order, 500) for order in (texts, texts[::-1])]
    assert vocabularies[0].tokens == vocabularies[1].tokens
    tokens = vocabularies[0].tokens
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and 400 < len(tokens) <= 500
    assert "今" in tokens and "##今" not in tokens, "Chinese characters stand alone"
    assert vocabularies[0].decode(vocabularies[0].encode("Kore perdal.")) == "kore perdal."


def test_endless_words_teach_no_vocabulary_and_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read, train = [], tokenizers.Tokenizer.train_from_iterator
    monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator",
                        lambda own, texts, trainer: train(own, (read.append(x) or x for x in texts), trainer))
    texts = make_text(3, 40).split("\n")
    assert Tokenizer.train([*texts, "x" * 101, "a " + "ACGT" * 50], 500).tokens == Tokenizer.train(
        [*texts, "a"], 500).tokens
    assert max(map(len, " ".join(read).split())) < 101  # by the square of which the time grows


def test_the_rarest_of_too_many_words_teach_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["abc, bcd cde dea"] * 20
    rare = [" ".join(map("".join, itertools.permutations("abcde")))]
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 5)
    assert Tokenizer.train(rare + common, 100).tokens == Tokenizer.train(common, 100).tokens
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 125)
    assert Tokenizer.train(rare + common, 100).tokens != Tokenizer.train(common, 100).tokens


def test_the_rarest_letters_become_unknown() -> None:
    assert "z" in Tokenizer.train(["abc " * 6_000, "z"], 100).vocab
    assert "z" not in Tokenizer.train(["abc " * 7_000, "z"], 100).vocab


def test_vocabulary_mistakes(tmp_path: Path) -> None:
    good = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"
    cases = {
        "no [MASK]": ("v.txt", good.replace("[MASK]\n", ""), "no [MASK]"),
        "twice": ("v.txt", good + "a\n", "has 'a' twice, on lines 6 and 7"),
        "json": ("v.json", "{", "is damaged"),
        "other json": ("v.json", "{}", "is not a tokenizer"),
    }
    for name, content, message in cases.values():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=re.escape(message)):
            Tokenizer.load(tmp_path / name)
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        Tokenizer.load(tmp_path / "v.txt")
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        Tokenizer.load(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="neither"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="99 entries is too small"):
        Tokenizer.train(["a b c"], 99)
    with pytest.raises(UserError, match="2147483648 entries is too large"):
        Tokenizer.train(["a b c"], 2**31)
    (tmp_path / "vocab.txt").write_text(good)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json is not a tokenizer's configuration"):
        Tokenizer.load(tmp_path)
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 200)))  # more than there is room for: the rest is [UNK]
    assert len(Tokenizer.train([letters], 100).tokens) <= 100
    with pytest.raises(UserError, match="no words"):
        Tokenizer.train([" ", "\n"], 100)


# The plan


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


def test_philox_known_answers() -> None:
    """The vectors that Random123 publishes for philox4x32 with 7 rounds."""
    cases = [
        ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (PI[:4], PI[4:], "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ]
    for (c0, c1, c2, c3), (k0, k1), expected in cases:
        words = plan.philox(k1 << 32 | k0, c3 >> 8, c3 & 255, np.uint64(c2 << 32 | c1), np.uint64(c0))
        assert " ".join(f"{int(word):08x}" for word in words) == expected
    assert (plan.philox(-5, 1, 2, 3, 4) == plan.philox(2**64 - 5, 1, 2, 3, 4)).all()


def test_segments_cover_the_corpus(dataset: Dataset) -> None:
    """A and true-B segments of a document follow each other without a gap, but where a full sample was cut to fit."""
    for seqlen in (32, 128):
        samples, _ = drawn(dataset, 7, 0, seqlen)
        assert plan.lengths(samples).max() == seqlen
        at, covered = 0, 0
        bounds = dataset.sentences[dataset.documents]
        document = iter(dataset.document_ids.tolist())
        end = 0
        gap_allowed = False
        for sample in samples:
            a, b, a_len, b_len, label = sample.tolist()
            full = a_len + b_len == seqlen - 3
            if at >= end or a >= end:
                assert at == end or gap_allowed, "tokens were lost at the end of a document"
                d = next(document)
                at, end = int(bounds[d]), int(bounds[d + 1])
                gap_allowed = False
            assert a == at or (a > at and (full or gap_allowed)), "tokens were lost between two samples"
            assert a + a_len <= end
            at = a + a_len
            if label == 0:
                assert b == at or (b > at and full), "B does not continue A"
                at = b + b_len
            covered += a_len + (label == 0) * b_len
            gap_allowed = full
        assert next(document, None) is None and (at == end or gap_allowed)
        assert covered > 0.6 * dataset.n_tokens
        for segment, length in [("a", "a_len"), ("b", "b_len")]:
            ends = [samples[segment], samples[segment] + samples[length]]
            cut = [1 - np.isin(end, dataset.sentences).mean() for end in ends]
            assert 0.1 < cut[0] < 0.9 and 0.8 < cut[0] / cut[1] < 1.25, "tokens are lost at both ends alike"


def test_half_of_b_is_random_and_from_elsewhere(dataset: Dataset) -> None:
    samples = np.concatenate([drawn(dataset, 1, epoch, 64)[0] for epoch in range(3)])
    share = (samples["label"] == 1).mean()
    assert abs(share - 0.5) < 4 * 0.5 / len(samples) ** 0.5
    starts = dataset.sentences[dataset.documents]
    document_of = lambda at: np.searchsorted(starts, at, side="right") - 1
    is_random = samples["label"] == 1
    assert (document_of(samples["a"])[is_random] != document_of(samples["b"])[is_random]).all()
    assert (document_of(samples["a"])[~is_random] == document_of(samples["b"])[~is_random]).all()
    assert np.isin(document_of(samples["b"]), dataset.document_ids).all(), "B comes from the other split"
    assert samples["a_len"].min() >= 1 and samples["b_len"].min() >= 1
    longer, _ = drawn(dataset, 1, 0, 256)
    assert 0.4 < (longer["a_len"] > longer["b_len"])[longer["label"] == 0].mean() < 0.6, (
        "parted in the middle on average"
    )


def test_short_targets_make_short_samples(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    means = []
    for threshold in (0, plan.SHORT, 2**32):
        monkeypatch.setattr(plan, "SHORT", threshold)
        means.append(plan.lengths(drawn(dataset, 1, 0, 64)[0]).mean())
    assert means[0] > means[1] > means[2] and means[2] < 0.9 * means[0]


def test_plan_is_a_pure_function(dataset: Dataset) -> None:
    one, same = drawn(dataset, 5, 2, 64), drawn(dataset, 5, 2, 64)
    assert all(map(np.array_equal, one, same))
    assert np.array_equal(np.sort(one[1]), np.arange(len(one[0])))
    for seed, epoch in [(6, 2), (5, 3)]:
        for a, b in zip(one, drawn(dataset, seed, epoch, 64)):
            assert not np.array_equal(a[:50], b[:50])


def test_validation_documents_are_apart(folder: Path, dataset: Dataset) -> None:
    validation = Dataset(folder, "validation")
    together = np.sort(np.concatenate([dataset.document_ids, validation.document_ids]))
    assert np.array_equal(together, np.arange(len(dataset.documents) - 1))
    assert len(validation.document_ids) in (6, 7)  # one in 32 of 200
    for split in (dataset, validation):
        bounds = split.sentences[split.documents]
        own = np.concatenate([split.tokens[bounds[d] : bounds[d + 1]] for d in split.document_ids])
        assert len(own) == split.n_tokens
        for most in (0, 1, 1000, len(own) - 1, len(own), 10**7):
            assert np.array_equal(split.first_tokens(most), own[:most])


def test_of_few_documents_one_is_held_out() -> None:
    assert [int(_held_out(n).sum()) for n in range(33)] == [0, 0] + 31 * [1]


# Corpora that leave little choice: a sentence, a document, two.


@pytest.mark.parametrize(
    "documents",
    [["Ba ko ti."], ["Ba ko ti. Re su. Mon dal per fin."], ["Ba ko ti.", "Re su."], ["Ba", "Ko", "Ti re."]],
)
@pytest.mark.parametrize("nsp", [True, False])
def test_tiny_corpora(documents: list[str], nsp: bool, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(documents))
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] . ba ko ti re su mon dal per fin".split()
    (tmp_path / "v.txt").write_text("\n".join(pieces))
    prepare([str(tmp_path / "t.txt")], tmp_path / "set", vocab=tmp_path / "v.txt", workers=1)
    dataset = Dataset(tmp_path / "set")
    for seed in range(5):
        loader = Loader(dataset, seed, 16, 16, nsp=nsp)
        batch = loader.batch(0)
        assert batch.n_sequences >= 1 and batch.n_masked >= 1
        assert_same(batch, Loader(dataset, seed, 16, 16, nsp=nsp).batch(0))


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Ba")
    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nba\n")
    prepare([str(tmp_path / "t.txt")], tmp_path / "set", vocab=tmp_path / "v.txt", workers=1)
    with pytest.raises(UserError, match="too little text"):  # one token cannot be a pair
        for seed in range(20):
            Loader(Dataset(tmp_path / "set"), seed, 16, 16)
    with pytest.raises(UserError, match="too little text for a single validation sample"):
        Loader(Dataset(tmp_path / "set", "validation"), 0, 16, 16)


# Batches


def source_ids(loader: Loader, epoch: int) -> dict[int, list[int]]:
    """Each sample's ids before masking, from the shards."""
    d, (samples, _, _) = loader.dataset, loader._epoch(epoch)
    _, cls_id, sep_id, _ = loader.vocabulary
    ids = {}
    for index, (a, b, a_len, b_len, _) in enumerate(samples.tolist()):
        pair = [*d.tokens[b : b + b_len].tolist(), sep_id] if b_len else []
        ids[index] = [cls_id, *d.tokens[a : a + a_len].tolist(), sep_id, *pair]
    return ids


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("whole_word", [False, True])
def test_batches_hold_what_they_say(dataset: Dataset, nsp: bool, whole_word: bool) -> None:
    T, S, p = 512, 64, 0.15
    loader = Loader(dataset, 3, S, T, nsp=nsp, whole_word_masking=whole_word, mlm_probability=p)
    B, P = loader.max_sequences, loader.max_predictions
    samples, order, offsets = loader._epoch(0)
    sources, specials, used = source_ids(loader, 0), {2, 3}, []
    for i in range(loader.batches_in_epoch(0)):
        batch = loader.batch(i)
        shapes = {k: tuple(v.shape) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        assert shapes == {
            "input_ids": (T,), "token_type_ids": (T,), "position_ids": (T,), "row_key": (T,), "cu_seqlens": (B + 1,),
            "read_rows": (P + B,), "cu_seqlens_read": (B + 1,), "cls_index": (B,), "mask_index": (P,), "labels": (P,),
            "next_sentence_label": (B,),
        }  # fmt: skip
        cu, cu_read = batch.cu_seqlens.tolist(), batch.cu_seqlens_read.tolist()
        assert cu[0] == cu_read[0] == 0
        assert cu[-1] == batch.n_tokens and cu_read[-1] == batch.n_masked + batch.n_sequences
        unmasked = batch.input_ids.clone()
        rows = batch.read_rows[batch.mask_index[: batch.n_masked]]
        unmasked[rows] = batch.labels[: batch.n_masked]
        chosen = order[offsets[i] : offsets[i + 1]].tolist()
        used += chosen
        for s, index in enumerate(chosen):
            here, m = slice(cu[s], cu[s + 1]), int(samples["a_len"][index]) + int(samples["b_len"][index])
            assert unmasked[here].tolist() == sources[index], "unmasking does not give back the text"
            assert batch.position_ids[here].tolist() == list(range(cu[s + 1] - cu[s]))
            assert (batch.row_key[here] == (s << 32) + batch.position_ids[here]).all()
            first = int(samples["a_len"][index]) + 2
            assert (batch.token_type_ids[here] == (batch.position_ids[here] >= first)).all()
            assert batch.next_sentence_label[s] == (samples["label"][index] if nsp else -100)
            read = batch.read_rows[cu_read[s] : cu_read[s + 1]].tolist()
            assert read[0] == cu[s] == batch.read_rows[batch.cls_index[s]] and read[1:] == sorted(set(read[1:]))
            assert all(cu[s] < row < cu[s + 1] - 1 for row in read[1:])
            assert not {int(unmasked[row]) for row in read[1:]} & specials, "a special token was masked"
            wanted = max(1, round(p * m))
            assert len(read) - 1 == wanted or (whole_word and 1 <= len(read) - 1 < wanted)
            if whole_word and len(read) - 1 > 1:
                check_whole_words(sources[index], [row - cu[s] for row in read[1:]], first, loader, wanted)
        assert (batch.input_ids[batch.n_tokens :] == 0).all() and (batch.position_ids[batch.n_tokens :] == 0).all()
        assert (batch.read_rows[cu_read[-1] :] == 0).all() and (batch.mask_index[batch.n_masked :] == 0).all()
        assert (batch.labels[batch.n_masked :] == -100).all() and (batch.labels[: batch.n_masked] >= 0).all()
        assert (batch.next_sentence_label[batch.n_sequences :] == -100).all()
        assert (batch.cls_index[batch.n_sequences :] == 0).all()
    assert sorted(used) == list(range(len(samples))), "an epoch uses each sample once"


def test_causal_batches_predict_each_next_token(dataset: Dataset) -> None:
    loader = Loader(dataset, 3, 64, 512, nsp=False, causal=True)
    _, order, offsets = loader._epoch(0)
    sources = source_ids(loader, 0)
    assert loader.max_predictions == 512
    for i in range(loader.batches_in_epoch(0)):
        batch, n = loader.batch(i), 0
        for s, index in enumerate(order[offsets[i] : offsets[i + 1]].tolist()):
            begin, end = batch.cu_seqlens[s : s + 2].tolist()
            assert batch.input_ids[begin:end].tolist() == sources[index]
            read = batch.read_rows[batch.cu_seqlens_read[s] : batch.cu_seqlens_read[s + 1]]
            assert read.tolist() == list(range(begin, end - 1)) and batch.cls_index[s] == n
            assert batch.mask_index[n : n + len(read)].tolist() == list(range(n, n + len(read)))
            assert batch.labels[n : n + len(read)].tolist() == sources[index][1:]
            n += len(read)
        assert n == batch.n_masked == batch.n_tokens - batch.n_sequences and (batch.labels[n:] == -100).all()
    masked = Loader(dataset, 3, 64, 512, nsp=False)
    with pytest.raises(UserError, match="cannot resume, the batches would differ: mlm_probability was 0.15, is 0.0"):
        loader.load_state_dict(masked.state_dict())


def test_documents_planned_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8192 documents on, where there are cores, equal ranges of them: the same samples in the same order."""
    if plan._C is None:
        pytest.skip("bertfast._C is not built")
    rng = np.random.default_rng(0)
    sentences = np.append(0, rng.integers(1, 9, 20_000).cumsum())
    documents = np.append(0, np.sort(rng.choice(np.arange(1, 20_000), 9000, replace=False)))
    documents = np.append(documents, 20_000)
    arguments = (sentences, documents, np.arange(9001), 7, 1, 16, True)
    fast = plan.plan(*arguments)
    monkeypatch.setattr(plan, "_C", None)
    assert np.array_equal(fast, plan.plan(*arguments))


def test_a_vocabulary_beyond_two_bytes(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 70_000))]
    (tmp_path / "v.txt").write_text("\n".join(words))
    rng = np.random.default_rng(0)
    (tmp_path / "t.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in rng.integers(5, 70_000, 40)) for _ in "abc"))
    manifest = prepare([str(tmp_path / "t.txt")], tmp_path / "set", vocab=tmp_path / "v.txt", workers=1)
    dataset = Dataset(tmp_path / "set")
    assert manifest["dtype"] == "uint32" and dataset.tokens.max() > 65_536
    loader = Loader(dataset, 1, 64, 128, nsp=False, causal=True)  # masks nothing
    batch, (_, order, offsets) = loader.batch(0), loader._epoch(0)
    sources = source_ids(loader, 0)
    expected = [x for index in order[offsets[0] : offsets[1]].tolist() for x in sources[index]]
    assert batch.input_ids[: batch.n_tokens].tolist() == expected and max(expected) > 65_536


def check_whole_words(ids: list[int], masked: list[int], first: int, loader: Loader, wanted: int) -> None:
    """A word is masked with all its pieces, or not at all."""
    inside = lambda at: at < len(ids) - 1 and at != first - 1 and at != first and loader.is_continuation[ids[at]]
    if inside(masked[0]) or len(masked) == wanted:
        return  # part of a word longer than the whole count
    for at in masked:
        assert not inside(at) or at - 1 in masked or at == 1, "a word's beginning was left"
        assert not inside(at + 1) or at + 1 in masked, "a word's end was left"


def test_masking_rates(dataset: Dataset) -> None:
    loader = Loader(dataset, 11, 128, 4096)
    labels, shown, masked_positions = [], [], []
    for i in range(2 * loader.batches_in_epoch(0)):
        batch = loader.batch(i)
        rows = batch.read_rows[batch.mask_index[: batch.n_masked]]
        labels.append(batch.labels[: batch.n_masked])
        shown.append(batch.input_ids[rows])
        masked_positions.append(batch.position_ids[rows])
    label, shown, position = torch.cat(labels), torch.cat(shown), torch.cat(masked_positions)
    n, V = len(label), loader.vocabulary[0]
    is_mask, same = shown == 4, shown == label
    for share, expected in [(is_mask, 0.8 + 0.1 / V), (same, 0.1 + 0.1 / V), (~is_mask & ~same, 0.1 - 0.1 / V)]:
        assert abs(share.double().mean().item() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 0.1 / V
    replaced = shown[~is_mask & ~same].double()
    assert abs(replaced.mean().item() / (V / 2) - 1) < 4 / (3 * len(replaced)) ** 0.5 + 1 / V
    assert replaced.min() < 0.03 * V and replaced.max() > 0.97 * V
    halves = ((position < 64).sum().item(), (position >= 64).sum().item())
    assert 0.8 < halves[1] / halves[0] < 1.1, "masked positions are not spread evenly"


def test_masks_are_drawn_anew_each_epoch(dataset: Dataset) -> None:
    ids = [plan.philox(1, epoch, plan.PICK, 5, np.arange(3)).tolist() for epoch in (0, 1)]
    assert ids[0] != ids[1]
    loader = Loader(dataset, 11, 128, 4096)
    one, two = loader.batch(0), loader.batch(loader.batches_in_epoch(0))
    assert not torch.equal(one.input_ids, two.input_ids)


def test_each_epoch_has_pairs_of_its_own(dataset):
    loader = Loader(dataset, 5, 64, 2048)
    one, two = loader._epoch(0).samples, loader._epoch(1).samples
    assert not np.array_equal(one[:50], two[:50])
    assert np.array_equal(one, drawn(dataset, 5, 0, 64)[0])


def test_packing_fills_the_budget(dataset: Dataset) -> None:
    for budget in (2048, 8192):
        loader = Loader(dataset, 0, 128, budget)
        samples, order, offsets = loader._epoch(0)
        filled = np.add.reduceat(plan.lengths(samples)[order], offsets[:-1])
        assert filled.max() <= budget and filled[:-1].mean() >= 0.995 * budget  # 0.99 by the worst fit
    order, offsets = plan.pack(samples, order, 8192, 3)
    assert np.diff(offsets).max() == 3


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("masking", [{}, {"whole_word_masking": True}, {"causal": True}], ids=str)
@pytest.mark.parametrize("size", [(16, 64), (128, 1024)])
def test_python_equals_cpp(
    dataset: Dataset, nsp: bool, masking: dict, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if plan._C is None:
        pytest.skip("bertfast._C is not built")
    make = lambda: Loader(dataset, -9, *size, nsp=nsp, mlm_probability=0.2, **masking)
    fast = make()
    batches = {i: fast.batch(i) for i in (0, 3, fast.batches_in_epoch(0) - 1, fast.batches_in_epoch(0) + 1)}
    monkeypatch.setattr(plan, "_C", None)
    slow = make()
    for a, b in zip(fast._epoch(0), slow._epoch(0), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    for i, batch in batches.items():
        assert_same(batch, slow.batch(i))


# The loader


def test_ranks_and_micro_batches_share_out_the_same_batches(dataset: Dataset) -> None:
    """A step of 4 batches: one rank, two, four; the sequence index counts through all of it, over epochs' ends too."""
    alone = Loader(dataset, 1, 64, 4096, micro_batches=4)
    n = 2 * alone.batches_in_epoch(0) // 4 * 4
    expected = [alone.batch(i) for i in range(n)]
    for first in range(0, n, 4):
        index = 0
        for batch in expected[first : first + 4]:
            rows = batch.row_key[batch.cu_seqlens[: batch.n_sequences].long()] >> 32
            assert rows.tolist() == list(range(index, index + batch.n_sequences))
            index += batch.n_sequences
    for world in (2, 4):
        ranks = [Loader(dataset, 1, 64, 4096, micro_batches=4 // world, rank=r, world_size=world) for r in range(world)]
        for i in range(n):
            assert_same(ranks[i % world].batch(i // world), expected[i])
    shares = [list(rank.validation_batches()) for rank in ranks]
    assert sum(map(len, shares)) == alone.batches_in_epoch(0)
    assert_same(shares[1][0], expected[1])


def test_iterating_resumes_where_it_stopped(dataset: Dataset) -> None:
    make = lambda **other: Loader(dataset, 4, 128, 8192, **other)
    loader = make()
    n = loader.batches_in_epoch(0)
    random_access = [loader.batch(i) for i in range(2 * n + 3)]
    for stop in (1, n, n + 2, 2 * n + 1):
        used = make()
        for i, batch in enumerate(used):
            assert_same(batch, random_access[i])
            if i + 1 == stop:
                break
        state = json.loads(json.dumps(used.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        for i, batch in zip(range(stop, stop + 2), resumed, strict=False):
            assert_same(batch, random_access[i])
    two = make(rank=1, world_size=2)
    two.load_state_dict({**state, "batch": 4, "epoch": 0, "epoch_start": 0})
    assert_same(next(iter(two)), Loader(dataset, 4, 128, 8192, rank=1, world_size=2).batch(2))
    with pytest.raises(UserError, match="token_budget was 8192, is 4096"):
        Loader(dataset, 4, 128, 4096).load_state_dict(state)
    with pytest.raises(UserError, match="on 2 ranks"):
        two.load_state_dict({**state, "batch": 3})


def test_prefetching_ends_and_tells_errors(folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
from bertfast.data.dataset import Dataset, Loader
batches = iter(Loader(Dataset({str(folder)!r}), 4, 128, 1 << 20))
print(next(batches).n_tokens > 0)
"""  # ends while the next batches are being made
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    loader = Loader(dataset, 4, 128, 8192)
    monkeypatch.setattr(plan, "fill", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))


def test_moving_a_batch(dataset: Dataset) -> None:
    batch = Loader(dataset, 4, 128, 1024).batch(0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta" and moved.n_tokens == batch.n_tokens and moved.max_seqlen == 128
    assert_same(batch.to("cpu"), batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 32), "smaller than a sequence"),
        ((4, 64), "out of range"),
        ((70_000, 80_000), "out of range"),
        ((64, 64, 1.0), "masking probability"),
    ],
)
def test_settings_that_make_no_batch(dataset: Dataset, arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(dataset, 0, *arguments[:2], mlm_probability=(*arguments, 0.15)[2])
