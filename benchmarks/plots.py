"""Pictures of results: bars of speed-up, the roofline of ops, time to quality. PNG, legible at half size."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from bertfast.benchmarks import tables

from bertfast.machine import threads
from bertfast.report import pyplot, save_figure

plt = pyplot()
MARKERS = {"forward": "o", "backward": "s", "both": "D"}
SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINES = ("-", "--", ":", "-.")


def draw(found: dict[str, dict], folder: Path) -> list[Path]:
    """A picture beside each result that has one; returns their paths."""
    drawers: dict[str, Callable] = {"pretrain": _bars, "inference": _inference, "ops": _roofline, "quality": _quality}
    written = []
    for name, result in found.items():
        if result["suite"] in drawers and any(not row["failed"] for row in result["rows"]):
            with tables.readable(folder / f"{name}.json", "picture"):
                figure = drawers[result["suite"]](result)
            if figure is not None:
                save_figure(figure, folder / f"{name}.png")
                written.append(folder / f"{name}.png")
    return written


def _horizontal(axes, labels: list[str], values: list[float], spreads: list[float], text: list[str]) -> None:
    """Bars from the top down, each with its text at the end, its spread as a thin line."""
    colours = [tables.colour(label) for label in labels]
    places = range(len(labels))
    axes.barh(places, values, color=colours, height=0.7)
    axes.errorbar(values, places, xerr=[v * s / 2 for v, s in zip(values, spreads)], fmt="none", ecolor="black",
                  elinewidth=1, capsize=2)
    for place, value, spread, words in zip(places, values, spreads, text):
        axes.text(value * (1 + spread / 2), place, f"  {words}", va="center", fontsize=10)
    axes.set_yticks(places, labels, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(v * (1 + s / 2) for v, s in zip(values, spreads)))
    axes.spines[["top", "right"]].set_visible(False)


def _bars(result: dict):
    rows = sorted(tables.measured(result), key=lambda r: r["median"])
    best = max((r["tokens_per_second"] for r in rows if r["contender"].startswith("HF")), default=None)
    values = [r["tokens_per_second"] for r in rows]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    _horizontal(axes, [r["contender"] for r in rows], values, [r["spread"] for r in rows],
                [f"{v:,.0f}" + (f"   {v / best:.2f}×" if best else "") for v in values])
    axes.set_xlabel("real tokens per second (× the best Hugging Face set-up; thin line: spread)")
    settings = result["settings"]
    axes.set_title(f"pretraining step, preset {settings['preset']}, sequences of up to {settings['length']}, "
                   f"{settings['fill']:.0%} full, {threads(result['threads'])}", fontsize=11, loc="left")
    return figure


def _inference(result: dict):
    keys = list(dict.fromkeys(r["key"] for r in tables.measured(result)))
    height = 0.42 * sum(1 for r in tables.measured(result)) + 1.1 * len(keys)
    figure, panels = plt.subplots(len(keys), 1, figsize=(9, height), layout="constrained", squeeze=False)
    for axes, key in zip(panels[:, 0], keys):
        rows = sorted((r for r in tables.measured(result) if r["key"] == key), key=lambda r: r["median"])
        values = [1 / r["median"] for r in rows]
        _horizontal(axes, [r["contender"] for r in rows], values, [r["spread"] for r in rows],
                    [f"{v:,.0f}" for v in values])
        axes.set_xlabel("sentences per second")
        axes.set_title(key, fontsize=11, loc="left")
    return figure


def _roofline(result: dict):
    """Our ops: share of the machine's peak (copy bandwidth or GEMM rate) over the bytes they move."""
    rows = [r for r in tables.measured(result, "share") if r["contender"] == "bertfast"]
    if not rows:
        return None
    kinds = list(dict.fromkeys(r["op"] for r in rows))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    size = 3 + 4 * len(dtypes), 5
    figure, (panels,) = plt.subplots(1, len(dtypes), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, dtype in zip(panels, dtypes):
        for kind, shade in zip(kinds, SHADES):
            for direction, marker in MARKERS.items():
                chosen = [r for r in rows if (r["op"], r["dtype"], r["direction"]) == (kind, dtype, direction)]
                if chosen:
                    axes.scatter([r["bytes"] / 1e6 for r in chosen], [100 * r["share"] for r in chosen], s=36,
                                 marker=marker, facecolor=shade, edgecolor="black", linewidth=0.4,
                                 label=f"{kind} {direction}")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high > 20 * low:  # else there may be no power of ten to read off
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("MB that must move")
        axes.set_title(dtype, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)  # of all panels, and only now: it ends the search for their limits
    panels[0].set_ylabel("% of the machine's peak:\na copy of as many bytes, or the GEMM rate")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _quality(result: dict):
    settings = result["settings"]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows = [r for r in result["rows"] if not r["failed"]]
    for row, line in zip(rows, cycle(LINES)):
        seconds, losses = [p[1] for p in row["curve"]], [p[2] for p in row["curve"]]
        axes.plot(seconds, losses, line, color=tables.colour(row["contender"]), linewidth=2)
        axes.annotate(row["contender"], (seconds[-1], losses[-1]), xytext=(6, 0), textcoords="offset points",
                      fontsize=10, va="center")
    right = max(p[1] for row in rows for p in row["curve"])
    axes.set_xlim(0, 1.28 * right)
    for target in settings["targets"]:
        level = settings["unigram_entropy"] - target
        axes.axhline(level, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axes.text(1.27 * right, level, f"{target} nats below\nthe unigram entropy", fontsize=8, ha="right", va="bottom")
    axes.set_xlabel("seconds of training (validation not counted)")
    axes.set_ylabel("validation masked-LM loss, nats")
    axes.set_title(f"preset {settings['preset']}, {settings['tokens']:,} tokens a step, the same batches, start and "
                   f"schedule, {threads(result['threads'])}", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
