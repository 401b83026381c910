"""What runs inside a patched model (bertfast.patch): stand-ins for the embeddings, encoders and layers of transformers.

An encoder unpads once, hands packed rows (T, H) from layer to layer, and pads back (unpadding: Portes et al. 2023,
Warner et al. 2024); its last layer computes only the rows that a head reads. A layer takes the parameters of its
submodules as they are; a projection that was replaced is called if it is known to act row by row (LoRA), and a layer
with any other or with a hook inside runs as the original. Whoever watches a layer's calls (hooks, hidden_states) sees
padded tensors.
"""

import functools
import importlib
import inspect
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .files import UserError
from .ops._define import forward_mode
from .ops.dropout import draw_seed
from .ops.few_rows_linear import takes
from .ops.linear import joined_linear, linear
from .patched_rows import Reads, Rows, arrange, last_rows, padding_mask, row_keys, tracing

try:
    from transformers.activations import GELUActivation
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        create_bidirectional_mask,
        eager_mask,
        flash_attention_mask,
        flex_attention_mask,
        sdpa_mask,
    )
    from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
    from transformers.models.distilbert import modeling_distilbert
except ImportError as error:
    raise UserError(f"bertfast.patch needs transformers (pip install 'bertfast[hf]'): {error}") from error


_OURS = ("bertfast.patching",)
_TRANSPARENT = (*_OURS, "transformers.utils.output_capturing")  # hooks that need no padded tensors
_CARRIED = (*_TRANSPARENT, "torch.distributed.fsdp._fully_shard._fsdp_state")  # hooks that read no argument by its name


def watched(module: nn.Module, transparent: tuple[str, ...] = _CARRIED) -> bool:
    """Whether forward hooks of others may read or change what goes into this module and comes out."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) not in transparent for hook in hooks)


def replaced(module: Any) -> bool:
    """Whether the module's `forward` is another than its class came with; put back, as accelerate does, it is not."""
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", own) is not type(module).forward:
        return True
    return replaced_in_class(type(module))


def replaced_in_class(cls: type) -> bool:
    """Whether the class of transformers, or the one behind a stand-in, has another `forward` than it came with, or
    another method that its forward calls."""
    for original in cls.__mro__:
        for name, came_with in FORWARDS.get(original, ()):
            if getattr(original, name) is not came_with:
                return True
    return False


def hooked(module: nn.Module, transparent: tuple[str, ...] = _TRANSPARENT) -> bool:
    """Whether somebody watches or replaces this module's calls."""
    if module._backward_hooks or module._backward_pre_hooks or replaced(module):
        return True
    return watched(module, transparent)


def runs(module: nn.Module, cls: Any) -> bool:
    """Whether the module's `forward` is that of `cls`, maybe within wrappers that call it, as accelerate's do."""
    if replaced_in_class(cls):
        return False
    if "forward" not in module.__dict__:
        return type(module).forward is cls.forward
    forward = inspect.unwrap(module.forward)
    return getattr(forward, "__func__", forward) is inspect.unwrap(cls.forward)


def _p(dropout: nn.Module, training: bool) -> float:
    return float(dropout.p) if training else 0.0  # type: ignore[arg-type]


