"""The pretraining loop: it learns, resumes bit for bit, normalises over the step, survives and explains faults."""

import copy
import io
import itertools
import json
import os
import pydoc_data.topics
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import matplotlib.axes
import numpy as np
import pytest
import torch
import transformers
from bertfast.benchmarks import contest, quality
from bertfast.benchmarks.contest import Outcome
from rich.console import Console
from safetensors.torch import load_file, save_file

import bertfast
from bertfast import cli, initial, machine, pretrain, processes, run_folder
from bertfast.data.prepare import prepare
from bertfast.files import UserError, locked
from bertfast.fill_mask import FillMask
from bertfast.model import useful_flops
from bertfast.ops.dropout import step_seed
from bertfast.optim import Optimizer
from bertfast.pretrain import start
from bertfast.run_folder import Settings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some English that every Python carries, prepared with a vocabulary of its own; and a model that fits it."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:40]))
    prepare([str(text)], folder / "data", vocab_size=600, workers=1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    (folder / "model.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 128, **sizes}))
    return folder


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The share of peak that is printed is no matter here, and measuring the peak takes longer than a test."""
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: 1e11)


def settings(corpus, **changes):
    defaults = dict(
        data=str(corpus / "data"), model_config=str(corpus / "model.json"), steps=8, tokens=512, short_length=32,
        long_length=64, long_share=0.25, lr=3e-3, precision="fp32", log_every=1, eval_every=100, save_every=4,
    )
    return Settings(**{**defaults, **changes})


def test_a_new_model_starts_from_counts(corpus, tmp_path):
    run = start(tmp_path, settings(corpus), resume=False)
    model, words = run.model, run.train_data.first_tokens(10**7)
    counts = np.bincount(words, minlength=model.config.vocab_size) + 0.5
    bias = model.cls["predictions"].bias.detach()
    expected = torch.from_numpy(np.log(counts / counts.sum())).float()  # not of the validation text
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-5)
    deeper = {**json.loads((corpus / "model.json").read_text()), "num_hidden_layers": 3, "max_position_embeddings": 128}
    (tmp_path / "deeper.json").write_text(json.dumps({**deeper, "hidden_size": 256, "num_attention_heads": 4}))
    model = start(tmp_path / "deeper", settings(corpus, model_config=str(tmp_path / "deeper.json")), False).model
    words = torch.randint(50, 600, (64, 2, 62))
    words[32:, 1] = words[32:, 0].flip(1)  # half of the pairs share all their words, half next to none
    ids = torch.cat([torch.full((64, 1), 2), words[:, 0], torch.full((64, 1), 3), words[:, 1]], 1)
    is_b = (torch.arange(126) > 63).long().expand(64, 126)
    out = model.eval().bert(ids, token_type_ids=is_b, output_hidden_states=True)
    chosen = settings(corpus, model_config=str(tmp_path / "deeper.json"), causal=True)
    causal = start(tmp_path / "causal", chosen, resume=False).model
    unseeing = causal.eval().bert(ids, token_type_ids=is_b, output_hidden_states=True)
    for one, states, offsets in ((model, out, (-1, 1, -2, 2)), (causal, unseeing, (-1, -2, -3, -4))):
        x, attention = states.hidden_states[0], one.bert.encoder.layer[0].attention.self
        for offset, query, key in zip(offsets, attention.query.weight.split(64), attention.key.weight.split(64)):
            looks = (x @ query.T @ (x @ key.T).transpose(1, 2) / 8).softmax(-1)  # words in their places, itself too
            there, itself = (looks.diagonal(place, 1, 2).mean() for place in (offset, 0))
            assert there > 0.4 > 8 * itself, f"no head looks at {offset}"
        alike = one.bert.encoder.layer[1].attention.self
        assert torch.equal(alike.query.weight, alike.key.weight) and not torch.equal(query, key)
    dense, said = model.bert.encoder.layer[-1].attention.output.dense, []
    told = (out.last_hidden_state[:, 0] @ dense.weight[:, 1]).detach()
    assert told[32:].min() > told[:32].max() or told[32:].max() < told[:32].min()
    dense.register_forward_hook(lambda module, given, found: said.append(found.mean(0)))
    ids, is_b = initial._pairs(run.train_data.first_tokens(10**7), run.tokenizer)
    model.bert(ids, token_type_ids=is_b)
    assert abs(said[0] @ dense.weight[:, 1]) < 0.5 * abs(dense.bias @ dense.weight[:, 1])  # on text, nearer to 0
    other = start(tmp_path / "normal", settings(corpus, start="normal"), resume=False)
    assert not other.model.cls["predictions"].bias.any()
    with pytest.raises(UserError, match="--start"):
        settings(corpus, start="lucky").check()


def test_half_of_the_pairs_that_a_start_is_centred_on_are_true():
    ids, _ = initial._pairs(np.arange(8 * 2 * 62), SimpleNamespace(cls_id=2, sep_id=3))
    assert (ids[:, 64] - ids[:, 62] == 1).tolist() == [True] * 4 + [False] * 4


def test_the_last_checkpoint_computes_the_same_with_tables_of_ordinary_size(corpus, tmp_path):
    run = start(tmp_path, settings(corpus, steps=4, save_every=2), resume=False)
    _, last = run.train()
    assert last == tmp_path / "checkpoint-4"
    for name in ("word", "position", "token_type"):
        kept, ordinary = (
            load_file(folder / "model.safetensors")[f"bert.embeddings.{name}_embeddings.weight"].std()
            for folder in (tmp_path / "checkpoint-2", last))
        assert 3.5 < kept / ordinary < 4.5
    ids, again = torch.randint(5, 600, (2, 30)), bertfast.BertForPreTraining.from_pretrained(str(last)).eval()
    for out, saved in zip(vars(run.model.eval()(ids)).values(), vars(again(ids)).values()):
        assert (out is None) == (saved is None)
        if out is not None:
            torch.testing.assert_close(saved, out, rtol=1e-6, atol=1e-6)


def test_the_last_checkpoint_keeps_its_tables_where_eps_counts(corpus, tmp_path):
    model = {**json.loads((corpus / "model.json").read_text()), "layer_norm_eps": 1e-5}
    (tmp_path / "model.json").write_text(json.dumps(model))
    run = start(tmp_path / "run", settings(corpus, steps=2, model_config=str(tmp_path / "model.json")), resume=False)
    _, last = run.train()
    ids, again = torch.randint(5, 600, (2, 30)), bertfast.BertForPreTraining.from_pretrained(last).eval()
    torch.testing.assert_close(again(ids).logits, run.model.eval()(ids).logits, rtol=1e-6, atol=1e-6)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
    last = run_folder.latest(folder)
    return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def test_a_run_learns_and_leaves_everything_behind(corpus, tmp_path, capsys):
    run = start(tmp_path, settings(corpus, steps=240, precision="bf16", eval_every=80), resume=False)
    assert "bf16" in run.describe("")["precision"]
    for name in ("checkpoint-best", "checkpoint-80-keep"):  # the user's own
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer.json").write_text("{}")
    results, last = run.train()
    assert last == tmp_path / "checkpoint-240"
    logged = [r for r in rows(tmp_path) if "loss" in r]
    assert [r["step"] for r in logged] == list(range(1, 241))
    for key in ("mlm_loss", "nsp_loss", "lr", "grad_norm", "tokens_per_sec"):
        assert all(r[key] is not None and r[key] >= 0 for r in logged), key
    entropy = run.train_data.manifest["unigram_entropy"]
    assert abs(logged[0]["mlm_loss"] - entropy) < 1  # it starts where a count of words would
    validation = [r for r in rows(tmp_path) if "validation_mlm_loss" in r]
    assert [(r["step"], r["validation_length"]) for r in validation] == [
        (80, 32), (160, 32), (180, 32), (240, 32), (240, 64)]
    for length, result in results.items():
        own = [r["validation_mlm_loss"] for r in validation if r["validation_length"] == length]
        assert own[-1] == result["validation_mlm_loss"]
    assert results[32]["validation_mlm_loss"] < validation[0]["validation_mlm_loss"] - 0.1
    assert {r["max_seqlen"] for r in logged} == {32, 64}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-236", "checkpoint-240", "checkpoint-80-keep", "checkpoint-best"]
    assert run_folder.latest(tmp_path) == last

    last = tmp_path / "checkpoint-240"
    assert {p.stat().st_mode & 0o777 for p in last.iterdir()} == {last.stat().st_mode & 0o666}
    hf, report = transformers.BertForPreTraining.from_pretrained(last, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(last)
    text = "The [MASK] statement raises an exception."
    assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text)
    (candidates,) = FillMask(last)(text, top=3)
    with torch.no_grad():
        logits = hf.eval()(**tokenizer(text, return_tensors="pt")).prediction_logits[0]
    expected = logits[tokenizer(text)["input_ids"].index(tokenizer.mask_token_id)].softmax(-1).topk(3)
    assert [run.tokenizer.vocab[t] for t, _ in candidates] == expected.indices.tolist()
    with pytest.raises(UserError, match="no \\[MASK\\]"):
        FillMask(last)("nothing to fill")


def test_a_causal_run_learns_and_is_read_by_transformers(corpus, tmp_path, capsys, monkeypatch):
    chosen = settings(corpus, steps=120, causal=True, eval_every=40)
    results, last = start(tmp_path / "run", chosen, resume=False).train()
    validation = [r["validation_mlm_loss"] for r in rows(tmp_path / "run") if r.get("validation_length") == 32]
    assert results[32]["validation_mlm_loss"] == validation[-1] < validation[0] - 0.1
    assert "nsp_loss" not in rows(tmp_path / "run")[0]
    hf = transformers.AutoModelForCausalLM.from_pretrained(last).eval()
    assert type(hf) is transformers.BertLMHeadModel and hf.config.is_decoder
    fill = FillMask(last)
    ids = fill.tokenizer.encode("The return [MASK] ends the call.")
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits[0, ids.index(fill.tokenizer.mask_id) - 1].softmax(-1).topk(3)
    (guesses,) = fill("The return [MASK] ends the call.", top=3)
    assert [fill.tokenizer.vocab[t] for t, _ in guesses] == expected.indices.tolist()
    assert fill("The return [MASK]", top=3)[0] == guesses  # it sees what stands before, and nothing else
    pretrain.report.examples(last, start(tmp_path / "other", chosen, resume=False).validation_data)
    shown = [line for line in capsys.readouterr().out.splitlines() if "[MASK]" in line][1:]
    assert shown and all(re.search(r"\[MASK\] *│", line) for line in shown)

    again = start(tmp_path / "masked", settings(corpus, model_config=None, init_from=str(last)), resume=False)
    assert type(again.model) is bertfast.BertForPreTraining and not again.model.config.is_decoder
    code, line = command(capsys, monkeypatch, "pretrain", "--out", tmp_path / "x", "--causal", "--whole-word-masking")
    assert code == 2 and "--causal masks nothing" in line


@pytest.mark.parametrize("crash_after", [3, 5, 7])  # before any checkpoint, after one, in the second phase
def test_resuming_is_as_if_nothing_had_happened(crash_after, corpus, tmp_path, monkeypatch):
    chosen = settings(corpus, save_every=2, micro_batches=2, log_every=3)  # steps 4 and 5 are in one row
    start(tmp_path / "whole", chosen, resume=False).train()

    broken = start(tmp_path / "broken", chosen, resume=False)
    step = broken.train_step

    def crash(*args):
        if broken.step == crash_after:
            raise RuntimeError("power cut")
        return step(*args)

    monkeypatch.setattr(broken, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    again = start(tmp_path / "broken", chosen, resume=True)
    assert again.step == crash_after // 2 * 2
    again.train()
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    timeless = lambda folder: [{k: v for k, v in r.items() if k != "tokens_per_sec"} for r in rows(folder)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


@pytest.mark.parametrize("at", [2, 4, 6, 8])  # in a phase, beside a checkpoint, at the phase's end, at the run's
def test_a_stop_is_heard_in_validation_which_is_made_up_for(at, corpus, tmp_path):
    chosen = settings(corpus, eval_every=2, save_every=4)
    start(tmp_path / "whole", chosen, resume=False).train()
    stopped = start(tmp_path / "stopped", chosen, resume=False)
    evaluate = stopped.evaluate

    def stop(*args, **options):
        if stopped.step == at:
            stopped.stopping = 143
        return evaluate(*args, **options)

    stopped.evaluate = stop
    with pytest.raises(KeyboardInterrupt, match="143"):
        stopped.train()
    assert run_folder.step_of(run_folder.latest(tmp_path / "stopped")) == at
    assert rows(tmp_path / "stopped")[-1]["step"] == at and "loss" in rows(tmp_path / "stopped")[-1]
    again = start(tmp_path / "stopped", chosen, resume=True)
    assert again.step == at and not again.validated
    results, last = again.train()
    assert last.name == "checkpoint-8" and results.keys() == {32, 64}
    timeless = lambda folder: [{k: v for k, v in r.items() if k != "tokens_per_sec"} for r in rows(folder)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "stopped")
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert start(tmp_path / "stopped", chosen, resume=True).validated


def test_a_stop_as_the_last_validation_ends_comes_too_late(corpus, tmp_path, capsys, monkeypatch):
    run = start(tmp_path, settings(corpus, steps=2), resume=False)
    validate = run._validate

    def stop(*arguments):
        found = validate(*arguments)
        run.stopping = 143 if run.step == 2 else 0
        return found

    run._validate = stop
    results, last = run.train()
    assert results.keys() == {32} and last == tmp_path / "checkpoint-2"
    (tmp_path / "loss.png").unlink()  # as if killed here
    assert command(capsys, monkeypatch, "pretrain", "--out", tmp_path, "--resume") == (0, "")
    assert (tmp_path / "loss.png").exists()


def test_a_checkpoint_with_a_changed_byte_is_not_gone_on_from(corpus, tmp_path):
    start(tmp_path, settings(corpus, steps=1), resume=False).train()
    last = run_folder.latest(tmp_path)
    for file in last.iterdir():
        good = file.read_bytes()
        at = good.index(b'"batch": 1') + 9 if file.name == "trainer.json" else len(good) - 9
        file.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        with pytest.raises(UserError, match=f"{file.name} is damaged .its checksum differs.: delete"):
            start(tmp_path, run_folder.stored_settings(tmp_path), resume=True)
        file.write_bytes(good)
    trainer = json.loads((last / "trainer.json").read_text())
    del trainer["files"], trainer["checksum"]
    (last / "trainer.json").write_text(json.dumps(trainer))
    with pytest.raises(UserError, match="trainer.json is damaged .its checksum differs.: delete"):
        start(tmp_path, run_folder.stored_settings(tmp_path), resume=True)


def test_a_checkpoint_half_written_is_cleared_away(corpus, tmp_path):
    run = start(tmp_path, settings(corpus), resume=False)
    for name in (".checkpoint-500.tmp", ".checkpoint-best.tmp"):  # the second is the user's own
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.safetensors").write_text("")
    run.save()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".checkpoint-best.tmp", "checkpoint-0"]


def test_damaged_rows_cost_no_others(tmp_path):
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
    one, two, three = (json.dumps(row).encode() for row in good)
    lines = [one, b'{"st\xffep": 1}', b"7", b'{"step": null}', two, b"\0\0", three, b'{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert pretrain.report.read_metrics(tmp_path) == good
    pretrain.report.Metrics(tmp_path, 2, tensorboard=False)
    assert rows(tmp_path) == good[:2]


def test_a_row_of_something_else_is_one_line(corpus, tmp_path, capsys, monkeypatch):
    start(tmp_path, settings(corpus, steps=1), resume=False).train()
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"validation_length": 32', '"validation_length": []'))
    code, line = command(capsys, monkeypatch, "pretrain", "--out", tmp_path, "--resume")
    assert code == 2 and "metrics.jsonl is damaged: line 2 holds more than numbers" in line


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png"])
def test_files_of_ones_own_are_not_written_over(name, corpus, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"holds {name}, which no run wrote: choose another --out"):
        start(tmp_path, settings(corpus), resume=False)
    assert (tmp_path / name).read_text() == "precious"


def test_two_processes_do_not_train_one_run(corpus, tmp_path):
    run = start(tmp_path, settings(corpus), resume=False)
    with locked(tmp_path, tmp_path):
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4/trainer.json").touch()  # as if the other process were deleting it
        for begin in (run.train, lambda: start(tmp_path, settings(corpus, seed=2), resume=True)):
            with pytest.raises(UserError, match="is being written by another process"):
                begin()
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = start(tmp_path, settings(corpus, seed=2), resume=False)
    run.train()
    with pytest.raises(UserError, match="already holds a run .checkpoint-8.: add --resume"):
        second.train()
    assert run_folder.stored_settings(tmp_path).seed == 1


def test_the_closing_table_of_a_run_without_a_finite_loss(corpus, tmp_path, capsys):
    results, _ = start(tmp_path, settings(corpus, steps=1, lr=1e11, warmup=0.0), resume=False).train()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mlm_loss": null}\n')
    pretrain.report.closing_table(tmp_path, results, 6.0, False)
    assert "below the unigram entropy" in " ".join(capsys.readouterr().out.split())


def test_the_closing_table_says_how_far_below_the_entropy(tmp_path, capsys):
    """Of the last ten rows' mean, and of validation."""
    lines = [json.dumps({"step": step, "mlm_loss": float(step)}) for step in range(1, 13)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    pretrain.report.closing_table(tmp_path, {32: {"validation_mlm_loss": 5.25}}, 6.0, False)
    shown = re.findall(r"-?\d+\.\d+", capsys.readouterr().out)
    assert shown == ["7.500", "5.250", "-1.500", "0.750"]


@pytest.mark.parametrize("source", ["model_config", "init_from"])
def test_resuming_needs_only_the_checkpoint_and_the_text(source, corpus, tmp_path, capsys, monkeypatch):
    origin, data, out = tmp_path / "origin", tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus / "data", data)
    if source == "init_from":
        start(tmp_path / "first", settings(corpus, steps=1), resume=False).train()[1].rename(origin)
    else:
        shutil.copy(corpus / "model.json", origin)
    chosen = settings(corpus, data=str(data), **{"model_config": None, source: str(origin)})
    start(out, chosen, resume=False).train()
    whole = final_state(out)
    shutil.rmtree(out / "checkpoint-8")
    data.rename(tmp_path / "moved")
    origin.rename(tmp_path / "gone")
    args = ["pretrain", "--out", out, "--resume"]
    assert command(capsys, monkeypatch, *args)[1] == f"bertfast: there is no prepared set {data}"
    assert command(capsys, monkeypatch, *args, "--data", tmp_path / "moved") == (0, "")
    again = final_state(out)
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)
    assert run_folder.stored_settings(out).data == str(tmp_path / "moved")


def test_resuming_before_the_first_checkpoint_begins_the_same_run(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    made = lambda _, folder, **options: shutil.copytree(corpus / "data", folder)
    monkeypatch.setattr("bertfast.data.prepare.prepare", made)  # the documentation of this machine
    made(None, out / "data")
    chosen = settings(corpus, data=str(out / "data"), steps=2)
    start(out, chosen, resume=False)._write_config()  # killed before the first step
    args = ["pretrain", "--out", out, "--resume"]
    code, line = command(capsys, monkeypatch, *args, "--steps", 3)
    assert code == 2 and "other settings: --steps 3 (it began with 2)" in line
    shutil.rmtree(out / "data")
    assert command(capsys, monkeypatch, *args) == (0, "")
    assert run_folder.stored_settings(out) == chosen and run_folder.latest(out).name == "checkpoint-2"
    shutil.rmtree(out / "checkpoint-2")
    assert command(capsys, monkeypatch, *args, "--data", corpus / "data") == (0, "")
    assert run_folder.stored_settings(out).data == str(corpus / "data")


def test_resuming_with_settings_that_change_no_numbers(corpus, tmp_path, capsys, monkeypatch):
    start(tmp_path, settings(corpus, steps=2, save_every=1), resume=False).train()
    whole = final_state(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    args = ["pretrain", "--out", tmp_path, "--resume", "--recompute", "--no-cuda-graph"]
    code, line = command(capsys, monkeypatch, *args, "--no-nsp", "--causal", "--seed", 2)
    assert code == 2 and line.endswith("with other settings: --no-nsp, --causal, --seed 2 (it began with 1)")
    assert command(capsys, monkeypatch, *args) == (0, "")
    stored, again = run_folder.stored_settings(tmp_path), final_state(tmp_path)
    assert stored.recompute and not stored.cuda_graph
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)


def test_documentation_replaces_no_text_of_ones_own(corpus, tmp_path, capsys, monkeypatch):
    shutil.copytree(corpus / "data", tmp_path / "data")
    code, line = command(capsys, monkeypatch, "pretrain", "--out", tmp_path)
    assert code == 2 and "holds a set of your own text: name it with --data" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_a_refused_run_leaves_the_data_of_the_one_before(corpus, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr("bertfast.data.prepare.prepare", lambda _, folder, **options: made.append(folder))
    start(tmp_path / "run", settings(corpus, steps=1), resume=False).train()
    for out, message in ((tmp_path / "run", "already holds a run"), (tmp_path / "run/checkpoint-1", "holds a model")):
        code, line = command(capsys, monkeypatch, "pretrain", "--out", out)
        assert code == 2 and message in line and not made


def test_a_moved_run_finds_its_own_data(corpus, tmp_path, capsys, monkeypatch):
    shutil.copytree(corpus / "data", tmp_path / "run/data")
    start(tmp_path / "run", settings(corpus, data=str(tmp_path / "run/data"), steps=2, save_every=1), False).train()
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert command(capsys, monkeypatch, "pretrain", "--out", tmp_path / "moved", "--resume") == (0, "")
    assert run_folder.latest(tmp_path / "moved").name == "checkpoint-2"


def test_going_on_takes_the_checkpoints_dropout_and_casing(corpus, tmp_path):
    start(tmp_path / "first", settings(corpus, steps=1, dropout=0.2), resume=False).train()
    given = tmp_path / "first/checkpoint-1"
    onwards = settings(corpus, model_config=None, init_from=str(given), steps=1)
    for dropout, expected in ((None, 0.2), (0.0, 0.0)):
        onwards.dropout = dropout
        config = start(tmp_path / f"with-{dropout}", onwards, resume=False).config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (expected, expected)
    tokenizer = json.loads((given / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (given / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = json.loads((given / "tokenizer_config.json").read_text())
    (given / "tokenizer_config.json").write_text(json.dumps({**told, "do_lower_case": False}))
    with pytest.raises(UserError, match="was prepared uncased, but .* is cased"):
        start(tmp_path / "cased", onwards, resume=False)


def test_fill_mask_reads_the_layout_of_the_first_checkpoints(corpus, tmp_path):
    _, last = start(tmp_path, settings(corpus, steps=1), resume=False).train()
    expected = FillMask(last)("the [MASK] of")
    config = json.loads((last / "config.json").read_text())
    (last / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    fill = FillMask(last)
    assert fill("the [MASK] of") == expected == [fill.at(fill.tokenizer.encode("the in of")[1:-1], 1, 5)]  # not "in"
    weights = load_file(last / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "transform" not in n}, last / "model.safetensors")
    with pytest.raises(UserError, match="missing: cls.predictions.transform"):
        FillMask(last)


def test_every_validation_is_drawn(tmp_path, monkeypatch):
    train = [{"step": s, "mlm_loss": 5.0, "max_seqlen": 32 if s <= 28 else 64} for s in (7, 14, 21, 28, 35, 40)]
    judged = [{"step": s, "validation_length": n, "validation_mlm_loss": 5.5}
              for s, n in ((10, 32), (20, 32), (28, 32), (30, 64), (40, 32), (40, 64))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train + judged))
    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, x, *a, **o: (drawn.append((o["label"], list(x))),
                                                                               plot(self, x, *a, **o))[1])
    pretrain.report.plot_loss(tmp_path, 6.0, False)
    assert dict(drawn)["validation"] == [10, 20, 28, 30, 40]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inlined", "nonsense"])
def test_pictures_need_no_notebook_around(backend):
    subprocess.run([sys.executable, "-c", "from bertfast.report import pyplot; pyplot().figure()"], check=True,
                   env={**os.environ, "MPLBACKEND": backend})


def test_slow_steps_have_an_eta(monkeypatch):
    now, shown = [0.0], io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120, get_time=lambda: now[0])
    monkeypatch.setattr(pretrain.report, "console", terminal)
    with pretrain.report.progress(1000, 0, 1e12) as bar:
        for step in (10, 20, 30):
            now[0] += 1800
            bar.show(step, {"loss": 6.0, "tokens_per_sec": 10.0}, 1e10)
    assert "ETA 48:30:00" in re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())  # 970 steps of three minutes


def test_a_dumb_terminal_is_told_in_lines(monkeypatch, capsys):
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(pretrain.report, "console", dumb)
    with pretrain.report.progress(1000, 0, 1e12) as bar, pretrain.report.counter("rows") as count:
        bar.show(10, {"loss": 6.0, "tokens_per_sec": 10.0}, 1e10)
        count(3)
    assert capsys.readouterr().out.startswith("step 10/1000  loss 6.000") and not dumb.file.getvalue()


def test_what_is_shown_is_no_markup(capsys):
    pretrain.report.header({"data": "set[v2]"})
    pretrain.report.note(line := "a long line, of a path that is not to be folded: " * 3 + "run[v2]")
    first, second = capsys.readouterr().out.splitlines()
    assert (first.split(), second) == (["data", "set[v2]"], line)


def test_resumed_tensorboard_keeps_the_row_of_the_checkpoint(tmp_path, monkeypatch):
    purged = []
    writer = SimpleNamespace(SummaryWriter=lambda folder, purge_step: purged.append(purge_step))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    pretrain.report.Metrics(tmp_path, 4, tensorboard=True)
    assert purged == [5]  # steps from there on


def test_the_loss_is_normalised_over_the_whole_step(corpus, tmp_path):
    """Two micro-batches with unequal mask counts give the gradient of one mean over all masked tokens."""
    run = start(tmp_path, settings(corpus, micro_batches=2, dropout=0.0), resume=False)
    micro = [run.loader(run.train_data, 32).batch(i) for i in range(2)]
    model = run.model
    masked = sum(b.n_masked for b in micro)
    pairs = sum(int((b.next_sentence_label >= 0).sum()) for b in micro)
    assert micro[0].n_masked != micro[1].n_masked
    sink, model.bert.embeddings.sink = model.bert.embeddings.sink, None
    total = 0.0
    for b in micro:
        out = model(b)
        total = total + out.mlm_loss * b.n_masked / masked
        total = total + out.nsp_loss * int((b.next_sentence_label >= 0).sum()) / pairs
    expected = torch.autograd.grad(total, list(model.parameters()))
    model.bert.embeddings.sink = sink
    run.optimizer.step = lambda lr: None  # keep the gradients
    run.train_step(micro, pretrain.report.Window())
    sums = {n: g for group in run.optimizer.groups for n, g in zip(group.names, group.gradients())}
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(sums[name], gradient, rtol=1e-4, atol=1e-7)


def test_every_step_has_its_learning_rate_and_seeds_of_its_own(corpus, tmp_path, monkeypatch):
    chosen, seen = settings(corpus, micro_batches=2), []
    monkeypatch.setattr(pretrain.StepGraph, "__call__", lambda graph, micro, seeds, lr, *_: seen.append((lr, seeds)))
    run = start(tmp_path, chosen, resume=False)
    micro = [run.loader(run.train_data, 32).batch(i) for i in range(2)]
    for run.step in range(8):
        run.train_step(micro, pretrain.report.Window())
    assert [lr for lr, _ in seen] == [chosen.learning_rate(step) for step in range(8)]
    assert len({seed for _, seeds in seen for seed in seeds}) == 16


def test_everything_random_is_a_function_of_the_seed(corpus, tmp_path, monkeypatch):
    """A new model's weights, the text and its masks, and dropout's keys; another seed draws all of them anew."""
    seen, found = [], []
    monkeypatch.setattr(pretrain.StepGraph, "__call__", lambda graph, micro, seeds, *_: seen.append(seeds))
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        run = start(tmp_path / name, settings(corpus, seed=seed), resume=False)
        batch = run.loader(run.train_data, 32).batch(0)
        run.train_step([batch], pretrain.report.Window())
        weight = run.model.bert.encoder.layer[0].output.dense.weight.detach()
        found.append([weight, batch.input_ids, torch.tensor(seen.pop())])
    for one, same, other in zip(*found):
        assert torch.equal(one, same) and not torch.equal(one, other)


def judged(model, batches):
    """(losses and accuracies a label, tokens) of a model on some batches."""
    outs = [(model(batch), batch) for batch in batches]
    sums = {name: 0.0 for name in ("masked", "correct", "pairs", "pairs_correct", "mlm", "nsp")}
    for out, batch in outs:
        sums["masked"] += batch.n_masked
        sums["pairs"] += batch.n_sequences
        sums["correct"] += int(out.n_correct)
        sums["pairs_correct"] += int(out.n_pairs_correct)
        sums["mlm"] += float(out.mlm_loss) * batch.n_masked
        sums["nsp"] += float(out.nsp_loss) * batch.n_sequences
    return {"mlm_loss": sums["mlm"] / sums["masked"], "mlm_accuracy": sums["correct"] / sums["masked"],
            "nsp_loss": sums["nsp"] / sums["pairs"], "nsp_accuracy": sums["pairs_correct"] / sums["pairs"]}


def test_rows_say_what_training_and_validation_came_to(corpus, tmp_path):
    """Of all batches of all steps of a row, and of all of the validation text; the rate is that of the last step."""
    chosen = settings(corpus, steps=4, tokens=128, micro_batches=2, log_every=2, lr=1e-12, dropout=0.0, long_share=0.0,
                      start="normal")
    run = start(tmp_path, chosen, resume=False)
    run.train()
    with torch.no_grad():
        batches = [run.loader(run.train_data, 32).batch(i) for i in range(8)]
        found = [r for r in rows(tmp_path) if "loss" in r]
        for row, own in zip(found, (batches[:4], batches[4:]), strict=True):
            assert {**row, **judged(run.model, own)} == pytest.approx(row, rel=1e-4)
            assert row["loss"] == pytest.approx(row["mlm_loss"] + row["nsp_loss"])
            assert row["lr"] == chosen.learning_rate(row["step"] - 1)
        whole = list(run.validation[32].validation_batches())
        (row,) = (r for r in rows(tmp_path) if "validation_length" in r)
        assert len(whole) > 2
        expected = {f"validation_{name}": value for name, value in judged(run.model.eval(), whole).items()}
        assert {**row, **expected} == pytest.approx(row, rel=1e-4)


def test_a_speed_is_that_of_training_alone(corpus, tmp_path, monkeypatch):
    """By a clock of which a step takes a second, a validation a minute, and a checkpoint an hour."""
    now, run = [0.0], start(tmp_path, settings(corpus, steps=6, eval_every=2, save_every=3, log_every=4), resume=False)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for name, seconds in (("train_step", 1.0), ("_validate", 60.0), ("save", 3600.0)):
        own = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *args, own=own, seconds=seconds: (
            now.__setitem__(0, now[0] + seconds), own(*args))[1])
    run.train()
    speeds = [r["tokens_per_sec"] for r in rows(tmp_path) if "loss" in r]
    assert len(speeds) == 2 and all(256 < speed <= 512 for speed in speeds), speeds
    window = pretrain.report.Window()
    window.tokens = 600.0
    now[0] += 3.0
    state = window.state_dict()
    now[0] += 1e6  # until the run is resumed
    window = pretrain.report.Window()
    window.load_state_dict(state)
    now[0] += 2.0
    assert window.row(1, 0.0, torch.tensor(0.0), 32)["tokens_per_sec"] == 120


def test_a_run_goes_on_in_the_precision_it_began_with(corpus, tmp_path, monkeypatch):
    chosen = settings(corpus, steps=2, save_every=1, precision="auto")
    for faster in ("bf16", "fp32"):  # by another clock, or on another machine
        monkeypatch.setattr(machine, "choose_precision", lambda wanted, device, faster=faster: (
            faster if wanted == "auto" else wanted, ""))
        run = start(tmp_path, chosen, resume=faster == "fp32")
        assert run.precision == "bf16"
        run.train()
        shutil.rmtree(tmp_path / "checkpoint-2")


def test_a_second_ctrl_c_interrupts_at_once():
    run, before = SimpleNamespace(stopping=0), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), processes.stop_on_interrupt(run):
            signal.raise_signal(signal.SIGINT)
            assert run.stopping == 130
            signal.raise_signal(signal.SIGINT)
            run.stopping = 0
        assert run.stopping == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_is_what_its_settings_say(corpus, tmp_path):
    masking = {"mlm_probability": 0.4, "whole_word_masking": True}
    run = start(tmp_path, settings(corpus, optimizer="lamb", weight_decay=0.3, max_grad_norm=0.7, nsp=False,
                                   recompute=True, **masking), resume=False)
    assert type(run.model) is bertfast.BertForMaskedLM and run.model.bert.recompute
    optimizer, loader = run.optimizer, run.loader(run.train_data, 32)
    assert (optimizer.kind, optimizer.max_grad_norm) == ("lamb", 0.7)
    assert [group.weight_decay for group in optimizer.groups] == [0.3, 0.0]
    assert not loader.nsp and masking.items() <= vars(loader).items()
    run = start(tmp_path / "by default", settings(corpus), resume=False)
    assert run.optimizer.betas == (0.9, 0.98)
    assert run.config.hidden_dropout_prob == run.config.attention_probs_dropout_prob == 0.1


