"""Tables of results: {title, columns, rows of strings}, ready for the terminal and for Markdown.

One function a suite. Colours are Okabe and Ito's (2008), told apart by the colour-blind; pictures say by position and
label what they say by colour.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bertfast.files import UserError
from bertfast.machine import threads

OURS, PLAIN, THEIRS, OTHER = "#D55E00", "#009E73", "#0072B2", "#999999"


def tables(result: dict) -> list[dict]:
    """The tables of one result, ready to print. Raises UserError for a file that no suite wrote."""
    suite = result.get("suite")
    makers: dict[str, Callable] = {
        "pretrain": _pretrain, "memory": _memory, "ops": _ops, "inference": _inference, "quality": _quality,
        "roofline": _roofline, "profile": _profile, "finetune": _finetune, "tasks": _tasks, "transfer": _transfer,
        "trainer": _trainer, "aot": _aot, "aot_peers": _aot_peers, "job": _job,
        "moves": _moves,
    }
    if suite not in makers:
        raise UserError(f"this is not a result of bertfast bench: suite {suite!r}")
    return makers[suite](result)


def colour(contender: str) -> str:
    families = (("bertfast", OURS), ("plain", PLAIN), ("HF", THEIRS), ("transformers", THEIRS), ("sentence", THEIRS))
    return next((shade for name, shade in families if contender.startswith(name)), OTHER)


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Raises UserError, naming the file, for whatever a damaged result raises on its way to a table or picture."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another version: it gives no {what} ({error!r})") from error


def measured(result: dict, value: str = "median") -> list[dict]:
    return [row for row in result["rows"] if not row["failed"] and value in row]


def _failures(result: dict, columns: int) -> list[list[str]]:
    """A line a reason, of all whom it kept out."""
    names: dict[str, list[str]] = {}
    for row in result["rows"]:
        names.setdefault(row["failed"], []).append(row["contender"])
    return [[", ".join(those), why, *[""] * (columns - 2)] for why, those in names.items() if why]


def _pretrain(result: dict) -> list[dict]:
    settings, rows = result["settings"], measured(result)
    columns = ["contender", "tokens/s", "× the best HF", "useful GFLOP/s", "of the GEMM rate", "spread"]
    best = max((r["tokens_per_second"] for r in rows if r["contender"].startswith("HF")), default=None)
    lines = [[
        r["contender"], f"{r['tokens_per_second']:,.0f}", f"{r['tokens_per_second'] / best:.2f}" if best else "–",
        f"{r['flops_per_second'] / 1e9:,.0f}", f"{r['share']:.0%}" if "share" in r else "–", f"{r['spread']:.0%}",
    ] for r in sorted(rows, key=lambda r: r["median"])]
    peaks = result["machine"]
    rates = "; GEMM " + ", ".join(f"{n} {peaks[n] / 1e9:,.0f}" for n in ("fp32", "bf16")) + " GFLOP/s" if peaks else ""
    title = (f"preset {settings['preset']}: {settings['tokens']} real tokens a step in {settings['sequences']} "
             f"sequences of up to {settings['length']} ({settings['fill']:.0%} full), vocabulary "
             f"{settings['vocab_size']:,}, {threads(result['threads'])}{rates}")
    return [{"title": title, "columns": columns, "rows": lines + _failures(result, len(columns))}]


def sweep(found: list[dict]) -> dict:
    """One table of several results of `pretrain`: a line a result, our faster precision against the others' best."""
    columns = ["preset", "sequences up to", "full", "tokens a step", "threads", "bertfast in", "tokens/s",
               "× the best HF", "× the best plain PyTorch", "of the GEMM rate"]
    lines = []
    shape = lambda r: [*(r["settings"][name] for name in ("preset", "length", "fill")), r["threads"]]
    for result in sorted(found, key=shape):
        settings, best = result["settings"], {}
        for row in measured(result):
            family = row["contender"].split(" ")[0]
            if family not in best or row["tokens_per_second"] > best[family]["tokens_per_second"]:
                best[family] = row
        about = [settings["preset"], str(settings["length"]), f"{settings['fill']:.0%}", f"{settings['tokens']:,}",
                 str(result["threads"])]
        if (ours := best.get("bertfast")) is None:
            reasons = [row["failed"] for row in result["rows"] if row["contender"].startswith("bertfast")]
            lines.append([*about, next(filter(None, reasons), "not measured"), *[""] * 4])
            continue
        lines.append([
            *about, ours["dtype"], f"{ours['tokens_per_second']:,.0f}",
            *[f"{ours['tokens_per_second'] / best[family]['tokens_per_second']:.2f}" if family in best else "–"
              for family in ("HF", "plain")], f"{ours['share']:.0%}" if "share" in ours else "–",
        ])
    return {"title": "steps of several shapes, each from a run of its own", "columns": columns, "rows": lines}


