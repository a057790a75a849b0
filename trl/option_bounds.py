"""Valid ranges of numeric options, by name; a range holds for every configuration with an option of that name.

Values must be finite, except for the options in `UNBOUNDED`, where infinity turns a limit off. A value outside the valid
range is an error; one outside the usual range is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from trl.errors import ConfigError
from trl.option_types import library_kinds

LARGEST = 2**63 - 1
"""Largest integer that is accepted: that of 64 bits."""


@dataclass(frozen=True)
class Bound:
    """Valid range least ≤ value ≤ most; `above` makes it least < value, `below` value < most.

    usual   (low, high); a value outside of it gives a warning
    words   describes valid values in errors; by default, the range does
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    usual: tuple[float, float] | None = None
    words: str = ""

    def admits(self, value: float) -> bool:
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        """The range for error messages: `1 or more`, `more than 0`, `0 to 1`, `0 to below 1`, `more than 0, at most 1`."""
        if self.words:
            return self.words
        if self.most == math.inf:
            return f"more than {self.least:g}" if self.above else f"{self.least:g} or more"
        least = f"more than {self.least:g}, at most" if self.above else f"{self.least:g} to"
        return f"{least} {'below ' if self.below else ''}{self.most:,.10g}"


COUNT, NOT_NEGATIVE, POSITIVE = Bound(1), Bound(0), Bound(0, above=True)
SHARE, PROBABILITY, NOT_ZERO_SHARE = Bound(0, 1), Bound(0, 1, below=True), Bound(0, 1, above=True)

UNBOUNDED = ("max_grad_norm", "ratio_threshold", "importance_sampling_clip_max", "delta", "target_kl", "clip_ratio")

SHARES = {"warmup_ratio": "warmup_steps"}
"""Older options that hold a share of all steps → today's, which hold a share below 1, and a number of steps from 1 on."""


def check_share(name: str, value: Any) -> None:
    """Raises ConfigError for an older option whose value, a share, would be read as a number of steps today."""
    if name in SHARES and isinstance(value, Real) and value >= 1:
        raise ConfigError(
            f"{name}={value:g} has to be a share of all steps, below 1: for a number of steps, give {SHARES[name]}."
        )


_NAMES = {
    COUNT: """
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps batch_size mini_batch_size
        forward_batch_size ppo_epochs dataset_num_proc max_tokens_per_micro_batch max_skipped_steps
        eval_accumulation_steps precompute_ref_batch_size ddp_timeout pad_to_multiple_of n_improve_steps compare_steps
        max_new_tokens num_generations num_generations_eval num_iterations steps_per_generation raters_per_item limit
        num_inference_steps num_inference_steps_eval noise_levels sample_batch_size vae_batch_size
        max_steps_per_micro_batch max_length max_prompt_length max_pixels min_pixels generation_batch_size num_prompts
        vllm_max_model_length vllm_tensor_parallel_size max_completion_length height width max_sequence_length
        per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count ref_model_sync_steps
        steps_for_target_q_sync eval_samples_max_new_tokens num_epochs save_freq num_checkpoint_limit log_image_freq
        max_workers sample_num_steps sample_num_batches_per_epoch train_batch_size train_num_inner_epochs
        train_gradient_accumulation_steps num_processes
    """,
    NOT_NEGATIVE: """
        num_train_epochs weight_decay warmup_steps max_grad_norm adam_epsilon eval_delay save_total_limit
        dataloader_num_workers cpo_alpha center_rewards_coefficient mistakes_shown max_resampling
        num_completions_to_print neftune_noise_alpha epsilon epsilon_high logging_steps save_steps eval_steps
        picture_steps num_pictures old_decay_rate beta init_kl_coef vf_coef rpo_alpha simpo_gamma missing_eos_penalty
        router_aux_loss_coef image_features_mb num_value_layers entropy_coef_delta entropy_target
        off_policy_mask_threshold importance_sampling_clip_min guidance_scale min_new_tokens eval_samples
        desirable_weight undesirable_weight cql_scale awac_scale
    """,
    POSITIVE: """
        reward_timeout horizon target ratio_threshold sapo_temperature_neg sapo_temperature_pos max_waiting
        max_request_tokens max_request_megabytes max_request_pixels request_timeout rollout_request_timeout
        vllm_server_timeout cliprange cliprange_value score_clip discopop_tau vespo_k_pos vespo_k_neg
        vespo_lambda_pos vespo_lambda_neg importance_sampling_clip_max advantage_clip clip_range
    """,
    PROBABILITY: "adam_beta1 adam_beta2 label_smoothing_factor ema_decay old_decay_max",
    SHARE: "gamma lam tau alpha start_percentile end_percentile ld_alpha",
    NOT_ZERO_SHARE: """
        timestep_fraction train_timestep_fraction nft_beta vllm_gpu_memory_utilization ref_model_mixup_alpha
        top_entropy top_entropy_quantile
    """,
}
BOUNDS = {name: bound for bound, names in _NAMES.items() for name in names.split()} | {
    "learning_rate": Bound(0, usual=(1e-8, 1e-1)),
    "seed": Bound(0, 2**32 - 1),
    "data_seed": Bound(0, 2**32 - 1),
    "max_steps": Bound(-1),
    "delta": Bound(1, above=True, words="more than 1: at 1, positive advantages would have no gradient"),
    "label_smoothing": Bound(
        0,
        0.5,
        below=True,
        words="a probability of wrong labels below 0.5: at 0.5 they say nothing, and nothing is trained",
    ),
    "noise_level": Bound(0, above=True, words="more than 0: steps without noise have no likelihood to train on"),
    "vllm_server_port": Bound(1, 65535),
    "temperature": Bound(0, words="0 (the most likely token) or a positive number"),
    "top_k": Bound(0, words="a count of tokens, or 0 for all"),
    "top_p": Bound(0, 1, above=True, words="a probability above 0 and up to 1"),
    "min_p": Bound(0, 1, words="a fraction from 0 to 1"),
    "repetition_penalty": Bound(0, above=True, words="a positive number (1 is no penalty)"),
    "port": Bound(0, 65535, words="0 (a free one) to 65535"),
    "every": Bound(1, words="at least 1 second"),
}
"""Valid range of each option, by name. Configurations check limits that only one method has themselves."""


