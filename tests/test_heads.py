"""The task heads against transformers': same losses, logits and gradients, padded and packed; loading and new heads."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.files import UserError
from bertfast.heads import BertForFeatures
from bertfast.model import unpad

SIZES = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 128, "max_position_embeddings": 48}


def original(cls, **changes):
    """A transformers model without dropout, its weights large enough for every path to matter."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                     attn_implementation="eager", **changes)
    model = cls(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
        model.bert.embeddings.word_embeddings.weight[0] = 0
    return model


def inputs(shape=(5, 32), lengths=(32, 7, 20, 31, 12)):
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(shape[-1]) < torch.tensor(lengths).unsqueeze(-1)).long().view(shape)
    return {
        "input_ids": torch.randint(5, 211, shape, generator=g) * mask, "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=g) * mask,
    }


def token_labels(mask, n=4):
    labels = torch.randint(0, n, mask.shape, generator=torch.Generator().manual_seed(4))
    return labels.masked_fill((mask == 0) | (torch.arange(mask.shape[1]) % 3 == 0), -100)


BATCH = inputs()
CASES = {  # name: (class, config, inputs, labels)
    "single label": ("BertForSequenceClassification", {"num_labels": 3}, BATCH,
                     {"labels": torch.tensor([0, 2, 1, 1, 0])}),
    "two labels by default": ("BertForSequenceClassification", {}, BATCH, {"labels": torch.tensor([0, 1, 1, 1, 0])}),
    "multi-label": ("BertForSequenceClassification", {"num_labels": 3}, BATCH,
                    {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])}),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}, BATCH,
                   {"labels": torch.tensor([0.5, 3.0, 2.5, 0.0, 5.0])}),
    "tagging": ("BertForTokenClassification", {"num_labels": 4}, BATCH,
                {"labels": token_labels(BATCH["attention_mask"])}),
    # transformers lets padding take part in its softmax: without padding the losses must agree
    "qa": ("BertForQuestionAnswering", {}, inputs((5, 32), (32,) * 5),
           {"start_positions": torch.tensor([0, 3, 31, 7, 9]).unsqueeze(1),
            "end_positions": torch.tensor([0, 5, 31, 9, 9])}),
    "multiple choice": ("BertForMultipleChoice", {}, inputs((2, 3, 16), (16, 5, 9, 3, 16, 12)),
                        {"labels": torch.tensor([2, 0])}),
}


def same_gradients(hf, ours):
    own = dict(ours.named_parameters())
    total = torch.cat([p.grad.flatten() for p in hf.parameters()]).norm()
    for name, p in hf.named_parameters():
        difference = (own[name].grad - p.grad).norm()
        assert difference <= 1e-5 * p.grad.norm() or difference <= 1e-7 * total, name


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case, tmp_path):
    name, changes, batch, labels = CASES[case]
    hf = original(getattr(transformers, name), **changes)
    hf.save_pretrained(tmp_path)
    expected = hf(**batch, **labels)
    expected.loss.backward()
    ours = getattr(bertfast, name).from_pretrained(tmp_path).train()
    result = ours(**batch, **labels)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    same_gradients(hf, ours)
    attended = batch["attention_mask"].bool()
    for field in ("start_logits", "end_logits") if case == "qa" else ("logits",):
        mine, theirs = getattr(result, field), getattr(expected, field)
        if mine.shape[:2] == attended.shape and case in ("qa", "tagging"):
            mine, theirs = mine[attended], theirs[attended]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = getattr(transformers, name).from_pretrained(tmp_path / "again", attn_implementation="eager").train()
    torch.testing.assert_close(again(**batch, **labels).loss, expected.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_packed_is_padded(case, tmp_path):
    """Only read rows are computed; loss and logits are those of the padded call."""
    name, changes, batch, labels = CASES[case]
    original(getattr(transformers, name), **changes).save_pretrained(tmp_path)
    model = getattr(bertfast, name).from_pretrained(tmp_path)
    flat = {k: v.flatten(0, -2) for k, v in batch.items()}
    if case == "tagging":
        packed, extra = unpad(**flat, **labels)[0], {}
    else:
        packed, extra = unpad(**flat)[0], dict(labels)
    if case == "multiple choice":
        extra["n_options"] = [3, 3]
    padded, result = model(**batch, **labels), model(packed, **extra)
    torch.testing.assert_close(result.loss, padded.loss)
    if case == "tagging":
        kept = labels["labels"] != -100
        torch.testing.assert_close(result.logits, padded.logits[kept])
        assert packed.read_rows.numel() == int(kept.sum()) + len(flat["input_ids"]) < packed.input_ids.numel()
    elif case == "qa":
        torch.testing.assert_close(result.start_logits, padded.start_logits[flat["attention_mask"].bool()])
    else:
        torch.testing.assert_close(result.logits, padded.logits)
        assert packed.read_rows.numel() == len(flat["input_ids"])
    scaled = model(packed, **extra, scale=torch.tensor(2.0))  # sums, for losses over several micro-batches
    n = {"tagging": int((labels.get("labels", torch.zeros(1)) != -100).sum()), "multiple choice": 2}.get(case, 5)
    torch.testing.assert_close(scaled.loss, padded.loss * n * 2)


def test_options_in_different_numbers():
    torch.manual_seed(0)
    model = bertfast.BertForMultipleChoice(bertfast.BertConfig(**SIZES)).eval()
    flat = {k: v.flatten(0, -2) for k, v in inputs((1, 5, 16), (16, 5, 9, 3, 16)).items()}
    packed = unpad(**flat)[0]
    both = model(packed, n_options=[2, 3], labels=torch.tensor([1, 2]))
    apart = model(packed, n_options=[5]).logits[0]
    torch.testing.assert_close(both.logits[0], torch.cat([apart[:2], torch.tensor([-torch.inf])]))
    torch.testing.assert_close(both.logits[1], apart[2:])
    losses = [torch.nn.functional.cross_entropy(apart[:2], torch.tensor(1)),
              torch.nn.functional.cross_entropy(apart[2:], torch.tensor(2))]
    torch.testing.assert_close(both.loss, (losses[0] + losses[1]) / 2)
    with pytest.raises(ValueError, match="n_options"):
        model(packed)


@pytest.mark.parametrize("name", ["TokenClassification", "SequenceClassification"])
def test_dropout_of_the_head_follows_the_seed(name):
    torch.manual_seed(0)
    config = bertfast.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.extra.update(classifier_dropout=0.5, id2label=dict(enumerate("abcd")))
    model = getattr(bertfast, f"BertFor{name}")(config).train()
    batch = unpad(**BATCH, labels=token_labels(BATCH["attention_mask"]))[0]
    same, again, other = (model(batch, seed=torch.tensor([s])).logits for s in (1, 1, 2))
    assert torch.equal(same, again) and not torch.equal(same, other)
    still = model.eval()(batch, seed=torch.tensor([1])).logits
    assert not torch.equal(still, same)
    kept = model.train()._dropped(torch.ones(4000, 64), torch.arange(4000), torch.tensor([1])) != 0
    assert abs(float(kept.float().mean()) - 0.5) < 0.01


def test_features_are_without_dropout_in_training_too():
    config = bertfast.BertConfig(**SIZES, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model, batch = BertForFeatures(config).train(), unpad(**BATCH)[0]
    assert torch.equal(model.features(batch), model.features(batch)) and model.bert.training
    assert torch.equal(model.features(batch), model.eval().features(batch))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 4.4), ("mini", 11.2), ("small", 28.8), ("medium", 41.4),
                                                  ("base", 109.5), ("large", 335.1)])
