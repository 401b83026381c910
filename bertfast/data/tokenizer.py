"""WordPiece: text -> ids, exactly as BERT does it (Devlin et al. 2018), through the `tokenizers` library.

Text is cleaned of control characters, CJK characters are set apart, case and accents are dropped (uncased), words and
punctuation are separated, and each word is cut greedily into the longest pieces of the vocabulary, `##` marking a
continuation. The ids equal those of transformers' BertTokenizer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bertfast.files import UserError, read_json, write_bytes, write_json

LONGEST_WORD = 100  # letters; longer ones are [UNK]
MOST_WORDS = 1_000_000  # that a vocabulary is learned from: each takes the trainer 1.3 kB, and 70 µs
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Tokenizer:
    """A WordPiece vocabulary and its rules. `backend` is the `tokenizers.Tokenizer` (offsets, batches, word ids)."""

    def __init__(self, vocab: dict[str, int], cased: bool = False, backend: tokenizers.Tokenizer | None = None,
                 strip_accents: bool | None = None, tokenize_chinese_chars: bool = True):
        """The last two as in tokenizer_config.json. Raises UserError where a special token is missing."""
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise UserError(f"the vocabulary has no {', '.join(missing)}: BERT needs {' '.join(SPECIAL_TOKENS)}")
        self.vocab = vocab
        self.cased = cased
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[token] for token in SPECIAL_TOKENS)
        self.tokens = [f"[unused-{i}]" for i in range(self.vocab_size)]  # id -> token; files may leave gaps
        for token, index in vocab.items():
            self.tokens[index] = token
        self.is_continuation = np.array([token.startswith("##") for token in self.tokens])  # (V,) bool
        self.sha256 = hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()
        self.backend = backend or _backend(vocab, cased, strip_accents, tokenize_chinese_chars)
        if self.backend.post_processor is None:  # a tokenizer.json may leave it to whoever reads it
            self.backend.post_processor = processors.BertProcessing(("[SEP]", self.sep_id), ("[CLS]", self.cls_id))
        normalizer = self.backend.normalizer
        found = _bert_normalizer(json.loads(normalizer.__getstate__())) if normalizer else {}
        self.tells_its_rules = backend is not None  # a bare vocab.txt does not say whether it is cased
        self.rules = {  # in tokenizer_config.json's words
            "do_lower_case": not cased,
            "tokenize_chinese_chars": found.get("handle_chinese_chars", True),
            "strip_accents": found.get("strip_accents"),
        }

    @classmethod
    def load(cls, path: str | Path, cased: bool | None = None) -> "Tokenizer":
        """From a vocab.txt, a tokenizer.json, or a folder that holds either (a checkpoint's, a prepared set's).

        `cased` is for a bare vocab.txt, which does not say; None means uncased, or what tokenizer_config.json says. Of
        accents, Chinese characters and added tokens that file tells a folder's vocab.txt too (of the last, else
        added_tokens.json); a tokenizer.json has its own rules.
        Raises UserError where the file is missing, damaged or not WordPiece.
        """
        path = Path(path)
        config: dict = {}
        added: list[tuple[int, tokenizers.AddedToken]] = []
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise UserError(f"{path} has neither tokenizer.json nor vocab.txt")
            if (path / "tokenizer_config.json").is_file():
                config = read_json(path / "tokenizer_config.json")
                if not isinstance(config, dict):
                    raise UserError(f"{path / 'tokenizer_config.json'} is not a tokenizer's configuration")
                if cased is None and "do_lower_case" in config:
                    cased = not config["do_lower_case"]
            added = _added_tokens(path, config)
            path = found[0]
        if path.suffix == ".json":
            return _from_json(path, cased)
        accents, chinese = config.get("strip_accents"), config.get("tokenize_chinese_chars", True)
        loaded = cls(_read_vocab(path), bool(cased), None, None if accents is None else bool(accents), bool(chinese))
        loaded.backend.add_tokens([token for _, token in added])
        for index, token in added:
            if loaded.backend.token_to_id(token.content) != index:
                raise UserError(f"{path} and the added token {token.content!r}, id {index}, do not go together")
        if added:
            loaded = cls(loaded.backend.get_vocab(), loaded.cased, loaded.backend)
        loaded.tells_its_rules = "do_lower_case" in config
        return loaded

    @classmethod
    def train(cls, texts: list[str], vocab_size: int, cased: bool = False) -> "Tokenizer":
        """Learn `vocab_size` entries (fewer where the text holds fewer) from `texts`. The same text, the same entries.

        Left alone, the library's trainer numbers the letters by the order of a hash table, which differs from run to
        run and decides ties between merges. So we count the letters and hand it all of them in a fixed order.
        The rarest letters, 1 in 20,000 of all, become [UNK], as SentencePiece's character coverage does. Words of more
        than 100 letters, which WordPiece reads as [UNK], teach nothing: the trainer's time grows with their square.
        Nor do the rarest words where there are more than a million: its memory grows with their number.
        Raises UserError where the text has no words or the vocabulary no room.
        """
        if vocab_size < 100:
            raise UserError(f"a vocabulary of {vocab_size} entries is too small: 100 at least")
        if vocab_size > 10_000_000:  # the library allocates room for all of them first, and aborts where there is none
            raise UserError(f"a vocabulary of {vocab_size} entries is too large: 10,000,000 at most")
        backend = _backend({token: i for i, token in enumerate(SPECIAL_TOKENS)}, cased)
        firsts: Counter[str] = Counter()
        inner: Counter[str] = Counter()
        distinct: set[str] = set()
        left_out: set[str] = set()
        counts = Counter(word for text in texts for word in text.split())
        for raw, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
            if len(distinct) >= MOST_WORDS:
                left_out.add(raw)
                continue
            words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(raw))
            if any(len(word) > LONGEST_WORD for word, _ in words):
                left_out.add(raw)
                continue
            for word, _ in words:
                distinct.add(word)
                firsts[word[0]] += count
                for letter in word[1:]:
                    inner[letter] += count
        del counts, distinct
        letters = firsts + inner
        if not letters:
            raise UserError("there are no words to learn a vocabulary from")
        kept: list[str] = []
        covered, room = 0, vocab_size - len(SPECIAL_TOKENS)
        for letter in sorted(letters, key=lambda x: (-letters[x], x)):
            room -= 1 + (letter in inner)
            if covered > 0.99995 * letters.total() or room < 0:
                break
            kept.append(letter)
            covered += letters[letter]
        kept.sort()
        seeds = SPECIAL_TOKENS + kept + ["##" + x for x in kept if x in inner]
        backend.train_from_iterator(
            (" ".join(w for w in text.split() if w not in left_out) for text in texts) if left_out else texts,
            trainers.WordPieceTrainer(
                vocab_size=vocab_size,
                special_tokens=seeds,
                initial_alphabet=kept,
                limit_alphabet=len(kept),
                show_progress=False,
            ),
        )
        return cls(backend.get_vocab(), cased)

    def encode(self, text: str, pair: str | None = None) -> list[int]:
        """[CLS] text [SEP] (pair [SEP]) as ids. Special tokens written in the text count, as in transformers."""
        return self.backend.encode(text, pair).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids as readable text, special tokens left out."""
        return self.backend.decode(list(ids))

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt, tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        folder = Path(folder)
        write_bytes(folder / "vocab.txt", "".join(f"{token}\n" for token in self.tokens).encode())
        write_bytes(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "BertTokenizer",
                **self.rules,
                **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
            },
        )


