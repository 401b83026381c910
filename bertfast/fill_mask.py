"""Fill [MASK]: the first thing to try on a pretrained model. A causal one knows only what stands before it."""

from pathlib import Path

import torch

from .checkpoint import find, load, read_tensors
from .config import BertConfig
from .data.tokenizer import Tokenizer
from .files import UserError
from .model import BertForMaskedLM, BertForPreTraining, BertLMHeadModel


class FillMask:
    """A pretrained model and its tokenizer, from a checkpoint folder."""

    def __init__(self, folder: str | Path):
        folder = find(folder)
        self.tokenizer = Tokenizer.load(folder)
        config = BertConfig.from_file(folder / "config.json")
        architectures = config.extra.get("architectures") or [""]
        classes = {cls.__name__: cls for cls in (BertForPreTraining, BertLMHeadModel)}
        self.model = classes.get(architectures[0], BertForMaskedLM)(config).eval()
        own, tensors = self.model.state_dict(), read_tensors(folder)
        for name in [n for n in tensors if n not in own and n.startswith(("bert.pooler.", "cls.seq_relationship."))]:
            del tensors[name]  # BERT's first checkpoints have them, and say that they are for masked words alone
        load(self.model, tensors, str(folder))
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(f"{folder}: a vocabulary of {self.tokenizer.vocab_size}, but the model has "
                            f"{self.model.config.vocab_size} words")
        self.causal = isinstance(self.model, BertLMHeadModel)

    def __call__(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """For each [MASK] in the text, the `top` likeliest (token, probability). Raises UserError without a [MASK]."""
        ids = self.tokenizer.encode(text)
        positions = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_id]
        if not positions:
            raise UserError(f"there is no [MASK] in {text!r}")
        return self._candidates(ids, positions, top)

    def at(self, ids: list[int], position: int, top: int) -> list[tuple[str, float]]:
        """Candidates for one token of a sentence of ids (without [CLS] and [SEP]), which is hidden from the model."""
        hidden = [*ids[:position], self.tokenizer.mask_id, *ids[position + 1 :]]
        return self._candidates([self.tokenizer.cls_id, *hidden, self.tokenizer.sep_id], [position + 1], top)[0]

    @torch.no_grad()
    def _candidates(self, ids: list[int], positions: list[int], top: int) -> list[list[tuple[str, float]]]:
        longest = self.model.config.max_position_embeddings
        if len(ids) > longest:
            raise UserError(f"the text has {len(ids)} tokens, the model reads {longest}")
        rows = [p - 1 for p in positions] if self.causal else positions
        logits = self.model(torch.tensor([ids])).logits[0, rows, : self.tokenizer.vocab_size]  # a table may have more
        probabilities = logits.float().softmax(-1)
        values, indices = probabilities.topk(min(top, probabilities.shape[1]))
        return [
            [(self.tokenizer.tokens[i], p) for i, p in zip(row.tolist(), ps.tolist())]
            for row, ps in zip(indices, values)
        ]