@dataclass
class Parts:
    """A layer's leaves, under one name in every family."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    head_dim: int
    scaling: float
    p_attention: float
    out: nn.Module
    out_norm: nn.LayerNorm
    p_out: float
    up: nn.Module
    activation: Any
    down: nn.Module
    down_norm: nn.LayerNorm
    p_down: float


def _bert_parts(layer: Any) -> tuple[Parts, tuple[nn.Module, ...]]:
    """The parts of a BERT, RoBERTa or ELECTRA layer, and the modules between it and them."""
    attention, up, down = layer.attention, layer.intermediate, layer.output
    own, out = attention.self, attention.output
    parts = Parts(
        own.query, own.key, own.value, own.attention_head_size, own.scaling, _p(own.dropout, own.training),
        out.dense, out.LayerNorm, _p(out.dropout, out.dropout.training), up.dense, up.intermediate_act_fn,
        down.dense, down.LayerNorm, _p(down.dropout, down.dropout.training),
    )
    return parts, (attention, own, out, up, down, own.dropout, out.dropout, down.dropout)


def _distilbert_parts(layer: Any) -> tuple[Parts, tuple[nn.Module, ...]]:
    own, ffn = layer.attention, layer.ffn
    parts = Parts(
        own.q_lin, own.k_lin, own.v_lin, own.attention_head_size, own.scaling, _p(own.dropout, own.training),
        own.out_lin, layer.sa_layer_norm, 0.0, ffn.lin1, ffn.activation, ffn.lin2, layer.output_layer_norm,
        _p(ffn.dropout, ffn.dropout.training),
    )
    return parts, (own, ffn, own.dropout, ffn.dropout)


def parts_of(layer: Any) -> Parts | str:
    """The layer's parts, or why it must run as the original."""
    if not isinstance(layer, _Layer):
        return f"a {type(layer).__name__}"
    if replaced(layer) or "feed_forward_chunk" in layer.__dict__:
        return "its forward was replaced"
    try:
        parts, between = layer.find_parts(layer)
    except AttributeError:  # something else stands there, without the leaves
        return "a part was replaced by one without its leaves"
    norms = (parts.out_norm, parts.down_norm)
    projections = (parts.query, parts.key, parts.value, parts.out, parts.up, parts.down)
    others = [m for m in between if type(m).__module__ != layer.home and type(m) is not nn.Dropout]
    others += [m for m in norms if not plain_norm(m)]
    others += [m for m in projections if not projects_rows(m)]
    if not elementwise(parts.activation):
        others.append(parts.activation)
    if others:
        return f"a {type(others[0]).__name__} inside, which the fused ops do not know"
    if any(map(hooked, (*between, *projections, *norms))) or (
        isinstance(parts.activation, nn.Module) and hooked(parts.activation)
    ):
        return "a hook or a replaced forward inside"
    if any(m.__dict__.get("is_causal") for m in between):
        return "causal attention"
    return parts


def projects_rows(module: Any) -> bool:
    """Whether the projection is known to act row by row, so that packed rows, or some of them, may stand for all."""
    if isinstance(module, nn.Linear):
        return True
    home = type(module).__module__
    if ".lily." in home or hasattr(module, "lora_velora_embed"):  # Lily's router, VeLoRA's projection: means of rows
        return False
    if home.startswith("peft.tuners."):
        return projects_rows(getattr(module, "base_layer", None))
    return home.startswith("torch.ao.nn.quantized.") and home.endswith(".linear")


_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.logsigmoid,
    F.softplus, F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, torch.relu, torch.tanh, torch.sigmoid,
)


def elementwise(activation: Any) -> bool:
    """Whether it is an activation of transformers or PyTorch, which see one number at a time."""
    if type(activation).__module__ == "transformers.activations":
        return True
    return (type(activation) if isinstance(activation, nn.Module) else activation) in _ELEMENTWISE


def past_cache(kwargs: dict) -> Any:
    """The cache of keys and values of a call, under its name before and since transformers 5.24."""
    return kwargs.get("past_key_values", kwargs.get("cache"))


def plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.bias is not None