WEIGHTS = (("loss_weights",), ("reward_weights",), ("desirable_weight", "undesirable_weight"))
"""Groups of loss weights: if all weights of a group are 0, the loss is constant."""


def check_bounds(config: Any) -> None:
    """Raise ConfigError for options of the dataclass `config` that are out of range, or of another type than a number."""
    check_numeric(config)
    own = library_kinds(type(config))
    for name in own:
        for value in numbers_in(getattr(config, name, None)):
            check_number(name, value)
    for names in WEIGHTS:
        weights = [*numbers_in([getattr(config, name, None) for name in names if name in own])]
        if weights and not any(weights):
            raise ConfigError(f"{' and '.join(names)}: every weight is 0, so nothing is trained. Set one above 0.")


def check_numeric(config: Any) -> None:
    """Raise ConfigError for text in place of a number, and for a fraction in place of a whole number."""
    for name, kind in library_kinds(type(config)).items():
        given = getattr(config, name, None)
        numeric = {"int", "float"} & {*kind.scalars, *(kind.item.scalars if kind.item else ())}
        invalid = kind.invalid_items(given) if numeric and not kind.choices else []
        if any(isinstance(value, str) for value in invalid):
            raise ConfigError(f"{name}={given!r} is text: give {kind}.")
        if any(isinstance(value, float) and not value.is_integer() for value in invalid):
            raise ConfigError(f"{name}={given!r}: give {kind}.")


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers in an option's value, which may be a number or nested lists of them."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield value


def check_number(name: str, value: float) -> None:
    """Raise ConfigError if `value` is out of range for the option `name`."""
    if not isinstance(value, Real):
        raise ConfigError(f"{name}={value!r}: give a number.")
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or name not in UNBOUNDED):
        raise ConfigError(f"{name}={value}: give a finite number.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{name} is an integer of {value.bit_length()} bits: give one below 2^63.")
    bound = BOUNDS.get(name)
    if bound is not None and not bound.admits(value):
        raise ConfigError(f"{name}={value}: give {bound}.")


def unusual(config: Any) -> list[str]:
    """Warnings, one per numeric option of the dataclass `config` that is outside its usual range."""
    said = []
    for name, bound in ((name, BOUNDS[name]) for name in library_kinds(type(config)) if name in BOUNDS):
        for value in numbers_in(getattr(config, name, None) if bound.usual else None):
            low, high = bound.usual
            if value and not low <= value <= high:
                said.append(
                    f"{name}={value:g} is outside the usual range, {low:g} to {high:g}: is the minus sign of its exponent missing?"
                )
    return said
