"""Fine-tuning end to end: every task learns, transformers scores its checkpoint the same, faults are explained."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from rouge_score import rouge_scorer
from safetensors.torch import load_file
from typer.testing import CliRunner

import bertfast
import bertfast.heads
from bertfast import cli, machine
from bertfast.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertfast.files import UserError, locked
from bertfast.finetune import metrics, predict, show, train, write
from bertfast.finetune.batches import by_budget, epoch_batches, pack
from bertfast.finetune.predict import Predictor, json_line, predict_file, run
from bertfast.finetune.read import Row, open_table
from bertfast.finetune.tag import Tagging
from bertfast.finetune.task import Example, Settings
from bertfast.finetune.tasks import TASKS
from bertfast.finetune.train import FineTuning, Window, finetune, freeze, layer_scale
from bertfast.model import unpad
from bertfast.optim import linear_schedule
from bertfast.step_graph import StepGraph

FILLER = "the a cat dog house tree walked over under green small river near with some old".split()
DIGITS = "one two three four five".split()


def sentence(rng, *special):
    words = rng.choices(FILLER, k=rng.randint(2, 12))
    for word in special:
        words.insert(rng.randint(0, len(words)), word)
    return words


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An encoder that has learnt nothing yet, with a vocabulary of the words below."""
    folder = tmp_path_factory.mktemp("start")
    rng = random.Random(0)
    names = ["good", "bad", "Paris", "yes", "no", "where", "is", "it"]
    Tokenizer.train([" ".join(sentence(rng, *DIGITS, *names)) for _ in range(50)], 200, cased=True).save(folder)
    torch.manual_seed(0)
    model = bertfast.BertModel(bertfast.BertConfig(
        vocab_size=Tokenizer.load(folder).vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    ))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The share of peak that is printed is no matter here, and measuring the peak takes longer than a test."""
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: 1e11)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def classification(rng, path):
    words = {"good": "positive", "bad": "negative"}
    lines = [f"{' '.join(sentence(rng, w))}\t{words[w]}" for w in rng.choices(list(words), k=160)]
    path.with_suffix(".tsv").write_text("sentence\tlabel\n" + "\n".join(lines))
    return ".tsv", {}


def pairs(rng, path):
    rows = ["Quality,#1 String,#2 String"]
    for _ in range(160):
        word = rng.choice(["good", "bad"])
        rows.append(f'{int(word == "good")},"{" ".join(sentence(rng))}, then",{" ".join(sentence(rng, word))}')
    path.with_suffix(".csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    return ".csv", {"metric": "f1"}


def multi_label(rng, path):
    rows = []
    for _ in range(200):
        found = [w for w in ("good", "Paris", "five") if rng.random() < 0.4]
        rows.append({"text": " ".join(sentence(rng, *found)), "labels": found})
    write_rows(path.with_suffix(".jsonl"), rows)
    return ".jsonl", {"multi_label": True, "steps": 120}


def regression(rng, path):
    digits = rng.choices(range(5), k=200)
    write_rows(path.with_suffix(".jsonl"), [
        {"sentence1": " ".join(sentence(rng)), "sentence2": " ".join(sentence(rng, DIGITS[d])), "score": d / 2}
        for d in digits])
    return ".jsonl", {"symmetric": True, "steps": 120}


def tagging(rng, path):
    lines = []
    for _ in range(120):
        words = sentence(rng, rng.choice(["Paris", "Paris dog"]))
        for word in " ".join(words).split():
            lines.append(f"{word}\tX\t{'I-LOC' if word == 'Paris' else 'O'}")  # IOB1
        lines.append("")
    path.with_suffix(".conll").write_text("\n".join(lines))
    return ".conll", {}


def qa(rng, path):
    questions = []
    for i in range(160):
        digit = rng.choice(DIGITS)
        context = " ".join(sentence(rng, digit, *["near"] * 5))
        questions.append({"context": context, "qas": [{
            "id": f"q{i}", "question": "where is it ?",
            "answers": [{"text": digit, "answer_start": context.index(digit)}],
        }]})
    path.with_suffix(".json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": questions}]}))
    return ".json", {"max_length": 24, "stride": 4, "steps": 150}


def multiple_choice(rng, path):
    rows = []
    for _ in range(120):
        label = rng.randint(0, 2)
        options = [" ".join(sentence(rng, "yes" if i == label else "no")) for i in range(3)]
        rows.append({"context": " ".join(sentence(rng)), "question": "where is it", "answer": "ABC"[label],
                     **{f"ending{i}": option for i, option in enumerate(options)}})
    write_rows(path.with_suffix(".jsonl"), rows)
    return ".jsonl", {"steps": 100}


def seq2seq(rng, path):
    digits = rng.choices(DIGITS, k=160)
    write_rows(path.with_suffix(".jsonl"),
               [{"source": " ".join(sentence(rng, d)), "target": f"it is {d} house"} for d in digits])
    return ".jsonl", {"steps": 150, "eval_every": 150, "max_target_length": 12}


KINDS = {  # name: (task, maker of data)
    "classification": ("classification", classification), "pairs": ("classification", pairs),
    "multi-label": ("classification", multi_label), "regression": ("regression", regression),
    "tagging": ("tagging", tagging), "seq2seq": ("seq2seq", seq2seq), "prefix-lm": ("seq2seq", seq2seq),
    "qa": ("qa", qa), "multiple-choice": ("multiple-choice", multiple_choice),
}


def settings(kind, start, folder, **changes):
    """A train and a dev file of a kind in `folder`, and the settings to learn it."""
    task, maker = KINDS[kind]
    ending, extra = maker(random.Random(1), folder / "train")
    if kind == "prefix-lm":
        extra["style"] = kind
    maker(random.Random(2), folder / "dev")
    return Settings(**{
        **dict(task=task, model=str(start), train=str(folder / f"train{ending}"), dev=str(folder / f"dev{ending}"),
               steps=60, batch_size=16, lr=3e-3, precision="fp32", eval_every=30), **extra, **changes,
    })


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def by_transformers(kind, folder, chosen, max_length):
    """Predictions of transformers' own classes and tokenizer, one example at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder)
    assert tokenizer.vocab_size
    call = lambda *texts, **kw: model(**tokenizer(*texts, return_tensors="pt", **kw))
    for example in chosen:
        if kind == "prefix-lm":  # transformers loads the weights, but has no such mask
            yield {}
        elif kind == "seq2seq":
            ids = model.generate(**{k: v for k, v in tokenizer(example.inputs[0], return_tensors="pt").items()
                                    if k != "token_type_ids"}, max_new_tokens=12, num_beams=1, do_sample=False)
            yield {"text": tokenizer.decode(ids[0], skip_special_tokens=True)}
        elif kind == "tagging":
            encoding = tokenizer(example.inputs, is_split_into_words=True, return_tensors="pt")
            guess = model(**encoding).logits[0].argmax(-1)
            words = encoding.word_ids()
            yield {"tags": [model.config.id2label[int(guess[words.index(i)])] for i in range(len(example.inputs))]}
        elif kind == "regression":
            a, b = example.inputs
            yield {"score": (call(a, b).logits + call(b, a).logits).item() / 2}
        elif kind == "multiple-choice":
            context, question, options = example.inputs
            encoding = tokenizer([context] * len(options), [question + o for o in options], return_tensors="pt",
                                 padding=True)
            yield {"scores": model(**{k: v[None] for k, v in encoding.items()}).logits[0].softmax(-1).tolist()}
        elif kind == "qa":
            _, question, context = example.inputs
            encoding = tokenizer(question, context, truncation="only_second", max_length=max_length, stride=4,
                                 return_overflowing_tokens=True, return_offsets_mapping=True)
            spans = []
            for i in range(len(encoding["input_ids"])):
                out = model(**{k: torch.tensor([encoding[k][i]]) for k in ("input_ids", "token_type_ids")})
                inside = [j for j, s in enumerate(encoding.sequence_ids(i)) if s == 1]
                spans += [(float(out.start_logits[0, a] + out.end_logits[0, b]),
                           context[encoding["offset_mapping"][i][a][0] : encoding["offset_mapping"][i][b][1]])
                          for a in inside for b in inside if b >= a]
            yield {"answer": max(spans)[1]}
        else:
            logits = call(*example.inputs).logits[0]
            p = logits.sigmoid() if kind == "multi-label" else logits.softmax(-1)
            yield {"scores": {model.config.id2label[i]: float(v) for i, v in enumerate(p)}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_learns_and_its_checkpoint_scores_the_same(kind, start, tmp_path, capsys):
    chosen = settings(kind, start, tmp_path)
    out = tmp_path / "run"
    summary = finetune(out, chosen, "")
    assert summary["best"][summary["metric"]] > 0.9, summary
    printed = capsys.readouterr().out
    assert "example 3, " in printed and "[CLS]" in printed
    assert json.loads((out / "metrics.json").read_text()) == summary
    rows = read_lines(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(10, chosen.steps + 1, 10))
    names = {"loss.png", "predictions.jsonl", "metrics.json", "metrics.jsonl", "config.json", "checkpoint"}
    confusion = {"confusion.png"} if kind in ("classification", "pairs") else set()
    assert {p.name for p in out.iterdir()} == names | confusion
    predictions = read_lines(out / "predictions.jsonl")
    predictor = Predictor(out, "fp32")
    result = predict_file(predictor, chosen.dev, tmp_path / "again.jsonl")
    again = read_lines(tmp_path / "again.jsonl")
    assert result["rows"] == len(again) == len(predictions)
    assert all({k: v for k, v in p.items() if k not in ("example", "gold")} == q for p, q in zip(predictions, again))
    work = FineTuning(out, chosen)
    assert set(summary["mean"]) == set(work.task.metrics)
    assert {**summary["best"], **work.task.score(work.dev_examples, again)} == summary["best"]
    theirs = by_transformers(kind, out / "checkpoint", work.dev_examples[:25], chosen.max_length)
    for ours, their in zip(again, theirs):
        for key, value in their.items():
            assert ours[key] == (pytest.approx(value, abs=2e-5) if key.startswith("score") else value)


def test_a_run_is_a_function_of_its_seed(start, tmp_path):
    """Bit for bit; and packing does not change what is computed, only how it is rounded."""
    def final(**changes):
        work = FineTuning(tmp_path, settings("tagging", start, tmp_path, steps=8, dropout=0.1, **changes))
        models, step = [], work.train_step
        work.train_step = lambda model, *rest: (models.append(model), step(model, *rest))[1]
        work._train_seed(changes.get("seed", 1))
        return torch.cat([p.detach().flatten() for p in models[0].parameters()])

    first = final()
    assert torch.equal(first, final())
    assert not torch.equal(first, final(seed=2))
    torch.testing.assert_close(final(tokens=64), first, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_computes_what_the_exact_one_does(kind, start, tmp_path, monkeypatch):
    """Rounded shapes and several batches change the rounding alone; captured or launched, the same bits.

    On a CPU a replay is a call.
    """
    def capture(graph):
        graph.warm_up()
        return SimpleNamespace(replay=graph.step, pool=lambda: None)

    def final(replayed, tokens, graphs=64):
        monkeypatch.setattr(train, "GRAPHS", graphs)
        work = FineTuning(tmp_path, settings(kind, start, tmp_path, steps=6, dropout=0.1, tokens=tokens))
        model = work.model_for(1)
        optimizer, batches, window, gradients = work.optimizer_for(model), work.batches(1), Window(), []
        work.replayed, update = replayed, optimizer.step

        def watched(lr):
            optimizer._collect_sinks()
            gradients.append(torch.cat([g.flatten() for group in optimizer.groups for g in group.gradients()]))
            return update(lr)

        monkeypatch.setattr(optimizer, "step", watched)
        for step in range(1, 7):
            work.train_step(model, optimizer, next(batches), 1, step, window)
        captured = sum(graph is not None for graph in work.graphs.values())
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return weights, gradients[0], float(window.loss), captured

    monkeypatch.setattr(StepGraph, "capture", capture)
    _, gradient, loss, _ = final(False, 4096)
    for tokens in (4096, 128):  # one batch a step, and several
        _, exact, _, captured = final(False, tokens)
        torch.testing.assert_close(exact, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert captured == 0
        launched, rounded_gradient, launched_loss, captured = final(True, tokens, graphs=0)
        assert captured == 0 and launched_loss == pytest.approx(loss, rel=1e-3)
        torch.testing.assert_close(rounded_gradient, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        replayed, _, replayed_loss, captured = final(True, tokens)
        assert captured > 0 or tokens == 128
        assert replayed_loss == launched_loss and torch.equal(replayed, launched)


def test_seeds_are_reported_with_mean_and_spread(start, tmp_path):
    summary = finetune(tmp_path / "run", settings("classification", start, tmp_path, steps=20, eval_every=None,
                                                  seeds=3, patience=1), "")
    assert [r["seed"] for r in summary["seeds"]] == [1, 2, 3]
    values = [r["accuracy"] for r in summary["seeds"]]
    assert summary["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert summary["std"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert summary["best"]["accuracy"] == max(values)
    with pytest.raises(UserError, match="already holds"):
        finetune(tmp_path / "run", settings("classification", start, tmp_path), "")


def test_a_head_goes_on_only_under_its_own_labels(start, tmp_path, capsys):
    finetune(tmp_path / "run", settings("classification", start, tmp_path, steps=1), "")
    checkpoint = tmp_path / "run/checkpoint"
    old = load_file(checkpoint / "model.safetensors")["classifier.weight"]

    def heads(**changes):
        chosen = settings("classification", checkpoint, tmp_path)
        work = FineTuning(tmp_path, replace(chosen, **changes))
        capsys.readouterr()
        found = [work.model_for(seed).classifier.weight for seed in (1, 2)]
        return found, capsys.readouterr().out

    (first, second), printed = heads()
    assert torch.equal(first, old) and torch.equal(second, old)
    assert printed.count("kept: classifier.bias, classifier.weight") == 2 and "anew" not in printed
    others = {"labels": {"task": "classification"}, "class": {"task": "tagging", "text": "tokens", "label": "label"}}
    for name, changes in others.items():
        rows = [{"text": "a", "tokens": ["a"], "label": x if name == "labels" else [x]} for x in ("good", "bad") * 9]
        write_rows(tmp_path / "other.jsonl", rows)
        (first, second), printed = heads(train=str(tmp_path / "other.jsonl"), dev=None, **changes)
        assert first.shape == old.shape and not any(map(torch.equal, (first, second, first), (second, old, old))), name
        assert printed.count("initialised anew: classifier.bias, classifier.weight") == 2 and "kept" not in printed


def test_an_encoder_decoder_goes_on(start, tmp_path):
    finetune(tmp_path / "run", settings("seq2seq", start, tmp_path, steps=1), "")
    checkpoint = tmp_path / "run/checkpoint"
    work = FineTuning(tmp_path, settings("seq2seq", checkpoint, tmp_path))
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in work.model_for(1).state_dict().items())
    with pytest.raises(UserError, match="is not a BERT configuration"):
        FineTuning(tmp_path, settings("classification", checkpoint, tmp_path)).model_for(1)


def test_freezing_and_layer_decay(start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=4)
    work = FineTuning(tmp_path, chosen)
    before = {n: p.clone() for n, p in work.model_for(1).named_parameters()}
    for what, moving in {"none": ("embeddings", "layer.0", "layer.1", "pooler", "classifier"),
                         "embeddings": ("layer.0", "layer.1", "pooler", "classifier"),
                         "1": ("layer.1", "pooler", "classifier"), "all": ("pooler", "classifier")}.items():
        chosen.freeze = what
        finetune(tmp_path / f"run-{what}", chosen, "")
        model = bertfast.BertForSequenceClassification.from_pretrained(tmp_path / f"run-{what}" / "checkpoint")
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {n for n in before if any(part in n for part in moving)} == moved, what
    with pytest.raises(UserError, match="--freeze 3"):
        freeze(model, "3")
    scale = layer_scale(model.config, 0.5)
    assert [scale(n) for n in ("classifier.weight", "bert.encoder.layer.1.output.dense.weight",
                               "bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.bias")
            ] == [1.0, 0.5, 0.25, 0.125]


def test_a_lower_layer_moves_by_its_share_of_the_learning_rate(start, tmp_path):
    work = FineTuning(tmp_path, settings("classification", start, tmp_path, layer_decay=0.5, weight_decay=0.0))
    model = work.model_for(1)
    optimizer = work.optimizer_for(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    moved = {n: float((before[n] - p.detach()).mean()) for n, p in model.named_parameters()}
    assert [moved[n] for n in ("classifier.bias", "bert.encoder.layer.1.output.dense.weight",
                               "bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.bias")
            ] == pytest.approx([0.1, 0.05, 0.025, 0.0125], rel=1e-3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_the_best(number, code, start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=100_000, eval_every=5)
    arguments = ["finetune", "--out", str(tmp_path / "run"), "--steps", "100000", "--eval-every", "5"]
    for name in ("task", "model", "train", "dev", "lr", "precision"):
        arguments += [f"--{name}", str(getattr(chosen, name))]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job of a shell would ignore it
    process = subprocess.Popen([sys.executable, "-c", "from bertfast.cli import main; main()", *arguments],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "predictions.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert "the best so far" in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["accuracy"] > 0
    assert Predictor(tmp_path / "run", "fp32").settings == Settings(**{**vars(chosen), "batch_size": 32})


# ---- batches


def test_epochs_are_fair_and_balanced():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 200, 5000)
    batches = epoch_batches(lengths, 32, seed=1, epoch=0)
    assert len(batches) == -(-5000 // 32)
    assert sorted(np.concatenate(batches)) == list(range(5000))
    assert {len(b) for b in batches} <= {31, 32}
    sums = np.array([lengths[b].sum() for b in batches if len(b) == 32])
    assert sums.std() / sums.mean() < 0.03 < 0.09 < lengths.std() / lengths.mean() / 32**0.5
    same, other = epoch_batches(lengths, 32, 1, 0), epoch_batches(lengths, 32, 1, 1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, same)) and not np.array_equal(batches[0], other[0])
    assert [len(b) for b in epoch_batches(lengths[:5], 32, 1, 0)] == [5]


def test_long_sentences_are_read_in_windows_each_word_once(start, capsys):
    tokenizer = Tokenizer.load(start)
    task = Tagging(Settings("tagging", str(start), "train"), tokenizer, 64, ["N", "V"])
    words = [random.Random(3).choice([*FILLER, "Parisgood", "goodbadgood"]) for _ in range(10_000)]
    items = task.items([Example("here", words, None), Example("there", ["cat", "\u200b", "dog"], ["N", "V", "N"])])
    assert all(item.n_tokens <= 64 for item in items)
    assert sorted(w for item in items[:-1] for w in item.extra) == list(range(10_000))
    for item in items[:-1]:
        (one,) = item.sequences
        for position, word in zip(one.reads, item.extra):
            pieces = tokenizer.backend.encode(words[word], add_special_tokens=False).ids
            assert one.ids[position] == pieces[0]
            assert list(one.ids[position : position + len(pieces)]) == pieces  # no word is cut where it is read
            inner = 1 < position < 62
            assert inner or word in (items[0].extra[0], items[-2].extra[-1])
    assert list(items[-1].sequences[0].labels) == [0, 1, 0]
    assert task.counts["words without a readable character, read as [UNK]"] == 1


@pytest.mark.parametrize(("stride", "shared"), [(128, 128), (20, 20), (300, 128)])
def test_windows_of_a_context_share_what_was_asked(stride, shared, start):
    """Or a third, which a question of half a window leaves room for; and say so."""
    task = TASKS["qa"](Settings("qa", str(start), "train", stride=stride), Tokenizer.load(start), 512)
    items = task.items([Example("here", ("1", "where is it", "cat " * 1000), None)])
    first, second = ([tuple(x) for x in offsets[begin:end]] for offsets, begin, end in (i.extra for i in items[:2]))
    assert len(set(first) & set(second)) == shared and items[0].n_tokens == 384
    assert list(task.counts) == [f"contexts of more than 384 tokens, read in windows that share {shared} (--stride)"]


def test_a_length_beyond_the_positions_is_told(start):
    given = {"style": "prefix-lm", "max_target_length": 40, "max_length": 60}
    for changes, length, told in [
        ({"max_target_length": 70}, 63, {"tokens of a target at most, not 70: the model has 64 positions": 63}),
        (given, 32, {"tokens of a target at most, not 40: the model has 64 positions": 32,
                     "tokens of a source at most, not 60: the target has the other positions": 32}),
        ({**given, "max_target_length": 4}, 4, {}),
    ]:
        task = TASKS["seq2seq"](Settings("seq2seq", str(start), "train", **changes), Tokenizer.load(start), 64)
        assert (task.longest, task.counts) == (length, told)


def test_outputs_do_not_depend_on_the_budget(start, tmp_path):
    work = FineTuning(tmp_path, settings("qa", start, tmp_path))
    model = work.model_for(1).eval()
    whole, small = (run(model, work.task, work.dev_items, tokens) for tokens in (100_000, 64))
    assert len(by_budget(work.dev_items, 64)) > 30
    for a, b in zip(whole, small):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    batch, _ = work.task.call(work.dev_items[:3])
    assert batch.n_tokens == len(batch.input_ids) == sum(i.n_tokens for i in work.dev_items[:3])
    assert pack(work.dev_items[0].sequences, first=7).row_key[0] == 7 << 32


# ---- files and their faults

TABLES = {  # name: (file name, content, options) -> rows or error
    "bom": ("a.tsv", b"\xef\xbb\xbfid\ttext\n1\tcaf\xc3\xa9\n", {}, [{"id": "1", "text": "café"}]),
    "latin-1": ("a.tsv", b"text\tlabel\ncaf\xe9\tx\n", {}, [{"text": "café", "label": "x"}]),
    "windows-1252": ("a.csv", "text,label\nI don\u2019t \u2013 \u201cnever\u201d,caf\xe9\n".encode("cp1252"), {},
                     [{"text": "I don\u2019t \u2013 \u201cnever\u201d", "label": "café"}]),
    "latin-1 with a control character": ("a.tsv", b"text\na\x81caf\xe9\n", {}, [{"text": "a\x81café"}]),
    "utf-16": ("a.tsv", "text\tlabel\ncafé\tx\n".encode("utf-16"), {}, [{"text": "café", "label": "x"}]),
    "stray quotes": ("a.tsv", b'text\tlabel\nhe said "no\tx\n"quoted" word\ty\n', {},
                     [{"text": 'he said "no', "label": "x"}, {"text": '"quoted" word', "label": "y"}]),
    "quoted tsv": ("a.tsv", b'text\tlabel\n"a ""b""\tc"\tx\n"d"\ty\n', {},
                   [{"text": 'a "b"\tc', "label": "x"}, {"text": "d", "label": "y"}]),
    "crlf": ("a.csv", b'text,label\r\n"two\r\nlines, one field",x\r\n', {},
             [{"text": "two\r\nlines, one field", "label": "x"}]),
    "no header": ("a.tsv", b"x\tone\textra\ny\ttwo\n", {"columns": ["label", "text"]},
                  [{"label": "x", "text": "one"}, {"label": "y", "text": "two"}]),
    "a header besides names": ("a.tsv", b"Label\ttext\textra\nx\tone\t\ny\ttwo\t\nlabel\ttext\t\n",
                               {"columns": ["label", "Text"]},
                               [{"label": "x", "Text": "one"}, {"label": "y", "Text": "two"},
                                {"label": "label", "Text": "text"}]),
    "a header of words besides names": ("a.conll", b"\nword  tag\nEU O\n\nword tag\n",
                                        {"words": True, "columns": ["word", "tag"]},
                                        [{"word": ["EU"], "tag": ["O"]}, {"word": ["word"], "tag": ["tag"]}]),
    "line separator is no line end": ("a.tsv", "text\tlabel\na\u2028b\x85c\tx\n".encode(), {},
                                      [{"text": "a\u2028b\x85c", "label": "x"}]),
    "jsonl": ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}', {},
              [{"text": "a", "label": 1}, {"text": "b", "label": 0}]),
    "conll": ("a.conll", b"-DOCSTART- -X- O\n\nEU NNP B-ORG\n# NN O\n\nx y z\n", {"words": True},
              [{"1": ["EU", "#"], "2": ["NNP", "NN"], "3": ["B-ORG", "O"]}, {"1": ["x"], "2": ["y"], "3": ["z"]}]),
    "conll with comments": ("a.conll", b"\n# sent_id = 1\nEU NNP I-NP O\n# NN I-NP O\n\n# sent_id = 2\nx y z O\n",
                            {"words": True},
                            [{"1": ["EU", "#"], "2": ["NNP", "NN"], "3": ["I-NP", "I-NP"], "4": ["O", "O"]},
                             {"1": ["x"], "2": ["y"], "3": ["z"], "4": ["O"]}]),
    "conll that begins with a hashtag": ("a.conll", b"#x O\n# O\n\n# O\n", {"words": True},
                                         [{"1": ["#x", "#"], "2": ["O", "O"]}, {"1": ["#"], "2": ["O"]}]),
    "blank lines with tabs": ("a.tsv", b"a\tO\n\t\nb\tX\n", {"words": True},
                              [{"1": ["a"], "2": ["O"]}, {"1": ["b"], "2": ["X"]}]),
    "conllu": ("a.conllu", b"#newdoc\n# text = vamonos\n1-2\tvamonos" + b"\t_" * 8 + b"\n1\tvamos\t_\tVERB" + b"\t_" * 6
               + b"\n1.1\tx\t_\tY" + b"\t_" * 6 + b"\n2\tnos\t_\tPRON" + b"\t_" * 6, {"words": True},
               {"form": ["vamos", "nos"], "upos": ["VERB", "PRON"]}),
    "conllu after files with other names": (
        "a.conllu", b"1\tvamos\t_\tVERB" + b"\t_" * 6, {"words": True, "columns": ["form", "upos", "xpos"]},
        {"form": ["vamos"], "upos": ["VERB"], "xpos": ["_"]}),
    "blank lines in one column": ("a.csv", b"text\na\n\nb\n\n", {}, [{"text": "a"}, {"text": ""}, {"text": "b"}]),
    "blank lines in two": ("a.csv", b"text,label\n\na,x\n\nb,y\n\n", {},
                           [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]),
    "fields": ("a.tsv", b"text\tlabel\none\tx\ntwo\n", {}, "a.tsv:3: 1 fields, but the header on line 1 names 2"),
    "csv quote": ("a.csv", b'text,label\n"one" two,x\n', {}, "a.csv:2: "),
    "jsonl fault": ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "a.jsonl:2: not JSON"),
    "blank lines first": ("a.tsv", b"\n\ntext\tlabel\none\n", {},
                          "a.tsv:4: 1 fields, but the header on line 3 names 2"),
    "an object a line in .json": ("a.json", b'{"text": "a"}\n{"text": "b", "label": 0}\n', {},
                                  [{"text": "a"}, {"text": "b", "label": 0}]),
    "utf-16 cut off": ("a.tsv", "text\tlabel\na\tx\n".encode("utf-16")[:-1], {},
                       "a.tsv is UTF-16, but damaged or cut off"),
    "deep json": ("a.json", b"[" * 100_000, {}, "a.json is not JSON"),
    "deep jsonl": ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, {}, "a.jsonl:2: not JSON"),
    "conll without a tag": ("a.conll", b"EU\t\nx\tO\n", {"words": True}, [{"1": ["EU", "x"], "2": ["", "O"]}]),
    "empty": ("a.tsv", b"", {}, "a.tsv is empty"),
    "compressed": ("a.tsv.gz", b"\x1f\x8b", {}, "is compressed: unpack it first"),
    "squad fault": ("a.json", b'{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1}]}]}]}', {}, "question 1"),
    "conll fault": ("a.conll", b"a O\nb\n", {"words": True}, "a.conll:2: 1 fields, but the first word has 2"),
}


@pytest.mark.parametrize("case", TABLES)
def test_files_are_understood_or_explained(case, tmp_path):
    name, content, options, expected = TABLES[case]
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected.replace("(", r"\(")):
            list(open_table(tmp_path / name, **options))
        return
    rows = [row.values for row in open_table(tmp_path / name, **options)]
    if isinstance(expected, dict):
        assert len(rows) == 1 and {k: rows[0][k] for k in expected} == expected
    else:
        assert rows == expected


def test_columns_are_those_of_all_objects(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "text_pair": "c"}, {"label": 1}]
    for name, content in {"a.jsonl": "\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows)}.items():
        (tmp_path / name).write_text(content)
        assert open_table(tmp_path / name).columns == ["text", "text_pair", "label"], name


FAULTS = {  # name: (task, content of train.tsv or .jsonl, options, what the one line must say)
    "no label": ("classification", "text\tlabel\na\tx\nb\t\n", {}, "train.tsv:3: no label in label"),
    "which column": ("classification", "phrase\tlabel\na\tx\n", {}, "Name it with --text; there are: phrase, label"),
    "which key": ("classification", '{"phrase": "a", "label": "x"}', {}, "there are: phrase, label$"),
    "which field": ("classification", "phrase\tlabel\na\tx\n", {}, "(no header? Name the columns with --columns)$"),
    "no such column": ("classification", "text\tlabel\na\tx\n", {"text_pair": "b"}, "has no column 'b'"),
    "one label": ("classification", "text\tlabel\na\tx\nb\tx\n", {}, "only one label"),
    "no number": ("regression", "text\tscore\na\tx\n", {}, "train.tsv:2: score is 'x', not a number"),
    "huge number": ("regression", '{"text": "a", "score": 1' + "0" * 400 + "}", {}, "not a number"),
    "nan": ("regression", "text\tscore\na\tnan\n", {}, "train.tsv:2: score is 'nan', not a number"),
    "tags": ("tagging", '{"tokens": ["a", "b"], "tags": ["X"]}', {}, "train.jsonl:1: 2 words, but 1 tags"),
    "option": ("multiple-choice", "text\tchoice1\tchoice2\tlabel\na\tb\t\t0\n", {},
               "train.tsv:2: option 2 of 2 is missing"),
    "number as option": ("multiple-choice", '{"text": "a", "choices": ["b", 3], "label": 0}', {},
                         "train.jsonl:1: option 2 of 2 is 3, not text"),
    "label nan": ("classification", '{"text": "a", "label": NaN}', {}, "train.jsonl:1: no label in label"),
    "label object": ("classification", '{"text": "a", "label": {"x": 1}}', {}, "label is {'x': 1}, not a label"),
    "choice": ("multiple-choice", "text\tchoice1\tchoice2\tlabel\na\tb\tc\t3\n", {}, "label '3' names none of the 2"),
    "choice of those that count from 1": (
        "multiple-choice", "text\tchoice1\tchoice2\tlabel\n" + "a\tb\tc\t2\n" * 5 + "a\tb\tc\t3\n", {},
        "train.tsv:7: label '3' names none of the 2"),
    "answer": ("qa", '{"context": "abc", "question": "x", "answers": {"text": ["b"], "answer_start": [0]}}', {},
               "the answer 'b' is not at character 0"),
    "metric": ("classification", "text\tlabel\na\tx\nb\ty\n", {"metric": "bleu"}, "this task has accuracy, f1, mcc"),
    "length": ("classification", "text\tlabel\na\tx\nb\ty\n", {"max_length": 65}, "the model has 64 positions"),
    "task": ("summary", "text\tlabel\na\tx\nb\ty\n", {}, "task 'summary' is unknown"),
    "symmetric": ("regression", "text\tscore\na\t1\nb\t2\n", {"symmetric": True}, "--symmetric needs pairs"),
    "the text as label": ("classification", "text\tlabel\na\tx\nb\ty\n", {"label": "text"}, "Name it with --text"),
    "one column as two": ("classification", "text\tlabel\na\tx\nb\ty\n", {"text": "text", "label": "text"},
                          "column 'text' cannot be both text and label"),
    **{f"length penalty {value}": ("seq2seq", "source\ttarget\na\tb\n", {"beams": 2, "length_penalty": value},
                                   "--length-penalty must be between -10 and 10")
       for value in (float("nan"), float("inf"), 1000.0, -1000.0)},
    "style": ("seq2seq", "source\ttarget\na\tb\n", {"style": "decoder"}, "--style decoder: say encoder-decoder or"),
    **{f"features and {name}": ("classification", "text\tlabel\na\tx\nb\ty\n", {"features": True, name: value},
                                "--features trains no part of the encoder: remove --freeze and --layer-decay")
       for name, value in (("freeze", "all"), ("layer_decay", 0.5))},
    "twice": ("classification", "text\ttext\tlabel\na\tb\tx\n", {}, "two columns have the same name"),
    "half a character": ("classification", '{"text": "a \\ud83d", "label": "x"}', {},
                         "train.jsonl:1: half of a character"),
    "scalar answer": ("qa", '{"context": "abc", "question": "x", "answers": {"text": "b", "answer_start": 1}}', {},
                      "train.jsonl:1: answers needs a list of texts"),
    "answer without start": ("qa", '{"context": "abc", "question": "x", "answers": {"text": ["b", "c"], '
                             '"answer_start": [1]}}', {}, "train.jsonl:1: answers needs a list of texts"),
    "pair of a tagging": ("tagging", "1\tX\n", {"text_pair": "1"},
                          "--text-pair is for classification and regression and multiple-choice and qa"),
    "tags of characters": ("tagging", "1\tX\n", {"characters": True, "label": "2"}, "--label has no effect beside"),
    "names of named columns": ("classification", '{"text": "a", "label": "x"}', {"columns": ["text", "label"]},
                               "train.jsonl names its own columns: remove --columns"),
    "no tags": ("tagging", '{"tokens": ["a"], "tags": [null]}', {}, "train.jsonl:1: tags is not a list of tags"),
    **{f"{name} {value}": ("classification", "text\tlabel\na\tx\nb\ty\n", {name: value}, message)
       for name, value, message in (
        ("lr", 0.0, "a learning rate of 0.0"), ("lr", float("nan"), "a learning rate of nan"),
        ("lr", 1e300, "a learning rate of 1e+300"), ("epochs", 1e308, "--epochs and --steps must be"),
        ("epochs", 0.0, "--epochs"), ("epochs", float("inf"), "--epochs"), ("max_length", 0, "--max-length 0"),
        ("dropout", 1.0, "a dropout of 1.0"), ("seed", 2**64, "does not fit"), ("weight_decay", -1.0, "--weight-decay"),
        ("label_separator", "", "--label-separator is empty"), ("choices", ["a"], "--choices is for"),
        ("beams", 4, "--beams is for seq2seq"), ("max_answer_length", 5, "--max-answer-length is for qa"),
        ("max_target_length", 5, "--max-target-length is for"), ("length_penalty", 0.0, "--length-penalty is for"),
        ("stride", 4, "--stride is for tagging and qa"), ("label_separator", ";", "needs --multi-label"),
        ("freeze", "\u00b2", "--freeze"), ("warmup", 1.5, "--warmup is a share"),
        ("layer_decay", 0.0, "--layer-decay a factor"), ("layer_decay", 1.5, "--layer-decay a factor"))},
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_one_clear_line(case, start, tmp_path):
    task, content, options, message = FAULTS[case]
    path = tmp_path / ("train.jsonl" if content.startswith("{") else "train.tsv")
    path.write_text(content)
    with pytest.raises(UserError) as error:
        finetune(tmp_path / "run", Settings(task, str(start), str(path), str(path), **options), "")
    assert message in f"{error.value}$" and "\n" not in str(error.value)


def test_decisions_are_counted_and_told(start, tmp_path, capsys):
    """A text without words, one too long, and a label that only dev has."""
    rows = [*["a cat\tx", "the dog\ty"] * 10, "\ty", "cat " * 10_000 + "\tx"]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    (tmp_path / "dev.tsv").write_text("text\tlabel\na cat\tx\nthe dog\tz\n")
    chosen = Settings("classification", str(start), str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"), steps=3,
                      precision="fp32")
    summary = finetune(tmp_path / "run", chosen, "")
    assert summary["decisions"] == {
        "rows with an empty text, kept": 1, "texts cut to 64 tokens (--max-length)": 1,
        f"dev examples with label 'z', which training never sees (first: {tmp_path / 'dev.tsv'}:3)": 1,
    }
    printed = capsys.readouterr().out
    assert all(f"decided: {n:,} {what}" in printed for what, n in summary["decisions"].items())
    assert summary["best"]["accuracy"] <= 0.5


def test_a_header_read_as_a_word_is_suspected(start, tmp_path):
    rows = "EU\tB-ORG\nrejects\tO\n\n" * 9
    told = "tag 'tag', on the first line alone (a header? Name the columns with --columns)"
    for content, columns, counts in [(rows, [], {}), (f"word\ttag\n{rows}", [], {told: 1}),
                                     (f"word\ttag\n{rows}", ["word", "tag"], {})]:
        (tmp_path / "train.tsv").write_text(content)
        chosen = Settings("tagging", str(start), *[str(tmp_path / "train.tsv")] * 2, columns=columns)
        task = FineTuning(tmp_path, chosen).task
        assert task.counts == counts and ("tag" in task.labels) == bool(counts)


def test_the_label_separator_parts_labels():
    task = TASKS["classification"](Settings("classification", "", "", multi_label=True, label_separator=";"), None, 64)
    assert task.label_of(SimpleNamespace(values={"label": "b;a"}, where="here"), "label") == ["a", "b"]
    assert task.label_of(SimpleNamespace(values={"label": [True, "a"]}, where="here"), "label") == ["a", "true"]
    task.several = False
    assert task.label_of(SimpleNamespace(values={"label": True}, where="here"), "label") == "true"  # as JSON has it


def test_numbers_of_any_size_are_told_apart():
    task = TASKS["regression"](Settings("regression", "", ""), None, 64)
    sizes = np.array([1e-7, -2e-7, 2.5, 1234567.0], np.float32)
    assert [p["score"] for p in task.predictions([], [], list(sizes[:, None]))] == [1e-7, -2e-7, 2.5, 1234567.0]


def test_training_goes_on_with_dropout_after_an_evaluation(start, tmp_path):
    work = FineTuning(tmp_path, settings("classification", start, tmp_path))
    model = work.model_for(1)
    work.evaluate(model)
    assert model.training and all(m.training for m in model.modules())


def test_every_epoch_has_an_order_of_its_own(start, tmp_path):
    batches = FineTuning(tmp_path, settings("classification", start, tmp_path)).batches(1)
    one, two = ([item.example for _ in range(10) for item in next(batches)] for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(160)) and one != two


def test_the_optimiser_is_what_the_settings_say(start, tmp_path):
    work = FineTuning(tmp_path, settings("classification", start, tmp_path, weight_decay=0.3, max_grad_norm=0.7))
    optimizer = work.optimizer_for(work.model_for(1))
    assert optimizer.max_grad_norm == 0.7 and {group.weight_decay for group in optimizer.groups} == {0.3, 0.0}


@pytest.mark.parametrize("patience", [0, 2])
def test_the_best_of_all_seeds_is_kept_and_patience_ends_a_seed(patience, start, tmp_path):
    work = FineTuning(tmp_path, settings("classification", start, tmp_path, steps=5, eval_every=1, seeds=2,
                                         patience=patience))
    found, saved = iter([0.6, 0.9, 0.9, 0.7] + [0.8] * 5), []
    work.evaluate = lambda model: (dict.fromkeys(work.task.metrics, next(found, 0.1)), [])
    work.save = lambda model, optimizer, predictions, best: saved.append((best["seed"], best["accuracy"]))
    summary = work.train()
    assert saved == [(1, 0.6), (1, 0.9)] and summary["best"]["accuracy"] == 0.9
    steps = [row["step"] for row in work.rows if "dev_accuracy" in row]
    assert steps == ([1, 2, 3, 4, 1, 2, 3] if patience else [1, 2, 3, 4, 5] * 2)


def test_questions_may_have_fewer_options_than_there_are_columns(start, tmp_path):
    write_rows(tmp_path / "train.jsonl", [
        {"text": "where is it", "choice1": "yes", "choice2": "no", "choice3": "good" if i % 2 else "", "label": i % 2}
        for i in range(8)])
    work = FineTuning(tmp_path, Settings("multiple-choice", str(start), *[str(tmp_path / "train.jsonl")] * 2, steps=1))
    assert [len(item.sequences) for item in work.train_items] == [2, 3] * 4
    assert work.task.counts["rows whose last option columns are empty: questions with fewer options"] == 8
    assert np.isfinite(work.train()["mean"]["accuracy"])


@pytest.mark.parametrize("labels", ["012", "123", "ABC", "abc"])
def test_what_choices_count_from_is_the_sets_habit(labels):
    task = TASKS["multiple-choice"](Settings("multiple-choice", "", ""), None, 64)
    task.learn([Example("here", ("where", "", ["yes", "no", "good"]), label) for label in labels], [])
    assert [task.label_ids[label] for label in labels] == [0, 1, 2]


@pytest.mark.parametrize("name", ["choice", "option", "ending", "answer", "sol", "solution", "alternative"])
def test_numbered_columns_are_options(name):
    task = TASKS["multiple-choice"](Settings("multiple-choice", "", ""), None, 64)
    for columns in ([f"{name}1", f"{name}2"], [f"{name.title()} a", f"{name.title()} b"]):
        task.find_columns(SimpleNamespace(path="", columns=["goal", *columns, "label"]))
        assert task.option_columns == columns


def test_held_out_where_there_is_no_dev_file(start, tmp_path):
    chosen = settings("classification", start, tmp_path)
    chosen.dev = None
    work = FineTuning(tmp_path, chosen)
    assert (len(work.train_examples), len(work.dev_examples)) == (144, 16)
    assert not {e.where for e in work.train_examples} & {e.where for e in work.dev_examples}


def test_a_text_is_on_one_side_of_the_split(start, tmp_path):
    rows = [{"context": f"cat {i // 3}", "choice1": "yes", "choice2": "no", "label": i % 2} for i in range(90)]
    write_rows(tmp_path / "train.jsonl", rows)
    chosen = Settings("multiple-choice", str(start), str(tmp_path / "train.jsonl"), precision="fp32")
    work = FineTuning(tmp_path, chosen)
    train, dev = ({e.inputs[0] for e in part} for part in (work.train_examples, work.dev_examples))
    assert len(dev) == 3 and len(work.dev_examples) == 9 and not train & dev
    write_rows(tmp_path / "train.jsonl", rows[:20])
    with pytest.raises(UserError, match="too few examples"):
        FineTuning(tmp_path, work.settings)


@pytest.mark.parametrize("kind", ["regression", "tagging", "qa", "prefix-lm"])
def test_bf16_trains_and_keeps_fp32_masters(kind, start, tmp_path):
    chosen = settings(kind, start, tmp_path, steps=12, eval_every=12, precision="bf16")
    finetune(tmp_path / "run", chosen, "")
    losses = [r["loss"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 2 and losses[1] < losses[0]
    work = Predictor(tmp_path / "run", "bf16")
    assert next(work.model.parameters()).dtype == torch.bfloat16
    saved = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values())
    assert not all(torch.equal(t, t.bfloat16().float()) for t in saved.values())


def test_chinese_words_from_characters(start, tmp_path):
    task = Tagging(Settings("tagging", str(start), "train", characters=True), Tokenizer.load(start), 64)
    row = next(iter(open_table_of(tmp_path, [{"tokens": ["今天", "天气", "好"]}])))
    example = task.example(row, {"words": "tokens"})
    assert example.inputs == list("今天天气好")
    assert example.label == ["B-WORD", "I-WORD", "B-WORD", "I-WORD", "B-WORD"]
    assert task.example(row._replace(values={"tokens": ["", *row.values["tokens"]]}), {"words": "tokens"}) == example
    task.learn([example], [example])
    items = task.items([example])
    guess = [np.array([task.label_ids[t] for t in ("B-WORD", "I-WORD", "I-WORD", "B-WORD", "B-WORD")])]
    (prediction,) = task.predictions([example], items, guess)
    assert prediction["words"] == ["今天天", "气", "好"]
    assert task.score([example], [prediction])["f1"] == pytest.approx(1 / 3)


def open_table_of(folder, rows):
    write_rows(folder / "rows.jsonl", rows)
    return open_table(folder / "rows.jsonl")


# ---- metrics


def test_answers_are_scored_as_squad_does():
    scores = metrics.answers([["the Cat."], [], ["a dog", "red dog"], []], ["cat", "", "big red dog", "no"])
    assert scores["exact_match"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 1 + 0.8 + 0) / 4)
    # an answer without words is none, beside others or alone
    assert metrics.answers([["The", "a cat"], ["The"], ["..."]], ["", "", "dog"])["exact_match"] == pytest.approx(1 / 3)


def test_metrics_by_hand():
    found = metrics.classification([0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 3], 4)  # 3 is not in gold: left out of the mean
    assert found["accuracy"] == pytest.approx(4 / 6) and found["f1"] == pytest.approx((6 / 7 + 2 / 3 + 0) / 3)
    assert metrics.classification([0, 0, 1, 1], [0, 1, 1, 1], 2)["f1"] == pytest.approx(0.8)
    assert metrics.classification([0, 0, 1, 1], [0, 1, 1, 1], 2)["mcc"] == pytest.approx(1 / 3**0.5)
    gold, guess = np.array([[1, 0], [1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
    found = metrics.multi_label(gold, guess)
    assert found == pytest.approx({"f1": 4 / 7, "macro_f1": (0.8 + 0) / 2, "accuracy": 0.5})
    found = metrics.correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 100.0])
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.9
    several = metrics.texts([["x y z w v", "a b c d e"], ["f g h i j"]], ["a b c d e", "f g h i j"])
    assert several == pytest.approx({"bleu": 1, "rouge_l": 1})


def qa_task(start, **changes):
    task = TASKS["qa"](Settings("qa", str(start), "train", **changes), Tokenizer.load(start), 64)
    row = {"id": "1", "context": "one two three four five", "question": "where is it"}
    return task, task.example(SimpleNamespace(values=row, where="here"), {"context": "context", "question": "question"},
                              labelled=False)


@pytest.mark.parametrize(("may_have_none", "null", "answer"), [
    (True, (11, 2), "four five"), (True, (11, 12), ""), (False, (11, 12), "four five")])
def test_the_best_span_of_all_windows(may_have_none, null, answer, start):
    """Of two words at most; no answer scores as [CLS] does, at its lowest over the windows."""
    task, example = qa_task(start, max_answer_length=2)
    task.labels = ["answers"] + ["no answer"] * may_have_none
    (item,) = task.items([example])
    _, begin, end = item.extra
    windows = [np.zeros((end + 1, 2), np.float32) for _ in null]
    windows[0][begin, 0], windows[0][begin + 3, 0], windows[0][begin + 4, 1] = 5, 1, 9
    for window, score in zip(windows, null):
        window[0, 0] = score
    (found,) = task.predictions([example], [item, item], windows)
    assert found["answer"] == answer


def test_a_question_may_have_no_answer(start):
    task = TASKS["qa"](Settings("qa", str(start), "train"), Tokenizer.load(start), 64)
    values = {"context": "one two", "question": "it", "answers": {"text": ["one"], "answer_start": [0]},
              "is_impossible": True}
    columns = {"context": "context", "question": "question", "answers": "answers"}
    assert task.example(SimpleNamespace(values=values, where="here"), columns).label == []


def test_words_that_the_vocabulary_lacks_are_missed_in_what_is_written(start):
    task = TASKS["seq2seq"](Settings("seq2seq", "model", "train"), Tokenizer.load(start), 64)
    texts = ["the \u732b cat walked \u00a35 house \u00a35", "the old cat walked"]
    examples = task.gathered([Example("here", (text,), [text]) for text in texts])
    ids = [np.array(task.tokenizer.encode(text)) for text in texts]
    assert list(ids[0]).count(task.tokenizer.unk_id) == 3
    predictions = task.predictions(examples, task.items(examples), ids)
    assert [p["text"] for p in predictions] == ["the cat walked house", texts[1]]
    scores = task.score(examples, predictions)
    assert scores == metrics.texts([[text] for text in texts], [p["text"] for p in predictions])
    assert scores["rouge_l"] == pytest.approx((8 / 11 + 1) / 2)
    assert task.counts["dev references with words that the vocabulary lacks, which no prediction writes"] == 1


def test_a_missing_metric_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(UserError, match=r"seqeval, which is not installed: pip install 'bertfast\[metrics\]'"):
        metrics.spans([["O"]], [["O"]])


def test_command_line(start, tmp_path):
    chosen = settings("multiple-choice", start, tmp_path)
    command = ["finetune", "--task", "multiple-choice", "--model", str(start), "--train", chosen.train, "--dev",
               chosen.dev, "--out", str(tmp_path / "run"), "--steps", "2", "--choices", "ending0, ending1,ending2",
               "--precision", "fp32"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "text = 'context', text pair = 'question', label = 'answer'" in result.output
    arguments = ["predict", "--model", str(tmp_path / "run"), "--input", chosen.dev, "--out", str(tmp_path / "p.jsonl")]
    result = CliRunner().invoke(cli.app, [*arguments, "--precision", "fp32"])
    assert result.exit_code == 0 and "precision: fp32 (asked for)" in result.output
    assert len(read_lines(tmp_path / "p.jsonl")) == 120
    assert set(TASKS) == {task for task, _ in KINDS.values()}


# ---- features


@pytest.mark.parametrize("kind", ["classification", "tagging", "multiple-choice", "regression", "qa"])
def test_features_are_cached_and_train_only_the_head(kind, start, tmp_path):
    """A mix of frozen layers: less than full training can do, but far from chance; the encoder is untouched."""
    chosen = settings(kind, start, tmp_path, features=True, lr=3e-2, steps=200, eval_every=200)
    summary = finetune(tmp_path / "run", chosen, "")
    assert summary["best"][summary["metric"]] > {"multiple-choice": 0.5, "regression": 0.3}.get(kind, 0.75), summary
    model = bertfast.heads.BertForFeatures.from_pretrained(tmp_path / "run" / "checkpoint")
    encoder = bertfast.BertModel.from_pretrained(start)
    own = model.state_dict()
    assert all(torch.equal(own[f"bert.{n}"], t) for n, t in encoder.state_dict().items() if not n.startswith("pooler"))
    assert float((model.mix.weight.softmax(0) - 1 / 3).abs().max()) > 1e-3
    predict_file(Predictor(tmp_path / "run", "fp32"), chosen.dev, tmp_path / "again.jsonl")
    cached = read_lines(tmp_path / "run" / "predictions.jsonl")
    for ours, fresh in zip(cached, read_lines(tmp_path / "again.jsonl")):
        for key, value in fresh.items():
            if key not in ("score", "scores"):
                assert ours[key] == value


def test_static_features_are_the_words_own_vectors(start, tmp_path):
    chosen = settings("classification", start, tmp_path, features=True, static=True, lr=3e-2, steps=200, eval_every=200)
    summary = finetune(tmp_path / "run", chosen, "")
    assert summary["best"]["accuracy"] > 0.75
    model = bertfast.heads.BertForFeatures.from_pretrained(tmp_path / "run" / "checkpoint")
    ids = torch.tensor([[2, 40, 30, 20, 3], [2, 20, 40, 30, 3]])
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        table.mul_(0.01)  # another eps would show
    expected = torch.nn.functional.layer_norm(table[ids[0]], table.shape[1:], eps=model.config.layer_norm_eps).mean(0)
    for vector in model.features(unpad(ids)[0]):  # the order of the words is nothing to it
        torch.testing.assert_close(vector.float(), expected[None], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="--static needs --features"):
        finetune(tmp_path / "other", replace(chosen, features=False), "")
    whole = replace(chosen, model=str(tmp_path / "run/checkpoint"), features=False, static=False)
    assert not {"features", "static"} & FineTuning(tmp_path, whole).model_for(1).config.extra.keys()


def test_features_are_refused_where_text_is_written(start, tmp_path):
    with pytest.raises(UserError, match="--features is not for seq2seq: a linear head cannot"):
        FineTuning(tmp_path, settings("seq2seq", start, tmp_path, features=True))


def test_the_mix_is_elmos():
    mix = bertfast.heads.ScalarMix(3)
    layers = torch.randn(5, 3, 8)
    torch.testing.assert_close(mix(layers), layers.mean(1))
    with torch.no_grad():
        mix.weight.copy_(torch.tensor([1.0, 0.0, -1.0])), mix.gamma.fill_(2.0)
    expected = 2 * sum(w * layers[:, k] for k, w in enumerate(mix.weight.softmax(0)))
    torch.testing.assert_close(mix(layers), expected)


# ---- the benchmark's peer


def test_the_benchmark_times_only_who_trains_the_same(start, tmp_path, monkeypatch):
    from bertfast.benchmarks import finetune as benchmark

    chosen = vars(settings("classification", start, tmp_path, dropout=0.1, lr=1e-3))
    facts = {}
    for name in benchmark.CONTENDERS:
        turns = benchmark.training(name, chosen, 0.01)
        facts[name] = next(turns)
        turn = next(turns)
        assert turn["seconds"] > 0 and (turn["flops"] > 0) == name.startswith("bertfast")
    assert benchmark.agreement(facts) == {}
    assert facts["bertfast fp32"]["losses"] == pytest.approx(facts["transformers fp32"]["losses"], rel=1e-5)
    assert facts["bertfast fp32"]["losses"][0] != facts["bertfast fp32"]["losses"][1]
    monkeypatch.setattr(FineTuning, "learning_rate", lambda self, step: 0.0)
    facts["bertfast fp32"] = next(benchmark.training("bertfast fp32", chosen, 0.01))  # never updates
    assert list(benchmark.agreement(facts)) == ["bertfast fp32"]


def test_the_trainer_of_transformers_sees_the_same_losses_patched(start, tmp_path):
    from bertfast.benchmarks import trainer as benchmark

    rng = random.Random(1)
    lines = [f"{' '.join(sentence(rng, word))}\t{int(word == 'good')}" for word in rng.choices(["good", "bad"], k=320)]
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(lines))
    rows = str(tmp_path / "rows.tsv")
    found = {name: list(benchmark.fine_tuning(name, str(start), rows, rows, 320, rounds=2, seed=0))
             for name in ("original fp32", "patched fp32")}
    facts = {name: turns[0] for name, turns in found.items()}
    assert benchmark.agreement(facts) == {} and len(facts["patched fp32"]["losses"]) == benchmark.CHECKED
    first, last = found["patched fp32"][1:]
    assert first["seconds"] > 0 and last["loss"] < first["loss"] and 0.4 < last["accuracy"] <= 1
    facts["patched fp32"]["losses"][3] += 1e-3
    assert list(benchmark.agreement(facts)) == ["patched fp32"]


def test_nobody_agrees_with_a_reference_that_failed():
    from bertfast.benchmarks import finetune as loops
    from bertfast.benchmarks import trainer

    facts = {"machine": {}, "bertfast fp32": {"losses": [1.0]}, "transformers bf16": {"losses": [1.0]}}
    assert list(loops.agreement(facts)) == ["bertfast fp32", "transformers bf16"]
    facts = {"machine": {}, "patched fp32": {"losses": [1.0]}, "original bf16": {"losses": [1.0]}}
    assert list(trainer.agreement(facts)) == ["patched fp32", "original bf16"]


@pytest.mark.full
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("prefix-lm", "regression")])
def test_the_benchmarks_peer_trains_the_same(kind, start, tmp_path):
    """Without dropout, from one start, transformers' loop and ours see the same losses and end at the same scores."""
    from bertfast.benchmarks.finetune import Peer

    chosen = settings(kind, start, tmp_path, lr=1e-3)
    if kind == "qa":
        chosen.max_length = 20  # all windows full: transformers lets padding take part in its softmax
    work = FineTuning(tmp_path, chosen)
    model, peer = work.model_for(1), Peer(work)
    missing, unexpected = peer.model.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("decoder." in name for name in missing), missing
    optimizer, window, batches = work.optimizer_for(model), Window(), work.batches(1)
    for step in range(1, 5):
        items = next(batches)
        if kind == "qa":
            items = [item for item in items if item.n_tokens == 20]
        window.loss = 0.0
        work.train_step(model, optimizer, items, 1, step, window)
        loss = peer.step(items, work.learning_rate(step))
        assert loss == pytest.approx(float(window.loss), rel=2e-4), step
    ours, theirs = work.evaluate(model)[0], peer.evaluate()
    assert theirs == {name: pytest.approx(value, abs=0.02) for name, value in ours.items()}


@pytest.mark.parametrize("context, answer, first, last", [
    ("near \ud55c house", "\ud55c", 1, 3),  # Hangul: three letters without accents, of one character
    ("near cafe\u0301 house", "cafe\u0301", 1, 1),  # a mark that no token holds
    ("near \u200b house", "\u200b house", 1, 1), ("near \u200b house", "\u200b", -1, -1),
])
def test_answers_of_characters_that_normalisation_changes(context, answer, first, last):
    words = "near where house cafe \u1112 ##\u1161 ##\u11ab".split()
    tokenizer = Tokenizer({word: i for i, word in enumerate(SPECIAL_TOKENS + words)})
    task = TASKS["qa"](Settings("qa", "model", "train"), tokenizer, 64, ["answers"])
    example = Example("here", ("q", "where", context), [(context.index(answer), answer)])
    (item,) = task.items([example])
    offsets, begin, _ = item.extra
    assert item.target == ((begin + first, begin + last) if first > 0 else (0, 0))
    logits = np.zeros((2, item.n_tokens), np.float32)
    logits[[0, 1], item.target] = 9
    if first > 0:
        assert task.predictions([example], [item], [logits.T])[0]["answer"] == answer.lstrip("\u200b ")


def test_answers_end_where_tokens_do(start):
    """Of an invisible character at a context's end no window has a row; an answer that no window holds is told."""
    task = TASKS["qa"](Settings("qa", str(start), "train", max_length=32), Tokenizer.load(start), 64)
    columns = {"context": "context", "question": "question", "answers": "answers"}

    def item_of(context, answer):
        values = {"context": context, "question": "where", "answers": {
            "text": [answer], "answer_start": [context.index(answer)]}}
        example = task.example(Row(values, "here"), columns)
        return example.label, task.items([example])[0]

    for context, answer in [("it is Paris\u200b", "Paris\u200b"), ("\ufeffParis is near", "\ufeffParis"),
                            ("it is Paris \u200e\xad", " Paris \u200e\xad"), ("it is Paris\ufffd", "Paris\ufffd")]:
        label, item = item_of(context, answer)
        begin = context.index("Paris")
        assert label == [(begin, "Paris")]
        assert (item.extra[0][item.target[0], 0], item.extra[0][item.target[1], 1]) == (begin, begin + len("Paris"))
    assert not task.counts
    item_of("the cat " * 40, "the cat " * 20)
    assert task.counts["answers that no window of 32 tokens holds: training takes them for none"] == 1


def test_a_label_of_dollars_is_drawn_as_it_is(tmp_path):
    show.plot_confusion(tmp_path / "confusion.png", [0, 1], [1, 1], ["$_$", "$10-$20"])
    assert (tmp_path / "confusion.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("labels", "drawn"), [(["a", "b"], ["a", "b"]), (["\u4e2d\u6587", "b"], ["0", "1"]),
                                               (["a" * 30 + "b", "a" * 30 + "c"], ["0", "1"])])
