"""Online: PPO of prompts and a reward function, on `trl.PPOTrainer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from trl.algorithms.moments import RunningMoments
from trl.algorithms.ppo import PPO
from trl.errors import ConfigError, unknown
from trl.models.layer_sharing import depth
from trl.rollouts.experience import Group
from trl.trainers.ppo.config import PPOConfig as TrlPPOConfig
from trl.trainers.ppo.trainer import PPOTrainer
from trl.types import Experience
from trlx.models.modeling_ppo import PPOConfig
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer, freeze_lower_layers
from trlx.trainer.options import adapter_config, sampling_options, steps_of_epochs
from trlx.trainer.prompted import Prompted, PromptedSampler
from trlx.trainer.schedules import Scheduled
from trlx.trainer.scoring import ScriptReward
from trlx.utils import logging

logger = logging.get_logger(__name__)

__all__ = ["AcceleratePPOTrainer", "PPOConfig"]

ALGORITHM_OPTIONS = ("init_kl_coef", "horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef")
SCALINGS = ("running", "ref", "ignored", False, None)


@dataclass(kw_only=True)
class ScaledPPO(PPO):
    """PPO that divides scores and rewards of tokens, after clipping, by a standard deviation."""

    scaling: str | None = None
    """Which standard deviation: "running", of all scores so far; "ref", `ref_std` or that of the first rollouts; None,
    no scaling."""

    ref_std: float | None = None
    """Standard deviation for "ref"."""

    def _moments_with(self, experience: Experience) -> RunningMoments:
        fixed = self.scaling == "ref" and (self.ref_std is not None or self.moments.count > 0)
        if self.scaling is None or fixed:
            return self.moments
        return self.moments.updated(experience.rewards.nan_to_num(0.0))

    def with_scores(self, experience: Experience) -> Experience:
        """Add the scaled `scores` `[N]`, and scale `dense_rewards` `[N,C]`, if there are any."""
        std = 1.0 if self.scaling is None else self.ref_std or self._moments_with(experience).std
        scores = {"scores": experience.rewards.nan_to_num(0.0) / std}
        if "dense_rewards" in experience.signals:
            scores["dense_rewards"] = experience.signals["dense_rewards"] / std
        return experience.with_signals(**scores)


class _Sampler(PromptedSampler):
    """Sampler that adds rewards of tokens to its groups, if the reward function `script` returned them."""

    script: ScriptReward

    def groups(self, rows: Sequence[Mapping[str, Any]], n: int, mode: str) -> list[Group]:
        groups = super().groups(rows, n, mode)
        if self.script.dense is None:
            return groups
        rewards = iter(self.script.dense)
        return [replace(group, example=_with_rewards(group.example, rewards)) for group in groups]


class _PPOTrainer(Scheduled, Prompted, PPOTrainer):
    """`PPOTrainer` with a `scheduler` section, tokenised prompts, and rewards of tokens."""

    sampler_class = _Sampler

    def __init__(self, *args: Any, script: ScriptReward, **kwargs: Any) -> None:
        self.script = script
        super().__init__(*args, reward_funcs=script, **kwargs)

    def _prepare_sampling(self, *args: Any) -> None:
        super()._prepare_sampling(*args)
        self.sampler.script = self.script


def _with_rewards(example: Any, rewards: Any) -> Any:
    completions = (replace(c, signals={**c.signals, "dense_rewards": next(rewards)}) for c in example.completions)
    return replace(example, completions=tuple(completions))


def scaled(algorithm: PPO, method: PPOConfig) -> ScaledPPO:
    """Return the algorithm with the method's `scale_reward`. Raises ConfigError for an unknown one; warns of unused options."""
    if method.scale_reward not in SCALINGS:
        raise ConfigError(unknown("method.scale_reward", str(method.scale_reward), map(str, SCALINGS)))
    options = {each.name: getattr(algorithm, each.name) for each in fields(algorithm)}
    scaling = method.scale_reward if method.scale_reward in ("running", "ref") else None
    for name, is_read in (("ref_mean", False), ("ref_std", scaling == "ref")):
        if getattr(method, name) is not None and not is_read:
            logger.warning(
                f"method.{name}={getattr(method, name)} has no effect with scale_reward={method.scale_reward!r}."
            )
    return ScaledPPO(**options, scaling=scaling, ref_std=method.ref_std if scaling == "ref" else None)


@register_trainer
class AcceleratePPOTrainer(AccelerateRLTrainer):
    """Samples from the prompts, computes rewards, and learns by PPO. Arguments: see `AccelerateRLTrainer`.

    A set of `num_rollouts` is split into equal batches of at most `train.batch_size`, one per optimizer step.
    """

    method_class = PPOConfig
    has_value_head = True

    def add_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        self.rows = self.prompt_rows(prompts, max_prompt_length)

    def make_trainer(self) -> PPOTrainer:
        train, method, model = self.config.train, self.config.method, self.config.model
        if self.reward_fn is None:
            raise ConfigError("PPOConfig needs a reward_fn: give one.")
        options = self.common_options()
        updates = math.ceil(method.num_rollouts / train.batch_size)
        accumulated = options.pop("gradient_accumulation_steps")
        mini = math.ceil(method.num_rollouts / updates / accumulated)
        del options["per_device_train_batch_size"]
        args = TrlPPOConfig(
            **options,
            **sampling_options(method.gen_experience_kwargs or method.gen_kwargs),
            **{name: getattr(method, name) for name in ALGORITHM_OPTIONS},
            adap_kl_ctrl=method.target is not None,
            target=method.target or 6,
            batch_size=mini * accumulated * updates,
            mini_batch_size=mini,
            gradient_accumulation_steps=accumulated,
            ppo_epochs=method.ppo_epochs,
            num_value_layers=method.num_value_layers_unfrozen,
            max_steps=steps_of_epochs(train, updates * method.ppo_epochs),
        )
        script = self.script_reward(
            chunk_size=method.chunk_size, folder=self.rollout_folder, clip=method.cliprange_reward
        )
        return _PPOTrainer(
            args=args,
            model=self.given_model,
            train_dataset=self.rows,
            params=self.train_params(),
            scheduler=self.config.scheduler,
            algorithm=scaled(args.make_algorithm(), method),
            script=script,
            peft_config=adapter_config(model.peft_config),
            num_shared_layers=self._shared_layers(),
            **self.common_keywords(),
        )

    def _shared_layers(self) -> int | None:
        """Number of frozen lower layers that policy and reference share. None: nothing is shared between two copies."""
        unfrozen, layers = self.config.model.num_layers_unfrozen, depth(self.given_model)
        if self.config.model.peft_config is not None or not 0 <= unfrozen < layers:
            return None
        if unfrozen == 0:
            freeze_lower_layers(self.given_model, 0)
            return None
        return layers - unfrozen
