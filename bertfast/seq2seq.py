"""Text to text with BERT: (a) encoder and decoder, both from the pretrained weights; (b) one transformer, prefix-LM.

(a) BertForSeq2Seq: the decoder is the encoder's copy with a causal mask and new cross-attention (Rothe et al. 2020),
    saved as transformers' EncoderDecoderModel.
(b) BertForPrefixLM: [CLS] source [SEP] target [SEP]; the source sees itself, the target the source and what came before
    (UniLM, Dong et al. 2019), saved as BertForMaskedLM with "prefix_lm": true.
Both predict the next token and run on the same attention op; `generate` decodes either, greedily or with beams, and
keeps keys and values of what was computed.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .batch import PackedBatch
from .checkpoint import Checkpointed, find, load, read_tensors, under_our_names
from .config import BertConfig
from .files import UserError, read_json, write_json
from .heads import HeadOutput
from .model import BertForMaskedLM, BertLayer, BertModel, initialise
from .nn import AddLayerNorm, Embeddings, MLMHead, Rows
from .ops.linear import joined_linear

DECODER_KEY = 0x5851F42D4C957F2D  # the decoder's dropout takes another key than the encoder's


class CrossAttention(nn.Module):
    """Queries from the target (T, H), keys and values from the source (Ts, H) -> (T, H)."""

    def __init__(self, hidden_size: int, n_heads: int, p: float, stream: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.n_heads, self.head_dim, self.p, self.stream = n_heads, hidden_size // n_heads, p, stream

    def keys_values(self, source: Tensor) -> tuple[Tensor, ...]:
        return joined_linear(source, self.key, self.value).view(-1, 2, self.n_heads, self.head_dim).unbind(1)

    def forward(self, x: Tensor, rows: Rows, keys_values: tuple[Tensor, ...], source: Rows) -> Tensor:
        q = self.query(x).view(-1, self.n_heads, self.head_dim)
        dropout = rows.dropout(self.p, self.stream)
        dropout["q_row_key"] = dropout.pop("row_key")
        k, v = keys_values
        return ops.attention(q, k, v, rows.cu_seqlens, source.cu_seqlens, rows.max_seqlen, source.max_seqlen,
                             **dropout).flatten(1)


class DecoderLayer(BertLayer):
    """A BertLayer with cross-attention between attention and feed-forward."""

    def __init__(self, config: BertConfig, index: int):
        super().__init__(config, index)
        stream = 3 * config.num_hidden_layers + 1 + 2 * index
        self.crossattention = nn.ModuleDict({
            "self": CrossAttention(config.hidden_size, config.num_attention_heads,
                                   config.attention_probs_dropout_prob, stream),
            "output": AddLayerNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps,
                                   config.hidden_dropout_prob, stream + 1),
        })

    def after_attention(self, context: Tensor, x: Tensor, rows: Rows, keys_values=None, source=None) -> Tensor:
        """The rest of the layer, from self-attention's output."""
        x = self.attention["output"](context, x, rows)
        x = self.crossattention["output"](self.crossattention["self"](x, rows, keys_values, source), x, rows)
        return self.feed_forward(x, rows)


class Decoder(nn.Module):
    """transformers' BertLMHeadModel: bert.embeddings, bert.encoder.layer, cls.predictions."""

    def __init__(self, config: BertConfig):
        super().__init__()
        embeddings = Embeddings(
            config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
            config.pad_token_id, config.layer_norm_eps, config.hidden_dropout_prob,
        )
        layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})
        head = MLMHead(config.vocab_size, config.hidden_size, config.layer_norm_eps, config.hidden_act)
        self.cls = nn.ModuleDict({"predictions": head})
        self.apply(lambda module: initialise(module, config.initializer_range))


