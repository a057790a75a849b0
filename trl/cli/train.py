"""Run a training command: read its options, build the trainer, train, save and publish the model."""

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
from trl.models import not_found
from trl.models.config import ModelConfig, get_peft_config, get_quantization_config
from trl.printable import printable
from trl.trainers.sampler_options import SamplerOptions

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer
    from trl.trainers.config import TrainerConfig

logger = logging.getLogger(__name__)

RESUME_LAST = (True, "last")

LIBRARIES = ("transformers", "peft", "datasets", "tokenizers", "huggingface_hub", "bitsandbytes")
"""Libraries whose errors are about the user's input: names, files, and options that are passed to them."""


@dataclass(frozen=True)
class Run:
    """The parsed arguments of a training command. `extra` is an instance of `method.extra`, if the method has one."""

    method: Method
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    model: ModelConfig
    training: TrainerConfig
    launch: LaunchArguments
    extra: Any = None


def read_run(method: Method, given: ParsedOptions) -> Run:
    """Make the arguments of a run. Checks that need no heavy imports come first."""
    os.environ.update(given.environment)
    for name, value in given.outdated.items():
        load("trl.compat.options:refuse_outdated")(name, value)
        print(f"{name} no longer has an effect: leave it out.", file=sys.stderr)
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
    """Make the trainer's configuration. Raises ConfigError for values that it, or `transformers`, refuses."""
    try:
        return given.arguments_for(load(method.config))
    except TrlError:
        raise
    except ValueError as error:
        raise ConfigError(f"These options cannot be combined: {error}") from error


