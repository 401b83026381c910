"""A whole tiny BERT trains through the GPU's code path, and makes the same steps as through the C++ engine.

The C++ engine runs in another process, because this one has the launchers in its place (see conftest.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bertfast
from bertfast.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 2
LENGTHS = [20, 33, 0, 9]  # with an empty sequence; two rows at the end belong to none


def packed_batch() -> bertfast.PackedBatch:
    """64 rows, four sequences, twelve prediction slots of which ten are used, each sequence's after its [CLS]."""
    g = torch.Generator().manual_seed(1)
    bounds = lambda lengths: torch.tensor([0, *lengths]).cumsum(0).int()
    cu_seqlens, used = bounds(LENGTHS), [(0, 3, 4, 8, 19), (0, 1, 5, 12, 32), (), (0, 2, 7)]
    position = torch.cat([torch.arange(n) for n in (*LENGTHS, 2)])
    position[-2:] = 0
    sequence = torch.repeat_interleave(torch.arange(5), torch.tensor([*LENGTHS, 2])) % 4
    read = [int(start) + row for start, rows in zip(cu_seqlens, used) for row in rows]
    cu_read = bounds([len(rows) for rows in used])
    masked = [i for i in range(len(read)) if i not in cu_read.tolist()]
    ids = torch.randint(5, 203, (64,), generator=g)
    labels = torch.randint(5, 203, (12,), generator=g)
    labels[len(masked) :] = -100
    return bertfast.PackedBatch(
        input_ids=ids * (torch.arange(64) < 62), token_type_ids=(position > 6).long(), position_ids=position,
        cu_seqlens=cu_seqlens, max_seqlen=40, row_key=(sequence << 32) + position,
        read_rows=torch.tensor(read + [0] * (16 - len(read))), cu_seqlens_read=cu_read,
        cls_index=cu_read[:-1].long().clamp(max=len(read) - 1),
        mask_index=torch.tensor(masked + [0] * (12 - len(masked))), labels=labels,
        next_sentence_label=torch.tensor([0, 1, -100, 1]), n_tokens=62, n_masked=len(masked), n_sequences=3,
    )  # fmt: skip


def train(kind: str, dtype: str) -> torch.Tensor:
    """Loss and gradient norm of each step, (STEPS, 2)."""
    torch.manual_seed(0)
    config = bertfast.BertConfig(vocab_size=203, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=128, max_position_embeddings=64)  # fmt: skip
    model, batch, rows = bertfast.BertForPreTraining(config).train(), packed_batch(), []
    optimizer = Optimizer(model, DTYPES[dtype], kind=kind, sink=True)
    for step in range(STEPS):
        out = model(batch, seed=torch.tensor([step + 77]))
        out.loss.backward()
        rows.append(torch.stack([out.loss.detach(), optimizer.step(1e-2)]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adamw", "fp32"), *(pytest.param(*run, marks=pytest.mark.full) for run in (("lamb", "fp32"), ("lamb", "bf16")))],
)
def test_training_equals_the_cpp_engine(kind, dtype, tmp_path):
    """In fp32 to 1e-5, which other dropout masks would not give. In bf16 no further from the fp32 run than the C++
    engine, but for two units in the last place."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BERTFAST_NO_EXT")}
    script = "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_training as t; "
    script += "torch.save([t.train(sys.argv[2], d) for d in ('fp32', sys.argv[3])], sys.argv[4])"
    here, path = str(Path(__file__).parent), tmp_path / "rows.pt"
    subprocess.run([sys.executable, "-c", script, here, kind, dtype, str(path)], env=environment, check=True)
    fp32, theirs = torch.load(path, weights_only=True)
    ours = train(kind, dtype)
    if dtype == "fp32":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    else:
        allowed = (theirs - fp32).abs() + 2 * torch.finfo(DTYPES[dtype]).eps * fp32
        assert ((ours - fp32).abs() <= allowed).all(), (ours, theirs, fp32)
