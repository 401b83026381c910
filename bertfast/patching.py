"""bertfast.patch: a live Hugging Face BERT runs on the fused ops, in place, and stays what it was.

The model and every PreTrainedModel in it keep their class, parameters, state_dict and signature. Three kinds of inner
module get their `__class__` swapped for a stand-in from bertfast.patched. Forward hooks tell the encoder what only the
outside knows: the padding mask before the model makes a (B, 1, S, S) tensor of it, which rows a head reads, and the
labels of a masked language model. Where hooks do not run (a wrapper that calls `.forward`), the same numbers come out
a little slower.
"""

import inspect
import sys
import warnings
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import UserError
from .ops import why_slow
from .patched import (
    ENCODERS,
    FAMILIES,
    ORIGINALS,
    STAND_INS,
    Encoder,
    config_of,
    elementwise,
    hooked,
    parts_of,
    past_cache,
    plain,
    plain_norm,
    projects_rows,
    runs,
    unknown,
    watched,
)
from .patched_rows import Reads

READS = {  # what each of transformers' heads reads of the encoder's output
    "ForSequenceClassification": "first column",
    "ForMultipleChoice": "first column",
    "ForNextSentencePrediction": "first column",
    "ForTokenClassification": "labels",  # what is attended, and what has a label
    "ForMaskedLM": "labels",
    "ForPreTraining": "labels",
    "ForQuestionAnswering": "padding",  # its softmax is over all columns
    "ForCausalLM": "padding",  # of no decoder; a label is its left neighbour's
}
READ_NO_PADDING = {  # of what sentence-transformers runs after an encoder
    "Pooling", "SpladePooling", "WeightedLayerPooling", "WordWeights", "Dense", "SparseAutoEncoder", "Dropout",
    "LayerNorm", "Normalize",
}

LIBRARIES = {"accelerate", "peft", "sentence_transformers", "torch", "transformers"}  # whose modules read none else


@dataclass
class Report:
    """What bertfast.patch replaced, and what it left alone and why; str() tells it in a few lines."""

    replaced: list[str] = field(default_factory=list)  # names of modules
    left: dict[str, str] = field(default_factory=dict)  # name of module -> reason

    def __str__(self) -> str:
        return "\n".join([f"{len(self.replaced)} modules run on bertfast", *self.exceptions()])

    def exceptions(self) -> list[str]:
        """What was left alone, a line a reason."""
        names: dict[str, list[str]] = {}
        for name, why in self.left.items():
            names.setdefault(why, []).append(name)
        return [f"{', '.join(those)} left alone: {why}" for why, those in names.items()]


