"""The command line: `bertfast COMMAND --help` explains each. A user's mistake is one line on stderr (of options, with
the command's usage) and exit code 2.

Heavy imports stand inside the commands, so that --help answers at once.
"""

import errno
import io
import os
import re
import shlex
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from bertfast.benchmarks.commands import bench
from bertfast.files import UserError, first_line, read_json, unfinished

WORLD_SIZE = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""  # processes, as torchrun tells them
LAUNCHED = int(WORLD_SIZE) if WORLD_SIZE.isdecimal() else 1
FIRST_HERE = LAUNCHED == 1 or os.environ.get("LOCAL_RANK", "0") == "0"  # what stderr is told is told once a machine
IDLE = [("causal", "nsp"), ("causal", "mlm_probability"), ("model_config", "preset"), ("init_from", "preset"),
        ("init_from", "start")]  # options, of which the second is refused beside the first, whatever it says

app = typer.Typer(
    name="bertfast",
    help="Pretrain, fine-tune and serve BERT, several times faster and with the same numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench)


@app.callback()
def bertfast(context: typer.Context) -> None:
    """Pretrain, fine-tune and serve BERT, several times faster and with the same numbers."""
    if WORLD_SIZE and not WORLD_SIZE.isdecimal():
        raise UserError(f"WORLD_SIZE={WORLD_SIZE!r} is no number of processes")
    if LAUNCHED > 1 and context.invoked_subcommand not in ("pretrain", "doctor"):
        raise UserError(f"{context.invoked_subcommand} runs in one process: start it without torchrun")


@app.command()
def prepare(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs: .txt .txt.gz .jsonl .jsonl.gz .parquet")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced if it holds a set made from something else.")],
    vocab: Annotated[Path | None, typer.Option(help="vocab.txt, tokenizer.json or a checkpoint's folder.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=100, max=10_000_000,
                                                   help="Learn this many entries instead (30522).")] = None,
    cased: Annotated[bool, typer.Option("--cased", help="Keep case and accents.")] = False,
    field: Annotated[str, typer.Option(help="Where the text is in .jsonl and .parquet.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes; by default all cores.")] = None,
) -> None:
    """Turn text into what pretraining reads: sentences as WordPiece ids, in flat files that are memory-mapped.

    In .txt a blank line parts documents; in .jsonl and .parquet each row is one. Sentences are found for you, also in
    Chinese and Japanese, and hard-wrapped lines are joined. Memory stays small however large the input; a second run
    with the same input does nothing; an interrupted run leaves nothing behind.

    Example: bertfast prepare books/ "news/*.jsonl.gz" --vocab-size 30522 --out data/mine
    """
    from bertfast.data.prepare import prepare

    prepare(text, out, vocab=vocab, vocab_size=vocab_size, cased=cased, field=field, workers=workers)


