"""Arguments of trainers and options of configurations in other releases of TRL and in `transformers` 4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trl.compat.advice import BY_REWARD, LOSS, REPORT, SWEEP, TOOLS, sentence
from trl.errors import ConfigError, suggest

_NO_LOGITS = (
    "trainers never compute the logits of all tokens at once, except for `compute_metrics` of `SFTTrainer`; trainers of preferences "
    "and rewards pass it rewards. "
    f"{LOSS} Metrics are averaged over the evaluation set and logged."
)
ARGUMENTS = dict.fromkeys(("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"), _NO_LOGITS)
ARGUMENTS |= dict.fromkeys(
    ("torch_dtype", "load_in_4bit", "load_in_8bit", "device_map"),
    "give it in `model_init_kwargs`, or load the model yourself.",
)
ARGUMENTS |= {
    "config": "use `args`.",
    "environment_factory": TOOLS,
    "judge": BY_REWARD,
    "model_init": f"give the model itself, or its name. {SWEEP}",
    "policy": "use `model`.",
    "ref_model": "online trainers take it as `reference`.",
    "ref_policy": "the reference is the model as it is before training.",
    "reward_model": "give it as one of `reward_funcs`.",
    "tools": TOOLS,
}
"""Arguments of trainers in other releases, and what to use instead."""

OPTIONS = {
    "generate_during_eval": REPORT,
    "local_rollout_forward_batch_size": "`max_tokens_per_micro_batch` bounds a forward pass.",
    "max_completion_length": "`max_length` bounds prompt and completion together, and `max_prompt_length` the prompt.",
    "max_target_length": "`max_length` bounds prompt and completion each, with an encoder-decoder.",
    "num_mini_batches": "set `mini_batch_size`: it divides a batch of `batch_size`.",
    "num_sample_generations": REPORT,
    "reward_model_path": "give the trainer `reward_funcs`, which may be names of models.",
    "sft_model_path": "give the trainer `model`: the reference is that model before training.",
    "stop_token": "responses end with the model's end-of-sequence tokens; `generation_kwargs` may name others.",
    "total_episodes": "set `max_steps` or `num_train_epochs`.",
}
_REGEX = "completions cannot be constrained to a regular expression: let a reward function check them."
OPTIONS |= dict.fromkeys(
    ("max_density_ratio", "min_density_ratio", "prompt_sample_size"),
    "`BCOTrainer` does not weigh prompts by the ratio of their densities: leave it out.",
)
OPTIONS |= {
    "kl_estimator": "set `kl_penalty`.",
    "normalize_reward": "set normalize_advantages=True.",
    "stop_token_id": OPTIONS["stop_token"],
    "token_level_kl": "the KL penalty is part of a completion's reward: leave it out.",
    "vllm_device": "set `vllm_mode`: vLLM runs on the GPUs of training or in a server. See docs/scaling.md.",
    "vllm_dtype": "vLLM computes in the dtype that the weights are saved in: leave it out.",
    "vllm_enable_prefix_caching": "vLLM chooses this by itself: leave it out.",
    "vllm_guided_decoding_regex": _REGEX,
    "whiten_rewards": "set normalize_advantages=True.",
}
OPTIONS |= {
    "adafactor": "set optim='adafactor'.",
    "dispatch_batches": "set it in `accelerator_config`.",
    "fp16_backend": "`transformers` 5 has PyTorch's autocast alone: leave it out.",
    "fsdp_min_num_params": "set `min_num_params` in `fsdp_config`.",
    "fsdp_transformer_layer_cls_to_wrap": "set `transformer_layer_cls_to_wrap` in `fsdp_config`.",
    "half_precision_backend": "`transformers` 5 has PyTorch's autocast alone: leave it out.",
    "include_inputs_for_metrics": "set include_for_metrics=['inputs'].",
    "jit_mode_eval": "`transformers` 5 has no tracing for evaluations: leave it out.",
    "optimize_cuda_cache": "set torch_empty_cache_steps=1.",
    "per_gpu_eval_batch_size": "set `per_device_eval_batch_size`.",
    "per_gpu_train_batch_size": "set `per_device_train_batch_size`.",
    "push_to_hub_model_id": "set `hub_model_id`.",
    "push_to_hub_organization": "set `hub_model_id`, with the organization before the slash.",
    "push_to_hub_token": "set `hub_token`.",
    "split_batches": "set it in `accelerator_config`.",
    "torchdynamo": "set `torch_compile` and `torch_compile_backend`.",
    "tpu_metrics_debug": "set debug='tpu_metrics_debug'.",
    "tpu_num_cores": "leave it out: the launcher sets the number of processes.",
    "use_ipex": "`transformers` 5 does not use this package: leave it out.",
    "use_legacy_prediction_loop": "`transformers` 5 has one loop: leave it out.",
}
"""Options of configurations in other releases of TRL and in `transformers` 4, and what to use instead."""
DEFAULTS = dict.fromkeys(("fp16_backend", "half_precision_backend", "vllm_device", "vllm_dtype"), "auto")
DEFAULTS |= {"kl_estimator": "k1", "vllm_enable_prefix_caching": True}
"""Values of `OPTIONS` that ask for nothing, besides None, False and 0."""

TRANSLATED = {
    "group_by_length": (True, "train_sampling_strategy", "group_by_length"),
    "use_flash_attention_2": (True, "attn_implementation", "flash_attention_2"),
}
"""Removed options → the value of each that is said otherwise now, by which option, and by which value of it."""
REFUSED = {"save_safetensors": (False, "weights are always saved as safetensors, so leave it out")}
"""Removed options → the value of each that is no longer supported, and what to do instead. Other values have no effect."""


def said_today(name: str, value: Any) -> tuple[str, Any] | None:
    """The option and the value that say today what `value` of a removed option said; None for all others."""
    was, today, now = TRANSLATED.get(name, (None, "", None))
    return (today, now) if today and value is was else None


def refuse_outdated(name: str, value: Any) -> None:
    """Raise ConfigError for a removed option with a value that is no longer supported."""
    refused, reason = REFUSED.get(name, (None, ""))
    if refused is not None and value is refused:
        raise ConfigError(f"{name}={value}: {reason}.")


def asks_for_nothing(name: str, value: Any) -> bool:
    """True if an option or argument of another release was given a value that turns it off, so that it can be ignored."""
    off = value is None or (isinstance(value, int) and not value)
    return name in ARGUMENTS | OPTIONS and (off or value == DEFAULTS.get(name))


def remedy(name: str, known: Iterable[str]) -> str:
    """End of an error message: what to use instead of a removed option or argument; else a similar name from `known`."""
    return advice_on(name) or suggest(name, known)


def advice_on(name: str) -> str:
    """What to use instead of a removed option or argument, as the end of an error message; "" for other names."""
    advice = (ARGUMENTS | OPTIONS).get(name, "")
    return advice and f" {sentence(advice)}"
