"""The command line: `bertfast COMMAND --help` explains each. A user's mistake is one line on stderr and exit code 2.

Heavy imports stand inside the commands, so that --help answers at once.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from bertfast.files import UserError

app = typer.Typer(
    name="bertfast",
    help="Pretrain, fine-tune and serve BERT, several times faster and with the same numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def bertfast() -> None:
    """Pretrain, fine-tune and serve BERT, several times faster and with the same numbers."""


@app.command()
def prepare(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs: .txt .txt.gz .jsonl .jsonl.gz .parquet")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced if it holds a set made from something else.")],
    vocab: Annotated[Path | None, typer.Option(help="vocab.txt, tokenizer.json or a checkpoint's folder.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=100, help="Learn this many entries instead [30522].")] = None,
    cased: Annotated[bool, typer.Option("--cased", help="Keep case and accents.")] = False,
    field: Annotated[str, typer.Option(help="Where the text is in .jsonl and .parquet.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [all cores].")] = None,
) -> None:
    """Turn text into what pretraining reads: sentences as WordPiece ids, in flat files that are memory-mapped.

    In .txt a blank line parts documents; in .jsonl and .parquet each row is one. Sentences are found for you, also in
    Chinese and Japanese, and hard-wrapped lines are joined. Memory stays small however large the input; a second run
    with the same input does nothing; an interrupted run leaves nothing behind.

    Example: bertfast prepare books/ "news/*.jsonl.gz" --vocab-size 30522 --out data/mine
    """
    from bertfast.data.prepare import prepare

    prepare(text, out, vocab=vocab, vocab_size=vocab_size, cased=cased, field=field, workers=workers)


def main() -> None:
    """The console script. Exit codes: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for a polite kill."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that temporary files are removed
    try:
        app()
    except UserError as error:
        print(f"bertfast: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bertfast: interrupted", file=sys.stderr)
        sys.exit(130)