def _job(result: dict) -> list[dict]:
    settings = result["settings"]
    words = "next-word" if settings.get("causal") else "masked-LM"
    columns = ["sequences up to", "steps", "tokens/s", f"validation {words} loss", "below the unigram entropy",
               f"{words} accuracy", "next-sentence accuracy"]
    lines = [[
        str(r["length"]), f"{r['steps']:,}", f"{settings['tokens'] / r['median']:,.0f}", f"{r['mlm_loss']:.3f}",
        f"{settings['unigram_entropy'] - r['mlm_loss']:.3f}", f"{r['mlm_accuracy']:.1%}",
        f"{r['nsp_accuracy']:.1%}" if "nsp_accuracy" in r else "–",
    ] for r in result["rows"]]
    title = (f"a run of `bertfast pretrain`, preset {settings['preset']}, {settings['tokens']:,} tokens a step, of a "
             f"text of {settings['text_tokens']:,} tokens (unigram entropy {settings['unigram_entropy']:.3f} nats, "
             f"vocabulary {settings['vocab_size']:,}), {threads(result['threads'])}")
    return [{"title": title, "columns": columns, "rows": lines}]


def _memory(result: dict) -> list[dict]:
    settings, rows = result["settings"], measured(result, "peak_bytes")
    columns = ["contender", "peak, MiB", "without parameters, gradients, optimiser, MiB", "of HF sdpa bf16's"]
    peer = next((r["activation_bytes"] for r in rows if r["contender"] == "HF sdpa bf16 autocast"), None)
    lines = [[r["contender"], f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['activation_bytes'] / 2**20:,.0f}",
              f"{r['activation_bytes'] / peer:.2f}" if peer else "–"]
             for r in sorted(rows, key=lambda r: r["peak_bytes"])]
    title = (f"peak memory of a step, preset {settings['preset']}: {settings['tokens']} tokens, sequences of up to "
             f"{settings['length']}, vocabulary {settings['vocab_size']:,}, {threads(result['threads'])}")
    return [{"title": title, "columns": columns, "rows": lines + _failures(result, len(columns))}]


def _ops(result: dict) -> list[dict]:
    """A table a dtype: a line an op, shape and direction; each contender's time, and ours against the best other."""
    if not result["settings"].get("quick", True):
        return _ops_in_short(result)
    made = []
    for dtype in ("fp32", "bf16"):
        rows = [r for r in result["rows"] if r["dtype"] == dtype]
        names = list(dict.fromkeys(r["contender"] for r in rows))
        lines = []
        for key in dict.fromkeys(r["key"] for r in rows):
            here = {r["contender"]: r for r in rows if r["key"] == key}
            times = {n: r["median"] for n, r in here.items() if not r["failed"]}
            others = [t for n, t in times.items() if n != "bertfast"]
            ours = here.get("bertfast", {"failed": "missing"})
            good = not ours["failed"]
            unit = "GFLOP/s" if good and ours["flops"] else "GB/s"
            lines.append([
                " ".join(key.split(" ")[:2]), key.rpartition(" ")[2],
                *[f"{1e6 * times[n]:,.0f}" if n in times else here[n]["failed"] if n in here else "" for n in names],
                f"{min(others) / times['bertfast']:.2f}" if good and others else "–",
                f"{ours['rate'] / 1e9:,.0f} {unit}" if good else "–",
                f"{ours['share']:.0%}" if "share" in ours else "–",
            ])
        columns = ["op and shape", "direction", *[f"{n}, µs" for n in names], "× the best other", "rate", "of the peak"]
        if lines:
            made.append({"title": f"ops in {dtype}, {threads(result['threads'])}", "columns": columns, "rows": lines})
    return made