def _check_adapter_options(given: ParsedOptions) -> None:
    """Raises ConfigError for LoRA options without `use_peft`.

    An explicit `--no_use_peft` allows them, so that a file can keep its LoRA options while the whole model is trained.
    """
    options = [name for name in given.values if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    if options and "use_peft" not in given.values:
        raise ConfigError(
            f"--{options[0]} has no effect without an adapter: add --use_peft to train one; or, to train without a new "
            f"adapter, leave {', '.join('--' + name for name in options)} out or add --no_use_peft."
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
    """The name of a model, with `~` expanded.

    Raises ConfigError if it is missing, or if it is a folder that does not exist or holds no model.
    """
    if name is None:
        raise ConfigError("--model_name_or_path is missing: the hub name or folder of a model.")
    return not_found.check_folder(name, f"model_name_or_path={name!r}")


def check_weights(name: str | None) -> None:
    """Raises ConfigError if the folder `name` lacks weight files. Hub names are not looked up."""
    if name is not None:
        not_found.check_weights(name, f"model_name_or_path={name!r}")


def model_to_load(given: ParsedOptions, name: str | None = None) -> ModelConfig:
    """The model arguments for a command that does not train: of model `name`, or of `model_name_or_path`.

    Raises ConfigError if no model is given, or its folder holds no model or lacks weight files.
    """
    check_weights(name := check_model(name or given.values.get("model_name_or_path")))
    values = {"dtype": "auto", **given.values, "model_name_or_path": name}
    return replace(given, values=values).arguments_for(ModelConfig)


def datasets_of(run: Run) -> tuple[Any, Any]:
    """Load training rows, and evaluation rows if `eval_strategy` needs them. Raises DataError if they are missing."""
    if run.mixture.datasets:
        splits, train, test = get_dataset(run.mixture), "train", "test"
    else:
        splits = load_dataset_argument(run.script)
        train, test = run.script.dataset_train_split, run.script.dataset_test_split
    if run.training.eval_strategy == "no":
        if not run.mixture.datasets and test != ScriptArguments.dataset_test_split:
            logger.warning(
                f"Nothing is evaluated on dataset_test_split={test!r}: give --eval_strategy epoch, or steps."
            )
        return splits[train], None
    if test not in splits:
        raise DataError(
            f"eval_strategy={run.training.eval_strategy.value!r} needs rows to evaluate on, but the dataset has no split "
            f"{test!r}: name one with --dataset_test_split, which may be a slice (train[90%:] beside --dataset_train_split "
            "train[:90%]), or hold out rows of a mixture with --test_split_size."
        )
    return splits[train], splits[test]


def build_trainer(run: Run) -> BaseTrainer:
    """Make the trainer: load its model and encode its rows."""
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
    """Keyword arguments that only some trainers take, such as `reward_funcs`."""
    return run.extra.keywords() if run.extra else {}


def check_hub(run: Run, *, pushes: bool = False) -> None:
    """Check, before anything is loaded, that the hub has the model and, with `pushes`, accepts uploads. Raises
    ConfigError."""
    check_model_on_hub(run.model.model_name_or_path, run.model.model_revision)
    if pushes and run.training.push_to_hub:
        check_push(run.training)


def train(run: Run) -> int:
    """Train, save the model to `output_dir`, and push it with `push_to_hub`. A signal ends training with a checkpoint.

    Return the exit status: 0, or 128 plus the number of the signal.
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
    """Raises ConfigError for quantised weights without an adapter, because they cannot be trained, or without bitsandbytes."""
    from trl.models.saved_adapters import is_adapter

    model = run.model
    bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit" if model.load_in_8bit else None
    has_adapter = model.use_peft or model.adapter_name_or_path is not None
    if bits is not None and not has_adapter and not is_adapter(model.model_name_or_path, **model.hub):
        raise ConfigError(f"--{bits}: quantised weights cannot be trained. Add --use_peft to train an adapter on them.")
    get_quantization_config(model)


def _check_output_folder(run: Run) -> None:
    """Raises ConfigError if the options alone show that the output folder holds another run, or the model itself.

    The trainer checks again when it knows its rows and parameters.
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
    """Turn errors that LIBRARIES raise while a trainer is made into one-line ConfigErrors.

    Errors raised elsewhere keep their traceback, because they may be bugs of trl.
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
    """Write the model card, and push model and card with `push_to_hub`."""
    names = run.script.dataset_name if isinstance(run.script.dataset_name, str) else None
    trainer.create_model_card(dataset_name=names)
    if trainer.steps.skipped:
        logger.warning(
            f"{trainer.steps.skipped} of {trainer.state.global_step} steps were skipped without an update, because their loss or "
            "gradient was not finite."
        )
    if run.training.push_to_hub:
        with push_explained(run.training.output_dir):
            trainer.push_to_hub(dataset_name=names)


def checkpoint_of(run: Run) -> str | bool | None:
    """The value of `resume_from_checkpoint` for the trainer, checked before models are loaded; None: start from the
    beginning.

    Without a checkpoint, `resume_from_checkpoint` raises ConfigError, and `--resume` logs a warning and starts from the
    beginning.
    """
    from trl.training.checkpoint import check_checkpoint, checkpoints

    asked, folder = run.training.resume_from_checkpoint, run.training.output_dir
    if not run.launch.resume and asked not in RESUME_LAST:
        return None if asked in (None, False) else check_checkpoint(asked)
    if checkpoints(folder):
        return True if asked is True and not run.launch.resume else "last"
    beside = [path.name for path in Path(folder).resolve().parent.iterdir() if checkpoints(path)]
    problem = f"output_dir={folder!r} holds no checkpoint.{suggest(Path(folder).name, beside)}"
    if asked is True:
        raise ConfigError(f"resume_from_checkpoint=true: {problem} Leave it out to start from the beginning.")
    logger.warning(f"Nothing to resume: {problem} Training starts from the beginning.")
    return None


def _progress(trainer: BaseTrainer) -> AbstractContextManager[None]:
    """Progress bars in a terminal that can draw them; elsewhere the trainer prints one line per log."""
    from rich.console import Console

    from trl.callbacks.progress import bars_of, draws

    if trainer.args.disable_tqdm or not trainer.is_world_process_zero() or not draws(Console()):
        return nullcontext()
    return bars_of(trainer)


class _Lines(logging.Handler):
    """Prints log messages to the current `sys.stderr`, which progress bars replace to print messages above
    themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr)


def report_progress() -> None:
    """Print the library's log messages (truncated and dropped rows, layout, …) in the first process of each node."""
    ours = logging.getLogger("trl")
    if os.environ.get("LOCAL_RANK", "0") == "0" and not any(isinstance(each, _Lines) for each in ours.handlers):
        ours.addHandler(_Lines())
        ours.setLevel(logging.INFO)
        ours.propagate = False