def poisoned(run, first, end=10**9):
    """The run, with steps from `first` to before `end` whose gradient is not finite."""
    run.model.cls.predictions.bias.register_hook(lambda g: g * float("nan") if first <= run.step < end else g)
    return run


def test_steps_that_are_not_finite_are_skipped_and_counted(corpus, tmp_path):
    poisoned(start(tmp_path, settings(corpus, steps=6), resume=False), 1, 3).train()
    logged = [r for r in rows(tmp_path) if "loss" in r]
    assert [r["skipped"] for r in logged] == [0, 1, 2, 2, 2, 2]
    assert [r["grad_norm"] is None for r in logged] == [False, True, True, False, False, False]
    assert all(torch.isfinite(t).all() for t in final_state(tmp_path).values())


def test_a_run_that_stays_broken_stops_with_the_culprit(corpus, tmp_path):
    run = start(tmp_path, settings(corpus, steps=40, save_every=100), resume=False)
    with torch.no_grad():
        run.model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"10 steps in a row.*bert.encoder.layer.0.output.dense.weight. Try a lower"):
        run.train()


def test_while_steps_are_skipped_nothing_is_saved(corpus, tmp_path):
    names = lambda folder: sorted(p.name for p in folder.glob("checkpoint-*"))
    chosen = settings(corpus, steps=40, save_every=2, log_every=1000, micro_batches=2)
    run, calls = poisoned(start(tmp_path / "broken", chosen, resume=False), 5), []
    run.model.register_forward_pre_hook(
        lambda _, args, given: calls.append((int(given["seed"]), float(given["mlm_scale"]))), with_kwargs=True)
    with pytest.raises(UserError, match=r"step 15: 10 steps in a row .*gradient of .*bias. Go on .*checkpoint-4 and a"):
        run.train()
    assert names(tmp_path / "broken") == ["checkpoint-2", "checkpoint-4"]
    assert calls[-2:] == calls[-4:-2]  # what was looked at for the culprit is the step that failed
    poisoned(start(tmp_path / "for_a_while", chosen, resume=False), 35, 38).train()
    assert names(tmp_path / "for_a_while") == ["checkpoint-39", "checkpoint-40"]
    poisoned(start(tmp_path / "at_the_end", chosen, resume=False), 39).train()
    assert names(tmp_path / "at_the_end") == ["checkpoint-38", "checkpoint-40"]
    stopped = poisoned(start(tmp_path / "stopped", chosen, resume=False), 5)
    stopped._validation_is_due = lambda: setattr(stopped, "stopping", 143 if stopped.step == 7 else 0)
    with pytest.raises(KeyboardInterrupt, match="143"):
        stopped.train()
    assert names(tmp_path / "stopped") == ["checkpoint-2", "checkpoint-4"]


