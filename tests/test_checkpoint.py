"""Checkpoint files as they are found in the world: every form that loads, and one clear error for each that doesn't."""

import errno
import json

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.checkpoint import export
from bertfast.files import UserError
from bertfast.machine import DTYPES


@pytest.fixture
def folder(tmp_path):
    """transformers' own checkpoint of a small BertForPreTraining, the tied decoder's bias included."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=48, max_position_embeddings=16)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    return tmp_path


def take(folder):
    """The tensors, and no file with them left."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def write_shards(folder, tensors, suffix, write):
    names = sorted(tensors)
    files = {f"model-{i}-of-3{suffix}": names[i::3] for i in range(3)}
    for file, members in files.items():
        write({n: tensors[n] for n in members}, folder / file)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    weight_map = {n: file for file, members in files.items() for n in members}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def renamed(tensors):
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()}


FORMS = {
    "safetensors": lambda folder, t: save_file(t, folder / "model.safetensors"),
    "pickle": lambda folder, t: torch.save(t, folder / "pytorch_model.bin"),
    "old pickle": lambda folder, t: torch.save(t, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "sharded safetensors": lambda folder, t: write_shards(folder, t, ".safetensors", save_file),
    "sharded pickle": lambda folder, t: write_shards(folder, t, ".bin", torch.save),
    "gamma and beta": lambda folder, t: save_file(renamed(t), folder / "model.safetensors"),
    "no prefix": lambda folder, t: save_file({n.removeprefix("bert."): x for n, x in t.items()},
                                             folder / "model.safetensors"),
    "tied copies and position_ids": lambda folder, t: save_file(
        {**t, "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone(),
         "bert.embeddings.position_ids": torch.arange(16)}, folder / "model.safetensors"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_form_gives_the_same_model(form, dtype, folder):
    expected = bertfast.BertForPreTraining.from_pretrained(folder).state_dict()
    expected = {n: t.to(dtype).float() for n, t in expected.items()}
    FORMS[form](folder, {n: t.to(dtype) for n, t in take(folder).items()})
    found = bertfast.BertForPreTraining.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], t), name


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_what_is_saved_is_called_fp32(name, folder, tmp_path):
    another_config(**{"dtype": None, name: "float16"})(folder, {n: t.half() for n, t in take(folder).items()})
    bertfast.BertForPreTraining.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").dtype == torch.float32
    assert "torch_dtype" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("form", ["safetensors", "pickle", "sharded safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_exported(dtype, form, folder, tmp_path):
    expected = bertfast.BertForPreTraining.from_pretrained(folder).state_dict()
    FORMS[form](folder, take(folder))
    for name in ("vocab.txt", "tokenizer.json", "finetune.json", "trainer.json", "optimizer.safetensors"):
        (folder / name).write_text(name)
    (folder / "lost.txt").symlink_to("nowhere")
    export(folder, tmp_path / "out", dtype)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "finetune.json"}
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert theirs.dtype == DTYPES[dtype]
    for name, tensor in bertfast.BertForPreTraining.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, expected[name].to(DTYPES[dtype]).float()), name
        assert torch.equal(tensor, theirs.state_dict()[name].float()), name


def test_what_is_not_exported(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    save_file({**take(folder), WORD: torch.full((60, 32), 1e5)}, folder / "model.safetensors")
    for arguments, said in ((("mine",), "exists already"), (("new", "fp16"), f"{WORD} has values that are not finite"),
                            (("new", "int4"), "--dtype int4 is unknown; known: fp32, bf16, fp16")):
        with pytest.raises(UserError, match=said):
            export(folder, tmp_path / arguments[0], *arguments[1:])
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json is not a model's configuration"):
        export(folder, tmp_path / "new")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("change", "cls", "said"), [
    (lambda t: {n: x for n, x in t.items() if "pooler" not in n}, "BertModel", "initialised anew: pooler.dense.bias"),
    (lambda t: {n: x for n, x in t.items() if "cls" not in n}, "BertForMaskedLM", "initialised anew: cls.predictions"),
    (lambda t: t, "BertModel", "not used: cls.predictions"),
], ids=["no pooler", "no head", "another head"])
def test_heads_may_be_missing_only_when_asked(change, cls, said, folder, capsys):
    save_file(change(take(folder)), folder / "model.safetensors")
    with pytest.raises(UserError, match="missing|unexpected"):
        getattr(bertfast, cls).from_pretrained(folder)
    getattr(bertfast, cls).from_pretrained(folder, new_heads=True)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("error", "said"), [
    (FileNotFoundError("No such file or directory"), "model.safetensors cannot be read"),  # as safetensors calls it
    (OSError(errno.EMFILE, "Too many open files"), "cannot read .*model.safetensors: Too many open files"),
    (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), "cannot read .*: Cannot allocate memory"),
])
def test_weights_that_may_not_be_read(error, said, folder, monkeypatch):
    def refuse(path):
        raise error

    save_file(take(folder), folder / "model.safetensors")
    monkeypatch.setattr("bertfast.checkpoint.load_file", refuse)
    with pytest.raises(UserError, match=said):
        bertfast.BertForPreTraining.from_pretrained(folder)


