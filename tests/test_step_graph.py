"""The step that a CUDA graph captures, on a CPU: it is the loop's own step, and preparing it leaves no trace."""

import pytest
import torch

import bertfast
from bertfast.model import unpad
from bertfast.optim import Optimizer
from bertfast.step_graph import StepGraph


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
    return model, Optimizer(model, torch.bfloat16, kind="lamb")


@pytest.mark.parametrize("n_micro", [1, 2])
def test_a_captured_step_is_the_loops_step(n_micro):
    batches = [micro_batch(i) for i in range(4)]
    (model, optimizer), (own_model, own_optimizer) = model_and_optimizer(), model_and_optimizer()
    before = {**own_optimizer.state_dict(), **{n: t.clone() for n, t in own_optimizer.master_state().items()}}
    graph = StepGraph(own_model, own_optimizer, batches[:n_micro])
    graph.warm_up()  # what a GPU does before the capture
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
        assert torch.equal(graph(micro, seeds, lr, 6 * n_micro, 3 * n_micro), norm)
        assert torch.equal(graph.outputs[-1].loss, out.loss)
    for a, b in zip(model.parameters(), own_model.parameters()):
        assert torch.equal(a, b)


def test_batches_of_other_shapes_are_refused():
    graph = StepGraph(*model_and_optimizer(), [micro_batch(0)])
    with pytest.raises(ValueError, match="captured for 1 batches"):
        graph([micro_batch(0)] * 2, [1, 2], 0.1, 6, 3)
    with pytest.raises(ValueError, match="captured for input_ids"):
        graph([unpad(torch.ones(1, 4, dtype=torch.int64))[0]], [1], 0.1, 6, 3)