def test_a_short_run_that_breaks_ends_as_an_error(corpus, tmp_path):
    run = start(tmp_path, settings(corpus, lr=1e11, warmup=0.0), resume=False)
    with pytest.raises(UserError, match="stopped at step 8: its validation is not finite; first not finite: the loss"):
        run.train()


def test_what_a_broken_run_is_told_to_do_works(corpus, tmp_path, capsys, monkeypatch):
    run = start(tmp_path / "run", settings(corpus, steps=40, save_every=100), resume=False)
    run.save()
    with torch.no_grad():
        run.model.cls["predictions"].bias[0] = float("inf")
    with pytest.raises(UserError, match=r"in another --out: --init-from \S+checkpoint-0 and a lower --lr") as told:
        run.train()
    init = re.search(r"--init-from \S+", str(told.value))[0].split()
    args = ["--data", corpus / "data", "--steps", 2, "--tokens", 256, "--long-length", 128, "--lr", 1e-4, *init]
    assert command(capsys, monkeypatch, "pretrain", "--out", tmp_path / "other", *args) == (0, "")


def test_fp16_loss_scaling_halves_and_recovers():
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, torch.float16)
    assert optimizer.loss_scale == 2**16
    weight = optimizer.master_state()["weight"].clone()
    optimizer.good_steps.fill_(1500)
    assert optimizer.state_dict()["good_steps"] == 1500
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step(0.1)
    assert optimizer.loss_scale == 2**15 and optimizer.n_skipped == 1 and optimizer.step_count == 0
    assert optimizer.good_steps == 0
    assert torch.equal(optimizer.master_state()["weight"], weight)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.good_steps.fill_(1999)
    norm = optimizer.step(0.1)
    assert float(norm) == pytest.approx(20**0.5 / 2**15, rel=1e-3)
    assert optimizer.loss_scale == 2**16 and optimizer.good_steps == 0 and optimizer.skipped_in_a_row == 0
    assert not torch.equal(optimizer.master_state()["weight"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_optimiser_heeds_weights_loaded_since(dtype):
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, dtype)
    loaded = {"weight": torch.full((4, 4), 0.5), "bias": torch.full((4,), 1 + 2**-12)}
    model.load_state_dict(loaded)
    rounded = loaded["bias"].to(dtype).float()
    for _ in range(2):
        assert torch.equal(optimizer.master_state()["weight"], loaded["weight"])
        assert torch.equal(optimizer.master_state()["bias"], rounded)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(0.0)
    optimizer.load_state_dict(loaded, optimizer.state_dict())
    assert torch.equal(optimizer.master_state()["bias"], loaded["bias"])  # the masters' own digits are not lost
    assert torch.equal(model.bias.float(), rounded)
    model.bias.data = torch.full_like(model.bias, 3.0)  # as vector_to_parameters writes
    optimizer.step(0.0)
    assert torch.equal(model.bias, torch.full_like(model.bias, 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_begins_from_weights_loaded_since(dtype):
    """Though nobody has asked for the masters in between."""
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, dtype)
    model.load_state_dict({name: torch.full_like(p, 0.5) for name, p in model.state_dict().items()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.0)
    assert all((t == 0.5).all() for t in [*model.parameters(), *optimizer.master_state().values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frozen_parameter_has_a_master_too(dtype):
    model = torch.nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    optimizer = Optimizer(model, dtype)
    assert torch.equal(optimizer.master_state()["bias"], bias)
    with torch.no_grad():
        model.bias.fill_(0.5)
    assert torch.equal(optimizer.master_state()["bias"], torch.full((4,), 0.5))
    optimizer.load_state_dict({"weight": model.weight, "bias": bias}, optimizer.state_dict())
    assert torch.equal(optimizer.master_state()["bias"], bias) and torch.equal(model.bias, bias.to(dtype))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_an_optimiser_has_its_masters(dtype, how):
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, dtype)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    copied = copy.deepcopy((model, optimizer)) if how == "deepcopy" else torch.load(file, weights_only=False)
    for _ in range(2):
        for name, value in optimizer.master_state().items():
            assert torch.equal(copied[1].master_state()[name], value)
        for ours, theirs in ((model, optimizer), copied):
            for p in ours.parameters():
                p.grad = torch.ones_like(p)
            theirs.step(1e-3)
    assert torch.equal(model.weight, copied[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_cast_behind_its_optimiser_is_refused(dtype):
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, dtype)
    model.to(torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for use in (lambda: optimizer.step(0.0), optimizer.master_state):
        with pytest.raises(RuntimeError, match="the model was cast to .* since its Optimizer was made: make a new one"):
            use()


def test_a_last_batch_that_was_not_accumulated_counts():
    norms = []
    for accumulated in (2, 1):
        model = torch.nn.Linear(4, 4)
        optimizer = Optimizer(model)
        for batch in range(2):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + batch)
            if batch < accumulated:
                optimizer.accumulate()
        norms.append(float(optimizer.step(1e-3)))
    assert norms[0] == norms[1] == pytest.approx(3 * 20**0.5)


def test_gradients_of_several_batches_add_up_in_fp32():
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, torch.bfloat16)
    for gradient in (1.0, 2**-9, 2**-9):  # of which bf16 would add neither to the first
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.accumulate()
    assert float(optimizer.step(0.0)) == pytest.approx((1 + 2**-8) * 20**0.5, rel=1e-6)


@pytest.mark.parametrize("most", [0.0, 1.0])
@pytest.mark.parametrize("size", [0.01, 100.0])
def test_gradients_are_clipped_where_their_norm_is_above(size, most):
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, max_grad_norm=most, betas=(0.0, 0.999), weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, size)
    norm = optimizer.step(1e-3)
    used = size if not most else size * min(1.0, most / float(norm))
    for name, moment in optimizer.state_dict().items():
        if name.startswith("exp_avg."):
            torch.testing.assert_close(moment, torch.full_like(moment, used))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lamb_moves_a_tensor_by_its_size(dtype):
    """By the learning rate times its norm, or where that is 0 times that of the update."""
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({"full": torch.rand(60, 80), "zero": torch.zeros(60, 1)})
    optimizer = Optimizer(model, dtype, kind="lamb", weight_decay=0.0, eps=1e-12)
    before = {name: t.clone() for name, t in optimizer.master_state().items()}

    def step(gradient):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * gradient
        optimizer.step(0.01)
        return {name: t.clone() for name, t in optimizer.master_state().items()}

    skipped, after = step(torch.inf), step(1.0)
    assert all(torch.equal(skipped[name], before[name]) for name in before)
    moved = {name: float((after[name] - before[name]).norm()) for name in before}
    assert moved["full"] == pytest.approx(0.01 * float(before["full"].norm()), rel=1e-3)
    assert moved["zero"] == pytest.approx(0.01 * 60**0.5, rel=1e-3)


@pytest.mark.parametrize("size", [0.0, 600.0])
def test_lamb_moves_vectors_as_adamw_does(size):
    """A bias from 0 would hardly learn by its own size, and an output bias of word counts would run away."""
    found = []
    for kind in ("adamw", "lamb"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 60)
        torch.nn.init.constant_(model.bias, size / 60**0.5)
        optimizer = Optimizer(model, kind=kind, weight_decay=0.0)
        for _ in range(50):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step(0.01)
        found.append(model.bias.detach())
    assert torch.equal(*found)


def test_eps_is_what_was_given():
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, eps=0.01, weight_decay=0.0, max_grad_norm=0.0)
    before = optimizer.master_state()["weight"].clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer.step(0.1)
    torch.testing.assert_close(before - optimizer.master_state()["weight"], torch.full((4, 4), 0.05))


def test_the_optimiser_equals_torch_and_joins_query_key_value(corpus):
    torch.manual_seed(0)
    config = bertfast.BertConfig.from_file(corpus / "model.json")
    ours, theirs = (bertfast.BertModel(config) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, max_grad_norm=1.0, weight_decay=0.1)
    groups = [{"params": [p for p in theirs.parameters() if (p.dim() > 1) is decay], "weight_decay": 0.1 * decay}
              for decay in (True, False)]
    reference = torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        optimizer.step(1e-2)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    attention = ours.encoder.layer[0].attention.self
    for a, b in ((attention.query, attention.key), (attention.key, attention.value)):
        for x, y in ((a.weight, b.weight), (a.bias, b.bias)):
            assert x.data_ptr() + x.numel() * 4 == y.data_ptr() or x.numel() * 4 % 64  # neighbours, up to alignment


def test_tables_of_a_run_that_goes_on_keep_their_size(corpus, tmp_path):
    first = start(tmp_path / "first", settings(corpus, steps=1), resume=False).train()[1]
    run = start(tmp_path / "second", settings(corpus, steps=1, lr=1e-9, model_config=None, init_from=str(first)),
                resume=False)
    last = run.train()[1]
    name = "bert.embeddings.word_embeddings.weight"
    a, b = (load_file(folder / "model.safetensors")[name] for folder in (first, last))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_validation_draws_no_dropout_and_training_goes_on_with_it(corpus, tmp_path):
    run = start(tmp_path, settings(corpus), resume=False)
    assert run.evaluate(32) == run.evaluate(32)
    assert run.model.training and all(m.training for m in run.model.modules())


def test_schedule_and_seeds():
    s = Settings(data="", steps=100, warmup=0.1, lr=1.0)
    rates = [s.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(1 / 90) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    seeds = {step_seed(1, step, micro) for step in range(100) for micro in range(2)}
    assert step_seed(2, 0) not in seeds
    assert len(seeds) == 200 and all(-(2**63) <= x < 2**63 for x in seeds)


def test_useful_flops_count_what_is_computed(corpus, tmp_path):
    run = start(tmp_path, settings(corpus), resume=False)
    batch = run.loader(run.train_data, 32).batch(0)
    H, I, V, reads = 32, 64, run.config.vocab_size, int(batch.cu_seqlens_read[-1])
    lengths, read = batch.cu_seqlens.diff().tolist(), batch.cu_seqlens_read.diff().tolist()
    expected = 2 * batch.n_tokens * (4 * H * H + 2 * H * I)  # first layer
    expected += 2 * batch.n_tokens * 2 * H * H + 2 * reads * (2 * H * H + 2 * H * I)  # last layer
    expected += 2 * batch.n_masked * (H * H + V * H)
    scores = sum(4 * n * n * H + 4 * n * r * H for n, r in zip(lengths, read))
    expected += scores
    assert useful_flops(run.config, batch) == 3 * expected
    causal = replace(run.config, is_decoder=True)  # half of the scores
    assert useful_flops(causal, batch) == 3 * (expected - scores / 2)


def test_the_loops_of_bench_quality_train_alike(corpus, tmp_path):
    """From one start on the same batches without dropout: ours, and that of transformers' model and torch's AdamW."""
    chosen = settings(corpus, steps=6, lr=1e-3, dropout=0.0, long_share=0.0, start="normal")
    first = start(tmp_path, chosen, resume=False)
    first.model.save_pretrained(tmp_path, first.optimizer.master_state())
    loops = [quality.bertfast(asdict(chosen), 3, str(tmp_path)),
             quality.hugging_face(asdict(chosen), 3, str(tmp_path), "sdpa", False, False)]
    for facts in zip(*(itertools.islice(loop, 3) for loop in loops)):
        ours, theirs = ([found["loss"], *found.get("losses", [])] for found in facts)
        assert ours == pytest.approx(theirs, rel=1e-4) and facts[0].get("step") == facts[1].get("step")
    assert facts[0]["step"] == 6


def test_a_curve_of_bench_quality_adds_up_the_seconds_of_its_turns(corpus, monkeypatch):
    turns = [{"step": 3, "seconds": 2.0, "loss": 1.0}, {"step": 6, "seconds": 4.0, "loss": 0.0}]
    found = {"bertfast fp32": Outcome({"loss": 2.0}, turns), "HF sdpa fp32": Outcome({"loss": 2.0}, turns, "refused")}
    monkeypatch.setattr(contest, "contest", lambda entrants, rounds, *more: (found, rounds == 2))
    result = quality.run(data=str(corpus / "data"), preset="tiny", steps=6, tokens=64, length=32, lr=1e-3, dropout=0.1,
                         every=3, seed=1, threads=1, precisions=["fp32"], peers=["HF sdpa fp32"])
    ours, theirs = result["rows"]
    assert ours["curve"] == [[0, 0.0, 2.0], [3, 2.0, 1.0], [6, 6.0, 0.0]] and ours["median"] == 3.0
    assert result["stopped_early"] and theirs["failed"] == "refused" and "curve" not in theirs


# ---- as a user types it


def command(capsys, monkeypatch, *args):
    """(exit code, the last line on stderr) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["bertfast", *map(str, args)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
            raise SystemExit(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().err.strip().splitlines()
    return exit_info.value.code or 0, lines[-1] if lines else ""


def test_every_mistake_is_one_line(corpus, tmp_path, capsys, monkeypatch):
    data, model = corpus / "data", corpus / "model.json"
    small = ["--model-config", model, "--steps", 4, "--tokens", 256, "--short-length", 32, "--long-length", 64]
    done = tmp_path / "done"
    assert command(capsys, monkeypatch, "pretrain", "--data", data, "--out", done, *small, "--save-every", 2)[0] == 0
    read_only = tmp_path / "file"
    read_only.write_text("")
    foreign = tmp_path / "foreign"
    prepare([str(corpus / "text.txt")], foreign, vocab_size=400, workers=1)
    words = (data / "vocab.txt").read_text().split("\n")[:-1]
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:5], *words[:4:-1]]))
    prepare([str(corpus / "text.txt")], tmp_path / "reordered", vocab=tmp_path / "vocab.txt", workers=1)
    (tmp_path / "text.txt").write_text("A single document. It has two sentences.")
    prepare([str(tmp_path / "text.txt")], tmp_path / "one", vocab=data, workers=1)
    untyped = tmp_path / "untyped.json"
    untyped.write_text(json.dumps({**json.loads(model.read_text()), "type_vocab_size": 1}))
    (tmp_path / "cut").mkdir()
    for file in data.iterdir():
        content = file.read_bytes()
        (tmp_path / "cut" / file.name).write_bytes(content[:-7] if file.name == "tokens.bin" else content)
    last = done / "checkpoint-4"
    mistakes = [
        ((["--data", tmp_path / "nowhere"]), "there is no prepared set"),
        ((["--data", tmp_path]), "is no prepared set: make one of your text with bertfast prepare"),
        ((["--data", data, *small[2:], "--init-from", last, "--out", last]), "holds a model or another run"),
        ((["--data", tmp_path / "cut"]), "tokens.bin is damaged"),
        ((["--data", data, "--preset", "gigantic"]), "preset 'gigantic' is unknown"),
        ((["--data", data, *small, "--tokens", 20]), "20 tokens is smaller than a sequence of 32"),
        ((["--data", data, *small, "--short-length", 256]), "has 128 positions"),
        ((["--data", data, *small, "--precision", "fp8"]), "precision 'fp8' is unknown"),
        ((["--data", data, *small, "--optimizer", "sgd"]), "optimizer 'sgd' is unknown"),
        ((["--data", data, *small, "--dropout", 1.5]), "dropout"),
        ((["--data", data, *small, "--out", read_only / "run"]), "cannot create"),
        ((["--data", foreign, *small[2:], "--init-from", last]), "with another vocabulary than that of"),
        ((["--data", data, *small, "--init-from", last]), "give one of --preset"),
        ((["--data", data, *small, "--preset", "mini"]), "--preset has no effect beside --model-config: remove it"),
        ((["--data", data, *small[2:], "--init-from", last, "--start", "normal"]), "--start has no effect beside"),
        ((["--data", data, *small, "--causal", "--nsp"]), "--nsp has no effect beside --causal"),
        ((["--data", data, *small, "--micro-batches", 1_000_000]), "256,000,000 tokens a step"),
        ((["--data", data, *small, "--tokens", 10**30]), "tokens a step"),
        ((["--data", data, *small, "--steps", 10**400]), "--steps must be between 1 and 10^12"),
        ((["--data", tmp_path / "reordered", *small[2:], "--init-from", last]), "with another vocabulary than that of"),
        ((["--data", tmp_path / "one", *small]), "single validation sample: more documents are needed"),
        ((["--data", data, *small, "--model-config", untyped]), "add --no-nsp"),
        ((["--data", data, *small, "--out", done]), "already holds a run"),
        ((["--data", foreign, *small, "--out", done, "--resume"]), "was trained on other data than"),
        ((["--out", done, "--resume", "--preset", "tiny"]), "--preset tiny (it began with mini)"),
    ]
    for args, message in mistakes:
        out = [] if "--out" in args else ["--out", tmp_path / "run"]
        code, line = command(capsys, monkeypatch, "pretrain", *args, *out)
        assert code == 2 and line.startswith("bertfast: ") and message in line, (message, code, line)
    edited = lambda **changes: json.dumps({"settings": {**vars(run_folder.stored_settings(done)), **changes}})
    untouched = edited()
    for path, content, message in [(done / "config.json", edited(lr=0.5), "with other settings: lr 0.001 (now 0.5)"),
                                   (done / "config.json", edited(steps="4"), "steps must be a whole number, got '4'"),
                                   (done / "config.json", edited(nsp=None), "nsp must be true or false, got None"),
                                   (done / "config.json", edited(lr=True), "config.json is damaged: lr must be a num"),
                                   (done / "config.json", edited(preset=3), "preset must be text, got 3"),
                                   (done / "config.json", edited(log_every=0), "--log-every must be between 1"),
                                   (last / "trainer.json", "{}", f"(its checksum differs): delete {last}, and"),
                                   (last / "trainer.json", "", f"(char 0): delete {last}, and --resume"),
                                   (done / "config.json", "[]", "is not that of a pretraining run"),
                                   (done / "config.json", '{"settings": null}', "is not that of a pretraining run")]:
        (done / "config.json").write_text(untouched)
        path.write_text(content)
        code, line = command(capsys, monkeypatch, "pretrain", "--out", done, "--resume")
        assert code == 2 and message in line
    code, line = command(capsys, monkeypatch, "fill-mask", "--model", "nowhere", "a [MASK]")
    assert code == 2 and "no checkpoint at nowhere; an id on the Hugging Face hub is OWNER/NAME" in line
    code, line = command(capsys, monkeypatch, "fill-mask", "--model", tmp_path / "nowhere", "a [MASK]")
    assert code == 2 and "no checkpoint at" in line


@pytest.mark.parametrize(("more", "message"), [(40, None), (-40, "a vocabulary of 600, but the model has 560")])
def test_a_word_table_of_another_size_than_the_vocabulary(more, message, corpus, tmp_path):
    """Filled up to a round size it is fine; smaller it is refused."""
    config = bertfast.BertConfig(vocab_size=600 + more, **{"hidden_size": 32, "num_hidden_layers": 2,
                                 "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128})
    bertfast.BertForPreTraining(config).save_pretrained(tmp_path / "given")
    for name in ("vocab.txt", "tokenizer.json"):
        shutil.copy(corpus / "data" / name, tmp_path / "given")
    onwards = settings(corpus, model_config=None, init_from=str(tmp_path / "given"), steps=2, save_every=1)
    if message:
        with pytest.raises(UserError, match=message):
            FillMask(tmp_path / "given")
        with pytest.raises(UserError, match="the model has 560"):
            start(tmp_path / "run", onwards, resume=False)
        return
    (guesses,) = FillMask(tmp_path / "given")("the [MASK] of", top=1000)
    assert len(guesses) == 600 and sum(p for _, p in guesses) == pytest.approx(1, abs=1e-4)
    start(tmp_path / "run", onwards, resume=False).train()
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    assert start(tmp_path / "run", onwards, resume=True).step == 1
    shutil.rmtree(tmp_path / "run")
    for name in ("vocab.txt", "tokenizer.json"):  # whose vocabulary it is, nobody knows
        (tmp_path / "given" / name).unlink()
    with pytest.raises(UserError, match="the model has 640"):
        start(tmp_path / "run", onwards, resume=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_write_a_checkpoint(number, code, corpus, tmp_path):
    small = ["--model-config", corpus / "model.json", "--tokens", "256", "--short-length", "32", "--long-length", "64"]
    out = tmp_path / "a long name, of a project and a machine, which no line is to be folded in, [v2]"
    args = [sys.executable, "-c", "from bertfast.cli import main; main()", "pretrain", "--out", out]
    first = subprocess.Popen([*args, "--data", corpus / "data", *small, "--steps", "100000", "--log-every", "1"],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(number)
    output, _ = first.communicate(timeout=60)
    checkpoint = run_folder.latest(out)
    assert checkpoint and rows(out)[-1]["step"] == run_folder.step_of(checkpoint)
    assert first.returncode == code
    assert output.endswith(f"\nstopped; {checkpoint}. Go on with: bertfast pretrain --out '{out}' --resume\n")


def test_output_that_cannot_be_written_stops_with_a_checkpoint(corpus, tmp_path):
    small = ["--model-config", corpus / "model.json", "--tokens", "256", "--short-length", "32", "--long-length", "64"]
    args = [sys.executable, "-c", "from bertfast.cli import main; main()", "pretrain", "--out", tmp_path]
    run = subprocess.Popen([*args, "--data", corpus / "data", *small, "--steps", "100000", "--eval-every", "1"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()  # as head does
    said = run.stderr.read()
    assert run.wait() == 2 and said == (f"bertfast: cannot write the output: Broken pipe\nstopped; "
        f"{run_folder.latest(tmp_path)}. Go on with: bertfast pretrain --out {tmp_path} --resume\n")


def in_processes(*args, ranks=({}, {}), **options):
    """`bertfast pretrain` in two processes, as torchrun starts them; `ranks`: the options of each alone."""
    program = [sys.executable, "-c", "from bertfast.cli import main; main()"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([*program, *map(str, [*args, *own])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
            for rank, own in enumerate(ranks)]


def ended(processes):
    outputs = [process.communicate(timeout=240) for process in processes]
    return [p.returncode for p in processes], *map(list, zip(*outputs))


def test_two_processes_train_as_one(corpus, tmp_path, monkeypatch):
    """From a checkpoint on, with dropout: the same weights and moments bit for bit, the same rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = settings(corpus, micro_batches=2, log_every=3, eval_every=3)  # a checkpoint within a row's steps
    start(tmp_path / "one", chosen, resume=False).train()
    torch.set_num_threads(threads)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoint-8")
    codes, outputs, errors = ended(in_processes("pretrain", "--out", tmp_path / "two", "--resume"))
    assert codes == [0, 0], errors
    assert "2, each 1 of a step's 2 batches" in " ".join(outputs[0].split()) and outputs[1] == ""
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a if k != "tokens_per_sec"), (a, b)
    trainers = [json.loads((run_folder.latest(tmp_path / n) / "trainer.json").read_text()) for n in ("one", "two")]
    for name in ("tokens_seen", "loader", "settings"):
        assert trainers[0][name] == trainers[1][name]


def test_processes_begin_a_run_and_stop_together(corpus, tmp_path):
    """torchrun itself, and Ctrl-C as a terminal sends it: to all of them, which torchrun then sends it again."""
    small = ["--model-config", corpus / "model.json", "--tokens", 256, "--short-length", 32, "--long-length", 64]
    args = ["--standalone", "--nproc-per-node", 2, "--no-python", sys.executable, "-m", "bertfast",
            "pretrain", "--out", tmp_path, "--data", corpus / "data", *small, "--steps", 100000, "--log-every", 1]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, args)], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() or len(rows(tmp_path)) < 3:
        assert run.poll() is None and time.monotonic() < deadline, run.stdout.read()
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert " ".join(output.split()).count("Go on with: bertfast pretrain") == 1, output
    checkpoint = run_folder.latest(tmp_path)
    assert checkpoint and rows(tmp_path)[-1]["step"] == run_folder.step_of(checkpoint)
    assert run_folder.stored_settings(tmp_path).micro_batches == 2  # one a process, where nothing else is said


