"""Text to text against transformers' EncoderDecoderModel (loss, gradients, greedy), decoding against brute force."""

import itertools

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bertfast
from bertfast import seq2seq
from bertfast.files import UserError
from bertfast.finetune.batches import Sequence, pack
from bertfast.seq2seq import BertForPrefixLM, BertForSeq2Seq, generate

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}
CLS, SEP = 2, 3
SOURCES, TARGETS = (9, 4, 13), (5, 8, 3)


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def ids(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 61, (n,), generator=g) for n in lengths]


def packed(rows):
    return pack([Sequence(row.numpy(), len(row)) for row in rows])


def padded(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@pytest.fixture
def pair(tmp_path):
    """transformers' model and ours from its folder."""
    halves = [transformers.BertConfig(**SIZES, attn_implementation="eager", **extra)
              for extra in ({}, {"is_decoder": True, "add_cross_attention": True})]
    hf = transformers.EncoderDecoderModel(encoder=transformers.BertModel(halves[0]),
                                          decoder=transformers.BertLMHeadModel(halves[1]))
    randomised(hf)
    hf.config.decoder_start_token_id, hf.config.pad_token_id, hf.config.eos_token_id = CLS, 0, SEP
    hf.save_pretrained(tmp_path / "hf")
    return hf.train(), BertForSeq2Seq.from_pretrained(tmp_path / "hf").train()


def arguments():
    sources, targets = ids(SOURCES, 1), [torch.cat([t, torch.tensor([SEP])]) for t in ids(TARGETS, 2)]
    begun = [torch.cat([torch.tensor([CLS]), t[:-1]]) for t in targets]
    return sources, targets, {"targets": packed(begun), "labels": torch.cat(targets)}


def test_encoder_decoder_is_transformers(pair, tmp_path):
    hf, ours = pair
    sources, targets, given = arguments()
    inputs = {"input_ids": padded(sources), "attention_mask": (padded(sources) > 0).long(),
              "labels": padded(targets, -100)}
    expected = hf(**inputs)
    expected.loss.backward()
    result = ours(packed(sources), **given)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    own = dict(ours.named_parameters())
    for name, p in hf.named_parameters():
        if p.grad is not None and "pooler" not in name:
            difference = (own[name].grad - p.grad).norm()
            assert difference <= 1e-5 * p.grad.norm() or difference <= 1e-6, name
    ours.config.extra.update(decoder_start_token_id=CLS, eos_token_id=SEP)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "ours").train()
    torch.testing.assert_close(again(**inputs).loss, expected.loss, rtol=1e-6, atol=0)
    written = again.eval().generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12,
                                    num_beams=1, do_sample=False)
    for theirs, mine in zip(written.tolist(), generate(ours.eval(), packed(sources), CLS, SEP, max_new=12)):
        theirs = theirs[1:]
        assert mine == (theirs[: theirs.index(SEP)] if SEP in theirs else theirs)


def prefix_model():
    torch.manual_seed(0)
    return randomised(BertForPrefixLM(bertfast.BertConfig(**SIZES))).eval()


def prefixed(sources, targets):
    """What BertForPrefixLM learns from: the target without its last token after the source."""
    rows = [Sequence(torch.cat([s, t[:-1]]).numpy(), len(s), torch.arange(len(s) - 1, len(s) + len(t) - 1).numpy(),
                     t.numpy()) for s, t in zip(sources, targets)]
    return pack(rows), torch.tensor([len(s) for s in sources], dtype=torch.int32)


