"""Where a new model starts: with what a count of words would know, and with heads that look at the neighbours.

The ordinary start (all weights N(0, 0.02), output bias 0) spends most of a short run on things that are known before
it begins. All of it is ordinary values of ordinary parameters: nothing in the model, the loss or the checkpoint
changes. What each is worth is measured in benchmarks/README.md.
"""

import math
from typing import Any

import numpy as np
import torch

from .data.dataset import Dataset
from .data.tokenizer import Tokenizer
from .model import BertForMaskedLM, BertForPreTraining, BertLMHeadModel

SAMPLE = 10_000_000  # tokens in which words are counted
OFFSETS = (-1, 1, -2, 2)  # of the word that each of the first layer's first heads looks at
CAUSAL_OFFSETS = (-1, -2, -3, -4)
SHARPNESS = 1.7  # gain of their query and key weights: the word at the offset gets some 12 in the softmax, far ones 0
GOLDEN = (math.sqrt(5) - 1) / 2
LIKENESS = 0.04  # std of the middle layers' query weights, which are their key weights too
SAME_WORD = 8.0  # what the comparing head gives the same word in the softmax, where others get about 0
TOLD = 2.0  # and how loudly it says what it found
PREFER_A = 5.0  # how far the last layer's head tells segment A from B: query bias
SEGMENT = 62  # tokens of each segment of the text that the comparison is centred on
WORD_SCALE, SEGMENT_SCALE = 4.0, 3.0  # of the word and position tables, and the token types, over initializer_range


