"""The step that a CUDA graph captures, on a CPU: what it computes, that preparing it leaves no trace, and the loop."""

import json
import pydoc_data.topics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import bertfast
from bertfast import machine, ops, pretrain, run_folder
from bertfast.data.prepare import prepare
from bertfast.files import UserError
from bertfast.model import unpad
from bertfast.ops import _define
from bertfast.optim import Optimizer
from bertfast.step_graph import StepGraph, replayable


class Replayed(StepGraph):
    """Prepared as for a capture, and run through what a replay reads; without a GPU, the step is called instead."""

    def capture(self):
        self.warm_up()
        return SimpleNamespace(replay=self.step)


def micro_batch(first: int) -> bertfast.PackedBatch:
    ids = (torch.arange(48).view(3, 16) + first) % 90 + 5
    labels = torch.full_like(ids, -100)
    labels[:, [3, 7]] = ids[:, [3, 7]]
    return unpad(ids, labels=labels, next_sentence_label=torch.tensor([0, 1, 0]))[0]


def model_and_optimizer():
    torch.manual_seed(0)
    config = bertfast.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=64, max_position_embeddings=16)
    model = bertfast.BertForPreTraining(config).train()
    return model, Optimizer(model, torch.bfloat16, kind="lamb", sink=True)


@pytest.mark.parametrize("n_micro", [1, 2])
def test_a_step_and_its_preparation(n_micro):
    """Against the calls written out; preparing a capture changes neither weights nor optimiser."""
    batches = [micro_batch(i) for i in range(4)]
    (model, optimizer), (own_model, own_optimizer) = model_and_optimizer(), model_and_optimizer()
    before = {**own_optimizer.state_dict(), **{n: t.clone() for n, t in own_optimizer.master_state().items()}}
    graph = Replayed(own_model, own_optimizer, captured=[(batch, {}) for batch in batches[:n_micro]])
    after = {**own_optimizer.state_dict(), **own_optimizer.master_state()}
    assert all(torch.equal(after[name], before[name]) for name in before)

    for step in range(3):
        micro, seeds, lr = [batches[step + i] for i in range(n_micro)], [step, step + 9][:n_micro], 0.01 / (step + 1)
        for batch, seed in zip(micro, seeds):
            mlm_scale, nsp_scale = (optimizer.loss_scale / (n * n_micro) for n in (6, 3))
            out = model(batch, seed=torch.tensor([seed]), mlm_scale=mlm_scale, nsp_scale=nsp_scale)
            out.loss.backward()
            if n_micro > 1:
                optimizer.accumulate()
        norm = optimizer.step(lr)
        assert torch.equal(graph([(batch, {}) for batch in micro], seeds, lr, (6 * n_micro, 3 * n_micro)), norm)
        assert torch.equal(graph.outputs[-1].loss, out.loss)
        assert graph.outputs[-1].loss.grad_fn is None  # or autograd's nodes would outlive the step, see step_graph.py
    for a, b in zip(model.parameters(), own_model.parameters()):
        assert torch.equal(a, b)


def test_losses_carry_the_loss_scale():
    model, optimizer = model_and_optimizer()
    optimizer.loss_scale.fill_(8.0)
    graph = StepGraph(model, optimizer)
    graph([(micro_batch(0), {})], [1], 0.0, (6, 3))
    assert graph.scale == 8