def cut(name):
    def write(folder, tensors):
        FORMS["pickle" if name.endswith("bin") else "safetensors"](folder, tensors)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return write


def without_a_shard(folder, tensors):
    FORMS["sharded safetensors"](folder, tensors)
    (folder / "model-1-of-3.safetensors").unlink()


def another_config(**changes):
    def write(folder, tensors):
        FORMS["safetensors"](folder, tensors)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return write


WORD = "bert.embeddings.word_embeddings.weight"
FAULTS = {
    "truncated safetensors": (cut("model.safetensors"), "model.safetensors is damaged or truncated"),
    "truncated pickle": (cut("pytorch_model.bin"), "pytorch_model.bin is damaged"),
    "empty file": (lambda folder, t: (folder / "model.safetensors").touch(), "is damaged or truncated"),
    "text for weights": (lambda folder, t: (folder / "pytorch_model.bin").write_text("404: not found"), "is damaged"),
    "a pickle of something else": (lambda folder, t: torch.save([1, 2], folder / "pytorch_model.bin"),
                                   "is not a dictionary of tensors"),
    "a missing shard": (without_a_shard, "model-1-of-3.safetensors is missing"),
    "an index without a map": (lambda folder, t: (folder / "model.safetensors.index.json").write_text("{}"),
                               "has no weight_map"),
    "a cut config": (lambda folder, t: (folder / "config.json").write_text('{"hidden_size": 3'),
                     "config.json is damaged"),
    "another shape": (lambda folder, t: FORMS["safetensors"](folder, {**t, WORD: torch.zeros(61, 32)}),
                      r"mis-shaped: bert.embeddings.word_embeddings.weight \(61, 32\) instead of \(60, 32\)"),
    "no number": (lambda folder, t: FORMS["safetensors"](folder, {**t, WORD: t[WORD] * float("nan")}),
                  "bert.embeddings.word_embeddings.weight has values that are not finite"),
    "a layer too few": (another_config(num_hidden_layers=3), "missing: bert.encoder.layer.2"),
    "a layer too many": (another_config(num_hidden_layers=1), "unexpected: bert.encoder.layer.1"),
    "no layers": (another_config(num_hidden_layers=0), "num_hidden_layers must be a whole number of 1 or more, got 0"),
    "a size in quotes": (another_config(hidden_size="32"), "hidden_size must be a whole number .* got '32'"),
    "a size of null": (another_config(vocab_size=None), "vocab_size must be a whole number .* got None"),
    "a rate in quotes": (another_config(layer_norm_eps="1e-12"), "layer_norm_eps must be a number, got '1e-12'"),
    "a rate below 0": (another_config(layer_norm_eps=-1.0), "layer_norm_eps must be 0 or more, got -1.0"),
    "a range of NaN": (another_config(initializer_range=float("nan")), "initializer_range must be 0 or more, got nan"),
    "padding nowhere": (another_config(pad_token_id=60), "pad_token_id 60 is not in the vocabulary of 60"),
    "a list for a config": (lambda folder, t: (folder / "config.json").write_text("[" * 100_000), "is damaged"),
    "RoBERTa": (another_config(model_type="roberta"), "describes a roberta model"),
    "a decoder": (another_config(add_cross_attention=True), "add_cross_attention=True is not supported"),
    "neither": (another_config(is_decoder="yes"), "is_decoder must be true or false, got 'yes'"),
    "relative positions": (another_config(position_embedding_type="relative_key"), "relative_key"),
    "an untied decoder": (
        lambda folder, t: FORMS["safetensors"](folder, {**t, "cls.predictions.decoder.weight": torch.zeros(60, 32)}),
        "an untied checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_clear_error(fault, folder):
    write, message = FAULTS[fault]
    write(folder, take(folder))
    with pytest.raises(UserError, match=message) as caught:
        bertfast.BertForPreTraining.from_pretrained(folder)
    assert "\n" not in str(caught.value)
