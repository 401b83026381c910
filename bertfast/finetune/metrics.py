"""The numbers tasks are judged by, higher is better, from the libraries the field quotes them from.

scikit-learn (F1, MCC), SciPy (correlations), seqeval (spans): the extra `bertfast[metrics]`. SQuAD's exact match and F1
follow the official evaluation script's rules (Rajpurkar et al. 2016).
"""

import importlib
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from bertfast.files import UserError

PACKAGES = {"sklearn": "scikit-learn", "scipy": "scikit-learn", "seqeval": "seqeval", "sacrebleu": "sacrebleu",
            "rouge_score": "rouge-score"}


def need(module: str):
    """A metric library. Raises UserError that says what to install; call it before training, not after."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module.partition(".")[0]]
        raise UserError(f"this task is scored with {package}, which is not installed: "
                        f"pip install 'bertfast[metrics]'") from error


def classification(gold: Sequence[int], guess: Sequence[int], n_labels: int) -> dict[str, float]:
    """Accuracy; F1 of the second label where there are two, else the mean of the labels in `gold`; Matthews."""
    sklearn = need("sklearn.metrics")
    average = {"average": "binary"} if n_labels == 2 else {"average": "macro", "labels": sorted(set(gold))}
    return {
        "accuracy": float(np.mean(np.array(gold) == np.array(guess))),
        "f1": float(sklearn.f1_score(gold, guess, zero_division=0, **average)),
        "mcc": float(sklearn.matthews_corrcoef(gold, guess)),
    }


def multi_label(gold: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Of 0/1 tables (examples, labels): F1 over all decisions, mean F1 of the labels, share of rows all right."""
    f1 = lambda average: float(need("sklearn.metrics").f1_score(gold, guess, average=average, zero_division=0))
    return {"f1": f1("micro"), "macro_f1": f1("macro"), "accuracy": float((gold == guess).all(1).mean())}


def correlation(gold: Sequence[float], guess: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant. Raises UserError for a guess that is no number."""
    stats = need("scipy.stats")
    if not np.isfinite(guess).all():
        raise UserError("the model's predictions are not numbers any more; try a lower --lr")
    mse = float(np.mean((np.array(gold) - np.array(guess)) ** 2))
    if len(set(gold)) < 2 or len(set(guess)) < 2:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    return {"pearson": float(stats.pearsonr(gold, guess)[0]), "spearman": float(stats.spearmanr(gold, guess)[0]),
            "mse": mse}


def tags(gold: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    """Share of words with the right tag."""
    pairs = [a == b for x, y in zip(gold, guess) for a, b in zip(x, y)]
    return {"accuracy": float(np.mean(pairs))}


def spans(gold: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans (as conlleval counts them), and the words' accuracy."""
    seqeval = need("seqeval.metrics")
    # BILOU as BIOES, which seqeval knows; its old versions take a kind from the last hyphen on, of "B" the letter
    known = lambda tag: {"U": "S", "L": "E"}.get(tag[0], tag[0]) + "-" + tag[2:].replace("-", "\0")
    gold, guess = ([[known(tag) for tag in row] for row in rows] for rows in (gold, guess))
    with warnings.catch_warnings():  # a model that predicts no span yet is no reason to warn
        warnings.simplefilter("ignore")
        values = {name: float(getattr(seqeval, f"{name}_score")(gold, guess)) for name in ("f1", "precision", "recall")}
    return {**values, **tags(gold, guess)}


def normalised(answer: str) -> list[str]:
    """SQuAD's words of an answer: lower case, no punctuation, no articles."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answers(gold: list[list[str]], guess: list[str]) -> dict[str, float]:
    """Exact match and word F1, each against the gold answer it fits best; none that has words: "" is right."""
    exact, f1 = [], []
    for references, text in zip(gold, guess):
        words = normalised(text)
        golds = [found for found in map(normalised, references) if found] or [[]]
        exact.append(words in golds)
        f1.append(max(_overlap(found, words) for found in golds))
    return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def texts(references: list[list[str]], guess: list[str]) -> dict[str, float]:
    """Corpus BLEU against all references, in [0, 1], and the mean over texts of the best ROUGE-L F1."""
    sacrebleu, rouge = need("sacrebleu"), need("rouge_score.rouge_scorer")
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    scorer = rouge.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=_words))
    best = [max(scorer.score(reference, text)["rougeL"].fmeasure for reference in row)
            for row, text in zip(references, guess)]
    return {"bleu": sacrebleu.corpus_bleu(guess, columns).score / 100, "rouge_l": float(np.mean(best))}


def _words(text: str) -> list[str]:
    """rouge_score's words, in lower case and without punctuation, but of any alphabet; an ideograph is one.

    Combining marks (most vowels of Hindi) continue a word: two that differ in them are two, though `re` parts them.
    """
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
    return re.findall(r"[\u3400-\u9fff]|\w[^\s\u3400-\u9fff]*", kept)


def _overlap(gold: list[str], guess: list[str]) -> float:
    if not gold or not guess:
        return float(gold == guess)
    common = sum((Counter(gold) & Counter(guess)).values())
    return 2 * common / (len(gold) + len(guess))
