"""The interface of TRL 0.4 to 0.11, with functions for prompts and rewards: what DDPO and AlignProp share.

    prompt_function()                         -> prompt, metadata
    reward_function(images, prompts, metadata) -> rewards, reward_metadata        images [b,3,H,W] in [0, 1]

This module has their checkpoints, saved pipelines and model cards; each trainer defines its sampling and its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from torch.utils.data import DataLoader

from trl.callbacks.model_card import Trained
from trl.errors import ConfigError, DataError
from trl.rewards.call import RewardError
from trl.trainers.diffusion.base import DiffusionTrainer, check_prompt
from trl.trainers.diffusion.ddpo_config import ClassicConfig
from trl.trainers.diffusion.pipeline import DefaultDDPOStableDiffusionPipeline
from trl.training.checkpoint import checkpoints


class ClassicTrainer(DiffusionTrainer):
    """Base of the trainers with the classic interface: their arguments, `train`, the tracker, and saving."""

    uncalled = DiffusionTrainer.uncalled | {"_get_train_sampler": "Prompts come from `prompt_function`."}

    def take_arguments(
        self,
        config: ClassicConfig,
        kind: type[ClassicConfig],
        reward_function: Callable,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DefaultDDPOStableDiffusionPipeline,
        image_samples_hook: Callable | None,
    ) -> None:
        """Store the arguments. Raises ConfigError for a configuration not of class `kind`, or a pipeline of another class."""
        if not isinstance(config, kind):
            raise ConfigError(f"config is a {type(config).__name__}: give a {kind.__name__}.")
        for name in ("sd_pipeline", "get_trainable_layers", "save_pretrained"):
            if not hasattr(sd_pipeline, name):
                raise ConfigError(
                    f"sd_pipeline is a {type(sd_pipeline).__name__} without {name}: give a "
                    "DefaultDDPOStableDiffusionPipeline, which takes the name of a pipeline, or a StableDiffusionPipeline."
                )
        self.config, self.sd_pipeline = config, sd_pipeline
        self.reward_fn, self.prompt_fn, self.image_samples_callback = (
            reward_function,
            prompt_function,
            image_samples_hook,
        )
        sd_pipeline.get_trainable_layers()

    def train(self, epochs: int | None = None, **options: Any) -> Any:
        """Train for `epochs`, by default config.num_epochs; resume from config.resume_from if that is set."""
        if epochs is not None:
            self.args.num_train_epochs = epochs
        found = options.pop("resume_from_checkpoint", None) or checkpoint_in(self.config.resume_from)
        return super().train(found, **options)

    def get_train_dataloader(self) -> DataLoader:
        return self.loader_of_minibatches(per_epoch=1)

    def _train_metrics(self) -> dict[str, float]:
        """The metrics of the steps since the last log; also logs them to the tracker."""
        found = super()._train_metrics()
        self.accelerator.log(found, step=self.state.global_step)
        return found

    # ---- files ----

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the pipeline, and its adapter if it has one."""
        self._save_pretrained(save_directory)

    def _save_pretrained(self, save_directory: str | Path) -> None:
        if self.is_world_process_zero():
            self.sd_pipeline.save_pretrained(save_directory)
            self.create_model_card(save_directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        else:
            self._save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(
        self,
        path: str | Path | None = None,
        model_name: str | None = None,
        hub_model_id: str | None = None,
        **_: Any,
    ) -> None:
        """Write README.md to the folder `path`, by default that of checkpoints. Its example loads the model by its hub id, or by
        the folder's name."""
        args = copy(self.args)
        args.output_dir = str(path or self.args.output_dir)
        args.hub_model_id = hub_model_id or args.hub_model_id
        method = type(self).__name__.removesuffix("Trainer")
        self._write_card(args, model_name=model_name or f"TRL {method} Model")

    def describe_model(self) -> tuple[Trained, list[str]]:
        given = self.sd_pipeline.pretrained_model
        return Trained(given if isinstance(given, str) else None, "pictures", is_adapter=self.has_adapter), []

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the pipeline to `repo_id`."""
        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.create_model_card(folder, hub_model_id=repo_id)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def asked_prompt(given: Any) -> tuple[str, Any]:
    """The prompt and metadata that prompt_function returned. Raises DataError for anything else."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise DataError(
            f"prompt_function returned {given!r:.60}: it has to return two values, a prompt and its metadata, as in "
            "`return prompt, {}`."
        )
    return check_prompt(given[0], "prompt_function"), given[1]


def two_values(given: Any) -> tuple[Any, Any]:
    """The rewards and metadata that the reward function returned. Raises RewardError for anything else."""
    if not isinstance(given, tuple | list) or len(given) != 2 or isinstance(given[0], int | float):
        raise RewardError(
            f"The reward function returned a {type(given).__name__}: it has to return two values, rewards and metadata, as in "
            "`return rewards, {}`."
        )
    return given[0], given[1]


def checkpoint_in(folder: str) -> str | None:
    """The checkpoint that `resume_from` names: the newest one in that folder, or the folder itself; None if it is empty."""
    if not folder:
        return None
    found = checkpoints(Path(folder).expanduser())
    return str(found[0]) if found else folder
