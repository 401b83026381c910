"""The tasks there are, and the settings that each of them can have."""

from bertfast.files import UserError
from bertfast.finetune.answer import Answering
from bertfast.finetune.classify import Classification, MultipleChoice, Regression
from bertfast.finetune.read import refuse_names
from bertfast.finetune.tag import Tagging
from bertfast.finetune.task import Settings, Task
from bertfast.finetune.write import Writing
from bertfast.optim import check_numbers

TASKS: dict[str, type[Task]] = {
    "classification": Classification, "regression": Regression, "tagging": Tagging, "qa": Answering,
    "multiple-choice": MultipleChoice, "seq2seq": Writing,
}
READERS = {  # the tasks that read a setting, where not all do
    "text_pair": ("classification", "regression", "multiple-choice", "qa"),
    "multi_label": ("classification",), "symmetric": ("regression",), "characters": ("tagging",),
    "choices": ("multiple-choice",), "stride": ("tagging", "qa"), "max_answer_length": ("qa",), "style": ("seq2seq",),
    "max_target_length": ("seq2seq",), "beams": ("seq2seq",), "length_penalty": ("seq2seq",),
}


def check(settings: Settings) -> None:
    """Raises UserError for settings no fine-tuning can have."""
    if settings.task not in TASKS:
        raise UserError(f"task {settings.task!r} is unknown; known: {', '.join(TASKS)}")
    usual = Settings(settings.task, settings.model, settings.train)
    for name, tasks in READERS.items():
        if settings.task not in tasks and getattr(settings, name) != getattr(usual, name):
            raise UserError(f"--{name.replace('_', '-')} is for {' and '.join(tasks)}")
    refuse_names(settings.train, settings.columns)
    if settings.characters and settings.label:
        raise UserError("--label has no effect beside --characters, which makes its own labels: remove it")
    if settings.style not in ("encoder-decoder", "prefix-lm"):
        raise UserError(f"--style {settings.style}: say encoder-decoder or prefix-lm")
    if settings.features and (settings.freeze != "none" or settings.layer_decay != 1):
        raise UserError("--features trains no part of the encoder: remove --freeze and --layer-decay")
    if settings.static and not settings.features:
        raise UserError("--static needs --features")
    if not settings.label_separator:
        raise UserError("--label-separator is empty")
    if settings.label_separator != usual.label_separator and not settings.multi_label:
        raise UserError("--label-separator needs --multi-label")
    if not (0 < settings.epochs <= 1e12 and (settings.steps is None or 0 < settings.steps <= 10**12)):
        raise UserError("--epochs and --steps must be more than 0, and 10^12 at most")
    if not abs(settings.length_penalty) <= 10:
        raise UserError("--length-penalty must be between -10 and 10")
    if settings.max_length is not None and settings.max_length < 8:
        raise UserError(f"--max-length {settings.max_length} is too short: 8 tokens at least")
    check_numbers(lr=settings.lr, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
                  dropout=settings.dropout, seed=settings.seed)
    if not 0 <= settings.warmup <= 1 or not 0 < settings.layer_decay <= 1:
        raise UserError("--warmup is a share of the steps, between 0 and 1, --layer-decay a factor of at most 1")
