"""Compatibility with scripts for other releases of TRL: old import paths work, removed names raise errors with advice.

from trl.trainer.utils import DataCollatorForCompletionOnlyLM       # works: the old path resolves to `trl`
from trl.experimental.cpo import CPOTrainer                         # works
from trl import BestOfNSampler                                      # ImportError with advice
class Mine(DPOTrainer): def dpo_loss(…)                             # ConfigError: this method is never called
class Mine(DPOTrainer): def _get_num_items_in_batch(…)              # ConfigError: nor is this one of `transformers.Trainer`
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, MethodType, ModuleType
from typing import Any

from trl.errors import ConfigError, suggest

PATHS = (
    "trl.chat_template_utils",
    "trl.commands",
    "trl.data_utils",
    "trl.distributed",
    "trl.env_utils",
    "trl.environment",
    "trl.environment.base_environment",
    "trl.experimental",
    "trl.extras",
    "trl.extras.best_of_n_sampler",
    "trl.extras.dataset_formatting",
    "trl.generation",
    "trl.import_utils",
    "trl.kernels",
    "trl.mergekit_utils",
    "trl.models.activation_offloading",
    "trl.models.auxiliary_modules",
    "trl.models.modeling_base",
    "trl.models.modeling_sd_base",
    "trl.models.modeling_value_head",
    "trl.models.sd_utils",
    "trl.models.selective_activation_checkpointing",
    "trl.models.utils",
    "trl.rewards.accuracy_rewards",
    "trl.rewards.format_rewards",
    "trl.rewards.other_rewards",
    "trl.scripts",
    "trl.trainer",
    "trl.utils",
)
"""Modules of other releases that do not exist here. Names imported from them, or their submodules, come from `trl`."""

MODULES = ("_config", "_trainer", "_utils", "callbacks", "cli", "core", "judges", "utils", "profiling", "vllm_client")
"""Endings of submodule names: `from trl.trainer import ppo_trainer` gives a module, other names are looked up in `trl`."""

METHODS = ("trl.experimental", "trl.scripts")
"""Packages in which every name is a submodule, one per method."""

_CLASSIC = """
DPOScriptArguments DpoScriptArguments RewardFunc RewardScriptArguments SFTScriptArguments SIMPLE_CHAT_TEMPLATE
SIMPLE_SFT_CHAT_TEMPLATE SftScriptArguments aesthetic_scorer build_bert_batch_from_txt conversations_formatting_function
init_zero_verbose is_bitsandbytes_available is_deepspeed_available is_diffusers_available
is_liger_kernel_available is_mergekit_available is_npu_available is_peft_available is_rich_available
is_unsloth_available is_vllm_available is_wandb_available is_xpu_available strtobool
"""
CLASSIC = frozenset(_CLASSIC.split())
"""Names of `trl.classic`, which scripts of other releases import."""

OBJECTIVE = "an algorithm of your own is a class with `advantages` and `loss`: see examples/own_algorithm.py."
PADDING = "trainers pad and mask by themselves: leave `data_collator` out."
REPORT = "`log_completions` logs completions, and every run writes a report with samples: see `trl report`."
BY_REWARD = (
    "`OnlineDPOTrainer` ranks completions by reward functions, or by `judge=`: a function of prompts and completions that "
    "returns the index of each prompt's best."
)
LOSS = "Override `loss(model, batch) -> (loss, metrics)`."
METRICS = "Return them from `loss`, or override `log(logs, start_time)`."
ROWS = "Change the rows of the dataset, or override `encode(rows, split, name)`."
SAMPLES = "Give an `engine`: see `trl.rollouts.engine`."
SCORES = "`score(model, batch)` computes log-probabilities: override `loss(model, batch) -> (loss, metrics)`."
SIX_LINES = "write it as a `transformers.TrainerCallback` of a few lines; `SyncRefModelCallback` does exist here."

SWEEP = "`trl sweep` searches hyperparameters, and makes a new model for each trial: see docs/coming_from_trl.md."
TOOLS = "tool calls are not supported yet; every online trainer takes an `engine` of your own."

_TOGETHER = {
    OBJECTIVE: (
        "A2POTrainer AsyncDistillationTrainer DPPOTrainer DistillationTrainer GFPOTrainer GKDTrainer GOLDTrainer "
        "GRPOWithReplayBufferTrainer IWOPDTrainer MiniLLMTrainer PAPOTrainer SDFTTrainer SDPOTrainer SSDTrainer "
        "ServerDistillationTrainer TPOTrainer"
    ),
    BY_REWARD: (
        "AllTrueJudge BaseBinaryJudge BaseJudge BasePairwiseJudge BaseRankJudge HfPairwiseJudge OpenAIPairwiseJudge PairRMJudge "
        "RandomPairwiseJudge RandomRankJudge"
    ),
    SIX_LINES: "BEMACallback MergeConfig MergeModelCallback",
    "trainers prepare the models that they are given by themselves: leave it out.": (
        "prepare_deepspeed prepare_fsdp prepare_peft_model"
    ),
    "give a `rollout_func`: see docs/scaling.md.": "generate_rollout_completions get_nemo_gym_rollout_func",
    PADDING: "DPODataCollatorWithPadding DataCollatorForPreference RewardDataCollatorWithPadding",
    "use `ScriptArguments`.": "GRPOScriptArguments KTOScriptArguments RLOOScriptArguments",
    REPORT: "LogCompletionsCallback WeaveCallback WinRateCallback",
    "use `OnlineDPOTrainer`.": "NashMDTrainer XPOTrainer",
    "tool calls are not supported yet; `PPOTrainer.step` trains on rollouts that your own loop produced.": (
        "TextEnvironment TextHistory"
    ),
    "tool calls are not supported yet.": "add_response_schema supports_tool_calling",
}
REMOVED = {name: advice for advice, names in _TOGETHER.items() for name in names.split()}
REMOVED |= {
    "AsyncGRPOTrainer": "use `GRPOTrainer`: an `engine` of your own may sample in other processes.",
    "BestOfNSampler": "sample with `LocalEngine` and `n=…`, and keep the best of each group.",
    "ConstantLengthDataset": "use `SFTConfig(packing=True)`, or `pack_dataset`.",
    "DDPOStableDiffusionPipeline": "it is a base class: use `DefaultDDPOStableDiffusionPipeline`.",
    "DataCollatorForChatML": "`SFTTrainer` takes `messages` as they are, and `assistant_only_loss=True`.",
    "DataCollatorForLanguageModeling": "import it from `transformers`; without a `data_collator`, trainers pad and batch rows by themselves.",
    "AdaptiveKLController": "set `adap_kl_ctrl=True`, `target` and `horizon` of `PPOConfig`.",
    "FDivergenceConstants": "give `f_divergence_type` and `f_alpha_divergence_coef` of `DPOConfig`.",
    "FixedKLController": "set `adap_kl_ctrl=False` and `init_kl_coef` of `PPOConfig`.",
    "FDivergenceType": "give `f_divergence_type` of `DPOConfig` as a str.",
    "GMPOTrainer": 'use `GRPOTrainer` with `GRPOConfig(loss_type="gmpo")`, and `epsilon=0.4`, as its paper has.',
    "IterativeSFTTrainer": "train an `SFTTrainer` on each round's rows.",
    "PPODecorators": "set `optimize_device_cache=True` of `PPOConfig`.",
    "PPOv2Trainer": "use `PPOTrainer`: it has the whole loop, `train()`.",
    "PRMTrainer": "use `RewardTrainer` with rows of `prompt`, `completions`, `labels`.",
    "PreTrainedModelWrapper": "it is a base class: use `AutoModelForCausalLMWithValueHead`.",
    "VLLMClient": "set `use_vllm=True` of the configuration: see docs/scaling.md.",
    "SUPPORTED_ARCHITECTURES": "value heads are added to every architecture of `transformers` that generates text.",
    "compute_accuracy": "`RewardTrainer` logs `accuracy` already.",
    "disable_dropout_in_model": "set `disable_dropout=True` of the configuration.",
    "enable_selective_activation_checkpointing": "set `gradient_checkpointing=True` of the configuration.",
    "generate_model_card": "every trainer writes one: `trainer.create_model_card()`.",
    "get_training_chat_template": "`assistant_only_loss=True` works with any chat template, unpatched.",
    "get_act_offloading_ctx_manager": "set `activation_offloading=True` of the configuration.",
    "pack_examples": "use `pack_dataset`, or `packing=True` of the configuration.",
    "peft_module_casting_to_bf16": "set `bf16=True` of the configuration: weights keep the dtype that they were loaded in.",
    "prepare_multimodal_messages": "rows with images are read as they are: see docs/vision.md.",
    "truncate_dataset": "set `max_length` of the configuration: trainers count truncated rows, and report them.",
    "unwrap_model_for_generation": "trainers gather sharded weights for sampling by themselves; elsewhere call `trainer.accelerator.unwrap_model(model)`.",
}
REMOVED |= {name.replace("Trainer", "Config"): advice for name, advice in REMOVED.items() if name.endswith("Trainer")}
"""Names of other releases that do not exist here, and what to use instead."""


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

_HOOKS = {
    LOSS: (
        "_compute_loss _compute_loss_liger bco_loss compute_liger_loss cpo_loss dpo_loss get_batch_loss_metrics "
        "get_high_entropy_mask get_off_policy_mask kto_loss odds_ratio_loss train_minibatch"
    ),
    METRICS: "_log_completion_extra _log_metric record_step_stats store_metrics",
    f"{OBJECTIVE[0].upper()}{OBJECTIVE[1:]}": "_kl_penalty compute_rewards",
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
    "_tune_save_checkpoint": f"{SWEEP[0].upper()}{SWEEP[1:]}",
    "call_model_init": f"{SWEEP[0].upper()}{SWEEP[1:]}",
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
    return advice and f" {advice[0].upper()}{advice[1:]}"


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
    return is_code and not found.__module__.startswith(("transformers.", "trl."))


class LegacyImportFinder(MetaPathFinder, Loader):
    """Import hook that creates the modules of `PATHS`, whose attributes are those of `trl`.

    Where a package lacks an attribute, `from package import name` tries to import it as a submodule, so this finder can raise
    an ImportError with advice. `hasattr` does not try that, and returns False.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if fullname in PATHS or (_is_old(parent) and (parent in METHODS or name.endswith(MODULES))):
            return ModuleSpec(fullname, self, is_package=True)
        if name.startswith("__") or not (_is_old(parent) or (parent in NEW and name in REMOVED)):
            return None
        raise ImportError(_not_here(parent, name), name=fullname)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "An import path of other releases. See `trl`."
        module.__dict__["__getattr__"] = names_for(module.__name__)


