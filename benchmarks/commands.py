"""`bertfast bench …`: the suites as commands. Heavy imports stand inside, so that --help answers at once."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from bertfast.files import UserError, atomic_path, create_folder


def _writable(out: Path | None) -> Path | None:
    """A result that cannot be written, or only over a file that is none, is told before it is measured."""
    if out:
        create_folder(out.parent)
        if out.exists() and not out.is_file():
            raise UserError(f"cannot write {out}: it is a {'folder' if out.is_dir() else 'device or a pipe'}")
        if not os.access(out.parent, os.W_OK):
            raise UserError(f"cannot write {out}: no permission")
        if out.exists():
            from bertfast.benchmarks import report

            try:
                report.load(out)
            except UserError as error:
                raise UserError(f"{out} exists already and holds no result: choose another --out") from error
    return out


bench = typer.Typer(
    name="bench", no_args_is_help=True, pretty_exceptions_enable=False,
    help="Measure bertfast against Hugging Face and plain PyTorch on this machine; results are JSON files.",
)
Out = Annotated[Path | None, typer.Option(
    callback=_writable, help="Write the result as JSON (NAME.json; `report` reads the folder).")]
Threads = Annotated[int | None, typer.Option(min=1, max=4096,
                                              help="Threads of each contender; by default torch's choice.")]
Rounds = Annotated[int, typer.Option(min=1, max=10**6,
                                      help="Turns of each contender, interleaved; medians are reported.")]
Quick = Annotated[bool, typer.Option("--quick", help="Leave out what torch.compile has to compile first.")]
DataOption = Annotated[str | None, typer.Option(help="A prepared set; by default ids of Zipf's frequencies, V=30522.")]
Preset = Annotated[str, typer.Option(help="tiny, mini, small, medium, base or large.")]
Length = Annotated[int, typer.Option(min=8, max=65535, help="Length of the longest sequence, S.")]
Tokens = Annotated[int, typer.Option(min=8, max=2**27, help="Real tokens of a step.")]
Fill = Annotated[float, typer.Option(help="How full the padded batch is, 0.5 to 1.")]
AtOnce = Annotated[int, typer.Option(min=0, help="In memory together, 3 at least (large models); 0 = all.")]


def _finish(result: dict, out: Path | None) -> None:
    from bertfast.benchmarks import report

    try:
        if out:
            report.write(result, out)
    finally:  # where the disk is full by now, the terminal still has it
        report.show(result)
    if result.get("stopped_early"):
        raise typer.Exit(130)
    if all(row.get("failed") for row in result["rows"]):
        raise typer.Exit(1)


def _threads(threads: int | None) -> int:
    import torch

    return threads or torch.get_num_threads()


@bench.command()
def pretrain(data: DataOption = None, preset: Preset = "mini", tokens: Tokens = 2048, length: Length = 128,
             fill: Fill = 1.0, rounds: Rounds = 9, threads: Threads = None, quick: Quick = False, at_once: AtOnce = 0,
             bf16: Annotated[bool, typer.Option("--bf16", help="Only bf16, and the reference in fp32.")] = False,
             out: Out = None) -> None:
    """A pretraining step against set-ups of transformers' BERT and a plain-PyTorch model equal to ours.

    Same sequences, weights, AdamW, clipping and dropout for all; their losses with dropout off must agree before
    anything is timed. Ctrl-C ends it with the rounds that were complete.

    Example: bertfast bench pretrain --preset small --length 512 --fill 0.75 --out results/small.json
    """
    from bertfast.benchmarks import pretrain

    _finish(pretrain.run("pretrain", data=data, preset=preset, tokens=tokens, length=length, fill=fill, rounds=rounds,
                         threads=_threads(threads), quick=quick, at_once=at_once, bf16=bf16), out)


@bench.command()
def memory(data: DataOption = None, preset: Preset = "mini", tokens: Tokens = 2048, length: Length = 128,
           fill: Fill = 1.0,
           rounds: Annotated[int, typer.Option(min=1, max=10**6,
                                               help="Turns of each contender; the least is reported.")] = 3,
           threads: Threads = None, quick: Quick = False, at_once: AtOnce = 0, out: Out = None) -> None:
    """Peak memory of a pretraining step, with the system's default allocator, of the same contenders.

    Example: bertfast bench memory --preset base --at-once 4 --out results/memory_base.json
    """
    from bertfast.benchmarks import pretrain

    _finish(pretrain.run("memory", data=data, preset=preset, tokens=tokens, length=length, fill=fill, rounds=rounds,
                         threads=_threads(threads), quick=quick, at_once=at_once), out)


@bench.command()
def ops(op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
        rounds: Rounds = 7, threads: Threads = None, quick: Quick = False, out: Out = None) -> None:
    """Every fused op, forward and backward, against eager and compiled PyTorch, in GB/s or GFLOP/s and % of the peak.

    Example: bertfast bench ops --op attention_full --op bias_gelu
    """
    from bertfast.benchmarks import ops
    from bertfast.benchmarks.roofline import COSTS

    known = [*COSTS, "adamw_step"]
    if unknown := [name for name in op or [] if name not in known]:
        raise UserError(f"op {unknown[0]!r} is unknown; known: {', '.join(known)}")
    _finish(ops.run(quick=quick, only=op or [], rounds=rounds, threads=_threads(threads)), out)


@bench.command()
def inference(model: Annotated[Path, typer.Option(help="A BERT checkpoint's folder.")],
              text: Annotated[Path, typer.Option(help="A text file, a sentence a line.")],
              batch: Annotated[list[int] | None, typer.Option(min=1, help="Sentences a batch, any number of times: by "
                                                              "default 1 and 64.")] = None,
              sentences: Annotated[int, typer.Option(min=1, help="Lines to take.")] = 512,
              rounds: Rounds = 9, threads: Threads = None, out: Out = None) -> None:
    """What you would gain on your model: embeddings of your text, ours against transformers and sentence-transformers.

    Example: bertfast bench inference --model all-MiniLM-L6-v2/ --text sentences.txt
    """
    from bertfast.benchmarks import inference

    _finish(inference.run(model=model, text=text, batches=batch or [1, 64], sentences=sentences, rounds=rounds,
                          threads=_threads(threads)), out)


@bench.command()
def finetune(task: Annotated[str, typer.Option(help="As `bertfast finetune` names them.")],
             model: Annotated[str, typer.Option(help="A BERT checkpoint's folder.")],
             train: Annotated[str, typer.Option(help="Your training file.")],
             dev: Annotated[str | None, typer.Option(help="Your dev file; it is read, not evaluated.")] = None,
             text: Annotated[str | None, typer.Option(help="The text's column.")] = None,
             text_pair: Annotated[str | None, typer.Option(help="The second text's column.")] = None,
             label: Annotated[str | None, typer.Option(help="The label's column.")] = None,
             batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 32,
             window: Annotated[float, typer.Option(min=0.1, max=86400, help="Seconds of a turn.")] = 20.0,
             rounds: Rounds = 3, threads: Threads = None, out: Out = None) -> None:
    """What you would gain on your task: samples a second of fine-tuning, ours against transformers' loop.

    Same data, start, hyper-parameters; losses with dropout off must agree before anything is timed.

    Example: bertfast bench finetune --task classification --model bert-base/ --train train.tsv
    """
    from bertfast.benchmarks import finetune

    from bertfast.finetune.task import Settings

    settings = Settings(task, model, train, dev, text=text, text_pair=text_pair, label=label, batch_size=batch_size)
    _finish(finetune.run(settings, window=window, rounds=rounds, threads=_threads(threads)), out)


@bench.command()
def trainer(model: Annotated[str, typer.Option(help="A BERT checkpoint's folder.")],
            train: Annotated[str, typer.Option(help="A TSV: a header, then sentence, tab, class (0 or 1).")],
            dev: Annotated[str, typer.Option(help="The same, to judge by.")],
            count: Annotated[int, typer.Option(min=1, help="Sentences to train on.")] = 10_000,
            seed: Annotated[int, typer.Option(help="Of the new head, dropout and the order.")] = 0,
            rounds: Rounds = 5, threads: Threads = None, out: Out = None) -> None:
    """transformers' Trainer on a model as it is and on one patched by bertfast.patch: speed, losses, accuracy.

    Example: bertfast bench trainer --model bert-base/ --train sst2/train.tsv --dev sst2/dev.tsv
    """
    from bertfast.benchmarks import trainer

    _finish(trainer.run(model=model, train=train, dev=dev, count=count, rounds=rounds, seed=seed,
                        threads=_threads(threads)), out)


@bench.command()
def quality(data: Annotated[str, typer.Option(help="A prepared set.")], preset: Preset = "mini",
            steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 3000, tokens: Tokens = 2048,
            length: Length = 128, lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
            dropout: Annotated[float, typer.Option(help="Hidden and attention dropout.")] = 0.1,
            every: Annotated[int, typer.Option(min=1, help="Steps between validations: a turn.")] = 100,
            seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
            precision: Annotated[list[str] | None, typer.Option(help="Ours: fp32 (default), bf16, or both.")] = None,
            peer: Annotated[list[str] | None, typer.Option(help="Set-ups of transformers, as `pretrain` names them: "
                                                           "by default HF sdpa fp32.")] = None,
            threads: Threads = None, out: Out = None) -> None:
    """Seconds of training to a validation loss 0.3, 0.5 and 0.7 nats below the unigram entropy, ours and transformers'.

    Same data, batches, start, schedule and optimiser; they train in turns. Ctrl-C ends it with the curves so far.

    Example: bertfast bench quality --data runs/mini/data --steps 3000 --out results/quality.json
    """
    from bertfast.benchmarks import quality

    from bertfast import machine

    peers = peer or ["HF sdpa fp32"]
    if unknown := [name for name in peers if name not in quality.SETUPS]:
        raise UserError(f"peer {unknown[0]!r} is unknown; known: {', '.join(quality.SETUPS)}")
    for name in precision or []:
        machine.check_precision(name)
    _finish(quality.run(data=data, preset=preset, steps=steps, tokens=tokens, length=length, lr=lr, dropout=dropout,
                        every=every, seed=seed, threads=_threads(threads), precisions=precision or ["fp32"],
                        peers=peers), out)


@bench.command()
def job(run: Annotated[Path, typer.Argument(help="The folder of a finished run of `bertfast pretrain`.")],
        out: Out = None) -> None:
    """A finished pretraining run as a result: its speed, its losses, and beside OUT its picture (of job.json: job.png).

    Example: bertfast bench job runs/mini --out results/job.json
    """
    from bertfast.benchmarks import job

    result, picture = job.run(run), run / "loss.png"
    if out and picture.exists() and out.parent.resolve() != run.resolve():
        copy = out.with_suffix(".png")
        if copy.exists() and not out.exists():
            raise UserError(f"{copy} is there already, and not the picture of {out}: choose another --out")
        with atomic_path(copy) as temporary:
            shutil.copyfile(picture, temporary)
    _finish(result, out)


@bench.command()
def roofline(preset: Preset = "mini", tokens: Tokens = 2048, length: Length = 128,
             vocab_size: Annotated[int, typer.Option(min=1, help="V.")] = 30522, threads: Threads = None,
             out: Out = None) -> None:
    """The least time of a step by formula, every tensor from memory: here from measured peaks, GPUs from datasheets.

    Example: bertfast bench roofline --preset base
    """
    import torch
    from bertfast.benchmarks import contest, ops, roofline

    roofline.bounds(preset, tokens, length, vocab_size, [])  # a mistake is told before anything is measured
    torch.set_num_threads(_threads(threads))
    measuring = contest.yardstick()
    next(measuring)
    found = [next(measuring) for _ in range(3)]
    best = {name: max(turn[name] for turn in found) for name in found[0]}
    here = [roofline.Machine(f"this machine, {name}", best[name], best["copy"], predicted=False)
            for name in ops.dtypes()]
    _finish({"suite": "roofline", **contest.provenance(_threads(threads)), "machine": best,
             **roofline.bounds(preset, tokens, length, vocab_size, here)}, out)


@bench.command()
def profile(data: DataOption = None, preset: Preset = "mini", tokens: Tokens = 2048, length: Length = 128,
            precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto", threads: Threads = None,
            out: Out = None) -> None:
    """Where the time of our step goes, kind of op by kind of op, beside the least it could take by formula.

    Example: bertfast bench profile --preset base --tokens 1024
    """
    from bertfast.benchmarks import step_profile

    _finish(step_profile.run(data=data, preset=preset, tokens=tokens, length=length, precision=precision,
                             threads=_threads(threads)), out)


@bench.command()
def moves(data: DataOption = None, preset: Preset = "mini", tokens: Tokens = 2048, length: Length = 128,
          precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto", rounds: Rounds = 5,
          threads: Threads = None, out: Out = None) -> None:
    """What each move is worth: our step with one of them taken back to plain PyTorch, beside what a formula predicts.

    Example: bertfast bench moves --preset small
    """
    from bertfast.benchmarks import moves

    _finish(moves.run(data=data, preset=preset, tokens=tokens, length=length, precision=precision, rounds=rounds,
                      threads=_threads(threads)), out)


@bench.command()
def tune(head_size: Annotated[list[int] | None, typer.Option(min=16, max=128, help="D, any number of times.")] = None,
         hidden_size: Annotated[list[int] | None, typer.Option(min=64, help="H, any number of times.")] = None) -> None:
    """Time the kernels' tiles on this machine's GPU, and keep the fastest for its later runs.

    Without options for BERT-base: D 64, H 768. Example: bertfast bench tune --head-size 64 --hidden-size 1024
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU was found here: tune times the kernels on one")
    from bertfast.benchmarks import tune
    from bertfast.kernels import hardware

    gpu = torch.cuda.get_device_name()
    for key, tile in tune.tune(gpu, head_size or [64], hidden_size or [768]).items():
        print(f"{key}: {tile or 'the two kernels of long sequences'}")
    print(f"wrote {hardware.tiles_file(gpu)}")