def test_presets_have_the_published_sizes(preset, millions):
    with torch.device("meta"):
        model = bertfast.BertModel(bertfast.BertConfig.preset(preset))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert all(m.head_dim == 64 for m in model.modules() if hasattr(m, "head_dim"))


def test_new_heads_on_an_encoder(tmp_path, capsys):
    """As in transformers: head, and pooler where the file has none, are new; here it is told."""
    encoder = original(transformers.BertForTokenClassification).bert  # without a pooler
    encoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="missing: bert.pooler.dense.bias"):
        bertfast.BertForSequenceClassification.from_pretrained(tmp_path)
    torch.manual_seed(1)
    first = bertfast.BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True)
    assert "initialised anew: bert.pooler.dense.bias" in capsys.readouterr().out
    torch.manual_seed(1)
    second = bertfast.BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True)
    assert torch.equal(first.classifier.weight, second.classifier.weight) and first.classifier.weight.std() > 0.01
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)


def test_a_head_of_another_task_is_replaced_not_misread(tmp_path, capsys):
    original(transformers.BertForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    config = bertfast.BertConfig.from_file(tmp_path / "config.json")
    config.extra["id2label"] = {"0": "no", "1": "yes"}
    with pytest.raises(UserError, match="mis-shaped: classifier.bias"):
        bertfast.BertForSequenceClassification.from_pretrained(tmp_path, extra=config.extra)
    model = bertfast.BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True, extra=config.extra)
    assert model.classifier.weight.shape == (2, 64)
    assert "initialised anew: classifier.bias, classifier.weight" in capsys.readouterr().out
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"][:8]  # that is damage, not a task's
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    with pytest.raises(UserError, match="mis-shaped: bert.pooler.dense.weight"):
        bertfast.BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True, extra=config.extra)


def test_padding_and_what_lies_outside_count_for_nothing():
    config = bertfast.BertConfig.preset("tiny", vocab_size=211)
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"].clone()
    mask[1] = 0
    sentences = bertfast.BertForSequenceClassification(config).eval()
    other = ids.clone()
    other[2] = 7
    assert torch.equal(sentences(ids, mask).logits[1], sentences(other, mask).logits[1])
    assert torch.isfinite(sentences.train()(ids, mask * 0).logits).all()
    with pytest.raises(ValueError, match="label stands on a padded"):
        bertfast.BertForTokenClassification(config)(ids, mask, labels=torch.zeros_like(ids))
    spans = bertfast.BertForQuestionAnswering(config)
    last = mask.sum(1) - 1
    inside = spans.eval()(ids, mask, start_positions=last.masked_fill(mask.sum(1) == 0, -100), end_positions=last * 0)
    outside = spans(ids, mask, start_positions=last, end_positions=(last * 0).index_fill(0, torch.tensor([1]), 40))
    assert torch.isfinite(inside.loss) and inside.loss == outside.loss
    assert spans(ids, mask * 0, start_positions=last, end_positions=last).loss == 0
    options = bertfast.BertForMultipleChoice(config)
    assert options(ids.new_zeros(0, 2, 8), labels=ids.new_zeros(0)).loss == 0


def test_the_head_drops_as_the_encoder_does_where_nothing_else_is_said():
    config = bertfast.BertConfig(**SIZES, hidden_dropout_prob=0.3)
    assert bertfast.BertForSequenceClassification(config).p == 0.3
    config.extra["classifier_dropout"] = 0.0
    assert bertfast.BertForSequenceClassification(config).p == 0.0
