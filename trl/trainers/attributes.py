"""Attributes that scripts for other releases read from a trainer: its options by name, and its reward functions.

trainer.beta                     trainer.args.beta
trainer.reward_weights           a tensor, [functions]
trainer.reward_funcs = [short]   rewards the rollout batches that follow
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trl.errors import ConfigError
from trl.rewards.model import RewardModel
from trl.rewards.reward import Reward, make_rewards

ENGINE = "Completions come from `trainer.engine`, and an `engine` of your own may be given: see `trl.rollouts.engine`."
NO_TOOLS = "Tools and environments are not supported yet: give a `rollout_func`, see docs/scaling.md."
SAMPLING = (
    "The configuration has the options of sampling: `temperature`, `top_p`, `top_k`, `min_p`, `generation_kwargs`."
)


def has_own_loss(trainer: Any) -> bool:
    """Whether a script overrides the loss of a trainer, in its class or on the object."""
    return any(not str(getattr(trainer, name).__module__).startswith("trl.") for name in ("loss", "compute_loss"))


class Option:
    """An option of the configuration, under its own name or as `option`; where it is None, the option `otherwise`.

    Setting it on the trainer to another value raises ConfigError, since it would change nothing. Where the configuration has no
    such option, it is an attribute like any other.
    """

    def __init__(self, option: str = "", *, otherwise: str = "") -> None:
        self.option, self.otherwise = option, otherwise

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.option = name, self.option or name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        if self.name in vars(trainer):
            return vars(trainer)[self.name]
        if self._is_in(trainer):
            value = getattr(trainer.args, self.option)
            return getattr(trainer.args, self.otherwise) if value is None and self.otherwise else value
        raise AttributeError(
            f"{type(trainer).__name__} has no attribute {self.name!r}, nor its configuration an option."
        )

    def __set__(self, trainer: Any, value: Any) -> None:
        if not self._is_in(trainer):
            vars(trainer)[self.name] = value
        elif value != self.__get__(trainer):
            raise ConfigError(
                f"{type(trainer).__name__}.{self.name} cannot be set: it is read from the configuration when the trainer is "
                f"constructed. Set {self.option}={value!r} in {type(trainer.args).__name__}."
            )

    def _is_in(self, trainer: Any) -> bool:
        return self.option in getattr(vars(trainer).get("args"), "__dataclass_fields__", ())


class Unread:
    """An attribute that other releases read and this one does not: setting it on a trainer of this package raises ConfigError.

    In a subclass it is an attribute like any other.
    """

    def __init__(self, advice: str) -> None:
        self.advice = advice

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        if self.name in vars(trainer):
            return vars(trainer)[self.name]
        raise AttributeError(f"{type(trainer).__name__} has no attribute {self.name!r}. {self.advice}")

    def __set__(self, trainer: Any, value: Any) -> None:
        if type(trainer).__module__.startswith("trl."):
            raise ConfigError(
                f"{type(trainer).__name__}.{self.name} cannot be set: nothing would read it. {self.advice}"
            )
        vars(trainer)[self.name] = value


class LossOption(Option):
    """An option that a trainer with a loss of its own may set to a value of its own, which that loss reads."""

    def __set__(self, trainer: Any, value: Any) -> None:
        if has_own_loss(trainer):
            vars(trainer)[self.name] = value
        else:
            super().__set__(trainer, value)


class Fact:
    """A property that a script may set to the value that it has. Raises ConfigError, with `advice`, for another one."""

    def __init__(self, advice: str = "") -> None:
        self.advice = advice

    def __call__(self, read: Callable[[Any], Any]) -> Fact:
        self.read, self.__doc__ = read, read.__doc__
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else self.read(trainer)

    def __set__(self, trainer: Any, value: Any) -> None:
        if value != self.read(trainer):
            raise ConfigError(
                f"{type(trainer).__name__}.{self.name} is {self.read(trainer)!r} and cannot be set to {value!r}.{self.advice}"
            )


class OfflineAttributes:
    """Attributes of offline trainers. Reading one whose option the configuration lacks raises AttributeError."""

    args: Any

    beta = LossOption()
    center_rewards_coefficient = LossOption()
    completion_only_loss = LossOption()
    cpo_alpha = LossOption()
    dataset_num_proc = LossOption()
    dataset_text_field = LossOption()
    desirable_weight = LossOption()
    f_divergence_type = LossOption()
    label_smoothing = LossOption()
    ld_alpha = LossOption()
    loss_type = LossOption()
    loss_weights = LossOption()
    max_length = LossOption()
    max_prompt_length = LossOption()
    max_seq_length = LossOption("max_length")
    model_adapter_name = LossOption()
    packing = LossOption()
    padding_free = LossOption()
    precompute_ref_log_probs = LossOption()
    ref_adapter_name = LossOption()
    simpo_gamma = LossOption()
    truncation_mode = LossOption()
    undesirable_weight = LossOption()
    use_weighting = LossOption()


class OnlineAttributes:
    """Attributes of online trainers. Reading one whose option the configuration lacks raises AttributeError."""

    args: Any
    sampler: Any
    rewards: Sequence[Reward]

    beta = LossOption()
    chat_template_kwargs = Option()
    entropy_coef = LossOption()
    epsilon_high = LossOption(otherwise="epsilon")
    epsilon_low = LossOption("epsilon")
    generation_kwargs = Option()
    importance_sampling_level = LossOption()
    log_completions = Option()
    log_unique_prompts = Option()
    loss_type = LossOption()
    mask_truncated_completions = Option()
    max_completion_length = Option()
    max_prompt_length = Option()
    min_p = Option()
    multi_objective_aggregation = Option()
    num_completions_to_print = Option()
    num_generations = Option()
    num_generations_eval = Option(otherwise="num_generations")
    num_iterations = Option()
    off_policy_mask_threshold = LossOption()
    pad_to_multiple_of = Option()
    repetition_penalty = Option()
    scale_rewards = Option()
    shuffle_dataset = Option()
    temperature = Option()
    top_entropy_quantile = LossOption()
    top_k = Option()
    top_p = Option()
    use_adaptive_entropy = LossOption()
    use_vllm = Option()
    vllm_gpu_memory_utilization = Option()
    vllm_mode = Option()
    vllm_tensor_parallel_size = Option()

    environments = Unread(NO_TOOLS)
    generation_config = Unread(SAMPLING)
    llm = Unread(ENGINE)
    sampling_params = Unread(SAMPLING)
    tools = Unread(NO_TOOLS)
    vllm_client = Unread(ENGINE)
    vllm_generation = Unread(ENGINE)

    @property
    def reward_funcs(self) -> list[Callable | nn.Module]:
        """The reward functions, and reward models as `nn.Module`s. Others may be set: as many as before keep the weights."""
        functions = [reward.function for reward in self.rewards]
        return [each.model if isinstance(each, RewardModel) else each for each in functions]

    @reward_funcs.setter
    def reward_funcs(self, functions: Any) -> None:
        made, before = make_rewards(functions), self.rewards
        self.sampler.rewards = made
        if len(made) == len(before):
            self.reward_weights = [reward.weight for reward in before]

    @property
    def reward_func_names(self) -> list[str]:
        """Names of the reward functions in logs."""
        return [reward.name for reward in self.rewards]

    @reward_func_names.setter
    def reward_func_names(self, names: Sequence[str]) -> None:
        self._set_each("name", names)

    @property
    def reward_weights(self) -> Tensor:
        """Weight of each reward function in the sum, `[functions]`."""
        return torch.tensor([reward.weight for reward in self.rewards])

    @reward_weights.setter
    def reward_weights(self, weights: Sequence[float] | Tensor) -> None:
        self._set_each("weight", [float(weight) for weight in weights])

    def _set_each(self, field: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.rewards):
            raise ConfigError(
                f"{len(values)} {field}s were given for {len(self.rewards)} reward functions: give one each."
            )
        pairs = zip(self.rewards, values, strict=True)
        self.sampler.rewards = [replace(reward, **{field: value}) for reward, value in pairs]
