"""A training command: from options to a trainer, and through its run."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.cli.commands import MIXTURE, MODEL, SCRIPT, Method, load
from trl.cli.hub import check_model_on_hub, check_push, push_explained
from trl.cli.launch import LaunchArguments
from trl.cli.parser import ParsedOptions
from trl.cli.rewards import RewardArguments, check_reward_weights
from trl.data.mixtures import DatasetMixtureConfig, get_dataset
from trl.data.places import naming_lines
from trl.data.sources import ScriptArguments, check_place, load_dataset_argument
from trl.errors import ConfigError, DataError, TrlError, suggest
from trl.models import names
from trl.models.config import ModelConfig, get_peft_config, get_quantization_config
from trl.printable import printable
from trl.trainers.sampler_options import SamplerOptions

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer
    from trl.trainers.config import TrainerConfig

logger = logging.getLogger(__name__)

RESUME_LAST = ("true", "last")

LIBRARIES = ("transformers", "peft", "datasets", "tokenizers", "huggingface_hub", "bitsandbytes")
"""Their errors are about what they were given: names, files, and options that are handed on to them."""


@dataclass(frozen=True)
class Run:
    """What a command line asks for. `extra` holds the method's own arguments, of the class `method.extra`."""

    method: Method
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    model: ModelConfig
    training: TrainerConfig
    launch: LaunchArguments
    extra: Any = None


def read_run(method: Method, given: ParsedOptions) -> Run:
    """The arguments of a run. What can be refused without importing anything heavy is refused first."""
    os.environ.update(given.environment)
    for name, value in given.outdated.items():
        load("trl.option_names:refuse_outdated")(name, value)
        print(f"{name} has no effect any more: leave it out.", file=sys.stderr)
    script, mixture, model = (given.arguments_for(load(reference)) for reference in (SCRIPT, MIXTURE, MODEL))
    extra = given.arguments_for(load(method.extra)) if method.extra else None
    if isinstance(extra, RewardArguments):
        check_reward_weights(given.values.get("reward_weights"), extra)
    given.arguments_for(SamplerOptions).check_installed()
    _check_data(script, mixture)
    model.model_name_or_path = check_model(model.model_name_or_path)
    _check_adapter_options(given)
    training = _training_arguments(method, given)
    training.model_init_kwargs = {**model.init_kwargs(), **(training.model_init_kwargs or {})}
    return Run(method, script, mixture, model, training, given.arguments_for(LaunchArguments), extra)


def _training_arguments(method: Method, given: ParsedOptions) -> TrainerConfig:
    """The configuration of the trainer. Raises ConfigError for what it, or `transformers`, does not take."""
    try:
        return given.arguments_for(load(method.config))
    except TrlError:
        raise
    except ValueError as error:
        raise ConfigError(f"The options do not go together: {error}") from error