def plain_norm(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None


def _linear(module: nn.Module, x: Tensor, gelu_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A projection without its bias, and the bias for the next op to add; a replaced module adds its own.

    With `gelu_bias`, of GELU(x + gelu_bias).
    """
    if not plain(module):
        return module(x if gelu_bias is None else ops.bias_gelu(x, gelu_bias)), None
    y, bias = linear(x, module, gelu_bias)
    return y, bias.to(y.dtype)


class _Layer:
    """Stands before a Hugging Face layer class; on packed rows it computes the same with the fused ops."""

    find_parts: Any  # the family's function
    home: str  # the module of the originals

    def forward(self: Any, hidden_states, *args, rows: Rows | None = None, parts: Parts | None = None,
                index: Tensor | None = None, final: Rows | None = None, stream: int = 0, **kwargs):
        if rows is None or parts is None or final is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        padded = hidden_states.dim() == 3  # a hook looks at this layer's input and output
        x = rows.pack(hidden_states) if padded else hidden_states
        context = _attend(parts, x, rows, index, final, stream)
        if index is not None:
            x = x.index_select(0, index)
        x = _add_norm(context, parts.out, parts.out_norm, x, parts.p_out, rows.seed, final.row_key, stream + 1)
        up, bias = _linear(parts.up, x)
        if type(parts.activation) is not GELUActivation or bias is None:
            up, bias = parts.activation(up if bias is None else up + bias), None
        x = _add_norm(up, parts.down, parts.down_norm, x, parts.p_down, rows.seed, final.row_key, stream + 2, bias)
        return rows.restore(x) if padded else x


def _attend(parts: Parts, x: Tensor, rows: Rows, index: Tensor | None, final: Rows, stream: int) -> Tensor:
    """Self-attention of packed rows: (T, H) -> (T, H), or (R, H) for the rows at `index`, which are `final`."""
    projections = (parts.query, parts.key, parts.value)
    dropout = {"p": parts.p_attention, "seed": rows.seed, "stream": stream}
    joinable = index is None and rows.keys is None and all(map(plain, projections))
    # one gradient GEMM of x instead of three is worth a copy of the weights; few rows in inference need none
    trained = joinable and torch.is_grad_enabled() and parts.query.weight.requires_grad
    worth = trained and not torch.is_autocast_enabled(x.device.type)
    if joinable and (worth or takes(x, parts.query)):  # type: ignore[arg-type]
        qkv = joined_linear(x, *projections).unflatten(1, (3, -1, parts.head_dim))  # type: ignore[arg-type]
        out = ops.attention_packed(qkv, rows.cu_seqlens, rows.longest, scale=parts.scaling, row_key=rows.row_key,
                                   **dropout)
        return out.flatten(1)
    attended = x if rows.keys is None else x.index_select(0, rows.keys)
    asking = x if index is None else x.index_select(0, index)
    inputs = (asking, attended, attended)
    q, k, v = (m(t).unflatten(1, (-1, parts.head_dim)) for m, t in zip(projections, inputs, strict=True))
    cu_seqlens_k = rows.cu_seqlens if rows.cu_seqlens_k is None else rows.cu_seqlens_k
    out = ops.attention(q, k, v, final.cu_seqlens, cu_seqlens_k, rows.longest, rows.longest, scale=parts.scaling,
                        q_row_key=final.row_key, **dropout)
    return out.flatten(1)


def _add_norm(x, dense: nn.Module, norm: nn.LayerNorm, residual, p, seed, row_key, stream, gelu_bias=None) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual), the residual's dtype throughout, as under autocast.

    With `gelu_bias`, x stands for GELU(x + gelu_bias).
    """
    y, bias = _linear(dense, x, gelu_bias)
    dtype = residual.dtype
    return ops.add_layer_norm(
        y.to(dtype), None if bias is None else bias.to(dtype), residual, norm.weight.to(dtype), norm.bias.to(dtype),
        norm.eps, p, seed, row_key, stream,
    )


_ATTENTION = {None, sdpa_attention_forward, flash_attention_forward, flex_attention_forward}  # None: eager
_CHANGES_SCORES = ("position_bias", "softcap", "s_aux", "sliding_window")  # arguments of attention functions
_MASKS = {eager_mask, sdpa_mask, flash_attention_mask, flex_attention_mask}


def _other_attention(config: Any, n_sequences: int, kwargs: dict) -> str | None:
    """What attention this call asks for other than every row's to all of its sequence, if it does."""
    function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if getattr(function, "func", function) not in _ATTENTION:  # a flash kernel of the hub is a partial
        return f"the attention function {config._attn_implementation!r}"
    if function is None and any(home.eager_attention_forward is not came_with for home, came_with in EAGER):
        return "a replaced eager_attention_forward"
    if ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation or "eager") not in _MASKS:
        return f"the masks of the attention {config._attn_implementation!r}"
    packed, positions = kwargs.get("cu_seq_lens_q") is not None, kwargs.get("position_ids")
    if not packed and function is not None and n_sequences == 1 and positions is not None:
        # flash attention takes each restart of the positions for another sequence
        packed = "flash" in config._attn_implementation and bool((positions.diff() != 1).any())
    return "several sequences in one row" if packed else None


class Encoder:
    """Stands before a Hugging Face encoder class: packs, runs the layers, pads back."""

    reads_padding = False  # set on the instance where a head reads padding rows, unless `Reads` says which
    said: set[str]  # the instance's, which DataParallel's replicas, new in each step, share with it
    output_type: Any = BaseModelOutputWithPastAndCrossAttentions

    def forward(self: Any, hidden_states, attention_mask=None, *args, bertfast_mask: Tensor | None = None,
                bertfast_reads: Reads | None = None, **kwargs):
        if kwargs.pop("head_mask", None) is not None:
            raise ValueError("a patched model takes no head_mask; bertfast.unpatch(model) runs the original")
        config, layers = config_of(self), [parts_of(layer) for layer in self.layer]
        attention = config._attn_implementation or "eager"
        mask, reason = bertfast_mask, None
        if bertfast_mask is None:
            mask, reason = padding_mask(attention_mask, hidden_states.shape[:2], attention)
        if kwargs.get("output_attentions", config.output_attentions):
            reason = "output_attentions"
        elif past_cache(kwargs) is not None:
            reason = "a cache of keys and values"
        elif kwargs.get("is_causal"):
            reason = "is_causal"
        elif others := [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]:
            reason = others[0]
        elif hidden_states.is_meta:
            reason = "a meta tensor"
        elif _has_any_global_hook():
            reason = "a hook on every module (a FLOP counter sets one)"
        elif _transformed():
            reason = "a transform of torch.func or forward-mode AD"
        elif replaced_in_class(type(self)):
            reason = "a forward replaced on the class"
        elif all(isinstance(parts, str) for parts in layers):
            reason = "hooks or replaced parts in every layer"
        elif reason is None:
            reason = _other_attention(config, hidden_states.shape[0], kwargs)
            floating = isinstance(attention_mask, Tensor) and attention_mask.is_floating_point()
            adds = floating or attention == "eager"
            if mask is not None and adds and not tracing() and not bool((mask != 0).any(1).all()):
                reason = "a sequence of padding alone, of which such attention makes a mean"
        if reason is not None:
            _say_once(self, f"bertfast: {reason}: such a call runs the original encoder")
            if bertfast_mask is not None:
                attention_mask = _original_mask(config, hidden_states, bertfast_mask)
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]

        autocast = torch.is_autocast_enabled(hidden_states.device.type)
        if (
            autocast and hidden_states.device.type == "cpu" and not tracing() and fp32_multiplies_faster()
            and all(p.dtype == torch.float32 for p in self.parameters())
        ):  # autocast permits a dtype for its speed; here fp32 is the faster one
            with torch.autocast("cpu", enabled=False):
                return self._run(hidden_states.float(), mask, bertfast_reads, layers, config, args, kwargs)
        return self._run(hidden_states, mask, bertfast_reads, layers, config, args, kwargs)

    def _run(self: Any, hidden_states: Tensor, mask: Tensor | None, reads: Reads | None, layers: list[Parts | str],
             config: Any, args: tuple, kwargs: dict):
        """`args` and `kwargs` go to the layers that run as the original."""
        shape, device = hidden_states.shape[:2], hidden_states.device
        longest = config.max_position_embeddings if tracing() else shape[1]
        read = self.reads_padding if reads is None else reads.padding
        foreign = any(isinstance(parts, str) for parts in layers)  # which may read any row
        every_row = tracing() or read or foreign
        reads = reads or Reads()
        labels = None if reads.labels is None else reads.labels.to(device).reshape(shape)
        rows = arrange(shape, longest, mask, device, labels, every_row)
        ours = [parts for parts in layers if isinstance(parts, Parts)]
        if any(p > 0.0 for parts in ours for p in (parts.p_attention, parts.p_out, parts.p_down)):
            rows.seed, rows.row_key = draw_seed(device), row_keys(shape, rows.indices, device)
        collecting = kwargs.get("output_hidden_states", config.output_hidden_states) not in (None, False)
        transparent = _OURS if collecting else _TRANSPARENT

        x, is_padded, final = hidden_states, True, rows
        for i, (layer, parts) in enumerate(zip(self.layer, layers, strict=True)):
            pad = isinstance(parts, str) or hooked(layer, transparent)  # whoever looks at a layer sees padded tensors
            if pad != is_padded:
                x, is_padded = (rows.restore(x) if pad else rows.pack(x)), pad
            given: tuple = ()
            if isinstance(parts, str) or hooked(layer):  # hooks may read what the original is given
                given = (_original_mask(config, hidden_states, mask), *args)
            if isinstance(parts, str):
                x = layer(x, *given, **kwargs)
                continue
            index = None
            if i == len(layers) - 1 and not pad and not collecting:
                index, final = last_rows(rows, reads, labels)
            x = layer(x, *given, rows=rows, parts=parts, stream=3 * i + 1, index=index, final=final)
        if is_padded:
            x = rows.pack(x)
        out = final.restore(x)
        if reads.head is not None and labels is not None:
            labels = labels.flatten() if final.indices is None else labels.flatten()[final.indices]
            reads.loss = _project(reads.head, x, labels)
            out = out[:, : reads.n_first]
        return self.output_type(last_hidden_state=out)


