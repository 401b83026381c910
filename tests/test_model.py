"""The model against transformers, and against itself: padded, packed, recomputed, saved and loaded."""

import copy
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import bertfast
from bertfast.files import UserError
from bertfast.model import unpad
from bertfast.ops.linear import joined_linear
from bertfast.optim import Optimizer

SIZES = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 128, "max_position_embeddings": 48}
PAIRS = [
    ("BertForPreTraining", transformers.BertForPreTraining, ("labels", "next_sentence_label")),
    ("BertForMaskedLM", transformers.BertForMaskedLM, ("labels",)),
    ("BertForNextSentencePrediction", transformers.BertForNextSentencePrediction, ("next_sentence_label",)),
    ("BertLMHeadModel", transformers.BertLMHeadModel, ("labels",)),
]


def original(cls=transformers.BertForPreTraining, dropout=0.0, **changes):
    """A transformers model with weights large enough for every path to matter."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, **changes}, hidden_dropout_prob=dropout,
                                     attention_probs_dropout_prob=dropout, attn_implementation="eager")
    model = cls(config).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
            if "word_embeddings" in name:
                p[0] = 0
    return model


@pytest.fixture(scope="module")
def batch():
    """Five right-padded sequences, one of them full, with segments, labels and pairs."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([32, 7, 20, 31, 12])
    mask = (torch.arange(32) < lengths.unsqueeze(1)).long()
    ids = torch.randint(5, 211, (5, 32), generator=g) * mask
    chosen = (torch.rand(5, 32, generator=g) < 0.2) & (mask == 1)
    chosen[1] = False  # a sequence with nothing masked
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, (5, 32), generator=g) * mask,
        "labels": torch.where(chosen, ids, -100), "next_sentence_label": torch.tensor([0, 1, -100, 1, 0]),
    }


def ours_of(hf, tmp_path, name="BertForPreTraining"):
    hf.save_pretrained(tmp_path)
    return getattr(bertfast, name).from_pretrained(tmp_path).train()


def assert_gradients_equal(hf, ours):
    """Norm of the difference <= 1e-5 of the gradient's, or 1e-7 of the global norm (key.bias has none in truth)."""
    own = dict(ours.named_parameters())
    total = torch.cat([p.grad.flatten() for p in hf.parameters()]).norm()
    for name, p in hf.named_parameters():
        difference = (own[name].grad - p.grad).norm()
        assert difference <= 1e-5 * p.grad.norm() or difference <= 1e-7 * total, name


@pytest.mark.parametrize(("name", "cls", "labels"), PAIRS, ids=[p[0] for p in PAIRS])
@pytest.mark.parametrize("form", ["padded", "unpadded", "packed"])
def test_parity_with_transformers(name, cls, labels, form, batch, tmp_path):
    causal = name == "BertLMHeadModel"
    hf = original(cls, is_decoder=causal)
    ours = ours_of(hf, tmp_path, name)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids", *labels)}
    if form == "unpadded":  # the sequence that fills the batch's width, alone, with no mask
        inputs = {k: v[:1] for k, v in inputs.items() if k != "attention_mask"}
    theirs = dict(inputs)
    if name == "BertForNextSentencePrediction":
        theirs["labels"] = theirs.pop("next_sentence_label")
    expected = hf(**theirs)
    expected.loss.backward()
    if form == "packed":  # a batch's labels stand at the rows that predict them
        at_rows = {"labels": F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)} if causal else {}
        result = ours(unpad(**{**inputs, **at_rows})[0])
    else:
        result = ours(**inputs)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    assert_gradients_equal(hf, ours)

    plain = {k: v for k, v in inputs.items() if k not in labels}
    with torch.no_grad():
        result, expected = ours.eval()(**plain), hf.eval()(**plain)
    attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) == 1
    if "labels" in labels:
        theirs_logits = expected.prediction_logits if name == "BertForPreTraining" else expected.logits
        torch.testing.assert_close(result.logits[attended], theirs_logits[attended], rtol=1e-5, atol=1e-5)
    if "next_sentence_label" in labels:
        theirs_nsp = expected.seq_relationship_logits if name == "BertForPreTraining" else expected.logits
        torch.testing.assert_close(result.seq_relationship_logits, theirs_nsp, rtol=1e-5, atol=1e-5)