def patch(model: nn.Module) -> Report:
    """Run every BERT, RoBERTa, XLM-RoBERTa, ELECTRA and DistilBERT encoder in `model` on the fused ops, in place.

    Nothing else changes: the classes of models, the parameters (the same objects), state_dict, signatures, outputs;
    rows at padding are zeros, unless what is in `model` may read them: a head, a replaced part, a module of somebody's
    own around the encoder, what follows in a Sequential.
    BertForMaskedLM and BertForPreTraining, in training with labels, compute the loss without the logits, in fp32 in a
    bf16 model too, and return None for them; skip_logits=False, return_dict=False or a hook forces them, and
    skip_logits=True skips them in eval too. A batch with no masked word has loss 0 for them then. Attentions, masks
    that are not padding masks, and layers with hooks inside, or with parts not known to act row by row, run as the
    original. Decoders and models of other families are left alone. Patching twice does nothing more. Returns a Report,
    and warns of everything that it says is left alone, and where the ops have no kernels. Raises UserError where there
    is nothing to patch.
    """
    report = Report()
    for name, module in model.named_modules():
        if type(module) not in ENCODERS:
            continue
        own_name = name or ORIGINALS.get(type(module), type(module)).__name__  # `model` is the encoder itself
        if not module.layer:
            report.left[own_name] = "an encoder without layers"
            continue
        config = config_of(module)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            report.left[own_name] = "a decoder or with cross-attention; bertfast runs encoders"
            continue
        _become(module, STAND_INS.get(type(module), type(module)))
        module.__dict__.setdefault("said", set())
        fused, layers = [], module.get_submodule("layer")
        for inner_name, inner in layers.named_children():
            _become(inner, STAND_INS.get(type(inner), type(inner)))
            full_name, parts = f"{name}.layer.{inner_name}".lstrip("."), parts_of(inner)
            if isinstance(parts, str):
                report.left[full_name] = parts
            else:
                fused.append(full_name)
        report.replaced += [own_name, *fused] if fused else []
    for name, module in model.named_modules():
        if _is_base(module):
            embeddings: Any = module.embeddings
            _become(embeddings, STAND_INS.get(type(embeddings), type(embeddings)))
            if type(embeddings) in ORIGINALS:
                full_name = f"{name}.embeddings".lstrip(".")
                with torch.no_grad():  # RoBERTa's positions are trained as the original, whatever else is there
                    if embeddings.fusable():
                        report.replaced.append(full_name)
                    else:
                        report.left[full_name] = "a hook or a part that the fused op does not know inside"
            _hook(module, _before_base)
            _encoder(module).reads_padding |= not runs(module, _home(module))
        elif _kind(module) and _is_base(module.base_model):
            if _kind(module) != "padding":
                _hook(module, _before_head, _after_head if projects(module) else None)
            _encoder(module.base_model).reads_padding = True  # unless the hook says else: `forward` may be another
        elif type(module).__name__ == "DPRSpanPredictor" and _is_base(module.encoder.base_model):
            _encoder(module.encoder.base_model).reads_padding = True  # as in question answering
        elif _may_read_padding(module):
            for encoder in (inner for inner in module.modules() if isinstance(inner, Encoder)):
                encoder.reads_padding = True
    if not report.replaced and not report.left:
        known = ", ".join([*FAMILIES, "distilbert"])
        raise UserError(f"{type(model).__name__} holds no encoder that bertfast knows ({known})")
    named: set[nn.Module] = set()  # with all that is in them
    for name, module in model.named_modules():
        if module not in named and unknown(module):
            report.left[name] = f"a {type(module).__name__} holds no encoder that bertfast knows"
            named.update(module.modules())
    for line in report.exceptions():
        warnings.warn(f"bertfast.patch: {line}", stacklevel=2)
    for device in sorted({p.device.type for p in model.parameters()}):
        if why := why_slow(device):
            warnings.warn(f"bertfast.patch: on {device} the ops run as slow references: {why}", stacklevel=2)
    return report


def _may_read_padding(module: nn.Module) -> bool:
    """Whether it gives the output of an encoder in it to code that we do not know."""
    if isinstance(module, nn.Sequential):
        return not all(map(_reads_no_padding, [*module][1:]))
    return _holds_encoder(module) and not {_library(type(module)), _library(module.forward)} <= LIBRARIES


def _holds_encoder(module: nn.Module) -> bool:
    """Whether there is an encoder or a base model right in it, or in nothing but containers and wrappers."""
    return any(
        isinstance(child, Encoder) or _is_base(child)
        or (_library(type(child)) in ("peft", "torch") and _holds_encoder(child))
        for child in module.children()
    )


def _library(code: Any) -> str:
    return code.__module__.partition(".")[0]


def _reads_no_padding(follower: nn.Module) -> bool:
    return type(follower).__name__ in READ_NO_PADDING and "sentence_transformers" in type(follower).__module__