class WordCache:
    """Ids of many texts quickly: most words were seen before, so each is cut into pieces once and then looked up.

    Cutting at spaces first changes nothing: every rule above works on single characters or inside a word. Special
    tokens written in the text are ordinary characters here: a corpus must not smuggle a [SEP] into a sample.
    """

    LIMIT = 300_000  # words held, some 60 MB
    CHARACTERS = 20 * LIMIT  # in them: where no spaces are, words are as long as sentences

    def __init__(self, tokenizer: Tokenizer):
        self.backend = tokenizers.Tokenizer(tokenizer.backend.model)  # without the added tokens
        self.backend.normalizer = tokenizer.backend.normalizer
        self.backend.pre_tokenizer = tokenizer.backend.pre_tokenizer
        self._clear()

    def _clear(self) -> None:
        self.index: dict[str, int] = {}
        self.characters = 0
        self.ids = np.zeros(0, np.int32)
        self.offsets = np.zeros(1, np.int64)

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, end to end (n,) int32, and how many each has (len(texts),) int64. No special tokens."""
        if len(self.index) > self.LIMIT or self.characters > self.CHARACTERS:
            self._clear()
        split = [text.split(" ") for text in texts]
        words = [word for text in split for word in text]
        new = [word for word in dict.fromkeys(words) if word not in self.index]
        if new:
            self.characters += sum(map(len, new))
            self.index.update(zip(new, range(len(self.index), len(self.index) + len(new)), strict=True))
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(new, add_special_tokens=False)]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            self.ids = np.concatenate([self.ids, np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum())])
            self.offsets = np.concatenate([self.offsets, self.offsets[-1] + np.cumsum(lengths)])
        which = np.fromiter(map(self.index.__getitem__, words), np.int64, len(words))
        starts, lengths = self.offsets[which], self.offsets[which + 1] - self.offsets[which]
        ends = np.cumsum(lengths)
        source = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        text_ends = np.cumsum(np.fromiter(map(len, split), np.int64, len(split)))
        return self.ids[source], np.diff(np.concatenate([[0], ends])[text_ends], prepend=0)


def _backend(vocab: dict[str, int], cased: bool, strip_accents: bool | None = None,
             tokenize_chinese_chars: bool = True) -> tokenizers.Tokenizer:
    """BERT's pipeline over a vocabulary, but for [CLS] and [SEP]."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=tokenize_chinese_chars, strip_accents=strip_accents, lowercase=not cased
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def _added_tokens(folder: Path, config: dict) -> list[tuple[int, tokenizers.AddedToken]]:
    """(id, token) of what was added to a vocab.txt, in the order of ids: where transformers writes them down."""
    path = folder / "tokenizer_config.json"
    try:
        if "added_tokens_decoder" in config:
            tokens = [(int(i), tokenizers.AddedToken(**token)) for i, token in config["added_tokens_decoder"].items()]
        elif (path := folder / "added_tokens.json").is_file():
            tokens = [(int(i), tokenizers.AddedToken(token, normalized=True)) for token, i in read_json(path).items()]
        else:
            return []
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its added tokens are not tokens and ids: {error}") from error
    return sorted(tokens, key=lambda pair: pair[0])


