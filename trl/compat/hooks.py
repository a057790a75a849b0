"""Methods of trainers that other releases of TRL or `transformers.Trainer` call, and trainers of this release do not."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

from trl.compat.advice import LOSS, METRICS, OBJECTIVE, ROWS, SAMPLES, SCORES, SWEEP, sentence
from trl.errors import ConfigError

_HOOKS = {
    LOSS: (
        "_compute_loss _compute_loss_liger bco_loss compute_liger_loss cpo_loss dpo_loss get_batch_loss_metrics "
        "get_high_entropy_mask get_off_policy_mask kto_loss odds_ratio_loss train_minibatch"
    ),
    METRICS: "_log_completion_extra _log_metric record_step_stats store_metrics",
    sentence(OBJECTIVE): "_kl_penalty compute_rewards",
    SAMPLES: "_generate _generate_single_turn _tool_call_loop generate_from_model",
    SCORES: (
        "_compute_kl_logps _get_per_token_logps _get_per_token_logps_and_entropies batched_forward_pass "
        "compute_ref_log_probs compute_reference_log_probs concatenated_forward get_batch_logps"
    ),
    ROWS: "_prepare_dataset _tokenize_prompts build_tokenized_answer concatenated_inputs process_row tokenize_row",
}
HOOKS = {name: advice for advice, names in _HOOKS.items() for name in names.split()}
HOOKS |= {
    "_calculate_rewards": "Give `reward_funcs`.",
    "_generate_and_score_completions": f"{SAMPLES} Advantages are computed by an algorithm: see examples/own_algorithm.py.",
    "_get_num_items_in_batch": "Override `weights(batch)`, which returns the weights of the losses.",
    "_prepare_input": "Override `collate(items)`, which makes a batch.",
    "_set_signature_columns_if_needed": ROWS,
    "_tune_save_checkpoint": sentence(SWEEP),
    "call_model_init": sentence(SWEEP),
    "create_optimizer_and_scheduler": "Override `create_optimizer` or `create_scheduler`, or give `optimizers`.",
}
"""Methods that trainers of other releases or `transformers.Trainer` call, but those of this release do not, and what to override
or pass instead. `uncalled` of a trainer class adds its own."""
ATTRIBUTES = dict.fromkeys(("_metrics", "_stored_metrics"), METRICS)
"""Attributes that trainers of other releases have, and what to do instead of reading them."""
SAMPLER = {
    "_get_train_sampler": (
        "Prompts are drawn in random order, or in that of the dataset with shuffle_dataset=False: set that, and sort the dataset."
    )
}
"""Like `HOOKS`, for online trainers."""


def reject_unused_overrides(cls: type, hooks: Mapping[str, str]) -> None:
    """Raise ConfigError if a trainer class overrides a method in `HOOKS` or `hooks`, which nothing would call.

    A function that a script has set as an attribute of a class of this package counts, too.
    """
    for name in sorted(HOOKS.keys() | hooks.keys()):
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is not None and (_is_of_a_script(owner) or _is_of_a_script(vars(owner)[name])):
            reject_unused(cls, name, hooks)


def reject_unused(cls: type, name: str, hooks: Mapping[str, str]) -> None:
    """Raise ConfigError if nothing would call a method of this name: see `HOOKS`."""
    if advice := HOOKS.get(name) or hooks.get(name):
        raise ConfigError(f"{cls.__name__}.{name} would never be called by this release of TRL. {advice}")


def _is_of_a_script(found: Any) -> bool:
    """Whether a class or function was written outside of `trl` and `transformers`; False for anything else."""
    is_code = isinstance(found, type | FunctionType | MethodType)
    return is_code and not str(found.__module__).startswith(("transformers.", "trl."))