@functools.cache
def fp32_multiplies_faster() -> bool:
    """Whether this CPU's fp32 GEMM beats its bf16 one; some run a bf16 dot product at half the rate of two FMAs."""
    if torch.cpu._is_amx_tile_supported():
        return False
    dtypes = (torch.float32, torch.bfloat16)
    operands = {dtype: (torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)) for dtype in dtypes}
    seconds = dict.fromkeys(dtypes, math.inf)
    with torch.autocast("cpu", enabled=False):  # in which the caller is: it would multiply fp32 in bf16
        for _ in range(15):
            for dtype in dtypes:
                began = time.perf_counter()
                torch.mm(*operands[dtype])
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] < seconds[torch.bfloat16]


def _project(head: Any, x: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of the labelled rows of x (R, H), through a BertLMPredictionHead."""
    transform = head.transform
    if plain(transform.dense) and type(transform.transform_act_fn) is GELUActivation and not tracing():
        norm, (dense, bias) = transform.LayerNorm, linear(x, transform.dense)
        x = ops.gelu_layer_norm(
            dense, bias.to(dense.dtype), norm.weight.to(dense.dtype), norm.bias.to(dense.dtype), norm.eps
        )
    else:
        x = transform(x)
    weight, bias = head.decoder.weight.to(x.dtype), head.decoder.bias.to(x.dtype)
    return ops.masked_vocab_projection(x, weight, bias, labels)[0]


def config_of(encoder: Any) -> Any:
    """DistilBERT's encoder keeps its configuration in the layers, below which something else may stand."""
    return next(module.config for module in encoder.modules() if hasattr(module, "config"))


def _original_mask(config, hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
    return create_bidirectional_mask(config, hidden_states, mask)  # type: ignore[return-value]


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work, which autograd.Functions do not take."""
    return not tracing() and (forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None)


def _say_once(encoder: Any, message: str) -> None:
    """Once for each encoder; what is said while tracing, nobody may see."""
    if tracing() or message in encoder.said:
        return
    encoder.said.add(message)
    # without a registry, or Python shows one message from one line once, whatever the model
    warnings.warn_explicit(message, UserWarning, "bertfast", 0)


class _Embeddings:
    """Stands before a Hugging Face embeddings class: word + position + token type, LayerNorm and dropout in one op."""

    def forward(self: Any, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, *args, **kwargs):
        # args, kwargs: the length of a decoder's cache, whose name differs between versions of transformers
        cached = any(args) or any(kwargs.values())
        if input_ids is None or inputs_embeds is not None or cached or _transformed() or not self.fusable():
            return super().forward(  # type: ignore[misc]
                input_ids, token_type_ids, position_ids, inputs_embeds, *args, **kwargs
            )
        if position_ids is None and hasattr(self, "create_position_ids_from_input_ids"):  # RoBERTa counts from padding
            position_ids = self.create_position_ids_from_input_ids(input_ids, self.padding_idx)
        elif position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = (input_ids, position_ids, token_type_ids)
        ids, positions, types = (t.expand(input_ids.shape).reshape(-1) for t in given)
        p = _p(self.dropout, self.dropout.training)
        seed = row_key = None
        if p > 0.0:
            seed, row_key = draw_seed(input_ids.device), row_keys(input_ids.shape, None, input_ids.device)
        tables = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        word, position, token_type = (t.weight for t in tables)
        norm, padding_idx = self.LayerNorm, self.word_embeddings.padding_idx
        x = ops.embedding_sum(ids, positions, types, word, position, token_type, norm.weight, norm.bias, norm.eps,
                              padding_idx, p, seed, row_key)
        return x.view(*input_ids.shape, -1)

    def fusable(self: Any) -> bool:
        """Whether nothing here was replaced, hooked or set to what the op does not compute."""
        tables = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        if any(type(t) is not nn.Embedding for t in tables) or replaced_in_class(type(self)):
            return False
        trained = torch.is_grad_enabled()
        # checkpointing has a hook that makes the output require a gradient, as ours does where the table does
        transparent = (*_TRANSPARENT, "transformers.modeling_utils") if tables[0].weight.requires_grad else _TRANSPARENT
        return (
            all(t.max_norm is None and not t.sparse and not t.scale_grad_by_freq and not hooked(t, transparent)
                for t in tables)
            and not (trained and any(t.padding_idx is not None for t in tables[1:]))  # the op knows the word table's
            and type(self.dropout) is nn.Dropout and plain_norm(self.LayerNorm)
            and not hooked(self.dropout) and not hooked(self.LayerNorm)
        )


# The classes themselves: the originals' names, importable from here, so that deepcopy and torch.save work.

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "electra": "Electra"}
STAND_INS: dict[type, type] = {}  # class of transformers -> ours
FORWARDS: dict[type, list[tuple[str, Any]]] = {}  # transformers' classes as they come: a later method is somebody's own
EAGER: list[tuple[Any, Any]] = []  # transformers' modules and the function that each came with


def _remember(home: Any) -> None:
    EAGER.append((home, home.eager_attention_forward))
    names = "forward", "feed_forward_chunk", "ff_chunk", "_create_attention_masks"
    FORWARDS.update({cls: [(name, getattr(cls, name)) for name in names if hasattr(cls, name)]
                     for cls in vars(home).values()
                     if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == home.__name__})


def _stand_in(source: Any, name: str, ours: type, **attributes) -> None:
    original = getattr(source, name)
    STAND_INS[original] = globals()[name] = type(name, (ours, original), {"__module__": __name__, **attributes})


for _family, _prefix in FAMILIES.items():
    _home = importlib.import_module(f"transformers.models.{_family}.modeling_{_family}")
    _remember(_home)
    _stand_in(_home, f"{_prefix}Embeddings", _Embeddings)
    _stand_in(_home, f"{_prefix}Encoder", Encoder)
    _stand_in(_home, f"{_prefix}Layer", _Layer, find_parts=staticmethod(_bert_parts), home=_home.__name__)
_remember(modeling_distilbert)  # its embeddings have no token types: they stay
_stand_in(modeling_distilbert, "Transformer", Encoder, output_type=BaseModelOutput)
_stand_in(modeling_distilbert, "TransformerBlock", _Layer, find_parts=staticmethod(_distilbert_parts),
          home=modeling_distilbert.__name__)
ORIGINALS = {ours: original for original, ours in STAND_INS.items()}
ENCODERS = {cls for both in STAND_INS.items() if issubclass(both[1], Encoder) for cls in both}


def unknown(module: nn.Module) -> bool:
    """Whether it is a model of transformers without any encoder that we know."""
    return isinstance(module, PreTrainedModel) and not any(type(m) in ENCODERS for m in module.modules())