def _read_vocab(path: Path) -> dict[str, int]:
    """vocab.txt: a token a line, its line number its id."""
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the vocabulary {path} is not UTF-8 text") from error
    vocab: dict[str, int] = {}
    for number, token in enumerate(lines):
        if vocab.setdefault(token, number) != number:
            raise UserError(f"the vocabulary {path} has {token!r} twice, on lines {vocab[token] + 1} and {number + 1}")
    return vocab


def _from_json(path: Path, cased: bool | None) -> Tokenizer:
    """A tokenizer.json: its own rules are kept as they are."""
    description = read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from error
    if (description.get("model") or {}).get("type") != "WordPiece":
        raise UserError(f"{path} is not a WordPiece tokenizer")
    lowercase = bool(_bert_normalizer(description.get("normalizer")).get("lowercase"))
    if cased is not None and cased == lowercase:
        raise UserError(f"{path} is {'uncased' if lowercase else 'cased'}, which contradicts the casing asked for")
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend.get_vocab(), not lowercase, backend)


def _bert_normalizer(normalizer: dict | None) -> dict:
    """The BertNormalizer in a tokenizer.json's normalizer, which may be a Sequence; empty where there is none."""
    if not normalizer or normalizer["type"] == "BertNormalizer":
        return normalizer or {}
    return next(filter(None, map(_bert_normalizer, normalizer.get("normalizers", []))), {})
