"""`trl preview [METHOD] …`: rows as a training command with the same options would see them.

The trainer is the real one, on a model without weights: all that happens to rows happens, and nothing else is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl.cli.commands import Method, load, methods
from trl.cli.train import Run, datasets_of, read_run
from trl.errors import ConfigError, suggest

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer

USUAL_METHOD = "sft"


@dataclass
class PreviewArguments:
    """Options of the preview itself."""

    rows: int = 3
    """How many rows to show."""


PREVIEW = f"{__name__}:PreviewArguments"


def run(words: Sequence[str]) -> int:
    known = methods()
    named = bool(words) and not words[0].startswith("-")
    if named and words[0] not in known:
        raise ConfigError(f"Unknown method {words[0]!r}.{suggest(words[0], known)} Methods: {', '.join(known)}.")
    method = known[words[0] if named else USUAL_METHOD]
    given = method.parser(PREVIEW).parse(words[1:] if named else words)
    if given.help:
        return _print_help(method, everything=given.help == "all")
    rows = given.arguments_for(PreviewArguments).rows
    run = read_run(method, given)
    trainer_without_weights(run).preview(rows)
    return 0


def _print_help(method: Method, *, everything: bool) -> int:
    from trl.cli.help import print_options

    summary = f"Show rows as `trl {method.name}` sees them: what is trained on, and what is not."
    options = method.options(PREVIEW)
    examples = [f"trl preview {method.name} {method.example} --rows 5"]
    print_options(f"trl preview {method.name}", summary, options, everything=everything, examples=examples)
    return 0


def trainer_without_weights(run: Run) -> BaseTrainer:
    """The trainer of a run, its training rows encoded, on a model whose weights take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    trainer_class = load(run.method.trainer)
    trust = run.training.trust_remote_code
    config = AutoConfig.from_pretrained(
        run.model.model_name_or_path, revision=run.model.model_revision, trust_remote_code=trust
    )
    config.num_labels = 1  # of reward models
    usual = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = (trainer_class.auto_class or usual).from_config(config, trust_remote_code=trust)
    run.training.model_init_kwargs = None
    train_dataset, _ = datasets_of(run)
    return _without_weights(trainer_class)(model=model, args=run.training, train_dataset=train_dataset)


def _without_weights(trainer_class: type[BaseTrainer]) -> type[BaseTrainer]:
    class WithoutWeights(trainer_class):
        """Leaves the model as it is: there is nothing to prepare or to move."""

        def prepare_model(self) -> None:
            pass

        def _move_model_to_device(self, model: Any, device: Any) -> Any:
            return model

    return WithoutWeights