def _ops_in_short(result: dict) -> list[dict]:
    """A table a dtype: a line an op and direction, over all its shapes."""
    columns = ["op", "direction", "shapes", "least × the best other", "at", "median × the best other", "largest shape",
               "rate there", "of the peak"]
    made = []
    for dtype in ("fp32", "bf16"):
        rows = [r for r in result["rows"] if r["dtype"] == dtype]
        lines = []
        for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in rows):
            here = [r for r in rows if (r["op"], r["direction"]) == (op, direction)]
            ours = {r["shape"]: r for r in here if r["contender"] == "bertfast" and not r["failed"]}
            if not ours:
                continue
            others = [r for r in here if r["contender"] != "bertfast" and not r["failed"]]
            best = {r["shape"]: r["median"] for r in sorted(others, key=lambda r: -r["median"])}  # the last one stays
            ahead = {shape: best[shape] / row["median"] for shape, row in ours.items() if shape in best}
            least = min(ahead, key=ahead.__getitem__, default="–")
            largest = max(ours.values(), key=lambda r: (r["bytes"], r["flops"]))
            lines.append([
                op, direction, str(len(ours)), f"{ahead[least]:.2f}" if ahead else "–", least,
                f"{statistics.median(ahead.values()):.2f}" if ahead else "–", largest["shape"],
                f"{largest['rate'] / 1e9:,.0f} {'GFLOP/s' if largest['flops'] else 'GB/s'}", f"{largest['share']:.0%}",
            ])
        if rows:
            made.append({"title": f"ops in {dtype}, {threads(result['threads'])}, all shapes", "columns": columns,
                         "rows": lines})
    failed = [r for r in result["rows"] if r["failed"]]
    if failed:
        made[-1]["rows"] += [[r["key"], r["contender"], r["failed"], *[""] * (len(columns) - 3)] for r in failed]
    return made


def _inference(result: dict) -> list[dict]:
    made = []
    columns = ["contender", "sentences/s", "× sentence-transformers", "largest difference", "least cosine", "spread"]
    for key in dict.fromkeys(r["key"] for r in result["rows"]):
        rows = sorted((r for r in measured(result) if r["key"] == key), key=lambda r: r["median"])
        peer = next((r["median"] for r in rows if r["contender"] == "sentence-transformers"), None)
        lines = [[r["contender"], f"{1 / r['median']:,.0f}", f"{peer / r['median']:.2f}" if peer else "–",
                  f"{r['difference']:.1e}", f"{r['cosine']:.5f}", f"{r['spread']:.0%}"] for r in rows]
        failed = _failures({"rows": [r for r in result["rows"] if r["key"] == key]}, len(columns))
        made.append({"title": f"sentence embeddings, {key}, {threads(result['threads'])}", "columns": columns,
                     "rows": lines + failed})
    return made


def _quality(result: dict) -> list[dict]:
    settings = result["settings"]
    targets = settings["targets"]
    columns = ["contender", *[f"{t} nats below" for t in targets], "last validation loss", "seconds"]
    rows = [r for r in result["rows"] if not r["failed"]]
    lines = [[r["contender"], *[f"{t:,.0f} s" if t else "not reached" for t in r["reached"]],
              f"{r['curve'][-1][2]:.3f}", f"{r['curve'][-1][1]:,.0f}"] for r in rows]
    title = (f"time to a validation loss so far below the unigram entropy ({settings['unigram_entropy']:.3f} nats): "
             f"preset {settings['preset']}, {settings['steps']:,} steps of {settings['tokens']:,} tokens, "
             f"{threads(result['threads'])}")
    return [{"title": title, "columns": columns, "rows": lines + _failures(result, len(columns))}]


def _roofline(result: dict) -> list[dict]:
    columns = ["machine", "lower bound, ms", "tokens/s at most", "largest pieces", ""]
    made = []
    for key in dict.fromkeys(r["key"] for r in result["rows"]):
        lines = []
        for row in (r for r in result["rows"] if r["key"] == key):
            pieces = sorted(row["pieces"].items(), key=lambda item: -item[1]["seconds"])[:3]
            lines.append([row["contender"], f"{1e3 * row['seconds']:,.2f}", f"{row['tokens_per_second']:,.0f}",
                          ", ".join(f"{n} {p['seconds'] / row['seconds']:.0%}" for n, p in pieces), row["label"]])
        made.append({"title": f"lower bound of a step by formula, {key}", "columns": columns, "rows": lines})
        gpus = [r for r in result["rows"] if r["key"] == key and r["label"].startswith("predicted")]
        made.append({
            "title": f"its kernels, forward and backward, ms at least (predicted, not measured), {key}",
            "columns": ["kernel", "GFLOP", "GB", *[r["contender"] for r in gpus]],
            "rows": [[name, f"{cost['flops'] / 1e9:,.0f}", f"{cost['bytes'] / 1e9:,.2f}",
                      *[f"{1e3 * r['pieces'][name]['seconds']:,.3f}" for r in gpus]]
                     for name, cost in gpus[0]["pieces"].items()],
        })
    return made


