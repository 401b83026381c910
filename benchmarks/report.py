"""Results as files, on the terminal and in README files, and one result against another.

A suite's result is one JSON file in a folder. Its tables (tables.py) are what the terminal shows and what stands
between the markers of README files; nobody types a figure.
"""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from bertfast.benchmarks import contest
from bertfast.benchmarks.tables import readable, sweep, tables
from rich.table import Table

from bertfast.files import UserError, create_folder, read_json, write_bytes

NOISE = 0.05  # a slowdown below this is never called one, whatever the spread


def show(result: dict) -> None:
    """Print a result's tables on the terminal."""
    for made in tables(result):
        table = Table(title=made["title"], title_justify="left")
        for i, column in enumerate(made["columns"]):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in made["rows"]:
            table.add_row(*row)
        contest.console.print(table)


# ---- README files: generated between markers


def results(folder: Path) -> dict[str, dict]:
    """All results of a folder by file name without suffix. Raises UserError where there is none, or a damaged one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        value = read_json(path)
        if not isinstance(value, dict) or "suite" not in value:
            continue
        found[path.stem] = load(path)
        with readable(path, "table"):
            markdown(value)
    if not found:
        raise UserError(f"there is no result in {folder}: run bertfast bench first")
    return found


def _markdown(made: dict) -> str:
    lines = [["" if cell is None else cell.replace("|", "/") for cell in row] for row in made["rows"]]
    return "\n".join([
        f"{made['title'][0].upper()}{made['title'][1:]}:", "", "| " + " | ".join(made["columns"]) + " |",
        "|" + "---|" * len(made["columns"]), *["| " + " | ".join(row) + " |" for row in lines],
    ])


def markdown(result: dict) -> str:
    """A result's tables in Markdown, each with its title, and where they come from below."""
    parts = [_markdown(made) for made in tables(result)]
    versions, machine = result["versions"], result["hardware"]
    parts.append(f"`{result['command']}`: {machine['cores']} cores of {machine['cpu']}, {machine['isa']}"
                 f"{', ' + machine['gpu'] if machine['gpu'] else ''}; torch {versions['torch']}, transformers "
                 f"{versions.get('transformers', 'not installed')}; commit {result['commit']}, {result['date'][:10]}."
                 + (" Stopped early: complete rounds only." if result.get("stopped_early") else ""))
    return "\n\n".join(parts)


def rewrite(text: str, found: dict[str, dict]) -> str:
    """`text` with every `<!-- bench NAME -->` … `<!-- end -->` filled from the result NAME.

    A NAME with stars is one table of all the steps that it matches. Raises UserError where a marker names a result
    that is not there. What is filled in has its marker's line ends.
    """
    def fill(match: re.Match) -> str:
        name = match[1]
        names = fnmatch.filter(found, name)
        if not names:
            raise UserError(f"the marker <!-- bench {name} --> has no result {name}.json")
        if "*" in name:
            where = sorted({f"{m['cores']} cores of {m['cpu']}" for m in (found[n]["hardware"] for n in names)})
            made = _markdown(sweep([found[n] for n in names])) + (
                f"\n\n{'; '.join(where)}: {', '.join(f'{n}.json' for n in names)}.")
        else:
            made = markdown(found[name])
        return f"<!-- bench {name} -->\n{made}\n<!-- end -->".replace("\n", match[2])

    return re.sub(r"<!-- bench ([\w.*-]+) -->(\r?\n).*?<!-- end -->", fill, text, flags=re.DOTALL)


def update(readmes: list[Path], found: dict[str, dict]) -> list[Path]:
    """Fill the markers of these files; returns those that changed. Raises UserError where one cannot be read."""
    changed = []
    for path in readmes:
        try:
            before = path.read_bytes().decode()  # not as text: that would turn all line ends into \n
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
        after = rewrite(before, found)
        if after != before:
            write_bytes(path, after.encode())
            changed.append(path)
    return changed


# ---- one result against another