def test_labels_that_cannot_be_drawn_are_numbered(labels, drawn, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: shown.extend(
        tick.get_text() for tick in figure.axes[0].get_xticklabels()))
    show.plot_confusion(tmp_path / "confusion.png", [0, 1], [1, 1], labels)
    assert shown == drawn


def test_a_single_row_is_drawn(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, marker, **_: lines.append((len(x), marker)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    for rows in (1, 2):
        show.plot_loss(tmp_path / "loss.png", [{"seed": 1, "step": i, "loss": 1.0} for i in range(rows)], "f1")
    assert [line for line in lines if line[0]] == [(1, "o"), (2, "")]


def test_a_model_or_another_run_is_not_written_over(start, tmp_path):
    chosen = settings("classification", start, tmp_path)
    config = (start / "config.json").read_bytes()
    with pytest.raises(UserError, match="is to be written"):
        finetune(start, chosen, "", overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_bytes(config)
    with pytest.raises(UserError, match="holds a model or another run"):
        finetune(tmp_path / "run", chosen, "", overwrite=True)
    assert (start / "config.json").read_bytes() == (tmp_path / "run/config.json").read_bytes() == config


def test_files_of_ones_own_are_not_written_over(start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=1)
    for name in ("predictions.jsonl", "metrics.json", "metrics.jsonl", "loss.png", "confusion.png", "checkpoint"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text("precious")
        with pytest.raises(UserError, match=f"mine holds {name}, which no run wrote: choose another --out"):
            finetune(tmp_path / "mine", chosen, "", overwrite=True)
        assert (tmp_path / "mine" / name).read_text() == "precious"
        shutil.rmtree(tmp_path / "mine")
    finetune(tmp_path / "run", chosen, "")
    (tmp_path / "run/checkpoint/finetune.json").unlink()
    with pytest.raises(UserError, match="checkpoint was not written by a fine-tuning: choose another --out"):
        finetune(tmp_path / "run", chosen, "", overwrite=True)
    assert (tmp_path / "run/checkpoint/model.safetensors").exists()


def test_predict_reads_what_training_read(start, tmp_path):
    """A pair stays a pair, a single text single; every row gives one, also an empty one; nothing is lost to a fault."""
    rows = [f"cat {i}\tdog\t{i % 2}" for i in range(20)]
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + "\n".join(rows))
    finetune(tmp_path / "run", Settings("classification", str(start), str(tmp_path / "train.tsv"), steps=1,
                                        precision="fp32"), "")
    predictor, out = Predictor(tmp_path / "run"), tmp_path / "out.jsonl"
    (tmp_path / "test.tsv").write_text("sentence1\tsentence_2\na\tb\n")
    with pytest.raises(UserError, match="has a text pair, 'sentence2', this one does not"):
        predict_file(predictor, tmp_path / "test.tsv", out)
    (tmp_path / "test.tsv").write_text("first\tsecond\na\tb\n")
    with pytest.raises(UserError, match="which column holds the text.* In training it was 'sentence1'; there are"):
        predict_file(predictor, tmp_path / "test.tsv", out)
    (tmp_path / "test.tsv").write_text("sentence1\tsentence2\na\tb\n\t\nc\td\n \t \n\n")
    assert predict_file(predictor, tmp_path / "test.tsv", out)["rows"] == 4
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(UserError, match="data.jsonl names its own columns: remove --columns"):
        predict_file(predictor, data, out, ["sentence1", "sentence2"])
    with pytest.raises(UserError, match="no predictions: choose another --out"):
        predict_file(predictor, tmp_path / "test.tsv", data)
    assert data.read_text() == '{"text": "a", "label": "b"}\n'
    before = out.read_bytes()
    (tmp_path / "test.tsv").write_text("sentence1\tsentence2\n")
    with pytest.raises(UserError, match="holds no examples"):
        predict_file(predictor, tmp_path / "test.tsv", out)
    assert out.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    for taken in ("pipe", "test.tsv"):
        with pytest.raises(UserError, match="choose another --out"):
            predict_file(predictor, tmp_path / "test.tsv", tmp_path / taken)
    (tmp_path / "single.tsv").write_text("text\na\n\nb\n\n")
    assert [row.values["text"] for row in open_table(tmp_path / "single.tsv")] == ["a", "", "b"]


def test_columns_are_the_training_files_before_likelier_names(start, tmp_path):
    rows = [f"a {word} cat\t{word}" for word in ("good", "bad") * 10]
    (tmp_path / "train.tsv").write_text("sentence\tscore\n" + "\n".join(rows))
    rows = [f"{i}\twhere is it\tx\t{row}" for i, row in enumerate(rows)]
    (tmp_path / "more.tsv").write_text("id\tquestion\tlabel\tsentence\tscore\n" + "\n".join(rows))
    finetune(tmp_path / "run", Settings("classification", str(start), *(str(tmp_path / f"{name}.tsv") for name in
                                        ("train", "more")), steps=1, precision="fp32"), "")
    assert {row["gold"] for row in read_lines(tmp_path / "run/predictions.jsonl")} == {"good", "bad"}
    for name in ("train", "more"):
        predict_file(Predictor(tmp_path / "run"), tmp_path / f"{name}.tsv", tmp_path / f"{name}.jsonl")
    assert read_lines(tmp_path / "train.jsonl") == read_lines(tmp_path / "more.jsonl")
    stored = json.loads((tmp_path / "run/checkpoint/finetune.json").read_text())
    assert stored["columns"] == {"text": "sentence", "label": "score"}


@pytest.mark.parametrize(("given", "read"), [
    ({}, {"text": "premise", "text_pair": "hypothesis"}), ({"text": "premise"}, {"text": "premise"}),
    ({"text": "premise", "text_pair": "hypothesis"}, {"text": "premise", "text_pair": "hypothesis"})])
def test_a_pair_is_found_by_name_only_where_the_text_is(given, read, start):
    task = TASKS["classification"](Settings("classification", str(start), "train", **given), Tokenizer.load(start), 64)
    table = SimpleNamespace(path="", format="", columns=["premise", "hypothesis", "label"])
    for _ in range(2):  # the training file, and the next
        assert task.as_in_training(table, task.find_columns(table)) == {**read, "label": "label"}


def test_options_and_tags_are_the_training_files_columns(start, tmp_path):
    tokenizer = Tokenizer.load(start)
    task = TASKS["multiple-choice"](Settings("multiple-choice", str(start), "train"), tokenizer, 64)
    understood = lambda *names: task.as_in_training(table := SimpleNamespace(path="", format="", columns=list(names)),
                                                    task.find_columns(table))
    understood("goal", "ending0", "ending1", "label")
    understood("goal", "ending0", "answers", "choice1", "ending1", "ending2", "label")
    assert task.option_columns == ["ending0", "ending1", "ending2"]
    task = TASKS["tagging"](Settings("tagging", str(start), "train"), tokenizer, 64)
    assert understood("1", "2", "3")["tags"] == understood("1", "2", "3", "4")["tags"] == "3"


def test_predictions_replace_nothing_but_predictions(start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=1)
    finetune(tmp_path / "run", chosen, "")
    predictor, checkpoint = Predictor(tmp_path / "run", "fp32"), tmp_path / "run/checkpoint"
    (tmp_path / "notes.txt").write_text("Dear diary\n")
    (tmp_path / "settings.json").write_text(json.dumps({"a": 1}, indent=1))
    (tmp_path / "link.jsonl").symlink_to(checkpoint / "model.safetensors")
    files = [tmp_path / "notes.txt", tmp_path / "settings.json", *checkpoint.iterdir()]
    before = [path.read_bytes() for path in files]
    for out in (*files, tmp_path / "link.jsonl", checkpoint / "new.jsonl"):
        with pytest.raises(UserError, match="choose another --out"):
            predict_file(predictor, chosen.dev, out)
    assert [path.read_bytes() for path in files] == before and (tmp_path / "link.jsonl").is_symlink()
    (tmp_path / "out.jsonl").touch()
    for _ in range(2):  # over an empty file, and over the last predictions
        assert predict_file(predictor, chosen.dev, tmp_path / "out.jsonl")["rows"] == 160
    (tmp_path / "out.jsonl").unlink()
    assert predict_file(predictor, chosen.dev, tmp_path / "run/out.jsonl")["rows"] == 160


def test_a_damaged_or_newer_folder_is_one_line(start, tmp_path):
    finetune(tmp_path / "run", settings("classification", start, tmp_path, steps=1), "")
    checkpoint = tmp_path / "run/checkpoint"
    stored, config = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("finetune", "config"))
    newer = {**stored["settings"], "new": 1}
    faults = [{}, [], *({k: v for k, v in stored.items() if k != name} for name in ("roles", "columns", "format")),
              *({**stored, name: value} for name, value in (
                  ("labels", None), ("labels", ["positive"]), ("columns", None), ("settings", None),
                  ("settings", newer), ("settings", {**stored["settings"], "task": "other"})))]
    for fault in faults:
        (checkpoint / "finetune.json").write_text(json.dumps(fault))
        with pytest.raises(UserError, match="checkpoint is damaged or of another version"):
            Predictor(tmp_path / "run")
    (checkpoint / "finetune.json").write_text(json.dumps(stored))
    for fault in ([], {k: v for k, v in config.items() if k != "max_position_embeddings"}):
        (checkpoint / "config.json").write_text(json.dumps(fault))
        with pytest.raises(UserError, match="checkpoint is damaged or of another version"):
            Predictor(tmp_path / "run")


def test_a_single_sentence_is_read_as_the_training_file_was(start, tmp_path):
    words, lines = "a\tX\ncat\tY\n", "tokens\ttags\na cat\tX Y\n"
    files = {"train.tsv": (words + "\n") * 9, "one.txt": words, "bare.txt": "a\ncat\n", "lines.tsv": lines,
             "gap.tsv": lines.replace("\na", "\n\na"), "broken.txt": "a\tX\ncat\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    chosen = Settings("tagging", str(start), str(tmp_path / "train.tsv"), str(tmp_path / "one.txt"), steps=1,
                      precision="fp32")
    finetune(tmp_path / "run", chosen, "")
    assert read_lines(tmp_path / "run/predictions.jsonl")[0]["gold"] == ["X", "Y"]
    for name in ("one.txt", "bare.txt", "lines.tsv"):
        assert predict_file(Predictor(tmp_path / "run"), tmp_path / name, tmp_path / "out.jsonl")["rows"] == 1, name
        assert read_lines(tmp_path / "out.jsonl")[0]["tokens"] == ["a", "cat"], name
    with pytest.raises(UserError, match=r"broken.txt.* there are: a, X"):
        predict_file(Predictor(tmp_path / "run"), tmp_path / "broken.txt", tmp_path / "out.jsonl")
    task = FineTuning(tmp_path, replace(chosen, train=str(tmp_path / "lines.tsv"), dev=str(tmp_path / "gap.tsv"))).task
    assert [task.open(tmp_path / name).format for name in ("gap.tsv", "train.tsv")] == ["TSV", "CoNLL"]
    task.read_format = None  # as before the training file is read
    assert [task.open(tmp_path / name).format for name in ("gap.tsv", "one.txt")] == ["CoNLL", "TSV"]


def test_a_mistake_leaves_the_run_that_was_to_be_replaced(start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=2, eval_every=2)
    finetune(tmp_path / "run", chosen, "")
    content = lambda: {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    before = content()
    with pytest.raises(UserError, match="--freeze 12"):
        finetune(tmp_path / "run", replace(chosen, freeze="12"), "", overwrite=True)
    assert content() == before
    finetune(tmp_path / "run", replace(chosen, lr=1e-3), "", overwrite=True)
    assert content().keys() == before.keys() and content() != before


def test_two_do_not_train_in_one_folder(start, tmp_path, monkeypatch):
    out, chosen, train = tmp_path / "run", settings("classification", start, tmp_path, steps=2), FineTuning.train
    out.mkdir()
    with locked(out, out), pytest.raises(UserError, match="run is being written by another process$"):
        finetune(out, chosen, "", overwrite=True)
    assert not list(out.iterdir())

    def contended(work):
        with pytest.raises(UserError, match="run is being written by another process$"), locked(out, out):
            pass
        return train(work)

    monkeypatch.setattr(FineTuning, "train", contended)
    finetune(out, chosen, "")
    shutil.move(out / "checkpoint", tmp_path / "theirs")
    describe = lambda work, allocator: {"done": str(shutil.move(tmp_path / "theirs", out / "checkpoint"))}
    monkeypatch.setattr(FineTuning, "describe", describe)  # another's run ends while ours reads its data
    with pytest.raises(UserError, match="already holds a fine-tuning"):
        finetune(out, chosen, "")


def test_a_model_of_one_segment_reads_no_pairs(start, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(start, folder)
    model = bertfast.BertModel(bertfast.BertConfig(**{**vars(bertfast.BertConfig.from_file(start / "config.json")),
                                                      "type_vocab_size": 1}))
    model.save_pretrained(folder)
    chosen = settings("classification", folder, tmp_path, steps=1)
    finetune(tmp_path / "run", chosen, "")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for kind in ("pairs", "qa", "multiple-choice", "prefix-lm"):
        with pytest.raises(UserError, match=r"one has one token type \(type_vocab_size 1\)"):
            finetune(tmp_path / "run", settings(kind, folder, tmp_path, steps=1), "", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    FineTuning(tmp_path, settings("pairs", folder, tmp_path, features=True, static=True)).model_for(1)
    FineTuning(tmp_path, settings("seq2seq", folder, tmp_path)).model_for(1)


def test_a_metric_of_spans_may_be_asked_for(start, tmp_path):
    work = FineTuning(tmp_path, settings("tagging", start, tmp_path, metric="f1"))
    assert work.metric == "f1" and "f1" in work.evaluate(work.model_for(1))[0]
    with pytest.raises(UserError, match="--metric mcc: this task has f1, precision, recall, accuracy"):
        FineTuning(tmp_path, settings("tagging", start, tmp_path, metric="mcc"))


@pytest.mark.parametrize("changes", [{"freeze": "all"}, {"features": True}], ids=str)
def test_in_bf16_what_is_frozen_is_saved_as_it_was(changes, start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=4, eval_every=4, precision="bf16", **changes)
    finetune(tmp_path / "run", chosen, "")
    saved = load_file(tmp_path / "run/checkpoint/model.safetensors")
    given = {f"bert.{n}": t for n, t in load_file(start / "model.safetensors").items() if "pooler" not in n}
    assert given and all(torch.equal(saved[n], t) for n, t in given.items())
    if "features" in changes:  # computed beforehand as they are in predicting
        predict_file(Predictor(tmp_path / "run", "bf16"), chosen.dev, tmp_path / "again.jsonl")
        cached = [{k: v for k, v in r.items() if k in ("label", "scores")}
                  for r in read_lines(tmp_path / "run/predictions.jsonl")]
        again = [{k: v for k, v in r.items() if k in ("label", "scores")} for r in read_lines(tmp_path / "again.jsonl")]
        assert cached == again


def test_dropout_is_also_that_before_the_head(start, tmp_path):
    folder = tmp_path / "dropping"
    shutil.copytree(start, folder)
    config = {**json.loads((start / "config.json").read_text()), "classifier_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert FineTuning(tmp_path, settings("classification", folder, tmp_path)).model_for(1).p == 0.5
    assert FineTuning(tmp_path, settings("classification", folder, tmp_path, dropout=0.0)).model_for(1).p == 0.0


def test_one_model_at_a_time(start, tmp_path, monkeypatch):
    """The last seed's is let go before the next one's is loaded."""
    work, models = FineTuning(tmp_path, settings("classification", start, tmp_path, steps=2, seeds=3)), []
    load = work.model_for

    def counted(seed):
        gc.collect()
        assert not [model for model in models if model() is not None]
        model = load(seed)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(work, "model_for", counted)
    work.train()
    assert len(models) == 3


def test_texts_are_written_in_the_memory_of_a_batch(start, tmp_path, monkeypatch):
    chosen = settings("seq2seq", start, tmp_path, tokens=64, beams=2, length_penalty=0.5)
    work, sizes, given = FineTuning(tmp_path, chosen), [], set()
    model, generate = work.model_for(1).eval(), write.generate

    def counted(model, batch, *arguments):
        sizes.append(len(batch.cu_seqlens) - 1)
        given.add(arguments)
        return generate(model, batch, *arguments)

    monkeypatch.setattr(write, "generate", counted)
    items = work.dev_items[:40]
    parts = work.task.infer(model, items)
    longest = max(len(item.sequences[0].ids) for item in items)
    assert sum(sizes) == 40 and max(sizes) == 8 * 64 // (2 * (12 + longest))
    assert given == {(work.tokenizer.cls_id, work.tokenizer.sep_id, 12, 2, 0.5)}
    work.settings.tokens = 4096
    sizes.clear()
    all_at_once = work.task.infer(model, items)
    assert sizes == [40] and all(np.array_equal(a, b) for a, b in zip(parts, all_at_once, strict=True))


def test_source_and_target_share_the_positions_of_a_prefix_lm(start, tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"source": "good " * 100, "target": "it is one house " * 20}] * 4)
    chosen = settings("prefix-lm", start, tmp_path, max_target_length=40)
    work = FineTuning(tmp_path, replace(chosen, train=str(tmp_path / "long.jsonl"), dev=str(tmp_path / "long.jsonl")))
    model = work.model_for(1)
    assert {item.n_tokens for item in work.train_items} == {63}  # of 64, what is written last is not read
    assert work.task.counts["targets cut to 32 tokens (--max-target-length)"] == 5  # four, and the one of all dev rows
    assert torch.isfinite(work.train_step(model, work.optimizer_for(model), work.train_items, 1, 1, Window()))
    assert all(len(ids) <= 32 for ids in work.task.infer(model.eval(), work.dev_items))


def test_a_stop_is_heard_while_features_are_computed_and_judged(start, tmp_path):
    work = FineTuning(tmp_path, settings("classification", start, tmp_path, features=True))
    work.stopping = 143
    with pytest.raises(KeyboardInterrupt, match="143"):
        work.model_for(1)
    work.stopping = 0
    model = work.model_for(1)
    work.stopping = 130
    with pytest.raises(KeyboardInterrupt, match="130"):
        work.evaluate(model)


def test_a_row_that_is_not_finite_is_json(tmp_path):
    """JSON has neither NaN nor Infinity, which Python writes and reads all the same."""
    def refuse(constant):
        raise AssertionError(constant)

    row = {"step": 1, "loss": float("inf"), "grad_norm": float("nan")}
    FineTuning._log(SimpleNamespace(rows=[], folder=tmp_path), row)
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert found == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.parametrize("changes", [{"steps": 8}, {"eval_every": 4, "log_every": 1000}], ids=str)
def test_a_run_without_a_finite_loss_ends_as_an_error(changes, start, tmp_path):
    chosen = settings("classification", start, tmp_path, lr=1e30, **changes)
    with pytest.raises(UserError, match="stopped at step [48]: the loss is not a number.* try a lower --lr"):
        finetune(tmp_path / "run", chosen, "")
    assert not (tmp_path / "run/checkpoint").exists()
    with pytest.raises(UserError, match="a prediction is not a finite number"):
        json_line({"scores": {"a": float("nan")}})


def test_a_failed_save_is_not_called_the_best(start, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("disk full")

    monkeypatch.setattr(FineTuning, "save", full)
    with pytest.raises(UserError, match="disk full"):
        finetune(tmp_path / "run", settings("classification", start, tmp_path), "")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["best"] is None


def test_spans_in_bilou_and_words_of_any_alphabet():
    gold, guess = [["U-A", "U-A", "B-B", "L-B"]], [["U-A", "O", "B-B", "L-B"]]
    assert metrics.spans(gold, guess)["f1"] == pytest.approx(0.8)
    assert metrics.spans([["B-PER-x"]], [["B-LOC-x"]])["f1"] == 0
    assert metrics.spans([["B", "I", "O", "B"]], [["B", "O", "O", "B"]])["f1"] == 0.5  # one of two spans, no kinds
    assert metrics.texts([["\u6211\u4eec\u53bb"]], ["\u6211\u4eec\u53bb"])["rouge_l"] == 1
    assert metrics.texts([["The cat's hat"]], ["the cat s HAT!"])["rouge_l"] == 1
    for word, other in [("\u0915\u0940", "\u0915\u093e"), ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),
                        ("\u0bae\u0ba3\u0bbf", "\u0bae\u0ba3"), ("\u05e9\u05b8\u05dd", "\u05e9\u05b4\u05dd")]:
        assert metrics.texts([[f"{word} cat"]], [f"{other} cat"])["rouge_l"] == 0.5  # Hindi, Thai, Tamil, Hebrew
        assert metrics.texts([[word]], [f"{word}!"])["rouge_l"] == 1
    assert metrics.texts([["\u2764\ufe0f"]], ["\u2600\ufe0f"])["rouge_l"] == 0  # a mark alone is no word


def test_english_is_scored_as_rouge_score_does():
    rng, scorer = random.Random(4), rouge_scorer.RougeScorer(["rougeL"])
    words = ["the", "The", "cat's", "U.S.", "1,000", "old_hat", "-", "5%"]
    for _ in range(50):
        gold, text = " ".join(rng.choices(words, k=6)), " ".join(rng.choices(words, k=6))
        assert metrics.texts([[gold]], [text])["rouge_l"] == scorer.score(gold, text)["rougeL"].fmeasure


def test_a_correlation_with_what_is_no_number_is_told():
    assert metrics.correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson"] == pytest.approx(1)
    with pytest.raises(UserError, match="not numbers any more; try a lower --lr"):
        metrics.correlation([1.0, 2.0, 3.0], [1.0, float("nan"), 3.0])


@pytest.mark.parametrize("some", [False, True])
def test_no_answer_competes_where_training_has_questions_without(some, start):
    task, example = qa_task(start)
    answered = example._replace(label=[(0, "one")])
    task.learn([answered, example._replace(label=[])] if some else [answered], [])
    (item,) = task.items([example])
    sure = np.zeros((item.n_tokens, 2), np.float32)
    sure[0] = 9
    (found,) = task.predictions([example], [item], [sure])
    assert (found["answer"] == "") == some


def test_a_question_of_more_than_half_a_window_is_cut(start):
    task = TASKS["qa"](Settings("qa", str(start), "train", max_length=32), Tokenizer.load(start), 64)
    (item,) = task.items([Example("here", ("1", "where " * 40, "it is Paris"), [(6, "Paris")])])
    assert item.n_tokens <= 32 and task.counts["questions cut to 16 tokens"] == 1 and item.target != (0, 0)


def test_targets_of_one_source_are_its_references(start):
    task = TASKS["seq2seq"](Settings("seq2seq", str(start), "train"), Tokenizer.load(start), 64)
    rows = [("a cat", "it is"), ("a dog", "yes"), ("a cat", "no house")]
    one, two = task.gathered([Example("here", (source,), [target]) for source, target in rows])
    assert (one.label, two.label) == (["it is", "no house"], ["yes"])
    assert task.counts["dev rows whose source occurred before: further references of it"] == 1


def test_steps_rates_and_evaluations_are_those_of_the_settings(start, tmp_path):
    chosen = settings("classification", start, tmp_path, steps=None, eval_every=None, epochs=2.5, lr=None, warmup=0.2)
    work = FineTuning(tmp_path, chosen)  # 160 examples in batches of 16
    assert (work.steps, work.eval_every) == (25, 10)
    assert [work.learning_rate(step) for step in (1, 5, 6, 25)] == pytest.approx(
        [linear_schedule(5e-5, 0.2, 25, step - 1) for step in (1, 5, 6, 25)])


def test_a_row_of_metrics_is_the_mean_of_its_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    window = Window()
    window.steps, window.tokens, window.loss, now[0] = 4, 600, torch.tensor(8.0), 3.0
    row = window.row(1, 4, 0.1, torch.tensor(2.0))
    assert (row["loss"], row["tokens_per_sec"]) == (2.0, 200.0)


def test_names_for_files_without_a_header(start, tmp_path):
    (tmp_path / "train.csv").write_text("x,a good cat\ny,a bad cat\n" * 9)
    (tmp_path / "test.csv").write_text("one,x,a good cat\n")
    chosen = Settings("classification", str(start), *[str(tmp_path / "train.csv")] * 2, columns=["label", "text"],
                      steps=1, precision="fp32")
    finetune(tmp_path / "run", chosen, "")
    predictor = Predictor(tmp_path / "run/checkpoint", "fp32")
    predict_file(predictor, tmp_path / "train.csv", tmp_path / "one.jsonl")
    predict_file(predictor, tmp_path / "test.csv", tmp_path / "two.jsonl", ["id", "label", "text"])
    one, two = (read_lines(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert (len(one), len(two)) == (18, 1) and one[0]["scores"] == pytest.approx(two[0]["scores"], abs=1e-5)


def test_rows_beyond_a_chunk_are_predicted_in_order(start, tmp_path, monkeypatch):
    chosen = settings("classification", start, tmp_path, steps=1)
    finetune(tmp_path / "run", chosen, "")
    predictor = Predictor(tmp_path / "run", "fp32")
    predict_file(predictor, chosen.dev, tmp_path / "one.jsonl")
    monkeypatch.setattr(predict, "CHUNK", 7)
    predict_file(predictor, chosen.dev, tmp_path / "two.jsonl")
    one, two = ([row["label"] for row in read_lines(tmp_path / f"{name}.jsonl")] for name in ("one", "two"))
    assert len(one) == 160 and one == two