def _profile(result: dict) -> list[dict]:
    settings, rows = result["settings"], result["rows"]
    total = sum(r["seconds"] for r in rows)
    bound = sum(min(r["bound"] or 0.0, r["seconds"]) for r in rows)
    lines = []
    for row in rows:
        reached = "–" if not row["bound"] else f"{row['bound'] / row['seconds']:.0%}"
        if row["bound"] and row["bound"] > row["seconds"]:
            reached = "more than the yardstick"  # a copy reads its target, too, which an update in place need not
        lines.append([row["contender"], f"{1e3 * row['seconds']:,.1f}", f"{row['seconds'] / total:.0%}",
                      f"{1e3 * row['bound']:,.1f}" if row["bound"] else "–", reached])
    lines.append(["step", f"{1e3 * total:,.1f}", "100%", f"{1e3 * bound:,.1f}", f"{bound / total:.0%}"])
    title = (f"where the time of our step goes: preset {settings['preset']} in {settings['precision']}, "
             f"{settings['tokens']} tokens, sequences of {settings['length']}, vocabulary {settings['vocab_size']:,}, "
             f"{threads(result['threads'])}")
    columns = ["kind of op", "measured, ms", "of the step", "lower bound, ms", "reached"]
    return [{"title": title, "columns": columns, "rows": lines}]


def _moves(result: dict) -> list[dict]:
    """A line a move, the dearest first: how much slower the step is without it, predicted and measured."""
    settings, rows = result["settings"], measured(result)
    ours = next((r for r in rows if "without" not in r["contender"]), None)
    if ours is None:
        columns = ["contender", "failed"]
        return [{"title": "what each move is worth: nothing to compare with", "columns": columns,
                 "rows": _failures(result, len(columns))}]
    in_ms = lambda seconds: f"{1e3 * seconds:,.1f}"
    lines = [[
        row["contender"].partition("without: ")[2], in_ms(row["predicted"]) if "predicted" in row else "–",
        in_ms(settings["tokens"] * (row["median"] - ours["median"])), f"{row['median'] / ours['median']:.2f}",
        f"{row['spread']:.0%}",
    ] for row in sorted(rows, key=lambda r: -r["median"]) if row is not ours]
    title = (f"what each move is worth: preset {settings['preset']} in {settings['precision']}, {settings['tokens']} "
             f"tokens, sequences of {settings['length']}, vocabulary {settings['vocab_size']:,}, {result['threads']} "
             f"threads, our step {in_ms(settings['tokens'] * ours['median'])} ms")
    columns = ["taken back to plain PyTorch", "predicted to add, ms", "adds, ms", "step, × ours", "spread"]
    return [{"title": title, "columns": columns, "rows": lines + _failures(result, len(columns))}]


def _finetune(result: dict) -> list[dict]:
    """A line a task and contender: how fast, and what the GEMMs of the useful FLOPs alone would allow."""
    columns = ["task", "contender", "samples/s", "× the best of transformers", "of the GEMM rate", "GEMMs alone allow",
               "spread"]
    lines = []
    for key in dict.fromkeys(r["key"] for r in result["rows"]):
        here = {"rows": [r for r in result["rows"] if r["key"] == key]}
        rows = sorted(measured(here), key=lambda r: r["median"])
        peer = min((r["median"] for r in rows if r["contender"].startswith("transformers")), default=None)
        alone = " (head alone, encoding not counted)"  # another model than the others train: not comparable
        lines += [[
            key, r["contender"] + (alone if r["contender"] == "bertfast features" else ""), f"{1 / r['median']:,.1f}",
            f"{peer / r['median']:.2f}" if peer and r["contender"] != "bertfast features" else "–",
            f"{r['share']:.0%}" if "share" in r else "–",
            f"{r['ceiling'] * peer:.2f}" if peer and "ceiling" in r else "–", f"{r['spread']:.0%}",
        ] for r in rows]
        lines += [[key, *line] for line in _failures(here, len(columns) - 1)]
    title = (f"samples of fine-tuning a second, {result['settings']['model']}, turns of "
             f"{result['settings']['window']:.0f} s, {threads(result['threads'])}")
    return [{"title": title, "columns": columns, "rows": lines}]


def _trainer(result: dict) -> list[dict]:
    settings, rows = result["settings"], sorted(measured(result), key=lambda r: r["median"])
    columns = ["contender", "samples/s", "× the best original", "accuracy", "losses with dropout off", "spread"]
    best = min((r["median"] for r in rows if r["contender"].startswith("original")), default=None)
    lines = [[r["contender"], f"{1 / r['median']:,.0f}", f"{best / r['median']:.2f}" if best else "–",
              f"{r['accuracy']:.3f}" if r["accuracy"] is not None else "–", f"within {r['deviation']:.0e}",
              f"{r['spread']:.0%}"] for r in rows]
    title = (f"transformers' Trainer, {settings['model']}, an epoch of {settings['sentences']:,} sentences, "
             f"{threads(result['threads'])}")
    return [{"title": title, "columns": columns, "rows": lines + _failures(result, len(columns))}]