def compare(before: dict, after: dict) -> list[dict]:
    """What got slower beyond the spread, failed, or learned less: [{"key", "contender", "why"}], only of ours.

    Where a row has its share of what the machine reached in the same run, that must have fallen as well as the time
    grown, so that neither another clock nor a yardstick that was quick once is called a regression; of memory, peaks
    are compared. Raises UserError for results of different suites, and for those that hold neither.
    """
    if before["suite"] != after["suite"]:
        raise UserError(f"a result of {before['suite']} cannot be compared with one of {after['suite']}")
    ours = [r for r in before["rows"] if r["contender"].startswith(("bertfast", "patched"))]
    old = {(r["key"], r["contender"]): r for r in ours}
    new = {(r["key"], r["contender"]): r for r in after["rows"]}
    found = []
    value = "peak_bytes" if before["suite"] == "memory" else "median"
    if not any(value in r for r in ours):
        raise UserError(f"results of {before['suite']} have no time or memory of ours to compare")
    for (key, contender), was in old.items():
        if was["failed"] or value not in was:
            continue
        now = new.get((key, contender))
        why = None
        if now is None or now["failed"]:
            why = f"failed: {now['failed']}" if now else "is missing"
        elif value not in now:
            why = f"has no {value}"
        else:
            shares = value == "median" and "share" in was and "share" in now
            worse = min(now[value] / was[value], was["share"] / now["share"] if shares else float("inf"))
            allowed = 1 + max(NOISE, was.get("spread", 0.0) + now.get("spread", 0.0))
            if worse > allowed:
                why = f"{worse:.2f} times as {'large' if value == 'peak_bytes' else 'slow'} (allowed {allowed:.2f})"
            else:
                why = _learned_less(was, now, allowed)
        if why:
            found.append({"key": key, "contender": contender, "why": why})
    return found


def _learned_less(was: dict, now: dict, allowed: float) -> str | None:
    """How the model that was trained got worse, or None: in a target, its last loss or its accuracy."""
    for before, after in zip(was.get("reached", ()), now.get("reached", ())):
        if before is not None and (after is None or after > allowed * before):
            return f"takes {f'{after:.1f} s' if after else 'for ever'} to a target that took {before:.1f} s"
    if was.get("curve") and now.get("curve"):
        before, after = was["curve"][-1][2], now["curve"][-1][2]
        if not after <= (1 + NOISE) * before:
            return f"ends at a loss of {after:.3f}, before {before:.3f}"
    before, after = was.get("accuracy"), now.get("accuracy")
    if before is not None and after is not None and (1 + NOISE) * after < before:
        return f"has an accuracy of {after:.3f}, before {before:.3f}"
    return None


def changed_settings(before: dict, after: dict) -> list[tuple[str, Any, Any]]:
    """(name, before, after) of what decides what a result measures, and is not the same in both."""
    where = lambda r: {name: r.get("hardware", {}).get(name) for name in ("cpu", "gpu")}
    old, new = ({"threads": r.get("threads"), **where(r), "torch": r.get("versions", {}).get("torch"),
                 **r.get("settings", {})} for r in (before, after))
    return [(name, old[name], new[name]) for name in old if name in new and old[name] != new[name]]


def load(path: Path) -> dict:
    """A result file. Raises UserError where it is none, or where what every comparison needs is missing."""
    result = read_json(path)
    if not isinstance(result, dict) or "rows" not in result or not isinstance(result.get("suite"), str):
        raise UserError(f"{path} is not a result of bertfast bench")
    for name, kind in (("rows", list), ("settings", dict), ("hardware", dict), ("versions", dict)):
        if not isinstance(result.get(name, kind()), kind):
            raise UserError(f"{path} is damaged: it has no {name}")
    for number, row in enumerate(result["rows"], 1):
        row = row if isinstance(row, dict) else {}
        for name in ("key", "contender", "failed"):
            if not isinstance(row.get(name), str):
                raise UserError(f"{path} is damaged: row {number} has no {name}")
        for name in ("median", "peak_bytes", "share"):
            if name in row and not (isinstance(row[name], (int, float)) and row[name] > 0):
                raise UserError(f"{path} is damaged: row {number} has a {name} that is no number above 0")
        if not isinstance(spread := row.get("spread", 0), (int, float)) or not spread >= 0:
            raise UserError(f"{path} is damaged: row {number} has a spread that is no number from 0 on")
    return result


def write(result: dict, path: Path) -> None:
    """A result as JSON, one line a row, so that a difference between two commits can be read."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1, ensure_ascii=False)
    text = f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
    json.loads(text)
    create_folder(path.parent)
    write_bytes(path, text.encode())