def test_at_a_stop_all_processes_wait_for_the_checkpoint(corpus, tmp_path, monkeypatch):
    run = start(tmp_path, settings(corpus), resume=False)
    there = []
    monkeypatch.setattr(pretrain.processes, "wait", lambda: there.append(run_folder.latest(tmp_path)))
    run.stopping = 143
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert there == [tmp_path / "checkpoint-1"]


@pytest.mark.parametrize(("own", "message"), [
    ((["--seed", 1], ["--seed", 2]), "the processes differ in settings or data"),
    ((["--micro-batches", 3], ["--micro-batches", 3]), "cannot be dealt out evenly to 2 processes"),
])
def test_a_mistake_in_several_processes_is_one_line(own, message, corpus, tmp_path):
    small = ["--model-config", corpus / "model.json", "--steps", 2, "--short-length", 32, "--long-length", 64]
    args = ["pretrain", "--out", tmp_path / "run", "--data", corpus / "data", *small]
    codes, outputs, errors = ended(in_processes(*args, ranks=own))
    assert codes == [2, 2] and message in errors[0] and errors[0].count("\n") == 1 and errors[1] == ""
    assert not (tmp_path / "run").exists()


def test_only_pretraining_runs_in_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "LAUNCHED", 2)
    code, line = command(capsys, monkeypatch, "fill-mask", "--model", tmp_path, "a [MASK]")
    assert (code, line) == (2, "bertfast: fill-mask runs in one process: start it without torchrun")