def test_prefix_lm_is_masked_lm_under_the_prefix_mask(tmp_path):
    model = prefix_model()
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.prefix_lm and config.architectures == ["BertForMaskedLM"]
    hf = transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    sources, targets, _ = arguments()
    loss = model(*prefixed(sources, targets)).loss
    losses = []
    for source, target in zip(sources, targets):
        n, m = len(source), len(source) + len(target) - 1
        visible = torch.ones(m, m).tril().bool() | (torch.arange(m) < n)
        mask = torch.zeros(1, 1, m, m).masked_fill(~visible, torch.finfo(torch.float32).min)
        logits = hf(torch.cat([source, target[:-1]])[None], attention_mask=mask,
                    token_type_ids=(torch.arange(m) >= n).long()[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[n - 1 :], target, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("style", ["encoder-decoder", "prefix-lm", "prefix-lm from a causal encoder"])
def test_cached_decoding_is_the_whole_model(style, pair):
    """The summed log-probability that step after step finds is the loss of the whole text at once."""
    model = pair[1].eval() if style == "encoder-decoder" else prefix_model()
    model.config.is_decoder = "causal" in style
    sources, targets, given = arguments()
    for source, target in zip(sources, targets):
        state, logits = model.begin(packed([source]), CLS, len(target))
        total = 0.0
        for token in target:
            total += logits.float().log_softmax(-1)[0, token]
            logits = model.advance(state, token[None])
        if style != "encoder-decoder":
            whole = model(*prefixed([source], [target]))
        else:
            begun = torch.cat([torch.tensor([CLS]), target[:-1]])
            whole = model(packed([source]), packed([begun]), target)
        torch.testing.assert_close(-total / len(target), whole.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["encoder-decoder", "prefix-lm"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_a_wide_beam_finds_the_best_text(style, penalty):
    """Against all texts of up to 3 tokens over 6 words, several sources at a time."""
    config = bertfast.BertConfig(**{**SIZES, "vocab_size": 6})
    torch.manual_seed(1)
    model = randomised((BertForSeq2Seq if style == "encoder-decoder" else BertForPrefixLM)(config)).eval()
    sources = [torch.tensor([2, 4, 5, 3]), torch.tensor([2, 5, 3])]
    results = generate(model, packed(sources), CLS, SEP, max_new=3, beams=150, length_penalty=penalty)
    letters = [t for t in range(6) if t != SEP]
    for source, result in zip(sources, results):
        scores = {}
        for n in range(3):
            for text in itertools.product(letters, repeat=n):
                target = torch.tensor([*text, SEP])
                if style == "prefix-lm":
                    loss = model(*prefixed([source], [target])).loss
                else:
                    begun = torch.tensor([CLS, *text])
                    loss = model(packed([source]), packed([begun]), target).loss
                scores[text] = -float(loss) * (n + 1) / (n + 1) ** penalty
        assert tuple(result) == max(scores, key=scores.get)


def test_beams_of_several_sources_do_not_mix(pair):
    model = pair[1].eval()
    sources = ids((9, 4, 13, 7), 5)
    together = generate(model, packed(sources), CLS, SEP, max_new=8, beams=4)
    assert together == [generate(model, packed([s]), CLS, SEP, max_new=8, beams=4)[0] for s in sources]
    assert len({tuple(t) for t in together}) > 1


class Scripted:
    """A model of three words and the end that writes by a table: {what is written so far: probabilities}."""

    def __init__(self, table):
        self.table = table

    def begin(self, batch, start, room):
        self.texts = [()]
        return self, self.logits()  # its own state

    def reorder(self, index):
        self.texts = [self.texts[i] for i in index]

    def advance(self, state, tokens):
        self.texts = [(*text, int(token)) for text, token in zip(self.texts, tokens)]
        return self.logits()

    def logits(self):
        return torch.tensor([self.table.get(text, (0.97, 0.01, 0.01, 0.01)) for text in self.texts]).log()


@pytest.mark.parametrize(("first", "second", "expected", "read"), [
    ((0.50, 0.02, 0.03, 0.45), (0.60, 0.01, 0.01, 0.38), [0, 0], 2),  # two have ended, but one that goes on is ahead
    ((0.40, 0.02, 0.03, 0.55), (0.05, 0.01, 0.01, 0.93), [0], 1),
])
def test_a_search_ends_when_nothing_in_progress_is_ahead(first, second, expected, read):
    model = Scripted({(): first, (0,): second, (0, 0): (0.001, 0.001, 0.001, 0.997)})
    assert generate(model, None, CLS, SEP, max_new=9, beams=2) == [expected]
    assert {len(text) for text in model.texts} == {read}


def test_a_decoder_from_an_encoder(tmp_path, capsys):
    encoder = randomised(bertfast.BertModel(bertfast.BertConfig(**SIZES)))
    encoder.save_pretrained(tmp_path)
    model = BertForSeq2Seq.from_pretrained(tmp_path, new_heads=True)
    assert "cross-attention, language-model head" in capsys.readouterr().out and not model.training
    own, given = model.state_dict(), encoder.state_dict()
    for name, tensor in given.items():
        assert torch.equal(own[f"encoder.{name}"], tensor)
        if not name.startswith("pooler"):
            assert torch.equal(own[f"decoder.bert.{name}"], tensor)
    assert own["decoder.bert.encoder.layer.0.crossattention.self.query.weight"].std() > 0.01


@pytest.mark.parametrize("names", [("weight", "bias"), ("gamma", "beta")])  # as BERT's first checkpoints call them
def test_a_decoder_takes_the_head_that_there_is(names, tmp_path, capsys):
    given = randomised(bertfast.BertForMaskedLM(bertfast.BertConfig(**SIZES)))
    given.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if names[0] == "gamma":
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
        for new, old in zip(("LayerNorm.weight", "LayerNorm.bias"), names):
            tensors = {n.replace(new, f"LayerNorm.{old}"): t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = BertForSeq2Seq.from_pretrained(tmp_path, new_heads=True)
    assert "(cross-attention)" in capsys.readouterr().out
    head = given.cls["predictions"].state_dict()
    own = model.decoder.cls["predictions"].state_dict()
    assert len(own) == 5 and all(torch.equal(t, head[n]) for n, t in own.items())


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-2}],
                         ids=str)
def test_halves_that_compute_otherwise_are_refused(change, tmp_path):
    halves = [transformers.BertConfig(**{**SIZES, **extra}) for extra in (
        {}, {"is_decoder": True, "add_cross_attention": True, **change})]
    transformers.EncoderDecoderModel(encoder=transformers.BertModel(halves[0]),
                                     decoder=transformers.BertLMHeadModel(halves[1])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"encoder and decoder differ in {next(iter(change))}"):
        BertForSeq2Seq.from_pretrained(tmp_path)


def test_dropout_of_the_decoder_is_its_own(pair, monkeypatch):
    """Streams of its own for each site of each layer, and other bits in them than the encoder draws."""
    model = pair[1]
    streams = [module.stream for module in model.decoder.modules() if hasattr(module, "stream")]
    assert len(set(streams)) == len(streams) == 5 * SIZES["num_hidden_layers"]
    seeds, rows = [], seq2seq.Rows
    monkeypatch.setattr(seq2seq, "Rows", lambda *given: seeds.extend(map(int, given[3:])) or rows(*given))
    model.train()(packed(arguments()[0]), **arguments()[2], seed=torch.tensor([5]))
    assert seeds and 5 not in seeds


def test_cross_attention_is_told_whose_rows_are_how_many(pair, monkeypatch):
    """Kernels for GPUs cut their tiles by it, queries first."""
    asked, attend = [], seq2seq.ops.attention
    monkeypatch.setattr(seq2seq.ops, "attention", lambda *args, **named: (asked.append(args[5:7]),
                                                                          attend(*args, **named))[1])
    pair[1](packed(arguments()[0]), **arguments()[2])
    assert asked == 2 * [(max(TARGETS) + 1, max(SOURCES))]


def test_both_halves_drop_without_a_seed(pair):
    """In training under torch's generator, as BertModel does: the decoder too."""
    model = pair[1]
    model.config.hidden_dropout_prob = 0.5
    for module in model.decoder.modules():
        if hasattr(module, "p"):
            module.p = 0.5  # in the decoder alone
    sources, _, given = arguments()
    losses = [model(packed(sources), **given).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    assert model.eval()(packed(sources), **given).loss == model(packed(sources), **given).loss