def _become(module: Any, cls: Any) -> None:
    """Change the module's class, and the bound `forward` that accelerate keeps in the module or has put back there."""
    before = type(module)
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is before.forward:
            module.__dict__[name] = MethodType(cls.forward, module)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo bertfast.patch, in place; returns `model`, which runs transformers' own code again.

    Raises UserError, and changes nothing, where a patched module's class was changed since, as FSDP2 does.
    """
    for name, module in model.named_modules():
        if isinstance(module, tuple(ORIGINALS)) and type(module) not in ORIGINALS:
            raise UserError(f"{name} has become a {type(module).__name__} since it was patched: unpatch it before that")
    for module in model.modules():
        if type(module) in ORIGINALS:
            _become(module, ORIGINALS[type(module)])
            for own in ("reads_padding", "said"):
                module.__dict__.pop(own, None)
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if hook in (_before_base, _before_head, _after_head)]:
                del hooks[key]
                flags.pop(key, None)
    return model


_HOMES = {original.__module__ for original in STAND_INS}


_POSITIONS = {  # of the label arguments, where they are given by position
    (cls, name): position - 1
    for cls in {cls for home in _HOMES for cls in vars(sys.modules[home]).values() if isinstance(cls, type)}
    if cls.__module__ in _HOMES and "For" in cls.__name__ and issubclass(cls, nn.Module)
    for position, name in enumerate(inspect.signature(cls.forward).parameters)
    if name in ("labels", "next_sentence_label")
}


def _encoder(base: Any) -> Any:
    return getattr(base, "transformer", getattr(base, "encoder", None))


def _home(module: nn.Module) -> Any:
    """The class of transformers that the module is of, maybe as a subclass (FSDP2 makes one), or None."""
    return next((c for c in type(module).__mro__ if c.__module__ in _HOMES), None)


def _as_written(base: Any) -> bool:
    """Whether base model and encoder run the `forward`s that the hooks know, on the masks of transformers."""
    home, masks = _home(base), getattr(base, "_create_attention_masks", None)
    if home is None or getattr(masks, "__func__", masks) is not getattr(home, "_create_attention_masks", None):
        return False
    return runs(base, home) and runs(_encoder(base), Encoder)


def _is_base(module: nn.Module) -> bool:
    """One of transformers' own base models (or a subclass), with a patched encoder."""
    return any(c.__module__ in _HOMES and c.__name__.endswith("Model") and "PreTrained" not in c.__name__
               for c in type(module).__mro__) and type(_encoder(module)) in ORIGINALS


def _kind(module: nn.Module) -> str | None:
    """What the module, if it is one of transformers' models with a head, reads; see READS."""
    cls = _home(module)
    if cls is None:
        return None
    if cls.__name__ == "ElectraForMultipleChoice":  # its summary may read any column
        return "padding"
    if cls.__name__ == "BertLMHeadModel":
        return READS["ForCausalLM"]
    return READS.get("For" + cls.__name__.partition("For")[2])


def projects(module: nn.Module) -> bool:
    """Whether the module has BERT's masked-language-model head, whose loss we compute without logits."""
    return getattr(_home(module), "__name__", None) in ("BertForMaskedLM", "BertForPreTraining")


def _hook(module: nn.Module, before, after=None) -> None:
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        if after is not None:
            # before FSDP2's, which must see the loss
            module.register_forward_hook(after, prepend=True, with_kwargs=True)


def _argument(module: nn.Module, args: tuple, kwargs: dict, name: str) -> Any:
    position = _POSITIONS[_home(module), name]
    return args[position] if len(args) > position else kwargs.get(name)


def _without(args: tuple, kwargs: dict, position: int, name: str) -> tuple[tuple, dict]:
    if len(args) > position:
        return (*args[:position], None, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: None}


def _before_base(model: nn.Module, args: tuple, kwargs: dict):
    """Hand the padding mask to the encoder as it is."""
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or not _as_written(model) or getattr(model.config, "is_decoder", False):
        return None
    if mask.dim() == 3:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; use (batch, sequence) or (batch, 1, queries, keys)"
        )
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or mask.shape != tokens.shape[:2] or past_cache(kwargs) is not None:
        return None
    if watched(model) or watched(_encoder(model)):  # whoever looks on finds the mask where it was
        return None
    args, kwargs = _without(args, kwargs, 1, "attention_mask")
    return args, {**kwargs, "bertfast_mask": mask}