@app.command()
def pretrain(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, metrics.jsonl, loss.png.")],
    data: Annotated[Path | None, typer.Option(help="A prepared set; by default documentation found here.")] = None,
    preset: Annotated[str, typer.Option(help="tiny, mini, small, medium, base or large.")] = "mini",
    model_config: Annotated[Path | None, typer.Option(help="A Hugging Face config.json instead of a preset.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Go on training from this checkpoint's weights.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of one packed batch.")] = 2048,
    micro_batches: Annotated[int, typer.Option(help="Packed batches a step (gradient accumulation).")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising learning rate.")] = 0.1,
    optimizer: Annotated[str, typer.Option(help="adamw or lamb.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="On matrices and tables only.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping; 0 turns it off.")] = 1.0,
    start: Annotated[str, typer.Option(help="A new model's weights: counts (of words) or normal.")] = "counts",
    dropout: Annotated[float | None, typer.Option(help="Of hidden and attention (0.1, or the checkpoint's).")] = None,
    mlm_probability: Annotated[float, typer.Option(help="Share of the tokens that are predicted.")] = 0.15,
    whole_word_masking: Annotated[bool, typer.Option("--whole-word-masking", help="Mask whole words.")] = False,
    nsp: Annotated[bool, typer.Option("--nsp/--no-nsp", help="Next-sentence prediction.")] = True,
    causal: Annotated[bool, typer.Option("--causal", help="Learn to predict the next word instead, as GPT.")] = False,
    short_length: Annotated[int, typer.Option(help="Sequence length of the first phase.")] = 128,
    long_length: Annotated[int, typer.Option(help="Sequence length of the second phase.")] = 512,
    long_share: Annotated[float, typer.Option(help="Share of the steps in the second phase.")] = 0.1,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    recompute: Annotated[bool, typer.Option("--recompute/--no-recompute",
                                            help="Keep layer inputs only: less memory.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph/--no-cuda-graph",
                                             help="On a GPU, replay the step as one CUDA graph.")] = True,
    seed: Annotated[int, typer.Option(help="Everything random is a function of it.")] = 1,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of metrics.jsonl.")] = 10,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints (the last two are kept).")] = 500,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events as well.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
) -> None:
    """Pretrain a BERT: masked words and next sentences, 90 % of the steps on short sequences, then long ones.

    Without --data it learns from the documentation that is already on this machine (docstrings of Python and its
    packages), with a vocabulary of 8,192 made from it. Ctrl-C (or SIGTERM) writes a checkpoint; --resume goes on from
    there, with the settings the run began with (--recompute and --cuda-graph may differ, and --data name the same set
    where it is now).

    Under torchrun a step's --micro-batches (by default one a process) are dealt out to the processes, one a GPU, or
    on CPUs one for each part of the cores (OMP_NUM_THREADS each); the run is the same but for rounding, and resumes on
    any number that divides them: torchrun --nproc-per-node 8 --no-python bertfast pretrain ...

    Example: bertfast pretrain --data data/mine --preset small --steps 20000 --out runs/mine
    """
    from bertfast import machine

    allocator = machine.keep_pages()
    import time
    from dataclasses import replace

    from bertfast import pretrain as engine
    from bertfast import processes, report
    from bertfast.data.prepare import prepare
    from bertfast.run_folder import FREE, Settings, check_folder, latest, stored_settings

    if LAUNCHED > 1:
        processes.join()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")
    own_data = out / "data"
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in ("out", "resume") and str(context.get_parameter_source(name)).endswith("COMMANDLINE")
    }
    begun = resume and bool(latest(out) or (out / "config.json").exists())
    if begun:
        settings = stored_settings(out)
        if not latest(out):
            report.note(f"no checkpoint in {out} yet: beginning this run anew")
        elif own_data.exists() and not Path(settings.data).exists():  # moved with the run, whose checkpoint knows it
            settings.data = str(own_data)
        settings = replace(settings, **{name: given.pop(name) for name in FREE if name in given})
        changed = [_typed(n, v, getattr(settings, n)) for n, v in given.items() if getattr(settings, n) != v]
        if changed:
            raise UserError(f"{out} cannot be resumed with other settings: {', '.join(changed)}")
    else:
        if resume:
            report.note(f"no run in {out} yet: starting one")
        for one, other in IDLE:
            if given.get(one) and given.get(other):
                one, other = (name.replace("_", "-") for name in (one, other))
                raise UserError(f"--{other} has no effect beside --{one}: remove it")
        new = {"data": str(own_data), "micro_batches": processes.count(), **given}
        settings = Settings(**new)
        settings.check()
    check_folder(out, resume)  # before a run's own data could be replaced
    if data is None and Path(settings.data).resolve() == own_data.resolve() and not (begun and own_data.exists()):
        report.note("no --data: learning from the documentation on this machine")
        if processes.is_first():
            _refuse_own_text(own_data)
            prepare(None, own_data, vocab_size=8192, console=report.console)
    processes.wait()
    began = time.perf_counter()
    run = engine.start(out, settings, resume)
    report.header(run.describe(allocator))
    if run.finished:
        if processes.is_first() and not (out / "loss.png").exists():  # it was killed before it had drawn it
            report.plot_loss(out, run.train_data.manifest["unigram_entropy"], settings.causal)
        report.note(f"this run is finished: {latest(out)}")
        return
    try:
        results, checkpoint = run.train()
    except KeyboardInterrupt as stop:
        report.note(f"stopped; {latest(out) or 'no checkpoint was written'}. "
                    f"Go on with: bertfast pretrain --out {shlex.quote(str(out))} --resume")
        raise typer.Exit(*stop.args or (130,)) from None
    if not processes.is_first():
        return
    report.closing_table(out, results, run.train_data.manifest["unigram_entropy"], settings.causal)
    report.examples(checkpoint, run.validation_data)
    report.note(f"trained in {time.perf_counter() - began:.0f} s; checkpoint: {checkpoint}; "
                f"curves: {out / 'loss.png'}; rows: {out / 'metrics.jsonl'}")


def _typed(name: str, value: Any, began: Any) -> str:
    """An option that is refused, as it was typed."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value} (it began with {began})"


def _refuse_own_text(folder: Path) -> None:
    """Raises UserError where it holds a set of the user's text, which the documentation is not to replace."""
    if (folder / "manifest.json").exists():
        match read_json(folder / "manifest.json"):
            case {"recipe": {"text": list()}}:  # of files; of the documentation it is a dictionary
                raise UserError(f"{folder} holds a set of your own text: name it with --data")


