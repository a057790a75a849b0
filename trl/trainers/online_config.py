"""Options shared by the online trainers, which train on completions that they sample."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import GenerationConfig

from trl.errors import ConfigError, suggest
from trl.rollouts.engine import RolloutEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.config import ReferenceConfig
from trl.trainers.rollout_options import RolloutOptions
from trl.trainers.sampler_options import SamplerOptions
from trl.types import Algorithm

AVERAGING = {"token": "token", "sequence": "sequence", "constant": "sequence", "sum": "sequence"}
"""`loss_aggregation` → how an accumulation window is averaged. "constant" and "sum" also scale each completion's loss."""

LossAggregation = Literal["token", "sequence", "constant", "sum"]

ALIASES = {
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
    "vllm_importance_sampling_correction": "importance_sampling_correction",
    "vllm_importance_sampling_mode": "importance_sampling_mode",
    "vllm_importance_sampling_clip_max": "importance_sampling_clip_max",
    "vllm_importance_sampling_cap": "importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min": "importance_sampling_clip_min",
    "vllm_max_model_len": "vllm_max_model_length",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "cache_implementation": "",
    "ds3_gather_for_generation": "",
    "log_multimodal": "",
    "use_transformers_continuous_batching": "",
    "transformers_continuous_batching_config": "",
    "use_transformers_paged": "",
}

NAMES = {"stop_strings": "stop"}
"""Options of `GenerationConfig` → the fields of `SamplingParams` with the same meaning."""


@dataclass
class OnlineConfig(RolloutOptions, SamplerOptions, ReferenceConfig):
    """Options of `OnlineTrainer`. Batch sizes count completions."""

    ALIASES: ClassVar[dict[str, str]] = {**ReferenceConfig.ALIASES, **ALIASES}

    max_completion_length: int | None = 512
    """Most tokens per completion. None: as many as fit into the model's context after the prompt."""

    num_generations_eval: int | None = None
    """Completions of each prompt in evaluation. None: as in training."""

    generation_batch_size: int | None = None
    """Completions of a rollout batch, over all processes. None: computed from `steps_per_generation`."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in training. 0: sampling is greedy, and training uses 1."""

    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum."""

    top_k: int | None = 0
    """Sample among this many most likely tokens; 0 or None: among all."""

    min_p: float | None = None
    """Sample only tokens at least this fraction as likely as the most likely one."""

    repetition_penalty: float = 1.0
    """Above 1: tokens that already occur in the text become less likely to be sampled."""

    stop_strings: list[str] | None = None
    """Texts that end a completion; they are kept at its end."""

    generation_kwargs: dict[str, Any] | str | None = None
    """Further sampling options: fields of `SamplingParams` (stop, min_new_tokens, …) or of `GenerationConfig`."""

    chat_template_kwargs: dict[str, Any] | str | None = None
    """Extra variables for the chat template."""

    on_reward_error: Literal["stop", "drop"] = "stop"
    """When a reward function fails: "stop" the run, or "drop" the completion from training and count it."""

    missing_eos_penalty: float | None = None
    """Subtract this from the reward of completions that were cut at the length limit."""

    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: "keep" them, "drop" them (not trained on), or "resample": replace them by groups
    of fresh prompts (dynamic sampling, DAPO, arXiv:2503.14476)."""

    max_resampling: int = 4
    """Most rounds of fresh prompts per rollout batch, with zero_variance="resample"."""

    mask_truncated_completions: bool = False
    """Do not train on completions that were cut at the length limit. Their rewards still count in their group's mean."""

    loss_aggregation: LossAggregation = "token"
    """Average the loss over all tokens ("token") or over sequences ("sequence"), or sum it over each completion's tokens
    and divide by the number of sequences ("sum"), or by that times max_completion_length ("constant", arXiv:2503.20783)."""

    recompute_old_logprobs: bool = False
    """Compute the old policy's log-probabilities with the model, instead of using those that the sampler returns."""

    log_completions: bool = False
    """At every log, show completions with their rewards, and write them to output_dir/completions as parquet."""

    num_completions_to_print: int | None = None
    """Completions shown in the terminal. None: all."""

    log_unique_prompts: bool = False
    """Log only one completion of each prompt."""

    log_completions_hub_repo: str | None = None
    """Not available in this version: the files in output_dir/completions can be uploaded."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *ReferenceConfig._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse("log_completions_hub_repo")
        self.refuse_options_of_rows()
        self.check_sampler()
        self.check_batches()
        limit = self.max_completion_length
        self.sampling_params(max_new_tokens=sys.maxsize if limit is None else limit, seed=self.seed)

    def make_algorithm(self) -> Algorithm:
        """The algorithm that these options describe."""
        raise ConfigError("OnlineTrainer needs algorithm=…: an object with the methods advantages and loss.")

    def make_engine(self, model: nn.Module, processor: Any, *, progress: bool) -> RolloutEngine:
        """Create the engine that these options ask for: the model itself, vLLM in this process, or servers."""
        return self.make_sampler(model, processor, temperature=self.temperature, progress=progress)

    def sampling_params(self, *, max_new_tokens: int, seed: int) -> SamplingParams:
        """The sampling parameters. Raises ConfigError for options that are unknown or out of range."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "stop": self.stop_strings,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        options = {NAMES.get(name, name): value for name, value in (self.generation_kwargs or {}).items()}
        known = {field.name for field in fields(SamplingParams)}
        further = {name: options.pop(name) for name in [*options] if name not in known}
        options = {name: value for name, value in options.items() if value is not None}
        config = GenerationConfig()
        for name in config.update(**further):
            near = suggest(name, [*known, *config.to_dict()])
            raise ConfigError(f"generation_kwargs: neither SamplingParams nor GenerationConfig has {name!r}.{near}")
        return SamplingParams(**{**given, **({"generation_config": config} if further else {}), **options})

    @property
    def reads_sampler_logprobs(self) -> bool:
        """Whether the loss depends on the log-probabilities that come with the samples."""
        return not (self.is_on_policy or self.recompute_old_logprobs)

    @property
    def minibatches_per_rollout_batch(self) -> int:
        """Number of minibatches in a rollout batch, on each process."""
        if self.generation_batch_size is None:
            return super().minibatches_per_rollout_batch
        together = self.per_device_train_batch_size * self.world_size
        minibatches, rest = divmod(self.generation_batch_size, together)
        if rest or self.steps_per_generation not in (None, minibatches):
            raise ConfigError(
                f"generation_batch_size={self.generation_batch_size} has to be per_device_train_batch_size × processes × "
                f"steps_per_generation ({self.per_device_train_batch_size} × {self.world_size} × "
                f"{self.steps_per_generation or 'a whole number'}): leave one of them out."
            )
        return minibatches
