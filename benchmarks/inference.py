"""Sentence embeddings out of a checkpoint: what `sentence-transformers` gives, and how many sentences a second.

Everybody goes from text to mean-pooled embeddings in batches of the same size; tokenising counts. Before
the clock starts, each contender's embeddings are compared with sentence-transformers': 1e-5 in fp32, a cosine above
0.999 in bf16.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bertfast.benchmarks import contest
from bertfast.benchmarks.contest import Contender, Outcome, timed

from bertfast import machine
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError, read_json
from bertfast.finetune.batches import Sequence, pack
from bertfast.model import BertModel

REFERENCE = "sentence-transformers"
FP32_AGREES, BF16_COSINE = 1e-5, 0.999


# ---- the contenders: generators, each in its own process


def sentence_transformers(model: str, texts: list[str], batch: int, precision: str, patched: bool) -> Iterator[dict]:
    """SentenceTransformer.encode as it comes, or with bertfast.patch."""
    from sentence_transformers import SentenceTransformer

    device = machine.choose_device()
    encoder = SentenceTransformer(model, device=device.type).to(machine.DTYPES[precision])
    if patched:
        import bertfast

        bertfast.patch(encoder)
    encode = lambda: encoder.encode(texts, batch_size=batch, convert_to_tensor=True, show_progress_bar=False)
    yield from _turns(encode, texts, device)


def transformers_mean(model: str, texts: list[str], batch: int, precision: str) -> Iterator[dict]:
    """AutoModel with padding to the longest of each batch, sentences sorted by length, mean pooling."""
    import transformers

    device = machine.choose_device()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoder = transformers.AutoModel.from_pretrained(model, attn_implementation="sdpa").to(
        device, machine.DTYPES[precision]).eval()
    longest = _longest(Path(model))

    def encode():
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out = torch.empty(len(texts), encoder.config.hidden_size, device=device)
        for start in range(0, len(texts), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=longest,
                               return_tensors="pt").to(device)
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            hidden = encoder(**inputs).last_hidden_state.float()
            out[chosen] = (hidden * mask).sum(1) / mask.sum(1)
        return out

    yield from _turns(encode, texts, device)


def bertfast_native(model: str, texts: list[str], batch: int, precision: str) -> Iterator[dict]:
    """bertfast.BertModel on packed sentences: nothing is padded, so nothing need be sorted."""
    device = machine.choose_device()
    tokenizer, longest = Tokenizer.load(model), _longest(Path(model))
    encoder = BertModel.from_pretrained(model).to(device, machine.DTYPES[precision]).eval()

    def encode():
        out = torch.empty(len(texts), encoder.config.hidden_size, device=device)
        for start in range(0, len(texts), batch):
            ids = [np.array(tokenizer.encode(text)) for text in texts[start : start + batch]]
            cut = [x if len(x) <= longest else np.append(x[: longest - 1], tokenizer.sep_id) for x in ids]
            packed = pack([Sequence(x, second=len(x)) for x in cut]).to(device)
            hidden = encoder.encode(packed, read=False).float()
            lengths = packed.cu_seqlens.diff().long()
            out[start : start + batch] = torch.segment_reduce(hidden, "mean", lengths=lengths, unsafe=True)
        return out

    yield from _turns(encode, texts, device)


@torch.inference_mode()
def _turns(encode: Callable, texts: list[str], device: torch.device) -> Iterator[dict]:
    embeddings = torch.nn.functional.normalize(encode().float(), dim=-1).cpu().numpy()
    encode()
    yield {"embeddings": embeddings}
    while True:
        seconds, _ = timed(encode, device)
        yield {"seconds": seconds / len(texts)}


def _longest(model: Path) -> int:
    """Tokens of the longest input, as sentence-transformers would cut it."""
    positions = read_json(model / "config.json").get("max_position_embeddings", 512)
    for name, entry in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = read_json(model / name).get(entry) if (model / name).exists() else None
        if limit:
            return min(limit, positions)
    return positions


# ---- the suite


def agreement(facts: dict[str, dict]) -> dict[str, str]:
    """Whose embeddings are not the reference's; each contender's facts get its difference and least cosine."""
    reference = next((name for name in (REFERENCE, "transformers sdpa fp32") if name in facts), None)
    if reference is None:
        return dict.fromkeys(facts, "refused: every reference in fp32 failed, and nothing else says what is right")
    refused = {}
    wanted = facts[reference]["embeddings"]
    for name, found in facts.items():
        got = found["embeddings"]
        found["difference"] = float(np.abs(got - wanted).max())
        found["cosine"] = float((got * wanted).sum(1).min())
        good = found["cosine"] > BF16_COSINE if name.endswith("bf16") else found["difference"] <= FP32_AGREES
        if not good:  # also where it is NaN
            refused[name] = (f"refused: embeddings differ from {reference}'s by {found['difference']:.1e}, least "
                             f"cosine {found['cosine']:.5f}")
    return refused


def contenders(model: str, texts: list[str], batch: int) -> list[Contender]:
    common = {"model": model, "texts": texts, "batch": batch}
    entries: list[tuple[str, Callable, dict]] = [(REFERENCE, sentence_transformers,
                                                  {"precision": "fp32", "patched": False})]
    for precision in ("fp32", "bf16"):
        entries.append((f"transformers sdpa {precision}", transformers_mean, {"precision": precision}))
        patched = {"precision": precision, "patched": True}
        entries.append((f"bertfast.patch {precision}", sentence_transformers, patched))
        entries.append((f"bertfast {precision}", bertfast_native, {"precision": precision}))
    entries.append(("sentence-transformers bf16", sentence_transformers, {"precision": "bf16", "patched": False}))
    return [Contender(name, make, {**common, **more}) for name, make, more in entries]


def read_sentences(text: Path, limit: int) -> list[str]:
    """The first `limit` lines with anything on them. Raises UserError where there is none."""
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in lines if line][:limit]
    if not lines:
        raise UserError(f"{text} holds no sentence: one a line is wanted")
    return lines


def run(*, model: Path, text: Path, batches: list[int], sentences: int, rounds: int, threads: int) -> dict:
    """The result as JSON's types. Raises UserError for a model that does not pool by the mean, or no text."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a checkpoint's folder: it has no config.json")
    pooling = read_json(model / "1_Pooling/config.json") if (model / "1_Pooling/config.json").exists() else {}
    modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
    if pooling.get("pooling_mode", "mean") != "mean" or modes - {"pooling_mode_mean_tokens"}:
        raise UserError(f"{model} does not pool by the mean of its tokens, which is what this benchmark compares")
    modules = read_json(model / "modules.json") if (model / "modules.json").exists() else []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if more := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UserError(f"{model} has a {more[0]} module: this benchmark compares means of an encoder's tokens alone")
    config = read_json(model / "config.json")
    lines = read_sentences(text, sentences)
    rows: list[dict] = []
    stopped = False
    for batch in batches:
        texts = lines if batch > 1 else lines[: max(1, sentences // 4)]  # one at a time takes longer
        outcomes, stopped = contest.contest(contenders(str(model), texts, batch), rounds, threads, agreement)
        rows += [_row(name, outcome, batch) for name, outcome in outcomes.items()]
        if stopped:
            break
    counts = [len(x.split()) for x in lines]
    settings = {"model": model.name, "hidden_size": config.get("hidden_size", config.get("dim")),  # DistilBERT's
                "sentences": len(lines), "words": {"least": min(counts), "median": int(np.median(counts)),
                                                   "most": max(counts)}, "rounds": rounds}
    return {"suite": "inference", **contest.provenance(threads), "settings": settings, "stopped_early": stopped,
            "rows": rows}


def _row(name: str, outcome: Outcome, batch: int) -> dict:
    facts = {k: v for k, v in outcome.facts.items() if k != "embeddings"}
    row = {"key": f"batch {batch}", "contender": name, "failed": outcome.failed, **facts}
    if outcome.failed or not outcome.turns:
        return row
    return {**row, "samples": outcome.values(), **contest.middle(outcome.values())}
