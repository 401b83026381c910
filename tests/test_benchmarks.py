"""The harness: it measures what it says, refuses what computes something else, and catches what got slower."""

import csv
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bertfast.benchmarks import (
    commands,
    contest,
    finetune,
    inference,
    job,
    moves,
    ops,
    plain,
    plots,
    pretrain,
    quality,
    report,
    roofline,
    step_profile,
    trainer,
)
from bertfast.benchmarks.cases import CASES
from bertfast.benchmarks.contest import Contender
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bertfast
from bertfast import cli, machine
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError
from bertfast.model import useful_flops
from bertfast.run_folder import Settings

ROOT = Path(__file__).parent.parent
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "vocab_size": 1500, "max_position_embeddings": 64}
BATCHES = {"data": None, "tokens": 256, "length": 32, "fill": 0.75, "vocab_size": 1500}
CONTENDERS = {
    pretrain.REFERENCE: (pretrain.hugging_face, pretrain.SETUPS[pretrain.REFERENCE]),
    "HF sdpa bf16 autocast": (pretrain.hugging_face, pretrain.SETUPS["HF sdpa bf16 autocast"]),
    "bertfast fp32": (pretrain.bertfast, {"precision": "fp32"}),
    "bertfast bf16": (pretrain.bertfast, {"precision": "bf16"}),
    "plain fp32": (pretrain.plain_torch, {"precision": "fp32", "compiled": False}),
    "plain bf16": (pretrain.plain_torch, {"precision": "bf16", "compiled": False}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = bertfast.BertConfig(**TINY, initializer_range=0.1)
    bertfast.BertForPreTraining(config).save_pretrained(folder)
    return folder


def made(rows, suite="ops", **more):
    """A result as a suite writes it."""
    return {"suite": suite, **contest.provenance(1), "machine": {}, "settings": {}, "rows": rows, **more}


def step_row(name, tokens_per_second, share=0.5, spread=0.02):
    seconds, dtype = 1 / tokens_per_second, "bf16" if "bf16" in name else "fp32"
    return {"key": "mini S=128 fill=100 %", "contender": name, "dtype": dtype, "failed": "", "samples": [seconds],
            "median": seconds, "spread": spread, "loss": 10.0, "tokens_per_second": tokens_per_second,
            "flops_per_second": 1e7 * tokens_per_second, "share": share}


STEP_SETTINGS = {"preset": "mini", "tokens": 2048, "sequences": 16, "length": 128, "fill": 1.0, "vocab_size": 30522,
                 "dropout": 0.1, "text": "zipf", "rounds": 3, "steps_a_turn": 2}


# ---- a training step


@pytest.mark.parametrize("fill", [0.5, 0.75, 1.0])
def test_batches_are_as_full_as_asked_and_padding_them_loses_nothing(fill):
    (batch,) = pretrain.make_batches(None, 256, 32, fill, n=1, vocab_size=1500)
    inputs = pretrain.padded(batch, 32)
    assert ("attention_mask" in inputs) == (fill < 1)
    attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert attended.float().mean() == pytest.approx(fill, abs=0.04) and attended[:, 0].all()
    assert torch.equal(inputs["input_ids"][attended], batch.input_ids)
    assert int((inputs["labels"] != -100).sum()) == batch.n_masked == int((batch.labels != -100).sum())
    lengths = batch.cu_seqlens.diff()[: batch.n_sequences]
    assert int(lengths.max()) == 32 and int(lengths.sum()) == batch.n_tokens
    with pytest.raises(UserError, match="fill"):
        pretrain.make_batches(None, 256, 32, 0.3)


def test_a_set_of_too_few_tokens_is_a_mistake(monkeypatch):
    special = SimpleNamespace(pad_id=0, cls_id=1, sep_id=2, mask_id=3)
    monkeypatch.setattr(pretrain, "Dataset", lambda data: SimpleNamespace(tokens=range(33), tokenizer=special))
    assert pretrain.make_batches("small", 32, 32, 1.0, n=1)[0].n_tokens == 32
    with pytest.raises(UserError, match="small holds 33 tokens, too few for a sequence of 33"):
        pretrain.make_batches("small", 33, 33, 1.0)


def test_moves_are_for_the_precisions_whose_peaks_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "choose_precision", lambda wanted, device: ("fp16", "as on a GPU without bf16"))
    with pytest.raises(UserError, match="fp32 or bf16"):
        moves.run(data=None, preset="tiny", tokens=64, length=32, precision="auto", rounds=1, threads=1)


def test_every_contender_computes_the_same_step_and_a_wrong_one_is_refused(checkpoint, tmp_path):
    def facts(make, arguments, folder=checkpoint):
        turns = make(checkpoint=str(folder), batches=BATCHES, turn_steps=1, **arguments)
        first, turn = next(turns), next(turns)
        assert turn["seconds"] > 0 and turn["loss"] < 0.9 * first["losses"][0] + 2
        return first

    found = {name: facts(*entry) for name, entry in CONTENDERS.items()}
    assert pretrain.agreement({**found, "machine": {}}) == {}
    reference = found[pretrain.REFERENCE]
    assert found["plain fp32"]["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["bertfast fp32"]["norms"] == pytest.approx(reference["norms"], rel=1e-3)

    state = load_file(checkpoint / "model.safetensors")  # one attention projection forgotten
    state["bert.encoder.layer.0.attention.output.dense.weight"].zero_()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    for name in ("bertfast fp32", "plain bf16"):
        refused = pretrain.agreement({**found, name: facts(*CONTENDERS[name], tmp_path)})
        assert list(refused) == [name] and "refused" in refused[name]


def test_the_plain_model_has_our_loss_and_gradients_on_unequal_lengths(checkpoint):
    (batch,) = pretrain.make_batches(**BATCHES, n=1)
    ours = bertfast.BertForPreTraining.from_pretrained(checkpoint).eval()
    model = plain.PlainBert(ours.config).load(ours.state_dict()).eval()
    wanted, found = ours(batch).loss, model(*plain.inputs(batch))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    wanted.backward(), found.backward()
    gradients = plain.PlainBert(ours.config).load({name: p.grad for name, p in ours.named_parameters()})
    for (name, p), gradient in zip(model.named_parameters(), gradients.parameters(), strict=True):
        torch.testing.assert_close(p.grad, gradient.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_a_turn_is_the_seconds_a_real_token_of_training_steps(monkeypatch):
    monkeypatch.setattr(pretrain, "timed", lambda call, device: (30.0, call()))
    model, seen = torch.nn.Linear(1, 1), []
    step = lambda i: (seen.append((i, model.training)), (torch.tensor(float(i)), 1.0))[1]
    turns = pretrain._train(model, step, [SimpleNamespace(n_tokens=i + 1) for i in range(8)], 0, turn_steps=2)
    assert next(turns)["losses"] == [0.0, 1.0]
    assert next(turns) == {"seconds": 30 / (7 + 8), "loss": 7.0}
    assert next(turns) == {"seconds": 30 / (2 + 3), "loss": 2.0}
    assert seen == [(i % 8, i > 1) for i in range(11)]


@pytest.mark.parametrize(("name", "share"), [("bertfast bf16", 0.25), ("bertfast fp32", 0.5)])
def test_a_share_is_that_of_the_peak_in_the_same_dtype(name, share):
    outcome = contest.Outcome({}, [{"seconds": 2e-4, "loss": 1.0}])
    row = pretrain._row(name, outcome, 1e9, {"fp32": 1e13, "bf16": 2e13}, False, STEP_SETTINGS)
    assert (row["share"], row["tokens_per_second"]) == pytest.approx((share, 5000))


@pytest.mark.parametrize("name", [pretrain.REFERENCE, "plain fp32"])
def test_memory_is_that_of_a_step_not_of_the_libraries_that_it_loads(name, checkpoint):
    make, setup = CONTENDERS[name]
    arguments = {"checkpoint": str(checkpoint), "batches": BATCHES, "turn_steps": 1, "memory": True, **setup}
    code = f"""import sys
from bertfast.benchmarks import pretrain
loaded = []
pretrain._resident = lambda: loaded.extend(sys.modules) or 0
turns = pretrain.{make.__name__}(**{arguments!r})
next(turns), next(turns)
print(*(name for name in set(sys.modules) - set(loaded) if name.startswith(("transformers.", "torch._"))))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("move", moves.MOVES)
def test_a_move_taken_back_runs_without_its_op_and_computes_the_same(move, checkpoint, monkeypatch):
    for owner, name in ((moves.model.BertModel, "encode"), (moves.model.BertLayer, "forward"),
                        (bertfast.optim, "GradientSink"), (pretrain, "Optimizer"), (moves.nn, "joined_linear"),
                        (moves.ops.linear, "suits"), (moves.ops.linear, "_forms_again"),
                        *((getattr(moves.nn, block), "forward") for block in
                          ("Embeddings", "SelfAttention", "AddLayerNorm", "FeedForward", "MLMHead"))):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    arguments = {"checkpoint": str(checkpoint), "batches": {**BATCHES, "fill": 1.0}, "precision": "fp32",
                 "turn_steps": 1}
    wanted = next(pretrain.bertfast(**arguments))
    turns = moves.without(move, **arguments)
    found = next(turns)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        next(turns)
    counts = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("bertfast::")}
    called = " ".join(counts)
    gone = [op for op in move.split(" and ") if "_" in op or op == "attention"]
    if move == "gemm":  # which a step of so few rows in fp32 doesn't call anyway
        for dtype in (torch.bfloat16, torch.float32):
            assert not moves.ops.linear.suits(*2 * [torch.ones(256, 64, dtype=dtype)])
    if move.startswith("GELU"):
        assert counts["bertfast::bias_gelu_fwd"] == counts["bertfast::bias_gelu_bwd"]
    assert called and not any(f"bertfast::{op}" in called for op in gone)
    cost = moves.MOVES[move][1](moves.Shape(2048, 16, 128, 304, bertfast.BertConfig.preset("mini"), 2))
    assert cost.flops > 0 or cost.bytes > 0 or cost.bytes < 0 and move.startswith("GELU")  # a price, not a saving


@pytest.mark.full
def test_the_command_measures_in_processes_and_reports(tmp_path, capsys, monkeypatch):
    arguments = "bench pretrain --preset tiny --tokens 256 --length 32 --rounds 1 --threads 1 --quick --out"
    monkeypatch.setattr("sys.argv", ["bertfast", *arguments.split(), str(tmp_path / "step.json")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    result = report.load(tmp_path / "step.json")
    fast = machine.multiplies_bf16(machine.choose_device())
    assert all(r["failed"] == ("" if fast or r["dtype"] == "fp32" else contest.NO_BF16) for r in result["rows"])
    assert all(r["tokens_per_second"] > 0 and 0 < r["share"] < 1 for r in result["rows"] if not r["failed"])
    assert result["command"].startswith("bertfast bench pretrain --preset tiny") and str(tmp_path) not in str(result)
    assert "tokens/s" in capsys.readouterr().out


def test_useful_flops_of_the_roofline_are_those_of_the_training_loop():
    config = bertfast.BertConfig.preset("mini")
    (batch,) = pretrain.make_batches(None, 2048, 128, 1.0, n=1)
    costs = roofline.step_costs(config, batch.n_tokens, 128, 4)
    flops = sum(cost.flops for cost in costs.values())
    attention = costs["attention"].flops  # five products backward here, four there
    assert flops - attention / 7 == pytest.approx(useful_flops(config, batch), rel=5e-3)
    model = bertfast.BertForPreTraining(config)
    assert roofline.parameters_of(config) == sum(p.numel() for p in model.parameters())


def test_costs_are_those_counted_by_hand():
    forward, backward = roofline.attention_cost(((3, 5), 0, 2, 4), 2)  # a tensor: 128 bytes; a product: 544 FLOPs
    assert (forward, backward) == (roofline.Cost(1088, 512), roofline.Cost(2720, 1024))
    assert roofline.gemm_cost(2, 3, 5, 4) == roofline.Cost(180, 372)
    assert [roofline.optimizer_cost(10, itemsize).bytes for itemsize in (4, 2)] == [280, 260]


# ---- contests


def taking(seconds):
    """A contender whose turns take so long, or raise what stands there instead."""
    yield {}
    for took in seconds:
        if isinstance(took, type):
            raise took
        yield {"seconds": took}


@pytest.fixture
def asked(monkeypatch):
    """Contenders run in this process; the names of those that were asked to go on, in order."""
    names = []

    class Here:
        def __init__(self, contender, threads):
            self.name, self.turns, self.pipe = contender.name, contender.make(**contender.arguments), io.BytesIO()

        def ask(self):
            names.append(self.name)

        def answer(self):
            return next(self.turns), ""

        def end(self):
            pass

    monkeypatch.setattr(contest, "_Process", Here)
    return names


def test_ctrl_c_drops_the_round_it_struck_of_contenders_that_alternate(asked):
    turns = {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, KeyboardInterrupt], "c": [6.0, 7.0, 8.0]}
    contenders = [Contender(name, taking, {"seconds": seconds}) for name, seconds in turns.items()]
    outcomes, stopped = contest.contest(contenders, rounds=3, threads=1, check=lambda facts: {})
    assert asked == [*"abc", *"abc", *"abc", *"ab"]  # the start, and the rounds
    assert stopped and {n: o.values() for n, o in outcomes.items()} == {n: s[:2] for n, s in turns.items()}


def test_heats_share_their_first_contenders_and_are_put_to_one_pace(asked):
    paces = iter([[1.0, 1.0], [3.0, 3.0], [9.0, 9.0]])
    turns = {"machine": [7.0, 7.0], "x": [10.0, 20.0], "y": [30.0, 60.0], "z": [KeyboardInterrupt]}
    contenders = [Contender("pace", lambda: taking(next(paces)), {})]
    contenders += [Contender(name, taking, {"seconds": seconds}) for name, seconds in turns.items()]
    outcomes, stopped = contest.contest(contenders, 2, 1, lambda facts: {}, at_once=3, shared=2)
    assert asked == 3 * ["pace", "machine", "x"] + 3 * ["pace", "machine", "y"] + 2 * ["pace", "machine", "z"]
    assert stopped and outcomes.pop("z").failed == "not measured: stopped"
    assert {n: o.values() for n, o in outcomes.items()} == {
        "pace": [1.0, 1.0, 3.0, 3.0], "machine": 4 * [7.0], "x": [20.0, 40.0], "y": [20.0, 40.0]}


def test_heats_that_measure_memory_have_no_pace(asked):
    contenders = [Contender(name, itertools.repeat, {"object": {"peak": 2.0}}) for name in "abc"]
    outcomes, _ = contest.contest(contenders, 1, 1, lambda facts: {}, at_once=2)
    assert {n: o.values("peak") for n, o in outcomes.items()} == {"a": [2.0, 2.0], "b": [2.0], "c": [2.0]}


def test_contenders_take_turns_and_those_that_fail_are_reported():
    contenders = [
        Contender("good", itertools.repeat, {"object": {"seconds": 1.0}}),
        Contender("dies", os._exit, {"status": 3}),
        Contender("stops", itertools.repeat, {"object": {"seconds": 1.0}, "times": 2}),
        Contender("wrong", itertools.repeat, {"object": {"seconds": 2.0}}),
        Contender("lacks", importlib.import_module, {"name": "absent_package"}),
    ]
    check = lambda facts: {"wrong": "refused: 2"} if facts["wrong"]["seconds"] == 2.0 else {}
    outcomes, stopped = contest.contest(contenders, rounds=2, threads=1, check=check)
    assert not stopped
    assert {n: len(o.turns) for n, o in outcomes.items()} == {"good": 2, "dies": 0, "stops": 1, "wrong": 0,
                                                             "lacks": 0}
    assert outcomes["good"].failed == "" and outcomes["wrong"].failed == "refused: 2"
    assert "exit code 3" in outcomes["dies"].failed and "StopIteration" in outcomes["stops"].failed
    assert outcomes["lacks"].failed == "No module named 'absent_package': pip install 'bertfast[hf]'"


def test_bf16_is_left_out_where_its_products_are_a_fallback(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    contenders = [Contender(name, itertools.repeat, {"object": {"seconds": 1.0}}) for name in ("x bf16", "x fp32")]
    outcomes, _ = contest.contest(contenders, rounds=1, threads=1, check=lambda facts: {})
    assert (outcomes["x bf16"].failed, outcomes["x bf16"].turns) == (contest.NO_BF16, [])
    assert (outcomes["x fp32"].failed, len(outcomes["x fp32"].turns)) == ("", 1)
    precision, reason = machine.choose_precision("bf16", torch.device("cpu"))
    assert precision == "bf16" and "fp32 is many times faster" in reason
    monkeypatch.setattr(ops, "TABLES", {"quick": {}})
    monkeypatch.setattr(machine, "keep_pages", lambda: None)
    with contest.console.capture() as told:
        assert ops.run(quick=True, only=["bias_gelu"], rounds=1, threads=torch.get_num_threads())["rows"] == []
    assert told.get() == f"bf16 {contest.NO_BF16}\n"


def test_freed_pages_are_kept_and_huge():
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not thp.exists() or "[never]" in thp.read_text():
        pytest.skip("this Linux gives no huge pages")
    zones = [line.split()[4:] for line in Path("/proc/buddyinfo").read_text().splitlines()]
    if sum(int(free) << order for zone in zones for order, free in enumerate(zone) if order >= 9) < 1 << 17:
        pytest.skip("less than 512 MiB of memory are free in one piece")
    program = """
import torch
from bertfast import machine
def mib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith(name + ":")) >> 10
said = machine.keep_pages()
before = mib("Rss")
tensors = [torch.ones(16 << 20) for _ in range(4)]
del tensors
print(said, mib("Rss") - before, mib("AnonHugePages"), sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, kept, huge = ran.stdout.strip().split("|")
    assert said == "glibc keeps freed pages (mallopt), huge ones where Linux has them (madvise)"
    assert int(kept) >= 250 and int(huge) >= 200  # MiB of 256


@pytest.mark.skipif(sys.platform != "linux", reason="pages are kept on Linux alone")
def test_pages_are_not_reserved_where_addresses_are_limited():
    program = """
import resource
from bertfast import machine
vm = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (vm() + (64 << 30),) * 2)
before = vm()
print(machine.keep_pages(), vm() - before >> 20, sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, reserved = ran.stdout.strip().split("|")
    assert said == "glibc keeps freed pages (mallopt)" and int(reserved) < 100  # MiB


def test_the_machine_is_measured_by_its_best_turns(monkeypatch):
    rates, seconds = iter([3.0, 5.0, 4.0, 2.0]), iter([4.0, 2.0, 3.0, 5.0, 8.0, 8.0, 4.0, 8.0])
    monkeypatch.setattr(contest, "MEASURED_COPY", 64)
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: next(rates))
    monkeypatch.setattr(contest, "timed", lambda call, device, source: (next(seconds), call(source)))
    facts, *turns = itertools.islice(contest.yardstick(), 3)
    assert (facts, turns) == ({}, [{"fp32": 3.0, "bf16": 5.0, "copy": 64.0}, {"fp32": 4.0, "bf16": 2.0, "copy": 32.0}])
    assert contest.peaks(contest.Outcome({}, turns)) == {"fp32": 4.0, "bf16": 5.0, "copy": 64.0}
    assert contest.peaks(contest.Outcome()) == {}


def test_a_profile_is_seconds_a_step_of_the_kinds_that_have_a_formula():
    events = [SimpleNamespace(key=key, self_cpu_time_total=1e6 * step_profile.STEPS * seconds) for key, seconds in (
        ("aten::add", 0.5), ("aten::addmm", 1.0), ("bertfast::gemm", 2.0), ("bertfast::adamw_step", 0.25))]
    assert list(step_profile._spent(events).items()) == [
        ("linear layers", 3.0), ("rest", 0.5), ("grad_norm and adamw_step", 0.25)]
    costs = roofline.step_costs(bertfast.BertConfig.preset("mini"), 2048, 128, 4)
    assert set(step_profile.KINDS.values()) <= set(costs)


def test_middle_and_reached():
    assert contest.middle([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "spread": pytest.approx(2 / 3)}
    assert quality.reached([[0, 0.0, 7.0], [10, 5.0, 6.0], [20, 10.0, 5.0]], 5.5) == 7.5
    assert quality.reached([[0, 0.0, 7.0], [10, 5.0, 6.0]], 5.5) is None


def test_other_embeddings_and_another_start_are_refused():
    off = {inference.REFERENCE: 0.0, "a fp32": 5e-6, "b fp32": 2e-5, "a bf16": 0.01, "b bf16": 0.05, "c bf16": np.nan}
    facts = {name: {"embeddings": np.eye(4) + [[0, error, 0, 0]]} for name, error in off.items()}
    for found in facts.values():
        found["embeddings"] /= np.linalg.norm(found["embeddings"], axis=1, keepdims=True)
    assert list(inference.agreement(facts)) == ["b fp32", "b bf16", "c bf16"]
    alone = {"bertfast fp32": facts["a fp32"], "bertfast.patch fp32": facts["b fp32"]}
    assert "nothing else says what is right" in inference.agreement(alone)["bertfast fp32"]
    (refused,) = inference.agreement({**alone, "transformers sdpa fp32": facts["a fp32"]}).values()
    assert "differ from transformers sdpa fp32's by" in refused
    steps = {name: {"losses": [1.0, loss], "norms": [1.0, 1.0]} for name, loss in (
        ("bertfast fp32", 1.1), ("bertfast bf16", 1.0), ("plain fp32", 1.0))}
    assert pretrain.agreement(steps) == {
        "bertfast fp32": "refused: losses of step 2 with dropout off: 1.1, plain fp32's 1"}
    assert list(pretrain.agreement(steps, "bertfast fp32")) == ["bertfast bf16", "plain fp32"]
    del steps["plain fp32"]
    assert list(pretrain.agreement(steps)) == list(steps)  # nobody vouches for itself
    starts = {name: {"loss": loss, "losses": [9.0, own]} for name, loss, own in (
        ("first fp32", 7.0, 9.0), ("near bf16", 7.005, 9.01), ("far fp32", 7.1, 9.0), ("wrong labels fp32", 7.0, 9.1))}
    assert list(quality._same_start(starts)) == ["far fp32", "wrong labels fp32"]


def test_embeddings_of_both_models_are_the_same_and_timed_a_text(monkeypatch, tmp_path):
    torch.manual_seed(0)
    texts = ["a b", "b " * 40, "c a b"]
    tokenizer = Tokenizer.train(texts, 100)
    tokenizer.save(tmp_path)
    sizes = {**TINY, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32}
    config = bertfast.BertConfig(**sizes, initializer_range=0.5)
    bertfast.BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(inference, "timed", lambda call, device: (6.0, call()))
    facts = {}
    for name, make in (("transformers sdpa fp32", inference.transformers_mean),
                       ("bertfast fp32", inference.bertfast_native)):
        facts[name], turn = itertools.islice(make(str(tmp_path), texts, 2, "fp32"), 2)
        assert turn == {"seconds": 2.0}
    assert inference.agreement(facts) == {}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("1_Pooling/config.json", {"pooling_mode": "cls"}, "does not pool by the mean"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "does not pool by"),
    ("modules.json", [{"type": f"library.{kind}"} for kind in ("Transformer", "Pooling", "Dense")], "a Dense module"),
])
def test_models_that_are_more_than_a_mean_have_no_embeddings_to_compare(name, content, message, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    for file, value in (("config.json", {}), (name, content)):
        (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        inference.run(model=tmp_path, text=tmp_path / "text", batches=[1], sentences=1, rounds=1, threads=1)


def test_distilbert_and_old_and_new_files_of_sentence_transformers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "contest", lambda *arguments: ({}, False))
    for name, values in (("config.json", {"dim": 64, "max_position_embeddings": 512}), ("text", "a"),
                         ("tokenizer_config.json", {"model_max_length": 256})):
        (tmp_path / name).write_text(json.dumps(values))
    found = inference.run(model=tmp_path, text=tmp_path / "text", batches=[1], sentences=1, rounds=1, threads=1)
    assert found["settings"]["hidden_size"] == 64 and inference._longest(tmp_path) == 256
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 384}))
    assert inference._longest(tmp_path) == 384


def test_a_slower_machine_or_a_quick_yardstick_is_no_regression():
    row = {"key": "k", "contender": "bertfast", "failed": "", "median": 1.0, "share": 0.5, "spread": 0.0}
    result = lambda **changes: {"suite": "ops", "rows": [{**row, **changes}]}
    assert report.compare(result(), result(share=0.3)) == report.compare(result(), result(median=2.0)) == []
    assert [r["why"] for r in report.compare(result(), result(median=2.0, share=0.3))] == [
        "1.67 times as slow (allowed 1.05)"]
    before, after = ({**result(), "hardware": {"cpu": cpu}, "versions": {"torch": "2.13"}} for cpu in "ab")
    assert report.changed_settings(before, after) == [("cpu", "a", "b")]


@pytest.mark.parametrize(("dev", "message"), [("sentence\tlabel\n", "has no sentence to judge by"),
                                              (f"sentence\tlabel\n{'a' * 131073}\t1\n", "field larger than")])
def test_a_dev_file_that_judges_nothing_is_told_before_training(dev, message, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find", lambda model: None)
    monkeypatch.setattr(contest, "contest", None)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "a\t1\n" * 32)
    (tmp_path / "dev.tsv").write_text(dev)
    limit = csv.field_size_limit(131072)  # Python's, which reading for fine-tuning raises
    with pytest.raises(UserError, match=f"dev.tsv.* {message}"):
        trainer.run(model="", train=str(tmp_path / "train.tsv"), dev=str(tmp_path / "dev.tsv"), count=32, rounds=1,
                    seed=0, threads=1)
    csv.field_size_limit(limit)


def test_all_left_out_is_a_result_too(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    outcomes, stopped = contest.contest([Contender("a bf16", itertools.repeat, {})], 1, 1, lambda facts: {})
    assert outcomes["a bf16"].failed == contest.NO_BF16 and not stopped


def test_a_fine_tuning_whose_machine_was_not_measured_has_no_share():
    outcome = contest.Outcome({}, [{"seconds": 0.01, "flops": 1e9}])
    row = finetune._row("sst2", "bertfast fp32", outcome, {})
    assert row["median"] == 0.01 and "share" not in row
    assert finetune._row("sst2", "bertfast fp32", outcome, {"fp32": 1e12, "bf16": 2e12})["share"] == pytest.approx(0.1)


def test_a_result_names_the_commit_of_this_code_and_no_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/bin/bertfast", "bench", "--data", "/home/me/novels/", "--out=/home/me/a.json"])
    assert contest.provenance(1)["command"] == "bertfast bench --data novels/ --out=a.json"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    (tmp_path / "contest.py").touch()
    monkeypatch.setattr(contest, "__file__", str(tmp_path / "contest.py"))  # installed within another project
    assert contest._commit() is None
    subprocess.run([*git, "add", "contest.py"], check=True)
    assert contest._commit().endswith(" + changes")


# ---- ops: a slow one is caught, a wrong one refused


@pytest.fixture(scope="module")
def op_rows():
    """bias_gelu as it is, slowed down, and wrong, each against eager."""
    def slow(t, p):
        time.sleep(0.005)
        return CASES["bias_gelu"].fused(t, p)

    fused, eager = CASES["bias_gelu"].fused, ops.BEST["bias_gelu"]
    sides = {"as it is": fused, "slow": slow, "wrong": lambda t, p: fused(t, p) * 1.01}
    return {name: ops.measure("bias_gelu", (256, 64), "fp32", {"bertfast": call, "eager": eager}, 3)
            for name, call in sides.items()}


def test_a_slowed_op_is_caught_and_a_wrong_one_refused(op_rows, tmp_path, capsys, monkeypatch):
    results = {name: made(rows) for name, rows in op_rows.items()}
    assert not any(r["failed"] for r in op_rows["as it is"]) and all(r["rate"] > 0 for r in op_rows["as it is"])
    assert report.compare(results["as it is"], results["as it is"]) == []
    worse = {row["key"]: row["why"] for row in report.compare(results["as it is"], results["slow"])}
    assert "times as slow" in worse["bias_gelu 256x64 fp32 forward"]
    refused = report.compare(results["as it is"], results["wrong"])
    assert len(refused) == 2 and all("refused" in row["why"] for row in refused)
    assert [r["failed"] for r in op_rows["wrong"] if r["contender"] == "eager"] == ["", ""]

    for name in ("as it is", "slow"):
        report.write(results[name], tmp_path / f"{name}.json")
    for pair, code in ((["as it is", "slow"], 1), (["slow", "slow"], 0)):
        paths = [str(tmp_path / f"{name}.json") for name in pair]
        monkeypatch.setattr("sys.argv", ["bertfast", "bench", "compare", *paths])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    assert "bias_gelu 256x64 fp32 forward: bertfast" in capsys.readouterr().out


@pytest.mark.parametrize("op", ops.BEST)
def test_plain_pytorch_computes_what_the_table_defines(op):
    shape = {"embedding_sum": (24, 32, 100), "attention_full": ((16, 16), 0, 2, 16),
             "masked_vocab_projection": (12, 32, 100)}.get(op, (24, 32))
    rows = ops.measure(op, shape, "fp32", {"eager": ops.BEST[op], "bertfast": CASES[op].fused}, 1)
    assert [r["failed"] for r in rows] == [""] * len(rows)
    assert all(r["share"] > 0 and r["median"] > 0 for r in rows)


def test_a_right_output_with_wrong_gradients_is_refused():
    def half_right(t, p):
        y = CASES["bias_gelu"].fused(t, p)
        return y.detach() + 1.01 * (y - y.detach())

    rows = ops.measure("bias_gelu", (24, 32), "fp32", {"bertfast": half_right, "eager": ops.BEST["bias_gelu"]}, 1)
    refused = {row["contender"]: row["failed"] for row in rows}
    assert refused["bertfast"].startswith(("refused: x", "refused: bias")) and refused["eager"] == ""


def test_the_optimiser_is_compared_and_checked(monkeypatch):
    monkeypatch.setattr(ops.BertConfig, "preset", lambda name: bertfast.BertConfig(**TINY))
    for dtype in ("fp32", "bf16"):
        rows = ops.optimizer_rows("tiny", dtype, 1)
        assert [(r["contender"], r["failed"]) for r in rows] == [("bertfast", ""), ("eager", "")]
    step = ops.Optimizer.step
    for factor in (0.0, 1.01):
        monkeypatch.setattr(ops.Optimizer, "step", lambda self, lr, factor=factor: step(self, factor * lr))
        ours, eager = ops.optimizer_rows("tiny", "bf16", 1)
        assert "refused" in ours["failed"] and not eager["failed"]


def test_the_ops_under_pytest_benchmark_use_all_slots_and_are_checked(monkeypatch):
    from bertfast.benchmarks import test_ops

    seen = []
    benchmark = SimpleNamespace(pedantic=lambda call, arguments, **options: seen.append(call.__self__), extra_info={},
                                stats=SimpleNamespace(stats=SimpleNamespace(median=1.0)))
    test_ops.test_op(benchmark, "masked_vocab_projection", (12, 32, 100), "fp32", "bertfast")
    assert int(seen[0].tensors["labels"].min()) >= 0
    monkeypatch.setitem(ops.BEST, "bias_gelu", lambda t, p: CASES["bias_gelu"].fused(t, p) * 1.01)
    with pytest.raises(AssertionError, match="refused: "):
        test_ops.test_op(benchmark, "bias_gelu", (24, 32), "fp32", "eager")
    assert len(seen) == 1


# ---- reports


def test_a_slower_trainer_is_noticed_and_results_without_times_are_refused():
    row = {"key": "trainer", "contender": "patched fp32", "failed": "", "spread": 0.0}
    before, after = (made([{**row, "median": seconds}], "trainer") for seconds in (0.01, 0.1))
    assert [row["why"] for row in report.compare(before, after)] == ["10.00 times as slow (allowed 1.05)"]
    assert report.compare(after, before) == []
    assert [row["why"] for row in report.compare(before, made([], "trainer"))] == ["is missing"]
    fewer = {**before, "threads": 1, "settings": {"tokens": 512, "length": 128}}
    more = {**fewer, "threads": 2, "settings": {"tokens": 2048, "length": 128}}
    assert report.changed_settings(fewer, more) == [("threads", 1, 2), ("tokens", 512, 2048)]
    scores = made([{"key": "sst2", "contender": "bertfast", "failed": "", "metrics": {"f1": 0.9}}], "tasks")
    with pytest.raises(UserError, match="results of tasks have no time"):
        report.compare(scores, scores)


def test_a_model_that_learns_less_is_noticed():
    why = lambda was, now: [row["why"] for row in report.compare(*(made([{
        "key": "k", "contender": "bertfast fp32", "failed": "", "median": 1.0, "spread": 0.0, **more}], "quality")
        for more in (was, now)))]
    curve = lambda loss: {"curve": [[0, 0.0, 7.0], [10, 5.0, loss]]}
    assert why({"reached": [9.0, None]}, {"reached": [9.1, 5.0]}) == why(curve(5.0), curve(5.1)) == []
    assert why({"reached": [9.0]}, {"reached": [None]}) == ["takes for ever to a target that took 9.0 s"]
    assert why({"reached": [9.0]}, {"reached": [10.0]}) == ["takes 10.0 s to a target that took 9.0 s"]
    for loss, shown in ((7.0, "7.000"), (float("nan"), "nan")):
        assert why(curve(5.0), curve(loss)) == [f"ends at a loss of {shown}, before 5.000"]
    assert why({"accuracy": 0.9}, {"accuracy": 0.5}) == ["has an accuracy of 0.500, before 0.900"]
    assert why({"accuracy": 0.9}, {"accuracy": 0.89}) == why({"accuracy": 0.9}, {"accuracy": None}) == []


def test_readmes_say_what_the_results_say():
    found = report.results(ROOT / "benchmarks/results")
    for name in ("README.md", "benchmarks/README.md"):
        text = (ROOT / name).read_text()
        assert "<!-- bench " in text, name
        assert report.rewrite(text, found) == text, f"run: bertfast bench report benchmarks/results --readme {name}"


def test_a_readme_is_filled_from_results_and_only_there(tmp_path):
    rows = [step_row("bertfast fp32", 9000), step_row("HF sdpa fp32", 3000),
            {"key": "", "contender": "HF compiled fp32", "dtype": "fp32", "failed": "RuntimeError: no compiler"}]
    result = made(rows, "pretrain", settings=STEP_SETTINGS)
    report.write(result, tmp_path / "step.json")
    found = report.results(tmp_path)
    assert found["step"]["rows"] == result["rows"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench step -->\nold\n<!-- end -->\nafter\n")
    assert report.update([readme], found) == [readme] and report.update([readme], found) == []
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench step -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| bertfast fp32 | 9,000 | 3.00 | 90 | 50% | 2% |" in text and "no compiler" in text and "old" not in text
    plain = [step_row("bertfast bf16", 8000), step_row("bertfast fp32", 6000), step_row("plain fp32", 4000)]
    full = found | {"step_thread": made(plain, "pretrain", settings={**STEP_SETTINGS, "length": 512}), "other": {}}
    several = report.rewrite("<!-- bench step* -->\n<!-- end -->", full)
    assert "| mini | 128 | 100% | 2,048 | 1 | fp32 | 9,000 | 3.00 | – | 50% |\n| mini | 512 |" in several
    assert "| bf16 | 8,000 | – | 2.00 | 50% |\n\n" in several
    hardware = result["hardware"]
    where = f"{hardware['cores']} cores of {hardware['cpu']}: step.json, step_thread.json.\n<!-- end -->"
    assert several.endswith(where)
    lost = made([{**plain[0], "failed": "refused: losses"}, plain[2]], "pretrain", settings=STEP_SETTINGS)
    lines = report.rewrite("<!-- bench step* -->\n<!-- end -->", full | {"step_2": lost})
    assert "| mini | 128 | 100% | 2,048 | 1 | refused: losses |  |  |  |  |\n" in lines
    with pytest.raises(UserError, match="no result nothing.json"):
        report.rewrite("<!-- bench nothing -->\n<!-- end -->", found)
    with pytest.raises(UserError, match="no result in"):
        report.results(tmp_path / "none")


def test_a_readme_keeps_its_line_ends_and_one_that_is_no_text_is_refused(tmp_path):
    found = {"step": made([step_row("bertfast fp32", 9000)], "pretrain", settings=STEP_SETTINGS)}
    readme = tmp_path / "README.md"
    readme.write_bytes(b"one\r\n<!-- bench step -->\r\nold\r\n<!-- end -->\r\ntwo\nthree\r\n")
    assert report.update([readme], found) == [readme] and report.update([readme], found) == []
    text = readme.read_bytes()
    assert text.startswith(b"one\r\n<!-- bench step -->\r\nPreset mini") and text.endswith(b"-->\r\ntwo\nthree\r\n")
    assert text.count(b"\n") == text.count(b"\r\n") + 1
    readme.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="README.md is not UTF-8 text"):
        report.update([readme], found)


def test_a_damaged_result_is_named(tmp_path):
    path = tmp_path / "step.json"
    good = made([step_row("bertfast fp32", 9000)], "pretrain", settings=STEP_SETTINGS)
    row, bare = good["rows"][0], {name: value for name, value in good.items() if name != "versions"}
    for damaged, message in (
        ({**good, "suite": None}, "is not a result"),
        ({**good, "rows": None}, "has no rows"),
        ({**good, "rows": [1]}, "row 1 has no key"),
        ({**good, "rows": [row, {"key": "k", "contender": "c"}]}, "row 2 has no failed"),
        *(({**good, "rows": [{**row, "median": value}]}, "row 1 has a median that is no number above 0")
          for value in (0, None, "1")),
        *(({**good, "rows": [{**row, "spread": value}]}, "row 1 has a spread that is no number from 0 on")
          for value in (-1, None, "1", float("nan"))),
        *(({**good, name: None}, f"has no {name}") for name in ("settings", "hardware", "versions")),
    ):
        path.write_text(json.dumps(damaged))
        for read in (lambda: report.load(path), lambda: report.results(tmp_path)):
            with pytest.raises(UserError, match=f"step.json .*{message}"):
                read()
    empty = {name: value for name, value in row.items() if name != "median"}
    assert [r["why"] for r in report.compare(good, {**good, "rows": [empty]})] == ["has no median"]
    for value, what in (({**good, "rows": [empty]}, "picture"),
                        (made([{"key": "k", "contender": "random, frozen", "failed": "", "metrics": {}}], "transfer",
                              settings={"model": "m"}), "table")):
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=f"step.json is damaged or of another version: it gives no {what}"):
            plots.draw(report.results(tmp_path), tmp_path)
    path.write_text(json.dumps(bare))  # enough to be compared, but not to be shown
    assert report.load(path) == bare
    with pytest.raises(UserError, match="step.json is damaged or of another version.*versions"):
        report.results(tmp_path)


def test_ops_in_short_have_the_least_and_the_median_of_their_shapes():
    seconds = {"bertfast": (1, 1, 1, 1, 1), "eager": (4, 9, 2, 3, None), "compiled": (9, 1, 9, 9, None)}
    rows = [{"key": f"bias_gelu {shape} fp32 forward", "op": "bias_gelu", "shape": str(shape), "dtype": "fp32",
             "direction": "forward", "contender": name, "failed": "" if median else "no memory", "median": median,
             "bytes": shape, "flops": 0, "rate": 1e9 * shape, "share": 0.5}
            for name, medians in seconds.items() for shape, median in enumerate(medians)]
    table = lambda rows: report.tables(made(rows, settings={"quick": False}))[0]["rows"]
    assert table(rows)[0] == ["bias_gelu", "forward", "5", "1.00", "1", "2.50", "4", "4 GB/s", "50%"]
    assert table(rows)[1][:3] == ["bias_gelu 4 fp32 forward", "eager", "no memory"]
    assert table(rows[:5])[0] == ["bias_gelu", "forward", "5", "–", "–", "–", "4", "4 GB/s", "50%"]


@pytest.mark.parametrize(("causal", "words"), [(False, "masked-LM"), (True, "next-word")])
def test_a_finished_run_is_a_result(causal, words, tmp_path):
    settings = asdict(Settings("runs/data", steps=20, long_share=0.5, tokens=512, log_every=5, causal=causal))
    data = {"tokens": 9000, "vocab_size": 500, "unigram_entropy": 6.0}
    (tmp_path / "config.json").write_text(json.dumps(
        {"settings": settings, "precision": "fp32", "threads": 2, "data": data}))
    rows = [{"step": step, "lr": 1e-3, "mlm_loss": 5.0, "tokens_per_sec": speed}
            for step, speed in ((5, 100), (10, 300), (15, 50), (20, 50))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="has not come to its end"):
        job.run(tmp_path)
    found = {"validation_mlm_loss": 5.5, "validation_mlm_accuracy": 0.2}
    ends = [{"step": 20, "validation_length": length, **found} for length in (128, 512)]
    for lost in (rows[2:] + ends, [*rows, {**ends[0], "validation_mlm_loss": None}, ends[1]]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost))
        with pytest.raises(UserError, match="no speed or no validation loss of sequences of 128"):
            job.run(tmp_path)
    rows += ends
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench_job = lambda out: CliRunner().invoke(cli.app, ["bench", "job", str(tmp_path), "--out", str(out)])
    for out in (tmp_path / "result.json", tmp_path / "results/job.json"):  # beside the picture, and elsewhere
        for picture in (b"", b"picture", b"a later one"):
            (tmp_path / "loss.png").write_bytes(picture) if picture else (tmp_path / "loss.png").unlink(missing_ok=True)
            assert bench_job(out).exit_code == 0
            assert report.load(out)["suite"] == "job"
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.png")} == dict.fromkeys(
        ("loss.png", "job.png"), b"a later one")
    other = tmp_path / "other"
    other.mkdir()
    (other / "loss.png").write_bytes(b"of another run")
    ended = bench_job(other / "loss.json")
    assert isinstance(ended.exception, UserError) and "not the picture of" in str(ended.exception)
    assert [path.name for path in other.iterdir()] == ["loss.png"]
    assert (other / "loss.png").read_bytes() == b"of another run"
    (table,) = report.tables(job.run(tmp_path))
    assert table["columns"][3] == f"validation {words} loss"
    assert table["rows"] == [["128", "10", "150", "5.500", "0.500", "20.0%", "–"],
                             ["512", "10", "50", "5.500", "0.500", "20.0%", "–"]]


def test_every_suite_has_tables_and_pictures(op_rows, tmp_path):
    peaks = {"fp32": 1e12, "bf16": 2e12, "copy": 1e10}
    machine = roofline.Machine("this machine, fp32", peaks["fp32"], peaks["copy"], predicted=False)
    curve = [[0, 0.0, 7.0], [10, 5.0, 6.0], [20, 10.0, 5.0]]
    curves = [{"key": "q", "contender": n, "failed": "", "curve": [[s, t * k, y] for s, t, y in curve],
               "median": 5.0 * k, "samples": [5.0 * k], "spread": 0.0, "reached": [1.0, 2.0, None]}
              for n, k in (("bertfast fp32", 1), ("HF sdpa fp32", 3))]
    about = {"preset": "mini", "steps": 20, "tokens": 2048, "unigram_entropy": 6.0, "targets": [0.3, 0.5, 0.7]}
    embeddings = [{"key": "batch 1", "contender": n, "failed": "", "median": 0.01, "samples": [0.01], "spread": 0.1,
                   "difference": 1e-6, "cosine": 1.0} for n in ("sentence-transformers", "bertfast.patch fp32")]
    peak = [{**step_row(n, 1000), "peak_bytes": 2**30, "activation_bytes": 2**28}
            for n in ("bertfast fp32", "plain fp32")]
    kinds = [{"key": "mini", "contender": kind, "failed": "", "seconds": 0.1, "bound": bound}
             for kind, bound in (("linear layers", 0.08), ("rest", None))]
    tuned = [{"key": "sst2", "contender": n, "failed": "", "samples": [0.01], "median": 0.01, "spread": 0.0, **more}
             for n, more in (("bertfast fp32", {"share": 0.5, "ceiling": 400.0}), ("transformers fp32", {}))]
    scored = [{"key": "sst2", "contender": n, "seed": seed, "failed": "", "steps": 9, "metrics": {"f1": 0.9}}
              for n in ("bertfast", "transformers") for seed in (1, 2)]
    bought = [{"key": "sst2", "contender": "pretrained, frozen", "failed": "", "steps": 9, "metrics": {"f1": 0.9}},
              {"key": "sst2", "contender": "random, frozen", "failed": "no memory"}]
    taken_back = [{**tuned[0], "contender": name, "predicted": 0.001} for name in ("bf16 without: x", "bertfast bf16")]
    found = {
        "moves": made(taken_back, "moves", settings={**STEP_SETTINGS, "precision": "bf16"}),
        "finetune": made(tuned, "finetune", settings={"model": "m", "window": 9.0}),
        "tasks": made(scored, "tasks", settings={"model": "m"}),
        "transfer": made(bought, "transfer", settings={"model": "m"}),
        "trainer": made([{**tuned[0], "accuracy": 0.9, "deviation": 1e-6}], "trainer",
                        settings={"model": "m", "sentences": 9}),
        "ops": made(op_rows["as it is"]),
        "ops_whole": made(op_rows["as it is"], settings={"quick": False}),
        "pretrain": made([step_row("bertfast fp32", 9000), step_row("HF sdpa fp32", 3000)], "pretrain",
                         settings=STEP_SETTINGS, machine=peaks),
        "memory": made(peak, "memory", settings=STEP_SETTINGS),
        "roofline": made([], "roofline") | roofline.bounds("mini", 2048, 128, 30522, [machine]),
        "inference": made(embeddings, "inference"),
        "quality": made(curves, "quality", settings=about),
        "profile": made(kinds, "profile", settings={**STEP_SETTINGS, "precision": "fp32"}),
    }
    for name, result in found.items():
        assert all(len(row) == len(t["columns"]) for t in report.tables(result) for row in t["rows"]), name
        assert json.loads(json.dumps(result)) == result
    assert "2 threads;" in report.tables({**found["pretrain"], "threads": 2})[0]["title"]
    assert "1 thread;" in report.tables({**found["pretrain"], "threads": 1})[0]["title"]
    assert report.tables(found["transfer"])[0]["rows"][-1][:3] == ["sst2", "random, frozen", "no memory"]
    assert report.tables(found["ops_whole"])[0]["rows"][0][:3] == ["bias_gelu", "forward", "1"]
    drawn = plots.draw(found, tmp_path)
    assert [p.stem for p in drawn] == ["ops", "ops_whole", "pretrain", "inference", "quality"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
    ours_refused = [{**r, "failed": "refused" * (r["contender"] == "bertfast")} for r in op_rows["as it is"]]
    assert plots.draw({"ops": made(ours_refused)}, tmp_path) == []
    larger = made([{**peak[0], "peak_bytes": 2**31}, peak[1]], "memory")
    assert [row["why"] for row in report.compare(found["memory"], larger)] == ["2.00 times as large (allowed 1.05)"]
    gpu = [r for r in found["roofline"]["rows"] if "H100" in r["contender"]]
    assert gpu[0]["label"] == "predicted, not measured" and gpu[0]["seconds"] > 0


def test_a_result_that_the_disk_refuses_is_on_the_terminal(op_rows, tmp_path, capsys):
    with pytest.raises(UserError, match="cannot create"):
        (tmp_path / "file").touch()
        commands._finish(made(op_rows["as it is"]), tmp_path / "file/result.json")
    assert "bias_gelu" in capsys.readouterr().out


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_measurement_outlives_its_reader(asked, op_rows, monkeypatch):
    monkeypatch.setattr(contest, "console", type(contest.console)(file=BrokenPipe()))
    outcomes, _ = contest.contest([Contender("a", taking, {"seconds": [1.0]})], 1, 1, lambda facts: {})
    assert outcomes["a"].values() == [1.0]
    with pytest.raises(BrokenPipeError):
        report.show(made(op_rows["as it is"]))


def test_a_closed_output_is_none_too():
    program = "import sys; sys.stdout = None; import bertfast.benchmarks.contest"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("arguments", "message"), [
    (["bench", "ops", "--op", "softmax"], "op 'softmax' is unknown"),
    (["bench", "compare", "a.json", "b.json"], "cannot read a.json"),
    *((["bench", suite, "--preset", "huge"], "preset 'huge' is unknown")
      for suite in ("pretrain", "memory", "moves", "profile", "roofline")),
    *((["bench", suite, "--length", "1024"], "sequences of 1024 tokens, but the model has 512 positions")
      for suite in ("pretrain", "memory", "moves", "profile")),
    (["bench", "inference", "--model", "nowhere", "--text", "x"], "nowhere is not a checkpoint's folder"),
    (["bench", "quality", "--data", "nowhere"], "there is no prepared set nowhere"),
    (["bench", "trainer", "--model", "nowhere", "--train", "x", "--dev", "x"], "no checkpoint at nowhere"),
    (["bench", "roofline", "--out", "file/x.json"], "cannot create file"),
    (["bench", "roofline", "--out", "folder"], "cannot write folder: it is a folder"),
    (["bench", "roofline", "--out", "pipe"], "cannot write pipe: it is a device or a pipe"),
    (["bench", "roofline", "--out", "file"], "file exists already and holds no result: choose another --out"),
    (["bench", "finetune", "--task", "qa", "--model", "nowhere", "--train", "x"], "nowhere"),
])
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch(), (tmp_path / "folder").mkdir(), os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(contest, "yardstick", None)  # it is told before anything is measured
    monkeypatch.setattr(contest, "contest", None)
    monkeypatch.setattr("sys.argv", ["bertfast", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bertfast: ") and message in error and error.count("\n") == 1