def test_without_triton_and_extension_it_trains_and_says_why_it_is_slow(corpus, tmp_path):
    program = f"""
import sys
from pathlib import Path
sys.modules["triton"] = None  # importing it raises ImportError
from bertfast.pretrain import start
from bertfast.run_folder import Settings
run = start(Path({str(tmp_path / 'run')!r}), Settings(**{vars(settings(corpus, steps=3))!r}), False)
print(run.describe("")["kernels"], "|", run.describe("")["loader"])
run.train()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "BERTFAST_NO_EXT": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "reference: BERTFAST_NO_EXT=1" in done.stdout and "numpy, slower" in done.stdout
    assert (tmp_path / "run/checkpoint-3/model.safetensors").exists()


def test_a_gradient_sink_changes_nothing(corpus, tmp_path):
    """The tied table's gradient, collected in one buffer, is autograd's sum of its two parts."""
    run = start(tmp_path, settings(corpus), resume=False)
    batch, embeddings = run.loader(run.train_data, 32).batch(0), run.model.bert.embeddings
    seed, table = torch.tensor([3]), embeddings.word_embeddings.weight
    assert embeddings.sink is not None
    gradients = []
    for sink in (embeddings.sink, None):
        for loss in ("loss", "nsp_loss"):  # with the projection's part, and without
            embeddings.sink = sink
            if sink:
                sink.filled = False
                sink.buffer.fill_(float("nan"))
            table.grad = None
            if loss == "nsp_loss":
                pooled = run.model.bert.pooler(run.model.bert.encode(batch, seed)[batch.cls_index])
                pooled.square().sum().backward()
            else:
                run.model(batch, seed=seed).loss.backward()
            gradients.append((sink.buffer if sink else table.grad).clone())
    for with_sink, without in zip(gradients[:2], gradients[2:]):
        torch.testing.assert_close(with_sink, without, rtol=1e-4, atol=1e-7)


LOOPS = {
    "a part of the loss": lambda model, ids: model(ids, labels=ids).loss / 4,
    "a loss of one's own": lambda model, ids: torch.nn.functional.cross_entropy(model(ids).logits[0], ids[0]),
    "a loss only looked at": lambda model, ids: model(ids, labels=ids).loss.detach() + model(ids[:1]).logits.sum(),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_optimiser_lets_every_loop_have_its_gradients(loop, corpus):
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(bertfast.BertConfig.from_file(corpus / "model.json")).eval()
    given = copy.deepcopy(model)
    Optimizer(given)
    ids = torch.arange(24).view(3, 8) + 5
    for side in (model, given):
        LOOPS[loop](side, ids).backward()
    for (name, expected), p in zip(model.named_parameters(), given.parameters()):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_step_given_up_leaves_nothing_in_the_sink(corpus):
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(bertfast.BertConfig.from_file(corpus / "model.json")).eval()
    ids = torch.arange(24).view(3, 8) + 5
    norms = []
    for given_up in ("nothing", "a loss", "a loss and its gradients"):
        ours = copy.deepcopy(model)
        optimizer = Optimizer(ours, sink=True)
        if given_up != "nothing":
            loss = ours(ids, labels=ids).loss  # and then, say, there is no memory for the backward
        if given_up == "a loss":
            with pytest.raises(RuntimeError, match="call Optimizer.zero_grad"):
                optimizer.step(1e-3)
        elif given_up != "nothing":
            loss.backward()
        optimizer.zero_grad()
        ours(ids.flip(0), labels=ids).loss.backward()
        norms.append(float(optimizer.step(1e-3)))
    assert norms[0] == norms[1] == norms[2]


def test_the_sink_is_the_optimisers_alone(corpus):
    """A copy of the model, a saved one, and the model itself when its optimiser is gone train their word table."""
    model = bertfast.BertForMaskedLM(bertfast.BertConfig.from_file(corpus / "model.json"))
    optimizer = Optimizer(model, sink=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False), model]
    del optimizer
    ids = torch.arange(24).view(3, 8) + 5
    for other in others:
        other.eval()(ids, labels=ids).loss.backward()
        assert other.bert.embeddings.word_embeddings.weight.grad.any()


@pytest.mark.parametrize("hooked", [False, True])
def test_two_batches_of_a_step_meet_in_the_sink(hooked, corpus):
    """A hook between them costs no gradient of the table either."""
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(bertfast.BertConfig.from_file(corpus / "model.json")).eval()
    ids, norms = torch.arange(24).view(3, 8) + 5, []
    for sink in (True, False):
        ours = copy.deepcopy(model)
        optimizer = Optimizer(ours, sink=sink)
        ours(ids, labels=ids).loss.backward()
        if hooked:  # no longer fused
            ours.bert.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
        ours(ids.flip(0), labels=ids).loss.backward()
        norms.append(float(optimizer.step(1e-3)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_table_frozen_later_keeps_out_of_the_sink(corpus):
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(bertfast.BertConfig.from_file(corpus / "model.json")).eval()
    ids, norms = torch.arange(24).view(3, 8) + 5, []
    for sink in (True, False):
        ours = copy.deepcopy(model)
        optimizer = Optimizer(ours, sink=sink, weight_decay=0.0)
        table = ours.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        before = table.clone()
        ours(ids, labels=ids).loss.backward()
        norms.append(float(optimizer.step(1e-3)))
        assert torch.equal(table, before)
    assert norms[0] == norms[1]


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        Optimizer(torch.nn.Linear(2, 2).requires_grad_(False))


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    for message in ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"):
        monkeypatch.setattr(cli, "app", lambda message=message: (_ for _ in ()).throw(RuntimeError(message)))
        code, line = command(capsys, monkeypatch, "pretrain")
        assert code == 2 and line.startswith("bertfast: out of memory;") and message in line
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        cli.main()