@app.command()
def finetune(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="classification, regression, tagging, qa, multiple-choice or seq2seq.")],
    model: Annotated[str, typer.Option(help="A pretrained checkpoint's folder, or an id on the Hugging Face hub.")],
    train: Annotated[Path, typer.Option(help=".csv .tsv .jsonl .json .parquet .conll .conllu, or SQuAD's .json.")],
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoint, metrics.json, predictions.jsonl, pictures.")],
    dev: Annotated[Path | None, typer.Option(help="What it is judged on; without, a tenth of --train.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text (words, context) if not found by name.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text, or the question.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label (number, tag, answers).")] = None,
    choices: Annotated[str | None, typer.Option(help="Columns of the options, with commas between.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of all columns, for files without a header.")] = None,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="A row may have any number of labels.")] = False,
    label_separator: Annotated[str, typer.Option(help="Separator of several labels in one field.")] = ",",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Regression: average both orders of a pair.")] = False,
    characters: Annotated[bool, typer.Option("--characters", help="Tagging: learn word boundaries (Chinese).")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a sequence or window (512; qa 384).")] = None,
    stride: Annotated[int, typer.Option(min=0, help="Tokens that windows of a long text share (tagging, qa).")] = 128,
    max_answer_length: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens (qa).")] = 30,
    epochs: Annotated[float, typer.Option(min=0, help="How often each example is seen.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples (windows) a step.")] = 32,
    tokens: Annotated[int, typer.Option(min=64, help="Token budget of one packed batch.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (5e-5; with --features 5e-3).")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising learning rate.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="On matrices and tables only.")] = 0.01,
    layer_decay: Annotated[float, typer.Option(help="Factor on the learning rate for each layer downwards.")] = 1.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping; 0 turns it off.")] = 1.0,
    dropout: Annotated[float | None, typer.Option(help="Instead of the checkpoint's.")] = None,
    freeze: Annotated[str, typer.Option(help="none, embeddings, a number of layers from below, or all.")] = "none",
    features: Annotated[bool, typer.Option("--features", help="Encode once, train a mix of layers only.")] = False,
    static: Annotated[bool, typer.Option("--static", help="With --features: the word embeddings alone.")] = False,
    style: Annotated[str, typer.Option(help="seq2seq: encoder-decoder or prefix-lm.")] = "encoder-decoder",
    max_target_length: Annotated[int, typer.Option(min=2, help="Tokens that are written at most (seq2seq).")] = 128,
    beams: Annotated[int, typer.Option(min=1, help="Beam search; 1 is greedy (seq2seq).")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Beam search: 0 favours short texts.")] = 1.0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    metric: Annotated[str | None, typer.Option(help="The metric that decides: accuracy, f1, mcc, pearson, …")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations (an epoch).")] = None,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many evaluations without a gain; 0: never.")] = 0,
    seed: Annotated[int, typer.Option(help="Order, dropout and the new head are functions of it.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each of another seed; reports mean and spread.")] = 1,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of metrics.jsonl.")] = 10,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph/--no-cuda-graph",
                                             help="On a GPU, replay steps whose shapes recur as CUDA graphs.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that --out already holds.")] = False,
) -> None:
    """Put a head on a pretrained encoder and train both on your examples.

    Columns are found by their usual names (of --dev first by those of --train), or named by you; what was understood
    is printed, with three examples, before training starts. OUT/checkpoint is the best so far at any moment (so Ctrl-C
    loses nothing), a folder that transformers loads; OUT also holds metrics.json, predictions.jsonl (of the dev file),
    loss.png and, where a text has one label, confusion.png.

    Example: bertfast finetune --task classification --model runs/mine/checkpoint-20000 --train train.tsv --dev dev.tsv
    --out runs/sst2
    """
    from bertfast import machine

    allocator = machine.keep_pages()
    from bertfast.finetune.task import Settings
    from bertfast.finetune.train import finetune as start

    values: dict[str, Any] = {
        name: str(v) if isinstance(v, Path) else v for name, v in context.params.items()
        if name not in ("out", "overwrite")
    }
    for name in ("choices", "columns"):
        values[name] = [part.strip() for part in values[name].split(",")] if values[name] else []
    try:
        start(out, Settings(**values), allocator, overwrite)
    except KeyboardInterrupt as stop:
        raise typer.Exit(*stop.args or (130,)) from None


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="The folder of a fine-tuning, or its checkpoint.")],
    input: Annotated[Path, typer.Option(help="Rows as in training, in the columns it read; labels are not needed.")],
    out: Annotated[Path, typer.Option(help="JSON lines, one a row, in their order; replaces no other kind of file.")],
    columns: Annotated[str | None, typer.Option(help="Names of all columns, for a file without a header.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
) -> None:
    """Predict every row of a file with a fine-tuned checkpoint; any size, in the memory of a batch.

    Example: bertfast predict --model runs/sst2 --input test.tsv --out test.jsonl
    """
    from bertfast import machine

    machine.keep_pages()
    from bertfast.finetune.predict import Predictor, predict_file

    names = [part.strip() for part in columns.split(",")] if columns else None
    predictor = Predictor(model, precision)
    result = predict_file(predictor, input, out, names)
    for what, n in result["decisions"].items():
        print(f"decided: {n:,} {what}")
    print(f"precision: {predictor.precision} ({predictor.precision_reason})")
    print(f"{result['rows']:,} rows in {result['seconds']:.1f} s "
          f"({result['rows'] / result['seconds']:,.0f} a second): {out}")


@app.command()
def fill_mask(
    text: Annotated[str, typer.Argument(help='A text with one [MASK] or more, in quotes.')],
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or an id on the Hugging Face hub.")],
    top: Annotated[int, typer.Option(min=1, help="Candidates to show for each [MASK].")] = 5,
) -> None:
    """Show the likeliest words for each [MASK] of a text.

    Example: bertfast fill-mask --model runs/mini/checkpoint-1000 "returns a new [MASK] object."
    """
    from bertfast.fill_mask import FillMask

    text = text.encode(errors="surrogateescape").decode(errors="replace")  # what the terminal sent may not be UTF-8
    for candidates in FillMask(model)(text, top):
        print("  ".join(f"{token} {probability:.1%}" for token, probability in candidates))


@app.command()
def export(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or an id on the Hugging Face hub.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="fp32, or half the size: bf16, fp16.")] = "fp32",
) -> None:
    """Write a checkpoint to hand on: the model and its tokenizer, without what a run resumes from.

    transformers loads the folder, and `bertfast finetune`, `predict` and `fill-mask` do.

    Example: bertfast export --model runs/mine/checkpoint-20000 --out my-bert --dtype bf16
    """
    from bertfast.checkpoint import export

    export(model, out, dtype)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{out}: {size:,.1f} MB in {dtype}")