def test_batches_of_other_shapes_are_refused():
    graph = Replayed(*model_and_optimizer(), captured=[(micro_batch(0), {})])
    with pytest.raises(ValueError, match="made for batches"):
        graph([(micro_batch(0), {})] * 2, [1, 2], 0.1, (6, 3))
    with pytest.raises(ValueError, match="made for batches"):
        graph([(unpad(torch.ones(1, 4, dtype=torch.int64))[0], {})], [1], 0.1, (6, 3))
    with pytest.raises(ValueError, match="made for batches"):
        graph([(replace(micro_batch(0), max_seqlen=15), {})], [1], 0.1, (6, 3))
    with pytest.raises(ValueError, match="made for batches"):
        graph([(replace(micro_batch(0), input_ids=micro_batch(0).input_ids.int()), {})], [1], 0.1, (6, 3))


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The share of peak that is printed is no matter here, and measuring the peak takes longer than a test."""
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: 1e11)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Eight steps on a little English: six on sequences of up to 32, two on sequences of up to 64."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:20]))
    prepare([str(folder / "text.txt")], folder / "data", vocab_size=400, workers=1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    (folder / "model.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64, **sizes}))
    return lambda **changes: run_folder.Settings(**{
        "data": str(folder / "data"), "model_config": str(folder / "model.json"), "steps": 8, "tokens": 256,
        "short_length": 32, "long_length": 64, "long_share": 0.25, "lr": 3e-3, "precision": "fp32", "log_every": 1,
        "save_every": 4, **changes,
    })


def rows(folder):
    """What a run wrote down but for its speed, and its last checkpoint's tensors."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = run_folder.latest(folder)
    tensors = {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}
    return [{k: v for k, v in line.items() if k != "tokens_per_sec"} for line in lines], tensors


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "micro_batches": 2}], ids=["fp32", "bf16, two batches"])
def test_a_run_with_a_graph_is_the_run_without(settings, changes, tmp_path, monkeypatch):
    """Bit for bit, over both phases, and also where it was interrupted and resumed in either."""
    pretrain.start(tmp_path / "launched", settings(**changes), resume=False).train()
    made = []
    monkeypatch.setattr(pretrain, "StepGraph", lambda *args, **named: made.append(Replayed(*args, **named)) or made[-1])
    for stop_after in (3, 7, 8):
        run = pretrain.start(tmp_path / "replayed", settings(**changes), resume=True)
        run.replayed = True
        step = run.train_step

        def stop(*args, run=run, step=step, stop_after=stop_after):
            run.stopping = run.step + 1 == stop_after < 8  # as Ctrl-C does
            return step(*args)

        monkeypatch.setattr(run, "train_step", stop)
        if stop_after < 8:
            with pytest.raises(KeyboardInterrupt):
                run.train()
        else:
            run.train()
    assert [graph.micro[0][0].max_seqlen for graph in made] == [32, 32, 64, 64]  # one a phase, in each process
    (lines, tensors), (expected_lines, expected) = rows(tmp_path / "replayed"), rows(tmp_path / "launched")
    assert lines == expected_lines
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_nothing_is_captured(settings, tmp_path):
    run = pretrain.start(tmp_path / "run", settings(), resume=False)
    assert run.settings.cuda_graph and not run.replayed and "CUDA graph" not in run.describe("")


@pytest.mark.parametrize(("where", "expected"), [("Triton", True), ("reference: BERTFAST_REFERENCE=1", False)])
def test_references_are_not_captured(where, expected, monkeypatch):
    """They read values of the device, which a capture forbids."""
    monkeypatch.setitem(ops._loaded, "cuda", where)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_define, "_too_old", lambda gpu: False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    config, gpu = bertfast.BertConfig(), torch.device("cuda")
    assert replayable(gpu, config) == expected and not replayable(torch.device("cpu"), config)
    assert not replayable(gpu, bertfast.BertConfig(hidden_size=32, num_attention_heads=4))  # heads that no kernel takes


def test_a_step_that_cannot_be_captured_is_one_line_that_says_what_to_do(settings, tmp_path, monkeypatch):
    def fails(graph):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    run = pretrain.start(tmp_path / "run", settings(), resume=False)
    monkeypatch.setattr(StepGraph, "capture", fails)
    run.replayed = True
    with pytest.raises(UserError, match=r"stream is capturing\): use --no-cuda-graph$"):
        run.train()


def test_a_captured_step_has_tensors_of_its_own():
    batch, other = micro_batch(0), micro_batch(5)
    graph = Replayed(*model_and_optimizer(), captured=[(batch, {})])
    graph([(other, {})], [1], 0.0, (6, 3))
    assert torch.equal(batch.input_ids, micro_batch(0).input_ids)