def _check_adapter_options(given: ParsedOptions) -> None:
    """Raises ConfigError for options of an adapter where nothing says whether there is to be one.

    With `--no_use_peft` they stay in a file, and the whole model is trained.
    """
    options = [name for name in given.values if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    if options and "use_peft" not in given.values:
        raise ConfigError(
            f"--{options[0]} has no effect without an adapter: add --use_peft, which trains one; or leave "
            f"{', '.join('--' + name for name in options)} out (or say --no_use_peft), to train what the model has."
        )


def _check_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    if script.dataset_name and mixture.datasets:
        raise ConfigError("dataset_name and datasets are both given: keep one.")
    names = [script.dataset_name] if isinstance(script.dataset_name, str) else script.dataset_name or []
    if empty := [name for name in names if (file := Path(name)).is_file() and not file.stat().st_size]:
        raise DataError(f"dataset_name: {empty[0]!r} is empty: it has no rows.")
    for name in names:
        check_place(name, "dataset_name")
    if not script.dataset_name and not mixture.datasets:
        raise ConfigError(
            "--dataset_name is missing: the hub name, folder or files of a dataset (or `datasets` in YAML)."
        )


def check_model(name: str | None) -> str:
    """The name of a model, with `~` written out.

    Raises ConfigError if it is missing, or is that of a folder which is not there or holds no model.
    """
    if name is None:
        raise ConfigError("--model_name_or_path is missing: the hub name or folder of a model.")
    return names.check_folder(name, f"model_name_or_path={name!r}")


def check_weights(name: str | None) -> None:
    """Raises ConfigError if `name` is that of a model's folder without whole weights. Names on a hub are not looked up."""
    if name is not None:
        names.check_weights(name, f"model_name_or_path={name!r}")


def model_to_load(given: ParsedOptions, name: str | None = None) -> ModelConfig:
    """The model that a command which trains nothing loads: the one of that name, or of the options.

    Raises ConfigError where it is missing, or its folder holds no model, or no whole weights.
    """
    check_weights(name := check_model(name or given.values.get("model_name_or_path")))
    values = {"dtype": "auto", **given.values, "model_name_or_path": name}
    return replace(given, values=values).arguments_for(ModelConfig)


def datasets_of(run: Run) -> tuple[Any, Any]:
    """Training rows, and evaluation rows if `eval_strategy` asks for them. Raises DataError where they are missing."""
    if run.mixture.datasets:
        splits, train, test = get_dataset(run.mixture), "train", "test"
    else:
        splits = load_dataset_argument(run.script)
        train, test = run.script.dataset_train_split, run.script.dataset_test_split
    if run.training.eval_strategy == "no":
        return splits[train], None
    if test not in splits:
        raise DataError(
            f"eval_strategy={run.training.eval_strategy.value!r} needs rows to evaluate on, and the dataset has no split "
            f"{test!r}: name one with --dataset_test_split, or set rows of a mixture aside with --test_split_size."
        )
    return splits[train], splits[test]


def build_trainer(run: Run) -> BaseTrainer:
    """The trainer, with its model loaded and its rows encoded."""
    loading = {
        "peft_config": get_peft_config(run.model),
        "quantization_config": get_quantization_config(run.model),
    }
    rewards = own_keywords(run)
    train_dataset, eval_dataset = datasets_of(run)
    with naming_lines(run.script, run.mixture):
        return load(run.method.trainer)(
            model=run.model.model_name_or_path,
            args=run.training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **loading,
            **rewards,
        )


def own_keywords(run: Run) -> Mapping[str, Any]:
    """What the trainer of a method takes beside what all take: rewards."""
    return run.extra.keywords() if run.extra else {}


def check_hub(run: Run, *, pushes: bool = False) -> None:
    """Ask the hub for what a run needs of it, before anything is loaded. Raises ConfigError for what it does not give."""
    check_model_on_hub(run.model.model_name_or_path, run.model.model_revision)
    if pushes and run.training.push_to_hub:
        check_push(run.training)


def train(run: Run) -> int:
    """Train, save the model to `output_dir`, push it if asked to. A signal ends training with a checkpoint.

    Returns the exit status: 0, or 128 and the number of the signal.
    """
    from trl.callbacks.stop import stop_on_signal
    from trl.training.checkpoint import explain_full_disk
    from trl.training.lock import check_free
    from trl.training.output_folder import check_writable

    report_progress()
    check_writable(run.training.output_dir)
    check_free(run.training.output_dir)
    resume = checkpoint_of(run)
    if resume is None:
        _check_output_folder(run)
    check_hub(run, pushes=True)
    check_trains(run)
    with library_errors_as_config_errors():
        trainer = build_trainer(run)
    if run.training.save_strategy == "no":
        trainer.check_space(has_checkpoints=False)
    with explain_full_disk(run.training.output_dir, "the model"), stop_on_signal(trainer) as stop:
        with _progress(trainer):
            trainer.train(resume_from_checkpoint=resume)
        if stop.signal is None:
            trainer.save_model(run.training.output_dir)
            logger.info(f"The model is in {run.training.output_dir}.")
            _publish(run, trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0 if stop.signal is None else 128 + stop.signal


def check_trains(run: Run) -> None:
    """Raises ConfigError for quantised weights without an adapter, which cannot be trained."""
    from trl.models.saved_adapters import is_adapter

    model = run.model
    bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit" if model.load_in_8bit else None
    if bits is None or model.use_peft or model.adapter_name_or_path is not None:
        return
    if not is_adapter(model.model_name_or_path, **model.hub):
        raise ConfigError(f"--{bits}: quantised weights do not train. Add --use_peft, which trains an adapter on them.")


def _check_output_folder(run: Run) -> None:
    """Raises ConfigError where options alone show that the output folder holds another run, or the model itself.

    The trainer looks again once it knows its rows and parameters.
    """
    from trl.models.saved_adapters import is_adapter
    from trl.training.output_folder import check_folder
    from trl.training.run_settings import describe_options

    if run.training.overwrite_output_dir:
        return
    name = run.model.model_name_or_path
    trainer, model = run.method.trainer.rpartition(":")[2], "" if Path(name).is_dir() and is_adapter(name) else name
    check_folder(run.training.output_dir, describe_options(trainer, model, run.training), overwrite=False)


@contextmanager
def library_errors_as_config_errors() -> Iterator[None]:
    """What other libraries refuse while a trainer is made, as one message.

    Raises ConfigError in place of an error that one of LIBRARIES raised itself; all others may be mistakes of ours.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        library = frame.f_globals["__name__"].partition(".")[0]
        if isinstance(error, TrlError) or library not in LIBRARIES:
            raise
        raise ConfigError(f"{library} refuses: {error}") from error


def _publish(run: Run, trainer: BaseTrainer) -> None:
    """Write the model's card, and push both if asked to."""
    names = run.script.dataset_name if isinstance(run.script.dataset_name, str) else None
    trainer.create_model_card(dataset_name=names)
    if trainer.steps.skipped:
        logger.warning(
            f"{trainer.steps.skipped} of {trainer.state.global_step} steps were skipped, since their loss or gradient was not "
            "finite: they changed nothing."
        )
    if run.training.push_to_hub:
        with push_explained(run.training.output_dir):
            trainer.push_to_hub(dataset_name=names)


def checkpoint_of(run: Run) -> str | bool | None:
    """What the trainer is to resume; None to start at the beginning. A folder is looked at before models are loaded.

    Raises ConfigError where `resume_from_checkpoint` asks for one and there is none. `--resume` starts anew then, and says so.
    """
    from trl.training.checkpoint import check_checkpoint, checkpoints

    asked, folder = run.training.resume_from_checkpoint, run.training.output_dir
    if not run.launch.resume and asked not in RESUME_LAST:
        return None if asked in (None, False, "false") else check_checkpoint(asked)
    if checkpoints(folder):
        return True if asked == "true" and not run.launch.resume else "last"
    beside = [path.name for path in Path(folder).resolve().parent.iterdir() if checkpoints(path)]
    problem = f"output_dir={folder!r} holds no checkpoint.{suggest(Path(folder).name, beside)}"
    if asked == "true":
        raise ConfigError(f"resume_from_checkpoint={asked}: {problem} Leave it out, to start at the beginning.")
    logger.warning(f"Nothing to resume: {problem} Training starts at the beginning.")
    return None


def _progress(trainer: BaseTrainer) -> AbstractContextManager[None]:
    """Bars in a terminal that can draw them; elsewhere the trainer's own lines, one for every log."""
    from rich.console import Console

    from trl.callbacks.progress import bars_of, draws

    if trainer.args.disable_tqdm or not trainer.is_world_process_zero() or not draws(Console()):
        return nullcontext()
    return bars_of(trainer)


class _Lines(logging.Handler):
    """Messages, a line each, on standard error as it is at the time: a bar of progress moves out of their way."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr)


def report_progress() -> None:
    """Show what the library reports (rows cut and dropped, layout, …), in one process of a node."""
    ours = logging.getLogger("trl")
    if os.environ.get("LOCAL_RANK", "0") == "0" and not any(isinstance(each, _Lines) for each in ours.handlers):
        ours.addHandler(_Lines())
        ours.setLevel(logging.INFO)
        ours.propagate = False