@dataclass
class State:
    """What decoding keeps for n hypotheses: keys and values of each layer, and for (a) those of the sources."""

    length: Tensor  # (n,) int64: how many keys are in use
    longest: int
    keys: list[Tensor] = field(default_factory=list)  # each (n, room, N, D)
    values: list[Tensor] = field(default_factory=list)
    memory: list[tuple[Tensor, ...]] = field(default_factory=list)  # cross-attention's keys and values, by layer
    source: Rows | None = None

    def reorder(self, index: Tensor) -> None:
        """Go on with the hypotheses at `index` (m,), m a multiple of n or n; beams of one source stay together."""
        self.length = self.length[index]
        for tensors in (self.keys, self.values):
            for i, t in enumerate(tensors):  # one after another: never all of them twice
                tensors[i] = t[index]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new query, key and value (n, N, D) each -> (n, H)."""
        n = torch.arange(len(q), device=q.device)
        self.keys[layer][n, self.length], self.values[layer][n, self.length] = k, v
        room = self.longest + 1
        visible = torch.arange(room, device=q.device) <= self.length.unsqueeze(1)
        keys, values = (t[layer][:, :room].transpose(1, 2) for t in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, visible[:, None, None])
        return out.flatten(1)


class _Generator(Checkpointed):
    """What `generate` asks of a model: `begin` and `advance`, both giving the next token's logits (n, V)."""

    token_type = 0

    def parts(self) -> tuple[Any, Any, Any]:
        """(embeddings, layers, head) of the transformer that writes."""
        raise NotImplementedError

    def advance(self, state: State, tokens: Tensor) -> Tensor:
        """Take in a token for each hypothesis, (n,) ids."""
        embeddings, layers, head = self.parts()
        n = len(tokens)
        per_source = n // (state.source.cu_seqlens.numel() - 1) if state.source else 1
        bounds = torch.arange(0, n + 1, per_source, dtype=torch.int32, device=tokens.device)
        rows = Rows(bounds, per_source, torch.arange(n, device=tokens.device))
        x = embeddings(tokens, torch.full_like(tokens, self.token_type), state.length, rows)
        for i, layer in enumerate(layers):
            attention = layer.attention["self"]
            q, k, v = joined_linear(x, attention.query, attention.key, attention.value).view(
                n, 3, attention.n_heads, attention.head_dim).unbind(1)
            context = state.attend(i, q, k, v)
            cross = (state.memory[i], state.source) if state.source else ()
            x = layer.after_attention(context, x, rows, *cross)
        state.length = state.length + 1
        state.longest += 1
        return head.logits(x, embeddings.word_embeddings.weight)