def test_counts_are_those_of_the_logits(batch, tmp_path):
    """Of what was predicted, and of what was predicted right: the likeliest word, the likelier of both answers."""
    ours = ours_of(original(), tmp_path).eval()
    plain = ours(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")})
    words, pairs = batch["labels"].clone(), plain.seq_relationship_logits.argmax(-1)
    chosen = (words != -100).nonzero()
    for row, column in chosen[::2]:
        words[row, column] = plain.logits[row, column].argmax()
    for row, column in chosen[1::2]:
        words[row, column] = plain.logits[row, column].argmin()
    pairs[0], pairs[2] = 1 - pairs[0], -100
    out = ours(**{**batch, "labels": words, "next_sentence_label": pairs})
    counts = out.n_masked, out.n_correct, out.n_pairs, out.n_pairs_correct
    assert tuple(map(int, counts)) == (len(chosen), len(chosen[::2]), 4, 3)


def test_the_last_layer_computes_what_is_read(batch, tmp_path, monkeypatch):
    ours, rows, add = ours_of(original(), tmp_path), [], bertfast.ops.add_layer_norm
    monkeypatch.setattr(bertfast.ops, "add_layer_norm", lambda x, *args, **named: (rows.append(len(x)),
                                                                                   add(x, *args, **named))[1])
    ours(**batch)
    packed = unpad(**batch)[0]
    assert rows == 4 * [packed.n_tokens] + 2 * [len(packed.read_rows)] and len(packed.read_rows) < packed.n_tokens


def test_a_causal_model_sees_nothing_behind_a_token(batch, tmp_path):
    """Whatever class reads it, as in transformers; a classifier judges by the last token, which has seen all."""
    config = bertfast.BertConfig(**SIZES, is_decoder=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    changed = ids.clone()
    changed[0, 20:] = torch.randint(5, 211, (12,))
    encoder = bertfast.BertModel(config).eval()
    a, b = (encoder(x, mask).last_hidden_state for x in (ids, changed))
    assert torch.equal(a[0, :20], b[0, :20]) and not torch.isclose(a[0, 20:], b[0, 20:]).all(1).any()
    classifier = bertfast.BertForSequenceClassification(config).eval()
    full, cut = (classifier(ids[:1, :n]).logits for n in (32, 31))
    assert not torch.isclose(full, cut).any()
    assert torch.allclose(classifier(ids, mask).logits[1], classifier(ids[1:2, :7]).logits, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_encoder_outputs_and_other_activations(activation, batch, tmp_path):
    hf = original(transformers.BertModel, hidden_act=activation).eval()
    ours = ours_of(hf, tmp_path, "BertModel").eval()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = hf(**inputs, output_hidden_states=True)
        result = ours(**inputs, output_hidden_states=True)
    attended = batch["attention_mask"] == 1
    torch.testing.assert_close(result.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    for a, b in zip(result.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[attended], b[attended], rtol=1e-5, atol=1e-5)
    assert not result.last_hidden_state[~attended].any()


def test_dropout_does_not_depend_on_padding_or_company(batch, tmp_path):
    """The same seed drops the same elements whether a sequence is padded, packed, or read in full."""
    ours = ours_of(original(dropout=0.1), tmp_path)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    seed = torch.tensor([42])
    packed, _ = unpad(**inputs, labels=batch["labels"])
    everything = ours.bert(**inputs, seed=seed).last_hidden_state
    attended = batch["attention_mask"] == 1
    torch.testing.assert_close(ours.bert.encode(packed, seed), everything[attended][packed.read_rows])
    alone = {k: v[:1] for k, v in inputs.items()}
    torch.testing.assert_close(ours.bert(**alone, seed=seed).last_hidden_state, everything[:1])
    assert not torch.equal(ours.bert(**inputs, seed=torch.tensor([43])).last_hidden_state, everything)
    torch.manual_seed(5)
    first = ours.bert(**inputs).last_hidden_state
    assert not torch.equal(first, ours.bert(**inputs).last_hidden_state)
    torch.manual_seed(5)
    assert torch.equal(first, ours.bert(**inputs).last_hidden_state)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_every_site_drops_its_share_from_a_stream_of_its_own(form, batch, monkeypatch):
    asked = []

    def recorded(op):
        def call(*args, **kwargs):
            given = inspect.signature(op).bind(*args, **kwargs).arguments
            asked.append((given["p"], given["stream"]))
            return op(*args, **kwargs)
        return call

    for name in ("embedding_sum", "attention", "attention_packed", "add_layer_norm"):
        monkeypatch.setattr(bertfast.ops, name, recorded(getattr(bertfast.ops, name)))
    config = bertfast.BertConfig(**SIZES, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    model = bertfast.BertForPreTraining(config).train()
    model(unpad(**batch)[0]) if form == "packed" else model.bert(batch["input_ids"], batch["attention_mask"])
    assert asked == [(0.2 if stream % 3 == 1 else 0.1, stream) for stream in range(10)]




def test_recompute_is_bit_equal_and_keeps_less(batch, tmp_path):
    ours = ours_of(original(dropout=0.1), tmp_path)
    gradients, kept = [], []
    for recompute in (False, True):
        ours.bert.recompute = recompute
        ours.zero_grad()
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            loss = ours(**batch, seed=torch.tensor([42])).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(kept[1]) < sum(kept[0]) / 2


def tables_and_norms(model):
    return [m for m in model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.LayerNorm))]


@pytest.mark.parametrize("sink", [False, True])
def test_hooks_on_tables_and_norms_are_called_and_change_no_number(sink, batch, tmp_path):
    """Dropout and gradients included: of the word table, too, which an optimiser's sink must not gather then."""
    found, called = [], []
    for hooked in (False, True):
        ours = ours_of(original(dropout=0.1), tmp_path)
        optimizer = Optimizer(ours, sink=sink)
        for module in tables_and_norms(ours) if hooked else ():
            module.register_forward_hook(lambda module, args, out: called.append(module))
        for module in tables_and_norms(ours)[3:] if hooked else ():  # a table's input has no gradient
            module.register_full_backward_hook(lambda module, *gradients: called.append(module))
        loss = ours(unpad(**batch)[0], seed=torch.tensor([42])).loss
        loss.backward()
        assert sink is False or hooked == (ours.bert.embeddings.word_embeddings.weight.grad is not None)
        gradients = [p.grad for n, p in ours.named_parameters() if "word_embeddings" not in n]
        found.append([loss, *gradients, optimizer.step(0.0)])
    assert set(called) == set(tables_and_norms(ours)) and len(called) == 3 + 2 * len(tables_and_norms(ours)[3:])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_pruned_table_or_norm_is_read_as_its_hook_leaves_it(batch, tmp_path):
    ours, pruned = ours_of(original(), tmp_path), ours_of(original(), tmp_path)
    with torch.no_grad():
        for i, module in enumerate(tables_and_norms(pruned)):
            prune.identity(module, "weight")
            module.weight_orig.mul_(1 + i / 8)
            tables_and_norms(ours)[i].weight.mul_(1 + i / 8)
    losses = [model(**batch).loss for model in (ours, pruned)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    for module, masked in zip(tables_and_norms(ours), tables_and_norms(pruned), strict=True):
        torch.testing.assert_close(masked.weight_orig.grad, module.weight.grad, rtol=1e-4, atol=1e-6)


class Doubled:
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("path", "part"), [
    ("bert.embeddings.token_type_embeddings", lambda: type("Table", (Doubled, torch.nn.Embedding), {})(2, 64)),
    ("bert.embeddings.position_embeddings", lambda: torch.nn.Embedding(48, 64, max_norm=1.0)),
    ("bert.embeddings.LayerNorm", lambda: type("Norm", (Doubled, torch.nn.LayerNorm), {})(64)),
    ("bert.encoder.layer.1.attention.output.LayerNorm", lambda: torch.nn.RMSNorm(64)),
    ("bert.encoder.layer.1.output.LayerNorm", lambda: torch.nn.LayerNorm(64, bias=False)),
    ("cls.predictions.transform.LayerNorm", torch.nn.Identity),
])
def test_a_replaced_part_runs_as_in_transformers(path, part, batch, tmp_path):
    hf = original(transformers.BertForMaskedLM)
    ours = ours_of(hf, tmp_path, "BertForMaskedLM")
    replacement = part()
    for model in (hf, ours):
        model.eval().set_submodule(path, copy.deepcopy(replacement))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    attended = batch["attention_mask"] == 1
    torch.testing.assert_close(ours(**inputs).logits[attended], hf(**inputs).logits[attended], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # PyTorch's: it will be removed
def test_a_model_runs_with_quantised_linear_layers(batch, tmp_path):
    ours = ours_of(original(dropout=0.1), tmp_path).eval()
    quantised = pytest.importorskip("torch.ao.quantization").quantize_dynamic(ours, {torch.nn.Linear})
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    exact, rounded = ours(**inputs).logits, quantised(**inputs).logits
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_an_all_padding_sequence_gives_no_nan(batch, tmp_path):
    ours = ours_of(original(), tmp_path)
    mask = batch["attention_mask"].clone()
    mask[2] = 0
    labels = batch["labels"].masked_fill(mask == 0, -100)
    out = ours(batch["input_ids"], mask, batch["token_type_ids"], labels=labels,
               next_sentence_label=batch["next_sentence_label"])
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(torch.isfinite(p.grad).all() for p in ours.parameters())
    unlabelled = ours(batch["input_ids"], mask, batch["token_type_ids"])  # the other sequences' [CLS] are theirs alone
    torch.testing.assert_close(out.seq_relationship_logits, unlabelled.seq_relationship_logits)
    out = ours.bert(batch["input_ids"], torch.zeros_like(mask))
    assert not out.last_hidden_state.any() and torch.isfinite(out.pooler_output).all()
    out = ours(batch["input_ids"], torch.zeros_like(mask), labels=torch.full_like(labels, -100),
               next_sentence_label=torch.full_like(batch["next_sentence_label"], -100))
    assert out.loss == 0


def test_autocast_is_refused(batch, tmp_path):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="no autocast"):
        ours_of(original(), tmp_path)(**batch)


@pytest.mark.parametrize(("change", "message"), [
    ({"attention_mask": torch.ones(5, 1, 32, 32)}, "padding mask"),
    ({"attention_mask": torch.arange(32).expand(5, 32) > 3}, "pad on the right"),
    ({"attention_mask": torch.arange(32).expand(5, 32) < 3}, "label stands on a padded"),
    ({"labels": torch.tensor([0, 1, 1, 0, 1])}, r"labels must be of shape \(5, 32\), got \(5,\)"),
    ({"next_sentence_label": torch.ones(5, 32)}, "next_sentence_label must be of shape"),
    ({"token_type_ids": torch.ones(5, 31)}, "token_type_ids must be of shape"),
    ({"input_ids": torch.zeros(5, 64, dtype=torch.long), "attention_mask": None, "token_type_ids": None,
      "labels": None}, "48 positions"),
])
def test_calls_we_would_compute_wrongly_are_refused(change, message, batch, tmp_path):
    with pytest.raises(ValueError, match=message):
        ours_of(original(), tmp_path)(**{**batch, **change})


def test_next_sentence_labels_are_also_called_labels(batch, tmp_path):
    hf = original(transformers.BertForNextSentencePrediction)
    ours, pairs = ours_of(hf, tmp_path, "BertForNextSentencePrediction"), batch["next_sentence_label"]
    torch.testing.assert_close(ours(batch["input_ids"], labels=pairs).loss, hf(batch["input_ids"], labels=pairs).loss)


@pytest.mark.parametrize(("name", "cls", "labels"), [*PAIRS, ("BertModel", transformers.BertModel, ())])
def test_transformers_loads_what_we_save(name, cls, labels, tmp_path):
    hf = original(cls)
    ours = ours_of(hf, tmp_path / "a", name)
    ours.save_pretrained(tmp_path / "b")
    back, report = cls.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (n, a), b in zip(hf.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    assert json.loads((tmp_path / "b/config.json").read_text())["architectures"] == [name]


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_old_names_prefixes_pickles_and_shards_load(tmp_path):
    hf = original()
    ours = ours_of(hf, tmp_path)
    expected = ours.state_dict()

    def same(model):
        return not model.training and all(torch.equal(t, model.state_dict()[n]) for n, t in expected.items())

    old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    rewrite(tmp_path, lambda t: {old(n).removeprefix("bert."): x for n, x in t.items()})
    assert same(bertfast.BertForPreTraining.from_pretrained(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(bertfast.BertForPreTraining.from_pretrained(tmp_path))
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file)
    index = {"weight_map": {n: file for file, members in halves.items() for n in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(bertfast.BertForPreTraining.from_pretrained(tmp_path))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys):
    hf = original(transformers.BertModel)
    hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="missing: cls.predictions.bias"):
        bertfast.BertForPreTraining.from_pretrained(tmp_path)
    bertfast.BertForPreTraining.from_pretrained(tmp_path, new_heads=True)
    assert "initialised anew: cls.predictions.bias" in capsys.readouterr().out
    rewrite(tmp_path, lambda t: {**t, "surprise": torch.zeros(1)})
    with pytest.raises(UserError, match="unexpected: surprise"):
        bertfast.BertModel.from_pretrained(tmp_path)
    name = "embeddings.LayerNorm.weight"
    rewrite(tmp_path, lambda t: {**{n: x for n, x in t.items() if n != "surprise"}, name: torch.zeros(3)})
    with pytest.raises(UserError, match=r"mis-shaped: embeddings.LayerNorm.weight \(3,\) instead of \(64,\)"):
        bertfast.BertModel.from_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        bertfast.BertModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        bertfast.BertModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        bertfast.BertModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        bertfast.BertModel.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"settings": {}}')
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match="is a run's folder, not a checkpoint: .*checkpoint-7"):
        bertfast.BertModel.from_pretrained(tmp_path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    original(transformers.BertModel).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": pytest.raises}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="refusing to unpickle|damaged"):
        bertfast.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("rows", [3, 40])
def test_few_rows_in_inference_are_joined_as_results(rows):
    """Query, key and value in one product, or without gradients and with few rows in three."""
    torch.manual_seed(0)
    linears, x = [torch.nn.Linear(24, 24) for _ in range(3)], torch.randn(rows, 24)
    expected = torch.cat([linear(x) for linear in linears], 1)
    torch.testing.assert_close(joined_linear(x, *linears), expected)
    with torch.inference_mode():
        torch.testing.assert_close(joined_linear(x, *linears), expected)
