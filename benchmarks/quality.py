"""Time to quality: seconds of training until the validation loss is so far below the unigram entropy.

Ours is the product's own loop (bertfast.pretrain.Run). The others train the same model from the same start on the same
batches in the same order, with the same schedule, AdamW, decay groups and clipping; validation is ours on the same
sequences and masks. They take turns, a validation interval each, so that a busy machine slows both; validation and
preparation are not counted. What differs is dropout's random bits and rounding.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from bertfast.benchmarks import contest
from bertfast.benchmarks.contest import Contender, timed
from bertfast.benchmarks.pretrain import SETUPS, agreement, padded

from bertfast.batch import PackedBatch
from bertfast.data.dataset import Dataset
from bertfast.pretrain import Run
from bertfast.report import Window
from bertfast.run_folder import Settings

TARGETS = (0.3, 0.5, 0.7)  # nats below the unigram entropy


def bertfast(settings: dict, every: int, checkpoint: str) -> Iterator[dict]:
    """Our loop."""
    run = Run(Path(checkpoint), Settings(**settings))
    length = run.settings.short_length
    batches = iter(run.loader(run.train_data, length))

    def advance(n: int) -> None:
        for _ in range(n):
            run.train_step([next(batches)], Window())
            run.step += 1

    validate = lambda: run.evaluate(length)["validation_mlm_loss"]
    losses = _losses(run, lambda batch: run.model(batch.to(run.device)).loss, run.model)
    yield from _curve(advance, validate, run.settings.steps, every, run.device, losses)


def hugging_face(settings: dict, every: int, checkpoint: str, attention: str, bf16: bool,
                 compiled: bool) -> Iterator[dict]:
    """transformers' BertForPreTraining in one of its set-ups, fed by our loader."""
    import transformers

    run = Run(Path(checkpoint), Settings(**{**settings, "precision": "fp32"}))  # loaders and validation
    device, length, pad_id = run.device, run.settings.short_length, run.tokenizer.pad_id
    model = transformers.BertForPreTraining.from_pretrained(checkpoint, attn_implementation=attention)
    model = model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": run.settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=run.settings.lr, betas=run.optimizer.betas, eps=run.optimizer.eps, fused=True)
    call = torch.compile(model, dynamic=True) if compiled else model
    batches = iter(run.loader(run.train_data, length))

    def loss_of(batch: PackedBatch) -> torch.Tensor:
        inputs = {name: t.to(device) for name, t in padded(batch, length, pad_id).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return call(**inputs).loss

    def advance(n: int) -> None:
        for _ in range(n):
            loss = loss_of(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.settings.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = run.settings.learning_rate(run.step)
            optimizer.step()
            optimizer.zero_grad()
            run.step += 1

    def validate() -> float:
        own = run.model.state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in own:
                    own[name].copy_(value)
        return run.evaluate(length)["validation_mlm_loss"]

    yield from _curve(advance, validate, run.settings.steps, every, device, _losses(run, loss_of, model))


@torch.no_grad()
def _losses(run: Run, loss_of: Callable, model: torch.nn.Module) -> list[float]:
    """A contender's own model on two batches, with dropout off."""
    model.eval()
    loader = run.loader(run.train_data, run.settings.short_length)
    losses = [float(loss_of(loader.batch(i))) for i in range(2)]
    model.train()
    return losses


def _curve(advance: Callable, validate: Callable, steps: int, every: int, device: torch.device,
           losses: list[float]) -> Iterator[dict]:
    """The losses before the first step, then a turn an interval; once all steps are done, nothing more happens."""
    yield {"loss": validate(), "losses": losses}
    done = 0
    while True:
        n = min(every, steps - done)
        seconds, _ = timed(advance, device, n)
        done += n
        yield {"step": done, "seconds": seconds, "loss": validate()}


def reached(curve: list[list[float]], level: float) -> float | None:
    """Seconds at which a curve of [step, seconds, loss] first comes down to `level`, between two points in a line."""
    for (_, t0, before), (_, t1, after) in zip(curve, curve[1:]):
        if after <= level < before:
            return t0 + (t1 - t0) * (before - level) / (before - after)
    return None


def run(*, data: str, preset: str, steps: int, tokens: int, length: int, lr: float, dropout: float, every: int,
        seed: int, threads: int, precisions: list[str], peers: list[str]) -> dict:
    """The result as JSON's types. Raises UserError for data or settings that no run can have."""
    settings = Settings(data=str(Path(data).resolve()), preset=preset, steps=steps, tokens=tokens, lr=lr,
                        dropout=dropout, short_length=length, long_share=0.0, precision=precisions[0], seed=seed)
    settings.check()
    text = Dataset(data)
    entropy = text.manifest["unigram_entropy"]
    with tempfile.TemporaryDirectory() as folder:
        start = Run(Path(folder), settings)  # what every contender starts from
        start.model.save_pretrained(Path(folder), start.optimizer.master_state())
        common = {"every": every, "checkpoint": folder}
        entrants = [Contender(f"bertfast {p}", bertfast, {"settings": {**asdict(settings), "precision": p}, **common})
                    for p in precisions]
        for name in peers:
            entrants.append(Contender(name, hugging_face, {"settings": asdict(settings), **common, **SETUPS[name]}))
        outcomes, stopped = contest.contest(entrants, -(-steps // every), threads, _same_start)
    rows = []
    for name, outcome in outcomes.items():
        row = {"key": f"{preset} to quality", "contender": name, "failed": outcome.failed}
        if outcome.turns and not outcome.failed:
            curve = [[0, 0.0, outcome.facts["loss"]]]
            for turn in outcome.turns:
                curve.append([turn["step"], curve[-1][1] + turn["seconds"], turn["loss"]])
            row |= {"curve": curve, "reached": [reached(curve, entropy - target) for target in TARGETS],
                    **contest.middle(outcome.values()), "samples": outcome.values()}
        rows.append(row)
    about = {"preset": preset, "steps": steps, "tokens": tokens, "length": length, "lr": lr, "dropout": dropout,
             "seed": seed, "every": every, "vocab_size": text.tokenizer.vocab_size, "train_tokens": text.n_tokens,
             "unigram_entropy": entropy, "targets": list(TARGETS)}
    return {"suite": "quality", **contest.provenance(threads), "settings": about, "stopped_early": stopped,
            "rows": rows}


def _same_start(facts: dict[str, dict]) -> dict[str, str]:
    """Who does not start from the first one's losses, in validation and its own training: {name: why}."""
    starts = {name: {"losses": [found["loss"], *found["losses"]]} for name, found in facts.items()}
    return agreement(starts, next(iter(starts), ""))
