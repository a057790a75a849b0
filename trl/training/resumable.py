"""A `transformers.Trainer` whose runs resume exactly where they were stopped.

Its checkpoints contain all state that changes during training: what `transformers` saves (model, optimizer, scheduler, random
states, history), the loss since the last log, and the parts that a trainer registers with `self.states.register(name, part)`.
`trl.training.checkpoint` writes and finds checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import IterableDataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl.compat.hooks import ATTRIBUTES, HOOKS, reject_unused, reject_unused_overrides
from trl.data.examples import Endless
from trl.models.files import follow_umask
from trl.models.reference import Reference
from trl.models.score import unwrap
from trl.training.checkpoint import read_manifest, resolve_checkpoint, rotate, write_checkpoint
from trl.training.collectives import all_gather_object, run_on_main
from trl.training.lock import only_run_in
from trl.training.nonfinite import last_sound_step, nonfinite_parameters, nonfinite_weights_error
from trl.training.output_folder import (
    check_folder,
    check_space,
    check_writable,
    checkpoint_bytes,
    claim,
    warn_of_refusal,
    warn_of_restart,
)
from trl.training.renamed_weights import are_renamed, load_renamed
from trl.training.run_settings import (
    OVERRULED,
    SETTINGS_FILE,
    check_adapter,
    check_rows_alike,
    check_settings,
    describe_options,
    describe_rows,
    describe_run,
    name_of,
)
from trl.training.state import StateFunctions, StateRegistry, Unchanged, reference_part
from trl.training.streams import steady_streams

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Writes complete checkpoints, and restores all of their state."""

    uncalled: ClassVar[Mapping[str, str]] = {}
    """Methods of `transformers.Trainer` that trainers of this class do not call, and what to do instead of overriding them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reject_unused_overrides(cls, cls.uncalled)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ConfigError for methods that trainers of this class do not call."""
        reject_unused(type(self), name, self.uncalled)
        super().__setattr__(name, value)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        reject_unused_overrides(type(self), self.uncalled)
        super().__init__(*args, **kwargs)
        self.states = StateRegistry()
        self.states.register(
            "loss", StateFunctions(self._loss_state, self._remember_loss), per_rank=True, optional=True
        )
        self._resumed_from: str | None = None
        self._nonfinite_at_first: frozenset[str] = frozenset()
        self._resumed_loss: Mapping[str, Any] | None = None
        self._optimizer_options: dict[str, Any] = {}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, with what to do instead, for a method or attribute that trainers of other releases have."""
            if advice := (HOOKS | ATTRIBUTES).get(name):
                raise AttributeError(f"{type(self).__name__}.{name} is of another release of TRL. {advice}")
            return object.__getattribute__(self, name)  # a property: raises the AttributeError from inside it

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def keep_reference(self, reference: Reference | None, *, moves: bool = False) -> None:
        """Register the state of a reference policy for checkpoints: all weights if it `moves` (changes during training)."""
        part = reference_part(reference, self.model, moves=moves)
        if part is not None:
            optional = isinstance(part, Unchanged)
            self.states.register("reference", part, per_rank=self.is_sharded, optional=optional)

    # ---- resuming ----

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. True resumes from the newest complete checkpoint; so does "last", or starts if there is none.

        In the first call, None is the option `resume_from_checkpoint`.
        """
        self._warn_of_kept_options()
        if resume_from_checkpoint is None and not self.state.global_step:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        with only_run_in(self.args.output_dir), steady_streams():
            check_rows_alike(all_gather_object(describe_rows(self.train_dataset), self.accelerator))
            checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
            self._check_folder(checkpoint)
            if checkpoint is None and self.is_world_process_zero():
                warn_of_restart(self.args.output_dir)
            elif checkpoint is not None:
                check_settings(Path(checkpoint), describe_run(self))
                check_adapter(Path(checkpoint), self.model)
            if self.args.save_strategy != "no":
                self.check_space(has_checkpoints=True)
            self._nonfinite_at_first = frozenset(self.nonfinite_weights())
            return super().train(checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self._optimizer_options = {name: getattr(self.args, name) for name in OVERRULED}
        return super().create_optimizer(*args, **kwargs)

    def _warn_of_kept_options(self) -> None:
        """Warn of options that were changed since an earlier call of `train` made the optimizer."""
        for name, was in self._optimizer_options.items():
            now = getattr(self.args, name)
            if self.optimizer is not None and now != was:
                logger.warning(
                    f"{name} was {was!r}, and is {now!r} now, which has no effect: the optimizer keeps the former value. Set "
                    "trainer.optimizer = None to make a new one."
                )

    def _check_folder(self, checkpoint: str | None) -> None:
        """Raise ConfigError on all processes if the output folder has results of a run other than the resumed one."""
        folder = Path(self.args.output_dir)
        if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
            return
        run_on_main(partial(check_folder, folder, describe_run(self), overwrite=self.args.overwrite_output_dir))

    def _check_folder_early(self) -> None:
        """Warn before rows are encoded if the output folder has results of another run, as far as options show.

        Raises ConfigError if it cannot be written to.
        """
        args = self.args
        if args.process_index == 0:
            check_writable(args.output_dir)
        if args.process_index == 0 and not (args.resume_from_checkpoint or args.overwrite_output_dir):
            warn_of_refusal(args.output_dir, describe_options(type(self).__name__, name_of(unwrap(self.model)), args))

    def check_space(self, *, has_checkpoints: bool) -> None:
        """Raise ConfigError on all processes if a checkpoint (or without them, the model) does not fit on the disk."""
        if self.is_sharded:
            return
        is_adapter = any(isinstance(module, PeftModel) for module in self.model.modules())
        moments = has_checkpoints and "adam" in str(self.args.optim).lower() and not self.args.save_only_model
        needed = checkpoint_bytes(self.model, has_optimizer=moments, only_trained=is_adapter)
        run_on_main(partial(check_space, self.args.output_dir, needed, has_checkpoints=has_checkpoints))

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        size, rows = self._train_batch_size, Endless(self.train_dataset)
        return self._get_dataloader(rows, description="Training", batch_size=size, is_training=True)

    def restore_rng_state(self) -> None:
        """Restore the random states of the resumed checkpoint, and the loss since its last log, before the first step.

        Data loaders draw random numbers when they start, so this is called after the first rows have been read.
        """
        self._load_rng_state(self._resumed_from)
        if self._resumed_loss is not None:
            self._tr_loss += self._resumed_loss["sum"].to(self._tr_loss.device)
            self._total_loss_scalar -= self._tr_loss.item()  # `train_loss` covers only the steps of this call
            self._globalstep_last_logged = self._resumed_loss["logged"]
            self._resumed_loss = None

    def is_finished(self) -> bool:
        """Whether no steps are left, as when a run resumes from its last checkpoint; if so, stop the training loop."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        return self.control.should_training_stop

    @property
    def steps_since_log(self) -> int:
        """Number of steps whose loss is not logged yet, including those before the resumed checkpoint."""
        resumed = self._resumed_loss
        return self.state.global_step - (self._globalstep_last_logged if resumed is None else resumed["logged"])

    def _loss_state(self) -> dict[str, Any]:
        return {"sum": self._tr_loss, "logged": self._globalstep_last_logged}

    def _remember_loss(self, state: Mapping[str, Any]) -> None:
        self._resumed_loss = state

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore random states only once: before the first step, or before an epoch that begins with that step."""
        if checkpoint is not None and checkpoint == self._resumed_from:
            super()._load_rng_state(checkpoint)
            self._resumed_from = None

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As in `transformers`, but with this run's logging_steps, eval_steps and save_steps in place of the checkpoint's."""
        begun = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not self._load_if_renamed(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_if_renamed(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_if_renamed(self, model: nn.Module, checkpoint: str) -> bool:
        if self.is_sharded or not are_renamed(model, Path(checkpoint)):
            return False
        load_renamed(model, Path(checkpoint))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in `transformers`, without warnings of tied weights, which a checkpoint contains only once."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            processes, rank = self.args.world_size, self.args.process_index
            written_by = read_manifest(Path(checkpoint)).get("processes", processes)
            self.states.load(Path(checkpoint), rank=rank, processes=processes, written_by=written_by)
            self._resumed_from = checkpoint
            # Found by its step: the run may have been moved since its path was stored, which must not lead out of it.
            best = Path(checkpoint).with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    # ---- stopping ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, completely or not at all. Raises NonFiniteError if weights are not finite."""
        self.check_finite(f"checkpoint-{self.state.global_step}")
        self.store_flos()
        state = self.state
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best == folder or best.exists():
            state.best_model_checkpoint = str(best)
        if self.args.should_save:
            claim(folder.parent, describe_run(self))
        write_checkpoint(folder, self._write_checkpoint, self.accelerator, names_it=self.args.should_save)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            sound = last_sound_step(state.log_history)
            rotate(folder, self.args.save_total_limit, state.best_model_checkpoint, sound)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers`, but raises NonFiniteError in place of overwriting a model by weights that are not finite."""
        self.check_finite("The model")
        if self.args.should_save and not _internal_call and output_dir in (None, self.args.output_dir):
            claim(self.args.output_dir, describe_run(self))
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            follow_umask(output_dir or self.args.output_dir)

    def check_finite(self, what: str) -> None:
        """Raise NonFiniteError on all processes if weights to be saved as `what` became non-finite during training."""
        if names := [name for name in self.nonfinite_weights() if name not in self._nonfinite_at_first]:
            raise nonfinite_weights_error(names, what)

    def nonfinite_weights(self) -> list[str]:
        """Names of parameters that are not finite on any process."""
        parts = all_gather_object(nonfinite_parameters(self.model), self.accelerator)
        return list(dict.fromkeys(name for part in parts for name in part))

    def _write_checkpoint(self, folder: Path) -> None:
        """The files of a checkpoint."""
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.states.save(folder, rank=self.args.process_index, is_main=self.args.should_save)
        if self.args.should_save:
            self.state.stateful_callbacks = self._callback_states()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            (folder / SETTINGS_FILE).write_text(json.dumps(describe_run(self), indent=1), encoding="utf-8")

    def _callback_states(self) -> dict[str, Any]:
        """States of callbacks by class name; a list of states if a class has several callbacks."""
        found: dict[str, list] = {}
        for each in (*self.callback_handler.callbacks, self.control):
            if isinstance(each, ExportableState):
                found.setdefault(type(each).__name__, []).append(each.state())
        return {name: states if len(states) > 1 else states[0] for name, states in found.items()}