@bench.command()
def report(folder: Annotated[Path, typer.Argument(help="Where the results lie.")] = Path("benchmarks/results"),
           readme: Annotated[list[Path] | None, typer.Option(help="Files whose <!-- bench NAME --> markers to fill.")]
           = None) -> None:
    """Turn results into tables, pictures (PNG, beside the results) and the README's figures.

    Example: bertfast bench report benchmarks/results --readme README.md --readme benchmarks/README.md
    """
    from bertfast.benchmarks import plots, report

    found = report.results(folder)
    for path in readme or []:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
    for result in found.values():
        report.show(result)
    written = plots.draw(found, folder)
    changed = report.update(readme or [], found)
    for path in [*written, *changed]:
        print(f"wrote {path}")


@bench.command()
def compare(before: Annotated[Path, typer.Argument(help="A result.")],
            after: Annotated[Path, typer.Argument(help="A later result of the same suite.")]) -> None:
    """Name what got slower beyond the spread of both, learned less, or stopped working; exit code 1 if anything did.

    Example: bertfast bench compare main.json branch.json
    """
    from bertfast.benchmarks import report

    old, new = report.load(before), report.load(after)
    worse = report.compare(old, new)
    for name, was, now in report.changed_settings(old, new):
        print(f"{name}: {was} before, {now} after: not the same measurement")
    for row in worse:
        print(f"{row['key']}: {row['contender']} {row['why']}")
    if worse:
        raise typer.Exit(1)
    print("no regression beyond the spread")