NEW = ("trl", "trl.models")
"""Existing packages from which scripts import names of other releases."""


def _is_old(module: str) -> bool:
    """True for modules that only scripts for other releases import from."""
    return any(module == old or module.startswith(f"{old}.") for old in (*PATHS, "trl.core"))


def _not_here(path: str, name: str) -> str:
    """Message for a name that does not exist here: what to use instead, or the most similar name."""
    if name in REMOVED:
        return f"trl.{name} is of another release of TRL and not in this one: {REMOVED[name]}"
    known = importlib.import_module("trl").__all__
    if not _is_old(path):
        return f"module {path!r} has no attribute {name!r}.{suggest(name, known)}"
    return (
        f"{path} is a path of other releases of TRL, and nothing here is called {name!r}.{suggest(name, known)} See "
        "docs/coming_from_trl.md."
    )


def missing(path: str, name: str) -> AttributeError:
    """The AttributeError that a module's `__getattr__` raises for a missing name."""
    return AttributeError(_not_here(path, name), name=name)


def names_for(path: str) -> Callable[[str], Any]:
    """Make a `__getattr__` for the module `path` that looks names up in `trl`."""

    def find(name: str) -> Any:
        trl = importlib.import_module("trl")
        if name in CLASSIC:
            return getattr(importlib.import_module("trl.classic"), name)
        if name.startswith("__") or name not in trl.__all__:
            raise missing(path, name)
        return getattr(trl, name)

    return find
