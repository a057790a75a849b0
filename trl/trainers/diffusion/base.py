"""Base of the trainers of diffusion models: a pipeline, of which the denoiser is trained, with the steps of `StepTrainer`.

A subclass defines what an item of a step is (a denoising step, a picture, a pair), how items are collated, and the loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, set_seed

from trl.callbacks.model_card import Trained, WritesModelCard
from trl.callbacks.pictures import PictureLog
from trl.callbacks.report import ReportCallback
from trl.data.encode import first_rows
from trl.diffusion.denoiser import Denoiser
from trl.diffusion.families import denoiser_for
from trl.diffusion.pipelines import (
    SwappedWeights,
    add_adapter,
    load_pipeline,
    load_trained,
    module_has_adapter,
    prepare_pipeline,
    save_trained,
    save_whole,
    trained,
    without_adapter,
)
from trl.diffusion.rollouts import IN_EVALUATION, Row, items_from, seed_of, state_of_items
from trl.diffusion.solvers import Schedule
from trl.diffusion.texts import PromptEmbeddings
from trl.diffusion.trajectories import Trajectories, sample
from trl.errors import ConfigError, DataError, RowError
from trl.models.load import disable_dropout
from trl.models.sharding import prepare_frozen
from trl.rollouts.buffer import RolloutBuffer
from trl.trainers.diffusion.config import DiffusionConfig
from trl.trainers.options import resolve_args
from trl.training.evaluation import EvaluatingTrainer

Rows = Dataset | IterableDataset


class DiffusionTrainer(WritesModelCard, EvaluatingTrainer):
    """Base of the trainers of diffusion models.

    model           a pipeline of `diffusers`, or the name or folder of one
    args            the trainer's configuration
    train_dataset   rows with `prompt`, a text
    peft_config     train a new adapter (LoRA); without one, and if the pipeline has none, all weights are trained
    options         options of the configuration given as keywords
    """

    config_class: ClassVar[type[DiffusionConfig]] = DiffusionConfig
    item_class: ClassVar[type]
    """Type of the sampled items that a subclass trains on: a denoising step, a picture."""
    buffer: RolloutBuffer | None = None
    uncalled: ClassVar[dict[str, str]] = {"_issue_warnings_after_load": "Override `_load_from_checkpoint`."}

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        *,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> None:
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config is for language models: load the pipeline quantised, and give it as the model."
            )
        self.args = resolve_args(self.config_class, args, options, trainer=type(self).__name__, model=model)
        set_seed(self.args.seed)  # the same initial adapters in every run and on every process
        for name, rows in (("train", train_dataset), ("eval", eval_dataset)):
            if rows is not None:
                self.check_rows(rows, name, self.args)
        self.pipeline = load_pipeline(model, **(self.args.model_init_kwargs or {}))
        self.denoiser = self.make_denoiser()
        self.part = self.denoiser.part
        module = self._prepare_module(peft_config)
        super().__init__(
            model=module,
            args=self._without_checkpointing(module),
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "Diffusion models are trained with DDP, or on one device: FSDP and DeepSpeed are not supported."
            )
        self.pipeline.to(self.args.device)
        self.ema = None if self.args.ema_decay is None else SwappedWeights(self.module)
        if self.ema is not None:
            self.states.register("ema", self.ema)
            self.add_callback(FollowWeights(self.ema, self.module, self.args.ema_decay))
        if self.args.num_pictures and self.train_dataset is not None:
            self.add_callback(PictureLog(self, self.pictured_rows()))
        if self.args.html_report:
            self.add_callback(ReportCallback())  # after PictureLog, whose pictures the report shows
        self.embeddings = PromptEmbeddings(self.denoiser)
        self._frozen: nn.Module | None = None

    @staticmethod
    def check_rows(rows: Rows, name: str, args: DiffusionConfig) -> None:
        """Raises DataError for rows that cannot be trained on; called before the pipeline is loaded."""
        check_prompts(rows, name)

    # ---- the model ----

    def make_denoiser(self) -> Denoiser:
        """Wrap the pipeline's denoiser, with the picture size and guidance of the options."""
        return denoiser_for(
            self.pipeline,
            height=self.args.height,
            width=self.args.width,
            negative_prompt=self.args.negative_prompt,
            max_sequence_length=self.args.max_sequence_length,
            guidance_scale=self.args.guidance_scale,
            flow_solver=self.args.flow_solver,
        )

    @property
    def module(self) -> nn.Module:
        """The denoiser that is trained, as the pipeline holds it."""
        return self.denoiser.module

    @property
    def has_adapter(self) -> bool:
        return module_has_adapter(self.module)

    def _prepare_module(self, peft_config: PeftConfig | None) -> nn.Module:
        module = prepare_pipeline(self.pipeline, self.part)
        add_adapter(module, peft_config, self.part)
        disable_dropout(module)  # sampling and training have to compute the same likelihoods
        if not trained(module):
            raise ConfigError(
                "No parameter of the model is trained: give a peft_config, or a model without a frozen adapter."
            )
        return module

    def _without_checkpointing(self, module: nn.Module) -> DiffusionConfig:
        """Enable gradient checkpointing by the method of `diffusers`, and hide the option from `transformers`.

        `transformers` would call a method that models of `diffusers` do not have.
        """
        args = copy(self.args)
        if args.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if hasattr(args, name):
                setattr(args, name, False)
        return args

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """Context with the reference model: the model without its adapter, or the frozen copy of `keep_reference_model`."""
        if self.has_adapter:
            with without_adapter(self.module):
                yield self.module
        else:
            yield self._frozen

    def keep_reference_model(self) -> None:
        """Make the frozen copy for `reference`, unless the model has an adapter; call it before the first step."""
        if not self.has_adapter:
            frozen = deepcopy(self.module).requires_grad_(False).eval()
            self._frozen = prepare_frozen(self.accelerator, frozen)  # under autocast, as the model in training is

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the model has the moving average of its weights, if `ema_decay` is set."""
        return nullcontext() if self.ema is None else self.ema.in_place(self.module)

    # ---- steps ----

    def size(self, item: Any) -> int:
        return 1

    def micro_batch_budget(self) -> int:
        return self.args.forward_rows

    def texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of `prompts` from the text encoders, collated."""
        return self.denoiser.collate(self.embeddings(prompts))

    # ---- items that are sampled ----

    def loader_of_minibatches(self, per_epoch: int | None) -> DataLoader:
        """A loader of the minibatches that `roll_out()` samples: `per_epoch` rollout batches per epoch (None: endless)."""
        self.buffer = RolloutBuffer(
            self.roll_out,
            minibatches=self.args.minibatches_per_rollout_batch,
            iterations=self.args.num_iterations,
            per_epoch=per_epoch,
            state_of=state_of_items,
            batch_from=partial(items_from, self.item_class),
        )
        return self.buffer.loader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.buffer is not None:
            self.restore_rng_state()  # after resuming, before sampling draws random numbers
            self.buffer.begin_step()
        return super().get_batch_samples(*args, **kwargs)

    # ---- pictures ----

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], schedule: Schedule, first_noise: Sequence[int] | None = None
    ) -> tuple[Trajectories, Tensor]:
        """Sample a picture `[N,3,H,W]` of each prompt, with the unwrapped model; also return the denoising trajectories."""
        with self.compute_loss_context_manager():
            trajectories = sample(
                self.denoiser,
                self.module,
                self.embeddings(prompts),
                schedule,
                seeds,
                negative=self.embeddings.negative(),
                first_noise=first_noise,
                at_once=self.args.sampled_at_once,
            )
            clean = trajectories.clean.to(self.args.device)
            images = self.denoiser.decode(clean, at_once=self.args.vae_batch_size)
        return trajectories, images.float()

    def evaluation_schedule(self) -> Schedule:
        """The deterministic schedule for pictures of evaluation and report."""
        return self.denoiser.schedule(self.args.num_inference_steps_eval, eta=0.0)

    def fixed_seeds(self, rows: Sequence[Row], each: int) -> list[int]:
        """`each` seeds per row that depend only on its prompt, so that pictures of different evaluations are comparable."""
        numbers = [zlib.crc32(row["prompt"].encode()) * 64 + k for row in rows for k in range(each)]
        return [seed_of(self.args.seed, IN_EVALUATION, number) for number in numbers]

    def pictured_rows(self) -> list[Row]:
        """`num_pictures` of the first rows, with distinct prompts as far as possible."""
        found: dict[str, Row] = {}
        for row in first_rows(self.train_dataset, 8 * self.args.num_pictures):
            found.setdefault(row["prompt"], row)
        rows = [*found.values()][: self.args.num_pictures]
        return [rows[i % len(rows)] for i in range(self.args.num_pictures)]

    def picture(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """A picture of each row, always from the same noise, and its reward (NaN without reward functions)."""
        seeds = [seed + i for i, seed in enumerate(self.fixed_seeds(rows, 1))]
        with self.averaged():
            _, images = self.draw([row["prompt"] for row in rows], seeds, self.evaluation_schedule())
        return images, self.picture_rewards(rows, images)

    def picture_rewards(self, rows: Sequence[Row], images: Tensor) -> Tensor:
        """The reward `[N]` of each picture, NaN by default."""
        return torch.full((len(images),), torch.nan)

    # ---- files ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_trained(self.pipeline, self.part, folder)
        torch.save(self.args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, or the whole pipeline if there is none, with averaged weights if `ema_decay` is set.

        Checkpoints hold the trained part only, with the weights that are not averaged.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            with self.averaged():
                save = save_trained if self.has_adapter else save_whole
                save(self.pipeline, self.part, folder)

    def describe_model(self) -> tuple[Trained, list[str]]:
        base = self.pipeline.config.get("_name_or_path") or None
        rows = self.train_dataset
        count = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream of rows"
        said = [] if rows is None else [f"train: {count}"]
        return Trained(base, "pictures", is_adapter=self.has_adapter), said

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.module, self.part, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_trained(self.module, self.part, Path(self.state.best_model_checkpoint))


class FollowWeights(TrainerCallback):
    """Updates a moving average of the weights of `module` after every optimizer step."""

    def __init__(self, average: SwappedWeights, module: nn.Module, decay: float) -> None:
        self.average, self.module, self.decay = average, module, decay

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.average.follow(self.module, decay=self.decay)


def check_prompts(rows: Rows, name: str) -> None:
    """Raises DataError without a column 'prompt', and RowError for the first row whose prompt is no text."""
    columns = rows.column_names or list(next(iter(rows), {}))
    if "prompt" not in columns:
        raise DataError(f"{name}_dataset has no column 'prompt'. It has {', '.join(columns) or 'none'}.")
    if isinstance(rows, Dataset):
        for number, prompt in enumerate(rows["prompt"]):
            if not isinstance(prompt, str):
                raise RowError(number, f", column 'prompt': {no_text(prompt)}", name)


def check_prompt(prompt: Any, where: str) -> str:
    """The prompt. Raises DataError if it is no text."""
    if not isinstance(prompt, str):
        raise DataError(f"{where}: prompt is {no_text(prompt)}")
    return prompt


def no_text(prompt: Any) -> str:
    return f"a {type(prompt).__name__} ({prompt!r:.60}), but has to be a text."