@torch.no_grad()
def start_from_counts(model: BertForPreTraining | BertForMaskedLM | BertLMHeadModel, data: Dataset) -> None:
    """Set a new model's output bias, position table and some of its heads; in place.

    - Output bias = log frequency of each word in the first SAMPLE tokens of `data`'s split. From a zero bias the tied
      table itself must learn the frequencies, which drives all its rows in one direction and hides the words from the
      encoder.
    - Positions are sinusoids of the word table's size (Vaswani et al. 2017 but for the fastest); tables exceed other
      weights, so that attention sees words, places and segments from the first step.
    - The first heads of the first layer look at the words at -1, +1, -2 and +2 (a causal model's at -1 to -4), as the
      positional heads of ConViT (d'Ascoli et al. 2021) start as a convolution.
    - In the layers between the first and the last, query weights equal key weights, so that a token looks at those that
      are like it (mimetic initialization, Trockman and Kolter 2023).
    - Where next sentences are learned, one head of the second and one of the last of three or more layers compare the
      segments, so that [CLS] starts with the share of A's words that B has too.
    """
    words = data.first_tokens(SAMPLE)
    counts = np.bincount(words, minlength=model.config.vocab_size) + 0.5
    model.cls["predictions"].get_parameter("bias").copy_(torch.from_numpy(np.log(counts / counts.sum())))
    embeddings = model.bert.embeddings
    embeddings.word_embeddings.weight.mul_(WORD_SCALE)
    embeddings.token_type_embeddings.weight.mul_(SEGMENT_SCALE)
    layers: Any = model.bert.encoder["layer"]
    attention = [layer.attention for layer in layers]
    frequency = _frequencies(model.config.hidden_size // 2, attention[0].self.head_dim // 2)
    _fill_with_sinusoids(embeddings.position_embeddings.weight, frequency, WORD_SCALE * model.config.initializer_range)
    offsets = CAUSAL_OFFSETS if model.config.is_decoder else OFFSETS
    _look_at_neighbours(attention[0].self, frequency, offsets)
    for middle in attention[1:-1]:
        middle.self.query.weight.normal_(std=LIKENESS)
        middle.self.key.weight.copy_(middle.self.query.weight)
    room = len(words) >= 2 * SEGMENT and model.config.max_position_embeddings >= 2 * SEGMENT + 3
    if isinstance(model, BertForPreTraining) and len(attention) > 2 and model.config.type_vocab_size > 1 and room:
        _compare_segments(model, *_pairs(words, data.tokenizer))


def with_ordinary_tables(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A trained model's weights with its three tables divided by WORD_SCALE: another set for the same outputs.

    Adam moves every weight by about the learning rate, so that large tables would learn slowly in fine-tuning. The
    tables' sum is normalised; what meets the word table again, as the decoder, is multiplied by as much.
    """
    tables = (f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    factors = dict.fromkeys(tables, 1 / WORD_SCALE)
    factors |= {f"cls.predictions.transform.LayerNorm.{kind}": WORD_SCALE for kind in ("weight", "bias")}
    return {name: tensor * factors[name] if name in factors else tensor for name, tensor in weights.items()}


def _frequencies(pairs: int, even: int) -> torch.Tensor:
    """(pairs,) radians a position: the first `even` cover 0 to pi evenly, the others are Vaswani's.

    The cosines of the even ones add up to a peak at 0 and to about nothing elsewhere, so a head that looks at an offset
    sees neither the place beside it nor, where its own word is turned by the offset, itself. Golden-ratio steps within
    the even intervals keep the peak from coming back some places further on.
    """
    k = torch.arange(even, dtype=torch.float64)
    near = math.pi * (k + k * k * GOLDEN % 1) / even
    far = torch.exp(torch.arange(pairs - even) * (-math.log(10_000.0) / max(1, pairs - even)))
    return torch.cat([near, far]).float()


def _fill_with_sinusoids(table: torch.Tensor, frequency: torch.Tensor, rms: float) -> None:
    """A position table (n, H): sine and cosine of each frequency by turns."""
    angle = torch.arange(table.shape[0]).unsqueeze(1) * frequency
    table[:, 0 : 2 * len(frequency) : 2] = angle.sin() * (math.sqrt(2) * rms)
    table[:, 1 : 2 * len(frequency) : 2] = angle.cos() * (math.sqrt(2) * rms)


def _look_at_neighbours(attention, frequency: torch.Tensor, offsets: tuple[int, ...]) -> None:
    """q(i) . k(j) = sum of cos(frequency * (i + offset - j)) over a head's dimensions: keys' sinusoids are rotated."""
    D = attention.head_dim
    sine = 2 * torch.arange(D // 2)
    cosine = sine + 1
    for offset, query, key in zip(offsets, attention.query.weight.split(D), attention.key.weight.split(D)):
        turn = offset * frequency[: D // 2]
        query[sine, sine] += SHARPNESS
        query[cosine, cosine] += SHARPNESS
        key[sine, sine] += SHARPNESS * turn.cos()
        key[sine, cosine] -= SHARPNESS * turn.sin()
        key[cosine, sine] += SHARPNESS * turn.sin()
        key[cosine, cosine] += SHARPNESS * turn.cos()


def _compare_segments(model: BertForPreTraining, ids: torch.Tensor, types: torch.Tensor) -> None:
    """The first heads of the second and the last layer: find A's words in B, and average over A how many were found.

    In the second layer queries and keys see words alone, so attention falls on a token and its copies, and what it
    passes on is which segment those stand in, in a direction of its own. Less the token's own segment, that is 0 for a
    word without copies in the other one. In the last layer every row looks at A and takes the average from there, in
    another direction; what it amounts to on real text is taken off in the bias, so that it starts around 0.
    """
    layers: Any = model.bert.encoder["layer"]
    second, last = layers[1].attention, layers[-1].attention
    tables = model.bert.embeddings
    word, position, segment = (
        t.weight for t in (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings))
    D, H = second.self.head_dim, word.shape[1]
    places = torch.linalg.svd(position[:128], full_matrices=False).Vh[: 3 * H // 8]  # what positions fill
    others = torch.linalg.qr(torch.cat([places, segment]).T).Q  # (H, ·)
    words_only = torch.eye(H) - others @ others.T
    share = word.var() / (word.var() + position.var() + segment.var()) * (1 - others.shape[1] / H)
    second.self.query.weight[:D] = torch.randn(D, H) * (SAME_WORD / (share * H * D**0.5)).sqrt() @ words_only
    second.self.key.weight[:D] = second.self.query.weight[:D]
    a_not_b = (segment[0] - segment[1]).unsqueeze(0)
    own, found, told = torch.linalg.qr(torch.cat([a_not_b, torch.randn(2, H)]).T).Q.T  # three directions
    own *= (a_not_b @ own).sign()
    second.self.value.weight[0] = own
    second.output.dense.weight[:, 0] = found
    last.self.query.bias[0] = PREFER_A
    last.self.key.weight[0] += own
    last.self.value.weight[1] = found - own
    last.output.dense.weight[:, 1] = TOLD * told

    model.eval()
    x = model.bert(ids, token_type_ids=types, output_hidden_states=True).hidden_states[-2]
    last.output.dense.bias -= TOLD * (x[:, : SEGMENT + 2] @ (found - own)).mean() * told


def _pairs(words: np.ndarray, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to 32 pairs of segments of a text, half of them true continuations: (input_ids, token_type_ids)."""
    n = min(32, len(words) // (2 * SEGMENT))
    text = torch.from_numpy(words[: n * 2 * SEGMENT].astype("int64")).view(n, 2, SEGMENT)
    a, b = text.unbind(1)
    b = torch.cat([b[: n // 2], b[n // 2 :].roll(1, 0)])
    cls, sep = (torch.full((n, 1), token) for token in (tokenizer.cls_id, tokenizer.sep_id))
    ids = torch.cat([cls, a, sep, b, sep], 1)
    return ids, (torch.arange(ids.shape[1]) > SEGMENT + 1).long().expand_as(ids)