def _mean_and_range(values: list[float]) -> str:
    """Of the seeds: 0.912, or 0.912 (0.905 to 0.920)."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _tasks(result: dict) -> list[dict]:
    """A line a case and metric: ours and the peer's after the same steps, with how many seeds each had."""
    columns = ["set", "metric", "bertfast", "transformers", "seeds", "steps"]
    lines = []
    for key in dict.fromkeys(r["key"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["key"] == key]
        good = [r for r in rows if not r["failed"]]
        for metric in dict.fromkeys(name for r in good for name in r["metrics"]):
            cells = [[r["metrics"][metric] for r in good if r["contender"] == name] for name in columns[2:4]]
            lines.append([key, metric, *[_mean_and_range(c) if c else "–" for c in cells],
                          " and ".join(str(len(c)) for c in cells), f"{good[0]['steps']:,}"])
        lines += [[key, r["contender"], r["failed"], *[""] * 3] for r in rows if r["failed"]]
    settings = result["settings"]
    precision = f"in {settings['precision']}, " if "precision" in settings else ""
    title = f"quality of fine-tuned {settings['model']}, {precision}the same data, start, hyper-parameters and steps"
    return [{"title": title, "columns": columns, "rows": lines}]


def _transfer(result: dict) -> list[dict]:
    """A line a set and style: the encoder pretrained and random, by the set's first metric; then what failed."""
    styles = list(dict.fromkeys(r["contender"].partition(", ")[2] for r in result["rows"]))
    lines = []
    for key in dict.fromkeys(r["key"] for r in result["rows"]):
        good = [r for r in result["rows"] if r["key"] == key and not r["failed"]]
        metric = next((next(iter(r["metrics"])) for r in good), "–")
        for style in styles:
            pair = [[r["metrics"][metric] for r in good if r["contender"] == f"{start}, {style}"]
                    for start in ("pretrained", "random")]
            lines.append([key, style, metric, *[_mean_and_range(cell) if cell else "–" for cell in pair],
                          " and ".join(str(len(cell)) for cell in pair)])
        failed = [r for r in result["rows"] if r["key"] == key and r["failed"]]
        lines += [[key, r["contender"], r["failed"], *[""] * 3] for r in failed]
    columns = ["set", "style", "metric", "pretrained", "random weights", "seeds"]
    return [{"title": f"what pretraining buys: {result['settings']['model']}", "columns": columns, "rows": lines}]


def _aot(result: dict) -> list[dict]:
    columns = ["architecture", "kernels", "in bf16 and fp16", "with tensor cores", "spilling", "most registers",
               "most shared memory, KiB", "dropout, instructions a score at most", "resident blocks it takes at most",
               "rules broken"]
    lines = [[
        r["key"], str(r["kernels"]), str(r["ruled"]), str(r["tensor_core"]), str(r["spilled"]),
        str(r["registers"] or "–"), f"{r['shared'] / 1024:.0f}" if r["shared"] else "–",
        f"{r['dropout']:.1f}" if r["dropout"] else "–", f"{r['blocks_lost']:g}" if r["dropout"] else "–",
        "; ".join(r["broken"]) or "none",
    ] for r in result["rows"]]
    what = "every shipped configuration" if result["full"] else "BERT-base in bf16"
    return [{"title": f"compiled ahead of time, {what} (computed, not measured)", "columns": columns, "rows": lines}]


def _aot_peers(result: dict) -> list[dict]:
    """A table an architecture; several kernels of one operation stand in one cell, parted by +."""
    columns = ["operation", "whose", "registers", "spilled, B", "warps", "occupancy", "instructions an element",
               "bytes an element", "remark"]
    made = []
    for arch in dict.fromkeys(r["key"].rpartition(", ")[2] for r in result["rows"]):
        lines = []
        for row in (r for r in result["rows"] if r["key"].endswith(arch)):
            operation, kernels = row["key"].rpartition(", ")[0], row["kernels"]
            each = lambda name, form="{}": " + ".join(form.format(k[name]) for k in kernels)  # noqa: B023
            lines.append([
                operation, row["contender"], each("registers"), each("spill"), each("warps"),
                each("occupancy", "{:.0%}"), f"{row['instructions']:.1f}", f"{row['bytes']:.1f}",
                result["remarks"][operation] if row["contender"] == "bertfast" and not made else "",  # once is enough
            ])
        made.append({"title": f"compiled for {arch}, bf16, BERT-base (computed, not measured)", "columns": columns,
                     "rows": lines})
    return made
