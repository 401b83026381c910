"""Checkpoints in the Hugging Face layout: config.json and model.safetensors, in and out, strictly.

Names are Hugging Face's; besides them we understand the old LayerNorm.gamma / beta, a missing or superfluous
`bert.` prefix, and the tied copies of the word table that some files carry. Anything else missing, unexpected or of
another shape is an error that lists it. Pickled files are read with weights_only.
"""

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import BertConfig
from .files import UserError, atomic_folder, atomic_path, create_folder, first_line, read_json, refusal, write_json
from .machine import DTYPES

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TIED = {  # tensor of the file -> the parameter it repeats
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TASK_HEADS = ("classifier.", "qa_outputs.", "mix.")
HEADS = ("pooler.", "bert.pooler.", "cls.", *TASK_HEADS)


class Checkpointed(torch.nn.Module):
    """`from_pretrained` and `save_pretrained` for a module with a `config` and a `base_prefix` before the encoder."""

    config: BertConfig
    base_prefix: str

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, name: str | Path, *, new_heads: bool = False, **config_changes):
        """Load a folder, or a model of the Hugging Face hub, in fp32 and eval mode.

        new_heads=True permits heads (pooler, cls, classifier) that the file lacks, or has beyond this class: they are
        initialised or dropped, and named in a printed line. A task's head (classifier, qa_outputs, mix) is kept only if
        the checkpoint is of this class and decides between the same labels in the same order.
        Raises UserError for anything missing, unexpected, mis-shaped or not finite, for a damaged file, and for
        another architecture.
        """
        folder = find(name)
        config = BertConfig.from_file(folder / "config.json")
        model = cls(replace(config, **config_changes))
        stored, wanted = config.extra, model.config.extra
        same_head = (stored.get("architectures") == [cls.__name__]
                     and wanted.get("id2label") in (None, stored.get("id2label"))  # None: a head without labels
                     and all(stored.get(name) == wanted.get(name) for name in ("features", "static")))
        load(model, read_tensors(folder), str(name), new_heads, same_head)
        return model.eval()

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors, each atomically.

        state: tensors to write in place of the parameters (a mixed-precision run's fp32 masters). Raises UserError
        where the folder cannot be written.
        """
        folder = create_folder(folder)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in (state or self.state_dict()).items()}
        with atomic_path(folder / "model.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        self.config.save(folder / "config.json", type(self).__name__)


def find(name: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or downloaded from the hub by its id. Raises UserError for what is none.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} holds no config.json: not a checkpoint")
        if run_settings(folder) is not None:
            newest = max(folder.glob("checkpoint*"), key=lambda path: path.stat().st_mtime, default=None)
            raise UserError(f"{folder} is a run's folder, not a checkpoint: {newest or 'it has none yet'}")
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/")):
        hint = "" if "/" in str(name) else "; an id on the Hugging Face hub is OWNER/NAME"
        raise UserError(f"no checkpoint at {name}{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[
            "config.json", "*.txt", "tokenizer*.json", "added_tokens.json", *FILES, "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"no folder {name}, and the hub did not give it: {str(error).splitlines()[0]}") from error


def export(source: str | Path, out: Path, dtype: str = "fp32") -> None:
    """Write the checkpoint `source` into the new folder `out`, to be handed on: all its tensors in one file, in fp32,
    bf16 or fp16, config.json, the tokenizer's files and what `bertfast predict` reads, not what a run resumes from.

    Raises UserError for another dtype, where `out` holds anything already, and for values that are not finite in it.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; known: {', '.join(DTYPES)}")
    folder = find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder")
    tensors = {n: t.to(DTYPES[dtype] if t.is_floating_point() else t.dtype).contiguous().clone()  # pickles share some
               for n, t in read_tensors(folder).items()}
    if broken := [n for n, t in tensors.items() if not torch.isfinite(t).all()]:
        raise UserError(f"{folder}: {broken[0]} has values that are not finite in {dtype}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model's configuration")
    config.pop("torch_dtype", None)  # as an older transformers calls it
    with atomic_folder(out) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        write_json(new / "config.json", {**config, "dtype": str(DTYPES[dtype]).removeprefix("torch.")})
        for path in [*folder.glob("*.json"), *folder.glob("*.txt")]:
            if path.is_file() and path.name not in ("config.json", "trainer.json", *FILES):
                shutil.copyfile(path, new / path.name)


def run_settings(folder: Path) -> dict | None:
    """The settings in a run's config.json, None where that file is a model's. Raises UserError where there is none."""
    stored = read_json(folder / "config.json")
    settings = stored.get("settings") if isinstance(stored, dict) else None
    return settings if isinstance(settings, dict) else None


def refuse_others(folder: Path, setting: str, written: Sequence[str]) -> None:
    """Raises UserError where a run in `folder` would spoil a model, a run of another kind or a user's own files.

    setting: one that all runs of this kind have, and no others; written: what they write.
    """
    if (folder / "config.json").exists():
        if setting not in (run_settings(folder) or {}):
            raise UserError(f"{folder} holds a model or another run: choose another --out")
    elif found := [name for name in written if (folder / name).exists()]:
        raise UserError(f"{folder} holds {found[0]}, which no run wrote: choose another --out")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: safetensors before pickles, whole or sharded.

    Raises UserError where there are none, or a file is damaged or holds more than tensors.
    """
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        if name.endswith(".index.json"):
            index = read_json(path)
            try:
                shards = sorted(set(index["weight_map"].values()))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is damaged: it has no weight_map") from error
            tensors: dict[str, Tensor] = {}
            for shard in shards:
                tensors.update(read_file(folder / shard))
            return tensors
        return read_file(path)
    raise UserError(f"{folder} holds no weights ({', '.join(FILES)})")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError, naming it, where it is missing, damaged or more than tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} {'cannot be read' if path.exists() else 'is missing'}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, json.JSONDecodeError) as error:
        reason = refusal(error)
        if reason and getattr(error, "errno", None) != errno.EINVAL:  # to which a pickle cut short leads
            raise UserError(f"cannot read {path}: {reason}") from error
        raise UserError(f"{path} is damaged or truncated: {first_line(error)}") from error
    except Exception as error:  # UnpicklingError: bytes that are no pickle, or one with code, which we do not run
        raise UserError(f"{path} is damaged or holds more than tensors: refusing to unpickle it") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return tensors


def load(model, tensors: dict[str, Tensor], source: str, new_heads: bool = False, same_head: bool = False) -> None:
    """Copy `tensors` into the model's parameters, strictly; see Checkpointed.from_pretrained."""
    own = dict(model.state_dict())
    found = under_our_names(tensors, own, model.base_prefix)
    if new_heads:  # a head of another task, of other labels or another size is another head
        found = {n: t for n, t in found.items() if not n.startswith(TASK_HEADS) or n not in own
                 or (same_head and own[n].shape == t.shape)}
    missing = sorted(set(own) - set(found))
    unexpected = sorted(set(found) - set(own))
    if new_heads:
        kept = sorted(n for n in set(own) & set(found) if n.startswith(TASK_HEADS))
        named = [n for n in missing + unexpected if n.startswith(HEADS)] + kept
        if named:
            print(f"{source}: " + "; ".join(
                f"{what}: {', '.join(n for n in names if n in named)}"
                for what, names in (("initialised anew", missing), ("not used", unexpected), ("kept", kept))
                if any(n in named for n in names)
            ))
        missing, unexpected = ([n for n in names if n not in named] for names in (missing, unexpected))
    shaped = [
        f"{n} {tuple(found[n].shape)} instead of {tuple(own[n].shape)}"
        for n in sorted(set(own) & set(found)) if own[n].shape != found[n].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped)) if names
    ]
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}; " + "; ".join(problems))
    if broken := [n for n in own if n in found and not torch.isfinite(found[n]).all()]:
        raise UserError(f"{source}: {broken[0]} has values that are not finite")
    with torch.no_grad():
        for name, tensor in own.items():
            if name in found:
                tensor.copy_(found[name])


def under_our_names(tensors: dict[str, Tensor], own: dict[str, Tensor], base_prefix: str) -> dict[str, Tensor]:
    """The file's tensors under our names."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.endswith("position_ids"):  # a buffer that older files carry
            continue
        if name not in own:
            if base_prefix and base_prefix + name in own:
                name = base_prefix + name
            elif not base_prefix and name.removeprefix("bert.") in own:
                name = name.removeprefix("bert.")
        found[name] = tensor
    for copy, original in TIED.items():
        if copy in found and copy not in own and original in found:
            if not torch.equal(found[copy], found[original]):
                raise UserError(f"{copy} differs from {original}: an untied checkpoint, which we cannot represent")
            del found[copy]
        elif copy in found and original in own and original not in found:
            found[original] = found.pop(copy)
    return found