def _before_head(model: Any, args: tuple, kwargs: dict):
    """Tell the encoder which rows this head reads; take the labels out where the encoder computes their loss."""
    config, base = model.config, model.base_model
    if not runs(model, _home(model)) or not _as_written(base):
        return None
    skip = kwargs.pop("skip_logits", None) if projects(model) else False
    whole = (
        any(kwargs.get(f"output_{k}", getattr(config, f"output_{k}")) for k in ("hidden_states", "attentions"))
        or hooked(base) or hooked(_encoder(base))
    )
    if _kind(model) == "first column":
        first = _takes_first(model)
        return args, {**kwargs, "bertfast_reads": Reads(padding=not first, first_only=first and not whole)}
    labels = _argument(model, args, kwargs, "labels")
    heads = [child for child in model.children() if child is not base]
    pooled = _home(model).__name__ == "BertForPreTraining"
    reads = Reads(labels, padding=not all(map(_acts_on_rows, heads)) or (pooled and not _takes_first(model)))
    if skip is None:
        named = kwargs.get("return_dict")  # else a tuple, which is taken apart by position
        skip = model.training and (config.return_dict if named is None else named)
    if (
        labels is not None and skip and not whole and not reads.padding and not watched(model) and _fusable_head(model)
        and (pooled or getattr(base, "pooler", None) is None)  # it reads column 0, which is left out
        # the original wants both labels, or no loss
        and (not pooled or _argument(model, args, kwargs, "next_sentence_label") is not None)
    ):
        reads.head, reads.n_first = model.cls.predictions, int(pooled)
        args, kwargs = _without(args, kwargs, _POSITIONS[_home(model), "labels"], "labels")
    return args, {**kwargs, "bertfast_reads": reads}


def _takes_first(model: Any) -> bool:
    """Whether the module that gets the encoder's output, pooler or classifier, is transformers' own."""
    if hasattr(model.base_model, "transformer"):  # DistilBERT's heads take column 0 themselves
        return True
    taker = getattr(model.base_model, "pooler", None) or model.classifier
    # peft trains a copy of the classifier, beside the original
    return type(getattr(taker, "original_module", taker)).__module__ in _HOMES and not hooked(taker)


def _acts_on_rows(module: Any) -> bool:
    """Whether this part of a head is known to act row by row, and so reads no padding."""
    module = module._modules.get("original_module", module)  # of which peft trains a copy
    if type(module).__module__ in _HOMES:
        return all(map(_acts_on_rows, module.children()))
    known = type(module) in (nn.LayerNorm, nn.Dropout, nn.CrossEntropyLoss)
    return known or projects_rows(module) or elementwise(module)


def _fusable_head(model: Any) -> bool:
    head: Any = getattr(model.cls, "predictions", None)
    own = (model.cls, head, getattr(head, "transform", None))
    if any(type(m).__module__ not in _HOMES for m in own):
        return False
    inner = (*own, *head.transform.children(), head.decoder)
    return plain(head.decoder) and plain_norm(head.transform.LayerNorm) and not any(map(hooked, inner))


def _after_head(model: Any, args: tuple, kwargs: dict, output):
    """Put the loss where the original has it, in place of the logits."""
    reads = kwargs.get("bertfast_reads")
    if reads is None or reads.head is None:
        return None
    skipped, loss = reads.loss is not None, reads.loss
    if not skipped:  # the encoder ran as the original, so the logits are all there
        loss = F.cross_entropy(output[0].view(-1, model.config.vocab_size), reads.labels.view(-1))
    if reads.n_first:
        pairs = output[1] if isinstance(output, tuple) else output.seq_relationship_logits
        labels = _argument(model, args, kwargs, "next_sentence_label")
        loss = loss + F.cross_entropy(pairs.view(-1, 2), labels.view(-1))
    if isinstance(output, tuple):
        return (loss, *output[skipped:])
    first = next(iter(output))
    return type(output)(**{**output, "loss": loss, first: None if skipped else output[first]})