class BertForSeq2Seq(_Generator):
    """(a) Encoder and decoder; `from_pretrained` reads an EncoderDecoderModel, or makes both out of one encoder."""

    base_prefix = ""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.encoder = BertModel(config)
        for p in self.encoder.pooler.parameters() if self.encoder.pooler else ():
            p.requires_grad = False  # transformers' layout has a pooler, which nothing reads
        self.decoder = Decoder(config)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, new_heads: bool = False, **config_changes):
        """As Checkpointed's. From an encoder (new_heads=True) cross-attention starts new, as in transformers."""
        folder = find(name)
        config, pair = read_config(folder / "config.json")
        model = cls(replace(config, **config_changes))
        tensors = read_tensors(folder)
        if not pair and new_heads:
            load(model.encoder, tensors, str(name), new_heads=True)
            tensors = {**{f"encoder.{n}": t for n, t in model.encoder.state_dict().items()},
                       **model._decoder_from(tensors)}
        load(model, tensors, str(name))
        return model.eval()

    def _decoder_from(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The decoder's tensors: the encoder's where they have the same name, the MLM head's if there is one."""
        own = {f"decoder.{n}": t for n, t in self.decoder.state_dict().items()}
        encoder = {f"decoder.bert.{n}": t for n, t in self.encoder.state_dict().items()}
        unprefixed = {n.removeprefix("decoder."): t for n, t in own.items()}
        head = {f"decoder.{n}": t for n, t in under_our_names(tensors, unprefixed, "").items()
                if n.startswith("cls.predictions.")}
        found = {name: {**encoder, **head}.get(name, t) for name, t in own.items()}
        new = [n for n in own if n not in encoder and n not in head]
        print(f"decoder: the encoder's weights; initialised anew: {len(new)} tensors (cross-attention"
              + ("" if head else ", language-model head") + ")")
        return found

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """In the layout of transformers' EncoderDecoderModel."""
        super().save_pretrained(folder, state)
        half = read_json(Path(folder) / "config.json")
        special = {name: self.config.extra.get(name) for name in ("decoder_start_token_id", "eos_token_id")}
        write_json(Path(folder) / "config.json", {
            "architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder", "is_encoder_decoder": True,
            "pad_token_id": self.config.pad_token_id, **special,
            "encoder": {**half, "architectures": ["BertModel"]},
            "decoder": {**half, "architectures": ["BertLMHeadModel"], "is_decoder": True, "add_cross_attention": True},
        })

    def parts(self):
        bert: Any = self.decoder.bert
        return bert["embeddings"], bert["encoder"]["layer"], self.decoder.cls["predictions"]

    def forward(self, batch: PackedBatch, targets: PackedBatch, labels: Tensor, *, seed: Tensor | None = None,
                scale: Tensor | None = None) -> HeadOutput:
        """targets: [CLS] target, packed; labels (T,): each row's next token. The loss is over all of them."""
        seed = self.encoder.dropout_seed(seed, batch.input_ids.device)
        memory = self.encoder.encode(batch, seed, read=False)
        key = None if seed is None else seed ^ DECODER_KEY
        source = Rows(batch.cu_seqlens, batch.max_seqlen, batch.row_key)
        rows = Rows(targets.cu_seqlens, targets.max_seqlen, targets.row_key, key)
        embeddings, layers, head = self.parts()
        x = embeddings(targets.input_ids, targets.token_type_ids, targets.position_ids, rows)
        for layer in layers:
            context = layer.attention["self"](x, rows, mask_mode="causal")
            keys_values = layer.crossattention["self"].keys_values(memory)
            x = layer.after_attention(context, x, rows, keys_values, source)
        table, sink = embeddings.tied()
        return HeadOutput(head(x, table, labels, scale, sink)[0])

    def begin(self, batch: PackedBatch, start: int, room: int) -> tuple[State, Tensor]:
        """Encode the sources; the logits after [CLS], (B, V). room: tokens to write at most."""
        memory = self.encoder.encode(batch, read=False)
        n, device = batch.cu_seqlens.numel() - 1, memory.device
        state = State(torch.zeros(n, dtype=torch.int64, device=device), 0)
        for layer in self.parts()[1]:
            state.memory.append(layer.crossattention["self"].keys_values(memory))
            shape = (n, room + 1, layer.attention["self"].n_heads, layer.attention["self"].head_dim)
            state.keys.append(memory.new_zeros(shape))
            state.values.append(memory.new_zeros(shape))
        state.source = Rows(batch.cu_seqlens, batch.max_seqlen, batch.row_key)
        return state, self.advance(state, torch.full((n,), start, device=device))


def read_config(path: Path) -> tuple[BertConfig, bool]:
    """A config.json, and whether it describes an encoder-decoder. Raises UserError for what BertForSeq2Seq is not."""
    values = read_json(path)
    pair = isinstance(values, dict) and values.get("model_type") == "encoder-decoder"
    return _of_both(values, path) if pair else BertConfig.from_dict(values, path), pair


def _of_both(values: dict, path: Path) -> BertConfig:
    """The one configuration of a pair's halves. Raises UserError where they differ in what is computed."""
    try:
        encoder, decoder = dict(values["encoder"]), dict(values["decoder"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: it describes no encoder and decoder") from error
    own = {"add_cross_attention": False, "is_decoder": False}  # the decoder's alone
    halves = [asdict(BertConfig.from_dict({**half, **own}, path)) for half in (encoder, decoder)]
    different = [name for name in halves[0]
                 if name not in ("extra", "initializer_range") and halves[0][name] != halves[1][name]]
    if different:
        raise UserError(f"{path}: encoder and decoder differ in {', '.join(different)}, which is not supported")
    return BertConfig.from_dict(encoder, path)


class BertForPrefixLM(BertForMaskedLM, _Generator):
    """(b) One transformer that reads the source in both directions and writes the target after it."""

    token_type = 1

    def parts(self):
        layers: Any = self.bert.encoder
        return self.bert.embeddings, layers["layer"], self.cls["predictions"]

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """As BertForMaskedLM, with "prefix_lm": true."""
        self.config.extra["prefix_lm"] = True
        super().save_pretrained(folder, state)
        values = read_json(Path(folder) / "config.json")
        write_json(Path(folder) / "config.json", {**values, "architectures": ["BertForMaskedLM"]})

    def forward(self, batch: PackedBatch, prefix_lens: Tensor, *, seed: Tensor | None = None,  # type: ignore[override]
                scale: Tensor | None = None) -> HeadOutput:
        """batch reads the rows that write (the source's [SEP], the target), its labels are their next tokens.

        prefix_lens: (B,) int32, the tokens of each source.
        """
        x = self.bert.encode(batch, seed, mask_mode="prefix", prefix_lens=prefix_lens)
        embeddings, _, head = self.parts()
        table, sink = embeddings.tied()
        return HeadOutput(head(x[batch.mask_index], table, batch.labels, scale, sink)[0])

    def begin(self, batch: PackedBatch, start: int, room: int) -> tuple[State, Tensor]:
        """Read the prefixes; the logits after each one's [SEP], (B, V)."""
        states: list[Tensor] = []
        x = self.bert.encode(batch, read=False, hidden_states=states, mask_mode="full")
        length = batch.cu_seqlens.diff().long()
        n, longest = len(length), int(length.max())
        state = State(length, longest)
        sequence, position = batch.row_key >> 32, batch.position_ids
        for layer, hidden in zip(self.parts()[1], states):
            attention = layer.attention["self"]
            k, v = joined_linear(hidden, attention.key, attention.value).view(
                -1, 2, attention.n_heads, attention.head_dim).unbind(1)
            for tensors, rows in ((state.keys, k), (state.values, v)):
                room_for = rows.new_zeros(n, longest + room + 1, *rows.shape[1:])
                tensors.append(room_for.index_put((sequence, position), rows))
        last = batch.cu_seqlens[1:].long() - 1
        embeddings, _, head = self.parts()
        return state, head.logits(x[last], embeddings.word_embeddings.weight)


@torch.no_grad()
def generate(model, batch: PackedBatch, start: int, end: int, max_new: int = 128, beams: int = 1,
             length_penalty: float = 1.0) -> list[list[int]]:
    """What the model writes for each source of a packed batch: ids without the final `end`.

    Beam search of width `beams`, greedy at 1: hypotheses end with the token `end` and are ranked by log-probability
    over length ** length_penalty (as in transformers; Wu et al. 2016 have (5 + length) / 6 in the length's place); a
    source is done when `beams` have ended and none in progress is ahead of the worst of them. start: what the decoder
    of (a) begins with. The model must be in eval mode.
    """
    state, logits = model.begin(batch, start, max_new)
    n, vocabulary, device = logits.shape[0], logits.shape[1], logits.device
    state.reorder(torch.arange(n, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    scores = torch.full((n, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams are still the same
    written = torch.zeros(n, beams, 0, dtype=torch.int64, device=device)
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(n)]
    done = [False] * n
    for step in range(1, max_new + 1):
        total = scores.unsqueeze(2) + logits.float().log_softmax(-1).view(n, beams, vocabulary)
        best, index = total.view(n, -1).topk(2 * beams)
        beam, token = index // vocabulary, index % vocabulary
        chosen = torch.zeros(n, beams, dtype=torch.int64, device=device)
        for b, (values, tokens) in enumerate(zip(best.tolist(), token.tolist())):
            if done[b]:
                continue
            goes_on = [c for c in range(2 * beams) if tokens[c] != end][:beams]
            for c in range(beams):
                if tokens[c] == end and values[c] > -torch.inf:
                    ended[b].append((values[c] / step**length_penalty, written[b, beam[b, c]].tolist()))
            ended[b] = sorted(ended[b], key=lambda pair: -pair[0])[:beams]
            chosen[b] = torch.tensor(goes_on, device=device)
            done[b] = len(ended[b]) == beams and values[goes_on[0]] / step**length_penalty <= ended[b][-1][0]
        scores, beam, token = (t.gather(1, chosen) for t in (best, beam, token))
        written = torch.cat([written.gather(1, beam.unsqueeze(2).expand(-1, -1, step - 1)), token.unsqueeze(2)], 2)
        if all(done) or step == max_new:
            break
        state.reorder((torch.arange(n, device=device).unsqueeze(1) * beams + beam).flatten())
        logits = model.advance(state, token.flatten())
    unfinished = [[(float(scores[b, 0]) / step**length_penalty, written[b, 0].tolist())] for b in range(n)]
    return [max(ended[b] or unfinished[b], key=lambda pair: pair[0])[1] for b in range(n)]
