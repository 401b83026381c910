"""What a fine-tuning prints and draws: what was understood, examples, evaluations, curves, the confusion picture."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.table import Table as Grid
from rich.text import Text

from bertfast.finetune.batches import Item
from bertfast.finetune.read import Table
from bertfast.finetune.task import Example, Task
from bertfast.report import console, note, pyplot, save_figure

MAX_DRAWN = 40  # labels; a larger confusion picture cannot be read
WIDTH = 300  # characters of a text in an example


def understood(table: Table, columns: dict[str, str], n: int) -> None:
    """One line about a file: format, how many examples, which column is what; then the reader's notes."""
    roles = ", ".join(f"{role.replace('_', ' ')} = {column!r}" for role, column in columns.items())
    note(f"{table.path}: {table.format}, {n:,} examples; {roles}")
    for line in table.notes:
        note(f"  {line}")


def examples(task: Task, chosen: Iterable[Example], items: list[Item]) -> None:
    """Examples as the task understands them, each with the tokens of its first sequence."""
    for i, example in enumerate(chosen, 1):
        grid = Grid(title=Text(f"example {i}, {example.where}"), title_justify="left", show_header=False, box=None,
                    padding=(0, 2, 0, 2))
        for name, value in task.shown(example).items():
            if value:
                grid.add_row(f"[bold]{name}[/bold]", Text(value if len(value) < WIDTH else value[:WIDTH] + " …"))
        first = next((item for item in items if item.example == i - 1), None)
        if first:
            tokens = [task.tokenizer.tokens[t] for t in first.sequences[0].ids[:40]]
            grid.add_row("[bold]tokens[/bold]", Text(" ".join(tokens)))
        console.print(grid)


def decisions(task: Task) -> None:
    """What the task decided by itself, and how often."""
    for what, n in task.counts.items():
        note(f"decided: {n:,} {what}")


def evaluation(step: int, scores: dict[str, float]) -> None:
    note(f"step {step:>6}  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def closing_table(summary: dict) -> None:
    """The metrics of each seed, and their mean and spread."""
    seeds = summary["seeds"]
    grid = Grid(title="best evaluation of each seed", title_justify="left")
    for column in ("seed", "step", *summary["mean"]):
        grid.add_column(column, justify="right")
    for row in seeds:
        grid.add_row(str(row["seed"]), str(row["step"]), *(f"{row[name]:.4f}" for name in summary["mean"]))
    if len(seeds) > 1:
        grid.add_row("mean", "", *(f"{v:.4f} ± {summary['std'][name]:.4f}" for name, v in summary["mean"].items()))
    console.print(grid)


def plot_loss(path: Path, rows: list[dict], metric: str) -> None:
    """loss.png: training loss above, the deciding metric on dev below, a line a seed."""
    if not any("loss" in row for row in rows):
        return
    plt = pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        for axis, name, marker in ((top, "loss", ""), (bottom, f"dev_{metric}", "o")):
            points = [(row["step"], row[name]) for row in own if name in row]
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o" if len(points) == 1 else marker,
                      markersize=4, label=f"seed {seed}")
    top.set_ylabel("training loss")
    top.legend(fontsize=9)
    bottom.set_ylabel(f"{metric} (dev)")
    bottom.set_xlabel("step")
    save_figure(figure, path)


def plot_confusion(path: Path, gold: list[int], guess: list[int], labels: list[str]) -> None:
    """confusion.png: rows are the true labels, columns the predicted ones, shades the share of each row.

    Of more than 40 labels those most often confused are drawn; labels that the font lacks, or that are the same once
    cut, as their numbers.
    """
    plt = pyplot()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, (gold, guess), 1)
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    drawn = np.sort(np.argsort(-wrong, kind="stable")[:MAX_DRAWN])
    counts = counts[np.ix_(drawn, drawn)]
    size = 3 + 0.3 * len(drawn)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    names, known = [labels[i][:24] for i in drawn], get_font(findfont(FontProperties())).get_charmap()
    if len(set(names)) < len(names) or not set(map(ord, "".join(names))) <= known.keys():
        names = [str(i) for i in drawn]
        figure.supxlabel("numbers: see id2label in checkpoint/config.json", fontsize=8)
    axis.set_xticks(range(len(drawn)), names, rotation=90, parse_math=False)  # a label's dollars are no formula
    axis.set_yticks(range(len(drawn)), names, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for i, j in np.argwhere(counts):
        axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7,
                  color="white" if counts[i, j] > counts[i].sum() / 2 else "black")
    if len(drawn) < len(labels):
        axis.set_title(f"the {len(drawn)} of {len(labels)} labels most often confused")
    save_figure(figure, path)