@app.command()
def doctor() -> None:
    """Tell what this machine offers and which kernels run on it, each with the reason."""
    from bertfast import machine, report

    report.header(machine.describe())


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C or SIGTERM: an exception, so that temporary files are removed, but not within an import, where it may
    strike inside C++, which aborts, or in code that takes it for a failed import: there it ends the process, or comes
    again when a file is being written.
    """
    importing = False
    while frame and not importing:
        importing = frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    if importing and unfinished:
        threading.Timer(0.05, os.kill, [os.getpid(), number]).start()  # raise_signal wakes no sleep
        return
    if number == signal.SIGINT and FIRST_HERE:
        with suppress(OSError):
            os.write(2, b"bertfast: interrupted\n")  # print may be what is interrupted
    if importing:
        os._exit(128 + number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def main() -> None:
    """The console script.

    Exit codes: 0; 2 for a mistake of the user, too little memory, files that may not be read or output that cannot be
    written; 130 Ctrl-C; 143 SIGTERM.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in a script's background
        signal.signal(signal.SIGINT, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # texts and vocabularies have characters that some terminals lack
        sys.stdout.reconfigure(errors="backslashreplace")
    stdout = sys.stdout
    try:
        app()
    except SystemExit as stop:
        if stop.code == 1 and sys.stdout is not stdout:  # click's end for a broken pipe, which says nothing
            print("bertfast: cannot write the output: Broken pipe", file=sys.stderr)
            sys.exit(2)
        raise
    except UserError as error:
        if FIRST_HERE:
            print(f"bertfast: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        print(f"bertfast: out of memory; fewer tokens or a smaller model need less: {first_line(error)}",
              file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename:
            print(f"bertfast: {str(error.filename)[:80]}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"bertfast: cannot write the output: {error.strerror}", file=sys.stderr)
            os._exit(2)  # at an ordinary exit Python tries to write the rest once more, and fails again
        if error.errno not in (errno.ENOENT, errno.ENOMEM, errno.EMFILE):  # no temporary folder, too little for the run
            raise
        print(f"bertfast: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
