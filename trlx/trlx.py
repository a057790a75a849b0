"""`train`: online reinforcement learning, offline reinforcement learning, or fine-tuning, depending on its arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.errors import ConfigError, DataError
from trlx.data.configs import TRLConfig
from trlx.data.default_configs import default_ilql_config, default_ppo_config, default_sft_config
from trlx.trainer.options import max_new_tokens, processes
from trlx.utils import set_seed
from trlx.utils.loading import get_trainer


def train(
    model_path: Any = None,
    reward_fn: Callable | None = None,
    dataset: tuple[Sequence[Any], Sequence[Any]] | None = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[Any] | None = None,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    metric_fn: Callable[..., Mapping[str, Sequence[float]]] | None = None,
    config: TRLConfig | None = None,
    stop_sequences: Sequence[str] | None = None,
) -> Any:
    """Train a language model, and return the trainer.

    Online, with `reward_fn`: sample completions of `prompts`, and learn from their rewards (PPO, RFT). Offline, with
    `samples` and `rewards`: ILQL. With `samples` alone: fine-tuning.

    model_path       name or folder of a model, or a `PretrainedConfig`; replaces that of `config`
    reward_fn        (samples, prompts, outputs, tokenizer, **columns) -> one number per sample, or one list per sample with
                     a reward for each token of its output
    samples          texts, or dialogues: lists in which prompts and outputs alternate
    rewards          one number per sample, or one list per sample with a number for each token of its outputs
    prompts          texts, or dicts with `prompt` and further columns; by default the BOS token
    eval_prompts     prompts for evaluation; by default the first batch of `prompts`
    metric_fn        (samples, prompts, outputs, **columns) -> {name: one number per sample}, in evaluation
    config           by default that of the chosen method, see `trlx.data.default_configs`
    stop_sequences   texts at which outputs end

    Raises ConfigError or DataError, which are ValueErrors, for arguments that are invalid or in conflict.
    """
    if dataset is not None:
        warnings.warn(
            "dataset=(samples, rewards) is deprecated: give samples and rewards.", FutureWarning, stacklevel=2
        )
        samples, rewards = dataset
    for name, function in (("reward_fn", reward_fn), ("metric_fn", metric_fn)):
        if function is not None and not callable(function):
            raise ConfigError(f"{name} is a {type(function).__name__}: give a function.")
    texts = {"samples": samples, "prompts": prompts, "eval_prompts": eval_prompts, "stop_sequences": stop_sequences}
    for name, given in texts.items():
        if isinstance(given, str):
            raise DataError(f"{name} is one text, {given!r:.60}: give a list of them.")
    _check(reward_fn, samples, rewards, prompts)
    config = _config(config, reward_fn, rewards)
    if model_path is not None:
        config = config.evolve(model={"model_path": model_path})
    set_seed(config.train.seed)
    trainer = get_trainer(config.train.trainer)(
        config=config,
        reward_fn=reward_fn,
        metric_fn=metric_fn,
        stop_sequences=stop_sequences,
        **config.train.trainer_kwargs,
    )
    _add_data(trainer, samples, rewards, prompts, eval_prompts)
    trainer.learn()
    return trainer


def _check(reward_fn: Any, samples: Any, rewards: Any, prompts: Any) -> None:
    if reward_fn is not None and rewards is not None:
        raise ConfigError(
            "reward_fn and rewards are both given: give reward_fn to train online, or rewards with samples to train offline."
        )
    if rewards is not None and samples is None:
        raise ConfigError("rewards are given without samples: give the samples that they belong to.")
    if reward_fn is not None and samples is not None:
        raise ConfigError(
            "reward_fn and samples are both given: give reward_fn with prompts to train online, or samples to train offline."
        )
    if reward_fn is None and samples is None:
        raise ConfigError(
            "Neither reward_fn nor samples is given: give reward_fn to train online, or samples to train offline."
        )
    if rewards is not None and len(samples) != len(rewards):
        raise DataError(
            f"{len(samples)} samples and {len(rewards)} rewards were given: give one reward for each sample."
        )
    if prompts is not None and not len(prompts):
        raise DataError("prompts is empty: give at least one, or leave it out.")


def _config(config: TRLConfig | None, reward_fn: Any, rewards: Any) -> TRLConfig:
    if config is not None:
        if not isinstance(config, TRLConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}: give a TRLConfig, which TRLConfig.from_dict(…) and TRLConfig.load_yaml(…) "
                "make."
            )
        return config
    defaults = (
        default_ppo_config if reward_fn is not None else default_sft_config if rewards is None else default_ilql_config
    )
    warnings.warn(f"config is not given: {defaults.__name__}() is used.", stacklevel=3)
    return defaults()


def _add_data(trainer: Any, samples: Any, rewards: Any, prompts: Any, eval_prompts: Any) -> None:
    """Give the trainer its prompts or samples, and evaluation prompts; check that seq_length leaves room for a prompt."""
    config = trainer.config
    room = config.train.seq_length - max_new_tokens(config.method.gen_kwargs)
    if room < 1:
        raise ConfigError(
            f"train.seq_length={config.train.seq_length} leaves no token for a prompt, with method.gen_kwargs.max_new_tokens="
            f"{max_new_tokens(config.method.gen_kwargs)}: raise the first, or lower the second."
        )
    tokenizer = trainer.tokenizer
    batch = config.train.batch_size * processes()
    beginnings = [tokenizer.bos_token or tokenizer.eos_token] * batch
    if samples is None:
        prompts = beginnings if prompts is None else prompts
        trainer.add_prompts(prompts, room)
        beginnings = list(prompts)[:batch]
    else:
        trainer.add_samples(samples, rewards)
    trainer.add_eval_prompts(beginnings if eval_prompts is None else eval_prompts, room)
