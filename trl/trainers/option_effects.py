"""Options that only have an effect together with another, and warnings for those that are set without it.

It is a warning and not an error, since one file may hold the settings of several runs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from trl.algorithms.dpo import LOSSES
from trl.option_bounds import unusual
from trl.option_types import library_kinds
from trl.trainers.sampler_options import USED

logger = logging.getLogger(__name__)

Condition = Callable[[Any], bool]

_OF_LOSSES = {
    option: [name for name, loss in LOSSES.items() if option in loss.options]
    for option in ("discopop_tau", "simpo_gamma", "alphapo_alpha")
}
"""Options of preference losses → the losses that read them."""

OF_VLLM = ("vllm_mode", "vllm_group_port", "vllm_structured_outputs_regex")
"""Options of vLLM besides those that its modes read."""

_CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "clip")


def _loss_is(*names: str) -> Condition:
    """Condition that `loss_type` is one of `names`; true for configurations with a single loss, which reads all options."""

    def is_one(config: Any) -> bool:
        if "loss_type" not in config.__dataclass_fields__:
            return True
        return not set(names).isdisjoint([config.loss_type] if isinstance(config.loss_type, str) else config.loss_type)

    return is_one


def _optimizer_is(*names: str) -> Condition:
    """Condition that the name of the optimizer contains one of `names`."""
    return lambda config: any(name in str(getattr(config.optim, "value", config.optim)) for name in names)


_CONDITIONS: list[tuple[str, Condition, str]] = [
    ("eval_steps", lambda c: c.eval_strategy == "steps", "eval_strategy='steps'"),
    ("eval_delay", lambda c: c.eval_strategy != "no", "eval_strategy"),
    ("save_total_limit save_only_model", lambda c: c.save_strategy != "no", "a save_strategy"),
    (
        "greater_is_better",
        lambda c: c.metric_for_best_model is not None or c.load_best_model_at_end,
        "metric_for_best_model",
    ),
    ("optim_target_modules", _optimizer_is("galore", "apollo"), "an optim of GaLore or APOLLO"),
    ("adam_beta1 adam_beta2", _optimizer_is("adam", "lion", "ademamix", "schedule_free"), "an optim of Adam's family"),
    ("adam_epsilon", _optimizer_is("adam", "ademamix", "schedule_free"), "an optim of Adam's family"),
    ("packing_strategy", lambda c: c.packing or bool(c.eval_packing), "packing=True"),
    ("eval_samples_max_new_tokens", lambda c: c.eval_samples > 0, "eval_samples"),
    ("ref_model_mixup_alpha ref_model_sync_steps", lambda c: c.sync_ref_model, "sync_ref_model=True"),
    ("precompute_ref_batch_size", lambda c: c.precompute_ref_log_probs, "precompute_ref_log_probs=True"),
    (
        "f_alpha_divergence_coef",
        lambda c: c.f_divergence_type == "alpha_divergence",
        "f_divergence_type='alpha_divergence'",
    ),
    *(
        (option, _loss_is(*losses), "loss_type=" + " or ".join(map(repr, losses)))
        for option, losses in _OF_LOSSES.items()
    ),
    ("cpo_alpha", lambda c: type(c).cpo_alpha is None or _loss_is("cpo")(c), "loss_type='cpo'"),  # None: CPOConfig
    (" ".join([*USED["server"], *USED["colocate"], *OF_VLLM]), lambda c: c.use_vllm, "use_vllm=True"),
    ("max_resampling", lambda c: c.zero_variance == "resample", "zero_variance='resample'"),
    ("num_completions_to_print log_unique_prompts", lambda c: c.log_completions, "log_completions=True"),
    ("epsilon", _loss_is(*_CLIPPED, "gmpo"), "a loss_type that clips ratios"),
    ("epsilon_high", _loss_is(*_CLIPPED, "gmpo", "cispo"), "a loss_type that clips ratios"),
    ("delta", _loss_is(*_CLIPPED), "a loss_type that clips ratios"),
    ("sapo_temperature_neg sapo_temperature_pos", _loss_is("sapo"), "loss_type='sapo'"),
    ("vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", _loss_is("vespo"), "loss_type='vespo'"),
    ("sync_ref_model", lambda c: "beta" not in c.__dataclass_fields__ or c.beta != 0, "beta above 0"),
    ("kl_estimator use_bias_correction_kl kl_in_reward", lambda c: c.beta > 0, "beta above 0"),
    (
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        lambda c: c.use_adaptive_entropy,
        "use_adaptive_entropy=True",
    ),
    (
        "importance_sampling_mode importance_sampling_clip_max importance_sampling_clip_min",
        lambda c: c.use_vllm if c.importance_sampling_correction is None else c.importance_sampling_correction,
        "importance_sampling_correction=True",
    ),
    ("liger_kernel_config", lambda c: c.use_liger_kernel, "use_liger_kernel=True"),
    (
        "lr_scheduler_kwargs",
        lambda c: c.lr_scheduler_type not in ("constant", "constant_with_warmup"),
        "a lr_scheduler_type that is not constant",
    ),
    ("target horizon", lambda c: c.adap_kl_ctrl, "adap_kl_ctrl=True"),
    ("target_kl", lambda c: c.early_stopping, "early_stopping=True"),
    ("compare_steps", lambda c: bool(c.push_to_hub_if_best_kwargs), "push_to_hub_if_best_kwargs"),
]
CONDITIONS = {name: (condition, words) for names, condition, words in _CONDITIONS for name in names.split()}
"""Option → the condition for its effect, and what to set to meet it."""


OF_IMAGES = {"max_pixels", "min_pixels", "image_folder", "image_features_mb", "adapted_part"}
"""Options that only have an effect with a processor that reads images."""


def warn_of_image_options(config: Any) -> None:
    """Warn of options for images that are set although the trainer has a tokenizer and no processor."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in sorted(defaults.keys() & OF_IMAGES):
        if (value := getattr(config, name)) != defaults[name]:
            logger.warning(
                f"{name}={value!r} has no effect with a tokenizer, which reads no images: leave it out, or give a model's "
                "processor."
            )


def set_in_vain(config: Any) -> list[str]:
    """A warning for every option of `config`, a dataclass, that differs from its default and has no effect."""
    said, known = [], library_kinds(type(config))
    for field in dataclasses.fields(config):
        condition, words = CONDITIONS.get(field.name, (None, "")) if field.name in known else (None, "")
        value = getattr(config, field.name, field.default)
        if condition is not None and value != field.default and not condition(config):
            said.append(f"{field.name}={value!r} has no effect without {words}: leave it out, or set that.")
    return said


def warn_of_options(config: Any) -> None:
    """Warn of options without effect and of unusual values, once for a configuration and its copies."""
    for sentence in (*unusual(config), *set_in_vain(config)):
        _say(config, sentence)


def ignore(config: Any, name: str, neutral: Any, reason: str) -> None:
    """Set an option that has no effect to its `neutral` value, and warn if it had another."""
    if (value := getattr(config, name)) != neutral:
        _say(config, f"{name}={value!r} has no effect: {reason}")
        setattr(config, name, neutral)


def _say(config: Any, sentence: str) -> None:
    said: set[str] = vars(config).setdefault("_said", set())
    if sentence not in said:
        said.add(sentence)
        logger.warning(sentence)
