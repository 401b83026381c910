"""A finished run of `bertfast pretrain` as a result: what its metrics.jsonl says, phase by phase."""

from pathlib import Path

from bertfast.benchmarks import contest

from bertfast.files import UserError, read_json
from bertfast.report import read_metrics
from bertfast.run_folder import stored_settings


def run(folder: Path) -> dict:
    """The result as JSON's types, a row a phase. Raises UserError where the folder holds no finished run, or a
    phase has no speed or loss."""
    config, metrics, settings = read_json(folder / "config.json"), read_metrics(folder), stored_settings(folder)
    last = {r["validation_length"]: r for r in metrics if "validation_length" in r and r["step"] == settings.steps}
    if not last:
        raise UserError(f"the run in {folder} has not come to its end: bertfast pretrain --out {folder} --resume")
    tokens, rows = settings.tokens * settings.micro_batches, []
    for begin, end, length in settings.phases():
        samples = [tokens / r["tokens_per_sec"] for r in metrics if "lr" in r and begin < r["step"] <= end]
        found = {name.removeprefix("validation_"): value for name, value in last.get(length, {}).items()}
        if not samples or found.get("mlm_loss") is None:  # null where it was infinite
            raise UserError(f"{folder / 'metrics.jsonl'} has no speed or no validation loss of sequences of {length}")
        rows.append({"key": f"S={length}", "contender": f"bertfast {config['precision']}", "failed": "",
                     "samples": samples, **contest.middle(samples), **found, "steps": end - begin})
    data = config["data"]
    return {"suite": "job", **contest.provenance(config["threads"]), "settings": {
        "preset": settings.preset, "tokens": tokens, "text_tokens": data["tokens"], "vocab_size": data["vocab_size"],
        "unigram_entropy": data["unigram_entropy"], "causal": settings.causal,
    }, "rows": rows}
